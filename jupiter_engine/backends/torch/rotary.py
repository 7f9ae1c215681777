"""Rotary position embedding of the torch twin: angles for every kind of scaling that a model folder may name.

The formulas and their order of operations are those of transformers'
`modeling_rope_utils`, so that angles at far positions agree, too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jupiter_engine.checkpoints.rope import number, yarn_range
from jupiter_engine.protocol.shapes import Shape

Scaling = dict[str, float | str]


def rotary_frequencies(info: Shape, scaling: Scaling | None) -> Tensor:
    """Radians per position of each of the head_dim/2 pairs, float32 [head_dim / 2].

    `scaling` is ModelInfo.rope_scaling: None (plain), `linear` (positions are
    divided by `factor`), `llama3` (long wavelengths are stretched, short ones
    kept, those between blended: Llama 3.1) or `yarn` (the same idea by number
    of rotations, arXiv 2309.00071; its factor on the attention is
    ModelInfo.attention_scale).
    """
    exponents = torch.arange(0, info.head_dim, 2, dtype=torch.int64).float() / info.head_dim
    frequencies = 1.0 / (info.rope_theta**exponents)
    kind = None if scaling is None else scaling["rope_type"]
    if scaling is None:
        return frequencies
    factor = number(scaling, "factor")
    if kind == "linear":
        return frequencies / factor
    original = number(scaling, "original_max_position_embeddings")
    if kind == "llama3":
        low, high = number(scaling, "low_freq_factor"), number(scaling, "high_freq_factor")
        wavelengths = 2 * math.pi / frequencies
        smooth = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - smooth) * frequencies / factor + smooth * frequencies
    first, last = yarn_range(scaling, info.head_dim, info.rope_theta)
    ramp = ((torch.arange(info.head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0.0, 1.0)
    kept = 1 - ramp
    return 1.0 / (factor * info.rope_theta**exponents) * (1 - kept) + frequencies * kept


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout. x [B, heads, T, head_dim]; cos, sin broadcastable to it.

    `sin` carries the sign of the first half (see `rotary`).
    """
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return x * cos + swapped * sin


def rotary(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions [...] -> cos, sin [..., head_dim]; angles in float32, sin negated in its first half."""
    angles = positions.unsqueeze(-1).float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)
