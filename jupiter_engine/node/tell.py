"""Verb `tell`: give a runner a command and wait for what came of it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from .commands import done_file, inbox_file, problem_of
from .errors import NodeError
from .files import read_json, write_json
from .keep import start_runner
from .keep_folder import KeepFolder

LONGER = 1.5
"""The answer may take so many times the grace ..."""
AT_LEAST_S = 15.0
"""... and this much besides, for starting a runner and for what SIGKILL does not end at once."""


def main(arguments: list[str]) -> int:
    """tell FOLDER, with {"id", "do": "stop"|"kill"|"signal", "name", "grace_s", "signal"} on standard input.

    Answers {"id", "done": true, "processes", "stuck", ...} when it is done. The same id again: the same answer.
    """
    if len(arguments) != 1:
        raise NodeError("usage", "tell FOLDER < COMMAND")
    try:
        command = json.loads(sys.stdin.buffer.read(64 << 10))
    except ValueError as error:
        raise NodeError("usage", f"the command is no JSON: {error}") from error
    problem = problem_of(command) if isinstance(command, dict) else "the command is no JSON object"
    if problem:
        raise NodeError("usage", problem)
    sys.stdout.write(json.dumps(told(KeepFolder(Path(arguments[0])), command)) + "\n")
    sys.stdout.flush()
    return 0


def told(folder: KeepFolder, command: dict[str, Any]) -> dict[str, Any]:
    """The answer to a command, sent now or earlier. NodeError if none comes in time; sending it again is safe."""
    order = folder.order()
    if command.get("name") and command["name"] not in order.processes:
        raise NodeError("order", f"there is no process {command['name']!r} in {folder.path}/keep.json")
    done = done_file(folder, command["id"])
    answer = read_json(done)
    if answer is not None:
        return answer
    inbox = inbox_file(folder, command["id"])
    inbox.parent.mkdir(exist_ok=True)
    write_json(inbox, command)
    start_runner(folder)
    wait_s = LONGER * float(command.get("grace_s", order.grace_s)) + AT_LEAST_S
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        answer = read_json(done)
        if answer is not None:
            return answer
        if not folder.runner()["alive"]:
            start_runner(folder)
        time.sleep(0.05)
    raise NodeError("timeout", f"command {command['id']} was not done after {wait_s:.0f} s", "ask again, same id")
