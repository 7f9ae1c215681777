"""Ranks that talk over torch.distributed; one rank alone needs none of it."""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from jupiter_engine.checkpoints.tensors import Array

_BUCKET_BYTES = 32 << 20
_TIMEOUT = datetime.timedelta(minutes=10)
"""A collective that waits longer raises; the supervisor's own deadline is usually shorter."""


def device_of_rank() -> torch.device:
    """This process's GPU by torchrun's LOCAL_RANK (ranks share GPUs where there are too few), else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


class Alone:
    """A group of one."""

    rank, ranks = 0, 1

    def all_sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the ranks, in place."""

    def sum_to(self, owner: int, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the ranks, in place on `owner`; what the others' tensors then hold is undefined."""

    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Give every rank `source`'s values, in place."""

    def exchange(self, row: Sequence[float]) -> npt.NDArray[np.float64]:
        """float64 [ranks, len(row)]: what every rank said."""
        return np.asarray([row], dtype=np.float64)

    def from_first(self, arrays: Mapping[str, Array] | None) -> Iterator[tuple[str, Array]]:
        """Every rank gets rank 0's arrays, one after the other; the others pass None."""
        yield from (arrays or {}).items()

    def to_first(self, arrays: Mapping[str, Array]) -> dict[str, Array] | None:
        """Rank 0 gets the arrays of all ranks, whose names differ; the others get None."""
        return dict(arrays)

    def close(self) -> None:
        """Leave the group in order."""


class TorchrunGroup(Alone):
    """The group that torchrun's environment describes: NCCL between GPUs where each rank has its own, else gloo."""

    def __init__(self) -> None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        backend = "cpu:gloo,cuda:nccl" if 0 < here <= torch.cuda.device_count() else "gloo"
        if torch.cuda.is_available():
            # Collectives and FSDP's meshes work on the current device.
            torch.cuda.set_device(device_of_rank())
        dist.init_process_group(backend, timeout=_TIMEOUT)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()

    def all_sum(self, tensors: Sequence[Tensor]) -> None:
        for bucket in _buckets(tensors):
            flat = _joined(bucket)
            dist.all_reduce(flat)
            _spread(flat, bucket)

    def sum_to(self, owner: int, tensors: Sequence[Tensor]) -> None:
        for bucket in _buckets(tensors):
            flat = _joined(bucket)
            dist.reduce(flat, dst=owner)
            if self.rank == owner:
                _spread(flat, bucket)

    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        for bucket in _buckets(tensors):
            flat = _joined(bucket)
            dist.broadcast(flat, src=source)
            if self.rank != source:
                _spread(flat, bucket)

    def exchange(self, row: Sequence[float]) -> npt.NDArray[np.float64]:
        table = torch.zeros(self.ranks, len(row), dtype=torch.float64)
        table[self.rank] = torch.tensor(row, dtype=torch.float64)
        dist.all_reduce(table)
        values: npt.NDArray[np.float64] = table.numpy()
        return values

    def from_first(self, arrays: Mapping[str, Array] | None) -> Iterator[tuple[str, Array]]:
        given = list((arrays or {}).items())
        head = torch.frombuffer(bytearray(_described(given)), dtype=torch.uint8)
        size = torch.tensor([len(head)])
        dist.broadcast(size, src=0)
        if self.rank != 0:
            head = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(head, src=0)
        for number, (name, empty) in enumerate(_arrays(head)):
            value = np.ascontiguousarray(given[number][1]) if self.rank == 0 else empty
            if value.size:
                dist.broadcast(_bytes(value), src=0)
            yield name, value

    def to_first(self, arrays: Mapping[str, Array]) -> dict[str, Array] | None:
        given = list(arrays.items())
        mine = _described(given)
        sizes = self.exchange([len(mine)])[:, 0]
        if self.rank != 0:
            dist.send(torch.frombuffer(bytearray(mine), dtype=torch.uint8), dst=0)
            for _, value in given:
                if value.size:
                    dist.send(_bytes(np.ascontiguousarray(value)), dst=0)
            return None
        gathered = dict(given)
        for rank in range(1, self.ranks):
            head = torch.empty(int(sizes[rank]), dtype=torch.uint8)
            dist.recv(head, src=rank)
            for name, value in _arrays(head):
                if value.size:
                    dist.recv(_bytes(value), src=rank)
                gathered[name] = value
        return gathered

    def close(self) -> None:
        # What cycles still hold (FSDP's modules and their meshes) would keep the group's threads past its end.
        gc.collect()
        # Without the barrier a rank may tear its sockets down while another still uses them; after FSDP that
        # ended the process with SIGABRT in 3 of 9 runs.
        dist.barrier()
        dist.destroy_process_group()


def _described(arrays: Sequence[tuple[str, Array]]) -> bytes:
    """Name, dtype and shape of each array as JSON."""
    return msgspec.json.encode([(name, value.dtype.str, value.shape) for name, value in arrays])


def _arrays(head: Tensor) -> Iterator[tuple[str, Array]]:
    """Room for what `_described` describes, one array after the other."""
    described = msgspec.json.decode(head.numpy().tobytes(), type=list[tuple[str, str, tuple[int, ...]]])
    for name, dtype, shape in described:
        yield name, np.empty(shape, dtype=np.dtype(dtype))


def _bytes(value: Array) -> Tensor:
    """The array's memory as uint8 [bytes]: collectives know few dtypes."""
    flat = value.reshape(-1).view(np.uint8)
    return torch.from_numpy(flat if flat.flags.writeable else flat.copy())


def _joined(bucket: Sequence[Tensor]) -> Tensor:
    """The bucket's values in one flat tensor; a single contiguous tensor is that itself."""
    if len(bucket) == 1 and bucket[0].is_contiguous():
        return bucket[0].detach()
    return torch.cat([tensor.detach().reshape(-1) for tensor in bucket])


def _spread(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    """Undo `_joined`, in place."""
    if len(bucket) == 1 and flat.data_ptr() == bucket[0].data_ptr():
        return
    offset = 0
    with torch.no_grad():
        for tensor in bucket:
            tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
            offset += tensor.numel()


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    return [[tensors[place] for place in bucket] for bucket in buckets(sizes)]


def buckets(sizes: Sequence[int]) -> list[list[int]]:
    """Places of `sizes` (bytes) in groups of up to 32 MiB, in order: few messages, bounded copies, alike on all ranks.

    A larger one has a group of its own.
    """
    groups: list[list[int]] = []
    room = 0
    for place, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = _BUCKET_BYTES
        groups[-1].append(place)
        room -= size
    return groups
