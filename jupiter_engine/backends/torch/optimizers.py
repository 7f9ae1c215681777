"""The torch twin's optimizers: AdamW, AdamW with 8-bit moments, Muon and Adafactor over named float32 tensors.

The arithmetic is backends/mlx/optimizers.py's. AdamW runs torch's own fused
kernel; the others are written out, in place and in pieces, so that a large
parameter needs no temporaries of its size beyond what is said at each rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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

_PIECE = {"cpu": 2**18, "cuda": 2**22}
"""Numbers that one pass of the written-out rules works on: 1 MiB of float32 stays in a core's cache."""


def build(spec: OptimizerSpec, shapes: Mapping[str, Shape], *, device: torch.device | str = "cpu") -> Optimizer:
    """An optimizer for the parameters of `shapes`, its state on `device`."""
    return Optimizer(spec, shapes, device=device)


def orthogonalised(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """`matrix` [R, C] with its singular values moved near 1 by Newton-Schulz steps computed in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(dtype)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=NEWTON_SCHULZ_EPS)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class EightBit:
    """One of the two 8-bit number systems, on a device."""

    def __init__(self, device: torch.device, *, signed: bool) -> None:
        system = numbers(signed=signed)
        self._values = torch.from_numpy(system.values).to(device)
        self._bounds = torch.from_numpy(system.bounds).to(device)
        self._first = torch.from_numpy(system.first).to(device)

    def read(self, codes: Tensor, scales: Tensor) -> Tensor:
        """uint8 codes [N] (whole blocks) and their scales [N / 256] as float32 [N / 256, 256]."""
        return self._values.index_select(0, codes.int()).view(-1, BLOCK).mul_(scales[:, None])

    def write(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [B, 256] as uint8 codes [B * 256] and scales [B]."""
        scales = blocks.abs().amax(-1).clamp_(min=LEAST_SCALE)
        scaled = (blocks / scales[:, None]).view(-1)
        upper = scaled.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
        codes = self._first.index_select(0, upper)
        return codes + (scaled >= self._bounds.index_select(0, codes.int())), scales


class Optimizer:
    """Update rules and moments of the parameters it was built with.

    `moments` are the live tensors by `<kind>.<parameter>` (backends.moments.layout);
    whoever distributes state may write into them. `updates` counts steps.
    Gradients are float32 and used up: their values are undefined afterwards.
    """

    def __init__(self, spec: OptimizerSpec, shapes: Mapping[str, Shape], *, device: torch.device | str) -> None:
        self.updates = 0
        self._spec = spec
        self._device = torch.device(device)
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._rules = {name: rule(spec, name, shape) for name, shape in self._shapes.items()}
        self._piece = _PIECE.get(self._device.type, _PIECE["cuda"])
        # Float32 on CPUs, where the twins must agree; bfloat16 on GPUs, torch.optim.Muon's own choice, since there
        # float32 products take ten times as long and the iteration itself is only good to some percent.
        self.newton_schulz_dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        self.moments: dict[str, Tensor] = {}
        self._mean8 = EightBit(self._device, signed=True)
        self._square8 = EightBit(self._device, signed=False)
        self.load({}, 0)

    def begin(self) -> None:
        """Count a step; before its updates."""
        self.updates += 1

    def update(self, name: str, weight: Tensor, gradient: Tensor, learning_rate: float) -> None:
        """Move `weight` (float32, contiguous, whole) in place; uses `gradient` up."""
        self.update_all({name: weight}, {name: gradient}, learning_rate)

    def update_all(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        learning_rate: float,
        gradient_scale: float = 1.0,
    ) -> None:
        """Move all `weights` in place, with `gradients` times `gradient_scale`; uses the gradients up."""
        if self.updates < 1:
            raise ValueError("begin() comes before the first update")
        with torch.no_grad():
            if gradient_scale != 1.0:
                torch._foreach_mul_([gradients[name] for name in weights], gradient_scale)
            plain = [name for name in weights if self._rules[name] == "adamw"]
            for decays in (True, False):
                self._adamw(
                    [n for n in plain if (len(self._shapes[n]) >= 2) is decays], weights, gradients, learning_rate
                )
            for name, weight in weights.items():
                shared = constants(self._spec, self._shapes[name], learning_rate, self.updates)
                match self._rules[name]:
                    case "muon":
                        self._muon(name, weight, gradients[name], shared)
                    case "adafactor":
                        self._adafactor(name, weight, gradients[name], shared)
                    case "adamw8bit":
                        self._adamw8bit(name, weight, gradients[name], shared)
                    case "adamw":
                        pass

    def _adamw(
        self, names: list[str], weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], learning_rate: float
    ) -> None:
        """AdamW of several parameters that all decay or all do not: one fused kernel, no temporaries."""
        if not names:
            return
        spec = self._spec
        step = torch.tensor(float(self.updates), device=self._device)
        torch._fused_adamw_(
            [weights[n] for n in names],
            [gradients[n] for n in names],
            [self.moments[f"m.{n}"] for n in names],
            [self.moments[f"v.{n}"] for n in names],
            [],
            [step] * len(names),
            lr=learning_rate,
            beta1=spec.beta1,
            beta2=spec.beta2,
            weight_decay=spec.weight_decay if len(self._shapes[names[0]]) >= 2 else 0.0,
            eps=spec.eps,
            amsgrad=False,
            maximize=False,
        )

    def _muon(self, name: str, weight: Tensor, gradient: Tensor, shared: Constants) -> None:
        """torch.optim.Muon with `match_rms_adamw`; temporaries: about four times the parameter."""
        momentum = self._spec.momentum
        running = self.moments[f"m.{name}"]
        running.lerp_(gradient, 1.0 - momentum)
        direction = orthogonalised(gradient.lerp_(running, momentum), self.newton_schulz_dtype)
        weight.mul_(1.0 - shared.decay)
        weight.add_(direction, alpha=-shared.learning_rate * MUON_RMS * math.sqrt(max(weight.shape)))

    def _adafactor(self, name: str, weight: Tensor, gradient: Tensor, shared: Constants) -> None:
        """torch.optim.Adafactor; the direction takes the gradient's place. No value leaves the device."""
        share = self.updates**ADAFACTOR_DECAY
        rate = min(shared.learning_rate, 1.0 / math.sqrt(self.updates))
        root_size = math.sqrt(weight.numel())
        rate_now = (torch.linalg.vector_norm(weight) / root_size).clamp_(min=ADAFACTOR_LEAST_RMS) * rate
        weight.mul_(1.0 - shared.decay)
        least = ADAFACTOR_EPS**2
        if gradient.ndim < 2:
            square = self.moments[f"v.{name}"]
            square.lerp_(gradient.square(), share)
            gradient.mul_(square.clamp(min=least).rsqrt_())
        else:
            row, col = self.moments[f"row.{name}"], self.moments[f"col.{name}"]
            row.lerp_(torch.linalg.vector_norm(gradient, dim=-1).square_().div_(gradient.shape[-1]), share)
            col.lerp_(torch.linalg.vector_norm(gradient, dim=-2).square_().div_(gradient.shape[-2]), share)
            relative = row / row.mean(-1, keepdim=True).clamp_(min=ADAFACTOR_EPS)
            rows = max(1, self._piece // gradient.shape[-1])
            for start in range(0, gradient.shape[-2], rows):
                part = slice(start, start + rows)
                estimate = relative[..., part, None] * col[..., None, :]
                gradient[..., part, :].mul_(estimate.clamp_(min=least).rsqrt_())
        size = (torch.linalg.vector_norm(gradient) / root_size).clamp_(min=1.0)
        weight.sub_(gradient.mul_(rate_now / size))

    def _adamw8bit(self, name: str, weight: Tensor, gradient: Tensor, shared: Constants) -> None:
        """AdamW on moments that are read from and written back to 8-bit codes, some blocks at a time."""
        spec = self._spec
        values, slopes = weight.view(-1), gradient.reshape(-1)
        codes = [self.moments[f"{kind}.{name}"].view(-1) for kind in ("m8", "v8")]
        scales = [self.moments[f"{kind}.{name}"] for kind in ("ms", "vs")]
        for start in range(0, len(values), self._piece):
            part = slice(start, min(start + self._piece, len(values)))
            blocks = slice(start // BLOCK, -(-part.stop // BLOCK))
            slope = _padded(slopes[part], 0.0).view(-1, BLOCK)
            mean = self._mean8.read(_padded(codes[0][part], 0), scales[0][blocks])
            square = self._square8.read(_padded(codes[1][part], 0), scales[1][blocks])
            mean.lerp_(slope, 1.0 - spec.beta1)
            square.lerp_(slope.square(), 1.0 - spec.beta2)
            for index, (system, value) in enumerate(((self._mean8, mean), (self._square8, square))):
                written, scale = system.write(value)
                codes[index][part] = written[: part.stop - start]
                scales[index][blocks] = scale
            root = square.sqrt_().div_(shared.root_correction).add_(spec.eps)
            step = mean.div_(root).view(-1)[: part.stop - start]
            values[part].mul_(1.0 - shared.decay).sub_(step, alpha=shared.learning_rate / shared.mean_correction)

    def export(self, names: Iterable[str]) -> dict[str, npt.NDArray[np.generic]]:
        """`<kind>.<parameter>` arrays of `names`; on CPUs they share the state's memory, so copy to keep them."""
        return {
            key: self.moments[key].cpu().numpy()
            for name in names
            for key in (f"{kind}.{name}" for kind in layout(self._spec, name, self._shapes[name]))
        }

    def load(self, moments: Mapping[str, npt.NDArray[np.generic]], updates: int) -> None:
        """Take over copies of `moments` (extra names are left out); see backends.moments.chosen for its errors."""
        self.moments = {
            key: torch.tensor(value, device=self._device)
            for key, value in chosen(self._spec, self._shapes, moments, updates)
        }
        self.updates = updates


def _padded(flat: Tensor, value: float) -> Tensor:
    """`flat` [N], filled up with `value` to whole blocks; itself where there is nothing to fill."""
    missing = -len(flat) % BLOCK
    return flat if missing == 0 else torch.nn.functional.pad(flat, (0, missing), value=value)
