"""The planner's answer as tables for a terminal."""

from __future__ import annotations

import math

from jupiter_engine.cli.output import print_table
from jupiter_engine.orchestrator.planner import nearest_text
from jupiter_engine.planning.memory import RankMemory
from jupiter_engine.planning.plan import Comparison, NodePlan, Outlook
from jupiter_engine.units import bytes_text, count_text

_PARTS: tuple[tuple[str, str], ...] = (
    ("weights", "weights"),
    ("compute_copy", "their copy to compute with"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("adapters", "adapters"),
    ("activations", "activations"),
    ("attention", "attention"),
    ("logits", "logits"),
    ("transients", "short-lived copies"),
    ("margin", "allocator"),
    ("runtime", "libraries"),
)
SOURCES: dict[str, str] = {
    "measured": "measured here",
    "scaled": "converted from a measurement of another shape",
    "table": "by table; --calibrate measures it",
    "unknown": "unknown; --calibrate measures it",
    "mixed": "partly measured",
}


def print_outlook(answer: Outlook, what: str) -> None:
    """Memory of each node, then the whole, then other ways, then what should be known."""
    trained = f", of which {count_text(answer.trained)} are trained" if answer.trained != answer.parameters else ""
    print()
    print(f"training {what}: {count_text(answer.parameters)} parameters{trained}, {count_text(answer.tokens)} tokens")
    print()
    _print_memory(answer.nodes)
    for node in answer.nodes:
        if node.why:
            print(f"{node.node} allows {bytes_text(node.allowed or 0)}: {node.why}")
    if answer.fits is False:
        print(f"does not fit: {answer.refusal}")
        print(f"nearest plan that fits: {nearest_text(answer)}")
    print()
    _print_nodes(answer)
    _print_whole(answer)
    print()
    print_table(
        ("WAY", "TOKENS", "MEMORY OF A RANK", "FITS", "TIME"),
        [
            (one.name, count_text(one.tokens), bytes_text(one.memory), _yes(one.fits), _comparison_time(one))
            for one in answer.comparisons
        ],
    )
    for warning in answer.warnings:
        print(f"warning: {warning}")


def _print_memory(nodes: tuple[NodePlan, ...]) -> None:
    rows: list[tuple[str, ...]] = []
    for field, text in _PARTS:
        sizes = [int(getattr(node.memory, field)) for node in nodes]
        if any(sizes):
            rows.append((text, *(bytes_text(size) for size in sizes)))
    rows.append(("one rank", *(bytes_text(node.memory.total) for node in nodes)))
    rows.append(("together on its memory", *(bytes_text(node.needed) for node in nodes)))
    rows.append(("allowed", *(bytes_text(node.allowed) if node.allowed is not None else "unknown" for node in nodes)))
    rows.append(("fits", *(_yes(node.fits) for node in nodes)))
    rows.append(("while a checkpoint is written", *(_writing(node.memory) for node in nodes)))
    print_table(("MEMORY", *(f"{node.node} ({node.twin}, {node.kind})" for node in nodes)), rows)


def _writing(memory: RankMemory) -> str:
    return f"{bytes_text(memory.writing)} more, if free"


def _print_nodes(answer: Outlook) -> None:
    print_table(
        ("NODE", "DEVICE", "RANKS", "TOKENS/S", "SOURCE", "ADDS", "WITHOUT IT"),
        [
            (
                node.node,
                node.device,
                node.ranks,
                _range(node.speed.low, node.speed.high),
                node.speed.source,
                f"{node.adds:.0%}",
                f"{node.without:.1f} x as long" if node.without is not None else "-",
            )
            for node in answer.nodes
        ],
    )


def _print_whole(answer: Outlook) -> None:
    print()
    print(
        f"speed      {_range(answer.tokens_per_s_low, answer.tokens_per_s_high)} tokens/s "
        f"({SOURCES[answer.source]}); {answer.sync_share:.1%} of the time on the wire"
    )
    if answer.seconds_low is not None and answer.seconds_high is not None:
        print(f"time       {span_text(answer.seconds_low, answer.seconds_high)}")
    if answer.energy_kwh_low is not None and answer.energy_kwh_high is not None:
        print(f"energy     {_range(answer.energy_kwh_low, answer.energy_kwh_high)} kWh (estimate from typical watts)")
    utilisation = [node for node in answer.nodes if node.speed.mfu is not None]
    if utilisation:
        told = ", ".join(f"{node.node} {node.speed.mfu or 0.0:.0%}" for node in utilisation)
        print(f"of peak    {told}")
    if answer.islands > 1:
        print(f"loss       {answer.penalty:+.1%} expected against one group, for {answer.islands} islands")
    available = "are known once a cycle has read them all"
    if answer.available is not None:
        times = f", read at most {answer.epochs:.1f} times over" if answer.epochs is not None else ""
        available = f"are at least {count_text(answer.available)}{times}"
    wanted = f"{count_text(answer.tokens_wanted)} would be 20 a parameter"
    print(f"tokens     {wanted}; distinct ones of the domain {available}")
    print(f"disk       {bytes_text(answer.checkpoint)} a checkpoint")


def _yes(fits: bool | None) -> str:  # noqa: FBT001 - a verdict with three values
    return "unknown" if fits is None else "yes" if fits else "NO"


def _comparison_time(one: Comparison) -> str:
    if math.isnan(one.days_low):
        return "unknown"
    return span_text(86400 * one.days_low, 86400 * one.days_high)


def span_text(low_s: float, high_s: float) -> str:
    """A range of times in one unit: 2 to 3 h."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if high_s >= 2 * size or unit == "s":
            low, high = low_s / size, high_s / size
            digits = 1 if high < 10 else 0
            first, last = f"{low:.{digits}f}", f"{high:.{digits}f}"
            return f"{first} {unit}" if first == last else f"{first} to {last} {unit}"
    raise AssertionError("the last unit takes everything")


def _range(low: float, high: float) -> str:
    if high <= 0:
        return "unknown"
    first, last = _figure(low), _figure(high)
    return first if first == last else f"{first} to {last}"


def _figure(value: float) -> str:
    return count_text(value) if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"
