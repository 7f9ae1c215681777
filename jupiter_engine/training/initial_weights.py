"""Random initial weights made with numpy from a seed: the same floats for both twins and any number of ranks."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from jupiter_engine.protocol.shapes import Shape, tensor_shapes

STANDARD_DEVIATION = 0.02
_RESIDUAL = ("o_proj.weight", "down_proj.weight")


def initial_weights(shape: Shape, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Weights by Hugging Face Llama name, float32.

    Matrices are normal with standard deviation 0.02; those that write into the
    residual stream (`o_proj`, `down_proj`) are divided by sqrt(2 * layers), so
    that the stream's variance does not grow with depth; norm gains are one.
    Each tensor has its own stream keyed by its name: adding a tensor changes no other.
    """
    weights: dict[str, npt.NDArray[np.float32]] = {}
    for name, size in tensor_shapes(shape).items():
        if len(size) == 1:
            weights[name] = np.ones(size, dtype=np.float32)
            continue
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        values = np.random.Generator(np.random.PCG64([seed, key])).standard_normal(size, dtype=np.float32)
        deviation = STANDARD_DEVIATION / (math.sqrt(2 * shape.layers) if name.endswith(_RESIDUAL) else 1.0)
        weights[name] = values * np.float32(deviation)
    return weights
