"""The Fleet page's text: this machine's live facts, the configured others, the engine process."""

from __future__ import annotations

from typing import Any

from jupiter_engine.units import bytes_text, duration_text
from jupiter_tui.view.picture import Picture
from jupiter_tui.view.text import Line, bar, cut_line, day_and_clock, mark, one_line, pad, pairs, rule, wrap


def node_lines(picture: Picture, width: int) -> list[Line]:
    """This machine: what it is, how busy, what it does."""
    node = picture.node
    if node is None:
        return [rule("This machine", width), [("reading…", "dim")]]
    gauge = max(10, min(30, width - 52))
    memory = node.memory_used_bytes / max(1, node.memory_total_bytes)
    rows: list[Line] = [
        [
            ("cpu     ", "dim"),
            (bar(node.cpu_percent / 100, gauge), "accent"),
            (f" {node.cpu_percent:3.0f}%", "bold"),
            (f"  load {node.load_1m:.2f} on {node.cores} cores", ""),
        ],
        [
            ("memory  ", "dim"),
            (bar(memory, gauge), "accent"),
            (f" {memory:4.0%}", "bold"),
            (f"  {bytes_text(node.memory_used_bytes)} of {bytes_text(node.memory_total_bytes)}", ""),
        ],
    ]
    facts = pairs(
        [
            ("host", node.host),
            ("chip", one_line(node.chip)),
            ("system", one_line(node.system)),
            ("disk free", bytes_text(node.disk_free_bytes) + " on the workspace's disk"),
            ("twin", f"{node.twin}, accelerator {node.accelerator}"),
            ("python", node.python),
        ]
    )
    head: Line = [
        mark("ok"),
        (" ready   ", "good"),
        (one_line(node.name), "bold"),
        (f"   {local_abilities(picture.cluster)}", "dim"),
    ]
    return [cut_line(line, width) for line in [rule("This machine", width), head, [], *rows, [], *facts]]


def engine_lines(picture: Picture, width: int) -> list[Line]:
    """Whether the workspace's engine process lives."""
    lines: list[Line] = [rule("Engine", width)]
    if picture.engine_lives:
        lines.append([mark("ok"), (f" running, process {picture.engine_pid}, version {picture.engine_version}", "")])
        if picture.engine_started_at is not None:
            age = duration_text(picture.now - picture.engine_started_at)
            lines.append([(f"   since {day_and_clock(picture.engine_started_at)} ({age})", "dim")])
        lines.append([("   it goes on when this console is closed", "dim")])
    else:
        lines.append([mark("none"), (" not running; the next command starts it", "dim")])
    return [cut_line(line, width) for line in lines]


def configured_nodes(cluster: dict[str, object] | None) -> list[dict[str, Any]]:
    """The nodes that cluster.yaml names, in its order; each with `local` and `abilities` added by the bridge."""
    found = (cluster or {}).get("nodes")
    return [node for node in found if isinstance(node, dict)] if isinstance(found, (list, tuple)) else []


def local_abilities(cluster: dict[str, object] | None) -> str:
    """What this machine may do, in words."""
    if cluster is None:
        return "roles unknown: config/cluster.yaml is not accepted"
    mine = next((node for node in configured_nodes(cluster) if node.get("local")), None)
    if mine is None:
        return "not listed in config/cluster.yaml, so it may do nothing"
    return ", ".join(mine.get("abilities", ())) or "may do nothing"


def cluster_lines(picture: Picture, width: int) -> list[Line]:
    """What cluster.yaml says, honestly: nodes that this version does not use are marked so."""
    lines: list[Line] = [rule("config/cluster.yaml", width)]
    if picture.cluster_problems:
        for problem in picture.cluster_problems:
            lines += [
                [mark("bad"), (" ", ""), *first] if i == 0 else [("   ", ""), *first]
                for i, first in enumerate(wrap(problem, width - 3))
            ]
        return lines
    if picture.cluster is None:
        return [*lines, [("reading…", "dim")]]
    for node in configured_nodes(picture.cluster):
        host = one_line(str(node.get("host", "")))
        name = one_line(str(node.get("name") or host))
        used = bool(node.get("local"))
        lines.append(
            [
                mark("ok" if used else "none"),
                (f" {pad(name, 18)}", "bold"),
                (f"{pad(host, 20)} {pad(node.get('role', ''), 10)} ", ""),
                ("this machine" if used else "not used by this version", "dim" if used else "warn"),
            ]
        )
    others = {
        k: v
        for k, v in (picture.cluster or {}).items()
        if k not in ("nodes", "schema") and v not in (None, "", (), [], {})
    }
    lines += [[], *pairs([(key, one_line(_value(value))) for key, value in others.items()])]
    return [cut_line(line, width) for line in lines]


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items() if v is not None)
    return ", ".join(map(_value, value)) if isinstance(value, (list, tuple)) else str(value)
