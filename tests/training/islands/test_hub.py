"""The hub against islands made of files: damaged, doubled, late and stale contributions, quorum, takeover, clipping."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from jupiter_engine.checkpoints.tensors import FileRecord
from jupiter_engine.files import sha256_file, write_json
from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.specs import RoundSpec
from jupiter_engine.training.distributed.islands import exchange, outer
from jupiter_engine.training.distributed.islands import hub as module
from jupiter_engine.training.distributed.islands.hub import Hub, HubRun
from jupiter_engine.training.distributed.islands.lead import Lead
from jupiter_engine.training.distributed.islands.ledger import Deposed, LeadTaken, Ledger, Offer, blocks_of
from jupiter_engine.training.distributed.islands.payload import Payload, of_arrays, shapes_of, write_payload

pytestmark = pytest.mark.timeout(120)

TOKENS = [10 + block for block in range(12)]
START = {"w": np.ones((8, 4), dtype=np.float32), "n": np.full(3, 2.0, dtype=np.float32)}


@dataclass
class Listener:
    metrics: list[Metric] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    halt: bool = False

    def metric(self, metric: Metric) -> None:
        self.metrics.append(metric)

    def progress(self, done: int, total: int, note: str) -> None: ...

    def note(self, text: str, level: str = "info") -> None:
        self.notes.append(text)

    def halt_asked(self) -> bool:
        return self.halt


class Running:
    """A hub at work in a thread of its own."""

    def __init__(self, folder: Path, islands: tuple[str, ...], spec: RoundSpec, owner: str = "hub") -> None:
        self.folder, self.islands, self.spec, self.owner = folder, islands, spec, owner
        self.listener = Listener()
        self.hub: Hub | None = None
        self.done: bool | None = None
        self.error: Exception | None = None
        self.asleep = threading.Event()
        """While set, the hub does nothing: a process that was stopped."""
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        run = HubRun(
            identity="run",
            tokens=TOKENS,
            block_inputs=16,
            shapes=shapes_of(START),
            start=of_arrays(START),
            islands=self.islands,
            spec=self.spec,
        )
        try:
            hub = Hub(self.folder, run, self.listener, owner=self.owner, tend=self._tend)
            self.hub = hub
            try:
                self.done = hub.run()
            finally:
                hub.close()
        except Exception as error:  # noqa: BLE001 - handed to the test
            self.error = error

    def _tend(self) -> None:
        while self.asleep.is_set():
            time.sleep(0.02)

    def stop(self) -> None:
        self.asleep.clear()
        self.listener.halt = True
        self.thread.join(timeout=20)

    def finished(self) -> bool:
        """Wait for the end; whether every block was merged."""
        self.thread.join(timeout=60)
        if self.error is not None:
            raise self.error
        assert self.done is not None, self.listener.notes
        return self.done


class Made:
    """An island made of files: it moves every weight by `delta` a block."""

    def __init__(self, folder: Path, name: str, delta: float = -0.01) -> None:
        self.exchange, self.name, self.delta = folder / "exchange", name, delta
        self.beats = 0
        exchange.make_folders(self.exchange)

    def beat(self, number: int = 0) -> None:
        self.beats += 1
        here = exchange.Here(island=self.name, beat=self.beats, round=number, used=0, waiting=True)
        write_json(exchange.here_path(self.exchange, self.name), here)

    def plan(self, at_least: int = 1) -> exchange.Plan:
        """The newest plan, once it has a lease for this island."""

        def ready() -> exchange.Plan | None:
            self.beat()
            plan = exchange.newest_plan(self.exchange)
            return plan if plan is not None and plan.round >= at_least and self.name in plan.leases else None

        found: exchange.Plan = wait_for(ready)
        return found

    def offer(self, plan: exchange.Plan, used: int, attempt: int = 1, **changes: object) -> exchange.Up:
        lease = plan.leases[self.name]
        blocks = blocks_of(lease.blocks)[:used]
        base = Payload(exchange.round_folder(self.exchange, plan.round) / exchange.BASE)
        weights = {name: base.array(name) - np.float32(self.delta * used) for name in base.shapes}
        part = exchange.up_folder(self.exchange, plan.round) / f"{self.name}.{attempt}.safetensors.part"
        record = outer.write_contribution(base, weights, part, "float32")
        tokens = sum(TOKENS[block] for block in blocks)
        offer = Offer(
            round=plan.round,
            island=self.name,
            attempt=attempt,
            lease=lease.lease,
            fence=lease.fence,
            base_sha256=plan.base.sha256,
            file=record,
            used=used,
            tokens=tokens,
        )
        return exchange.Up(
            offer=msgspec.structs.replace(offer, **changes),
            steps=used,
            loss_sum=2.0 * tokens,
            grad_norm=1.0,
            learning_rate=0.1,
            seconds=0.5,
            versions={},
        )

    def put(self, up: exchange.Up) -> None:
        part = exchange.up_folder(self.exchange, up.offer.round) / (f"{self.name}.{up.offer.attempt}.safetensors.part")
        exchange.put_up(self.exchange, up, part)

    def contribute(self, plan: exchange.Plan, used: int, attempt: int = 1, **changes: object) -> exchange.Up:
        up = self.offer(plan, used, attempt, **changes)
        self.put(up)
        return up

    def finish(self, running: Running) -> None:
        """Do whatever is left."""
        number = 1
        while running.thread.is_alive():
            self.beat()
            plan = exchange.newest_plan(self.exchange)
            if plan is None or plan.round < number or self.name not in plan.leases:
                time.sleep(0.02)
                continue
            if not exchange.attempts(self.exchange, plan.round).get((self.name, 99)):
                self.contribute(plan, len(blocks_of(plan.leases[self.name].blocks)), 99)
            number = plan.round + 1


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 30
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def audit(folder: Path) -> None:
    ledger = Ledger(folder / "rounds.db")
    assert [block for block, *_ in ledger.merges()] == list(range(len(TOKENS)))
    assert ledger.totals().tokens_merged == sum(TOKENS)
    ledger.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    hubs: list[Running] = []

    def begin(*islands: str, owner: str = "hub", **spec: object) -> Running:
        settings = {"round_s": 60.0, "grace_s": 60.0, "payload": "float32", "outer_learning_rate": 1.0, **spec}
        made = Running(tmp_path, islands, msgspec.convert(settings, RoundSpec), owner)
        hubs.append(made)
        return made

    yield begin
    for running in hubs:
        running.stop()


def verdict(folder: Path, number: int, island: str, attempt: int) -> str:
    ledger = Ledger(folder / "rounds.db")
    found = ledger.verdicts().get((number, island, attempt))
    ledger.close()
    return str(found[0]) if found else ""


def test_a_round_merges_by_tokens_and_moves_the_base(start: Callable[..., Running], tmp_path: Path) -> None:
    running = start("a", "b", outer_momentum=0.0, clip_norm_factor=100.0)
    a, b = Made(tmp_path, "a", -0.01), Made(tmp_path, "b", -0.01)
    plan_a, plan_b = a.plan(), b.plan()
    plan_b = b.plan()
    assert plan_a.leases["a"].blocks == ((0, 6),)
    ups = [a.contribute(plan_a, 2), b.contribute(plan_b, 2)]
    plan = a.plan(2)
    assert plan.tokens_done == sum(up.offer.tokens for up in ups)
    base = Payload(exchange.round_folder(a.exchange, 2) / exchange.BASE)
    # Both moved by the same: the mean is that, whatever the weights are.
    np.testing.assert_allclose(base.array("w"), START["w"] + 0.02, rtol=0, atol=1e-6)
    assert running.listener.metrics[0].step == 4
    assert running.listener.metrics[0].loss == pytest.approx(2.0)
    # What was lent but not used is lent again.
    assert {block for lease in (plan.leases["a"],) for block in blocks_of(lease.blocks)} <= {2, 3, 4, 5, 8, 9, 10, 11}


def test_a_damaged_upload_is_refused_told_to_the_island_and_nothing_is_lost(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    running = start("a")
    island = Made(tmp_path, "a")
    plan = island.plan()
    up = island.offer(plan, 5)
    part = exchange.up_folder(island.exchange, 1) / "a.1.safetensors.part"
    part.write_bytes(part.read_bytes()[:-7])
    island.put(up)
    wait_for(lambda: (found := exchange.newest_plan(island.exchange)) and found.refused.get("a") == 1)
    assert verdict(tmp_path, 1, "a", 1) == "refused"
    assert any("bytes" in note for note in running.listener.notes)
    island.contribute(plan, 5, 2)
    assert island.plan(2).tokens_done == sum(TOKENS[:5])
    island.finish(running)
    assert running.finished()
    audit(tmp_path)


@pytest.mark.parametrize("how", ["nan", "tensors", "tokens", "base"])
def test_contributions_that_cannot_be_true_are_refused(how: str, start: Callable[..., Running], tmp_path: Path) -> None:
    running = start("a")
    island = Made(tmp_path, "a", float("nan") if how == "nan" else -0.01)
    plan = island.plan()
    told: dict[str, dict[str, Any]] = {"tokens": {"tokens": 7}, "base": {"base_sha256": "0" * 64}}
    changes = told.get(how, {})
    up = island.offer(plan, 3, **changes)
    if how == "tensors":
        part = exchange.up_folder(island.exchange, 1) / "a.1.safetensors.part"
        write_payload(part, {"w": (2,)}, "float32", of_arrays({"w": np.zeros(2)}))
        record = FileRecord(sha256=sha256_file(part), bytes=part.stat().st_size)
        up = msgspec.structs.replace(up, offer=msgspec.structs.replace(up.offer, file=record))
    island.put(up)
    wait_for(lambda: verdict(tmp_path, 1, "a", 1) == "refused")
    island.delta = -0.01
    island.contribute(plan, 3, 2)
    island.finish(running)
    assert running.finished()
    audit(tmp_path)


def test_attempts_of_one_island_count_once_and_the_longest_counts(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    running = start("a", "b", quorum=2)
    a, b = Made(tmp_path, "a"), Made(tmp_path, "b")
    plan, _ = a.plan(), b.plan()
    a.contribute(plan, 2, 1)
    a.contribute(plan, 4, 2)
    wait_for(lambda: verdict(tmp_path, 1, "a", 2) == "held")
    # The same file again, word for word.
    write_json(
        exchange.ok_path(a.exchange, 1, "a", 1), exchange.read(exchange.ok_path(a.exchange, 1, "a", 1), exchange.Up)
    )
    b.contribute(b.plan(), 1)
    assert a.plan(2).tokens_done == sum(TOKENS[:4]) + TOKENS[6]
    assert (verdict(tmp_path, 1, "a", 1), verdict(tmp_path, 1, "a", 2)) == ("superseded", "merged")
    running.stop()


def test_quorum_and_grace_leave_the_late_one_out_and_its_data_comes_back(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    running = start("a", "b", round_s=0.5, grace_s=0.5, quorum=1)
    a, b = Made(tmp_path, "a"), Made(tmp_path, "b")
    plan_a, plan_b = a.plan(), b.plan()
    a.contribute(plan_a, 6)
    second = a.plan(2)
    assert second.tokens_done == sum(TOKENS[:6])
    b.contribute(plan_b, 3)
    wait_for(lambda: verdict(tmp_path, 1, "b", 1) == "stale")
    assert any("late for round 1" in note or "merged without b" in note for note in running.listener.notes)
    a.finish(running)
    assert running.finished()
    audit(tmp_path)


def test_the_quorum_is_waited_for_however_long(start: Callable[..., Running], tmp_path: Path) -> None:
    running = start("a", "b", round_s=0.2, grace_s=0.2, quorum=2)
    a, b = Made(tmp_path, "a"), Made(tmp_path, "b")
    plan, other = a.plan(), b.plan()
    a.contribute(plan, 2)
    wait_for(lambda: any("1 of at least 2" in note for note in running.listener.notes))
    assert exchange.newest_plan(a.exchange).round == 1  # type: ignore[union-attr]
    b.contribute(other, 2)
    assert a.plan(2).tokens_done == sum(TOKENS[0:2]) + sum(TOKENS[6:8])


def test_a_hub_that_slept_through_a_takeover_changes_nothing_any_more(
    start: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LEAD_S", 0.4)
    monkeypatch.setattr(Lead, "_work", lambda _: None)
    old = start("a", owner="old")
    island = Made(tmp_path, "a")
    plan = island.plan()
    old.asleep.set()
    time.sleep(0.6)
    new = start("a", owner="new")
    wait_for(lambda: (found := exchange.newest_plan(island.exchange)) and found.fence > plan.fence)
    # The lease of the old hub's round is still the island's.
    again = exchange.newest_plan(island.exchange)
    assert again is not None
    assert again.leases["a"] == plan.leases["a"]
    island.contribute(plan, 4)
    assert island.plan(2).fence == again.fence
    old.asleep.clear()
    old.thread.join(timeout=20)
    assert isinstance(old.error, Deposed)
    island.finish(new)
    assert new.finished()
    audit(tmp_path)


def test_a_hub_that_wakes_to_a_halt_after_a_takeover_elsewhere_says_no_end(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    old = start("a", owner="old")
    island = Made(tmp_path, "a")
    plan = island.plan()
    old.asleep.set()
    time.sleep(0.3)
    # The other hub has a ledger of its own: only the island's machine tells.
    (island.exchange / exchange.FENCE).write_text(f"{plan.fence + 1}\n")
    old.stop()
    assert isinstance(old.error, Deposed)
    assert not (island.exchange / exchange.END).exists()


def test_files_beside_the_state_folders_disturb_nothing(start: Callable[..., Running], tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / ".DS_Store").touch()
    running = start("a")
    Made(tmp_path, "a").finish(running)
    assert running.finished()
    audit(tmp_path)


def test_the_trouble_of_a_line_is_told_once(start: Callable[..., Running], tmp_path: Path) -> None:
    running = start("a")
    Made(tmp_path, "a").plan()
    assert running.hub is not None
    line = running.hub._carriers["a"]
    for problem in ("no route", "no route still", "", "no route"):
        line.problem = problem
        time.sleep(0.5)
    told = [note for note in running.listener.notes if "island a" in note or "Island a" in note]
    trouble = "Nothing can be carried to or from island a: no route"
    assert told == [trouble, "Island a is reached again", trouble]


def test_what_only_the_dead_hold_goes_to_the_living(
    start: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ALIVE_S", 1.0)
    first = start("b", owner="hub")
    dead = Made(tmp_path, "b")
    plan = dead.plan()
    assert plan.leases["b"].blocks == ((0, 12),)
    first.stop()
    second = start("a", "b", round_s=0.5, grace_s=0.5, quorum=1)
    island = Made(tmp_path, "a")
    anew = island.plan()
    assert (anew.round, anew.leases["a"].blocks) == (1, ((0, 12),))
    assert "Round 1: nothing is heard of b; others get its data" in second.listener.notes
    # It was not dead after all.
    dead.contribute(plan, 3)
    wait_for(lambda: verdict(tmp_path, 1, "b", 1) == "refused")
    island.finish(second)
    assert second.finished()
    audit(tmp_path)


def test_an_island_behind_a_slow_line_is_waited_for_from_the_next_round_on(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    running = start("a", "b", round_s=4.0, grace_s=0.2, quorum=1, outer_momentum=0.0, clip_norm_factor=100.0)
    a, b = Made(tmp_path, "a"), Made(tmp_path, "b")
    plan_a, plan_b = a.plan(), b.plan()
    a.contribute(plan_a, 1)
    b.plan(2)
    b.contribute(plan_b, 1)
    wait_for(lambda: verdict(tmp_path, 1, "b", 1) == "stale")
    plan_a, plan_b = a.plan(2), b.plan(2)
    began = time.monotonic()
    a.contribute(plan_a, 1)
    while time.monotonic() - began < 5.0:
        b.beat()
        time.sleep(0.1)
    # Longer than a round and its grace.
    assert verdict(tmp_path, 2, "a", 1) == "held"
    b.contribute(plan_b, 1)
    b.plan(3)
    assert verdict(tmp_path, 2, "b", 1) == "merged"
    running.stop()


def test_two_hubs_do_not_lead_at_once(start: Callable[..., Running], tmp_path: Path) -> None:
    first = start("a", owner="one")
    Made(tmp_path, "a").plan()
    second = start("a", owner="two")
    second.thread.join(timeout=20)
    assert isinstance(second.error, LeadTaken)
    assert first.error is None


def test_a_contribution_by_a_stale_fence_is_not_taken(start: Callable[..., Running], tmp_path: Path) -> None:
    running = start("a")
    island = Made(tmp_path, "a")
    plan = island.plan()
    island.contribute(plan, 4, fence=plan.leases["a"].fence + 1)
    wait_for(lambda: verdict(tmp_path, 1, "a", 1) == "stale")
    island.finish(running)
    assert running.finished()
    audit(tmp_path)


def test_one_far_above_the_median_is_left_out_and_its_data_comes_back(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    running = start("a", "b", "c", quorum=3)
    made = [Made(tmp_path, "a", -0.01), Made(tmp_path, "b", -0.01), Made(tmp_path, "c", -5.0)]
    plans = [island.plan() for island in made]
    for island, plan in zip(made, plans, strict=True):
        island.contribute(plan, 2)
    plan = made[0].plan(2)
    assert verdict(tmp_path, 1, "c", 1) == "refused"
    assert plan.tokens_done == sum(
        TOKENS[block] for p, i in zip(plans[:2], "ab", strict=True) for block in blocks_of(p.leases[i].blocks)[:2]
    )
    assert any("exceeds" in note for note in running.listener.notes)


def test_an_island_that_makes_more_steps_is_no_runaway(start: Callable[..., Running], tmp_path: Path) -> None:
    start("a", "b", "c", quorum=3)
    made = [Made(tmp_path, name) for name in "abc"]
    plans = [island.plan() for island in made]
    # Its change is four times that of the others.
    for island, plan, used in zip(made, plans, (1, 1, 4), strict=True):
        island.contribute(plan, used)
    made[0].plan(2)
    assert [verdict(tmp_path, 1, name, 1) for name in "abc"] == ["merged"] * 3


@pytest.mark.parametrize("how", ["damaged", "file gone", "message gone"])
def test_what_a_hub_had_taken_in_and_its_disk_lost_is_offered_again(
    how: str, start: Callable[..., Running], tmp_path: Path
) -> None:
    first = start("a", "b", quorum=2, owner="one")
    a, b = Made(tmp_path, "a"), Made(tmp_path, "b")
    plan, _ = a.plan(), b.plan()
    a.contribute(plan, 2)
    wait_for(lambda: verdict(tmp_path, 1, "a", 1) == "held")
    first.listener.halt = True
    assert not first.finished()
    file = exchange.contribution_path(a.exchange, 1, "a", 1)
    if how == "damaged":
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "file gone":
        file.unlink()
    else:
        file.with_suffix(".ok.json").unlink()
    second = start("a", "b", quorum=2, owner="one")
    told = wait_for(lambda: (found := exchange.newest_plan(a.exchange)) and found.refused.get("a") == 1 and found)
    assert verdict(tmp_path, 1, "a", 1) == "refused"
    # A hub that starts later still says so.
    second.listener.halt = True
    assert not second.finished()
    start("a", "b", quorum=2, owner="one")
    wait_for(lambda: a.plan().fence > told.fence)
    assert a.plan().refused == {"a": 1}
    a.contribute(a.plan(), 2, 2)
    b.contribute(b.plan(), 2)
    a.plan(2)
    assert [verdict(tmp_path, 1, "a", 1), verdict(tmp_path, 1, "a", 2)] == ["refused", "merged"]


def test_a_halted_hub_goes_on_with_the_open_round(start: Callable[..., Running], tmp_path: Path) -> None:
    first = start("a", owner="one")
    island = Made(tmp_path, "a")
    plan = island.plan()
    first.listener.halt = True
    assert not first.finished()
    end = exchange.read(island.exchange / exchange.END, exchange.End)
    assert end == exchange.End(reason="halted", fence=plan.fence)
    second = start("a", owner="one")
    again = island.plan()
    assert (again.round, again.leases["a"].blocks) == (1, plan.leases["a"].blocks)
    island.finish(second)
    assert second.finished()
    audit(tmp_path)
