"""One step: what is measured about it, who reads its rows, and how failures travel."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from jupiter_engine.errors import StateError
from jupiter_engine.protocol.shapes import flops_per_token
from jupiter_engine.protocol.specs import HostSpec, LaunchSpec
from jupiter_engine.settings.cluster import launch_spec, load_cluster
from jupiter_engine.training.balance import Balance
from jupiter_engine.training.distributed.hosts import HOSTS_VARIABLE, host_here, hosts_taking_part, micro_batch_sizes
from jupiter_engine.training.loop import Batch, PeerFailed
from jupiter_engine.training.reading import BatchReader
from jupiter_engine.training.step import GroupStep, StepDone
from tests.training.bigram import BigramTrainer, Wire, training
from tests.training.nano import INFO, SEQUENCE, Listener, data, recipe

TOKENS = 50


class Sleeper(BigramTrainer):
    """Takes a known time for everything."""

    lockstep_wanted = False
    seconds = 0.0
    sums = 0.0

    @property
    def lockstep(self) -> bool:
        return self.lockstep_wanted

    def accumulate(self, batch: Batch, scale: float) -> float:
        time.sleep(self.seconds)
        return super().accumulate(batch, scale)

    def reduce(self) -> float:
        time.sleep(self.sums)
        return super().reduce()


def together(trainers: list[Any], act: Any) -> list[Any]:
    """`act(rank, trainer)` in a thread each; returns results or errors."""
    ends: list[Any] = [None] * len(trainers)

    def one(rank: int) -> None:
        try:
            ends[rank] = act(rank, trainers[rank])
        except Exception as error:  # noqa: BLE001 - handed to the test
            ends[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(trainers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return ends


def step(trainer: BigramTrainer, sizes: tuple[int, ...], rows: int = 8, **more: Any) -> GroupStep:
    return GroupStep(recipe(**more), data(rows=rows), trainer, Listener(), Balance(sizes, lockstep=trainer.lockstep))


def test_the_seconds_of_every_rank_are_where_they_were_spent() -> None:
    wire = Wire(2)
    trainers = [Sleeper(wire, rank) for rank in range(2)]
    trainers[0].seconds, trainers[1].seconds = 0.03, 0.01
    for trainer in trainers:
        trainer.sums = 0.05

    def act(rank: int, trainer: Sleeper) -> StepDone:
        group = step(trainer, (2, 4))
        group.compute(0, np.arange(8), TOKENS)
        done = group.apply(1e-3)
        group.close()
        return done

    one, other = together(trainers, act)
    # 4 rows a rank: two micro-batches of 2 for rank 0, one of 4 for rank 1.
    assert one.rows == (4, 4)
    assert (trainers[0].batches, trainers[1].batches) == ([2, 2], [4])
    for name in ("loss", "norm", "compute_seconds", "data_seconds", "communication_seconds", "idle_seconds", "rows"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.compute_seconds == pytest.approx((0.06, 0.01), abs=0.02)
    assert one.idle_seconds == pytest.approx((0.0, 0.05), abs=0.02)
    assert one.communication_seconds == pytest.approx((0.05, 0.05), abs=0.03)
    assert one.peak_bytes == (1000, 1001)
    assert one.seconds > 0.1


def test_ranks_in_lockstep_compute_equally_many_micro_batches() -> None:
    wire, reference = Wire(3), BigramTrainer()
    trainers = [Sleeper(wire, rank) for rank in range(3)]
    for trainer in trainers:
        trainer.lockstep_wanted = True

    def act(rank: int, trainer: BigramTrainer) -> tuple[StepDone, float]:
        group = step(trainer, (1, 4, 4), rows=9) if trainer.ranks == 3 else step(trainer, (9,), rows=9)
        group.compute(0, np.arange(7), TOKENS)
        done = group.apply(1e-3)
        return done, group.measure(data(rows=5, seed=4), np.arange(5))

    ends = together(trainers, act)
    (alone,) = together([reference], act)
    assert ends[0][0].rows == (3, 2, 2)
    assert {len(trainer.batches) for trainer in trainers} == {3}
    assert sorted(trainers[1].batches) == [1, 1, 1]
    assert {len(trainer.measured) for trainer in trainers} == {2}
    assert [end[1] for end in ends] == pytest.approx([alone[1]] * 3)
    for trainer in trainers:
        np.testing.assert_allclose(trainer.table, reference.table, rtol=0, atol=1e-12)


def test_a_rank_in_lockstep_that_fails_does_not_wait_for_ranks_that_wait_within_their_work() -> None:
    trainer = Sleeper(Wire(2), 1)  # nobody is there as rank 0: an exchange would time out
    trainer.lockstep_wanted = True
    trainer.raise_at = 0
    group = step(trainer, (4, 4))
    with pytest.raises(MemoryError):
        group.compute(0, np.arange(8), TOKENS)
    group.close()


def test_a_discarded_step_leaves_no_trace() -> None:
    trainer = BigramTrainer()
    group = step(trainer, (8,))
    group.compute(0, np.arange(8), TOKENS)
    group.discard()
    assert not trainer.table.any()
    with pytest.raises(RuntimeError, match="follow compute"):
        group.apply(1e-3)
    group.compute(0, np.arange(4), TOKENS)
    assert math.isfinite(group.apply(1e-3).norm)


@pytest.mark.parametrize("where", ["apply", "held_out", "check"])
def test_a_failure_anywhere_is_told_to_the_others(where: str) -> None:
    wire = Wire(2)
    trainers = [BigramTrainer(wire, rank) for rank in range(2)]

    def fail(*_: Any) -> None:
        raise MemoryError("no memory")

    if where != "check":
        setattr(trainers[1], where, fail)

    def act(rank: int, trainer: BigramTrainer) -> None:
        group = step(trainer, (4, 4))
        group.compute(0, np.arange(8), TOKENS, check=fail if where == "check" and rank == 1 else None)
        group.apply(1e-3)
        group.measure(data(rows=2), np.arange(2))

    ends = together(trainers, act)
    assert isinstance(ends[1], MemoryError)
    assert isinstance(ends[0], PeerFailed)
    assert "rank 1 failed" in str(ends[0])


def test_a_balance_of_other_ranks_is_refused() -> None:
    with pytest.raises(StateError, match="divided among 2 ranks, 1 take part"):
        step(BigramTrainer(), (4, 4))


# -- reading ---------------------------------------------------------------------------------------------


def test_rows_are_read_while_others_are_computed_and_read_ahead_for_the_next_step() -> None:
    rows = data(rows=24)
    seen: list[str] = []

    class Slow:
        """An array whose rows take 10 ms to read."""

        def __init__(self, array: npt.NDArray[Any]) -> None:
            self._array = array

        def __getitem__(self, wanted: Any) -> Any:
            time.sleep(0.01)
            seen.append(threading.current_thread().name)
            return self._array[wanted]

    class Reading:
        tokens, loss_mask, segments = Slow(rows.tokens), rows.loss_mask, rows.segments

    reader = BatchReader(Reading)  # type: ignore[arg-type]
    parts = [np.arange(start, start + 2) for start in range(0, 12, 2)]
    for mine, following in ((parts[:3], parts[3:]), (parts[3:], [])):
        for part, batch in zip(mine, reader.read(mine, following), strict=True):
            np.testing.assert_array_equal(batch.tokens, rows.tokens[part][:, :-1])
            time.sleep(0.03)
    # Only the very first batch had to be waited for.
    assert 0.005 < reader.waited < 0.02
    assert len(seen) == 6
    assert all(name.startswith("rows") for name in seen)
    # Other rows than were read ahead.
    for part, batch in zip(parts[:1], reader.read(parts[:1], parts[1:2]), strict=True):
        np.testing.assert_array_equal(batch.tokens, rows.tokens[part][:, :-1])
    for part, batch in zip(parts[4:5], reader.read(parts[4:5]), strict=True):
        np.testing.assert_array_equal(batch.tokens, rows.tokens[part][:, :-1])
    reader.close()


def test_a_row_that_cannot_be_read_ends_the_step() -> None:
    group = step(BigramTrainer(), (4,), batch_sequences=4, micro_batch_sequences=4)
    with pytest.raises(IndexError):
        group.compute(0, np.array([0, 99]), TOKENS)


# -- sizes and utilisation -----------------------------------------------------------------------------------


def host(name: str, ranks: int, micro: int = 0) -> HostSpec:
    return HostSpec(
        name=name,
        ssh="",
        ranks=ranks,
        runner=(),
        python="",
        run_folder="",
        addresses=(),
        micro_batch_sequences=micro,
    )


def test_micro_batches_follow_the_hosts_that_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = LaunchSpec(twin="torch", ranks=4, hosts=(host("a", 1), host("b", 2, 3), host("c", 1, 5)))
    wanted = recipe(micro_batch_sequences=8, batch_sequences=32)
    assert micro_batch_sizes(launch, wanted, 4, ()) == [8, 3, 3, 5]
    monkeypatch.setenv(HOSTS_VARIABLE, "a,c")
    assert micro_batch_sizes(launch, wanted, 2, hosts_taking_part()) == [8, 5]
    assert micro_batch_sizes(LaunchSpec(twin="torch", ranks=3), wanted, 3, ()) == [8, 8, 8]
    with pytest.raises(StateError, match="3 ranks take part, their hosts should have 2"):
        micro_batch_sizes(launch, wanted, 3, hosts_taking_part())


def test_a_process_knows_its_host_by_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = LaunchSpec(twin="torch", ranks=4, hosts=(host("a", 1), host("b", 2, 3), host("c", 1, 5)))
    assert host_here(LaunchSpec(twin="torch")) is None
    assert host_here(launch) == launch.hosts[0]
    monkeypatch.setenv(HOSTS_VARIABLE, "a,b,c")
    for variable in ("RANK", "MLX_RANK"):
        found = []
        for rank in range(4):
            monkeypatch.setenv(variable, str(rank))
            found.append(host_here(launch))
        assert [one.name for one in found if one is not None] == ["a", "b", "b", "c"]
        monkeypatch.delenv(variable)
    monkeypatch.setenv(HOSTS_VARIABLE, "a,c")
    monkeypatch.setenv("RANK", "1")
    assert host_here(launch) == launch.hosts[2]
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(StateError, match="have 2 ranks"):
        host_here(launch)


def test_a_rank_that_is_given_more_rows_computes_no_more_at_once_than_an_equal_share() -> None:
    launch = LaunchSpec(twin="torch", ranks=2)
    sizes = micro_batch_sizes(launch, recipe(micro_batch_sequences=8, batch_sequences=8), 2, ())
    balance = Balance(sizes)
    for _ in range(3):
        balance.observe((1.0, 4.0), balance.counts(8))
    assert balance.counts(8) == (7, 1)
    assert [len(part) for part in balance.parts(np.arange(8), 0)] == [4, 3]


@pytest.mark.parametrize(("own", "batches"), [(0, [4, 4]), (3, [3, 3, 2])])
def test_a_machine_that_trains_alone_computes_its_own_number_at_once(
    own: int, batches: list[int], tmp_path: Path
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(f"nodes: [{{host: localhost, device_type: cpu, micro_batch_sequences: {own}}}]\n")
    launch = launch_spec(load_cluster(file).value)
    sizes = micro_batch_sizes(launch, recipe(micro_batch_sequences=4, batch_sequences=8), 1, ())
    trainer = BigramTrainer()
    step(trainer, tuple(sizes)).compute(0, np.arange(8), TOKENS)
    assert trainer.batches == batches


def test_utilisation_is_the_needed_arithmetic_over_the_peaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener()
    training(recipe(steps=2), BigramTrainer(), tmp_path / "a", listener).run()
    assert listener.metrics[0].mfu is None
    monkeypatch.setattr(BigramTrainer, "peak_flops", lambda _: 2e9)
    training(recipe(steps=2), BigramTrainer(), tmp_path / "b", listener := Listener()).run()
    training(recipe(steps=2, update="lora"), BigramTrainer(), tmp_path / "c", adapters := Listener()).run()
    for found, passes in ((listener, 3.0), (adapters, 2.0)):
        metric = found.metrics[1]
        needed = 8 * SEQUENCE * passes * flops_per_token(INFO, SEQUENCE)
        assert metric.mfu == pytest.approx(needed / metric.seconds / 2e9)
