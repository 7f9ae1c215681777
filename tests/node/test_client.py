"""The control wing's client over a real connection to this machine: putting the runner there, verbs, following."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from jupiter_engine.cluster.frames import BeatFrame, FileFrame, Frame, NodeRefused, header_of
from jupiter_engine.cluster.mirror import Mirror
from jupiter_engine.cluster.runner import KeepOrder, KeepProcess, NodeRunner
from jupiter_engine.cluster.runner_file import RunnerFile
from jupiter_engine.errors import NodeUnreachable, RemoteError
from jupiter_engine.remote.port import Completed
from jupiter_engine.remote.this_machine import LocalConnection
from tests.node.kept import Node, oldest_python, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


class CountedConnection(LocalConnection):
    """Counts what crosses to the node."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    async def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 30.0, limit_bytes: int = 16 << 20
    ) -> Completed:
        self.calls.append("run")
        return await super().run(argv, stdin=stdin, timeout_s=timeout_s, limit_bytes=limit_bytes)

    async def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        self.calls.append("write")
        await super().write(path, data, mode=mode)


@pytest.fixture
async def connection() -> AsyncIterator[CountedConnection]:
    found = CountedConnection()
    yield found
    await found.close()


@pytest.fixture
async def runner(connection: CountedConnection, node: Node) -> NodeRunner:
    found = NodeRunner(connection, str(node.folder / "work dir"), node.python)
    await found.ensure()
    return found


def order(node: Node, script: str, **more: Any) -> KeepOrder:
    process = KeepProcess(
        name="worker",
        argv=("/bin/sh", "-c", script),
        cwd=str(node.folder),
        log=str(node.folder / "worker.log"),
        env={node.mark: "1"},
    )
    return KeepOrder(id="run-1", processes=(process,), grace_s=1.0, **more)


async def test_the_runner_is_sent_once_and_then_found_in_one_round_trip(
    connection: CountedConnection, tmp_path: Path
) -> None:
    workdir = str(tmp_path / "it's a folder")
    first = NodeRunner(connection, workdir, oldest_python())
    hello = await first.ensure()
    assert hello.version == RunnerFile.packed().sha
    assert connection.calls == ["run", "write", "run"]
    connection.calls.clear()
    second = NodeRunner(connection, workdir, oldest_python())
    assert (await second.ensure()).boot_id == hello.boot_id
    assert connection.calls == ["run"]
    assert second.file == f"{workdir}/node/{RunnerFile.packed().name}"
    await connection.write(second.file, b"damaged")
    await second.ensure()
    assert await connection.read(second.file) == RunnerFile.packed().data


async def test_a_python_is_found_and_the_home_folder_too(
    connection: CountedConnection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = NodeRunner(connection)
    await found.ensure()
    assert found.workdir == f"{tmp_path}/.jupiter"
    assert Path(found.python).is_absolute()
    assert abs((await found.hello()).at - time.time()) < 10


async def test_no_python_names_all_that_was_tried(connection: CountedConnection, tmp_path: Path) -> None:
    old = tmp_path / "old python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    with pytest.raises(NodeUnreachable) as missing:
        await NodeRunner(connection, str(tmp_path), "/no/such/python").ensure()
    assert missing.value.reason == "no_python", "calling again does not mend it"
    assert "/no/such/python is not there" in missing.value.detail
    assert "Python 3.11" in missing.value.fix
    with pytest.raises(RemoteError) as broken:
        await NodeRunner(connection, str(tmp_path), str(old)).ensure()
    assert f"{old} is older than 3.9 or broken" in broken.value.detail


async def test_a_refusal_carries_kind_detail_and_fix(runner: NodeRunner) -> None:
    with pytest.raises(NodeRefused) as refused:
        await runner.verb("no-such-verb")
    assert refused.value.reason == "usage"
    assert "no-such-verb" in refused.value.detail
    assert "follow" in refused.value.fix
    with pytest.raises(NodeRefused) as nothing:
        await runner.state("/no/such/folder")
    assert nothing.value.reason == "missing"


async def test_a_verb_that_crashes_says_so(connection: CountedConnection, tmp_path: Path) -> None:
    runner = NodeRunner(connection, str(tmp_path), oldest_python())
    await runner.ensure()
    runner.file = "/no/such/file.pyz"
    with pytest.raises(RemoteError) as crashed:
        await runner.verb("hello")
    assert crashed.value.exit_status == 2
    assert "No such file" in crashed.value.detail


async def test_a_process_is_kept_followed_and_told(runner: NodeRunner, node: Node) -> None:
    run, copy = node.folder / "run", node.folder / "copy"
    (run / "results").mkdir(parents=True)
    copy.mkdir()
    script = f"cd {run}; echo row >> results/a.jsonl; echo '{{\"seq\": 1}}' >> events.jsonl; sleep 60"
    state = await runner.keep(f"{run}/node", order(node, script))
    assert state.at_work()
    assert state.runner.version == RunnerFile.packed().sha
    mirror = Mirror(copy, ("events.jsonl", "results/*.jsonl"))
    beats = []
    async with aclosing(
        runner.follow(str(run), ("events.jsonl", "results/*.jsonl"), have=mirror.have(), beat_s=0.3)
    ) as frames:
        async for frame in frames:
            await mirror.apply(frame)
            if isinstance(frame, BeatFrame):
                beats.append(frame)
                if len(beats) >= 4 and (copy / "events.jsonl").exists():
                    break
    assert (copy / "results" / "a.jsonl").read_text() == "row\n"
    assert beats[-1].state
    assert beats[-1].state.processes["worker"].state == "running"
    told = await runner.tell(f"{run}/node", {"id": "end", "do": "stop", "grace_s": 1})
    assert told.processes["worker"].signal == "TERM"
    assert await runner.tell(f"{run}/node", {"id": "end", "do": "stop", "grace_s": 1}) == told
    node.keep_folder = run / "node"
    until(lambda: not node.of_ours())
    assert not (await runner.state(f"{run}/node")).at_work()
    assert node.marked() == []


async def test_a_follower_renews_the_lease_and_its_absence_ends_the_work(runner: NodeRunner, node: Node) -> None:
    folder = str(node.keep_folder)
    await runner.keep(folder, order(node, "sleep 60", lease_s=1.5))
    began = time.monotonic()
    frames = runner.follow(folder, ("events.jsonl",), lease=f"{folder}/lease", renew_s=0.3, beat_s=0.5)
    async with aclosing(frames):
        async for frame in frames:
            if isinstance(frame, BeatFrame) and time.monotonic() - began > 3.5:
                assert frame.state
                assert frame.state.processes["worker"].state == "running"
                break
    until(lambda: node.named("leased_out"))
    until(lambda: not node.marked() and not node.of_ours())


async def test_a_follow_that_dies_is_an_error_with_its_reason(runner: NodeRunner, node: Node) -> None:
    with pytest.raises(NodeRefused, match="below the folder"):
        await exhaust(runner.follow(str(node.folder), ("../*",)))
    (node.folder / "a.log").write_bytes(b"x")
    frames = runner.follow(str(node.folder), ("*.log",))
    await anext(frames)
    kill_followers(runner.file)
    with pytest.raises(RemoteError, match="ended with KILL"):
        await asyncio.wait_for(exhaust(frames), 10)


async def exhaust(frames: AsyncIterator[Frame]) -> None:
    async for _ in frames:
        pass


def kill_followers(file: str) -> None:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if file.encode() in words and b"follow" in words:
                os.kill(int(path.parent.name), signal.SIGKILL)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"{",
        b'{"f": "else"}',
        b'{"f": "file", "path": "../etc/passwd", "inode": 1, "offset": 0, "size": 1}',
        b'{"f": "file", "path": "/etc/passwd", "inode": 1, "offset": 0, "size": 1}',
        b'{"f": "file", "path": "results/../a.log", "inode": 1, "offset": 0, "size": 1}',
        b'{"f": "file", "path": "results/.a", "inode": 1, "offset": 0, "size": 1}',
        b'{"f": "file", "path": "other.txt", "inode": 1, "offset": 0, "size": 1}',
        b'{"f": "file", "path": "a\\u0000.log", "inode": 1, "offset": 0, "size": 1}',
        b'{"f": "file", "path": "a\\u001b[2J.log", "inode": 1, "offset": 0, "size": 1}',
        b'{"f": "file", "path": "a.log", "inode": -1, "offset": 0, "size": 1}',
        b'{"f": "file", "path": "a.log", "inode": 1, "offset": -1, "size": 1}',
        b'{"f": "file", "path": "a.log", "inode": 1, "offset": 0, "size": 0}',
        b'{"f": "file", "path": "a.log", "inode": 1, "offset": 0, "size": 1048577}',
        b'{"f": "file", "path": "a.log", "inode": 1, "offset": 0}',
        b'{"f": "reset", "path": "a.log", "inode": 1, "size": -1}',
        b'{"f": "reset", "path": "b/c.log", "inode": 1}',
        b'{"f": "beat", "at": "now"}',
        b'{"f": "beat", "at": 1, "state": []}',
        b'{"f": "beat", "at": 1, "state": {"runner": {"alive": "yes"}, "processes": {}}}',
        b'{"f": "beat", "at": 1, "state": ' + b"[" * 3000 + b"]" * 3000 + b"}",
        b'{"f": "file", "path": "' + b"a" * 600 + b'.log", "inode": 1, "offset": 0, "size": 1}',
        b'\xff{"f": "beat", "at": 1}',
    ],
    ids=lambda line: ascii(line[:50]),
)
def test_frames_that_cannot_be_are_refused(line: bytes) -> None:
    with pytest.raises(RemoteError):
        header_of(line, ("*.log", "results/*"), "node")


def test_texts_of_a_node_cannot_drive_a_terminal() -> None:
    line = b'{"f": "beat", "at": 1, "state": {"runner": {"alive": true, "version": "\\u001b[31mred"}, "processes": {}}}'
    frame, _ = header_of(line, (), "node")
    assert isinstance(frame, BeatFrame)
    assert frame.state
    assert frame.state.runner.version == "red"


async def test_a_flood_without_a_line_end_is_cut_off(connection: CountedConnection, tmp_path: Path) -> None:
    flood = tmp_path / "flood"
    flood.write_text("#!/bin/sh\nhead -c 300000 /dev/zero | tr '\\0' a\nsleep 60\n")
    flood.chmod(0o755)
    liar = NodeRunner(connection, str(tmp_path))
    liar.python, liar.file = str(flood), "unused"
    with pytest.raises(RemoteError, match="longer than"):
        await exhaust(liar.follow("/tmp", ("*.log",)))


RECEIVER = """
import asyncio, sys
from contextlib import aclosing
from pathlib import Path
from jupiter_engine.cluster.mirror import Mirror
from jupiter_engine.cluster.runner import NodeRunner
from jupiter_engine.remote.this_machine import LocalConnection

async def main(source, copy, workdir, python):
    connection = LocalConnection()
    runner = NodeRunner(connection, workdir, python)
    await runner.ensure()
    patterns = ("events.jsonl", "*.log", "results/*.jsonl", "state.json")
    async def before(line):
        await asyncio.sleep(0)
    mirror = Mirror(Path(copy), patterns, before_events=before)
    async with aclosing(runner.follow(source, patterns, have=mirror.have(), poll_s=0.05)) as frames:
        async for frame in frames:
            await mirror.apply(frame)

asyncio.run(main(*sys.argv[1:]))
"""


def written(source: Path, chance: random.Random, number: int) -> None:
    """A worker's doing: rows, events, log lines, a state that is replaced, a results file that is begun anew."""
    for name in ("events.jsonl", "worker.log", "results/a.jsonl", "results/b.jsonl"):
        if chance.random() < 0.8:
            with (source / name).open("ab", buffering=0) as file:
                file.write(f'{{"seq": {number}, "pad": "{"x" * chance.randint(0, 3000)}"}}\n'.encode())
    if chance.random() < 0.3:
        (source / "state.new").write_text(f'{{"number": {number}}}')
        (source / "state.new").replace(source / "state.json")
    if chance.random() < 0.05:
        os.truncate(source / "results" / "b.jsonl", chance.randint(0, (source / "results" / "b.jsonl").stat().st_size))


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_receiver_killed_at_any_moment_loses_and_doubles_nothing(node: Node, seed: int) -> None:
    chance = random.Random(seed)
    source, copy = node.folder / "source", node.folder / "copy"
    (source / "results").mkdir(parents=True)
    copy.mkdir()
    (source / "results" / "b.jsonl").touch()
    argv = [sys.executable, "-c", RECEIVER, str(source), str(copy), str(node.folder / "work"), node.python]
    names = ("events.jsonl", "worker.log", "results/a.jsonl", "results/b.jsonl", "state.json")
    number = 0
    for _ in range(4):
        with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as receiver:
            until(lambda: (node.folder / "work").exists())
            for _ in range(chance.randint(20, 60)):
                number += 1
                written(source, chance, number)
                time.sleep(0.02)
            receiver.kill()
    with subprocess.Popen(argv) as receiver:
        until(lambda: all((copy / name).exists() for name in names if (source / name).exists()))
        until(lambda: all((copy / name).read_bytes() == (source / name).read_bytes() for name in names), 20)
        assert receiver.poll() is None
        receiver.terminate()
    assert number > 60


async def test_following_idle_files_costs_next_to_nothing(runner: NodeRunner, node: Node) -> None:
    run = node.folder / "run"
    (run / "results").mkdir(parents=True)
    for number in range(300):
        (run / "results" / f"{number}.jsonl").write_bytes(b"x\n")
    frames = runner.follow(str(run), ("events.jsonl", "results/*.jsonl", "*.log"), beat_s=0.5)
    spent: list[tuple[float, float]] = []
    async with aclosing(frames):
        async for frame in frames:
            if isinstance(frame, BeatFrame):
                spent.append((time.monotonic(), cpu_s(runner.file)))
                if len(spent) > 8:
                    break
    (first, before), (last, after) = spent[2], spent[-1]
    # The budget is half a percent of a core; a shared test machine and the ticks of its clock get some room.
    assert (after - before) / (last - first) < 0.02


def cpu_s(file: str) -> float:
    """Processor time of the follower so far."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if file.encode() in words and b"follow" in words:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    raise AssertionError("nobody follows")


async def test_a_rate_limit_is_kept_and_beats_go_on(runner: NodeRunner, node: Node) -> None:
    (node.folder / "big.log").write_bytes(b"x" * 600_000)
    received, beats, began = 0, 0, time.monotonic()
    frames = runner.follow(str(node.folder), ("*.log",), limit_bytes_per_s=300_000, beat_s=0.4)
    async with aclosing(frames):
        async for frame in frames:
            received += len(frame.data) if isinstance(frame, FileFrame) else 0
            beats += isinstance(frame, BeatFrame)
            if received == 600_000:
                break
    assert time.monotonic() - began > 1.5
    assert beats >= 3


def test_the_runner_needs_few_files_open(node: Node) -> None:
    """A Mac allows 256 open files by default."""
    for number in range(600):
        (node.folder / f"{number}.log").write_bytes(b"x")
    request = f'{{"root": "{node.folder}", "patterns": ["*.log"]}}\n'.encode()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    with subprocess.Popen(
        node.argv("follow"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=limit
    ) as follow:
        assert follow.stdin
        assert follow.stdout
        follow.stdin.write(request)
        follow.stdin.flush()
        seen = 0
        while seen < 600:
            line = follow.stdout.readline()
            assert line, "it ended early"
            if b'"file"' in line:
                seen += 1
                follow.stdout.read(1)
        follow.stdin.close()
        assert follow.wait(10) == 0
