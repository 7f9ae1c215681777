"""Calibrations of several machines: each by its own way, failures told by name, nothing tried that cannot fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from jupiter_engine.cluster.placement import Placement
from jupiter_engine.cluster.stage import RemoteStage, Successor
from jupiter_engine.errors import NodeUnreachable
from jupiter_engine.orchestrator.calibrating import calibrate
from jupiter_engine.orchestrator.planner import calibrations
from jupiter_engine.planning.budget import Device
from jupiter_engine.planning.plan import Member, Question
from jupiter_engine.protocol.shapes import PRESETS
from jupiter_engine.protocol.specs import Recipe
from jupiter_engine.remote.local import LocalRemote
from jupiter_engine.settings.cluster import ClusterSettings, NodeSpec
from jupiter_engine.units import GIB

CLUSTER = ClusterSettings(
    nodes=(NodeSpec(), NodeSpec(host="far.lan", name="far"), NodeSpec(host="gone.lan", name="gone"))
)
RECIPE = Recipe(sequence_tokens=32, batch_sequences=2, micro_batch_sequences=1, compute_dtype="float32")


class PlayedStages:
    """Other machines, played by this one; `gone` does not answer."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.closed = False

    def stage(self, cluster: ClusterSettings, placement: Placement, folder: Path) -> RemoteStage:
        del cluster, folder
        self.asked += placement.names()
        if placement.names() == ("gone",):
            raise NodeUnreachable("gone.lan does not answer", host="gone.lan", reason="timeout")
        return cast("RemoteStage", LocalRemote())

    def silent(self) -> frozenset[str]:
        return frozenset()

    async def successor(self, others: Sequence[str], run: str) -> Successor | None:
        raise AssertionError((others, run))

    async def stop_abandoned(self, node: str, workspace: str, run: str, number: int) -> bool:
        raise AssertionError((node, workspace, run, number))

    async def close(self) -> None:
        self.closed = True


def member(name: str, allowed: int = 8 * GIB) -> Member:
    return Member(device=Device(node=name, kind="cpu", twin="torch", name="chip", cores=2, allowed=allowed))


async def test_each_machine_is_measured_by_its_own_way_and_failures_are_told(tmp_path: Path) -> None:
    (tmp_path / ".jupiter" / "runs").mkdir(parents=True)
    stages, said = PlayedStages(), list[str]()
    members = (member("far"), member("gone"), member("small", allowed=1 << 20))
    question = Question(shape=PRESETS["nano"].shape, recipe=RECIPE, members=members)
    done, problems = await calibrate(
        tmp_path, "python", CLUSTER, question, seconds=0.1, stages=lambda: stages, say=said.append
    )
    assert [one.node for one in done] == ["far"]
    assert calibrations(tmp_path) == done
    assert done[0].micro_batch_s > 0
    gone, small = problems
    assert "gone was not measured" in gone
    assert "does not answer" in gone
    assert "small was not measured: it needs" in small
    assert stages.asked == ["far", "gone"]
    assert stages.closed
    assert any("far: training" in text for text in said)
