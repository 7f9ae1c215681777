"""How often the gate is wrong, and how often it finds what is there: seeded simulations with known truth."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from jupiter_engine.protocol.specs import GateSpec
from jupiter_engine.training.evaluation.gate import decide
from jupiter_engine.training.evaluation.statistics import (
    cluster_bootstrap,
    mcnemar_mid_p,
    paired_score_p,
    sign_flip_p,
    spent_alpha,
)
from tests.training.evaluation.made_scores import CANDIDATE, INCUMBENT, World, scores

HISTORIES = 2000
LOOKS = 20
ITEMS = 1000
DISCORDANT = 0.30

Counts = NDArray[np.int64]

mid_p = cache(mcnemar_mid_p)


def outcomes(effect: float, looks: int, seed: int) -> Counts:
    """int64 [HISTORIES, looks, 3]: items only the candidate has right, only the incumbent, both or neither."""
    wins = (DISCORDANT + effect) / 2
    shares = [wins, DISCORDANT - wins, 1 - DISCORDANT]
    return np.random.default_rng(seed).multinomial(ITEMS, shares, size=(HISTORIES, looks))


def ever_promoted(drawn: Counts, alphas: list[float]) -> float:
    """Share of histories in which some look's mid-p is at most that look's alpha."""
    p = np.array([[mid_p(int(w), int(loss)) for w, loss, _ in history] for history in drawn])
    return float((p <= np.array(alphas)).any(axis=1).mean())


def test_twenty_looks_at_equal_models_stay_within_the_budget() -> None:
    drawn = outcomes(0.0, LOOKS, 1)
    # Allowance: 0.2 points for the mid-p, two standard errors (1 point) for the simulation.
    assert ever_promoted(drawn, [spent_alpha(0.05, look) for look in range(1, LOOKS + 1)]) <= 0.05 + 0.002 + 0.01


def test_testing_at_five_percent_every_time_would_replace_most_incumbents_by_equals() -> None:
    assert ever_promoted(outcomes(0.0, LOOKS, 1), [0.05] * LOOKS) > 0.55


def test_a_point_difference_of_five_percent_would_be_no_rule_at_all() -> None:
    """'Replace if 5 points better' on 100 items at 50 % discordance, no true difference, 20 looks."""
    drawn = np.random.default_rng(2).multinomial(100, [0.25, 0.25, 0.5], size=(HISTORIES, LOOKS))
    assert float(((drawn[..., 0] - drawn[..., 1]) / 100 > 0.05).any(axis=1).mean()) > 0.95


@pytest.mark.parametrize(("effect", "power"), [(0.03, 0.64), (0.05, 0.976), (0.08, 1.0)])
def test_three_looks_find_real_gains(effect: float, power: float) -> None:
    found = ever_promoted(outcomes(effect, 3, 3), [spent_alpha(0.05, look) for look in (1, 2, 3)])
    assert found == pytest.approx(power, abs=0.04)


def test_clustered_items_fool_mcnemar_but_not_sign_flips_by_document() -> None:
    """Five items a document that rise and fall together: the independent test errs far above its level."""
    rng = np.random.default_rng(5)
    alpha, fooled, clustered = spent_alpha(0.05, 1), 0, 0
    for trial in range(400):
        mood = rng.choice([-1, 0, 1], p=[0.2, 0.6, 0.2], size=60)
        totals = (mood * 5).astype(np.float64)
        wins, losses = int(totals[totals > 0].sum()), int(-totals[totals < 0].sum())
        fooled += mid_p(wins, losses) <= alpha
        clustered += sign_flip_p(totals, trial, flips=999) <= alpha
    assert fooled / 400 > 0.12
    assert clustered / 400 <= alpha + 0.02


def test_text_intervals_cover_with_skewed_documents() -> None:
    """A third of the documents carry all the difference and windows differ in size: bounds still cover about 97 %."""
    rng = np.random.default_rng(6)
    below = above = 0
    alpha, trials = 0.0304, 400
    for trial in range(trials):
        weights = rng.uniform(500, 1200, 60)
        totals = weights * np.where(rng.uniform(size=60) < 1 / 3, rng.exponential(0.06, 60), rng.normal(0, 0.02, 60))
        low, high = cluster_bootstrap(totals, weights, alpha, trial, resamples=600)
        below += high < 0.02
        above += low > 0.02
    assert above / trials <= alpha + 0.02
    # The upper bound errs more often: a sample that misses the rare large documents cannot know of them.
    assert below / trials <= alpha + 0.06


def test_a_guard_lets_a_candidate_at_its_margin_pass_about_alpha_of_the_time() -> None:
    """True accuracy lower by exactly the margin (8 points), 150 items at 20 % discordance."""
    rng = np.random.default_rng(9)
    alpha = spent_alpha(0.05, 1)
    drawn = rng.multinomial(150, [0.06, 0.14, 0.80], size=HISTORIES)
    passed = np.array([paired_score_p(int(w), int(loss), 150, -0.08) <= alpha for w, loss, _ in drawn])
    assert float(passed.mean()) <= alpha + 0.01


@pytest.mark.slow
def test_whole_decisions_on_equal_models_are_rarely_promotions() -> None:
    """60 first looks of the whole gate, no true difference: at most a handful promote (alpha_1 alone allows 1.8)."""
    world = World(items=150, windows=90, chunks=40)
    gate = GateSpec()
    verdicts = [decide(gate, CANDIDATE, INCUMBENT, scores(world, seed), [], 1, 0, seed).verdict for seed in range(60)]
    assert verdicts.count("promote") <= 4
    assert verdicts.count("worse") <= 12
    assert verdicts.count("inconclusive") >= 45


@pytest.mark.slow
def test_whole_decisions_find_a_large_gain_and_a_large_loss() -> None:
    better = World(bits=0.05, known=0.14, vault=0.08, usable=0.10, items=300)
    worse = World(bits=-0.05, known=-0.14, vault=-0.08, usable=-0.10, items=300)
    gate = GateSpec()
    for world, verdict in ((better, "promote"), (worse, "worse")):
        reached: list[str] = [
            decide(gate, CANDIDATE, INCUMBENT, scores(world, seed), [], 1, 0, seed).verdict for seed in range(8)
        ]
        assert reached.count(verdict) >= 7, (verdict, reached)
