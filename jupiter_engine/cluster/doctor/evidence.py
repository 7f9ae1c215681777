"""What the doctor knows when it looks: settings, facts, plans and measurements of one moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from jupiter_engine.protocol.fleet import GroupPlan, Link, NodeFacts
from jupiter_engine.settings.cluster import ABILITIES, ClusterSettings, NodeSpec
from jupiter_engine.units import GIB

DEFAULT_CHECKPOINT_BYTES: Final = int(1.6 * GIB)
"""A full training state of the embedded default base (see cli.setup)."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Why a node gave no facts."""

    text: str
    fix: str = ""


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """Measured from node `a` towards node `b`."""

    a: str
    b: str
    address: str
    """Of b, as a called it."""
    rtt_s: float | None = None
    """Best time of a TCP connection; None: none came about."""
    error: str = ""
    """Why not, as the system of `a` says it."""
    detached_error: str | None = None
    """The same from a process that no session owns; empty: it works; None: not tried."""
    listen_error: str | None = None
    """Connecting to a port that was just opened at b; empty: it works; None: not tried."""
    to_bytes_per_s: float | None = None
    from_bytes_per_s: float | None = None


class Login(msgspec.Struct, frozen=True, kw_only=True):
    """Whether node `a`, which leads a group, gets into node `b` with its own ssh."""

    a: str
    b: str
    works: bool
    text: str = ""
    """Last line of what ssh said."""


class Former(msgspec.Struct, frozen=True, kw_only=True):
    """What the doctor saw of a node the last time."""

    boot_id: str
    wired_limit_mb: int | None = None
    at: float = 0.0


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a check may look at. Mappings are keyed by the node's name in the cluster file."""

    cluster: ClusterSettings
    facts: Mapping[str, NodeFacts]
    """Of the nodes that answered."""
    plans: tuple[GroupPlan, ...] = ()
    problems: Mapping[str, Problem] = {}
    """Of the nodes that did not."""
    edges: tuple[Edge, ...] = ()
    logins: tuple[Login, ...] = ()
    former: Mapping[str, Former] = {}
    at: float = 0.0
    """Seconds since the epoch, by this machine's clock."""
    checkpoint_bytes: int = DEFAULT_CHECKPOINT_BYTES
    """Of one full training state."""

    def spec(self, name: str) -> NodeSpec | None:
        """The node's entry in the cluster file."""
        return next((node for node in self.cluster.nodes if node.title() == name), None)

    def remote(self) -> dict[str, NodeFacts]:
        """Facts of the machines that are reached over ssh."""
        return {name: facts for name, facts in self.facts.items() if not self.is_local(name)}

    def is_local(self, name: str) -> bool:
        spec = self.spec(name)
        return spec is not None and spec.is_local()

    def macs(self) -> dict[str, NodeFacts]:
        return {name: facts for name, facts in self.facts.items() if facts.system.startswith("Darwin")}

    def linuxes(self) -> dict[str, NodeFacts]:
        return {name: facts for name, facts in self.facts.items() if facts.system.startswith("Linux")}

    def with_gpus(self) -> dict[str, NodeFacts]:
        """Machines with NVIDIA cards, and those that should have one."""
        return {
            name: facts
            for name, facts in self.facts.items()
            if facts.gpus or ((spec := self.spec(name)) is not None and spec.device_type == "nvidia")
        }

    def groups(self) -> Iterator[tuple[GroupPlan, dict[str, NodeFacts]]]:
        """Each plan with the facts of its nodes that answered."""
        for plan in self.plans:
            yield plan, {name: self.facts[name] for name in plan.nodes if name in self.facts}

    def links(self) -> Iterator[tuple[GroupPlan, Link]]:
        for plan in self.plans:
            for link in plan.links:
                yield plan, link

    def needed(self, name: str) -> bool:
        """Whether work cannot go on without this node: a group has it, or nobody else may do what it does."""
        spec = self.spec(name)
        if spec is None:
            return False
        if any(name in plan.nodes for plan in self.plans):
            return True
        if any(name in group.nodes or spec.host in group.nodes for group in self.cluster.groups):
            return True
        others: set[str] = set()
        for node in self.cluster.nodes:
            if node.title() in self.facts:
                others |= node.abilities()
        return not ABILITIES["hybrid"] <= others


def node_fact(facts: NodeFacts, key: str) -> Any:
    """What the node's own Python read (node.machine), by key; None if it is not there."""
    node = facts.raw.get("node")
    return node.get(key) if isinstance(node, dict) else None


def node_table(facts: NodeFacts, key: str) -> dict[str, Any]:
    """The same where it should be an object: empty for anything else."""
    value = node_fact(facts, key)
    return value if isinstance(value, dict) else {}


def tool_text(facts: NodeFacts, tool: str) -> str | None:
    """What a tool printed; None if it is missing there or did not end in time."""
    text = facts.raw.get(tool)
    return text if isinstance(text, str) else None


def tool_refusal(facts: NodeFacts, tool: str) -> str:
    """What a tool said on its way to a failure; empty if it did not fail."""
    failed = facts.raw.get("failed")
    return str(failed.get(tool, "")) if isinstance(failed, dict) else ""
