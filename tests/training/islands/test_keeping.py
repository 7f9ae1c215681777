"""The threads that keep the islands' workers going: none of them ends silently, and none starts what has to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from jupiter_engine.errors import StageFailed
from jupiter_engine.protocol.specs import RoundSpec
from jupiter_engine.training.distributed.islands import keeping as module
from jupiter_engine.training.distributed.islands.keeping import Keeper
from jupiter_engine.training.distributed.islands.starting import IslandState
from jupiter_engine.worker import hub as worker
from tests.training.islands.runs import islands, one_rank
from tests.training.nano import make_run, recipe

pytestmark = pytest.mark.timeout(60)


class Made:
    """A worker that ends whenever it is told to."""

    def __init__(self) -> None:
        self.now = IslandState(state="absent")
        self.starts = 0
        self.trouble: Exception | None = None

    def start(self, order: bytes) -> IslandState:
        if self.trouble is not None:
            raise self.trouble
        self.starts += 1
        self.now = IslandState(state="running", round=self.starts)
        return self.now

    def has_started(self, times: int) -> bool:
        return self.starts == times

    def state(self) -> IslandState:
        return self.now

    def ask_halt(self) -> None: ...

    def stop(self, *, grace_s: float = 0.0) -> IslandState:
        return self.now

    def fail(self) -> None:
        self.now = IslandState(state="exited", exit_status=1, detail="no memory")


def wait_for(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.02)
    monkeypatch.setattr(module, "_PAUSES_S", (0.02,))


def keeper_of(made: Made, restarts: int = 3) -> Keeper:
    return Keeper("a", made, b"", restarts_per_hour=restarts, near=True)


def test_a_disk_that_is_full_for_a_while_ends_no_keeper() -> None:
    made = Made()
    made.trouble = OSError(28, "No space left on device")
    keeper = keeper_of(made, restarts=1000)
    keeper.begin()
    wait_for(lambda: not keeper.said.empty())
    assert "No space left" in keeper.said.get()[0]
    made.trouble = None
    wait_for(lambda: made.starts == 1)
    keeper.leave()


def test_one_that_never_began_can_be_ended() -> None:
    keeper_of(Made()).end(grace_s=0.0)


def test_after_leave_nothing_is_started_again() -> None:
    made = Made()
    keeper = keeper_of(made)
    keeper.begin()
    wait_for(lambda: made.starts == 1)
    keeper.leave()
    made.fail()
    time.sleep(0.3)
    keeper.end(grace_s=0.0)
    assert made.starts == 1


@pytest.mark.parametrize("restarts", [0, 2])
def test_a_worker_is_started_again_as_often_as_is_set(restarts: int, tmp_path: Path) -> None:
    launch = msgspec.structs.replace(islands(RoundSpec(), a=one_rank()), restarts_per_hour=restarts)
    order = make_run(tmp_path, recipe(), launch).order
    keeper = worker._keeper(order, launch.islands[0], tmp_path)
    keeper._worker = made = Made()
    keeper.begin()
    for count in range(1, restarts + 2):
        wait_for(partial(made.has_started, count))
        made.fail()
    wait_for(lambda: keeper.given_up)
    assert made.starts == restarts + 1


def test_too_few_islands_for_a_round_end_the_stage() -> None:
    keepers = [keeper_of(Made()) for _ in range(3)]
    hub: Any = SimpleNamespace()
    listener: Any = SimpleNamespace()
    worker._tend(keepers, 2, listener, None, hub)
    keepers[0].given_up = "no memory"
    worker._tend(keepers, 2, listener, None, hub)
    keepers[2].given_up = "no memory"
    with pytest.raises(StageFailed, match="1 of 3 islands still train, a round needs 2 contributions; a: no memory"):
        worker._tend(keepers, 2, listener, None, hub)
    worker._tend(keepers, 1, listener, None, hub)
    keepers[1].given_up = "no memory"
    with pytest.raises(StageFailed, match="no island trains any more"):
        worker._tend(keepers, 1, listener, None, hub)
