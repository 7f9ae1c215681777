"""What a check is, how its verdicts become findings, and the words that all checks use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from jupiter_engine.cluster.doctor.evidence import Evidence
from jupiter_engine.errors import JupiterError
from jupiter_engine.protocol.fleet import Finding, Fix, NodeFacts, Severity
from jupiter_engine.units import plain_text

NAMES_SHOWN: Final = 4
_ORDER: Final[Mapping[Severity, int]] = {"fail": 0, "warn": 1, "info": 2, "ok": 3}


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One result of a check, before it is signed with the check's slug."""

    severity: Severity
    nodes: tuple[str, ...]
    text: str
    fix: Fix | None = None


class Unread(Exception):
    """A node did not tell what the check needs; the message says what is missing."""


Judge = Callable[[Evidence], Iterable[Verdict]]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A check. It yields nothing where it does not apply, and an `ok` where it looked and all is well."""

    slug: str
    title: str
    judge: Judge


class Theme:
    """The checks of one module, in the order of their definition."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def check(self, slug: str, title: str) -> Callable[[Judge], Judge]:
        def add(judge: Judge) -> Judge:
            self.checks.append(Check(slug=slug, title=title, judge=judge))
            return judge

        return add


def examine_with(checks: Sequence[Check], evidence: Evidence) -> tuple[Finding, ...]:
    """Findings of the given checks, worst first; those of equal severity in the order of the checks."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings.extend(_sign(check, verdict) for verdict in check.judge(evidence))
        except JupiterError as error:
            # A tool of some node printed what no reader understands: that is a finding, too.
            text = f"{check.title} could not be judged: {plain_text(error.detail)}."
            findings.append(Finding(check=check.slug, severity="info", nodes=(), text=text, fix=None))
    return tuple(sorted(findings, key=lambda finding: _ORDER[finding.severity]))


def _sign(check: Check, verdict: Verdict) -> Finding:
    return Finding(
        check=check.slug,
        severity=verdict.severity,
        nodes=verdict.nodes,
        text=" ".join(plain_text(verdict.text).split()),
        fix=verdict.fix,
    )


# -- words ---------------------------------------------------------------------------------------------
def ok(nodes: Iterable[str], text: str) -> Verdict:
    return Verdict(severity="ok", nodes=tuple(nodes), text=text)


def info(nodes: Iterable[str], text: str, fix: Fix | None = None) -> Verdict:
    return Verdict(severity="info", nodes=tuple(nodes), text=text, fix=fix)


def warn(nodes: Iterable[str], text: str, fix: Fix | None = None) -> Verdict:
    return Verdict(severity="warn", nodes=tuple(nodes), text=text, fix=fix)


def fail(nodes: Iterable[str], text: str, fix: Fix | None = None) -> Verdict:
    return Verdict(severity="fail", nodes=tuple(nodes), text=text, fix=fix)


def person(text: str) -> Fix:
    """A fix that only a person can make."""
    return Fix(text=text)


def command(text: str, *argv: str, node: str, safe: bool = False) -> Fix:
    """A fix that is a command on a node."""
    return Fix(text=text, argv=argv, node=node, safe=safe)


def names(nodes: Iterable[str]) -> str:
    """'a, b and c'; more than NAMES_SHOWN are counted."""
    listed = list(nodes)
    if len(listed) > NAMES_SHOWN:
        return f"{', '.join(listed[: NAMES_SHOWN - 1])} and {len(listed) - NAMES_SHOWN + 1} more"
    return " and ".join([", ".join(listed[:-1]), listed[-1]]) if len(listed) > 1 else "".join(listed)


def each(
    nodes: Mapping[str, NodeFacts], judge: Callable[[str, NodeFacts], Verdict | None], *, good: str
) -> Iterator[Verdict]:
    """Judge every node: its verdict, or None where all is well; `good` is the sentence's beginning for those.

    Nodes for which `judge` raises Unread are named in one `info`.
    """
    fine: list[str] = []
    unread: dict[str, list[str]] = {}
    for name, facts in nodes.items():
        try:
            verdict = judge(name, facts)
        except (Unread, JupiterError) as error:
            text = error.detail if isinstance(error, JupiterError) else str(error)
            unread.setdefault(text, []).append(name)
            continue
        if verdict is None:
            fine.append(name)
        else:
            yield verdict
    if fine:
        yield ok(fine, f"{good} on {names(fine)}.")
    for text, where in unread.items():
        yield info(where, f"Not known on {names(where)}: {text}.")


def by_value(nodes: Mapping[str, NodeFacts], value: Callable[[NodeFacts], str | None]) -> dict[str, list[str]]:
    """Names of the nodes by what they have; nodes without a value are left out."""
    found: dict[str, list[str]] = {}
    for name, facts in nodes.items():
        has = value(facts)
        if has:
            found.setdefault(has, []).append(name)
    return found


def spread(found: Mapping[str, Sequence[str]]) -> str:
    """'0.32.1 on a, 0.32.4 on b and c'."""
    return ", ".join(f"{value} on {names(nodes)}" for value, nodes in sorted(found.items()))
