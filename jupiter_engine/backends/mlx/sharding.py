"""Who holds what when a group divides its state.

`zero1` runs on every backend: whole tensors are dealt out, each rank keeps the
float32 masters and the optimizer's state of its own ones, updates them, and all
ranks then get the new weights. Whole tensors, because Muon's rule needs whole
matrices and the state of each stays one array however many ranks there are.

`fsdp` divides every tensor along its first axis and puts it together for the
moment in which it is needed. It rests on `mx.distributed.sum_scatter`, which
jaccl and nccl have and the TCP ring has not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import mlx.core as mx

from jupiter_engine.backends.mlx.collectives import BUCKET_BYTES
from jupiter_engine.errors import UsageError


def assign(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Deal tensors out to ranks by equal sizes (any unit): for each rank its names, the largest first.

    The largest tensor still left goes to the rank with the least; at worst a
    rank holds a third more than the mean (Graham's bound), unless one tensor
    alone is larger than that. Depends on names and sizes only.
    """
    owned: list[list[str]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = load.index(min(load))
        owned[rank].append(name)
        load[rank] += sizes[name]
    return owned


def rounds(owned: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> list[list[list[str]]]:
    """Cut each rank's tensors (sizes in bytes) into messages of at most BUCKET_BYTES or one tensor.

    Returns, round by round, the names that each rank sends in it. A round is as
    long as its longest message, so ranks send their tensors in order of size
    and the longest meet.
    """
    queues = [list(names) for names in owned]
    found: list[list[list[str]]] = []
    while any(queues):
        room = max([BUCKET_BYTES, *(sizes[queue[0]] for queue in queues if queue)])
        each: list[list[str]] = []
        for queue in queues:
            taken, used = 0, 0
            while taken < len(queue) and used + sizes[queue[taken]] <= room:
                used += sizes[queue[taken]]
                taken += 1
            each.append(queue[:taken])
            del queue[:taken]
        found.append(each)
    return found


class Gatherer:
    """Puts tensors together whose first axis is divided evenly over the group, and divides their gradients again."""

    def __init__(self, group: mx.distributed.Group, dtype: mx.Dtype) -> None:
        """Whole tensors come in `dtype`; gradients go back to the shards' own precision."""
        self._group, self._ranks, self._dtype = group, group.size(), dtype
        self._functions: dict[tuple[tuple[int, ...], ...], Callable[[list[mx.array]], list[mx.array]]] = {}

    def __call__(self, shards: Mapping[str, mx.array], after: mx.array | None) -> dict[str, mx.array]:
        """The whole tensors of one module's shards, by the same names: one message.

        `after` is what the module works on: its weights are asked for only once
        that is there. So one module's weights exist at a time, and all ranks send
        in one order, which a ring needs.
        """
        names = list(shards)
        values = list(shards.values())
        if after is not None:
            values = mx.depends(values, [after])
        key = tuple(tuple(value.shape) for value in values)
        if key not in self._functions:
            self._functions[key] = self._make(key)
        return dict(zip(names, self._functions[key](values), strict=True))

    def _make(self, shapes: Sequence[tuple[int, ...]]) -> Callable[[list[mx.array]], list[mx.array]]:
        group, ranks, dtype = self._group, self._ranks, self._dtype
        cuts, total = [], 0
        for shape in shapes:
            size = 1
            for edge in shape:
                size *= edge
            total += size
            cuts.append(total)

        @mx.custom_function
        def gather(shards: list[mx.array]) -> list[mx.array]:
            flat = mx.concatenate([shard.reshape(1, -1).astype(dtype) for shard in shards], axis=1)
            table = mx.distributed.all_gather(flat, group=group, stream=mx.cpu)
            parts = mx.split(table, cuts[:-1], axis=1)
            return [part.reshape(shape[0] * ranks, *shape[1:]) for part, shape in zip(parts, shapes, strict=True)]

        @gather.vjp
        def gather_vjp(shards: list[mx.array], cotangents: list[mx.array], _: Any) -> list[mx.array]:
            # Summed over the ranks, never averaged: the loss is already divided by the tokens of all.
            table = mx.concatenate([value.astype(mx.float32).reshape(ranks, -1) for value in cotangents], axis=1)
            mine = mx.distributed.sum_scatter(table, group=group, stream=mx.cpu)
            parts = mx.split(mine, cuts[:-1], axis=1)
            return [
                part.reshape(shape).astype(shard.dtype)
                for part, shape, shard in zip(parts, shapes, shards, strict=True)
            ]

        function: Callable[[list[mx.array]], list[mx.array]] = cast(Any, gather)
        return function


def check_fsdp(group: mx.distributed.Group, shapes: Mapping[str, Sequence[int]]) -> None:
    """UsageError where this group cannot divide tensors of these shapes."""
    ranks = group.size()
    try:
        mx.eval(mx.distributed.sum_scatter(mx.zeros((ranks, 1)), group=group, stream=mx.cpu))
    except RuntimeError as error:
        raise UsageError(
            f"sharding fsdp needs a sum that is scattered over the ranks, which this group has not: {error}",
            fix="use sharding zero1, which the TCP ring can do, or the jaccl backend (Thunderbolt 5, macOS 26.2)",
        ) from error
    odd = [name for name, shape in shapes.items() if shape[0] % ranks]
    if odd:
        raise UsageError(
            f"{len(odd)} tensors cannot be divided evenly by {ranks} ranks; the first is {odd[0]} with "
            f"{shapes[odd[0]][0]} rows",
            fix="use another number of ranks, or sharding zero1",
        )
