"""Whole samples into rows with hardly a gap: best-fit decreasing over a window of samples.

The classic bin-packing rule: take the longest sample of the window that is not
placed yet and put it into the row with the least room that still holds it. No
sample is cut (unless it alone is longer than a row), and rows opened by one
window are filled up by the next ones. Where that leaves gaps, as with few
different lengths, the rows with the largest gaps are filled anew, each with
the fullest choice out of what lies in them and the next few samples (subset
sum over bit sets).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

WINDOW = 2048
"""Units that are looked at together; more pack a little tighter and stray further from the drawing order."""
_FULL_ENOUGH = 0.002
"""Gaps of this share of all room are left."""
_IN_VAIN = 32
"""So many units in a row that fit no gap end the search."""
_SPARE = 12
"""So many units more than it holds are looked at when a row is filled anew."""


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
        self._passed_over: list[U] = []

    def fill(self, draw: Callable[[], U]) -> None:
        """Place units from `draw` until the rows are full, or nothing drawn fits any more."""
        enough = self._most * self._width * _FULL_ENOUGH
        in_vain = 0
        while self._free > enough and in_vain < _IN_VAIN:
            # sort() is stable: equals stay in drawing order. What finds no gap once all rows are open is passed over.
            for unit in sorted(self._window(draw), key=lambda unit: -len(unit.ids)):
                if self._place(unit):
                    in_vain = 0
                else:
                    in_vain += 1
                    self._passed_over.append(unit)
        self._tighten(draw, enough)

    def _tighten(self, draw: Callable[[], U], enough: float) -> None:
        """Fill rows anew, those with the largest gaps first, until the gaps are small enough or all have been tried."""
        pool = self._passed_over[:WINDOW]
        for room, row in reversed(self._open):
            if self._free <= enough:
                break
            pool += [draw() for _ in range(_SPARE - len(pool))]
            pool += self.filled[row]
            chosen = fullest([len(unit.ids) for unit in pool], self._width)
            self.filled[row] = [pool[number] for number in chosen]
            pool = [unit for number, unit in enumerate(pool) if number not in chosen]
            self._free += (self._width - room) - sum(len(unit.ids) for unit in self.filled[row])
        self._open = []

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


def fullest(lengths: list[int], width: int) -> set[int]:
    """Numbers of the `lengths` (0 and those above `width` are none) that add up closest to `width`, not above it.

    Exact; of equal choices the one with the longest pieces. Costs one shift of a `width`-bit number a length.
    """
    order = sorted((number for number, length in enumerate(lengths) if 0 < length <= width), key=lengths.__getitem__)
    limit = (1 << (width + 1)) - 1
    reached = [1]  # bit n: some choice of the pieces so far is n long
    for number in order:
        reached.append((reached[-1] | reached[-1] << lengths[number]) & limit)
    left = reached[-1].bit_length() - 1
    chosen = set()
    for index in range(len(order) - 1, -1, -1):
        length = lengths[order[index]]
        if length <= left and reached[index] >> (left - length) & 1:
            chosen.add(order[index])
            left -= length
    return chosen
