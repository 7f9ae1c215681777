"""One stage of a cycle on other machines, seen as a Remote: whoever asks sees a local run.

The worker there is kept by the leading machine's node runner. Its run folder is mirrored byte by byte
into the workspace; facts, rows and metrics are then read here. A lost connection changes nothing over
there: the mirror goes on from where it stands as soon as the machine answers again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path, PurePath
from typing import Any, Final, Protocol

import msgspec

from jupiter_engine.cluster.frames import BeatFrame, KeepState
from jupiter_engine.cluster.mirror import Mirror
from jupiter_engine.cluster.runner import KeepOrder, KeepProcess, NodeRefused, NodeRunner
from jupiter_engine.cluster.shipping import localise
from jupiter_engine.cluster.site import Ready, Site
from jupiter_engine.errors import JupiterError, NodeUnreachable, RemoteError, StateError
from jupiter_engine.files import ProcessIdentity, read_json, write_json
from jupiter_engine.protocol.facts import Progress
from jupiter_engine.remote.failures import lasting
from jupiter_engine.remote.local import LocalRemote

MIRRORED: Final = (
    "metrics.jsonl",
    "worker.log",
    "state.json",
    "results/*.jsonl",
    "ranks/*/*.log",
    "ranks/*/*.jsonl",
    "ranks/*/*.json",
    "events.jsonl",
)
KEEP: Final = "node"
"""Folder of the node runner's own files below a run folder."""
_BEAT_S: Final = 1.0
_RETRY_S: Final = 1.0
_FAULTS: Final = 8
_GOOD_S: Final = 30.0
_NOTHING: Final = 5
"""Beats without any state of a worker that was started: its folder is gone."""
STOP_GRACE_S: Final = 60.0
"""A training step on a slow machine must fit in, so that a stop ends in a checkpoint and not in a kill."""
NOWHERE: Final = ProcessIdentity(pid=0, started_at=0.0)
"""Stands for a worker on another machine, which no process table here knows."""


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """placement.json of a run folder: where the stage works, and how often a worker was started anywhere.

    It survives a change of machines, so that a round is never used twice: what a machine remembers of a
    round can then only be about that round.
    """

    nodes: tuple[str, ...] = ()
    """The leading one first; empty: not chosen."""
    group: bool = False
    """Whether they train as one group."""
    islands: bool = False
    """Whether they train in islands; the leading one is then the hub's."""
    workspace: str = ""
    """Folder of this workspace on the leading machine; empty until it is known."""
    round: int = 0
    """Workers started so far, on whatever machine."""
    begun: bool = False
    """Whether the one of this round was started on `nodes`; false: they are chosen, nothing runs there yet."""


class Maker(Protocol):
    """Makes the machines ready: environment, inputs, order; and says how to reach the leading one later."""

    async def prepare(self, say: Callable[[str], None], at: Callable[[Progress], None]) -> Ready: ...

    async def leader(self, name: str) -> Site:
        """The leading machine as it was made ready before; waits while it does not answer."""

    async def fetch(self, site: Site, at: Callable[[Progress], None]) -> None:
        """Bring the stage's outputs home, verified."""

    def outputs(self) -> tuple[Path, ...]:
        """Where they go here."""


class Successor(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that could lead a group instead of one that is gone."""

    name: str
    step: int
    """Of the newest checkpoint that it has a copy of; -1: none."""


def read_placement(folder: Path) -> Placed:
    """A run folder's placement.json; that of a stage which was begun nowhere if there is none."""
    path = folder / "placement.json"
    if not path.exists():
        return Placed()
    placed = read_json(path, Placed)
    assert isinstance(placed, Placed)
    return placed


class RemoteStage(LocalRemote):
    """Reads come from the mirror in the workspace; starting, stopping and halting go to the machine."""

    def __init__(self, folder: Path, home: Path, nodes: tuple[str, ...], maker: Maker) -> None:
        super().__init__()
        self.name = nodes[0]
        self.nodes = nodes
        self.notes: list[tuple[str, str]] = []
        """(level, sentence) that nobody has taken yet."""
        self.progress: Progress | None = None
        """Of making ready and of fetching, until the worker speaks itself."""
        self.silent_since: float | None = None
        """time.monotonic() since when the leading machine does not answer."""
        self._folder, self._home, self._maker = folder, home, maker
        self._task: asyncio.Task[None] | None = None
        self._over = False
        self._failure: JupiterError | None = None
        self._halt = False
        self._making_ready = False
        self._faults = 0
        """Times in a row that following broke, although the machine answers, before it had gone well for a while."""

    # -- Remote ----------------------------------------------------------------------------------
    async def start(
        self, argv: tuple[str, ...], *, folder: PurePath, log: PurePath, env: dict[str, str]
    ) -> ProcessIdentity:
        """Make the machines ready and start the worker there, in the background: `alive` says how it goes."""
        await self._end_task()
        self._over, self._failure, self._halt, self._making_ready = False, None, False, False
        self._task = asyncio.create_task(self._begin(env), name=f"stage {self._folder.name}")
        return NOWHERE

    async def alive(self, process: ProcessIdentity) -> bool:
        """Whether the stage is being made ready, at work, or out of sight; raises what made it impossible."""
        if self._task is None and not self._over and self.placed().begun:
            # An engine before this one started it.
            self.name = self.placed().nodes[0]
            self._task = asyncio.create_task(self._follow(), name=f"stage {self._folder.name}")
        if self._failure is not None:
            failure, self._failure = self._failure, None
            self._over = True
            raise failure
        if self._task is not None and self._task.done() and not self._over:
            self._task.result()
            raise StateError(f"the watch over {self._folder.name} ended without a reason")
        return self._task is not None and not self._over

    async def stop(self, process: ProcessIdentity, *, grace_s: float) -> None:
        site = await self._maker.leader(self.name)
        keep = site.path(f"runs/{self._folder.name}/{KEEP}")
        await site.runner.tell(keep, {"id": f"stop-{self.placed().round}", "do": "stop", "grace_s": grace_s})

    async def read(self, path: PurePath, offset_bytes: int = 0) -> bytes:
        return await super().read(self._mapped(path), offset_bytes)

    def _mapped(self, path: PurePath) -> PurePath:
        """The engine's order keeps the paths of this machine; the one that is sent gets the name spec.json there."""
        return self._folder / "order.json" if PurePath(path) == self._folder / "spec.json" else path

    async def write(self, path: PurePath, data: bytes) -> None:
        if PurePath(path) == self._folder / "inbox" / "halt":
            await self._ask_halt()
            return
        await super().write(self._mapped(path), data)

    async def remove(self, path: PurePath) -> None:
        if PurePath(path) == self._folder / "inbox" / "halt":
            self._halt = False
        await super().remove(path)

    def localise(self, result: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = localise(
            result,
            home=self._home,
            run_folder=self._folder,
            workspace_there=self.placed().workspace,
            outputs=self._maker.outputs(),
        )
        return found

    # -- for the engine --------------------------------------------------------------------------
    def take_notes(self) -> list[tuple[str, str]]:
        found, self.notes = self.notes, []
        return found

    async def close(self) -> None:
        """Let go; the worker there goes on."""
        await self._end_task()

    # -- the work --------------------------------------------------------------------------------
    def placed(self) -> Placed:
        return read_placement(self._folder)

    def _say(self, text: str, level: str = "info") -> None:
        self.notes.append((level, text))

    def _at(self, progress: Progress) -> None:
        self.progress = progress

    async def _end_task(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, JupiterError):
                await task

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except JupiterError as error:
            self._failure = error
        except OSError as error:
            self._failure = StateError(f"{self._folder}: {error}")

    async def _begin(self, env: dict[str, str]) -> None:
        async def work() -> None:
            self._making_ready = True
            ready = await self._make_ready()
            self.name = ready.leader.name
            again = Placed(
                nodes=ready.names(),
                group=ready.group,
                islands=ready.islands,
                workspace=ready.leader.workspace,
                round=self.placed().round + 1,
                begun=True,
            )
            # From here on something may run there, whatever ends this process.
            write_json(self._folder / "placement.json", again)
            self._making_ready = False
            self.progress = None
            await self._keep(ready.leader, env, again.round)
            self._say(f"{self._folder.name} works on {', '.join(ready.names())}")
            await self._mirror()

        await self._guarded(work)

    async def _make_ready(self) -> Ready:
        """Tried until the machine answers: the engine decides when another one should do it instead."""
        while True:
            try:
                ready = await self._maker.prepare(self._say, self._at)
            except NodeUnreachable as error:
                if lasting(error):
                    raise
                self._lost(error, "nothing was started there yet")
                await asyncio.sleep(_RETRY_S)
            else:
                self._heard()
                return ready

    async def _follow(self) -> None:
        await self._guarded(self._mirror)

    async def _keep(self, site: Site, env: dict[str, str], number: int) -> None:
        run = site.path(f"runs/{self._folder.name}")
        await site.connection.run(["rm", "-f", f"{run}/inbox/halt"])
        worker = KeepProcess(
            name="worker",
            argv=(site.python, "-m", "jupiter_engine.worker", run),
            # The order's paths are relative to the run folder.
            cwd=run,
            env={**env, **site.env},
            log=f"{run}/worker.log",
        )
        order = KeepOrder(id=self._folder.name, processes=(worker,), grace_s=STOP_GRACE_S, restart=True, round=number)
        await site.runner.keep(f"{run}/{KEEP}", order)

    async def _ask_halt(self) -> None:
        """Hand the wish to the worker there; if nothing was started yet, there is nothing to bring to rest."""
        self._halt = True
        if self._making_ready or not self.placed().begun:
            await self._end_task()
            self._over, self._making_ready, self.progress = True, False, None

    async def _mirror(self) -> None:
        """Follow the run to its end, over any number of connections.

        A lost connection is waited out. What breaks again and again although the machine answers (answers that are
        none, limits that are passed, files that cannot be fetched) fails the stage.
        """
        while True:
            try:
                site = await self._maker.leader(self.name)
                if await self._follow_once(site):
                    self._over = True
                    return
            except NodeRefused:
                raise
            except NodeUnreachable as error:
                self._lost(error)
            except RemoteError as error:
                self._faults += 1
                if self._faults >= _FAULTS:
                    raise
                if self._faults == 1:
                    self._say(f"{self.name}: {error.detail}; trying again", "warning")
            await asyncio.sleep(_RETRY_S)

    def _heard(self) -> None:
        if self.silent_since is not None:
            self._say(f"{self.name} answers again after {time.monotonic() - self.silent_since:.0f} s")
            self.silent_since = None

    def _lost(self, error: RemoteError, so: str = "what runs there goes on") -> None:
        if self.silent_since is None:
            self.silent_since = time.monotonic()
            fix = f" -> {error.fix}" if error.fix else ""
            self._say(f"{self.name} does not answer ({error.detail}); {so}{fix}", "warning")

    async def _follow_once(self, site: Site) -> bool:
        """True once the worker has ended and everything it wrote is here."""
        run = site.path(f"runs/{self._folder.name}")
        if site.local:
            await self._watch_here(site.runner, f"{run}/{KEEP}")
            await self._maker.fetch(site, self._at)
            return True
        keep = f"{run}/{KEEP}"
        mirror = Mirror(self._folder, MIRRORED, before_events=self._before_event(site), host=self.name)
        following = site.runner.follow(run, MIRRORED, have=mirror.have(), keep=keep, beat_s=_BEAT_S)
        told = ended = False
        nothing, began = 0, time.monotonic()
        async with contextlib.aclosing(following) as frames:
            async for frame in frames:
                if not isinstance(frame, BeatFrame):
                    await mirror.apply(frame)
                    self._heard()
                    continue
                self._heard()
                if time.monotonic() - began > _GOOD_S:
                    self._faults = 0
                if self._halt and not told:
                    await site.connection.write(f"{run}/inbox/halt", b"")
                    told = True
                if ended:
                    # A whole look has passed since the end was seen: all that was written has come.
                    return True
                nothing = nothing + 1 if frame.state is None else 0
                if nothing > _NOTHING:
                    self._say(f"{self.name} has nothing of {self._folder.name} any more", "warning")
                    return True
                if frame.state is not None:
                    ended = await self._ended(site.runner, keep, frame.state)
        return False

    async def _ended(self, runner: NodeRunner, keep: str, state: KeepState) -> bool:
        """Whether the worker of this round is over; a node runner that was killed is started again."""
        if not state.runner.alive and any(process.state == "running" for process in state.processes.values()):
            self._say(
                f"the node runner on {self.name} had died; the worker lives, and a new one looks after it", "warning"
            )
            state = await runner.keep(keep)
        return state.round == self.placed().round and not state.at_work()

    async def _watch_here(self, runner: NodeRunner, keep: str) -> None:
        while not await self._ended(runner, keep, await runner.state(keep)):
            if self._halt:
                await LocalRemote.write(self, self._folder / "inbox" / "halt", b"")
                self._halt = False
            await asyncio.sleep(_BEAT_S)

    def _before_event(self, site: Site) -> Callable[[bytes], Awaitable[None]]:
        async def before(line: bytes) -> None:
            # What a finished stage made has to be here before anybody learns that it is finished.
            if b'"fact":"finished"' in line:
                await self._maker.fetch(site, self._at)
                self.progress = None

        return before
