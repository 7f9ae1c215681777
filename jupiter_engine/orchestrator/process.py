"""The engine process: one a workspace, detached from whoever asked for it, found by identity."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from jupiter_engine.errors import JupiterError
from jupiter_engine.files import ProcessIdentity, whole_lines
from jupiter_engine.protocol.facts import Metric

START_TIMEOUT_S = 20.0

_started: list[subprocess.Popen[bytes]] = []
"""Engines that this process started: they outlive it, but while it lives it has to reap them."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    identity: ProcessIdentity
    version: str


def living_engine(root: Path) -> EngineInfo | None:
    """The workspace's engine if it lives: recorded pid and start time, and the lock that only it holds."""
    _started[:] = [child for child in _started if child.poll() is None]
    path = root / ".jupiter" / "engine.json"
    try:
        info = msgspec.json.decode(path.read_bytes(), type=EngineInfo)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return info if info.identity.alive() and _lock_held(root) else None


def _lock_held(root: Path) -> bool:
    with (root / ".jupiter" / "engine.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def ensure_engine(root: Path) -> EngineInfo:
    """Start `python -m jupiter_engine.orchestrator ROOT` detached unless an engine lives; wait until it answers."""
    living = living_engine(root)
    if living is not None:
        return living
    log = root / ".jupiter" / "engine.log"
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "jupiter_engine.orchestrator", str(root)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=root,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    _started.append(child)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        living = living_engine(root)
        if living is not None:
            return living
        if child.poll() not in (None, 0):
            break
        time.sleep(0.02)
    tail = log.read_text(errors="replace")[-600:].strip()
    raise JupiterError(f"the engine did not start: {tail or 'no output'}", fix=f"see {log}")


def read_metrics(path: Path, offset_bytes: int) -> tuple[list[Metric], int]:
    """(metrics after the offset, next offset); lines that are no metric are left out. See api.Workspace.metrics."""
    if not path.exists():
        return [], 0
    if path.stat().st_size < offset_bytes:
        offset_bytes = 0
    decoder = msgspec.json.Decoder(Metric)
    metrics: list[Metric] = []
    for line, end in whole_lines(path, offset_bytes):
        offset_bytes = end
        # A line torn by a power cut, or another machine's nonsense, must not hide the steps around it.
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            metrics.append(decoder.decode(line))
    return metrics, offset_bytes
