"""Whole samples into rows with hardly a gap: best-fit decreasing over a window of samples.

The classic bin-packing rule: take the longest sample of the window that is not
placed yet and put it into the row with the least room that still holds it. No
sample is cut (unless it alone is longer than a row), and rows opened by one
window are filled up by the next ones.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

WINDOW = 2048
"""Units that are looked at together; more pack a little tighter and stray further from the drawing order."""
_FULL_ENOUGH = 0.001
"""Gaps of this share of all room are left."""
_IN_VAIN = 256
"""So many units in a row that fit no gap end the search."""


class Sized(Protocol):
    @property
    def ids(self) -> list[int]: ...


U = TypeVar("U", bound=Sized)


class BestFit(Generic[U]):
    """`rows` rows of `width` tokens, filled from an endless drawing order."""

    def __init__(self, rows: int, width: int) -> None:
        self.filled: list[list[U]] = []
        """Units of each row, in order of placing."""
        self._most, self._width = rows, width
        self._open: list[tuple[int, int]] = []  # (room, row), sorted
        self._free = rows * width

    def fill(self, draw: Callable[[], U]) -> None:
        """Place units from `draw` until the rows are full, or nothing drawn fits any more."""
        enough = self._most * self._width * _FULL_ENOUGH
        in_vain = 0
        while self._free > enough and in_vain < _IN_VAIN:
            # sort() is stable: equals stay in drawing order. What finds no gap once all rows are open is passed over.
            for unit in sorted(self._window(draw), key=lambda unit: -len(unit.ids)):
                in_vain = 0 if self._place(unit) else in_vain + 1

    def _window(self, draw: Callable[[], U]) -> list[U]:
        """The next units for the room that is left, at least one and at most WINDOW."""
        window: list[U] = []
        tokens = 0
        while not window or (len(window) < WINDOW and tokens < self._free):
            window.append(draw())
            tokens += min(len(window[-1].ids), self._width)
        return window

    def _place(self, unit: U) -> bool:
        length = min(len(unit.ids), self._width)
        if length == 0:
            return False
        at = bisect_left(self._open, (length, -1))
        if at < len(self._open):
            room, row = self._open.pop(at)
        elif len(self.filled) < self._most:
            room, row = self._width, len(self.filled)
            self.filled.append([])
        else:
            return False
        self.filled[row].append(unit)
        if room > length:
            insort(self._open, (room - length, row))
        self._free -= length
        return True
