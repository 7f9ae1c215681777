"""Threads with a workspace of their own, and what is run in them."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupiter_engine.errors import JupiterError, StateError

if TYPE_CHECKING:
    from jupiter_engine.api import Workspace

Opener = Callable[[Path | None], "Workspace"]


def open_workspace(path: Path | None) -> Workspace:
    """The workspace at `path`, or the one that the environment means."""
    from jupiter_engine.api import Workspace, find_workspace

    return Workspace(find_workspace(path, os.environ, Path.cwd()))


class Errand:
    """A function to be run with the workspace in one of the bridge's threads."""

    def __init__(self, function: Callable[[Workspace], Any]) -> None:
        self.function = function
        self.future: Future[Any] = Future()

    def run(self, workspace: Workspace) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function(workspace))
        except BaseException as error:  # noqa: BLE001 - carried to the waiting page, which raises it there
            self.future.set_exception(error)


class Worker(threading.Thread):
    """A daemon thread with its own workspace: runs errands in order, and `tick` in between."""

    def __init__(self, name: str, opener: Callable[[], Workspace], tick: Callable[[Workspace], float | None]) -> None:
        super().__init__(name=name, daemon=True)
        self.errands: queue.SimpleQueue[Errand | None] = queue.SimpleQueue()
        self._opener = opener
        self._tick = tick
        self.failed: Callable[[JupiterError], None] = lambda _: None
        self.ended: Callable[[], None] = lambda: None

    def run(self) -> None:
        try:
            workspace = self._opener()
        except JupiterError as error:
            self._fail(error)
            return
        try:
            self._serve(workspace)
        except JupiterError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - a thread's outermost frame: the console must say why it stopped
            self._fail(StateError(f"reading the workspace failed: {type(error).__name__}: {error}"))
        finally:
            self.ended()
            workspace.close()

    def _fail(self, error: JupiterError) -> None:
        self.failed(error)
        while not self.errands.empty():
            errand = self.errands.get()
            if errand is not None:
                errand.future.set_exception(error)

    def _serve(self, workspace: Workspace) -> None:
        pause = self._tick(workspace)
        due = time.monotonic() + (pause or 0.0)
        while True:
            try:
                errand = self.errands.get(timeout=None if pause is None else max(0.0, due - time.monotonic()))
            except queue.Empty:
                pause = self._tick(workspace)
                due = time.monotonic() + (pause or 0.0)
                continue
            if errand is None:
                return
            errand.run(workspace)
