"""The twins are one algorithm: same weights and batches give the same loss curve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jupiter_engine.checkpoints.store import CheckpointStore
from tests.training.nano import Listener, recipe, train

FLOAT32_TOLERANCE = 2e-4
"""Nats, on every step's loss, with float32 products: what rounding alone leaves after 20 steps."""
BFLOAT16_TOLERANCE = 2e-2
"""Nats, with bfloat16 products, which each framework rounds at other places."""


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", FLOAT32_TOLERANCE), ("bfloat16", BFLOAT16_TOLERANCE)])
def test_the_twins_follow_the_same_loss_curve(dtype: str, tolerance: float, tmp_path: Path) -> None:
    wanted = recipe(steps=20, compute_dtype=dtype, micro_batch_sequences=3, checkpoint_every_steps=50)
    torch_side, mlx_side = Listener(), Listener()
    train("torch", wanted, tmp_path / "torch", torch_side)
    train("mlx", wanted, tmp_path / "mlx", mlx_side)
    ours, theirs = (np.array([metric.loss for metric in side.metrics]) for side in (torch_side, mlx_side))
    assert len(ours) == 20
    assert ours[0] - ours[-1] > 1.0
    assert float(np.abs(ours - theirs).max()) < tolerance
    norms = [np.array([metric.grad_norm for metric in side.metrics]) for side in (torch_side, mlx_side)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=50 * tolerance)
    assert [metric.learning_rate for metric in torch_side.metrics] == [m.learning_rate for m in mlx_side.metrics]


def test_a_checkpoint_of_one_twin_goes_on_in_the_other(tmp_path: Path) -> None:
    wanted = recipe(steps=12, checkpoint_every_steps=50)
    whole = Listener()
    train("torch", wanted, tmp_path / "whole", whole)
    first, second = Listener(halt_at=6), Listener()
    train("torch", wanted, tmp_path / "moved", first)
    assert CheckpointStore(tmp_path / "moved" / "checkpoints", keep=2).steps() == [6]
    train("mlx", wanted, tmp_path / "moved", second)
    mixed = np.array([metric.loss for metric in first.metrics + second.metrics])
    expected = np.array([metric.loss for metric in whole.metrics])
    assert len(second.metrics) == 6
    assert float(np.abs(mixed - expected).max()) < FLOAT32_TOLERANCE
