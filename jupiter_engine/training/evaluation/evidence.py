"""Scores of two models, paired unit by unit: the only thing the gate's statistics ever see."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from jupiter_engine.errors import StateError
from jupiter_engine.protocol.rows import Score
from jupiter_engine.training.evaluation.statistics import Floats, bits_per_byte, cluster_sums

Task = Literal["vault_bpb", "mcq_known", "mcq_vault", "yield"]
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True, slots=True)
class Pairs:
    """One task's units in sorted order with both models' values; all arrays float64 [n]."""

    task: Task
    units: tuple[str, ...]
    documents: int
    clusters: tuple[str, ...]
    candidate: Floats
    incumbent: Floats
    weight: Floats
    candidate_answers: tuple[str, ...]
    incumbent_answers: tuple[str, ...]

    @property
    def is_text(self) -> bool:
        """Nats over bytes (lower is better), as opposed to 0/1 outcomes (higher is better)."""
        return self.task == "vault_bpb"

    def differences(self) -> Floats:
        """float64 [n], positive where the candidate is better: bits of a window, or -1/0/1 of an item."""
        if self.is_text:
            return (self.incumbent - self.candidate) / math.log(2.0)
        return self.candidate - self.incumbent

    def by_cluster(self) -> tuple[Floats, Floats]:
        """(sum of differences, sum of weights) of each cluster, float64 [G] each."""
        totals, weights = cluster_sums(self.clusters, self.differences(), self.weight)
        return totals, weights

    def levels(self) -> tuple[float, float]:
        """(candidate, incumbent): bits per byte, or share of ones."""
        if self.is_text:
            return bits_per_byte(self.candidate, self.weight), bits_per_byte(self.incumbent, self.weight)
        return float(self.candidate.mean()), float(self.incumbent.mean())

    def wins_losses(self) -> tuple[int, int]:
        """Units on which only the candidate, or only the incumbent, is right (0/1 tasks)."""
        difference = self.differences()
        return int(np.count_nonzero(difference > 0)), int(np.count_nonzero(difference < 0))


def pair_scores(scores: Iterable[Score], candidate_sha256: str, incumbent_sha256: str) -> dict[Task, Pairs]:
    """Pair the two models' scores; tasks nobody was measured on are absent. Other models' rows are ignored.

    Raises StateError when a unit was scored for one model only, twice, with different weights, or with a value that
    the task cannot have: a comparison on unequal ground would be worth nothing.
    """
    sides: dict[tuple[str, str], dict[str, Score]] = {}
    for score in scores:
        if score.model_sha256 not in (candidate_sha256, incumbent_sha256):
            continue
        side = sides.setdefault((score.task, score.model_sha256), {})
        if score.unit in side:
            raise StateError(f"{score.task}: unit {score.unit} was scored twice for {score.model}", fix=_REDO)
        side[score.unit] = score
    found: dict[Task, Pairs] = {}
    for task in TASKS:
        ours, theirs = sides.get((task, candidate_sha256), {}), sides.get((task, incumbent_sha256), {})
        if ours.keys() != theirs.keys():
            missing = sorted(ours.keys() ^ theirs.keys())
            raise StateError(
                f"{task}: {len(missing)} units were scored for one model only (the first is {missing[0]})", fix=_REDO
            )
        if ours:
            found[task] = _pairs(task, [ours[unit] for unit in sorted(ours)], [theirs[unit] for unit in sorted(ours)])
    return found


_REDO = "remove the run folder of the evaluation and run the cycle again: only what is missing is scored"


def _pairs(task: Task, ours: Sequence[Score], theirs: Sequence[Score]) -> Pairs:
    for mine, other in zip(ours, theirs, strict=True):
        if (mine.weight, mine.cluster, mine.document) != (other.weight, other.cluster, other.document):
            raise StateError(f"{task}: unit {mine.unit} is not the same unit for both models", fix=_REDO)
        for score in (mine, other):
            if not (math.isfinite(score.value) and score.weight > 0 and math.isfinite(score.weight)):
                raise StateError(f"{task}: unit {score.unit} of {score.model} has no usable number", fix=_REDO)
            if task != "vault_bpb" and (score.value not in (0.0, 1.0) or score.weight != 1.0):
                raise StateError(f"{task}: unit {score.unit} of {score.model} is neither 0 nor 1", fix=_REDO)
    return Pairs(
        task=task,
        units=tuple(score.unit for score in ours),
        documents=len({score.document for score in ours}),
        clusters=tuple(score.cluster for score in ours),
        candidate=np.array([score.value for score in ours], dtype=np.float64),
        incumbent=np.array([score.value for score in theirs], dtype=np.float64),
        weight=np.array([score.weight for score in ours], dtype=np.float64),
        candidate_answers=tuple(score.answer for score in ours),
        incumbent_answers=tuple(score.answer for score in theirs),
    )
