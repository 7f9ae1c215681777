"""Which machine works on which stage, and everything about machines that the journal should know."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from jupiter_engine.cluster.placement import ABILITY_OF_STAGE, Placement, begun_islands, place
from jupiter_engine.cluster.stage import Placed, RemoteStage, Successor, read_placement
from jupiter_engine.errors import JupiterError, NoUsableNode
from jupiter_engine.files import read_json, write_json
from jupiter_engine.protocol.facts import Progress
from jupiter_engine.protocol.orders import TrainOrder
from jupiter_engine.protocol.orders import decoder as order_decoder
from jupiter_engine.protocol.specs import LaunchSpec
from jupiter_engine.remote.port import Remote
from jupiter_engine.settings.cluster import ClusterSettings, launch_spec, load_cluster, node_by_name, training_group

_TIDY_S = 10.0
_INQUIRY_S = 10.0


class Stages(Protocol):
    """Makes the adapter for a stage on other machines (cluster.fleet_stages; tests play it)."""

    def stage(self, cluster: ClusterSettings, placement: Placement, folder: Path) -> RemoteStage: ...

    def silent(self) -> frozenset[str]:
        """Names of the machines that do not answer now."""

    async def successor(self, others: Sequence[str], run: str) -> Successor | None:
        """Which of a group's other machines should lead; None while one of them hears of the leader."""

    async def stop_abandoned(self, node: str, workspace: str, run: str, number: int) -> bool:
        """End the run's processes on a machine, if it answers; whether that is done."""

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Note:
    run: str
    level: str
    text: str


class AbandonedRun(msgspec.Struct, frozen=True, kw_only=True):
    node: str
    workspace: str
    """There."""
    run: str
    round: int


class Abandoned(msgspec.Struct, frozen=True, kw_only=True):
    """abandoned.json: runs that were taken up elsewhere while their machine was silent; ended once it answers."""

    runs: tuple[AbandonedRun, ...] = ()


class Dispatcher:
    """One for an engine's life."""

    def __init__(self, root: Path, local: Remote, stages: Callable[[], Stages] | None) -> None:
        """`stages` is asked for only when a stage is really placed on another machine."""
        self._root, self._local, self._make = root, local, stages
        self._stages: Stages | None = None
        self._remote: dict[str, RemoteStage] = {}
        self._notes: deque[Note] = deque()
        self._abandon_due = 0.0
        self._tidying: asyncio.Task[None] | None = None
        self._inquiries: dict[str, asyncio.Task[Successor | None]] = {}

    def _cluster(self) -> ClusterSettings:
        return load_cluster(self._root / "config" / "cluster.yaml").value

    # -- choosing --------------------------------------------------------------------------------
    def remote_of(self, stage: str, folder: Path) -> Remote:
        """Where the stage of this run folder works: where it was begun, else where the cluster file puts it."""
        if self._make is None or stage not in ABILITY_OF_STAGE:
            return self._local
        known = self._remote.get(folder.name)
        if known is not None:
            return known
        cluster = self._cluster()
        placement = self._begun(cluster, folder) or place(stage, cluster, lost=self._silent())
        if _starts_here(placement):
            return self._local
        remote = self._remote[folder.name] = self._made().stage(cluster, placement, folder)
        return remote

    def _made(self) -> Stages:
        assert self._make is not None
        if self._stages is None:
            self._stages = self._make()
        return self._stages

    def launch(self) -> LaunchSpec:
        """How training starts on this machine."""
        cluster = self._cluster()
        launch, group = launch_spec(cluster), training_group(cluster)
        if group is not None and _starts_here(place("train", cluster)) and group.ranks_per_node > 1:
            launcher = group.launcher
            if launcher not in ("torchrun", "mlx.launch"):
                launcher = "torchrun" if launch.twin == "torch" else "mlx.launch"
            return msgspec.structs.replace(launch, ranks=group.ranks_per_node, launcher=launcher)
        return launch

    def _begun(self, cluster: ClusterSettings, folder: Path) -> Placement | None:
        """Where the run was placed before; None if nowhere, or if the cluster file lacks a machine of it now."""
        placed = read_placement(folder)
        if not placed.nodes:
            return None
        try:
            nodes = tuple(node_by_name(cluster, name) for name in placed.nodes)
        except JupiterError:
            self._give_up(folder, placed)
            return None
        if placed.islands:
            again = begun_islands(cluster, placed.nodes)
            if again.islands:
                return again
            self._give_up(folder, placed)  # the cluster file has no islands any more
            return None
        return Placement(nodes=nodes, group=training_group(cluster) if placed.group else None)

    def _silent(self) -> frozenset[str]:
        return self._stages.silent() if self._stages is not None else frozenset()

    # -- while it works --------------------------------------------------------------------------
    def take_notes(self) -> list[Note]:
        """Sentences that have come up since the last call."""
        found = list(self._notes)
        self._notes.clear()
        for run, remote in self._remote.items():
            found += [Note(run, level, text) for level, text in remote.take_notes()]
        return found

    def progress(self, run: str) -> Progress | None:
        remote = self._remote.get(run)
        return remote.progress if remote is not None else None

    async def replace(self, stage: str, folder: Path) -> bool:
        """Give up a machine that has been silent for too long, if another one can do the stage instead.

        True if the stage has to be begun again.
        """
        remote = self._remote.get(folder.name)
        if remote is None or remote.silent_since is None or self._stages is None:
            return False
        cluster = self._cluster()
        silence = time.monotonic() - remote.silent_since
        if silence < cluster.retries.node_lost_after_s:
            return False
        placed = read_placement(folder)
        leader = ""
        if stage == "train" and placed.begun:
            leader = self._next_leader(folder, placed, remote.name)
            if not leader:
                return False
        try:
            instead = place(stage, cluster, lost=self._stages.silent() | {remote.name})
        except NoUsableNode:
            return False
        names = instead.names()
        if leader and leader in names:
            names = (leader, *(name for name in names if name != leader))
        nodes = () if _starts_here(instead) else names
        self._give_up(
            folder, placed, Placed(nodes=nodes, group=instead.group is not None, islands=bool(instead.islands))
        )
        await self.forget(folder.name)
        where = "this machine" if instead.here else names[0]
        text = f"{remote.name} has not answered for {silence:.0f} s: {where} takes over the stage"
        self._note(folder, text, "warning")
        return True

    def _next_leader(self, folder: Path, placed: Placed, gone: str) -> str:
        """The machine that a training moves to; empty: it stays, or the others are still being asked.

        It moves only if the others miss the leading machine too (most silences are a network's, not a machine's), and
        only to one that has a copy of its checkpoints, unless there was none to lose.
        """
        assert self._stages is not None
        others = [name for name in placed.nodes if name != gone]
        inquiry = self._inquiries.get(folder.name)
        if inquiry is None:
            asking = self._asked_later(self._stages.successor(others, folder.name))
            self._inquiries[folder.name] = asyncio.create_task(asking)
            return ""
        if not inquiry.done():
            return ""
        del self._inquiries[folder.name]
        found = inquiry.result()
        if found is None or (found.step < 0 and _had_checkpoint(folder)):
            return ""
        return found.name

    @staticmethod
    async def _asked_later(question: Awaitable[Successor | None]) -> Successor | None:
        """The answer, not more often than every few seconds."""
        answer = await question
        if answer is None:
            await asyncio.sleep(_INQUIRY_S)
        return answer

    async def let_go(self, folder: Path, why: str) -> None:
        """Leave the machine of a run to itself; what still works there is ended when it answers again."""
        self._give_up(folder, read_placement(folder))
        await self.forget(folder.name)
        self._note(folder, why, "warning")

    def silent_s(self, run: str) -> float:
        """For how long the run's machine has not answered; 0 if it answers or is this one."""
        remote = self._remote.get(run)
        if remote is None or remote.silent_since is None:
            return 0.0
        return time.monotonic() - remote.silent_since

    def _note(self, folder: Path, text: str, level: str = "info") -> None:
        self._notes.append(Note(folder.name, level, text))

    async def forget(self, run: str) -> None:
        """The run is over (or given up): let go of its machines."""
        inquiry = self._inquiries.pop(run, None)
        if inquiry is not None:
            inquiry.cancel()
            await asyncio.gather(inquiry, return_exceptions=True)
        remote = self._remote.pop(run, None)
        if remote is not None:
            self._notes.extend(Note(run, level, text) for level, text in remote.take_notes())
            await remote.close()

    # -- runs that another machine took over -------------------------------------------------------
    @property
    def _abandoned_path(self) -> Path:
        return self._root / ".jupiter" / "abandoned.json"

    def _abandoned(self) -> Abandoned:
        if not self._abandoned_path.exists():
            return Abandoned()
        found = read_json(self._abandoned_path, Abandoned)
        assert isinstance(found, Abandoned)
        return found

    def _give_up(self, folder: Path, placed: Placed, instead: Placed | None = None) -> None:
        """The run is not any more where it was; `instead` is where it goes, if that is settled."""
        if placed.begun and placed.nodes:
            entry = AbandonedRun(node=placed.nodes[0], workspace=placed.workspace, run=folder.name, round=placed.round)
            write_json(self._abandoned_path, Abandoned(runs=(*self._abandoned().runs, entry)))
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "placement.json", msgspec.structs.replace(instead or Placed(), round=placed.round))

    def tidy(self) -> None:
        """End abandoned work on machines that answer again, in the background; at most one look in ten seconds."""
        if time.monotonic() < self._abandon_due or (self._tidying is not None and not self._tidying.done()):
            return
        self._abandon_due = time.monotonic() + _TIDY_S
        if self._make is not None and self._abandoned().runs:
            self._tidying = asyncio.create_task(self._tidy(self._made()))

    async def _tidy(self, stages: Stages) -> None:
        known = {node.title() for node in self._cluster().nodes}
        for entry in self._abandoned().runs:
            placed = read_placement(self._root / ".jupiter" / "runs" / entry.run)
            if entry.node not in known:
                said = f"{entry.node} is no node any more; if {entry.run} still runs there, nobody ends it"
            elif placed.begun and placed.nodes[:1] == (entry.node,):
                # It is there again by now; whoever made it ready has ended what was left.
                said = ""
            elif entry.node in stages.silent():
                continue
            elif await stages.stop_abandoned(entry.node, entry.workspace, entry.run, entry.round):
                said = f"{entry.node} answers again; its abandoned part of {entry.run} was ended"
            else:
                continue
            rest = tuple(one for one in self._abandoned().runs if one != entry)
            write_json(self._abandoned_path, Abandoned(runs=rest))
            if said:
                self._notes.append(Note(entry.run, "info", said))

    async def close(self) -> None:
        if self._tidying is not None:
            self._tidying.cancel()
            await asyncio.gather(self._tidying, return_exceptions=True)
        for run in list(self._remote):
            await self.forget(run)
        if self._stages is not None:
            await self._stages.close()
            self._stages = None


def _had_checkpoint(folder: Path) -> bool:
    """Whether a training went on long enough for a checkpoint, by the steps that are known here."""
    try:
        order = order_decoder.decode((folder / "order.json").read_bytes())
    except (FileNotFoundError, msgspec.DecodeError):
        return True
    metrics = folder / "metrics.jsonl"
    steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    if read_placement(folder).islands:
        return steps > 0  # each line is a round that was merged
    return not isinstance(order, TrainOrder) or steps >= order.recipe.checkpoint_every_steps


def _starts_here(placement: Placement) -> bool:
    """Whether the worker is simply a process of this machine; a group that asks for `direct` needs node runners."""
    return placement.here and (placement.group is None or placement.group.launcher != "direct")
