"""Commands to a node runner: files in inbox/, each done once however often it is sent, with its answer in done/."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import identity
from .files import NO_ROOM, read_json, write_json
from .keep_folder import NAME, KeepFolder, shown

if TYPE_CHECKING:
    from .keeper import Keeper

VERBS = ("stop", "kill", "signal")


def problem_of(command: dict[str, Any]) -> str:
    """What is wrong with a command, one sentence; empty if it can be done."""
    if not NAME.fullmatch(str(command.get("id"))):
        return f"a command's id is letters, digits, dots and dashes: {command.get('id')!r}"
    if command.get("do") not in VERBS:
        return f"a command does one of {', '.join(VERBS)}: {command.get('do')!r}"
    grace_s = command.get("grace_s", 0)
    if isinstance(grace_s, bool) or not isinstance(grace_s, (int, float)) or not 0 <= grace_s < 1e6:
        return f"grace_s is no number of seconds: {grace_s!r}"
    if command["do"] == "signal" and not isinstance(
        getattr(signal, f"SIG{command.get('signal')}", None), signal.Signals
    ):
        return f"there is no signal {command.get('signal')!r}"
    return ""


def inbox_file(folder: KeepFolder, command_id: str) -> Path:
    """Where a command is put."""
    return folder.path / "inbox" / f"{command_id}.json"


def done_file(folder: KeepFolder, command_id: str) -> Path:
    """Where its answer is found."""
    return folder.path / "done" / f"{command_id}.json"


class Inbox:
    """The runner's side: takes commands in, sees them through, answers."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._folder = keeper.folder
        self._seen: tuple[int, int] | None = None
        self.open: dict[str, dict[str, Any]] = {}
        """Commands under way, by id."""
        for name in ("inbox", "done"):
            (self._folder.path / name).mkdir(exist_ok=True)

    def take_in(self) -> None:
        """Begin what is new. A folder that has not changed since the last look is not listed again."""
        folder = self._folder.path / "inbox"
        found = folder.stat()
        mark = (found.st_mtime_ns, found.st_nlink)
        if mark == self._seen:
            return
        for path in sorted(folder.glob("*.json")):
            command = read_json(path)
            if command is None or problem_of(command) or path.stem != command["id"]:
                # Not from verb `tell`, which checks before it writes.
                continue
            if done_file(self._folder, command["id"]).exists():
                path.unlink()
            elif command["id"] not in self.open:
                self._begin(command)
        # Two changes within one tick of the file system's clock look the same: remember only what has settled.
        self._seen = mark if time.time_ns() - found.st_mtime_ns > 100_000_000 else None

    def _begin(self, command: dict[str, Any]) -> None:
        keeper, command_id = self._keeper, command["id"]
        names = [command["name"]] if command.get("name") else list(keeper.kept)
        again = keeper.log.has("told", id=command_id)
        if not again:
            keeper.log.add("told", id=command_id, do=command["do"], names=names, round=keeper.order.round)
        self.open[command_id] = {**command, "names": names}
        if command["do"] == "signal":
            # Sent at most once: a runner that was killed between its event and its answer may have sent it.
            self.open[command_id]["sent"] = 0 if again else self._signal(names, f"SIG{command['signal']}")
            self.open[command_id]["uncertain"] = again
        elif not keeper.log.has("ending", cause=command_id):
            grace_s = 0.0 if command["do"] == "kill" else float(command.get("grace_s", keeper.order.grace_s))
            keeper.end(command_id, names, grace_s)

    def _signal(self, names: list[str], signal_name: str) -> int:
        reports = [self._keeper.kept[name].report for name in names if name in self._keeper.kept]
        number = int(getattr(signal, signal_name))
        return sum(identity.send(report, number) for report in reports if report["state"] == "running")

    def answer(self) -> None:
        """Answer what is done."""
        keeper = self._keeper
        for command_id, command in list(self.open.items()):
            kept = [keeper.kept[name] for name in command["names"] if name in keeper.kept]
            if command["do"] != "signal" and not all(keeper.settled(entry) or entry.stuck for entry in kept):
                continue
            answer = {"id": command_id, "done": True, "do": command["do"]}
            answer.update({key: command[key] for key in ("sent", "uncertain") if key in command})
            answer["processes"] = {entry.name: shown(entry.report) for entry in kept}
            answer["stuck"] = [pid for entry in kept for pid in entry.stuck]
            try:
                write_json(done_file(self._folder, command_id), answer)
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                continue
            del self.open[command_id]
            with contextlib.suppress(FileNotFoundError):
                inbox_file(self._folder, command_id).unlink()
