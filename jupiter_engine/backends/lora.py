"""What LoRA adapters are, for both twins: names, shapes, first values, merging. numpy only, no tensor library.

An adapter of a projection W [out, in] is a pair A [rank, in], B [out, rank];
the projection then computes x W^T + (alpha / rank) x A^T B^T (Hu et al., 2021,
arXiv 2106.09685). Its parameters are named after the projection's module:
`model.layers.0.self_attn.q_proj.lora_a` and `.lora_b`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from jupiter_engine.protocol.shapes import Shape, tensor_shapes
from jupiter_engine.protocol.specs import LoraSpec

A, B = "lora_a", "lora_b"


def scale(lora: LoraSpec) -> float:
    """What an adapter's output is multiplied by."""
    return lora.alpha / lora.rank


def adapter_shapes(shape: Shape, lora: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every adapter tensor, in the order of the model's own tensors."""
    adapters: dict[str, tuple[int, ...]] = {}
    for name, size in tensor_shapes(shape).items():
        module = name.removesuffix(".weight")
        if len(size) == 2 and module.rpartition(".")[2] in lora.targets:
            adapters[f"{module}.{A}"] = (lora.rank, size[1])
            adapters[f"{module}.{B}"] = (size[0], lora.rank)
    return adapters


def initial_adapters(shape: Shape, lora: LoraSpec, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """First values, float32: A normal with standard deviation 1/sqrt(in), B zero: a run starts at the model itself.

    Every tensor has its own random stream, keyed by seed and name (as training.model.presets does): the same
    values in either twin and on every rank.
    """
    values: dict[str, npt.NDArray[np.float32]] = {}
    for name, size in adapter_shapes(shape, lora).items():
        if name.endswith(B):
            values[name] = np.zeros(size, dtype=np.float32)
            continue
        stream = np.random.Generator(np.random.PCG64([seed, *name.encode()]))
        values[name] = stream.standard_normal(size, dtype=np.float32) / np.float32(size[1] ** 0.5)
    return values


def merge(
    name: str, weight: npt.NDArray[np.float32], adapters: Mapping[str, npt.NDArray[Any]], lora: LoraSpec
) -> npt.NDArray[np.float32]:
    """The weight `name` (`<module>.weight`, float32 [out, in]) with its adapter added, where it has one."""
    module = name.removesuffix(".weight")
    if f"{module}.{A}" not in adapters:
        return weight
    change = adapters[f"{module}.{B}"].astype(np.float32) @ adapters[f"{module}.{A}"].astype(np.float32)
    return weight + np.float32(scale(lora)) * change
