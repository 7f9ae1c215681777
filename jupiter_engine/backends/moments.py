"""What an optimizer keeps for each parameter, the same for both twins: rules, layouts and the 8-bit number system.

Plain numpy; the update rules themselves stand in each twin's `optimizers`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jupiter_engine.errors import StateError
from jupiter_engine.protocol.specs import OptimizerSpec

Rule = Literal["adamw", "adamw8bit", "muon", "adafactor"]
Shape = tuple[int, ...]
Layout = dict[str, tuple[Shape, npt.DTypeLike]]

BLOCK = 256
"""Numbers that share one scale (8-Bit Optimizers via Block-wise Quantization, arXiv 2110.02861)."""
LEAST_QUANTISED = 4096
"""Smaller parameters (norm gains) keep float32 moments, as in bitsandbytes and torchao: there is nothing to save."""
LEAST_SCALE = 1e-12
"""A block's scale is at least this, so that a block of zeros has one (torchao)."""

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon's quintic iteration (torch.optim.Muon, from Keller Jordan's Muon)."""
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_EPS = 1e-7
"""Least norm that the momentum is divided by."""
MUON_RMS = 0.2
"""AdamW's typical root mean square of an update over the rate: with it AdamW's rates fit (arXiv 2502.16982)."""

ADAFACTOR_DECAY = -0.8
"""The t-th step's weight in the running squares is t to this (arXiv 1804.04235)."""
ADAFACTOR_EPS = float(np.finfo(np.float32).eps)
"""Least root of a squared-gradient estimate (torch.optim.Adafactor's eps1 for float32)."""
ADAFACTOR_LEAST_RMS = 1e-3
"""A parameter's update is relative to its root mean square, at least this (eps2)."""

_NOT_MUON = ("embed_tokens", "lm_head")


@dataclass(frozen=True, slots=True)
class Constants:
    """What a step's arithmetic needs besides the tensors; Python floats, computed in double precision."""

    learning_rate: float
    decay: float
    """learning_rate * weight_decay, or 0 for parameters that do not decay."""
    mean_correction: float
    """1 - beta1 ** t."""
    root_correction: float
    """sqrt(1 - beta2 ** t)."""


def constants(spec: OptimizerSpec, shape: Shape, learning_rate: float, updates: int) -> Constants:
    """Those of update number `updates` (from 1) of a parameter of `shape`. Vectors never decay."""
    return Constants(
        learning_rate=learning_rate,
        decay=learning_rate * spec.weight_decay if len(shape) >= 2 else 0.0,
        mean_correction=1.0 - spec.beta1**updates,
        root_correction=math.sqrt(1.0 - spec.beta2**updates),
    )


def rule(spec: OptimizerSpec, name: str, shape: Shape) -> Rule:
    """How the parameter is updated: Muon is for the layers' matrices, AdamW takes the rest."""
    if spec.name == "muon" and (len(shape) != 2 or any(part in _NOT_MUON for part in name.split("."))):
        return "adamw"
    if spec.name == "adamw8bit" and math.prod(shape) < LEAST_QUANTISED:
        return "adamw"
    return spec.name


def layout(spec: OptimizerSpec, name: str, shape: Shape) -> Layout:
    """Kind of moment -> (shape, dtype), for one parameter.

    `m`, `v`: running mean and square, float32 of the parameter's shape (Muon's
    matrices: `m` alone). `row` [..., R], `col` [..., C]: Adafactor's running
    mean squares over the last and the last but one dimension. `m8`, `v8`: codes
    of m and v, uint8 of the parameter's shape; `ms`, `vs`: scales of their
    blocks of 256 in row-major order, float32.
    """
    f4: npt.DTypeLike = np.float32
    match rule(spec, name, shape):
        case "adamw":
            return {"m": (shape, f4), "v": (shape, f4)}
        case "muon":
            return {"m": (shape, f4)}
        case "adafactor":
            if len(shape) < 2:
                return {"v": (shape, f4)}
            return {"row": (shape[:-1], f4), "col": ((*shape[:-2], shape[-1]), f4)}
        case "adamw8bit":
            scales: Shape = (-(-math.prod(shape) // BLOCK),)
            return {"m8": (shape, np.uint8), "v8": (shape, np.uint8), "ms": (scales, f4), "vs": (scales, f4)}


def fresh(kind: str, shape: Shape, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The moment before the first update: zero, in 8-bit kinds the code of zero."""
    return np.full(shape, {"m8": numbers(signed=True).zero, "v8": numbers(signed=False).zero}.get(kind, 0), dtype)


def chosen(
    spec: OptimizerSpec,
    shapes: Mapping[str, Shape],
    moments: Mapping[str, npt.NDArray[Any]],
    updates: int,
) -> Iterable[tuple[str, npt.NDArray[Any]]]:
    """Every moment that `shapes` need, as `<kind>.<parameter>`, taken out of `moments`.

    StateError where one is missing or has another shape or type, unless there
    were no updates yet: then missing ones are as before the first.
    """
    for name, shape in shapes.items():
        for kind, (wanted, dtype) in layout(spec, name, shape).items():
            key = f"{kind}.{name}"
            value = moments.get(key)
            if value is None and updates == 0:
                yield key, fresh(kind, wanted, dtype)
            elif value is None:
                raise StateError(
                    f"the checkpoint holds no {key}, which {spec.name} needs",
                    fix="go on with the optimizer that the run began with, or start a new run",
                )
            elif value.shape != wanted or value.dtype != dtype:
                raise StateError(
                    f"the checkpoint's {key} is {value.dtype} {value.shape}, wanted is {np.dtype(dtype)} {wanted}",
                    fix="go on with the model and optimizer that the run began with, or start a new run",
                )
            else:
                yield key, value


@dataclass(frozen=True, slots=True)
class Numbers:
    """256 numbers in [-1, 1] or [0, 1] and how a float32 finds its code, the index of the nearest one.

    code(x) = number of `bounds` that are <= x, where bounds are the float32
    midpoints of neighbours: a tie goes to the larger number. `first[b]` is that
    count for the smallest float32 whose upper 16 bits are b; no two bounds share
    those bits, so code(x) = c + (x >= bounds[c]) with c = first[upper bits of x].
    """

    values: npt.NDArray[np.float32]
    """[256], ascending."""
    bounds: npt.NDArray[np.float32]
    """[256], ascending; the last is infinite."""
    first: npt.NDArray[np.uint8]
    """[65536]."""
    zero: int
    """Code of 0."""


@lru_cache(maxsize=2)
def numbers(*, signed: bool) -> Numbers:
    """The dynamic numbers of arXiv 2110.02861 (1511.04561), as bitsandbytes and torchao make them.

    Seven decades down to 1e-6; each halves the count of numbers of the one
    above, spread evenly; besides 0 and 1. Unsigned ones have twice as many.
    """
    found: list[float] = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (decade + (0 if signed else 1)) + 1)
        means = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2.0
        found += [*means, *(-means if signed else ())]
    values = np.sort(np.array(found, dtype=np.float32))
    bounds = np.append(values[:-1] + (values[1:] - values[:-1]) * np.float32(0.5), np.float32(np.inf))
    upper = np.arange(65536, dtype=np.uint32) << 16
    # Among negative floats of the same upper bits the smallest has all lower bits set.
    smallest = np.where(upper >> 31, upper | 0xFFFF, upper).view(np.float32)
    first = np.searchsorted(bounds[:-1], smallest, side="right").astype(np.uint8)
    return Numbers(values, bounds, first, int(np.flatnonzero(values == 0.0)[0]))
