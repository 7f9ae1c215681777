"""Checks: getting to a node and staying there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Final

from jupiter_engine.cluster.doctor.evidence import Evidence, node_fact, tool_text
from jupiter_engine.cluster.doctor.registry import (
    Theme,
    Unread,
    Verdict,
    command,
    each,
    fail,
    info,
    names,
    ok,
    person,
    warn,
)
from jupiter_engine.protocol.fleet import NodeFacts
from jupiter_engine.units import duration_text

CLOCK_WARN_S: Final = 2.0
"""Facts of several nodes are put in one order by their clocks."""
CLOCK_FAIL_S: Final = 30.0
"""Half of a lease: beyond it a node that lives looks lost."""
ODD_SHELLS: Final = frozenset({"fish", "csh", "tcsh", "nu", "xonsh", "pwsh", "elvish"})
NO_SHELLS: Final = frozenset({"nologin", "false"})

_theme = Theme()


@_theme.check("unreachable", "Every node answers")
def unreachable(e: Evidence) -> Iterator[Verdict]:
    for name, problem in e.problems.items():
        fix = person(problem.fix) if problem.fix else None
        text = f"{name} cannot be used: {problem.text.removeprefix(f'{name}: ').rstrip('.')}."
        yield fail((name,), text, fix) if e.needed(name) else warn((name,), text, fix)
    if e.facts:
        yield ok(e.facts, f"{len(e.facts)} of {len(e.facts) + len(e.problems)} nodes answer.")


@_theme.check("login-shell", "The login shell runs commands")
def login_shell(e: Evidence) -> Iterator[Verdict]:
    by_mlx_launch = {name for plan in e.plans if plan.launcher == "mlx.launch" for name in plan.nodes}

    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        path = node_fact(facts, "shell")
        if not isinstance(path, str) or not path:
            raise Unread("the account has no shell entry")
        shell = PurePosixPath(path).name
        if shell in ODD_SHELLS or shell in NO_SHELLS:
            text = f"The login shell on {name} is {shell}, which does not read commands as sh does."
            return warn((name,), text, person(f"on {name}: chsh -s /bin/bash (or /bin/zsh)"))
        if name in by_mlx_launch and shell not in ("bash", "zsh"):
            text = f"The login shell on {name} is {shell}; the script that mlx.launch sends needs bash or zsh."
            return warn((name,), text, person(f"on {name}: chsh -s /bin/bash; or `launcher: direct`"))
        return None

    yield from each(e.remote(), judge, good="The login shell is one that ssh commands can use")


@_theme.check("login-output", "Logging in prints nothing of its own")
def login_output(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        printed = node_fact(facts, "shell_noise")
        if not isinstance(printed, str):
            raise Unread("its shell did not start in time")
        if not printed.strip():
            return None
        first = " ".join(printed.split())[:60]
        text = f"Every ssh command on {name} prints {len(printed)} characters of its own: {first!r}."
        fix = person("print in ~/.bashrc, ~/.zshenv and the like only if the shell is interactive")
        return warn((name,), text, fix)

    yield from each(e.remote(), judge, good="Commands over ssh print nothing of their own")


@_theme.check("clock-skew", "Clocks agree")
def clock_skew(e: Evidence) -> Iterator[Verdict]:
    known = {name: facts.clock_skew_s for name, facts in e.remote().items() if facts.clock_skew_s is not None}
    good = []
    for name, skew in known.items():
        if abs(skew) <= CLOCK_WARN_S:
            good.append(name)
            continue
        direction = "ahead of" if skew > 0 else "behind"
        mac = name in e.macs()
        argv = ("sudo", "sntp", "-sS", "time.apple.com") if mac else ("sudo", "timedatectl", "set-ntp", "true")
        fix = command(f"set the clock of {name} by a time server", *argv, node=name)
        text = f"The clock of {name} is {abs(skew):.1f} s {direction} this machine's (fine: {CLOCK_WARN_S:.0f} s)."
        yield fail((name,), text, fix) if abs(skew) > CLOCK_FAIL_S else warn((name,), text, fix)
    if good:
        largest = max(abs(known[name]) for name in good)
        yield ok(good, f"The clocks of {names(good)} are within {max(largest, 0.01):.2f} s of this machine's.")


@_theme.check("reboot", "Nodes are up since the last look")
def reboot(e: Evidence) -> Iterator[Verdict]:
    seen = {name: facts for name, facts in e.facts.items() if name in e.former and facts.boot_id}
    same = []
    for name, facts in seen.items():
        former = e.former[name]
        if facts.boot_id == former.boot_id:
            same.append(name)
            continue
        ago = duration_text(max(0.0, e.at - former.at))
        text = f"{name} was started anew since the last look {ago} ago: addresses set by ifconfig"
        text += " and the wired limit are back to the system's own." if name in e.macs() else " or ip are gone."
        fix = person("look at what else the doctor says about it, and set up the group's addresses again")
        yield info((name,), text, fix)
    if same:
        yield ok(same, f"{names(same)} ran without a restart since the last look.")


@_theme.check("linger", "Processes stay when the session ends")
def linger(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        if node_fact(facts, "linger_file") or "Linger=yes" in (tool_text(facts, "linger") or ""):
            return None
        if node_fact(facts, "user") == "root":
            return None
        text = f"systemd on {name} may end Jupiter's processes once you log out: lingering is off."
        argv = ("loginctl", "enable-linger")
        return warn((name,), text, command(f"let them stay on {name}", *argv, node=name, safe=True))

    with_systemd = {name: facts for name, facts in e.linuxes().items() if node_fact(facts, "systemd")}
    yield from each(with_systemd, judge, good="Processes stay after logging out")


CHECKS: Final = tuple(_theme.checks)
