"""The scripted machine and the scripted ssh servers, on which other rooms' tests rely."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from jupiter_engine.errors import RemoteError
from jupiter_engine.remote.port import Completed
from jupiter_engine.remote.scripted import ScriptedConnection
from jupiter_engine.remote.ssh import connect
from jupiter_engine.remote.this_machine import LocalConnection
from jupiter_engine.settings.cluster import ConnectionSettings
from tests.remote.test_connection import group_lives
from tests.ssh_server import ssh_hosts, start_ssh_host


async def test_the_longest_prefix_answers() -> None:
    machine = ScriptedConnection(
        {
            (): Completed(exit_status=9),
            ("uname",): "Darwin\n",
            ("uname", "-m"): b"arm64\n",
            ("fail",): RemoteError("pulled", host="h"),
            ("echo",): lambda argv, data: " ".join(argv[1:]) + data.decode(),
        }
    )
    assert (await machine.run(["uname", "-s"])).stdout == b"Darwin\n"
    assert (await machine.run(["uname", "-m", "-x"])).stdout == b"arm64\n"
    assert (await machine.run(["other"])).exit_status == 9
    assert (await machine.run(["echo", "a", "b"], stdin=b"!")).stdout == b"a b!"
    with pytest.raises(RemoteError, match="pulled"):
        await machine.run(["fail"])
    assert machine.asked[-1] == ("fail",)
    assert (await ScriptedConnection().run(["x"])).exit_status == 127


async def test_a_scripted_machine_can_be_lost() -> None:
    machine = ScriptedConnection({("a",): ""})
    waiting = asyncio.create_task(machine.wait_lost())
    machine.break_off()
    assert (await waiting).host == "scripted"
    with pytest.raises(RemoteError, match="lost"):
        await machine.run(["a"])


async def test_scripted_ssh_servers_answer_through_real_ssh(tmp_path: Path) -> None:
    answers = {
        ("uname", "-s"): "Darwin\n",
        ("odd",): Completed(exit_status=None, signal="KILL", stderr=b"why"),
        ("upper",): lambda argv, data: data.upper() + argv[1].encode(),
    }
    async with ssh_hosts(tmp_path, 2, answers, names=["a", "b"]) as hosts:  # type: ignore[arg-type]
        for host in hosts:
            connection = await connect(
                host.node(), ConnectionSettings(), known_hosts=host.known_hosts(), ssh_config=None
            )
            assert connection.name == host.name
            assert (await connection.run(["uname", "-s"])).stdout == b"Darwin\n"
            assert (await connection.run(["upper", "é\n'"], stdin=b"x")).stdout == "Xé\n'".encode()
            done = await connection.run(["odd"])
            assert (done.signal, done.exit_status, done.stderr) == ("KILL", None, b"why")
            assert (await connection.run(["missing"])).exit_status == 127
            assert host.asked == [("uname", "-s"), ("upper", "é\n'"), ("odd",), ("missing",)]
            await connection.close()


async def test_start_up_noise_of_a_scripted_server_is_cut_off(tmp_path: Path) -> None:
    host = await start_ssh_host(tmp_path, {("a",): "answer"}, start_up_noise=b"Welcome\r\n\x1b[31m")
    connection = await connect(host.node(), ConnectionSettings(), known_hosts=host.known_hosts(), ssh_config=None)
    assert (await connection.run(["a"])).stdout == b"answer"
    await connection.close()
    await host.stop()


async def gone(*groups: int) -> None:
    """Wait until nothing of these process groups is left."""
    for _ in range(100):
        if not any(map(group_lives, groups)):
            return
        await asyncio.sleep(0.02)
    pytest.fail("a process was left")


# -- this machine --------------------------------------------------------------------------------------
async def test_a_stream_lives_on_after_it_is_closed_but_not_after_its_connection(tmp_path: Path) -> None:
    machine = LocalConnection("here")
    stream = await machine.stream(["sh", "-c", f"echo $$ >{tmp_path}/pid; echo begun; sleep 60"])
    assert await stream.read_line(100) == b"begun"
    group = int((tmp_path / "pid").read_text())
    await stream.close()
    assert group_lives(group)
    await machine.close()
    await gone(group)
    assert (await machine.wait_lost()).host == "localhost"


async def test_cancelled_commands_of_this_machine_are_ended(tmp_path: Path) -> None:
    machine = LocalConnection()
    for delay_s in (0.0, 0.001, 0.002, 0.004, 0.01, 0.1) * 3:
        task = asyncio.create_task(machine.run(["sh", "-c", f"echo $$ >>{tmp_path}/pids; sleep 60 & wait"]))
        await asyncio.sleep(delay_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    groups = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert groups
    await gone(*groups)


async def test_commands_here_begin_where_they_do_over_ssh() -> None:
    machine = LocalConnection()
    assert (await machine.run(["pwd"])).stdout.decode().strip() == str(Path.home().resolve())
