"""Runs the faults and prints their table:  make faults, or  PYTHONPATH=.:tests python -m faults [words of a name ...]

Each fault runs in a process and a temporary folder of its own, as many at once as there are cores. The exit code is 1
unless every fault passed every try. few=true makes only as many tries as `make test` does, tries=N so many.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .catalogue import FAULTS
from .harness import Fault, Report

HEADER = ("fault", "tries", "passed", "silently wrong", "most steps lost", "recovery s", "remarks")


def main(argv: list[str]) -> int:
    if argv[:1] == ["one"]:
        return one(int(argv[1]), int(argv[2]))
    options = {w for w in argv if w.startswith(("few=", "tries="))}
    words = [w.lower() for w in argv if w not in options]
    tries = next((int(w.removeprefix("tries=")) for w in options if w.startswith("tries=")), 0)
    few = "few=true" in options
    chosen = [f for f in FAULTS if all(w in f.name.lower() for w in words) and (f.few or not few)]
    if not chosen:
        print(f"error: no fault has {' and '.join(words)} in its name; there are: "
              f"{'; '.join(f.name for f in FAULTS)}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        rows = list(pool.map(lambda fault: in_process(fault, tries or (fault.few if few else fault.whole)), chosen))
    print("\n" + table(rows))
    print(f"\n{len(rows)} faults, {sum(row['tries'] for row in rows):,} tries, {(time.monotonic() - begin) / 60:.0f} "
          f"minutes; torch {torch.__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} cores")
    for row in rows:
        for failure in row["failures"][:5]:
            print(f"FAILED {row['name']}: {failure}")
    return 0 if all(row["good"] for row in rows) else 1


def one(index: int, tries: int) -> int:
    """Runs one fault here, and prints its row as the last line."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report = FAULTS[index].run(tries, Path(folder))
    print("\n" + json.dumps(report.row()))
    return 0


def in_process(fault: Fault, tries: int) -> dict:
    """The row of a fault that ran in a process of its own; a fault that could not even run has failed."""
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-m", __package__, "one", str(FAULTS.index(fault)), str(tries)],
                          capture_output=True, text=True)
    if done.returncode:
        row = Report(tries=tries, failures=[f"it did not run: {done.stderr[-2000:]}"]).row()
    else:
        row = json.loads(done.stdout.splitlines()[-1])
    print(f"{'passed' if row['good'] else 'FAILED'}  {fault.name}: {row['passed']} of {row['tries']}, "
          f"{time.monotonic() - begin:.0f} s", flush=True)
    return row | {"name": fault.name}


def table(rows: list[dict]) -> str:
    """The rows as a table in Markdown."""
    def shown(value: object) -> str:
        return "" if value is None else f"{value:.1f}" if isinstance(value, float) else f"{value:,}" \
            if isinstance(value, int) else value

    lines = [HEADER, ("---",) * len(HEADER)]
    lines += [[shown(row[key]) for key in ("name", "tries", "passed", "silent", "lost", "recovery", "note")]
              for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
