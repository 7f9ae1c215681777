"""The training loop: framework-free, the same for both twins and for any number of ranks.

What one step is stands in `step`. Here: which rows it takes, at which rate, when the
state is stored, measured or taken back, and when the run ends.

A step whose loss or gradient is not finite, or whose loss leaps, is taken back: the
run returns to its newest checkpoint (or its start) and leaves that batch out. The
batches after it move up, so step i from then on trains on batch i + 1. A run always
has `recipe.steps` steps. `tokens` and `tokens_total` count the targets of the
batches that are really trained on: with a batch left out and another one moved in
at the end `tokens_total`, and with it the schedule's position, changes by the
difference of the two, from the checkpoint on.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.checkpoints.store import Checkpoint, CheckpointStore, Damaged, Identity, World
from jupiter_engine.checkpoints.writer import CheckpointWriter
from jupiter_engine.errors import Diverged, JupiterError, StateError
from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.shapes import Shape, flops_per_token
from jupiter_engine.protocol.specs import Recipe
from jupiter_engine.training.balance import Balance
from jupiter_engine.training.data_order import BatchOrder, Rows, batch_number, counted_tokens
from jupiter_engine.training.guard import EarlyStop, SpikeGuard
from jupiter_engine.training.schedule import learning_rate
from jupiter_engine.training.step import GroupStep, StepDone
from jupiter_engine.training.trainer import Batch, PeerFailed, Reporter, Trainer, TrainingData

__all__ = ["Batch", "Outcome", "PeerFailed", "Reporter", "Trainer", "Training", "TrainingData", "recipe_sha256"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    steps: int
    tokens: int
    first_loss: float
    last_loss: float
    tokens_per_s: float
    """Input tokens of all steps over the sum of their wall times."""
    halted: bool
    """Stopped on request; a checkpoint of step `steps` was written."""
    best_step: int | None = None
    """The step whose state the trainer holds now, where held-out losses were measured."""
    held_out_loss: float | None = None
    """That state's, in nats a token."""
    stopped_early: bool = False
    """Ended before the recipe's last step because the held-out loss did not improve any more."""
    skipped_batches: tuple[int, ...] = ()
    """Numbers of the batches that the spike guard left out, from 0."""
    rollbacks: int = 0


def recipe_sha256(recipe: Recipe) -> str:
    """Over what differs from the defaults, so that a key that a later version adds changes no running recipe."""
    return hashlib.sha256(msgspec.json.encode(_set(recipe), order="deterministic")).hexdigest()


def _set(spec: msgspec.Struct) -> dict[str, Any]:
    """Fields that differ from those of a spec of the same type without any, nested specs likewise."""
    found: dict[str, Any] = {}
    default = type(spec)()
    for name in spec.__struct_fields__:
        value = getattr(spec, name)
        if value != getattr(default, name):
            found[name] = _set(value) if isinstance(value, msgspec.Struct) else value
    return found


class Training:
    """One run of a recipe over a snapshot, from a checkpoint if there is one."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        trainer: Trainer,
        reporter: Reporter,
        store: CheckpointStore | None,
        *,
        identity: Identity,
        world: World,
        shape: Shape | None = None,
        held_out: TrainingData | None = None,
        start: Callable[[], TrainerState] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> None:
        """`store` is None on ranks other than 0: only rank 0 writes.

        `shape`: the model's, for the FLOP of a step (None: utilisation is not told);
        `held_out`: rows for the recipe's early stop, the same on all ranks; `start`:
        makes the state before the first step once more (rank 0), for a step that has
        to be taken back before the first checkpoint; `sizes`: each rank's micro-batch
        (None: the recipe's).
        """
        self._recipe, self._data, self._trainer, self._reporter, self._store = recipe, data, trainer, reporter, store
        self._identity, self._world, self._start = identity, world, start
        self._writer = CheckpointWriter(store) if store is not None else None
        balance = Balance(sizes, lockstep=trainer.lockstep) if sizes is not None else None
        self._group = GroupStep(recipe, data, trainer, reporter, balance)
        self._order = BatchOrder(len(data.tokens), recipe.batch_sequences, recipe.seed)
        self._counts = counted_tokens(data.loss_mask)
        self._guard, self._early = SpikeGuard(recipe.spike_guard), EarlyStop(recipe.early_stop)
        self._held_out = _measured_rows(recipe, held_out)
        self._skipped: tuple[int, ...] = ()
        self._batch_tokens: list[int] = []
        self._step_tokens: list[int] = []
        self._tokens_total = 0
        self._leave_out(())
        self._step = 0
        self._tokens = 0
        self._bad_step: int | None = None
        """The step that was taken back last."""
        self._measured: float | None = None
        """Held-out loss of the state as it stands."""
        self._published: int | None = None
        """The step that the weights were taken back to when the run ended."""
        self._metrics: list[bytes] = []
        self._flops = _flops_of_token(recipe, shape) if shape is not None else None
        self._peak: float | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._step

    @property
    def metrics(self) -> bytes:
        """The encoded metric lines of all steps done (on rank 0)."""
        return b"".join(self._metrics)

    # -- where the run stands ----------------------------------------------------------------------

    def _leave_out(self, skipped: Iterable[int]) -> None:
        """Walk all batches but these. StateError if one of the others has no target."""
        self._skipped = tuple(sorted(skipped))
        numbers = [batch_number(step, self._skipped) for step in range(self._recipe.steps)]
        for number in range(len(self._batch_tokens), numbers[-1] + 1):
            self._batch_tokens.append(int(self._counts[self._order.batch(number)].sum()))
        self._step_tokens = [self._batch_tokens[number] for number in numbers]
        self._tokens_total = sum(self._step_tokens)
        empty = [step + 1 for step, tokens in enumerate(self._step_tokens) if tokens == 0]
        if empty:
            raise StateError(
                f"no target counts in the batch of step {empty[0]} (and {len(empty) - 1} more): its loss is undefined",
                fix="use larger batches, or a snapshot with fewer masked rows",
            )

    def _rows(self, step: int) -> Rows:
        return self._order.batch(batch_number(step, self._skipped))

    def take_up(self, checkpoint: Checkpoint | None) -> None:
        """Go on from a stored state. Rank 0 brings it (None: from the beginning), the others get it from there."""
        if self._go_to(checkpoint):
            self._trainer.share_state(self._step)
        # One number a rank, once; NaN where a device's peak is not known.
        peaks = self._trainer.exchange([self._trainer.peak_flops() or math.nan])[:, 0]
        self._peak = float(peaks.sum()) if np.isfinite(peaks).all() else None

    def _go_to(self, checkpoint: Checkpoint | None) -> bool:
        """Place, metrics, guard and early stop of rank 0's checkpoint, on every rank; the trainer's state on rank 0.

        False if that is the beginning, where nothing has to be shared.
        """
        self._metrics = checkpoint.metrics.splitlines(keepends=True) if checkpoint is not None else []
        known = [msgspec.json.decode(line, type=Metric) for line in self._metrics]
        measured = [(m.step, m.held_out_loss) for m in known if m.held_out_loss is not None]
        lists: tuple[list[float], ...] = ([], [], [])
        head = [0.0, 0.0]
        if checkpoint is not None:
            head = [float(checkpoint.step), float(checkpoint.rollbacks)]
            losses = [metric.loss for metric in known[-self._recipe.spike_guard.window :]]
            lists = (
                [float(n) for n in checkpoint.skipped_batches],
                losses,
                [float(v) for pair in measured for v in pair],
            )
        step, rollbacks, *lengths = (int(v) for v in self._first_says([*head, *(float(len(one)) for one in lists)], 5))
        skipped, losses, pairs = (self._first_says(one, size) for one, size in zip(lists, lengths, strict=True))
        self._leave_out({int(value) for value in skipped})
        self._guard.rollbacks = max(rollbacks, self._guard.rollbacks)
        self._guard.restart(losses)
        self._early.restart((int(at), loss) for at, loss in zip(pairs[::2], pairs[1::2], strict=True))
        self._step, self._tokens = step, sum(self._step_tokens[:step])
        self._measured = checkpoint.held_out_loss if checkpoint is not None else None
        if checkpoint is not None:
            if (checkpoint.tokens, checkpoint.tokens_total) != (self._tokens, self._tokens_total):
                raise StateError(
                    f"the checkpoint of step {checkpoint.step} counts {checkpoint.tokens} of "
                    f"{checkpoint.tokens_total} tokens, the snapshot says {self._tokens} of "
                    f"{self._tokens_total}",
                    fix="restore the snapshot, or remove the run folder to train anew",
                )
            self._trainer.import_state(checkpoint.trainer)
        return step > 0

    def _first_says(self, values: Sequence[float], length: int) -> list[float]:
        """Rank 0's `length` values, on every rank; the others' own are not heard."""
        if length == 0:
            return []
        row = list(values) if self._trainer.rank == 0 else [0.0] * length
        return [float(value) for value in self._trainer.exchange(row)[0]]

    # -- the run -----------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train to the last step, to the next step boundary after a halt was asked for, or to an early stop.

        Then the trainer holds what is to be published: the best measured state, or the last one.
        """
        self.agree_on_weights("at the start")
        recipe, halted = self._recipe, False
        try:
            while self._step < recipe.steps and not halted and not self._early.over:
                carried_out = self._one_step()
                if carried_out is None:
                    # A halt is asked for again before the next step, which there is.
                    continue
                asked, better = carried_out
                last = self._step == recipe.steps
                over = last or self._early.over
                halted = asked and not over
                # The best state is stored if anything may follow it.
                if halted or (better and not last) or (self._step % recipe.checkpoint_every_steps == 0 and not over):
                    self._checkpoint(wait=halted)
            self._on_disk(lambda writer: writer.wait())
            if not halted:
                self._return_to_best()
        finally:
            self._group.close()
            if self._writer is not None:
                self._writer.close()
        return self._outcome(halted=halted)

    def save(self, folder: Path | None) -> None:
        """Write the whole model as model.safetensors, in the recipe's compute precision. All ranks; `folder` on 0."""
        self._trainer.save(folder)

    def close(self) -> None:
        """Leave the group together with the other ranks."""
        self._trainer.close()

    def agree_on_weights(self, when: str) -> None:
        """StateError unless all ranks hold bitwise the same weights."""
        if self._trainer.ranks == 1:
            return
        # 48 bits of the hash: an integer that float64 carries exactly.
        mine = float(int(self._trainer.fingerprint()[:12], 16))
        prints = self._trainer.exchange([mine])[:, 0]
        if not (prints == prints[0]).all():
            apart = [rank for rank in range(self._trainer.ranks) if prints[rank] != prints[0]]
            raise StateError(
                f"{when} rank {apart[0]} holds other weights than rank 0",
                fix="start the run again; it goes on from the last checkpoint",
            )

    def _one_step(self) -> tuple[bool, bool] | None:
        """Carry out a step. Returns (was a halt asked for, is this the best measured state?); None: taken back."""
        recipe, step = self._recipe, self._step
        tokens = self._step_tokens[step]
        computed = self._group.compute(
            step,
            self._rows(step),
            tokens,
            halt=self._halt_asked,
            following=self._rows(step + 1) if step + 1 < recipe.steps else None,
            check=self._writer.check if self._writer is not None else None,
        )
        wrong = self._guard.judge(computed.loss, computed.norm)
        if wrong is not None:
            self._group.discard()
            self._take_back(wrong)
            return None
        rate = learning_rate(recipe.schedule, recipe.optimizer.learning_rate, self._tokens + tokens, self._tokens_total)
        done = self._group.apply(rate)
        self._step, self._tokens = step + 1, self._tokens + tokens
        self._guard.accept(done.loss)
        better = self._measure()
        self._tell(done, rate)
        return computed.halt, better

    def _halt_asked(self) -> bool:
        return self._trainer.rank == 0 and self._reporter.halt_asked()

    def _measure(self) -> bool:
        """The held-out loss, if it is due; True if this state is the best one."""
        self._measured = None
        if self._held_out is None or not self._early.due(self._step, last=self._step == self._recipe.steps):
            return False
        rows = np.arange(len(self._held_out.tokens), dtype=np.int64)
        self._measured = self._group.measure(self._held_out, rows)
        return self._early.note(self._step, self._measured)

    def _tell(self, done: StepDone, rate: float) -> None:
        recipe = self._recipe
        tokens_per_s = recipe.batch_sequences * recipe.sequence_tokens / done.seconds
        mfu = None
        if self._flops is not None and self._peak is not None:
            mfu = tokens_per_s * self._flops / self._peak
        metric = Metric(
            step=self._step,
            tokens=self._tokens,
            loss=done.loss,
            learning_rate=rate,
            grad_norm=done.norm,
            tokens_per_s=tokens_per_s,
            seconds=done.seconds,
            at=time.time(),
            rank_seconds=done.compute_seconds,
            data_seconds=done.data_seconds,
            communication_seconds=done.communication_seconds,
            idle_seconds=done.idle_seconds,
            rank_rows=done.rows,
            peak_bytes=done.peak_bytes,
            mfu=mfu,
            held_out_loss=self._measured,
        )
        self._metrics.append(msgspec.json.encode(metric) + b"\n")
        self._reporter.metric(metric)
        self._reporter.progress(self._step, recipe.steps, f"loss {done.loss:.3f}")

    # -- steps taken back ----------------------------------------------------------------------------

    def _take_back(self, wrong: str) -> None:
        """Go back to the newest checkpoint, or to the start, and leave the batch of the step under way out.

        Diverged (on rank 0, PeerFailed on the others) where the recipe allows no more of this, or there is nothing to
        go back to.
        """
        bad_step, bad_batch = self._step, batch_number(self._step, self._skipped)
        allowed = not self._guard.exhausted
        checkpoint: Checkpoint | None = None
        state: TrainerState | None = None

        def look(writer: CheckpointWriter) -> None:
            nonlocal checkpoint, state
            writer.wait()
            if allowed and self._store is not None:
                checkpoint = self._store.newest(self._identity, lambda text: self._reporter.note(text, "warning"))
                state = self._start() if checkpoint is None and self._start is not None else None

        self._on_disk(look)
        possible = self._first_says([float(checkpoint is not None or state is not None)], 1)[0]
        if not allowed or not possible:
            if self._trainer.rank > 0:
                raise PeerFailed("rank 0 ends the run: it has diverged")
            raise self._diverged(wrong)
        skipped = self._skipped
        self._go_to(checkpoint)
        if state is not None:
            self._trainer.import_state(state)
        self._trainer.share_state(self._step)
        left_out = {bad_batch}
        if bad_step == self._bad_step and bad_step > self._step:
            # Another batch at the same place is no better: the harm was done by the update before it.
            left_out.add(batch_number(bad_step - 1, self._skipped))
        self._bad_step = bad_step
        self._leave_out({*skipped, *self._skipped, *left_out})
        self._guard.rollbacks += 1
        self.agree_on_weights(f"back at step {self._step}")
        self._reporter.begun(self._step)
        named = " and ".join(str(one + 1) for one in sorted(left_out))
        self._reporter.note(
            f"Step {bad_step + 1}: {wrong}. Back to step {self._step}; batch {named} is left out from now on "
            f"({self._guard.rollbacks} of {self._recipe.spike_guard.rollbacks} times)",
            "warning",
        )

    def _diverged(self, wrong: str) -> Diverged:
        kept = self._store.steps() if self._store is not None else []
        from_here = f"the checkpoint of step {kept[-1]} is kept" if kept else "no checkpoint had been written yet"
        tried = f"; batches left out before: {len(self._skipped)}" if self._skipped else ""
        return Diverged(
            f"step {self._step + 1}: {wrong}; {from_here}{tried}",
            fix="lower recipe.optimizer.learning_rate or raise recipe.schedule.warmup_share, then train anew",
        )

    def _return_to_best(self) -> None:
        """Take over the weights with the best held-out loss, if they are not the last ones."""
        best = self._early.best_step
        if best is None or best == self._step:
            return
        weights = None
        if self._store is not None:
            try:
                weights = self._store.weights(best, self._identity)
            except Damaged as error:
                self._reporter.note(
                    f"the best state, of step {best}, is damaged: the last one is taken ({error})", "warning"
                )
        if self._first_says([float(weights is not None)], 1)[0]:
            self._trainer.adopt(weights)
            self._published = best

    # -- checkpoints ---------------------------------------------------------------------------------

    def _checkpoint(self, *, wait: bool) -> None:
        """Write the state (rank 0) and let every rank know whether that worked.

        Without `wait` the disk may still be busy afterwards; a failure then
        shows at the start of the next step.
        """
        self.agree_on_weights(f"after step {self._step}")
        state = self._trainer.export_state()

        def write(writer: CheckpointWriter) -> None:
            assert state is not None
            writer.write(self._snapshot(state))
            if wait:
                writer.wait()

        self._on_disk(write)

    def _on_disk(self, act: Callable[[CheckpointWriter], None]) -> None:
        """Let rank 0 act on its writer; a failure there ends all ranks together."""
        failure: JupiterError | OSError | None = None
        if self._writer is not None:
            try:
                act(self._writer)
            except (JupiterError, OSError) as error:
                failure = error
        said = self._trainer.exchange([float(failure is not None)])
        if failure is not None:
            raise failure
        if said.any():
            raise PeerFailed(f"rank 0 could not write or read a checkpoint (after step {self._step})")

    def _snapshot(self, state: TrainerState) -> Checkpoint:
        """The run as it stands between two steps."""
        return Checkpoint(
            step=self._step,
            tokens=self._tokens,
            tokens_total=self._tokens_total,
            cursor_rows=batch_number(self._step, self._skipped) * self._recipe.batch_sequences,
            identity=self._identity,
            world=self._world,
            trainer=state,
            metrics=self.metrics,
            held_out_loss=self._measured,
            best_step=self._early.best_step,
            skipped_batches=self._skipped,
            rollbacks=self._guard.rollbacks,
        )

    def _outcome(self, *, halted: bool) -> Outcome:
        metrics = [msgspec.json.decode(line, type=Metric) for line in self._metrics]
        inputs = len(metrics) * self._recipe.batch_sequences * self._recipe.sequence_tokens
        published = self._published if self._published is not None else self._step
        measured = {metric.step: metric.held_out_loss for metric in metrics}.get(published)
        return Outcome(
            steps=self._step,
            tokens=self._tokens,
            first_loss=metrics[0].loss,
            last_loss=metrics[-1].loss,
            tokens_per_s=inputs / sum(metric.seconds for metric in metrics),
            halted=halted,
            best_step=published if measured is not None and not halted else None,
            held_out_loss=measured,
            stopped_early=not halted and self._step < self._recipe.steps,
            skipped_batches=self._skipped,
            rollbacks=self._guard.rollbacks,
        )


def _measured_rows(recipe: Recipe, held_out: TrainingData | None) -> TrainingData | None:
    """The held-out rows that the recipe wants measured. StateError where it wants some and there are none."""
    if not recipe.early_stop.every_steps:
        return None
    wanted = recipe.early_stop.sequences
    if held_out is None or not held_out.loss_mask[:wanted, 1:].any():
        raise StateError(
            "early_stop.every_steps asks for a held-out loss, the snapshot holds no held-out rows",
            fix="build the snapshot again, or set early_stop.every_steps to 0",
        )
    return TrainingData(
        tokens=held_out.tokens[:wanted],
        loss_mask=held_out.loss_mask[:wanted],
        segments=held_out.segments[:wanted],
        sha256=held_out.sha256,
    )


def _flops_of_token(recipe: Recipe, shape: Shape) -> float:
    """Floating-point operations that training on a token needs (recomputing activations is not needed work).

    Forward, and twice that backward: gradients by inputs and by weights. Frozen weights of LoRA need no gradient.
    """
    return flops_per_token(shape, recipe.sequence_tokens) * (2.0 if recipe.update == "lora" else 3.0)
