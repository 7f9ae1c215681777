"""One question to a verb of the node runner, and what came back, checked."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import msgspec

from jupiter_engine.cluster.frames import refusal
from jupiter_engine.errors import DiskFull, JupiterError, RemoteError
from jupiter_engine.node import wire
from jupiter_engine.remote.port import Connection, Stream
from jupiter_engine.units import plain_text

ANSWER_S = 900.0
"""Longest silence of a verb. Hashing a folder of 100 GB at 200 MB/s takes 500 s; a dead connection ends much sooner."""


class Node(Protocol):
    """A machine with the node runner on it."""

    @property
    def connection(self) -> Connection: ...

    @property
    def workdir(self) -> str:
        """Absolute, there."""

    def argv(self, verb: str, *arguments: str) -> tuple[str, ...]:
        """The command that runs a verb."""


def node_error(node: Node, line: bytes) -> JupiterError | None:
    """The error that a line is, if it is one: DiskFull, or NodeRefused with the node's own reason."""
    refused = refusal(line, node.connection.host)
    if refused is not None and refused.reason == "DiskFull":
        return DiskFull(f"{node.connection.name}: {refused.detail}", fix=refused.fix)
    return refused


async def answer_of(node: Node, stream: Stream, limit_bytes: int = wire.HEADER_BYTES) -> dict[str, Any]:
    """The next JSON line of a verb. The error that it answered is raised, and RemoteError for anything else."""
    try:
        async with asyncio.timeout(ANSWER_S):
            line = await stream.read_line(limit_bytes)
    except TimeoutError:
        detail = f"the node runner on {node.connection.name} said nothing for {ANSWER_S:.0f} s"
        fix = "look at that machine: it may be out of memory, or its disk may hang"
        raise RemoteError(detail, host=node.connection.host, fix=fix) from None
    if not line:
        ended = await stream.wait()
        said = plain_text(ended.stderr.decode("utf-8", "replace"))[-2000:]
        raise RemoteError(
            f"the node runner on {node.connection.name} ended without an answer",
            host=node.connection.host,
            exit_status=ended.exit_status,
            output_tail=said,
            fix="push again; if it stays so, look at the node with `jupiter doctor`",
        )
    try:
        answer = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise nonsense(node, f"a line that is no JSON ({line[:80]!r})") from error
    if not isinstance(answer, dict):
        raise nonsense(node, f"{line[:80]!r}")
    if (refused := node_error(node, line)) is not None:
        raise refused
    return answer


def nonsense(node: Node, what: str) -> RemoteError:
    """The error of an answer that no node runner gives."""
    fix = "something on that machine may write into the output of ssh commands, such as its shell's start files"
    return RemoteError(f"{node.connection.name} answered {plain_text(what)}", host=node.connection.host, fix=fix)


async def ask(node: Node, verb: str, *arguments: str, question: object = None, limit_bytes: int) -> dict[str, Any]:
    """One JSON line to a verb, one from it."""
    stream = await node.connection.stream(node.argv(verb, *arguments))
    try:
        if question is not None:
            await stream.write(msgspec.json.encode(question) + b"\n")
        await stream.close_input()
        return await answer_of(node, stream, limit_bytes)
    finally:
        await stream.close()
