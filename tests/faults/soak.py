"""A long run must take no more of the machine at its end than at its beginning: descriptors,
threads, memory, files.
"""

import json
import os
import re
import statistics
from functools import partial
from pathlib import Path

import train

from .harness import Child, Report, bad_end, before_call, fault

STEPS_PER_TRY, STEPS_PER_LOOK, WARM = 500, 100, 150
MODEL = dict(n_layer=1, n_embd=16, n_hidden=16, block_size=8, batch_size=2)
MODEL |= dict(save_interval=10, keep=3, eval_interval=100, eval_iters=2, log_interval=10)
DRIFT = 0.01  # of the memory, over the second half of the run
LONG = 10  # tries; memory is only compared in a run that is longer, in which it has settled


@fault("10,000 steps with a save at each tenth", whole=20, few=1)
def soak(report: Report, tries: int, folder: Path) -> None:
    """One run, of which each try is 500 steps."""
    out, looks = folder / "run", folder / "looks"
    before = partial(look_often, out, looks)
    ended = Child(out, before, max_iters=STEPS_PER_TRY * tries, **MODEL).end(60 * tries)
    seen = [json.loads(line) for line in looks.read_text().splitlines()]
    memory = [look.pop("memory") for look in seen]
    warm = seen[0] | {"checkpoints": MODEL["keep"], "unfinished": 0}
    half = memory[len(memory) // 2 :]
    quarter = max(1, len(half) // 4)
    drift = statistics.median(half[-quarter:]) / statistics.median(half[:quarter]) - 1
    per_try = STEPS_PER_TRY // STEPS_PER_LOOK
    for i in range(tries):
        here = seen[i * per_try : (i + 1) * per_try]
        other = [f"{look}, at first {warm}" for look in here if look != warm]
        failure = bad_end(ended) or (other[0] if other else "")
        if not here:
            failure = failure or "nobody looked"
        if i == tries - 1 > LONG and abs(drift) > DRIFT:
            failure = failure or f"memory {drift:+.1%}"
        report.count(f"500 steps from {i * STEPS_PER_TRY}", failure)
    report.note = (
        f"{warm['descriptors']} descriptors, {warm['threads']} threads, {warm['files']} files, "
        f"memory {drift:+.2%} of {statistics.median(half) / 2**20:.0f} MB"
    )


def look_often(out: Path, looks: Path) -> None:
    """In a child: writes a line into `looks` every STEPS_PER_LOOK steps, from the step WARM on."""

    def look(data, step, *_):
        if step >= WARM and step % STEPS_PER_LOOK == WARM % STEPS_PER_LOOK:
            with open(looks, "a") as file:
                file.write(json.dumps(look_at(out)) + "\n")

    before_call(train, "batch", look)


def look_at(out: Path) -> dict[str, int]:
    """What this process holds, and what is in the folder of its run."""
    names = [path.name for path in out.iterdir()]
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(names),
        "checkpoints": sum(bool(re.fullmatch(r"ckpt_\d+\.pt", name)) for name in names),
        "unfinished": sum(name.endswith(".tmp") for name in names),
        "memory": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
    }
