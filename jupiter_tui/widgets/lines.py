"""Two ways of showing lines: `Bar` keeps still, `Pane` scrolls. Both draw by the line, without scrollbars."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from jupiter_tui.view.text import Line, clean
from jupiter_tui.widgets.ink import Inked

Build = Callable[[int], list[Line]]
"""Makes the lines for a width in cells."""


def bordered(text: str) -> str:
    """Text for a border, which Textual draws itself: data may stand in it, so nothing of it is markup or control."""
    return clean(text).replace("\n", " ").replace("[", "\\[")


class Bar(Inked):
    """A few fixed lines; as high as its style says."""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:  # noqa: A002 - Textual's own name
        super().__init__(id=id, classes=classes)
        self.lines: list[Line] = []
        self._build: Build = lambda _: []

    def show(self, build: Build) -> None:
        """Draw what `build` makes, now and after every resize."""
        self._build = build
        self._rebuild()

    def _rebuild(self) -> None:
        if self.content_size.width == 0:
            return
        lines = self._build(self.content_size.width)
        if lines != self.lines:
            self.lines = lines
            self.refresh()

    def on_resize(self) -> None:
        self._rebuild()

    def render_line(self, y: int) -> Strip:
        line = self.lines[y] if y < len(self.lines) else []
        return self.strip_of(line, self.size.width)


class Pane(ScrollView, Inked, can_focus=True):
    """Lines that may be longer than the pane; the position stands in the border instead of a scrollbar."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("g", "scroll_home", "first line", show=False),
        Binding("G", "scroll_end", "last line", show=False),
    ]
    DEFAULT_CSS = """
    Pane { scrollbar-size: 0 0; overflow: auto auto; background: transparent; }
    """

    def __init__(self, title: str = "", *, id: str | None = None, classes: str | None = None) -> None:  # noqa: A002 - Textual's own name
        super().__init__(id=id, classes=classes)
        self.lines: list[Line] = []
        self._build: Build = lambda _: []
        self._width = 0
        self._title = self._subtitle = ""
        self.set_title(title)

    def set_title(self, title: str) -> None:
        """The border's text; data may stand in it, so it is never read as markup."""
        title = bordered(title)
        if title != self._title:
            # Only on change: Textual draws the whole widget anew for each assignment.
            self._title = self.border_title = title

    def show(self, build: Build, *, home: bool = False) -> None:
        """Draw what `build` makes for the pane's width, now and after every resize; `home`: from the top."""
        self._build = build
        self._rebuild()
        if home:
            self.scroll_to(y=0, animate=False)

    def _rebuild(self) -> None:
        width = self.content_size.width
        if width == 0:
            return
        lines = self._build(width)
        if len(lines) == len(self.lines) and width == self._width:
            self._renew(lines)
            return
        self.lines, self._width = lines, width
        self.virtual_size = Size(width, len(lines))
        self._say_position()
        self.refresh()

    def _renew(self, lines: list[Line]) -> None:
        """As many lines as before: only those that are others are drawn anew, which a slow terminal thanks."""
        before, self.lines = self.lines, lines
        for number, (old, new) in enumerate(zip(before, lines, strict=True)):
            if old != new:
                self.refresh_line(number)

    def on_resize(self) -> None:
        self._rebuild()
        self._say_position()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        self._say_position()

    def _say_position(self) -> None:
        height = self.content_size.height
        below = len(self.lines) - height - round(self.scroll_y)
        above = round(self.scroll_y)
        parts = [f"{above} above"] if above > 0 else []
        parts += [f"{below} below"] if below > 0 else []
        self.set_subtitle(" · ".join(parts))

    def set_subtitle(self, text: str) -> None:
        if text != self._subtitle:
            self._subtitle = text
            self.border_subtitle = bordered(text)

    def reveal(self, y: int) -> None:
        """Scroll as little as needed to show line `y`."""
        height = max(1, self.content_size.height)
        top = round(self.scroll_y)
        if y < top:
            self.scroll_to(y=y, animate=False)
        elif y >= top + height:
            self.scroll_to(y=y - height + 1, animate=False)

    def render_line(self, y: int) -> Strip:
        index = y + round(self.scroll_y)
        line = self.lines[index] if index < len(self.lines) else []
        return self.strip_of(line, self.size.width)
