"""The gate's answer with its evidence."""

from __future__ import annotations

from typing import Literal

import msgspec


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One measured comparison of candidate and incumbent.

    `effect` is signed so that positive means the candidate is better, in `unit`;
    the interval is one-sided at `alpha` below and above (a 1-2*alpha interval).
    """

    name: str
    role: Literal["primary", "guard", "report"]
    unit: str
    candidate: float
    incumbent: float
    effect: float
    low: float
    high: float
    threshold: float
    """The lower bound must exceed this for the endpoint to pass."""
    alpha: float
    p_value: float
    test: str
    units: int
    clusters: int
    mde: float
    """Smallest true effect that this sample would find with 80 % power at `alpha`."""
    passed: bool | None
    """None: not decidable (too few units, or nothing measured)."""
    sentence: str


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """One item on which the two models differ."""

    task: str
    question: str
    right: str
    candidate: str
    incumbent: str
    winner: Literal["candidate", "incumbent"]


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """`promote`: better on the primary endpoint and every guard holds. `worse`: measurably worse
    on the primary or a guard is broken. `inconclusive`: neither could be shown.
    `not_enough_data`: fewer units than the gate's minimum."""

    verdict: Literal["promote", "worse", "inconclusive", "not_enough_data"]
    candidate: str
    candidate_sha256: str
    incumbent: str
    incumbent_sha256: str
    look: int
    """k-th look against this incumbent, from 1."""
    slice: int
    alpha: float
    alpha_total: float
    endpoints: tuple[Endpoint, ...]
    examples: tuple[Example, ...]
    sentences: tuple[str, ...]
    """Plain words: what was measured, what it means, what would be needed if inconclusive."""
    seed: int
    versions: dict[str, str]
    items_sha256: str
    scores_sha256: str
