"""A text picture of how nodes are connected: a box for each, what runs between neighbours, the way back of a ring.

╭─ ┌─────────┐
│  │ 0 mac-a │
│  └─────────┘
│    ║ Thunderbolt 40 Gb/s   en3 10.211.0.1 ══ en2 10.211.0.2
│  ┌─────────┐
│  │ 1 mac-b │
│  └─────────┘
╰─── ║ Thunderbolt 40 Gb/s   en2 10.211.0.10 ══ en3 10.211.0.9   back to mac-a
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from jupiter_engine.protocol.fleet import GroupPlan, Link
from jupiter_tui.view.text import cut, one_line

_NAMES: Final = {"thunderbolt": "Thunderbolt", "ethernet": "Ethernet", "wifi": "Wi-Fi"}
_DOWN: Final = {"thunderbolt": "║", "ethernet": "│", "wifi": ":"}
_ACROSS: Final = {"thunderbolt": "══", "ethernet": "──", "wifi": "··"}


def plan_lines(plan: GroupPlan, width: int = 100) -> list[str]:
    """A group: its name, backend and launcher, then its nodes in rank order and their links."""
    count = len(plan.nodes)
    head = f"{one_line(plan.name)}: {plan.backend} through {plan.launcher}, {count} node{'s' if count != 1 else ''}"
    return [cut(head, width), *topology_lines(plan.nodes, plan.links, width)]


def topology_lines(nodes: Sequence[str], links: Sequence[Link], width: int = 100) -> list[str]:
    """Nodes from top to bottom with the links between neighbours; a link from the last to the first closes a ring.

    Links between others stand below as a list. No line is longer than `width`.
    """
    if not nodes:
        return []
    closing = _between(links, nodes[-1], nodes[0]) if len(nodes) > 2 else []
    names = [f"{rank} {one_line(node)}" for rank, node in enumerate(nodes)]
    inner = max(len(name) for name in names)
    inner = min(inner, max(1, width - 8))
    lines: list[str] = []
    drawn: list[Link] = list(closing)
    for rank, node in enumerate(nodes):
        first, rail = (rank == 0, "│  ") if closing else (False, "   ")
        lines.append(("╭─ " if first else rail) + "┌" + "─" * (inner + 2) + "┐")
        lines.append(f"{rail}│ {cut(names[rank], inner).ljust(inner)} │")
        lines.append(rail + "└" + "─" * (inner + 2) + "┘")
        if rank + 1 < len(nodes):
            between = _between(links, node, nodes[rank + 1])
            drawn += between
            lines += [f"{rail}  {_DOWN[link.kind]} {_words(link, node)}" for link in between]
            if not between:
                lines.append(f"{rail}    no link to {one_line(nodes[rank + 1])}")
    for number, link in enumerate(closing):
        last = number == len(closing) - 1
        lines.append(f"{'╰──' if last else '│  '}{'─' if last else ' '} {_DOWN[link.kind]} {_back(link, nodes)}")
    rest = [link for link in links if not any(link is other for other in drawn)]
    lines += ["also:"] if rest else []
    lines += [f"  {one_line(one.a)} {_ACROSS[one.kind]} {one_line(one.b)}: {_words(one, one.a)}" for one in rest]
    return [cut(line, width).rstrip() for line in lines]


def _between(links: Sequence[Link], a: str, b: str) -> list[Link]:
    return [link for link in links if {link.a, link.b} == {a, b}]


def _back(link: Link, nodes: Sequence[str]) -> str:
    return f"{_words(link, nodes[-1])}   back to {one_line(nodes[0])}"


def _words(link: Link, upper: str) -> str:
    """Kind, speed, round trip and RDMA, then both ends with the one of `upper` first."""
    ends = [(link.a_interface, link.a_address), (link.b_interface, link.b_address)]
    if link.a != upper:
        ends.reverse()
    parts = [_NAMES[link.kind]]
    if link.speed_bits_per_s is not None:
        parts.append(_speed(link.speed_bits_per_s))
    if link.rdma is not None:
        parts.append("RDMA")
    if link.rtt_s is not None:
        parts.append(f"{link.rtt_s * 1000:.2g} ms")
    texts = [" ".join(one_line(part) for part in end if part) for end in ends]
    where = f" {_ACROSS[link.kind]} ".join(text or "?" for text in texts) if any(texts) else ""
    return " ".join(parts) + (f"   {where}" if where else "")


def _speed(bits_per_s: int) -> str:
    return f"{bits_per_s / 1e9:g} Gb/s" if bits_per_s >= 1e9 else f"{bits_per_s / 1e6:g} Mb/s"
