"""A gate decision as lines: every endpoint with its interval, in words; and the generators' lineage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from jupiter_engine.protocol.decision import Decision, Endpoint, Example
from jupiter_engine.protocol.state import CycleState, GeneratorState
from jupiter_tui.view.chart import interval_bar
from jupiter_tui.view.text import Line, Span, cut, cut_line, day_and_clock, mark, number, one_line, pad, rule, wrap

VERDICTS: Final = {
    "promote": ("ok", "good", "PROMOTE: better on the primary endpoint, and every guard holds"),
    "worse": ("!!", "bad", "WORSE: the candidate is measurably worse, or a guard is broken"),
    "inconclusive": ("--", "warn", "INCONCLUSIVE: neither better nor worse could be shown"),
    "not_enough_data": ("--", "warn", "NOT ENOUGH DATA: fewer units than the gate's minimum"),
}

_ROLES: Final = {"primary": "PRIMARY", "guard": "guard", "report": "report"}


def passed_words(endpoint: Endpoint) -> Span:
    """passed / failed / undecidable, or `no rule` for an endpoint that is only reported."""
    if endpoint.role == "report":
        return ("-- no rule", "dim")
    if endpoint.passed is None:
        return ("-- undecidable", "warn")
    return ("ok passed", "good") if endpoint.passed else ("!! failed", "bad")


def verdict_line(decision: Decision) -> Line:
    sign, style, words = VERDICTS[decision.verdict]
    return [(f"{sign} ", style), (words, style)]


def _signed(value: float) -> str:
    if math.isinf(value):
        return "+inf" if value > 0 else "-inf"
    return f"{value:+.4f}"


def endpoint_table(endpoints: Sequence[Endpoint], width: int) -> list[Line]:
    """One line an endpoint: both values, the interval drawn against its threshold, the outcome."""
    if not endpoints:
        return [[("nothing was measured", "dim")]]
    drawn = max(10, min(48, width - 58))
    head = pad("endpoint", 13) + pad("role", 9) + pad("candidate", 10) + pad("generator", 10) + pad("worse", drawn - 6)
    lines: list[Line] = [[(head + "better", "dim")]]
    for endpoint in endpoints:
        outcome = passed_words(endpoint)
        picture = interval_bar(endpoint.low, endpoint.effect, endpoint.high, endpoint.threshold, drawn)
        lines.append(
            [
                (pad(one_line(endpoint.name), 13), "bold"),
                (pad(_ROLES[endpoint.role], 9), "accent"),
                (pad(number(endpoint.candidate), 10), "bold"),
                (pad(number(endpoint.incumbent), 10), ""),
                (picture if math.isfinite(endpoint.effect) else " " * drawn, outcome[1]),
                (f" {outcome[0]}", outcome[1]),
            ]
        )
    lines.append([("─ interval  ● effect  | what its lower end must exceed", "dim")])
    return [cut_line(line, width) for line in lines]


def endpoint_lines(endpoint: Endpoint, width: int) -> list[Line]:
    """Name and outcome, both values, the interval drawn, and the sentence."""
    role = _ROLES[endpoint.role]
    lines: list[Line] = [
        [(pad(one_line(endpoint.name), 16), "bold"), (pad(role, 9), "accent"), passed_words(endpoint)],
        [
            ("  candidate ", "dim"),
            (number(endpoint.candidate), "bold"),
            ("   generator ", "dim"),
            (number(endpoint.incumbent), ""),
            (f"   {one_line(endpoint.unit)}", "dim"),
        ],
    ]
    interval = (
        f"  effect {_signed(endpoint.effect)}  [{_signed(endpoint.low)}, {_signed(endpoint.high)}]"
        f"  needs lower end > {_signed(endpoint.threshold)}"
    )
    lines.append([(interval, "")])
    facts = (
        f"  {endpoint.test}, p {number(endpoint.p_value, 3)}, {endpoint.units} units in {endpoint.clusters} clusters"
    )
    lines.append([(f"{facts}, could find {number(endpoint.mde, 3)}", "dim")])
    lines += wrap(endpoint.sentence, width - 2, indent="  ")
    return [cut_line(line, width) for line in lines] + [[]]


def decision_lines(decision: Decision, width: int) -> list[Line]:
    """The whole decision: verdict, sentences, endpoints (primary first), examples."""
    lines: list[Line] = [verdict_line(decision)]
    lines.append(
        [
            ("candidate ", "dim"),
            (one_line(decision.candidate), "bold"),
            ("  against ", "dim"),
            (one_line(decision.incumbent), "bold"),
        ]
    )
    look = f"look {decision.look} against this generator, slice {decision.slice},"
    look += f" error budget {decision.alpha:.4g} of {decision.alpha_total:.4g}"
    lines += [cut_line([(look, "dim")], width), []]
    order = {"primary": 0, "guard": 1, "report": 2}
    endpoints = sorted(decision.endpoints, key=lambda e: order[e.role])
    lines += endpoint_table(endpoints, width)
    lines += [[], rule("In words", width)]
    told = {endpoint.sentence for endpoint in endpoints}
    for sentence in decision.sentences:
        # The endpoints' own sentences stand with their numbers below.
        if sentence not in told:
            lines += wrap(sentence, width)
    lines += [[], rule("Endpoints", width)]
    for endpoint in endpoints:
        lines += endpoint_lines(endpoint, width)
    lines += example_lines(decision.examples, width)
    return [cut_line(line, width) for line in lines]


def example_lines(examples: Sequence[Example], width: int) -> list[Line]:
    """Items on which the two models differ, won ones first."""
    wins = sum(e.winner == "candidate" for e in examples)
    lines: list[Line] = [rule(f"Examples: {wins} won, {len(examples) - wins} lost by the candidate", width)]
    for example in sorted(examples, key=lambda e: e.winner != "candidate"):
        won = example.winner == "candidate"
        lines.append(
            [("ok won " if won else "!! lost", "good" if won else "bad"), (f"  {one_line(example.task)}", "dim")]
        )
        lines += wrap(example.question, width - 2, indent="  ")[:6]
        for label, text in (
            ("right", example.right),
            ("candidate", example.candidate),
            ("generator", example.incumbent),
        ):
            lines += [[(f"  {pad(label, 10)}", "dim"), (cut(one_line(text), max(10, width - 12)), "")]]
        lines.append([])
    return lines


def lineage_lines(generators: Sequence[GeneratorState], width: int, cursor: int | None = None) -> list[Line]:
    """One line a generator, oldest first; the active one is marked, the chosen one carries `>`."""
    if not generators:
        return [[("no generator yet: the first cycle prepares the base", "dim")]]
    lines: list[Line] = []
    for index, generator in enumerate(generators):
        chosen = index == cursor
        sign = ("ok active ", "good") if generator.active else ("   ", "dim")
        how = f"from {generator.parent}" if generator.parent else "base"
        when = day_and_clock(generator.registered_at)
        looks = f"  {generator.looks} look{'s' if generator.looks > 1 else ''}" if generator.looks else ""
        line: Line = [
            ("> " if chosen else "  ", "accent"),
            (pad(sign[0], 10), sign[1]),
            (pad(one_line(generator.name), 24), "cursor" if chosen else "bold"),
            (f" {pad(one_line(how), 18)} {when}{looks}", "dim"),
        ]
        lines.append(cut_line(line, width))
    return lines


def promote_heading(cycle: CycleState | None) -> Line:
    """What the page asks of the person right now."""
    if cycle is None:
        return [("No cycle yet, so there is nothing to decide.", "dim")]
    if cycle.decision is None:
        return [(f"Cycle {cycle.number} has not been measured yet.", "dim")]
    if cycle.waiting_for == "decision":
        keys = (
            "p promotes the candidate"
            if cycle.decision.verdict == "promote"
            else "p promotes against the gate (OVERRIDE)"
        )
        return [
            ("** ", "warn"),
            (f"Cycle {cycle.number} waits for you: {keys}, h keeps the present generator.", "bold"),
        ]
    if cycle.answer:
        done = "promoted" if cycle.answer == "promote" else "kept the generator"
        return [mark("ok"), (f" Cycle {cycle.number}: {cycle.answered_by or 'the gate'} {done}.", "bold")]
    return [(f"Cycle {cycle.number}: the gate has spoken.", "bold")]
