"""Nodes and groups as text."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from jupiter_engine.protocol.fleet import GroupPlan, Link, NodeStatus
from jupiter_engine.units import bytes_text, duration_text

_LINES = {"thunderbolt": "═", "ethernet": "─", "wifi": "┄"}


def node_rows(nodes: Sequence[NodeStatus]) -> list[tuple[str, ...]]:
    """A head and one row a node; what is not known is a dash."""
    head = ("NODE", "HOST", "ROLE", "STATE", "CHIP", "MEMORY", "FREE DISK", "TRAINS WITH", "ENVIRONMENT", "RTT")
    rows: list[tuple[str, ...]] = [head]
    for node in nodes:
        facts = node.facts
        if facts is None:
            rows.append((node.name, node.host, node.role, node.state, *["-"] * 6))
            continue
        card = next((gpu for gpu in facts.gpus if gpu.name), None)
        memory_bytes = card.memory_total_bytes if card is not None else facts.memory_total_bytes
        rows.append(
            (
                node.name,
                node.host,
                node.role,
                "this machine" if node.local else node.state,
                card.name if card is not None else facts.chip,
                bytes_text(memory_bytes) if memory_bytes else "-",
                bytes_text(facts.disk_free_bytes),
                f"{facts.twin} ({facts.accelerator})",
                "own" if node.local else facts.environment[:12] or "none yet",
                f"{facts.rtt_s * 1000:.1f} ms" if facts.rtt_s is not None and not node.local else "-",
            )
        )
    return rows


def plan_lines(plan: GroupPlan) -> list[str]:
    """One group: who is in it, how it would be launched and why, its connections, what is in the way."""
    lines = [
        f"{plan.name}: {len(plan.nodes)} node(s), {plan.twin}, backend {plan.backend}, launcher {plan.launcher}",
        f"  {plan.reason}" if plan.reason else "",
        *(f"  {number}  {name}" for number, name in enumerate(plan.nodes)),
        *(_link(link) for link in plan.links),
        *(f"  !! {problem}" for problem in plan.problems),
    ]
    if plan.setup:
        lines.append("  before the first launch:")
        for fix in plan.setup:
            where = f"on {fix.node}: " if fix.node else ""
            lines.append(f"    {where}{shlex.join(fix.argv) if fix.argv else fix.text}")
    return [line for line in lines if line]


def _link(link: Link) -> str:
    line = _LINES[link.kind] * 3
    ends = [
        f"{node}{f' {card}' if card else ''}{f' {address}' if address else ''}"
        for node, card, address in (
            (link.a, link.a_interface, link.a_address),
            (link.b, link.b_interface, link.b_address),
        )
    ]
    about: list[str] = [link.kind]
    if link.speed_bits_per_s:
        about.append(f"{link.speed_bits_per_s / 1e9:g} Gb/s")
    if link.rtt_s is not None:
        about.append(f"{link.rtt_s * 1000:.2f} ms" if link.rtt_s < 1 else duration_text(link.rtt_s))
    if link.rdma is not None:
        about.append(f"RDMA {link.rdma[0]}, {link.rdma[1]}")
    return f"  {ends[0]} {line} {ends[1]}  ({', '.join(about)})"
