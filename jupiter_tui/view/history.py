"""All cycles as rows, and one cycle in full."""

from __future__ import annotations

from typing import Final

from jupiter_engine.protocol.journal import STAGES
from jupiter_engine.protocol.state import CycleState, State
from jupiter_engine.units import duration_text
from jupiter_tui.view.chart import chart
from jupiter_tui.view.decision import VERDICTS, decision_lines
from jupiter_tui.view.header import cycle_state_words
from jupiter_tui.view.picture import Curve
from jupiter_tui.view.text import Line, Span, cut_line, day_and_clock, number, pad, rule, wrap
from jupiter_tui.view.train import funnel, result_of, stage_mark


def newest_first(state: State) -> list[CycleState]:
    return list(reversed(state.cycles.values()))


def cycle_sign(cycle: CycleState) -> Span:
    if cycle.status == "finished":
        return ("ok", "good") if cycle.outcome == "promoted" else ("ok", "dim")
    if cycle.waiting_for and cycle.status == "running":
        return ("**", "warn")
    return {"failed": ("!!", "bad"), "stopped": ("==", "warn"), "paused": ("==", "warn")}.get(
        cycle.status, ("..", "accent")
    )


def _loss(cycle: CycleState) -> str:
    first, last = result_of(cycle, "train", "first_loss"), result_of(cycle, "train", "last_loss")
    return f"{number(first, 3)} > {number(last, 3)}" if first is not None else "-"


def primary_effect(cycle: CycleState) -> str:
    """The primary endpoint's effect, `-` before the gate."""
    if cycle.decision is None:
        return "-"
    primary = next((e for e in cycle.decision.endpoints if e.role == "primary"), None)
    return "-" if primary is None else f"{primary.name} {primary.effect:+.3f}"


_COLUMNS: Final = (("cycle", 16), ("state", 23), ("took", 8), ("loss", 14), ("measured", 18), ("begun", 17))
HEADING: Final[Line] = [("     " + "".join(pad(name, width) for name, width in _COLUMNS), "dim")]


def cycle_row(cycle: CycleState, width: int, now: float, *, chosen: bool) -> Line:
    """One line: mark, id, state, took, loss, effect, begun."""
    took = duration_text((cycle.ended_at or now) - cycle.created_at)
    begun = day_and_clock(cycle.created_at)
    values = (cycle.id, cycle_state_words(cycle), took, _loss(cycle), primary_effect(cycle), begun)
    cells = [pad(value, size - 1) + " " for value, (_, size) in zip(values, _COLUMNS, strict=True)]
    line: Line = [("> " if chosen else "  ", "accent"), cycle_sign(cycle), (" ", "")]
    line += [(cells[0], "cursor" if chosen else "bold"), (cells[1], ""), ("".join(cells[2:]), "dim")]
    return cut_line(line, width)


def stage_lines(cycle: CycleState, width: int) -> list[Line]:
    """One line a stage: mark, how long, attempts, what failed."""
    lines: list[Line] = []
    for name in STAGES:
        stage = cycle.stages[name]
        took = duration_text(stage.ended_at - stage.started_at) if stage.ended_at and stage.started_at else "-"
        line: Line = [stage_mark(stage), (f" {pad(name, 10)}", ""), (pad(took, 9, right=True), "bold")]
        if stage.attempt > 1:
            line += [(f"  attempt {stage.attempt}", "warn")]
        if stage.failure is not None:
            line += [(f"  {stage.failure.title}: {stage.failure.detail}".replace("\n", " "), "bad")]
        lines.append(cut_line(line, width))
    return lines


def cycle_lines(cycle: CycleState, width: int, *, report: str, curve: Curve, now: float) -> list[Line]:
    """Everything about one cycle: outcome, stages, funnel, loss curve, decision, report."""
    took = duration_text((cycle.ended_at or now) - cycle.created_at)
    lines: list[Line] = [
        [
            (cycle.id, "bold"),
            (f"  {cycle_state_words(cycle)}", "accent"),
            (f"  {cycle.mode}, asked by {cycle.by}, {took}", "dim"),
        ]
    ]
    if cycle.decision is not None:
        sign, style, words = VERDICTS[cycle.decision.verdict]
        lines.append([(f"gate: {sign} {words}", style)])
    lines += [
        [],
        rule("Stages", width),
        *stage_lines(cycle, width),
        [],
        rule("Samples", width),
        *funnel(cycle, width),
        [],
    ]
    lines += [rule("Loss by step", width)]
    steps, losses = [m.step for m in curve.metrics], [m.loss for m in curve.metrics]
    lines += (
        chart(steps, losses, width=min(width, 100), height=12, weight=0.0, empty="no optimizer step was recorded")
        if steps
        else [[("no optimizer step was recorded", "dim")]]
    )
    if cycle.decision is not None:
        lines += [[], rule("Decision", width), *decision_lines(cycle.decision, width)]
    lines += [[], rule("Report", width)]
    lines += wrap(report, width) if report else [[("no report yet", "dim")]]
    return [cut_line(line, width) for line in lines]
