"""A TCP connection to a name with several addresses, without waiting long for the ones that are dead.

The next address is tried a quarter of a second after the one before, beside it; the first that answers wins.
asyncio has this too (`happy_eyeballs_delay`), but there a call that is given up at the wrong moment leaves an
open socket behind, seen on Python 3.11.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from typing import Any, Final

NEXT_ADDRESS_S: Final = 0.25
# Of several failures, the one that says most about the machine.
TELLING: Final = (errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH)


async def open_socket(
    host: str, port: int, *, family: int = socket.AF_UNSPEC, local_address: tuple[str, int] | None = None
) -> socket.socket:
    """Raises OSError (socket.gaierror for an unknown name). Cancelled at any point, it leaves nothing open."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
    waiting = deque(_alternating(found))
    trying: set[asyncio.Task[socket.socket]] = set()
    errors: list[OSError] = []
    try:
        while waiting or trying:
            if waiting:
                trying.add(asyncio.create_task(_connected(waiting.popleft(), local_address)))
            pause_s = NEXT_ADDRESS_S if waiting else None
            done, _ = await asyncio.wait(trying, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if error is None:
                    trying.discard(task)
                    return task.result()
                if not isinstance(error, OSError):
                    raise error
                errors.append(error)
                trying.discard(task)
    finally:
        # Nothing is awaited here: whoever gives up a second time would lose the sockets.
        for task in trying:
            task.cancel()
            task.add_done_callback(_close)
    order = {number: place for place, number in enumerate(TELLING)}
    raise min(errors, key=lambda error: order.get(error.errno or 0, len(order)))


def _alternating(found: list[Any]) -> list[Any]:
    """The system's order, but IPv4 and IPv6 in turn: when one of the two does not work at all, half are dead."""
    first = [info for info in found if info[0] == found[0][0]]
    other = [info for info in found if info[0] != found[0][0]]
    longest = max(len(first), len(other))
    return [info for place in range(longest) for group in (first, other) for info in group[place : place + 1]]


def _close(task: asyncio.Task[socket.socket]) -> None:
    """One that connected too late, or beside the winner."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


async def _connected(info: Any, local_address: tuple[str, int] | None) -> socket.socket:
    family, kind, protocol, _, address = info
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        if local_address is not None:
            sock.bind(local_address)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock
