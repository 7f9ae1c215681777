"""What an island does next, from its exchange folder and the clock."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from jupiter_engine.checkpoints.tensors import FileRecord
from jupiter_engine.files import write_json
from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.orders import IslandOrder
from jupiter_engine.protocol.specs import RoundSpec
from jupiter_engine.training.distributed.islands import exchange, pace
from jupiter_engine.training.distributed.islands.pace import Act, Pace, Sitting
from jupiter_engine.training.distributed.islands.payload import Payload, of_arrays, shapes_of, write_payload

BASE = {"w": np.ones((3, 4), dtype=np.float32)}


class Reporter:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.halt = False
        self.waited = 0

    def begun(self, step: int) -> None: ...

    def metric(self, metric: Metric) -> None: ...

    def progress(self, done: int, total: int, note: str) -> None: ...

    def at(self, step: int, *, waiting: bool) -> None: ...

    def alive(self) -> None:
        self.waited += 1

    def note(self, text: str, level: str = "info") -> None:
        self.notes.append(text)

    def halt_asked(self) -> bool:
        return self.halt


class Clock:
    """time.monotonic of the module under test; sleeping moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("jupiter_engine.training.distributed.islands.pace.time.monotonic", lambda: self.now)
        monkeypatch.setattr("jupiter_engine.training.distributed.islands.pace.time.sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def publish(folder: Path, number: int, *, name: str = "a", fence: int = 1, **changes: object) -> exchange.Plan:
    made = exchange.round_folder(folder, number)
    made.mkdir(parents=True, exist_ok=True)
    record: FileRecord = write_payload(made / exchange.BASE, shapes_of(BASE), "float32", of_arrays(BASE))
    lease = exchange.PlannedLease(lease=number, fence=fence, blocks=((0, 4), (7, 9)), share=0.5)
    plan = exchange.Plan(
        round=number,
        fence=fence,
        base=record,
        deadline_s=10.0,
        max_steps=0,
        patience_s=5.0,
        tokens_done=100,
        tokens_total=1000,
        leases={name: lease},
    )
    plan = msgspec.structs.replace(plan, **changes)
    write_json(made / exchange.PLAN, plan)
    return plan


class Table:
    """An island that follows its pace, without training anything."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.folder, self.clock = folder, clock
        self.reporter = Reporter()
        self.pace = Pace(folder, "a", 2, self.reporter)
        self.sitting: Sitting | None = None

    def next(self, *, step_s: float = 1.0) -> Act:
        act = self.pace.decide(self.sitting)
        if act is Act.JOIN:
            assert self.pace.plan is not None
            self.sitting = pace.sitting_of(self.pace.plan, self.pace.plan.leases["a"], None)
        elif act is Act.STEP:
            assert self.sitting is not None
            self.sitting.used += 1
            self.clock.now += step_s
        elif act is Act.OFFER:
            assert self.sitting is not None
            self.sitting.offered, self.sitting.offered_at = self.sitting.used, self.clock.now
            self.sitting.attempt += 1
        return act

    def until(self, act: Act, *, step_s: float = 1.0) -> list[Act]:
        acts: list[Act] = []
        for _ in range(1000):
            acts.append(self.next(step_s=step_s))
            if acts[-1] is act:
                return acts
        raise AssertionError(acts[-5:])


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    return Table(tmp_path, Clock(monkeypatch))


def test_it_waits_joins_trains_to_the_deadline_offers_and_waits(table: Table) -> None:
    assert [table.next(), table.next()] == [Act.WAIT, Act.WAIT]
    assert table.reporter.waited == 2
    publish(table.folder, 1)
    # 4 s a step: the first boundary after 10 s is that of the third.
    assert table.until(Act.WAIT, step_s=4.0) == [Act.JOIN, Act.STEP, Act.STEP, Act.STEP, Act.OFFER, Act.WAIT]
    here = exchange.read(exchange.here_path(table.folder, "a"), exchange.Here)
    assert here is not None
    assert (here.round, here.used, here.waiting) == (1, 3, True)


def test_a_lease_that_is_used_up_is_offered_at_once_and_a_step_is_always_made(table: Table) -> None:
    publish(table.folder, 1)
    assert table.until(Act.OFFER, step_s=0.1).count(Act.STEP) == 6
    publish(table.folder, 2)
    assert table.until(Act.OFFER, step_s=100.0) == [Act.JOIN, Act.STEP, Act.OFFER]


def test_max_steps_ends_a_round_early(table: Table) -> None:
    publish(table.folder, 1, max_steps=2)
    assert table.until(Act.OFFER, step_s=0.1) == [Act.JOIN, Act.STEP, Act.STEP, Act.OFFER]


def test_a_newer_base_ends_the_round_whatever_is_under_way(table: Table) -> None:
    publish(table.folder, 1)
    assert [table.next(), table.next()] == [Act.JOIN, Act.STEP]
    publish(table.folder, 2)
    assert [table.next(), table.next()] == [Act.JOIN, Act.STEP]
    # One without data for this island is waited out.
    publish(table.folder, 3, name="other")
    assert table.next() is Act.WAIT


def test_without_a_hub_it_goes_on_so_often_and_then_waits(table: Table) -> None:
    publish(table.folder, 1)
    acts = table.until(Act.OFFER, step_s=6.0)
    assert acts.count(Act.STEP) == 2
    acts = table.until(Act.OFFER, step_s=6.0)
    assert acts.count(Act.STEP) == 2
    assert acts.count(Act.WAIT) >= 10  # 5 s of patience
    assert table.until(Act.OFFER, step_s=6.0).count(Act.STEP) == 2
    assert "by itself (2 of at most 2 rounds)" in table.reporter.notes[-1]
    assert {table.next() for _ in range(100)} == {Act.WAIT}


def test_after_long_alone_it_comes_to_rest(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_ABANDONED_S", 60.0)
    publish(table.folder, 1)
    acts = table.until(Act.HALT)
    assert acts.count(Act.STEP) == 6
    assert table.clock.now > 160.0


def test_what_could_not_be_taken_is_offered_again_but_not_for_ever(table: Table) -> None:
    plan = publish(table.folder, 1)
    table.until(Act.OFFER)
    for attempt in (1, 2, 3):
        assert table.next() is Act.WAIT
        write_json(
            exchange.round_folder(table.folder, 1) / exchange.PLAN,
            msgspec.structs.replace(plan, refused={"a": attempt}),
        )
        assert table.next() is Act.OFFER
    write_json(exchange.round_folder(table.folder, 1) / exchange.PLAN, msgspec.structs.replace(plan, refused={"a": 9}))
    assert table.next() is Act.WAIT


def test_a_plan_of_a_lower_fence_than_was_seen_is_not_followed(table: Table) -> None:
    publish(table.folder, 1, fence=5)
    assert table.next() is Act.JOIN
    publish(table.folder, 2, fence=4)
    assert table.next() is Act.STEP
    publish(table.folder, 2, fence=5)
    assert table.next() is Act.JOIN


def test_the_same_lease_of_a_ledger_that_was_begun_anew_is_another(table: Table) -> None:
    publish(table.folder, 1, fence=5)
    assert [table.next(), table.next()] == [Act.JOIN, Act.STEP]
    publish(table.folder, 1, fence=6)
    assert table.next() is Act.JOIN
    assert table.sitting is not None
    assert (table.sitting.fence, table.sitting.used) == (6, 0)


def test_the_end_and_a_halt_are_heard(table: Table) -> None:
    publish(table.folder, 1)
    table.next()
    # That of a hub which was replaced is not.
    write_json(table.folder / exchange.END, exchange.End(reason="halted", fence=0))
    assert table.next() is Act.STEP
    write_json(table.folder / exchange.END, exchange.End(reason="done", fence=1))
    assert table.next() is Act.END
    write_json(table.folder / exchange.END, exchange.End(reason="halted", fence=1))
    assert table.next() is Act.HALT
    (table.folder / exchange.END).unlink()
    table.reporter.halt = True
    assert table.next() is Act.HALT


def test_the_other_ranks_get_the_same_round(tmp_path: Path) -> None:
    plan = publish(tmp_path, 3)
    lease = plan.leases["a"]
    place = pace.Place(
        round=3,
        base_sha256=plan.base.sha256,
        lease=3,
        fence=1,
        used=2,
        tokens=55,
        loss_sum=1.0,
        norm_sum=2.0,
        learning_rate=0.1,
        seconds=4.0,
    )
    first = pace.sitting_of(plan, lease, None, place)
    other = pace.decode(pace.encode(plan, lease, place))
    for name in ("round", "lease", "fence", "blocks", "share", "tokens_done", "tokens_total", "used", "tokens"):
        assert getattr(first, name) == getattr(other, name)
    assert first.blocks == [0, 1, 2, 3, 7, 8]
    assert first.place().used == 2


def test_a_checkpoint_goes_on_in_its_own_round_only(tmp_path: Path) -> None:
    plan = publish(tmp_path, 3)
    place = pace.sitting_of(plan, plan.leases["a"], None).place()
    assert pace.resume(place, tmp_path, "a") == (plan, plan.leases["a"])
    assert pace.resume(msgspec.structs.replace(place, lease=9), tmp_path, "a") is None
    assert pace.resume(msgspec.structs.replace(place, fence=9), tmp_path, "a") is None
    assert pace.resume(place, tmp_path, "b") is None
    publish(tmp_path, 4)
    assert pace.resume(place, tmp_path, "a") is None
    assert pace.resume(None, tmp_path, "a") is None


def test_an_offer_never_takes_a_name_that_was_used(tmp_path: Path) -> None:
    plan = publish(tmp_path, 1)
    order = IslandOrder(name="a", exchange="", rounds=RoundSpec(payload="float32"))
    base = Payload(exchange.round_folder(tmp_path, 1) / exchange.BASE)
    up = exchange.up_folder(tmp_path, 1)
    up.mkdir()
    # What a killed process left, and another island's.
    (up / "a.4.safetensors.part").touch()
    (up / "ab.9.safetensors").touch()
    sitting = pace.sitting_of(plan, plan.leases["a"], base)
    sitting.used, sitting.tokens = 2, 30
    weights = {"w": BASE["w"] - np.float32(0.25)}
    pace.write_offer(tmp_path, order, sitting, weights, {})
    assert sitting.attempt == 5
    found = exchange.read(exchange.ok_path(tmp_path, 1, "a", 5), exchange.Up)
    assert found is not None
    assert (found.offer.used, found.offer.tokens, found.offer.lease) == (2, 30, 1)
    np.testing.assert_array_equal(Payload(up / "a.5.safetensors").array("w"), np.full((3, 4), 0.25, dtype=np.float32))


def test_places_are_kept_by_step(tmp_path: Path) -> None:
    plan = publish(tmp_path, 1)
    book = pace.PlaceBook(tmp_path)
    for step in range(100):
        sitting = pace.sitting_of(plan, plan.leases["a"], None)
        sitting.used = step % 6
        book.put(step, sitting.place())
    known = exchange.read(tmp_path / "places.json", pace.Places)
    assert known is not None
    assert sorted(known.by_step) == list(range(50, 100))
    assert known.by_step[57].used == 3
    assert book.of(None) is None
