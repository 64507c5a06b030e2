"""All faults, in the order of the table: importing a module registers its faults."""

from . import resume, kill, writers, signals, disk, rot, finite, hostile, fuzz, soak  # noqa: I001
from .harness import FAULTS

__all__ = ["FAULTS", "disk", "finite", "fuzz", "hostile", "kill", "resume", "rot", "signals", "soak", "writers"]
