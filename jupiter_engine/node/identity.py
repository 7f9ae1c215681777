"""Processes by identity: pid, start time and boot. A pid alone may long belong to somebody else.

A process is a plain dictionary that can be stored as JSON:
    {"pid": 4711, "started_at": 1700000000.25, "mark": "8812345", "boot_id": "..."}
`started_at` is in seconds since the epoch and good for people and for comparison with what psutil says; `mark` is the
start time exactly as the system gives it (Linux: clock ticks since boot, which no change of the clock moves).
Identities without a mark, written by others, are compared by `started_at` to the second.
"""

from __future__ import annotations

import calendar
import os
import signal
import subprocess
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

LINUX = os.uname().sysname == "Linux"

START_TOLERANCE_S = 1.0
"""Two readings of a start time in seconds may differ by a tick, and on macOS they are whole seconds."""

DEAD = frozenset("ZX")
"""States of a process that runs no more: only its exit status is still to be collected."""


class Row(NamedTuple):
    """One process as the system lists it."""

    pid: int
    parent: int
    session: int
    """Leader of its session; on macOS of its process group, which is what the system tells there."""
    state: str
    """R, S, D, T, Z: one letter, as ps gives it."""
    started_at: float
    mark: str

    def identity(self) -> dict[str, Any]:
        """As it is stored."""
        return {"pid": self.pid, "started_at": self.started_at, "mark": self.mark, "boot_id": boot_id()}


@lru_cache(maxsize=1)
def boot_id() -> str:
    """Changes with every boot of this machine."""
    if LINUX:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    # Not kern.boottime where it can be helped: that one moves when the clock is set.
    for name in ("kern.bootsessionuuid", "kern.boottime"):
        answer = subprocess.run(["/usr/sbin/sysctl", "-n", name], stdout=subprocess.PIPE, check=False)
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.decode("ascii", "replace").strip()
    raise OSError("this system does not say when it was booted")


@lru_cache(maxsize=1)
def _linux_clock() -> tuple[float, float]:
    """(seconds since the epoch at boot, clock ticks per second)."""
    with Path("/proc/stat").open("rb") as file:
        booted = next(float(line.split()[1]) for line in file if line.startswith(b"btime "))
    return booted, float(os.sysconf("SC_CLK_TCK"))


def _linux_row(pid: int) -> Row | None:
    try:
        file = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except OSError:
        return None
    try:
        content = os.read(file, 4096)
    except OSError:
        # The process ended between the two calls.
        return None
    finally:
        os.close(file)
    # The name in parentheses may itself hold parentheses and blanks.
    fields = content[content.rfind(b")") + 2 :].split()
    booted, per_second = _linux_clock()
    mark = fields[19].decode("ascii")
    return Row(pid, int(fields[1]), int(fields[3]), fields[0].decode("ascii"), booted + int(mark) / per_second, mark)


def _ps_rows(*selection: str) -> list[Row]:
    """Rows of ps, for systems without /proc."""
    argv = ["/bin/ps", *selection, "-o", "pid=,ppid=,pgid=,stat=,lstart="]
    env = {"LC_ALL": "C", "TZ": "UTC0", "PATH": "/bin:/usr/bin"}
    answer = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, check=False)
    rows = []
    for line in answer.stdout.decode("ascii", "replace").splitlines():
        words = line.split(None, 4)
        if len(words) == 5:
            mark = " ".join(words[4].split())
            started_at = calendar.timegm(time.strptime(mark, "%a %b %d %H:%M:%S %Y"))
            state = {"U": "D", "I": "S"}.get(words[3][0], words[3][0])
            rows.append(Row(int(words[0]), int(words[1]), int(words[2]), state, float(started_at), mark))
    return rows


def row(pid: int) -> Row | None:
    """The process with this pid, dead but uncollected ones included; None if there is none."""
    if LINUX:
        return _linux_row(pid)
    return next(iter(_ps_rows("-p", str(pid))), None)


def rows() -> dict[int, Row]:
    """All processes that this machine lists."""
    if LINUX:
        found = (_linux_row(int(name)) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208 - as fast as can be
        return {entry.pid: entry for entry in found if entry is not None}
    return {entry.pid: entry for entry in _ps_rows("-ax")}


def carrying(variable: str) -> list[Row]:
    """Living processes of this user that have an environment variable of this name, wherever they have gone."""
    wanted = variable.encode("ascii") + b"="
    if LINUX:
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and wanted in (folder / "environ").read_bytes():
                    found.append(_linux_row(int(folder.name)))
            except OSError:
                # Ended, or of another user.
                continue
    else:
        argv = ["/bin/ps", "-axwwE", "-o", "pid=,command="]
        answer = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
        found = [row(int(line.split(None, 1)[0])) for line in answer.stdout.splitlines() if b" " + wanted in line]
    return [entry for entry in found if entry is not None and entry.state not in DEAD and entry.pid != os.getpid()]


def of(pid: int) -> dict[str, Any]:
    """Identity of a process that is there. ProcessLookupError if it is not."""
    found = row(pid)
    if found is None:
        raise ProcessLookupError(f"there is no process {pid}")
    return found.identity()


def same(found: Row, identity: dict[str, Any]) -> bool:
    """Whether a listed process is the one that was stored."""
    if found.pid != identity.get("pid") or identity.get("boot_id", boot_id()) != boot_id():
        return False
    if identity.get("mark"):
        return bool(found.mark == identity["mark"])
    return abs(found.started_at - float(identity.get("started_at") or 0.0)) <= START_TOLERANCE_S


def living(identity: dict[str, Any]) -> Row | None:
    """The process that was stored, if it still runs (one that only waits to be collected does not)."""
    found = row(int(identity.get("pid") or 0)) if identity.get("pid") else None
    if found is None or found.state in DEAD or not same(found, identity):
        return None
    return found


def descendants(table: dict[int, Row], ancestors: set[int]) -> set[int]:
    """Pids below these, at any depth."""
    children: dict[int, list[int]] = {}
    for row in table.values():
        children.setdefault(row.parent, []).append(row.pid)
    found: set[int] = set()
    todo = list(ancestors)
    while todo:
        fresh = [pid for pid in children.get(todo.pop(), []) if pid not in found and pid not in ancestors]
        found.update(fresh)
        todo += fresh
    return found


def send(identity: dict[str, Any], number: int) -> bool:
    """Send a signal to exactly this process; False if it has ended or is not ours to signal."""
    if living(identity) is None:
        return False
    try:
        os.kill(int(identity["pid"]), number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def signal_name(number: int) -> str:
    """15 -> TERM."""
    try:
        return signal.Signals(number).name[3:]
    except ValueError:
        return str(number)
