"""Shapes of Llama models as pure numbers: presets, parameter counts and the bytes they take.

No tensor library: the control wing shows these tables before any worker is started.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What fixes a Llama model's tensors and arithmetic (grouped-query attention, RoPE, SwiGLU, RMSNorm)."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    context: int
    """Longest sequence in tokens that the positions were made for."""
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tied: bool = True
    """The output projection is the embedding itself."""


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    shape: Shape
    purpose: str


def _shape(
    *, layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocab: int, context: int, theta: float
) -> Shape:
    return Shape(
        vocab_size=vocab,
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        intermediate_size=intermediate,
        context=context,
        head_dim=hidden // heads,
        rope_theta=theta,
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="nano",
            shape=_shape(
                layers=4, hidden=128, heads=4, kv_heads=2, intermediate=384, vocab=2048, context=1024, theta=10000.0
            ),
            purpose="trains in seconds on any CPU; proves a setup, knows nothing",
        ),
        Preset(
            name="125m",
            shape=_shape(
                layers=12, hidden=768, heads=12, kv_heads=4, intermediate=2560, vocab=32768, context=2048, theta=10000.0
            ),
            purpose="smallest size with fluent text; one GPU or one Mac",
        ),
        Preset(
            name="350m",
            shape=_shape(
                layers=24,
                hidden=1024,
                heads=16,
                kv_heads=8,
                intermediate=3072,
                vocab=32768,
                context=4096,
                theta=50000.0,
            ),
            purpose="one 16 GB machine",
        ),
        Preset(
            name="500m",
            shape=_shape(
                layers=24,
                hidden=1280,
                heads=20,
                kv_heads=4,
                intermediate=3840,
                vocab=32768,
                context=4096,
                theta=100000.0,
            ),
            purpose="one 24 GB machine, or several of 16 GB",
        ),
        Preset(
            name="1b",
            shape=_shape(
                layers=16,
                hidden=2048,
                heads=32,
                kv_heads=8,
                intermediate=8192,
                vocab=32768,
                context=4096,
                theta=500000.0,
            ),
            purpose="a group of Macs or one large GPU",
        ),
        Preset(
            name="3b",
            shape=_shape(
                layers=28,
                hidden=3072,
                heads=24,
                kv_heads=8,
                intermediate=8192,
                vocab=32768,
                context=8192,
                theta=500000.0,
            ),
            purpose="several large GPUs",
        ),
    )
}


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the Hugging Face Llama layout ([out, in] for projections)."""
    d, f = shape.hidden_size, shape.intermediate_size
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, d)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = (d,)
        tensors[f"{prefix}.self_attn.q_proj.weight"] = (q, d)
        tensors[f"{prefix}.self_attn.k_proj.weight"] = (kv, d)
        tensors[f"{prefix}.self_attn.v_proj.weight"] = (kv, d)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = (d, q)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = (d,)
        tensors[f"{prefix}.mlp.gate_proj.weight"] = (f, d)
        tensors[f"{prefix}.mlp.up_proj.weight"] = (f, d)
        tensors[f"{prefix}.mlp.down_proj.weight"] = (d, f)
    tensors["model.norm.weight"] = (d,)
    if not shape.tied:
        tensors["lm_head.weight"] = (shape.vocab_size, d)
    return tensors


def parameter_count(shape: Shape) -> int:
    """Exact number of trained values; a tied output projection is counted once."""
    d, f = shape.hidden_size, shape.intermediate_size
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = d * q + 2 * d * kv + q * d + 3 * d * f + 2 * d
    embeddings = shape.vocab_size * d * (1 if shape.tied else 2)
    return embeddings + shape.layers * layer + d


class TrainingMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one data-parallel rank's state, without activations."""

    weights: int
    """float32 master weights."""
    compute_copy: int
    """Copy of the weights in the compute precision (0 when that is float32)."""
    gradients: int
    """float32."""
    optimizer: int
    """AdamW: two float32 moments."""

    @property
    def total(self) -> int:
        return self.weights + self.compute_copy + self.gradients + self.optimizer


def training_memory(shape: Shape, *, compute_dtype: str = "bfloat16") -> TrainingMemory:
    """State of full training with AdamW and float32 master weights: 16 (float32) or 18 (bfloat16) bytes a parameter."""
    n = parameter_count(shape)
    return TrainingMemory(
        weights=4 * n,
        compute_copy=0 if compute_dtype == "float32" else BYTES_OF_DTYPE[compute_dtype] * n,
        gradients=4 * n,
        optimizer=8 * n,
    )


def weight_bytes(shape: Shape, dtype: str = "bfloat16") -> int:
    """Bytes of the weights alone, as stored or loaded for inference."""
    return parameter_count(shape) * BYTES_OF_DTYPE[dtype]


def kv_cache_bytes(shape: Shape, tokens: int, dtype: str = "bfloat16") -> int:
    """Bytes of keys and values for `tokens` cached positions, over all sequences."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens * BYTES_OF_DTYPE[dtype]


def flops_per_token(shape: Shape, sequence_tokens: int) -> float:
    """Floating-point operations of a forward pass per token (a training step takes three times as many).

    Two per weight in a matrix product (embedding look-up excluded, output projection included)
    plus causal attention, which on average sees half the sequence.
    """
    matrices = parameter_count(shape) - shape.hidden_size * (2 * shape.layers + 1)
    if not shape.tied:
        matrices -= shape.vocab_size * shape.hidden_size
    attention = 2.0 * shape.layers * shape.heads * shape.head_dim * sequence_tokens
    return 2.0 * matrices + attention


# -- shapes of model folders ---------------------------------------------------------------------------
SMOLLM2_135M = Shape(
    vocab_size=49152,
    hidden_size=576,
    layers=30,
    heads=9,
    kv_heads=3,
    intermediate_size=1536,
    context=8192,
    head_dim=64,
    rope_theta=100000.0,
)
"""The base model of `base: smollm2`."""


def shape_of_config(config: Mapping[str, Any]) -> Shape:
    """The shape that a Hugging Face Llama's config.json describes. KeyError or ValueError where it describes none.

    Only numbers are read; whether the folder's tensors agree is for whoever opens them.
    """
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // max(1, heads)
    return Shape(
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden,
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(kv_heads),
        intermediate_size=int(config["intermediate_size"]),
        context=int(config.get("max_position_embeddings") or 2048),
        head_dim=int(head_dim),
        tied=bool(config.get("tie_word_embeddings", False)),
    )
