"""How score requests become batches."""

from __future__ import annotations

import statistics

import numpy as np

from jupiter_engine.backends.contract import ScoreRequest
from jupiter_engine.backends.planning import score_batches, uniform


def test_a_shared_prefix_is_run_once() -> None:
    requests = [ScoreRequest(tokens=[1, 2, 3, 10 + option, 20], first=3) for option in range(4)]
    [batch] = score_batches(requests, batch_tokens=100)
    assert batch.tokens.tolist() == [[1, 2, 3, 10, 11, 12, 13]], "the last token of an option predicts nothing"
    assert batch.positions.tolist() == [[0, 1, 2, 3, 3, 3, 3]]
    assert batch.sources.tolist() == [2, 3, 2, 4, 2, 5, 2, 6]
    assert batch.targets.tolist() == [10, 20, 11, 20, 12, 20, 13, 20]
    assert batch.owners == [(0, 2), (1, 2), (2, 2), (3, 2)]
    mask = batch.mask()
    assert mask is not None
    assert mask[0, 0, 5].tolist() == [True, True, True, False, False, True, False], "an option sees no other option"
    assert mask[0, 0, 1].tolist() == [True, True] + [False] * 5


def test_every_query_sees_something() -> None:
    """A fully masked padding row would give NaN, which spreads through the products."""
    requests = [ScoreRequest(tokens=[1, 2, 3, 4, option], first=3) for option in range(3)]
    requests += [ScoreRequest(tokens=[9, option, 5, 6, 7, 8, 9], first=1) for option in range(3)]
    for batch in score_batches(requests, batch_tokens=1000):
        mask = batch.mask()
        assert mask is not None
        assert mask.any(axis=-1).all()


def test_batches_hold_what_was_allowed_and_lose_nothing() -> None:
    random = np.random.default_rng(0)
    requests = [
        ScoreRequest(tokens=random.integers(0, 9, int(length)).tolist(), first=int(random.integers(1, length + 1)))
        for length in random.integers(2, 60, 200)
    ]
    batches = score_batches(requests, batch_tokens=300)
    assert max(batch.tokens.size for batch in batches) <= 300
    owned = {index: count for batch in batches for index, count in batch.owners}
    wanted = {i: len(r.tokens) - r.first for i, r in enumerate(requests) if len(r.tokens) > r.first}
    assert owned == wanted
    plain = [batch.tokens.shape[1] for batch in batches if batch.branches is None]
    assert plain == sorted(plain, reverse=True)


def test_a_row_longer_than_the_batch_goes_alone() -> None:
    [batch] = score_batches([ScoreRequest(tokens=[1] * 50, first=1)], batch_tokens=10)
    assert batch.tokens.shape == (1, 49)
    assert batch.owners == [(0, 49)]


def test_uniform_is_uniform_and_keyed() -> None:
    draws = [uniform(3, step) for step in range(4000)]
    assert abs(statistics.mean(draws) - 0.5) < 0.015
    assert abs(statistics.variance(draws) - 1 / 12) < 0.005
    assert uniform(3, 0) != uniform(4, 0) != uniform(3, 1)
    assert uniform(11, 1) != uniform(1, 11), "seed and step must not run together"
