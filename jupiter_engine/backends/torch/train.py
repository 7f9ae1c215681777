"""The torch twin's trainer: float32 master weights, products in the recipe's precision, any of the optimizers."""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from jupiter_engine.backends import lora
from jupiter_engine.backends.torch import attention, device
from jupiter_engine.backends.torch.adapters import add_adapters, merged
from jupiter_engine.backends.torch.collectives import Alone, TorchrunGroup, device_of_rank
from jupiter_engine.backends.torch.model import DTYPES, Llama, Sight, load_model, save_model
from jupiter_engine.backends.torch.rotary import rotary_frequencies
from jupiter_engine.backends.torch.sharding import FullyShard, Replicated, Zero1, give_shards, place, shard
from jupiter_engine.checkpoints.model_folder import ModelInfo
from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.protocol.shapes import flops_per_token, tensor_shapes
from jupiter_engine.protocol.specs import Recipe
from jupiter_engine.training.trainer import Batch

_LOSS_CHUNK = 512
"""Targets whose logits exist at once: at 49k tokens 100 MB in float32, however large the micro-batch."""

_CPU_FLOPS = 150e9
"""What a CPU core with bfloat16 instructions does in a second of training, for that estimate."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's malloc.h

Sharding = Literal["none", "zero1", "fsdp"]
Compile = Literal["auto", "on", "off"]


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
    sharding: Sharding = "none",
    compile: Compile = "auto",  # noqa: A002 - the name that both twins and the setting have
) -> TorchTrainer:
    """This twin's trainer; see TorchTrainer."""
    return TorchTrainer(info, recipe, weights, group=group, threads=threads, sharding=sharding, compile=compile)


def versions() -> dict[str, str]:
    return {"torch": str(torch.__version__)}


def load_weights(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """A verified model folder's weights as float32 arrays."""
    model = load_model(folder, "float32")
    return {name: value.numpy() for name, value in model.state_dict().items()}


class TorchTrainer:
    """Implements training.loop.Trainer.

    The model computes in `recipe.compute_dtype`. What is trained (all weights,
    or LoRA's adapters) is held as backends.torch.sharding says; a frozen rest is
    kept in compute precision only, divided over the ranks with `fsdp`.
    """

    def __init__(
        self,
        info: ModelInfo,
        recipe: Recipe,
        weights: Mapping[str, npt.NDArray[Any]] | None,
        *,
        group: Alone | None = None,
        threads: int = 0,
        sharding: Sharding = "none",
        compile: Compile = "auto",  # noqa: A002
    ) -> None:
        """`weights` (the whole start model, float32 by name) are needed on rank 0 only: the others receive them.

        `sharding` of a group of one is none: there is nothing to divide.
        """
        if threads:
            torch.set_num_threads(threads)
        _keep_freed_memory()
        torch.manual_seed(recipe.seed)
        self._group = group or Alone()
        self._info, self._recipe = info, recipe
        self._dtype = DTYPES[recipe.compute_dtype]
        self._device = device_of_rank()
        self._lora = recipe.lora if recipe.update == "lora" else None
        self._pending: TrainerState | None = None
        sharding = sharding if self._group.ranks > 1 else "none"
        with torch.device("meta"):
            self._model = Llama(info)
            adapters = add_adapters(self._model, self._lora) if self._lora is not None else []
        # A plain attribute that the meta device left without values.
        self._model.frequencies = rotary_frequencies(info, info.rope_scaling).to(self._device)
        for layer in self._model.model.layers:
            layer.recompute = recipe.recompute_activations
        if device.compile_wanted(compile, self._device, self._expected_seconds()):
            self._compile()
        shapes = tensor_shapes(info)
        values: Mapping[str, npt.NDArray[Any]] | None = weights if self._group.rank == 0 else None
        self._frozen: list[str] = []
        if self._lora is not None:
            self._frozen = list(shapes)
            self._freeze(shapes, values, adapters, divided=sharding == "fsdp")
            shapes = lora.adapter_shapes(info, self._lora)
            values = lora.initial_adapters(info, self._lora, recipe.seed)
        holder: type[Replicated | FullyShard] = Zero1 if sharding == "zero1" else Replicated
        if sharding == "fsdp" and self._lora is None:
            # (Adapters are small: they stay whole on every rank.)
            holder = FullyShard
        self.lockstep = sharding == "fsdp"
        self.joint_update = sharding != "none" and self._group.ranks > 1
        self._held: Replicated | FullyShard = holder(
            self._model,
            shapes,
            values,
            spec=recipe.optimizer,
            dtype=self._dtype,
            device=self._device,
            group=self._group,
        )
        self._frozen_hash = self._hash_frozen()

    @property
    def rank(self) -> int:
        return self._group.rank

    @property
    def ranks(self) -> int:
        return self._group.ranks

    def _expected_seconds(self) -> float:
        """A rough length of the run on this machine's CPU."""
        tokens = self._recipe.steps * self._recipe.batch_sequences * self._recipe.sequence_tokens / self._group.ranks
        flops = 3 * flops_per_token(self._info, self._recipe.sequence_tokens) * tokens
        return flops / (_CPU_FLOPS * torch.get_num_threads())

    def _compile(self) -> None:
        """Compile the two halves of a layer beside attention; all layers share the code."""
        for layer in self._model.model.layers:
            layer.before = torch.compile(layer.before)
            layer.after = torch.compile(layer.after)

    def _freeze(
        self,
        shapes: Mapping[str, Sequence[int]],
        values: Mapping[str, npt.NDArray[Any]] | None,
        adapters: Sequence[str],
        *,
        divided: bool,
    ) -> None:
        """The start model in compute precision, without gradients; whole, or this rank's shards of it."""
        if divided:
            self._model.to(self._dtype)
            left_out = [self._model.get_parameter(name) for name in adapters]
            shard(self._model, self._group, self._device, torch.float32, left_out=left_out)
        for name, size in shapes.items():
            whole = torch.empty(tuple(size), dtype=self._dtype, device=self._device)
            if values is not None:
                whole.copy_(torch.from_numpy(np.array(values[name], dtype=np.float32)))
            self._group.broadcast([whole])
            if divided:
                give_shards(self._model.get_parameter(name), whole, self._group)
            else:
                place(self._model, name, whole, trained=False)

    def _hash_frozen(self) -> bytes:
        """Of this rank's part of the frozen weights, which never change."""
        digest = hashlib.sha256()
        for name in self._frozen:
            value = self._model.get_parameter(name).detach()
            local = value.to_local() if isinstance(value, DTensor) else value
            digest.update(local.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.digest()

    # -- a step ------------------------------------------------------------------------------------

    def accumulate(self, batch: Batch, scale: float) -> float:
        if not self.lockstep and not batch.counted.any():
            return 0.0
        loss = self._model.summed_loss(*self._inputs(batch))
        loss.backward(torch.tensor(scale, device=loss.device))
        self._held.collect()
        return float(loss.detach())

    def held_out(self, batch: Batch) -> float:
        if not self.lockstep and not batch.counted.any():
            return 0.0
        # FSDP gathers into memory that later steps use again: tensors of inference mode could not be trained on.
        with torch.no_grad() if self.lockstep else torch.inference_mode():
            return float(self._model.summed_loss(*self._inputs(batch)))

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Sight, Tensor | None, Tensor, int]:
        """Arguments of Llama.summed_loss; what can be decided in numpy is, so that a GPU need not be waited for."""
        starts = attention.document_starts(batch.segments)
        positions = torch.from_numpy(np.arange(batch.tokens.shape[1]) - starts).to(self._device)
        counted = batch.counted.reshape(-1)
        targets = torch.from_numpy(batch.targets.reshape(-1)[counted]).to(self._device)
        chosen = None if counted.all() else torch.from_numpy(counted).to(self._device)
        tokens = torch.from_numpy(np.ascontiguousarray(batch.tokens)).to(self._device)
        return tokens, positions, self._sight(starts), chosen, targets, _LOSS_CHUNK

    def _sight(self, starts: npt.NDArray[np.int64]) -> Sight:
        if self._device.type == "cpu":
            return attention.cut(starts, self._dtype)
        if not starts.any():
            return None
        here = torch.from_numpy(starts).to(self._device)
        steps = torch.arange(starts.shape[1], device=self._device)
        mask = (here.unsqueeze(2) == here.unsqueeze(1)) & (steps.unsqueeze(1) >= steps.unsqueeze(0))
        return mask.unsqueeze(1)

    def exchange(self, row: Sequence[float]) -> npt.NDArray[np.float64]:
        return self._group.exchange(row)

    def reduce(self) -> float:
        return self._held.reduce()

    def apply(self, learning_rate: float, gradient_scale: float) -> None:
        self._held.apply(learning_rate, gradient_scale)

    def discard(self) -> None:
        self._held.discard()

    # -- state -------------------------------------------------------------------------------------

    def export_state(self) -> TrainerState | None:
        weights = self._held.weights()
        moments, updates = self._held.moments()
        if weights is None or moments is None:
            return None
        return TrainerState(
            weights=weights,
            moments=moments,
            updates=updates,
            rng={"torch.cpu": torch.get_rng_state().numpy()},
        )

    def import_state(self, state: TrainerState) -> None:
        """Take over a state of either twin; in a group `share_state` does, with the others."""
        if "torch.cpu" in state.rng:
            torch.set_rng_state(torch.tensor(state.rng["torch.cpu"]))
        if self._group.ranks > 1:
            self._pending = state
            return
        self._held.adopt(state.weights)
        self._held.load_moments(state.moments, state.updates)

    def share_state(self, updates: int) -> None:
        if self._group.ranks == 1:
            return
        state, self._pending = self._pending, None
        self._held.adopt(state.weights if state is not None else None)
        self._held.load_moments(state.moments if state is not None else None, updates)

    def weights(self) -> dict[str, npt.NDArray[Any]] | None:
        return self._held.weights()

    def adopt(self, weights: Mapping[str, npt.NDArray[Any]] | None) -> None:
        self._held.adopt(weights if self._group.rank == 0 else None)

    def fingerprint(self) -> str:
        if self._lora is None:
            return self._held.fingerprint()
        frozen = self._frozen_hash
        if self.lockstep:
            # Each rank holds other shards.
            frozen = self._group.exchange([float(int.from_bytes(frozen[:6], "big"))]).tobytes()
        return hashlib.sha256(frozen + self._held.fingerprint().encode()).hexdigest()

    def save(self, folder: Path | None) -> None:
        """Write model.safetensors into `folder` (rank 0's), in the recipe's compute precision, adapters merged."""
        tensors = dict(self._wholes())
        if folder is not None:
            save_model(_Weights(tensors), folder, self._recipe.compute_dtype)

    def _wholes(self) -> Iterator[tuple[str, Tensor]]:
        """The model to publish, in compute precision; only rank 0's is complete."""
        trained = {name: torch.from_numpy(value) for name, value in (self._held.weights() or {}).items()}
        for name in tensor_shapes(self._info):
            if self._lora is None:
                if name in trained:
                    yield name, trained[name].to(self._dtype)
                continue
            value = self._model.get_parameter(name).detach()
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if trained:
                yield name, merged(name, whole.cpu(), trained, self._lora).to(self._dtype)

    def peak_bytes(self) -> int:
        return device.peak_bytes(self._device)

    def peak_flops(self) -> float | None:
        return device.peak_flops(self._device, self._dtype)

    def state_bytes(self) -> int:
        """Bytes of the optimizer's moments on this rank."""
        return self._held.state_bytes()

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
    """Tensors in the shape that save_model takes."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights

    def state_dict(self) -> dict[str, Tensor]:
        return self._weights
