"""Verb `follow`: send what is new in the files of a run folder, and a sign of life with the processes' state.

The first line of standard input says what to follow; every later one renews the lease. The end of standard input ends
it. Standard output carries frames: a JSON line, and after a `file` header exactly `size` raw bytes.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from .errors import NodeError
from .files import complain, write_all
from .keep_folder import KeepFolder
from .tail import Known, Tail, problem_of

REQUEST_BYTES = 64 << 20
PIECE_BYTES = 1 << 20
SLOW_PIECE_BYTES = 64 << 10
"""Size of pieces under a rate limit."""
IDLE_SHARE = 0.003
"""Looking for news may take this share of one core while there is none."""
SLOWEST_S = 5.0
FAREWELL_S = 2.0
"""A receiver that has closed our input but does not read is not waited for longer."""


class Request:
    """The first line, checked."""

    def __init__(self, value: Any) -> None:
        if not isinstance(value, dict) or not str(value.get("root", "")).startswith("/"):
            raise NodeError("usage", "follow wants a JSON object with an absolute root")
        self.root = str(value["root"])
        self.patterns = [str(pattern) for pattern in value.get("patterns") or []]
        for pattern in self.patterns:
            if problem := problem_of(pattern):
                raise NodeError("usage", problem)
        self.have = {
            str(path): Known(int(known["inode"]), int(known["offset"]), str(known.get("check", "")))
            for path, known in (value.get("have") or {}).items()
        }
        self.beat_s = float(value.get("beat_s") or 5.0)
        self.poll_s = float(value.get("poll_s") or 0.2)
        self.lease = str(value["lease"]) if value.get("lease") else None
        limit = value.get("limit_bytes_per_s")
        self.limit_bytes_per_s = float(limit) if limit else None
        self.keep = str(value["keep"]) if value.get("keep") else None


def main(arguments: list[str]) -> int:
    """follow, with the request as the first line of standard input."""
    if arguments:
        raise NodeError("usage", "follow < REQUEST")
    source = sys.stdin.buffer
    try:
        request = Request(json.loads(source.readline(REQUEST_BYTES)))
    except (ValueError, TypeError, KeyError) as error:
        raise NodeError("usage", f"the first line is no request: {error!r}") from error
    return Follow(request).run()


class Follow:
    """One receiver, served until it goes."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._tail = Tail(request.root, request.patterns, request.have)
        self._gone = threading.Event()
        self._beat_due = 0.0
        self._free_at = 0.0
        """time.monotonic() from which on the rate limit lets the next piece go."""

    def run(self) -> int:
        """Send frames until the input ends or nobody reads any more."""
        if self._request.lease:
            self._renew(Path(self._request.lease))
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            while not self._gone.is_set():
                self._beat()
                began = time.thread_time()
                sent = self._round()
                spent = time.thread_time() - began
                idle_s = 0.0 if sent else min(SLOWEST_S, spent / IDLE_SHARE)
                until_beat = max(0.0, self._beat_due - time.monotonic())
                self._gone.wait(min(max(self._request.poll_s, idle_s), until_beat))
        except BrokenPipeError:
            return 0
        return 0

    def _round(self) -> bool:
        """Send all that is new; whether there was anything."""
        sent = False
        piece_bytes = SLOW_PIECE_BYTES if self._request.limit_bytes_per_s else PIECE_BYTES
        for found in self._tail.look():
            for header, content in self._tail.news(found, piece_bytes):
                self._send(header, content)
                sent = True
                self._beat()
                if self._gone.is_set():
                    return sent
        return sent

    def _send(self, header: dict[str, Any], content: bytes = b"") -> None:
        data = json.dumps(header).encode("utf-8") + b"\n" + content
        write_all(1, data)
        if self._request.limit_bytes_per_s and content:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + len(data) / self._request.limit_bytes_per_s
            while (wait_s := self._free_at - time.monotonic()) > 0 and not self._gone.is_set():
                self._gone.wait(min(wait_s, self._request.beat_s))
                self._beat()

    def _beat(self) -> None:
        now = time.monotonic()
        if now >= self._beat_due:
            self._beat_due = now + self._request.beat_s
            self._send({"f": "beat", "at": time.time(), "state": self._state()})

    def _state(self) -> dict[str, Any] | None:
        """As verb `state` gives it; None while there is no keep folder."""
        root = Path(self._request.root)
        places = [Path(self._request.keep)] if self._request.keep else [root, root / "node"]
        for place in places:
            if (place / "keep.json").is_file():
                try:
                    return KeepFolder(place).state()
                except NodeError as error:
                    return error.record()
        return None

    def _listen(self) -> None:
        """Renew the lease with every line; notice the end even while the other thread waits for a slow receiver."""
        while True:
            try:
                data = os.read(0, 4096)
            except OSError:
                data = b""
            if not data:
                break
            if self._request.lease and b"\n" in data:
                self._renew(Path(self._request.lease))
        self._gone.set()
        time.sleep(FAREWELL_S)
        os._exit(0)

    def _renew(self, lease: Path) -> None:
        try:
            lease.touch()
        except OSError as error:
            complain(f"the lease cannot be renewed: {error}")
