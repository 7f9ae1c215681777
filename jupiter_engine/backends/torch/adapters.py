"""LoRA in torch: frozen projections in compute precision with a trained low-rank pair beside each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from jupiter_engine.backends import lora as definition
from jupiter_engine.backends.torch.model import Llama
from jupiter_engine.protocol.specs import LoraSpec


class LoraLinear(nn.Module):
    """y = x W^T + scale * (x A^T) B^T with W frozen; W [out, in], A [rank, in], B [out, rank]."""

    def __init__(self, size_in: int, size_out: int, lora: LoraSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_out, size_in), requires_grad=False)
        self.lora_a = nn.Parameter(torch.empty(lora.rank, size_in))
        self.lora_b = nn.Parameter(torch.empty(size_out, lora.rank))
        self.scale = definition.scale(lora)

    def forward(self, x: Tensor) -> Tensor:
        low = functional.linear(x, self.lora_a) * self.scale
        return functional.linear(x, self.weight) + functional.linear(low, self.lora_b)


def add_adapters(model: Llama, lora: LoraSpec) -> list[str]:
    """Put adapters beside the projections of `lora.targets` and freeze the rest; returns the adapters' names.

    The new parameters have no values yet (the model is still on the meta device, or they are given later).
    """
    model.requires_grad_(requires_grad=False)
    shapes = definition.adapter_shapes(model.info, lora)
    for name in shapes:
        module, _, kind = name.rpartition(".")
        if kind != definition.A:
            continue
        parent, _, child = module.rpartition(".")
        projection = model.get_submodule(module)
        assert isinstance(projection, nn.Linear)
        with torch.device(projection.weight.device):
            adapted = LoraLinear(projection.in_features, projection.out_features, lora)
        setattr(model.get_submodule(parent), child, adapted)
    return list(shapes)


def merged(name: str, weight: Tensor, adapters: Mapping[str, Tensor], lora: LoraSpec) -> Tensor:
    """float32: the weight `name` with its adapter added (backends.lora.merge in torch); the weight if it has none."""
    module = name.removesuffix(".weight")
    low: Any = adapters.get(f"{module}.{definition.A}")
    if low is None:
        return weight.float()
    change = adapters[f"{module}.{definition.B}"].float() @ low.float()
    return weight.float() + definition.scale(lora) * change
