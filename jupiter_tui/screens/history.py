"""History: every cycle of the workspace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual import work
from textual.binding import BindingType
from textual.widget import Widget

from jupiter_engine.errors import JupiterError
from jupiter_engine.protocol.state import CycleState
from jupiter_tui.screens.page import Page, bindings
from jupiter_tui.view.history import HEADING, cycle_lines, cycle_row, newest_first
from jupiter_tui.view.picture import Curve, Picture
from jupiter_tui.view.text import Line, cut_line
from jupiter_tui.widgets.lines import Pane


class HistoryPage(Page):
    PAGE = "history"
    BINDINGS: ClassVar[list[BindingType]] = bindings("history")
    AUTO_FOCUS = "#cycle"

    _chosen = ""

    def body(self) -> Iterable[Widget]:
        yield Pane("Cycles", id="cycles")
        yield Pane("Cycle", id="cycle")

    def on_mount(self) -> None:
        self._read: tuple[object, ...] = ()
        self._curve = Curve()
        self._report = ""
        super().on_mount()

    def cycles(self) -> list[CycleState]:
        return newest_first(self.picture.state)

    def chosen(self) -> CycleState | None:
        known = self.cycles()
        return next((c for c in known if c.id == self._chosen), known[0] if known else None)

    def draw(self, picture: Picture) -> None:
        known, chosen = self.cycles(), self.chosen()
        rows, detail = self.query_one("#cycles", Pane), self.query_one("#cycle", Pane)
        rows.show(lambda w: self._rows(w, picture.now))
        if chosen is None:
            detail.show(lambda _: [[("No cycle has run yet. Page 4 starts one.", "dim")]])
            return
        rows.reveal(known.index(chosen) + 1)
        detail.set_title(chosen.id)
        key = (chosen.id, chosen.status, chosen.report, chosen.stages["train"].run, chosen.stages["train"].status)
        if key != self._read:
            self._read = key
            self.read(chosen)
        self._show_cycle(chosen)

    def _show_cycle(self, chosen: CycleState) -> None:
        running = (
            picture_curve if (picture_curve := self.picture.curve).run == chosen.stages["train"].run else self._curve
        )
        curve = running if running.run == chosen.stages["train"].run else Curve()
        now, report = self.picture.now, self._report
        self.query_one("#cycle", Pane).show(lambda w: cycle_lines(chosen, w, report=report, curve=curve, now=now))

    def _rows(self, width: int, now: float) -> list[Line]:
        chosen = self.chosen()
        rows = [cycle_row(c, width, now, chosen=c is chosen) for c in self.cycles()]
        return [cut_line(HEADING, width), *rows] if rows else []

    @work(exclusive=True, group="cycle")
    async def read(self, cycle: CycleState) -> None:
        """The parts of a cycle that lie in files."""
        try:
            self._curve = await self.desk.bridge.curve(cycle)
            self._report = await self.desk.bridge.report(cycle)
        except JupiterError as error:
            self.say(error.sentence(), bad=True)
            return
        if (chosen := self.chosen()) is not None and chosen.id == cycle.id:
            self._show_cycle(chosen)

    # -- actions ---------------------------------------------------------------------------------
    def available(self, action: str) -> bool:  # noqa: ARG002 - the same for all
        return bool(self.picture.state.cycles)

    def action_move(self, step: int) -> None:
        known, chosen = self.cycles(), self.chosen()
        if chosen is not None:
            self._chosen = known[max(0, min(len(known) - 1, known.index(chosen) + step))].id
            self._report = ""
            self.query_one("#cycle", Pane).scroll_to(y=0, animate=False)
            self.show(self.picture)

    def action_zoom(self) -> None:
        self.toggle_class("-zoom")
        self.call_after_refresh(lambda: self.show(self.picture))
