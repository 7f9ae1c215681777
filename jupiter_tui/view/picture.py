"""What the console knows at one moment: immutable to the screen, replaced as a whole by the bridge.

The growing parts (curve, log) are shared and only ever appended to by the bridge's thread; readers
take their length first, so they never see half a record.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

from jupiter_engine.protocol.facts import Metric, Progress
from jupiter_engine.protocol.fleet import FleetPicture
from jupiter_engine.protocol.state import CycleState, State

LINES_KEPT = 200_000


@dataclass
class Curve:
    """The optimizer steps of one run, in step order."""

    run: str = ""
    metrics: list[Metric] = field(default_factory=list)
    taken: int = 0
    """Steps taken in so far, repeated ones too: two curves that share a list still differ by it."""
    measured: list[Metric] = field(default_factory=list)
    """Those at which the held-out loss was measured."""

    def extend(self, new: Iterable[Metric]) -> None:
        """Take in further steps; a resumed run that repeats steps overwrites them."""
        for metric in new:
            if self.metrics and metric.step <= self.metrics[-1].step:
                keep = bisect_left(self.metrics, metric.step, key=lambda m: m.step)
                self.metrics = self.metrics[:keep]
                self.measured = [m for m in self.measured if m.step < metric.step]
            self.metrics.append(metric)
            if metric.held_out_loss is not None:
                self.measured.append(metric)
            self.taken += 1

    @property
    def last(self) -> Metric | None:
        return self.metrics[-1] if self.metrics else None


@dataclass
class LogBook:
    """Lines of one cycle's output as they came; `first` counts lines given up at the front."""

    cycle: str = ""
    lines: list[str] = field(default_factory=list)
    first: int = 0
    total: int = 0
    """Lines taken in so far: two books that share a list still differ by it."""

    def add(self, new: Iterable[str]) -> None:
        before = len(self.lines)
        self.lines.extend(new)
        self.total += len(self.lines) - before
        if len(self.lines) > LINES_KEPT:
            given_up = len(self.lines) - LINES_KEPT
            # A new list: a reader that holds the old one keeps a whole picture.
            self.lines = self.lines[given_up:]
            self.first += given_up


@dataclass(frozen=True)
class DomainFile:
    """One domain as its file says it: readable settings, or the sentences that say why not."""

    name: str
    path: str
    settings: dict[str, object] | None
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """One moment. `loaded` is False until the workspace has been read once."""

    root: str = ""
    domain: str = ""
    """The domain that the pages are about."""
    loaded: bool = False
    state: State = field(default_factory=State)
    now: float = 0.0
    """Seconds since the epoch when this was taken."""
    engine_pid: int | None = None
    engine_version: str = ""
    engine_started_at: float | None = None
    cycle: CycleState | None = None
    """The cycle that Train, Review and Promote show."""
    progress: Progress | None = None
    """Of the cycle's running stage."""
    curve: Curve = field(default_factory=Curve)
    log: LogBook = field(default_factory=LogBook)
    ranks: tuple[tuple[int, str], ...] = ()
    """Ranks of the shown run's newest launch over several machines: (rank, machine)."""
    rank: int | None = None
    """The rank whose output is followed; None: none, `log` is shown."""
    rank_log: LogBook = field(default_factory=LogBook)
    """What that rank prints."""
    waiting_samples: int = 0
    """Samples of the waiting review without a verdict."""
    reviewed_samples: int | None = None
    """Samples of the shown cycle that a person gave a verdict on."""
    domains: tuple[DomainFile, ...] = ()
    cluster: dict[str, object] | None = None
    cluster_problems: tuple[str, ...] = ()
    fleet: FleetPicture = field(default_factory=FleetPicture)
    """All machines; empty until the Fleet page was looked at."""
    fleet_problem: str = ""
    """Why the cluster file is not followed; empty: it is."""
    fleet_doing: tuple[str, ...] = ()
    """What is being done with machines on behalf of this console."""

    @property
    def engine_lives(self) -> bool:
        return self.engine_pid is not None

    def domain_file(self) -> DomainFile | None:
        return next((d for d in self.domains if d.name == self.domain), None)
