"""Verbs of the node runner on the hosts of a group: on this machine directly, on the others through ssh."""

from __future__ import annotations

import contextlib
import json
import queue
import shlex
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

from . import program
from .errors import NodeError
from .group_spec import Host

CONNECT_S = 5
"""An ssh server that has not answered by then is not there."""
_SSH_FAILED = 255
_REPEAT_S = 1.0
_ALIVE_S = 2
_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", "-o", "LogLevel=ERROR"),
    # A shared connection of the user may be hanging, and may end when he logs out.
    *("-o", "ControlMaster=no", "-o", "ControlPath=none", "-o", "ForwardX11=no", "-T"),
)
_TAIL_BYTES = 2000


class Unreachable(NodeError):
    """A host does not answer (now): the call may be repeated."""

    def __init__(self, host: str, detail: str) -> None:
        super().__init__("unreachable", f"{host}: {detail}", f"try `ssh {host}` on the leading machine")


def ssh_line(config: str, name: str, line: str, *, silence_s: float = 3 * _ALIVE_S) -> list[str]:
    """An ssh command that runs `line` on host `name` without asking anything.

    It ends when the host has been silent for about `silence_s`.
    """
    count = max(1, round(silence_s / _ALIVE_S))
    alive = ("-o", f"ServerAliveInterval={_ALIVE_S}", "-o", f"ServerAliveCountMax={count}")
    return ["ssh", *(("-F", config) if config else ()), *_OPTIONS, *alive, "--", name, line]


def far_line(runner: Sequence[str], verb: str, *arguments: str) -> str:
    """A verb as a line for any login shell: sh, bash, zsh, fish, csh read single quotes alike."""
    words = [runner[0], *program.PYTHON_FLAGS, *runner[1:], verb, *arguments]
    return "exec " + " ".join(shlex.quote(word) for word in words)


def line(host: Host, ssh_config: str, verb: str, *arguments: str) -> list[str]:
    """The command that runs a verb on a host."""
    if not host.ssh:
        return program.argv(verb, *arguments)
    return ssh_line(ssh_config, host.ssh, far_line(host.runner, verb, *arguments))


def call(host: Host, ssh_config: str, verb: str, question: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Ask a host one thing and return its answer.

    Unreachable if it does not answer in time or ssh fails, NodeError for what the host itself answers as an error.
    """
    argv = line(host, ssh_config, verb)
    # Its own session: a signal to this process's group must not take away the means of ending the far ranks.
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        output, errors = process.communicate(json.dumps(question).encode("utf-8"), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise Unreachable(host.name, f"no answer to {verb} within {timeout_s:.0f} s") from None
    return _answer(host, verb, process.returncode, output, errors)


def _answer(host: Host, verb: str, status: int, output: bytes, errors: bytes) -> dict[str, Any]:
    """The last JSON object of the output: a login shell may have written lines of its own before it."""
    for text in reversed(output.decode("utf-8", "replace").splitlines()):
        if text.startswith("{"):
            try:
                answer = json.loads(text)
            except ValueError:
                break
            if isinstance(answer, dict):
                return _checked(host, answer)
    tail = errors[-_TAIL_BYTES:].decode("utf-8", "replace").strip()
    if host.ssh and status == _SSH_FAILED:
        raise Unreachable(host.name, tail.splitlines()[-1] if tail else "ssh failed without a word")
    raise NodeError(
        "answer", f"{host.name}: {verb} ended with status {status} and no answer: {tail}", "is the node runner there?"
    )


def _checked(host: Host, answer: dict[str, Any]) -> dict[str, Any]:
    error = answer.get("error")
    if isinstance(error, dict):
        kind, detail, fix = (str(error.get(key, "")) for key in ("kind", "detail", "fix"))
        raise NodeError(kind, f"{host.name}: {detail}", fix)
    return answer


class Calls:
    """One question to each of several hosts at once."""

    def __init__(self, ssh_config: str, stopped: threading.Event) -> None:
        """`stopped` makes repetitions end; a call under way is waited for by nobody then."""
        self._config, self._stopped = ssh_config, stopped

    def ask(
        self, verb: str, questions: Sequence[tuple[Host, dict[str, Any]]], timeout_s: float, *, repeat_s: float = 0.0
    ) -> dict[str, dict[str, Any] | NodeError]:
        """Host name -> answer or error. Who is unreachable is asked again for `repeat_s` seconds."""
        answers: queue.SimpleQueue[tuple[str, dict[str, Any] | NodeError]] = queue.SimpleQueue()
        until = time.monotonic() + repeat_s

        def one(host: Host, question: dict[str, Any]) -> None:
            answers.put((host.name, self._persistently(host, verb, question, timeout_s, until)))

        for host, question in questions:
            threading.Thread(target=one, args=(host, question), daemon=True).start()
        found: dict[str, dict[str, Any] | NodeError] = {}
        while len(found) < len(questions) and not (repeat_s and self._stopped.is_set()):
            # Waiting in turns: a signal's handler runs in between.
            with contextlib.suppress(queue.Empty):
                name, answer = answers.get(timeout=0.2)
                found[name] = answer
        return found

    def _persistently(
        self, host: Host, verb: str, question: dict[str, Any], timeout_s: float, until: float
    ) -> dict[str, Any] | NodeError:
        while True:
            try:
                return call(host, self._config, verb, question, timeout_s)
            except Unreachable as error:
                if time.monotonic() >= until or self._stopped.wait(_REPEAT_S):
                    return error
            except NodeError as error:
                return error
            except Exception as error:  # noqa: BLE001 - the end of a thread that somebody waits for
                return NodeError("internal", f"{host.name}: {verb}: {type(error).__name__}: {error}")
