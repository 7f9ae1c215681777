"""A machine over ssh: `connect` calls it, SshConnection runs commands and moves files there."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import asyncssh

from jupiter_engine.errors import RemoteError
from jupiter_engine.remote import failures, quoting
from jupiter_engine.remote.file_commands import FileCommands, shell
from jupiter_engine.remote.host_keys import KnownHosts, OfferedKey
from jupiter_engine.remote.port import Completed
from jupiter_engine.remote.ssh_call import SSH_CONFIG, Called, Caller
from jupiter_engine.remote.ssh_channel import Command, SshStream, completed, failure
from jupiter_engine.settings.cluster import ConnectionSettings, NodeSpec
from jupiter_engine.units import bytes_text

# sshd allows ten sessions on a connection (MaxSessions). Two stay free for what the user's own tools share with
# us, and streams, which last, leave two of ours for commands.
SESSIONS: Final = 8
STREAMS: Final = 6
STREAM_WAIT_S: Final = 60.0
WINDOW_BYTES: Final = 4 << 20
PIECE_BYTES: Final = 256 << 10

# Ends a command that nobody waits for any more: its process group, gently and then for good. A group's number is
# not given to another process while the group lives, and the loop ends with it.
_END: Final = (
    'kill -TERM "-$1" 2>/dev/null || exit 0; for _ in 1 2 3 4 5 6 7 8 9 10; do sleep 0.3; '
    'kill -0 "-$1" 2>/dev/null || exit 0; done; kill -KILL "-$1"'
)


async def connect(
    node: NodeSpec,
    settings: ConnectionSettings,
    *,
    known_hosts: KnownHosts,
    ssh_config: Path | None = SSH_CONFIG,
) -> SshConnection:
    """Call a machine, through its jump hosts, as the user's ssh config says. Asks nobody anything.

    Raises NodeUnreachable within `connect_timeout_s`, HostKeyRefused (with the offered key) for a key that is
    not trusted. `ssh_config` None: no config file counts.
    """
    called = await Caller(settings, known_hosts, ssh_config).connect(node)
    return SshConnection(node.name or node.host, called)


async def offered_key(
    node: NodeSpec,
    settings: ConnectionSettings,
    *,
    known_hosts: KnownHosts,
    ssh_config: Path | None = SSH_CONFIG,
) -> OfferedKey:
    """The key with which a machine presents itself now, to show to a person at first contact; logs in nowhere but
    at jump hosts. Raises NodeUnreachable."""
    return await Caller(settings, known_hosts, ssh_config).offered_key(node)


class _Slots:
    """Sessions of one connection that may be open at once; fewer if the server turns out to allow fewer."""

    def __init__(self) -> None:
        self.open = 0
        self.limit = SESSIONS
        self._free = asyncio.Semaphore(SESSIONS)
        self._streams = asyncio.Semaphore(STREAMS)

    async def take(self, *, lasting: bool) -> Callable[[], None]:
        """Wait for a slot; the result, called any number of times, gives it back."""
        if lasting:
            await self._streams.acquire()
        try:
            await self._free.acquire()
        except asyncio.CancelledError:
            if lasting:
                self._streams.release()
            raise
        self.open += 1
        taken = True

        def give_back() -> None:
            nonlocal taken
            if taken:
                taken = False
                self.open -= 1
                self._free.release()
                if lasting:
                    self._streams.release()

        return give_back

    async def narrow(self) -> None:
        """The server has refused one: do with one less from now on."""
        self.limit -= 1
        await self._free.acquire()


class SshConnection(FileCommands):
    """`port.Connection` over one ssh connection."""

    def __init__(self, name: str, called: Called) -> None:
        self.name = name
        self.host = called.client.call.host
        self._called = called
        self._connection = called.connection
        self._slots = _Slots()
        self._ending: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def user(self) -> str:
        return self._called.client.call.user

    @property
    def through(self) -> tuple[str, ...]:
        """Jump hosts, the first one first."""
        return self._called.client.call.through

    async def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 30.0, limit_bytes: int = 16 << 20
    ) -> Completed:
        channel: asyncssh.SSHClientChannel[bytes] | None = None
        command: Command | None = None
        finished = False
        try:
            async with asyncio.timeout(timeout_s):
                channel, command = await self._open(argv, stderr_limit_bytes=limit_bytes, lasting=False)
                output = await self._converse(argv, channel, command, stdin, limit_bytes)
            finished = True
            return completed(self.name, self.host, argv, command, output)
        except TimeoutError:
            if command is None:
                raise failures.sessions(self.name, self.host, argv, waited_s=timeout_s) from None
            raise self._failure(argv, command, f"{argv[0]} did not end in {timeout_s:g} s") from None
        finally:
            if channel is not None:
                channel.close()
            if command is not None and not finished:
                self._end(command)

    async def stream(self, argv: Sequence[str]) -> SshStream:
        """Raises RemoteError if no session becomes free within a minute."""
        try:
            async with asyncio.timeout(STREAM_WAIT_S):
                channel, command = await self._open(argv, stderr_limit_bytes=None, lasting=True)
        except TimeoutError:
            raise failures.sessions(self.name, self.host, argv, waited_s=STREAM_WAIT_S) from None
        return SshStream(self.name, self.host, argv, command, channel)

    async def wait_lost(self) -> RemoteError:
        """Wait until the connection has ended, whoever ended it; the result says why."""
        await self._connection.wait_closed()
        cause = self._called.client.cause
        return failures.lost(self.name, self.host, str(cause) if cause else "")

    async def close(self) -> None:
        self._closing = True
        for task in self._ending:
            task.cancel()
        await asyncio.gather(*self._ending, return_exceptions=True)
        await self._called.close()

    # -- one session ---------------------------------------------------------------------------------------
    async def _open(
        self, argv: Sequence[str], *, stderr_limit_bytes: int | None, lasting: bool
    ) -> tuple[asyncssh.SSHClientChannel[bytes], Command]:
        """Start a command once a session is free. Cancelled at any point, it leaves no session open."""
        mark = quoting.new_mark()
        line = quoting.command_line(argv, mark)
        while True:
            give_back = await self._slots.take(lasting=lasting)
            opening = asyncio.create_task(
                self._connection.create_session(
                    lambda: Command(mark, stderr_limit_bytes=stderr_limit_bytes),
                    line,
                    encoding=None,
                    window=WINDOW_BYTES,
                )
            )
            try:
                channel, command = await asyncio.shield(opening)
            except asyncio.CancelledError:
                opening.add_done_callback(functools.partial(_abandon, give_back=give_back))
                raise
            except asyncssh.ChannelOpenError as error:
                others = self._slots.open > 1 and self._slots.limit > 1
                give_back()
                if self._called.client.cause is not None or self._connection.is_closed():
                    raise self._lost(argv, error) from error
                if not others:
                    raise failures.sessions(self.name, self.host, argv) from error
                await self._slots.narrow()
            except (OSError, asyncssh.Error) as error:
                give_back()
                raise self._lost(argv, error) from error
            else:
                assert isinstance(command, Command)
                command.on_close = give_back
                if command.closed.is_set():
                    give_back()
                return channel, command

    async def _converse(
        self,
        argv: Sequence[str],
        channel: asyncssh.SSHClientChannel[bytes],
        command: Command,
        stdin: bytes,
        limit_bytes: int,
    ) -> bytes:
        """Send the input and gather the output at the same time, until the command is over."""
        output = bytearray()
        feeding = asyncio.create_task(_feed(channel, command, stdin))
        try:
            while await command.more():
                output += command.take(limit_bytes + 1)
                if len(output) + len(command.errors) > limit_bytes:
                    command.overflow = True
                    break
            if not command.overflow:
                await command.closed.wait()
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
        if command.overflow:
            raise self._failure(argv, command, f"{argv[0]} wrote more than {bytes_text(limit_bytes)}")
        return bytes(output)

    def _failure(self, argv: Sequence[str], command: Command, what: str) -> RemoteError:
        return failure(self.name, self.host, argv, command, what)

    def _lost(self, argv: Sequence[str], error: Exception) -> RemoteError:
        return failures.lost(self.name, self.host, str(self._called.client.cause or error), argv)

    def _end(self, command: Command) -> None:
        """Nobody waits for it any more: end it there, for closing its session alone would let it go on."""
        gone = command.exit_status is not None or command.signal or command.cause is not None
        if command.pid is None or command.pid <= 1 or gone or self._closing:
            return
        task = asyncio.create_task(self._kill(command.pid))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _kill(self, pid: int) -> None:
        try:
            async with asyncio.timeout(15):
                argv = shell(_END, str(pid))
                channel, command = await self._open(argv, stderr_limit_bytes=None, lasting=False)
                try:
                    await self._converse(argv, channel, command, b"", 64 << 10)
                finally:
                    channel.close()
        except (RemoteError, TimeoutError):
            # The machine has gone or is stuck; whoever asked has already been told that the command failed.
            return


async def _feed(channel: asyncssh.SSHClientChannel[bytes], command: Command, data: bytes) -> None:
    try:
        for at in range(0, len(data), PIECE_BYTES):
            channel.write(data[at : at + PIECE_BYTES])
            await command.drained()
            if command.closed.is_set():
                return
        channel.write_eof()
    except (OSError, asyncssh.Error):
        # The command ended without reading its input, which is its right; its exit status tells.
        return


def _abandon(opening: asyncio.Task[Any], give_back: Callable[[], None]) -> None:
    """A session that came about after nobody wanted it any more."""
    if opening.cancelled() or opening.exception() is not None:
        give_back()
        return
    channel, command = opening.result()
    command.on_close = give_back
    if command.closed.is_set():
        give_back()
    channel.close()
