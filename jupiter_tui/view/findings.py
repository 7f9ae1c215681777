"""What the doctor found, gravest first; what is well is one line until somebody wants to see it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from jupiter_engine.protocol.fleet import Finding, Fix, FleetPicture
from jupiter_engine.units import duration_text
from jupiter_tui.view.text import MARKS, Line, Span, clean, cut, cut_line, one_line, wrap

_MARKS: Final[dict[str, Span]] = {
    "fail": MARKS["bad"],
    "warn": ("**", "warn"),
    "info": ("..", "accent"),
    "ok": MARKS["ok"],
}
NOT_YET: Final = "The doctor has not looked yet: d lets it look at all nodes and what lies between them."


@dataclass(frozen=True)
class Listed:
    """Lines of a list of findings and where each shown finding begins."""

    lines: list[Line]
    shown: tuple[Finding, ...]
    starts: tuple[int, ...]


def command_of(fix: Fix) -> str:
    """What a person would type for a fix, on one line; empty if there is no command."""
    return one_line(shlex.join(fix.argv)) if fix.argv else ""


def copied_command(fix: Fix) -> str:
    """The command exactly, over several lines if it has them, without what could drive a terminal."""
    return clean(shlex.join(fix.argv)) if fix.argv else ""


def shown_findings(findings: Sequence[Finding], *, folded: bool) -> tuple[Finding, ...]:
    """Those that are shown; folded: without what is well."""
    return tuple(one for one in findings if not (folded and one.severity == "ok"))


def finding_lines(finding: Finding, width: int, *, chosen: bool = False, fix_key: str = "") -> list[Line]:
    """Mark, check, nodes; the sentence; what mends it and the command."""
    nodes = one_line(", ".join(finding.nodes[:6]) + (f" and {len(finding.nodes) - 6} more" * (len(finding.nodes) > 6)))
    head: Line = [
        ("> " if chosen else "  ", "title"),
        _MARKS[finding.severity],
        (f" {one_line(finding.check)}", "bold"),
        (f"  {nodes}", "dim"),
    ]
    if finding.severity == "ok":
        return [
            cut_line(
                [head[0], head[1], (f" {one_line(finding.check)}", ""), (f"  {one_line(finding.text)}", "dim")], width
            )
        ]
    lines = [cut_line(head, width), *_indented(finding.text, width, "")]
    if finding.fix is not None:
        lines += _indented(f"-> {one_line(finding.fix.text)}", width, "accent")
        command = command_of(finding.fix)
        if command:
            where = f"on {one_line(finding.fix.node)}: " if finding.fix.node else ""
            key = f"   [{fix_key}]" if chosen and fix_key and finding.fix.safe else ""
            lines.append(
                [("     ", ""), (cut(f"$ {where}{command}", max(8, width - 5 - len(key))), ""), (key, "title")]
            )
    return lines


def _indented(text: str, width: int, style: str) -> list[Line]:
    return [[("     ", ""), *piece] for piece in wrap(one_line(text), max(8, width - 5), style)]


def list_findings(fleet: FleetPicture, width: int, chosen: int, *, folded: bool) -> Listed:
    """All of them. `chosen` counts among those shown."""
    if not fleet.findings_at:
        return Listed(wrap(NOT_YET, width, "dim"), (), ())
    shown = shown_findings(fleet.findings, folded=folded)
    lines: list[Line] = []
    starts: list[int] = []
    for number, finding in enumerate(shown):
        starts.append(len(lines))
        lines += finding_lines(finding, width, chosen=number == chosen, fix_key="f does it")
    well = sum(one.severity == "ok" for one in fleet.findings)
    if folded and well:
        words = "1 check is well" if well == 1 else f"{well} checks are well"
        lines.append([("  ", ""), _MARKS["ok"], (f" {words}", ""), ("  (o shows what is well)", "dim")])
    return Listed(lines, shown, tuple(starts))


def doctor_title(fleet: FleetPicture, now: float) -> str:
    """`Doctor  2 to mend, 1 warning  3m12s ago`."""
    if not fleet.findings_at:
        return "Doctor"
    fails = sum(one.severity == "fail" for one in fleet.findings)
    warns = sum(one.severity == "warn" for one in fleet.findings)
    found = [f"{fails} to mend"] if fails else []
    found += [f"{warns} warning{'s' * (warns != 1)}"] if warns else []
    age = duration_text(max(0.0, now - fleet.findings_at))
    return f"Doctor  {', '.join(found) or 'all is well'}  {age} ago"
