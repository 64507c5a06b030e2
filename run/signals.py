"""Ctrl-C, SIGTERM and a closed terminal, while a run trains."""

import signal
from typing import Any

from config.command import catch_signals, restore_signals
from run.ranks import ALONE, Ranks


class Interrupts:
    """Notes the signals that come inside its `with`. The loop asks for them where it can stop.

    A second signal ends the process at once, but not with several ranks: their launcher passes on
    every signal that it gets, and kills them itself when its time limit is over.
    """

    def __init__(self, ranks: Ranks = ALONE):
        self.ranks = ranks
        self.noted = 0  # the number of the first signal that came to this rank, 0 = none
        self.came = 0  # the number of a signal that all ranks know of, 0 = none

    def __enter__(self) -> "Interrupts":
        self.before = catch_signals(self.note)
        return self

    def __exit__(self, *_) -> None:
        restore_signals(self.before)

    def note(self, number: int, frame: Any = None) -> None:
        """The signal handler."""
        # A shell and the kernel may each send a SIGHUP when a terminal closes: that is one event.
        is_second = self.noted and number != getattr(signal, "SIGHUP", None)
        if is_second and self.ranks.size == 1:
            raise SystemExit(128 + number)
        self.ask_to_stop(number)

    def ask_to_stop(self, number: int) -> None:
        """Has the run stop, as a first signal does. The log also calls this, when the reader of our
        output has gone. That often comes together with a signal, so it never counts as a second."""
        self.noted = self.noted or number

    def agreed(self) -> bool:
        """Whether a signal has come to any rank. All ranks must ask at the same place. All get the
        same answer."""
        self.came = self.ranks.largest(self.noted)
        return bool(self.came)
