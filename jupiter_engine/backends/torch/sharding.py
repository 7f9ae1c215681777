"""Who holds which part of the trained weights, their gradients and the optimizer's state.

Three ways, one interface (`Held`):

- `Replicated`: every rank holds everything; gradients are summed over the ranks.
- `Zero1`: the optimizer's state and, with bfloat16 products, the float32 master
  weights are divided by whole tensors; a gradient is summed on its owner, who
  updates the weight and hands it to the others in compute precision.
- `FullyShard`: torch's FSDP2; every tensor is divided along its first axis, the
  ranks gather a layer when they need it.

The numbers are the same in all three, up to the order of sums: a state that one
exports is a state that any other imports, whole arrays by name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from jupiter_engine.backends.torch.collectives import Alone, buckets
from jupiter_engine.backends.torch.model import Llama
from jupiter_engine.backends.torch.optimizers import Optimizer, build
from jupiter_engine.checkpoints.tensors import Array
from jupiter_engine.errors import StateError
from jupiter_engine.protocol.specs import OptimizerSpec

Values = Mapping[str, npt.NDArray[Any]]


class Held(Protocol):
    """The trained part of a model on one rank. All methods are collective unless they say otherwise."""

    def collect(self) -> None:
        """After a backward pass: nothing of it is left in compute precision. Not collective."""
        ...

    def reduce(self) -> float:
        """Sum the gradients over the ranks; their global L2 norm, the same on every rank."""
        ...

    def apply(self, learning_rate: float, gradient_scale: float) -> None:
        """Update with the gradient times `gradient_scale`; then the gradient is zero."""
        ...

    def discard(self) -> None:
        """The gradient is zero. Not collective."""
        ...

    def weights(self) -> dict[str, Array] | None:
        """Whole float32 arrays on rank 0."""
        ...

    def adopt(self, values: Values | None) -> None:
        """Take over rank 0's whole weights; moments stay."""
        ...

    def moments(self) -> tuple[dict[str, Array] | None, int]:
        """Whole moments on rank 0, and the number of updates they have seen (everywhere)."""
        ...

    def load_moments(self, moments: Mapping[str, Array] | None, updates: int) -> None:
        """Take over rank 0's whole moments; weights stay."""
        ...

    def fingerprint(self) -> str: ...

    def state_bytes(self) -> int:
        """Bytes of moments on this rank. Not collective."""
        ...


def owners(shapes: Mapping[str, Sequence[int]], ranks: int) -> dict[str, int]:
    """Whole tensors dealt out to ranks so that each gets about equally many numbers: largest first, to the emptiest."""
    load = [0] * ranks
    dealt: dict[str, int] = {}
    for name in sorted(shapes, key=lambda name: (-math.prod(shapes[name]), name)):
        rank = load.index(min(load))
        dealt[name] = rank
        load[rank] += math.prod(shapes[name])
    return {name: dealt[name] for name in shapes}


def place(model: nn.Module, name: str, value: Tensor, *, trained: bool) -> nn.Parameter:
    """Make `value` itself the module's parameter `name`."""
    path, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(value, requires_grad=trained)
    setattr(model.get_submodule(path), leaf, parameter)
    return parameter


class Replicated:
    """Every rank holds the float32 master weights, their gradients and the optimizer's whole state.

    With bfloat16 products the model's parameters are rounded copies, and each
    gradient is added to a float32 one (and freed) as soon as it is complete.
    """

    lockstep = False

    def __init__(
        self,
        model: Llama,
        shapes: Mapping[str, Sequence[int]],
        values: Values | None,
        *,
        spec: OptimizerSpec,
        dtype: torch.dtype,
        device: torch.device,
        group: Alone,
    ) -> None:
        self._names, self._group, self._dtype, self._device = list(shapes), group, dtype, device
        self._shapes = {name: tuple(size) for name, size in shapes.items()}
        self._rounded = dtype != torch.float32
        self._mine = self._owned()
        self._master: dict[str, Tensor] = {}
        self._compute: dict[str, nn.Parameter] = {}
        for name in self._names:
            whole = _whole(name, self._shapes[name], values, device)
            group.broadcast([whole])
            if name in self._mine:
                self._master[name] = whole
            compute = whole.to(dtype) if self._rounded else whole
            self._compute[name] = place(model, name, compute, trained=True)
        self._gradients: dict[str, Tensor] = {}
        self._filled: set[str] = set()
        self._flat: dict[int, list[Tensor]] = {}
        """Memory of the float32 gradients by the rank that they are summed on, whole buckets: sent as they lie."""
        if self._rounded:
            self._flat = {rank: self._room(names) for rank, names in self._dealt().items()}
            for name, parameter in self._compute.items():
                parameter.register_post_accumulate_grad_hook(self._adder(name))
        mine = {name: self._shapes[name] for name in self._names if name in self._mine}
        self._optimizer: Optimizer = build(spec, mine, device=device)

    def _owned(self) -> set[str]:
        """Names of the weights that this rank updates."""
        return set(self._names)

    def _dealt(self) -> dict[int, list[str]]:
        """Names by the rank that their gradients are summed on; one entry where that is every rank."""
        return {0: self._names}

    def _room(self, names: Sequence[str]) -> list[Tensor]:
        """Make `names`' gradients views of few large tensors, which are returned."""
        flats: list[Tensor] = []
        for bucket in buckets([4 * math.prod(self._shapes[name]) for name in names]):
            sizes = [math.prod(self._shapes[names[place]]) for place in bucket]
            flats.append(torch.empty(sum(sizes), dtype=torch.float32, device=self._device))
            for place, view in zip(bucket, flats[-1].split(sizes), strict=True):
                self._gradients[names[place]] = view.view(self._shapes[names[place]])
        return flats

    def _adder(self, name: str) -> Any:
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if name in self._filled:
                self._gradients[name].add_(parameter.grad)
            else:
                self._gradients[name].copy_(parameter.grad)
                self._filled.add(name)
            parameter.grad = None

        return add

    def collect(self) -> None:
        if not self._rounded:
            for name, parameter in self._compute.items():
                if parameter.grad is not None:
                    self._gradients[name] = parameter.grad
                    self._filled.add(name)

    def _complete(self) -> dict[str, Tensor]:
        """The gradients of all names in order; zero where no backward pass reached."""
        for name in self._names:
            if name not in self._filled:
                if name in self._gradients:
                    self._gradients[name].zero_()
                else:
                    self._gradients[name] = torch.zeros(self._shapes[name], device=self._device)
        return {name: self._gradients[name] for name in self._names}

    def reduce(self) -> float:
        gradients = list(self._complete().values())
        self._filled.update(self._names)
        self._group.all_sum(self._flat.get(0, gradients))
        return float(_norm(gradients))

    def apply(self, learning_rate: float, gradient_scale: float) -> None:
        gradients = self._complete()
        self._optimizer.begin()
        mine = {name: gradients[name] for name in self._master}
        self._optimizer.update_all(self._master, mine, learning_rate, gradient_scale)
        self.discard()
        self._refresh()

    def discard(self) -> None:
        self._filled.clear()
        if not self._rounded:
            self._gradients.clear()
            for parameter in self._compute.values():
                parameter.grad = None

    def _refresh(self) -> None:
        """The model computes with what the masters now hold."""
        if self._rounded:
            with torch.no_grad():
                torch._foreach_copy_([self._compute[name] for name in self._master], list(self._master.values()))

    def weights(self) -> dict[str, Array] | None:
        if self._group.rank != 0:
            return None
        return {name: self._master[name].detach().cpu().numpy() for name in self._names}

    def adopt(self, values: Values | None) -> None:
        for name in self._names:
            whole = _whole(name, self._shapes[name], values, self._device)
            self._group.broadcast([whole])
            with torch.no_grad():
                if name in self._master:
                    self._master[name].copy_(whole)
                if self._rounded or name not in self._master:
                    self._compute[name].copy_(whole)

    def moments(self) -> tuple[dict[str, Array] | None, int]:
        moments = self._optimizer.export(self._master) if self._group.rank == 0 else None
        return moments, self._optimizer.updates

    def load_moments(self, moments: Mapping[str, Array] | None, updates: int) -> None:
        if not updates:
            self._optimizer.load({}, 0)
            return
        kept = {key: value for key, value in self._group.from_first(moments) if key.partition(".")[2] in self._mine}
        self._optimizer.load(kept, updates)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in self._names:
            digest.update(_memory(self._master[name]))
        return digest.hexdigest()

    def state_bytes(self) -> int:
        return _bytes_of(self._optimizer)


class Zero1(Replicated):
    """Replicated weights and gradients; moments and (with bfloat16 products) masters live on their owners only."""

    def _owned(self) -> set[str]:
        self._owners = owners(self._shapes, self._group.ranks)
        return {name for name, rank in self._owners.items() if rank == self._group.rank}

    def _of(self, rank: int) -> list[str]:
        return [name for name in self._names if self._owners[name] == rank]

    def _dealt(self) -> dict[int, list[str]]:
        return {rank: self._of(rank) for rank in range(self._group.ranks)}

    def reduce(self) -> float:
        gradients = self._complete()
        self._filled.update(self._names)
        for rank in range(self._group.ranks):
            self._group.sum_to(rank, self._flat.get(rank) or [gradients[name] for name in self._of(rank)])
        mine = float(_norm([gradients[name] for name in self._master]))
        # Added up in the order of ranks everywhere, so all ranks get the same last bit.
        return math.sqrt(float((self._group.exchange([mine])[:, 0] ** 2).sum()))

    def _refresh(self) -> None:
        super()._refresh()
        for rank in range(self._group.ranks):
            self._group.broadcast([self._compute[name] for name in self._of(rank)], rank)

    def weights(self) -> dict[str, Array] | None:
        gathered = self._group.to_first({name: value.detach().cpu().numpy() for name, value in self._master.items()})
        return None if gathered is None else {name: gathered[name] for name in self._names}

    def moments(self) -> tuple[dict[str, Array] | None, int]:
        return self._group.to_first(self._optimizer.export(self._master)), self._optimizer.updates

    def fingerprint(self) -> str:
        """Over what every rank holds (the model as it computes), and over all masters, agreed among the ranks."""
        digest, mine = hashlib.sha256(), hashlib.sha256()
        for name in self._names:
            digest.update(_memory(self._compute[name]))
            if name in self._master:
                mine.update(_memory(self._master[name]))
        digest.update(_agreed(self._group, mine.hexdigest()))
        return digest.hexdigest()


class FullyShard:
    """FSDP2: float32 shards of every trained tensor along its first axis, gathered layer by layer in compute precision.

    AdamW works on the shards. The other rules need whole tensors: each tensor
    has an owner that holds its moments; weight and gradient are gathered, one
    tensor a rank at a time, and the owner hands out the new weight.
    """

    lockstep = True

    def __init__(
        self,
        model: Llama,
        shapes: Mapping[str, Sequence[int]],
        values: Values | None,
        *,
        spec: OptimizerSpec,
        dtype: torch.dtype,
        device: torch.device,
        group: Alone,
    ) -> None:
        self._names, self._group, self._device = list(shapes), group, device
        self._shapes = {name: tuple(size) for name, size in shapes.items()}
        shard(model, group, device, dtype)
        self._parameters = dict(model.named_parameters())
        for name in self._names:
            self._set(name, _whole(name, self._shapes[name], values, device))
        self._local = spec.name == "adamw"
        self._owners = owners(self._shapes, group.ranks)
        if self._local:
            held = {name: tuple(self._shard(name).shape) for name in self._names if self._shard(name).numel()}
        else:
            held = {name: self._shapes[name] for name, rank in self._owners.items() if rank == group.rank}
        self._held = list(held)
        self._optimizer = build(spec, held, device=device)

    def _shard(self, name: str) -> Tensor:
        value = self._parameters[name].detach()
        assert isinstance(value, DTensor)
        return value.to_local()

    def _set(self, name: str, whole: Tensor, source: int = 0) -> None:
        """Every rank keeps its shard of `source`'s tensor."""
        self._group.broadcast([whole], source)
        with torch.no_grad():
            _part(self._shard(name), whole, self._group)

    def collect(self) -> None:
        """FSDP has summed the gradient into float32 shards already."""

    def _gradient(self, name: str) -> Tensor:
        """This rank's shard, float32; zero where no backward pass reached."""
        gradient = self._parameters[name].grad
        if gradient is None:
            return torch.zeros_like(self._shard(name))
        assert isinstance(gradient, DTensor)
        return gradient.to_local()

    def reduce(self) -> float:
        gradients = [self._gradient(name) for name in self._names]
        mine = float(_norm([gradient for gradient in gradients if gradient.numel()]))
        return math.sqrt(float((self._group.exchange([mine])[:, 0] ** 2).sum()))

    def apply(self, learning_rate: float, gradient_scale: float) -> None:
        self._optimizer.begin()
        if self._local:
            self._optimizer.update_all(
                {name: self._shard(name) for name in self._held},
                {name: self._gradient(name) for name in self._held},
                learning_rate,
                gradient_scale,
            )
        else:
            self._apply_whole(learning_rate, gradient_scale)
        self.discard()

    def _apply_whole(self, learning_rate: float, gradient_scale: float) -> None:
        """One tensor of each rank at a time, so that the owners compute side by side."""
        lists = [[name for name in self._names if self._owners[name] == rank] for rank in range(self._group.ranks)]
        for turn in range(max(len(names) for names in lists)):
            names = [(rank, names[turn]) for rank, names in enumerate(lists) if turn < len(names)]
            wholes: dict[str, tuple[Tensor, Tensor]] = {}
            for rank, name in names:
                weight = self._gather(name, self._shard(name))
                gradient = self._gather(name, self._gradient(name))
                if rank == self._group.rank:
                    wholes[name] = (weight, gradient)
            for name, (weight, gradient) in wholes.items():
                self._optimizer.update_all({name: weight}, {name: gradient}, learning_rate, gradient_scale)
            for rank, name in names:
                ours = wholes[name][0] if name in wholes else torch.empty(self._shapes[name], device=self._device)
                self._set(name, ours, rank)

    def _gather(self, name: str, local: Tensor) -> Tensor:
        """A whole tensor from the ranks' shards, which are cut as the parameter `name` is."""
        parameter = self._parameters[name]
        assert isinstance(parameter, DTensor)
        whole = DTensor.from_local(
            local, parameter.device_mesh, [Shard(0)], shape=parameter.shape, stride=parameter.stride()
        ).full_tensor()
        return whole.contiguous()

    def discard(self) -> None:
        for name in self._names:
            self._parameters[name].grad = None

    def weights(self) -> dict[str, Array] | None:
        return self._wholes({name: self._shard(name) for name in self._names})

    def _wholes(self, shards: Mapping[str, Tensor], prefix: str = "") -> dict[str, Array] | None:
        """Whole arrays on rank 0; the other ranks let each go at once."""
        gathered: dict[str, Array] = {}
        for name in self._names:
            local = shards.get(name)
            whole = self._gather(name, torch.zeros_like(self._shard(name)) if local is None else local)
            if self._group.rank == 0:
                gathered[prefix + name] = whole.cpu().numpy()
        return gathered if self._group.rank == 0 else None

    def adopt(self, values: Values | None) -> None:
        for name in self._names:
            self._set(name, _whole(name, self._shapes[name], values, self._device))

    def moments(self) -> tuple[dict[str, Array] | None, int]:
        updates = self._optimizer.updates
        if not self._local:
            return self._group.to_first(self._optimizer.export(self._held)), updates
        gathered: dict[str, Array] = {}
        for kind in ("m.", "v."):
            shards = {name: self._optimizer.moments[kind + name] for name in self._held}
            gathered.update(self._wholes(shards, kind) or {})
        return gathered if self._group.rank == 0 else None, updates

    def load_moments(self, moments: Mapping[str, Array] | None, updates: int) -> None:
        if not updates:
            self._optimizer.load({}, 0)
            return
        held, kept = set(self._held), {}
        for key, value in self._group.from_first(moments):
            name = key.partition(".")[2]
            if name not in held:
                continue
            if self._local:
                part = torch.zeros_like(self._shard(name), device="cpu")
                _part(part, torch.from_numpy(np.array(value)), self._group)
                kept[key] = part.numpy()
            else:
                kept[key] = value
        self._optimizer.load(kept, updates)

    def fingerprint(self) -> str:
        """Of the whole model, agreed among the ranks: each weight exists once, so no two ranks can differ."""
        mine = hashlib.sha256()
        for name in self._names:
            mine.update(_memory(self._shard(name)))
        return hashlib.sha256(_agreed(self._group, mine.hexdigest())).hexdigest()

    def state_bytes(self) -> int:
        return _bytes_of(self._optimizer)


def shard(
    model: Llama, group: Alone, device: torch.device, dtype: torch.dtype, *, left_out: Iterable[nn.Parameter] = ()
) -> None:
    """Divide a model on the meta device with FSDP2, layer by layer and the rest; its shards then have no values yet.

    Products are computed in `dtype`, gradients are summed (not averaged: the
    loss carries the tokens' weights) in float32. Parameters in `left_out` stay whole.
    """
    mesh = init_device_mesh(device.type, (group.ranks,))
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    ignored = set(left_out)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # Not to_empty on the whole model: parameters left out may have values already.
    for name, parameter in list(model.named_parameters()):
        if isinstance(parameter, DTensor):
            empty = torch.empty_like(parameter, device=device, requires_grad=parameter.requires_grad)
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    register_fsdp_forward_method(model, "summed_loss")


def give_shards(parameter: nn.Parameter, whole: Tensor, group: Alone) -> None:
    """Fill this rank's shard of a divided parameter from the whole tensor (equal on every rank)."""
    value = parameter.detach()
    assert isinstance(value, DTensor)
    with torch.no_grad():
        _part(value.to_local(), whole, group)


def _part(local: Tensor, whole: Tensor, group: Alone) -> None:
    """Copy this rank's rows of `whole` to `local`: FSDP cuts the first axis as torch.chunk does."""
    rows = -(-whole.shape[0] // group.ranks)
    start = min(rows * group.rank, whole.shape[0])
    if local.numel():
        local.copy_(whole[start : start + local.shape[0]])


def _whole(name: str, shape: Sequence[int], values: Values | None, device: torch.device) -> Tensor:
    """float32 on the device: rank 0's value, or room for it where `values` is None."""
    if values is None:
        return torch.empty(tuple(shape), dtype=torch.float32, device=device)
    if tuple(values[name].shape) != tuple(shape):
        raise StateError(
            f"{name} has shape {list(values[name].shape)}, the model needs {list(shape)}",
            fix="use weights of the model that the recipe names",
        )
    return torch.tensor(values[name], dtype=torch.float32, device=device)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))


def _memory(value: Tensor) -> bytes | memoryview:
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.data


def _agreed(group: Alone, mine: str) -> bytes:
    """All ranks' hashes in the order of ranks, 48 bits of each (integers that float64 carries exactly)."""
    return np.ascontiguousarray(group.exchange([float(int(mine[:12], 16))])).tobytes()


def _bytes_of(optimizer: Optimizer) -> int:
    return sum(value.numel() * value.element_size() for value in optimizer.moments.values())
