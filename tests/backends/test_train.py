"""Each twin's trainer against exact definitions and against torch's own reference."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn import functional

from jupiter_engine.backends.torch.model import Llama
from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.protocol.specs import OptimizerSpec, Recipe, Twin
from jupiter_engine.training.loop import Batch, Trainer
from tests.training.nano import INFO, Listener, Weights, data, open_trainer, recipe, train, weights

TWINS: tuple[Twin, ...] = ("torch", "mlx")


def batch(rows: slice = slice(0, 8)) -> Batch:
    arrays = data()
    tokens = arrays.tokens[rows].astype(np.int64)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segments=arrays.segments[rows][:, :-1].astype(np.int64),
        counted=arrays.loss_mask[rows][:, 1:] != 0,
    )


def reference(given: Batch) -> tuple[float, Weights]:
    """Loss sum and gradient of the whole batch at once, through autograd and full float32 logits."""
    model = Llama(INFO)
    model.load_state_dict({name: torch.tensor(value) for name, value in weights().items()})
    logits = model(torch.tensor(given.tokens), torch.tensor(given.segments))
    losses = functional.cross_entropy(logits.flatten(0, 1), torch.tensor(given.targets).flatten(), reduction="none")
    loss = losses[torch.tensor(given.counted).flatten()].sum()
    loss.backward()
    gradients = {name: value.grad.numpy() for name, value in model.named_parameters() if value.grad is not None}
    return float(loss.detach()), gradients


def state_of(trainer: Trainer) -> TrainerState:
    """Of a rank alone, which is rank 0."""
    state = trainer.export_state()
    assert state is not None
    return state


def gradient(trainer: Trainer) -> Weights:
    """The accumulated gradient, read off an update that is a plain copy of it.

    With beta1 = 0 AdamW's first moment after one step is the gradient itself.
    """
    trainer.apply(1e-30, 1.0)
    moments = state_of(trainer).moments
    return {name: moments[f"m.{name}"] for name in weights()}


def plain(**changes: object) -> Recipe:
    return recipe(optimizer=OptimizerSpec(learning_rate=1e-3, beta1=0.0, weight_decay=0.0), **changes)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("cuts", [(0, 8), (0, 3, 8), (0, 1, 2, 5, 8)])
def test_micro_batches_add_up_to_the_gradient_of_one_big_batch(twin: Twin, cuts: tuple[int, ...]) -> None:
    loss, expected = reference(batch())
    trainer = open_trainer(twin, plain())
    counted = int(batch().counted.sum())
    parts = [trainer.accumulate(batch(slice(a, b)), 1.0 / counted) for a, b in pairwise(cuts)]
    assert sum(parts) == pytest.approx(loss, rel=1e-5)
    norm = np.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in expected.values())) / counted
    assert trainer.reduce() == pytest.approx(norm, rel=1e-4)
    for name, value in gradient(trainer).items():
        np.testing.assert_allclose(value, expected[name] / counted, rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("twin", TWINS)
def test_the_chunked_loss_is_the_whole_loss(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, expected = reference(batch())
    monkeypatch.setattr(f"jupiter_engine.backends.{twin}.train._LOSS_CHUNK", 7)
    trainer = open_trainer(twin, plain())
    assert trainer.accumulate(batch(), 1.0) == pytest.approx(loss, rel=1e-5)
    for name, value in gradient(trainer).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=3e-4, err_msg=name)


@pytest.mark.parametrize("twin", TWINS)
def test_a_document_does_not_see_the_one_before_it(twin: Twin) -> None:
    first = batch()
    changed = Batch(
        tokens=np.where(first.segments == 0, 200, first.tokens),
        targets=first.targets,
        segments=first.segments,
        counted=first.counted & (first.segments == 1),
    )
    only_second = Batch(
        tokens=first.tokens,
        targets=first.targets,
        segments=first.segments,
        counted=first.counted & (first.segments == 1),
    )
    trainer = open_trainer(twin, plain())
    assert trainer.accumulate(changed, 1.0) == pytest.approx(trainer.accumulate(only_second, 1.0), rel=1e-6)
    joined = Batch(
        tokens=changed.tokens,
        targets=first.targets,
        segments=np.zeros_like(first.segments),
        counted=only_second.counted,
    )
    assert abs(trainer.accumulate(joined, 1.0) - trainer.accumulate(only_second, 1.0)) > 0.1


@pytest.mark.parametrize("twin", TWINS)
def test_a_batch_without_counted_targets_adds_nothing(twin: Twin) -> None:
    empty = batch()
    empty.counted[:] = False
    trainer = open_trainer(twin, plain())
    assert trainer.accumulate(empty, 1.0) == 0.0
    assert trainer.reduce() == 0.0


@pytest.mark.parametrize("twin", TWINS)
def test_updates_equal_torchs_own_adamw_with_decay_on_matrices_only(twin: Twin) -> None:
    spec = OptimizerSpec(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=0.3)
    trainer = open_trainer(twin, recipe(optimizer=spec))
    model = Llama(INFO)
    model.load_state_dict({name: torch.tensor(value) for name, value in weights().items()})
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": 0.3},
            {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1.0,
        betas=(0.9, 0.95),
        eps=1e-5,  # large enough that a gradient of rounding noise moves nothing
        foreach=False,
    )
    for step in range(4):
        given = batch(slice(2 * step, 2 * step + 2))
        trainer.accumulate(given, 0.01)
        trainer.apply(1e-2 / (step + 1), 0.5)
        optimizer.zero_grad()
        logits = model(torch.tensor(given.tokens), torch.tensor(given.segments))
        counted = torch.tensor(given.counted).flatten()
        targets = torch.tensor(given.targets).flatten()[counted]
        (0.005 * functional.cross_entropy(logits.flatten(0, 1)[counted], targets, reduction="sum")).backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()
    state = state_of(trainer)
    assert state.updates == 4
    moved = 0.0
    for name, value in parameters.items():
        np.testing.assert_allclose(state.weights[name], value.detach().numpy(), rtol=0, atol=2e-5, err_msg=name)
        moved = max(moved, float(np.abs(state.weights[name] - weights()[name]).max()))
    assert moved > 1e-2


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resuming_at_any_step_is_bitwise_the_uninterrupted_run(twin: Twin, dtype: str, tmp_path: Path) -> None:
    wanted = recipe(compute_dtype=dtype, steps=7, micro_batch_sequences=3)
    _, whole = train(twin, wanted, tmp_path / "whole")
    train(twin, wanted, tmp_path / "cut", Listener(halt_at=2))
    train(twin, wanted, tmp_path / "cut", Listener(halt_at=3))
    listener = Listener()
    outcome, resumed = train(twin, wanted, tmp_path / "cut", listener)
    assert [metric.step for metric in listener.metrics] == [6, 7]
    assert outcome.steps == 7
    assert resumed.fingerprint() == whole.fingerprint()
    for name, value in state_of(whole).moments.items():
        assert value.tobytes() == state_of(resumed).moments[name].tobytes(), name


@pytest.mark.parametrize("twin", TWINS)
def test_small_updates_survive_in_the_master_weights(twin: Twin) -> None:
    """In bfloat16 alone a norm gain of 1.0 cannot move by 1e-5 a step; the float32 master does."""
    trainer = open_trainer(twin, recipe(compute_dtype="bfloat16"))
    before = state_of(trainer).weights["model.norm.weight"].copy()
    for _ in range(10):
        trainer.accumulate(batch(), 1e-2)
        trainer.apply(1e-5, 1.0)
    moved = np.abs(state_of(trainer).weights["model.norm.weight"] - before)
    assert 2e-5 < float(np.median(moved)) < 2e-4


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_weights_are_the_master_weights_rounded_to_the_compute_precision(
    twin: Twin, dtype: str, tmp_path: Path
) -> None:
    trainer = open_trainer(twin, recipe(compute_dtype=dtype))
    trainer.save(tmp_path)
    from safetensors.torch import load_file as load_torch

    saved = load_torch(tmp_path / "model.safetensors")
    assert saved.keys() == weights().keys()
    for name, value in weights().items():
        expected = torch.tensor(value).to(torch.float32 if dtype == "float32" else torch.bfloat16)
        assert torch.equal(saved[name], expected), name
    if dtype == "float32":
        assert load_file(tmp_path / "model.safetensors").keys() == weights().keys()


@pytest.mark.parametrize("twin", TWINS)
def test_the_fingerprint_sees_one_changed_bit(twin: Twin) -> None:
    trainer = open_trainer(twin, recipe())
    other = weights()
    other["model.norm.weight"][3] = np.nextafter(other["model.norm.weight"][3], np.float32(2))
    assert trainer.fingerprint() == open_trainer(twin, recipe()).fingerprint()
    assert trainer.fingerprint() != open_trainer(twin, recipe(), other).fingerprint()


@pytest.mark.parametrize("twin", TWINS)
def test_a_random_generator_comes_back_where_it_was(twin: Twin) -> None:
    trainer = open_trainer(twin, recipe())
    state = state_of(trainer)
    before = _draw(twin)
    trainer.import_state(state)
    assert _draw(twin) == before
    without = TrainerState(weights=state.weights, moments=state.moments, updates=0)
    trainer.import_state(without)
    assert _draw(twin) != before


def _draw(twin: Twin) -> float:
    if twin == "torch":
        return float(torch.rand(()))
    import mlx.core as mx

    return float(np.array(mx.random.uniform()))


def test_what_remains_of_a_group_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX refuses a ring of one; a group whose other machines were all left out is one."""
    from jupiter_engine.backends.mlx.train import join_group

    monkeypatch.setenv("JUPITER_RANKS", "1")
    group = join_group()
    assert (group.rank, group.ranks) == (0, 1)
    assert group.exchange([2.0]).tolist() == [[2.0]]
