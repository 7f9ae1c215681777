"""Curves as text: smoothing, min/max decimation, and a braille raster with axes. Pure functions.

A chart is decimated to two values a dot column before anything is drawn, so drawing costs the same
for a hundred points and for a million; not-a-number leaves a gap and never enters the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from jupiter_tui.view.text import Line, cut, number

Points = list[tuple[float, float]]

_BITS: Final = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_AXIS_WIDTH: Final = 8


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Debiased exponential average; 0 returns the values. Non-finite values pass through and leave no trace."""
    if weight <= 0.0:
        return list(values)
    result: list[float] = []
    total, bias = 0.0, 1.0
    for value in values:
        if not math.isfinite(value):
            result.append(value)
            continue
        total = total * weight + value * (1.0 - weight)
        bias *= weight
        result.append(total / (1.0 - bias))
    return result


def decimate(xs: Sequence[float], ys: Sequence[float], columns: int) -> Points:
    """At most 2 points a column: the least and the largest of each, in order of x. Gaps stay as one NaN point."""
    if len(xs) <= 2 * columns:
        return list(zip(xs, ys, strict=True))
    low, high = xs[0], xs[-1]
    width = (high - low) / columns or 1.0
    points: Points = []
    start = 0
    for column in range(columns):
        end = start
        limit = high + 1 if column == columns - 1 else low + (column + 1) * width
        while end < len(xs) and xs[end] < limit:
            end += 1
        finite = [i for i in range(start, end) if math.isfinite(ys[i])]
        if finite:
            least = min(finite, key=ys.__getitem__)
            most = max(finite, key=ys.__getitem__)
            points += [(xs[i], ys[i]) for i in sorted({least, most})]
        elif end > start:
            points.append((xs[start], math.nan))
        start = end
    return points


def bounds(values: Sequence[float]) -> tuple[float, float] | None:
    """(least, largest) finite value with a little room; None if there is none."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    room = (high - low) * 0.03 or abs(high) * 0.05 or 1.0
    return low - room, high + room


class Raster:
    """Dots on a grid of braille cells (2x4 dots a cell)."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.cells = [bytearray(width) for _ in range(height)]

    def dot(self, x: int, y: int) -> None:
        """Set the dot `x` from the left and `y` from the top; outside is ignored."""
        if 0 <= x < self.width * 2 and 0 <= y < self.height * 4:
            self.cells[y >> 2][x >> 1] |= _BITS[x & 1][y & 3]

    def segment(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        (x0, y0), (x1, y1) = start, end
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        for i in range(steps + 1):
            self.dot(x0 + round((x1 - x0) * i / steps), y0 + round((y1 - y0) * i / steps))

    def polyline(self, points: Points, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        """Lines between neighbours; a point that is not finite breaks the line."""

        def place(point: tuple[float, float]) -> tuple[int, int]:
            x = (point[0] - x_range[0]) / ((x_range[1] - x_range[0]) or 1.0)
            y = (y_range[1] - point[1]) / ((y_range[1] - y_range[0]) or 1.0)
            return round(x * (self.width * 2 - 1)), round(y * (self.height * 4 - 1))

        for a, b in pairwise(points):
            if math.isfinite(a[1]) and math.isfinite(b[1]):
                self.segment(place(a), place(b))
        for point in points:
            if math.isfinite(point[1]):
                self.dot(*place(point))


def chart(
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    width: int,
    height: int,
    weight: float = 0.0,
    empty: str = "",
    from_zero: bool = False,
) -> list[Line]:
    """Exactly `height` lines of at most `width` characters: y axis left, x axis below.

    `from_zero`: the y axis begins at 0, for amounts whose small wavering should not look like much.
    With `weight` the smoothed curve is drawn strong over the dim raw one. `empty` stands where no
    finite value exists.
    """
    inner_width, inner_height = width - _AXIS_WIDTH - 1, height - 2
    limits = bounds(ys)
    if limits is None or inner_width < 4 or inner_height < 1:
        return [[(cut(empty, width), "dim")], *([[]] * (height - 1))][:height]
    if from_zero:
        limits = min(0.0, limits[0]), limits[1]
    x_range = (xs[0], xs[-1] if xs[-1] > xs[0] else xs[0] + 1)
    strong, faint = Raster(inner_width, inner_height), Raster(inner_width, inner_height)
    columns = inner_width * 2
    smoothed = smooth(ys, weight)
    strong.polyline(decimate(xs, smoothed, columns), x_range, limits)
    if weight > 0:
        faint.polyline(decimate(xs, ys, columns), x_range, limits)
    lines = [_row(row, strong, faint, limits) for row in range(inner_height)]
    lines.append([(" " * _AXIS_WIDTH + "└" + "─" * inner_width, "dim")])
    left, right = number(xs[0]), number(xs[-1])
    gap = max(1, inner_width - len(left) - len(right))
    lines.append([(cut(" " * (_AXIS_WIDTH + 1) + left + " " * gap + right, width), "dim")])
    return lines


def _row(row: int, strong: Raster, faint: Raster, limits: tuple[float, float]) -> Line:
    labelled = {0: limits[1], strong.height // 2: (limits[0] + limits[1]) / 2, strong.height - 1: limits[0]}
    value = labelled.get(row)
    label = number(value, 3).rjust(_AXIS_WIDTH) + "┤" if value is not None else " " * _AXIS_WIDTH + "│"
    line: Line = [(label, "dim")]
    for front, back in zip(strong.cells[row], faint.cells[row], strict=True):
        # One cell holds one style: where both curves share a cell the strong one keeps it.
        character, style = chr(0x2800 + (front | back)) if front | back else " ", "accent" if front else "dim"
        if len(line) > 1 and line[-1][1] == style:
            line[-1] = (line[-1][0] + character, style)
        else:
            line.append((character, style))
    return line


def interval_bar(low: float, effect: float, high: float, threshold: float, width: int) -> str:
    """An interval on one axis: `─` from low to high, `●` the effect, `|` the threshold, `·` elsewhere."""
    values = [v for v in (low, effect, high, threshold, 0.0) if math.isfinite(v)]
    left, right = min(values), max(values)
    scale = (width - 1) / ((right - left) or 1.0)

    def column(value: float) -> int:
        if not math.isfinite(value):
            return 0 if value < 0 else width - 1
        return round((value - left) * scale)

    cells = ["·"] * width
    for i in range(column(low), column(high) + 1):
        cells[i] = "─"
    cells[column(threshold)] = "|"
    if math.isfinite(effect):
        cells[column(effect)] = "●"
    return "".join(cells)
