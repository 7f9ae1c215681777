"""The torch twin's trainer: what is particular to it, against torch's own operations and explicit formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from jupiter_engine.backends import lora as lora_definition
from jupiter_engine.backends.torch import attention, device, head
from jupiter_engine.backends.torch.model import Llama
from jupiter_engine.backends.torch.train import TorchTrainer, open_trainer
from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.errors import StateError, UsageError
from jupiter_engine.protocol.shapes import tensor_shapes
from jupiter_engine.protocol.specs import LoraSpec, OptimizerSpec, Recipe
from tests.backends.torch_ranks import batch
from tests.training.nano import INFO, recipe, weights

ROWS = list(range(8))


def opened(chosen: Recipe, **more: Any) -> TorchTrainer:
    return open_trainer(INFO, chosen, weights(), threads=1, **{"compile": "off", **more})


def state_of(trainer: TorchTrainer) -> TrainerState:
    state = trainer.export_state()
    assert state is not None
    return state


def gradients(trainer: TorchTrainer) -> dict[str, np.ndarray]:
    """With beta1 = 0 AdamW's first moment after one step is the gradient itself."""
    trainer.apply(1e-30, 1.0)
    return {name[2:]: value.copy() for name, value in state_of(trainer).moments.items() if name.startswith("m.")}


def plain(**changes: Any) -> Recipe:
    return recipe(optimizer=OptimizerSpec(learning_rate=1e-3, beta1=0.0, weight_decay=0.0), **changes)


# -- attention and head --------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 128, 300, 700])
@pytest.mark.parametrize("documents", [1, 3])
def test_attention_in_blocks_is_torchs_attention_under_the_same_mask(length: int, documents: int) -> None:
    random = torch.Generator().manual_seed(length)
    rows, heads, kv_heads, size = 4, 6, 2, 16
    q, k, v = (
        torch.randn(rows, length, count, size, generator=random).transpose(1, 2).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )
    cuts = np.sort(np.random.default_rng(length).integers(0, length, (rows, documents - 1)), axis=1)
    segments = (np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1)
    starts = attention.document_starts(segments)
    steps = np.arange(length)
    mask = (segments[:, :, None] == segments[:, None, :]) & (steps[:, None] >= steps[None, :])
    expected = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.from_numpy(mask[:, None]), scale=0.3, enable_gqa=True
    )
    found = attention.attend(q, k, v, attention.cut(starts, torch.float32), 0.3)
    assert torch.allclose(found, expected, atol=1e-5)
    slope = torch.randn(found.shape, generator=random)
    for ours, theirs in zip(
        torch.autograd.grad(found, (q, k, v), slope), torch.autograd.grad(expected, (q, k, v), slope), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_blocks_leave_out_keys_that_no_query_may_see() -> None:
    segments = np.repeat(np.arange(4), 256)[None]
    blocks = attention.cut(attention.document_starts(segments), torch.float32).blocks
    assert sum((block.end - block.first) * (block.end - block.begin) for block in blocks) <= 4 * 256 * 256
    whole = attention.cut(attention.document_starts(np.zeros_like(segments)), torch.float32).blocks
    assert sum((block.end - block.first) * (block.end - block.begin) for block in whole) < 0.6 * 1024 * 1024


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_loss_is_the_cross_entropy_of_full_logits(chunk: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(33, 24, generator=random).mul(4).to(dtype).requires_grad_()
    weight = torch.randn(50, 24, generator=random).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (33,), generator=random)
    found = head.head_loss(hidden, weight, targets, chunk)
    expected = functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="sum")
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    with torch.inference_mode():
        assert float(head.head_loss(hidden, weight, targets, chunk)) == pytest.approx(
            float(expected.detach()), rel=1e-5
        )
    ours = torch.autograd.grad(found * 0.3, (hidden, weight))
    theirs = torch.autograd.grad(expected * 0.3, (hidden, weight))
    for mine, other in zip(ours, theirs, strict=True):
        error = torch.linalg.vector_norm((mine - other).float()) / torch.linalg.vector_norm(other.float())
        assert float(error) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_the_head_loss_bears_scores_far_apart() -> None:
    """A target of probability exp(-600), which is 0 in float32, has a finite loss all the same."""
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[300.0, 0.0], [-300.0, 0.0]])
    assert float(head.head_loss(hidden, weight, torch.tensor([1]), 4).detach()) == pytest.approx(600.0)


# -- what a step does ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_held_out_is_the_loss_that_training_sees_and_changes_nothing(dtype: str) -> None:
    trainer = opened(plain(compute_dtype=dtype))
    before = trainer.fingerprint()
    held = trainer.held_out(batch(ROWS))
    assert trainer.reduce() == 0.0
    assert held == pytest.approx(trainer.accumulate(batch(ROWS), 1.0), rel=1e-6)
    assert trainer.fingerprint() == before
    assert trainer.held_out(batch([])) == 0.0
    trainer.apply(1e-3, 1.0)
    assert trainer.held_out(batch(ROWS)) < held, "it follows the weights, and training goes on after it"


def test_a_discarded_gradient_is_as_if_it_had_never_been() -> None:
    chosen = recipe(compute_dtype="bfloat16")
    trainer, other = opened(chosen), opened(chosen)
    trainer.accumulate(batch([0, 1]), 1.0)
    assert trainer.reduce() > 0.0
    trainer.discard()
    for one in (trainer, other):
        one.accumulate(batch([2, 3]), 0.01)
        one.reduce()
        one.apply(1e-3, 1.0)
    assert trainer.fingerprint() == other.fingerprint()
    assert state_of(trainer).updates == 1


@pytest.mark.parametrize("update", ["full", "lora"])
def test_recomputed_activations_give_the_same_gradients_to_the_bit_and_keep_less(update: str) -> None:
    kept: dict[bool, int] = {}
    found: dict[bool, dict[str, np.ndarray]] = {}
    for recompute in (False, True):
        trainer = opened(plain(recompute_activations=recompute, update=update))
        seen: dict[int, int] = {}

        def pack(value: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        # Parameters are saved, too, in either case: the same ones.
        with saved_tensors_hooks(pack, lambda value: value):
            trainer.accumulate(batch(ROWS), 0.01)
        kept[recompute] = sum(seen.values())
        found[recompute] = gradients(trainer)
    for name, value in found[False].items():
        assert value.tobytes() == found[True][name].tobytes(), name
    assert max(float(np.abs(value).max()) for value in found[True].values()) > 1e-4
    inputs = 8 * 16 * INFO.hidden_size * 4 * INFO.layers
    parameters = sum(int(np.prod(size)) for size in tensor_shapes(INFO).values()) * 4
    assert kept[True] < kept[False] - inputs
    assert kept[True] < parameters + 3 * inputs + 200_000


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon", "adafactor"])
def test_every_optimizer_trains_and_goes_on_from_its_state_to_the_bit(name: str) -> None:
    chosen = recipe(optimizer=OptimizerSpec(name=name, learning_rate=3e-3, weight_decay=0.1))  # type: ignore[arg-type]

    def run(trainer: TorchTrainer, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            given = batch([step % 24, (step + 7) % 24, (step + 11) % 24])
            losses.append(trainer.accumulate(given, 1.0 / given.counted.sum()) / given.counted.sum())
            trainer.apply(3e-3, min(1.0, 1.0 / trainer.reduce()))
        return losses

    whole = opened(chosen)
    losses = run(whole, 0, 24)
    assert np.mean(losses[:4]) - np.mean(losses[-4:]) > 0.5
    first, second = opened(chosen), opened(chosen)
    run(first, 0, 9)
    second.import_state(state_of(first))
    assert second.fingerprint() == first.fingerprint()
    assert run(second, 9, 24) == losses[9:]
    assert second.fingerprint() == whole.fingerprint()


def test_a_state_of_another_model_is_refused_in_words() -> None:
    trainer = opened(recipe())
    state = state_of(trainer)
    state.weights["model.norm.weight"] = np.ones(3, np.float32)
    with pytest.raises(StateError, match=r"model\.norm\.weight has shape"):
        trainer.import_state(state)


def test_adopted_weights_replace_the_old_ones_and_moments_stay() -> None:
    trainer = opened(recipe(compute_dtype="bfloat16"))
    trainer.accumulate(batch(ROWS), 0.01)
    trainer.apply(1e-3, 1.0)
    moments = {name: value.copy() for name, value in state_of(trainer).moments.items()}
    other = weights(seed=5)
    trainer.adopt(other)
    held = trainer.weights()
    assert held is not None
    for name, value in other.items():
        np.testing.assert_array_equal(held[name], value)
    for name, value in moments.items():
        np.testing.assert_array_equal(state_of(trainer).moments[name], value)
    fresh = open_trainer(INFO, recipe(compute_dtype="bfloat16"), other, threads=1, compile="off")
    assert trainer.held_out(batch(ROWS)) == fresh.held_out(batch(ROWS)), "the rounded copies follow, too"


# -- LoRA ----------------------------------------------------------------------------------------

SPEC = LoraSpec(rank=3, alpha=6.0, targets=("q_proj", "o_proj", "down_proj"))


def adapted(seed: int = 3) -> dict[str, np.ndarray]:
    """Adapters of which neither part is zero."""
    random = np.random.default_rng(seed)
    shapes = lora_definition.adapter_shapes(INFO, SPEC)
    return {name: random.normal(0, 0.2, size).astype(np.float32) for name, size in shapes.items()}


def test_a_fresh_adapter_changes_nothing() -> None:
    trainer = opened(plain(update="lora", lora=SPEC))
    assert trainer.held_out(batch(ROWS)) == pytest.approx(opened(plain()).held_out(batch(ROWS)), rel=1e-6)


def test_lora_is_w_plus_scaled_b_a_in_value_and_gradient() -> None:
    """Against a plain model whose weights are W + (alpha / rank) B A, differentiated by autograd."""
    trainer = opened(plain(update="lora", lora=SPEC))
    given = adapted()
    trainer.adopt(given)
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in given.items()}
    whole = {}
    for name, value in weights().items():
        module = name.removesuffix(".weight")
        whole[name] = torch.tensor(value)
        if f"{module}.lora_a" in leaves:
            whole[name] = whole[name] + 2.0 * leaves[f"{module}.lora_b"] @ leaves[f"{module}.lora_a"]
    data = batch(ROWS)
    arguments = (torch.tensor(data.tokens), torch.tensor(data.segments))
    logits = torch.func.functional_call(Llama(INFO), whole, arguments)
    counted = torch.tensor(data.counted).flatten()
    loss = functional.cross_entropy(
        logits.flatten(0, 1)[counted], torch.tensor(data.targets).flatten()[counted], reduction="sum"
    )
    (0.01 * loss).backward()
    assert trainer.accumulate(data, 0.01) == pytest.approx(float(loss.detach()), rel=1e-5)
    found = gradients(trainer)
    assert found.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        np.testing.assert_allclose(found[name], leaf.grad.numpy(), rtol=1e-3, atol=2e-5, err_msg=name)


def test_only_adapters_have_masters_gradients_and_state() -> None:
    trainer = opened(recipe(update="lora", lora=SPEC, compute_dtype="bfloat16"))
    trainer.accumulate(batch(ROWS), 0.01)
    model = trainer._model
    for name, parameter in model.named_parameters():
        adapter = ".lora_" in name
        assert parameter.requires_grad == adapter
        assert parameter.grad is None, "an adapter's gradient is in float32 elsewhere, the rest has none"
        assert parameter.dtype == torch.bfloat16
    trainer.apply(1e-3, 1.0)
    state, shapes = state_of(trainer), lora_definition.adapter_shapes(INFO, SPEC)
    assert state.weights.keys() == shapes.keys()
    assert len(shapes) == 2 * 3 * INFO.layers
    assert {name.partition(".")[2] for name in state.moments} == shapes.keys()
    assert trainer.state_bytes() == 8 * sum(int(np.prod(size)) for size in shapes.values())


def test_the_published_model_has_the_adapters_merged(tmp_path: Path) -> None:
    trainer = opened(recipe(update="lora", lora=SPEC))
    given = adapted()
    trainer.adopt(given)
    trainer.save(tmp_path)
    saved = dict(load_file(tmp_path / "model.safetensors"))
    assert saved.keys() == weights().keys()
    for name, value in weights().items():
        np.testing.assert_allclose(saved[name], lora_definition.merge(name, value, given, SPEC), atol=1e-5)
    whole = open_trainer(INFO, recipe(), saved, threads=1, compile="off")
    assert whole.held_out(batch(ROWS)) == pytest.approx(trainer.held_out(batch(ROWS)), rel=1e-5)
    assert whole.held_out(batch(ROWS)) != pytest.approx(opened(recipe()).held_out(batch(ROWS)), rel=1e-3)


def test_the_frozen_rest_is_part_of_the_fingerprint() -> None:
    chosen = recipe(update="lora", lora=SPEC)
    other = weights()
    other["model.norm.weight"][3] = np.nextafter(other["model.norm.weight"][3], np.float32(2))
    changed = open_trainer(INFO, chosen, other, threads=1, compile="off")
    assert changed.fingerprint() != opened(chosen).fingerprint()
    assert opened(chosen).fingerprint() == opened(chosen).fingerprint()


# -- device and compiling ------------------------------------------------------------------------


def test_peak_memory_grows_with_what_is_held() -> None:
    trainer = opened(recipe())
    before = trainer.peak_bytes()
    assert 50 << 20 < before < 1 << 40
    held = torch.ones((before >> 2) + (64 << 20))
    assert trainer.peak_bytes() >= held.numel() * 4 > before


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA GeForce RTX 3090", 71e12, 35.6e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA GeForce RTX 5090", 209.5e12, 104.8e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12),
        ("NVIDIA H100 PCIe", 756e12, 51.2e12),
        ("NVIDIA H200", 989.4e12, 66.9e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("Some GPU", None, None),
    ],
)
def test_peaks_of_known_gpus(name: str, bfloat16: float | None, float32: float | None) -> None:
    assert device.peak_flops_of(name, torch.bfloat16) == bfloat16
    assert device.peak_flops_of(name, torch.float32) == float32


def test_a_cpu_has_no_stated_peak() -> None:
    assert device.peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_when_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(device, "compiler_found", lambda: True)
    assert device.compile_wanted("auto", cpu, 1000.0)
    assert not device.compile_wanted("auto", cpu, 10.0), "start-up would take longer than it saves"
    assert device.compile_wanted("on", cpu, 10.0)
    assert not device.compile_wanted("off", cpu, 1000.0)
    monkeypatch.setattr(device, "compiler_found", lambda: False)
    assert not device.compile_wanted("auto", cpu, 1000.0)
    with pytest.raises(UsageError, match="needs a C\\+\\+ compiler"):
        device.compile_wanted("on", cpu, 1000.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own warnings are not ours to fix
def test_a_compiled_model_trains_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    chosen = plain(recompute_activations=True)
    compiled, eager = opened(chosen, compile="on"), opened(chosen)
    # Another number of rows, as the last micro-batch of a step may have.
    for rows in (ROWS, ROWS[:3]):
        assert compiled.accumulate(batch(rows), 0.01) == pytest.approx(eager.accumulate(batch(rows), 0.01), rel=1e-5)
    assert any(tmp_path.rglob("*.cpp")) or any(tmp_path.rglob("*.so")), "something was compiled"
    expected = gradients(eager)
    for name, value in gradients(compiled).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5, err_msg=name)
