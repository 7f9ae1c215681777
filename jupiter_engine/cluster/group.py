"""A group that is being planned: what is asked for and what was read, and the words that all plans use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from jupiter_engine.cluster.addressing import Ends
from jupiter_engine.cluster.cables import Cable
from jupiter_engine.cluster.machine import Machine
from jupiter_engine.protocol.fleet import GroupPlan, Link
from jupiter_engine.protocol.specs import Twin

Backend = Literal["ring", "jaccl", "jaccl-ring", "gloo", "nccl"]
Launcher = Literal["in_process", "torchrun", "mlx.launch", "direct"]


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for, and everything read."""

    name: str
    machines: tuple[Machine, ...]
    cables: tuple[Cable, ...]
    matrix: list[list[int]]
    twin: Twin
    launcher: Launcher
    ranks_per_node: int

    def names(self, order: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.machines[i].name for i in order)

    def unread(self) -> tuple[str, ...]:
        return tuple(sentence for machine in self.machines for sentence in machine.unread)


def failed(group: Group, backend: Backend, *problems: str, reason: str = "", links: tuple[Link, ...] = ()) -> GroupPlan:
    """A plan that says only why there is none."""
    return GroupPlan(
        name=group.name,
        nodes=group.names(range(len(group.machines))),
        twin=group.twin,
        backend=backend,
        launcher=group.launcher,
        links=links,
        reason=reason,
        problems=(*problems, *group.unread()),
    )


def noted(group: Group, reason: str) -> str:
    """The reason of a plan that works, and what could not be read although it was not needed."""
    return " ".join((reason, *group.unread()))


def joined(sentences: Sequence[str]) -> str:
    """Sentences as a part of one, the first two of them."""
    parts = [sentence.removesuffix(".") for sentence in sentences[:2]]
    starts = ("The ", "There ", "No ", "A ")
    shown = "; ".join(part[0].lower() + part[1:] if part.startswith(starts) else part for part in parts)
    return shown + (f"; and {len(sentences) - 2} more" if len(sentences) > 2 else "")


def pair(group: Group, i: int, j: int) -> str:
    return f"{group.machines[i].name} and {group.machines[j].name}"


def speed_text(bits_per_s: int | None) -> str:
    if bits_per_s is None:
        return "speed not told"
    gigabits = bits_per_s / 1e9
    return f"{gigabits:g} Gb/s" if gigabits >= 1 else f"{bits_per_s / 1e6:g} Mb/s"


def cable_links(group: Group) -> tuple[Link, ...]:
    """All cables of the group, for plans that cannot use them."""
    return tuple(cable_link(cable, None, group.machines, rdma=False) for cable in group.cables)


def cable_link(cable: Cable, ends: Ends | None, machines: Sequence[Machine], *, rdma: bool) -> Link:
    return Link(
        a=machines[cable.a].name,
        b=machines[cable.b].name,
        kind="thunderbolt",
        a_interface=cable.a_interface,
        b_interface=cable.b_interface,
        a_address=ends.a if ends else "",
        b_address=ends.b if ends else "",
        speed_bits_per_s=cable.speed_bits_per_s,
        rdma=(f"rdma_{cable.a_interface}", f"rdma_{cable.b_interface}") if rdma else None,
    )
