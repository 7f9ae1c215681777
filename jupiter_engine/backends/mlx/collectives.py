"""Ranks that talk over mx.distributed; one rank alone needs none of it.

Every collective runs on the CPU stream and is evaluated at once: on the GPU
stream a rank that waits some seconds for another trips Metal's watchdog, and a
collective left lazy on one rank pairs with the wrong one of its neighbour and
gives wrong numbers without an error.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

_BUCKET_BYTES = 32 << 20


class Alone:
    """A group of one."""

    rank, ranks = 0, 1

    def all_sum(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """The sum of each array over the ranks."""
        return list(arrays)

    def broadcast(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Rank 0's values, on every rank."""
        return list(arrays)

    def exchange(self, row: Sequence[float]) -> npt.NDArray[np.float64]:
        """float64 [ranks, len(row)]: what every rank said."""
        return np.asarray([row], dtype=np.float64)

    def close(self) -> None:
        """Leave the group in order."""


class RingGroup(Alone):
    """The group that MLX_RANK and MLX_HOSTFILE (jaccl: MLX_IBV_DEVICES) describe; the launcher sets them."""

    def __init__(self) -> None:
        backend = os.environ.get("JUPITER_BACKEND") or "ring"
        # strict: without it a missing host file gives a silent group of one. jaccl-ring is jaccl with MLX_JACCL_RING.
        self._group = mx.distributed.init(strict=True, backend="jaccl" if backend.startswith("jaccl") else "ring")
        self.rank, self.ranks = self._group.rank(), self._group.size()

    def _sum(self, array: mx.array) -> mx.array:
        total = mx.distributed.all_sum(array, group=self._group, stream=mx.cpu)
        mx.eval(total)
        return total

    def all_sum(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        mx.eval(list(arrays))
        sums: list[mx.array] = []
        for bucket in _buckets(arrays):
            flat = self._sum(mx.concatenate([array.reshape(-1) for array in bucket], stream=mx.cpu))
            offset = 0
            for array in bucket:
                sums.append(flat[offset : offset + array.size].reshape(array.shape))
                offset += array.size
        mx.eval(sums)
        return sums

    def broadcast(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        # The ring has no broadcast; adding zeros is exact.
        return self.all_sum([array if self.rank == 0 else mx.zeros_like(array) for array in arrays])

    def exchange(self, row: Sequence[float]) -> npt.NDArray[np.float64]:
        table = np.zeros((self.ranks, len(row)), dtype=np.float64)
        table[self.rank] = row
        with mx.stream(mx.cpu):  # float64 exists on the CPU only
            total = self._sum(mx.array(table, dtype=mx.float64))
        return np.array(total)

    def close(self) -> None:
        # A last exchange: no rank closes its sockets while another still sends.
        self.exchange([0.0])


def _buckets(arrays: Sequence[mx.array]) -> list[list[mx.array]]:
    """Group arrays up to 32 MiB: few messages, bounded copies, the same order on all ranks."""
    buckets: list[list[mx.array]] = []
    room = 0
    for array in arrays:
        if not buckets or array.nbytes > room:
            buckets.append([])
            room = _BUCKET_BYTES
        buckets[-1].append(array)
        room -= array.nbytes
    return buckets
