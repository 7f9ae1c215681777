"""Rotary position embedding of the MLX twin: periods for every kind of scaling that a model folder may name.

The same formulas as in the torch twin, which are those of transformers'
`modeling_rope_utils`.
"""

from __future__ import annotations

import math

import mlx.core as mx

from jupiter_engine.checkpoints.rope import number, yarn_range
from jupiter_engine.protocol.shapes import Shape

Scaling = dict[str, float | str]


def rotary_periods(info: Shape, scaling: Scaling | None) -> mx.array:
    """Positions per radian of each of the head_dim/2 pairs, float32 [head_dim / 2] (what mx.fast.rope calls freqs).

    `scaling` is ModelInfo.rope_scaling: None (plain), `linear` (positions are
    divided by `factor`), `llama3` (long wavelengths are stretched, short ones
    kept, those between blended: Llama 3.1) or `yarn` (the same idea by number
    of rotations, arXiv 2309.00071; its factor on the attention is
    ModelInfo.attention_scale).
    """
    exponents = mx.arange(0, info.head_dim, 2, dtype=mx.float32) / info.head_dim
    frequencies = 1.0 / (info.rope_theta**exponents)
    if scaling is None:
        return 1.0 / frequencies
    kind, factor = scaling["rope_type"], number(scaling, "factor")
    if kind == "linear":
        return factor / frequencies
    original = number(scaling, "original_max_position_embeddings")
    if kind == "llama3":
        low, high = number(scaling, "low_freq_factor"), number(scaling, "high_freq_factor")
        smooth = mx.clip((original * frequencies / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
        return 1.0 / ((1 - smooth) * frequencies / factor + smooth * frequencies)
    first, last = yarn_range(scaling, info.head_dim, info.rope_theta)
    stretched = mx.clip((mx.arange(info.head_dim // 2, dtype=mx.float32) - first) / (last - first), 0.0, 1.0)
    return 1.0 / (frequencies / factor * stretched + frequencies * (1 - stretched))


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotary embedding in the half-split layout at any positions.

    x [B, heads, T, head_dim]; cos, sin float32 [B, 1, T, head_dim / 2]. mx.fast.rope knows consecutive positions only.
    """
    first, second = mx.split(x.astype(mx.float32), 2, axis=-1)
    return mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
