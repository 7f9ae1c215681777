"""Fleet: this machine, the configured others, the engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual import work
from textual.binding import BindingType
from textual.widget import Widget

from jupiter_tui.screens.page import Page, bindings
from jupiter_tui.view.fleet import cluster_lines, engine_lines, node_lines
from jupiter_tui.view.picture import Picture
from jupiter_tui.view.text import Line
from jupiter_tui.widgets.lines import Pane


class FleetPage(Page):
    PAGE = "fleet"
    BINDINGS: ClassVar[list[BindingType]] = bindings("fleet")
    AUTO_FOCUS = "#fleet"

    def body(self) -> Iterable[Widget]:
        yield Pane("Fleet", id="fleet")

    def on_screen_resume(self) -> None:
        self.desk.bridge.watch_node(wanted=True)
        super().on_screen_resume()

    def on_screen_suspend(self) -> None:
        self.desk.bridge.watch_node(wanted=False)

    def draw(self, picture: Picture) -> None:
        self.query_one("#fleet", Pane).show(lambda w: _lines(picture, w))

    def available(self, action: str) -> bool:
        return not (action == "wake" and self.picture.engine_lives)

    @work
    async def action_wake(self) -> None:
        await self.tried(self.desk.bridge.wake_engine(), "the engine runs")


def _lines(picture: Picture, width: int) -> list[Line]:
    return [*node_lines(picture, width), [], *engine_lines(picture, width), [], *cluster_lines(picture, width)]
