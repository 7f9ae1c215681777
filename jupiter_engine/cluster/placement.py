"""Who does what on the machines of the cluster. Pure: settings in, machines out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from jupiter_engine.errors import NoUsableNode
from jupiter_engine.settings.cluster import (
    Ability,
    ClusterSettings,
    GroupSpec,
    NodeSpec,
    group_nodes,
    hub_node,
    islands,
    node_by_name,
    training_group,
)
from jupiter_engine.units import duration_text

ABILITY_OF_STAGE: Final[dict[str, Ability]] = {"generate": "generate", "train": "train", "evaluate": "evaluate"}
"""Stages that may run on other machines; all others work on the workspace's own files and run where it lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Island:
    """Machines that train as one, apart from the others."""

    name: str
    """A word that may stand in a path; the island's run folder is called RUN.NAME."""
    group: GroupSpec
    nodes: tuple[NodeSpec, ...]
    """The leading one first; those that do not answer are not in it."""

    def names(self) -> tuple[str, ...]:
        return tuple(node.title() for node in self.nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The machines of one stage."""

    nodes: tuple[NodeSpec, ...] = ()
    """The leading one first; empty: this machine."""
    group: GroupSpec | None = None
    """Set where several machines (or several ranks by a group's own settings) train as one."""
    islands: tuple[Island, ...] = ()
    """Set where groups train apart; then the first of `nodes` is the hub's machine, and all of theirs follow."""

    @property
    def here(self) -> bool:
        """This machine alone, started directly."""
        if self.islands:
            return False
        return not self.nodes or (len(self.nodes) == 1 and self.nodes[0].is_local())

    def names(self) -> tuple[str, ...]:
        return tuple(node.title() for node in self.nodes)


def require_duties(cluster: ClusterSettings) -> None:
    """NoUsableNode unless every duty of a cycle has a machine that may do it."""
    able = {ability for node in cluster.nodes for ability in node.abilities()}
    missing = {"generate", "train", "evaluate"} - able
    if missing:
        raise NoUsableNode(
            f"no node of config/cluster.yaml may {' or '.join(sorted(missing))}",
            fix="give the node with host: localhost the role `hybrid`",
        )


def place(stage: str, cluster: ClusterSettings, *, lost: AbstractSet[str] = frozenset()) -> Placement:
    """Where a stage runs. `lost`: names of machines that do not answer and are passed over.

    NoUsableNode if every machine that may do it is lost.
    """
    ability = ABILITY_OF_STAGE.get(stage)
    if ability is None:
        return Placement()
    if ability == "train" and islands(cluster):
        return _place_islands(cluster, lost)
    if ability == "train":
        group = training_group(cluster)
        if group is not None:
            return _place_group(cluster, group, lost)
    able = [node for node in cluster.nodes if ability in node.abilities() and node.title() not in lost]
    if not able:
        who = ", ".join(node.title() for node in cluster.nodes if ability in node.abilities())
        raise NoUsableNode(
            f"the {stage} stage has no machine: {who or 'no node'} "
            + ("may do it but does not answer" if who else f"may {ability}"),
            fix="`jupiter doctor` says what is wrong; or give another node the role",
        )
    return Placement(nodes=(min(able, key=lambda node: _preference(node, ability)),))


def _place_group(cluster: ClusterSettings, group: GroupSpec, lost: AbstractSet[str]) -> Placement:
    nodes = tuple(node for node in group_nodes(cluster, group) if node.title() not in lost)
    if not nodes:
        raise NoUsableNode(
            f"no machine of the group {group.name} answers", fix="`jupiter doctor` says what is wrong with each"
        )
    return Placement(nodes=nodes, group=group)


def _place_islands(cluster: ClusterSettings, lost: AbstractSet[str]) -> Placement:
    """The hub where the cluster file puts it; if that machine is lost, on the first island's leading one."""
    found = islands_without(cluster, lost)
    if not found:
        raise NoUsableNode("no machine of any island answers", fix="`jupiter doctor` says what is wrong with each")
    wanted = hub_node(cluster)
    return with_hub(wanted if wanted.title() not in lost else found[0].nodes[0], found)


def with_hub(hub: NodeSpec, found: Sequence[Island]) -> Placement:
    """Islands under a hub on this machine."""
    nodes = {node.title(): node for node in (hub, *itertools.chain.from_iterable(one.nodes for one in found))}
    return Placement(nodes=tuple(nodes.values()), islands=tuple(found))


def begun_islands(cluster: ClusterSettings, names: Sequence[str]) -> Placement:
    """Islands as they were begun: `names` are the hub's machine and all of theirs, as in Placement.nodes."""
    everybody = {node.title() for node in cluster.nodes}
    return with_hub(node_by_name(cluster, names[0]), islands_without(cluster, everybody - set(names)))


def islands_without(cluster: ClusterSettings, lost: AbstractSet[str]) -> tuple[Island, ...]:
    """The islands that have a machine left. Their names do not depend on who is lost."""
    groups = islands(cluster)
    members = [tuple(n for n in group_nodes(cluster, group) if n.title() not in lost) for group in groups]
    return tuple(
        Island(name=name, group=group, nodes=nodes)
        for name, group, nodes in zip(_words(groups), groups, members, strict=True)
        if nodes
    )


def islands_text(cluster: ClusterSettings) -> str:
    """Who trains apart and who merges it, in one sentence for people; empty: there are no islands."""
    groups = islands(cluster)
    if not groups:
        return ""
    named = [
        group.name if group.nodes == (group.name,) else f"{group.name} ({', '.join(group.nodes)})" for group in groups
    ]
    every = duration_text(cluster.islands.rounds.round_s)
    return f"Islands: {', '.join(named)}. {hub_node(cluster).title()} merges what they have learnt every {every}."


def _words(groups: Sequence[GroupSpec]) -> list[str]:
    """Names that may stand in a path and tell people who is meant."""
    found: list[str] = []
    for group in groups:
        word = re.sub(r"[^a-z0-9]+", "-", group.name.lower()).strip("-")[:40] or "island"
        choices = itertools.chain([word], (f"{word}-{number}" for number in itertools.count(2)))
        found.append(next(choice for choice in choices if choice not in found))
    return found


def _preference(node: NodeSpec, ability: Ability) -> tuple[bool, bool]:
    """A machine kept for this one duty first, then this machine: nothing has to be sent."""
    dedicated = {"generate": "generator", "evaluate": "evaluator", "train": "trainer"}[ability]
    return node.role != dedicated, not node.is_local()
