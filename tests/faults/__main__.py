"""Runs the faults and prints their table:

    make faults, or  PYTHONPATH=.:tests python -m faults [words of a name ...] [few=true] [tries=N]

Each fault runs in a process and a temporary folder of its own, as many at once as there are cores.
few=true makes only as many tries as `make test` does, tries=N makes N. The exit code is 1 unless
every fault passed every try.
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

COLUMNS = {  # key of a row -> heading
    "name": "fault",
    "tries": "tries",
    "passed": "passed",
    "silent": "silently wrong",
    "lost": "most steps lost",
    "recovery": "recovery s",
    "note": "remarks",
}


def main(argv: list[str]) -> int:
    if argv[:1] == ["one"]:
        return one(int(argv[1]), int(argv[2]))
    words = [word.lower() for word in argv if "=" not in word]
    options = dict(word.split("=") for word in argv if "=" in word)
    few, tries = options.get("few") == "true", int(options.get("tries", 0))
    chosen = [f for f in FAULTS if all(w in f.name.lower() for w in words) and (f.few or not few)]
    if not chosen:
        names = "; ".join(fault.name for fault in FAULTS)
        print(f"error: no fault has {' and '.join(words)} in its name: {names}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        counts = [tries or (fault.few if few else fault.whole) for fault in chosen]
        rows = list(pool.map(in_process, chosen, counts))
    print("\n" + table(rows))
    print(
        f"\n{len(rows)} faults, {sum(row['tries'] for row in rows):,} tries, "
        f"{(time.monotonic() - begin) / 60:.0f} minutes; torch {torch.__version__}, "
        f"Python {sys.version.split()[0]}, {os.cpu_count()} cores"
    )
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
    """The row of a fault that ran in a process of its own. A fault that cannot even run has
    failed."""
    begin = time.monotonic()
    arguments = ["one", str(FAULTS.index(fault)), str(tries)]
    done = subprocess.run(
        [sys.executable, "-m", __package__, *arguments], capture_output=True, text=True
    )
    if done.returncode:
        row = Report(tries, failures=[f"it did not run: {done.stderr[-2000:]}"]).row()
    else:
        row = json.loads(done.stdout.splitlines()[-1])
    verdict, seconds = "passed" if row["good"] else "FAILED", time.monotonic() - begin
    print(
        f"{verdict}  {fault.name}: {row['passed']} of {row['tries']}, {seconds:.0f} s", flush=True
    )
    return row | {"name": fault.name}


def table(rows: list[dict]) -> str:
    """The rows as a table in Markdown."""
    lines = [COLUMNS.values(), ["---"] * len(COLUMNS)]
    lines += [[shown(row[key]) for key in COLUMNS] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: str | int | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    return value or ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
