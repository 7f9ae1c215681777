"""The MLX twin's trainer: float32 master weights, products in the recipe's precision, AdamW."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten, tree_unflatten

from jupiter_engine.backends.mlx.collectives import Alone, RingGroup
from jupiter_engine.backends.mlx.model import DTYPES, Llama, load_model, save_model
from jupiter_engine.checkpoints.model_folder import ModelInfo
from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.protocol.specs import Recipe
from jupiter_engine.training.loop import Batch

_LOSS_CHUNK = 256
"""Targets whose logits exist at once: at 49k tokens 50 MB in float32, however large the micro-batch."""

Weights = dict[str, mx.array]


def join_group() -> Alone:
    """Join the group that the launcher started this process for."""
    # MLX refuses a ring of one, which is what remains of a group whose other machines were left out.
    return Alone() if os.environ.get("JUPITER_RANKS") == "1" else RingGroup()


def open_trainer(
    info: ModelInfo,
    recipe: Recipe,
    weights: Mapping[str, npt.NDArray[Any]] | None,
    *,
    group: Alone | None = None,
    threads: int = 0,
) -> MlxTrainer:
    """This twin's trainer; see MlxTrainer."""
    return MlxTrainer(info, recipe, weights, group=group, threads=threads)


def versions() -> dict[str, str]:
    return {"mlx": version("mlx")}


def load_weights(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """A verified model folder's weights as float32 arrays."""
    return {name: np.array(value) for name, value in tree_flatten(load_model(folder, "float32").parameters())}


@mx.checkpoint
def _chunk_loss(weight: mx.array, hidden: mx.array, targets: mx.array) -> mx.array:
    """Sum of the cross-entropy in nats; recomputed in the backward pass, so its logits live only there."""
    logits = (hidden @ weight.T).astype(mx.float32)
    return nn.losses.cross_entropy(logits, mx.stop_gradient(targets), reduction="sum")


class MlxTrainer:
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
        threads: int = 0,  # noqa: ARG002 - MLX takes its number of BLAS threads from the environment, before it is loaded
    ) -> None:
        """`weights` (float32 by name) are needed on rank 0 only: the others receive them."""
        mx.random.seed(recipe.seed)
        self._group = group or Alone()
        self._recipe = recipe
        self._dtype = DTYPES[recipe.compute_dtype]
        self._model = Llama(info)
        shapes = {name: value.shape for name, value in tree_flatten(self._model.parameters())}
        self._names = list(shapes)
        given = [mx.zeros(shapes[n]) if weights is None else mx.array(weights[n], mx.float32) for n in self._names]
        self._master: Weights = dict(zip(self._names, self._group.broadcast(given), strict=True))
        self._gradients: Weights = {}
        self._zero()
        self._refresh()
        self._decaying = [n for n in self._names if len(shapes[n]) >= 2]
        self._plain = [n for n in self._names if len(shapes[n]) < 2]
        self._optimizers = (
            (self._decaying, _adamw(recipe, recipe.optimizer.weight_decay)),
            (self._plain, _adamw(recipe, 0.0)),
        )
        self._updates = 0
        self._set_moments(None)
        self._value_and_grad = nn.value_and_grad(self._model, self._loss)

    @property
    def rank(self) -> int:
        return self._group.rank

    @property
    def ranks(self) -> int:
        return self._group.ranks

    def _zero(self) -> None:
        self._gradients = {name: mx.zeros(value.shape, mx.float32) for name, value in self._master.items()}

    def _refresh(self) -> None:
        self._model.update(tree_unflatten([(n, value.astype(self._dtype)) for n, value in self._master.items()]))
        mx.eval(self._model.parameters())

    def _loss(
        self, tokens: mx.array, segments: mx.array, counted: mx.array, targets: mx.array, scale: float
    ) -> tuple[mx.array, mx.array]:
        """(scale * S, S): S = sum of cross-entropy over the positions `counted` [K] with `targets` [K]."""
        hidden = self._model.hidden(tokens, segments)
        rows = hidden.reshape(-1, hidden.shape[-1])[counted]
        weight = self._model.model.embed_tokens.weight if self._model.info.tied else self._model.lm_head.weight
        total = mx.array(0.0)
        for start in range(0, len(targets), _LOSS_CHUNK):
            chunk = slice(start, start + _LOSS_CHUNK)
            total = total + _chunk_loss(weight, rows[chunk], targets[chunk])
        return total * scale, total

    def accumulate(self, batch: Batch, scale: float) -> float:
        counted = np.flatnonzero(batch.counted)
        if len(counted) == 0:
            return 0.0
        (_, total), gradients = self._value_and_grad(
            mx.array(batch.tokens),
            mx.array(batch.segments),
            mx.array(counted),
            mx.array(batch.targets.reshape(-1)[counted]),
            scale,
        )
        for name, gradient in tree_flatten(gradients):
            self._gradients[name] = self._gradients[name] + gradient.astype(mx.float32)
        mx.eval(total, self._gradients)
        return float(np.array(total))

    def exchange(self, row: Sequence[float]) -> npt.NDArray[np.float64]:
        return self._group.exchange(row)

    def reduce(self) -> float:
        sums = self._group.all_sum([self._gradients[name] for name in self._names])
        self._gradients = dict(zip(self._names, sums, strict=True))
        squares = mx.stack([mx.sum(mx.square(value)) for value in sums])
        return math.sqrt(float(np.array(mx.sum(squares))))

    def apply(self, learning_rate: float, gradient_scale: float) -> None:
        for names, optimizer in self._optimizers:
            optimizer.learning_rate = learning_rate
            gradients = {name: self._gradients[name] * gradient_scale for name in names}
            self._master.update(optimizer.apply_gradients(gradients, {name: self._master[name] for name in names}))
            mx.eval(self._master, optimizer.state)
        self._updates += 1
        self._zero()
        self._refresh()

    def _set_moments(self, state: TrainerState | None) -> None:
        for names, optimizer in self._optimizers:
            optimizer.init({name: self._master[name] for name in names})
            if state is None:
                continue
            optimizer.state["step"] = mx.array(state.updates, mx.uint64)
            for name in names if state.updates else ():
                optimizer.state[name] = {key: mx.array(state.moments[f"{key}.{name}"]) for key in ("m", "v")}
            mx.eval(optimizer.state)

    def export_state(self) -> TrainerState:
        moments = {
            f"{key}.{name}": np.array(optimizer.state[name][key], copy=False)
            for names, optimizer in self._optimizers
            for name in names
            for key in ("m", "v")
        }
        return TrainerState(
            weights={name: np.array(value, copy=False) for name, value in self._master.items()},
            moments=moments,
            updates=self._updates,
            rng={f"mlx.{index}": np.array(key) for index, key in enumerate(_generators())},
        )

    def import_state(self, state: TrainerState) -> None:
        """Take over a state of either twin."""
        self._master = {name: mx.array(state.weights[name]) for name in self._names}
        self._updates = state.updates
        self._set_moments(state)
        generators = _generators()
        for index in range(len(generators)):
            if f"mlx.{index}" in state.rng:
                generators[index][:] = mx.array(state.rng[f"mlx.{index}"])
        self._refresh()

    def share_state(self, updates: int) -> None:
        self._master = dict(zip(self._names, self._group.broadcast(list(self._master.values())), strict=True))
        self._updates = updates
        for names, optimizer in self._optimizers:
            optimizer.state["step"] = mx.array(updates, mx.uint64)
            moments = [optimizer.state[name][key] for name in names for key in ("m", "v")]
            shared = iter(self._group.broadcast(moments))
            for name in names:
                optimizer.state[name] = {"m": next(shared), "v": next(shared)}
        self._refresh()

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in self._names:
            digest.update(np.array(self._master[name], copy=False).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write model.safetensors into `folder`, in the recipe's compute precision."""
        save_model(_Weights(self._master), folder, self._recipe.compute_dtype)

    def close(self) -> None:
        self._group.close()


def _generators() -> list[mx.array]:
    """The keys of MLX's global random state; writing into one of them sets it."""
    state: Any = mx.random.state
    return list(state)


class _Weights:
    """Master weights in the shape that save_model takes."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def parameters(self) -> Weights:
        return self._weights


def _adamw(recipe: Recipe, weight_decay: float) -> optim.AdamW:
    """AdamW as torch defines it (MLX leaves the bias correction out unless asked)."""
    spec = recipe.optimizer
    return optim.AdamW(
        learning_rate=spec.learning_rate,
        betas=[spec.beta1, spec.beta2],
        eps=spec.eps,
        weight_decay=weight_decay,
        bias_correction=True,
    )
