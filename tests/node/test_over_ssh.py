"""The node runner through a real sshd: what it keeps outlives the connection, and the mirror goes on after a cut."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from jupiter_engine.cluster.frames import BeatFrame
from jupiter_engine.cluster.mirror import Mirror
from jupiter_engine.cluster.runner import KeepOrder, KeepProcess, NodeRunner
from jupiter_engine.errors import JupiterError
from jupiter_engine.remote.ssh import connect
from jupiter_engine.settings.cluster import ConnectionSettings
from tests.node.kept import Node, kill, until
from tests.sshd import Sshd, start_sshd

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
PATTERNS = ("events.jsonl", "worker.log")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Sshd]:
    found = start_sshd(tmp_path / "sshd")
    yield found
    found.stop()


@asynccontextmanager
async def runner_at(server: Sshd, node: Node) -> AsyncIterator[NodeRunner]:
    connection = await connect(server.node(), ConnectionSettings(), known_hosts=server.trusted(), ssh_config=None)
    try:
        runner = NodeRunner(connection, str(node.folder / "work"), node.python)
        await runner.ensure()
        yield runner
    finally:
        await connection.close()


def order(node: Node, script: str) -> KeepOrder:
    folder = str(node.folder)
    argv, log = ("/bin/sh", "-c", script), f"{folder}/run/worker.log"
    process = KeepProcess(name="worker", argv=argv, cwd=folder, log=log, env={node.mark: "1"})
    return KeepOrder(id="run-1", processes=(process,), grace_s=1.0)


async def mirror_until(runner: NodeRunner, node: Node, size: int) -> Mirror:
    """Mirror until the copy of the events has `size` bytes."""
    mirror = Mirror(node.folder / "copy", PATTERNS)
    run = str(node.folder / "run")
    async with aclosing(runner.follow(run, PATTERNS, have=mirror.have(), beat_s=0.2, poll_s=0.05)) as frames:
        async for frame in frames:
            await mirror.apply(frame)
            copy = node.folder / "copy" / "events.jsonl"
            if isinstance(frame, BeatFrame) and copy.exists() and copy.stat().st_size >= size:
                break
    return mirror


async def test_work_goes_on_through_cut_connections_and_the_copy_catches_up(server: Sshd, node: Node) -> None:
    run = node.folder / "run"
    for name in ("run", "copy"):
        (node.folder / name).mkdir()
    line = """'{"seq": '$i'}'"""
    script = f"for i in $(seq 300); do echo {line} >> {run}/events.jsonl; sleep 0.01; done; exit 6"
    node.keep_folder = run / "node"
    async with runner_at(server, node) as runner:
        began = time.monotonic()
        await runner.keep(str(node.keep_folder), order(node, script))
        assert time.monotonic() - began < 15, "the channel closes although the runner lives"
        await mirror_until(runner, node, 200)
        cut = asyncio.create_task(mirror_until(runner, node, 1 << 40))
        await asyncio.sleep(0.3)
        server.cut()
        with pytest.raises(JupiterError):
            await cut
    assert node.starts("worker") == 0
    assert node.marked(), "it works on without us"
    async with runner_at(server, node) as runner:
        await mirror_until(runner, node, 3000)
        until(lambda: node.named("ended"))
        await mirror_until(runner, node, (run / "events.jsonl").stat().st_size)
        state = await runner.state(str(node.keep_folder))
    assert state.processes["worker"].exit_status == 6
    copied, source = node.folder / "copy" / "events.jsonl", run / "events.jsonl"
    assert copied.read_bytes() == source.read_bytes()
    assert len(source.read_bytes().splitlines()) == 300


async def test_a_client_that_is_gone_leaves_no_follower_behind(server: Sshd, node: Node) -> None:
    (node.folder / "run").mkdir()
    async with runner_at(server, node) as runner:
        frames = runner.follow(str(node.folder / "run"), PATTERNS)
        await anext(frames)
        followers = following(runner.file)
        assert len(followers) == 1
        await frames.aclose()
        until(lambda: not following(runner.file))
        again = runner.follow(str(node.folder / "run"), PATTERNS)
        await anext(again)
        server.cut()
        until(lambda: not following(runner.file))
        with pytest.raises(JupiterError):
            await anext(again)


def following(file: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"python3") and file.encode() in words and b"follow" in words:
            found.append(int(path.name))
    return found


async def test_a_runner_shot_between_two_connections_is_replaced(server: Sshd, node: Node) -> None:
    async with runner_at(server, node) as runner:
        (node.folder / "run").mkdir()
        first = await runner.keep(str(node.keep_folder), order(node, "sleep 60"))
        until(lambda: node.named("started"))
    kill(first.runner.pid, signal.SIGKILL)
    async with runner_at(server, node) as runner:
        second = await runner.keep(str(node.keep_folder))
        assert second.runner.pid != first.runner.pid
        assert second.processes["worker"].state == "running"
        await runner.tell(str(node.keep_folder), {"id": "end", "do": "kill"})
    assert node.marked() == []
