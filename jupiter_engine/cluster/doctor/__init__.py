"""The doctor: what could keep a cluster from working, looked at before hours are spent on it.

`evidence.Evidence` is everything that is known at one moment; a check is a pure function from it to verdicts.
`examine` asks every check. Each slug has a heading in docs/troubleshooting.md.
"""

from __future__ import annotations

from jupiter_engine.cluster.doctor import access, capacity, macos, network, nvidia, power, software, thunderbolt
from jupiter_engine.cluster.doctor.evidence import Edge, Evidence, Former, Login, Problem
from jupiter_engine.cluster.doctor.registry import Check, examine_with
from jupiter_engine.protocol.fleet import Finding

__all__ = ["CHECKS", "Check", "Edge", "Evidence", "Former", "Login", "Problem", "examine", "needed_nodes_fail"]

CHECKS: tuple[Check, ...] = tuple(
    check
    for theme in (access, software, capacity, power, macos, thunderbolt, network, nvidia)
    for check in theme.CHECKS
)
"""Every check, in the order in which a person reads them."""


def examine(evidence: Evidence) -> tuple[Finding, ...]:
    """All findings, worst first within the order of the checks."""
    return examine_with(CHECKS, evidence)


def needed_nodes_fail(findings: tuple[Finding, ...]) -> bool:
    """Whether a node that is needed cannot be used at all."""
    return any(finding.check == "unreachable" and finding.severity == "fail" for finding in findings)
