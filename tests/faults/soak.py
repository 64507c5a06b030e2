"""A long run takes no more of the machine at its end than at its beginning: descriptors, threads, memory, files."""

import json
import os
import re
import statistics
from functools import partial
from pathlib import Path

import train

from .harness import Child, Report, command, fault, words

STEPS_PER_TRY, STEPS_PER_LOOK, WARM = 500, 100, 150
MODEL = {"n_layer": 1, "n_embd": 16, "n_hidden": 16, "block_size": 8, "batch_size": 2, "save_interval": 10, "keep": 3,
         "eval_interval": 100, "eval_iters": 2, "log_interval": 10}
DRIFT = 0.01  # of the memory, over the second half of the run


@fault("10,000 steps with a save at each tenth", whole=20, few=1)
def soak(tries: int, folder: Path) -> Report:
    """One run, of which each try is 500 steps. Memory is looked at in a run that is long enough to be warm."""
    data, report, out = words(folder), Report(), folder / "run"
    child = Child(command(out, max_iters=STEPS_PER_TRY * tries, **MODEL), data,
                  partial(look_often, out, folder / "looks"))
    code, text = child.wait(60 * tries), child.text()
    looks = [json.loads(line) for line in (folder / "looks").read_text().splitlines()]
    memory = [look.pop("memory") for look in looks]
    warm = looks[0] | {"checkpoints": MODEL["keep"], "unfinished": 0}
    half = memory[len(memory) // 2:]
    part = max(1, len(half) // 4)
    drift = statistics.median(half[-part:]) / statistics.median(half[:part]) - 1
    for i in range(tries):
        here = looks[i * STEPS_PER_TRY // STEPS_PER_LOOK:(i + 1) * STEPS_PER_TRY // STEPS_PER_LOOK]
        failure = next((f"{look}, at first {warm}" for look in here if look != warm), "" if here else "no look at it")
        if code or i == tries - 1 and tries > 10 and abs(drift) > DRIFT:
            failure = failure or f"exit code {code}, memory {drift:+.1%}: {text[-500:]}"
        report.count(failure)
    report.note = (f"{warm['descriptors']} descriptors, {warm['threads']} threads, {warm['files']} files, memory "
                   f"{drift:+.2%} of {statistics.median(half) / 2**20:.0f} MB")
    return report


def look_often(out: Path, looks: Path) -> None:
    """In a child: every STEPS_PER_LOOK steps, from the step WARM on, a line in `looks` with what it takes up."""
    make_batch = train.batch

    def batch(data, step, *rest):
        if step >= WARM and step % STEPS_PER_LOOK == WARM % STEPS_PER_LOOK:
            with open(looks, "a") as file:
                file.write(json.dumps(look_at(out)) + "\n")
        return make_batch(data, step, *rest)

    train.batch = batch


def look_at(out: Path) -> dict[str, int]:
    """What this process holds, and what is in the folder of its run."""
    names = [path.name for path in out.iterdir()]
    return {"descriptors": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task")),
            "files": len(names), "checkpoints": sum(bool(re.fullmatch(r"ckpt_\d+\.pt", name)) for name in names),
            "unfinished": sum(name.endswith(".tmp") for name in names),
            "memory": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")}
