"""The MLX twin's optimizers: AdamW, AdamW with 8-bit moments, Muon and Adafactor over named float32 arrays.

The arithmetic is backends/torch/optimizers.py's, term by term. MLX's own
optimizers differ from torch's (no bias correction by default, Muon's decay goes
into the gradient), so the rules are written out and fused with mx.compile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from jupiter_engine.backends.moments import (
    ADAFACTOR_DECAY,
    ADAFACTOR_EPS,
    ADAFACTOR_LEAST_RMS,
    BLOCK,
    LEAST_SCALE,
    MUON_RMS,
    NEWTON_SCHULZ,
    NEWTON_SCHULZ_EPS,
    NEWTON_SCHULZ_STEPS,
    Constants,
    Shape,
    chosen,
    constants,
    layout,
    numbers,
    rule,
)
from jupiter_engine.protocol.specs import OptimizerSpec

_PENDING = 2**24
"""Numbers of parameters whose updates are computed together: bounds what exists besides the state (64 MiB each)."""
_PIECE = 2**20
"""Numbers that one pass of the 8-bit rule works on."""

Step = Callable[..., Any]


def _total(values: mx.array) -> mx.array:
    """Sum of all values, row by row first: one running float32 sum over 2^24 numbers would stop growing."""
    return mx.sum(mx.sum(values, axis=-1))


def build(spec: OptimizerSpec, shapes: Mapping[str, Shape]) -> Optimizer:
    """An optimizer for the parameters of `shapes`."""
    return Optimizer(spec, shapes)


def orthogonalised(matrix: mx.array) -> mx.array:
    """`matrix` [R, C] with its singular values moved near 1 by Newton-Schulz steps, in float32."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / mx.maximum(mx.sqrt(_total(mx.square(x))), NEWTON_SCHULZ_EPS)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = mx.addmm(x, mx.addmm(gram, gram, gram, alpha=c, beta=b), x, alpha=1.0, beta=a)
    return x.T if tall else x


class EightBit:
    """One of the two 8-bit number systems."""

    def __init__(self, *, signed: bool) -> None:
        system = numbers(signed=signed)
        self._values, self._bounds, self._first = (
            mx.array(table) for table in (system.values, system.bounds, system.first)
        )

    def read(self, codes: mx.array, scales: mx.array) -> mx.array:
        """uint8 codes [N] (whole blocks) and their scales [N / 256] as float32 [N / 256, 256]."""
        return self._values[codes].reshape(-1, BLOCK) * scales[:, None]

    def write(self, blocks: mx.array) -> tuple[mx.array, mx.array]:
        """float32 [B, 256] as uint8 codes [B * 256] and scales [B]."""
        scales = mx.maximum(mx.abs(blocks).max(-1), LEAST_SCALE)
        scaled = (blocks / scales[:, None]).reshape(-1)
        codes = self._first[scaled.view(mx.uint32) >> 16]
        return codes + (scaled >= self._bounds[codes]), scales


def _adamw(spec: OptimizerSpec) -> Step:
    def step(
        weight: mx.array, gradient: mx.array, mean: mx.array, square: mx.array,
        scale: mx.array, rate: mx.array, decay: mx.array, mean_correction: mx.array, root_correction: mx.array,
    ) -> tuple[mx.array, mx.array, mx.array]:  # fmt: skip
        """New weight, mean and square; all but the first four are scalars, so that nothing is compiled again."""
        gradient = gradient * scale
        mean = mean + (gradient - mean) * (1.0 - spec.beta1)
        square = square + (mx.square(gradient) - square) * (1.0 - spec.beta2)
        root = mx.sqrt(square) / root_correction + spec.eps
        return weight - decay * weight - (rate / mean_correction) * (mean / root), mean, square

    return step


class Optimizer:
    """Update rules and moments of the parameters it was built with.

    `moments` are the live arrays by `<kind>.<parameter>` (backends.moments.layout);
    whoever distributes state may replace them. `updates` counts steps.
    """

    def __init__(self, spec: OptimizerSpec, shapes: Mapping[str, Shape]) -> None:
        self.updates = 0
        self._spec = spec
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._rules = {name: rule(spec, name, shape) for name, shape in self._shapes.items()}
        self.moments: dict[str, mx.array] = {}
        self._mean8, self._square8 = EightBit(signed=True), EightBit(signed=False)
        self._adamw_step: Step = mx.compile(_adamw(spec), shapeless=True)
        self.load({}, 0)

    def begin(self) -> None:
        """Count a step; before its updates."""
        self.updates += 1

    def update(self, name: str, weight: mx.array, gradient: mx.array, learning_rate: float) -> mx.array:
        """The new value of `weight` (float32, whole). Nothing is computed yet: evaluate it and `moments`."""
        return self._updated(name, weight, gradient, learning_rate, mx.array(1.0))

    def update_all(
        self,
        weights: dict[str, mx.array],
        gradients: Mapping[str, mx.array],
        learning_rate: float,
        gradient_scale: float = 1.0,
    ) -> None:
        """Replace all values of `weights`, with `gradients` times `gradient_scale`; computed before it returns."""
        scale = mx.array(gradient_scale, mx.float32)
        pending: list[str] = []
        for name in list(weights):
            weights[name] = self._updated(name, weights[name], gradients[name], learning_rate, scale)
            pending.append(name)
            if sum(math.prod(self._shapes[n]) for n in pending) >= _PENDING:
                self._compute(weights, pending)
                pending = []
        self._compute(weights, pending)

    def _compute(self, weights: Mapping[str, mx.array], names: Iterable[str]) -> None:
        mx.eval([[weights[name], *(self.moments[key] for key in self._keys(name))] for name in names])

    def _updated(
        self, name: str, weight: mx.array, gradient: mx.array, learning_rate: float, scale: mx.array
    ) -> mx.array:
        if self.updates < 1:
            raise ValueError("begin() comes before the first update")
        shared = constants(self._spec, self._shapes[name], learning_rate, self.updates)
        match self._rules[name]:
            case "adamw":
                keys = (f"m.{name}", f"v.{name}")
                new, *moments = self._adamw_step(
                    weight, gradient, *(self.moments[k] for k in keys), scale, *_scalars(shared)
                )
                self.moments.update(zip(keys, moments, strict=True))
                return new
            case "muon":
                return self._muon(name, weight, gradient * scale, shared)
            case "adafactor":
                return self._adafactor(name, weight, gradient * scale, shared)
            case "adamw8bit":
                return self._adamw8bit(name, weight, gradient, scale, shared)

    def _muon(self, name: str, weight: mx.array, gradient: mx.array, shared: Constants) -> mx.array:
        """torch.optim.Muon with `match_rms_adamw`."""
        momentum = self._spec.momentum
        running = self.moments[f"m.{name}"]
        running = running + (gradient - running) * (1.0 - momentum)
        self.moments[f"m.{name}"] = running
        direction = orthogonalised(gradient + (running - gradient) * momentum)
        rate = shared.learning_rate * MUON_RMS * math.sqrt(max(weight.shape))
        return weight * (1.0 - shared.decay) - rate * direction

    def _adafactor(self, name: str, weight: mx.array, gradient: mx.array, shared: Constants) -> mx.array:
        """torch.optim.Adafactor."""
        share = self.updates**ADAFACTOR_DECAY
        rate = min(shared.learning_rate, 1.0 / math.sqrt(self.updates))
        rate_now = mx.maximum(mx.sqrt(_total(mx.square(weight)) / weight.size), ADAFACTOR_LEAST_RMS) * rate
        squares = mx.square(gradient)
        if gradient.ndim < 2:
            square = self.moments[f"v.{name}"]
            estimate = square = square + (squares - square) * share
            self.moments[f"v.{name}"] = square
        else:
            row, col = self.moments[f"row.{name}"], self.moments[f"col.{name}"]
            row = row + (mx.mean(squares, -1) - row) * share
            col = col + (mx.mean(squares, -2) - col) * share
            self.moments[f"row.{name}"], self.moments[f"col.{name}"] = row, col
            relative = row / mx.maximum(mx.mean(row, -1, keepdims=True), ADAFACTOR_EPS)
            estimate = relative[..., :, None] * col[..., None, :]
        direction = gradient * mx.rsqrt(mx.maximum(estimate, ADAFACTOR_EPS**2))
        size = mx.maximum(mx.sqrt(_total(mx.square(direction)) / direction.size), 1.0)
        return weight * (1.0 - shared.decay) - direction * (rate_now / size)

    def _adamw8bit(
        self, name: str, weight: mx.array, gradient: mx.array, scale: mx.array, shared: Constants
    ) -> mx.array:
        """AdamW on moments that are read from and written back to 8-bit codes, some blocks at a time."""
        keys = [f"{kind}.{name}" for kind in ("m8", "v8", "ms", "vs")]
        codes_m, codes_v, scales_m, scales_v = (self.moments[key] for key in keys)
        flat = [array.reshape(-1) for array in (weight, gradient, codes_m, codes_v)]
        pieces: list[list[mx.array]] = []
        for start in range(0, weight.size, _PIECE):
            part = slice(start, min(start + _PIECE, weight.size))
            blocks = slice(start // BLOCK, -(-part.stop // BLOCK))
            value, slope, m8, v8 = (_padded(array[part]) for array in flat)
            mean, square = self._mean8.read(m8, scales_m[blocks]), self._square8.read(v8, scales_v[blocks])
            new, mean, square = self._adamw_step(
                value.reshape(-1, BLOCK), slope.reshape(-1, BLOCK), mean, square, scale, *_scalars(shared)
            )
            written = [new.reshape(-1)[: part.stop - start]]
            for system, moment in ((self._mean8, mean), (self._square8, square)):
                codes, scales = system.write(moment)
                written += [codes[: part.stop - start], scales]
            if weight.size > _PIECE:
                mx.eval(written)
            pieces.append(written)
        new, m8, ms, v8, vs = (mx.concatenate(list(part)) for part in zip(*pieces, strict=True))
        shape = weight.shape
        self.moments.update(zip(keys, (m8.reshape(shape), v8.reshape(shape), ms, vs), strict=True))
        return new.reshape(shape)

    def _keys(self, name: str) -> list[str]:
        return [f"{kind}.{name}" for kind in layout(self._spec, name, self._shapes[name])]

    def export(self, names: Iterable[str]) -> dict[str, npt.NDArray[np.generic]]:
        """`<kind>.<parameter>` arrays of `names`; they may share the state's memory, so copy to keep them."""
        return {key: np.array(self.moments[key], copy=False) for name in names for key in self._keys(name)}

    def load(self, moments: Mapping[str, npt.NDArray[np.generic]], updates: int) -> None:
        """Take over copies of `moments` (extra names are left out); see backends.moments.chosen for its errors."""
        self.moments = {key: mx.array(value) for key, value in chosen(self._spec, self._shapes, moments, updates)}
        self.updates = updates


@lru_cache(maxsize=8)
def _scalars(shared: Constants) -> tuple[mx.array, ...]:
    """A step's constants as arrays: given as Python numbers they would be compiled into the kernel."""
    return tuple(
        mx.array(value, mx.float32)
        for value in (shared.learning_rate, shared.decay, shared.mean_correction, shared.root_correction)
    )


def _padded(flat: mx.array) -> mx.array:
    """`flat` [N], filled up with zeros to whole blocks."""
    return mx.pad(flat, (0, -flat.size % BLOCK))
