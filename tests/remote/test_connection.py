"""What every Connection does: one suite over this machine, a real sshd, and the scripted machine."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from jupiter_engine.errors import RemoteError, UsageError
from jupiter_engine.remote.port import Completed, Connection
from jupiter_engine.remote.scripted import ScriptedConnection
from jupiter_engine.remote.ssh import connect
from jupiter_engine.remote.this_machine import LocalConnection
from jupiter_engine.settings.cluster import ConnectionSettings
from tests.sshd import Sshd

SPEAK = ("/bin/sh", "-c", "cat; echo oops >&2; exit 3")
DIE = ("/bin/sh", "-c", "kill -TERM $$")
LINES = ("/bin/sh", "-c", 'cat >/dev/null; printf "one\\ntwo\\n\\nfour"')
FLOOD = ("/bin/sh", "-c", "head -c 3000000 /dev/zero")

ANSWERS = {
    ("cat",): lambda _argv, data: data,
    SPEAK: lambda _argv, data: Completed(exit_status=3, stdout=data, stderr=b"oops\n"),
    DIE: Completed(exit_status=None, signal="TERM"),
    LINES: "one\ntwo\n\nfour",
    FLOOD: bytes(3_000_000),
    ("printf",): lambda argv, _data: argv[2].encode(),
}


@pytest.fixture(params=["local", "ssh", "scripted"])
async def machine(request: pytest.FixtureRequest) -> AsyncIterator[Connection]:
    connection: Connection
    if request.param == "local":
        connection = LocalConnection()
    elif request.param == "ssh":
        sshd: Sshd = request.getfixturevalue("sshd")
        settings = ConnectionSettings()
        connection = await connect(sshd.node(), settings, known_hosts=sshd.trusted(), ssh_config=None)
    else:
        connection = ScriptedConnection(ANSWERS)  # type: ignore[arg-type]
    yield connection
    await connection.close()


async def test_output_errors_and_status_arrive_as_they_are(machine: Connection) -> None:
    data = bytes(range(256)) * 4000
    done = await machine.run(SPEAK, stdin=data)
    assert (done.exit_status, done.signal, done.stderr) == (3, "", b"oops\n")
    assert done.stdout == data


async def test_a_signal_is_no_exit_status(machine: Connection) -> None:
    done = await machine.run(DIE)
    assert (done.exit_status, done.signal) == (None, "TERM")


async def test_a_missing_program_is_status_127(machine: Connection) -> None:
    done = await machine.run(["jupiter-has-no-such-program"])
    assert done.exit_status == 127
    assert b"not found" in done.stderr


async def test_arguments_arrive_exactly(machine: Connection) -> None:
    for text in ("it's", "$(id); `id`", "a\nb\n", "\\", "-n", "日本 \x1b[31m!", ""):
        done = await machine.run(["printf", "%s", text])
        assert done.stdout.decode() == text


async def test_more_output_than_allowed_is_an_error(machine: Connection) -> None:
    with pytest.raises(RemoteError, match="wrote") as caught:
        await machine.run(FLOOD, limit_bytes=1_000_000)
    assert caught.value.argv == FLOOD
    assert len((await machine.run(FLOOD, limit_bytes=3_000_000)).stdout) == 3_000_000


async def test_many_at_once(machine: Connection) -> None:
    done = await asyncio.gather(*(machine.run(["cat"], stdin=str(i).encode()) for i in range(30)))
    assert [int(one.stdout) for one in done] == list(range(30))


async def test_a_stream_is_read_in_pieces(machine: Connection) -> None:
    stream = await machine.stream(["cat"])
    await stream.write(b"head")
    await stream.write(b"er\nbody")
    await stream.close_input()
    assert await stream.read_line(100) == b"header"
    assert await stream.read_exactly(2) == b"bo"
    assert await stream.read(100) == b"dy"
    assert await stream.read(100) == b""
    assert (await stream.wait()).exit_status == 0
    await stream.close()


async def test_lines_end_with_an_empty_one_and_a_short_read_is_an_error(machine: Connection) -> None:
    stream = await machine.stream(LINES)
    await stream.close_input()
    lines = [await stream.read_line(10) for _ in range(5)]
    assert lines == [b"one", b"two", b"", b"four", b""]
    with pytest.raises(RemoteError):
        await stream.read_exactly(1)
    await stream.close()


async def test_a_line_without_end_is_an_error(machine: Connection) -> None:
    stream = await machine.stream(FLOOD)
    await stream.close_input()
    with pytest.raises(RemoteError, match="line"):
        await stream.read_line(65536)
    await stream.close()


async def test_files_are_written_whole_and_read_from_an_offset(machine: Connection, tmp_path: Path) -> None:
    path = str(tmp_path / "new folder" / "it's $(id)\n.json")
    assert await machine.read(path) == b""
    data = bytes(range(256)) * 3000
    await machine.write(path, data, mode=0o600)
    assert await machine.read(path) == data
    assert await machine.read(path, offset_bytes=700_000) == data[700_000:]
    assert await machine.read(path, offset_bytes=len(data)) == b""
    await machine.write(path, b"second")
    assert await machine.read(path) == b"second"
    with pytest.raises(RemoteError):
        await machine.read(path, limit_bytes=3)


async def test_file_modes_and_leftovers(machine: Connection, tmp_path: Path) -> None:
    if isinstance(machine, ScriptedConnection):
        pytest.skip("keeps no real files")
    await machine.write(str(tmp_path / "key"), b"secret", mode=0o600)
    await machine.write(str(tmp_path / "tool"), b"#!/bin/sh\n", mode=0o755)
    assert modes(tmp_path) == {"key": 0o600, "tool": 0o755}
    (tmp_path / "folder").mkdir()
    with pytest.raises(RemoteError):
        await machine.write(str(tmp_path / "folder"), b"x")
    assert sorted(modes(tmp_path)) == ["folder", "key", "tool"]
    assert not modes(tmp_path / "folder")


async def test_files_go_there_and_back(machine: Connection, tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    source.mkdir()
    contents = {
        "plain": b"x" * 1000,
        "deep/er/-dash it's\n": bytes(600_000),
        "empty": b"",
        "n" * 150 + "/" + "m" * 200: b"long",
        "日本": b"unicode",
    }
    files = []
    for i, (name, data) in enumerate(contents.items()):
        (source / str(i)).write_bytes(data)
        files.append((source / str(i), name))
    (source / "0").chmod(0o755)
    sent: list[int] = []
    fetched: list[int] = []
    there = str(tmp_path / "there")
    await machine.send(files, there, sent.append)
    await machine.fetch(there, [*contents], back, fetched.append)
    total = sum(map(len, contents.values()))
    assert (sent[-1], fetched[-1]) == (total, total)
    assert {name: (back / name).read_bytes() for name in contents} == contents
    if not isinstance(machine, ScriptedConnection):
        assert (back / "plain").stat().st_mode & 0o777 == 0o755
        assert (tmp_path / "there" / "plain").stat().st_uid == (source / "0").stat().st_uid


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "", "a//b", "./a", "a/."])
async def test_names_never_lead_out_of_the_folder(machine: Connection, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(RemoteError, match="no name below"):
        await machine.send([(tmp_path / "file", name)], str(tmp_path / "there" / "below"))
    with pytest.raises(RemoteError, match="no name below"):
        await machine.fetch(str(tmp_path), [name], tmp_path / "back")
    assert not (tmp_path / "there" / "out").exists()


async def test_a_missing_file_is_named(machine: Connection, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="nowhere"):
        await machine.fetch(str(tmp_path), ["nowhere"], tmp_path / "back")


async def test_a_closed_connection_says_so(machine: Connection) -> None:
    if isinstance(machine, LocalConnection):
        pytest.skip("this machine does not go away")
    await machine.close()
    with pytest.raises(RemoteError, match="connection was lost"):
        await machine.run(["cat"])


async def test_time_is_limited(machine: Connection, tmp_path: Path) -> None:
    if isinstance(machine, ScriptedConnection):
        pytest.skip("answers at once")
    script = f"echo $$ >{tmp_path}/pid; sleep 100 & wait"
    with pytest.raises(RemoteError, match=r"did not end in 0\.5 s") as caught:
        await machine.run(["/bin/sh", "-c", script], timeout_s=0.5)
    assert caught.value.host == machine.host
    # What nobody waits for is not left running, nor what it started.
    group = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not group_lives(group):
            break
        await asyncio.sleep(0.1)
    assert not group_lives(group)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def group_lives(group: int) -> bool:
    """Any process of the group that is not a zombie."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[2]) == group:
            return True
    return False


@pytest.mark.parametrize("vector", [[], [""], ["cat", "a\0b"]])
async def test_impossible_vectors_are_refused(machine: Connection, vector: list[str]) -> None:
    if isinstance(machine, ScriptedConnection):
        pytest.skip("runs nothing")
    with pytest.raises(UsageError):
        await machine.run(vector)
    assert (await machine.run(["true"])).exit_status == 0
