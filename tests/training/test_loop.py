"""The loop with a small exact model in numpy: what a step is, whatever ranks and micro-batches do."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.checkpoints.store import CheckpointStore
from jupiter_engine.errors import DiskFull, Diverged, StateError
from jupiter_engine.protocol.specs import Recipe, SpikeGuardSpec
from jupiter_engine.training.loop import Batch, Outcome, PeerFailed, Training, TrainingData, recipe_sha256
from tests.training.nano import IDENTITY, INFO, WORLD, Listener, data, recipe


class Wire:
    """Connects trainers that run in threads, as a group of ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._barrier = threading.Barrier(ranks, timeout=20)
        self._slots: list[Any] = [None] * ranks

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._slots[rank] = value
        self._barrier.wait()
        everything = list(self._slots)
        self._barrier.wait()
        return everything


class BigramTrainer:
    """A bigram table trained by plain gradient descent in float64; counts what it is asked."""

    def __init__(self, wire: Wire | None = None, rank: int = 0) -> None:
        self._wire, self._rank = wire or Wire(1), rank
        self.table = np.zeros((INFO.vocab_size, INFO.vocab_size))
        self.gradient = np.zeros_like(self.table)
        self.batches: list[int] = []
        self.rates: list[float] = []
        self.poison_at = -1
        self.poison_row = -1
        """A batch with the row that begins with this token has no finite loss."""
        self.raise_at = -1
        self.measured: list[int] = []

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def ranks(self) -> int:
        return self._wire.ranks

    def accumulate(self, batch: Batch, scale: float) -> float:
        if len(self.rates) == self.raise_at:
            raise MemoryError("no memory for this batch")
        self.batches.append(len(batch.tokens))
        inputs, targets = batch.tokens[batch.counted], batch.targets[batch.counted]
        logits = self.table[inputs]
        log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        slopes = np.exp(log_probabilities)
        slopes[np.arange(len(targets)), targets] -= 1.0
        np.add.at(self.gradient, inputs, scale * slopes)
        loss = -float(log_probabilities[np.arange(len(targets)), targets].sum())
        return math.nan if len(self.rates) == self.poison_at else loss

    @property
    def lockstep(self) -> bool:
        return False

    def held_out(self, batch: Batch) -> float:
        self.measured.append(len(batch.tokens))
        inputs, targets = batch.tokens[batch.counted], batch.targets[batch.counted]
        logits = self.table[inputs]
        log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -float(log_probabilities[np.arange(len(targets)), targets].sum())

    def discard(self) -> None:
        self.gradient[:] = 0.0

    def weights(self) -> dict[str, npt.NDArray[np.float32]] | None:
        return {"table": self.table.astype(np.float32)} if self._rank == 0 else None

    def adopt(self, weights: Mapping[str, npt.NDArray[Any]] | None) -> None:
        self.table = np.array(self._wire.gather(self._rank, weights)[0]["table"], dtype=np.float64)

    def peak_bytes(self) -> int:
        return 1000 + self._rank

    def peak_flops(self) -> float | None:
        return None

    def exchange(self, row: Sequence[float]) -> npt.NDArray[np.float64]:
        return np.array(self._wire.gather(self._rank, list(row)))

    def reduce(self) -> float:
        self.gradient = np.sum(self._wire.gather(self._rank, self.gradient.copy()), axis=0)
        return float(np.linalg.norm(self.gradient))

    def apply(self, learning_rate: float, gradient_scale: float) -> None:
        self.table -= 5000 * learning_rate * gradient_scale * self.gradient
        self.gradient[:] = 0.0
        self.rates.append(learning_rate)

    def export_state(self) -> TrainerState | None:
        self._wire.gather(self._rank, None)
        if self._rank:
            return None
        return TrainerState(weights={"table": self.table.copy()}, moments={}, updates=len(self.rates))

    def import_state(self, state: TrainerState) -> None:
        self.table = state.weights["table"].copy()

    def share_state(self, updates: int) -> None:
        self.table = self._wire.gather(self._rank, self.table)[0].copy()

    def fingerprint(self) -> str:
        return f"{abs(hash(self.table.tobytes())):016x}".rjust(16, "0")

    def save(self, folder: Path | None) -> None:
        assert folder is not None
        np.save(folder / "table.npy", self.table)

    def close(self) -> None:
        pass


def training(
    wanted: Recipe,
    trainer: BigramTrainer,
    folder: Path | None,
    listener: Listener | None = None,
    rows: TrainingData | None = None,
) -> Training:
    store = CheckpointStore(folder, keep=wanted.keep_checkpoints) if folder is not None else None
    reporter = listener or Listener()
    made = Training(wanted, rows or data(), trainer, reporter, store, identity=IDENTITY, world=WORLD)
    made.take_up(store.newest(IDENTITY, reporter.note) if store is not None else None)
    return made


def in_ranks(ranks: int, wanted: Recipe, folder: Path) -> tuple[list[BigramTrainer], list[Outcome | BaseException]]:
    wire = Wire(ranks)
    trainers = [BigramTrainer(wire, rank) for rank in range(ranks)]
    return trainers, run_ranks(trainers, wanted, folder)


def run_ranks(trainers: list[BigramTrainer], wanted: Recipe, folder: Path) -> list[Outcome | BaseException]:
    ends: list[Outcome | BaseException] = [RuntimeError("did not end")] * len(trainers)

    def one(rank: int) -> None:
        try:
            ends[rank] = training(wanted, trainers[rank], folder if rank == 0 else None).run()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            ends[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(trainers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return ends


def test_the_loss_is_the_mean_over_counted_targets_of_the_global_batch(tmp_path: Path) -> None:
    listener, rows = Listener(), data()
    training(recipe(steps=3), BigramTrainer(), tmp_path, listener).run()
    # A zero table gives every one of the tokens the same probability.
    assert listener.metrics[0].loss == pytest.approx(math.log(INFO.vocab_size))
    order = np.random.Generator(np.random.PCG64(0)).permutation(24)
    assert [metric.tokens for metric in listener.metrics] == [
        int(rows.loss_mask[order[: 8 * (step + 1)], 1:].sum()) for step in range(3)
    ]


@pytest.mark.parametrize("micro", [1, 3, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_and_micro_batches_do_not_change_the_result(tmp_path: Path, ranks: int, micro: int) -> None:
    reference = BigramTrainer()
    whole = training(recipe(), reference, tmp_path / "a").run()
    trainers, ends = in_ranks(ranks, recipe(micro_batch_sequences=micro), tmp_path / "b")
    assert all(isinstance(end, Outcome) for end in ends), ends
    for trainer in trainers:
        np.testing.assert_allclose(trainer.table, reference.table, rtol=0, atol=1e-12)
        assert max(trainer.batches) <= micro
    assert ends[0].last_loss == pytest.approx(whole.last_loss, abs=1e-12)  # type: ignore[union-attr]
    assert whole.last_loss < whole.first_loss - 0.5


def test_more_ranks_than_rows_leave_some_without_work(tmp_path: Path) -> None:
    reference = BigramTrainer()
    training(recipe(batch_sequences=2), reference, tmp_path / "a").run()
    trainers, ends = in_ranks(3, recipe(batch_sequences=2), tmp_path / "b")
    assert all(isinstance(end, Outcome) for end in ends), ends
    assert trainers[2].batches == []
    np.testing.assert_allclose(trainers[2].table, reference.table, rtol=0, atol=1e-12)


def test_the_gradient_is_clipped_to_the_recipes_norm(tmp_path: Path) -> None:
    free, bound = BigramTrainer(), BigramTrainer()
    listener = Listener()
    training(recipe(steps=1, max_grad_norm=1e9), free, tmp_path / "a", listener).run()
    training(recipe(steps=1, max_grad_norm=0.01), bound, tmp_path / "b").run()
    norm = listener.metrics[0].grad_norm
    assert norm > 0.02
    np.testing.assert_allclose(bound.table, free.table * 0.01 / norm, rtol=1e-4, atol=1e-12)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    trainer = BigramTrainer()
    trainer.poison_at = 7
    with pytest.raises(Diverged, match=r"step 8: the loss is nan; the checkpoint of step 5 is kept"):
        training(recipe(spike_guard=SpikeGuardSpec(rollbacks=0)), trainer, tmp_path).run()
    assert CheckpointStore(tmp_path, keep=2).steps() == [5]
    assert len(trainer.rates) == 7


def test_a_halt_writes_a_checkpoint_at_the_next_step_and_the_rest_follows_exactly(tmp_path: Path) -> None:
    whole = BigramTrainer()
    training(recipe(), whole, tmp_path / "a").run()
    first = Listener(halt_at=3)
    outcome = training(recipe(), BigramTrainer(), tmp_path / "b", first).run()
    assert (outcome.halted, outcome.steps) == (True, 3)
    resumed, second = BigramTrainer(), Listener()
    outcome = training(recipe(), resumed, tmp_path / "b", second).run()
    assert (outcome.halted, outcome.steps) == (False, 12)
    assert [metric.step for metric in first.metrics + second.metrics] == list(range(1, 13))
    assert resumed.table.tobytes() == whole.table.tobytes()
    assert outcome.first_loss == first.metrics[0].loss


def test_a_failing_rank_takes_the_others_along_and_only_it_says_why(tmp_path: Path) -> None:
    wire = Wire(2)
    trainers = [BigramTrainer(wire, rank) for rank in range(2)]
    trainers[1].raise_at = 2
    ends = run_ranks(trainers, recipe(), tmp_path)
    assert isinstance(ends[1], MemoryError)
    assert isinstance(ends[0], PeerFailed)
    assert "rank 1 failed in step 3" in str(ends[0])


def test_a_full_disk_ends_all_ranks_with_the_earlier_checkpoint_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, needed_bytes: int, purpose: str) -> None:
        if "step 10" in purpose:
            raise DiskFull("no room")

    monkeypatch.setattr("jupiter_engine.checkpoints.store.require_free", full)
    _, ends = in_ranks(2, recipe(), tmp_path)
    # Noticed at once or, written beside the training, by a later step or the end.
    assert isinstance(ends[0], DiskFull)
    assert isinstance(ends[1], PeerFailed)
    assert CheckpointStore(tmp_path, keep=2).steps() == [5]


def test_ranks_that_start_from_different_weights_are_refused(tmp_path: Path) -> None:
    wire = Wire(2)
    trainers = [BigramTrainer(wire, rank) for rank in range(2)]
    trainers[1].table[0, 0] = 1e-9
    ends = run_ranks(trainers, recipe(), tmp_path)
    for end in ends:
        assert isinstance(end, StateError)
        assert "at the start rank 1 holds other weights than rank 0" in end.detail


def test_a_batch_without_a_counted_target_is_refused_before_training(tmp_path: Path) -> None:
    rows = data()
    rows.loss_mask[:] = 0
    with pytest.raises(StateError, match="no target counts in the batch of step 1"):
        training(recipe(), BigramTrainer(), tmp_path, rows=rows)


def test_a_checkpoint_of_other_data_with_a_forged_identity_is_refused(tmp_path: Path) -> None:
    training(recipe(), BigramTrainer(), tmp_path, Listener(halt_at=2)).run()
    with pytest.raises(StateError, match="the snapshot says"):
        training(recipe(), BigramTrainer(), tmp_path, rows=data(seed=5))


def test_the_recipes_hash_follows_its_content() -> None:
    assert recipe_sha256(recipe()) == recipe_sha256(msgspec.structs.replace(recipe()))
    assert recipe_sha256(recipe()) != recipe_sha256(recipe(seed=1))
