"""How many sessions one ssh connection may have open at once, and who waits for the next.

sshd allows ten (MaxSessions). Two stay free for what the user's own tools share with us, and streams, which last,
leave two of ours for commands. A server that refuses earlier is taken at its word, and asked for more again later.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Final

SESSIONS: Final = 8
STREAMS: Final = 6
# A session whose command outlives it stays counted by sshd until the command ends, so a refusal says little about
# the time after.
ASK_AGAIN_AFTER_S: Final = 30.0


class Slot:
    """The right to open one session; `give_back` may be called any number of times."""

    def __init__(self, slots: Slots, *, lasting: bool) -> None:
        self._slots = slots
        self.lasting = lasting
        self.established = False
        self._taken = True

    def establish(self) -> None:
        """The server has opened it."""
        self.established = True

    def give_back(self) -> None:
        if self._taken:
            self._taken = False
            self._slots._returned(self)


class Slots:
    """Of one connection."""

    def __init__(self) -> None:
        self.limit = SESSIONS
        self._open: set[Slot] = set()
        self._waiting: deque[tuple[asyncio.Future[Slot], bool]] = deque()
        self._refused_at = 0.0

    async def take(self, *, lasting: bool) -> Slot:
        """Wait for a slot, in order; streams only for one of the first STREAMS."""
        if self._fits(lasting=lasting):
            return self._give(lasting=lasting)
        future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, lasting))
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                future.result().give_back()
            raise

    def refused(self, slot: Slot) -> bool:
        """The server did not open this one. Whether waiting makes sense: another one is open and will end."""
        slot.give_back()
        self._refused_at = time.monotonic()
        self.limit = max(1, sum(other.established for other in self._open))
        return bool(self._open)

    def _fits(self, *, lasting: bool) -> bool:
        if len(self._open) >= self.limit:
            return False
        return not lasting or sum(slot.lasting for slot in self._open) < STREAMS

    def _give(self, *, lasting: bool) -> Slot:
        slot = Slot(self, lasting=lasting)
        self._open.add(slot)
        return slot

    def _returned(self, slot: Slot) -> None:
        self._open.discard(slot)
        if slot.established and self.limit < SESSIONS and time.monotonic() - self._refused_at > ASK_AGAIN_AFTER_S:
            self._refused_at = time.monotonic()
            self.limit += 1
        for future, lasting in [*self._waiting]:
            if future.done():
                self._waiting.remove((future, lasting))
            elif self._fits(lasting=lasting):
                self._waiting.remove((future, lasting))
                future.set_result(self._give(lasting=lasting))
