"""Counts and bytes of model shapes."""

from __future__ import annotations

import math

import pytest

from jupiter_engine.protocol.shapes import (
    PRESETS,
    Shape,
    flops_per_token,
    kv_cache_bytes,
    parameter_count,
    tensor_shapes,
    training_memory,
    weight_bytes,
)

LIMITS = {
    "nano": (0.9e6, 3e6),
    "125m": (110e6, 135e6),
    "350m": (320e6, 380e6),
    "500m": (460e6, 540e6),
    "1b": (1.0e9, 1.1e9),
    "3b": (2.7e9, 3.3e9),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_they_are_named_for(name: str) -> None:
    shape = PRESETS[name].shape
    low, high = LIMITS[name]
    assert low <= parameter_count(shape) <= high
    assert shape.heads % shape.kv_heads == 0
    assert shape.head_dim * shape.heads == shape.hidden_size
    assert shape.head_dim % 2 == 0, "rotary pairs"


@pytest.mark.parametrize("name", PRESETS)
def test_the_count_is_the_sum_of_the_tensors(name: str) -> None:
    shape = PRESETS[name].shape
    assert parameter_count(shape) == sum(math.prod(size) for size in tensor_shapes(shape).values())


def test_known_models() -> None:
    """Published counts: SmolLM2-135M (134,515,008) and Llama-2-7B (6,738,415,616)."""
    smol = Shape(
        vocab_size=49152, hidden_size=576, layers=30, heads=9, kv_heads=3, head_dim=64, intermediate_size=1536,
        context=8192, tied=True,
    )  # fmt: skip
    llama = Shape(
        vocab_size=32000, hidden_size=4096, layers=32, heads=32, kv_heads=32, head_dim=128, intermediate_size=11008,
        context=4096, tied=False,
    )  # fmt: skip
    assert parameter_count(smol) == 134_515_008
    assert parameter_count(llama) == 6_738_415_616


def test_memory_by_hand() -> None:
    shape = PRESETS["1b"].shape
    n = parameter_count(shape)
    assert weight_bytes(shape) == 2 * n
    assert training_memory(shape).total == 18 * n
    assert training_memory(shape, compute_dtype="float32").total == 16 * n
    assert kv_cache_bytes(shape, 4096) == 2 * 16 * 8 * 64 * 4096 * 2


def test_flops_are_about_two_a_parameter() -> None:
    shape = PRESETS["1b"].shape
    assert flops_per_token(shape, 0) == pytest.approx(2 * parameter_count(shape), rel=1e-3)
    assert flops_per_token(shape, 4096) > 1.05 * flops_per_token(shape, 0)
