"""Review: one sample at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import msgspec
from textual import work
from textual.binding import BindingType
from textual.containers import Horizontal
from textual.widget import Widget

from jupiter_engine.errors import JupiterError
from jupiter_engine.protocol.commands import FinishReview, Review
from jupiter_tui.screens.page import Page, bindings
from jupiter_tui.screens.sheets import AskSheet, ChoiceSheet, ConfirmSheet
from jupiter_tui.view.picture import Picture
from jupiter_tui.view.review import REASONS, STATUSES, chunk_lines, position_line, sample_lines
from jupiter_tui.view.text import Line
from jupiter_tui.widgets.lines import Bar, Pane

if TYPE_CHECKING:
    from jupiter_engine.api import SampleView
    from jupiter_engine.protocol.rows import Chunk

LIMIT: Final = 5000
"""Samples held at once; narrower filters reach the rest."""

Verdict = Literal["accept", "reject", "undecided"]


@dataclass(frozen=True)
class Step:
    """What one verdict of this session replaced."""

    sample: str
    verdict: Verdict
    reason: str


class ReviewPage(Page):
    PAGE = "review"
    BINDINGS: ClassVar[list[BindingType]] = bindings("review")
    AUTO_FOCUS = "#sample"

    def body(self) -> Iterable[Widget]:
        yield Bar(id="position")
        with Horizontal(id="review-columns"):
            yield Pane("Sample", id="sample")
            yield Pane("Source", id="source")

    def on_mount(self) -> None:
        self._samples: list[SampleView] = []
        self._index = 0
        self._counts: dict[str, int] = {}
        self._steps: list[Step] = []
        self._loaded_for: tuple[object, ...] = ()
        self._status: str | None = None
        self._search = ""
        self._chunk: tuple[str, Chunk | None] = ("", None)
        self._unanswered = 0
        super().on_mount()

    # -- drawing ---------------------------------------------------------------------------------
    def current(self) -> SampleView | None:
        return self._samples[self._index] if self._index < len(self._samples) else None

    def draw(self, picture: Picture) -> None:
        cycle = picture.cycle
        if cycle is not None:
            counted = (
                cycle.id,
                cycle.counts.get("samples"),
                cycle.counts.get("accepted"),
                cycle.counts.get("rejected"),
            )
            if counted != self._loaded_for:
                if cycle.id != (self._loaded_for[:1] or ("",))[0]:
                    self._index, self._steps = 0, []
                self._loaded_for = counted
                self.load()
        self._draw_sample()

    def _draw_sample(self) -> None:
        cycle, sample = self.picture.cycle, self.current()
        waits = cycle is not None and cycle.waiting_for == "review"
        self.query_one("#position", Bar).show(
            lambda w: [
                position_line(
                    self._index,
                    len(self._samples),
                    counts=self._counts,
                    status=self._status,
                    search=self._search,
                    width=w,
                    waits=waits,
                )
            ]
        )
        pane, source = self.query_one("#sample", Pane), self.query_one("#source", Pane)
        pane.set_title(f"Sample {sample.sample.id[:12]}" if sample else "Sample")
        if sample is None:
            pane.show(lambda _: [[(self._empty_words(), "dim")]])
            source.show(lambda _: [])
            return
        beside = source.display
        chunk = self._chunk[1] if self._chunk[0] == sample.sample.chunk else None
        known = self._chunk[0] == sample.sample.chunk

        def source_text(width: int) -> list[Line]:
            return chunk_lines(chunk, width) if known else [[("reading…", "dim")]]

        def lines(width: int) -> list[Line]:
            shown = sample_lines(sample, width)
            return shown if beside else [*shown, [], *source_text(width)]

        pane.show(lines)
        source.show(source_text)
        if not known:
            self.load_chunk(sample)

    def _empty_words(self) -> str:
        if self.picture.cycle is None:
            return "No cycle yet, so there is no sample. Page 4 starts one."
        if self._status or self._search:
            return "No sample matches the filter (/ changes it)."
        return "This cycle has no sample yet; they appear here while the generate stage runs."

    # -- loading ---------------------------------------------------------------------------------
    @work(exclusive=True, group="samples")
    async def load(self) -> None:
        """Read the cycle's samples; the one on screen stays on screen."""
        cycle = self.picture.cycle
        if cycle is None:
            return
        at = self.current()
        bridge = self.desk.bridge
        try:
            samples = await bridge.samples(
                cycle.domain, cycle.number, status=self._status, search=self._search, limit=LIMIT
            )
            self._counts = await bridge.count_samples(cycle.domain, cycle.number)
        except JupiterError as error:
            self.say(error.sentence(), bad=True)
            return
        self._samples = samples
        ids = [s.sample.id for s in samples]
        self._index = (
            ids.index(at.sample.id)
            if at is not None and at.sample.id in ids
            else min(self._index, max(0, len(ids) - 1))
        )
        self._draw_sample()
        self.update_keys()

    @work(exclusive=True, group="chunk")
    async def load_chunk(self, sample: SampleView) -> None:
        chunk_id = sample.sample.chunk
        try:
            self._chunk = (chunk_id, await self.desk.bridge.chunk(sample.domain, chunk_id))
        except JupiterError as error:
            self.say(error.sentence(), bad=True)
            return
        self._draw_sample()

    # -- actions ---------------------------------------------------------------------------------
    def available(self, action: str) -> bool:
        cycle = self.picture.cycle
        match action:
            case "accept" | "reject" | "move":
                return self.current() is not None
            case "undo":
                return bool(self._steps)
            case "finish":
                return cycle is not None and cycle.waiting_for == "review"
        return cycle is not None

    def action_move(self, step: int) -> None:
        if self._samples:
            self._index = max(0, min(len(self._samples) - 1, self._index + step))
            self.query_one("#sample", Pane).scroll_to(y=0, animate=False)
            self._draw_sample()

    def action_accept(self) -> None:
        self._judge("accept", "")

    @work
    async def action_reject(self) -> None:
        sample = self.current()
        if sample is None:
            return
        reason = await self.app.push_screen_wait(ChoiceSheet("Why reject it?", REASONS))
        if reason:
            self._judge("reject", reason)

    def _judge(self, verdict: Verdict, reason: str) -> None:
        sample = self.current()
        if sample is None:
            return
        self._steps.append(Step(sample.sample.id, sample.review or "undecided", sample.review_reason))
        self._put(sample, verdict, reason)
        self.action_move(1)
        self.update_keys()

    def action_undo(self) -> None:
        if not self._steps:
            return
        step = self._steps.pop()
        found = next((i for i, s in enumerate(self._samples) if s.sample.id == step.sample), None)
        if found is None:
            self.say("that sample is not in this filter; the verdict was taken back all the same")
            self.send(Review(sample=step.sample, verdict=step.verdict, reason=step.reason))
        else:
            self._index = found
            self._put(self._samples[found], step.verdict, step.reason)
        self._draw_sample()
        self.update_keys()

    def _put(self, sample: SampleView, verdict: Verdict, reason: str) -> None:
        """Show the verdict at once and give the command; a refusal reads the samples again."""
        changed = msgspec.structs.replace(
            sample, review="" if verdict == "undecided" else verdict, review_reason=reason, reviewer="user"
        )
        self._samples[self._samples.index(sample)] = changed
        for status, difference in ((sample.status, -1), (changed.status, 1)):
            if status in self._counts:
                self._counts[status] += difference
        self._counts["reviewed"] = self._counts.get("reviewed", 0) + bool(changed.review) - bool(sample.review)
        self.send(Review(sample=sample.sample.id, verdict=verdict, reason=reason))

    @work
    async def send(self, command: Review) -> None:
        if not await self.tried(self.desk.bridge.perform(command)):
            self.load()

    @work
    async def action_filter(self) -> None:
        hint = f"A status ({', '.join(STATUSES)}), words of the text, or both: `rejected import`. Empty shows all."
        value = " ".join(part for part in (self._status or "", self._search) if part)
        text = await self.app.push_screen_wait(AskSheet("Filter samples", [[(hint, "dim")]], value=value))
        if text is None:
            return
        first, _, rest = text.partition(" ")
        self._status, self._search = (first, rest.strip()) if first in STATUSES else (None, text)
        self._index = 0
        self.load()

    def action_reload(self) -> None:
        self.load()

    @work
    async def action_finish(self) -> None:
        cycle = self.picture.cycle
        if cycle is None:
            return
        left = self.picture.waiting_samples
        question = (
            f"Finish the review of cycle {cycle.id}? {left} samples without your verdict keep what the filters said."
        )
        if await self.app.push_screen_wait(ConfirmSheet("Finish the review", question)):
            await self.tried(self.desk.bridge.perform(FinishReview(cycle=cycle.id)), "the cycle goes on")
