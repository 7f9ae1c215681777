"""Who does what on the machines of the cluster. Pure: settings in, machines out."""

from __future__ import annotations

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
    training_group,
)

ABILITY_OF_STAGE: Final[dict[str, Ability]] = {"generate": "generate", "train": "train", "evaluate": "evaluate"}
"""Stages that may run on other machines; all others work on the workspace's own files and run where it lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The machines of one stage."""

    nodes: tuple[NodeSpec, ...] = ()
    """The leading one first; empty: this machine."""
    group: GroupSpec | None = None
    """Set where several machines (or several ranks by a group's own settings) train as one."""

    @property
    def here(self) -> bool:
        """This machine alone, started directly."""
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


def _preference(node: NodeSpec, ability: Ability) -> tuple[bool, bool]:
    """A machine kept for this one duty first, then this machine: nothing has to be sent."""
    dedicated = {"generate": "generator", "evaluate": "evaluator", "train": "trainer"}[ability]
    return node.role != dedicated, not node.is_local()
