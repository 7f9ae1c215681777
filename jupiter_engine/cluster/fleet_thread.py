"""The fleet for a program without an event loop of its own: a thread keeps it fresh, `picture` never waits."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

from jupiter_engine.cluster import upkeep
from jupiter_engine.cluster.discovery import Discovered, discover
from jupiter_engine.cluster.fleet import AT_ONCE, Fleet
from jupiter_engine.cluster.joining import Joined
from jupiter_engine.errors import JupiterError, UsageError
from jupiter_engine.protocol.fleet import Finding, Fix, FleetPicture
from jupiter_engine.remote.host_keys import OfferedKey
from jupiter_engine.settings.cluster import ClusterSettings, NodeSpec, load_cluster

FAST_S: Final = 2.0
"""Between two questions for the numbers that change; more for fleets larger than AT_ONCE."""
FULL_S: Final = 30.0
"""Between two questions for everything: software, interfaces, settings."""
LOOK_S: Final = 1.0
"""Between two looks at the cluster file."""

T = TypeVar("T")
MakeFleet = Callable[[ClusterSettings, Path], Fleet]
Say = Callable[[str], None]
"""Told what is being done; called from the fleet's thread."""
Ask = Callable[[OfferedKey, str], concurrent.futures.Future[bool]]
"""Puts a key, and whose it is, before a person; called from the fleet's thread, which goes on meanwhile."""


class FleetThread:
    """Starts at the first `picture`, `wake` or `examine`; ends with `close`. Methods may be called from any thread."""

    def __init__(self, root: Path, *, make: MakeFleet = Fleet) -> None:
        """`root`: the workspace, whose config/cluster.yaml is read again whenever it changes."""
        self._root = root
        self._make = make
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._guard = threading.Lock()
        self._picture = FleetPicture()
        self._fleet: Fleet | None = None
        self._wanted: asyncio.Event | None = None
        self._stopping = False
        self._watched = True
        self._watching: asyncio.Event | None = None
        self.problem = ""
        """Why the cluster file is not followed at the moment; empty: it is."""

    # -- from any thread -----------------------------------------------------------------------------------
    def picture(self) -> FleetPicture:
        """The newest picture; an empty one until there is any."""
        self._begin()
        return self._picture

    def wake(self) -> None:
        """Call lost machines at once and ask all of them now."""
        self._submit(self._wake())

    def examine(self, progress: Callable[[str], None] | None = None) -> concurrent.futures.Future[tuple[Finding, ...]]:
        """Let the doctor look; the findings are in the picture, too. `progress` is called from the thread."""
        return self._submit(self._with_fleet(lambda fleet: fleet.examine(progress=progress)))

    def apply(self, fix: Fix) -> concurrent.futures.Future[str]:
        """Do what a safe fix says; the result is what the command printed, or the JupiterError."""
        return self._submit(self._with_fleet(lambda fleet: fleet.apply(fix)))

    def watch(self, *, wanted: bool) -> None:
        """Whether anybody looks: without, machines are kept connected but not asked. At first somebody does."""
        self._watched = wanted
        if self._loop is not None and self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._mind)

    def discover(self) -> concurrent.futures.Future[Discovered]:
        """Machines that could be added; takes a few seconds."""
        return self._submit(discover())

    def add(self, node: NodeSpec, ask: Ask, say: Say) -> concurrent.futures.Future[Joined]:
        """Take a machine in; `ask` decides about a key that is not trusted yet."""
        return self._submit(self._with_fleet(lambda fleet: upkeep.add(fleet, node, _decider(ask), say)))

    def trust(self, name: str, ask: Ask) -> concurrent.futures.Future[tuple[OfferedKey, bool]]:
        """Settle a node's key, a changed one too: (its key, whether anything was decided)."""
        return self._submit(self._with_fleet(lambda fleet: upkeep.trust(fleet, name, _decider(ask))))

    def remove(self, name: str) -> concurrent.futures.Future[upkeep.Removed]:
        """Take a node out of the cluster file, and what links have put there off the machine."""
        return self._submit(self._with_fleet(lambda fleet: upkeep.remove(fleet, name)))

    def push(self, name: str) -> concurrent.futures.Future[str]:
        """Bring a node's environment up to date; the result is its Python."""
        return self._submit(self._with_fleet(lambda fleet: upkeep.push(fleet, name)))

    def link(self, group: str) -> concurrent.futures.Future[tuple[str, tuple[str, ...]]]:
        """Let the leading node of a group call the others: (the leading node, those that it reaches)."""
        return self._submit(self._with_fleet(lambda fleet: upkeep.link_group(fleet, group)))

    def close(self) -> None:
        """Hang up and end the thread."""
        with self._guard:
            thread, self._stopping = self._thread, True
        if thread is None:
            return
        self._ready.wait()
        if self._loop is not None and self._wanted is not None:
            # A loop that is closed already has ended by itself.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wanted.set)
        thread.join()

    def _begin(self) -> None:
        with self._guard:
            if self._thread is None and not self._stopping:
                self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="fleet", daemon=True)
                self._thread.start()

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        self._begin()
        if self._stopping or not self._ready.wait(10) or self._loop is None:
            work.close()
            failed: concurrent.futures.Future[T] = concurrent.futures.Future()
            failed.set_exception(UsageError("the fleet has been closed"))
            return failed
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    # -- in the thread -------------------------------------------------------------------------------------
    async def _run(self) -> None:
        self._loop, self._wanted = asyncio.get_running_loop(), asyncio.Event()
        self._watching = asyncio.Event()
        self._mind()
        seen: tuple[int, int] | None = None
        looking: asyncio.Task[None] | None = None
        self._ready.set()
        try:
            while not self._stopping:
                mark = self._mark()
                if mark != seen or (self._fleet is None and not self.problem):
                    seen = mark
                    former = looking
                    if await self._replace() and self._fleet is not None:
                        if former is not None:
                            await _ended(former)
                        looking = asyncio.create_task(self._look(self._fleet))
                with_pause = asyncio.create_task(self._wanted.wait())
                await asyncio.wait({with_pause}, timeout=LOOK_S)
                with_pause.cancel()
                self._wanted.clear()
        finally:
            if looking is not None:
                await _ended(looking)
            if self._fleet is not None:
                await self._fleet.close()
            # Whoever still waits for an answer gets the end of it, not silence.
            rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

    def _mind(self) -> None:
        if self._watching is not None:
            if self._watched:
                self._watching.set()
            else:
                self._watching.clear()

    def _mark(self) -> tuple[int, int] | None:
        try:
            status = (self._root / "config" / "cluster.yaml").stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size

    async def _replace(self) -> bool:
        """Follow the file as it is now; a file that is not accepted leaves the former fleet in place."""
        try:
            cluster = load_cluster(self._root / "config" / "cluster.yaml").value
        except JupiterError as error:
            self.problem = error.sentence()
            return False
        self.problem = ""
        former, fleet = self._fleet, self._make(cluster, self._root)
        fleet.listen(lambda: self._show(fleet))
        if former is not None:
            fleet.inherit(former)
        self._fleet = fleet
        if former is not None:
            await former.close()
        await fleet.open()
        self._show(fleet)
        return True

    def _show(self, fleet: Fleet) -> None:
        if fleet is self._fleet:
            self._picture = fleet.picture()

    async def _look(self, fleet: Fleet) -> None:
        """Keep everything fresh until cancelled; a machine that is slow to answer keeps no other one waiting."""
        pause_s = FAST_S * max(1.0, len(fleet.names()) / AT_ONCE)
        watching = self._watching
        assert watching is not None
        async with asyncio.TaskGroup() as group:
            for name in fleet.names():
                group.create_task(self._look_at(fleet, name, pause_s, watching))
            group.create_task(self._plan(fleet, pause_s, watching))

    @staticmethod
    async def _look_at(fleet: Fleet, name: str, pause_s: float, watching: asyncio.Event) -> None:
        whole_at = time.monotonic()
        while True:
            await watching.wait()
            whole = time.monotonic() - whole_at > FULL_S
            if whole:
                whole_at = time.monotonic()
            await fleet.refresh_facts(fast=not whole, names=(name,))
            await asyncio.sleep(pause_s)

    @staticmethod
    async def _plan(fleet: Fleet, pause_s: float, watching: asyncio.Event) -> None:
        """Plan the groups again whenever another machine has told what it is, and now and then."""
        known, planned_at = -1, 0.0
        while True:
            await watching.wait()
            told = sum(fleet.facts(name) is not None for name in fleet.names())
            if told != known or time.monotonic() - planned_at > FULL_S:
                known, planned_at = told, time.monotonic()
                await fleet.plans()
            await asyncio.sleep(pause_s)

    async def _wake(self) -> None:
        if self._fleet is not None:
            self._fleet.wake()
            await self._fleet.refresh_facts(fast=True)

    async def _with_fleet(self, work: Callable[[Fleet], Coroutine[Any, Any, T]]) -> T:
        for _ in range(int(10 / LOOK_S)):
            if self._fleet is not None:
                return await work(self._fleet)
            if self.problem:
                break
            await asyncio.sleep(LOOK_S / 10)
        raise UsageError(self.problem or "there is no cluster file yet")


def _decider(ask: Ask) -> Callable[[OfferedKey, str], Coroutine[Any, Any, bool]]:
    async def decide(key: OfferedKey, who: str) -> bool:
        return await asyncio.wrap_future(ask(key, who))

    return decide


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
