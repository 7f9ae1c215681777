"""A curve in a box. All drawing is view.chart's; this keeps the last result and redraws only on change."""

from __future__ import annotations

from collections.abc import Callable

from jupiter_engine.protocol.facts import Metric
from jupiter_tui.view.chart import chart
from jupiter_tui.view.picture import Curve
from jupiter_tui.view.text import Line
from jupiter_tui.widgets.lines import Bar


class Chart(Bar):
    """One number of every optimizer step, over the steps."""

    def __init__(
        self, title: str, value: Callable[[Metric], float], *, name: str, empty: str, from_zero: bool = False
    ) -> None:
        super().__init__(id=name)
        self._title = title
        self._value = value
        self._empty = empty
        self._from_zero = from_zero
        self._curve = Curve()
        self._weight = 0.0
        self._drawn: tuple[object, ...] = ()
        self.border_title = title

    def take(self, curve: Curve, weight: float) -> None:
        """Show this curve, smoothed by `weight` (0: as measured)."""
        self._curve, self._weight = curve, weight
        last = curve.last
        smoothed = f" · smoothed {weight:.2g}" if weight else ""
        title = self._title + (f"  {self._value(last):.4g}{smoothed}" if last else "")
        if title != self.border_title:
            # Only on change: Textual draws the whole widget anew for each assignment.
            self.border_title = title
        self._rebuild()

    def _rebuild(self) -> None:
        size = self.content_size
        key = (self._curve.run, self._curve.taken, self._weight, size)
        if key == self._drawn or size.width == 0 or not self.display:
            return
        self._drawn = key
        self.lines = self._draw(size.width, size.height)
        self.refresh()

    def _draw(self, width: int, height: int) -> list[Line]:
        metrics = list(self._curve.metrics)
        steps = [float(m.step) for m in metrics]
        values = [self._value(m) for m in metrics]
        return chart(
            steps, values, width=width, height=height, weight=self._weight, empty=self._empty, from_zero=self._from_zero
        )
