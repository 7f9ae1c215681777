"""Keeps the islands' workers going: one thread an island, so that a machine that does not answer holds up nobody."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from typing import Protocol

from jupiter_engine.errors import JupiterError
from jupiter_engine.training.distributed.islands.starting import IslandState

_LOOK_S = 1.0
_REMOTE_LOOK_S = 5.0
_PAUSES_S = (1.0, 5.0, 15.0, 60.0)
_STEADY_S = 120.0
"""A worker that was at work for so long starts its pauses anew."""
_HOUR_S = 3600.0


class Worker(Protocol):
    """What LocalIsland and RemoteIsland have in common."""

    def start(self, order: bytes) -> IslandState: ...

    def state(self) -> IslandState: ...

    def ask_halt(self) -> None: ...

    def stop(self, *, grace_s: float = ...) -> IslandState: ...


class Keeper:
    """Starts an island's worker, and again whenever it ends although the run goes on."""

    def __init__(self, name: str, worker: Worker, order: bytes, *, restarts_per_hour: int, near: bool) -> None:
        """`near`: on this machine, where looking costs nothing."""
        self.name, self._worker, self._order = name, worker, order
        self._restarts, self._every_s = restarts_per_hour, _LOOK_S if near else _REMOTE_LOOK_S
        self.said: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        """(text, level) for whoever reports."""
        self.given_up = ""
        """Why this island is not started any more."""
        self._stop = threading.Event()
        self._starts: deque[float] = deque()
        self._thread = threading.Thread(target=self._work, name=f"keeper of {name}", daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def _work(self) -> None:
        pauses, silent, began, met = 0, "", time.monotonic(), False
        while not self._stop.is_set():
            try:
                present = self._worker.state()
                if present.state == "silent":
                    if not silent:
                        self.said.put(
                            (f"The machine of island {self.name} does not answer: {present.detail}", "warning")
                        )
                    silent = present.detail or "silent"
                elif silent:
                    self.said.put((f"The machine of island {self.name} answers again", "info"))
                    silent = ""
                if present.at_work and not met:
                    # A hub on another machine may have given it another order; on this one it is left alone.
                    self._worker.start(self._order)
                met = met or present.state != "silent"
                if not present.at_work and present.state != "silent":
                    if present.state != "absent":
                        pauses = 0 if time.monotonic() - began > _STEADY_S else pauses
                        self._explain(present, _PAUSES_S[min(pauses, len(_PAUSES_S) - 1)])
                        if self._spent(present) or self._stop.wait(_PAUSES_S[min(pauses, len(_PAUSES_S) - 1)]):
                            return
                        pauses += 1
                    self._starts.append(time.monotonic())
                    began = time.monotonic()
                    self._worker.start(self._order)
            except (JupiterError, OSError) as error:
                # OSError: a full disk, no more processes. It may pass.
                reason = _reason(error)
                if not silent:
                    self.said.put((f"Island {self.name} could not be started: {reason}", "warning"))
                silent = reason
            self._stop.wait(self._every_s)

    def _explain(self, present: IslandState, pause_s: float) -> None:
        how = f"was ended by SIG{present.signal}" if present.signal else f"ended with status {present.exit_status}"
        if present.state == "lost":
            how = "is gone"
        words = f" ({present.detail})" if present.detail else ""
        self.said.put(
            (f"The worker of island {self.name} {how}{words}; it is started again in {pause_s:.0f} s", "warning")
        )

    def _spent(self, present: IslandState) -> bool:
        now = time.monotonic()
        while self._starts and now - self._starts[0] > _HOUR_S:
            self._starts.popleft()
        if len(self._starts) <= self._restarts:
            return False
        self.given_up = present.detail or f"its worker ended {len(self._starts)} times within an hour"
        self.said.put((f"Island {self.name} is given up: {self.given_up}", "warning"))
        return True

    def end(self, *, grace_s: float) -> None:
        """The run is over or rests: let the worker come to its end by itself, and end it if it does not."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=90.0)
        try:
            deadline = time.monotonic() + grace_s
            while self._worker.state().at_work and time.monotonic() < deadline:
                time.sleep(0.2)
            self._worker.stop()
        except (JupiterError, OSError) as error:
            # It ends itself: the end lies in its exchange folder, or its lease runs out.
            self.said.put((f"Island {self.name} could not be ended: {_reason(error)}", "warning"))

    def leave(self) -> None:
        """Stop looking, and leave the worker at work: another hub goes on with it, or it is ended later."""
        self._stop.set()


def _reason(error: JupiterError | OSError) -> str:
    return (error.detail if isinstance(error, JupiterError) else str(error)) or type(error).__name__
