"""Ending a kept process together with everything it started: SIGTERM, a grace, SIGKILL, and a look for the rest."""

from __future__ import annotations

import signal
import time
from typing import Any

from . import identity
from .identity import Row

UNKILLABLE_AFTER_S = 10.0
"""A process that outlives SIGKILL for so long hangs in a driver; waiting longer helps nobody."""


def members(
    table: dict[int, Row], report: dict[str, Any], known: list[dict[str, Any]], hold: dict[str, Any]
) -> list[Row]:
    """Living processes that belong to a kept process, itself first.

    Those are: it, whatever is in its session, whatever descends from it or from its `hold` (which adopts orphans where
    the system lets it), and `known`: descendants recorded while their parents still lived, with all below them.
    """
    found: dict[int, Row] = {}
    roots = [entry for entry in [report, *known] if entry.get("pid")]
    for entry in roots:
        row = table.get(int(entry["pid"]))
        if row is not None and identity.same(row, entry):
            found[row.pid] = row
    leader = int(report.get("session") or 0)
    owner = table.get(leader)
    if leader and report.get("boot_id") == identity.boot_id() and (owner is None or identity.same(owner, report)):
        # The number of a session is not given out again while anybody is in it; if its leader is another process
        # now, the session we knew is gone.
        found.update({row.pid: row for row in table.values() if row.session == leader})
    ancestors = set(found)
    holder = table.get(int(hold.get("pid") or 0))
    if holder is not None and identity.same(holder, hold):
        ancestors.add(holder.pid)
    for pid in identity.descendants(table, ancestors):
        found[pid] = table[pid]
    if holder is not None:
        found.pop(holder.pid, None)
    return [row for row in found.values() if row.state not in identity.DEAD]


class Ending:
    """The end of one process and all its members, step by step, so that its owner can go on watching."""

    def __init__(self, cause: str, grace_s: float, *, patience_s: float = 0.0) -> None:
        """`cause` is the id of a command, `lease` or `rest`; `grace_s` lies between SIGTERM and SIGKILL, and
        `patience_s` before SIGTERM."""
        self.cause = cause
        self.killed = False
        """Whether SIGKILL was needed."""
        self.ended: list[int] = []
        """Pids that were told to end."""
        self.stuck: list[int] = []
        """Pids that not even SIGKILL has ended."""
        self._tell_at = time.monotonic() + patience_s
        self._kill_at = self._tell_at + grace_s
        self._told: set[tuple[int, str]] = set()

    def hasten(self, grace_s: float) -> None:
        """SIGKILL no later than `grace_s` from now."""
        self._kill_at = min(self._kill_at, time.monotonic() + grace_s)

    def step(self, living: list[Row]) -> bool:
        """Do what is due to the members that live now; True when there is nothing left to do."""
        now = time.monotonic()
        if not living:
            return True
        if now >= self._kill_at + UNKILLABLE_AFTER_S:
            self.stuck = sorted(row.pid for row in living)
            return True
        if now < self._tell_at:
            return False
        for row in living:
            if (row.pid, row.mark) not in self._told:
                self._told.add((row.pid, row.mark))
                self.ended.append(row.pid)
                identity.send(row.identity(), signal.SIGTERM)
                if row.state in "Tt":
                    # A stopped process cannot end well before it runs again.
                    identity.send(row.identity(), signal.SIGCONT)
        if now >= self._kill_at:
            self.killed = True
            for row in living:
                identity.send(row.identity(), signal.SIGKILL)
        return False
