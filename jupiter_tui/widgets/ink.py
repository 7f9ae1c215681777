"""Style names of the view to colours of the theme, and lines to strips."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final

from rich.segment import Segment
from rich.style import Style
from textual.color import Color
from textual.filter import LineFilter
from textual.strip import Strip
from textual.widget import Widget

from jupiter_tui.view.text import Line, clean, to_ascii

NAMES: Final = ("dim", "bold", "good", "bad", "warn", "accent", "title", "cursor", "tab", "match")
INK_CLASSES: Final = {f"ink--{name}" for name in NAMES}
"""Component classes; console.tcss gives them the theme's colours."""


class Inked(Widget):
    """A widget that draws lines of spans. Textual inherits component classes along the first base only,
    so a class that has another widget before this one names INK_CLASSES itself."""

    COMPONENT_CLASSES: ClassVar[set[str]] = INK_CLASSES

    def ink(self, name: str) -> Style:
        """The style of a name; unknown and empty names are plain."""
        base = self.rich_style
        return base + self.get_component_rich_style(f"ink--{name}", partial=True) if name in NAMES else base

    def strip_of(self, line: Line, width: int, *, skip: int = 0) -> Strip:
        """One line as exactly `width` cells from cell `skip` on. Whatever the text, no control code leaves here."""
        segments = [Segment(clean(text).replace("\n", " "), self.ink(style)) for text, style in line if text]
        return Strip(segments).crop_extend(skip, skip + width, self.rich_style)


class AsciiOnly(LineFilter):
    """The last thing before the terminal with --ascii: every glyph of the console becomes one of ASCII."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:  # noqa: ARG002 - the filter's contract
        return [Segment(to_ascii(s.text), s.style, s.control) for s in segments]


def same(left: Iterable[Line], right: Iterable[Line]) -> bool:
    return list(left) == list(right)
