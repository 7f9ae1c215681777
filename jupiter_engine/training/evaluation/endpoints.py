"""One comparison at a time: paired scores in, an Endpoint with its interval, test and sentence out."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import msgspec

from jupiter_engine.protocol.decision import Endpoint
from jupiter_engine.protocol.specs import GateSpec
from jupiter_engine.training.evaluation import statistics
from jupiter_engine.training.evaluation.evidence import Pairs, Task
from jupiter_engine.training.evaluation.statistics import Floats

Role = Literal["primary", "guard"]

BITS = "bits per byte"
SHARE = "share of units"

TITLES: dict[Task, str] = {
    "vault_bpb": "Unseen text",
    "mcq_known": "Questions on known documents",
    "mcq_vault": "Questions on unseen documents",
    "yield": "Fitness as a generator",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tested:
    p_value: float
    test: str
    mde: float


def threshold_of(gate: GateSpec, pairs: Pairs, role: Role) -> float:
    """What the lower bound of the improvement must exceed, in the endpoint's unit.

    Primary: `min_effect`. Guard: minus the margin; for text the margin is a share of the incumbent's bits per byte.
    """
    if role == "primary":
        return gate.min_effect
    if pairs.is_text:
        return -gate.margin_vault_bpb * pairs.levels()[1]
    return -(gate.margin_yield if pairs.task == "yield" else gate.margin_mcq)


def shortage(gate: GateSpec, pairs: Pairs) -> str:
    """What is missing for a decision on these pairs, as a sentence; empty if there is enough.

    Clusters count, not documents: documents that repeat each other are one observation. Yield has no minimum of its
    own: its test is exact enough about small samples to fail on them.
    """
    clusters = len(set(pairs.clusters))
    title = TITLES[pairs.task]
    if pairs.is_text and len(pairs.units) < gate.min_windows:
        return f"{title}: {len(pairs.units)} windows were scored, the gate wants at least {gate.min_windows}."
    if pairs.task in ("mcq_known", "mcq_vault") and len(pairs.units) < gate.min_items:
        return f"{title}: {len(pairs.units)} questions were asked, the gate wants at least {gate.min_items}."
    wanted = 2 if pairs.task == "yield" else max(2, gate.min_documents)
    if clusters < wanted:
        return f"{title}: the units come from {clusters} independent documents, the gate wants at least {wanted}."
    return ""


def measure(gate: GateSpec, pairs: Pairs, role: Role, alpha: float, seed: int) -> Endpoint:
    """Compare the two models on one task. Needs at least two clusters (see `shortage`).

    `passed` iff the one-sided p-value is at most `alpha` and the lower bound exceeds the threshold; None if the
    sample is smaller than the gate's minimum.
    """
    totals, weights = pairs.by_cluster()
    candidate, incumbent = pairs.levels()
    threshold = threshold_of(gate, pairs, role)
    seed = _seed(seed, pairs.task)
    low, high = statistics.cluster_bootstrap(totals, weights, alpha, seed)
    if pairs.is_text:
        tested = _test_text(totals, weights, threshold, alpha, seed)
    else:
        tested = _test_share(pairs, totals, weights, threshold, alpha, seed)
    endpoint = Endpoint(
        name=pairs.task,
        role=role,
        unit=BITS if pairs.is_text else SHARE,
        candidate=candidate,
        incumbent=incumbent,
        effect=statistics.ratio(totals, weights),
        low=low,
        high=high,
        threshold=threshold,
        alpha=alpha,
        p_value=tested.p_value,
        test=tested.test,
        units=len(pairs.units),
        clusters=len(totals),
        mde=tested.mde,
        passed=None if shortage(gate, pairs) else tested.p_value <= alpha and low > threshold,
        sentence="",
    )
    return _with_sentence(endpoint, pairs)


def broken(endpoint: Endpoint) -> bool:
    """Shown to be worse: the upper bound lies below zero (primary) or below minus the margin (guard)."""
    return endpoint.passed is False and endpoint.high < min(endpoint.threshold, 0.0)


def _seed(seed: int, task: Task) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{task}".encode()).digest()[:8], "big")


def _test_text(totals: Floats, weights: Floats, threshold: float, alpha: float, seed: int) -> _Tested:
    shifted = totals - threshold * weights
    return _Tested(
        p_value=statistics.sign_flip_p(shifted, seed, flips=statistics.flips_for(alpha)),
        test="sign flips by document" + ("" if threshold == 0 else ", shifted by the threshold"),
        mde=statistics.detectable(statistics.clustered_se(totals, weights), alpha),
    )


def _test_share(pairs: Pairs, totals: Floats, weights: Floats, threshold: float, alpha: float, seed: int) -> _Tested:
    """0/1 outcomes. Superiority over zero: the larger of exact mid-p McNemar (units as independent) and clustered sign
    flips, so a wrong idea of the clustering cannot promote. Any other threshold: Tango's score test, its variance
    inflated by the design effect.
    """
    wins, losses = pairs.wins_losses()
    units = len(pairs.units)
    design = statistics.design_effect(totals, weights, wins, losses)
    # One more discordant item than seen: models that never differed on this sample are not known never to differ.
    discordant = min(1.0, (wins + losses + 1) / units)
    mde = statistics.detectable_share(discordant, units, alpha, design=design)
    if threshold == 0:
        flipped = statistics.sign_flip_p(totals, seed, flips=statistics.flips_for(alpha))
        exact = statistics.mcnemar_mid_p(wins, losses)
        return _Tested(p_value=max(flipped, exact), test="mid-p McNemar and sign flips by document", mde=mde)
    score = statistics.paired_score_p(wins, losses, units, threshold, design=design)
    return _Tested(p_value=score, test="paired score test with a margin, clustered by document", mde=mde)


# -- sentences -------------------------------------------------------------------------------------
def number(value: float, unit: str) -> str:
    """0.7851 bits per byte -> '0.785'; 0.62 of units -> '62.0 %'."""
    return f"{value:.3f}" if unit == BITS else f"{100 * value:.1f} %"


def _with_sentence(endpoint: Endpoint, pairs: Pairs) -> Endpoint:
    return msgspec.structs.replace(endpoint, sentence=_sentence(endpoint, pairs))


def _sentence(e: Endpoint, pairs: Pairs) -> str:
    """Level of both, difference, interval, what was required, and whether it holds: all numbers to check it by hand."""
    title = TITLES[pairs.task]
    cover = f"{100 * (1 - 2 * e.alpha):.4g} % interval"
    change = _change(e)
    if pairs.is_text:
        facts = (
            f"{title}: the candidate needs {e.candidate:.3f} bits per byte where the incumbent needs {e.incumbent:.3f}"
            f" on {e.units} windows from {pairs.documents} documents that neither was trained on; {change}"
        )
    else:
        wins, losses = pairs.wins_losses()
        right = "gives a usable sample for" if pairs.task == "yield" else "answers"
        what = "passages it never saw" if pairs.task == "yield" else "questions"
        facts = (
            f"{title}: the candidate {right} {number(e.candidate, e.unit)} of {e.units} {what} from {pairs.documents}"
            f" documents, the incumbent {number(e.incumbent, e.unit)} (only the candidate {wins}, only the incumbent"
            f" {losses}); {change}"
        )
    interval = f", {cover} {_signed(e.low, e.unit)} .. {_signed(e.high, e.unit)}, p = {e.p_value:.2g}."
    return facts + interval + " " + _required(e)


def _change(e: Endpoint) -> str:
    return f"improvement {_signed(e.effect, e.unit)}"


def _signed(value: float, unit: str) -> str:
    return f"{value:+.3f}" if unit == BITS else f"{100 * value:+.1f} pp"


def _required(e: Endpoint) -> str:
    wanted = f"Required: above {_signed(e.threshold, e.unit)} with p <= {e.alpha:.2g}"
    if e.passed is None:
        return f"{wanted}: too few units to decide."
    if e.passed:
        return f"{wanted}: holds."
    if broken(e):
        return f"{wanted}: fails, the candidate is measurably worse."
    return f"{wanted}: not shown. {_needed(e)}"


def _needed(e: Endpoint) -> str:
    """How large a difference this sample could have found, and what sample would do."""
    text = f"This sample finds a true difference of {_signed(e.mde, e.unit).lstrip('+')} with 80 % power"
    hoped = max(e.effect, 0.0) - e.threshold
    if e.role == "primary" and e.effect <= e.threshold:
        return text + "; the candidate shows no improvement of the size required."
    if not (e.mde > 0 and hoped > 0):
        return text + "."
    units = math.ceil(e.units * (e.mde / hoped) ** 2)
    if units <= e.units:
        return text + "."
    truth = "the difference is as measured" if e.effect > 0 else "the two are equal"
    return text + f"; if {truth}, about {units} units would show it."
