"""The MLX twin's trainer: float32 master weights, products in the recipe's precision, any of the optimizers.

On a CPU MLX multiplies bfloat16 matrices without a BLAS, some ten times slower
than float32 ones. A recipe's `compute_dtype` is kept all the same: which weights
a run publishes must not depend on the machine it ran on. For training on a
Linux CPU the torch twin is the fast one.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from jupiter_engine.backends import lora
from jupiter_engine.backends.mlx import adapters, device, optimizers
from jupiter_engine.backends.mlx.collectives import Alone, RingGroup
from jupiter_engine.backends.mlx.forward import Forward, Inputs, Weights
from jupiter_engine.backends.mlx.model import DTYPES, Llama, load_model, save_weights
from jupiter_engine.backends.mlx.sharding import Gatherer, assign, check_fsdp, rounds
from jupiter_engine.checkpoints.model_folder import ModelInfo
from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.errors import StateError, UsageError
from jupiter_engine.protocol.shapes import tensor_shapes
from jupiter_engine.protocol.specs import Recipe
from jupiter_engine.training.loop import Batch

_LOSS_CHUNK = 256
"""Targets whose logits exist at once: at 49k tokens 50 MB in float32, however large the micro-batch."""
_LOSS_STEP = 32
"""A chunk's length is a multiple of this, so that few different kernels' shapes occur."""
_DENSE = 0.9
"""From this share of counted targets on all are computed, the others times zero: picking rows out costs more."""

Sharding = Literal["none", "zero1", "fsdp"]
Compile = Literal["auto", "on", "off"]
Array = npt.NDArray[Any]


def join_group() -> Alone:
    """Join the group that the launcher started this process for."""
    # MLX refuses a ring of one, which is what remains of a group whose other machines were left out.
    return Alone() if os.environ.get("JUPITER_RANKS") == "1" else RingGroup()


def open_trainer(
    info: ModelInfo,
    recipe: Recipe,
    weights: Mapping[str, Array] | None,
    *,
    group: Alone | None = None,
    threads: int = 0,
    sharding: Sharding = "none",
    compile: Compile = "auto",  # noqa: A002 - the name that both twins and the setting have
) -> MlxTrainer:
    """This twin's trainer; see MlxTrainer."""
    return MlxTrainer(info, recipe, weights, group=group, threads=threads, sharding=sharding, compile=compile)


def versions() -> dict[str, str]:
    return {"mlx": version("mlx")}


def load_weights(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """A verified model folder's weights as float32 arrays."""
    return {name: np.array(value) for name, value in tree_flatten(load_model(folder, "float32").parameters())}


class MlxTrainer:
    """Implements training.loop.Trainer.

    `_master` holds the float32 weights that this rank updates: all (`none`),
    whole tensors dealt out (`zero1`), or its rows of every tensor (`fsdp`).
    `_computed` are the trained weights as the forward pass takes them: the
    masters themselves in float32, for adapters and for fsdp, else copies rounded
    to the recipe's precision and renewed after each update. `_frozen` is the
    rest of the model, in the recipe's precision: nothing without LoRA.
    Gradients are added up in float32.
    """

    def __init__(
        self,
        info: ModelInfo,
        recipe: Recipe,
        weights: Mapping[str, Array] | None,
        *,
        group: Alone | None = None,
        threads: int = 0,  # noqa: ARG002 - MLX takes its number of BLAS threads from the environment, before it is loaded
        sharding: Sharding = "none",
        compile: Compile = "auto",  # noqa: A002
    ) -> None:
        """`weights` (the whole start model, float32 by name) are needed on rank 0 only: the others receive them.

        `sharding` of a group of one is none. `compile`: mx.compile fuses elementwise steps; `auto` does so on Metal,
        where kernels are ready in milliseconds, and not on a CPU, where each is a run of the C++ compiler.
        """
        device.prepare()
        mx.random.seed(recipe.seed)
        self._group = group or Alone()
        self._recipe, self._info = recipe, info
        self._sharding: Sharding = "none" if self._group.ranks == 1 else sharding
        self.lockstep = self._sharding == "fsdp"
        self.joint_update = self._sharding != "none" and self._group.ranks > 1
        self._dtype = DTYPES[recipe.compute_dtype]
        self._lora = recipe.lora if recipe.update == "lora" else None
        self._shapes = tensor_shapes(info) if self._lora is None else lora.adapter_shapes(info, self._lora)
        self._held_dtype = mx.float32 if self._lora is not None else self._dtype
        sizes = {name: math.prod(shape) * self._held_dtype.size for name, shape in self._shapes.items()}
        self._dealt = assign(sizes, self._group.ranks)
        """The tensors' names by rank: what each owns with zero1, and the order of gradients' messages always."""
        divided = self._sharding == "zero1"
        self._mine = set(self._dealt[self._group.rank]) if divided else set(self._shapes)
        """Names of the tensors whose masters (or parts of them) this rank holds and updates."""
        self._rounds = rounds(self._dealt, sizes)
        self._forward = self._build_forward(compiled=compile == "on" or (compile == "auto" and device.on_metal()))
        self._master: Weights = {}
        self._computed: Weights = {}
        self._frozen: Weights = {}
        self._gradients: Weights = {}
        self._brought: TrainerState | None = None
        self._take_start(weights)
        self._frozen_print = _digest(self._frozen) if self._frozen else b""
        held = {name: value.shape for name, value in self._master.items()}
        self._optimizer = optimizers.build(recipe.optimizer, held)

    def _build_forward(self, *, compiled: bool) -> Forward:
        model = Llama(self._info)
        if self._lora is not None:
            adapters.adapt(model, self._lora)
        gatherer = None
        if self._sharding == "fsdp":
            self._check_fsdp()
            gatherer = Gatherer(self._ring().mlx, self._dtype)
        # Collectives inside a compiled graph have no place of their own among the others: fsdp is never compiled.
        return Forward(
            model,
            recompute=self._recipe.recompute_activations,
            gatherer=gatherer,
            compiled=compiled and gatherer is None,
        )

    def _ring(self) -> RingGroup:
        assert isinstance(self._group, RingGroup)
        return self._group

    def _check_fsdp(self) -> None:
        if self._lora is not None or self._recipe.optimizer.name != "adamw":
            raise UsageError(
                "in the MLX twin sharding fsdp goes with update full and the optimizer adamw only: "
                "a row of their state belongs to a row of the weights",
                fix="use sharding zero1",
            )
        check_fsdp(self._ring().mlx, self._shapes)

    @property
    def rank(self) -> int:
        return self._group.rank

    @property
    def ranks(self) -> int:
        return self._group.ranks

    # -- weights ----------------------------------------------------------------------------------

    def _take_start(self, weights: Mapping[str, Array] | None) -> None:
        given = None
        if self._group.rank == 0:
            given = {name: np.asarray((weights or {})[name], np.float32) for name in tensor_shapes(self._info)}
        for name, value in self._group.broadcast(given):
            if self._lora is not None:
                self._frozen[name] = mx.array(value).astype(self._dtype)
                mx.eval(self._frozen[name])
            else:
                self._take(name, value)
        if self._lora is not None:
            self._master = {
                name: value
                for name, value in adapters.initial(self._info, self._lora, self._recipe.seed).items()
                if name in self._mine
            }
        self._refresh()

    def _take(self, name: str, whole: Array) -> None:
        """Make `whole` (float32) the master weight, as much of it as this rank holds."""
        if name in self._mine:
            self._master[name] = mx.array(self._part(whole))

    def _part(self, whole: Array) -> Array:
        """This rank's part of a whole tensor, or of a moment of it."""
        if self._sharding != "fsdp":
            return whole
        rows = whole.shape[0] // self._group.ranks
        return whole[self._group.rank * rows : (self._group.rank + 1) * rows]

    def _refresh(self) -> None:
        """Renew what the forward pass works with after the masters changed; with zero1 the ranks share their parts."""
        if self._sharding == "fsdp":
            mx.eval(self._master)
            self._computed = self._master
            return
        own = {name: value.astype(self._held_dtype) for name, value in self._master.items()}
        mx.eval(own)
        if self._sharding == "none":
            self._computed = own
            return
        self._computed = {}
        for name, value in self._group.share(self._rounds, self._shapes, own):
            self._computed[name] = own.get(name, value)

    def _whole_weights(self) -> dict[str, Array] | None:
        """The trained weights, float32, on rank 0."""
        return self._whole({name: np.array(value, copy=False) for name, value in self._master.items()})

    def _whole(self, own: dict[str, Array]) -> dict[str, Array] | None:
        """Collective: what each rank holds of float32 weights or moments, whole on rank 0 and None elsewhere."""
        if self._sharding == "none":
            return own if self._group.rank == 0 else None
        if self._sharding == "zero1":
            return self._group.gather(own)
        whole: dict[str, Array] = {}
        for name, part in own.items():
            value = self._ring().concatenate(mx.array(part))
            if self._group.rank == 0:
                whole[name] = np.array(value, copy=False)
        return whole if self._group.rank == 0 else None

    # -- a step -----------------------------------------------------------------------------------

    def _inputs(self, batch: Batch) -> tuple[Inputs, int]:
        """The batch for Forward, and the number of chunks that its loss is computed in."""
        length = batch.tokens.shape[1]
        inputs = {"tokens": mx.array(batch.tokens.astype(np.int32))}
        several = bool((batch.segments[:, 1:] != batch.segments[:, :-1]).any())
        if several or self.lockstep:
            inputs["segments"] = mx.array(batch.segments.astype(np.int32))
        counts = batch.counted.reshape(-1).astype(np.float32)
        targets = batch.targets.reshape(-1).astype(np.int32)
        # With fsdp every rank's graph must have the same collectives in the same order, whatever its rows.
        wanted = self._recipe.micro_batch_sequences * length if self.lockstep else int(counts.sum())
        dense = self.lockstep or wanted >= _DENSE * counts.size
        chunks = max(1, -(-(wanted if self.lockstep or not dense else counts.size) // _LOSS_CHUNK))
        if dense and counts.size % chunks == 0:
            return {**inputs, "targets": mx.array(targets), "counts": mx.array(counts)}, chunks
        at = np.arange(counts.size) if dense else np.flatnonzero(batch.counted)
        width = -(-at.size // (chunks * _LOSS_STEP)) * _LOSS_STEP
        places = np.zeros(chunks * width, dtype=np.int32)
        places[: at.size] = at
        weight = np.zeros(places.size, dtype=np.float32)
        weight[: at.size] = counts[at]
        return {
            **inputs,
            "at": mx.array(places),
            "targets": mx.array(targets[places]),
            "counts": mx.array(weight),
        }, chunks

    def accumulate(self, batch: Batch, scale: float) -> float:
        if not self.lockstep and not batch.counted.any():
            return 0.0
        inputs, chunks = self._inputs(batch)
        inputs["scale"] = mx.array(scale, mx.float32)
        total, gradients = self._forward.gradients(self._computed, self._frozen, inputs, chunks)
        for name in self._shapes:
            gradient = gradients.pop(name).astype(mx.float32)
            before = self._gradients.pop(name, None)
            self._gradients[name] = gradient if before is None else before + gradient
        mx.eval(total, self._gradients)
        return float(np.array(total))

    def held_out(self, batch: Batch) -> float:
        if not self.lockstep and not batch.counted.any():
            return 0.0
        inputs, chunks = self._inputs(batch)
        return float(np.array(self._forward.loss(self._computed, self._frozen, inputs, chunks)))

    def exchange(self, row: Sequence[float]) -> npt.NDArray[np.float64]:
        return self._group.exchange(row)

    def reduce(self) -> float:
        if not self._gradients:
            self._gradients = {name: mx.zeros(value.shape) for name, value in self._computed.items()}
        if self.lockstep:
            # The backward pass has summed them already; here lies this rank's part of each.
            own = _squares(self._gradients)
            return math.sqrt(float(self._group.exchange([own])[:, 0].sum()))
        given, self._gradients = self._gradients, {}
        squares = dict.fromkeys(self._shapes, 0.0)

        def keep(name: str, value: mx.array) -> None:
            squares[name] = _squares({name: value})
            if name in self._mine:
                self._gradients[name] = value

        # Owner by owner, so that a bucket holds nothing but what its owner keeps.
        for names in self._dealt:
            self._group.sum_up({name: given.pop(name) for name in self._shapes if name in set(names)}, keep)
        return math.sqrt(sum(squares.values()))

    def apply(self, learning_rate: float, gradient_scale: float) -> None:
        gradients, self._gradients = self._gradients, {}
        for name, value in self._master.items():
            if name not in gradients:
                gradients[name] = mx.zeros(value.shape)
        # What the forward pass took from the masters goes first, or old and new weights would exist together.
        self._computed = {}
        self._optimizer.begin()
        self._optimizer.update_all(self._master, gradients, learning_rate, gradient_scale)
        del gradients
        self._refresh()

    def discard(self) -> None:
        self._gradients = {}

    # -- state ------------------------------------------------------------------------------------

    def export_state(self) -> TrainerState | None:
        weights = self._whole_weights()
        moments = self._whole(self._optimizer.export(self._master))
        if weights is None or moments is None:
            return None
        return TrainerState(
            weights={name: weights[name] for name in self._shapes},
            moments=moments,
            updates=self._optimizer.updates,
            rng={f"mlx.{index}": np.array(key) for index, key in enumerate(_generators())},
        )

    def import_state(self, state: TrainerState) -> None:
        """Take over a state of either twin. In a group it reaches the ranks with `share_state`."""
        missing = [name for name in self._shapes if name not in state.weights]
        if missing:
            raise StateError(
                f"the checkpoint has no weights for {missing[0]} ({len(missing)} of {len(self._shapes)} are missing)",
                fix="remove the run folder to train anew: it was written for another model or method",
            )
        generators = _generators()
        for index in range(len(generators)):
            if f"mlx.{index}" in state.rng:
                generators[index][:] = mx.array(state.rng[f"mlx.{index}"])
        self._brought = state
        if self._group.ranks == 1:
            self.share_state(state.updates)

    def share_state(self, updates: int) -> None:
        state, self._brought = self._brought, None
        if not self._group.exchange([float(state is not None)])[0, 0]:
            if self._group.ranks == 1:
                return
            state = self.export_state()
        self.adopt(None if state is None else {name: state.weights[name] for name in self._shapes})
        moments = {
            key: self._part(value)
            for key, value in self._group.broadcast(None if state is None else state.moments)
            if key.partition(".")[2] in self._mine
        }
        self._optimizer.load(moments, updates)

    def weights(self) -> dict[str, Array] | None:
        whole = self._whole_weights()
        return None if whole is None else {name: whole[name] for name in self._shapes}

    def adopt(self, weights: Mapping[str, Array] | None) -> None:
        self._computed = {}
        for name, value in self._group.broadcast(None if weights is None else dict(weights)):
            self._take(name, value.astype(np.float32, copy=False))
        self._refresh()

    def fingerprint(self) -> str:
        """SHA-256 over the weights in name order, the frozen ones included; collective with fsdp.

        Over the masters where all ranks hold them (`none`), over what the forward pass takes with zero1. With fsdp no
        two ranks hold the same: the parts' own digests are shared, and the result is the same on all ranks.
        """
        digest = hashlib.sha256(self._frozen_print)
        if self._sharding != "fsdp":
            held = self._master if self._sharding == "none" else self._computed
            digest.update(_digest({name: held[name] for name in self._shapes}))
            return digest.hexdigest()
        parts = _digest(self._master)
        rows = self._group.exchange([float(int.from_bytes(parts[i : i + 4], "little")) for i in range(0, 32, 4)])
        digest.update(rows.astype("<u4").tobytes())
        return digest.hexdigest()

    def save(self, folder: Path | None) -> None:
        """Write the whole model as model.safetensors, in the recipe's compute precision, adapters merged."""
        held = self._computed
        if self._sharding == "none" and self._lora is None:
            held = self._master
        if self._sharding == "fsdp":
            held = {}
            for name, part in self._master.items():
                value = self._ring().concatenate(part.astype(self._dtype))
                if self._group.rank == 0:
                    held[name] = value
        if self._group.rank > 0:
            return
        if folder is None:
            raise ValueError("rank 0 needs the folder")
        whole = held if self._lora is None else adapters.merged(self._frozen, held, self._lora)
        save_weights(((name, whole[name]) for name in tensor_shapes(self._info)), folder, self._recipe.compute_dtype)

    # -- facts ------------------------------------------------------------------------------------

    def state_bytes(self) -> int:
        """Bytes of this rank's optimizer state."""
        return sum(array.nbytes for array in self._optimizer.moments.values())

    def peak_bytes(self) -> int:
        return device.peak_bytes()

    def peak_flops(self) -> float | None:
        return device.peak_flops()

    def close(self) -> None:
        self._group.close()


def _squares(arrays: Weights) -> float:
    """The sum of all squares: float32 along the last axis, float64 over the rest.

    MLX's CPU adds millions of float32 numbers one after the other: with 2^24 of a size the sum stands still.
    """
    rows = [mx.sum(mx.square(value), axis=-1) for value in arrays.values()]
    mx.eval(rows)
    return float(sum(np.array(row).sum(dtype=np.float64) for row in rows))


def _digest(weights: Mapping[str, mx.array]) -> bytes:
    """SHA-256 over the bytes of all arrays in order."""
    digest = hashlib.sha256()
    for value in weights.values():
        flat = value.reshape(-1)
        plain = flat.view(mx.uint16) if flat.dtype == mx.bfloat16 else flat
        digest.update(np.array(plain, copy=False).view(np.uint8).data)
    return digest.digest()


def _generators() -> list[mx.array]:
    """The keys of MLX's global random state; writing into one of them sets it."""
    state: Any = mx.random.state
    return list(state)
