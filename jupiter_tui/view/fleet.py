"""The Fleet page's smaller text: the engine process, the cluster file, what is under way."""

from __future__ import annotations

from typing import Any

from jupiter_engine.units import bytes_text, duration_text
from jupiter_tui.view.picture import Picture
from jupiter_tui.view.text import Line, cut_line, day_and_clock, mark, one_line, pairs, rule, wrap


def engine_lines(picture: Picture, width: int) -> list[Line]:
    """Whether the workspace's engine process lives, what it sends to nodes, and the rest of the cluster file."""
    lines: list[Line] = []
    if picture.engine_lives:
        lines.append([mark("ok"), (f" running, process {picture.engine_pid}, version {picture.engine_version}", "")])
        if picture.engine_started_at is not None:
            age = duration_text(picture.now - picture.engine_started_at)
            lines.append([(f"   since {day_and_clock(picture.engine_started_at)} ({age})", "dim")])
        lines.append([("   it goes on when this console is closed", "dim")])
    else:
        lines.append([mark("none"), (" not running; the next command starts it", "dim")])
    lines += sending_lines(picture, width)
    others = _others(picture.cluster)
    if others:
        lines += [[], rule("config/cluster.yaml", width), *pairs(others)]
    return [cut_line(line, width) for line in lines]


def sending_lines(picture: Picture, width: int) -> list[Line]:
    """What the engine is sending to or fetching from nodes for the running stage."""
    progress, cycle = picture.progress, picture.cycle
    if progress is None or cycle is None or progress.unit != "bytes":
        return []
    stage = cycle.current_stage()
    text = f"{stage.stage if stage else 'a stage'}: {bytes_text(progress.done)} of {bytes_text(progress.total)}"
    if progress.rate_per_s:
        text += f", {bytes_text(progress.rate_per_s)}/s"
    if progress.eta_s is not None:
        text += f", ETA {duration_text(progress.eta_s)}"
    lines: list[Line] = [[mark("run"), (f" {text}", "")]]
    return lines + (wrap(one_line(progress.note), width, "dim", indent="   ") if progress.note else [])


def configured_nodes(cluster: dict[str, object] | None) -> list[dict[str, Any]]:
    """The nodes that cluster.yaml names, in its order; each with `local` and `abilities` added by the bridge."""
    found = (cluster or {}).get("nodes")
    return [node for node in found if isinstance(node, dict)] if isinstance(found, (list, tuple)) else []


def abilities(cluster: dict[str, object] | None, name: str) -> str:
    """What a node may do, in words; empty for one that the file does not name."""
    for node in configured_nodes(cluster):
        if (node.get("name") or node.get("host")) == name:
            return ", ".join(node.get("abilities", ())) or "may do nothing"
    return ""


def no_nodes_lines(picture: Picture, width: int) -> list[Line]:
    """What stands where the table of nodes would be: why there is none."""
    problems = picture.cluster_problems or ((picture.fleet_problem,) if picture.fleet_problem else ())
    if not problems:
        return [[("  reading config/cluster.yaml…", "dim")]]
    lines: list[Line] = [[mark("bad"), (" config/cluster.yaml is not accepted:", "bad")]]
    return lines + [line for problem in problems for line in wrap(one_line(problem), width, "", indent="   ")]


def doing_line(picture: Picture, width: int) -> Line:
    """What is being done with machines at the moment."""
    return cut_line([(" ", ""), mark("run"), (f" {one_line(', '.join(picture.fleet_doing))}", "accent")], width)


def _others(cluster: dict[str, object] | None) -> list[tuple[str, str]]:
    hidden = ("nodes", "schema", "groups")
    found = {key: value for key, value in (cluster or {}).items() if key not in hidden}
    return [(key, one_line(_value(value))) for key, value in found.items() if value not in (None, "", (), [], {})]


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items() if v is not None)
    return ", ".join(map(_value, value)) if isinstance(value, (list, tuple)) else str(value)
