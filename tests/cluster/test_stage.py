"""A stage on another machine through the real node runner: mirrored, halted, killed, cut off, taken up again.

The other machine is a second folder of this one behind a connection that can be cut.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec
import pytest

import jupiter_engine
from jupiter_engine.cluster.contents import HashCache
from jupiter_engine.cluster.runner import NodeRunner
from jupiter_engine.cluster.shipping import Shipment, ship
from jupiter_engine.cluster.site import Ready, Site
from jupiter_engine.cluster.stage import NOWHERE, RemoteStage
from jupiter_engine.cluster.transfer import fetch_tree, send_tree
from jupiter_engine.errors import JupiterError, NodeUnreachable, RemoteError
from jupiter_engine.protocol import facts
from jupiter_engine.protocol.facts import Metric, Progress
from jupiter_engine.protocol.orders import TrainOrder
from jupiter_engine.protocol.specs import LaunchSpec
from jupiter_engine.remote.this_machine import LocalConnection, LocalStream
from tests.training.nano import Run, make_run, recipe

CODE = str(Path(jupiter_engine.__file__).parents[1])


class Cuttable(LocalConnection):
    """A connection that a test can cut, with every stream on it."""

    def __init__(self) -> None:
        super().__init__("far")
        self.cut = False
        self._mine: list[LocalStream] = []

    async def stream(self, argv: Sequence[str]) -> LocalStream:
        if self.cut:
            raise NodeUnreachable("far: cut", host="far", reason="lost")
        stream = await super().stream(argv)
        self._mine.append(stream)
        return stream

    def sever(self) -> None:
        self.cut = True
        for stream in self._mine:
            if not stream.ended:
                stream._process.kill()
        self._mine.clear()


class Far:
    """The Maker: a node in `node/`, the workspace's part of it in `node/ws`."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.home, self.folder = root, folder
        self.connection = Cuttable()
        self.runner = NodeRunner(self.connection, str(root / "node"), sys.executable)
        self.hashes = HashCache(root / "hashes.db")
        self.prepared = 0

    @property
    def workspace(self) -> str:
        return str(self.home / "node" / "ws")

    def shipment(self) -> Shipment:
        order = msgspec.json.decode((self.folder / "order.json").read_bytes(), type=TrainOrder)
        launch = LaunchSpec(twin="torch", threads_per_rank=1)
        return ship(order, home=self.home, run_folder=self.folder, twin="torch", launch=launch)

    async def prepare(self, say: Callable[[str], None], at: Callable[[Progress], None]) -> Ready:
        site = await self.leader("far")
        shipment = self.shipment()
        for here, there in shipment.inputs:
            await send_tree(self.runner, here, site.path(there), self.hashes)
        spec = msgspec.json.encode(shipment.order)
        await self.connection.write(site.path(f"runs/{self.folder.name}/spec.json"), spec)
        self.prepared += 1
        return Ready(sites=(site,), group=False)

    async def leader(self, name: str) -> Site:
        if self.connection.cut:
            raise NodeUnreachable("far: cut", host="far", reason="lost")
        await self.runner.ensure()
        return Site(
            name="far",
            local=False,
            runner=self.runner,
            workspace=self.workspace,
            python=sys.executable,
            env={"PYTHONPATH": CODE},
        )

    def outputs(self) -> tuple[Path, ...]:
        return tuple(here for _, here in self.shipment().outputs)

    async def fetch(self, site: Site, at: Callable[[Progress], None]) -> None:
        for there, here in self.shipment().outputs:
            await fetch_tree(self.runner, site.path(there), here, self.hashes, limit_bytes=1 << 30)


class Case:
    def __init__(self, root: Path, *, steps: int = 12) -> None:
        self.run: Run = make_run(root, recipe(steps=steps), LaunchSpec(twin="torch"))
        self.folder = self.run.folder
        (self.folder / "spec.json").rename(self.folder / "order.json")
        self.far = Far(root, self.folder)
        self.there = root / "node" / "ws" / "runs" / self.folder.name
        self.stage = self.new()

    def new(self) -> RemoteStage:
        return RemoteStage(self.folder, self.far.home, ("far",), self.far)

    async def start(self) -> None:
        await self.stage.start((), folder=self.folder, log=self.folder / "worker.log", env={})

    async def until(self, what: Callable[[], bool], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert await self.stage.alive(NOWHERE), self.log()
            assert time.monotonic() < deadline, self.log()
            await asyncio.sleep(0.05)

    async def over(self, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while await self.stage.alive(NOWHERE):
            assert time.monotonic() < deadline, self.log()
            await asyncio.sleep(0.05)

    def log(self) -> str:
        path = self.folder / "worker.log"
        return path.read_text() if path.exists() else f"no log; notes {self.stage.notes}"

    def steps(self) -> list[int]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [msgspec.json.decode(line, type=Metric).step for line in lines if line.endswith(b"\n")]

    def facts(self) -> list[facts.AnyFact]:
        return [facts.decoder.decode(line) for line in (self.folder / "events.jsonl").read_bytes().splitlines()]

    def check_mirror(self) -> None:
        for name in ("events.jsonl", "metrics.jsonl", "worker.log"):
            assert (self.folder / name).read_bytes() == (self.there / name).read_bytes(), name

    def check_facts(self) -> None:
        numbers = [fact.seq for fact in self.facts()]
        assert numbers == list(range(1, len(numbers) + 1))

    def check_done(self) -> None:
        self.check_mirror()
        self.check_facts()
        assert self.steps() == list(range(1, self.run.order.recipe.steps + 1))
        # The model is here before anybody could read that it is finished, and is what was trained there.
        assert isinstance(self.facts()[-1], facts.Finished)
        made = Path(self.run.order.target) / "model.safetensors"
        there = self.far.home / "node" / "ws" / "models" / Path(self.run.order.target).name / "model.safetensors"
        assert made.read_bytes() == there.read_bytes()


Cases = Callable[..., Case]


@pytest.fixture
async def cases(tmp_path: Path) -> AsyncIterator[Cases]:
    made: list[Case] = []

    def make(*, steps: int = 12) -> Case:
        made.append(Case(tmp_path, steps=steps))
        return made[-1]

    yield make
    for case in made:
        await case.stage.close()
        await case.far.connection.close()


async def test_a_training_elsewhere_ends_with_its_model_here(cases: Cases) -> None:
    case = cases()
    await case.start()
    await case.over()
    case.check_done()
    finished = case.facts()[-1]
    assert isinstance(finished, facts.Finished)
    result = case.stage.localise(finished.result)
    assert result["model"]["folder"] == case.run.order.target
    assert any("works on far" in text for _, text in case.stage.take_notes())
    assert not await case.stage.alive(NOWHERE)


@pytest.mark.slow
async def test_a_lost_connection_and_a_new_engine_lose_and_double_nothing(cases: Cases) -> None:
    case = cases(steps=400)
    await case.start()
    await case.until(lambda: len(case.steps()) > 20)
    case.far.connection.sever()
    await case.until(lambda: case.stage.silent_since is not None)
    seen = len(case.steps())
    await asyncio.sleep(1.0)
    # An engine that knows nothing but the files.
    await case.stage.close()
    case.stage = case.new()
    assert await case.stage.alive(NOWHERE)
    case.far.connection.cut = False
    await case.until(lambda: len(case.steps()) > seen + 20)
    await case.over()
    case.check_done()
    assert case.far.prepared == 1


@pytest.mark.slow
async def test_a_killed_worker_is_seen_and_a_second_start_goes_on_from_its_checkpoint(cases: Cases) -> None:
    case = cases(steps=400)
    await case.start()
    await case.until(lambda: len(case.steps()) > 20)
    state = msgspec.json.decode((case.folder / "state.json").read_bytes(), type=facts.RunState)
    os.kill(state.worker.pid, signal.SIGKILL)
    await case.over()
    await case.start()
    await case.over()
    case.check_done()
    attempts = [fact.attempt for fact in case.facts() if isinstance(fact, facts.Started)]
    assert attempts == [1, 2]


@pytest.mark.slow
async def test_a_killed_node_runner_is_replaced_while_the_worker_goes_on(cases: Cases) -> None:
    case = cases(steps=400)
    await case.start()
    await case.until(lambda: len(case.steps()) > 20)
    runner = msgspec.json.decode((case.there / "node" / "runner.json").read_bytes())
    os.kill(runner["pid"], signal.SIGKILL)
    await case.over()
    case.check_done()
    assert [fact.attempt for fact in case.facts() if isinstance(fact, facts.Started)] == [1]
    assert any("node runner on far had died" in text for _, text in case.stage.take_notes())


@pytest.mark.slow
async def test_a_halt_reaches_the_worker_and_the_next_start_goes_on(cases: Cases) -> None:
    case = cases(steps=400)
    await case.start()
    await case.until(lambda: len(case.steps()) > 20)
    await case.stage.write(case.folder / "inbox" / "halt", b"")
    await case.over()
    assert isinstance(case.facts()[-1], facts.Halted)
    halted_at = len(case.steps())
    assert halted_at < 400
    await case.stage.remove(case.folder / "inbox" / "halt")
    await case.start()
    await case.over()
    case.check_done()


async def test_a_machine_that_does_not_answer_yet_is_waited_for_and_a_halt_ends_the_waiting(cases: Cases) -> None:
    case = cases()
    case.far.connection.cut = True
    await case.start()
    await case.until(lambda: case.stage.silent_since is not None)
    assert ("warning", "far does not answer (far: cut); nothing was started there yet") in case.stage.take_notes()
    await case.stage.write(case.folder / "inbox" / "halt", b"")
    await case.over(5.0)
    assert case.far.prepared == 0


async def test_what_calling_again_does_not_mend_fails_the_stage(cases: Cases) -> None:
    case = cases()

    async def refuse(name: str) -> Site:
        raise NodeUnreachable("far: no key fits", host="far", reason="auth", fix="add the key")

    case.far.leader = refuse  # type: ignore[method-assign]
    await case.start()
    with pytest.raises(JupiterError, match="no key fits"):
        await case.over(5.0)
    assert not await case.stage.alive(NOWHERE)


async def test_a_run_folder_that_is_gone_over_there_is_not_waited_for(cases: Cases) -> None:
    case = cases(steps=4000)
    await case.start()
    await case.until(lambda: len(case.steps()) > 5)
    await case.far.runner.tell(str(case.there / "node"), {"id": "gone", "do": "kill"})
    shutil.rmtree(case.there)
    await case.over(60.0)
    assert any("has nothing of nano-0001-train any more" in text for _, text in case.stage.take_notes())


async def test_what_cannot_be_fetched_again_and_again_fails_the_stage_in_few_words(
    cases: Cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jupiter_engine.cluster.stage._RETRY_S", 0.05)
    case = cases()

    async def refuse(site: Site, at: object) -> None:
        raise RemoteError("the files cannot be read", host="far")

    case.far.fetch = refuse  # type: ignore[method-assign]
    await case.start()
    with pytest.raises(JupiterError, match="cannot be read"):
        await case.over(60.0)
    assert len(case.stage.take_notes()) < 5
