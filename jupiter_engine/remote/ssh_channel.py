"""One command over ssh: cuts off start-up noise, bounds what is kept, reads piece by piece."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Final

import asyncssh

from jupiter_engine.errors import RemoteError
from jupiter_engine.remote import failures
from jupiter_engine.remote.port import Completed
from jupiter_engine.units import bytes_text, plain_text

# Reading pauses above the first and goes on below the second: enough to keep a fast line busy.
HIGH_BYTES: Final = 4 << 20
LOW_BYTES: Final = 1 << 20
STDERR_KEPT_BYTES: Final = 64 << 10
# Start-up files print a page or two; what goes on for longer is no start-up file.
NOISE_LIMIT_BYTES: Final = 4 << 20
NOISE_KEPT_BYTES: Final = 16 << 10


class Frame:
    """Finds the mark in one output of a command; everything up to it was printed by start-up files."""

    def __init__(self, mark: str) -> None:
        self._end = re.compile(re.escape(mark.encode()) + rb" (\d+)\n")
        self.found = False
        self.pid: int | None = None
        self.noise = bytearray()
        self.noise_bytes = 0

    def feed(self, data: bytes) -> bytes:
        """What of `data` belongs to the command."""
        if self.found:
            return data
        self.noise += data
        self.noise_bytes += len(data)
        end = self._end.search(self.noise)
        if end is None:
            # The mark may be split over two packets; the kept end is far longer than a mark.
            del self.noise[:-NOISE_KEPT_BYTES]
            return b""
        self.found, self.pid = True, int(end[1])
        rest = bytes(self.noise[end.end() :])
        del self.noise[end.start() :]
        return rest


class Command(asyncssh.SSHClientSession[bytes]):
    """The receiving half: filled by asyncssh's callbacks, emptied by `ssh.py` and SshStream."""

    def __init__(self, mark: str, *, stderr_limit_bytes: int | None) -> None:
        """`stderr_limit_bytes`: more than that ends the command; None keeps the last 64 KiB of any amount."""
        self.output = bytearray()
        self.errors = bytearray()
        self.overflow = False
        self.exit_status: int | None = None
        self.signal = ""
        self.ended = False
        """No more output comes."""
        self.closed = asyncio.Event()
        self.cause: Exception | None = None
        self.on_close: Callable[[], None] = lambda: None
        self._stdout, self._stderr = Frame(mark), Frame(mark)
        self._stderr_limit_bytes = stderr_limit_bytes
        self._news = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._paused = False
        self._chan: asyncssh.SSHClientChannel[bytes] | None = None

    # -- called by asyncssh --------------------------------------------------------------------------------
    def connection_made(self, chan: asyncssh.SSHClientChannel[bytes]) -> None:
        self._chan = chan

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
        frame = self._stderr if datatype == asyncssh.EXTENDED_DATA_STDERR else self._stdout
        kept = frame.feed(data)
        if frame.noise_bytes > NOISE_LIMIT_BYTES:
            self._give_up()
        elif frame is self._stderr:
            self.errors += kept
            if self._stderr_limit_bytes is None:
                del self.errors[:-STDERR_KEPT_BYTES]
            elif len(self.errors) > self._stderr_limit_bytes:
                self._give_up()
        elif kept:
            self.output += kept
            if len(self.output) > HIGH_BYTES and not self._paused and self._chan is not None:
                self._paused = True
                self._chan.pause_reading()
        self._news.set()

    def _give_up(self) -> None:
        self.overflow = True
        if self._chan is not None:
            self._chan.close()

    def eof_received(self) -> bool:
        self.ended = True
        self._news.set()
        # The command may still read: only its output has ended.
        return True

    def exit_status_received(self, status: int) -> None:
        self.exit_status = status

    def exit_signal_received(self, signal: str, core_dumped: bool, msg: str, lang: str) -> None:  # noqa: ARG002, FBT001
        self.signal = signal

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self.cause = exc
        self.closed.set()
        self._news.set()
        self._writable.set()
        self.on_close()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # -- called by Jupiter ---------------------------------------------------------------------------------
    @property
    def began(self) -> bool:
        """Whether the command itself was started, after all start-up files."""
        return self._stdout.found

    @property
    def pid(self) -> int | None:
        """On the other side: also its process group and session, as sshd starts each command in a new one."""
        return self._stdout.pid

    @property
    def noise_bytes(self) -> int:
        return self._stdout.noise_bytes

    @property
    def over(self) -> bool:
        """Whether it is known to have ended, or nothing more can be known."""
        return self.exit_status is not None or bool(self.signal) or self.cause is not None

    def said(self) -> bytes:
        """What came instead of the command's own output."""
        return bytes(self._stdout.noise + self._stderr.noise)

    async def more(self) -> bool:
        """Wait until there is output or no more to come; False at the end."""
        while not self.output and not self.ended:
            self._news.clear()
            await self._news.wait()
        return bool(self.output)

    async def longer(self) -> None:
        """Wait for anything new, however much there is already."""
        # Resuming delivers what is there at once, which must not be taken for old news.
        self._news.clear()
        if self._paused and self._chan is not None and not self.closed.is_set():
            self._paused = False
            self._chan.resume_reading()
        if not self.ended:
            await self._news.wait()

    def take(self, size_bytes: int) -> bytes:
        taken = bytes(self.output[:size_bytes])
        del self.output[:size_bytes]
        if self._paused and len(self.output) < LOW_BYTES and self._chan is not None and not self.closed.is_set():
            self._paused = False
            self._chan.resume_reading()
        return taken

    async def drained(self) -> None:
        await self._writable.wait()


class SshStream:
    """`port.Stream` over one ssh session."""

    def __init__(
        self, name: str, host: str, argv: Sequence[str], command: Command, chan: asyncssh.SSHClientChannel[bytes]
    ) -> None:
        self._name, self._host, self._argv = name, host, tuple(argv)
        self._command, self._chan = command, chan
        self._closed = False

    def _failure(self, what: str) -> RemoteError:
        return failure(self._name, self._host, self._argv, self._command, what)

    def _end_of_output(self) -> None:
        """Tell an end from a broken connection: the latter must not look like a complete answer."""
        if self._command.cause is not None or not self._command.began:
            raise self._failure("its output broke off")

    async def write(self, data: bytes) -> None:
        if self._closed or self._command.closed.is_set():
            raise self._failure("the command has ended and reads no more input")
        try:
            self._chan.write(data)
        except (OSError, asyncssh.Error) as error:
            raise self._failure(f"the command reads no more input: {error}") from error
        await self._command.drained()
        if self._command.closed.is_set():
            raise self._failure("the command ended before it had read its input")

    async def close_input(self) -> None:
        if not self._command.closed.is_set():
            try:
                self._chan.write_eof()
            except (OSError, asyncssh.Error) as error:
                raise self._failure(f"its input cannot be ended: {error}") from error

    async def read(self, size_bytes: int) -> bytes:
        if not await self._command.more():
            self._end_of_output()
        return self._command.take(size_bytes)

    async def read_exactly(self, size_bytes: int) -> bytes:
        parts: list[bytes] = []
        missing = size_bytes
        while missing:
            part = await self.read(missing)
            if not part:
                text = f"its output ended {bytes_text(missing)} short of the {bytes_text(size_bytes)} that were due"
                raise self._failure(text)
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    async def read_line(self, limit_bytes: int) -> bytes:
        command = self._command
        searched = 0
        while True:
            end = command.output.find(b"\n", searched)
            if end > limit_bytes or (end < 0 and len(command.output) > limit_bytes):
                raise self._failure(f"a line of its output is longer than {bytes_text(limit_bytes)}")
            if end >= 0:
                return command.take(end + 1)[:-1]
            if command.ended:
                self._end_of_output()
                return command.take(len(command.output))
            searched = len(command.output)
            await command.longer()

    async def wait(self) -> Completed:
        # Unread output would stop the channel from ever closing.
        while await self._command.more():
            self._command.take(HIGH_BYTES)
        await self._command.closed.wait()
        return completed(self._name, self._host, self._argv, self._command)

    async def close(self) -> None:
        self._closed = True
        self._chan.close()


def failure(name: str, host: str, argv: Sequence[str], command: Command, what: str) -> RemoteError:
    """Why a command gave no proper answer: the connection, the login shell, or else `what`."""
    if command.cause is not None:
        return failures.lost(name, host, str(command.cause), argv)
    if not command.began and (command.ended or command.noise_bytes):
        return failures.shell(name, host, argv, command.said())
    tail = plain_text(command.errors[-2000:].decode("utf-8", "replace")).strip()
    return RemoteError(
        f"{name}: {what}", host=host, argv=tuple(argv), exit_status=command.exit_status, output_tail=tail
    )


def completed(name: str, host: str, argv: Sequence[str], command: Command, output: bytes = b"") -> Completed:
    """How a command that is over ended; raises if it is the connection that ended, or nothing was ever run."""
    if command.cause is not None or not command.began:
        raise failure(name, host, argv, command, "it never ran")
    if command.exit_status is None and not command.signal:
        raise failure(name, host, argv, command, "the session ended without saying how the command did")
    status = None if command.signal else command.exit_status
    return Completed(exit_status=status, signal=command.signal, stdout=output, stderr=bytes(command.errors))
