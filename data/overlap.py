"""How much of the validation text stands in the training text, too.

What a model has read in training it may know by heart, so a validation loss on the same words says
nothing about new text.
"""

from collections import Counter
from collections.abc import Iterable

import numpy as np

WINDOW = 64  # bytes, a power of two: about a line of a text
MULTIPLIER = 0x9E3779B97F4A7C15  # of the hash; any odd number with bits all over does
BITS = 20  # of a hash, which a table of all windows sorts out nearly every place with


def overlap_of(val: Iterable[bytes], train: Iterable[bytes]) -> float | None:
    """The share of the windows of val that occur anywhere in train. None if val has no window.

    val: texts, each of which is cut into windows of WINDOW bytes side by side. train: blocks of one
    text, held one at a time. A place of it that has the hash of a window is compared with it byte
    for byte.
    """
    windows = Counter(
        text[at : at + WINDOW] for text in val for at in range(0, len(text) - WINDOW + 1, WINDOW)
    )
    if not windows:
        return None
    sought, before = WindowTable(windows), b""
    for block in train:
        text = before + block
        sought.find_in(text)
        before = text[1 - WINDOW :]
    return sum(windows[window] for window in sought.found) / windows.total()


class WindowTable:
    """Windows, to be found by their hashes. `found` are those that some text has had."""

    def __init__(self, windows: Iterable[bytes]):
        hashed = [(int(window_hashes(window)[0]), window) for window in windows]
        hashed.sort()
        self.windows = [window for _, window in hashed]
        self.hashes = np.array([number for number, _ in hashed], np.uint64)
        self.known = np.zeros(2**BITS, bool)
        self.known[self.hashes >> np.uint64(64 - BITS)] = True
        self.found: set[bytes] = set()

    def find_in(self, text: bytes) -> None:
        hashes = window_hashes(text)
        places = np.flatnonzero(self.known[hashes >> np.uint64(64 - BITS)])
        nearest = np.searchsorted(self.hashes, hashes[places]).clip(max=len(self.hashes) - 1)
        same = self.hashes[nearest] == hashes[places]
        # One place for each window is enough.
        for number, first in zip(*np.unique(nearest[same], return_index=True), strict=True):
            place, window = places[same][first], self.windows[number]
            if text[place : place + WINDOW] == window:
                self.found.add(window)


def window_hashes(text: bytes) -> np.ndarray:
    """The hash of the window at every place of a text, uint64 [len(text) - WINDOW + 1]: the
    polynomial of its bytes, modulo 2**64. A hash of twice the length is made of two.
    """
    hashes, length = np.frombuffer(text, np.uint8).astype(np.uint64), 1
    while length < WINDOW:
        factor = np.uint64(pow(MULTIPLIER, length, 2**64))
        hashes = hashes[:-length] * factor + hashes[length:]
        length *= 2
    return hashes
