"""Shares of ranks of different speed and memory."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jupiter_engine.training.balance import Balance, shares

RANKS = st.integers(1, 5)


@given(rows=st.integers(0, 200), ranks=RANKS, data=st.data())
def test_every_row_is_given_once_in_order_and_in_micro_batches_of_at_most_each_ranks_size(
    rows: int, ranks: int, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=ranks, max_size=ranks))
    lockstep = data.draw(st.booleans())
    balance = Balance(sizes, lockstep=lockstep)
    for _ in range(3):
        seconds = data.draw(st.lists(st.floats(0.1, 10.0), min_size=ranks, max_size=ranks))
        balance.observe(seconds, balance.counts(rows))
    batch = np.arange(rows, dtype=np.int64) * 3
    parts = [balance.parts(batch, rank) for rank in range(ranks)]
    assert [int(row) for mine in parts for part in mine for row in part] == batch.tolist()
    assert tuple(sum(len(part) for part in mine) for mine in parts) == balance.counts(rows)
    for mine, size in zip(parts, sizes, strict=True):
        assert all(len(part) <= size for part in mine)
    if lockstep and rows:
        assert len({len(mine) for mine in parts}) == 1


def test_a_rank_in_lockstep_without_rows_still_gets_its_empty_micro_batches() -> None:
    balance = Balance([2, 2, 2], lockstep=True)
    parts = [balance.parts(np.arange(2, dtype=np.int64), rank) for rank in range(3)]
    assert [[len(part) for part in mine] for mine in parts] == [[1], [1], [0]]


@pytest.mark.parametrize("rows", [1, 5, 9, 12])
@pytest.mark.parametrize("cost", [(1.0, 1.0, 1.0), (1.0, 2.0, 3.5), (5.0, 1.0, 0.3), (0.7, 0.71, 2.0)])
def test_no_other_division_of_the_rows_ends_earlier(rows: int, cost: tuple[float, ...]) -> None:
    counts = shares(rows, cost, (1, 1, 1))
    others = [c for c in product(range(rows + 1), repeat=3) if sum(c) == rows]
    least = min(max(n * each for n, each in zip(c, cost, strict=True)) for c in others)
    assert max(n * each for n, each in zip(counts, cost, strict=True)) == pytest.approx(least)


@given(cost=st.lists(st.floats(0.2, 5.0), min_size=2, max_size=5), size=st.integers(1, 8), many=st.integers(20, 60))
def test_with_many_micro_batches_ranks_end_within_one_of_each_other(cost: list[float], size: int, many: int) -> None:
    sizes = [size] * len(cost)
    counts = shares(many * size * len(cost), cost, sizes)
    ends = [n * each for n, each in zip(counts, cost, strict=True)]
    assert max(ends) - min(ends) <= size * max(cost) + 1e-9
    assert all(count % size == 0 for count in counts)


def test_ranks_are_equal_at_first_whatever_their_micro_batches() -> None:
    assert Balance([8, 8]).counts(8) == (4, 4)
    assert Balance([8, 2]).counts(64) == (32, 32)
    assert Balance([1, 1, 1]).counts(2) == (1, 1, 0)


def run(balance: Balance, rows: int, a_row: list[float], steps: int) -> list[tuple[int, ...]]:
    """Shares before each step, with ranks that need so many seconds a row."""
    seen: list[tuple[int, ...]] = []
    for _ in range(steps):
        counts = balance.counts(rows)
        seen.append(counts)
        balance.observe([n * each for n, each in zip(counts, a_row, strict=True)], counts)
    return seen


def test_a_slow_rank_gets_fewer_rows_after_the_third_step() -> None:
    seen = run(Balance([4, 4]), 120, [1.0, 3.0], 12)
    assert seen[:3] == [(60, 60)] * 3
    assert set(seen[3:]) == {(90, 30)}


def test_shares_stay_while_the_spread_is_small() -> None:
    assert set(run(Balance([1, 1]), 64, [1.0, 1.04], 120)) == {(32, 32)}


def test_shares_follow_a_rank_that_becomes_slow_later() -> None:
    balance = Balance([1, 1])
    run(balance, 60, [1.0, 1.0], 30)
    seen = run(balance, 60, [1.0, 2.0], 100)
    assert seen[0] == (30, 30)
    assert seen[-1] == (40, 20)
    assert len(set(seen)) <= 4


def test_the_first_steps_warm_up_does_not_count() -> None:
    balance = Balance([1, 1])
    balance.observe([1.0, 100.0], (8, 8))
    run(balance, 16, [1.0, 1.0], 5)
    assert balance.counts(16) == (8, 8)


def test_a_micro_batch_has_at_least_one_row() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        Balance([4, 0])
