"""Real groups of ranks with different memory and speed: the result is that of one big batch."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.specs import Recipe, Sharding, SpikeGuardSpec, Twin
from tests.training import uneven_rank
from tests.training.nano import recipe
from tests.training.uneven_rank import Case

ROUNDING = 2e-5
"""Difference of weights: the order of float32 sums differs."""
AMPLIFIED = 3e-4
"""Of the few weights whose gradient is nearly zero: AdamW divides it by its own size, rounding included."""


def result(folder: Path) -> tuple[dict[str, np.ndarray], list[Metric]]:
    metrics = [msgspec.json.decode(line, type=Metric) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    return dict(np.load(folder / "weights.npz")), metrics


def alone(twin: Twin, wanted: Recipe, folder: Path, **changes: object) -> tuple[dict[str, np.ndarray], list[Metric]]:
    folder.mkdir()
    whole = msgspec.structs.replace(wanted, micro_batch_sequences=wanted.batch_sequences)
    case = Case(twin=twin, recipe=whole, sizes=(wanted.batch_sequences,), slow=(0.0,))
    uneven_rank.run(msgspec.structs.replace(case, **changes), folder, joined=False)
    return result(folder)


def equal(ours: Path, theirs: tuple[dict[str, np.ndarray], list[Metric]]) -> list[Metric]:
    weights, metrics = result(ours)
    reference, steps = theirs
    assert weights.keys() == reference.keys()
    for name, value in weights.items():
        apart = np.abs(value - reference[name])
        assert np.quantile(apart, 0.999) < ROUNDING, name
        assert apart.max() < AMPLIFIED, name
    assert [m.step for m in metrics] == [m.step for m in steps]
    assert [m.loss for m in metrics] == pytest.approx([m.loss for m in steps], abs=1e-4)
    assert [m.grad_norm for m in metrics] == pytest.approx([m.grad_norm for m in steps], rel=1e-3)
    return metrics


@pytest.mark.slow
@pytest.mark.parametrize("twin", ["torch", "mlx"])
def test_three_ranks_of_different_speed_and_memory_equal_one_big_batch_while_rows_move(
    twin: Twin, tmp_path: Path
) -> None:
    # 30 rows; the ranks sleep so that their fair shares are 4, 7 and 19 rows, in 2, 3 and 7 micro-batches or more.
    wanted = recipe(batch_sequences=30, micro_batch_sequences=3, steps=14, checkpoint_every_steps=100)
    slow = tuple(0.06 / rows for rows in (4, 7, 19))
    case = Case(twin=twin, recipe=wanted, sizes=(2, 3, 3), slow=slow)
    uneven_rank.in_group(case, tmp_path / "group")
    metrics = equal(tmp_path / "group", alone(twin, wanted, tmp_path / "alone"))
    rows = [metric.rank_rows for metric in metrics]
    assert rows[:3] == [(10, 10, 10)] * 3
    assert all(sum(each) == 30 for each in rows)
    assert rows[-1][0] < rows[-1][1] < rows[-1][2]
    before, after = metrics[1:3], metrics[-4:]
    idle = [np.mean([max(m.idle_seconds) / m.seconds for m in part]) for part in (before, after)]
    assert idle[1] < idle[0]
    for metric in metrics[1:]:
        assert len(metric.data_seconds) == len(metric.communication_seconds) == len(metric.peak_bytes) == 3
        assert min(metric.peak_bytes) > 10 << 20
        spent = np.array(metric.rank_seconds) + metric.data_seconds + metric.communication_seconds + metric.idle_seconds
        assert spent.max() <= metric.seconds * 1.05 + 0.02


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["zero1", "fsdp"])
def test_divided_state_and_uneven_micro_batches_in_the_torch_twin(sharding: Sharding, tmp_path: Path) -> None:
    wanted = recipe(batch_sequences=5, micro_batch_sequences=2, steps=8, checkpoint_every_steps=3)
    case = Case(twin="torch", recipe=wanted, sizes=(1, 2), slow=(0.02, 0.0), sharding=sharding)
    uneven_rank.in_group(case, tmp_path / "group")
    equal(tmp_path / "group", alone("torch", wanted, tmp_path / "alone"))


@pytest.mark.slow
@pytest.mark.parametrize("twin", ["torch", "mlx"])
@pytest.mark.parametrize(("checkpoint_every", "sharding"), [(2, "none"), (50, "none"), (50, "zero1")])
def test_a_poisoned_row_in_a_real_group_is_left_out_as_by_one_rank(
    twin: Twin, checkpoint_every: int, sharding: Sharding, tmp_path: Path
) -> None:
    wanted = recipe(
        batch_sequences=4,
        micro_batch_sequences=2,
        steps=10,
        checkpoint_every_steps=checkpoint_every,
        spike_guard=SpikeGuardSpec(rollbacks=1),
    )
    case = Case(twin=twin, recipe=wanted, sizes=(2, 2), slow=(0.0, 0.0), sharding=sharding, rows=48, poison=300)
    uneven_rank.in_group(case, tmp_path / "group")
    reference = alone(twin, wanted, tmp_path / "alone", rows=48, poison=300)
    equal(tmp_path / "group", reference)
    said = [json.loads((tmp_path / where / "said.json").read_text()) for where in ("group", "alone")]
    assert said[0] == said[1]
    assert len(said[0]["skipped"]) == 1
    assert any(note.startswith("warning: Step") for note in said[0]["notes"])
