"""Running the system's own tools: all at once, each with a deadline and a limit, none of them trusted to end."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

Answer = dict[str, Any]
"""{"status", "out", "err"} of a tool that ended, {"missing": true} or {"timed_out": true, "out": so far}."""

SEARCH_ALSO = ("/usr/local/bin", "/opt/homebrew/bin", "/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/lib/wsl/lib")
"""A command that comes over ssh has a shorter PATH than a terminal; tools live in these folders too."""

OUTPUT_LIMIT_BYTES = 256 * 1024


def search_path() -> str:
    """PATH as it is here, then the folders that ssh commands often lack."""
    own = os.environ.get("PATH", "").split(":")
    return ":".join([*own, *(folder for folder in SEARCH_ALSO if folder not in own)])


def run_tool(
    argv: Sequence[str],
    timeout_s: float,
    limit_bytes: int = OUTPUT_LIMIT_BYTES,
    env: dict[str, str] | None = None,
) -> Answer:
    """Run one tool to its end, its deadline or its output limit; it is killed with all its children after that.

    `env` is added to the environment.
    """
    program = shutil.which(argv[0], path=search_path())
    if program is None:
        return {"missing": True}
    environment = {**os.environ, "PATH": search_path(), "LC_ALL": "C", "LANG": "C", **(env or {})}
    try:
        child = subprocess.Popen(
            [program, *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=environment,
        )
    except OSError as error:
        return {"missing": True, "err": str(error)}
    try:
        outputs, ended = _collect(child, time.monotonic() + timeout_s, limit_bytes)
    finally:
        if child.stdout is not None and child.stderr is not None:
            child.stdout.close()
            child.stderr.close()
    answer: Answer = {"out": outputs[0].decode("utf-8", "replace"), "err": outputs[1][:2000].decode("utf-8", "replace")}
    if ended is None:
        answer["timed_out"] = True
    else:
        answer["status"] = ended
    if len(outputs[0]) >= limit_bytes:
        answer["truncated"] = True
    return answer


def _collect(child: subprocess.Popen[bytes], deadline: float, limit_bytes: int) -> tuple[list[bytes], int | None]:
    """([stdout, stderr], exit status); None for a tool that had to be ended."""
    parts: list[list[bytes]] = [[], []]
    sizes = [0, 0]
    with selectors.DefaultSelector() as selector:
        for number, stream in enumerate((child.stdout, child.stderr)):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ, number)
        while selector.get_map() and sizes[0] < limit_bytes:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for key, _ in selector.select(left):
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fileobj)
                elif sizes[key.data] < limit_bytes:
                    parts[key.data].append(data[: limit_bytes - sizes[key.data]])
                    sizes[key.data] += len(data)
    status: int | None = None
    try:
        status = child.wait(max(0.0, deadline - time.monotonic())) if sizes[0] < limit_bytes else None
    except subprocess.TimeoutExpired:
        status = None
    if status is None:
        _end(child)
        if sizes[0] >= limit_bytes:
            status = child.returncode
    return [b"".join(part) for part in parts], status


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the tool's whole session. One that cannot die (a driver that hangs) is left to the system."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    try:
        child.wait(0.2)
    except subprocess.TimeoutExpired:
        # Stuck in the kernel; this process ends without it, and it is not ours to wait for.
        child.returncode = -signal.SIGKILL


def run_tools(tools: dict[str, tuple[str, ...]], timeout_s: float) -> dict[str, Answer]:
    """All tools at once, each in a thread of its own; back after at most `timeout_s` and a little."""
    answers: dict[str, Answer] = {}
    guard = threading.Lock()

    def work(name: str, argv: tuple[str, ...]) -> None:
        answer = run_tool(argv, timeout_s)
        with guard:
            answers[name] = answer

    threads = [threading.Thread(target=work, args=item, daemon=True) for item in tools.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s + 0.5
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    with guard:
        return {name: answers.get(name, {"timed_out": True, "out": ""}) for name in tools}
