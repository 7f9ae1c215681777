"""A node of the tests: the packed runner, a real Python, real processes that carry a mark by which they are found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jupiter_engine.cluster.runner import PYTHON_FLAGS
from jupiter_engine.cluster.runner_file import RunnerFile


def oldest_python() -> str:
    """Python 3.9 where this machine has one, else our own."""
    known = [*Path.home().glob(".pyenv/versions/3.9.*/bin/python3"), shutil.which("python3.9")]
    return next((str(path) for path in known if path), sys.executable)


class Node:
    """Runs verbs of the node runner on keep folders below a folder."""

    def __init__(self, folder: Path, python: str = "") -> None:
        self.folder = folder
        self.python = python or oldest_python()
        packed = RunnerFile.packed()
        self.file = folder / packed.name
        self.file.write_bytes(packed.data)
        self.mark = f"JUPITER_TEST_{uuid.uuid4().hex}"
        self.keep_folder = folder / "keep"
        self.keep_folder.mkdir(exist_ok=True)

    def argv(self, verb: str, *arguments: str | Path) -> list[str]:
        return [self.python, *PYTHON_FLAGS, str(self.file), verb, *map(str, arguments)]

    def verb(self, verb: str, *arguments: str | Path, stdin: bytes = b"", timeout_s: float = 40) -> dict[str, Any]:
        done = subprocess.run(
            self.argv(verb, *arguments), input=stdin, capture_output=True, timeout=timeout_s, check=False
        )
        assert done.stdout, done.stderr.decode()
        answer: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (1 if "error" in answer else 0), done
        return answer

    def order(self, *processes: dict[str, Any], **more: Any) -> None:
        """Write keep.json as the control wing does: whole or not at all."""
        order = {"version": 1, "id": "test", "grace_s": 1, "lease_s": None, "processes": processes, **more}
        temp = self.keep_folder / ".keep.json.tmp"
        temp.write_text(json.dumps(order))
        temp.replace(self.keep_folder / "keep.json")

    def process(self, name: str, script: str, **more: Any) -> dict[str, Any]:
        """A shell script that notes each of its starts in NAME.starts."""
        script = f"echo $$ >> {self.folder}/{name}.starts\n{script}"
        process = {"name": name, "argv": ["/bin/sh", "-c", script], "cwd": str(self.folder), "env": {self.mark: "1"}}
        return {**process, "log": str(self.folder / f"{name}.log"), **more}

    def starts(self, name: str) -> int:
        path = self.folder / f"{name}.starts"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def keep(self) -> dict[str, Any]:
        return self.verb("keep", self.keep_folder)

    def state(self) -> dict[str, Any]:
        return self.verb("state", self.keep_folder)

    def tell(self, **command: Any) -> dict[str, Any]:
        return self.verb("tell", self.keep_folder, stdin=json.dumps(command).encode())

    def events(self) -> list[dict[str, Any]]:
        path = self.keep_folder / "events.jsonl"
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def named(self, event: str) -> list[dict[str, Any]]:
        return [entry for entry in self.events() if entry["event"] == event]

    def record(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.keep_folder / name).read_bytes())
        return value

    def marked(self) -> list[int]:
        """Pids of all living processes that were started by or below a kept one."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (path / "environ").read_bytes() and state_of(int(path.name)) not in ("", "Z"):
                    found.append(int(path.name))
            except OSError:
                continue
        return found

    def of_ours(self) -> list[int]:
        """Pids of our runners and holds: processes with this folder on their command line."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.keep_folder).encode() in (path / "cmdline").read_bytes():
                    found.append(int(path.name))
            except OSError:
                continue
        return found

    def clean(self) -> None:
        """End what a failed test left: only processes that carry our mark or our folder."""
        for pid in [*self.of_ours(), *self.marked()]:
            kill(pid)
        for pid in self.marked():
            kill(pid)


def state_of(pid: int) -> str:
    """One letter of ps; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def until(what: Callable[[], Any], timeout_s: float = 15) -> Any:
    """Wait for something to become true and return it."""
    deadline = time.monotonic() + timeout_s
    while not (value := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.03)
    return value
