"""doctor."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence

from jupiter_engine.api import Workspace
from jupiter_engine.cli.output import open_workspace, print_json
from jupiter_engine.cluster.doctor import CHECKS, needed_nodes_fail
from jupiter_engine.cluster.fleet import Fleet
from jupiter_engine.errors import ExitCode, UsageError
from jupiter_engine.protocol.fleet import Finding, Fix
from jupiter_engine.settings.cluster import ClusterSettings, node_by_name
from jupiter_engine.settings.reader import nearest
from jupiter_engine.units import plain_text

MARKS = {"ok": "ok", "info": "..", "warn": "..", "fail": "!!"}
TITLES = {
    "fail": "cannot work until it is mended",
    "warn": "works worse, or may break",
    "info": "good to know",
    "ok": "looked at and well",
}


def doctor(options: argparse.Namespace) -> int:
    workspace = open_workspace(options)
    cluster = workspace.cluster().value
    names = [node_by_name(cluster, name).title() for name in options.node or ()]
    if options.fix is not None:
        _known(options.fix)
    return asyncio.run(_examine(workspace, cluster, names, options))


async def _examine(
    workspace: Workspace, cluster: ClusterSettings, names: Sequence[str], options: argparse.Namespace
) -> int:
    fleet = Fleet(cluster, workspace.root)
    async with fleet.opened():
        with _progress() as say:
            findings = await fleet.examine(names=names or None, progress=say)
        if options.fix is not None:
            return await _mend(fleet, findings, options)
    if options.json:
        print_json(findings)
    else:
        _print(findings)
    return _exit_code(findings)


def _exit_code(findings: Sequence[Finding]) -> int:
    if needed_nodes_fail(tuple(findings)):
        return ExitCode.NO_NODE
    return ExitCode.STAGE_FAILED if any(one.severity == "fail" for one in findings) else ExitCode.DONE


def _known(slug: str) -> None:
    slugs = [check.slug for check in CHECKS]
    if slug not in slugs:
        guess = nearest(slug, slugs)
        hint = f"did you mean {guess}?" if guess else "the first column of `jupiter doctor` names them"
        raise UsageError(f"there is no check {slug!r}", fix=hint)


def _print(findings: Sequence[Finding]) -> None:
    width = max((len(one.check) for one in findings), default=0)
    for severity, title in TITLES.items():
        group = [one for one in findings if one.severity == severity]
        if not group:
            continue
        print(f"{title}:")
        for one in group:
            print(plain_text(f"{MARKS[severity]} {one.check.ljust(width)}  {one.text}"))
            if one.fix is not None:
                print(plain_text(f"{' ' * (width + 5)}-> {fix_text(one.fix)}"))
    counts = {severity: sum(one.severity == severity for one in findings) for severity in TITLES}
    print(
        f"{counts['fail']} to mend, {counts['warn']} warnings, {counts['info']} notes, {counts['ok']} fine; "
        "docs/troubleshooting.md explains each by its name"
    )


def fix_text(fix: Fix) -> str:
    """The fix as one line: what for, and the command to type."""
    if not fix.argv:
        return fix.text
    return f"{fix.text}: {'on ' + fix.node + ': ' if fix.node else ''}{shlex.join(fix.argv)}"


async def _mend(fleet: Fleet, findings: Sequence[Finding], options: argparse.Namespace) -> int:
    """Carry out the safe fixes of one check, each shown first."""
    mine = [one for one in findings if one.check == options.fix and one.severity != "ok"]
    safe = [one.fix for one in mine if one.fix is not None and one.fix.safe]
    done = []
    for one in mine:
        if not options.json:
            print(plain_text(f"{MARKS[one.severity]} {one.check}: {one.text}"))
    for fix in safe:
        if not options.json:
            print(plain_text(f"-> {fix_text(fix)}"))
        said = await fleet.apply(fix)
        done.append({"fix": fix, "output": said})
        if said and not options.json:
            print(said)
    left = [one for one in mine if one.fix is None or not one.fix.safe]
    if options.json:
        print_json({"done": done, "left": left})
    elif not mine:
        print(f"ok {options.fix}: there is nothing to mend")
    for one in left if not options.json else ():
        print(plain_text(f"a person has to: {fix_text(one.fix) if one.fix is not None else one.text}"))
    return ExitCode.STAGE_FAILED if left else ExitCode.DONE


class _Line:
    """One line on stderr that is written over while something is done; nothing where nobody watches."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._length = 0

    def __call__(self, text: str) -> None:
        if self._shown:
            line = plain_text(text)[:78]
            print(f"\r{line.ljust(self._length)}", end="", file=sys.stderr, flush=True)
            self._length = len(line)

    def clear(self) -> None:
        if self._length:
            print(f"\r{' ' * self._length}\r", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _progress() -> Iterator[_Line]:
    line = _Line()
    try:
        yield line
    finally:
        line.clear()
