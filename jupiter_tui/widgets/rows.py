"""A table: a head that stays, and rows of which only those that changed are drawn anew."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.strip import Strip

from jupiter_tui.view.text import Line
from jupiter_tui.widgets.lines import Pane


class Rows(Pane):
    """Rows with one that is chosen; the page moves the choice (its action `move`)."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "screen.move(-1)", "the one before", show=False),
        Binding("down", "screen.move(1)", "next", show=False),
        Binding("pageup", "screen.move(-10)", "ten back", show=False),
        Binding("pagedown", "screen.move(10)", "ten on", show=False),
        Binding("g,home", "screen.move(-9999)", "first", show=False),
        Binding("G,end", "screen.move(9999)", "last", show=False),
    ]

    def __init__(self, title: str = "", *, id: str | None = None) -> None:  # noqa: A002 - Textual's own name
        super().__init__(title, id=id)
        self.head: Line = []
        self.drawn = 0
        """Rows drawn anew so far."""

    def show_rows(self, head: Line, rows: list[Line], chosen: int) -> None:
        """Show these rows under a head; `chosen` is kept in sight."""
        width = self.content_size.width
        if width == 0:
            return
        if head != self.head or len(rows) != len(self.lines) or width != self._width:
            self.head, self.lines, self._width = head, rows, width
            self.virtual_size = Size(width, len(rows) + 1)
            self.drawn += len(rows)
            self.refresh()
        else:
            self._renew(rows)
        if rows:
            self.reveal(chosen)
        self._say_position()

    def _renew(self, lines: list[Line]) -> None:
        before, self.lines = self.lines, lines
        top = round(self.scroll_y)
        for number, (old, new) in enumerate(zip(before, lines, strict=True)):
            if old != new and top <= number < top + self.rows_in_sight():
                self.refresh_line(number + 1)
                self.drawn += 1

    def rows_in_sight(self) -> int:
        return max(1, self.content_size.height - 1)

    def _rebuild(self) -> None:
        # The page knows the rows for the new width and shows them at its own resize.
        self._say_position()

    def _say_position(self) -> None:
        above = round(self.scroll_y)
        below = len(self.lines) - self.rows_in_sight() - above
        parts = [f"{above} above"] if above > 0 else []
        parts += [f"{below} below"] if below > 0 else []
        self.set_subtitle(" · ".join(parts))

    def reveal(self, y: int) -> None:
        top, height = round(self.scroll_y), self.rows_in_sight()
        if y < top:
            self.scroll_to(y=y, animate=False)
        elif y >= top + height:
            self.scroll_to(y=y - height + 1, animate=False)

    def render_line(self, y: int) -> Strip:
        width = self.size.width
        if y == 0:
            return self.strip_of(self.head, width)
        index = y - 1 + round(self.scroll_y)
        return self.strip_of(self.lines[index] if index < len(self.lines) else [], width)


class Findings(Pane):
    """A list whose entries are several lines long; up and down choose an entry."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "screen.move(-1)", "the one before", show=False),
        Binding("down", "screen.move(1)", "next", show=False),
    ]
