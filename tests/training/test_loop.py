"""The loop with a small exact model in numpy: what a step is, whatever ranks and micro-batches do."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from jupiter_engine.checkpoints.store import CheckpointStore
from jupiter_engine.errors import DiskFull, Diverged, StateError
from jupiter_engine.protocol.specs import SpikeGuardSpec
from jupiter_engine.training.loop import Outcome, PeerFailed, recipe_sha256
from tests.training.bigram import BigramTrainer, Wire, in_ranks, run_ranks, training
from tests.training.nano import INFO, Listener, data, recipe


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
