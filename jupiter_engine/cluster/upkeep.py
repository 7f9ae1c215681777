"""What a person may do to the machines of an open fleet: take in, trust, send the environment, link, take out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from jupiter_engine.cluster import link
from jupiter_engine.cluster.fleet import Fleet
from jupiter_engine.cluster.inventory import Inventory
from jupiter_engine.cluster.joining import Decide, Joined, join, settle_key
from jupiter_engine.errors import JupiterError, UsageError
from jupiter_engine.remote.host_keys import OfferedKey
from jupiter_engine.remote.port import Connection
from jupiter_engine.settings.cluster import (
    HUB,
    ClusterSettings,
    GroupSpec,
    NodeSpec,
    default_groups,
    group_nodes,
    hub_group,
    node_by_name,
)
from jupiter_engine.settings.workspace import CLUSTER_FILE
from jupiter_engine.units import plain_text


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that is no node any more."""

    name: str
    workdir: str
    """What Jupiter put there stays there."""
    stays: tuple[str, ...] = ()
    """What links had put there and could not be taken back, in sentences that name it and where it is."""
    warnings: tuple[str, ...] = ()
    """What the cluster file says about itself now."""


async def add(fleet: Fleet, node: NodeSpec, decide: Decide, say: Callable[[str], None]) -> Joined:
    """Look at a machine and write it into the cluster file; see `joining.join`."""
    inventory = Inventory(fleet.root / CLUSTER_FILE)
    return await join(inventory, node, known_hosts=fleet.known_hosts, decide=decide, say=say)


async def trust(
    fleet: Fleet, machine: NodeSpec | str, decide: Decide, *, replace: bool = True
) -> tuple[OfferedKey, bool]:
    """Settle the key of a machine and of the jump hosts before it: (its key, whether anything was decided).

    `machine`: a node by name, or any machine. `replace`: a changed key is put before `decide` as well. Raises what
    `joining.settle_key` raises.
    """
    decided = False

    async def ask(key: OfferedKey, who: str) -> bool:
        nonlocal decided
        answer = await decide(key, who)
        decided = decided or answer
        return answer

    node = node_by_name(fleet.cluster, machine) if isinstance(machine, str) else machine
    key = await settle_key(node, fleet.cluster.connection, known_hosts=fleet.known_hosts, decide=ask, replace=replace)
    if node.title() in fleet.names():
        fleet.wake([node.title()])
    return key, decided


async def remove(fleet: Fleet, name: str) -> Removed:
    """Take a node out of the cluster file and of its group, and what links have put there off the machine.

    UsageError for the only or an unknown node. That the machine cannot be called keeps nobody from removing it:
    what stays there is told.
    """
    inventory = Inventory(fleet.root / CLUSTER_FILE)
    node = node_by_name(inventory.cluster, name)
    inventory.remove(name)
    inventory.check()
    stays = await _take_back(fleet, node)
    return Removed(name=node.title(), workdir=node.workdir, stays=stays, warnings=inventory.save().warnings)


async def _take_back(fleet: Fleet, node: NodeSpec) -> tuple[str, ...]:
    """Withdraw from a machine that is to be no node any more; sentences about what stays there."""
    groups = link.groups_with(fleet.root, node)
    if not groups:
        return ()
    stays: list[str] = []
    try:
        connection = await fleet.connection(node.title(), wait_s=fleet.cluster.connection.connect_timeout_s)
        await link.withdraw_from(connection, node, root=fleet.root, groups=groups)
    except JupiterError as error:
        stays.append(plain_text(f"{error.detail}: {link.what_stays(fleet.root, node)}"))
    link.forget(fleet.root, node)
    return tuple(stays)


async def push(fleet: Fleet, name: str) -> str:
    """Bring a node's environment up to date; how far it is stands in the picture. Returns its Python, by path."""
    # Loaded here: only who sends needs the builder of environments.
    from jupiter_engine.cluster.push import push_all

    title = node_by_name(fleet.cluster, name).title()
    try:
        pushed = await push_all(fleet, fleet.cluster, fleet.root, [title], fleet.show_transfer)
    finally:
        fleet.show_transfer(title, None)
    environment = pushed[title]
    if isinstance(environment, JupiterError):
        raise environment
    await fleet.refresh_facts(names=[title])
    return environment.python


def groups_named(cluster: ClusterSettings, name: str | None) -> tuple[GroupSpec, ...]:
    """The groups called so, all of them without a name; UsageError if there is none. The hub of islands with their
    leading machines counts as one."""
    return _chosen(_linkable(cluster), name)


def _linkable(cluster: ClusterSettings) -> tuple[GroupSpec, ...]:
    """Groups whose first machine calls the others."""
    hub = hub_group(cluster)
    return (*(cluster.groups or default_groups(cluster)), *((hub,) if hub is not None else ()))


def _chosen(groups: Sequence[GroupSpec], name: str | None) -> tuple[GroupSpec, ...]:
    chosen = tuple(group for group in groups if name in (None, group.name))
    if not chosen:
        have = ", ".join(group.name for group in groups) or "none"
        what = "there is no group" if name is None else f"there is no group {name!r} (there: {have})"
        raise UsageError(what, fix="see `groups` in docs/config.md")
    return chosen


async def connections_of(fleet: Fleet, group: GroupSpec) -> tuple[dict[str, Connection], dict[str, JupiterError]]:
    """Connections to the nodes of a group, and why there is none to the others; both by the node's name."""
    names = [node.title() for node in group_nodes(fleet.cluster, group)]
    wait_s = fleet.cluster.connection.connect_timeout_s
    answers = await asyncio.gather(*(fleet.connection(name, wait_s=wait_s) for name in names), return_exceptions=True)
    connections: dict[str, Connection] = {}
    problems: dict[str, JupiterError] = {}
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, JupiterError):
            problems[name] = answer
        elif isinstance(answer, BaseException):
            raise answer
        else:
            connections[name] = answer
    return connections, problems


async def link_group(fleet: Fleet, name: str) -> tuple[str, tuple[str, ...]]:
    """Let the leading node of a group call the others, now and at every later launch: (the leading node, the nodes
    that it reaches).

    Raises the first node's problem if one of them cannot be called from here, else what `link.link` raises; the
    leave, once all could be called, is given even so, because a key may have been left on some of them.
    """
    (group,) = groups_named(fleet.cluster, name)
    connections, problems = await connections_of(fleet, group)
    if problems:
        raise next(iter(problems.values()))
    whole = hub_group(fleet.cluster, whole=True) if group.name == HUB else None
    link.give_leave(fleet.root, fleet.cluster, whole or group)
    files = await link.link(fleet.cluster, group, connections, root=fleet.root, known_hosts=fleet.known_hosts)
    return group_nodes(fleet.cluster, group)[0].title(), tuple(files.aliases)


async def unlink_groups(fleet: Fleet, name: str | None) -> dict[str, dict[str, str]]:
    """Take leave and links back from a group, from all of them without a name, those that the cluster file no longer
    has among them: group -> node -> why it could not be taken back there. UsageError if there is no such group."""
    present = {group.name: group for group in _linkable(fleet.cluster)}
    names = [*present, *(former for former in link.linked(fleet.root).groups if former not in present)]
    groups = [link.as_linked(fleet.root, fleet.cluster, one, present.get(one)) for one in names]
    left: dict[str, dict[str, str]] = {}
    for group in _chosen(groups, name):
        connections, problems = await connections_of(fleet, group)
        said = await link.unlink(fleet.cluster, group, connections, root=fleet.root)
        left[group.name] = {node: problems[node].detail if node in problems else text for node, text in said.items()}
    return left
