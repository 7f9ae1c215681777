"""Verb `keep`: make sure that a runner of its own, tied to no terminal and no connection, looks after a folder."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from . import program
from .errors import NodeError
from .keep_folder import KeepFolder

START_S = 20.0
"""A runner that is not at work after so long will not be."""
SYSTEMD = Path("/run/systemd/system")
LINGERING = Path("/var/lib/systemd/linger")
_SCOPE = ("systemd-run", "--user", "--scope", "--quiet", "--collect", "--")


def main(arguments: list[str]) -> int:
    """keep FOLDER: start, adopt or leave alone, as needed; answers as verb `state` once a runner is at work or all is
    over. May be repeated at any time."""
    if len(arguments) != 1:
        raise NodeError("usage", "keep FOLDER")
    folder = KeepFolder(Path(arguments[0]))
    if not over(folder, folder.order().round):
        start_runner(folder)
    sys.stdout.write(json.dumps(folder.state()) + "\n")
    sys.stdout.flush()
    return 0


def over(folder: KeepFolder, round_number: int) -> bool:
    """Whether a runner has seen everything of this round through to its end."""
    record = folder.runner()
    return bool(record.get("ended_at")) and int(record.get("round") or 0) >= round_number


def start_runner(folder: KeepFolder) -> None:
    """Return when a runner is at work on the present order, or has just seen it through. NodeError if none will be."""
    wanted = folder.order().round
    earlier, deadline = folder.runner().get("ended_at"), time.monotonic() + START_S
    child: subprocess.Popen[bytes] | None = None
    while time.monotonic() < deadline:
        record = folder.runner()
        if record["alive"] and int(record.get("round") or 0) >= wanted:
            return
        if record.get("ended_at") != earlier and over(folder, wanted):
            return
        if child is not None and child.poll():
            raise NodeError("runner", f"the node runner ended with status {child.returncode}", _log_tail(folder))
        if not record["alive"] and (child is None or child.poll() is not None):
            # Where another runner is just starting, or ending, ours finds the folder taken, ends, and we ask again.
            child = _spawn(folder)
        time.sleep(0.02)
    raise NodeError("timeout", f"no node runner was at work after {START_S:.0f} s", _log_tail(folder))


def _spawn(folder: KeepFolder) -> subprocess.Popen[bytes]:
    """A session of its own; nothing of ours stays open in it, or ssh would wait for it for ever."""
    argv = program.argv("keep-run", str(folder.path))
    if _scope_works():
        # Where logging out ends all processes of a login (KillUserProcesses), those of a user's scope stay.
        argv = [*_SCOPE, *argv]
    log = os.open(folder.path / "runner.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder.path, start_new_session=True
        )
    finally:
        os.close(log)


def _scope_works() -> bool:
    """Whether systemd can keep a process of this user beyond the login: it must linger, else its manager ends too."""
    if not SYSTEMD.is_dir():
        return False
    try:
        lingers = (LINGERING / getpass.getuser()).exists()
        return (
            lingers and subprocess.run([*_SCOPE, "true"], capture_output=True, timeout=5, check=False).returncode == 0
        )
    except (OSError, KeyError, subprocess.TimeoutExpired):
        return False


def _log_tail(folder: KeepFolder) -> str:
    try:
        return (folder.path / "runner.log").read_bytes()[-2000:].decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return ""
