"""Whom the others wait for, from where each rank is."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from jupiter_engine.protocol.specs import HostSpec, LaunchSpec
from jupiter_engine.training.distributed.hosts import GroupEvents, Roll
from jupiter_engine.training.distributed.stall import FACTOR, FLOOR_S, Progress


def moving(places: dict[int, tuple[int, bool]], *, ranks: int = 3) -> Progress:
    progress = Progress(ranks, places=places)
    progress.step_done(0.5)
    return progress


def test_the_rank_that_has_not_arrived_is_named() -> None:
    found = moving({0: (7, True), 1: (7, False), 2: (7, True)}).suspects()
    assert found == {1: "it is still at work on step 8"}


def test_a_rank_a_whole_step_behind_is_named_even_if_it_waits() -> None:
    assert moving({0: (7, True), 1: (6, True), 2: (7, True)}).suspects() == {1: "it waits in step 7"}


def test_a_rank_that_never_began_is_named() -> None:
    assert moving({0: (0, True), 1: (0, True)}).suspects() == {2: "it has not begun yet"}


def test_nobody_is_named_where_all_are_alike() -> None:
    assert moving(dict.fromkeys(range(3), (7, True))).suspects() == {}


def test_a_stopped_process_or_a_silent_machine_explains_more_than_the_place() -> None:
    progress = moving(dict.fromkeys(range(3), (7, True)))
    progress.stopped.add(2)
    assert progress.suspects() == {2: "its process is stopped"}
    assert progress.suspects([1]) == {2: "its process is stopped", 1: "its machine does not answer"}


@pytest.mark.parametrize(("step_s", "patience"), [(0.5, FLOOR_S), (30.0, FACTOR * 30.0)])
def test_patience_follows_the_median_step(step_s: float, patience: float) -> None:
    progress = Progress(2)
    assert progress.patience_s() is None
    assert progress.stalled_s() is None
    for _ in range(3):
        progress.step_done(step_s)
    assert progress.patience_s() == patience
    assert progress.stalled_s() is None
    progress.moved_at = time.monotonic() - patience - 1
    assert progress.stalled_s() == pytest.approx(patience + 1, abs=0.5)


def host(name: str, ssh: str) -> HostSpec:
    return HostSpec(
        name=name, ssh=ssh, ranks=1, runner=("python3", "r"), python="python3", run_folder="/r", addresses=("10.0.0.1",)
    )


def test_a_host_is_left_out_only_after_its_time_and_never_the_leading_one() -> None:
    launch = LaunchSpec(
        twin="mlx", ranks=2, launcher="direct", hosts=(host("a", ""), host("b", "b")), host_lost_after_s=0.05
    )
    roll = Roll(launch)
    assert [h.name for h in roll.present()] == ["a", "b"]
    roll.lost("a")
    roll.lost("b")
    assert roll.missed() == {"b"}
    time.sleep(0.06)
    # No ssh host is called so: it stays away.
    (said,) = roll.look()
    assert "b has not answered" in said
    assert [h.name for h in roll.present()] == ["a"]
    assert roll.missed() == set()
    assert roll.look() == []


def test_events_of_the_launcher_are_read_once_and_torn_lines_wait(tmp_path: Path) -> None:
    events = GroupEvents(tmp_path)
    assert events.read() == []
    (tmp_path / "group.jsonl").write_bytes(b'{"event":"prepared"}\n{"event":"host_si')
    assert [e["event"] for e in events.read()] == ["prepared"]
    with (tmp_path / "group.jsonl").open("ab") as file:
        file.write(b'lent","host":"b"}\n')
    assert events.read() == [{"event": "host_silent", "host": "b"}]
    assert events.read() == []
