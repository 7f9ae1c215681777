from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jupiter_engine.training.data_order import BatchOrder, batch_number, counted_tokens, micro_batches


@given(rows=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 1000))
def test_every_epoch_visits_every_row_once_whatever_the_batch(rows: int, batch: int, seed: int) -> None:
    order = BatchOrder(rows, batch, seed)
    steps = -(-3 * rows // batch)
    walked = np.concatenate([order.batch(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(walked[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_the_order_is_the_documented_one_and_needs_no_history() -> None:
    order = BatchOrder(10, 4, seed=7)
    epochs = [np.random.Generator(np.random.PCG64(7 + epoch)).permutation(10) for epoch in range(2)]
    walked = np.concatenate(epochs)
    assert order.batch(3).tolist() == walked[12:16].tolist()
    assert order.batch(2).tolist() == walked[8:12].tolist()
    assert BatchOrder(10, 4, seed=8).batch(2).tolist() != order.batch(2).tolist()


@given(rows=st.integers(0, 30), size=st.integers(1, 7))
def test_micro_batches_partition_a_ranks_rows(rows: int, size: int) -> None:
    batch = np.arange(rows) * 3
    parts = list(micro_batches(batch, size))
    assert [int(row) for part in parts for row in part] == batch.tolist()
    assert all(0 < len(part) <= size for part in parts)


@given(step=st.integers(0, 60), skipped=st.sets(st.integers(0, 60)))
def test_a_step_trains_on_the_batch_of_its_turn_among_those_not_left_out(step: int, skipped: set[int]) -> None:
    left = [number for number in range(200) if number not in skipped]
    assert batch_number(step, sorted(skipped)) == left[step]


def test_the_first_column_of_a_mask_never_counts() -> None:
    mask = np.array([[1, 1, 0, 1], [1, 0, 0, 0]], dtype=np.uint8)
    assert counted_tokens(mask, block_rows=1).tolist() == [2, 0]


def test_an_empty_snapshot_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BatchOrder(0, 4, 0)
