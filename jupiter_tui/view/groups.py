"""Groups of nodes: how they are wired, how they would be launched and why, and what stands in the way."""

from __future__ import annotations

import shlex

from jupiter_engine.protocol.fleet import Fix, FleetPicture, GroupPlan
from jupiter_tui.view.text import Line, cut_line, mark, one_line, wrap
from jupiter_tui.view.topology import plan_lines

ALONE = "No group: this machine trains alone. Two nodes or more that may train with one framework make a group."


def group_lines(fleet: FleetPicture, width: int) -> list[Line]:
    """Every group of the fleet, and which of them train apart."""
    lines: list[Line] = [*wrap(one_line(fleet.islands), width, "bold")] if fleet.islands else []
    if not fleet.groups:
        return lines or wrap(ALONE, width, "dim")
    for plan in fleet.groups:
        lines += [[], *_group(plan, width)] if lines else _group(plan, width)
    return [cut_line(line, width) for line in lines]


def _group(plan: GroupPlan, width: int) -> list[Line]:
    head, *drawing = plan_lines(plan, max(20, width - 3))
    lines: list[Line] = [[mark("bad" if plan.problems else "ok"), (f" {head}", "bold")]]
    if plan.reason:
        lines += _indented(plan.reason, width, "")
    for problem in plan.problems:
        lines += _indented(f"!! {problem}", width, "bad")
    lines += [[("   ", ""), (line, "accent")] for line in drawing]
    if plan.setup and not plan.problems:
        lines += _indented("before the first launch:", width, "dim")
        lines += [line for fix in plan.setup for line in _indented(setup_text(fix), width, "")]
    return lines


def setup_text(fix: Fix) -> str:
    """`on studio: sudo networksetup ...`, or the sentence for what only a person can do."""
    where = f"on {fix.node}: " if fix.node else ""
    return one_line(where + (shlex.join(fix.argv) if fix.argv else fix.text))


def _indented(text: str, width: int, style: str) -> list[Line]:
    return [[("   ", ""), *piece] for piece in wrap(one_line(text), max(8, width - 3), style)]


def groups_title(fleet: FleetPicture) -> str:
    """`Groups  2  1 cannot be launched`."""
    broken = sum(bool(plan.problems) for plan in fleet.groups)
    text = f"Groups  {len(fleet.groups)}" if fleet.groups else "Groups"
    return f"{text}  {broken} cannot be launched" if broken else text
