"""events.jsonl of a keep folder: what happened to its processes, each event once, numbered without gaps or repeats."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from .files import NO_ROOM, write_all


class EventLog:
    """Appends events durably. With no room on the disk they wait in memory until there is some."""

    def __init__(self, path: Path) -> None:
        """Open the log, cutting off a line that a kill left half written."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        content = path.read_bytes()
        self._size = content.rfind(b"\n") + 1
        if self._size != len(content):
            os.ftruncate(self._fd, self._size)
        self.events: list[dict[str, Any]] = [json.loads(line) for line in content[: self._size].splitlines()]
        """All events there are, oldest first; those that could not be written yet are at the end."""
        self._seq: int = self.events[-1]["seq"] if self.events else 0
        self._waiting: list[bytes] = []
        self.problem = ""
        """Why the last attempt to write failed; empty if all is written."""

    @property
    def waiting(self) -> int:
        """Events not written yet."""
        return len(self._waiting)

    def has(self, event: str, **fields: Any) -> bool:
        """Whether there is an event with these values."""
        return any(
            known["event"] == event and all(known.get(key) == value for key, value in fields.items())
            for known in self.events
        )

    def add(self, event: str, **fields: Any) -> None:
        """Take in an event that happened now, and write it if there is room."""
        self._seq += 1
        record = {"seq": self._seq, "at": time.time(), "event": event, **fields}
        self.events.append(record)
        self._waiting.append(json.dumps(record).encode("utf-8") + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write what waits. A full disk is remembered in `problem`, not raised: the processes matter more."""
        if not self._waiting:
            return
        data = b"".join(self._waiting)
        try:
            write_all(self._fd, data)
            os.fsync(self._fd)
        except OSError as error:
            # Whatever arrived of it is taken back: a reader must never see half an event for good.
            os.ftruncate(self._fd, self._size)
            first = not self.problem
            self.problem = str(error)
            if first and error.errno in NO_ROOM:
                self.add("disk_full", detail=str(error))
            return
        self._size += len(data)
        self._waiting.clear()
        self.problem = ""

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
