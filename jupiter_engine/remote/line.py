"""A node's connection over time: called, kept, lost, called again; with what people want to know about it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Protocol

from jupiter_engine.errors import JupiterError, RemoteError
from jupiter_engine.protocol.fleet import NodeState
from jupiter_engine.remote import failures
from jupiter_engine.remote.host_keys import SSH_CONFIG as SSH_CONFIG
from jupiter_engine.remote.host_keys import KnownHosts
from jupiter_engine.remote.port import Connection
from jupiter_engine.settings.cluster import ConnectionSettings, NodeSpec

FIRST_PAUSE_S: Final = 0.5
# What calling again does not mend is still tried now and then: people mend things elsewhere and tell nobody.
REFUSED_PAUSE_S: Final = 60.0
# A connection that lasted this long was a good one; before, a machine that hangs up at once is not called faster
# and faster.
GOOD_AFTER_S: Final = 10.0
# Of each pause, at random: a fleet that lost its switch does not call in step.
JITTER: Final = 0.25


class Held(Connection, Protocol):
    """A connection that says when it is over."""

    async def wait_lost(self) -> RemoteError: ...


Dial = Callable[[], Awaitable[Held]]
Listener = Callable[["Line"], None]


class Line:
    """Keeps one machine connected until `close`. Everything runs in the event loop that called `start`."""

    def __init__(self, name: str, dial: Dial, settings: ConnectionSettings) -> None:
        self.name = name
        self.state: NodeState = "unknown"
        self.since = time.time()
        """Seconds since the epoch at which `state` began."""
        self.failure: JupiterError | None = None
        """Why the last call or connection failed; None while online."""
        self.next_call_at: float | None = None
        """Seconds since the epoch; None while calling or online."""
        self._dial = dial
        self._settings = settings
        self._held: Held | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._outcome = asyncio.Event()
        self._listeners: list[Listener] = []
        self._closed = False
        self._answered = False

    def start(self) -> None:
        """Begin calling; again does nothing."""
        if self._task is None and not self._closed:
            self._task = asyncio.create_task(self._keep(), name=f"line to {self.name}")

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Be told after every change of `state` or `failure`; the result ends that."""
        self._listeners.append(listener)

        def end() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return end

    def wake(self) -> None:
        """Call at once instead of at the end of the pause: a person has mended something, or is waiting."""
        self.next_call_at = None
        self._wake.set()
        if self.state == "refused":
            self._set("connecting", self.failure)

    async def connection(self, *, wait_s: float | None = None) -> Connection:
        """The connection. While it is being called: what comes of that, or its failure. In a pause between two
        calls: the last failure at once, or with `wait_s` whatever comes in that time. Never calls more often than
        the pauses say, however often it is asked; `wake` does."""
        self.start()
        deadline = None if wait_s is None else time.monotonic() + wait_s
        while self._held is None:
            if self._closed:
                raise failures.lost(self.name, self.name, "Jupiter closed it")
            if self.state == "refused" or (deadline is None and self.next_call_at is not None):
                raise self._reason()
            self._outcome.clear()
            try:
                async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                    await self._outcome.wait()
            except TimeoutError:
                raise self._reason() from None
        return self._held

    def _reason(self) -> JupiterError:
        return self.failure or failures.lost(self.name, self.name, "it is being called")

    async def close(self) -> None:
        """Hang up and call no more."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._set("unknown", None)
        self._outcome.set()

    # -- keeping -------------------------------------------------------------------------------------------
    async def _keep(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            if self.state == "unknown":
                self._set("connecting", None)
            lasted_s = await self._once()
            if lasted_s > GOOD_AFTER_S:
                pause_s = FIRST_PAUSE_S
            await self._pause(REFUSED_PAUSE_S if self.state == "refused" else pause_s)
            pause_s = min(pause_s * 2, self._settings.reconnect_max_s)

    async def _once(self) -> float:
        """One call, and the connection if it comes about; how long that lasted, 0 if it did not."""
        held: Held | None = None
        began = time.monotonic()
        failure: JupiterError
        self._wake.clear()
        try:
            held = self._held = await self._dial()
            began = time.monotonic()
            self._answered = True
            self._set("online", None)
            self._outcome.set()
            failure = await held.wait_lost()
        except JupiterError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - a fault in calling one machine is shown as that machine's problem
            text = f"{self.name}: the call failed: {type(error).__name__}: {error}"
            failure = RemoteError(text, host=self.name)
        finally:
            self._held = None
            if held is not None:
                await held.close()
        if held is None and failures.lasting(failure):
            state: NodeState = "refused"
        else:
            state = "lost" if self._answered else "connecting"
        self._failed(state, failure)
        return time.monotonic() - began if held is not None else 0.0

    def _failed(self, state: NodeState, failure: JupiterError) -> None:
        # Before anybody is told: who asks for the connection now is to get this failure, not to wait.
        self.next_call_at = time.time()
        self._set(state, failure)
        self._outcome.set()

    async def _pause(self, pause_s: float) -> None:
        pause_s *= 1 + JITTER * random.uniform(-1, 1)
        self.next_call_at = time.time() + pause_s
        try:
            async with asyncio.timeout(pause_s):
                await self._wake.wait()
        except TimeoutError:
            pass
        finally:
            self.next_call_at = None

    def _set(self, state: NodeState, failure: JupiterError | None) -> None:
        if state == self.state and failure is self.failure:
            return
        if state != self.state:
            self.since = time.time()
        self.state, self.failure = state, failure
        for listener in [*self._listeners]:
            listener(self)


def line_to(
    node: NodeSpec, settings: ConnectionSettings, *, known_hosts: KnownHosts, ssh_config: Path | None = SSH_CONFIG
) -> Line:
    """A line to a node of the cluster file: over ssh, or to this machine itself. `ssh_config` None: none."""

    async def dial() -> Held:
        # asyncssh takes a tenth of a second to load; a workspace without remote machines never needs it.
        if node.is_local():
            from jupiter_engine.remote.this_machine import LocalConnection

            return LocalConnection(node.name or node.host)
        from jupiter_engine.remote import ssh

        return await ssh.connect(node, settings, known_hosts=known_hosts, ssh_config=ssh_config)

    return Line(node.name or node.host, dial, settings)
