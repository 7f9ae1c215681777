"""Files of a machine through its commands: small POSIX scripts for one file, tar streams for many.

Works on any system with sh, cat, tail, mv, wc and tar (GNU, BSD or busybox). What is sent is counted on the
other side before it gets its name; what is fetched is checked here entry by entry.
"""

from __future__ import annotations

import asyncio
import posixpath
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from jupiter_engine.errors import RemoteError
from jupiter_engine.remote.port import Completed, Progress, Stream
from jupiter_engine.remote.tar_stream import Receiver, TarRefused, pieces
from jupiter_engine.units import plain_text

# Measured: larger pieces send no faster, smaller ones cost a wake-up each.
PIECE_BYTES: Final = 256 << 10
FETCH_LIMIT_BYTES: Final = 256 << 30
# How long one piece may wait for a machine that takes nothing.
STALL_S: Final = 120.0

_READ: Final = 'if [ -e "$1" ]; then exec tail -c "+$2" <"$1"; fi'
# Size checked before the rename: a lost connection looks like the end of the input. Then nobody reads the errors
# either, which must not end the script before it has cleaned up.
_WRITE: Final = """
if [ -d "$3" ]; then echo "$3 is a folder" >&2; exit 1; fi
mkdir -p "$1" || exit 1
umask 077
trap '' PIPE
trap 'rm -f "$2"' EXIT
trap 'exit 1' HUP INT TERM
cat >"$2" || exit 1
if [ "$(($(wc -c <"$2")))" -ne "$5" ]; then echo "the file arrived incomplete" >&2; exit 1; fi
chmod "$4" "$2" || exit 1
sync "$2" 2>/dev/null || sync || :
mv -f "$2" "$3" || exit 1
sync "$1" 2>/dev/null || :
"""
# Owners and extended attributes are the sender's business only; a Mac's tar would otherwise read and write ._ files.
_UNPACK: Final = 'mkdir -p "$1" && cd "$1" && COPYFILE_DISABLE=1 exec tar -x -o -p -f -'
_PACK: Final = 'cd "$1" && COPYFILE_DISABLE=1 exec tar --null -T - -c -f -'


def shell(script: str, *arguments: str) -> tuple[str, ...]:
    """A vector that runs `script` in /bin/sh with $1, $2, ..."""
    return ("/bin/sh", "-c", script, "sh", *arguments)


def safe_path(path: str) -> str:
    """A path that no tool takes for an option."""
    return path if path.startswith("/") else f"./{path}"


class FileCommands:
    """The file half of `port.Connection`, for adapters that can run and stream commands."""

    name: str
    host: str

    async def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 30.0, limit_bytes: int = 16 << 20
    ) -> Completed:
        raise NotImplementedError

    async def stream(self, argv: Sequence[str]) -> Stream:
        raise NotImplementedError

    async def read(self, path: str, *, offset_bytes: int = 0, limit_bytes: int = 64 << 20) -> bytes:
        argv = shell(_READ, safe_path(path), str(offset_bytes + 1))
        done = await self.run(argv, timeout_s=STALL_S, limit_bytes=limit_bytes)
        return self._good(done, f"{path} cannot be read", argv).stdout

    async def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        target = safe_path(path)
        folder = posixpath.dirname(target)
        temporary = posixpath.join(folder, f".jupiter-{secrets.token_hex(8)}.tmp")
        argv = shell(_WRITE, folder, temporary, target, f"{mode:04o}", str(len(data)))
        done = await self.run(argv, stdin=data, timeout_s=STALL_S + len(data) / 1e6)
        self._good(done, f"{path} cannot be written", argv)

    async def send(self, files: Sequence[tuple[Path, str]], folder: str, progress: Progress | None = None) -> None:
        """Copy local files to names below `folder`, as one stream. A name may not lead out of it (RemoteError)."""
        argv = shell(_UNPACK, safe_path(folder))
        source = pieces(files, PIECE_BYTES)
        stream = await self.stream(argv)
        try:
            sent = 0
            while (piece := await asyncio.to_thread(next, source, None)) is not None:
                data, content_bytes = piece
                async with asyncio.timeout(STALL_S):
                    await stream.write(data)
                sent += content_bytes
                if progress is not None and content_bytes:
                    progress(sent)
            await stream.close_input()
            async with asyncio.timeout(STALL_S):
                done = await stream.wait()
        except RemoteError as error:
            raise await self._why(stream, error) from error
        except TimeoutError as error:
            raise RemoteError(f"{self.name} took no data for {STALL_S:g} s", host=self.host, argv=argv) from error
        except TarRefused as error:
            raise RemoteError(f"not sent to {self.name}: {error}", host=self.host, argv=argv) from error
        finally:
            source.close()
            await stream.close()
        self._good(done, f"the files were not all stored in {folder}", argv)

    async def _why(self, stream: Stream, error: RemoteError) -> RemoteError:
        """tar ends early when it cannot go on; its own words say more than `reads no more input`."""
        try:
            async with asyncio.timeout(5):
                done = await stream.wait()
        except (RemoteError, TimeoutError):
            return error
        said = plain_text(done.stderr.decode("utf-8", "replace")).strip()
        if not said:
            return error
        return RemoteError(
            f"{self.name}: the files could not be stored: {said[-600:]}",
            host=self.host,
            exit_status=done.exit_status,
            output_tail=said[-2000:],
        )

    async def fetch(
        self,
        folder: str,
        names: Sequence[str],
        target: Path,
        progress: Progress | None = None,
        *,
        limit_bytes: int = FETCH_LIMIT_BYTES,
    ) -> None:
        """Copy regular files below `folder` into the local `target`, as one stream. Only what was asked for is taken,
        each once, never more than `limit_bytes` in all, never outside `target`; anything else is a RemoteError."""
        argv = shell(_PACK, safe_path(folder))
        try:
            receiver = Receiver(target, names, limit_bytes=limit_bytes)
        except TarRefused as error:
            raise RemoteError(f"not fetched from {self.name}: {error}", host=self.host, argv=argv) from error
        stream = await self.stream(argv)
        feeding = asyncio.create_task(self._name_files(stream, names))
        try:
            while not receiver.complete:
                async with asyncio.timeout(STALL_S):
                    data = await stream.read(PIECE_BYTES)
                if not data:
                    break
                await asyncio.to_thread(receiver.feed, data)
                if progress is not None:
                    progress(receiver.content_bytes)
            async with asyncio.timeout(STALL_S):
                await feeding
                done = await stream.wait()
            self._good(done, f"the files of {folder} cannot be read", argv)
            receiver.finish()
        except TarRefused as error:
            raise RemoteError(f"{self.name} sent what was not asked for: {error}", host=self.host, argv=argv) from error
        except TimeoutError as error:
            raise RemoteError(f"{self.name} sent nothing for {STALL_S:g} s", host=self.host, argv=argv) from error
        finally:
            feeding.cancel()
            receiver.close()
            await stream.close()

    async def _name_files(self, stream: Stream, names: Sequence[str]) -> None:
        for batch in _batches(names):
            await stream.write(batch)
        await stream.close_input()

    def _good(self, done: Completed, what: str, argv: Sequence[str]) -> Completed:
        if done.exit_status == 0:
            return done
        said = plain_text(done.stderr.decode("utf-8", "replace")).strip()
        how = f"signal {done.signal}" if done.exit_status is None else f"exit status {done.exit_status}"
        raise RemoteError(
            f"{self.name}: {what}: {said[-600:] or how}",
            host=self.host,
            argv=tuple(argv),
            exit_status=done.exit_status,
            output_tail=said[-2000:],
        )


def _batches(names: Sequence[str]) -> Iterator[bytes]:
    """Names for `tar --null -T -`, which takes none of them for an option."""
    batch = bytearray()
    for name in names:
        batch += f"./{name}".encode("utf-8", "surrogateescape") + b"\0"
        if len(batch) > PIECE_BYTES:
            yield bytes(batch)
            batch.clear()
    yield bytes(batch)
