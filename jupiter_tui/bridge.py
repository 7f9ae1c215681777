"""The only module that talks to the engine's api.

Two threads, so that nothing ever blocks the event loop: one reads the workspace four times a second
and posts whole `Pictured` messages (a newer one replaces an older one that was not handled yet); the
other carries out commands in order and awaits the engine's answers. Each owns its own Workspace.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
from textual.message import Message

from jupiter_engine.errors import ConfigError, JupiterError, StateError
from jupiter_engine.protocol.state import CycleState, State
from jupiter_engine.units import MIB, bytes_text, plain_text
from jupiter_tui.view.log import logging_run, notice_text
from jupiter_tui.view.picture import Curve, DomainFile, LogBook, Picture

if TYPE_CHECKING:
    from jupiter_engine.api import SampleView, Workspace
    from jupiter_engine.protocol.commands import AnyCommand
    from jupiter_engine.protocol.rows import Chunk

T = TypeVar("T")
Opener = Callable[[Path | None], "Workspace"]

POLL_S: Final = 0.25
SLOW_POLL_S: Final = 0.5
"""Over ssh: fewer frames leave the line free for the answers to keys."""
ENGINE_LOOK_S: Final = 1.0
NODE_LOOK_S: Final = 2.0
FILES_LOOK_S: Final = 1.0
LOG_OPEN_BYTES: Final = 2 * MIB
"""Read of a log when it is opened: its end; the rest stays in the file."""
LOG_STEP_BYTES: Final = 64 * MIB
"""Read of a log at one look after that: more than any worker writes in a quarter of a second, so no line is lost."""


class Pictured(Message):
    """The workspace as it is now."""

    def __init__(self, picture: Picture) -> None:
        super().__init__()
        self.picture = picture

    def can_replace(self, message: Message) -> bool:
        return isinstance(message, Pictured)


class Broken(Message):
    """The workspace could not be opened or read; the console cannot go on."""

    def __init__(self, error: JupiterError) -> None:
        super().__init__()
        self.error = error


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


@dataclass
class _Reader:
    """What the reading thread remembers between two looks."""

    picture: Picture = field(default_factory=Picture)
    seq: int = -1
    cycle_id: str = ""
    reviews: tuple[str, int] = ("", 0)
    log_run: str = ""
    log_offset: int = 0
    notice_at: float = 0.0
    curve_offset: int = 0
    engine_due: float = 0.0
    node_due: float = 0.0
    files_due: float = 0.0
    stamps: tuple[tuple[str, int, int], ...] | None = None


class Bridge:
    """The console's side of the front door. All methods are called from the event loop."""

    def __init__(
        self,
        post: Callable[[Message], object],
        *,
        workspace: Path | None,
        domain: str = "",
        opener: Opener | None = None,
    ) -> None:
        chosen = opener or open_workspace
        self._post = post
        self._wanted_domain = domain
        self._reader = _Reader()
        self._wants_node = False
        self._poll_s = SLOW_POLL_S if os.environ.get("SSH_CONNECTION") else POLL_S
        self._readers = Worker("jupiter-read", lambda: chosen(workspace), self._look)
        self._orders = Worker("jupiter-orders", lambda: chosen(workspace), lambda _: None)
        for worker in (self._readers, self._orders):
            worker.failed = self._failed
        self._orders_started = False

    def start(self) -> None:
        """Open the workspace and begin to look; the first picture is posted as soon as it is read."""
        self._readers.start()

    def stop(self) -> None:
        """End the threads after what they do now; commands already given still go out."""
        self._readers.errands.put(None)
        self._orders.errands.put(None)
        if self._orders_started:
            self._orders.join(timeout=2.0)
        if self._readers.ident is not None:
            self._readers.join(timeout=2.0)

    def _failed(self, error: JupiterError) -> None:
        self._post(Broken(error))

    # -- questions -------------------------------------------------------------------------------
    async def ask(self, function: Callable[[Workspace], T]) -> T:
        """Run `function` in the reading thread; its JupiterErrors are raised here."""
        errand = Errand(function)
        self._readers.errands.put(errand)
        result: T = await asyncio.wrap_future(errand.future)
        return result

    async def samples(
        self, domain: str, cycle: int, *, status: str | None, search: str, limit: int
    ) -> list[SampleView]:
        return await self.ask(
            lambda w: w.samples(domain=domain, cycle=cycle, status=status, search=search, limit=limit)
        )

    async def count_samples(self, domain: str, cycle: int) -> dict[str, int]:
        """Samples of a cycle by status."""
        statuses = ("new", "accepted", "rejected", "reviewed")
        return await self.ask(
            lambda w: {status: w.count_samples(domain=domain, cycle=cycle, status=status) for status in statuses}
        )

    async def chunk(self, domain: str, chunk_id: str) -> Chunk | None:
        return await self.ask(lambda w: w.chunk(domain, chunk_id))

    async def curve(self, cycle: CycleState) -> Curve:
        """The optimizer steps of a cycle's training, whole."""
        run = cycle.stages["train"].run

        def read(workspace: Workspace) -> Curve:
            curve = Curve(run=run)
            if run:
                curve.extend(workspace.metrics(run)[0])
            return curve

        return await self.ask(read)

    async def report(self, cycle: CycleState) -> str:
        """The text of a cycle's report; empty while there is none."""

        def read(workspace: Workspace) -> str:
            if not cycle.report:
                return ""
            path = workspace.root / cycle.report
            try:
                return plain_text(path.read_text(encoding="utf-8", errors="replace"))
            except OSError as error:
                return f"{path} cannot be read: {error.strerror or error}"

        return await self.ask(read)

    async def domain_path(self, name: str) -> Path:
        return await self.ask(lambda w: w.domain_path(name))

    async def new_domain(self, name: str, description: str) -> Path:
        """Write a new domain file from the template; raises UsageError or ConfigError."""

        def make(workspace: Workspace) -> Path:
            from jupiter_engine.settings.workspace import new_domain

            path = new_domain(workspace.root, name, description)
            self._reader.files_due = 0.0
            return path

        return await self.ask(make)

    # -- wishes of the screen --------------------------------------------------------------------
    def show_domain(self, name: str) -> None:
        """Make the pages about another domain."""

        def choose(_: Workspace) -> None:
            self._wanted_domain = name

        self._readers.errands.put(Errand(choose))

    def watch_node(self, *, wanted: bool) -> None:
        """Read this machine's load only while someone looks at it."""
        self._wants_node = wanted

    # -- commands --------------------------------------------------------------------------------
    async def perform(self, command: AnyCommand) -> None:
        """Give a command and wait for the engine's answer; a refusal raises UsageError with its sentence."""
        await self._order(lambda w: w.perform(command))

    async def wake_engine(self) -> None:
        """Start the engine process if none lives."""
        await self._order(lambda w: w.ensure_engine())

    async def _order(self, function: Callable[[Workspace], Any]) -> None:
        if not self._orders_started:
            self._orders_started = True
            self._orders.start()
        errand = Errand(function)
        self._orders.errands.put(errand)
        # Shielded: leaving a page must not withdraw a command that was already given.
        await asyncio.shield(asyncio.wrap_future(errand.future))
        # Look at once instead of at the next turn: the answer should be seen as soon as it is there.
        self._readers.errands.put(Errand(self._look))

    # -- the reading thread ----------------------------------------------------------------------
    def _look(self, workspace: Workspace) -> float:
        """Read what changed; post a picture if anything a person can see has."""
        before, reader = self._reader.picture, self._reader
        now = time.monotonic()
        picture = replace(before, loaded=True, root=str(workspace.root), now=time.time())
        workspace.refresh()
        if workspace.state.seq != reader.seq:
            # The screen keeps a copy of its own: the api's state changes in place.
            state = msgspec.msgpack.decode(msgspec.msgpack.encode(workspace.state), type=State)
            picture, reader.seq = replace(picture, state=state), workspace.state.seq
        if now >= reader.engine_due:
            reader.engine_due = now + ENGINE_LOOK_S
            picture = _with_engine(picture, workspace)
        if now >= reader.files_due:
            reader.files_due = now + FILES_LOOK_S
            picture = self._with_settings(picture, workspace)
        if self._wants_node and now >= reader.node_due:
            reader.node_due = now + NODE_LOOK_S
            picture = replace(picture, node=workspace.node())
        picture = self._with_cycle(picture, workspace)
        if picture != replace(before, now=picture.now) or picture.now - before.now >= 1.0 or not before.loaded:
            reader.picture = picture
            self._post(Pictured(picture))
        return self._poll_s

    def _with_settings(self, picture: Picture, workspace: Workspace) -> Picture:
        stamps = _stamps(workspace.root / "config")
        if stamps == self._reader.stamps:
            return picture
        self._reader.stamps = stamps
        domains = tuple(_read_domain(workspace, name) for name in workspace.domains())
        cluster, problems = _read_cluster(workspace)
        return replace(picture, domains=domains, cluster=cluster, cluster_problems=problems)

    def _with_cycle(self, picture: Picture, workspace: Workspace) -> Picture:
        """The shown domain and cycle with its running stage's progress, curve and log."""
        domain = self._wanted_domain
        if not domain:
            latest = picture.state.latest_cycle()
            domain = latest.domain if latest else next((d.name for d in picture.domains), "")
        cycle = picture.state.latest_cycle(domain) if domain else None
        picture = replace(picture, domain=domain, cycle=cycle)
        reader = self._reader
        cycle_id = cycle.id if cycle else ""
        if cycle_id != reader.cycle_id:
            reader.cycle_id, reader.log_run, reader.log_offset, reader.curve_offset = cycle_id, "", 0, 0
            reader.notice_at = 0.0
            picture = replace(picture, curve=Curve(), log=LogBook(cycle=cycle_id))
        if cycle is None:
            return replace(picture, progress=None, waiting_samples=0, reviewed_samples=None)
        stage = cycle.current_stage()
        run = stage.run if stage is not None and stage.status == "running" else ""
        picture = replace(picture, progress=workspace.progress(run) if run else None)
        reviews = (cycle.id, picture.state.seq)
        if reviews != reader.reviews:
            reader.reviews = reviews
            waiting, reviewed = (
                workspace.count_samples(domain=cycle.domain, cycle=cycle.number, status=status)
                for status in ("unreviewed", "reviewed")
            )
            picture = replace(picture, waiting_samples=waiting, reviewed_samples=reviewed)
        return self._with_log(self._with_curve(picture, workspace, cycle), workspace, cycle)

    def _with_curve(self, picture: Picture, workspace: Workspace, cycle: CycleState) -> Picture:
        run, reader = cycle.stages["train"].run, self._reader
        if not run:
            return picture
        try:
            new, offset = workspace.metrics(run, reader.curve_offset)
        except msgspec.DecodeError:
            # A resumed worker cut the file back and wrote past our place between two looks.
            new, offset = workspace.metrics(run)
            picture = replace(picture, curve=Curve())
        if not new and offset == reader.curve_offset and picture.curve.run == run:
            return picture
        begun_anew = offset < reader.curve_offset or picture.curve.run != run
        old = Curve() if begun_anew else picture.curve
        curve = Curve(run=run, metrics=old.metrics, taken=old.taken)
        curve.extend(new)
        reader.curve_offset = offset
        return replace(picture, curve=curve)

    def _with_log(self, picture: Picture, workspace: Workspace, cycle: CycleState) -> Picture:
        reader = self._reader
        run, begun_at = logging_run(cycle)
        notices = [n for n in picture.state.notices if n.at > reader.notice_at and n.cycle in (None, cycle.id)]
        if notices:
            reader.notice_at = notices[-1].at
        fresh: list[str] = []
        if run and run != reader.log_run:
            if reader.log_run:
                # What the former run wrote between the last look and its end.
                fresh += workspace.log(reader.log_run, reader.log_offset, limit_bytes=LOG_STEP_BYTES)[0]
            fresh += [notice_text(n) for n in notices if n.at < begun_at]
            fresh.append(f"──── {run} " + "─" * 24)
            notices = [n for n in notices if n.at >= begun_at]
            reader.log_run, reader.log_offset = run, 0
            fresh += _skipped(workspace.run_folder(run) / "worker.log")
        if run:
            limit = LOG_STEP_BYTES if reader.log_offset else LOG_OPEN_BYTES
            lines, reader.log_offset = workspace.log(run, reader.log_offset, limit_bytes=limit)
            fresh += lines
        fresh += [notice_text(n) for n in notices]
        if fresh:
            old = picture.log
            book = LogBook(cycle=cycle.id, lines=old.lines, first=old.first, total=old.total)
            book.add(fresh)
            return replace(picture, log=book)
        return picture


def _skipped(path: Path) -> list[str]:
    """What is said of the part of a long log that is not read on opening it."""
    size = path.stat().st_size if path.exists() else 0
    return [f"(the first {bytes_text(size - LOG_OPEN_BYTES)} stand in {path})"] if size > LOG_OPEN_BYTES else []


def _with_engine(picture: Picture, workspace: Workspace) -> Picture:
    info = workspace.engine()
    if info is None:
        return replace(picture, engine_pid=None, engine_version="", engine_started_at=None)
    identity = info.identity
    return replace(picture, engine_pid=identity.pid, engine_version=info.version, engine_started_at=identity.started_at)


def _stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """(name, mtime, size) of every settings file: cheap to compare, so files are parsed only when they change."""
    found = []
    for path in sorted(folder.rglob("*.y*ml")):
        try:
            stat = path.stat()
        except FileNotFoundError:  # removed between the listing and the look: the next look will not list it
            continue
        found.append((str(path), stat.st_mtime_ns, stat.st_size))
    return tuple(found)


def _read_domain(workspace: Workspace, name: str) -> DomainFile:
    path = str(workspace.root / "config" / "domains" / f"{name}.yaml")
    try:
        loaded = workspace.domain(name)
    except ConfigError as error:
        return DomainFile(name=name, path=path, settings=None, problems=error.problems)
    settings = msgspec.to_builtins(loaded.value)
    return DomainFile(name=name, path=str(loaded.path), settings=settings, warnings=loaded.warnings)


def _read_cluster(workspace: Workspace) -> tuple[dict[str, object] | None, tuple[str, ...]]:
    try:
        settings = workspace.cluster().value
    except ConfigError as error:
        return None, error.problems
    found: dict[str, object] = msgspec.to_builtins(settings)
    found["nodes"] = [
        {**msgspec.to_builtins(node), "local": node.is_local(), "abilities": sorted(node.abilities())}
        for node in settings.nodes
    ]
    return found, ()
