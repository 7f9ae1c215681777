"""This machine as a Connection: the same commands and streams without a network."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from jupiter_engine.errors import RemoteError, UsageError
from jupiter_engine.files import write_atomic
from jupiter_engine.remote.file_commands import FileCommands
from jupiter_engine.remote.port import Completed
from jupiter_engine.units import bytes_text, plain_text

PIECE_BYTES: Final = 256 << 10
STDERR_KEPT_BYTES: Final = 64 << 10


class LocalStream:
    """`port.Stream` over a child process."""

    def __init__(self, argv: Sequence[str], process: asyncio.subprocess.Process) -> None:
        self._argv = tuple(argv)
        self._process = process
        self._errors = bytearray()
        self._buffer = bytearray()
        self._tail = asyncio.create_task(self._keep_errors())

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    async def _keep_errors(self) -> None:
        """Read its errors for ever: a full pipe would stop it."""
        assert self._process.stderr is not None
        while data := await self._process.stderr.read(PIECE_BYTES):
            self._errors += data
            del self._errors[:-STDERR_KEPT_BYTES]

    def _failure(self, what: str) -> RemoteError:
        tail = plain_text(self._errors[-2000:].decode("utf-8", "replace")).strip()
        return RemoteError(
            what,
            host=LocalConnection.host,
            argv=self._argv,
            exit_status=self._process.returncode,
            output_tail=tail,
        )

    async def write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        if self._process.stdin.is_closing():
            raise self._failure("the command reads no more input")
        try:
            self._process.stdin.write(data)
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._failure("the command ended before it had read its input") from error

    async def close_input(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await self._process.stdin.wait_closed()

    async def _more(self, size_bytes: int = PIECE_BYTES) -> bool:
        assert self._process.stdout is not None
        data = await self._process.stdout.read(size_bytes)
        self._buffer += data
        return bool(data)

    def _take(self, size_bytes: int) -> bytes:
        taken = bytes(self._buffer[:size_bytes])
        del self._buffer[:size_bytes]
        return taken

    async def read(self, size_bytes: int) -> bytes:
        if not self._buffer:
            await self._more(size_bytes)
        return self._take(size_bytes)

    async def read_exactly(self, size_bytes: int) -> bytes:
        while len(self._buffer) < size_bytes:
            if not await self._more():
                missing = size_bytes - len(self._buffer)
                text = f"its output ended {bytes_text(missing)} short of the {bytes_text(size_bytes)} that were due"
                raise self._failure(text)
        return self._take(size_bytes)

    async def read_line(self, limit_bytes: int) -> bytes:
        searched = 0
        while True:
            end = self._buffer.find(b"\n", searched)
            if end > limit_bytes or (end < 0 and len(self._buffer) > limit_bytes):
                raise self._failure(f"a line of its output is longer than {bytes_text(limit_bytes)}")
            if end >= 0:
                return self._take(end + 1)[:-1]
            searched = len(self._buffer)
            if not await self._more():
                return self._take(searched)

    async def wait(self) -> Completed:
        while await self._more():
            self._buffer.clear()
        status = await self._process.wait()
        await self._tail
        return _completed(status, b"", bytes(self._errors))

    async def close(self) -> None:
        """Closes all three pipes. A command that lives on is ended when the connection is closed."""
        self._tail.cancel()
        await asyncio.gather(self._tail, return_exceptions=True)
        _close_pipes(self._process)

    async def end(self) -> None:
        """End the command with all that it started and has not detached."""
        await self.close()
        if self._process.returncode is None:
            _signal_group(self._process, signal.SIGTERM)
            try:
                async with asyncio.timeout(2):
                    await self._process.wait()
            except TimeoutError:
                _signal_group(self._process, signal.SIGKILL)
                await self._process.wait()


class LocalConnection(FileCommands):
    """`port.Connection` for the node that Jupiter itself runs on."""

    host = "localhost"

    def __init__(self, name: str = "this machine") -> None:
        self.name = name
        self._ended = asyncio.Event()
        self._streams: list[LocalStream] = []

    async def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 30.0, limit_bytes: int = 16 << 20
    ) -> Completed:
        process = await self._start(argv)
        gathered = _Gathered(limit_bytes)
        try:
            async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
                assert process.stdin is not None
                assert process.stdout is not None
                assert process.stderr is not None
                group.create_task(_feed(process.stdin, stdin))
                group.create_task(gathered.gather(process.stdout, gathered.output))
                group.create_task(gathered.gather(process.stderr, gathered.errors))
            status = await process.wait()
        except TimeoutError:
            text = f"{self.name}: {argv[0]} did not end in {timeout_s:g} s"
            raise RemoteError(text, host=self.host, argv=tuple(argv)) from None
        except ExceptionGroup as group_error:
            text = f"{self.name}: {argv[0]} wrote more than {bytes_text(limit_bytes)}"
            raise RemoteError(text, host=self.host, argv=tuple(argv)) from group_error
        finally:
            await _end_at_once(process)
        return _completed(status, bytes(gathered.output), bytes(gathered.errors))

    async def stream(self, argv: Sequence[str]) -> LocalStream:
        self._streams = [stream for stream in self._streams if not stream.ended]
        stream = LocalStream(argv, await self._start(argv))
        self._streams.append(stream)
        return stream

    async def _start(self, argv: Sequence[str]) -> asyncio.subprocess.Process:
        if not argv or not argv[0] or any("\0" in argument for argument in argv):
            raise UsageError("there is no program to run, or an argument contains a NUL")
        # A command over ssh begins in the home folder and without a terminal; so it does here. One that cannot be
        # started ends with 127 there, and /bin/sh sees to that here as well.
        vector = ("/bin/sh", "-c", 'exec "$@"', "sh", *argv)
        starting = asyncio.create_task(
            asyncio.create_subprocess_exec(
                *(os.fsencode(argument) for argument in vector),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=Path.home(),
                start_new_session=True,
            )
        )
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            # asyncio itself would kill the process alone, and then wait for all that hold its pipes.
            await _end_at_once(await starting)
            raise
        except OSError as error:
            text = f"{self.name}: {argv[0]} could not be started: {error}"
            raise RemoteError(text, host=self.host, argv=tuple(argv)) from error

    async def read(self, path: str, *, offset_bytes: int = 0, limit_bytes: int = 64 << 20) -> bytes:
        return await asyncio.to_thread(self._read, Path.home() / path, offset_bytes, limit_bytes)

    def _read(self, path: Path, offset_bytes: int, limit_bytes: int) -> bytes:
        try:
            with path.open("rb") as file:
                file.seek(offset_bytes)
                data = file.read(limit_bytes + 1)
        except FileNotFoundError:
            return b""
        except OSError as error:
            text = f"{self.name}: {path} cannot be read: {error.strerror}"
            raise RemoteError(text, host=self.host) from error
        if len(data) > limit_bytes:
            raise RemoteError(f"{self.name}: {path} has more than {bytes_text(limit_bytes)}", host=self.host)
        return data

    async def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        await asyncio.to_thread(self._write, Path.home() / path, data, mode)

    def _write(self, path: Path, data: bytes, mode: int) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # `write_atomic` opens with the mode, which the umask may only narrow: never wider for a moment.
            write_atomic(path, data, mode=mode)
            path.chmod(mode)
        except OSError as error:
            text = f"{self.name}: {path} cannot be written: {error.strerror}"
            raise RemoteError(text, host=self.host) from error

    async def wait_lost(self) -> RemoteError:
        """Only `close` ends it."""
        await self._ended.wait()
        return RemoteError("closed", host=self.host)

    async def close(self) -> None:
        self._ended.set()
        for stream in self._streams:
            await stream.end()
        self._streams.clear()


class _Gathered:
    """Both outputs of a command, up to a limit for the two together."""

    def __init__(self, limit_bytes: int) -> None:
        self.output = bytearray()
        self.errors = bytearray()
        self._limit_bytes = limit_bytes

    async def gather(self, reader: asyncio.StreamReader, into: bytearray) -> None:
        while data := await reader.read(PIECE_BYTES):
            into += data
            if len(self.output) + len(self.errors) > self._limit_bytes:
                raise OverflowError


async def _feed(writer: asyncio.StreamWriter, data: bytes) -> None:
    try:
        for at in range(0, len(data), PIECE_BYTES):
            writer.write(data[at : at + PIECE_BYTES])
            await writer.drain()
    except (BrokenPipeError, ConnectionResetError):
        # It ended without reading its input, which is its right; its exit status tells.
        return
    finally:
        writer.close()


def _completed(status: int, output: bytes, errors: bytes) -> Completed:
    if status >= 0:
        return Completed(exit_status=status, stdout=output, stderr=errors)
    return Completed(
        exit_status=None, signal=signal.Signals(-status).name.removeprefix("SIG"), stdout=output, stderr=errors
    )


async def _end_at_once(process: asyncio.subprocess.Process) -> None:
    """Nothing of it remains, whether it had ended or not."""
    if process.returncode is None:
        _signal_group(process, signal.SIGKILL)
    # First: a pipe that nobody reads any more would never be seen to end, and asyncio waits for that.
    _close_pipes(process)
    await process.wait()


def _signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """It leads its own session, and has not been reaped: its number is still its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _close_pipes(process: asyncio.subprocess.Process) -> None:
    """Now; asyncio would leave that to the garbage collector, and complain."""
    transport = getattr(process, "_transport", None)
    for fd in (0, 1, 2):
        pipe = transport.get_pipe_transport(fd) if transport is not None else None
        if pipe is not None:
            pipe.close()
