"""Lines: called, online, lost, called again, refused; many at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from jupiter_engine.errors import JupiterError, NodeUnreachable, RemoteError
from jupiter_engine.remote import line as line_module
from jupiter_engine.remote.host_keys import KnownHosts
from jupiter_engine.remote.line import Held, Line, line_to
from jupiter_engine.remote.scripted import ScriptedConnection
from jupiter_engine.settings.cluster import ConnectionSettings, NodeSpec
from tests.ssh_server import fleet_known_hosts, ssh_hosts, start_ssh_host
from tests.sshd import Sshd, free_port

SETTINGS = ConnectionSettings(connect_timeout_s=5, keepalive_s=0.2, reconnect_max_s=2)


def unreachable(reason: str) -> NodeUnreachable:
    return NodeUnreachable(f"no: {reason}", host="h", reason=reason)


class Exchange:
    """Plays the machine: each call takes the next of `plan` (None: it answers)."""

    def __init__(self, *plan: Exception | None) -> None:
        self.plan = list(plan)
        self.calls: list[float] = []
        self.connections: list[ScriptedConnection] = []

    async def dial(self) -> Held:
        self.calls.append(time.monotonic())
        await asyncio.sleep(0)
        step = self.plan.pop(0) if self.plan else None
        if step is not None:
            raise step
        self.connections.append(ScriptedConnection({("true",): ""}))
        return self.connections[-1]


@asynccontextmanager
async def open_line(exchange: Exchange, settings: ConnectionSettings = SETTINGS) -> AsyncIterator[Line]:
    line = Line("mini", exchange.dial, settings)
    try:
        yield line
    finally:
        await line.close()


async def until(happened: Callable[[], bool], within_s: float = 5.0) -> None:
    for _ in range(int(within_s / 0.01)):
        if happened():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not happen")


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_module, "FIRST_PAUSE_S", 0.02)


async def test_states_are_told_in_order() -> None:
    exchange = Exchange(unreachable("refused"), None)
    seen: list[tuple[str, str]] = []
    async with open_line(exchange) as line:
        assert line.state == "unknown"
        end = line.listen(lambda it: seen.append((it.state, it.failure.detail if it.failure else "")))
        with pytest.raises(NodeUnreachable, match="no: refused"):
            await line.connection()
        assert line.next_call_at is not None
        line.wake()
        connection = await line.connection()
        assert (await connection.run(["true"])).exit_status == 0
        since = line.since
        assert abs(since - time.time()) < 2
        exchange.connections[0].break_off()
        await until(lambda: line.state == "lost")
        assert isinstance(line.failure, RemoteError)
        assert line.since >= since
        assert (await line.connection(wait_s=3)) is exchange.connections[1]
        end()
        end()
    assert line.state == "unknown"
    assert [state for state, _ in seen] == ["connecting", "connecting", "online", "lost", "online"]
    assert seen[1][1] == "no: refused"
    with pytest.raises(JupiterError, match="closed"):
        await line.connection()


async def test_pauses_double_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_module, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(line_module, "JITTER", 0.0)
    exchange = Exchange(*[unreachable("timeout")] * 6)
    async with open_line(exchange, ConnectionSettings(reconnect_max_s=0.3)) as line:
        assert await line.connection(wait_s=10) is exchange.connections[0]
    pauses = [after - before for before, after in zip(exchange.calls, exchange.calls[1:], strict=False)]
    for pause, expected in zip(pauses, [0.05, 0.1, 0.2, 0.3, 0.3, 0.3], strict=True):
        assert expected <= pause < expected + 0.25


async def test_asking_often_does_not_call_often() -> None:
    exchange = Exchange(*[unreachable("refused")] * 50)
    async with open_line(exchange) as line:
        for _ in range(50):
            with pytest.raises(NodeUnreachable):
                await line.connection()
            await asyncio.sleep(0.005)
        assert len(exchange.calls) <= 2
        began = time.monotonic()
        with pytest.raises(NodeUnreachable):
            await line.connection(wait_s=0.1)
        assert 0.05 < time.monotonic() - began < 2


@pytest.mark.usefixtures("short_pauses")
async def test_what_calling_does_not_mend_waits_for_somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = Exchange(unreachable("auth"), unreachable("host_key_changed"), None)
    async with open_line(exchange) as line:
        with pytest.raises(NodeUnreachable, match="auth"):
            await line.connection(wait_s=10)
        assert line.state == "refused"
        await asyncio.sleep(0.2)
        assert len(exchange.calls) == 1
        line.wake()
        with pytest.raises(NodeUnreachable, match="changed"):
            await line.connection(wait_s=10)
        # People mend things elsewhere: it is tried now and then.
        monkeypatch.setattr(line_module, "REFUSED_PAUSE_S", 0.05)
        line.wake()
        await until(lambda: line.state == "online")


@pytest.mark.usefixtures("short_pauses")
async def test_a_machine_that_hangs_up_at_once_is_not_called_faster_and_faster() -> None:
    exchange = Exchange()
    async with open_line(exchange, ConnectionSettings(reconnect_max_s=30)) as line:
        line.start()
        began = time.monotonic()
        while time.monotonic() - began < 1.0:
            if line.state == "online":
                exchange.connections[-1].break_off()
            await asyncio.sleep(0.005)
        assert 3 <= len(exchange.calls) <= 8


async def test_a_fault_in_the_call_is_the_machines_problem_not_the_end() -> None:
    exchange = Exchange(KeyError("surprise"), None)
    async with open_line(exchange) as line:
        with pytest.raises(RemoteError, match="surprise"):
            await line.connection()
        line.wake()
        assert await line.connection() is exchange.connections[0]


async def test_closing_while_calling_and_while_others_wait() -> None:
    async def dial() -> Held:
        await asyncio.sleep(60)
        raise AssertionError

    line = Line("mini", dial, SETTINGS)
    waiting = [asyncio.create_task(line.connection()) for _ in range(3)]
    await asyncio.sleep(0.05)
    waiting[0].cancel()
    await line.close()
    done = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(done[0], asyncio.CancelledError)
    assert all(isinstance(one, JupiterError) for one in done[1:])
    never = Line("mini", dial, SETTINGS)
    await never.close()


# -- over real connections -----------------------------------------------------------------------------
class Wire:
    """A TCP relay that can stop carrying anything without closing, like a pulled cable."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._flows = asyncio.Event()
        self._flows.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1")
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def pull(self) -> None:
        self._flows.clear()

    def plug_in(self) -> None:
        self._flows.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flows.wait()
        up, down = await asyncio.open_connection("127.0.0.1", self._target)
        for pair in ((reader, down), (up, writer)):
            task = asyncio.create_task(self._carry(*pair))
            self._tasks.add(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


async def test_a_pulled_cable_is_noticed_and_the_machine_called_again(sshd: Sshd, tmp_path: Path) -> None:
    async with Wire(sshd.port) as wire:
        known = KnownHosts(tmp_path / "known", user=(), system=())
        known.own.write_text(f"[127.0.0.1]:{wire.port} {sshd.public_key}\n")
        settings = ConnectionSettings(connect_timeout_s=2, keepalive_s=0.3, reconnect_max_s=1)
        line = line_to(sshd.node(ssh_port=wire.port), settings, known_hosts=known, ssh_config=None)
        try:
            first = await line.connection()
            running = asyncio.create_task(first.run(["sleep", "60"], timeout_s=60))
            await asyncio.sleep(0.2)
            wire.pull()
            pulled = time.monotonic()
            with pytest.raises(NodeUnreachable) as caught:
                await running
            # Three questions unanswered, as the settings say.
            assert 0.9 < time.monotonic() - pulled < 4
            assert caught.value.reason == "lost"
            assert line.state == "lost"
            with pytest.raises(NodeUnreachable):
                await first.run(["true"])
            wire.plug_in()
            second = await line.connection(wait_s=10)
            assert second is not first
            assert (await second.run(["echo", "back"])).stdout == b"back\n"
        finally:
            await line.close()


async def test_a_machine_that_comes_up_late_and_changes_its_key(tmp_path: Path) -> None:
    port = free_port()
    known = KnownHosts(tmp_path / "known", user=(), system=())
    before = await start_ssh_host(tmp_path, {("true",): ""}, port=port)
    known.own.write_text(before.known_hosts_line + "\n")
    await before.stop()
    line = line_to(before.node(), SETTINGS, known_hosts=known, ssh_config=None)
    try:
        with pytest.raises(NodeUnreachable, match="refuses connections"):
            await line.connection()
        other = await start_ssh_host(tmp_path, {("true",): ""}, port=port, identity=before.identity)
        with pytest.raises(NodeUnreachable, match="HAS CHANGED"):
            await line.connection(wait_s=10)
        assert line.state == "refused"
        known.own.write_text(other.known_hosts_line + "\n")
        line.wake()
        assert (await (await line.connection()).run(["true"])).exit_status == 0
        await other.stop()
    finally:
        await line.close()


async def test_sixty_four_machines_at_once(tmp_path: Path) -> None:
    async with ssh_hosts(tmp_path, 64, {("probe",): lambda argv, _data: argv[1]}) as hosts:
        known = fleet_known_hosts(hosts, tmp_path / "known")
        settings = ConnectionSettings(connect_timeout_s=60, reconnect_max_s=2)
        lines = [line_to(host.node(), settings, known_hosts=known, ssh_config=None) for host in hosts]
        try:
            connections = await asyncio.gather(*(line.connection(wait_s=60) for line in lines))
            done = await asyncio.gather(*(one.run(["probe", str(i)]) for i, one in enumerate(connections)))
            assert [int(one.stdout) for one in done] == list(range(64))
            for host in hosts[::2]:
                host.cut()
            await until(lambda: sum(line.state == "online" for line in lines) <= 40)
            again = await asyncio.gather(*(line.connection(wait_s=60) for line in lines))
            assert [a is b for a, b in zip(connections, again, strict=True)] == [False, True] * 32
        finally:
            await asyncio.gather(*(line.close() for line in lines))


async def test_this_machine_has_a_line_too(tmp_path: Path) -> None:
    line = line_to(NodeSpec(), SETTINGS, known_hosts=KnownHosts(tmp_path / "known", user=(), system=()))
    try:
        assert (await (await line.connection()).run(["echo", "here"])).stdout == b"here\n"
    finally:
        await line.close()
