"""Which machine works on which stage, and everything about machines that the journal should know."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from jupiter_engine.cluster.placement import ABILITY_OF_STAGE, Placement, place
from jupiter_engine.cluster.stage import Placed, RemoteStage
from jupiter_engine.errors import JupiterError, NoUsableNode
from jupiter_engine.files import read_json, write_json
from jupiter_engine.protocol.facts import Progress
from jupiter_engine.protocol.specs import LaunchSpec
from jupiter_engine.remote.port import Remote
from jupiter_engine.settings.cluster import ClusterSettings, launch_spec, load_cluster, node_by_name, training_group


class Stages(Protocol):
    """Makes the adapter for a stage on other machines (cluster.fleet_stages; tests play it)."""

    def stage(self, cluster: ClusterSettings, placement: Placement, folder: Path) -> RemoteStage: ...

    def silent(self) -> frozenset[str]:
        """Names of the machines that do not answer now."""

    async def leader_gone(self, others: Sequence[str], run: str) -> bool:
        """Whether a group's other machines answer, and none of them has heard of the leading one for a minute."""

    async def stop_abandoned(self, node: str, workspace: str, run: str) -> bool:
        """End the run's processes on a machine, if it answers; whether that is done."""

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Note:
    run: str
    level: str
    text: str


class Abandoned(msgspec.Struct, frozen=True, kw_only=True):
    """abandoned.json: runs that were taken up elsewhere while their machine was silent; ended once it answers."""

    runs: tuple[tuple[str, str, str], ...] = ()
    """(node, workspace there, run)"""


class Dispatcher:
    """One for an engine's life."""

    def __init__(self, root: Path, local: Remote, stages: Callable[[], Stages] | None) -> None:
        """`stages` is asked for only when a stage is really placed on another machine."""
        self._root, self._local, self._make = root, local, stages
        self._stages: Stages | None = None
        self._remote: dict[str, RemoteStage] = {}
        self._notes: deque[Note] = deque()
        self._abandon_due = 0.0

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
        if self._stages is None:
            self._stages = self._make()
        remote = self._remote[folder.name] = self._stages.stage(cluster, placement, folder)
        return remote

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

    @staticmethod
    def _begun(cluster: ClusterSettings, folder: Path) -> Placement | None:
        """Where an earlier engine began the run; None if nowhere, or if the cluster file lacks a machine of it now."""
        path = folder / "placement.json"
        if not path.exists():
            return None
        placed = read_json(path, Placed)
        assert isinstance(placed, Placed)
        try:
            nodes = tuple(node_by_name(cluster, name) for name in placed.nodes)
        except JupiterError:
            return None
        group = training_group(cluster) if len(nodes) > 1 or placed.group else None
        return Placement(nodes=nodes, group=group)

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
        if silence < cluster.retries.node_lost_after_s or not await self._may_move(stage, folder, remote):
            return False
        silent = self._stages.silent() | {remote.name}
        try:
            instead = place(stage, cluster, lost=silent)
        except NoUsableNode:
            return False
        self._abandon(folder, remote)
        await self.forget(folder.name)
        (folder / "placement.json").unlink(missing_ok=True)
        where = "this machine" if instead.here else instead.names()[0]
        self._note(
            folder, f"{remote.name} has not answered for {silence:.0f} s: {where} takes over the stage", "warning"
        )
        return True

    async def _may_move(self, stage: str, folder: Path, remote: RemoteStage) -> bool:
        """A training moves only to a machine that has a copy of its checkpoints, the next of its group, and only if
        that one misses the leading machine too: most silences are a network's, not a machine's."""
        placed = remote.placed()
        if stage != "train" or placed.round == 0:
            return True
        assert self._stages is not None
        others = [name for name in placed.nodes if name != remote.name]
        return bool(others) and await self._stages.leader_gone(others, folder.name)

    def _note(self, folder: Path, text: str, level: str = "info") -> None:
        self._notes.append(Note(folder.name, level, text))

    async def forget(self, run: str) -> None:
        """The run is over (or given up): let go of its machines."""
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

    def _abandon(self, folder: Path, remote: RemoteStage) -> None:
        placed = remote.placed()
        if placed.round == 0:
            return
        runs = self._abandoned().runs
        entry = (remote.name, placed.workspace, folder.name)
        write_json(self._abandoned_path, Abandoned(runs=(*runs, entry)))

    async def tidy(self) -> None:
        """End abandoned work on machines that answer again; at most one look in ten seconds."""
        if self._stages is None or time.monotonic() < self._abandon_due:
            return
        self._abandon_due = time.monotonic() + 10.0
        left = []
        for node, workspace, run in self._abandoned().runs:
            if node not in self._stages.silent() and await self._stages.stop_abandoned(node, workspace, run):
                self._notes.append(Note(run, "info", f"{node} answers again; its abandoned part of {run} was ended"))
            else:
                left.append((node, workspace, run))
        if len(left) != len(self._abandoned().runs):
            write_json(self._abandoned_path, Abandoned(runs=tuple(left)))

    async def close(self) -> None:
        for run in list(self._remote):
            await self.forget(run)
        if self._stages is not None:
            await self._stages.close()
            self._stages = None


def _starts_here(placement: Placement) -> bool:
    """Whether the worker is simply a process of this machine; a group that asks for `direct` needs node runners."""
    return placement.here and (placement.group is None or placement.group.launcher != "direct")
