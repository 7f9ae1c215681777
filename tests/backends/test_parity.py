"""The twins are one algorithm: same weights and batches give the same loss curve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from jupiter_engine.checkpoints.store import CheckpointStore
from jupiter_engine.protocol.specs import LoraSpec, OptimizerSpec
from tests.training.nano import Listener, open_trainer, recipe, train, weights

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


# eps: large enough that a gradient of rounding noise moves nothing.
QUIET = OptimizerSpec(learning_rate=3e-3, weight_decay=0.1, eps=1e-5)


def _apart(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """The largest relative L2 distance of two arrays of a name."""
    assert ours.keys() == theirs.keys()
    return max(
        float(np.linalg.norm(np.asarray(ours[name]) - theirs[name]) / np.linalg.norm(theirs[name])) for name in theirs
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_both_twins_train_the_same_adapters(recompute: bool, tmp_path: Path) -> None:
    """Same start, ten steps: adapters equal to 1e-5, and so are the published models."""
    wanted = recipe(
        steps=10, update="lora", lora=LoraSpec(rank=4, alpha=8.0), optimizer=QUIET, micro_batch_sequences=3,
        recompute_activations=recompute, checkpoint_every_steps=50,
    )  # fmt: skip
    saved, states = [], []
    for twin in ("torch", "mlx"):
        _, trainer = train(twin, wanted, tmp_path / twin)
        state = trainer.export_state()
        assert state is not None
        states.append(state)
        trainer.save(tmp_path / twin)
        saved.append(load_file(tmp_path / twin / "model.safetensors"))
    start = open_trainer("mlx", wanted).export_state()
    assert start is not None
    assert _apart(states[0].weights, states[1].weights) < 1e-5
    moved = [np.abs(states[1].weights[name] - value).max() for name, value in start.weights.items()]
    assert min(moved) > 1e-3
    assert saved[1].keys() == weights().keys()
    assert _apart(saved[0], saved[1]) < 1e-5


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "adamw8bit"])
def test_adapters_of_one_twin_go_on_in_the_other(name: Any, tmp_path: Path) -> None:
    spec = msgspec.structs.replace(QUIET, name=name)
    wanted = recipe(steps=8, update="lora", optimizer=spec, checkpoint_every_steps=50)
    whole = Listener()
    train("torch", wanted, tmp_path / "whole", whole)
    first, second = Listener(halt_at=4), Listener()
    train("mlx", wanted, tmp_path / "moved", first)
    train("torch", wanted, tmp_path / "moved", second)
    mixed = np.array([metric.loss for metric in first.metrics + second.metrics])
    expected = np.array([metric.loss for metric in whole.metrics])
    assert len(second.metrics) == 4
    assert float(np.abs(mixed - expected).max()) < (5e-3 if name == "adamw8bit" else FLOAT32_TOLERANCE)


@pytest.mark.parametrize("update", ["full", "lora"])
def test_the_twins_measure_the_same_held_out_loss(update: Any) -> None:
    from tests.backends.mlx_ring import rows

    wanted = recipe(update=update)
    ours, theirs = (open_trainer(twin, wanted).held_out(rows(np.arange(8))) for twin in ("torch", "mlx"))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours > 100.0
