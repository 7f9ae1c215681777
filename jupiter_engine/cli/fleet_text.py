"""Nodes and groups as text."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from jupiter_engine.protocol.fleet import GroupPlan, Link, NodeStatus, Transfer
from jupiter_engine.units import bytes_text, duration_text, plain_text

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


class Ticker:
    """What is being sent to each node, on stderr: one line that is written over on a terminal, else a line for each
    new step and each tenth of a node's transfer."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._now: dict[str, str] = {}
        self._said: dict[str, tuple[str, int]] = {}
        self._length = 0

    def __enter__(self) -> Ticker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._length:
            print(f"\r{' ' * self._length}\r", end="", file=sys.stderr, flush=True)

    def tell(self, name: str, transfer: Transfer) -> None:
        self._now[name] = transfer_text(transfer)
        if self._terminal:
            line = plain_text("   ".join(f"{node}: {text}" for node, text in self._now.items()))[:118]
            print(f"\r{line.ljust(self._length)}", end="", file=sys.stderr, flush=True)
            self._length = len(line)
            return
        tenth = 10 * transfer.sent_bytes // transfer.total_bytes if transfer.total_bytes else 0
        if self._said.get(name) != (transfer.step, tenth):
            self._said[name] = (transfer.step, tenth)
            print(plain_text(f"{name}: {self._now[name]}"), file=sys.stderr, flush=True)


def transfer_text(transfer: Transfer) -> str:
    """environment: sending 12.0 MiB of 80.0 MiB, 11.2 MiB/s, 6s left."""
    parts = [
        f"{transfer.what}: {transfer.step} {bytes_text(transfer.sent_bytes)} of {bytes_text(transfer.total_bytes)}"
    ]
    if not transfer.total_bytes:
        parts = [f"{transfer.what}: {transfer.step}"]
    if transfer.bytes_per_s:
        parts.append(f"{bytes_text(transfer.bytes_per_s)}/s")
    if transfer.eta_s is not None:
        parts.append(f"{duration_text(transfer.eta_s)} left")
    return ", ".join(parts)
