"""The gate: does the candidate replace the incumbent? Evidence in, a Decision out; nothing is read or written here.

Promote if and only if the candidate is superior on the primary endpoint and non-inferior on every guard, each
tested at this look's share of the error budget. Because all must pass (an intersection-union test), testing
several endpoints costs no further correction.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from jupiter_engine import __version__
from jupiter_engine.protocol.decision import Decision, Endpoint, Example
from jupiter_engine.protocol.orders import ModelRef
from jupiter_engine.protocol.rows import Item, Row, Score
from jupiter_engine.protocol.specs import GateSpec
from jupiter_engine.training.evaluation.endpoints import TITLES, broken, measure, shortage
from jupiter_engine.training.evaluation.evidence import TASKS, Pairs, Task, pair_scores
from jupiter_engine.training.evaluation.statistics import spent_alpha

Verdict = Literal["promote", "worse", "inconclusive", "not_enough_data"]

EXAMPLES_PER_SIDE = 3
"""Wins and losses shown of each task."""
_ANSWER_CHARS = 400


def decide(
    gate: GateSpec,
    candidate: ModelRef,
    incumbent: ModelRef,
    scores: Sequence[Score],
    items: Sequence[Item],
    look: int,
    slice: int,  # noqa: A002 - the vault slice; the word used by rows and orders
    seed: int,
) -> Decision:
    """Judge `candidate` against `incumbent` at the `look`-th look (from 1) on paired `scores`.

    Deterministic in its arguments and independent of the order of `scores` and `items`. Raises StateError when the
    scores are not paired (evidence.pair_scores).
    """
    alpha = spent_alpha(gate.alpha, look)
    used = [score for score in scores if score.model_sha256 in (candidate.sha256, incumbent.sha256)]
    same = candidate.sha256 == incumbent.sha256
    pairs = {} if same else pair_scores(used, candidate.sha256, incumbent.sha256)
    endpoints, shortages = _measure_all(gate, pairs, alpha, seed)
    verdict: Verdict = "inconclusive" if same else _verdict(endpoints, shortages)
    if same:
        sentences = [
            f"{candidate.name} and {incumbent.name} are the same model, byte for byte: there is nothing to decide."
        ]
    else:
        sentences = _sentences(gate, verdict, candidate, incumbent, pairs, endpoints, shortages)
    sentences.append(
        f"Look {look} at {incumbent.name} on vault slice {slice}: {alpha:.3g} of the error budget of {gate.alpha:g}"
        " is spent here; over all looks the chance to replace it by a model that is no better stays within the budget."
    )
    return Decision(
        verdict=verdict,
        candidate=candidate.name,
        candidate_sha256=candidate.sha256,
        incumbent=incumbent.name,
        incumbent_sha256=incumbent.sha256,
        look=look,
        slice=slice,
        alpha=alpha,
        alpha_total=gate.alpha,
        endpoints=tuple(endpoints),
        examples=tuple(_examples(pairs, items, seed)),
        sentences=tuple(sentences),
        seed=seed,
        versions={"jupiter": __version__, "python": platform.python_version(), "numpy": np.__version__},
        items_sha256=_rows_sha256([item for item in items if item.id in {score.unit for score in used}]),
        scores_sha256=_rows_sha256(used),
    )


def _measure_all(gate: GateSpec, pairs: dict[Task, Pairs], alpha: float, seed: int) -> tuple[list[Endpoint], list[str]]:
    """The primary first, then the guards; and what is missing for a decision."""
    order: list[Task] = [gate.primary, *(task for task in TASKS if task != gate.primary)]
    endpoints: list[Endpoint] = []
    shortages: list[str] = []
    for task in order:
        found = pairs.get(task)
        if found is None:
            if task in (gate.primary, "vault_bpb"):
                shortages.append(f"{TITLES[task]}: nothing was scored, and the gate cannot do without it.")
            continue
        missing = shortage(gate, found)
        if missing:
            shortages.append(missing)
        if len(set(found.clusters)) >= 2:
            endpoints.append(measure(gate, found, "primary" if task == gate.primary else "guard", alpha, seed))
    return endpoints, shortages


def _verdict(endpoints: list[Endpoint], shortages: list[str]) -> Verdict:
    if any(broken(endpoint) for endpoint in endpoints):
        return "worse"
    if shortages:
        return "not_enough_data"
    return "promote" if all(endpoint.passed for endpoint in endpoints) else "inconclusive"


def _sentences(
    gate: GateSpec,
    verdict: Verdict,
    candidate: ModelRef,
    incumbent: ModelRef,
    pairs: dict[Task, Pairs],
    endpoints: list[Endpoint],
    shortages: list[str],
) -> list[str]:
    sentences = [_headline(verdict, candidate, incumbent, endpoints)]
    sentences += [endpoint.sentence for endpoint in endpoints]
    sentences += shortages
    sentences += [
        f"{TITLES[task]} ({task}) was not measured and guards nothing: no unit was asked for or none exists."
        for task in TASKS
        if task not in pairs and task not in (gate.primary, "vault_bpb")
    ]
    if gate.primary == "vault_bpb":
        sentences.append(
            "Caution: tuning a model to follow instructions raises its bits per byte on raw text, so this primary"
            " endpoint favours a candidate that was trained plainly; read it together with the questions."
        )
    return sentences


def _headline(verdict: Verdict, candidate: ModelRef, incumbent: ModelRef, endpoints: list[Endpoint]) -> str:
    names = f"{candidate.name} against {incumbent.name}"
    guards = sum(endpoint.role == "guard" for endpoint in endpoints)
    if verdict == "promote":
        return f"{names}: promote. Better on the primary endpoint, and all {guards} guards hold."
    if verdict == "worse":
        hurt = ", ".join(TITLES[_task(endpoint)].lower() for endpoint in endpoints if broken(endpoint))
        return f"{names}: keep the incumbent. The candidate is measurably worse ({hurt})."
    if verdict == "not_enough_data":
        return f"{names}: keep the incumbent. There is not enough data to decide."
    open_ends = ", ".join(TITLES[_task(endpoint)].lower() for endpoint in endpoints if endpoint.passed is False)
    return f"{names}: keep the incumbent. Inconclusive: not shown on {open_ends}; nothing shows it to be worse either."


def _task(endpoint: Endpoint) -> Task:
    return next(task for task in TASKS if task == endpoint.name)


def _examples(pairs: dict[Task, Pairs], items: Sequence[Item], seed: int) -> list[Example]:
    """Up to EXAMPLES_PER_SIDE wins and as many losses of each 0/1 task, drawn by a seeded hash: not hand-picked."""
    by_id = {item.id: item for item in items}
    examples: list[Example] = []
    for task, found in pairs.items():
        if found.is_text:
            continue
        shown = {"candidate": 0, "incumbent": 0}
        difference = found.differences()
        for index in sorted(range(len(found.units)), key=lambda i: _draw(seed, found.units[i])):
            if difference[index] == 0:
                continue
            winner: Literal["candidate", "incumbent"] = "candidate" if difference[index] > 0 else "incumbent"
            if shown[winner] == EXAMPLES_PER_SIDE:
                continue
            shown[winner] += 1
            item = by_id.get(found.units[index])
            examples.append(
                Example(
                    task=task,
                    question=item.question if item else f"Write a training sample from passage {found.units[index]}",
                    right=item.options[item.answer] if item else "",
                    candidate=found.candidate_answers[index][:_ANSWER_CHARS],
                    incumbent=found.incumbent_answers[index][:_ANSWER_CHARS],
                    winner=winner,
                )
            )
    return examples


def _draw(seed: int, unit: str) -> bytes:
    return hashlib.sha256(f"{seed}:{unit}".encode()).digest()


def _rows_sha256(rows: Sequence[Row]) -> str:
    """Hash over the rows' JSON, sorted by id: the same rows in any order give the same hash."""
    digest = hashlib.sha256()
    for line in sorted(msgspec.json.encode(row) for row in rows):
        digest.update(line + b"\n")
    return digest.hexdigest()
