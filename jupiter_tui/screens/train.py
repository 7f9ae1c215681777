"""Train: the running cycle."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final

from textual import work
from textual.binding import BindingType
from textual.containers import Horizontal
from textual.widget import Widget

from jupiter_engine.protocol.commands import Pause, Resume, Stop
from jupiter_tui.screens.page import Page, bindings
from jupiter_tui.view.log import log_title
from jupiter_tui.view.picture import Picture
from jupiter_tui.view.text import rule, wrap
from jupiter_tui.view.train import FIRST_RUN, funnel, head_lines, numbers, progress_line
from jupiter_tui.widgets.chart import Chart
from jupiter_tui.widgets.lines import Bar, Pane
from jupiter_tui.widgets.log import LogPane

SMOOTHING: Final = (0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 0.98)
ZOOMS: Final = ("", "-zoom-log", "-zoom-charts")


class TrainPage(Page):
    PAGE = "train"
    BINDINGS: ClassVar[list[BindingType]] = bindings("train")
    AUTO_FOCUS = "#log"

    _smoothing = 2
    _zoom = 0
    _frozen = False

    def body(self) -> Iterable[Widget]:
        yield Bar(id="strip")
        yield Bar(id="progress")
        with Horizontal(id="middle"):
            yield Pane("Samples", id="funnel")
            yield Pane("Step", id="numbers")
            yield Chart("Loss", lambda m: m.loss, name="loss", empty="begins with the train stage")
            yield Chart(
                "Tokens/s", lambda m: m.tokens_per_s, name="speed", empty="begins with the train stage", from_zero=True
            )
        yield LogPane(id="log")

    def draw(self, picture: Picture) -> None:
        if self._frozen:
            return
        self._draw_head(picture)
        weight = SMOOTHING[self._smoothing]
        self.query_one("#loss", Chart).take(picture.curve, weight)
        self.query_one("#speed", Chart).take(picture.curve, weight)
        self.query_one("#funnel", Pane).show(lambda w: self._funnel_lines(picture, w))
        self.query_one("#numbers", Pane).show(lambda w: numbers(picture, w))
        log = self.query_one("#log", LogPane)
        log.set_title(log_title(picture))
        log.take(picture.log if picture.rank is None else picture.rank_log)

    def _draw_head(self, picture: Picture) -> None:
        strip, progress = self.query_one("#strip", Bar), self.query_one("#progress", Bar)
        lines = head_lines(picture, self.app.size.width)
        if strip.styles.height is None or strip.styles.height.value != len(lines):
            # Only on change: a new height lays the whole page out again.
            strip.styles.height = len(lines)
        strip.show(lambda w: head_lines(picture, w))
        progress.show(lambda w: [progress_line(picture, w)])

    def _funnel_lines(self, picture: Picture, width: int) -> list[list[tuple[str, str]]]:
        if not picture.loaded:
            return []
        if picture.cycle is None:
            return [piece for sentence in FIRST_RUN for piece in wrap(sentence, width)]
        lines = funnel(picture.cycle, width, reviewed=picture.reviewed_samples)
        # Where there is no room for a box of their own, the step's numbers follow here.
        if not self.query_one("#numbers").display and picture.curve.last is not None:
            lines += [rule("Step", width), *numbers(picture, width)]
        return lines

    # -- actions ---------------------------------------------------------------------------------
    def available(self, action: str) -> bool:
        cycle, picture = self.picture.cycle, self.picture
        status = cycle.status if cycle else ""
        match action:
            case "start":
                return bool(picture.domain) and (cycle is None or status in ("finished", "stopped", "paused", "failed"))
            case "pause":
                return status == "running"
            case "resume":
                stands_still = status in ("running", "pausing", "stopping") and not picture.engine_lives
                return status in ("paused", "stopped", "failed") or stands_still
            case "stop":
                return status in ("running", "pausing", "paused", "failed")
            case "rank":
                return bool(picture.ranks)
        return True

    def action_start(self) -> None:
        self.start_cycles(self.picture.domain)

    @work
    async def action_pause(self) -> None:
        if (cycle := self.picture.cycle) is not None:
            await self.tried(
                self.desk.bridge.perform(Pause(cycle=cycle.id)), f"cycle {cycle.number} pauses at the next safe point"
            )

    @work
    async def action_resume(self) -> None:
        if (cycle := self.picture.cycle) is None:
            return
        if cycle.status in ("paused", "stopped", "failed"):
            await self.tried(self.desk.bridge.perform(Resume(cycle=cycle.id)), f"cycle {cycle.number} goes on")
        else:
            await self.tried(self.desk.bridge.wake_engine(), "the engine runs again")

    @work
    async def action_stop(self) -> None:
        if (cycle := self.picture.cycle) is None:
            return
        from jupiter_tui.screens.sheets import ConfirmSheet

        question = f"Stop cycle {cycle.id} at its next safe point? What it made stays; R can take it up again."
        if await self.app.push_screen_wait(ConfirmSheet("Stop", question)):
            await self.tried(
                self.desk.bridge.perform(Stop(cycle=cycle.id)), f"cycle {cycle.number} stops at the next safe point"
            )

    def action_freeze(self) -> None:
        self._frozen = not self._frozen
        self.set_class(self._frozen, "-frozen")
        log = self.query_one("#log", LogPane)
        log.set_title("Log  VIEW PAUSED (space goes on)" if self._frozen else "Log")
        if not self._frozen:
            self.show(self.picture)

    def action_follow(self) -> None:
        log = self.query_one("#log", LogPane)
        log.set_follow(not log.follow)

    @work
    async def action_find(self) -> None:
        from jupiter_tui.screens.sheets import AskSheet

        log = self.query_one("#log", LogPane)
        hint = "Letter case is ignored; n and N walk through the matches. Empty ends the search."
        term = await self.app.push_screen_wait(AskSheet("Find in the log", [[(hint, "dim")]], value=log.term))
        if term is not None:
            log.find(term)

    def action_match(self, step: int) -> None:
        self.query_one("#log", LogPane).go(step)

    def action_rank(self, step: int) -> None:
        """The worker's own log, then that of each rank, round."""
        order: list[int | None] = [None, *(rank for rank, _ in self.picture.ranks)]
        at = order.index(self.picture.rank) if self.picture.rank in order else 0
        self.desk.bridge.show_rank(order[(at + step) % len(order)])

    def action_smooth(self, step: int) -> None:
        self._smoothing = max(0, min(len(SMOOTHING) - 1, self._smoothing + step))
        for chart in self.query(Chart):
            chart.take(self.picture.curve, SMOOTHING[self._smoothing])

    def action_zoom(self) -> None:
        self._zoom = (self._zoom + 1) % len(ZOOMS)
        for index, name in enumerate(ZOOMS[1:], 1):
            self.set_class(index == self._zoom, name)
        self.call_after_refresh(lambda: self.show(self.picture))
