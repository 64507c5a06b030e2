"""All faults, in the order of the table: to import a module is to register its faults."""

# ruff: noqa: F401, I001
from . import (
    resume,
    kill,
    writers,
    signals,
    output,
    disk,
    rot,
    finite,
    hostile,
    fuzz,
    soak,
    launched,
)
from .harness import FAULTS
