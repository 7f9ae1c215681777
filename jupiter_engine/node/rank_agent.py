"""Verb `rank-run`: starts the ranks of one host, or whatever starts them, and writes down what becomes of each.

It is the one process that the node runner keeps for a launch. It says in ranks.jsonl what happens: rank_started,
rank_exited (with the true status that `hold` wrote), rank_stopped and rank_resumed (SIGSTOP: not ended, people debug),
launcher_exited, and `ended` when nothing of the launch lives here any more. SIGTERM ends everything, by identity.
It decides nothing: what a death means for the other hosts is the business of `group`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import identity, program, shim
from .ending import Ending, members
from .errors import NodeError
from .event_log import EventLog
from .files import read_json, write_json
from .group_spec import layout
from .keep_folder import KeepFolder

POLL_S = 0.2
_STATUS_S = 1.0
_SETTLE_S = 2.0
"""How long the exit file of a rank may take after everything else says that it has ended."""
_LAUNCHER_GRACE_S = 5.0
_NUDGES_S = 120.0
_NUDGE_S = 1.0
_LATE_NUDGE_S = 30.0


def main(arguments: list[str]) -> int:
    """rank-run ROOT, where ROOT is <run folder>/ranks/<generation>."""
    if len(arguments) != 1:
        raise NodeError("usage", "rank-run ROOT")
    agent = Agent(Path(arguments[0]))
    # Before anything is started: nothing may slip past an order to end.
    signal.signal(signal.SIGTERM, agent.ask_to_end)
    signal.signal(signal.SIGINT, agent.ask_to_end)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    agent.run()
    return 0


class Agent:
    """The ranks of one launch on this host."""

    def __init__(self, root: Path) -> None:
        self._places = layout(root)
        launch = read_json(self._places.launch)
        if launch is None:
            raise NodeError("missing", f"{self._places.launch} is missing or damaged", "the group writes it")
        self._launch = launch
        self._held = KeepFolder(self._places.held)
        self._order = self._held.order()
        self._log = EventLog(self._places.events)
        self._seen: dict[str, dict[str, Any]] = {str(rank): {"state": "waiting"} for rank in launch["ranks"]}
        self._lost_since: dict[str, float] = {}
        self._holds: dict[str, subprocess.Popen[bytes]] = {}
        self._launcher: subprocess.Popen[bytes] | None = None
        self._launcher_status: int | None = None
        self._started = time.monotonic()
        self._nudged = self._looked = 0.0
        self._asked = False

    def ask_to_end(self, number: int, frame: object) -> None:
        """Signal handler: end everything at the next turn."""
        del number, frame
        self._asked = True

    def run(self) -> None:
        """From the start of the ranks until nothing of them is left."""
        self._places.temporary.mkdir(exist_ok=True)
        try:
            self._start()
            while not self._asked and not self._over():
                self._turn()
                time.sleep(POLL_S)
            self._end()
        finally:
            shutil.rmtree(self._places.temporary, ignore_errors=True)
        self._log.add("ended", asked=self._asked, launcher_status=self._launcher_status)
        self._log.close()

    # -- start -----------------------------------------------------------------------------------
    def _start(self) -> None:
        if self._launch["command"]:
            self._start_launcher(self._launch["command"])
        elif self._launch["launcher"] == "direct":
            for rank in self._seen:
                argv = program.argv("hold", str(self._places.held), f"rank-{rank}")
                self._holds[rank] = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        # Otherwise mlx.launch on the leading host starts them.

    def _start_launcher(self, command: list[str]) -> None:
        environment = {**os.environ, **self._launch["command_env"], "TMPDIR": str(self._places.temporary)}
        nudged = self._launch["launcher"] == "mlx.launch"
        if nudged:
            folder = self._places.keep / "shim"
            shim.write(folder, self._places.keep)
            environment[shim.FOLDER_VARIABLE] = str(folder)
            environment["PATH"] = os.pathsep.join([str(folder), os.environ.get("PATH", os.defpath)])
        sys.stdout.write(f"starting {command}\n")
        sys.stdout.flush()
        # Its own session: it, and what it starts without `hold`, can be told from everything else.
        self._launcher = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if nudged else subprocess.DEVNULL,
            cwd=self._launch["cwd"],
            env=environment,
            start_new_session=True,
        )
        write_json(self._places.keep / "launcher.json", identity.of(self._launcher.pid))

    # -- watching --------------------------------------------------------------------------------
    def _turn(self) -> None:
        self._log.flush()
        self._nudge()
        if self._launcher is not None and self._launcher_status is None:
            self._launcher_status = self._launcher.poll()
            if self._launcher_status is not None:
                self._log.add("launcher_exited", exit_status=self._launcher_status)
        for hold in self._holds.values():
            hold.poll()
        now = time.monotonic()
        statuses = now - self._looked >= _STATUS_S
        self._looked = now if statuses else self._looked
        for rank in self._seen:
            self._look(rank, statuses=statuses)

    def _nudge(self) -> None:
        """Let mlx.launch sleep.

        It selects on its ranks' standard inputs, which always can be written to, and so takes a whole core until a
        write to one fails. What we write to it goes on to all of them; `hold` and the stand-in for ssh have closed
        theirs. A rank that starts late is reached by a later nudge. Its own standard input must stay open and silent:
        an end of file there is another busy loop.
        """
        if self._launcher is None or self._launcher.stdin is None:
            return
        now = time.monotonic()
        if now - self._nudged < (_NUDGE_S if now - self._started < _NUDGES_S else _LATE_NUDGE_S):
            return
        self._nudged = now
        try:
            self._launcher.stdin.write(b"\n")
            self._launcher.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which the next turn sees

    def _look(self, rank: str, *, statuses: bool) -> None:
        before = self._seen[rank]
        if before["state"] in ("exited", "lost"):
            return
        if before["state"] == "running" and not statuses and not self._held.exit_file(f"rank-{rank}").exists():
            return
        found = self._held.report(f"rank-{rank}", self._order)
        if found["state"] == "lost" or (found["state"] == "waiting" and self._hold_failed(rank)):
            if time.monotonic() - self._lost_since.setdefault(rank, time.monotonic()) < _SETTLE_S:
                return
            found = {**found, "state": "lost"}
        self._seen[rank] = found
        self._tell(rank, before, found)

    def _hold_failed(self, rank: str) -> bool:
        """Whether nobody is left who could still start the rank."""
        hold = self._holds.get(rank)
        return self._launcher_status is not None or (hold is not None and hold.returncode is not None)

    def _tell(self, rank: str, before: dict[str, Any], found: dict[str, Any]) -> None:
        number = int(rank)
        if before["state"] == "waiting" and found["state"] != "waiting" and found.get("pid"):
            who = {key: found.get(key) for key in ("pid", "started_at", "mark", "boot_id")}
            self._log.add("rank_started", rank=number, process=who)
        if found["state"] == "running":
            was, now = before.get("status") == "T", found.get("status") == "T"
            if was != now:
                self._log.add("rank_stopped" if now else "rank_resumed", rank=number)
        elif found["state"] == "exited":
            facts = {key: found.get(key) for key in ("exit_status", "signal", "ended_at", "error")}
            self._log.add(
                "rank_exited", rank=number, **{key: value for key, value in facts.items() if value is not None}
            )
        elif found["state"] == "lost":
            self._log.add("rank_exited", rank=number, lost=True)

    def _over(self) -> bool:
        if self._launcher is not None:
            return self._launcher_status is not None
        return all(report["state"] in ("exited", "lost") for report in self._seen.values())

    # -- end -------------------------------------------------------------------------------------
    def _end(self) -> None:
        """End every rank by identity, then the launcher, and say how each rank ended."""
        self._see_off(Ending("group", float(self._launch["grace_s"])), self._living_ranks)
        if self._launcher is not None:
            self._wait_for_launcher()
            self._see_off(Ending("group", _LAUNCHER_GRACE_S), self._living_launcher)
            self._launcher_status = self._launcher.wait()
            if self._launcher.stdin is not None:
                _close(self._launcher.stdin)
        # A launcher may have started one more while the others were ended.
        self._see_off(Ending("group", _LAUNCHER_GRACE_S), self._living_ranks)
        self._last_words()
        end_holds(self._held, self._seen)
        for hold in self._holds.values():
            hold.wait()

    def _wait_for_launcher(self) -> None:
        """Its ranks have ended: it should notice by itself."""
        assert self._launcher is not None
        deadline = time.monotonic() + _SETTLE_S
        while self._launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S / 4)

    def _see_off(self, ending: Ending, living: Any) -> None:
        while not ending.step(living()):
            for rank in self._seen:
                self._look(rank, statuses=False)
            if self._launcher is not None:
                self._launcher.poll()
            for hold in self._holds.values():
                hold.poll()
            time.sleep(POLL_S / 4)
        if ending.stuck:
            self._log.add("unkillable", pids=ending.stuck)

    def _living_ranks(self) -> list[identity.Row]:
        table = identity.rows()
        found: dict[int, identity.Row] = {}
        for rank in self._seen:
            found.update({row.pid: row for row in rank_members(self._held, rank, table)})
            hold = self._holds.get(rank)
            if hold is not None and hold.returncode is None and not self._held.pid_file(f"rank-{rank}").exists():
                # It has not started its rank yet, and must not.
                found.update({hold.pid: table[hold.pid]} if hold.pid in table else {})
        return [row for row in found.values() if row.state not in identity.DEAD]

    def _living_launcher(self) -> list[identity.Row]:
        record = read_json(self._places.keep / "launcher.json") or {}
        return members(identity.rows(), {**record, "session": record.get("pid")}, [], {})

    def _last_words(self) -> None:
        """Every rank that was started, or should have been, has an end that is written down."""
        deadline = time.monotonic() + 2 * _SETTLE_S
        while any(self._unsettled(rank) for rank in self._seen) and time.monotonic() < deadline:
            for rank in self._seen:
                self._look(rank, statuses=True)
            time.sleep(POLL_S / 4)

    def _unsettled(self, rank: str) -> bool:
        state = self._seen[rank]["state"]
        return state == "running" or (state == "waiting" and self._hold_failed(rank))


def end_holds(held: KeepFolder, ranks: Iterable[str]) -> None:
    """End what waits for room on a full disk to write down how its rank ended."""
    for rank in ranks:
        record = read_json(held.pid_file(f"rank-{rank}")) or {}
        identity.send(record.get("hold") or {}, signal.SIGKILL)


def rank_members(held: KeepFolder, rank: str, table: dict[int, identity.Row]) -> list[identity.Row]:
    """Living processes of one rank, without the `hold` that is to write down its end."""
    record = read_json(held.pid_file(f"rank-{rank}"))
    if record is None:
        return []
    ended = read_json(held.exit_file(f"rank-{rank}")) or {}
    remaining = ended.get("remaining") or []
    return members(table, record, remaining, record.get("hold") or {})


def _close(stream: Any) -> None:
    # Nobody may be left to read the last nudge.
    with contextlib.suppress(BrokenPipeError):
        stream.close()
