"""Checks: Thunderbolt cables, the bridge, RDMA."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, Literal

from jupiter_engine.cluster.doctor.evidence import Evidence, tool_text
from jupiter_engine.cluster.doctor.registry import Theme, Verdict, command, fail, info, names, ok, person, warn
from jupiter_engine.cluster.machine import RDMA_ABOVE_BITS_PER_S, RDMA_SINCE, Machine, NodeTools, read_machine
from jupiter_engine.cluster.readers.thunderbolt import macos_version, rdma_ports
from jupiter_engine.protocol.fleet import NodeFacts

MESH_LARGEST: Final = 8
RING_WIRES: Final = 4
"""Limits of MLX's JACCL: peers of a mesh, wires between two neighbours of a ring."""
MAC_STUDIO: Final = re.compile(r"Mac(15,14|16,9)")
NEXT_TO_ETHERNET: Final = "rdma_en2"
"""The Mac Studio's socket beside its Ethernet one, on which RDMA was seen not to come up."""

_theme = Theme()


def machine(name: str, facts: NodeFacts) -> Machine:
    """The node's network and Thunderbolt answers, read."""
    system: Literal["Darwin", "Linux"] = "Darwin" if facts.system.startswith("Darwin") else "Linux"
    return read_machine(NodeTools(name=name, host=facts.host, system=system, raw=facts.raw))


def _over_thunderbolt(e: Evidence) -> set[str]:
    return {name for _, link in e.links() if link.kind == "thunderbolt" for name in (link.a, link.b)}


@_theme.check("tool-answers", "The system's tools can be read")
def tool_answers(e: Evidence) -> Iterator[Verdict]:
    good = []
    for name, facts in e.facts.items():
        sentences = list(machine(name, facts).unread)
        late = facts.raw.get("timed_out")
        if isinstance(late, list) and late:
            sentences.append(f"{name}: no answer in time from {', '.join(str(tool) for tool in late[:6])}.")
        if sentences:
            yield info((name,), " ".join(sentences))
        else:
            good.append(name)
    if good:
        yield ok(good, f"Every system tool that was asked could be read on {names(good)}.")


@_theme.check("rdma", "RDMA where the sockets can do it")
def rdma(e: Evidence) -> Iterator[Verdict]:
    wanted = {
        name for plan in e.plans if plan.backend in ("jaccl", "jaccl-ring") for name in plan.nodes if name in e.facts
    }
    for name, facts in e.macs().items():
        seen = machine(name, facts)
        if not seen.sockets:
            continue
        fastest = max((socket.port.speed_bits_per_s or 0 for socket in seen.sockets), default=0)
        problem, fix = "", None
        if fastest <= RDMA_ABOVE_BITS_PER_S:
            problem = f"The Thunderbolt sockets of {name} run at {fastest / 1e9:.0f} Gb/s: RDMA needs Thunderbolt 5"
            if seen.rdma_switch == "enabled":
                problem += ", and that rdma_ctl says enabled means nothing there"
        elif (macos_version(seen.macos) or RDMA_SINCE) < RDMA_SINCE:
            problem = f"{name} has macOS {seen.macos}: RDMA over Thunderbolt came with 26.2"
            fix = person(f"update {name} to macOS 26.2 or later")
        elif seen.rdma_switch == "disabled" or not seen.rdma_devices:
            problem = f"{name} has Thunderbolt 5, but RDMA is switched off"
            fix = person(f"for RDMA start {name} into Recovery and run `rdma_ctl enable` there")
        if not problem:
            yield ok((name,), f"{name} has {len(seen.rdma_devices)} RDMA devices at {fastest / 1e9:.0f} Gb/s.")
        elif name in wanted:
            yield fail((name,), f"{problem}; its group is set to use RDMA.", fix)
        else:
            yield info((name,), f"{problem}. The ring over TCP does not need it.", fix)


@_theme.check("rdma-port", "RDMA ports are active")
def rdma_port(e: Evidence) -> Iterator[Verdict]:
    good: set[str] = set()
    for _, link in e.links():
        if link.rdma is None:
            continue
        for name, device in ((link.a, link.rdma[0]), (link.b, link.rdma[1])):
            facts = e.facts.get(name)
            answer = tool_text(facts, "ibv_devinfo") if facts is not None else None
            if facts is None or answer is None:
                continue
            state = next((port.state for port in rdma_ports(answer) if port.device == device), "")
            if state != "PORT_ACTIVE":
                text = f"{device} on {name} is {state or 'not listed'}, so its cable carries no RDMA."
                fix = person("plug the cable in again at both ends; it must be a Thunderbolt 5 cable")
                yield fail((name,), text, fix)
            elif device == NEXT_TO_ETHERNET and MAC_STUDIO.fullmatch(facts.model):
                text = f"The cable of {name} is in the socket next to Ethernet, where RDMA was seen to fail."
                yield warn((name,), text, person("move it to another Thunderbolt socket"))
            else:
                good.add(name)
    if good:
        yield ok(sorted(good), f"RDMA ports are active on {names(sorted(good))}.")


@_theme.check("group-plan", "Every group can be launched")
def group_plan(e: Evidence) -> Iterator[Verdict]:
    for plan in e.plans:
        for problem in plan.problems:
            yield fail(plan.nodes, f"Group {plan.name}: {problem}")
        if not plan.problems:
            yield ok(plan.nodes, f"Group {plan.name} would run on {plan.backend}: {plan.reason.rstrip('.')}.")


@_theme.check("mesh-size", "No more cables than JACCL takes")
def mesh_size(e: Evidence) -> Iterator[Verdict]:
    for plan in e.plans:
        if plan.backend == "jaccl":
            if len(plan.nodes) > MESH_LARGEST:
                text = f"Group {plan.name} has {len(plan.nodes)} nodes; a mesh over RDMA takes {MESH_LARGEST}."
                yield fail(plan.nodes, text, person("write `backend: jaccl-ring`, or split the group"))
            else:
                yield ok(plan.nodes, f"Group {plan.name} has {len(plan.nodes)} nodes of at most {MESH_LARGEST}.")
        elif plan.backend in ("jaccl-ring", "ring"):
            wires: dict[frozenset[str], int] = {}
            for link in plan.links:
                if link.kind == "thunderbolt":
                    pair = frozenset((link.a, link.b))
                    wires[pair] = wires.get(pair, 0) + 1
            most = max(wires.values(), default=0)
            if most > RING_WIRES:
                text = f"Group {plan.name} has {most} cables between two neighbours; {RING_WIRES} can be used."
                yield warn(plan.nodes, text, person("use the further cables elsewhere"))
            elif most:
                yield ok(plan.nodes, f"Group {plan.name} has {most} cable(s) between neighbours.")


@_theme.check("thunderbolt-bridge", "The Thunderbolt bridge is off")
def thunderbolt_bridge(e: Evidence) -> Iterator[Verdict]:
    concerned = _over_thunderbolt(e)
    good = []
    for name, facts in e.macs().items():
        if name not in concerned:
            continue
        seen = machine(name, facts)
        if not seen.bridge:
            good.append(name)
            continue
        text = f"{seen.bridge} on {name} holds {names(seen.bridged)}: the addresses of a ring cannot be put on them."
        fix = command(f"switch the bridge of {name} off", "sudo", "ifconfig", seen.bridge, "down", node=name)
        yield fail((name,), text, fix)
    if good:
        yield ok(good, f"The Thunderbolt bridge is off on {names(good)}.")


@_theme.check("thunderbolt-hub", "Macs behind hubs are seen")
def thunderbolt_hub(e: Evidence) -> Iterator[Verdict]:
    for name, facts in e.macs().items():
        for socket in machine(name, facts).sockets:
            for peer in socket.port.peers:
                if peer.hubs:
                    text = f"{name} reaches {peer.name or 'a Mac'} through {names(peer.hubs)}; mlx.distributed_config"
                    yield info((name,), f"{text} would miss that cable, Jupiter uses it.")


@_theme.check("cable-speed", "Cables run at full speed")
def cable_speed(e: Evidence) -> Iterator[Verdict]:
    good = []
    for _, link in e.links():
        if link.kind != "thunderbolt" or link.speed_bits_per_s is None:
            continue
        if link.speed_bits_per_s < 40_000_000_000:
            text = f"The cable between {link.a} and {link.b} runs at {link.speed_bits_per_s / 1e9:.0f} Gb/s"
            yield warn(
                (link.a, link.b), f"{text}: it is no Thunderbolt cable.", person("use a Thunderbolt 4 or 5 cable")
            )
        else:
            good.append(link)
    if good:
        slowest = min(link.speed_bits_per_s or 0 for link in good)
        nodes = sorted({name for link in good for name in (link.a, link.b)})
        yield ok(nodes, f"{len(good)} Thunderbolt cable(s) run at {slowest / 1e9:.0f} Gb/s or more.")


CHECKS: Final = tuple(_theme.checks)
