"""Names with several addresses, some of them dead."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from jupiter_engine.remote.addresses import _alternating, open_socket
from tests.sshd import free_port


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """Of a server on 127.0.0.1 that hangs up at once."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1")
    yield server.sockets[0].getsockname()[1]
    server.close()


@pytest.fixture
async def dead() -> AsyncIterator[int]:
    """A port whose queue of new connections is full: who calls hears nothing."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    callers = []
    for _ in range(4):
        caller = socket.socket()
        caller.setblocking(False)
        caller.connect_ex(listener.getsockname())
        callers.append(caller)
    yield listener.getsockname()[1]
    for one in (*callers, listener):
        one.close()


def resolve(monkeypatch: pytest.MonkeyPatch, *ports: int) -> None:
    async def found(*_: object, **__: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", found)


async def test_a_dead_address_costs_a_moment(port: int, dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, dead, port)
    began = time.monotonic()
    sock = await open_socket("name", 22)
    assert sock.getpeername()[1] == port
    sock.close()
    assert 0.2 < time.monotonic() - began < 3


async def test_a_refusal_goes_on_at_once(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, free_port(), free_port(), port)
    sock = await open_socket("name", 22)
    assert sock.getpeername()[1] == port
    sock.close()


async def test_the_failure_that_says_most_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, free_port(), free_port())
    with pytest.raises(OSError, match="Connect call failed") as caught:
        await open_socket("name", 22)
    assert caught.value.errno == errno.ECONNREFUSED


async def test_an_unknown_name() -> None:
    with pytest.raises(socket.gaierror):
        await open_socket("no-such-machine.invalid", 22)


async def test_given_up_at_any_moment_it_leaves_nothing_open(
    port: int, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, dead, port, port)
    for turns in range(60):
        task = asyncio.create_task(open_socket("name", 22))
        for _ in range(turns % 12):
            await asyncio.sleep(0)
        if turns % 5 == 0:
            await asyncio.sleep(0.25 + turns / 10_000)
        task.cancel()
        done = (await asyncio.gather(task, return_exceptions=True))[0]
        if isinstance(done, socket.socket):
            done.close()
    await asyncio.sleep(0.01)
    # An open socket that nobody holds is a warning here, and warnings are errors.
    gc.collect()


def test_kinds_of_addresses_take_turns() -> None:
    found = [(6, 1), (6, 2), (6, 3), (4, 1)]
    assert _alternating(found) == [(6, 1), (4, 1), (6, 2), (6, 3)]
    assert _alternating(found[:1]) == found[:1]
