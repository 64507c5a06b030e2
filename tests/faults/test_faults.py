"""A quick try of each kind of fault; `make faults` makes all tries of all."""

import pytest

from .catalogue import FAULTS
from .harness import ROOT
from .mutants import edited, every_mutant


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.few], ids=lambda f: f.name)
def test_a_run_survives(fault, tmp_path):
    report = fault.run(fault.few, tmp_path)
    assert report.good, report


@pytest.mark.parametrize("mutant", every_mutant(), ids=lambda mutant: mutant.what)
def test_what_a_mutant_takes_out_is_still_in_the_code_and_its_fault_exists(mutant):
    for name, old, new in mutant.edits:
        edited((ROOT / name).read_text(encoding="utf-8"), old, new)
    words = mutant.words.lower().split()
    assert any(all(word in fault.name.lower() for word in words) for fault in FAULTS)
