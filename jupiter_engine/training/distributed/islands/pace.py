"""What an island does next: rank 0's decisions, from the exchange folder and the clock alone, and how all ranks get to
know them. `island` carries them out; rounds, attempts and their files are explained there and in `exchange`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

import msgspec

from jupiter_engine.checkpoints.store import Checkpoint
from jupiter_engine.files import write_json
from jupiter_engine.protocol.orders import IslandOrder
from jupiter_engine.training.distributed.islands import exchange, outer
from jupiter_engine.training.distributed.islands.ledger import Offer, Ranges, blocks_of
from jupiter_engine.training.distributed.islands.payload import Payload, verified
from jupiter_engine.training.trainer import PeerFailed, Reporter, Trainer

_BEAT_S = 1.0
_WAIT_S = 0.5
_PLACES = 50
_ABANDONED_S = 6 * 3600.0
"""An island that has waited so long for a base comes to rest by itself."""
_OFFERS = 3
"""How often one and the same work is offered again when the hub could not take it."""


class IslandReporter(Reporter, Protocol):
    """A loop's reporter that is also told that an island waits."""

    def alive(self) -> None:
        """Rank 0 waits for the hub and is well: no hang."""
        ...


class Act(IntEnum):
    """What all ranks do next."""

    WAIT = 0
    JOIN = 1
    STEP = 2
    OFFER = 3
    HALT = 4
    END = 5


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where in a round a checkpoint stands."""

    round: int
    base_sha256: str
    lease: int
    fence: int
    used: int
    tokens: int
    """Counted targets of the used blocks."""
    loss_sum: float
    norm_sum: float
    learning_rate: float
    seconds: float
    """Since the round began here."""


class Places(msgspec.Struct, frozen=True, kw_only=True):
    by_step: dict[int, Place]


@dataclass(slots=True)
class Sitting:
    """A round on this island; the same on every rank but for `base` and the clocks, which rank 0 alone looks at."""

    round: int
    base_sha256: str
    lease: int
    fence: int
    blocks: list[int]
    share: float
    tokens_done: int
    tokens_total: int
    deadline_s: float
    max_steps: int
    patience_s: float
    base: Payload | None
    began: float
    """time.monotonic()."""
    until: float
    used: int = 0
    tokens: int = 0
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    learning_rate: float = 0.0
    trained_until: float = 0.0
    offered: int = 0
    """Blocks in the last offer."""
    attempt: int = 0
    offers_again: int = 0
    offered_at: float = 0.0
    unsynced: int = 0

    def place(self) -> Place:
        return Place(
            round=self.round,
            base_sha256=self.base_sha256,
            lease=self.lease,
            fence=self.fence,
            used=self.used,
            tokens=self.tokens,
            loss_sum=self.loss_sum,
            norm_sum=self.norm_sum,
            learning_rate=self.learning_rate,
            seconds=max(self.trained_until - self.began, 0.0),
        )


class Pace:
    """Rank 0's decisions, made from the exchange folder and the clock alone."""

    def __init__(self, folder: Path, name: str, max_unsynced: int, reporter: IslandReporter) -> None:
        self.folder, self.name = folder, name
        self._max_unsynced, self._reporter = max_unsynced, reporter
        self.plan: exchange.Plan | None = None
        """The one to join."""
        self._fence = 0
        self._beat, self._beat_at = time.time_ns(), 0.0
        self._idle_since: float | None = None
        exchange.make_folders(folder)

    def decide(self, sitting: Sitting | None) -> Act:
        act = self._decide(sitting)
        if act is not Act.WAIT:
            self._idle_since = None
        return act

    def _decide(self, sitting: Sitting | None) -> Act:
        if self._reporter.halt_asked():
            return Act.HALT
        plan = exchange.newest_plan(self.folder)
        end = exchange.read(self.folder / exchange.END, exchange.End)
        if end is not None and end.fence >= max(self._fence, plan.fence if plan is not None else 0):
            return Act.END if end.reason == "done" else Act.HALT
        if plan is not None and plan.fence >= self._fence:
            self._fence = plan.fence
            mine = plan.leases.get(self.name)
            elsewhere = sitting is None or (plan.round, plan.base.sha256) != (sitting.round, sitting.base_sha256)
            if elsewhere or (mine is not None and sitting is not None and not _same_lease(mine, sitting)):
                self.plan = plan
                return Act.JOIN if mine is not None else self._wait(sitting)
            if sitting is not None and self._refused(plan, sitting):
                return Act.OFFER
        if sitting is None:
            return self._wait(None)
        return self._in_round(sitting)

    def _in_round(self, sitting: Sitting) -> Act:
        now = time.monotonic()
        end = len(sitting.blocks)
        left = sitting.used < end
        if sitting.max_steps:
            end = min(end, sitting.max_steps * (1 + sitting.unsynced))
        if sitting.used < end and (sitting.used == 0 or now < sitting.until):
            self.beat(sitting, waiting=False)
            return Act.STEP
        if sitting.offered < sitting.used:
            return Act.OFFER
        if left and now - sitting.offered_at > sitting.patience_s and sitting.unsynced < self._max_unsynced:
            sitting.unsynced += 1
            sitting.until = now + sitting.deadline_s
            self._reporter.note(
                f"Nothing is heard of the hub; island {self.name} goes on by itself ({sitting.unsynced} of at most "
                f"{self._max_unsynced} rounds)",
                "warning",
            )
            return Act.STEP
        return self._wait(sitting)

    def _refused(self, plan: exchange.Plan, sitting: Sitting) -> bool:
        """Whether the hub could not take what was offered last (it may have been damaged on its way)."""
        if not sitting.attempt or plan.refused.get(self.name, 0) < sitting.attempt or sitting.offers_again >= _OFFERS:
            return False
        sitting.offers_again += 1
        self._reporter.note(f"The hub could not take attempt {sitting.attempt} of {self.name}; it is offered again")
        return True

    def _wait(self, sitting: Sitting | None) -> Act:
        self.beat(sitting, waiting=True)
        now = time.monotonic()
        self._idle_since = self._idle_since or now
        if now - self._idle_since > _ABANDONED_S:
            self._reporter.note("No hub has come back; the island comes to rest", "warning")
            return Act.HALT
        # A supervisor must not take this for a hang.
        self._reporter.alive()
        time.sleep(_WAIT_S)
        return Act.WAIT

    def beat(self, sitting: Sitting | None, *, waiting: bool) -> None:
        if time.monotonic() - self._beat_at < _BEAT_S:
            return
        self._beat_at = time.monotonic()
        self._beat += 1
        here = exchange.Here(
            island=self.name,
            beat=self._beat,
            round=sitting.round if sitting is not None else 0,
            used=sitting.used if sitting is not None else 0,
            waiting=waiting,
        )
        write_json(exchange.here_path(self.folder, self.name), here)


class Sharer:
    """Numbers of rank 0 on all ranks."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def act(self, mine: Act | None) -> Act:
        return Act(int(self._trainer.exchange([float(mine or 0)])[0, 0]))

    def numbers(self, mine: Sequence[float] | None) -> list[float]:
        length = int(self._trainer.exchange([float(len(mine or ()))])[0, 0])
        row = [*(mine or ()), *([0.0] * length)][:length]
        return [float(value) for value in self._trainer.exchange(row)[0]] if length else []

    def failure(self, error: Exception | None, what: str) -> None:
        """Raise rank 0's failure there and PeerFailed on the others."""
        said = self._trainer.exchange([float(error is not None)])
        if error is not None:
            raise error
        if said.any():
            raise PeerFailed(f"rank 0 could not {what}")


def resume(place: Place | None, folder: Path, name: str) -> tuple[exchange.Plan, exchange.PlannedLease] | None:
    """The plan that a checkpoint's place belongs to, if that round is still open here."""
    plan = exchange.newest_plan(folder)
    lease = plan.leases.get(name) if plan is not None else None
    if place is None or plan is None or lease is None:
        return None
    same = (plan.round, plan.base.sha256) == (place.round, place.base_sha256) and _same_lease(lease, place)
    return (plan, lease) if same else None


def _same_lease(lease: exchange.PlannedLease, held: Sitting | Place) -> bool:
    """The fence counts as well: a ledger that was begun anew numbers its leases anew."""
    return (lease.lease, lease.fence) == (held.lease, held.fence)


def sitting_of(
    plan: exchange.Plan, lease: exchange.PlannedLease, base: Payload | None, place: Place | None = None
) -> Sitting:
    """A round from its beginning, or from a checkpoint's place."""
    now = time.monotonic()
    began = now - (place.seconds if place is not None else 0.0)
    made = Sitting(
        round=plan.round,
        base_sha256=plan.base.sha256,
        lease=lease.lease,
        fence=lease.fence,
        blocks=blocks_of(lease.blocks),
        share=lease.share,
        tokens_done=plan.tokens_done,
        tokens_total=plan.tokens_total,
        deadline_s=plan.deadline_s,
        max_steps=plan.max_steps,
        patience_s=plan.patience_s,
        base=base,
        began=began,
        until=began + plan.deadline_s,
        trained_until=now,
    )
    if place is not None:
        made.used, made.tokens = place.used, place.tokens
        made.loss_sum, made.norm_sum, made.learning_rate = place.loss_sum, place.norm_sum, place.learning_rate
    return made


def attempts_before(folder: Path, number: int, name: str) -> int:
    """The highest attempt that was put up, or begun, for a round."""
    up = exchange.up_folder(folder, number)
    found = [
        int(parts[1])
        for path in (up.iterdir() if up.exists() else ())
        if (parts := path.name.split("."))[0] == name and len(parts) > 2 and parts[1].isdigit()
    ]
    return max(found, default=0)


def write_offer(folder: Path, order: IslandOrder, sitting: Sitting, weights: Any, versions: dict[str, str]) -> None:
    """Write and publish a contribution. `weights`: float32 by name."""
    assert sitting.base is not None
    up = exchange.up_folder(folder, sitting.round)
    up.mkdir(parents=True, exist_ok=True)
    attempt = max(sitting.attempt, attempts_before(folder, sitting.round, order.name)) + 1
    part = up / f"{order.name}.{attempt}.safetensors.part"
    record = outer.write_contribution(sitting.base, weights, part, order.rounds.payload)
    offer = Offer(
        round=sitting.round,
        island=order.name,
        attempt=attempt,
        lease=sitting.lease,
        fence=sitting.fence,
        base_sha256=sitting.base_sha256,
        file=record,
        used=sitting.used,
        tokens=sitting.tokens,
    )
    message = exchange.Up(
        offer=offer,
        steps=sitting.used,
        loss_sum=sitting.loss_sum,
        grad_norm=sitting.norm_sum / sitting.used,
        learning_rate=sitting.learning_rate,
        seconds=sitting.trained_until - sitting.began,
        versions=versions,
    )
    exchange.put_up(folder, message, part)
    sitting.attempt = attempt


def encode(plan: exchange.Plan, lease: exchange.PlannedLease, place: Place | None) -> list[float]:
    """What the other ranks must know of a round, in numbers (all below 2**53)."""
    head = [
        plan.round,
        lease.lease,
        lease.fence,
        lease.share,
        plan.tokens_done,
        plan.tokens_total,
        place.used if place is not None else 0,
        place.tokens if place is not None else 0,
    ]
    return [float(value) for value in [*head, *(number for pair in lease.blocks for number in pair)]]


def decode(numbers: Sequence[float]) -> Sitting:
    """The round on a rank other than 0."""
    head, tail = numbers[:8], [int(value) for value in numbers[8:]]
    blocks: Ranges = tuple(zip(tail[::2], tail[1::2], strict=True))
    return Sitting(
        round=int(head[0]),
        base_sha256="",
        lease=int(head[1]),
        fence=int(head[2]),
        blocks=blocks_of(blocks),
        share=head[3],
        tokens_done=int(head[4]),
        tokens_total=int(head[5]),
        deadline_s=0.0,
        max_steps=0,
        patience_s=0.0,
        base=None,
        began=0.0,
        until=0.0,
        used=int(head[6]),
        tokens=int(head[7]),
    )


def open_base(folder: Path, plan: exchange.Plan) -> Payload:
    return verified(exchange.round_folder(folder, plan.round) / exchange.BASE, plan.base)


class PlaceBook:
    """places.json of an island's run folder."""

    def __init__(self, run_folder: Path) -> None:
        self._path = run_folder / "places.json"

    def put(self, step: int, place: Place) -> None:
        """Before the checkpoint of `step` is written: one without its place would be of no use."""
        known = exchange.read(self._path, Places)
        by_step = dict(known.by_step) if known is not None else {}
        by_step[step] = place
        kept = dict(sorted(by_step.items())[-_PLACES:])
        write_json(self._path, Places(by_step=kept))

    def of(self, checkpoint: Checkpoint | None) -> Place | None:
        known = exchange.read(self._path, Places)
        return known.by_step.get(checkpoint.step) if known is not None and checkpoint is not None else None
