"""The torch twin's trainer: float32 master weights, products in the recipe's precision, AdamW."""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from jupiter_engine.backends.torch.collectives import Alone, TorchrunGroup, device_of_rank
from jupiter_engine.backends.torch.model import DTYPES, Llama, load_model, save_model
from jupiter_engine.backends.torch.rotary import rotary_frequencies
from jupiter_engine.checkpoints.model_folder import ModelInfo
from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.protocol.specs import Recipe
from jupiter_engine.training.loop import Batch

_LOSS_CHUNK = 256
"""Targets whose logits exist at once: at 49k tokens 50 MB in float32, however large the micro-batch."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def join_group() -> Alone:
    """Join the group that torchrun started this process for."""
    return TorchrunGroup()


def open_trainer(
    info: ModelInfo,
    recipe: Recipe,
    weights: Mapping[str, npt.NDArray[Any]] | None,
    *,
    group: Alone | None = None,
    threads: int = 0,
) -> TorchTrainer:
    """This twin's trainer; see TorchTrainer."""
    return TorchTrainer(info, recipe, weights, group=group, threads=threads)


def versions() -> dict[str, str]:
    return {"torch": str(torch.__version__)}


def load_weights(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """A verified model folder's weights as float32 arrays."""
    model = load_model(folder, "float32")
    return {name: value.numpy() for name, value in model.state_dict().items()}


class TorchTrainer:
    """Implements training.loop.Trainer.

    The model computes in `recipe.compute_dtype`; where that is not float32 it
    is a rounded copy of the master weights, refreshed after each update, and
    its gradients are added up in float32.
    """

    def __init__(
        self,
        info: ModelInfo,
        recipe: Recipe,
        weights: Mapping[str, npt.NDArray[Any]] | None,
        *,
        group: Alone | None = None,
        threads: int = 0,
    ) -> None:
        """`weights` (float32 by name) are needed on rank 0 only: the others receive them."""
        if threads:
            torch.set_num_threads(threads)
        _keep_freed_memory()
        torch.manual_seed(recipe.seed)
        self._group = group or Alone()
        self._info, self._recipe = info, recipe
        self._dtype = DTYPES[recipe.compute_dtype]
        self._device = device_of_rank()
        with torch.device("meta"):
            self._model = Llama(info)
        self._names = list(self._model.state_dict())
        shapes = {name: value.shape for name, value in self._model.state_dict().items()}
        self._master: dict[str, Tensor] = {
            name: torch.zeros(shapes[name], device=self._device)
            if weights is None
            else torch.tensor(weights[name], dtype=torch.float32, device=self._device)
            for name in self._names
        }
        self._group.broadcast(list(self._master.values()))
        # A plain attribute that the meta device left without values.
        self._model.frequencies = rotary_frequencies(info, info.rope_scaling)
        self._bind()
        for value in self._master.values():
            value.grad = torch.zeros_like(value)
        self._optimizer = _adamw(self._master, recipe)

    @property
    def rank(self) -> int:
        return self._group.rank

    @property
    def ranks(self) -> int:
        return self._group.ranks

    def _bind(self) -> None:
        """Give the model its compute weights: the master itself in float32, else rounded copies."""
        if self._dtype == torch.float32:
            compute = {name: value.detach() for name, value in self._master.items()}
        else:
            compute = {name: value.to(self._dtype) for name, value in self._master.items()}
        self._model.load_state_dict(compute, assign=True)
        self._compute = dict(self._model.named_parameters())
        for value in self._compute.values():
            value.requires_grad_(True)

    def accumulate(self, batch: Batch, scale: float) -> float:
        tokens, targets, segments, counted = (
            torch.from_numpy(array).to(self._device)
            for array in (batch.tokens, batch.targets, batch.segments, batch.counted)
        )
        counted = counted.reshape(-1)
        targets = targets.reshape(-1)[counted]
        hidden = self._model.hidden(tokens, segments)
        total, back = self._loss(hidden.reshape(-1, hidden.shape[-1]), counted, targets, scale)
        if back is not None:
            hidden.backward(back.view_as(hidden))
        with torch.no_grad():
            for name, value in self._compute.items():
                if value.grad is not None:
                    gradient = self._master[name].grad
                    assert gradient is not None
                    gradient.add_(value.grad)
                    value.grad = None
        return total

    def _loss(self, hidden: Tensor, counted: Tensor, targets: Tensor, scale: float) -> tuple[float, Tensor | None]:
        """Sum of the counted cross-entropy and scale * its gradient by `hidden` [B * T, D].

        Only counted positions are projected, `_LOSS_CHUNK` at a time, each
        differentiated at once: the full [B * T, V] logits never exist.
        """
        if len(targets) == 0:
            return 0.0, None
        leaf = hidden.detach()[counted].requires_grad_(True)
        total = 0.0
        for start in range(0, len(targets), _LOSS_CHUNK):
            logits = self._model.logits(leaf[start : start + _LOSS_CHUNK]).float()
            loss = functional.cross_entropy(logits, targets[start : start + _LOSS_CHUNK], reduction="sum")
            total += float(loss.detach())
            (loss * scale).backward()
        back = torch.zeros_like(hidden)
        back[counted] = leaf.grad
        return total, back

    def exchange(self, row: Sequence[float]) -> npt.NDArray[np.float64]:
        return self._group.exchange(row)

    def _gradients(self) -> list[Tensor]:
        return [value.grad for value in self._master.values() if value.grad is not None]

    def reduce(self) -> float:
        gradients = self._gradients()
        self._group.all_sum(gradients)
        return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))

    def apply(self, learning_rate: float, gradient_scale: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        gradients = self._gradients()
        if gradient_scale != 1.0:
            torch._foreach_mul_(gradients, gradient_scale)
        self._optimizer.step()
        torch._foreach_zero_(gradients)
        self._refresh()

    def _refresh(self) -> None:
        if self._dtype != torch.float32:
            with torch.no_grad():
                for name, value in self._compute.items():
                    value.copy_(self._master[name])

    def export_state(self) -> TrainerState:
        moments: dict[str, npt.NDArray[np.float32]] = {}
        updates = 0
        for name in self._names:
            state = self._optimizer.state.get(self._master[name], {})
            for short, long in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                value = state[long] if state else torch.zeros_like(self._master[name])
                moments[f"{short}.{name}"] = value.cpu().numpy()
            updates = int(state["step"]) if state else 0
        return TrainerState(
            weights={name: self._master[name].detach().cpu().numpy() for name in self._names},
            moments=moments,
            updates=updates,
            rng={"torch.cpu": torch.get_rng_state().numpy()},
        )

    def import_state(self, state: TrainerState) -> None:
        """Take over a state of either twin."""
        with torch.no_grad():
            for name in self._names:
                self._master[name].copy_(torch.from_numpy(state.weights[name]))
        for name in self._names if state.updates else ():
            self._optimizer.state[self._master[name]] = {
                "step": torch.tensor(float(state.updates), device=self._device),
                "exp_avg": torch.tensor(state.moments[f"m.{name}"], device=self._device),
                "exp_avg_sq": torch.tensor(state.moments[f"v.{name}"], device=self._device),
            }
        if "torch.cpu" in state.rng:
            torch.set_rng_state(torch.tensor(state.rng["torch.cpu"]))
        self._refresh()

    def share_state(self, updates: int) -> None:
        self._group.broadcast(list(self._master.values()))
        if updates:
            for name in self._names:
                state = self._optimizer.state.setdefault(self._master[name], {})
                state.setdefault("step", torch.tensor(float(updates), device=self._device))
                for key in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(key, torch.zeros_like(self._master[name]))
                self._group.broadcast([state["exp_avg"], state["exp_avg_sq"]])
        self._refresh()

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in self._names:
            digest.update(self._master[name].detach().cpu().numpy().reshape(-1).view(np.uint8))
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write model.safetensors into `folder`, in the recipe's compute precision."""
        save_model(_Weights(self._master), folder, self._recipe.compute_dtype)

    def close(self) -> None:
        self._group.close()


def _keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks instead of returning them to the kernel each time.

    By default every tensor above 32 MiB is mapped, filled with zeros by the
    kernel and unmapped again. Measured on a 135M model, a step of 8x256 tokens:
    4.3 s of kernel time with that, 0.6 s without (and smaller loss chunks), of
    20 s in all. Where there is no glibc nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class _Weights:
    """Master weights in the shape that save_model takes."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights

    def state_dict(self) -> dict[str, Tensor]:
        return self._weights


def _adamw(weights: Mapping[str, Tensor], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; the rate is set before each step."""
    spec = recipe.optimizer
    return torch.optim.AdamW(
        [
            {"params": [w for w in weights.values() if w.ndim >= 2], "weight_decay": spec.weight_decay},
            {"params": [w for w in weights.values() if w.ndim < 2], "weight_decay": 0.0},
        ],
        lr=spec.learning_rate,
        betas=(spec.beta1, spec.beta2),
        eps=spec.eps,
        fused=True,
    )
