"""The Train page's text: stages, progress, funnel and numbers."""

from __future__ import annotations

from typing import Any, Final

from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.journal import STAGES
from jupiter_engine.protocol.state import CycleState, StageState
from jupiter_engine.units import bytes_text, count_text, duration_text
from jupiter_tui.view.header import cycle_state_words, stage_share
from jupiter_tui.view.log import stalled
from jupiter_tui.view.picture import Picture
from jupiter_tui.view.text import Line, Span, bar, clock, cut_line, mark, number, one_line, pad, plain, span

FIRST_RUN: Final = (
    "No cycle has run yet: press l to start one.",
    "It collects text, generates and filters samples, trains a candidate and measures it, on this machine.",
    "Quit when you like: the work goes on.",
)


def stage_mark(stage: StageState, *, waits: bool = False) -> Span:
    """ok done, .. running, !! failed, ** waits for a person, == halted, -- not yet."""
    if waits:
        return ("**", "warn")
    if stage.status == "halted":
        return ("==", "warn")
    return mark({"done": "ok", "running": "run", "failed": "bad", "pending": "none"}[stage.status])


def stage_strip(cycle: CycleState | None, width: int) -> list[Line]:
    """All stages in order with their marks, broken over as many lines as the width needs."""
    # Two blanks between stages, or one where that saves a line.
    narrow = 1 + sum(len(name) + 3 for name in STAGES) + len(STAGES) - 1
    between = " " if narrow <= width < narrow + len(STAGES) - 1 else "  "
    lines: list[Line] = [[(" ", "")]]
    waits_in = {"review": "review", "decision": "promote"}.get(cycle.waiting_for, "") if cycle else ""
    for name in STAGES:
        stage = cycle.stages.get(name) if cycle else None
        sign = stage_mark(stage, waits=name == waits_in and stage.status != "done") if stage else mark("none")
        active = sign[0] != "ok" and sign[0] != "--"
        piece: Line = [sign, (" ", ""), (name, "bold" if active else "dim" if sign[0] == "--" else ""), (between, "")]
        if len(plain(lines[-1])) + len(plain(piece)) - len(between) > width:
            lines.append([(" ", "")])
        lines[-1] += piece
    return lines


def head_lines(picture: Picture, width: int) -> list[Line]:
    """The stages, and under them that the ranks stand still, if they do."""
    lines = stage_strip(picture.cycle, width)
    standing = stalled(picture.cycle, picture.state.notices) if picture.cycle is not None else ""
    return [*lines, cut_line([(" ", ""), mark("bad"), (f" {standing}", "bad")], width)] if standing else lines


def progress_line(picture: Picture, width: int) -> Line:
    """The running stage: bar, share, count, rate, ETA; else what the cycle's state is."""
    cycle = picture.cycle
    if cycle is None:
        return []
    stage = cycle.current_stage()
    if stage is None or stage.status != "running" or cycle.waiting_for:
        took = _took(cycle, picture.now)
        what = f" at {stage.stage}" if stage is not None and cycle.status != "finished" else ""
        return cut_line(
            [(f" cycle {cycle.number} {cycle_state_words(cycle)}{what}", "bold"), (f"  {took}", "dim")], width
        )
    line: Line = [(f" {stage.stage} ", "bold")]
    share, progress = stage_share(picture), picture.progress
    if share is None or progress is None:
        line += [("working, no count yet", "dim")]
    else:
        line += [(bar(share, max(8, min(30, width // 5))), "accent"), (f" {share:4.0%} ", "bold")]
        if progress.unit != "percent":
            line += [(f" {number(progress.done)}/{number(progress.total)} {one_line(progress.unit)}", "")]
        if progress.rate_per_s and progress.unit != "percent":
            line += [(f"  {number(progress.rate_per_s, 3)}/s", "")]
        line += [(f"  ETA {duration_text(progress.eta_s)}", "bold")]
    if stage.started_at is not None:
        line += [(f"  running {duration_text(picture.now - stage.started_at)}", "dim")]
    if stage.attempt > 1:
        line += [(f"  attempt {stage.attempt}", "warn")]
    if progress is not None and progress.note:
        line += [(f"  {one_line(progress.note)}", "dim")]
    return cut_line(line, width)


def _took(cycle: CycleState, now: float) -> str:
    end = cycle.ended_at
    if end is None:
        return f"begun {duration_text(now - cycle.created_at)} ago"
    return f"took {duration_text(end - cycle.created_at)}, ended {clock(end)}"


def result_of(cycle: CycleState, stage: str, key: str) -> Any:
    """A value of a finished stage's result, None before it finished."""
    state = cycle.stages.get(stage)
    return state.result.get(key) if state is not None else None


def _count(cycle: CycleState, stage: str, key: str, table: str) -> int | None:
    # A cycle that reuses an earlier corpus adds no rows: the stage's own result is the better source.
    value = result_of(cycle, stage, key)
    return int(value) if value is not None else cycle.counts.get(table)


def funnel(cycle: CycleState | None, width: int, *, reviewed: int | None = None) -> list[Line]:
    """Documents -> chunks -> samples -> accepted -> queued tokens, and why samples were rejected."""
    if cycle is None:
        return []
    samples, accepted = cycle.counts.get("samples"), cycle.counts.get("accepted")
    judged = (accepted or 0) + cycle.counts.get("rejected", 0)
    rows: list[tuple[str, int | None, str]] = [
        ("documents", _count(cycle, "collect", "documents", "documents"), _reused(cycle)),
        ("chunks", _count(cycle, "collect", "chunks", "chunks"), _size(result_of(cycle, "collect", "bytes"))),
        ("samples", samples, _of(samples, cycle.settings.get("generation"))),
        ("accepted", accepted, f"{accepted / judged:.0%} of {judged}" if accepted is not None and judged else ""),
        ("reviewed", reviewed if reviewed is not None else result_of(cycle, "review", "reviewed"), ""),
        ("queued tokens", result_of(cycle, "queue", "tokens"), _sequences(cycle)),
    ]
    reasons = sorted(cycle.rejected.items(), key=lambda item: (-item[1], item[0]))
    narrow = width < 40
    if reasons and narrow:
        # No room for a list of its own: the reasons stand in the row, the most frequent first.
        rejected = ", ".join(f"{one_line(reason)} {count}" for reason, count in reasons)
        rows.insert(4, ("rejected", cycle.counts.get("rejected", 0), rejected))
    lines: list[Line] = []
    for label, value, note in rows:
        shown = "-" if value is None else f"{value:,}"
        lines.append([(pad(label, 14), "dim"), (shown.rjust(9), "bold" if value else "dim"), (f"  {note}", "dim")])
    if reasons and not narrow:
        total = cycle.counts.get("rejected", 0)
        lines.append([(f"rejected {total}, because:", "warn")])
        for reason, count in reasons:
            room = max(4, width - 30)
            lines.append([(f"  {pad(one_line(reason), 18)}{count:>5} ", ""), (bar(count / max(1, total), room), "dim")])
    return [cut_line(line, width) for line in lines]


def _of(samples: int | None, generation: Any) -> str:
    wanted = generation.get("samples") if isinstance(generation, dict) else None
    return f"of {wanted} asked" if wanted and samples is not None else ""


def _size(value: Any) -> str:
    return bytes_text(float(value)) if value else ""


def _reused(cycle: CycleState) -> str:
    return "reused" if result_of(cycle, "collect", "reused") else ""


def _sequences(cycle: CycleState) -> str:
    value = result_of(cycle, "queue", "sequences")
    return f"{value:,} sequences" if value else ""


def numbers(picture: Picture, width: int) -> list[Line]:
    """Loss, rate, gradient norm, speed of the newest optimizer step."""
    last = picture.curve.last
    if last is None:
        return [[("no optimizer step yet", "dim")]]
    first = picture.curve.metrics[0]
    rows = [
        ("step", f"{last.step:,}"),
        ("loss", f"{last.loss:.4f}  (first {first.loss:.4f})"),
        ("learning rate", f"{last.learning_rate:.2e}"),
        ("grad norm", number(last.grad_norm, 3)),
        ("tokens/s", count_text(last.tokens_per_s)),
        ("tokens", count_text(last.tokens)),
        ("seconds/step", number(last.seconds, 3)),
    ]
    measured = picture.curve.measured
    if measured:
        best = min(measured, key=lambda m: m.held_out_loss or 0.0)
        rows.append(
            ("held out", f"{measured[-1].held_out_loss:.4f}  (best {best.held_out_loss:.4f}, step {best.step})")
        )
    if last.mfu is not None:
        rows.append(("MFU", f"{last.mfu:.1%}"))
    if last.peak_bytes:
        rows.append(("memory, peak", " ".join(bytes_text(value) for value in last.peak_bytes)))
    if len(last.rank_seconds) > 1:
        rows.append(("ranks s/step", " ".join(number(s, 3) for s in last.rank_seconds)))
        rows.append(("ranks' rows", " ".join(str(rows_of) for rows_of in last.rank_rows)))
    rows += _lost(last)
    return [cut_line([(pad(label, 14), "dim"), span(value, "bold")], width) for label, value in rows]


def _lost(metric: Metric) -> list[tuple[str, str]]:
    """Where the ranks' time goes besides computing, as shares of all of it; nothing where it was not measured."""
    parts = {
        "data": metric.data_seconds,
        "communication": metric.communication_seconds,
        "slower ranks": metric.idle_seconds,
    }
    total = sum(metric.rank_seconds) + sum(sum(part) for part in parts.values())
    if not total or not metric.data_seconds:
        return []
    return [("waits for", ", ".join(f"{name} {sum(part) / total:.1%}" for name, part in parts.items()))]
