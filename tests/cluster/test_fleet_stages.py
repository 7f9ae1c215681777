"""How the machines of a stage are made ready: what the order says about each, who is left out, who merges next."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jupiter_engine.cluster.fleet_stages import FleetStages, _Preparation
from jupiter_engine.cluster.link import LinkFiles
from jupiter_engine.cluster.placement import place
from jupiter_engine.cluster.runner import NodeRunner
from jupiter_engine.cluster.site import Site
from jupiter_engine.errors import NodeUnreachable
from jupiter_engine.protocol.fleet import GroupPlan
from jupiter_engine.protocol.specs import LaunchSpec
from jupiter_engine.remote.port import Completed
from jupiter_engine.settings.cluster import ClusterSettings, load_cluster

NODES = """\
nodes:
  - {host: hub, device_type: cpu, role: evaluator}
  - {host: m1, device_type: mac, role: trainer, micro_batch_sequences: 3}
  - {host: m2, device_type: mac, role: trainer}
  - {host: box, device_type: cpu, role: trainer, micro_batch_sequences: 5}
groups: [{name: macs, nodes: [m1, m2]}]
"""
ISLANDS = NODES + "islands: {groups: [macs, box], hub: hub, rounds: {quorum: 1}}\n"
RUN = "tiny-0001-train"


class PlayedConnection:
    """Answers each command from a table of what its words contain."""

    host = "played"

    def __init__(self, name: str, answers: dict[str, str]) -> None:
        self.name, self.answers = name, answers
        self.asked: list[tuple[str, ...]] = []

    async def run(self, argv: Sequence[str], **_: Any) -> Completed:
        self.asked.append(tuple(argv))
        said = next((text for part, text in self.answers.items() if part in " ".join(argv)), "")
        return Completed(exit_status=0, stdout=said.encode(), stderr=b"")


class PlayedFleet(FleetStages):
    """Machines that answer from tables; those in `silent` do not."""

    def __init__(self, root: Path, cluster: ClusterSettings, silent: set[str]) -> None:
        super().__init__(root)
        self._opened_with, self.silent_ones = cluster, silent
        self.answers: dict[str, dict[str, str]] = {}
        self.connections: dict[str, PlayedConnection] = {}

    async def runner(self, name: str) -> tuple[NodeRunner, Any]:
        if name in self.silent_ones:
            raise NodeUnreachable(f"{name} is silent", host=name, reason="timeout")
        if name not in self.connections:
            self.connections[name] = PlayedConnection(name, self.answers.get(name, {}))
        runner = NodeRunner(self.connections[name], f"/home/{name}/.jupiter")  # type: ignore[arg-type]
        runner.python, runner.file = "/usr/bin/python3", f"/home/{name}/.jupiter/node/x.pyz"
        return runner, None


def cluster_of(folder: Path, text: str) -> ClusterSettings:
    (folder / "cluster.yaml").write_text(text)
    (folder / ".jupiter").mkdir(exist_ok=True)
    (folder / ".jupiter" / "id").write_text("abc")
    return load_cluster(folder / "cluster.yaml").value


def preparation(folder: Path, text: str, silent: set[str] | None = None) -> tuple[_Preparation, PlayedFleet]:
    cluster = cluster_of(folder, text)
    fleet = PlayedFleet(folder, cluster, silent or set())
    return _Preparation(fleet, cluster, place("train", cluster), folder / ".jupiter" / "runs" / RUN), fleet


async def host_of(made: _Preparation, fleet: PlayedFleet, name: str, run: str) -> Any:
    runner, _ = await fleet.runner(name)
    site = Site(
        name=name, local=False, runner=runner, workspace=f"/home/{name}/ws", python="/env/python", env={"A": "1"}
    )
    plan = GroupPlan(name="macs", nodes=("m1", "m2"), twin="mlx", backend="ring", launcher="mlx.launch")
    group = made._cluster.groups[0]
    return made._host(site, plan, LinkFiles(ssh_config="", aliases={"m2": "m2"}), group, run)


async def test_a_machines_micro_batches_reach_the_order(tmp_path: Path) -> None:
    made, fleet = preparation(tmp_path, NODES)
    first, second = await host_of(made, fleet, "m1", RUN), await host_of(made, fleet, "m2", f"{RUN}.macs")
    assert (first.micro_batch_sequences, second.micro_batch_sequences) == (3, 0)
    assert (first.run_folder, second.run_folder) == (f"/home/m1/ws/runs/{RUN}", f"/home/m2/ws/runs/{RUN}.macs")
    assert (first.ssh, second.ssh) == ("", "m2")


@pytest.mark.parametrize("name", ["m1", "m2", "box"])
async def test_one_machine_alone_has_its_micro_batches_in_the_order_as_well(name: str, tmp_path: Path) -> None:
    """A group's last machine, and an island of one."""
    made, fleet = preparation(tmp_path, ISLANDS)
    runner, _ = await fleet.runner(name)
    site = Site(name=name, local=False, runner=runner, workspace="/w", python="/env/python", env={})
    group = None if name == "box" else made._cluster.groups[0]
    launch, sites = await made._launch(group, [site], "torch", lambda _: None)
    assert (launch.micro_batch_sequences, launch.hosts, sites) == ({"m1": 3, "m2": 0, "box": 5}[name], (), [site])


@pytest.mark.parametrize(
    ("launch", "sharding", "compiled"),
    [("{}", "none", "auto"), ("{sharding: zero1, compile: 'off'}", "zero1", "off"), ("{compile: 'on'}", "none", "on")],
)
def test_sharding_and_compiling_reach_the_order(launch: str, sharding: str, compiled: str, tmp_path: Path) -> None:
    made, _ = preparation(tmp_path, f"{NODES}launch: {launch}\n")
    spec = made._alone("torch", 2)
    assert isinstance(spec, LaunchSpec)
    assert (spec.sharding, spec.compile, spec.ranks) == (sharding, compiled, 2)


def left(made: _Preparation, said: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    placement = asyncio.run(made._answering_islands(said.append))
    return [(island.name, island.names()) for island in placement.islands]


def test_islands_go_without_those_that_do_not_answer(tmp_path: Path) -> None:
    said: list[str] = []
    made, _ = preparation(tmp_path, ISLANDS)
    assert left(made, said) == [("macs", ("m1", "m2")), ("box", ("box",))]
    assert said == []
    made, _ = preparation(tmp_path, ISLANDS, {"m1", "box"})
    assert left(made, said) == [("macs", ("m2",))]
    assert said == ["m1 is left out of its island: m1 is silent", "box is left out of its island: box is silent"]
    # Too few for a merge, or no hub: the engine tries again.
    for text, silent in ((ISLANDS.replace("quorum: 1", "quorum: 2"), {"box"}), (ISLANDS, {"hub"})):
        made, _ = preparation(tmp_path, text, silent)
        with pytest.raises(NodeUnreachable, match=f"{min(silent)} is silent"):
            left(made, said)


async def test_who_merges_next_has_the_newest_copy_and_hears_of_no_hub(tmp_path: Path) -> None:
    _, fleet = preparation(tmp_path, ISLANDS)
    fleet.answers = {
        "m1": {f"runs/{RUN}/copies": "00000001.00000007\n"},
        "m2": {},
        "box": {f"runs/{RUN}/copies": "00000002.00000004\n.00000009.00000009.partial\n"},
    }
    found = await fleet.successor(["m1", "m2", "box"], RUN)
    assert found is not None
    assert (found.name, found.step) == ("box", 2_00000004)
    # One that heard of the hub within the last minute: it lives, only we do not hear it.
    leases = f"*/{RUN}.*/node/lease"
    fleet.connections.clear()
    fleet.answers["m2"] = {leases: f"/home/m2/.jupiter/workspaces/abc/runs/{RUN}.macs/node/lease\n"}
    assert await fleet.successor(["m1", "m2", "box"], RUN) is None
    # A group's checkpoints are found as ever.
    fleet.connections.clear()
    fleet.answers = {"m1": {f"runs/{RUN}/checkpoints": "step-00000020\nstep-00000010\n"}, "m2": {}}
    found = await fleet.successor(["m1", "m2"], RUN)
    assert found is not None
    assert (found.name, found.step) == ("m1", 20)


async def test_what_was_exchanged_is_cleared_when_the_model_is_home(tmp_path: Path) -> None:
    made, fleet = preparation(tmp_path, ISLANDS, {"m2"})
    await made._clear_islands()
    (cleared,) = fleet.connections["m1"].asked
    runs = "/home/m1/.jupiter/workspaces/abc/runs"
    assert cleared == (
        "rm",
        "-rf",
        # Of a hub that was there before.
        f"{runs}/{RUN}/copies",
        f"{runs}/{RUN}/state",
        f"{runs}/{RUN}/exchange",
        f"{runs}/{RUN}.macs/checkpoints",
        f"{runs}/{RUN}.macs/exchange",
    )
    (of_hub,) = fleet.connections["hub"].asked
    assert f"/home/hub/.jupiter/workspaces/abc/runs/{RUN}/state" in of_hub
    assert "m2" not in fleet.connections
