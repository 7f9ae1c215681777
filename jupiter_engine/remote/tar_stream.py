"""Tar streams in both directions: written in even pieces, and read from machines that may mean harm.

The reading half takes regular files that were asked for and nothing else: no links, devices, absolute
names, `..`, second copies, or more bytes than allowed. Each file gets its name only when it is complete.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tarfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import IO, Final

from jupiter_engine.errors import DiskFull
from jupiter_engine.files import disk_full
from jupiter_engine.units import bytes_text

BLOCK: Final = tarfile.BLOCKSIZE
# Extended headers carry long names; a name is never longer than a few KiB.
HEADER_LIMIT_BYTES: Final = 64 << 10
_SPARE_BYTES: Final = 64 << 20


class TarRefused(Exception):
    """What arrived, or was to be sent, is not what may be in the stream; says what."""


# -- writing -------------------------------------------------------------------------------------------
def checked_name(name: str) -> str:
    """A relative name that stays below its folder, as it is written; TarRefused for any other."""
    parts = name.split("/")
    if not name or name.startswith("/") or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise TarRefused(f"{name!r} is no name below a folder")
    return name


def pieces(files: Sequence[tuple[Path, str]], piece_bytes: int) -> Generator[tuple[bytes, int], None, None]:
    """The stream in pieces of at least `piece_bytes` (but the last), each with the bytes of file content in it.

    A file that shrinks under our hands is TarRefused; of one that grows, the part that it had is sent.
    """
    buffer = bytearray()
    content = 0
    for path, name in files:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise TarRefused(f"{path} is not a regular file")
            buffer += _header(name, status)
            left = status.st_size
            while left:
                data = file.read(min(left, piece_bytes))
                if not data:
                    raise TarRefused(f"{path} became shorter while it was being sent")
                buffer += data
                content += len(data)
                left -= len(data)
                if len(buffer) >= piece_bytes:
                    yield bytes(buffer), content
                    buffer.clear()
                    content = 0
            buffer += bytes(-status.st_size % BLOCK)
    buffer += bytes(2 * BLOCK)
    yield bytes(buffer), content


def _header(name: str, status: os.stat_result) -> bytes:
    info = tarfile.TarInfo(checked_name(name))
    info.size = status.st_size
    info.mode = status.st_mode & 0o777
    info.mtime = int(status.st_mtime)
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


# -- reading -------------------------------------------------------------------------------------------
class Receiver:
    """Takes a stream as it comes (`feed`), writes the wanted files below `target`."""

    def __init__(self, target: Path, names: Sequence[str], *, limit_bytes: int) -> None:
        self.content_bytes = 0
        self.complete = False
        """The end of the stream was seen."""
        self._target = target
        self._missing = {checked_name(name) for name in names}
        self._limit_bytes = limit_bytes
        self._buffer = bytearray()
        self._name = ""
        """Of the next entry, by an extended header."""
        self._size: int | None = None
        self._file: IO[bytes] | None = None
        self._left = 0
        self._padding = 0
        self._temporary = Path()
        self._final = Path()
        self._mode = 0o644
        self._folders: set[Path] = set()

    def feed(self, data: bytes) -> None:
        """Raises TarRefused, or DiskFull; nothing more may be fed after either."""
        self._buffer += data
        while not self.complete and self._step():
            pass
        if self.complete:
            self._buffer.clear()

    def finish(self) -> None:
        """The stream has ended: raises TarRefused unless every file is there."""
        if self._file is not None or self._padding or (self._buffer and not self.complete):
            raise TarRefused("the stream broke off")
        if self._missing:
            raise TarRefused(f"{len(self._missing)} files did not come, such as {min(self._missing)!r}")

    def close(self) -> None:
        """Let go of a half-written file."""
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
            self._file = None

    def _step(self) -> bool:
        """Work on what is buffered; whether there was enough for anything."""
        if self._file is not None:
            return self._body(self._file)
        if self._padding:
            if len(self._buffer) < self._padding:
                return False
            del self._buffer[: self._padding]
            self._padding = 0
        if len(self._buffer) < BLOCK:
            return False
        if not any(self._buffer[:BLOCK]):
            self.complete = True
            return True
        try:
            info = tarfile.TarInfo.frombuf(bytes(self._buffer[:BLOCK]), "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise TarRefused(f"this is no tar stream ({error})") from None
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            return self._extended(info)
        del self._buffer[:BLOCK]
        self._entry(info)
        return True

    def _extended(self, info: tarfile.TarInfo) -> bool:
        if not 0 <= info.size <= HEADER_LIMIT_BYTES:
            raise TarRefused(f"a header of {bytes_text(info.size)}")
        whole = BLOCK + info.size + -info.size % BLOCK
        if len(self._buffer) < whole:
            return False
        data = bytes(self._buffer[BLOCK : BLOCK + info.size])
        del self._buffer[:whole]
        if info.type == tarfile.GNUTYPE_LONGNAME:
            self._name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type != tarfile.XGLTYPE:
            self._records(data)
        return True

    def _records(self, data: bytes) -> None:
        """pax records, `LENGTH key=value`: only path and size mean anything here."""
        at = 0
        while at < len(data):
            head, space, _ = data[at : at + 20].partition(b" ")
            length = int(head) if space and head.isdigit() else 0
            record = data[at : at + length]
            if length <= len(head) + 1 or not record.endswith(b"\n") or b"=" not in record:
                raise TarRefused("a damaged header")
            key, _, value = record[len(head) + 1 : -1].partition(b"=")
            if key == b"path":
                self._name = value.decode("utf-8", "surrogateescape")
            elif key == b"size":
                if not value.isdigit() or len(value) > 18:
                    raise TarRefused("a damaged header")
                self._size = int(value)
            at += length

    def _entry(self, info: tarfile.TarInfo) -> None:
        name = (self._name or info.name).removeprefix("./")
        size = info.size if self._size is None else self._size
        self._name, self._size = "", None
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise TarRefused(f"{name!r} is no regular file")
        if name not in self._missing:
            raise TarRefused(f"{name!r} was not asked for, or came twice")
        if size < 0 or self.content_bytes + size > self._limit_bytes:
            raise TarRefused(f"{name!r} would make more than {bytes_text(self._limit_bytes)}")
        self._missing.discard(name)
        self._open(name, size, executable=bool(info.mode & 0o100))

    def _open(self, name: str, size: int, *, executable: bool) -> None:
        self._final = self._target / name
        folder = self._final.parent
        try:
            self._make(folder)
            free = shutil.disk_usage(folder).free if size > _SPARE_BYTES else size + _SPARE_BYTES
            if free < size + _SPARE_BYTES:
                raise DiskFull(f"{name} has {bytes_text(size)}, {bytes_text(free)} are free in {folder}")
            self._temporary = folder / f".jupiter-{secrets.token_hex(8)}.tmp"
            fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise disk_full(error, self._final) from error
        self._file = os.fdopen(fd, "wb")
        self._left, self._mode = size, 0o755 if executable else 0o644
        self._padding = -size % BLOCK

    def _make(self, folder: Path) -> None:
        if folder in self._folders:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not folder.resolve().is_relative_to(self._target.resolve()):
            raise TarRefused(f"{folder} is a link that leads out of {self._target}")
        self._folders.add(folder)

    def _body(self, file: IO[bytes]) -> bool:
        part = self._buffer[: self._left]
        if not part and self._left:
            return False
        try:
            file.write(part)
            del self._buffer[: len(part)]
            self._left -= len(part)
            self.content_bytes += len(part)
            if not self._left:
                os.fchmod(file.fileno(), self._mode)
                file.close()
                self._file = None
                self._temporary.replace(self._final)
        except OSError as error:
            raise disk_full(error, self._final) from error
        return True
