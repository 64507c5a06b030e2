"""Where the time of the optimizer steps goes, with profile=N: a table, and a trace to look into."""

import gzip
import os
import tempfile
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

from torch.autograd import DeviceType
from torch.profiler import profile, schedule

from config.command import warn
from data.files import write_atomically
from run.setup import Run

TRACE_FILE = "trace.json.gz"
WARM_UP = 3  # steps before those that are recorded: the first ones are slower


class Profiler:
    """Records `profile` steps of main, and what lies between them; none with profile=0. They take
    longer, but the training stays the same bit for bit. A failure is a warning."""

    def __init__(self, run: Run, say: Callable[[str], None]):
        self.run, self.say, self.recorder = run, say, None
        if run.config.profile and run.ranks.is_main:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it prints its inner stages
            plan = schedule(wait=0, warmup=WARM_UP, active=run.config.profile, repeat=1)
            self.recorder = profile(schedule=plan)
            self.recorder.start()

    def step(self) -> None:
        """To be called after each optimizer step."""
        if self.recorder is not None:
            self.recorder.step()
            if self.recorder.step_num == WARM_UP + self.run.config.profile:
                self.stop()

    def stop(self) -> None:
        """To be called when the run ends, too: what there is, is printed and written."""
        if self.recorder is None:
            return
        recorder, self.recorder = self.recorder, None
        recorder.stop()
        count, last = recorder.step_num - WARM_UP, self.run.step
        if count < 1:
            warn(f"nothing is profiled: the run ended in its first {WARM_UP} steps, the warm-up")
            return
        steps, path = f"steps {last - count + 1} to {last}", self.run.folder / TRACE_FILE
        try:
            self.say(f"the costliest operators of {steps}:\n{costliest(recorder, count)}")
            self.run.lock.check()
            write_atomically(path, lambda file: file.write(trace(recorder)))
            self.say(f"{path} has all of {steps}: https://ui.perfetto.dev opens it")
        except Exception as error:  # PyTorch raises several kinds, the disk OSError
            warn(f"{path} could not be made ({error!r:.300}); the run does not need it")


def trace(recorder: profile) -> bytes:
    """What the recorder has seen, as a Chrome trace, compressed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(file))
        text = file.read_bytes()
    if not text.rstrip().endswith(b"}"):  # PyTorch does not tell
        raise OSError("only a part of it could be written: is the disk full?")
    return gzip.compress(text)


def costliest(recorder: profile, steps: int) -> str:
    """A table of the ten operators that took most time themselves, without those that they called:
    of the GPU, or of the CPU if none is recorded."""
    seen = [e for e in recorder.key_averages() if not e.is_user_annotation]
    operators = [event for event in seen if event.device_type == DeviceType.CPU]
    on_gpu = any(event.self_device_time_total for event in operators)
    own = attrgetter(f"self_{'device' if on_gpu else 'cpu'}_time_total")  # microseconds
    whole, lines = sum(map(own, operators)), [" ms/step  share  calls/step  operator"]
    for event in sorted(operators, key=own, reverse=True)[:10]:
        ms, share, calls = own(event) / 1000 / steps, own(event) / whole, event.count / steps
        lines.append(f"{ms:8.2f}  {share:5.1%}  {calls:10,.0f}  {event.key:.48}")
    return "\n".join(lines)
