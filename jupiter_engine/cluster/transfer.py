"""Files to and from nodes by the hash of their content: resumable, checked, whole folders or none.

Sending a folder is one conversation with the verb tree-take of the node runner. The hash of the
folder's manifest goes first: if the node's folder has it, that was all. Otherwise the node says
which files its store lacks, and how much of each, and gets only those.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from jupiter_engine.cluster import fetching
from jupiter_engine.cluster.contents import Contents, HashCache, LocalFile
from jupiter_engine.cluster.conversation import Node, answer_of, ask, nonsense
from jupiter_engine.cluster.frames import NodeRefused
from jupiter_engine.cluster.progress import Meter, OnTransfer
from jupiter_engine.errors import DiskFull, JupiterError, RemoteError, StageFailed
from jupiter_engine.node import wire
from jupiter_engine.remote.port import Stream
from jupiter_engine.units import bytes_text, plain_text

ATTEMPTS = 3
"""Of one transfer in which the node refuses a file (changed meanwhile, or damaged on the way)."""
BATCH_BYTES = 1 << 20
SPARE_BYTES = 64 << 20
"""What a disk should still have free afterwards."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What a transfer came to."""

    sha256: str
    """Of the manifest."""
    files: int
    total_bytes: int
    moved_bytes: int
    """Went over the network; the rest was there already."""


class _Refused(Exception):
    """The node did not take files; `why` is a word of its own."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


# -- sending -------------------------------------------------------------------------------------------
async def send_tree(
    node: Node,
    source: Path | Mapping[str, Path],
    folder: str,
    hashes: HashCache,
    on_transfer: OnTransfer | None = None,
    *,
    what: str = "inputs",
) -> Sent:
    """Make `folder` on the node (absolute, or below its work folder) hold the files of `source`: of a folder here
    exactly those; of files by the name they get there these, beside what else is in it. Large ones are read-only there.

    DiskFull before anything is sent if it cannot fit; StageFailed if a file here keeps changing; RemoteError if the
    connection fails: what arrived is kept there, and the next attempt goes on after it.
    """
    meter = Meter(on_transfer, what)
    why = ""
    for _ in range(ATTEMPTS):
        # The node looks at its folder while we look at ours.
        argv = node.argv("tree-take", node.workdir, folder, *(() if isinstance(source, Path) else ("beside",)))
        stream = await node.connection.stream(argv)
        try:
            contents = await asyncio.to_thread(hashes.contents, source)
            return await _send_contents(node, stream, contents, meter, exact=isinstance(source, Path))
        except _Refused as refused:
            why = refused.why
        finally:
            await stream.close()
    raise _given_up(node, why)


def _given_up(node: Node, why: str) -> JupiterError:
    if why == "hash":
        detail = f"files arrived on {node.connection.name} with other content than they had, {ATTEMPTS} times"
        return StageFailed(detail, fix="do not change files while they are sent; if none changed, test that network")
    detail = f"{node.connection.name} did not take files that were sent ({plain_text(why)[:80]}), {ATTEMPTS} times"
    return RemoteError(detail, host=node.connection.host, fix="another push to that node may be going on; then repeat")


async def _send_contents(node: Node, stream: Stream, contents: Contents, meter: Meter, *, exact: bool) -> Sent:
    total = contents.total_bytes
    manifest = {"sha256": contents.sha256, "files": contents.manifest()}
    try:
        first = {"sha256": contents.sha256} if exact else manifest
        await stream.write(msgspec.json.encode(first) + b"\n")
        if (await answer_of(node, stream)).get("current") is True:
            meter.expect(total, there_bytes=total)
            return Sent(contents.sha256, len(contents.files), total, 0)
        if exact:
            await stream.write(msgspec.json.encode(manifest) + b"\n")
        answer = await answer_of(node, stream, wire.LIST_BYTES)
        files = {file.sha256: file for file in contents.files.values()}
        missing = _missing(node, answer, files)
        moved = sum(file.size - offset for file, offset in missing)
        # Small files are kept by the store and written once more into the folder.
        placed = sum(file.size for file in contents.files.values() if file.size <= wire.SMALL_BYTES)
        _require_room(node, answer, moved + placed)
        meter.expect(total, there_bytes=total - moved)
        await pour(node, stream, missing, meter)
        meter.step("verifying")
        answer = await answer_of(node, stream, wire.LIST_BYTES)
    except NodeRefused as error:
        if error.reason == "store_damaged":
            raise _Refused("hash") from error
        raise
    if answer.get("placed") is not True:
        raise _Refused(_why(answer))
    return Sent(contents.sha256, len(contents.files), total, moved)


async def send_files(
    node: Node, files: Sequence[LocalFile], on_transfer: OnTransfer | None = None, *, what: str = "environment"
) -> int:
    """Put files into the node's store; returns the bytes that had to be sent. Errors as for `send_tree`."""
    meter = Meter(on_transfer, what)
    by_sha = {file.sha256: file for file in files}
    total = sum(file.size for file in by_sha.values())
    question = {"files": [{"sha256": file.sha256, "size": file.size} for file in by_sha.values()]}
    moved, why = 0, ""
    for _ in range(ATTEMPTS):
        answer = await ask(node, "store-have", node.workdir, question=question, limit_bytes=wire.LIST_BYTES)
        missing = _missing(node, answer, by_sha)
        left = sum(file.size - offset for file, offset in missing)
        _require_room(node, answer, left)
        meter.expect(total, there_bytes=total - left)
        if not missing:
            return moved
        stream = await node.connection.stream(node.argv("store-receive", node.workdir))
        try:
            await pour(node, stream, missing, meter)
            meter.step("verifying")
            answer = await answer_of(node, stream, wire.LIST_BYTES)
        finally:
            await stream.close()
        moved += left
        if not answer.get("refused"):
            return moved
        why = _why(answer)
    raise _given_up(node, why)


def _missing(node: Node, answer: Mapping[str, Any], files: Mapping[str, LocalFile]) -> list[tuple[LocalFile, int]]:
    """What the node asks for, each with the offset from which; RemoteError for what it was not offered."""
    asked = answer.get("missing")
    if not isinstance(asked, list):
        raise nonsense(node, "without a list of what it lacks")
    missing: dict[str, tuple[LocalFile, int]] = {}
    for item in asked:
        file = files.get(str(item.get("sha256"))) if isinstance(item, dict) else None
        here = item.get("have") if isinstance(item, dict) else None
        if file is None or not isinstance(here, int) or not 0 <= here <= file.size:
            raise nonsense(node, f"{str(item)[:120]}, which it was not offered")
        missing[file.sha256] = (file, here)
    return list(missing.values())


def _why(answer: Mapping[str, Any]) -> str:
    refused = answer.get("refused")
    first = refused[0] if isinstance(refused, list) and refused else {}
    return str(first.get("why")) if isinstance(first, dict) else "?"


def _require_room(node: Node, answer: Mapping[str, Any], needed_bytes: int) -> None:
    free = answer.get("free_bytes")
    if isinstance(free, int) and needed_bytes and free < needed_bytes + SPARE_BYTES:
        detail = (
            f"{node.connection.name} has {bytes_text(free)} ({free} bytes) free in {node.workdir}, "
            f"{bytes_text(needed_bytes + SPARE_BYTES)} ({needed_bytes + SPARE_BYTES} bytes) are needed"
        )
        raise DiskFull(detail, fix="free some space there, or give the node another workdir in cluster.yaml")


async def pour(node: Node, stream: Stream, missing: Sequence[tuple[LocalFile, int]], meter: Meter) -> None:
    """Send the frames. An error that the node answered meanwhile is raised rather than the closed pipe it causes."""
    batches = frames(missing)
    try:
        batch = await asyncio.to_thread(next, batches, None)
        while batch is not None:
            # The next piece is read while this one is on its way.
            reading = asyncio.create_task(asyncio.to_thread(next, batches, None))
            try:
                await stream.write(batch[0])
                meter.add(batch[1])
            finally:
                batch = await reading
        await stream.write(b'{"end":true}\n')
        await stream.close_input()
    except RemoteError as error:
        try:
            await answer_of(node, stream, wire.LIST_BYTES)
        except RemoteError:
            raise error from None
        raise


def frames(missing: Iterable[tuple[LocalFile, int]]) -> Iterator[tuple[bytes, int]]:
    """Headers and content in pieces of about BATCH_BYTES, each with its count of content bytes. StageFailed for a
    file that became shorter."""
    batch, content = bytearray(), 0
    for file, offset in missing:
        batch += b'{"sha256":"%s","size":%d,"offset":%d}\n' % (file.sha256.encode(), file.size, offset)
        left = file.size - offset
        # Plain descriptors: with thousands of small files the objects around them cost more than reading.
        descriptor = os.open(file.path, os.O_RDONLY)
        try:
            os.lseek(descriptor, offset, os.SEEK_SET)
            while left:
                piece = os.read(descriptor, min(left, BATCH_BYTES))
                if not piece:
                    raise StageFailed(f"{file.path} became shorter while it was sent", fix="repeat when it is complete")
                batch += piece
                content += len(piece)
                left -= len(piece)
                if len(batch) >= BATCH_BYTES:
                    yield bytes(batch), content
                    batch, content = bytearray(), 0
        finally:
            os.close(descriptor)
    if batch:
        yield bytes(batch), content


# -- fetching ------------------------------------------------------------------------------------------
async def fetch_tree(
    node: Node,
    folder: str,
    target: Path,
    hashes: HashCache,
    on_transfer: OnTransfer | None = None,
    *,
    what: str = "results",
    limit_bytes: int,
    wanted: Callable[[str], bool] | None = None,
) -> Sent:
    """Make `target` hold exactly the files of the node's `folder` whose names are `wanted` (left out: all).
    Nothing is written outside `target` and its waiting room beside it, and no more than `limit_bytes`.

    DiskFull before anything is fetched if it cannot fit; RemoteError if the node's answers do not fit together or
    the connection fails: what came is kept, and the next attempt goes on after it.
    """
    meter = Meter(on_transfer, what, step="fetching")
    damaged = ""
    for _ in range(ATTEMPTS):
        answer = await ask(node, "tree-manifest", node.workdir, folder, limit_bytes=wire.LIST_BYTES)
        fetch = await asyncio.to_thread(fetching.plan, node, answer, target, hashes, wanted, limit_bytes)
        meter.expect(fetch.total_bytes, there_bytes=fetch.total_bytes - fetch.left_bytes)
        if fetch.asked:
            damaged = await _receive(node, fetch, folder, meter)
            if damaged:
                continue
        meter.step("verifying")
        await asyncio.to_thread(fetch.place)
        return Sent(fetch.sha256, len(fetch.manifest), fetch.total_bytes, fetch.left_bytes)
    raise RemoteError(
        f"{plain_text(damaged)[:200]} of {node.connection.name} came with other content than its hash says, "
        f"{ATTEMPTS} times",
        host=node.connection.host,
        fix="fetch again when nothing writes to it; if nothing does, test that network",
    )


async def _receive(node: Node, fetch: fetching.Fetch, folder: str, meter: Meter) -> str:
    """Take the frames of what was asked for; the first name whose content was another than announced."""
    damaged = ""
    stream = await node.connection.stream(node.argv("tree-send", node.workdir, folder))
    try:
        question = [{"path": item.name, "size": item.size, "offset": item.offset} for item in fetch.asked]
        await stream.write(msgspec.json.encode({"files": question}) + b"\n")
        await stream.close_input()
        for item, expected in zip(fetch.asked, question, strict=True):
            header = await answer_of(node, stream)
            if header != expected:
                raise nonsense(node, f"{str(header)[:120]} where {item.name} was asked for")
            with fetch.part(item) as part:
                left = item.size - item.offset
                while left:
                    piece = await stream.read(min(left, BATCH_BYTES))
                    if not piece:
                        detail = f"{node.connection.name} stopped in the middle of {plain_text(item.name)}"
                        raise RemoteError(detail, host=node.connection.host, fix="fetch again: it goes on from there")
                    await asyncio.to_thread(part.write, piece)
                    left -= len(piece)
                    meter.add(len(piece))
                if not await asyncio.to_thread(part.finish):
                    damaged = damaged or item.name
    finally:
        await stream.close()
    return damaged
