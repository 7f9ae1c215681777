"""Commands over real sshd, and over servers that behave badly."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from jupiter_engine.errors import NodeUnreachable, RemoteError
from jupiter_engine.remote.ssh import SshConnection, connect
from jupiter_engine.remote.ssh_sessions import SESSIONS, STREAMS
from jupiter_engine.settings.cluster import ConnectionSettings
from tests.remote.test_connection import group_lives
from tests.ssh_server import PID, Play, Reply, ServerProcess, ssh_hosts
from tests.sshd import Sshd, start_sshd

NOISE = 'echo "Welcome \x1b[31mto the machine"; echo "jupiter-begin-0 1"; printf "no newline"; echo "tty?" >&2'


StartUp = Callable[[str], object]


@pytest.fixture
def bashrc(sshd_home: Path) -> Iterator[StartUp]:
    """Writes the start-up file of the account."""
    path = sshd_home / ".bashrc"
    yield path.write_text
    path.unlink(missing_ok=True)


@asynccontextmanager
async def calling(server: Sshd) -> AsyncIterator[SshConnection]:
    connection = await connect(server.node(), ConnectionSettings(), known_hosts=server.trusted(), ssh_config=None)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def playing(tmp_path: Path, answers: dict[tuple[str, ...], Reply]) -> AsyncIterator[SshConnection]:
    """A connection to a scripted server."""
    async with ssh_hosts(tmp_path, 1, answers) as hosts:
        connection = await connect(
            hosts[0].node(), ConnectionSettings(), known_hosts=hosts[0].known_hosts(), ssh_config=None
        )
        try:
            yield connection
        finally:
            await connection.close()


async def until(happened: Callable[[], bool]) -> None:
    """Wait up to ten seconds for something on the other side."""
    for _ in range(200):
        if happened():
            return
        await asyncio.sleep(0.05)
    pytest.fail("it did not happen")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- login shells --------------------------------------------------------------------------------------
async def test_what_start_up_files_print_is_no_output(ssh: SshConnection, bashrc: StartUp) -> None:
    bashrc(NOISE + "\n")
    done = await ssh.run(["sh", "-c", "printf out; printf err >&2"])
    assert (done.stdout, done.stderr) == (b"out", b"err")
    stream = await ssh.stream(["printf", "line"])
    assert await stream.read_line(100) == b"line"
    await stream.close()


async def test_start_up_files_that_never_stop_printing_are_found_out(ssh: SshConnection, bashrc: StartUp) -> None:
    bashrc("yes noise\n")
    with pytest.raises(NodeUnreachable) as caught:
        await ssh.run(["true"], timeout_s=20)
    assert caught.value.reason == "shell"
    assert "noise noise" in caught.value.detail
    assert len(caught.value.detail) < 1000


async def test_start_up_files_that_hang_or_leave_are_found_out(ssh: SshConnection, bashrc: StartUp) -> None:
    bashrc("echo choose a desktop; exec sleep 60\n")
    with pytest.raises(NodeUnreachable, match="choose a desktop") as caught:
        await ssh.run(["true"], timeout_s=1)
    assert caught.value.reason == "shell"
    bashrc("echo out of order; exit 0\n")
    with pytest.raises(NodeUnreachable, match="out of order"):
        await ssh.run(["true"])


async def test_an_account_without_a_shell(tmp_path: Path) -> None:
    nologin = tmp_path / "nologin"
    nologin.write_text("#!/bin/sh\necho 'This account is currently not available.'\nexit 1\n")
    nologin.chmod(0o755)
    server = start_sshd(tmp_path / "sshd", force=str(nologin))
    try:
        async with calling(server) as connection:
            with pytest.raises(NodeUnreachable, match="currently not available") as caught:
                await connection.run(["true"])
            assert caught.value.reason == "shell"
            with pytest.raises(NodeUnreachable, match="currently not available"):
                await (await connection.stream(["true"])).read(10)
    finally:
        server.stop()


@pytest.mark.parametrize("program", ["dash", "zsh", "fish", "tcsh"])
async def test_everything_works_through_other_login_shells(program: str, tmp_path: Path) -> None:
    path = Path("/usr/bin") / program
    if not path.exists():
        pytest.skip(f"no {program} here")
    server = start_sshd(tmp_path / "sshd", shell=str(path), force_env={"HOME": str(tmp_path)})
    try:
        async with calling(server) as connection:
            name = str(tmp_path / "it's $(id) `x` \\ ! \n é")
            await connection.write(name, b"data", mode=0o600)
            assert await connection.read(name, offset_bytes=1) == b"ata"
            (tmp_path / "source").write_bytes(b"x" * 5000)
            await connection.send([(tmp_path / "source", "a b/'c'")], f"{name}.d")
            await connection.fetch(f"{name}.d", ["a b/'c'"], tmp_path / "back")
            assert (tmp_path / "back" / "a b" / "'c'").read_bytes() == b"x" * 5000
    finally:
        server.stop()


async def test_scripted_tools_come_first(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sw_vers").write_text("#!/bin/sh\necho 26.2\n")
    (tools / "sw_vers").chmod(0o755)
    server = start_sshd(tmp_path / "sshd", path_first=tools)
    try:
        async with calling(server) as connection:
            assert (await connection.run(["sw_vers"])).stdout == b"26.2\n"
    finally:
        server.stop()


# -- sessions ------------------------------------------------------------------------------------------
async def test_more_commands_than_sessions_queue(ssh: SshConnection) -> None:
    done = await asyncio.gather(*(ssh.run(["sh", "-c", "sleep 0.1; echo $0", str(i)]) for i in range(25)))
    assert [int(one.stdout) for one in done] == list(range(25))


async def test_streams_leave_room_for_commands(ssh: SshConnection) -> None:
    streams = [await ssh.stream(["cat"]) for _ in range(STREAMS)]
    waiting = asyncio.create_task(ssh.stream(["echo", "late"]))
    done = await asyncio.gather(*(ssh.run(["echo", str(i)]) for i in range(10)))
    assert len(done) == 10
    assert not waiting.done()
    await streams[0].close()
    late = await waiting
    assert await late.read(10) == b"late\n"
    for stream in [*streams, late]:
        await stream.close()


@pytest.mark.parametrize("allowed", [1, 3])
async def test_a_server_that_allows_few_sessions(allowed: int, tmp_path: Path) -> None:
    server = start_sshd(tmp_path / "sshd", options=[f"MaxSessions {allowed}"], force_env={"HOME": str(tmp_path)})
    try:
        async with calling(server) as connection:
            for _ in range(2):
                done = await asyncio.gather(*(connection.run(["echo", str(i)]) for i in range(SESSIONS)))
                assert [int(one.stdout) for one in done] == list(range(SESSIONS))
            stream = await connection.stream(["cat"])
            if allowed == 1:
                with pytest.raises(NodeUnreachable, match="in use") as caught:
                    await connection.run(["echo", "late"], timeout_s=0.5)
                assert caught.value.reason == "sessions"
            await stream.close()
            assert (await connection.run(["echo", "late"])).stdout == b"late\n"
    finally:
        server.stop()


async def test_a_server_that_allows_none(tmp_path: Path) -> None:
    server = start_sshd(tmp_path / "sshd", options=["MaxSessions 0"])
    try:
        async with calling(server) as connection:
            with pytest.raises(NodeUnreachable, match="no further session") as caught:
                await connection.run(["true"])
            assert caught.value.reason == "sessions"
            assert "MaxSessions" in caught.value.fix
    finally:
        server.stop()


async def test_cancelled_commands_free_their_session_and_end(ssh: SshConnection, tmp_path: Path) -> None:
    script = f"echo $$ >>{tmp_path}/pids; sleep 100"
    for delay_s in (0.0, 0.001, 0.005, 0.02, 0.05, 0.3) * 3:
        task = asyncio.create_task(ssh.run(["sh", "-c", script]))
        await asyncio.sleep(delay_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    done = await asyncio.gather(*(ssh.run(["echo", str(i)]) for i in range(10)))
    assert len(done) == 10
    groups = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert groups
    await until(lambda: not any(map(group_lives, groups)))


async def test_closing_still_ends_what_was_given_up(sshd: Sshd, tmp_path: Path) -> None:
    async with calling(sshd) as connection:
        with pytest.raises(RemoteError, match="did not end"):
            await connection.run(["sh", "-c", f"echo $$ >{tmp_path}/pid; exec sleep 100"], timeout_s=0.5)
    group = int((tmp_path / "pid").read_text())
    await until(lambda: not group_lives(group))


async def test_a_command_that_ignores_sigterm_is_killed(ssh: SshConnection, tmp_path: Path) -> None:
    script = f"trap '' TERM; echo $$ >{tmp_path}/pid; while :; do sleep 0.1; done"
    with pytest.raises(RemoteError, match="did not end"):
        await ssh.run(["sh", "-c", script], timeout_s=0.5)
    group = int((tmp_path / "pid").read_text())
    await until(lambda: not group_lives(group))


# -- the connection ends -------------------------------------------------------------------------------
async def test_a_connection_that_breaks_under_everything(sshd: Sshd) -> None:
    async with calling(sshd) as connection:
        stream = await connection.stream(["sh", "-c", "echo begun; sleep 60"])
        assert await stream.read_line(100) == b"begun"
        reading = asyncio.create_task(stream.read(10))
        running = asyncio.create_task(connection.run(["sleep", "60"]))
        await asyncio.sleep(0.3)
        sshd.cut()
        for task in (reading, running):
            with pytest.raises(NodeUnreachable) as caught:
                await task
            assert caught.value.reason == "lost"
        # Cut off, not ended: nobody may take what came so far for all there was.
        with pytest.raises(NodeUnreachable):
            await stream.read_line(100)
        with pytest.raises(NodeUnreachable):
            await stream.wait()
        with pytest.raises(RemoteError):
            await stream.write(b"x")
        assert (await connection.wait_lost()).reason == "lost"  # type: ignore[attr-defined]
        with pytest.raises(NodeUnreachable, match="lost"):
            await connection.run(["true"])
        await stream.close()


async def test_a_file_that_is_cut_off_gets_no_name(sshd: Sshd, tmp_path: Path) -> None:
    async with calling(sshd) as connection:
        (tmp_path / "there").write_bytes(b"before")
        writing = asyncio.create_task(connection.write(str(tmp_path / "there"), bytes(200_000_000)))
        await until(lambda: len(names(tmp_path)) > 1)
        sshd.cut()
        with pytest.raises(RemoteError):
            await writing
        await until(lambda: names(tmp_path) == ["there"])
        assert (tmp_path / "there").read_bytes() == b"before"


async def test_what_the_other_tar_says_is_told(ssh: SshConnection, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(2_000_000))
    (tmp_path / "in the way").write_text("")
    with pytest.raises(RemoteError, match="in the way"):
        await ssh.send([(tmp_path / "file", "a")], str(tmp_path / "in the way" / "below"))
    (tmp_path / "there" / "a").mkdir(parents=True)
    (tmp_path / "there" / "a" / "full").write_text("")
    with pytest.raises(RemoteError, match="a: Cannot"):
        await ssh.send([(tmp_path / "file", "a")] * 3, str(tmp_path / "there"))


async def test_a_stream_does_not_run_away_from_a_slow_reader(ssh: SshConnection) -> None:
    stream = await ssh.stream(["sh", "-c", "head -c 100000000 /dev/zero"])
    await asyncio.sleep(0.5)
    assert len(stream._command.output) < 20_000_000
    total = 0
    while data := await stream.read(1 << 20):
        total += len(data)
    assert total == 100_000_000
    assert (await stream.wait()).exit_status == 0
    await stream.close()


async def test_a_line_longer_than_the_buffer_is_read_if_it_is_allowed(ssh: SshConnection) -> None:
    stream = await ssh.stream(["sh", "-c", "head -c 12000000 /dev/zero | tr '\\0' x; echo; echo next"])
    assert len(await stream.read_line(16_000_000)) == 12_000_000
    assert await stream.read_line(100) == b"next"
    await stream.close()


async def test_errors_without_end_do_not_stop_the_output(ssh: SshConnection) -> None:
    stream = await ssh.stream(["sh", "-c", "head -c 30000000 /dev/zero >&2; echo done; exit 4"])
    assert await stream.read_line(100) == b"done"
    done = await stream.wait()
    assert done.exit_status == 4
    assert len(done.stderr) <= 64 << 10
    await stream.close()


async def test_commands_that_outlive_their_session(ssh: SshConnection, tmp_path: Path) -> None:
    script = f"(sleep 1; echo yes >{tmp_path}/late) >/dev/null 2>&1 </dev/null & echo started"
    began = time.monotonic()
    assert (await ssh.run(["sh", "-c", script])).stdout == b"started\n"
    assert time.monotonic() - began < 1
    await until(lambda: "late" in names(tmp_path))


# -- hostile servers -----------------------------------------------------------------------------------
def endless(data: bytes, *, to_errors: bool = False) -> Play:
    async def play(process: ServerProcess, argv: tuple[str, ...]) -> None:
        output = process.stderr if to_errors else process.stdout
        while True:
            output.write(data)
            await output.drain()

    return Play(play)


async def _leave(process: ServerProcess, argv: tuple[str, ...]) -> None:
    process.stdout.write(b"half an ans")
    process.close()


async def test_floods_are_cut_off(tmp_path: Path) -> None:
    answers: dict[tuple[str, ...], Reply] = {
        ("out",): endless(b"x" * 30_000),
        ("err",): endless(b"\x1b[2J" * 8000, to_errors=True),
        ("ok",): "fine",
    }
    async with playing(tmp_path, answers) as connection:
        for program in ("out", "err"):
            with pytest.raises(RemoteError, match="wrote more than") as caught:
                await connection.run([program], limit_bytes=1 << 20)
            assert "\x1b" not in caught.value.output_tail
        stream = await connection.stream(["out"])
        with pytest.raises(RemoteError, match="line"):
            await stream.read_line(1 << 16)
        await stream.close()
        assert (await connection.run(["ok"])).stdout == b"fine"


async def test_a_session_that_ends_without_a_status_is_no_success(tmp_path: Path) -> None:
    async with playing(tmp_path, {("leave",): Play(_leave)}) as connection:
        with pytest.raises(RemoteError, match="without saying"):
            await connection.run(["leave"])


def sends(tar: bytes) -> Callable[[tuple[str, ...], bytes], bytes]:
    return lambda _argv, _data: tar


async def test_hostile_archives_do_not_get_out(tmp_path: Path) -> None:
    from tests.remote.test_tar_stream import END, HOSTILE

    for number, (name, stream) in enumerate(HOSTILE.items()):
        if name == "too large":
            continue
        folder = tmp_path / str(number)
        async with playing(folder, {("/bin/sh",): sends(stream + END)}) as connection:
            with pytest.raises(RemoteError, match=r"not asked for|cannot be read"):
                await connection.fetch("/anywhere", ["a"], folder / "target", limit_bytes=1 << 20)
        assert not (folder / "out").exists()
        assert {path.name for path in (folder / "target").rglob("*")} <= {"a"}


async def test_an_archive_without_end_is_bounded(tmp_path: Path) -> None:
    from tests.remote.test_tar_stream import entry

    async def play(process: ServerProcess, argv: tuple[str, ...]) -> None:
        process.stdout.write(entry("a", b"", pax_headers={"size": "999999999999"}))
        while True:
            process.stdout.write(bytes(30_000))
            await process.stdout.drain()

    async with playing(tmp_path, {("/bin/sh",): Play(play)}) as connection:
        with pytest.raises(RemoteError, match="more than"):
            await connection.fetch("/anywhere", ["a"], tmp_path / "target", limit_bytes=1 << 20)
    assert not [*(tmp_path / "target").rglob("*")]


def test_the_process_number_of_a_scripted_server_is_nobodys() -> None:
    # `run` asks the other side to kill this number; it must be no process here even if a test got that wrong.
    assert not Path(f"/proc/{PID}").exists()
