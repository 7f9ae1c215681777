"""How far a transfer is: bytes, the rate of the last seconds, and the time that is left at that rate."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from jupiter_engine.protocol.fleet import Transfer

OnTransfer = Callable[[Transfer], None]
WINDOW_S = 5.0
"""The rate is that of so many seconds: long enough to be calm, short enough to follow a slower network."""
INTERVAL_S = 0.2


class Meter:
    """Counts bytes and tells them on, a few times a second."""

    def __init__(self, on_transfer: OnTransfer | None, what: str, *, step: str = "sending") -> None:
        self._tell = on_transfer
        self._what = what
        self._step = step
        self._sent = 0
        self._total = 0
        self._marks: deque[tuple[float, int]] = deque()
        self._told_at = 0.0

    def expect(self, total_bytes: int, *, there_bytes: int = 0) -> None:
        """So much there is in all, of which so much was there already."""
        self._total, self._sent = total_bytes, there_bytes
        self._marks.clear()
        self._marks.append((time.monotonic(), there_bytes))
        self._report(force=True)

    def add(self, size_bytes: int) -> None:
        self._sent += size_bytes
        now = time.monotonic()
        self._marks.append((now, self._sent))
        while len(self._marks) > 2 and now - self._marks[0][0] > WINDOW_S:
            self._marks.popleft()
        self._report(force=False)

    def step(self, name: str) -> None:
        """What is being done from now on: sending, installing, verifying."""
        self._step = name
        self._report(force=True)

    def transfer(self) -> Transfer:
        begun, before = self._marks[0] if self._marks else (time.monotonic(), 0)
        passed_s = time.monotonic() - begun
        moving = self._step in ("sending", "fetching") and passed_s > 0 and self._sent > before
        rate = (self._sent - before) / passed_s if moving else None
        left_s = (self._total - self._sent) / rate if rate else None
        return Transfer(
            what=self._what,
            sent_bytes=self._sent,
            total_bytes=self._total,
            bytes_per_s=rate,
            eta_s=left_s,
            step=self._step,
        )

    def _report(self, *, force: bool) -> None:
        now = time.monotonic()
        if self._tell is not None and (force or now - self._told_at >= INTERVAL_S):
            self._told_at = now
            self._tell(self.transfer())
