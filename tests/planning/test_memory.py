from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from jupiter_engine.backends.lora import adapter_shapes as real_adapter_shapes
from jupiter_engine.backends.moments import layout
from jupiter_engine.planning.memory import (
    LOSS_CHUNK,
    DeviceKind,
    adapter_shapes,
    checkpoint_bytes,
    optimizer_state_bytes,
    rank_memory,
)
from jupiter_engine.protocol.shapes import PRESETS, parameter_count, tensor_shapes
from jupiter_engine.protocol.specs import LoraSpec, OptimizerSpec, Recipe, Twin

SHAPE = PRESETS["125m"].shape
RECIPE = Recipe(sequence_tokens=512, batch_sequences=8, micro_batch_sequences=4)


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon", "adafactor"])
def test_the_optimizers_state_is_counted_exactly(name: str, preset: str) -> None:
    spec = OptimizerSpec(name=name)  # type: ignore[arg-type]
    for shapes in (tensor_shapes(PRESETS[preset].shape), adapter_shapes(PRESETS[preset].shape, LoraSpec())):
        real = sum(
            math.prod(size) * np.dtype(dtype).itemsize
            for parameter, shape in shapes.items()
            for size, dtype in layout(spec, parameter, shape).values()
        )
        assert optimizer_state_bytes(spec, shapes) == real


def test_adapters_are_those_that_the_twins_make() -> None:
    for lora in (LoraSpec(), LoraSpec(rank=4, targets=("q_proj", "down_proj"))):
        assert adapter_shapes(SHAPE, lora) == real_adapter_shapes(SHAPE, lora)


def test_state_is_16_bytes_a_weight_in_float32_and_18_in_bfloat16() -> None:
    n = parameter_count(SHAPE)
    for dtype, each in (("float32", 16), ("bfloat16", 18)):
        parts = rank_memory(SHAPE, replace(RECIPE, compute_dtype=dtype), twin="torch")
        assert parts.weights + parts.compute_copy + parts.gradients + parts.optimizer == each * n
    assert checkpoint_bytes(SHAPE, RECIPE) == 12 * n


def test_the_loss_takes_as_many_targets_at_once_as_the_twins_do() -> None:
    """Torch 512, MLX 256; on a card torch makes a chunk's softmax while that of the chunk before is still there."""
    for twin, chunk in LOSS_CHUNK.items():
        source = Path(f"jupiter_engine/backends/{twin}/train.py").read_text()
        assert f"\n_LOSS_CHUNK = {chunk}\n" in source
    long, short = (replace(RECIPE, sequence_tokens=tokens, micro_batch_sequences=1) for tokens in (1024, 512))

    def logits(recipe: Recipe, twin: Twin, device: DeviceKind) -> int:
        return rank_memory(SHAPE, recipe, twin=twin, device=device).logits

    assert logits(long, "torch", "cpu") == logits(short, "torch", "cuda") == 512 * SHAPE.vocab_size * 10
    assert logits(long, "torch", "cuda") == 512 * SHAPE.vocab_size * 14
    assert logits(long, "mlx", "metal") == 256 * SHAPE.vocab_size * 10


@pytest.mark.parametrize(("tokens", "mib"), [(128, (3015, 990)), (384, (3167, 1458)), (2048, (4393, 3037))])
def test_what_was_fitted_on_a_processor_stays_as_it_was_fitted(tokens: int, mib: tuple[int, int]) -> None:
    """The fit took 256 targets at once for the loss, torch takes up to twice as many."""
    for update, total in zip(("full", "lora"), mib, strict=True):
        recipe = replace(RECIPE, sequence_tokens=tokens, micro_batch_sequences=1, update=update)
        assert rank_memory(SHAPE, recipe, twin="torch").total / 2**20 == pytest.approx(total, abs=1)


def test_adapters_take_the_place_of_most_of_the_state() -> None:
    lora = replace(RECIPE, update="lora")
    parts = rank_memory(SHAPE, lora, twin="torch")
    assert parts.weights == 2 * parameter_count(SHAPE)
    assert parts.gradients == parts.compute_copy == 0
    assert parts.adapters > 0
    assert parts.total < rank_memory(SHAPE, RECIPE, twin="torch").total
    assert checkpoint_bytes(SHAPE, lora) < checkpoint_bytes(SHAPE, RECIPE) / 10


@pytest.mark.parametrize("twin", ["torch", "mlx"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "metal"])
def test_more_work_at_once_never_takes_less_memory(twin: str, device: str) -> None:
    def size(**changes: object) -> int:
        return rank_memory(SHAPE, replace(RECIPE, **changes), twin=twin, device=device).total  # type: ignore[arg-type]

    for field, values in (("sequence_tokens", (64, 256, 1024, 4096)), ("micro_batch_sequences", (1, 2, 4, 8))):
        sizes = [size(**{field: value}) for value in values]
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[-1]
    assert size(recompute_activations=True) < size()


def test_ranks_share_batch_and_by_wish_state() -> None:
    one = rank_memory(SHAPE, RECIPE, twin="torch")
    four = rank_memory(SHAPE, RECIPE, twin="torch", ranks=4)
    zero1 = rank_memory(SHAPE, RECIPE, twin="torch", ranks=4, sharding="zero1")
    fsdp = rank_memory(SHAPE, RECIPE, twin="torch", ranks=4, sharding="fsdp")
    assert four.activations == pytest.approx(one.activations / 2, rel=0.01)  # 2 of its 4 sequences are left for a rank
    assert (four.weights, four.optimizer) == (one.weights, one.optimizer)
    assert zero1.optimizer == one.optimizer // 4
    # The masters are divided where a copy in the compute precision lies beside them on every rank, else not.
    assert (zero1.weights, zero1.compute_copy) == (one.weights // 4, one.compute_copy)
    plain = replace(RECIPE, compute_dtype="float32")
    whole = rank_memory(SHAPE, plain, twin="torch").weights
    assert rank_memory(SHAPE, plain, twin="torch", ranks=4, sharding="zero1").weights == whole
    assert fsdp.weights == one.weights // 4
    assert fsdp.gradients == one.gradients // 4


def test_metal_builds_attention_again_one_layer_at_a_time() -> None:
    """3.2 x 2 bytes x heads x s^2 with 32 heads in bfloat16, fitted to 12.9 GiB at 8,192 tokens (mlx-train-perf)."""
    shape = PRESETS["1b"].shape
    for tokens, gib in ((1024, 0.2), (2048, 0.8), (4096, 3.2), (8192, 12.9)):
        recipe = replace(RECIPE, sequence_tokens=tokens, batch_sequences=1, micro_batch_sequences=1)
        assert rank_memory(shape, recipe, twin="mlx", device="metal").attention / 2**30 == pytest.approx(gib, rel=0.02)
