"""The front door: submit a command, read the state, follow the facts.

`Workspace` is what the console and the command line hold. Reading goes straight to the
workspace's files and database (several viewers may look at once, also while no engine
runs); everything that changes something is a command, carried out by the workspace's
engine process, which `ensure_engine` starts if none lives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from jupiter_engine.cluster.discovery import Discovered, Offer
from jupiter_engine.cluster.probe import probe_local
from jupiter_engine.errors import ConfigError, JupiterError, rebuild
from jupiter_engine.orchestrator import process
from jupiter_engine.orchestrator.comparison import Comparison
from jupiter_engine.orchestrator.comparison import Summary as RunSummary
from jupiter_engine.orchestrator.comparison import compare as compare_runs
from jupiter_engine.orchestrator.database import Database, Recorded, SampleView
from jupiter_engine.orchestrator.lineage import Lineage, trace
from jupiter_engine.orchestrator.planner import nearest_text, question_of
from jupiter_engine.orchestrator.review import in_review_share
from jupiter_engine.orchestrator.sentences import progress_text, result_text, sentence
from jupiter_engine.orchestrator.state import apply
from jupiter_engine.planning.plan import Outlook, outlook
from jupiter_engine.protocol.commands import AnyCommand
from jupiter_engine.protocol.facts import Metric, Progress
from jupiter_engine.protocol.fleet import NodeFacts
from jupiter_engine.protocol.rows import Chunk, Document
from jupiter_engine.protocol.state import CycleState, State
from jupiter_engine.remote.host_keys import OfferedKey
from jupiter_engine.settings.cluster import ClusterSettings, load_cluster
from jupiter_engine.settings.domain import DomainSettings, load_domain
from jupiter_engine.settings.reader import Loaded
from jupiter_engine.settings.workspace import create, domain_file, domains, find_workspace
from jupiter_engine.units import plain_text

if TYPE_CHECKING:
    from jupiter_engine.cluster.fleet_thread import FleetThread

__all__ = [
    "Comparison",
    "Discovered",
    "EngineInfo",
    "Lineage",
    "NodeFacts",
    "Offer",
    "OfferedKey",
    "Outlook",
    "RankLog",
    "Recorded",
    "RunSummary",
    "SampleView",
    "Workspace",
    "compare_runs",
    "find_workspace",
    "nearest_text",
    "progress_text",
    "result_text",
    "sentence",
    "settings_of",
]

EngineInfo = process.EngineInfo


Hosts = dict[Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)], str]
"""hosts.json of a launch: rank -> the machine on which it runs."""


class RankLog(msgspec.Struct, frozen=True, kw_only=True):
    """Where one rank of a group writes what it prints."""

    rank: int
    host: str
    path: Path
    """Mirrored here while the rank runs elsewhere; may not exist yet."""


class Workspace:
    """A workspace seen from outside the engine. Use one instance from one thread."""

    def __init__(self, root: Path) -> None:
        """Open the workspace at `root`; one without config/ is created with the shipped settings."""
        self.root = root
        create(root)
        self._database = Database(root / ".jupiter" / "jupiter.db")
        self._state = State()
        self.refresh()

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- state -----------------------------------------------------------------------------------
    def refresh(self) -> list[Recorded]:
        """Take in what the journal has gained; returns the new entries, oldest first."""
        new = self._database.entries(after=self._state.seq)
        for recorded in new:
            apply(recorded, self._state)
        return new

    @property
    def state(self) -> State:
        """The state as of the last refresh. Read it, never change it."""
        return self._state

    def follow(self, *, poll_s: float = 0.2) -> Iterator[Recorded | None]:
        """All entries from the first one on, for ever; None each time nothing new has come for `poll_s`."""
        yield from self._database.entries()
        while True:
            new = self.refresh()
            yield from new
            if not new:
                yield None
                time.sleep(poll_s)

    def entries(self, after: int = 0) -> list[Recorded]:
        return self._database.entries(after=after)

    # -- runs ------------------------------------------------------------------------------------
    def run_folder(self, run: str) -> Path:
        return self.root / ".jupiter" / "runs" / run

    def progress(self, run: str) -> Progress | None:
        """The newest progress of a run, None before its first."""
        return self._database.progress(run)

    def metrics(self, run: str, offset_bytes: int = 0) -> tuple[list[Metric], int]:
        """(optimizer steps after the offset, offset to ask with next). A resumed run may repeat steps: the last wins.

        If the file became shorter (a resume cut it back), reading starts over: the returned offset is
        then smaller than the given one plus the new lines, and the steps begin anew. Lines that are no
        metric (torn by a power cut, another machine's nonsense) are left out.
        """
        return process.read_metrics(self.run_folder(run) / "metrics.jsonl", offset_bytes)

    def log(
        self, run: str, offset_bytes: int = 0, *, limit_bytes: int = 256 * 1024, rank: int | None = None
    ) -> tuple[list[str], int]:
        """(lines of the worker's output after the offset, next offset); control characters removed.

        With `rank`, the output of that rank in the newest launch of its group. At most `limit_bytes` are
        read; from further back the start is skipped. A line that was drawn over and over (a progress bar's
        carriage returns) is its last drawing.
        """
        path = self.run_folder(run) / "worker.log"
        if rank is not None:
            path = next((found.path for found in self.ranks(run) if found.rank == rank), path.with_name("no-such-rank"))
        if not path.exists():
            return [], 0
        size = path.stat().st_size
        if size < offset_bytes:
            offset_bytes = 0
        start = max(offset_bytes, size - limit_bytes)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(size - start)
        end = data.rfind(b"\n") + 1
        lines = data[:end].decode("utf-8", "replace").splitlines()
        return [plain_text(line.rsplit("\r", 1)[-1]) for line in lines], start + end

    def ranks(self, run: str) -> list[RankLog]:
        """The ranks of a run's newest launch over several machines, each with its machine and its output."""
        folder = self.run_folder(run) / "ranks"
        launches = sorted((int(p.name) for p in folder.glob("*") if p.name.isdecimal()), reverse=True)
        for launch in launches:
            try:
                hosts = msgspec.json.decode((folder / str(launch) / "hosts.json").read_bytes(), type=Hosts)
            except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
                # Not there yet, half mirrored (the next look has it), or nothing that a launcher writes.
                continue
            return [
                RankLog(rank=rank, host=plain_text(host), path=folder / str(launch) / f"rank-{rank}.log")
                for rank, host in sorted(hosts.items())
            ]
        return []

    # -- commands and the engine -----------------------------------------------------------------
    def submit(self, command: AnyCommand) -> int:
        """Queue a command for the engine and make sure one runs; returns the number to ask `answer` with."""
        number = self._database.submit(command)
        self.ensure_engine()
        return number

    def answer(self, number: int) -> tuple[bool, str | None]:
        """(carried out or refused yet, the reason if refused)."""
        answered, refusal = self._database.command_answer(number)
        if refusal is None:
            return answered, None
        return answered, rebuild(refusal.kind, refusal.title, refusal.detail, refusal.fix).sentence()

    def perform(self, command: AnyCommand, *, timeout_s: float = 30.0) -> None:
        """Submit and wait for the engine's answer; a refusal is raised as the error that it was."""
        number = self.submit(command)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            answered, refusal = self._database.command_answer(number)
            if answered:
                self.refresh()
                if refusal is not None:
                    raise rebuild(refusal.kind, refusal.title, refusal.detail, refusal.fix)
                return
            # An engine that was just ending itself may not have seen the command.
            self.ensure_engine()
            time.sleep(0.05)
        raise JupiterError(
            f"the engine did not answer within {timeout_s:.0f} s",
            fix=f"see {self.root}/.jupiter/engine.log",
        )

    def engine(self) -> EngineInfo | None:
        """The living engine process of this workspace, None if there is none."""
        return process.living_engine(self.root)

    def ensure_engine(self) -> EngineInfo:
        """Start the engine process unless one lives."""
        return process.ensure_engine(self.root)

    # -- data ------------------------------------------------------------------------------------
    def samples(
        self,
        *,
        domain: str | None = None,
        cycle: int | None = None,
        status: str | None = None,
        search: str = "",
        limit: int = 100,
        offset: int = 0,
    ) -> list[SampleView]:
        """Samples in order of generation; status: new, accepted, rejected, reviewed, unreviewed."""
        return self._database.samples(
            domain=domain, cycle=cycle, status=status, search=search, limit=limit, offset=offset
        )

    def count_samples(
        self, *, domain: str | None = None, cycle: int | None = None, status: str | None = None, search: str = ""
    ) -> int:
        return self._database.count_samples(domain=domain, cycle=cycle, status=status, search=search)

    def review_queue(self, cycle: CycleState) -> list[SampleView]:
        """The samples of a cycle that its settings put before a person, in order of generation.

        Those the filters accepted; with `review.mode: sample` the stated share of them.
        """
        review = settings_of(cycle.settings).review
        views = self._database.samples(domain=cycle.domain, cycle=cycle.number, limit=-1)
        share = review.share if review.mode == "sample" else 1.0
        return [v for v in views if v.filtered and in_review_share(v.sample.id, share)]

    def sample(self, prefix: str) -> SampleView | None:
        """The one sample whose id starts with `prefix`, None if there is none or more than one."""
        return self._database.sample(prefix)

    def chunk(self, domain: str, chunk_id: str) -> Chunk | None:
        return self._database.chunk(domain, chunk_id)

    def documents(self, domain: str, *, limit: int = 200, offset: int = 0) -> list[Document]:
        return self._database.documents(domain, limit=limit, offset=offset)

    def why(self, prefix: str) -> Lineage:
        """Where a document, chunk, item or sample came from and what became of it."""
        return trace(self._database, self._state, prefix)

    # -- settings --------------------------------------------------------------------------------
    def domains(self) -> list[str]:
        return domains(self.root)

    def domain(self, name: str) -> Loaded[DomainSettings]:
        return load_domain(domain_file(self.root, name))

    def domain_path(self, name: str) -> Path:
        return domain_file(self.root, name)

    def cluster(self) -> Loaded[ClusterSettings]:
        return load_cluster(self.root / "config" / "cluster.yaml")

    def problems(self) -> list[ConfigError]:
        """Every settings file that would be refused."""
        found: list[ConfigError] = []
        loaders: list[Callable[[], object]] = [self.cluster]
        loaders += [partial(self.domain, name) for name in self.domains()]
        for load in loaders:
            try:
                load()
            except ConfigError as error:
                found.append(error)
        return found

    # -- planning --------------------------------------------------------------------------------
    def outlook(
        self,
        domain: str,
        *,
        preset: str | None = None,
        tokens: int | None = None,
        facts: Mapping[str, NodeFacts] | None = None,
        compare: bool = True,
    ) -> Outlook:
        """The planner's answer for a domain's training, or for a model of `preset` from scratch.

        `facts`: by node, of machines that were asked just now; others count as they said last, or as the cluster
        file describes them. `compare`: whether other ways are worked out as well.
        """
        settings, cluster = self.domain(domain).value, self.cluster().value
        asked = question_of(
            self.root, self._state, domain, settings, cluster, facts=facts, preset=preset, tokens=tokens
        )
        return outlook(asked, compare=compare)

    # -- machines --------------------------------------------------------------------------------
    def fleet(self) -> FleetThread:
        """Lines of this viewer's own to all machines of the cluster file, opened in a thread; `close` it.

        Looking needs no engine, and the engine's lines are its own: whoever looks cannot slow it down.
        """
        from jupiter_engine.cluster.fleet_thread import FleetThread

        return FleetThread(self.root)

    def node(self) -> NodeFacts:
        return probe_local(self.root)


def settings_of(cycle_settings: dict[str, Any]) -> DomainSettings:
    """The typed settings that were frozen for a cycle (CycleState.settings)."""
    return msgspec.convert(cycle_settings, DomainSettings)
