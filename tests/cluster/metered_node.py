"""A node that is this machine: verbs run as real processes, every byte counted, connections that break on demand."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jupiter_engine.cluster.runner_file import RunnerFile
from jupiter_engine.errors import RemoteError
from jupiter_engine.remote.port import Completed, Progress


@dataclass
class Fault:
    """What goes wrong on the way to the node (or from it, with `incoming`)."""

    cut_after_bytes: int | None = None
    """The connection is gone once so many bytes have passed."""
    flip_at_byte: int | None = None
    """One bit of this byte arrives changed."""
    incoming: bool = False


class MeteredStream:
    """A process with its standard streams."""

    def __init__(self, node: MeteredNode, process: asyncio.subprocess.Process, argv: Sequence[str]) -> None:
        self._node, self._process, self._argv = node, process, argv
        self._passed = 0

    def _gone(self) -> RemoteError:
        return RemoteError("the connection was cut", host="here", argv=tuple(self._argv))

    async def _through(self, data: bytes, *, incoming: bool) -> bytes:
        fault = self._node.fault
        begun, self._passed = self._passed, self._passed + len(data)
        if fault is None or fault.incoming != incoming:
            return data
        if fault.flip_at_byte is not None and begun <= fault.flip_at_byte < self._passed:
            changed = bytearray(data)
            changed[fault.flip_at_byte - begun] ^= 1
            self._node.fault = None
            return bytes(changed)
        if fault.cut_after_bytes is not None and self._passed > fault.cut_after_bytes:
            if not incoming and self._process.stdin is not None:
                self._process.stdin.write(data[: fault.cut_after_bytes - begun])
            self._node.fault = None
            await self.close()
            raise self._gone()
        return data

    async def write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        data = await self._through(data, incoming=False)
        self._node.sent_bytes += len(data)
        try:
            self._process.stdin.write(data)
            await self._process.stdin.drain()
        except (ConnectionError, BrokenPipeError) as error:
            raise self._gone() from error

    async def close_input(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    async def read(self, size_bytes: int) -> bytes:
        assert self._process.stdout is not None
        data = await self._process.stdout.read(size_bytes)
        self._node.fetched_bytes += len(data)
        return await self._through(data, incoming=True)

    async def read_exactly(self, size_bytes: int) -> bytes:
        data = b""
        while len(data) < size_bytes:
            piece = await self.read(size_bytes - len(data))
            if not piece:
                raise self._gone()
            data += piece
        return data

    async def read_line(self, limit_bytes: int) -> bytes:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if len(line) > limit_bytes:
            raise RemoteError("the line is too long", host="here")
        return line.rstrip(b"\n")

    async def wait(self) -> Completed:
        assert self._process.stderr is not None
        errors = await self._process.stderr.read()
        return Completed(exit_status=await self._process.wait(), stderr=errors)

    async def close(self) -> None:
        """As a broken ssh connection does: the process meets the end of its input."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._process.stdout is not None:
            while await self._process.stdout.read(1 << 20):
                pass
        await self._process.wait()


@dataclass
class MeteredNode:
    """A node and its connection in one."""

    workdir: str
    runner: Path
    python: str = sys.executable
    name: str = "node"
    host: str = "here"
    fault: Fault | None = None
    sent_bytes: int = 0
    fetched_bytes: int = 0
    streams: list[str] = field(default_factory=list)
    """Verbs that were run."""
    env: dict[str, str] = field(default_factory=dict)

    def came_true(self) -> bool:
        """Whether the fault has happened."""
        return self.fault is None

    @property
    def connection(self) -> MeteredNode:
        return self

    @staticmethod
    def at(folder: Path) -> MeteredNode:
        packed = RunnerFile.packed()
        runner = folder / packed.name
        runner.write_bytes(packed.data)
        return MeteredNode(workdir=str(folder / "work"), runner=runner)

    def argv(self, verb: str, *arguments: str) -> tuple[str, ...]:
        return (self.python, str(self.runner), verb, *arguments)

    async def stream(self, argv: Sequence[str]) -> MeteredStream:
        self.streams.append(argv[2])
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 26,
            env={**os.environ, **self.env},
        )
        return MeteredStream(self, process, argv)

    async def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 30.0, limit_bytes: int = 16 << 20
    ) -> Completed:
        stream = await self.stream(argv)
        await stream.write(stdin)
        await stream.close_input()
        output = b""
        while piece := await stream.read(1 << 20):
            output += piece
        ended = await stream.wait()
        return Completed(exit_status=ended.exit_status, stdout=output, stderr=ended.stderr)

    async def read(self, path: str, *, offset_bytes: int = 0, limit_bytes: int = 64 << 20) -> bytes:
        raise NotImplementedError

    async def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        raise NotImplementedError

    async def send(self, files: Sequence[tuple[Path, str]], folder: str, progress: Progress | None = None) -> None:
        raise NotImplementedError

    async def fetch(self, folder: str, names: Sequence[str], target: Path, progress: Progress | None = None) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        return None
