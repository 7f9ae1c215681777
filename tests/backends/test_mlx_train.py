"""The MLX trainer by itself: the loss it fuses, the memory it saves, adapters, and what the device says."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
import numpy as np
import pytest
from mlx_lm.tuner.lora import LoRALinear
from safetensors.numpy import load_file

from jupiter_engine.backends import lora
from jupiter_engine.backends.mlx import device
from jupiter_engine.backends.mlx.adapters import AdaptedLinear
from jupiter_engine.backends.mlx.forward import _head_loss
from jupiter_engine.backends.mlx.train import MlxTrainer, open_trainer
from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.errors import StateError
from jupiter_engine.protocol.shapes import tensor_shapes
from jupiter_engine.protocol.specs import LoraSpec
from jupiter_engine.training.loop import Batch
from jupiter_engine.training.model.presets import _random
from tests.backends.mlx_ring import case_recipe, rows
from tests.training.nano import INFO, weights

EIGHT = np.arange(8)


def opened(compile: str = "off", **changes: Any) -> MlxTrainer:  # noqa: A002
    return open_trainer(INFO, case_recipe(**changes), weights(), compile=compile)  # type: ignore[arg-type]


def gradients(trainer: MlxTrainer, batch: Batch, scale: float = 0.01) -> dict[str, np.ndarray]:
    trainer.accumulate(batch, scale)
    found = {name: np.array(value) for name, value in trainer._gradients.items()}
    trainer.discard()
    return found


def close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=name)


# -- the head's loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 1e-5), (mx.bfloat16, 2e-2)])
def test_the_fused_head_equals_plain_cross_entropy(chunks: int, dtype: mx.Dtype, tolerance: float) -> None:
    mx.random.seed(3)
    weight, hidden = mx.random.normal((50, 16)).astype(dtype), mx.random.normal((12, 16)).astype(dtype)
    targets, counts = mx.random.randint(0, 50, (12,)), mx.array([1.0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1])

    def plain(weight: mx.array, hidden: mx.array) -> mx.array:
        logits = (hidden @ weight.T).astype(mx.float32)
        return 0.3 * mx.sum(nn.losses.cross_entropy(logits, targets, reduction="none") * counts)

    def fused(weight: mx.array, hidden: mx.array) -> mx.array:
        return 0.3 * _head_loss(chunks)(weight, hidden, targets, counts)[0]

    expected, slopes = mx.value_and_grad(plain, argnums=(0, 1))(weight, hidden)
    value, found = mx.value_and_grad(fused, argnums=(0, 1))(weight, hidden)
    assert value.item() == pytest.approx(expected.item(), rel=tolerance)
    for ours, theirs in zip(found, slopes, strict=True):
        assert ours.dtype == dtype
        ours, theirs = (np.array(array.astype(mx.float32)) for array in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def test_logits_exist_for_a_few_chunks_at_a_time() -> None:
    weight, hidden = mx.random.normal((8192, 32)), mx.random.normal((2048, 32))
    targets, counts = mx.zeros(2048, mx.int32), mx.ones(2048)
    mx.eval(weight, hidden, targets, counts)

    def peak(chunks: int) -> int:
        def loss(weight: mx.array, hidden: mx.array) -> mx.array:
            return _head_loss(chunks)(weight, hidden, targets, counts)[0]

        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(mx.value_and_grad(loss, argnums=(0, 1))(weight, hidden))
        return mx.get_peak_memory()

    # All logits are 64 MiB in float32; the CPU's queue runs some ten operations ahead of what is freed.
    assert peak(1) > 120 << 20
    assert peak(32) < 30 << 20


def test_few_counted_targets_are_picked_out_and_many_are_not() -> None:
    trainer = opened()
    few = rows(EIGHT)
    few.counted[:, 3:] = False
    inputs, _ = trainer._inputs(few)
    assert "at" in inputs
    assert len(inputs["counts"]) == 32
    many = dataclasses.replace(few, counted=np.ones_like(few.counted))
    many.counted[0, 0] = False
    inputs, _ = trainer._inputs(many)
    assert "at" not in inputs
    assert np.array(inputs["counts"]).sum() == many.counted.size - 1


def test_a_row_of_one_document_needs_no_mask() -> None:
    trainer = opened()
    batch = rows(EIGHT)
    one = dataclasses.replace(batch, segments=np.full_like(batch.segments, 3))
    assert "segments" not in trainer._inputs(one)[0]
    found = gradients(trainer, one)
    trainer.lockstep = True  # as fsdp: the mask is always made
    assert "segments" in trainer._inputs(one)[0]
    close(found, gradients(trainer, one), 1e-5)


def test_held_out_loss_is_the_training_loss_without_a_gradient() -> None:
    for changes in ({}, {"update": "lora"}):
        trainer = opened(**changes)
        batch = rows(EIGHT)
        assert trainer.held_out(batch) == pytest.approx(trainer.accumulate(batch, 1.0), rel=1e-6)
        trainer.discard()
        trainer.held_out(batch)
        assert trainer.reduce() == 0.0


def test_a_lockstep_trainer_computes_batches_that_count_nothing() -> None:
    trainer = opened()
    trainer.lockstep = True
    batch = rows(EIGHT)
    nothing = dataclasses.replace(batch, counted=np.zeros_like(batch.counted))
    expected = gradients(trainer, batch)
    trainer.accumulate(batch, 0.01)
    assert trainer.accumulate(nothing, 0.01) == 0.0
    close({name: np.array(value) for name, value in trainer._gradients.items()}, expected, 1e-7)


@pytest.mark.slow  # on a CPU every compiled kernel is a run of the C++ compiler
@pytest.mark.parametrize("changes", [{}, {"update": "lora", "recompute_activations": True}])
def test_a_compiled_step_gives_the_same_gradient(changes: dict[str, Any]) -> None:
    plain, compiled = opened(**changes), opened("on", **changes)
    assert plain._forward._gradients != compiled._forward._gradients
    few = rows(EIGHT)
    few.counted[:, 3:] = False
    for batch in (rows(EIGHT), few):
        close(gradients(compiled, batch), gradients(plain, batch), 2e-5)
    for trainer in (plain, compiled):
        trainer.accumulate(rows(EIGHT), 0.01)
        trainer.apply(1e-3, 1.0)
    # The new weights are an argument, no constant of the compiled function.
    close(gradients(compiled, rows(EIGHT)), gradients(plain, rows(EIGHT)), 2e-4)


@pytest.mark.parametrize(("compile", "metal", "expected"), [
    ("on", False, True), ("off", True, False), ("auto", True, True), ("auto", False, False),
])  # fmt: skip
def test_auto_compiles_on_metal_only(
    compile: str,  # noqa: A002
    metal: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrapped: list[object] = []

    def remember(function: Any, **_: Any) -> Any:
        wrapped.append(function)
        return function

    monkeypatch.setattr(device, "prepare", lambda: None)
    monkeypatch.setattr(device, "on_metal", lambda: metal)
    monkeypatch.setattr("jupiter_engine.backends.mlx.forward.mx.compile", remember)
    trainer = opened(compile)
    assert (trainer._forward._gradients in wrapped) == expected


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_activations_give_the_same_gradient(dtype: str) -> None:
    kept, computed = (opened(recompute_activations=flag, compute_dtype=dtype) for flag in (False, True))
    close(gradients(computed, rows(EIGHT)), gradients(kept, rows(EIGHT)), 1e-6)


def test_recomputed_activations_need_less_memory() -> None:
    deep = msgspec.structs.replace(INFO, layers=8, vocab_size=64, context=256)
    given = {name: _random(name, size, 8, 0) for name, size in tensor_shapes(deep).items()}
    tokens = np.arange(4 * 129).reshape(4, 129) % 60 + 3
    batch = Batch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], segments=np.zeros((4, 128), np.int64),
        counted=np.ones((4, 128), np.bool_),
    )  # fmt: skip

    def peak(*, recompute: bool) -> int:
        wanted = case_recipe(sequence_tokens=128, recompute_activations=recompute)
        trainer = open_trainer(deep, wanted, given)
        trainer.accumulate(batch, 0.01)
        trainer.discard()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        trainer.accumulate(batch, 0.01)
        return mx.get_peak_memory() - before

    assert peak(recompute=True) < 0.4 * peak(recompute=False)


def test_the_first_gradient_is_no_second_copy() -> None:
    """Weights, moments and one gradient between steps: nothing is left of the pass."""
    trainer = opened()
    trainer.accumulate(rows(EIGHT), 0.01)
    trainer.apply(1e-3, 1.0)
    mx.clear_cache()
    parameters = sum(int(np.prod(size)) for size in tensor_shapes(INFO).values())
    before = mx.get_active_memory()
    trainer.accumulate(rows(EIGHT), 0.01)
    assert mx.get_active_memory() - before < 1.2 * 4 * parameters
    trainer.apply(1e-3, 1.0)
    assert abs(mx.get_active_memory() - before) < 0.2 * 4 * parameters


# -- LoRA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_an_adapted_projection_equals_mlx_lms(dtype: mx.Dtype) -> None:
    mx.random.seed(5)
    spec = LoraSpec(rank=4, alpha=10.0)
    base = nn.Linear(24, 40, bias=False)
    base.weight = base.weight.astype(dtype)
    theirs = LoRALinear.from_base(base, r=4, scale=lora.scale(spec))
    theirs.lora_b = mx.random.normal(theirs.lora_b.shape)
    ours = AdaptedLinear(base, spec)
    ours.lora_a, ours.lora_b = theirs.lora_a.T, theirs.lora_b.T
    x = mx.random.normal((2, 3, 24)).astype(dtype)
    assert ours(x).dtype == dtype
    assert mx.array_equal(ours(x), theirs(x))
    assert not mx.array_equal(ours(x), base(x))


def test_lora_trains_adapters_only_and_publishes_them_merged(tmp_path: Path) -> None:
    trainer = opened(update="lora", lora={"rank": 4, "targets": ("q_proj", "down_proj")})
    names = lora.adapter_shapes(INFO, case_recipe(lora={"rank": 4, "targets": ("q_proj", "down_proj")}).lora)
    before = trainer.held_out(rows(EIGHT))
    assert before == pytest.approx(opened().held_out(rows(EIGHT)), rel=1e-6)
    for _ in range(3):
        trainer.accumulate(rows(EIGHT), 0.01)
        trainer.apply(1e-2, 1.0)
    state = trainer.export_state()
    assert state is not None
    assert state.weights.keys() == names.keys()
    assert {key.partition(".")[2] for key in state.moments} == names.keys()
    trainer.save(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == weights().keys()
    spec = LoraSpec(rank=4, targets=("q_proj", "down_proj"))
    moved = 0
    for name, value in weights().items():
        expected = lora.merge(name, value, state.weights, spec)
        np.testing.assert_allclose(saved[name], expected, rtol=0, atol=1e-6, err_msg=name)
        moved += not np.array_equal(saved[name], value)
    assert moved == 2 * INFO.layers
    merged = open_trainer(INFO, case_recipe(), saved)
    assert merged.held_out(rows(EIGHT)) == pytest.approx(trainer.held_out(rows(EIGHT)), rel=1e-5)
    assert trainer.held_out(rows(EIGHT)) < before - 1.0


def test_the_fingerprint_of_adapters_knows_the_frozen_weights() -> None:
    other = weights()
    other["model.norm.weight"][0] += 0.5
    wanted = case_recipe(update="lora")
    assert opened(update="lora").fingerprint() == open_trainer(INFO, wanted, weights()).fingerprint()
    assert opened(update="lora").fingerprint() != open_trainer(INFO, wanted, other).fingerprint()


def test_a_state_of_another_method_is_refused() -> None:
    state = opened().export_state()
    assert state is not None
    with pytest.raises(StateError, match=r"no weights for model\.layers\.0\.self_attn\.q_proj\.lora_a"):
        opened(update="lora").import_state(state)


# -- state -----------------------------------------------------------------------------------------


def test_adopted_weights_leave_the_moments_and_a_discarded_gradient_leaves_nothing() -> None:
    trainer = opened()
    trainer.accumulate(rows(EIGHT), 0.01)
    trainer.apply(1e-2, 1.0)
    before = trainer.export_state()
    assert before is not None
    trainer.accumulate(rows(EIGHT), 0.01)
    trainer.discard()
    trainer.adopt(weights(seed=9))
    after = trainer.export_state()
    assert after is not None
    assert all(np.array_equal(after.weights[name], value) for name, value in weights(seed=9).items())
    assert all(np.array_equal(after.moments[key], value) for key, value in before.moments.items())
    assert after.updates == 1
    assert trainer.reduce() == 0.0
    fresh = open_trainer(INFO, case_recipe(), weights(seed=9))
    assert trainer.held_out(rows(EIGHT)) == fresh.held_out(rows(EIGHT))


def test_an_exported_state_is_not_changed_by_later_updates() -> None:
    trainer = opened()
    trainer.accumulate(rows(EIGHT), 0.01)
    trainer.apply(1e-2, 1.0)
    state = trainer.export_state()
    assert isinstance(state, TrainerState)
    copies = {name: value.copy() for name, value in {**state.weights, **state.moments}.items()}
    for _ in range(2):
        trainer.accumulate(rows(EIGHT), 0.01)
        trainer.apply(1e-2, 1.0)
    assert all(np.array_equal(copies[name], value) for name, value in {**state.weights, **state.moments}.items())


def test_the_norm_of_a_large_tensor_is_exact() -> None:
    """MLX's CPU sums float32 one by one: 2^26 ones come out as 2^24 unless rows are summed first."""
    trainer = opened()
    name = "model.embed_tokens.weight"
    trainer._gradients = {n: mx.zeros(size) for n, size in tensor_shapes(INFO).items()}
    trainer._gradients[name] = mx.ones((8192, 8192))
    assert trainer.reduce() == pytest.approx(8192.0, rel=1e-6)


# -- the device ------------------------------------------------------------------------------------


def test_a_cpu_has_no_budget_of_its_own_and_no_known_peak() -> None:
    if device.on_metal():
        pytest.skip("this machine has an Apple GPU")
    assert device.memory_budget() is None
    assert device.peak_flops() is None
    program = (
        "import numpy as np; from jupiter_engine.backends.mlx import device; print(device.peak_bytes());"
        "block = np.ones(256 << 20, dtype=np.uint8); del block; print(device.peak_bytes())"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60).stdout.split()
    before, after = (int(number) for number in said)
    assert 16 << 20 < before < 400 << 20
    assert 240 << 20 < after - before < 270 << 20
    trainer = opened()
    assert trainer.peak_flops() is None
    assert trainer.peak_bytes() > before


def test_the_measured_speed_of_products_is_this_machines() -> None:
    slow, fast = device.measured_gemm_flops(0.02, size=2), device.measured_gemm_flops(0.1, size=256)
    assert 1e5 < slow < fast < 1e14


def test_on_metal_the_cache_is_bounded_and_memory_counted_by_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    monkeypatch.setattr(device, "on_metal", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12 << 30})
    monkeypatch.setattr(mx, "set_cache_limit", limits.append)
    monkeypatch.setattr(mx, "set_wired_limit", lambda _: pytest.fail("wired memory panics macOS"))
    opened()
    assert limits == [(12 << 30) // 8]
    assert device.memory_budget() == 12 << 30
    assert device.peak_bytes() == mx.get_peak_memory()
