"""Each statistic against scipy, a hand-computed case, or the sample-size table that the gate's defaults come from."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from jupiter_engine.training.evaluation import statistics
from jupiter_engine.training.evaluation.statistics import (
    bits_per_byte,
    cluster_bootstrap,
    cluster_sums,
    clustered_se,
    design_effect,
    detectable,
    detectable_share,
    flips_for,
    mcnemar_mid_p,
    normal_quantile,
    paired_score_p,
    ratio,
    sign_flip_p,
    spent_alpha,
    units_needed,
)

Floats = NDArray[np.float64]


def floats(*values: float) -> Floats:
    return np.array(values, dtype=np.float64)


# -- error budget ----------------------------------------------------------------------------------
def test_spent_alpha_is_the_documented_series() -> None:
    assert [round(spent_alpha(0.05, look), 4) for look in (1, 2, 3, 5)] == [0.0304, 0.0076, 0.0034, 0.0012]


def test_spent_alpha_never_exceeds_the_budget_over_many_looks() -> None:
    total = sum(spent_alpha(0.05, look) for look in range(1, 100_000))
    assert 0.04999 < total < 0.05


def test_spent_alpha_refuses_look_zero() -> None:
    with pytest.raises(ValueError, match="count from 1"):
        spent_alpha(0.05, 0)


# -- McNemar ---------------------------------------------------------------------------------------
@given(wins=st.integers(0, 400), losses=st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_mid_p_equals_scipys_binomial(wins: int, losses: int) -> None:
    m = wins + losses
    expected = stats.binom.sf(wins, m, 0.5) + 0.5 * stats.binom.pmf(wins, m, 0.5)
    assert mcnemar_mid_p(wins, losses) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_mid_p_by_hand() -> None:
    # X ~ Bin(3, 1/2): P(X > 2) + P(X = 2)/2 = 1/8 + 3/16.
    assert mcnemar_mid_p(2, 1) == 5 / 16
    assert mcnemar_mid_p(0, 0) == 0.5


def test_mid_p_lies_between_the_exact_tests_two_sides() -> None:
    exact = stats.binomtest(15, 20, 0.5, alternative="greater").pvalue
    assert stats.binom.sf(15, 20, 0.5) < mcnemar_mid_p(15, 5) < exact


@given(wins=st.integers(0, 300), losses=st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_mid_p_of_the_two_directions_adds_to_one(wins: int, losses: int) -> None:
    assert mcnemar_mid_p(wins, losses) + mcnemar_mid_p(losses, wins) == pytest.approx(1.0, abs=1e-12)


# -- Tango's score test ----------------------------------------------------------------------------
def test_score_test_at_zero_is_mcnemars_z() -> None:
    assert paired_score_p(30, 12, 200, 0.0) == pytest.approx(stats.norm.sf(18 / math.sqrt(42)), rel=1e-12)


def test_score_test_uses_the_constrained_maximum_of_the_likelihood() -> None:
    """The closed form for the nuisance share against a numerical maximisation of the trinomial likelihood."""
    wins, losses, n, threshold = 14, 9, 120, -0.08

    def log_likelihood(q: float) -> float:
        p = q + threshold
        return wins * math.log(p) + losses * math.log(q) + (n - wins - losses) * math.log(1 - p - q)

    grid = np.linspace(0.0801, 0.5, 200_001)
    q = float(grid[int(np.argmax([log_likelihood(float(value)) for value in grid[::40]])) * 40])
    z = (wins - losses - n * threshold) / math.sqrt(n * (2 * q + threshold * (1 - threshold)))
    assert paired_score_p(wins, losses, n, threshold) == pytest.approx(stats.norm.sf(z), rel=2e-3)


def test_score_test_with_no_discordant_item_by_hand() -> None:
    # losses = 0: q = 0.08, variance = 100 * (0.16 - 0.0864) = 7.36, z = 8 / sqrt(7.36).
    assert paired_score_p(0, 0, 100, -0.08) == pytest.approx(stats.norm.sf(8 / math.sqrt(7.36)), rel=1e-12)


def test_score_test_keeps_its_level_at_the_margin_where_shifted_flips_do_not() -> None:
    """Losses only, true loss rate exactly the margin: the hard case for a resampling test on 100 units."""
    n, margin, alpha = 100, 0.08, spent_alpha(0.05, 1)
    losses = np.arange(n + 1)
    chance = stats.binom.pmf(losses, n, margin)
    score_passes = np.array([paired_score_p(0, int(k), n, -margin) <= alpha for k in losses])
    flip_passes = np.array(
        [sign_flip_p(np.r_[np.full(n - k, margin), np.full(k, margin - 1.0)], 7, flips=999) <= alpha for k in range(20)]
    )
    assert float(chance[score_passes].sum()) <= 1.3 * alpha
    assert float(chance[:20][flip_passes].sum()) > 2 * alpha


def test_clustering_weakens_the_score_test() -> None:
    assert paired_score_p(20, 5, 100, -0.05, design=2.0) > paired_score_p(20, 5, 100, -0.05)


@pytest.mark.parametrize(("wins", "losses", "units", "threshold"), [(8, 8, 10, 0.0), (0, 0, 0, 0.0), (1, 1, 9, 1.0)])
def test_score_test_refuses_impossible_counts(wins: int, losses: int, units: int, threshold: float) -> None:
    with pytest.raises(ValueError, match=r"cannot exceed|lies in"):
        paired_score_p(wins, losses, units, threshold)


# -- estimates and standard errors -----------------------------------------------------------------
def test_clustered_se_by_hand() -> None:
    # Clusters (d, n): (2, 2), (0, 1), (-1, 1). R = 1/4; residuals 1.5, -.25, -1.25; SE = sqrt(1.5 * 3.875) / 4.
    totals, weights = floats(2, 0, -1), floats(2, 1, 1)
    assert ratio(totals, weights) == 0.25
    assert clustered_se(totals, weights) == pytest.approx(math.sqrt(1.5 * 3.875) / 4, rel=1e-15)


def test_clustered_se_of_single_units_is_the_textbook_standard_error() -> None:
    d = np.random.default_rng(3).normal(size=50)
    assert clustered_se(d, np.ones(50)) == pytest.approx(float(stats.sem(d)), rel=1e-12)


def test_clustered_se_of_one_cluster_is_unknown() -> None:
    assert clustered_se(floats(3), floats(5)) == math.inf


def test_design_effect_is_the_cluster_size_when_units_of_a_cluster_agree() -> None:
    d = np.random.default_rng(5).choice([-1.0, 0.0, 1.0], size=2000)
    effect = design_effect(d * 4, np.full(2000, 4.0), 4 * int((d > 0).sum()), 4 * int((d < 0).sum()))
    assert effect == pytest.approx(4.0, rel=0.01)
    assert design_effect(floats(0, 0, 0), floats(1, 1, 1), 0, 0) == 1.0


def test_bits_per_byte_is_a_ratio_of_sums() -> None:
    # 8 bytes at 1 bit and 24 bytes at 2 bits: (8 + 48) / 32.
    assert bits_per_byte(floats(8, 48) * math.log(2), floats(8, 24)) == pytest.approx(1.75, rel=1e-15)


# -- sign flips ------------------------------------------------------------------------------------
def test_sign_flips_agree_with_scipys_permutation_test() -> None:
    d = np.random.default_rng(11).normal(0.3, 1.0, size=12)
    exact = stats.permutation_test(
        (d, -d), lambda a, b: np.sum(a - b), permutation_type="samples", alternative="greater", n_resamples=np.inf
    ).pvalue
    assert sign_flip_p(d, 1, flips=200_000) == pytest.approx(exact, abs=0.003)


def test_sign_flips_count_ties_against_the_candidate() -> None:
    assert sign_flip_p(np.zeros(40), 0) == 1.0
    # Four equal clusters: only one of 16 sign patterns reaches the sum, within Monte-Carlo error.
    assert sign_flip_p(np.full(4, 0.1), 0) == pytest.approx(1 / 16, abs=0.01)


def test_sign_flips_are_reproducible_and_never_zero() -> None:
    d = np.full(60, 1.0)
    assert sign_flip_p(d, 5) == sign_flip_p(d, 5) == 1 / 10_000


def test_late_looks_get_enough_flips_to_pass() -> None:
    assert flips_for(spent_alpha(0.05, 1)) == statistics.FLIPS
    alpha = spent_alpha(0.05, 20)
    assert sign_flip_p(np.full(60, 1.0), 5, flips=flips_for(alpha)) <= alpha


# -- bootstrap -------------------------------------------------------------------------------------
def test_bootstrap_agrees_with_scipys_percentile_interval() -> None:
    rng = np.random.default_rng(2)
    totals, weights = rng.normal(1.0, 2.0, 80), rng.uniform(0.5, 3.0, 80)
    low, high = cluster_bootstrap(totals, weights, 0.025, 4)
    expected = stats.bootstrap(
        (totals, weights), lambda t, w, axis: t.sum(axis) / w.sum(axis), paired=True, n_resamples=10_000,
        method="percentile", rng=np.random.default_rng(9),
    ).confidence_interval  # fmt: skip
    width = expected.high - expected.low
    assert low == pytest.approx(expected.low, abs=0.05 * width)
    assert high == pytest.approx(expected.high, abs=0.05 * width)


def test_bootstrap_mirrors_when_the_models_are_swapped() -> None:
    d = np.random.default_rng(8).normal(0.1, 1.0, 40)
    low, high = cluster_bootstrap(d, np.ones(40), 0.03, 1)
    swapped = cluster_bootstrap(-d, np.ones(40), 0.03, 1)
    assert list(swapped) == pytest.approx([-high, -low], abs=1e-12)


def test_bootstrap_lower_bound_covers_close_to_nominal() -> None:
    """Lower bound at alpha 0.025 over 600 samples of 60 clusters: covers in 95..99.5 % (nominal 97.5)."""
    rng = np.random.default_rng(21)
    covered = 0
    for trial in range(600):
        weights = rng.uniform(600, 1200, 60)
        totals = weights * rng.normal(0.02, 0.06, 60)
        covered += cluster_bootstrap(totals, weights, 0.025, trial, resamples=600)[0] <= 0.02
    assert 0.95 <= covered / 600 <= 0.995


# -- power -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("effect", "discordant", "look", "units"),
    [
        (0.03, 0.25, 1, 2043), (0.03, 0.25, 2, 2959), (0.03, 0.25, 3, 3485), (0.03, 0.35, 1, 2863),
        (0.03, 0.35, 2, 4146), (0.05, 0.25, 1, 731), (0.05, 0.25, 2, 1059), (0.05, 0.25, 3, 1247),
        (0.05, 0.35, 1, 1026), (0.05, 0.35, 2, 1486), (0.08, 0.25, 1, 281), (0.08, 0.25, 2, 407),
        (0.08, 0.25, 3, 480), (0.08, 0.35, 1, 397), (0.08, 0.35, 2, 574),
    ],
)  # fmt: skip
def test_sample_sizes_are_those_of_the_published_table(effect: float, discordant: float, look: int, units: int) -> None:
    alpha = spent_alpha(0.05, look)
    assert units_needed(effect, discordant, alpha) == pytest.approx(units, rel=0.0015)  # the table rounds alpha
    assert detectable_share(discordant, units, alpha) == pytest.approx(effect, rel=2e-3)


def test_detectable_difference_of_text_by_hand() -> None:
    # A paired SE of .0058 on 36 windows: .01 bits per byte at look 1 need about 90 windows.
    per_90 = 0.0058 * math.sqrt(36 / 90)
    assert detectable(per_90, spent_alpha(0.05, 1)) == pytest.approx(0.01, rel=0.01)
    assert normal_quantile(0.8) == pytest.approx(float(stats.norm.ppf(0.8)), rel=1e-9)


def test_the_published_sample_size_has_the_promised_power() -> None:
    """281 items, a true gain of 8 points at 25 % discordance: mid-p McNemar finds it in about 80 % of samples."""
    rng = np.random.default_rng(17)
    alpha = spent_alpha(0.05, 1)
    drawn = rng.multinomial(281, [0.165, 0.085, 0.75], size=4000)
    found = sum(mcnemar_mid_p(int(wins), int(losses)) <= alpha for wins, losses, _ in drawn)
    assert found / 4000 == pytest.approx(0.80, abs=0.03)


# -- cluster sums ----------------------------------------------------------------------------------
@given(st.permutations(range(12)))
@settings(max_examples=30, deadline=None)
def test_cluster_sums_do_not_depend_on_the_order_of_units(order: list[int]) -> None:
    labels = [f"c{index % 5}" for index in range(12)]
    values = np.random.default_rng(0).normal(size=12)
    base = cluster_sums(labels, values)[0]
    shuffled = cluster_sums([labels[index] for index in order], values[order])[0]
    assert base.tobytes() == shuffled.tobytes()
