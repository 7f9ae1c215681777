"""The ledger: under any order of contributions, crashes, retries and takeovers no block counts twice or is lost."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jupiter_engine.checkpoints.tensors import FileRecord
from jupiter_engine.errors import StateError
from jupiter_engine.training.distributed.islands.ledger import (
    Deposed,
    LeadTaken,
    Lease,
    Ledger,
    Offer,
    RoundFiles,
    blocks_of,
    ranges,
)

TOKENS = [7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47]
ISLANDS = ("a", "b", "c")


def files(number: int) -> RoundFiles:
    made = [FileRecord(sha256=f"{kind}{number}", bytes=number) for kind in ("theta", "momentum", "base")]
    return RoundFiles(theta=made[0], momentum=made[1], base=made[2])


def offer_of(lease: Lease, number: int, *, used: int, attempt: int = 1, fence: int | None = None) -> Offer:
    blocks = blocks_of(lease.blocks)[:used]
    return Offer(
        round=lease.round,
        island=lease.island,
        attempt=attempt,
        lease=lease.lease,
        fence=lease.fence if fence is None else fence,
        base_sha256=f"base{number}",
        file=FileRecord(sha256="s", bytes=1),
        used=used,
        tokens=sum(TOKENS[block] for block in blocks),
    )


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / "rounds.db")
    made.create("run", TOKENS)
    return made


class Killed(BaseException):
    """The process ends at this instant."""


class Dying(Ledger):
    """A connection whose next transaction is lost at the last moment."""

    dying = False

    def _before_commit(self) -> None:
        if self.dying:
            self.dying = False
            raise Killed


class Bookkeeping(RuleBasedStateMachine):
    """A run with up to two hubs, of which one may be stale, and islands whose messages come late, twice or wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.ledger = Dying(self.folder / "rounds.db", clock=self.clock)
        self.ledger.create("run", TOKENS)
        self.fence = self.ledger.take_lead("hub-0", 30.0)
        self.fences = [self.fence]
        self.ledger.begin(self.fence, files(1))
        self.round = 1
        self.leases: list[Lease] = []
        self.offers: list[Offer] = []
        self.counted: dict[int, tuple[int, str, int]] = {}

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.folder)

    @rule(island=st.sampled_from(ISLANDS), wanted=st.integers(0, 6), dies=st.booleans())
    def lend(self, island: str, wanted: int, dies: bool) -> None:
        self.ledger.dying = dies
        try:
            lease = self.ledger.lend(self.fence, self.round, island, wanted)
        except Killed:
            return
        finally:
            self.ledger.dying = False
        if lease is not None and lease not in self.leases:
            self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def contribute(self, data: st.DataObject) -> None:
        """Of any lease there ever was: current, stale, of a fence before; honest or not."""
        lease = data.draw(st.sampled_from(self.leases))
        used = data.draw(st.integers(0, lease.size + 1))
        offer = offer_of(
            lease,
            data.draw(st.sampled_from([lease.round, lease.round, lease.round + 1])),
            used=used,
            attempt=data.draw(st.integers(1, 3)),
            fence=data.draw(st.sampled_from([lease.fence, lease.fence, lease.fence + 1])),
        )
        self.ledger.dying = data.draw(st.booleans())
        try:
            verdict = self.ledger.record(self.fence, offer)
        except Killed:
            return
        finally:
            self.ledger.dying = False
        sound = (
            offer.round == self.round
            and offer.fence == lease.fence
            and offer.base_sha256 == f"base{self.round}"
            and 0 < used <= lease.size
        )
        first = all((o.round, o.island, o.attempt) != (offer.round, offer.island, offer.attempt) for o in self.offers)
        if first:
            assert (verdict == "held") == sound, (verdict, offer)
            self.offers.append(offer)
        # Told twice, it says the same.
        assert self.ledger.record(self.fence, offer) == verdict

    @rule(data=st.data(), dies=st.booleans())
    def merge(self, data: st.DataObject, dies: bool) -> None:
        held = self.ledger.held(self.round)
        assert len({offer.island for offer in held}) == len(held)
        chosen = data.draw(st.lists(st.sampled_from(held), unique=True)) if held else []
        used = {offer.island: blocks_of(self.lease_of(offer).blocks)[: offer.used] for offer in chosen}
        self.ledger.dying = dies
        try:
            self.ledger.commit(self.fence, self.round, chosen, files(self.round + 1), b"m")
        except Killed:
            return
        finally:
            self.ledger.dying = False
        for offer in chosen:
            for block in used[offer.island]:
                assert block not in self.counted, "counted twice"
                self.counted[block] = (self.round, offer.island, offer.attempt)
        self.round += 1

    def lease_of(self, offer: Offer) -> Lease:
        return next(lease for lease in self.ledger.leases(self.round) if lease.lease == offer.lease)

    @rule(dies=st.booleans())
    def what_is_lent_is_taken_back(self, dies: bool) -> None:
        self.ledger.dying = dies
        try:
            self.ledger.take_back(self.fence, self.round)
        except Killed:
            return
        finally:
            self.ledger.dying = False
        assert self.ledger.totals().lent == 0
        assert self.ledger.held(self.round) == []
        self.leases = [lease for lease in self.leases if lease.round != self.round]

    @rule()
    def hub_is_killed_and_another_takes_over(self) -> None:
        self.ledger.close()
        self.ledger = Dying(self.folder / "rounds.db", clock=self.clock)
        self.ledger.create("run", TOKENS)
        owner = f"hub-{len(self.fences)}"
        with pytest.raises(LeadTaken):
            self.ledger.take_lead(owner, 30.0)
        self.clock.now += 31.0
        self.fence = self.ledger.take_lead(owner, 30.0)
        assert self.fence > max(self.fences)
        self.fences.append(self.fence)

    @precondition(lambda self: len(self.fences) > 1)
    @rule(data=st.data())
    def a_deposed_hub_wakes_up(self, data: st.DataObject) -> None:
        old = data.draw(st.sampled_from(self.fences[:-1]))
        lease = next(iter(self.ledger.leases(self.round)), None)
        with pytest.raises(Deposed):
            self.ledger.commit(old, self.round, [], files(99), b"m")
        with pytest.raises(Deposed):
            self.ledger.lend(old, self.round, "a", 3)
        with pytest.raises(Deposed):
            self.ledger.renew(old, 30.0)
        if lease is not None:
            with pytest.raises(Deposed):
                self.ledger.record(old, offer_of(lease, self.round, used=1, attempt=9))

    @invariant()
    def every_block_is_in_one_place_and_counts_as_the_merges_say(self) -> None:
        totals = self.ledger.totals()
        assert totals.free + totals.lent + totals.merged == len(TOKENS)
        lent = [block for lease in self.ledger.leases(self.round) for block in blocks_of(lease.blocks)]
        assert len(lent) == len(set(lent)) == totals.lent
        assert not set(lent) & set(self.counted)
        assert {row[0]: tuple(row[1:]) for row in self.ledger.merges()} == self.counted
        assert totals.tokens_merged == sum(TOKENS[block] for block in self.counted)
        current = self.ledger.current()
        assert current is not None
        assert (current.number, current.files) == (self.round, files(self.round))
        assert len(self.ledger.metrics()) == self.round - 1


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_ranges_are_blocks_and_back() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == ((0, 3), (5, 6), (7, 9))
    assert blocks_of(((0, 3), (5, 6), (7, 9))) == [0, 1, 2, 5, 7, 8]
    assert ranges([]) == ()


def test_another_run_is_refused(ledger: Ledger) -> None:
    with pytest.raises(StateError, match="another recipe"):
        ledger.create("other", TOKENS)


def test_a_dead_leader_is_replaced_at_once_a_living_one_is_not(ledger: Ledger) -> None:
    one = ledger.take_lead("one", 1000.0)
    with pytest.raises(LeadTaken) as taken:
        ledger.take_lead("two", 1000.0, lambda _: False)
    assert 990 < taken.value.left_s <= 1000
    assert ledger.take_lead("two", 1000.0, lambda owner: owner == "one") > one
    with pytest.raises(Deposed):
        ledger.renew(one, 10.0)


def test_a_ledger_that_is_begun_anew_repeats_no_fence_and_no_lease(tmp_path: Path) -> None:
    clock = Clock()
    clock.now = 1.7e9
    given: list[Lease] = []
    for name in ("lost", "new"):
        ledger = Ledger(tmp_path / name, clock=clock)
        ledger.create("run", TOKENS)
        fence = ledger.take_lead(name, 30.0)
        ledger.begin(fence, files(1))
        lease = ledger.lend(fence, 1, "a", 4)
        assert lease is not None
        given.append(lease)
        clock.now += 61.0
    old, new = given
    assert new.fence > old.fence > 0
    assert new.lease > old.lease
    # Trained for the lost one: it says nothing about the blocks that are lent now.
    assert ledger.record(new.fence, offer_of(old, 1, used=2)) == "refused"
    ledger.close()


def test_the_attempt_that_used_most_is_held_and_the_others_superseded(ledger: Ledger) -> None:
    fence = ledger.take_lead("hub", 30.0)
    ledger.begin(fence, files(1))
    lease = ledger.lend(fence, 1, "a", 5)
    assert lease is not None
    assert lease.blocks == ((0, 5),)
    for attempt, used in ((1, 2), (2, 4), (3, 3)):
        assert ledger.record(fence, offer_of(lease, 1, used=used, attempt=attempt)) == "held"
    (best,) = ledger.held(1)
    assert (best.attempt, best.used, best.tokens) == (2, 4, 7 + 11 + 13 + 17)
    ledger.commit(fence, 1, [best], files(2), b"m")
    assert {key[2]: verdict for key, (verdict, _) in ledger.verdicts().items()} == {
        1: "superseded",
        2: "merged",
        3: "superseded",
    }
    again = ledger.lend(fence, 2, "a", 2)
    assert again is not None
    assert again.blocks == ((4, 6),)
    late = ledger.record(fence, offer_of(lease, 1, used=5, attempt=4))
    assert late == "stale"


def test_a_contribution_that_lies_about_its_tokens_is_refused(ledger: Ledger) -> None:
    fence = ledger.take_lead("hub", 30.0)
    ledger.begin(fence, files(1))
    lease = ledger.lend(fence, 1, "a", 5)
    assert lease is not None
    honest = offer_of(lease, 1, used=2)
    lie = msgspec.structs.replace(honest, tokens=honest.tokens + 1)
    assert ledger.record(fence, lie) == "refused"
    assert ledger.record(fence, msgspec.structs.replace(honest, attempt=2), "its file is damaged") == "refused"
    assert ledger.held(1) == []
    with pytest.raises(StateError, match="waits for no merge"):
        ledger.commit(fence, 1, [honest], files(2), b"m")
    assert ledger.current().number == 1  # type: ignore[union-attr]


def test_commits_reach_the_disk_on_every_system(ledger: Ledger) -> None:
    asked = {name: ledger._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("fullfsync", "checkpoint_fullfsync")}
    assert asked == {"fullfsync": 1, "checkpoint_fullfsync": 1}


def test_what_is_held_can_be_taken_back_once(ledger: Ledger) -> None:
    fence = ledger.take_lead("hub", 60.0)
    ledger.begin(fence, files(1))
    lease = ledger.lend(fence, 1, "a", 4)
    assert lease is not None
    offer = offer_of(lease, 1, used=2)
    assert ledger.record(fence, offer) == "held"
    ledger.refuse(fence, offer, "its file is gone")
    assert ledger.held(1) == []
    assert ledger.verdicts() == {(1, "a", 1): ("refused", "its file is gone")}
    with pytest.raises(StateError, match="waits for no merge"):
        ledger.refuse(fence, offer, "again")
    # The same work under a later attempt counts.
    assert ledger.record(fence, offer_of(lease, 1, used=2, attempt=2)) == "held"
