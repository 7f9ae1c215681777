"""This machine as a Remote: identity, sessions, endings."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from jupiter_engine.errors import RemoteError
from jupiter_engine.files import ProcessIdentity
from jupiter_engine.remote.local import LocalRemote

SLEEPER = "import time; print('ready', flush=True); time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"


async def start(remote: LocalRemote, folder: Path, code: str) -> ProcessIdentity:
    argv = (sys.executable, "-c", code)
    identity = await remote.start(argv, folder=folder, log=folder / "log", env={"JUPITER_TEST": "1"})
    for _ in range(200):
        if b"ready" in await remote.read(folder / "log"):
            break
        await asyncio.sleep(0.02)
    return identity


@pytest.mark.parametrize(("code", "grace_s"), [(SLEEPER, 5.0), (STUBBORN, 0.3)])
async def test_stop_ends_a_process_kindly_or_not(tmp_path: Path, code: str, grace_s: float) -> None:
    remote = LocalRemote()
    identity = await start(remote, tmp_path, code)
    assert await remote.alive(identity)
    await remote.stop(identity, grace_s=grace_s)
    for _ in range(100):
        if not await remote.alive(identity):
            break
        await asyncio.sleep(0.02)
    assert not await remote.alive(identity)


async def test_a_reused_pid_is_not_mistaken_for_ours(tmp_path: Path) -> None:
    remote = LocalRemote()
    identity = await start(remote, tmp_path, SLEEPER)
    other = ProcessIdentity(pid=identity.pid, started_at=identity.started_at - 3600)
    assert not other.alive()
    await LocalRemote().stop(other, grace_s=0.1)
    assert await remote.alive(identity)
    await remote.stop(identity, grace_s=5.0)


async def test_a_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="/no/such/program could not be started"):
        await LocalRemote().start(("/no/such/program",), folder=tmp_path, log=tmp_path / "log", env={})


async def test_files_are_read_from_an_offset_and_written_whole(tmp_path: Path) -> None:
    remote = LocalRemote()
    await remote.write(tmp_path / "a" / "b", b"0123456789")
    assert await remote.read(tmp_path / "a" / "b", 4) == b"456789"
    assert await remote.read(tmp_path / "missing") == b""
    await remote.remove(tmp_path / "a" / "b")
    await remote.remove(tmp_path / "a" / "b")
    assert not (tmp_path / "a" / "b").exists()
