"""Paired, clustered statistics of the gate: exact where possible, resampled where not.

Everything here compares two models on the *same* units. Signs are fixed once: a positive difference means
that the candidate is better. Shapes: G clusters (groups of documents that repeat each other), n units.

    D  float64 [G]   sum of the paired differences of the cluster's units
    w  float64 [G]   sum of the cluster's weights (scored bytes for text, number of items for items)

The estimate is always the ratio sum(D) / sum(w): bits per byte, or the difference of two accuracies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
FLIPS = 9_999
POWER = 0.80

_BLOCK_CELLS = 4_000_000
"""Resampling works through blocks of at most this many float64 cells (32 MB)."""

_NORMAL = NormalDist()


def spent_alpha(alpha: float, look: int) -> float:
    """Error budget of the k-th look at one incumbent: alpha_k = alpha * 6 / (pi^2 * k^2), k from 1.

    The series sums to alpha over unlimited looks (Euler: sum 1/k^2 = pi^2/6), so by the union bound the chance
    that an incumbent is ever wrongly replaced stays at or below alpha, however the looks depend on each other.
    """
    if look < 1:
        raise ValueError(f"looks count from 1, not {look}")
    return alpha * 6.0 / (math.pi**2 * look**2)


def normal_quantile(probability: float) -> float:
    """z with P(Z <= z) = probability for a standard normal Z; 0 < probability < 1."""
    return _NORMAL.inv_cdf(probability)


def normal_tail(z: float) -> float:
    """P(Z >= z) for a standard normal Z."""
    return 0.5 * math.erfc(z / math.sqrt(2.0))


def mcnemar_mid_p(wins: int, losses: int) -> float:
    """One-sided mid-p of McNemar's exact test: P(X > wins) + P(X = wins) / 2 with X ~ Binomial(wins + losses, 1/2).

    `wins`: items only the candidate has right; `losses`: items only the incumbent has right; items on which both
    agree do not enter. Small means the candidate is better; 0.5 when there is no discordant item.
    Source: Fagerland, Lydersen, Laake 2013 (BMC Med Res Methodol 13:91). Exact integer arithmetic.
    """
    if wins < 0 or losses < 0:
        raise ValueError("wins and losses are counts")
    m = wins + losses
    term = math.comb(m, wins)
    twice = term
    # P(X = k) from P(X = k - 1): C(m, k) = C(m, k-1) * (m - k + 1) / k, always a whole number.
    for k in range(wins + 1, m + 1):
        term = term * (m - k + 1) // k
        twice += 2 * term
    return twice / (1 << (m + 1))


def paired_score_p(wins: int, losses: int, units: int, threshold: float, *, design: float = 1.0) -> float:
    """One-sided p of Tango's score test of H0: p_wins - p_losses <= threshold, for paired 0/1 outcomes.

    T = (wins - losses - n*t) / sqrt(n * (2*q + t*(1 - t)) * design), where q is the constrained maximum-likelihood
    estimate of the share of losses under H0: q = (sqrt(B^2 - 4AC) - B) / (2A), A = 2n,
    B = -wins - losses + (2n - wins + losses) * t, C = -losses * t * (1 - t)  (Tango 1998, Stat Med 17:891).
    At t = 0 it is McNemar's (wins - losses) / sqrt(wins + losses). With a margin t < 0 the variance under H0 counts
    the losses that the margin would allow, which the observed ones understate: that is why a plain shifted
    resampling is too ready to call a small sample non-inferior.

    `design`: variance inflation by clustering (see `design_effect`), at least 1.
    """
    if not 0 <= wins + losses <= units or units < 1:
        raise ValueError("wins + losses cannot exceed the units, and one unit is needed")
    if not -1.0 < threshold < 1.0:
        raise ValueError(f"a difference of shares lies in (-1, 1), not {threshold}")
    a = 2.0 * units
    b = -wins - losses + (2.0 * units - wins + losses) * threshold
    c = -losses * threshold * (1.0 - threshold)
    q = (math.sqrt(max(b * b - 4.0 * a * c, 0.0)) - b) / (2.0 * a)
    variance = units * (2.0 * q + threshold * (1.0 - threshold)) * max(design, 1.0)
    distance = wins - losses - units * threshold
    if variance <= 1e-12:
        return 0.5 if abs(distance) <= 1e-12 else float(distance < 0)
    return normal_tail(distance / math.sqrt(variance))


def ratio(totals: Floats, weights: Floats) -> float:
    """sum(D) / sum(w): the estimated difference."""
    return float(totals.sum() / weights.sum())


def clustered_se(totals: Floats, weights: Floats) -> float:
    """Standard error of sum(D) / sum(w) with clusters as the independent units.

    SE = sqrt( G/(G-1) * sum_g (D_g - R*w_g)^2 ) / sum_g w_g, with R = sum(D)/sum(w). For items (w_g = n_g) the inner
    term is sum_{i in g} (d_i - R), Miller 2024 (arXiv 2411.00640); for text it is the linearised ratio estimator.
    Infinite with fewer than two clusters: nothing can be said about their spread.
    """
    groups = len(totals)
    if groups < 2:
        return math.inf
    residual = totals - ratio(totals, weights) * weights
    return math.sqrt(groups / (groups - 1) * float(residual @ residual)) / float(weights.sum())


def design_effect(totals: Floats, weights: Floats, wins: int, losses: int) -> float:
    """Variance of the clustered estimate over that of independent items, never below 1.

    Independent items: Var = (p_d - R^2) / n, with p_d = (wins + losses)/n. 1 when no item is discordant.
    """
    n = float(weights.sum())
    effect = ratio(totals, weights)
    independent = ((wins + losses) / n - effect * effect) / n
    if independent <= 0.0 or len(totals) < 2:
        return 1.0
    return max(1.0, clustered_se(totals, weights) ** 2 / independent)


def sign_flip_p(totals: Floats, seed: int, *, flips: int = FLIPS) -> float:
    """One-sided p of the clustered sign-flip permutation test: is sum(D) larger than chance makes it?

    Under H0 the two models are exchangeable within a cluster, so each D_g is as likely as -D_g (all units of a
    cluster flip together). p = (1 + #{flips: sum s_g*D_g >= sum D_g}) / (1 + flips). For "better by more than t" pass
    D_g - t*w_g. Deterministic in (totals, seed).
    """
    observed = float(totals.sum())
    # Sums that are equal on paper may differ in the last bits; ties must count against the candidate.
    bar = observed - 1e-9 * max(float(np.abs(totals).sum()), 1e-300)
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_CELLS // max(1, len(totals)))
    reached, done = 0, 0
    while done < flips:
        count = min(block, flips - done)
        signs = rng.integers(0, 2, size=(count, len(totals)), dtype=np.int8).astype(np.float64) * 2.0 - 1.0
        reached += int(np.count_nonzero(signs @ totals >= bar))
        done += count
    return (1 + reached) / (1 + flips)


def flips_for(alpha: float) -> int:
    """Sign flips that make p-values fine enough for a test at `alpha`: at least 20 steps below it."""
    return max(FLIPS, math.ceil(20.0 / alpha) - 1)


def cluster_bootstrap(
    totals: Floats, weights: Floats, alpha: float, seed: int, *, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile interval of sum(D)/sum(w), resampling whole clusters: its `alpha` and `1 - alpha` quantiles.

    Each end is a one-sided bound at `alpha`; together they cover 1 - 2*alpha. A resample draws G clusters with
    replacement and takes the ratio of their sums. Deterministic in (totals, weights, seed); swapping the two
    models mirrors the interval exactly.
    """
    groups = len(totals)
    rng = np.random.default_rng(seed)
    share = np.full(groups, 1.0 / groups)
    block = max(1, _BLOCK_CELLS // groups)
    drawn = np.empty(resamples)
    for start in range(0, resamples, block):
        counts = rng.multinomial(groups, share, size=min(block, resamples - start)).astype(np.float64)
        drawn[start : start + len(counts)] = (counts @ totals) / (counts @ weights)
    low, high = np.quantile(drawn, [alpha, 1.0 - alpha])
    return float(low), float(high)


def bits_per_byte(nats: Floats, scored_bytes: Floats) -> float:
    """sum(-ln p) / (ln 2 * sum of UTF-8 bytes) over all windows: one ratio of sums, not a mean of ratios."""
    return float(nats.sum() / (math.log(2.0) * scored_bytes.sum()))


def detectable(standard_error: float, alpha: float, power: float = POWER) -> float:
    """Minimum detectable effect: (z_{1-alpha} + z_power) * SE, the true difference found with chance `power`."""
    return (normal_quantile(1.0 - alpha) + normal_quantile(power)) * standard_error


def detectable_share(
    discordant: float, units: int, alpha: float, *, design: float = 1.0, power: float = POWER
) -> float:
    """Minimum detectable difference of two paired accuracies.

    Solves n = z^2 * (p_d - d^2) / d^2 for d, z = z_{1-alpha} + z_power: d = z * sqrt(p_d / (n + z^2)), with n divided
    by the design effect. `discordant`: share p_d of items on which the models differ. A result above p_d says that
    nothing is detectable: no difference can exceed the discordance.
    """
    z = normal_quantile(1.0 - alpha) + normal_quantile(power)
    return z * math.sqrt(discordant / (units / design + z * z))


def units_needed(effect: float, discordant: float, alpha: float, *, power: float = POWER) -> int:
    """Items that find a true accuracy difference d: n = (z_{1-alpha} + z_power)^2 * (p_d - d^2) / d^2, rounded up."""
    z = normal_quantile(1.0 - alpha) + normal_quantile(power)
    return math.ceil(z * z * (discordant - effect * effect) / (effect * effect))


def cluster_sums(labels: Sequence[str], *columns: Floats) -> tuple[Floats, ...]:
    """Sum each column [n] over equal labels -> [G], clusters in sorted label order.

    The sorted order and `math.fsum` make the result independent of the order of the units, to the last bit.
    """
    rows: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        rows.setdefault(label, []).append(index)
    return tuple(np.array([math.fsum(column[rows[label]].tolist()) for label in sorted(rows)]) for column in columns)
