"""Reads the workspace into pictures: only what has changed since the last look is read again."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from jupiter_engine.errors import ConfigError
from jupiter_engine.protocol.state import CycleState, State
from jupiter_engine.units import MIB, bytes_text
from jupiter_tui.bridge.machines import MachineRoom
from jupiter_tui.view.log import logging_run, notice_text
from jupiter_tui.view.picture import Curve, DomainFile, LogBook, Picture

if TYPE_CHECKING:
    from jupiter_engine.api import Workspace

ENGINE_LOOK_S: Final = 1.0
FILES_LOOK_S: Final = 1.0
LOG_OPEN_BYTES: Final = 2 * MIB
"""Read of a log when it is opened: its end; the rest stays in the file."""
LOG_STEP_BYTES: Final = 64 * MIB
"""Read of a log at one look after that: more than any worker writes in a quarter of a second, so no line is lost."""


@dataclass
class Reader:
    """What the reading thread remembers between two looks; used by that thread alone."""

    machines: MachineRoom
    wanted_domain: str = ""
    wanted_rank: int | None = None
    picture: Picture = field(default_factory=Picture)
    seq: int = -1
    cycle_id: str = ""
    reviews: tuple[str, int] = ("", 0)
    log_run: str = ""
    log_offset: int = 0
    rank_path: Path | None = None
    rank_offset: int = 0
    notice_at: float = 0.0
    curve_offset: int = 0
    engine_due: float = 0.0
    files_due: float = 0.0
    stamps: tuple[tuple[str, int, int], ...] | None = None

    def look(self, workspace: Workspace) -> Picture | None:
        """Read what changed; the new picture, None if nothing that a person can see is another."""
        before = self.picture
        now = time.monotonic()
        picture = replace(before, loaded=True, root=str(workspace.root), now=time.time())
        workspace.refresh()
        if workspace.state.seq != self.seq:
            # The screen keeps a copy of its own: the api's state changes in place.
            state = msgspec.msgpack.decode(msgspec.msgpack.encode(workspace.state), type=State)
            picture, self.seq = replace(picture, state=state), workspace.state.seq
        if now >= self.engine_due:
            self.engine_due = now + ENGINE_LOOK_S
            picture = _with_engine(picture, workspace)
        if now >= self.files_due:
            self.files_due = now + FILES_LOOK_S
            picture = self._with_settings(picture, workspace)
        picture = self.machines.look(workspace, picture)
        picture = self._with_cycle(picture, workspace)
        if picture != replace(before, now=picture.now) or picture.now - before.now >= 1.0 or not before.loaded:
            self.picture = picture
            return picture
        return None

    def _with_settings(self, picture: Picture, workspace: Workspace) -> Picture:
        stamps = _stamps(workspace.root / "config")
        if stamps == self.stamps:
            return picture
        self.stamps = stamps
        domains = tuple(_read_domain(workspace, name) for name in workspace.domains())
        cluster, problems = _read_cluster(workspace)
        return replace(picture, domains=domains, cluster=cluster, cluster_problems=problems)

    def _with_cycle(self, picture: Picture, workspace: Workspace) -> Picture:
        """The shown domain and cycle with its running stage's progress, curve and log."""
        domain = self.wanted_domain
        if not domain:
            latest = picture.state.latest_cycle()
            domain = latest.domain if latest else next((d.name for d in picture.domains), "")
        cycle = picture.state.latest_cycle(domain) if domain else None
        picture = replace(picture, domain=domain, cycle=cycle)
        cycle_id = cycle.id if cycle else ""
        if cycle_id != self.cycle_id:
            self.cycle_id, self.log_run, self.log_offset, self.curve_offset = cycle_id, "", 0, 0
            self.notice_at = 0.0
            picture = replace(picture, curve=Curve(), log=LogBook(cycle=cycle_id))
        if cycle is None:
            nothing = replace(picture, progress=None, waiting_samples=0, reviewed_samples=None)
            return replace(nothing, ranks=(), rank=None, rank_log=LogBook())
        stage = cycle.current_stage()
        run = stage.run if stage is not None and stage.status == "running" else ""
        picture = replace(picture, progress=workspace.progress(run) if run else None)
        reviews = (cycle.id, picture.state.seq)
        if reviews != self.reviews:
            self.reviews = reviews
            waiting, reviewed = (
                workspace.count_samples(domain=cycle.domain, cycle=cycle.number, status=status)
                for status in ("unreviewed", "reviewed")
            )
            picture = replace(picture, waiting_samples=waiting, reviewed_samples=reviewed)
        picture = self._with_log(self._with_curve(picture, workspace, cycle), workspace, cycle)
        return self._with_rank(picture, workspace, logging_run(cycle)[0])

    def _with_curve(self, picture: Picture, workspace: Workspace, cycle: CycleState) -> Picture:
        run = cycle.stages["train"].run
        if not run:
            return picture
        try:
            new, offset = workspace.metrics(run, self.curve_offset)
        except msgspec.DecodeError:
            # A resumed worker cut the file back and wrote past our place between two looks.
            new, offset = workspace.metrics(run)
            picture = replace(picture, curve=Curve())
        if not new and offset == self.curve_offset and picture.curve.run == run:
            return picture
        begun_anew = offset < self.curve_offset or picture.curve.run != run
        old = Curve() if begun_anew else picture.curve
        curve = Curve(run=run, metrics=old.metrics, taken=old.taken, measured=list(old.measured))
        curve.extend(new)
        self.curve_offset = offset
        return replace(picture, curve=curve)

    def _with_log(self, picture: Picture, workspace: Workspace, cycle: CycleState) -> Picture:
        run, begun_at = logging_run(cycle)
        notices = [n for n in picture.state.notices if n.at > self.notice_at and n.cycle in (None, cycle.id)]
        if notices:
            self.notice_at = notices[-1].at
        fresh: list[str] = []
        if run and run != self.log_run:
            if self.log_run:
                # What the former run wrote between the last look and its end.
                fresh += workspace.log(self.log_run, self.log_offset, limit_bytes=LOG_STEP_BYTES)[0]
            fresh += [notice_text(n) for n in notices if n.at < begun_at]
            fresh.append(f"──── {run} " + "─" * 24)
            notices = [n for n in notices if n.at >= begun_at]
            self.log_run, self.log_offset = run, 0
            fresh += _skipped(workspace.run_folder(run) / "worker.log")
        if run:
            limit = LOG_STEP_BYTES if self.log_offset else LOG_OPEN_BYTES
            lines, self.log_offset = workspace.log(run, self.log_offset, limit_bytes=limit)
            fresh += lines
        fresh += [notice_text(n) for n in notices]
        if fresh:
            old = picture.log
            book = LogBook(cycle=cycle.id, lines=old.lines, first=old.first, total=old.total)
            book.add(fresh)
            return replace(picture, log=book)
        return picture

    def _with_rank(self, picture: Picture, workspace: Workspace, run: str) -> Picture:
        """The ranks of the run whose output matters, and what the chosen one prints."""
        ranks = workspace.ranks(run) if run else []
        picture = replace(picture, ranks=tuple((one.rank, one.host) for one in ranks))
        chosen = next((one for one in ranks if one.rank == self.wanted_rank), None)
        if chosen is None:
            self.rank_path = None
            return replace(picture, rank=None, rank_log=LogBook())
        key = f"{run} rank {chosen.rank}"
        old = picture.rank_log if picture.rank_log.cycle == key else LogBook(cycle=key)
        fresh: list[str] = []
        if chosen.path != self.rank_path:
            # Another rank, or the ranks were launched anew and write into another folder.
            self.rank_path, self.rank_offset = chosen.path, 0
            fresh.append(f"──── launch {chosen.path.parent.name} " + "─" * 24)
            fresh += _skipped(chosen.path)
        limit = LOG_STEP_BYTES if self.rank_offset else LOG_OPEN_BYTES
        lines, self.rank_offset = workspace.log(run, self.rank_offset, limit_bytes=limit, rank=chosen.rank)
        fresh += lines
        book = old
        if fresh:
            book = LogBook(cycle=key, lines=old.lines, first=old.first, total=old.total)
            book.add(fresh)
        return replace(picture, rank=chosen.rank, rank_log=book)


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
