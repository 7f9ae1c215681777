"""Steps that are taken back and runs that end early: the decisions, and the loop that follows them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from jupiter_engine.checkpoints.store import CheckpointStore
from jupiter_engine.errors import Diverged, StateError
from jupiter_engine.protocol.specs import EarlyStopSpec, OptimizerSpec, Recipe, SpikeGuardSpec
from jupiter_engine.training.data_order import BatchOrder
from jupiter_engine.training.guard import EarlyStop, SpikeGuard
from jupiter_engine.training.loop import Batch, Outcome, PeerFailed, TrainingData
from tests.training.bigram import BigramTrainer, Wire, run_ranks, training
from tests.training.nano import IDENTITY, Listener, data, recipe

POISON = 50
"""A token of no other row."""
STEPS = 12


# -- decisions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "norm", "words"),
    [
        (math.nan, math.nan, "the loss is nan"),
        (math.inf, math.nan, "the loss is inf"),
        (2.0, math.inf, "its gradient norm inf"),
        (6.1, 1.0, "the loss is 6.1000, the median of the last 4 steps 2.0000"),
        (5.9, 1.0, None),
    ],
)
def test_what_counts_as_a_bad_step(loss: float, norm: float, words: str | None) -> None:
    guard = SpikeGuard(SpikeGuardSpec(spike_factor=3.0, window=4))
    for known in (50.0, 2.0, 1.0, 2.0, 3.0):
        guard.accept(known)
    said = guard.judge(loss, norm)
    assert said == words or (words is not None and said is not None and words in said)


def test_there_is_no_spike_before_the_window_is_full_or_without_a_factor() -> None:
    guard = SpikeGuard(SpikeGuardSpec(spike_factor=2.0, window=4))
    for _ in range(3):
        guard.accept(1.0)
    assert guard.judge(100.0, 1.0) is None
    guard.accept(1.0)
    assert guard.judge(100.0, 1.0) is not None
    off = SpikeGuard(SpikeGuardSpec(spike_factor=0.0, window=4))
    off.restart([1.0] * 4)
    assert off.judge(100.0, 1.0) is None
    assert off.judge(math.nan, 1.0) is not None


def test_near_zero_a_loss_must_leap_by_half_a_nat_to_be_a_spike() -> None:
    guard = SpikeGuard(SpikeGuardSpec(spike_factor=3.0, window=4))
    guard.restart([0.05, 0.04, 0.06, 0.05])
    assert guard.judge(0.5, 1.0) is None
    assert guard.judge(0.6, 1.0) is not None


class Harmed(BigramTrainer):
    """The update from one batch ruins the weights: it shows in the loss of the step after it."""

    harmful = b""

    def accumulate(self, batch: Batch, scale: float) -> float:
        self.last = batch.tokens.tobytes()
        return super().accumulate(batch, scale)

    def apply(self, learning_rate: float, gradient_scale: float) -> None:
        super().apply(learning_rate, gradient_scale)
        if self.last == self.harmful:
            self.table[:] = math.nan


def test_harm_that_an_update_did_is_found_when_the_next_batch_is_no_better(tmp_path: Path) -> None:
    wanted, rows = recipe(spike_guard=SpikeGuardSpec(rollbacks=2)), data()
    trainer, listener = Harmed(), Listener()
    batch = BatchOrder(len(rows.tokens), wanted.batch_sequences, wanted.seed).batch(7)
    trainer.harmful = rows.tokens[batch][:, :-1].astype(np.int64).tobytes()
    outcome = training(wanted, trainer, tmp_path, listener, rows=rows).run()
    # Step 9 shows what step 8 did. First its own batch is left out, then the harmful one.
    assert outcome.steps == STEPS
    assert outcome.rollbacks == 2
    assert 7 in outcome.skipped_batches
    assert np.isfinite(trainer.table).all()
    assert any("batch 8 and 10 is left out" in note for note in listener.notes)


def test_patience_counts_measurements_without_a_real_improvement() -> None:
    early = EarlyStop(EarlyStopSpec(every_steps=5, patience=2, min_improvement=0.1))
    over: list[bool] = []
    assert [early.due(step, last=step == 12) for step in (4, 5, 10, 12)] == [False, True, True, True]
    better: list[bool] = []
    for step, loss in ((5, 3.0), (10, 2.95), (15, 2.8), (20, math.nan), (25, 2.79)):
        better.append(early.note(step, loss))
        over.append(early.over)
    assert better == [True, False, True, False, False]
    assert over == [False, False, False, False, True]
    assert (early.best_step, early.best_loss) == (15, 2.8)
    again = EarlyStop(EarlyStopSpec(every_steps=5, patience=2, min_improvement=0.1))
    again.restart([(5, 3.0), (10, 2.95), (15, 2.8)])
    assert (again.best_step, again.over) == (15, False)
    assert not EarlyStop(EarlyStopSpec()).due(5, last=True)


# -- a poisoned batch ----------------------------------------------------------------------------------


def poisoned(batch: int, wanted: Recipe) -> TrainingData:
    """96 rows (every batch another one), one of `batch` poisoned."""
    rows = data(rows=96)
    row = BatchOrder(96, wanted.batch_sequences, wanted.seed).batch(batch)[2]
    rows.tokens[row] = POISON
    return rows


def without(rows: TrainingData, wanted: Recipe, batch: int) -> TrainingData:
    """Data whose plain order is that of `rows` with `batch` left out."""
    size = wanted.batch_sequences
    order = BatchOrder(96, size, wanted.seed)
    walked = np.concatenate([order.batch(n) for n in range(STEPS) if n != batch])
    plain = np.concatenate([order.batch(n) for n in range(STEPS)])
    moved = data(rows=96)
    for name in ("tokens", "loss_mask", "segments"):
        getattr(moved, name)[plain[: len(walked)]] = getattr(rows, name)[walked]
    return moved


def test_a_poisoned_batch_is_left_out_and_the_rest_is_as_if_it_had_never_been(tmp_path: Path) -> None:
    wanted = recipe(steps=STEPS - 1)
    rows = poisoned(7, wanted)
    listener, trainer, clean = Listener(), BigramTrainer(), BigramTrainer()
    trainer.poison_token = POISON
    outcome = training(wanted, trainer, tmp_path / "a", listener, rows).run()
    training(wanted, clean, tmp_path / "b", rows=without(rows, wanted, 7)).run()
    assert (outcome.steps, outcome.skipped_batches, outcome.rollbacks) == (STEPS - 1, (7,), 1)
    # Up to the checkpoint of step 5 the schedule ran over the tokens with the bad batch: rates differ a little.
    np.testing.assert_allclose(trainer.table, clean.table, rtol=0.02, atol=1e-3)
    assert [m.step for m in listener.metrics] == [*range(1, 8), *range(6, STEPS)]
    assert "begun 5" in listener.notes
    said = [note for note in listener.notes if "batch 8 is left out" in note]
    assert said == [
        "warning: Step 8: the loss is nan. Back to step 5; batch 8 is left out from now on (1 of 2 times)",
    ]


def test_tokens_count_the_batches_that_were_trained_on(tmp_path: Path) -> None:
    wanted = recipe(steps=STEPS - 1)
    rows = poisoned(7, wanted)
    trainer = BigramTrainer()
    trainer.poison_token = POISON
    outcome = training(wanted, trainer, tmp_path, rows=rows).run()
    order = BatchOrder(96, 8, wanted.seed)
    counted = [int(rows.loss_mask[order.batch(n), 1:].sum()) for n in range(STEPS) if n != 7]
    assert outcome.tokens == sum(counted)
    manifest = json.loads((tmp_path / "step-00000010" / "manifest.json").read_text())
    assert (manifest["skipped_batches"], manifest["rollbacks"]) == ([7], 1)
    assert manifest["tokens"] == sum(counted[:10])
    assert manifest["tokens_total"] == sum(counted)
    assert manifest["cursor_rows"] == 11 * 8


def test_a_leap_of_the_loss_is_taken_back(tmp_path: Path) -> None:
    wanted = recipe(steps=STEPS - 1, spike_guard=SpikeGuardSpec(window=4, spike_factor=2.0))
    rows = poisoned(7, wanted)
    trainer = BigramTrainer()
    trainer.poison_token, trainer.poison = POISON, 5000.0
    outcome = training(wanted, trainer, tmp_path, rows=rows).run()
    assert outcome.skipped_batches == (7,)
    other = BigramTrainer()
    other.poison_token, other.poison = POISON, 5000.0
    blind = recipe(steps=STEPS - 1, spike_guard=SpikeGuardSpec(window=4, spike_factor=0.0))
    assert training(blind, other, tmp_path / "b", rows=rows).run().skipped_batches == ()


def test_before_the_first_checkpoint_the_run_returns_to_its_start(tmp_path: Path) -> None:
    wanted = recipe(steps=STEPS - 1)
    rows = poisoned(2, wanted)
    listener, trainer, clean = Listener(), BigramTrainer(), BigramTrainer()
    trainer.poison_token = POISON
    outcome = training(wanted, trainer, tmp_path / "a", listener, rows).run()
    training(wanted, clean, tmp_path / "b", rows=without(rows, wanted, 2)).run()
    assert outcome.skipped_batches == (2,)
    assert "begun 0" in listener.notes
    # Nothing of the first attempt is left, the schedule included.
    np.testing.assert_array_equal(trainer.table, clean.table)


def test_too_many_bad_steps_end_the_run(tmp_path: Path) -> None:
    rows = data(rows=96)
    rows.tokens[:] = POISON
    trainer = BigramTrainer()
    trainer.poison_token = POISON
    with pytest.raises(Diverged, match=r"step 1: the loss is nan; no checkpoint .* left out before: 2"):
        training(recipe(), trainer, tmp_path, rows=rows).run()


def test_ranks_go_back_together_and_only_rank_0_says_why_a_run_ends(tmp_path: Path) -> None:
    wanted = recipe(steps=STEPS - 1, micro_batch_sequences=2)
    rows = poisoned(7, wanted)
    single = BigramTrainer()
    single.poison_token = POISON
    one = training(wanted, single, tmp_path / "a", rows=rows).run()
    wire = Wire(2)
    trainers = [BigramTrainer(wire, rank) for rank in range(2)]
    for trainer in trainers:
        trainer.poison_token = POISON
    ends = run_ranks(trainers, wanted, tmp_path / "b", rows=rows)
    for trainer, end in zip(trainers, ends, strict=True):
        assert isinstance(end, Outcome)
        assert (end.skipped_batches, end.tokens) == (one.skipped_batches, one.tokens)
        np.testing.assert_allclose(trainer.table, single.table, rtol=0, atol=1e-12)
    rows.tokens[:] = POISON
    trainers = [BigramTrainer(wire, rank) for rank in range(2)]
    for trainer in trainers:
        trainer.poison_token = POISON
    ends = run_ranks(trainers, wanted, tmp_path / "c", rows=rows)
    assert isinstance(ends[0], Diverged)
    assert isinstance(ends[1], PeerFailed)


@pytest.mark.parametrize("halt_at", [6, 9, 10])
def test_a_run_that_is_stopped_before_or_after_it_went_back_ends_alike(tmp_path: Path, halt_at: int) -> None:
    wanted = recipe(steps=STEPS - 1)
    rows = poisoned(7, wanted)
    trainers = [BigramTrainer() for _ in range(3)]
    for trainer in trainers:
        trainer.poison_token = POISON
    whole, first, second = trainers
    expected = training(wanted, whole, tmp_path / "a", rows=rows).run()
    assert training(wanted, first, tmp_path / "b", Listener(halt_at=halt_at), rows).run().halted
    outcome = training(wanted, second, tmp_path / "b", rows=rows).run()
    assert (outcome.skipped_batches, outcome.tokens) == (expected.skipped_batches, expected.tokens)
    if halt_at > 7:
        assert second.table.tobytes() == whole.table.tobytes()
    else:
        # It went back to the halt's checkpoint of step 6 instead of step 5's: step 6 had the former total.
        np.testing.assert_allclose(second.table, whole.table, rtol=0.02, atol=1e-3)


# -- the held-out loss -----------------------------------------------------------------------------------


def test_the_held_out_loss_is_the_mean_over_counted_targets_however_it_is_divided(tmp_path: Path) -> None:
    held_out = data(rows=7, seed=9)
    stop = EarlyStopSpec(every_steps=4, sequences=5)
    listener, alone = Listener(), BigramTrainer()
    training(recipe(early_stop=stop), alone, tmp_path / "a", listener, held_out=held_out).run()
    measured = {m.step: m.held_out_loss for m in listener.metrics if m.held_out_loss is not None}
    assert list(measured) == [4, 8, 12]
    assert alone.measured == [5, 5, 5]
    wire, several = Wire(3), Listener()
    trainers = [BigramTrainer(wire, rank) for rank in range(3)]
    ends = run_ranks(
        trainers, recipe(early_stop=stop, micro_batch_sequences=1), tmp_path / "b", several, held_out=held_out
    )
    assert all(isinstance(end, Outcome) for end in ends), ends
    assert {m.step: m.held_out_loss for m in several.metrics if m.held_out_loss is not None} == pytest.approx(measured)
    tokens = held_out.tokens[:5].astype(int)
    counted = held_out.loss_mask[:5, 1:].astype(bool)
    logits = alone.table[tokens[:, :-1][counted]]
    picked = logits[np.arange(len(logits)), tokens[:, 1:][counted]]
    assert measured[12] == pytest.approx(float((np.log(np.exp(logits).sum(1)) - picked).mean()))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_best_measured_state_is_what_remains_and_patience_ends_the_run(tmp_path: Path, ranks: int) -> None:
    held_out = data(rows=6, seed=9)
    stop = EarlyStopSpec(every_steps=1, sequences=6, patience=3)
    wanted = recipe(
        steps=60, early_stop=stop, keep_checkpoints=1, checkpoint_every_steps=50, max_grad_norm=1e9, batch_sequences=3
    )
    # A quarter of the rows teach the held-out pattern backwards, and the rates are far too high to settle.
    rows = data(rows=6)
    rows.tokens[3:] = rows.tokens[3:, ::-1]
    listener, wire = Listener(), Wire(ranks)
    trainers = [BigramTrainer(wire, rank) for rank in range(ranks)]
    ends = run_ranks(trainers, wanted, tmp_path, listener, rows=rows, held_out=held_out)
    measured = {m.step: m.held_out_loss for m in listener.metrics if m.held_out_loss is not None}
    best = min(measured, key=lambda step: measured[step])
    for end, trainer in zip(ends, trainers, strict=True):
        assert isinstance(end, Outcome), end
        assert (end.best_step, end.stopped_early, end.steps) == (best, True, best + 3)
        assert end.held_out_loss == measured[best]
        stored = CheckpointStore(tmp_path, keep=1).weights(best, IDENTITY)["table"]
        np.testing.assert_array_equal(trainer.table, stored)
    assert 1 < best < 57
    manifest = json.loads((tmp_path / f"step-{best:08d}" / "manifest.json").read_text())
    assert (manifest["held_out_loss"], manifest["best_step"]) == (measured[best], best)


def test_a_resumed_run_remembers_its_best_state(tmp_path: Path) -> None:
    held_out = data(rows=6, seed=9)
    rows = data(rows=6)
    rows.tokens[3:] = rows.tokens[3:, ::-1]
    wanted = recipe(
        steps=30,
        early_stop=EarlyStopSpec(every_steps=1, sequences=6),
        keep_checkpoints=1,
        checkpoint_every_steps=3,
        max_grad_norm=1e9,
        batch_sequences=3,
        optimizer=OptimizerSpec(learning_rate=0.03),
    )
    whole, second = BigramTrainer(), BigramTrainer()
    expected = training(wanted, whole, tmp_path / "a", None, rows, held_out=held_out).run()
    assert expected.best_step is not None
    stop = Listener(halt_at=expected.best_step + 2)
    assert training(wanted, BigramTrainer(), tmp_path / "b", stop, rows, held_out=held_out).run().halted
    steps = CheckpointStore(tmp_path / "b", keep=1).steps()
    assert steps == [expected.best_step, expected.best_step + 2]
    outcome = training(wanted, second, tmp_path / "b", None, rows, held_out=held_out).run()
    assert (outcome.best_step, outcome.held_out_loss) == (expected.best_step, expected.held_out_loss)
    assert second.table.tobytes() == whole.table.tobytes()


def test_a_best_state_that_was_damaged_is_said_and_the_last_one_is_taken(tmp_path: Path) -> None:
    held_out = data(rows=6, seed=9)
    rows = data(rows=6)
    rows.tokens[3:] = rows.tokens[3:, ::-1]
    wanted = recipe(
        steps=30,
        early_stop=EarlyStopSpec(every_steps=1, sequences=6),
        max_grad_norm=1e9,
        batch_sequences=3,
        optimizer=OptimizerSpec(learning_rate=0.03),
    )

    class Damaging(Listener):
        def metric(self, metric: object) -> None:
            super().metric(metric)  # type: ignore[arg-type]
            if len(self.metrics) == 30:
                for path in tmp_path.glob("step-*/weights.safetensors"):
                    path.write_bytes(path.read_bytes()[:-1])

    listener = Damaging()
    outcome = training(wanted, BigramTrainer(), tmp_path, listener, rows, held_out=held_out).run()
    assert outcome.best_step == 30
    assert outcome.held_out_loss == listener.metrics[-1].held_out_loss
    assert any("is damaged" in note and "the last one is taken" in note for note in listener.notes)


def test_measuring_without_held_out_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no held-out rows") as caught:
        training(recipe(early_stop=EarlyStopSpec(every_steps=2)), BigramTrainer(), tmp_path)
    assert caught.value.fix
