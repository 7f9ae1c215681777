"""The cycle's report: what was done, what was measured, what was decided. Pure: state in, Markdown out."""

from __future__ import annotations

from jupiter_engine.orchestrator import results
from jupiter_engine.orchestrator.results import told
from jupiter_engine.orchestrator.sentences import mix_text, one_line, reasons_text
from jupiter_engine.protocol.decision import Decision, Endpoint
from jupiter_engine.protocol.state import CycleState, State
from jupiter_engine.units import bytes_text, count_text, duration_text


def cycle_report(cycle: CycleState, state: State) -> str:
    """Markdown for people; every number comes from the cycle's own results."""
    parts = [f"# Cycle {cycle.id}\n", *_done(cycle), *_measured(cycle), *_decided(cycle, state)]
    return "\n".join(parts) + "\n"


def _seconds(cycle: CycleState, stage: str) -> str:
    s = cycle.stages[stage]
    if s.started_at is None or s.ended_at is None:
        return "-"
    return duration_text(s.ended_at - s.started_at)


def _done(cycle: CycleState) -> list[str]:
    lines = ["## What was done\n", "| stage | result | time |", "|---|---|---|"]
    for stage in ("collect", "generate", "filter", "review", "queue", "train", "evaluate"):
        text = _result(told(stage, cycle.stages[stage].result))
        lines.append(f"| {stage} | {_cell(text)} | {_seconds(cycle, stage)} |")
    return [*lines, ""]


def _result(one: results.Told | None) -> str:
    match one:
        case results.Collected():
            reused = " (unchanged since the last collection)" if one.reused else ""
            return f"{one.documents} documents, {bytes_text(one.bytes)}, {one.items} items{reused}"
        case results.Generated():
            return f"{one.samples} samples, {one.tokens_per_s:.0f} tokens/s"
        case results.Filtered():
            reasons = f" ({reasons_text(one.rejected)})" if one.rejected else ""
            return f"{one.accepted} accepted, {sum(one.rejected.values())} rejected{reasons}"
        case results.Reviewed():
            return f"{one.accepted} accepted, {one.reviewed} looked at by a person"
        case results.Queued():
            return f"{one.sequences} sequences, {count_text(one.tokens)} tokens ({mix_text(one.mix)})"
        case results.Trained():
            return (
                f"{one.steps} steps, loss {one.first_loss:.3f} -> {one.last_loss:.3f}, {one.tokens_per_s:.0f} tokens/s"
            )
        case results.Evaluated():
            units = ", ".join(f"{task} {count}" for task, count in one.units.items())
            return f"{units} units on both models"
        case _:
            return "-"


def _cell(text: str) -> str:
    """A worker's words may not end the cell, nor the table."""
    return one_line(text).replace("|", "\\|")


def _measured(cycle: CycleState) -> list[str]:
    decision = cycle.decision
    if decision is None:
        return []
    return ["## What was measured\n", *endpoint_table(decision), ""]


def endpoint_table(decision: Decision) -> list[str]:
    """A Markdown table of the endpoints."""
    lines = [
        "| endpoint | role | generator | candidate | better by | interval | must exceed | p | passed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {e.name} | {e.role} | {e.incumbent:.4f} | {e.candidate:.4f} | {e.effect:+.4f} {e.unit} | "
        f"{e.low:+.4f} .. {e.high:+.4f} | {e.threshold:+.4f} | {e.p_value:.4f} | {passed_text(e)} |"
        for e in decision.endpoints
    ]
    return lines


def passed_text(endpoint: Endpoint) -> str:
    return {True: "yes", False: "no", None: "not decidable"}[endpoint.passed]


def _decided(cycle: CycleState, state: State) -> list[str]:
    decision = cycle.decision
    if decision is None:
        return []
    lines = [
        "## What was decided\n",
        f"The gate says **{decision.verdict}** (look {decision.look}, alpha {decision.alpha:.4f}).",
    ]
    lines += [f"- {sentence}" for sentence in decision.sentences]
    outcome = (
        f"{decision.candidate} is now the generator of {cycle.domain}."
        if cycle.answer == "promote"
        else f"{decision.incumbent} stays the generator of {cycle.domain}."
    )
    lines += ["", f"{outcome} (answered by {cycle.answered_by})"]
    trained = told("train", cycle.stages["train"].result)
    model = trained.model if isinstance(trained, results.Trained) else None
    active = state.active_generator(cycle.domain)
    lines += ["", f"Trained model: `{one_line(model.folder) if model is not None else '-'}`"]
    if active is not None:
        lines.append(f"Generator now: `{active.model.folder}`")
    if model is not None:
        lines += ["", f"Chat with the trained model: `jupiter chat --model {one_line(model.name)}`"]
    return lines
