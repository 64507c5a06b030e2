"""Times the training steps of several arms in turn, in several processes one after the other.

A process has its own layout of memory, and its rounds share it: they are not independent. Several
processes are, so an interval is over processes. lab.compare starts this file for each of them: it
reads from standard input which arms to time, and prints one line of JSON at the end.

Order: what is timed; the processes; timing.json; what a process does.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from config.command import run_command, user_errors
from config.preset import load_json
from lab.measure import fresh_run, seconds_of_step, values_in_turn
from run.metrics import is_number
from run.setup import read_config
from train import warm_up

UNTIMED = 4  # rounds of steps before the rounds that are timed


def time_arms(command_lines: dict[str, list[str]], steps: int) -> dict[str, Any]:
    """What one process measures: the seconds of each training step, round by round, and the
    micro-batch of each arm, from the arms' command lines for train.py."""
    torch._dynamo.reset()
    runs = {name: fresh_run(read_config(words)) for name, words in command_lines.items()}
    # All of them compile the same Decoder.forward, which has one limit for all.
    with torch._dynamo.config.patch(recompile_limit=8 * len(runs)):
        for run in runs.values():
            warm_up(run)
        calls = {name: partial(seconds_of_step, run) for name, run in runs.items()}
        seconds = values_in_turn(calls, UNTIMED + steps)
    return {
        "seconds": {name: times[UNTIMED:] for name, times in seconds.items()},
        "micro_batch_size": {name: run.config.micro_batch_size for name, run in runs.items()},
    }


def time_elsewhere(command_lines: dict[str, list[str]], steps: int) -> dict[str, Any]:
    """time_arms in a process of its own, which ends when this one is interrupted. OSError if it
    fails, after its own words."""
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "lab.timing"],
        input=json.dumps([command_lines, steps]).encode(),
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,  # a terminal's Ctrl-C reaches lab.compare, which ends this process
    )
    if done.returncode:
        raise OSError(f"the process that times the steps ended with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def time_in_processes(
    command_lines: dict[str, list[str]], steps: int, processes: int
) -> dict[str, Any]:
    """As time_arms, but seconds has a list for each process, and steps and processes are told."""
    found = [time_elsewhere(command_lines, steps) for _ in range(processes)]
    return {
        "seconds": {name: [one["seconds"][name] for one in found] for name in command_lines},
        "micro_batch_size": found[-1]["micro_batch_size"],
        "steps": steps,
        "processes": processes,
    }


def read_timing(path: Path) -> dict[str, Any]:
    """What timing.json says, or {} if there is none. ValueError if it is damaged, or of a time when
    all steps were timed in one process."""
    if not path.exists():
        return {}
    saved, sound = load_json(path), False
    if isinstance(saved, dict) and saved and "processes" not in saved:
        raise ValueError(
            f"{path} is of an older lab.compare, which timed all steps in one process: delete it, "
            f"and the steps are timed again"
        )
    with suppress(TypeError, LookupError, AttributeError):
        times, micro = saved["seconds"], saved["micro_batch_size"]
        each = [seconds for processes in times.values() for seconds in processes]
        sound = (
            times.keys() == micro.keys() == saved["cells"].keys()
            and all(type(size) is int for size in micro.values())
            and all(len(own) == saved["processes"] for own in times.values())
            and all(len(own) == saved["steps"] for own in each)
            and all(is_number(t) and t > 0 for own in each for t in own)
        )
    if not sound:
        raise ValueError(f"{path} is damaged: delete it, and the steps are timed again")
    return saved


def main(argv: list[str]) -> int:
    """What a process of time_elsewhere does; returns the exit code. Other lines of its output, such
    as that of a compiler that does not work, come before the one that counts."""
    command_lines, steps = json.loads(sys.stdin.read())
    with user_errors():
        print(json.dumps(time_arms(command_lines, steps)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
