"""The detached node runner of one keep folder (verb `keep-run`): starts, adopts, watches and ends its processes.

All it knows is on the disk: what `hold` writes about each process, events.jsonl, and the commands in inbox/. It may be
killed at any moment; the next one goes on from there, and nothing is started, told or reported twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from . import identity, program
from .commands import Inbox
from .ending import Ending, members
from .errors import NodeError
from .event_log import EventLog
from .files import NO_ROOM, complain, read_json, write_all, write_atomic, write_json
from .keep_folder import KeepFolder, shown

TICK_S = 0.2 if identity.LINUX else 1.0
"""Between two looks. Without /proc each look at a process starts a `ps`."""
BEAT_S = 2.0
SCAN_S = 2.0
SCAN_SHARE = 0.002
"""Looking for descendants may take this share of one core; with many processes it happens less often."""
LEASE_TICK_S = 2.0
"""A pause of ours (a stopped virtual machine) counts at most so much towards a lease that nobody renews."""
REST_S = 2.0
"""What a process leaves behind may end by itself for so long before it is told to."""
STUCK_AGAIN_S = 60.0
"""Processes that SIGKILL did not end are tried again so often."""
STARTS = 3
"""How often a `hold` that dies before it has begun is started again."""


def main(arguments: list[str]) -> int:
    """keep-run FOLDER: be the runner of this folder until all its processes have ended; 0 if another one is."""
    folder = KeepFolder(Path(arguments[0]))
    folder.order()
    lock = os.open(folder.path / "lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return 0
    for number in (signal.SIGHUP, signal.SIGINT):
        # Not SIG_IGN: that would be inherited by everything we start.
        signal.signal(number, lambda *_: None)
    Keeper(folder).run()
    return 0


class Kept:
    """What the runner remembers of one process between two looks at it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.report: dict[str, Any] = {"state": "waiting"}
        self.record: dict[str, Any] = {}
        """NAME.pid.json of the present process."""
        self.known: list[dict[str, Any]] = []
        """Descendants seen while their parents lived."""
        self.ending: Ending | None = None
        self.swept = False
        """Nothing of it is left."""
        self.holds: list[subprocess.Popen[bytes]] = []
        self.next_start = self.next_sweep = 0.0
        """Not before this value of time.monotonic()."""
        self.stuck: list[int] = []
        """Pids that SIGKILL did not end."""
        self.failed = False
        """No `hold` could start it."""


class Keeper:
    """The runner. `run` returns when every process has ended and that has been written down."""

    def __init__(self, folder: KeepFolder) -> None:
        self.folder = folder
        self.order = folder.order()
        self.log = EventLog(folder.path / "events.jsonl")
        self._order_mark = self._stat_mark(folder.path / "keep.json")
        self._own = identity.of(os.getpid())
        self._own["began_at"] = time.time()
        self._inbox = Inbox(self)
        self._awake: subprocess.Popen[bytes] | None = None
        self._beat_due = self._scan_due = 0.0
        self._stored = ""
        self._lease_mark: tuple[int, int] | None = None
        self._lease_age_s = 0.0
        stored = read_json(folder.path / "processes.json") or {}
        self.kept = {name: Kept(name) for name in self.order.processes}
        for name, kept in self.kept.items():
            kept.known = list((stored.get(name) or {}).get("members") or [])

    # -- the loop --------------------------------------------------------------------------------
    def run(self) -> None:
        """Watch until all is over."""
        if not identity.LINUX:
            # A Mac would fall asleep under work that has no terminal.
            with contextlib.suppress(OSError):
                self._awake = subprocess.Popen(["/usr/bin/caffeinate", "-is", "-w", str(os.getpid())])
        try:
            self._adopt()
            last = time.monotonic()
            self._tick(0.0)
            while not self._over():
                self._beat()
                ending = any(kept.ending for kept in self.kept.values())
                time.sleep(TICK_S / 2 if ending else TICK_S)
                now = time.monotonic()
                self._tick(now - last)
                last = now
            # One who finds us alive must be able to count on us: from here on we are not.
            self._write_runner(ended_at=time.time())
        except OSError:
            if self.folder.path.is_dir():
                raise
            self._abandon()
        self.log.close()

    def _tick(self, passed_s: float) -> None:
        """One look at everything, and what follows from it."""
        self._read_order()
        self._inbox.take_in()
        self._watch_lease(passed_s)
        for kept in self.kept.values():
            for hold in kept.holds:
                hold.poll()
            self._look(kept)
        self._scan()
        for kept in self.kept.values():
            self._end(kept)
        self._inbox.answer()
        self.log.flush()
        self._store()

    def _over(self) -> bool:
        """Whether nothing is left to do; writes that down."""
        if self._inbox.open or not all(self.settled(kept) for kept in self.kept.values()):
            return False
        if not self.log.has("ended", round=self.order.round):
            outcome = {
                name: {key: kept.report.get(key) for key in ("state", "exit_status", "signal")}
                for name, kept in self.kept.items()
            }
            self.log.add("ended", round=self.order.round, processes=outcome)
        written = self.log.waiting == 0
        return written and self._order_mark == self._stat_mark(self.folder.path / "keep.json")

    def settled(self, kept: Kept) -> bool:
        """Whether nothing more will happen to it in this round."""
        if kept.report["state"] == "waiting" or kept.report.get("stale"):
            return kept.failed or self._stop_of(kept) is not None
        return kept.report["state"] in ("exited", "lost") and kept.swept

    def _stop_of(self, kept: Kept) -> dict[str, Any] | None:
        """The event by which its round was ended before it was over; in an ended round nothing is started or left."""
        begun = kept.report["state"] != "waiting" and not kept.report.get("stale")
        wanted = int(kept.report.get("round") or 0) if begun else self.order.round
        endings = (event for event in reversed(self.log.events) if event["event"] == "ending")
        return next((event for event in endings if event["round"] >= wanted and kept.name in event["names"]), None)

    def _abandon(self) -> None:
        """The folder was removed under us: nobody can ask for the processes any more, so they end."""
        for kept in self.kept.values():
            kept.ending = Ending("folder removed", self.order.grace_s)
        while any(kept.ending for kept in self.kept.values()):
            table = identity.rows()
            for kept in self.kept.values():
                if kept.ending and kept.ending.step(self._members(kept, table)):
                    kept.ending = None
            time.sleep(TICK_S)

    # -- order and lease -------------------------------------------------------------------------
    @staticmethod
    def _stat_mark(path: Path) -> tuple[int, int] | None:
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _read_order(self) -> None:
        """Take in a new round. An order that cannot be read leaves the old one in force."""
        mark = self._stat_mark(self.folder.path / "keep.json")
        if mark == self._order_mark or mark is None:
            return
        self._order_mark = mark
        try:
            order = self.folder.order()
        except NodeError as error:
            complain(error.detail)
            return
        self.order = order
        for name in order.processes:
            kept = self.kept.setdefault(name, Kept(name))
            kept.next_start, kept.failed = 0.0, False
            kept.holds = [hold for hold in kept.holds if hold.poll() is None]
        for name in [name for name in self.kept if name not in order.processes]:
            if self.kept[name].report["state"] == "waiting":
                del self.kept[name]
        self._lease_age_s = 0.0
        self._beat_due = 0.0

    def _watch_lease(self, passed_s: float) -> None:
        """End everything when the lease file has not been touched for lease_s of our own clock."""
        if self.order.lease_s is None:
            return
        mark = self._stat_mark(self.folder.path / "lease")
        if mark != self._lease_mark:
            self._lease_mark, self._lease_age_s = mark, 0.0
        self._lease_age_s += min(passed_s, LEASE_TICK_S)
        if self._lease_age_s >= self.order.lease_s and not self.log.has("leased_out", round=self.order.round):
            self.log.add("leased_out", round=self.order.round, lease_s=self.order.lease_s)
            self.end("lease", list(self.kept), self.order.grace_s)

    # -- processes -------------------------------------------------------------------------------
    def _adopt(self) -> None:
        """Take over what an earlier runner started."""
        for name, kept in self.kept.items():
            kept.report = self.folder.report(name, self.order)
            if kept.report["state"] == "running" and self._known_event("started", kept):
                self.log.add("adopted", name=name, round=kept.report.get("round"), pid=kept.report["pid"])

    def _known_event(self, event: str, kept: Kept) -> bool:
        return self.log.has(event, name=kept.name, round=kept.report.get("round"), pid=kept.report.get("pid"))

    def _look(self, kept: Kept) -> None:
        """See what became of a process; start it if it waits for that."""
        report = kept.report = self.folder.report(kept.name, self.order)
        state = report["state"]
        if state != "waiting":
            if kept.record.get("mark") != report["mark"]:
                kept.record = read_json(self.folder.pid_file(kept.name)) or {}
            self._say_news(kept)
        if state == "running":
            kept.swept = False
            stop = self._stop_of(kept)
            if stop is not None and kept.ending is None and not kept.stuck:
                kept.ending = Ending(stop["cause"], stop["grace_s"])
            if report["status"] == "Z":
                self._wake_hold(kept)
        elif state == "waiting" or (report.get("stale") and kept.swept and kept.ending is None):
            self._start(kept)

    def _say_news(self, kept: Kept) -> None:
        report = kept.report
        facts = {"name": kept.name, "round": report.get("round"), "pid": report["pid"]}
        if not self._known_event("started", kept):
            self.log.add("started", **facts, started_at=report["started_at"])
        if report["state"] in ("exited", "lost") and not self._known_event(report["state"], kept):
            ends = {key: report[key] for key in ("exit_status", "signal", "ended_at", "error") if key in report}
            self.log.add(report["state"], **facts, **ends)

    def _wake_hold(self, kept: Kept) -> None:
        """A process has ended, and a `hold` that somebody stopped cannot say how before it runs again."""
        found = identity.living(kept.record.get("hold") or {})
        if found is not None and found.state in "Tt":
            identity.send(found.identity(), signal.SIGCONT)

    def _start(self, kept: Kept) -> None:
        """Start `hold`, which starts the process. Safe to repeat: only the first `hold` of a round does anything."""
        now = time.monotonic()
        wanted = self.order.processes[kept.name].get("start", True) if kept.name in self.order.processes else False
        if not wanted or kept.failed or self._stop_of(kept) or now < kept.next_start:
            return
        if any(hold.returncode is None for hold in kept.holds):
            return
        if len(kept.holds) >= STARTS:
            kept.failed = True
            self.log.add("start_failed", name=kept.name, round=self.order.round, exit_status=kept.holds[-1].returncode)
            return
        kept.next_start = now + len(kept.holds)
        kept.holds.append(
            subprocess.Popen(
                program.argv("hold", str(self.folder.path), kept.name),
                stdin=subprocess.DEVNULL,
                cwd=self.folder.path,
                start_new_session=True,
            )
        )

    def _scan(self) -> None:
        """Remember the descendants of what runs: once their parents have died nothing else leads to them."""
        now = time.monotonic()
        running = [kept for kept in self.kept.values() if kept.report["state"] == "running"]
        if now < self._scan_due or not running:
            return
        spent = time.process_time()
        table = identity.rows()
        for kept in running:
            kept.known = [row.identity() for row in self._members(kept, table) if row.pid != kept.report["pid"]]
        spent = time.process_time() - spent
        self._scan_due = now + max(SCAN_S, spent / SCAN_SHARE)

    def _members(self, kept: Kept, table: dict[int, identity.Row]) -> list[identity.Row]:
        known = [*kept.known, *(kept.report.get("remaining") or [])]
        return members(table, kept.report, known, kept.record.get("hold") or {})

    # -- endings ---------------------------------------------------------------------------------
    def end(self, cause: str, names: list[str], grace_s: float) -> None:
        """Begin to end these processes; the event makes a later runner go on with it."""
        self.log.add("ending", cause=cause, round=self.order.round, names=names, grace_s=grace_s)
        for kept in (self.kept[name] for name in names if name in self.kept):
            begun = kept.report["state"] != "waiting" and not kept.report.get("stale")
            if begun and kept.swept:
                continue
            if kept.ending is None or kept.ending.cause == "rest":
                kept.ending = Ending(cause, grace_s)
            kept.ending.hasten(grace_s)
            kept.stuck = []
            for hold in kept.holds:
                # To one that has not begun yet this is a cancellation.
                if not begun and hold.poll() is None:
                    hold.send_signal(signal.SIGTERM)

    def _end(self, kept: Kept) -> None:
        """Go on ending it; when it ended by itself, look after what it left behind."""
        state = kept.report["state"]
        if state in ("exited", "lost") and not kept.swept and kept.ending is None:
            if (state == "exited" and not kept.report.get("remaining")) or self._known_event("swept", kept):
                kept.swept = True
            elif time.monotonic() >= kept.next_sweep:
                kept.ending = Ending("rest", self.order.grace_s, patience_s=REST_S)
        if kept.ending is None:
            return
        if state == "waiting":
            if all(hold.poll() is not None for hold in kept.holds):
                kept.ending = None
        elif kept.ending.step(self._members(kept, identity.rows())) and (state != "running" or kept.ending.stuck):
            # While it counts as running although nothing lives, its `hold` is about to say how it ended.
            hidden = identity.carrying(kept.record["variable"]) if kept.record.get("variable") else []
            if hidden and not kept.ending.stuck:
                kept.known = [row.identity() for row in hidden]
            else:
                self._ended(kept, kept.ending)

    def _ended(self, kept: Kept, ending: Ending) -> None:
        kept.ending = None
        kept.stuck = ending.stuck
        kept.swept = not ending.stuck
        kept.next_sweep = time.monotonic() + STUCK_AGAIN_S
        event = "swept" if ending.cause == "rest" else "stopped"
        if ending.ended or event == "stopped":
            facts = {"name": kept.name, "round": kept.report.get("round"), "pid": kept.report.get("pid")}
            self.log.add(
                event, **facts, cause=ending.cause, pids=ending.ended, killed=ending.killed, stuck=ending.stuck
            )

    # -- what others see -------------------------------------------------------------------------
    def _beat(self) -> None:
        if time.monotonic() >= self._beat_due:
            self._beat_due = time.monotonic() + BEAT_S
            self._write_runner()

    def _write_runner(self, **more: Any) -> None:
        """runner.json; on a full disk in the room it already has, so that the beat goes on."""
        path = self.folder.path / "runner.json"
        record = {
            **self._own,
            "version": program.version(),
            "round": self.order.round,
            "beat_at": time.time(),
            "disk_full": bool(self.log.problem),
            "waiting_events": self.log.waiting,
            **more,
        }
        data = json.dumps(record).encode("utf-8").ljust(1023) + b"\n"
        try:
            write_atomic(path, data, sync=False)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            with contextlib.suppress(OSError), path.open("r+b", buffering=0) as file:
                write_all(file.fileno(), data)

    def _store(self) -> None:
        """processes.json, when something in it is new. On a full disk it waits: all of it can be found again."""
        table = {name: {**shown(kept.report), "members": kept.known} for name, kept in self.kept.items()}
        content = json.dumps(table)
        if content == self._stored:
            return
        try:
            write_json(self.folder.path / "processes.json", table, sync=False)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            return
        self._stored = content
