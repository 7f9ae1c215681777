"""Style names of the view to colours of the theme, and lines to strips."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from rich.segment import Segment
from rich.style import Style
from textual.color import Color
from textual.filter import LineFilter
from textual.strip import Strip
from textual.widget import Widget

from jupiter_tui.view.text import Line, clean, to_ascii

_MEANINGS: Final[dict[str, tuple[str, Style]]] = {
    "dim": ("", Style(dim=True)),
    "bold": ("", Style(bold=True)),
    "good": ("success", Style()),
    "bad": ("error", Style(bold=True)),
    "warn": ("warning", Style()),
    "accent": ("accent", Style()),
    "title": ("primary", Style(bold=True)),
    "cursor": ("", Style(bold=True, reverse=True)),
    "tab": ("primary", Style(bold=True, reverse=True)),
    "match": ("", Style(reverse=True)),
}
"""Style name -> (the theme's variable for its colour, its attributes).

Not component classes: those cost a style resolution per name and widget, a third of the time to the first frame.
"""


@lru_cache(256)
def _style(name: str, colour: str) -> Style:
    attributes = _MEANINGS[name][1]
    return attributes + Style(color=Color.parse(colour).rich_color) if colour else attributes


class Inked(Widget):
    """A widget that draws lines of spans."""

    def ink(self, name: str) -> Style:
        """The style of a name in the present theme; unknown and empty names are plain."""
        if name not in _MEANINGS:
            return self.rich_style
        variable = _MEANINGS[name][0]
        return self.rich_style + _style(name, self.app.theme_variables.get(variable, "") if variable else "")

    def strip_of(self, line: Line, width: int, *, skip: int = 0) -> Strip:
        """One line as exactly `width` cells from cell `skip` on. Whatever the text, no control code leaves here."""
        segments = [Segment(clean(text).replace("\n", " "), self.ink(style)) for text, style in line if text]
        return Strip(segments).crop_extend(skip, skip + width, self.rich_style)


class AsciiOnly(LineFilter):
    """The last thing before the terminal with --ascii: every glyph of the console becomes one of ASCII."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:  # noqa: ARG002 - the filter's contract
        return [Segment(to_ascii(s.text), s.style, s.control) for s in segments]
