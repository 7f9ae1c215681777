"""Thunderbolt cables between the nodes of a group, and what they form: a mesh, a ring, or less.

The rules are MLX's own (mlx/_distributed_utils/config.py): cables are found by the domain UUID that a bus names as
its peer, a ring is the first full one of a depth-first search from the first node, and its width is the fewest
cables between two neighbours. Two things are seen that MLX misses: peers behind hubs, and cables that only one of
the two ends names.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Final

import msgspec

from jupiter_engine.cluster.machine import Machine

_STEPS: Final = 200_000
"""A search for a ring gives up after so many steps (well below a second); eight nodes in full mesh take 8."""


class Cable(msgspec.Struct, frozen=True, kw_only=True):
    """A Thunderbolt connection between two nodes, by their places in the group; `a` is the earlier one."""

    a: int
    b: int
    a_interface: str
    b_interface: str
    speed_bits_per_s: int | None = None
    """The slower end's."""
    hubs: tuple[str, ...] = ()
    """Devices in between, as the end that sees them lists them."""

    def interface(self, node: int) -> str:
        return self.a_interface if node == self.a else self.b_interface

    def other(self, node: int) -> int:
        return self.b if node == self.a else self.a


def find_cables(machines: Sequence[Machine]) -> tuple[Cable, ...]:
    """All cables between these nodes, each once, in the order of nodes and interfaces."""
    place = {socket.port.domain: (i, socket) for i, one in enumerate(machines) for socket in one.sockets}
    cables: list[Cable] = []
    known: set[frozenset[str]] = set()
    for i, machine in enumerate(machines):
        for socket in machine.sockets:
            for peer in socket.port.peers:
                j, far = place.get(peer.domain, (i, socket))
                ends = frozenset((socket.port.domain, peer.domain))
                # A cable from a Mac into itself connects nothing; one that both ends name is one cable.
                if j == i or ends in known:
                    continue
                known.add(ends)
                speeds = [one for one in (socket.port.speed_bits_per_s, far.port.speed_bits_per_s) if one is not None]
                near, away = (i, socket.interface), (j, far.interface)
                (a, a_interface), (b, b_interface) = (near, away) if i < j else (away, near)
                cables.append(
                    Cable(
                        a=a,
                        b=b,
                        a_interface=a_interface,
                        b_interface=b_interface,
                        speed_bits_per_s=min(speeds) if speeds else None,
                        hubs=peer.hubs,
                    )
                )
    return tuple(sorted(cables, key=lambda cable: (cable.a, cable.b, cable.a_interface, cable.b_interface)))


def between(cables: Sequence[Cable], i: int, j: int) -> list[Cable]:
    """The cables between two nodes."""
    return [cable for cable in cables if {cable.a, cable.b} == {i, j}]


def connectivity(count: int, cables: Sequence[Cable]) -> list[list[int]]:
    """How many cables there are between any two of `count` nodes."""
    matrix = [[0] * count for _ in range(count)]
    for cable in cables:
        matrix[cable.a][cable.b] += 1
        matrix[cable.b][cable.a] += 1
    return matrix


def missing_for_mesh(matrix: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Pairs of nodes without a cable; empty: every node is connected to every other."""
    return [(i, j) for i, j in combinations(range(len(matrix)), 2) if matrix[i][j] == 0]


def find_ring(matrix: Sequence[Sequence[int]]) -> list[int] | None:
    """All nodes in an order in which each has a cable to the next and the last to the first; it begins with node 0.

    None where there is no such order. Two nodes with a cable are a ring.
    """
    if len(matrix) < 2:
        return None
    if len(matrix) > 2 and any(sum(1 for count in row if count) < 2 for row in matrix):
        return None
    return _walk(matrix, 0, closed=True)


def find_chain(matrix: Sequence[Sequence[int]]) -> list[int] | None:
    """All nodes in an order in which each has a cable to the next: a ring that lacks one cable."""
    for start in range(len(matrix)):
        found = _walk(matrix, start, closed=False)
        if found is not None:
            return found
    return None


def _walk(matrix: Sequence[Sequence[int]], start: int, *, closed: bool) -> list[int] | None:
    """Depth first from `start`, neighbours in order; the first walk over all nodes."""
    count = len(matrix)
    path = [start]
    nexts = [iter(range(count))]
    for _ in range(_STEPS):
        if len(path) == count and (not closed or matrix[path[-1]][start]):
            return path
        step = next((j for j in nexts[-1] if matrix[path[-1]][j] and j not in path), None)
        if step is not None:
            path.append(step)
            nexts.append(iter(range(count)))
            continue
        path.pop()
        nexts.pop()
        if not path:
            return None
    return None


def width(matrix: Sequence[Sequence[int]], ring: Sequence[int]) -> int:
    """Fewest cables between neighbours of a ring."""
    return min(matrix[ring[i - 1]][node] for i, node in enumerate(ring))
