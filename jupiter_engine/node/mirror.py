"""The leading host's copies of files that grow on the others, byte for byte, from the frames of verb `follow`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from .errors import NodeError
from .tail import CHECKED_BYTES

HEADER_BYTES = 64 << 10
FRAME_BYTES = 64 << 20


class Mirror:
    """Files of one host. Only paths that were agreed upon are written; all else that a host sends is refused."""

    def __init__(self, targets: Mapping[str, Path]) -> None:
        """`targets`: path as the other host names it -> where its copy lies here."""
        self._targets = dict(targets)
        self._have: dict[str, dict[str, int]] = {}
        self.started = False
        """Whether a frame has come over the present connection."""
        for target in self._targets.values():
            target.parent.mkdir(parents=True, exist_ok=True)

    @property
    def paths(self) -> list[str]:
        """What to ask for."""
        return list(self._targets)

    def have(self) -> dict[str, dict[str, Any]]:
        """What has arrived: path -> {"offset", "inode", "check"}, as `follow` wants to be told."""
        return {path: {**known, "check": self._check(path, known["offset"])} for path, known in self._have.items()}

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether everything up to these sizes has arrived: path -> bytes."""
        return all(self._have.get(path, {"offset": 0})["offset"] >= size for path, size in sizes.items())

    def _check(self, path: str, offset: int) -> str:
        """What `follow` compares before it goes on at `offset`."""
        with self._targets[path].open("rb") as file:
            file.seek(max(0, offset - CHECKED_BYTES))
            return hashlib.sha256(file.read(min(offset, CHECKED_BYTES))).hexdigest()

    def take(self, stream: IO[bytes]) -> dict[str, Any] | None:
        """Read one frame and do what it says; returns its header, None at the end of the stream.

        NodeError for anything that is no frame, OSError where this host's disk refuses.
        """
        header = self._header(stream)
        self.started = header is not None
        if header is None or header.get("f") == "beat":
            return header
        path = header.get("path")
        if not isinstance(path, str) or path not in self._targets:
            raise NodeError("protocol", f"a file that nobody asked for: {str(path)[:200]!r}")
        inode = _count(header, "inode")
        if header["f"] == "reset":
            self._targets[path].write_bytes(b"")
            self._have[path] = {"offset": 0, "inode": inode}
        elif header["f"] == "file":
            self._append(path, inode, _count(header, "offset"), _exactly(stream, _count(header, "size")))
        else:
            raise NodeError("protocol", f"an unknown frame: {str(header['f'])[:200]!r}")
        return header

    def _append(self, path: str, inode: int, offset: int, data: bytes) -> None:
        known = self._have.get(path, {"offset": 0, "inode": inode})
        if known != {"offset": offset, "inode": inode}:
            raise NodeError("protocol", f"{path}: bytes at {offset} of file {inode}, wanted {known}")
        descriptor = os.open(self._targets[path], os.O_WRONLY | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            # At its place, not at the end: what a full disk cut off in the middle is written again.
            file.seek(offset)
            file.write(data)
        self._have[path] = {"offset": offset + len(data), "inode": inode}

    @staticmethod
    def _header(stream: IO[bytes]) -> dict[str, Any] | None:
        line = stream.readline(HEADER_BYTES)
        if not line:
            return None
        if line.endswith(b"\n"):
            try:
                header = json.loads(line)
            except ValueError:
                header = None
            if isinstance(header, dict) and ("f" in header or "error" in header):
                if isinstance(header.get("error"), dict):
                    error = header["error"]
                    raise NodeError(str(error.get("kind")), str(error.get("detail")), str(error.get("fix", "")))
                return header
        raise NodeError("protocol", f"no frame: {line[:200]!r}")


def _count(header: dict[str, Any], key: str) -> int:
    value = header.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or (key == "size" and value > FRAME_BYTES):
        raise NodeError("protocol", f"{key} of a frame is {str(value)[:50]!r}")
    return value


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise NodeError("interrupted", "the connection ended in the middle of a frame")
    return data
