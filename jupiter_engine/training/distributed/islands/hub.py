"""The hub: lends data, publishes bases, merges what the islands have learnt. It trains nothing and loads no framework.

RUN_FOLDER/rounds.db                          the ledger
RUN_FOLDER/state/<round>.<fence>/             theta, momentum (float32) and base of a round, as one hub made them
RUN_FOLDER/exchange/                          what islands see (exchange.py)

A round: publish base and plan; islands train until its time is over and contribute; once every island that has a lease
has contributed, or the time and a grace are over and the quorum is there, merge. The new files lie complete in a folder
of their own before the ledger's one transaction makes them the current ones; everything before it can be done again,
everything after it is derived from the ledger: so the hub may be killed at any instant.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from jupiter_engine.errors import StateError
from jupiter_engine.files import require_free, sync_folder, write_json
from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.specs import RoundSpec
from jupiter_engine.training.distributed.islands import exchange, outer
from jupiter_engine.training.distributed.islands.carrier import Carrier, Local
from jupiter_engine.training.distributed.islands.lead import Lead
from jupiter_engine.training.distributed.islands.ledger import Ledger, Offer, Round, RoundFiles
from jupiter_engine.training.distributed.islands.payload import (
    Payload,
    Shapes,
    Source,
    payload_bytes,
    verified,
    write_payload,
)

_STATE = re.compile(r"(\d+)\.(\d+)")
_POLL_S = 0.1
_LEAD_S = 30.0
"""A hub that does not renew its lead for so long may be replaced."""
_AHEAD = 1.5
"""A lease holds so many times the blocks that the island is expected to use before it hears of the hub again."""
_PATIENCE_S = 10.0
_ALIVE_S = 30.0
_LATE_MORE_S = 5.0
"""An island that was late is waited for so much longer than it needed."""
_SPARE_BYTES = 256 << 20


class Listener(Protocol):
    """Where the hub tells what happens."""

    def metric(self, metric: Metric) -> None: ...

    def progress(self, done: int, total: int, note: str) -> None: ...

    def note(self, text: str, level: str = "info") -> None: ...

    def halt_asked(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRun:
    """What is trained, as the hub sees it."""

    identity: str
    """Hash of recipe, data and start model."""
    tokens: Sequence[int]
    """Counted targets of every block."""
    block_inputs: int
    """Input tokens of a block: batch_sequences x sequence_tokens."""
    shapes: Shapes
    """Of what is trained."""
    start: Source
    """Its first values."""
    islands: Sequence[str]
    spec: RoundSpec


@dataclass(slots=True)
class _Seen:
    """What is known of an island."""

    beat: int = -1
    at: float = -math.inf
    """time.monotonic() of the last sign of life."""
    rate: float = 0.0
    """Blocks a second in the last round that it contributed to; 0: not known yet."""
    late_s: float = 0.0
    """So much longer than a round and its grace its contributions need to arrive: a slow line."""


@dataclass(slots=True)
class _Gathering:
    """A round while its contributions come in."""

    round: Round
    began: float
    plan: exchange.Plan | None = None
    looked: set[tuple[str, int]] = field(default_factory=set)
    ups: dict[tuple[str, int], exchange.Up] = field(default_factory=dict)
    norms: dict[tuple[str, int], float] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    """Island -> its highest attempt that could not be taken."""
    named: bool = False
    """It was said that the quorum is missing."""


class Hub:
    """One hub at work. Several may be started on one folder; the ledger's lead says which one counts."""

    def __init__(
        self,
        folder: Path,
        run: HubRun,
        listener: Listener,
        *,
        owner: str,
        gone: Callable[[str], bool] = lambda _: False,
        carriers: Mapping[str, Carrier] | None = None,
        tend: Callable[[], None] = lambda: None,
    ) -> None:
        """`owner`: this process, as `gone` recognises it again; `tend`: called often, keeps the islands' workers
        going; `carriers`: of islands that are elsewhere."""
        self._folder, self._run, self._listener, self._tend = folder, run, listener, tend
        self.exchange = folder / "exchange"
        exchange.make_folders(self.exchange)
        (folder / "state").mkdir(exist_ok=True)
        require_free(folder, self._needed() + _SPARE_BYTES, "the hub (two rounds of weights and contributions)")
        self.ledger = Ledger(folder / "rounds.db")
        self.ledger.create(run.identity, run.tokens)
        self.fence = self.ledger.take_lead(owner, _LEAD_S, gone)
        self._lead = Lead(folder / "rounds.db", self.fence, _LEAD_S)
        self._carriers: dict[str, Carrier] = {
            island: (carriers or {}).get(island) or Local(self.exchange, island) for island in run.islands
        }
        self._seen = {island: _Seen() for island in run.islands}
        self._problems: dict[str, str] = {}
        """Island -> what is wrong with its line, as it was told."""
        self._merge_s = 0.0
        self._merged_at = time.monotonic()

    def _needed(self) -> int:
        """Bytes on disk beyond what lies there from an earlier start: of two rounds theta, momentum and base, and the
        contributions of one and a half."""
        shapes, kind = self._run.shapes, self._run.spec.payload
        base = payload_bytes(shapes, outer.base_encoding(kind))
        contributions = math.ceil(1.5 * len(self._run.islands)) * payload_bytes(shapes, kind)
        stored = sum(
            path.stat().st_size
            for name in ("state", "exchange")
            for path in (self._folder / name).rglob("*.safetensors")
            # Bases are linked from one folder into the other.
            if name == "state" or path.name != exchange.BASE
        )
        return max(0, 4 * payload_bytes(shapes, "float32") + 2 * base + contributions - stored)

    # -- the run ---------------------------------------------------------------------------------
    def run(self) -> bool:
        """Go on until every block is merged (True), or a halt is asked for (False). Deposed if another hub leads."""
        self._begin()
        (self.exchange / exchange.END).unlink(missing_ok=True)
        for carrier in self._carriers.values():
            carrier.begin(self.fence)
        while True:
            current = self.ledger.current()
            assert current is not None
            self._tidy(current)
            totals = self.ledger.totals()
            done = totals.merged == totals.blocks
            if done or not self._gather(current):
                self.say_end("done" if done else "halted")
                return done

    @property
    def carried(self) -> dict[str, tuple[int, int]]:
        """Island -> bytes (to it, from it), as far as this process has seen them."""
        return {name: (carrier.down_bytes, carrier.up_bytes) for name, carrier in self._carriers.items()}

    def theta(self) -> Path:
        """The current weights, float32."""
        current = self.ledger.current()
        assert current is not None
        path = self._state(current) / "theta.safetensors"
        verified(path, current.files.theta).close()
        return path

    def close(self) -> None:
        for carrier in self._carriers.values():
            carrier.close()
        self._lead.close()
        self.ledger.close()

    def _state(self, current: Round) -> Path:
        return self._folder / "state" / f"{current.number}.{current.fence}"

    def _fresh(self, number: int) -> Path:
        folder = self._folder / "state" / f"{number}.{self.fence}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def _begin(self) -> None:
        """Make round 1 from the start, unless there is a round already."""
        if self.ledger.current() is not None:
            return
        folder = self._fresh(1)
        theta = write_payload(folder / "theta.safetensors", self._run.shapes, "float32", self._run.start)
        base = outer.write_base(folder / "theta.safetensors", folder / exchange.BASE, self._run.spec.payload)
        sync_folder(folder)
        self._lead.check()
        self.ledger.begin(self.fence, RoundFiles(theta=theta, momentum=None, base=base))

    def _tidy(self, current: Round) -> None:
        """Leave only what the current round needs; what the islands may still read goes a round later."""
        for path in (self._folder / "state").iterdir():
            named = _STATE.fullmatch(path.name)
            if named is None or path == self._state(current):
                # What the file system's own tools leave (.DS_Store) concerns nobody.
                continue
            # A hub that has taken over meanwhile may be writing under its own, higher fence.
            if int(named[1]) <= current.number or int(named[2]) < self.fence:
                shutil.rmtree(path, ignore_errors=True)
        exchange.forget_before(self.exchange, current.number - 1)

    def say_end(self, reason: str) -> None:
        """Let the islands come to their end (`done`) or to rest (`halted`). Deposed if they are another hub's: a hub
        that was asleep may wake to a halt, and must hear of that first."""
        self.ledger.must_lead(self.fence)
        # At once: a machine that does not answer costs its time out.
        with ThreadPoolExecutor(len(self._carriers)) as pool:
            list(pool.map(lambda carrier: carrier.ask(), self._carriers.values()))
        self._check_lead()
        write_json(self.exchange / exchange.END, exchange.End(reason=reason, fence=self.fence))

    def _check_lead(self) -> None:
        """Deposed if another hub leads, by the ledger or by what lies on an island's machine."""
        self._lead.check()
        for carrier in self._carriers.values():
            if isinstance(carrier, Local):
                carrier.ask()
            if carrier.deposed is not None:
                raise carrier.deposed

    # -- a round ---------------------------------------------------------------------------------
    def _gather(self, current: Round) -> bool:
        """Publish, take contributions in and merge; False if a halt was asked for first."""
        state = _Gathering(round=current, began=time.monotonic())
        for (number, island, attempt), (verdict, _) in self.ledger.verdicts().items():
            if number == current.number and verdict in ("refused", "stale"):
                state.refused[island] = max(attempt, state.refused.get(island, 0))
        self._publish_base(current)
        while not self._listener.halt_asked():
            self._check_lead()
            self._tend()
            self._tell_problems()
            self._look(state)
            self._lend(state)
            self._take_in(state)
            offers = self._whole(state)
            if offers and self._ready(state, offers):
                self._merge(state, offers)
                return True
            if not offers:
                self._lend_anew(state)
            time.sleep(_POLL_S)
        return False

    def _publish_base(self, current: Round) -> None:
        folder = exchange.round_folder(self.exchange, current.number)
        exchange.up_folder(self.exchange, current.number).mkdir(parents=True, exist_ok=True)
        base, made = folder / exchange.BASE, self._state(current) / exchange.BASE
        if base.exists() and base.stat().st_size == current.files.base.bytes:
            return
        verified(made, current.files.base).close()
        part = base.with_name(f"{base.name}.{self.fence}.part")
        part.unlink(missing_ok=True)
        try:
            os.link(made, part)
        except OSError:
            # A file system without hard links.
            shutil.copyfile(made, part)
        part.replace(base)
        sync_folder(folder)

    def _look(self, state: _Gathering) -> None:
        """Signs of life."""
        for island, seen in self._seen.items():
            here = exchange.read(exchange.here_path(self.exchange, island), exchange.Here)
            if here is not None and here.beat != seen.beat:
                # The first look may find what a dead island left behind.
                if seen.beat != -1 or here.round == state.round.number or here.waiting:
                    seen.at = time.monotonic()
                seen.beat = here.beat

    def _tell_problems(self) -> None:
        """Of the lines to the islands, each once."""
        for island, carrier in self._carriers.items():
            problem, told = carrier.problem, self._problems.get(island, "")
            if problem and not told:
                self._listener.note(f"Nothing can be carried to or from island {island}: {problem}", "warning")
            elif told and not problem:
                self._listener.note(f"Island {island} is reached again")
            self._problems[island] = problem

    def _alive(self, island: str) -> bool:
        limit = max(_ALIVE_S, self._run.spec.round_s + self._run.spec.grace_s)
        # A slow line carries no signs of life while it carries a contribution.
        return time.monotonic() - self._seen[island].at < limit + self._seen[island].late_s

    def _lend(self, state: _Gathering) -> None:
        """Give every island that is there and has no lease one, and publish the plan where it has changed."""
        number = state.round.number
        leases = {lease.island: lease for lease in self.ledger.leases(number)}
        asking = [island for island in self._run.islands if island not in leases and self._alive(island)]
        totals = self.ledger.totals()
        if asking and totals.free:
            shares = self._shares(leases)
            for island in asking:
                lease = self.ledger.lend(
                    self.fence, number, island, self._wanted(island, shares, totals.free + totals.lent)
                )
                if lease is not None:
                    leases[island] = lease
                    carrier = self._carriers[island]
                    if isinstance(carrier, Local):
                        carrier.took_base(state.round.files.base.bytes)
        shares = self._shares(leases)
        holding = sum(shares[island] for island in leases) or 1.0
        plan = exchange.Plan(
            round=number,
            fence=self.fence,
            base=state.round.files.base,
            deadline_s=self._run.spec.round_s,
            max_steps=self._run.spec.max_steps,
            patience_s=_PATIENCE_S + self._run.spec.grace_s + 4.0 * self._merge_s,
            tokens_done=totals.tokens_merged,
            tokens_total=totals.tokens_total,
            leases={
                island: exchange.PlannedLease(
                    lease=lease.lease, fence=lease.fence, blocks=lease.blocks, share=shares[island] / holding
                )
                for island, lease in sorted(leases.items())
            },
            refused=dict(state.refused),
        )
        if plan != state.plan:
            state.plan = plan
            write_json(exchange.round_folder(self.exchange, number) / exchange.PLAN, plan)

    def _lend_anew(self, state: _Gathering) -> None:
        """When all that is left is lent to islands that are gone, and one that is there has nothing to do: what was
        lent goes to the living."""
        spec, number = self._run.spec, state.round.number
        if time.monotonic() - state.began < spec.round_s + spec.grace_s or self.ledger.totals().free:
            return
        holding = {lease.island for lease in self.ledger.leases(number)}
        living = {island for island in self._run.islands if self._alive(island)}
        if holding and living and not holding & living:
            self.ledger.take_back(self.fence, number)
            state.began = time.monotonic()
            gone = ", ".join(sorted(holding))
            self._listener.note(f"Round {number}: nothing is heard of {gone}; others get its data", "warning")

    def _shares(self, leases: Mapping[str, object]) -> dict[str, float]:
        """Expected part of each island in a round, by its speed where that is known. An island that is not there has
        none, except while nobody knows yet who will come."""
        known = [steps for island in self._run.islands if (steps := self._round_steps(island)) > 0.0]
        usual = sum(known) / len(known) if known else 1.0
        parts = {
            island: (self._round_steps(island) or usual)
            if island in leases or self._alive(island) or self._seen[island].beat == -1
            else 0.0
            for island in self._run.islands
        }
        total = sum(parts.values()) or 1.0
        return {island: part / total for island, part in parts.items()}

    def _round_steps(self, island: str) -> float:
        """Steps that an island is expected to make in a round; 0: not known yet."""
        expected = self._seen[island].rate * self._run.spec.round_s
        return min(expected, self._run.spec.max_steps or math.inf)

    def _wanted(self, island: str, shares: Mapping[str, float], open_blocks: int) -> int:
        """Blocks of a lease: the island's share of all that is left, but no more than it can use before it hears of
        the hub again."""
        spec, steps = self._run.spec, self._round_steps(island)
        wanted, rounds = math.ceil(open_blocks * shares[island]), 1 + spec.max_unsynced_rounds
        if spec.max_steps:
            wanted = min(wanted, rounds * spec.max_steps)
        elif steps > 0.0:
            wanted = min(wanted, math.ceil(_AHEAD * rounds * steps))
        return max(1, wanted)

    # -- contributions ---------------------------------------------------------------------------
    def _take_in(self, state: _Gathering) -> None:
        """Enter whatever was put up and not looked at yet, for this round or for one that is over."""
        for number in exchange.rounds(self.exchange):
            if number > state.round.number:
                continue
            for (island, attempt), path in exchange.attempts(self.exchange, number).items():
                key = (island, attempt)
                if number == state.round.number and key not in state.looked and island in self._seen:
                    state.looked.add(key)
                    self._enter(state, key, path)
                elif number < state.round.number and island in self._seen:
                    self._enter_late(state.round.number, path)

    def _enter(self, state: _Gathering, key: tuple[str, int], path: Path) -> None:
        island, attempt = key
        up = exchange.read(path, exchange.Up)
        named = (state.round.number, *key)
        if up is None or (up.offer.round, up.offer.island, up.offer.attempt) != named:
            self._listener.note(f"{path.name} in round {state.round.number} says nothing sensible; left out", "warning")
            return
        problem = ""
        try:
            with verified(path.with_name(f"{island}.{attempt}.safetensors"), up.offer.file) as payload:
                if not outer.same_tensors(payload.shapes, self._run.shapes):
                    problem = "it holds other tensors than the model"
                else:
                    state.norms[key] = outer.norm(payload)
                    if not math.isfinite(state.norms[key]):
                        problem = f"its norm is {state.norms[key]}"
        except StateError as error:
            problem = error.detail
        verdict = self.ledger.record(self.fence, up.offer, problem)
        if verdict == "held":
            state.ups[key] = up
            self._seen[island].at = time.monotonic()
            carrier = self._carriers[island]
            if isinstance(carrier, Local):
                carrier.gave(up.offer.file.bytes)
        elif verdict in ("stale", "refused"):
            self._refused(state, key, self.ledger.verdicts()[named][1])

    def _refused(self, state: _Gathering, key: tuple[str, int], reason: str) -> None:
        """Let the island know, which then offers again, and whoever watches."""
        island, attempt = key
        state.refused[island] = max(attempt, state.refused.get(island, 0))
        self._listener.note(
            f"The contribution of {island} to round {state.round.number} was not taken ({reason}); "
            "its data goes back to the queue",
            "warning",
        )

    def _whole(self, state: _Gathering) -> list[Offer]:
        """The contributions that the ledger holds and that can be merged.

        Files of one that an earlier hub took in may be gone or damaged by now: a disk lost them, or this hub goes on
        from another machine's copy of the ledger. Such a contribution is refused.
        """
        found: list[Offer] = []
        for offer in self.ledger.held(state.round.number):
            try:
                self._norm(state, offer)
                self._up(state, offer)
            except StateError as error:
                self.ledger.refuse(self.fence, offer, error.detail)
                self._refused(state, (offer.island, offer.attempt), error.detail)
            else:
                found.append(offer)
        return found

    def _enter_late(self, number: int, path: Path) -> None:
        """`number`: of the open round."""
        up = exchange.read(path, exchange.Up)
        if up is None or (up.offer.round, up.offer.island, up.offer.attempt) in self.ledger.verdicts():
            return
        if self.ledger.record(self.fence, up.offer) == "stale":
            if up.offer.round == number - 1:
                seen = self._seen[up.offer.island]
                late = seen.late_s + time.monotonic() - self._merged_at + _LATE_MORE_S
                seen.late_s = min(late, self._run.spec.round_s)
            self._listener.note(
                f"{up.offer.island} was late for round {up.offer.round}; its data went back to the queue", "warning"
            )

    def _ready(self, state: _Gathering, offers: Sequence[Offer]) -> bool:
        """Whether to merge now."""
        spec, number = self._run.spec, state.round.number
        leases = self.ledger.leases(number)
        quorum = min(spec.quorum, len(self._run.islands))
        if not self.ledger.totals().free:
            # The last blocks may go to fewer islands than the quorum asks for.
            quorum = min(quorum, len(leases))
        given = {offer.island for offer in offers}
        missing = [lease.island for lease in leases if lease.island not in given and self._alive(lease.island)]
        late_s = max((self._seen[island].late_s for island in missing), default=0.0)
        over = time.monotonic() - state.began >= spec.round_s + spec.grace_s + late_s
        if len(offers) < quorum:
            if over and not state.named:
                state.named = True
                self._listener.note(
                    f"Round {number}: {len(offers)} of at least {quorum} contributions are there", "warning"
                )
            return False
        # Whoever is there may yet be given blocks that nobody has.
        return over or not missing

    # -- the merge -------------------------------------------------------------------------------
    def _merge(self, state: _Gathering, offers: Sequence[Offer]) -> None:
        began, current, spec = time.monotonic(), state.round, self._run.spec
        drifts = {offer.island: outer.drift(self._norm(state, offer), offer.used) for offer in offers}
        clipping = outer.clip(drifts, spec.clip_norm_factor)
        merged = [offer for offer in offers if offer.island in clipping.scales]
        payloads = {offer.island: Payload(self._file(offer)) for offer in merged}
        folder = self._fresh(current.number + 1)
        old = self._state(current)
        try:
            stepped = outer.outer_step(
                old / "theta.safetensors",
                old / "momentum.safetensors" if current.files.momentum is not None else None,
                [
                    outer.Contribution(
                        payload=payloads[offer.island], weight=offer.tokens, scale=clipping.scales[offer.island]
                    )
                    for offer in merged
                ],
                rate=spec.outer_learning_rate or outer.outer_rate(len(self._run.islands)),
                mu=spec.outer_momentum,
                new_theta=folder / "theta.safetensors",
                new_momentum=folder / "momentum.safetensors",
            )
        finally:
            for payload in payloads.values():
                payload.close()
        base = outer.write_base(folder / "theta.safetensors", folder / exchange.BASE, spec.payload)
        sync_folder(folder)
        metric = self._metric(state, merged)
        self.ledger.commit(
            self.fence,
            current.number,
            merged,
            RoundFiles(theta=stepped.theta, momentum=stepped.momentum, base=base),
            msgspec.json.encode(metric) + b"\n",
            clipping.refused,
        )
        self._merge_s = time.monotonic() - began
        for offer in offers:
            up = state.ups.get((offer.island, offer.attempt))
            if up is not None and up.seconds > 0.0:
                self._seen[offer.island].rate = offer.used / up.seconds
        self._listener.metric(metric)
        totals = self.ledger.totals()
        self._listener.progress(totals.merged, totals.blocks, f"round {current.number}, loss {metric.loss:.3f}")
        for island, reason in clipping.refused.items():
            self._listener.note(
                f"Round {current.number} was merged without {island}: {reason}; its data goes back to the queue",
                "warning",
            )
        given = {offer.island for offer in offers}
        absent = [island for island in (state.plan.leases if state.plan else ()) if island not in given]
        if absent:
            self._listener.note(
                f"Round {current.number} was merged without {', '.join(absent)}; what they had goes back to the queue",
                "warning",
            )

    def _file(self, offer: Offer) -> Path:
        return exchange.contribution_path(self.exchange, offer.round, offer.island, offer.attempt)

    def _norm(self, state: _Gathering, offer: Offer) -> float:
        """Of a contribution that may have been entered by an earlier hub."""
        key = (offer.island, offer.attempt)
        if key not in state.norms:
            with verified(self._file(offer), offer.file) as payload:
                state.norms[key] = outer.norm(payload)
        return state.norms[key]

    def _metric(self, state: _Gathering, merged: Sequence[Offer]) -> Metric:
        """The round as one point of the run's curve: `step` counts merged blocks, loss and norm are means over them."""
        totals = self.ledger.totals()
        ups = [self._up(state, offer) for offer in merged]
        tokens, blocks = sum(offer.tokens for offer in merged), sum(offer.used for offer in merged)
        now = time.monotonic()
        seconds = max(now - self._merged_at, 1e-9)
        self._merged_at = now
        return Metric(
            step=totals.merged + blocks,
            tokens=totals.tokens_merged + tokens,
            loss=sum(up.loss_sum for up in ups) / tokens,
            learning_rate=max(up.learning_rate for up in ups),
            grad_norm=sum(up.grad_norm * up.offer.tokens for up in ups) / tokens,
            tokens_per_s=blocks * self._run.block_inputs / seconds,
            seconds=seconds,
            at=time.time(),
            rank_seconds=tuple(up.seconds for up in ups),
        )

    def _up(self, state: _Gathering, offer: Offer) -> exchange.Up:
        key = (offer.island, offer.attempt)
        if key not in state.ups:
            up = exchange.read(exchange.ok_path(self.exchange, offer.round, *key), exchange.Up)
            if up is None:
                raise StateError(f"what {offer.island} told about round {offer.round} is gone", fix="start again")
            state.ups[key] = up
        return state.ups[key]
