"""The log: a virtual pane over plain strings. Only the visible lines are ever looked at.

Follows its end until the person scrolls up; never jumps by itself after that. Find keeps the
other lines as context.
"""

from __future__ import annotations

import re

from textual.geometry import Size
from textual.strip import Strip

from jupiter_tui.view.picture import LogBook
from jupiter_tui.view.text import Line
from jupiter_tui.widgets.lines import Pane

WIDEST = 4096
"""Cells of a line that can be scrolled to; longer ones are cut there."""
_LEVEL = re.compile(r"\b(E|ERROR|CRITICAL|Traceback|[A-Za-z]*Error)\b|\b(W|WARN|WARNING|[A-Za-z]*Warning)\b")


def level_style(line: str) -> str:
    """`bad` for errors, `warn` for warnings, `accent` for dividers, else plain."""
    if line.startswith("────"):
        return "accent"
    found = _LEVEL.search(line[:200])
    if found is None:
        return ""
    return "bad" if found.group(1) else "warn"


class LogPane(Pane):
    """Shows a LogBook."""

    def __init__(self, title: str = "Log", *, id: str | None = None) -> None:  # noqa: A002 - Textual's own name
        super().__init__(title, id=id)
        self.book = LogBook()
        self.follow = True
        self.term = ""
        self.matches: list[int] = []
        self._searched = 0
        self._at = -1
        """Position in `matches` of the one gone to last."""
        self._count = 0
        self._widest = 0

    def take(self, book: LogBook) -> None:
        """Show this book from now on; a longer version of the same one keeps the place."""
        lost = book.first - self.book.first if book.cycle == self.book.cycle else 0
        if book.cycle != self.book.cycle or lost < 0:
            self.follow, self._widest, self._count, lost = True, 0, 0, 0
        if book.cycle == self.book.cycle and book.total == self.book.total and self._count:
            return
        new = book.lines[max(0, self._count - lost) :]
        self._widest = min(WIDEST, max([self._widest, *map(len, new)]))
        self.book, self._count = book, len(book.lines)
        if lost or self._searched > self._count:
            self.matches, self._searched = [], 0
        self.virtual_size = Size(max(self._widest, self.content_size.width), self._count)
        if self.follow:
            self._to(self._count)
        elif lost:
            self._to(self.scroll_y - lost)
        self._say_position()
        self.refresh()

    def _to(self, y: float) -> None:
        # Forced: before the first layout Textual still believes that there is nothing to scroll.
        self.scroll_to(y=y, animate=False, force=True)

    def _rebuild(self) -> None:
        if self.follow and self._count:
            self._to(self._count)

    # -- finding ---------------------------------------------------------------------------------
    def find(self, term: str) -> None:
        """Mark `term` (letter case ignored) and go to its last occurrence; an empty term ends the search."""
        self.term, self.matches, self._searched, self._at = term.lower(), [], 0, -1
        if self.term:
            self._search()
            self._at = len(self.matches)
            self.go(-1)
        self._say_position()
        self.refresh()

    def _search(self) -> None:
        lines = self.book.lines
        self.matches += [i for i in range(self._searched, self._count) if self.term in lines[i].lower()]
        self._searched = self._count

    def go(self, step: int) -> None:
        """To the next (1) or former (-1) match, round the ends."""
        if not self.term:
            return
        self._search()
        if self.matches:
            self._at = (self._at + step) % len(self.matches)
            self.follow = False
            height = max(1, self.content_size.height)
            self._to(max(0, self.matches[self._at] - height // 2))
        self._say_position()

    # -- following -------------------------------------------------------------------------------
    def set_follow(self, follow: bool) -> None:  # noqa: FBT001 - a switch has one value
        self.follow = follow
        if follow:
            self._to(self._count)
        self._say_position()

    def _leave_end(self) -> None:
        self.follow = False
        self._say_position()

    def action_scroll_up(self) -> None:
        self._leave_end()
        super().action_scroll_up()

    def action_page_up(self) -> None:
        self._leave_end()
        super().action_page_up()

    def action_scroll_home(self) -> None:
        self._leave_end()
        super().action_scroll_home()

    def on_mouse_scroll_up(self) -> None:
        self._leave_end()

    def action_scroll_end(self) -> None:
        self.set_follow(True)

    # -- drawing ---------------------------------------------------------------------------------
    def _say_position(self) -> None:
        below = max(0, self._count - self.content_size.height - round(self.scroll_y))
        parts = [f"{self.book.first + self._count:,} lines"]
        if self.book.first:
            parts.append(f"oldest {self.book.first:,} are in worker.log only")
        if self.term:
            at = f"{self._at + 1} of {len(self.matches)}" if self.matches else "not found"
            parts.append(f'find "{self.term}" {at}')
        parts.append("FOLLOW" if self.follow else f"+{below:,} below, f follows")
        self.set_subtitle(" · ".join(parts))

    def render_line(self, y: int) -> Strip:
        index = y + round(self.scroll_y)
        width = self.size.width
        if index >= self._count or index >= len(self.book.lines):
            return self.strip_of([], width)
        text = self.book.lines[index][:WIDEST]
        return self.strip_of(self._marked(text, level_style(text)), width, skip=round(self.scroll_x))

    def _marked(self, text: str, style: str) -> Line:
        if not self.term or self.term not in text.lower():
            return [(text, style)]
        line: Line = []
        start, lowered = 0, text.lower()
        while (found := lowered.find(self.term, start)) >= 0:
            line += [(text[start:found], style), (text[found : found + len(self.term)], "match")]
            start = found + len(self.term)
        return [*line, (text[start:], style)]
