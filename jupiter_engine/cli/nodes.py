"""nodes: the machines of the cluster file."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from jupiter_engine.api import Workspace
from jupiter_engine.cli.fleet_text import Ticker, node_rows, plan_lines
from jupiter_engine.cli.output import open_workspace, print_json, print_table
from jupiter_engine.cluster import upkeep
from jupiter_engine.cluster.discovery import discover as find_hosts
from jupiter_engine.cluster.fleet import KNOWN_HOSTS, Fleet
from jupiter_engine.cluster.inventory import Inventory
from jupiter_engine.cluster.joining import join
from jupiter_engine.errors import ExitCode, HostKeyRefused, JupiterError, UsageError
from jupiter_engine.protocol.fleet import NodeStatus
from jupiter_engine.remote.host_keys import KnownHosts, OfferedKey
from jupiter_engine.settings.cluster import (
    ClusterSettings,
    NodeSpec,
    node_by_name,
)
from jupiter_engine.settings.reader import nearest
from jupiter_engine.settings.workspace import CLUSTER_FILE
from jupiter_engine.units import plain_text

COMPARE: Final = "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub"
"""Typed at a machine itself, it shows the fingerprint of its key."""


def nodes(options: argparse.Namespace) -> int:
    """Run the chosen `jupiter nodes ...`."""
    action: Callable[[argparse.Namespace, Workspace], Awaitable[int]] = ACTIONS[options.action]
    return asyncio.run(_run(action, options, open_workspace(options)))


async def _run(
    action: Callable[[argparse.Namespace, Workspace], Awaitable[int]], options: argparse.Namespace, workspace: Workspace
) -> int:
    return await action(options, workspace)


def _say(text: str) -> None:
    """Progress and notices, for people; standard output is for what was asked for."""
    print(plain_text(text), file=sys.stderr, flush=True)


# -- who is there --------------------------------------------------------------------------------------
async def list_nodes(options: argparse.Namespace, workspace: Workspace) -> int:
    loaded = workspace.cluster()
    fleet = Fleet(loaded.value, workspace.root)
    async with fleet.opened():
        _say(f"asking {len(loaded.value.nodes)} node(s)")
        await fleet.refresh_facts()
        found = fleet.picture().nodes
    if options.json:
        # What the node's tools said word for word is for the checks that read it.
        print_json([n if n.facts is None else replace(n, facts=replace(n.facts, raw={})) for n in found])
    else:
        head, *rows = node_rows(found)
        print_table(head, rows)
        _problems(found)
    return ExitCode.DONE if all(not node.problem for node in found) else ExitCode.NO_NODE


def _problems(found: Sequence[NodeStatus]) -> None:
    for node in found:
        if node.problem:
            fix = f" -> {node.fix}" if node.fix else ""
            print(plain_text(f"!! {node.problem}{fix}"))


async def discover(options: argparse.Namespace, workspace: Workspace) -> int:
    cluster = workspace.cluster().value
    _say("listening to the local network")
    found = await find_hosts()
    known = {node.host.lower(): node.title() for node in cluster.nodes}
    offers = [
        (offer, known.get(offer.host.lower()) or known.get(offer.address.lower()) or "") for offer in found.offers
    ]
    if options.json:
        print_json([{**msgspec.to_builtins(offer), "node": node} for offer, node in offers])
    else:
        rows = [(o.host, o.name, o.address, o.port or "", o.user, o.source, node) for o, node in offers]
        print_table(("HOST", "NAME", "ADDRESS", "PORT", "USER", "FOUND IN", "NODE"), rows)
        if not rows:
            print("nothing was found; `jupiter nodes add HOST` takes any host that ssh reaches")
    for note in found.notes:
        _say(note)
    return ExitCode.DONE


# -- taking in and out ---------------------------------------------------------------------------------
async def add(options: argparse.Namespace, workspace: Workspace) -> int:
    user, _, host = options.host.rpartition("@")
    if user and options.user:
        raise UsageError("the user is given twice", fix=f"write {host} and --user {options.user}")
    given = {
        "host": host,
        "name": options.name,
        "role": options.role,
        "ssh_user": options.user or user or None,
        "ssh_port": options.port,
        "identity": _from_here(options.identity),
        "jump": options.jump,
        "device_type": options.device_type,
        "connection_type": options.connection,
        "python": options.python,
        "workdir": options.workdir,
        "environment": options.environment,
    }
    node = NodeSpec(**{key: value for key, value in given.items() if value is not None})
    joined = await join(
        Inventory(workspace.root / CLUSTER_FILE),
        node,
        known_hosts=_known_hosts(workspace),
        decide=_decider(options),
        say=_say,
    )
    for warning in joined.warnings:
        _say(warning)
    if options.json:
        print_json({"node": joined.node, "facts": joined.facts})
    else:
        node = joined.node
        about = ", ".join(
            filter(None, (node.device_type, node.chip, f"{node.memory_gb:g} GB" if node.memory_gb else ""))
        )
        print(plain_text(f"{node.title()} is a node now: {about}, role {node.role}"))
    return ExitCode.DONE


def _from_here(path: str | None) -> str | None:
    """A path given on the command line, as it is written into a file in another folder."""
    if path is None or path.startswith(("/", "~", "-")):
        return path
    return str(Path.cwd() / path)


async def remove(options: argparse.Namespace, workspace: Workspace) -> int:
    # Not opened: only that one machine is called, if there is anything to be taken back from it.
    fleet = Fleet(workspace.cluster().value, workspace.root)
    try:
        removed = await upkeep.remove(fleet, options.name)
    finally:
        await fleet.close()
    for text in (*removed.stays, *removed.warnings):
        _say(text)
    if options.json:
        print_json({"removed": removed.name, "stays": removed.stays})
    else:
        text = f"{removed.name} is no node any more; what Jupiter put there stays in {removed.workdir}"
        print(plain_text(text))
    return ExitCode.DONE


async def trust(options: argparse.Namespace, workspace: Workspace) -> int:
    cluster = workspace.cluster().value
    fleet = Fleet(cluster, workspace.root)
    machine = _named(cluster, options.name)
    key, decided = await upkeep.trust(fleet, machine, _decider(options), replace=options.replace)
    if options.json:
        print_json({"key": key, "new": decided})
    elif decided:
        print(plain_text(f"{options.name} is trusted with {key.algorithm} {key.fingerprint} from now on"))
    else:
        print(plain_text(f"{options.name} is trusted already, with {key.algorithm} {key.fingerprint}"))
    return ExitCode.DONE


def _named(cluster: ClusterSettings, name: str) -> NodeSpec:
    """A node, or a machine that is none: a jump host, or one that is to become a node."""
    try:
        return node_by_name(cluster, name)
    except UsageError:
        user, _, host = name.rpartition("@")
        host, _, port = host.partition(":") if host.count(":") == 1 else (host, "", "")
        known = [node.title() for node in cluster.nodes]
        if not host or not host.isascii() or not host.replace(".", "").replace("-", "").replace(":", "").isalnum():
            raise
        if nearest(name, known) and not user and not port:
            raise  # more likely a slip than another machine
        return NodeSpec(host=host, ssh_user=user or None, ssh_port=int(port) if port.isdecimal() else None)


def _known_hosts(workspace: Workspace) -> KnownHosts:
    return KnownHosts(workspace.root / KNOWN_HOSTS)


def _decider(options: argparse.Namespace) -> Callable[[OfferedKey, str], Awaitable[bool]]:
    """Who decides about a key: --fingerprint, else a person at the terminal, else nobody."""

    async def decide(key: OfferedKey, who: str) -> bool:
        if options.fingerprint is not None:
            if key.fingerprint in options.fingerprint:
                return True
            _say(f"{who} presented {key.fingerprint}, which is not the given fingerprint")
            return False
        if getattr(options, "yes", False) or not sys.stdin.isatty():
            raise HostKeyRefused(
                f"{who} presented {key.algorithm} {key.fingerprint}, which nobody has confirmed",
                host=key.host,
                reason=f"host_key_{key.standing}",
                offered=key,
                fix=f"compare with `{COMPARE}` typed at the machine itself, then pass --fingerprint {key.fingerprint}",
            )
        return await asyncio.to_thread(_ask, key, who)

    return decide


def _ask(key: OfferedKey, who: str) -> bool:
    if key.standing == "changed":
        _say(f"THE KEY OF {who} HAS CHANGED. Known is: {'; '.join(key.known)}")
        _say("Either the machine was set up anew, or another machine answers in its place.")
    _say(f"{who} ({key.host}, port {key.port}) presents {key.algorithm} {key.fingerprint}")
    _say(f"Compare with `{COMPARE}` typed at the machine itself.")
    while True:
        print("Is it the same? [yes/no] ", end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline()
        word = answer.strip().lower()
        if word in ("yes", "no") or not answer:
            return word == "yes"
        if word == key.fingerprint.lower():
            return True


# -- environments --------------------------------------------------------------------------------------
async def push(options: argparse.Namespace, workspace: Workspace) -> int:
    # The other actions need nothing of it.
    from jupiter_engine.cluster.push import Environment, push_all

    cluster = workspace.cluster().value
    chosen = [node_by_name(cluster, name) for name in options.name] or [n for n in cluster.nodes if not n.is_local()]
    if not chosen:
        _say("this machine is the only node; it uses its own environment")
    fleet = Fleet(cluster, workspace.root)
    with Ticker() as ticker:
        async with fleet.opened():
            names = [node.title() for node in chosen]
            answers = await push_all(fleet, cluster, workspace.root, names, ticker.tell, mode=options.mode)
    failed = {name: answer for name, answer in answers.items() if isinstance(answer, JupiterError)}
    ready = {name: answer for name, answer in answers.items() if isinstance(answer, Environment)}
    if options.json:
        errors = {name: {"error": error.detail, "fix": error.fix} for name, error in failed.items()}
        print_json({**ready, **errors})
    else:
        for name, environment in ready.items():
            print(plain_text(f"ok {name}: {environment.python}"))
        for name, error in failed.items():
            print(plain_text(f"!! {name}: {error.sentence()}"))
    return next((error.exit_code for error in failed.values()), ExitCode.DONE)


# -- groups --------------------------------------------------------------------------------------------
async def link(options: argparse.Namespace, workspace: Workspace) -> int:
    cluster = workspace.cluster().value
    fleet = Fleet(cluster, workspace.root)
    done: dict[str, dict[str, Any]] = {}
    async with fleet.opened():
        for group in upkeep.groups_named(cluster, options.group):
            _say(f"linking the nodes of {group.name}")
            leader, reached = await upkeep.link_group(fleet, group.name)
            done[group.name] = {"leader": leader, "calls": reached}
            if not options.json:
                others = ", ".join(reached) or "nobody else: it is alone in its group"
                print(plain_text(f"{group.name}: {leader} leads and calls {others}"))
    if options.json:
        print_json(done)
    return ExitCode.DONE


async def unlink(options: argparse.Namespace, workspace: Workspace) -> int:
    fleet = Fleet(workspace.cluster().value, workspace.root)
    async with fleet.opened():
        left = await upkeep.unlink_groups(fleet, options.group)
    if options.json:
        print_json(left)
    for name, texts in left.items() if not options.json else ():
        print(plain_text(f"{name}: " + ("the workspace's key is taken back" if not texts else "not everywhere")))
        for node, text in texts.items():
            print(plain_text(f"!! {node}: {text}"))
    return ExitCode.STAGE_FAILED if any(left.values()) else ExitCode.DONE


async def topology(options: argparse.Namespace, workspace: Workspace) -> int:
    cluster = workspace.cluster().value
    fleet = Fleet(cluster, workspace.root)
    async with fleet.opened():
        _say(f"asking {len(cluster.nodes)} node(s)")
        await fleet.refresh_facts()
        plans = await fleet.plans()
        picture = fleet.picture()
    if options.json:
        print_json(plans)
    elif not plans:
        print("no group: this machine trains alone (see `groups` in docs/config.md)")
    else:
        print(plain_text("\n".join(line for plan in plans for line in plan_lines(plan))))
    if not options.json:
        if picture.islands:
            print(plain_text(picture.islands))
        _problems(picture.nodes)
    return ExitCode.NO_NODE if any(plan.problems for plan in plans) else ExitCode.DONE


ACTIONS: Final[dict[str, Any]] = {
    "list": list_nodes,
    "add": add,
    "discover": discover,
    "remove": remove,
    "trust": trust,
    "push": push,
    "link": link,
    "unlink": unlink,
    "topology": topology,
}
"""What follows `jupiter nodes` -> what it does."""
