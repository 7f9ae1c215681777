"""Stages on other machines as the engine sees them: placed by role, taken over after silence, told in the journal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from jupiter_engine.cluster.placement import Placement
from jupiter_engine.cluster.stage import Placed, Successor, read_placement
from jupiter_engine.errors import NodeUnreachable
from jupiter_engine.files import write_json
from jupiter_engine.orchestrator.engine import Engine
from jupiter_engine.protocol import facts
from jupiter_engine.protocol.commands import Pause, StartCycles
from jupiter_engine.protocol.facts import Progress
from jupiter_engine.remote.scripted import ScriptedRemote
from jupiter_engine.settings.cluster import ClusterSettings
from jupiter_engine.settings.workspace import create
from tests.orchestrator.scripted_worker import ScriptedWorker

CLUSTER = """\
nodes:
  - {host: localhost, name: here, device_type: cpu, role: hybrid}
  - {host: far, name: far, device_type: cpu, role: generator}
retries: {node_lost_after_s: 20}
"""


class PlayedStage(ScriptedRemote):
    """A stage on another machine whose worker is played at once."""

    def __init__(self, worker: ScriptedWorker, folder: Path, placement: Placement, *, silent: bool) -> None:
        super().__init__(worker)
        self.name = placement.names()[0]
        self.nodes = placement.names()
        self.folder, self.placement = folder, placement
        self.silent_since: float | None = time.monotonic() if silent else None
        self.progress: Progress | None = None
        self.closed = False
        self._notes = [("info", f"{folder.name} works on {self.name}\x1b[31m")]

    async def start(self, argv, *, folder, log, env):  # type: ignore[no-untyped-def]
        placed = Placed(
            nodes=self.nodes,
            group=len(self.nodes) > 1,
            workspace="/far/ws",
            round=read_placement(Path(folder)).round + 1,
            begun=True,
        )
        write_json(Path(folder) / "placement.json", placed)
        if self.silent_since is not None:
            self._living.add(1)
            return await ScriptedRemote.start(SilentRemote(), ("x",), folder=folder, log=log, env=env)
        return await super().start(argv, folder=folder, log=log, env=env)

    async def alive(self, process):  # type: ignore[no-untyped-def]
        return self.silent_since is not None or await super().alive(process)

    def take_notes(self) -> list[tuple[str, str]]:
        found, self._notes = self._notes, []
        return found

    async def close(self) -> None:
        self.closed = True


class SilentRemote(ScriptedRemote):
    def __init__(self) -> None:
        super().__init__(lambda _: True)


class PlayedStages:
    def __init__(self, worker: ScriptedWorker) -> None:
        self.worker = worker
        self.made: list[PlayedStage] = []
        self.lost: set[str] = set()
        self.silent_stage = False
        self.next: Successor | None = None
        self.asked: tuple[str, ...] = ()
        self.stopped: list[tuple[str, str, str, int]] = []
        self.closed = False

    def stage(self, cluster: ClusterSettings, placement: Placement, folder: Path) -> PlayedStage:
        self.made.append(PlayedStage(self.worker, folder, placement, silent=self.silent_stage))
        return self.made[-1]

    def silent(self) -> frozenset[str]:
        return frozenset(self.lost)

    async def successor(self, others: Sequence[str], run: str) -> Successor | None:
        self.asked = tuple(others)
        return self.next

    async def stop_abandoned(self, node: str, workspace: str, run: str, number: int) -> bool:
        self.stopped.append((node, workspace, run, number))
        return True

    async def close(self) -> None:
        self.closed = True


class Fixture:
    def __init__(self, root: Path, cluster: str = CLUSTER) -> None:
        create(root)
        (root / "config" / "cluster.yaml").write_text(cluster)
        self.root = root
        self.worker = ScriptedWorker()
        self.local = ScriptedRemote(self.worker)
        self.stages = PlayedStages(self.worker)
        self.engine = self.new_engine()

    def new_engine(self) -> Engine:
        return Engine(self.root, self.local, self.make)  # type: ignore[arg-type]

    def make(self) -> PlayedStages:
        return self.stages

    def start(self) -> None:
        self.engine.database.submit(StartCycles(domain="python", mode="auto"))
        self.engine._carry_out_commands()

    async def steps(self, most: int = 300) -> None:
        for _ in range(most):
            if not await self.engine.step():
                return

    async def tidy(self) -> None:
        self.engine.dispatch._abandon_due = 0.0
        await self.engine.step()
        await asyncio.sleep(0.05)
        await self.steps()

    def texts(self) -> list[str]:
        return [notice.text for notice in self.engine.state.notices]


async def test_the_generator_node_generates_and_everything_else_stays_here(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)
    fixture.start()
    await fixture.steps()
    cycle = fixture.engine.state.cycles["python-0001"]
    assert cycle.status == "finished", fixture.texts()
    assert [(stage.name, stage.folder.name) for stage in fixture.stages.made] == [("far", "python-0001-generate")]
    assert fixture.stages.made[0].closed
    # The note is in the journal, and cannot drive a terminal.
    assert "python-0001-generate works on far" in fixture.texts()
    await fixture.engine.dispatch.close()
    assert fixture.stages.closed


async def test_without_other_machines_nobody_is_called(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, "nodes: [{host: localhost, device_type: cpu, role: hybrid}]\n")
    fixture.start()
    await fixture.steps()
    assert fixture.engine.state.cycles["python-0001"].status == "finished"
    assert fixture.stages.made == []


async def test_a_silent_machine_is_replaced_and_its_abandoned_work_ended_later(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)
    fixture.stages.silent_stage = True
    fixture.start()
    await fixture.steps()
    (silent,) = fixture.stages.made
    assert fixture.engine.state.cycles["python-0001"].stages["generate"].status == "running"
    fixture.stages.lost.add("far")
    silent.silent_since = time.monotonic() - 21
    await fixture.steps()
    cycle = fixture.engine.state.cycles["python-0001"]
    assert cycle.status == "finished", fixture.texts()
    assert any("far has not answered for 21 s: this machine takes over" in text for text in fixture.texts())
    assert silent.closed
    assert fixture.stages.stopped == []
    fixture.stages.lost.clear()
    await fixture.tidy()
    assert fixture.stages.stopped == [("far", "/far/ws", "python-0001-generate", 1)]
    await fixture.tidy()
    assert len(fixture.stages.stopped) == 1
    assert any("far answers again; its abandoned part" in text for text in fixture.texts())


async def test_a_short_silence_changes_nothing(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)
    fixture.stages.silent_stage = True
    fixture.start()
    await fixture.steps()
    fixture.stages.lost.add("far")
    fixture.stages.made[0].silent_since = time.monotonic() - 2
    await fixture.steps()
    assert fixture.engine.state.cycles["python-0001"].stages["generate"].status == "running"


async def test_a_training_that_was_begun_stays_with_the_machine_that_has_its_checkpoints(tmp_path: Path) -> None:
    cluster = CLUSTER.replace("role: hybrid", "role: hybrid, can_train: false").replace("generator}", "trainer}")
    fixture = Fixture(tmp_path, cluster)
    fixture.stages.silent_stage = True
    fixture.start()
    await fixture.steps()
    assert fixture.stages.made[0].folder.name == "python-0001-train"
    fixture.stages.lost.add("far")
    fixture.stages.made[0].silent_since = time.monotonic() - 6000
    await fixture.steps()
    assert fixture.engine.state.cycles["python-0001"].stages["train"].status == "running"


GROUP = """\
nodes:
  - {host: localhost, name: here, device_type: cpu, role: hybrid, can_train: false}
  - {host: m1, device_type: mac, role: trainer}
  - {host: m2, device_type: mac, role: trainer}
  - {host: m3, device_type: mac, role: trainer}
groups: [{name: macs, nodes: [m1, m2, m3]}]
retries: {node_lost_after_s: 20}
"""


async def group_without_its_leader(root: Path, successor: Successor | None) -> Fixture:
    fixture = Fixture(root, GROUP)
    fixture.stages.silent_stage = True
    fixture.start()
    await fixture.steps()
    fixture.stages.lost.add("m1")
    fixture.stages.next = successor
    fixture.stages.silent_stage = False
    fixture.stages.made[0].silent_since = time.monotonic() - 21
    for _ in range(5):
        await fixture.steps()
        await asyncio.sleep(0.02)
    assert set(fixture.stages.asked) == {"m2", "m3"}
    return fixture


async def test_a_group_is_led_by_the_machine_with_the_newest_copy_when_the_others_miss_its_leader(
    tmp_path: Path,
) -> None:
    fixture = await group_without_its_leader(tmp_path, Successor(name="m3", step=40))
    leaders = [stage.nodes for stage in fixture.stages.made if stage.folder.name == "python-0001-train"]
    assert leaders == [("m1", "m2", "m3"), ("m3", "m2")]
    assert fixture.engine.state.cycles["python-0001"].status == "finished"
    # The old leader's part is ended when it is seen again.
    fixture.stages.lost.clear()
    await fixture.tidy()
    assert fixture.stages.stopped == [("m1", "/far/ws", "python-0001-train", 1)]


@pytest.mark.parametrize("successor", [None, Successor(name="m3", step=-1)])
async def test_a_group_waits_for_its_leader_while_it_lives_or_nobody_has_its_checkpoints(
    successor: Successor | None, tmp_path: Path
) -> None:
    fixture = await group_without_its_leader(tmp_path, successor)
    assert fixture.engine.state.cycles["python-0001"].stages["train"].status == "running"
    await fixture.engine.dispatch.close()


async def test_a_machine_that_left_the_cluster_file_is_given_up_and_does_not_stop_the_engine(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)
    fixture.stages.silent_stage = True
    fixture.start()
    await fixture.steps()
    (tmp_path / "config" / "cluster.yaml").write_text(
        "nodes: [{host: localhost, name: here, device_type: cpu, role: hybrid}]\n"
    )
    fixture.engine = fixture.new_engine()
    await fixture.steps()
    assert fixture.engine.state.cycles["python-0001"].status == "finished", fixture.texts()
    await fixture.tidy()
    assert any("far is no node any more" in text for text in fixture.texts())
    assert fixture.stages.stopped == []


async def test_facts_taken_in_from_one_machine_are_not_taken_in_again_on_the_next(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)
    fixture.stages.silent_stage = True
    fixture.start()
    await fixture.steps()
    (silent,) = fixture.stages.made
    # As a stage elsewhere keeps it: the engine's order under another name, the far worker's facts mirrored.
    (silent.folder / "spec.json").rename(silent.folder / "order.json")
    fixture.worker._fact(silent.folder, facts.Note, level="info", text="told by far")
    await fixture.steps()
    fixture.stages.lost.add("far")
    silent.silent_since = time.monotonic() - 21
    await fixture.steps()
    assert fixture.engine.state.cycles["python-0001"].status == "finished", fixture.texts()
    assert fixture.texts().count("told by far") == 1


async def test_a_result_that_is_home_is_kept_when_its_machine_falls_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jupiter_engine.orchestrator.engine.LINGER_S", 0.0)
    fixture = Fixture(tmp_path)
    fixture.start()
    original = fixture.stages.stage

    def stage(cluster: ClusterSettings, placement: Placement, folder: Path) -> PlayedStage:
        made = original(cluster, placement, folder)
        play = made.start

        async def then_silence(argv, **more):  # type: ignore[no-untyped-def]
            identity = await play(argv, **more)  # type: ignore[no-untyped-call]
            made.silent_since = time.monotonic()
            return identity

        made.start = then_silence  # type: ignore[method-assign]
        return made

    fixture.stages.stage = stage  # type: ignore[method-assign]
    await fixture.steps()
    cycle = fixture.engine.state.cycles["python-0001"]
    assert cycle.status == "finished", fixture.texts()
    assert any("the result is here" in text for text in fixture.texts())
    await fixture.tidy()
    assert fixture.stages.stopped == [("far", "/far/ws", "python-0001-generate", 1)]


async def test_a_pause_does_not_wait_for_a_machine_that_is_silent(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)
    fixture.stages.silent_stage = True
    fixture.start()
    await fixture.steps()
    fixture.stages.made[0].silent_since = time.monotonic() - 15
    fixture.engine.database.submit(Pause(cycle="python-0001"))
    await fixture.steps()
    assert fixture.engine.state.cycles["python-0001"].status == "paused"
    await fixture.tidy()
    assert fixture.stages.stopped == [("far", "/far/ws", "python-0001-generate", 1)]


async def test_the_next_engine_goes_back_to_the_machine_where_the_stage_was_begun(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)
    fixture.stages.silent_stage = True
    fixture.start()
    await fixture.steps()
    # The roles have changed meanwhile; the stage that runs stays where it is.
    roles = CLUSTER.replace("role: generator", "role: evaluator")
    (tmp_path / "config" / "cluster.yaml").write_text(roles)
    fixture.engine = fixture.new_engine()
    await fixture.steps()
    assert [stage.name for stage in fixture.stages.made] == ["far", "far"]


async def test_what_makes_a_machine_impossible_fails_the_cycle_with_its_sentence(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)

    async def refused(*_: object, **__: object) -> None:
        raise NodeUnreachable("far: no key fits", host="far", reason="auth", fix="add the key to the agent")

    fixture.start()
    original = fixture.stages.stage

    def stage(cluster: ClusterSettings, placement: Placement, folder: Path) -> PlayedStage:
        made = original(cluster, placement, folder)
        made.start = refused  # type: ignore[method-assign]
        return made

    fixture.stages.stage = stage  # type: ignore[method-assign]
    await fixture.steps()
    cycle = fixture.engine.state.cycles["python-0001"]
    assert cycle.status == "failed"
    failure = cycle.stages["generate"].failure
    assert failure is not None
    assert (failure.detail, failure.fix) == ("far: no key fits", "add the key to the agent")


@pytest.mark.parametrize(("ranks", "launcher"), [(1, "in_process"), (2, "torchrun")])
def test_a_group_of_this_machine_alone_sets_its_ranks(ranks: int, launcher: str, tmp_path: Path) -> None:
    group = f"groups: [{{name: all, nodes: [here], ranks_per_node: {ranks}}}]\n"
    fixture = Fixture(tmp_path, CLUSTER + group)
    launch = fixture.engine.dispatch.launch()
    assert (launch.ranks, launch.launcher) == (ranks, launcher)


ISLANDS = """\
nodes:
  - {host: localhost, name: here, device_type: cpu, role: hybrid, can_train: false}
  - {host: a, name: a, device_type: cpu, role: trainer}
  - {host: b, name: b, device_type: cpu, role: trainer}
  - {host: c, name: c, device_type: cpu, role: trainer}
islands: {groups: [b, c], hub: a}
retries: {node_lost_after_s: 20}
"""


async def test_another_machine_becomes_the_hub_of_islands_where_the_first_one_is_gone(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ISLANDS)
    fixture.stages.silent_stage = True
    fixture.start()
    await fixture.steps()
    (first,) = fixture.stages.made
    assert first.nodes == ("a", "b", "c")
    placed = read_placement(first.folder)
    write_json(first.folder / "placement.json", msgspec.structs.replace(placed, islands=True))
    # An engine that comes later finds the same machines and the same islands.
    again = fixture.new_engine().dispatch.remote_of("train", first.folder)
    assert isinstance(again, PlayedStage)
    assert again.nodes == first.nodes
    assert [one.name for one in again.placement.islands] == ["b", "c"]
    fixture.stages.made.pop()
    fixture.stages.lost.add("a")
    fixture.stages.silent_stage = False
    fixture.stages.next = Successor(name="c", step=4)
    first.silent_since = time.monotonic() - 21
    for _ in range(20):
        await fixture.steps()
        await asyncio.sleep(0.05)
    cycle = fixture.engine.state.cycles["python-0001"]
    assert cycle.status == "finished", fixture.texts()
    second = fixture.stages.made[1]
    assert second.nodes == ("c", "b")
    assert set(fixture.stages.asked) == {"b", "c"}
    assert [one.name for one in second.placement.islands] == ["b", "c"]
    assert any("a has not answered for 21 s: c takes over" in text for text in fixture.texts())
