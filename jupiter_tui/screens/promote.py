"""Promote: the evidence, the decision, the lineage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual import work
from textual.binding import BindingType
from textual.containers import Container
from textual.widget import Widget

from jupiter_engine.protocol.commands import Decide, Rollback
from jupiter_engine.protocol.state import GeneratorState
from jupiter_tui.screens.page import Page, bindings
from jupiter_tui.screens.sheets import ConfirmSheet, TypeSheet
from jupiter_tui.view.decision import decision_lines, lineage_lines, promote_heading, verdict_line
from jupiter_tui.view.picture import Picture
from jupiter_tui.view.text import Line, cut_line, wrap
from jupiter_tui.widgets.lines import Bar, Pane

OVERRIDE = "OVERRIDE"


class PromotePage(Page):
    PAGE = "promote"
    BINDINGS: ClassVar[list[BindingType]] = bindings("promote")
    AUTO_FOCUS = "#decision"

    _chosen = ""

    def body(self) -> Iterable[Widget]:
        yield Bar(id="asks")
        with Container(id="promote-columns"):
            yield Pane("Decision", id="decision")
            yield Pane("Generators", id="lineage")

    def generators(self) -> list[GeneratorState]:
        return self.picture.state.generators.get(self.picture.domain, [])

    def chosen(self) -> int:
        """The generator under the cursor; at first the active one."""
        known = self.generators()
        for index, generator in enumerate(known):
            if generator.name == self._chosen or (not self._chosen and generator.active):
                return index
        return max(0, len(known) - 1)

    def draw(self, picture: Picture) -> None:
        cycle = picture.cycle
        self.query_one("#asks", Bar).show(lambda w: [cut_line([(" ", ""), *promote_heading(cycle)], w)])
        pane = self.query_one("#decision", Pane)
        if cycle is None or cycle.decision is None:
            pane.show(lambda w: wrap(_NOTHING_YET, w, "dim"))
        else:
            decision = cycle.decision
            pane.show(lambda w: decision_lines(decision, w))
        lineage = self.query_one("#lineage", Pane)
        lineage.show(lambda w: lineage_lines(self.generators(), w, self.chosen()))
        lineage.reveal(self.chosen())

    # -- actions ---------------------------------------------------------------------------------
    def available(self, action: str) -> bool:
        cycle = self.picture.cycle
        if action in ("promote", "keep"):
            return cycle is not None and cycle.waiting_for == "decision" and cycle.decision is not None
        known = self.generators()
        if action == "rollback":
            return bool(known) and not known[self.chosen()].active
        return bool(known)

    def action_move(self, step: int) -> None:
        known = self.generators()
        if known:
            self._chosen = known[max(0, min(len(known) - 1, self.chosen() + step))].name
            self.show(self.picture)

    @work
    async def action_promote(self) -> None:
        cycle = self.picture.cycle
        if cycle is None or cycle.decision is None:
            return
        decision = cycle.decision
        against = decision.verdict != "promote"
        lines: list[Line] = [
            [(f"{decision.candidate} shall replace {decision.incumbent} as the generator of {cycle.domain}.", "")]
        ]
        if against:
            lines += [
                [],
                verdict_line(decision),
                [("This goes against the gate. The override is stored with the decision.", "warn")],
            ]
        sheet = TypeSheet("Promote", lines, OVERRIDE if against else decision.candidate)
        if await self.app.push_screen_wait(sheet):
            command = Decide(cycle=cycle.id, answer="promote", override=against)
            await self.tried(self.desk.bridge.perform(command), f"{decision.candidate} becomes the generator")

    @work
    async def action_keep(self) -> None:
        cycle = self.picture.cycle
        if cycle is None or cycle.decision is None:
            return
        question = f"Keep {cycle.decision.incumbent}? The candidate {cycle.decision.candidate} stays on disk."
        if await self.app.push_screen_wait(ConfirmSheet("Keep the generator", question)):
            await self.tried(self.desk.bridge.perform(Decide(cycle=cycle.id, answer="keep")), "the generator is kept")

    @work
    async def action_rollback(self) -> None:
        target = self.generators()[self.chosen()]
        lines: list[Line] = [
            [(f"{target.name} shall be the generator of {target.domain} again. No model is deleted.", "")]
        ]
        if await self.app.push_screen_wait(TypeSheet("Roll back", lines, target.name)):
            await self.tried(
                self.desk.bridge.perform(Rollback(domain=target.domain, to=target.name)),
                f"{target.name} is active again",
            )


_NOTHING_YET = (
    "No decision yet. When a cycle has trained a candidate, both models are measured on the same held-out items; "
    "every endpoint, its interval and the gate's verdict then stand here, and you decide."
)
