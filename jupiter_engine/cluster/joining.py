"""Taking a machine in: its key is decided about, it is looked at, and it is written into the cluster file.

The same steps serve the command line and the console: what a person has to decide is asked through `decide`.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec

from jupiter_engine.cluster import probe
from jupiter_engine.cluster.inventory import Inventory, node_values
from jupiter_engine.cluster.runner import NodeRunner
from jupiter_engine.cluster.yaml_text import Value
from jupiter_engine.errors import HostKeyRefused, UsageError
from jupiter_engine.protocol.fleet import NodeFacts
from jupiter_engine.remote import host_keys
from jupiter_engine.remote.host_keys import KnownHosts, OfferedKey
from jupiter_engine.remote.ssh import connect, offered_key
from jupiter_engine.remote.ssh_call import LONGEST_WAY, SSH_CONFIG
from jupiter_engine.settings.cluster import ClusterSettings, ConnectionSettings, NodeSpec
from jupiter_engine.settings.tree import quote
from jupiter_engine.units import GIB

Decide = Callable[[OfferedKey, str], Awaitable[bool]]
"""Asked with a key that is not trusted yet and whose it is; True: it is that machine's."""


class Joined(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that has been taken in."""

    node: NodeSpec
    facts: NodeFacts
    warnings: tuple[str, ...] = ()
    """What the cluster file says about itself now."""


async def settle_key(
    node: NodeSpec,
    settings: ConnectionSettings,
    *,
    known_hosts: KnownHosts,
    decide: Decide,
    replace: bool = False,
    ssh_config: Path | None = SSH_CONFIG,
) -> OfferedKey:
    """See to it that the keys of a machine and of the jump hosts on the way to it are trusted; returns the machine's.

    `replace`: a changed key may be decided about too. HostKeyRefused if the answer is no, and always for a
    revoked key and for a changed one without `replace`. NodeUnreachable if it does not answer.
    """
    for _ in range(2 * LONGEST_WAY):
        try:
            key = await offered_key(node, settings, known_hosts=known_hosts, ssh_config=ssh_config)
            who, refusal = node.title(), None
        except HostKeyRefused as error:  # of a jump host
            if not isinstance(error.offered, OfferedKey):
                raise
            key, who, refusal = error.offered, error.through or error.host, error
        if refusal is None and key.standing == "known":
            return key
        refusal = refusal or host_keys.refused(key, name=who)
        decidable = key.standing == "unknown" or (key.standing == "changed" and replace)
        if not decidable or not await decide(key, who):
            raise refusal
        known_hosts.trust(key, replace=replace)
    raise UsageError(f"{node.title()} presents another key at every call", fix="see what answers at that address")


async def look(
    node: NodeSpec, settings: ConnectionSettings, *, known_hosts: KnownHosts, ssh_config: Path | None = SSH_CONFIG
) -> NodeFacts:
    """What a machine says about itself, asked over a connection of its own. NodeUnreachable if that cannot be."""
    connection = await connect(node, settings, known_hosts=known_hosts, ssh_config=ssh_config)
    try:
        runner = NodeRunner(connection, node.workdir, node.python)
        await runner.ensure()
        python = (node.python or "") if node.environment == "own" else ""
        reading = await probe.ask(runner, workdir=runner.workdir, python=python)
        return probe.facts_of(node.title(), node.host, reading)
    finally:
        await connection.close()


def completed(node: NodeSpec, facts: NodeFacts) -> NodeSpec:
    """The node with what was left out taken from the machine itself; what a person wrote stays."""
    card = next((gpu for gpu in facts.gpus if gpu.name), None)
    kind = "mac" if facts.twin == "mlx" else "nvidia" if card is not None else "cpu"
    memory_bytes = card.memory_total_bytes if card is not None else facts.memory_total_bytes
    chip = card.name if card is not None else facts.chip
    return msgspec.structs.replace(
        node,
        device_type=node.device_type or kind,
        chip=node.chip or chip.strip() or None,
        memory_gb=node.memory_gb or (_gib(memory_bytes) if memory_bytes else None),
    )


def _gib(size_bytes: int) -> float:
    """As machines are sold: systems report a little less than what is built in."""
    exact = size_bytes / GIB
    sold = 4.0 * math.ceil(exact / 4)
    return sold if sold - exact <= 0.06 * sold else round(exact, 1)


_WITH_ROLE: Final = ("host", "name", "device_type", "memory_gb", "chip", "role")


def entry(node: NodeSpec) -> dict[str, Value]:
    """What is written into the cluster file: everything that is not a default, and the role in any case."""
    values: dict[str, Value] = {**node_values(node), "role": node.role}
    return {key: values[key] for key in (*_WITH_ROLE, *values) if key in values}


async def join(
    inventory: Inventory,
    node: NodeSpec,
    *,
    known_hosts: KnownHosts,
    decide: Decide,
    say: Callable[[str], None] = lambda _: None,
    ssh_config: Path | None = SSH_CONFIG,
) -> Joined:
    """Take a machine in. Before it is called the file must be able to hold it (ConfigError, UsageError);
    nothing is written unless everything went well. `say` is told what is being done."""
    if node.is_local():
        raise UsageError(
            f"{quote(node.host)} is this machine, which needs no ssh",
            fix="it is the node with host: localhost in config/cluster.yaml",
        )
    inventory.add(entry(node))
    inventory.check()
    inventory.revert()
    settings: ClusterSettings = inventory.cluster
    say(f"calling {node.title()}")
    await settle_key(node, settings.connection, known_hosts=known_hosts, decide=decide, ssh_config=ssh_config)
    say(f"looking at {node.title()}")
    facts = await look(node, settings.connection, known_hosts=known_hosts, ssh_config=ssh_config)
    node = completed(node, facts)
    inventory.add(entry(node))
    loaded = inventory.save()
    return Joined(node=node, facts=facts, warnings=loaded.warnings)
