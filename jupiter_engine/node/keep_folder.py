"""A keep folder: the order of what to keep alive, and what its files say about each process.

keep.json        the order (written by whoever wants the processes)
runner.json      the node runner at work here
processes.json   the processes as the runner last saw them, with their known descendants
NAME.pid.json    written by `hold` when it has started NAME
NAME.exit.json   written by `hold` when NAME has ended
events.jsonl     what happened
inbox/, done/    commands and their answers
lock             held by the runner for its life
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import identity
from .errors import NodeError
from .files import no_room, read_json

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names of processes and ids of commands: they become file names."""

TAIL_BYTES = 64 << 10


class Order:
    """keep.json, checked."""

    def __init__(self, value: dict[str, Any], path: Path) -> None:
        self._path = path
        if value.get("version") != 1:
            raise self._wrong("version is not 1")
        self.id = str(value.get("id", ""))
        self.grace_s = self._number(value, "grace_s", 20.0)
        self.lease_s = None if value.get("lease_s") is None else self._number(value, "lease_s", 0.0)
        self.restart = bool(value.get("restart", False))
        self.round = int(value.get("round") or 0)
        self.processes: dict[str, dict[str, Any]] = {}
        processes = value.get("processes")
        if not isinstance(processes, list) or not processes:
            raise self._wrong("processes is no list with entries")
        for process in processes:
            self._check(process)
            self.processes[process["name"]] = process

    def _wrong(self, what: str) -> NodeError:
        return NodeError("order", f"{self._path}: {what}", "the file must be written by the same Jupiter")

    def _number(self, value: dict[str, Any], key: str, default: float) -> float:
        number = value.get(key, default)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < 1e9:
            raise self._wrong(f"{key} is no number of seconds: {number!r}")
        return float(number)

    def _check(self, process: Any) -> None:
        if not isinstance(process, dict) or not NAME.fullmatch(str(process.get("name"))):
            raise self._wrong("a process without a usable name")
        name = process["name"]
        if name in self.processes:
            raise self._wrong(f"two processes are called {name}")
        argv, env = process.get("argv"), process.get("env", {})
        if (
            not isinstance(argv, list)
            or not argv
            or not all(isinstance(word, str) and "\0" not in word for word in argv)
        ):
            raise self._wrong(f"argv of {name} is no list of words")
        if not isinstance(env, dict) or not all(isinstance(text, str) for pair in env.items() for text in pair):
            raise self._wrong(f"env of {name} holds something other than texts")
        for key in ("cwd", "log"):
            if not isinstance(process.get(key), str) or not process[key].startswith("/"):
                raise self._wrong(f"{key} of {name} is no absolute path")


class KeepFolder:
    """Reads a keep folder. Nothing here changes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def order(self) -> Order:
        """NodeError if there is none, or none that can be followed."""
        path = self.path / "keep.json"
        value = read_json(path)
        if value is None:
            raise NodeError("missing", f"{path} is missing or no JSON object", "write it before this verb is used")
        return Order(value, path)

    def pid_file(self, name: str) -> Path:
        """Who `name` is."""
        return self.path / f"{name}.pid.json"

    def exit_file(self, name: str) -> Path:
        """How `name` ended."""
        return self.path / f"{name}.exit.json"

    def runner(self) -> dict[str, Any]:
        """runner.json with `alive`; only {"alive": false} if no runner was ever here."""
        record = read_json(self.path / "runner.json") or {}
        return {**record, "alive": not record.get("ended_at") and identity.living(record) is not None}

    def report(self, name: str, order: Order) -> dict[str, Any]:
        """One process as its files and the system show it now.

        `state` is waiting (not started in this round), running, exited, or lost (it has ended and nobody can know how:
        its `hold` was killed or the machine restarted). A running one has `status`, the letter ps gives (T: stopped).
        An ended one is `stale` if a newer round wants it started again.
        """
        record = read_json(self.pid_file(name))
        if record is None:
            return {"state": "waiting"}
        known = {key: record.get(key) for key in ("pid", "started_at", "mark", "boot_id", "round", "session")}
        ended = self._ending(name, record)
        found = None if ended else identity.living(record)
        if ended is None and found is None:
            if identity.living(record.get("hold") or {}) is not None:
                # It has ended and its parent is about to say how.
                return {**known, "state": "running", "status": "Z"}
            # The parent may have said so and ended since we looked.
            ended = self._ending(name, record)
        if found is not None:
            return {**known, "state": "running", "status": found.state}
        if order.restart and int(record.get("round") or 0) < order.round:
            known["stale"] = True
        if ended is not None:
            facts = {key: ended.get(key) for key in ("exit_status", "signal", "ended_at", "error", "remaining")}
            return {**known, "state": "exited", **{key: value for key, value in facts.items() if value is not None}}
        return {**known, "state": "lost"}

    def _ending(self, name: str, record: dict[str, Any]) -> dict[str, Any] | None:
        ended = read_json(self.exit_file(name))
        if ended is None or any(ended.get(key) != record.get(key) for key in ("pid", "mark", "round")):
            return None
        return ended

    def last_seq(self) -> int:
        """Number of the newest event; 0 if there is none."""
        try:
            with (self.path / "events.jsonl").open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - TAIL_BYTES))
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return 0
        # What follows the last newline is not (completely) written; what precedes the first may be cut.
        match = re.match(rb'\{"seq": (\d+),', lines[-2]) if len(lines) > 1 else None
        return int(match.group(1)) if match else 0

    def state(self) -> dict[str, Any]:
        """What verb `state` answers and every beat of `follow` carries. Works with and without a living runner."""
        order = self.order()
        runner = self.runner()
        processes = {name: shown(self.report(name, order)) for name in order.processes}
        return {
            "runner": runner,
            "round": order.round,
            "processes": processes,
            "events_seq": self.last_seq(),
            "disk_full": bool(runner.get("disk_full")) or no_room(self.path),
        }


def shown(report: dict[str, Any]) -> dict[str, Any]:
    """A report as others see it: what ended in an older round waits for its new start."""
    if report.get("stale"):
        return {"state": "waiting"}
    return {key: value for key, value in report.items() if key != "remaining"}
