"""Checks: what only a Mac can have wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from jupiter_engine.cluster.doctor.evidence import Evidence, node_fact, tool_text
from jupiter_engine.cluster.doctor.registry import (
    Theme,
    Unread,
    Verdict,
    by_value,
    command,
    each,
    fail,
    info,
    ok,
    person,
    spread,
    warn,
)
from jupiter_engine.cluster.readers.apple import memory_use
from jupiter_engine.protocol.fleet import NodeFacts
from jupiter_engine.units import GIB, MIB, bytes_text, duration_text

MACOS_NEEDS_BYTES: Final = 3 * GIB
"""What macOS itself must keep: below it the kernel panics (IOGPUMemory.cpp) rather than refuse."""
WIRED_SHARE: Final = 0.4
"""Wired memory of an idle Mac is 2-4 GB; this share of all of it, with nothing of ours running, has leaked."""
CRASHES_COUNT_S: Final = 7 * 86400.0

_theme = Theme()


@_theme.check("macos-build", "The same macOS in a group")
def macos_build(e: Evidence) -> Iterator[Verdict]:
    for plan, facts_of in e.groups():
        macs = {name: facts for name, facts in facts_of.items() if name in e.macs()}
        if len(macs) < 2:
            continue
        found = by_value(macs, lambda facts: facts.os_build or None)
        if len(found) > 1:
            text = f"The Macs of group {plan.name} run different builds of macOS: {spread(found)}."
            fix = person("update all of them to the same build")
            rdma = plan.backend in ("jaccl", "jaccl-ring")
            yield fail(macs, f"{text} RDMA needs equal ones.", fix) if rdma else warn(macs, text, fix)
        elif found:
            yield ok(macs, f"The Macs of group {plan.name} all run macOS build {next(iter(found))}.")


@_theme.check("auto-update", "macOS does not restart by itself")
def auto_update(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        value = tool_text(facts, "update")
        if value is None:
            raise Unread("the update settings could not be read")
        if value.strip() != "1":
            return None
        where = "System Settings > General > Software Update > Automatic Updates"
        return warn(
            (name,),
            f"{name} installs macOS updates by itself and restarts for them.",
            person(f"switch it off: {where}"),
        )

    yield from each(e.macs(), judge, good="macOS does not update itself")


@_theme.check("display-sleep", "The display may sleep")
def display_sleep(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        if not facts.sleep:
            raise Unread("pmset gave no settings")
        if facts.sleep.get("displaysleep") != "0":
            return None
        fix = command(f"let the display of {name} sleep", "sudo", "pmset", "-a", "displaysleep", "10", node=name)
        return warn(
            (name,), f"The display of {name} never sleeps: M5 Max machines were seen to panic under load so.", fix
        )

    m5_max = {name: facts for name, facts in e.macs().items() if "M5 Max" in facts.chip}
    yield from each(m5_max, judge, good="The display goes to sleep")


@_theme.check("wired-limit", "The GPU's memory limit leaves room")
def wired_limit(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        if facts.wired_limit_mb is None:
            raise Unread("iogpu.wired_limit_mb was not told")
        if facts.wired_limit_mb == 0:
            former = e.former.get(name)
            if former is not None and former.wired_limit_mb:
                text = f"iogpu.wired_limit_mb of {name} is back to the default; it was {former.wired_limit_mb} before."
                argv = ("sudo", "sysctl", f"iogpu.wired_limit_mb={former.wired_limit_mb}")
                return info((name,), text, command(f"set it again on {name}", *argv, node=name))
            return None
        left = facts.memory_total_bytes - facts.wired_limit_mb * MIB
        if left < MACOS_NEEDS_BYTES:
            text = f"iogpu.wired_limit_mb of {name} leaves {bytes_text(max(0, left))} for macOS; below"
            fix = command(f"back to the default on {name}", "sudo", "sysctl", "iogpu.wired_limit_mb=0", node=name)
            return fail((name,), f"{text} {bytes_text(MACOS_NEEDS_BYTES)} it panics.", fix)
        text = f"iogpu.wired_limit_mb of {name} is {facts.wired_limit_mb}, which is gone after a restart."
        return info((name,), text)

    yield from each(e.macs(), judge, good="The GPU's memory limit is the system's own")


@_theme.check("leaked-memory", "No memory has leaked")
def leaked_memory(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        statistics = tool_text(facts, "vm_stat")
        if statistics is None:
            raise Unread("vm_stat gave no answer")
        wired = memory_use(statistics).wired_bytes
        running = node_fact(facts, "processes")
        if running or wired < max(6 * GIB, facts.memory_total_bytes * WIRED_SHARE):
            return None
        text = (
            f"{bytes_text(wired)} of {bytes_text(facts.memory_total_bytes)} memory are wired on {name} though nothing"
        )
        return warn((name,), f"{text} of Jupiter runs there: a killed run has leaked it.", person(f"restart {name}"))

    yield from each(e.macs(), judge, good="No memory is held by runs that have ended")


@_theme.check("crash-reports", "No panic lately")
def crash_reports(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        reports = node_fact(facts, "crash_reports")
        if not isinstance(reports, list):
            raise Unread("the crash reports could not be listed")
        recent = [
            report
            for report in reports
            if isinstance(report, dict)
            and isinstance(report.get("at"), int | float)
            and 0 <= e.at - report["at"] < CRASHES_COUNT_S
        ]
        if not recent:
            return None
        kind = "ran out of memory" if str(recent[0].get("name", "")).startswith("JetsamEvent") else "panicked"
        ago = duration_text(e.at - recent[0]["at"])
        text = f"{name} has {len(recent)} report(s) of the last 7 days; {ago} ago it {kind}."
        return warn((name,), text, person(f"read {recent[0].get('name')} in /Library/Logs/DiagnosticReports on {name}"))

    yield from each(e.macs(), judge, good="No panic or memory shortage in the last 7 days")


CHECKS: Final = tuple(_theme.checks)
