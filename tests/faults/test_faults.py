"""A few tries of every fault; `make faults` makes all of them."""

import pytest

from .catalogue import FAULTS


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.few], ids=lambda f: f.name)
def test_a_run_survives(fault, tmp_path):
    report = fault.run(fault.few, tmp_path)
    assert report.good, report
