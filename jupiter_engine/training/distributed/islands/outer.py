"""The outer step: contributions of the islands become the next base.

    delta    = sum_i w_i * c_i * (base - theta_i) / sum_i w_i      w_i: trained tokens of island i
    momentum = mu * momentum + delta
    theta    = theta - rate * (delta + mu * momentum)              Nesterov, as torch.optim.SGD(nesterov=True)

c_i scales a contribution whose drift (`drift`: its norm, made comparable between islands of unlike speed) is above the
median down to it; one that exceeds the median `factor` times, or is not finite, is refused whole (Covenant/SparseLoCo
clip to the median). Rates by number of islands are those of
"Communication-Efficient Language Model Training Scales Reliably and Robustly: Scaling Laws for DiLoCo", figures 7-8.

theta and momentum are float32 files; everything runs chunk by chunk (payload.CHUNK values), so a hub needs some
hundred MB for a model of any size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jupiter_engine.checkpoints.tensors import FileRecord
from jupiter_engine.training.distributed.islands.payload import (
    Encoding,
    Floats,
    Payload,
    Shapes,
    chunks,
    write_payload,
)

_RATES = ((1, 0.4), (2, 0.6), (4, 0.6), (8, 0.8))


def outer_rate(islands: int) -> float:
    """Rate of the outer step for so many islands: tuned values at 1, 2, 4 and 8, straight lines between them."""
    if islands < 1:
        raise ValueError(f"islands must be at least 1, got {islands}")
    return float(np.interp(islands, [count for count, _ in _RATES], [rate for _, rate in _RATES]))


def same_tensors(found: Shapes, wanted: Shapes) -> bool:
    """Whether a contribution holds the model's tensors in their shapes and order."""
    return list(found.items()) == list(wanted.items())


def norm(payload: Payload) -> float:
    """L2 norm over all tensors, float64; NaN or infinite if any value is."""
    total = 0.0
    for name, shape in payload.shapes.items():
        for first, end in chunks(math.prod(shape)):
            values = payload.read(name, first, end).astype(np.float64)
            total += float(values @ values)
    return math.sqrt(total) if math.isfinite(total) else total


def drift(size: float, steps: int) -> float:
    """A contribution's norm as of one step, so that an island is not taken for a runaway because it made more steps.

    After k steps weights are between sqrt(k) (steps in unrelated directions) and k (all in one direction) times as far
    from their base as after one. k**0.75 lies between: whichever holds, islands of which one makes 20 times the steps
    of another differ by at most 20**0.25 = 2.1 after it.
    """
    return float(size / steps**0.75)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clipping:
    median: float
    scales: dict[str, float]
    """Island -> factor of its contribution (1 or less); refused ones are not in here."""
    refused: dict[str, str]
    """Island -> why."""


def clip(drifts: Mapping[str, float], factor: float) -> Clipping:
    """Who takes part, and with what factor (at least 1).

    The median is that of the finite drifts; of an even number the lower of the two in the middle: between two islands
    the calmer one is the measure, a mean of both could never be exceeded twofold.
    """
    refused = {island: f"its norm is {value}" for island, value in drifts.items() if not math.isfinite(value)}
    finite = {island: value for island, value in drifts.items() if island not in refused}
    median = statistics.median_low(finite.values()) if finite else 0.0
    scales: dict[str, float] = {}
    for island, value in finite.items():
        if value > factor * median:
            refused[island] = f"its change for its steps, {value:.4g}, exceeds {factor:g} times the median {median:.4g}"
        else:
            scales[island] = median / value if value > median else 1.0
    return Clipping(median=median, scales=scales, refused=refused)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    payload: Payload
    """base - theta of the island, by name."""
    weight: float
    """Its trained tokens."""
    scale: float = 1.0
    """From `clip`."""


def mean_delta(name: str, first: int, end: int, contributions: Sequence[Contribution]) -> Floats:
    """The weighted mean of a chunk, float32; the sums are float64."""
    total = sum(one.weight for one in contributions)
    found = np.zeros(end - first, dtype=np.float64)
    for one in contributions:
        found += one.payload.read(name, first, end).astype(np.float64) * (one.weight * one.scale / total)
    return found.astype(np.float32)


def nesterov(theta: Floats, momentum: Floats, delta: Floats, *, rate: float, mu: float) -> tuple[Floats, Floats]:
    """(new theta, new momentum) of one chunk, float32."""
    moved: Floats = np.add(np.float32(mu) * momentum, delta, dtype=np.float32)
    # Multiplied in float32: numpy keeps an array's precision against its own scalars.
    pushed: Floats = (delta + np.float32(mu) * moved) * np.float32(rate)
    stepped: Floats = np.subtract(theta, pushed, dtype=np.float32)
    return stepped, moved


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    theta: FileRecord
    momentum: FileRecord
    delta_norm: float
    """L2 norm of the mean delta."""


def outer_step(
    theta: Path,
    momentum: Path | None,
    contributions: Sequence[Contribution],
    *,
    rate: float,
    mu: float,
    new_theta: Path,
    new_momentum: Path,
) -> Stepped:
    """Write the merged theta and momentum (float32 files). `momentum` None: zero, as before the first step.

    Two passes, one for each file, so that both are written in one stream: the sums are done twice, which costs less
    than holding the model.
    """
    if not contributions or sum(one.weight for one in contributions) <= 0.0:
        raise ValueError("a step needs at least one contribution with trained tokens")
    squares = 0.0
    with Payload(theta) as old:
        before = Payload(momentum) if momentum is not None else None

        def moved(name: str, first: int, end: int) -> tuple[Floats, Floats, Floats]:
            delta = mean_delta(name, first, end, contributions)
            last = before.read(name, first, end) if before is not None else np.zeros(end - first, dtype=np.float32)
            return *nesterov(old.read(name, first, end), last, delta, rate=rate, mu=mu), delta

        def momentum_of(name: str, first: int, end: int) -> Floats:
            nonlocal squares
            _, value, delta = moved(name, first, end)
            wide = delta.astype(np.float64)
            squares += float(wide @ wide)
            return value

        try:
            kept = write_payload(new_momentum, old.shapes, "float32", momentum_of)
            stepped = write_payload(
                new_theta, old.shapes, "float32", lambda name, first, end: moved(name, first, end)[0]
            )
        finally:
            if before is not None:
                before.close()
    return Stepped(theta=stepped, momentum=kept, delta_norm=math.sqrt(squares))


def write_base(theta: Path, path: Path, encoding: Encoding) -> FileRecord:
    """The base as the islands get it. With int8 contributions it travels as bfloat16: weights themselves do not bear
    the error of int8, differences do."""
    with Payload(theta) as payload:
        return write_payload(path, payload.shapes, base_encoding(encoding), payload.read)


def base_encoding(encoding: Encoding) -> Encoding:
    return "bfloat16" if encoding == "int8" else encoding


def write_contribution(base: Payload, weights: Mapping[str, Floats], path: Path, encoding: Encoding) -> FileRecord:
    """base - theta, the island's contribution; `weights` float32 by name, those of the base.

    Raises ValueError for weights of other names or shapes, and (int8) for ones that are not finite.
    """
    if {name: tuple(value.shape) for name, value in weights.items()} != base.shapes:
        raise ValueError(f"{base.path} holds other tensors than the model")

    def difference(name: str, first: int, end: int) -> Floats:
        mine = np.asarray(weights[name], dtype=np.float32).reshape(-1)[first:end]
        return base.read(name, first, end) - mine

    return write_payload(path, base.shapes, encoding, difference)
