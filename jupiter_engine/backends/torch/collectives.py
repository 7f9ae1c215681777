"""Ranks that talk over torch.distributed; one rank alone needs none of it."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

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

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank rank 0's values, in place."""

    def exchange(self, row: Sequence[float]) -> npt.NDArray[np.float64]:
        """float64 [ranks, len(row)]: what every rank said."""
        return np.asarray([row], dtype=np.float64)

    def close(self) -> None:
        """Leave the group in order."""


class TorchrunGroup(Alone):
    """The group that torchrun's environment describes: NCCL between GPUs where each rank has its own, else gloo."""

    def __init__(self) -> None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        backend = "cpu:gloo,cuda:nccl" if 0 < here <= torch.cuda.device_count() else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()

    def all_sum(self, tensors: Sequence[Tensor]) -> None:
        for bucket in _buckets(tensors):
            if len(bucket) == 1:
                dist.all_reduce(bucket[0])
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            offset = 0
            for tensor in bucket:
                tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
                offset += tensor.numel()

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)

    def exchange(self, row: Sequence[float]) -> npt.NDArray[np.float64]:
        table = torch.zeros(self.ranks, len(row), dtype=torch.float64)
        table[self.rank] = torch.tensor(row, dtype=torch.float64)
        dist.all_reduce(table)
        values: npt.NDArray[np.float64] = table.numpy()
        return values

    def close(self) -> None:
        # Without the barrier a rank may tear its sockets down while another still uses them.
        dist.barrier()
        dist.destroy_process_group()


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group tensors up to 32 MiB: few messages, bounded copies, the same order on all ranks."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if not buckets or size > room:
            buckets.append([])
            room = _BUCKET_BYTES
        buckets[-1].append(tensor)
        room -= size
    return buckets
