"""Ranks that talk over mx.distributed; one rank alone needs none of it.

Every collective runs on the CPU stream and is evaluated at once, and what it
sends is evaluated before: on the GPU stream a rank that waits some seconds for
another trips Metal's watchdog, and a collective left lazy on one rank pairs with
the wrong one of its neighbour and gives wrong numbers without an error.

Gradients travel as float32. Half the bytes (bfloat16) would cost a rounding of
2^-9 on each hop of each step; few large messages and islands, which meet every
few minutes, save more without changing a result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import numpy.typing as npt

BUCKET_BYTES = 32 << 20
"""Most bytes of one message, except where one tensor alone is larger: few messages, bounded copies."""

Arrays = Mapping[str, npt.NDArray[Any]]
Field = tuple[str, str, tuple[int, ...]]
"""Name, numpy dtype and shape of an array that is to come."""


class Alone:
    """A group of one. `RingGroup` has the same methods; every rank calls them in the same order."""

    rank, ranks = 0, 1

    def sum_up(self, arrays: dict[str, mx.array], each: Callable[[str, mx.array], None]) -> None:
        """Sum arrays of equal names and shapes over the ranks; `each` gets every sum, in the order of names.

        `arrays` is emptied on the way, so that no more than one bucket exists twice.
        """
        for name in list(arrays):
            each(name, arrays.pop(name))

    def broadcast(self, arrays: Arrays | None) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Rank 0's arrays, one after the other, bit by bit the same on every rank; others pass None.

        Must be used up: every array is a message that all ranks take part in.
        """
        yield from (arrays or {}).items()

    def gather(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]] | None:
        """All ranks' arrays (names differ between ranks) on rank 0, None on the others."""
        return dict(arrays)

    def share(
        self,
        rounds: Sequence[Sequence[Sequence[str]]],
        shapes: Mapping[str, tuple[int, ...]],
        own: Mapping[str, mx.array],
    ) -> Iterator[tuple[str, mx.array]]:
        """Every rank's arrays on every rank: round by round, `rounds[i][rank]` names those that `rank` brings.

        All of `own` have one dtype. Must be used up, as `broadcast`.
        """
        del shapes
        yield from ((name, own[name]) for each in rounds for name in each[0])

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
        self.mlx = mx.distributed.init(strict=True, backend="jaccl" if backend.startswith("jaccl") else "ring")
        self.rank, self.ranks = self.mlx.rank(), self.mlx.size()

    def _sum(self, array: mx.array) -> mx.array:
        mx.eval(array)
        total = mx.distributed.all_sum(array, group=self.mlx, stream=mx.cpu)
        mx.eval(total)
        return total

    def sum_up(self, arrays: dict[str, mx.array], each: Callable[[str, mx.array], None]) -> None:
        mx.eval(arrays)
        for names in _buckets({name: array.nbytes for name, array in arrays.items()}):
            bucket = [arrays.pop(name) for name in names]
            shapes = [array.shape for array in bucket]
            flat = mx.concatenate([array.reshape(-1) for array in bucket], stream=mx.cpu)
            mx.eval(flat)
            del bucket
            flat = self._sum(flat)
            for name, part in zip(names, _split(flat, shapes), strict=True):
                each(name, part)

    def broadcast(self, arrays: Arrays | None) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        given = arrays or {}
        for name, dtype, shape in self._announce(0, given):
            yield name, self._spread(given.get(name), dtype, shape)

    def gather(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]] | None:
        found: dict[str, npt.NDArray[Any]] = {}
        for owner in range(self.ranks):
            for name, dtype, shape in self._announce(owner, arrays):
                array = self._spread(arrays[name] if owner == self.rank else None, dtype, shape)
                if self.rank == 0:
                    found[name] = array
        return found if self.rank == 0 else None

    def _announce(self, owner: int, arrays: Arrays) -> list[Field]:
        """What `owner` is about to send, on every rank."""
        fields = [(name, array.dtype.str, array.shape) for name, array in arrays.items()]
        head = np.frombuffer(msgspec.json.encode(fields), dtype=np.uint8)
        size = int(self.exchange([float(head.size)])[owner, 0])
        said = self._spread(head if owner == self.rank else None, "|u1", (size,))
        return msgspec.json.decode(said.tobytes(), type=list[Field])

    def _spread(self, array: npt.NDArray[Any] | None, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """The array of the one rank that passes one, on every rank.

        The ring has no broadcast; adding zeros to the bytes as integers is exact, NaN included.
        """
        mine = array is not None
        result = np.ascontiguousarray(array) if mine else np.empty(shape, dtype=dtype)
        flat = result.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, BUCKET_BYTES):
            window = flat[start : start + BUCKET_BYTES]
            words = np.zeros(-(-window.size // 4), dtype=np.uint32)
            if mine:
                words.view(np.uint8)[: window.size] = window
            total = self._sum(mx.array(words))
            if not mine:
                window[:] = np.array(total, copy=False).view(np.uint8)[: window.size]
        return result.reshape(shape)

    def share(
        self,
        rounds: Sequence[Sequence[Sequence[str]]],
        shapes: Mapping[str, tuple[int, ...]],
        own: Mapping[str, mx.array],
    ) -> Iterator[tuple[str, mx.array]]:
        mx.eval(dict(own))
        dtype = next((array.dtype for array in own.values()), mx.float32)
        for each in rounds:
            # all_gather wants equal lengths: the shorter buckets of a round are filled up with zeros.
            room = max(sum(_elements(shapes[name]) for name in names) for names in each)
            parts = [own[name].reshape(-1) for name in each[self.rank]]
            short = room - sum(part.size for part in parts)
            if short:
                parts.append(mx.zeros(short, dtype=dtype))
            bucket = mx.concatenate(parts, stream=mx.cpu)
            mx.eval(bucket)
            table = mx.distributed.all_gather(bucket, group=self.mlx, stream=mx.cpu).reshape(self.ranks, room)
            mx.eval(table)
            for rank, names in enumerate(each):
                wanted = [shapes[name] for name in names]
                yield from zip(names, _split(table[rank], wanted), strict=True)

    def concatenate(self, array: mx.array) -> mx.array:
        """The ranks' arrays of equal shapes, one below the other along the first axis."""
        mx.eval(array)
        whole = mx.distributed.all_gather(array, group=self.mlx, stream=mx.cpu)
        mx.eval(whole)
        return whole

    def exchange(self, row: Sequence[float]) -> npt.NDArray[np.float64]:
        table = np.zeros((self.ranks, len(row)), dtype=np.float64)
        table[self.rank] = row
        with mx.stream(mx.cpu):  # float64 exists on the CPU only
            total = self._sum(mx.array(table, dtype=mx.float64))
        return np.array(total)

    def close(self) -> None:
        # A last exchange: no rank closes its sockets while another still sends.
        self.exchange([0.0])


def _elements(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _split(flat: mx.array, shapes: Sequence[Sequence[int]]) -> list[mx.array]:
    """Cut a run of elements into arrays of these shapes. They are views: the run lives as long as one of them."""
    parts, offset = [], 0
    for shape in shapes:
        count = _elements(shape)
        parts.append(flat[offset : offset + count].reshape(shape))
        offset += count
    mx.eval(parts)
    return parts


def _buckets(sizes: Mapping[str, int]) -> list[list[str]]:
    """Group names up to BUCKET_BYTES, in order; the same on all ranks."""
    buckets: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not buckets or size > room:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(name)
        room -= size
    return buckets
