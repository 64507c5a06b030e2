"""All faults, in the order of the table: importing a module registers its faults."""

from . import resume
from .harness import FAULTS

__all__ = ["FAULTS", "resume"]
