"""All faults, in the order of the table: importing a module registers its faults."""

from . import resume, kill, writers, signals, disk, rot, finite, hostile, fuzz, soak, launched  # noqa: I001
from .harness import FAULTS

__all__ = ["FAULTS", "disk", "finite", "fuzz", "hostile", "kill", "launched", "resume", "rot", "signals", "soak",
           "writers"]
