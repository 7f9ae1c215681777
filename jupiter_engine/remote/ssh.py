"""A machine over ssh: `connect` calls it, SshConnection runs commands and moves files there."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
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
from jupiter_engine.remote.ssh_sessions import Slot, Slots
from jupiter_engine.settings.cluster import ConnectionSettings, NodeSpec
from jupiter_engine.units import bytes_text

STREAM_WAIT_S: Final = 60.0
# After a refusal with nothing of ours open: sshd may still be clearing away what has just ended.
REFUSED_PAUSES_S: Final = (0.1, 0.3, 0.6)
WINDOW_BYTES: Final = 4 << 20
END_WITHIN_S: Final = 15.0
CLOSE_WITHIN_S: Final = 2.0
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


class SshConnection(FileCommands):
    """`port.Connection` over one ssh connection."""

    def __init__(self, name: str, called: Called) -> None:
        self.name = name
        self.host = called.client.call.host
        self._called = called
        self._connection = called.connection
        self._slots = Slots()
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
            if channel is not None and command is not None:
                if finished:
                    channel.close()
                else:
                    self._dispose(channel, command)

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
        if self._ending and self._called.client.cause is None:
            # What nobody waits for any more is still to be ended there.
            await asyncio.wait(self._ending, timeout=CLOSE_WITHIN_S)
        for task in [*self._ending]:
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
        patience = iter(REFUSED_PAUSES_S)
        while True:
            slot = await self._slots.take(lasting=lasting)
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
                opening.add_done_callback(functools.partial(self._abandon, slot=slot))
                raise
            except asyncssh.ChannelOpenError as error:
                others = self._slots.refused(slot)
                if self._called.client.cause is not None or self._connection.is_closed():
                    raise self._lost(argv, error) from error
                pause_s = 0.0 if others else next(patience, None)
                if pause_s is None:
                    raise failures.sessions(self.name, self.host, argv) from error
                await asyncio.sleep(pause_s)
            except (OSError, asyncssh.Error) as error:
                slot.give_back()
                raise self._lost(argv, error) from error
            else:
                assert isinstance(command, Command)
                _occupy(slot, command)
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

    def _abandon(self, opening: asyncio.Task[Any], slot: Slot) -> None:
        """A session that came about after nobody wanted it any more."""
        if opening.cancelled() or opening.exception() is not None:
            slot.give_back()
            return
        channel, command = opening.result()
        _occupy(slot, command)
        self._dispose(channel, command)

    def _dispose(self, channel: asyncssh.SSHClientChannel[bytes], command: Command) -> None:
        """Nobody waits for it any more: end it there, for closing its session alone would let it go on."""
        if command.over or self._closing:
            channel.close()
            return
        task = asyncio.create_task(self._end(channel, command))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end(self, channel: asyncssh.SSHClientChannel[bytes], command: Command) -> None:
        try:
            async with asyncio.timeout(END_WITHIN_S):
                # One that has hardly begun has not told its number yet.
                while command.pid is None and not command.ended:
                    await command.longer()
                channel.close()
                # 0 and 1 would mean everything there is.
                if command.pid is None or command.pid <= 1 or command.over:
                    return
                argv = shell(_END, str(command.pid))
                ending, killer = await self._open(argv, stderr_limit_bytes=None, lasting=False)
                try:
                    await self._converse(argv, ending, killer, b"", 64 << 10)
                finally:
                    ending.close()
        except (RemoteError, TimeoutError):
            # The machine has gone or is stuck; whoever asked has already been told that the command failed.
            return
        finally:
            channel.close()


def _occupy(slot: Slot, command: Command) -> None:
    """The slot is taken until the session has closed."""
    slot.establish()
    command.on_close = slot.give_back
    if command.closed.is_set():
        slot.give_back()


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
