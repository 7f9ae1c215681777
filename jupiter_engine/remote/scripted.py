"""Fake machines for tests: ScriptedRemote plays workers, ScriptedConnection answers commands from a table."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath

import msgspec

from jupiter_engine.errors import RemoteError
from jupiter_engine.files import ProcessIdentity, write_atomic
from jupiter_engine.remote import failures
from jupiter_engine.remote.file_commands import FileCommands
from jupiter_engine.remote.local import LocalRemote
from jupiter_engine.remote.port import Completed, Progress
from jupiter_engine.remote.tar_stream import TarRefused, checked_name

Script = Callable[[Path], bool]
"""Called with the run folder when its worker starts; returns whether the worker goes on living."""


Answer = Completed | str | bytes | Exception | Callable[[tuple[str, ...], bytes], Completed | str | bytes | Exception]
"""What a scripted command gives: see ScriptedConnection."""


class ScriptedRemote(LocalRemote):
    """Records what was started; `script` plays the worker (writes facts), `die` ends it."""

    name = "scripted"

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script
        self.started: list[tuple[str, ...]] = []
        self.stopped: list[ProcessIdentity] = []
        self._living: set[int] = set()
        # Above every real pid, so a test can never signal a real process.
        self._pids = itertools.count(1 << 30)

    async def start(
        self, argv: tuple[str, ...], *, folder: PurePath, log: PurePath, env: dict[str, str]
    ) -> ProcessIdentity:
        if not argv:
            raise RemoteError("nothing to start", host=self.name)
        self.started.append(argv)
        pid = next(self._pids)
        if self.script(Path(argv[-1])):
            self._living.add(pid)
        return ProcessIdentity(pid=pid, started_at=1.0)

    async def alive(self, process: ProcessIdentity) -> bool:
        return process.pid in self._living

    async def stop(self, process: ProcessIdentity, *, grace_s: float) -> None:
        self.stopped.append(process)
        self._living.discard(process.pid)

    def die(self) -> None:
        """Kill every living scripted worker, as kill -9 would."""
        self._living.clear()


class ScriptedConnection(FileCommands):
    """A machine whose answers are a table: the longest prefix of the command's vector that is in it answers.

    An answer is a Completed, its standard output as text or bytes, an error to raise, or a function of vector and
    input. What was asked is in `asked`. Files (`read`, `write`, `send`, `fetch`) are dictionary entries in `files`.
    """

    host = "scripted"

    def __init__(self, answers: Mapping[tuple[str, ...], Answer] | None = None, *, name: str = "scripted") -> None:
        self.name = name
        self.answers: dict[tuple[str, ...], Answer] = dict(answers or {})
        self.asked: list[tuple[str, ...]] = []
        self.files: dict[str, bytes] = {}
        self.modes: dict[str, int] = {}
        self._ended = asyncio.Event()

    async def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 30.0, limit_bytes: int = 16 << 20
    ) -> Completed:
        vector = tuple(argv)
        self.asked.append(vector)
        if self._ended.is_set():
            raise failures.lost(self.name, self.host, "closed", vector)
        answer = self._answer(vector)
        if callable(answer):
            answer = answer(vector, stdin)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Completed):
            done = answer
        else:
            done = Completed(exit_status=0, stdout=answer.encode() if isinstance(answer, str) else answer)
        if len(done.stdout) + len(done.stderr) > limit_bytes:
            raise RemoteError(f"{vector[0]} wrote too much", host=self.host, argv=vector)
        return done

    def _answer(self, vector: tuple[str, ...]) -> Answer:
        for length in range(len(vector), -1, -1):
            if vector[:length] in self.answers:
                return self.answers[vector[:length]]
        return Completed(exit_status=127, stderr=f"sh: {vector[0]}: not found\n".encode())

    async def stream(self, argv: Sequence[str]) -> ScriptedStream:
        return ScriptedStream(self, tuple(argv))

    async def read(self, path: str, *, offset_bytes: int = 0, limit_bytes: int = 64 << 20) -> bytes:
        data = self.files.get(path, b"")[offset_bytes:]
        if len(data) > limit_bytes:
            raise RemoteError(f"{path} is too large", host=self.host)
        return data

    async def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        self.files[path], self.modes[path] = data, mode

    async def send(self, files: Sequence[tuple[Path, str]], folder: str, progress: Progress | None = None) -> None:
        sent = 0
        for path, name in files:
            data = path.read_bytes()
            self.files[self._place(folder, name)] = data
            sent += len(data)
            if progress is not None:
                progress(sent)

    async def fetch(
        self,
        folder: str,
        names: Sequence[str],
        target: Path,
        progress: Progress | None = None,
        *,
        limit_bytes: int = 1 << 30,
    ) -> None:
        fetched = 0
        for name in names:
            data = self.files.get(self._place(folder, name))
            if data is None:
                raise RemoteError(f"{folder}/{name} does not exist", host=self.host)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target / name, data)
            fetched += len(data)
            if progress is not None:
                progress(fetched)

    def _place(self, folder: str, name: str) -> str:
        try:
            return f"{folder}/{checked_name(name)}"
        except TarRefused as error:
            raise RemoteError(str(error), host=self.host) from error

    async def wait_lost(self) -> RemoteError:
        await self._ended.wait()
        return failures.lost(self.name, self.host, "closed")

    def break_off(self) -> None:
        """Lose the connection, as a pulled cable would."""
        self._ended.set()

    async def close(self) -> None:
        self._ended.set()


class ScriptedStream:
    """Gathers its input; the table answers as soon as output is asked for after the input has ended."""

    def __init__(self, connection: ScriptedConnection, argv: tuple[str, ...]) -> None:
        self._connection, self._argv = connection, argv
        self._input = bytearray()
        self._input_ended = asyncio.Event()
        self._output: bytearray | None = None
        self._done = Completed(exit_status=0)

    async def write(self, data: bytes) -> None:
        if self._input_ended.is_set():
            raise RemoteError("its input has ended", host=self._connection.host, argv=self._argv)
        self._input += data

    async def close_input(self) -> None:
        self._input_ended.set()

    async def _answered(self) -> bytearray:
        if self._output is None:
            await self._input_ended.wait()
            done = await self._connection.run(self._argv, stdin=bytes(self._input))
            self._output, self._done = bytearray(done.stdout), msgspec.structs.replace(done, stdout=b"")
        return self._output

    def _take(self, output: bytearray, size_bytes: int) -> bytes:
        taken = bytes(output[:size_bytes])
        del output[:size_bytes]
        return taken

    async def read(self, size_bytes: int) -> bytes:
        return self._take(await self._answered(), size_bytes)

    async def read_exactly(self, size_bytes: int) -> bytes:
        output = await self._answered()
        if len(output) < size_bytes:
            raise RemoteError("its output ended too early", host=self._connection.host, argv=self._argv)
        return self._take(output, size_bytes)

    async def read_line(self, limit_bytes: int) -> bytes:
        output = await self._answered()
        end = output.find(b"\n")
        if end > limit_bytes or (end < 0 and len(output) > limit_bytes):
            raise RemoteError("a line of its output is too long", host=self._connection.host, argv=self._argv)
        return self._take(output, end + 1)[:-1] if end >= 0 else self._take(output, len(output))

    async def wait(self) -> Completed:
        (await self._answered()).clear()
        return self._done

    async def close(self) -> None:
        self._input_ended.set()
