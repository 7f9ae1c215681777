"""The cycle's report: what was done, what was measured, what was decided. Pure: state in, Markdown out."""

from __future__ import annotations

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
    def get(stage: str, key: str, default: object = 0) -> object:
        return cycle.stages[stage].result.get(key, default)

    lines = ["## What was done\n", "| stage | result | time |", "|---|---|---|"]

    def row(stage: str, text: str) -> None:
        lines.append(f"| {stage} | {text} | {_seconds(cycle, stage)} |")

    collected = (
        f"{get('collect', 'documents')} documents, {bytes_text(float(str(get('collect', 'bytes'))))}, "
        f"{get('collect', 'items')} items"
        + (" (unchanged since the last collection)" if get("collect", "reused") else "")
    )
    row("collect", collected)
    row("generate", f"{get('generate', 'samples')} samples, {float(str(get('generate', 'tokens_per_s'))):.0f} tokens/s")
    rejected = cycle.stages["filter"].result.get("rejected", {})
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(rejected.items(), key=lambda x: -x[1]))
    row(
        "filter",
        f"{get('filter', 'accepted')} accepted, {sum(rejected.values())} rejected"
        + (f" ({reasons})" if reasons else ""),
    )
    row("review", f"{get('review', 'accepted')} accepted, {get('review', 'reviewed')} looked at by a person")
    mix = ", ".join(f"{name} {share:.0%}" for name, share in cycle.stages["queue"].result.get("mix", {}).items())
    row(
        "queue",
        f"{get('queue', 'sequences')} sequences, {count_text(float(str(get('queue', 'tokens'))))} tokens ({mix})",
    )
    row(
        "train",
        f"{get('train', 'steps')} steps, loss {float(str(get('train', 'first_loss'))):.3f} -> "
        f"{float(str(get('train', 'last_loss'))):.3f}, {float(str(get('train', 'tokens_per_s'))):.0f} tokens/s",
    )
    units = ", ".join(f"{task} {count}" for task, count in cycle.stages["evaluate"].result.get("units", {}).items())
    row("evaluate", f"{units} units on both models")
    return [*lines, ""]


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
    model = cycle.stages["train"].result.get("model", {})
    active = state.active_generator(cycle.domain)
    lines += ["", f"Trained model: `{model.get('folder', '-')}`"]
    if active is not None:
        lines.append(f"Generator now: `{active.model.folder}`")
    lines += ["", f"Chat with the trained model: `jupiter chat --model {model.get('name', '-')}`"]
    return lines
