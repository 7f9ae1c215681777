"""LoRA in MLX: low-rank adapters in float32 beside frozen projections (backends.lora says what they are)."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from jupiter_engine.backends import lora
from jupiter_engine.backends.mlx.model import Llama
from jupiter_engine.checkpoints.model_folder import ModelInfo
from jupiter_engine.protocol.specs import LoraSpec


class AdaptedLinear(nn.Module):
    """A projection x W^T + (alpha / rank) x A^T B^T.

    `weight` [out, in] in the compute precision; `lora_a` [rank, in] and `lora_b`
    [out, rank] in float32, and so are their products, as in mlx_lm's LoRALinear
    (which holds both transposed). The result has x's precision.
    """

    def __init__(self, base: nn.Linear, spec: LoraSpec) -> None:
        super().__init__()
        out, width = base.weight.shape
        self.weight = base.weight
        self.lora_a = mx.zeros((spec.rank, width))
        self.lora_b = mx.zeros((out, spec.rank))
        self._scale = lora.scale(spec)

    def __call__(self, x: mx.array) -> mx.array:
        change = (x.astype(mx.float32) @ self.lora_a.T) @ self.lora_b.T
        return x @ self.weight.T + (self._scale * change).astype(x.dtype)


def adapt(model: Llama, spec: LoraSpec) -> None:
    """Put an adapter beside every target projection of every layer."""
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name in spec.targets:
                if name in part:
                    part[name] = AdaptedLinear(part[name], spec)


def initial(info: ModelInfo, spec: LoraSpec, seed: int) -> dict[str, mx.array]:
    """First values by name, float32: the same on every rank and in the other twin."""
    return {name: mx.array(value) for name, value in lora.initial_adapters(info, spec, seed).items()}


def merged(weights: Mapping[str, mx.array], adapters: Mapping[str, mx.array], spec: LoraSpec) -> dict[str, mx.array]:
    """The model's weights, float32, with every adapter added to its projection. Lazy: nothing is computed yet."""
    whole: dict[str, mx.array] = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        value = weight.astype(mx.float32)
        if f"{module}.{lora.A}" in adapters:
            value = value + lora.scale(spec) * (adapters[f"{module}.{lora.B}"] @ adapters[f"{module}.{lora.A}"])
        whole[name] = value
    return whole
