"""An island: the ranks of one group train on what the hub lends them and contribute what they have learnt.

Rank 0 looks at the exchange folder and decides what comes next (`pace`); one number tells all ranks, so they join,
step, contribute and leave together. A round of the island:

join        take over the base (moments stay: they are the island's own and are never reset)
step        one optimizer step on the next block of the lease (every island makes steps of `batch_sequences` rows of its
            own), until the round's time is over or the lease is used up
offer       rank 0 writes base - theta and what it is
wait        for the next base; if none comes, go on for a round's time and offer the whole again, at most
            `max_unsynced_rounds` times

All attempts of a round start from the same base and hold a longer and longer part of the same lease, so whichever one
the hub merges, it knows exactly which blocks went into it. A base of a later round ends everything at the next step.

The learning rate follows the tokens merged before the round and the island's own since, as if the others kept pace:
one curve and one warm-up for the whole run.

RUN_FOLDER/places.json says where in its round each checkpoint stands, so a killed island goes on exactly there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from jupiter_engine.checkpoints.store import Checkpoint, CheckpointStore, Identity, World
from jupiter_engine.checkpoints.writer import CheckpointWriter
from jupiter_engine.errors import Diverged, JupiterError
from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.orders import IslandOrder
from jupiter_engine.protocol.specs import Recipe
from jupiter_engine.training.data_order import BatchOrder, counted_tokens
from jupiter_engine.training.distributed.islands import pace
from jupiter_engine.training.distributed.islands.pace import Act, IslandReporter, Pace, PlaceBook, Sharer, Sitting
from jupiter_engine.training.schedule import learning_rate
from jupiter_engine.training.step import GroupStep, StepDone
from jupiter_engine.training.trainer import Trainer, TrainingData


def block_tokens(data: TrainingData, recipe: Recipe) -> list[int]:
    """Counted targets of every block of a run, by block number."""
    counts = counted_tokens(data.loss_mask)
    order = BatchOrder(len(data.tokens), recipe.batch_sequences, recipe.seed)
    return [int(counts[order.batch(block)].sum()) for block in range(recipe.steps)]


@dataclass(frozen=True, slots=True, kw_only=True)
class IslandOutcome:
    steps: int
    """Optimizer steps of this island, those that were never merged included."""
    tokens: int
    offers: int
    """Contributions of this process."""
    halted: bool


class Island:
    """One island's part of a run; on every rank."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        trainer: Trainer,
        reporter: IslandReporter,
        store: CheckpointStore | None,
        order: IslandOrder,
        run_folder: Path,
        step: GroupStep,
        *,
        identity: Identity,
        world: World,
    ) -> None:
        """`store` is None on ranks other than 0: only rank 0 writes and looks at the exchange folder."""
        self._recipe, self._trainer, self._reporter, self._order_of = recipe, trainer, reporter, order
        self._identity, self._world, self._store = identity, world, store
        self._writer = CheckpointWriter(store) if store is not None else None
        self._order = BatchOrder(len(data.tokens), recipe.batch_sequences, recipe.seed)
        self._block_tokens = block_tokens(data, recipe)
        self._group = step
        self._all = Sharer(trainer)
        self._folder = run_folder / order.exchange
        self._places = PlaceBook(run_folder)
        self._pace = (
            Pace(self._folder, order.name, order.rounds.max_unsynced_rounds, reporter) if store is not None else None
        )
        self._sitting: Sitting | None = None
        self._step = self._tokens = self._offers = self._left_out = 0
        self._stored = -1
        self._metrics: list[bytes] = []

    # -- the whole -------------------------------------------------------------------------------
    @property
    def step(self) -> int:
        return self._step

    def take_up(self, checkpoint: Checkpoint | None) -> None:
        """Go on from a stored state. Rank 0 brings it (None: from the beginning), the others get it from there."""
        mine = (checkpoint.step, checkpoint.tokens) if checkpoint is not None else (0, 0)
        step, tokens = (int(value) for value in self._trainer.exchange([float(value) for value in mine])[0])
        if step == 0:
            return
        if checkpoint is not None:
            self._trainer.import_state(checkpoint.trainer)
            self._metrics = checkpoint.metrics.splitlines(keepends=True)
        self._trainer.share_state(step)
        self._step, self._tokens, self._stored = step, tokens, step
        self._resume(self._places.of(checkpoint) if self._pace is not None else None)

    def run(self) -> IslandOutcome:
        """Train until the hub says that the run is over, or a halt is asked for."""
        halted = False
        try:
            while True:
                act = self._all.act(self._pace.decide(self._sitting) if self._pace is not None else None)
                if act is Act.JOIN:
                    self._join()
                elif act is Act.STEP:
                    self._one_step()
                elif act is Act.OFFER:
                    self._offer()
                elif act in (Act.HALT, Act.END):
                    halted = act is Act.HALT
                    break
            if halted and self._step > self._stored:
                self._checkpoint()
            self._on_disk("write a checkpoint", lambda: self._writer.wait() if self._writer is not None else None)
        finally:
            self._group.close()
            if self._writer is not None:
                self._writer.close()
        return IslandOutcome(steps=self._step, tokens=self._tokens, offers=self._offers, halted=halted)

    def close(self) -> None:
        """Leave the group together with the other ranks."""
        self._trainer.close()

    def _on_disk(self, what: str, act: Any) -> None:
        """Let rank 0 act; a failure there ends all ranks together."""
        failure: Exception | None = None
        if self._pace is not None:
            try:
                act()
            except (JupiterError, OSError, ValueError) as error:
                failure = error
        self._all.failure(failure, what)

    # -- rounds ----------------------------------------------------------------------------------
    def _resume(self, place: pace.Place | None) -> None:
        """Take the round up where the checkpoint stands, if it is still open; else the next decision joins one."""
        numbers: list[float] | None = None
        if self._pace is not None:
            found = pace.resume(place, self._folder, self._order_of.name)
            if found is not None:
                plan, lease = found
                self._sitting = pace.sitting_of(plan, lease, pace.open_base(self._folder, plan), place)
                numbers = pace.encode(plan, lease, place)
        told = self._all.numbers(numbers)
        if self._pace is None and told:
            self._sitting = pace.decode(told)

    def _join(self) -> None:
        """Begin the round of the plan: every rank takes over its base."""
        numbers: list[float] | None = None
        weights: dict[str, npt.NDArray[np.float32]] | None = None
        made: list[Sitting] = []

        def begin() -> None:
            nonlocal numbers, weights
            assert self._pace is not None
            plan = self._pace.plan
            assert plan is not None
            lease = plan.leases[self._order_of.name]
            base = pace.open_base(self._folder, plan)
            weights, numbers = base.arrays(), pace.encode(plan, lease, None)
            made.append(pace.sitting_of(plan, lease, base))

        self._on_disk("take over a base", begin)
        told = self._all.numbers(numbers)
        self._trainer.adopt(weights)
        if self._sitting is not None and self._sitting.base is not None:
            self._sitting.base.close()
        self._sitting = made[0] if made else pace.decode(told)
        if made:
            # Loading a large base is no training time.
            made[0].began = time.monotonic()
            made[0].until = made[0].began + made[0].deadline_s

    def _offer(self) -> None:
        sitting = self._sitting
        assert sitting is not None
        weights = self._trainer.weights()
        self._on_disk(
            "write its contribution",
            lambda: pace.write_offer(self._folder, self._order_of, sitting, weights, self._world.versions),
        )
        self._offers += 1
        sitting.offered, sitting.offered_at = sitting.used, time.monotonic()
        if self._step > self._stored:
            self._checkpoint()

    # -- steps -----------------------------------------------------------------------------------
    def _one_step(self) -> None:
        sitting, recipe = self._sitting, self._recipe
        assert sitting is not None
        block = sitting.blocks[sitting.used]
        ahead = sitting.blocks[sitting.used + 1 : sitting.used + 2]
        tokens = self._block_tokens[block]
        computed = self._group.compute(
            self._step,
            self._order.batch(block),
            tokens,
            following=self._order.batch(ahead[0]) if ahead else None,
            check=self._writer.check if self._writer is not None else None,
        )
        sitting.used, sitting.tokens = sitting.used + 1, sitting.tokens + tokens
        self._tokens += tokens
        if not computed.finite:
            self._leave_out(block)
            return
        rate = self._rate(sitting)
        done = self._group.apply(rate)
        self._step += 1
        sitting.loss_sum += done.loss_sum
        sitting.norm_sum += done.norm
        sitting.learning_rate, sitting.trained_until = rate, time.monotonic()
        self._tell(done, rate)
        if self._step % recipe.checkpoint_every_steps == 0:
            self._checkpoint()

    def _rate(self, sitting: Sitting) -> float:
        """Of the step that makes the round's own tokens `sitting.tokens`."""
        done = min(sitting.tokens_total, sitting.tokens_done + round(sitting.tokens / max(sitting.share, 1e-9)))
        return learning_rate(self._recipe.schedule, self._recipe.optimizer.learning_rate, done, sitting.tokens_total)

    def _leave_out(self, block: int) -> None:
        """A batch whose loss or gradient is not finite: nothing is learnt from it."""
        self._group.discard()
        self._left_out += 1
        if self._left_out > self._recipe.spike_guard.rollbacks:
            raise Diverged(
                f"island {self._order_of.name}: the loss or its gradient was not finite {self._left_out} times, "
                f"last in batch {block + 1}",
                fix="lower recipe.optimizer.learning_rate or raise recipe.schedule.warmup_share, then train anew",
            )
        self._reporter.note(f"Batch {block + 1} is left out: its loss or gradient is not finite", "warning")

    def _tell(self, done: StepDone, rate: float) -> None:
        recipe = self._recipe
        metric = Metric(
            step=self._step,
            tokens=self._tokens,
            loss=done.loss,
            learning_rate=rate,
            grad_norm=done.norm,
            tokens_per_s=recipe.batch_sequences * recipe.sequence_tokens / done.seconds,
            seconds=done.seconds,
            at=time.time(),
            rank_seconds=done.compute_seconds,
            data_seconds=done.data_seconds,
            communication_seconds=done.communication_seconds,
            idle_seconds=done.idle_seconds,
            rank_rows=done.rows,
            peak_bytes=done.peak_bytes,
        )
        self._metrics.append(msgspec.json.encode(metric) + b"\n")
        self._reporter.metric(metric)

    def _checkpoint(self) -> None:
        state = self._trainer.export_state()

        def write() -> None:
            assert state is not None
            assert self._writer is not None
            if self._sitting is not None:
                self._places.put(self._step, self._sitting.place())
            self._writer.write(
                Checkpoint(
                    step=self._step,
                    tokens=self._tokens,
                    tokens_total=sum(self._block_tokens),
                    cursor_rows=self._step * self._recipe.batch_sequences,
                    identity=self._identity,
                    world=self._world,
                    trainer=state,
                    metrics=b"".join(self._metrics),
                )
            )

        self._on_disk("write a checkpoint", write)
        self._stored = self._step
