"""One suite for every launcher: a group of ranks on this machine, and on three hosts of their own."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch.launches import KINDS, Launch
from tests.rig import Rig, needs_rig

ROOT = Path(__file__).resolve().parents[2]
Make = Callable[..., Launch]

SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow if kind != "direct-mlx" else ()) for kind in KINDS]
QUICK_KINDS = ["direct-mlx", "mlx.launch", pytest.param("torchrun", marks=pytest.mark.slow)]
"""For what does not need a framework in the ranks: twin is empty there."""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes launches; whatever a failed test leaves of them is ended."""
    made: list[Launch] = []

    def build(kind: str, *, rig: Rig | None = None, **arguments: Any) -> Launch:
        launch = Launch(kind, tmp_path, arguments.pop("order", {}), rig=rig, **arguments)
        made.append(launch)
        return launch

    yield build
    for launch in made:
        launch.close()


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    # dash: mlx.launch's scripts are bash, whatever the login shell of the other hosts is.
    with Rig(3, shell="/bin/dash") as made:
        yield made


# -- this machine --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_results_statuses_and_logs_of_every_rank(make: Make, kind: str) -> None:
    launch = make(kind)
    assert launch.run() == 0, launch.output
    for rank in (0, 1):
        ready, said, over = launch.reports(rank)
        assert (ready["report"], ready["threads"]) == ("ready", "1")
        assert (said["value"], over["report"]) == (3.0, "over")
        lines = launch.log(rank).splitlines()
        assert [line for line in lines if "line" in line] == [f"rank {rank} line {index}" for index in range(200)]
        assert f"rank {rank} errs" in lines
        assert not any(f"rank {1 - rank}" in line for line in lines)
    assert launch.last_line() == {
        "ended": "done",
        "reason": "",
        "ranks": {str(rank): {"host": "here", "exit_status": 0, "signal": None} for rank in (0, 1)},
        "left": [],
    }
    names = {event["event"] for event in launch.events()}
    assert names == {"prepared", "started", "ready", "rank_started", "rank_exited", "ended"}
    started = {event["rank"]: event["process"]["pid"] for event in launch.events("rank_started")}
    assert started == {rank: launch.reports(rank)[0]["process"]["pid"] for rank in (0, 1)}
    launch.assert_nothing_left()


@pytest.mark.parametrize("kind", QUICK_KINDS)
@pytest.mark.parametrize(
    ("act", "exit_status", "number", "words"),
    [
        ("raise", 1, None, "ended with status 1"),
        ("exit 3", 3, None, "ended with status 3"),
        ("kill", None, "KILL", "was ended by signal KILL"),
    ],
)
def test_a_ranks_end_is_told_as_it_was(
    make: Make, kind: str, act: str, exit_status: int | None, number: str | None, words: str
) -> None:
    launch = make(kind, order={"twin": "", "acts": {"1": act}, "seconds": 60.0})
    assert launch.run() == 1
    last = launch.last_line()
    assert last["ended"] == "failed"
    assert last["reason"] == f"rank 1 on here {words}"
    assert last["ranks"]["1"] == {"host": "here", "exit_status": exit_status, "signal": number}
    # The other one was ended because of that (mlx.launch and torchrun may be faster than the group).
    assert last["ranks"]["0"]["ended_by"] in ("group", launch.spec["launcher"])
    died = launch.events("rank_exited")[0]
    assert (died["rank"], died["exit_status"], died["signal"]) == (1, exit_status, number)
    if act == "raise":
        assert "ValueError: rank 1 does not like this" in launch.log(1)
    launch.assert_nothing_left()


@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_a_death_is_seen_within_a_second_and_ends_the_launch(make: Make, kind: str) -> None:
    launch = make(kind, order={"twin": "", "seconds": 60.0})
    launch.start()
    launch.until_joined()
    killed_at = time.time()
    os.kill(launch.rank_pid(0), signal.SIGKILL)
    assert launch.wait() == 1
    assert launch.last_line()["reason"] == "rank 0 on here was ended by signal KILL"
    assert launch.events("rank_exited")[0]["at"] - killed_at < 1.5
    launch.assert_nothing_left()


@pytest.mark.parametrize("kind", QUICK_KINDS)
@pytest.mark.parametrize("moment", ["at work", "at once"])
def test_sigterm_ends_everything(make: Make, kind: str, moment: str) -> None:
    launch = make(kind, order={"twin": "", "seconds": 60.0})
    launch.start()
    if moment == "at work":
        launch.until_joined()
    else:
        launch.until(lambda: launch.folder.joinpath("hosts.json").exists(), "the beginning")
    os.kill(launch.pid(), signal.SIGTERM)
    assert launch.wait() == 143
    assert launch.last_line()["ended"] == "stopped"
    launch.assert_nothing_left()


@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_without_a_leader_the_lease_ends_the_ranks(make: Make, kind: str) -> None:
    launch = make(kind, order={"twin": "", "seconds": 60.0}, lease_s=3)
    launch.start()
    launch.until_joined()
    os.kill(launch.pid(), signal.SIGKILL)
    assert launch.wait() == -signal.SIGKILL
    assert launch.processes()
    launch.assert_nothing_left(15.0)


def test_a_stopped_rank_is_told_and_left_alone(make: Make) -> None:
    launch = make("direct-mlx", order={"twin": "", "seconds": 4.0})
    launch.start()
    launch.until_joined()
    os.kill(launch.rank_pid(1), signal.SIGSTOP)
    launch.until_event("rank_stopped", rank=1, host="here")
    time.sleep(2.0)
    os.kill(launch.rank_pid(1), signal.SIGCONT)
    launch.until_event("rank_resumed", rank=1)
    assert launch.wait() == 0


def test_a_rank_that_never_reports_ready_is_named(make: Make) -> None:
    launch = make("direct-mlx", order={"twin": "", "acts": {"1": "never ready"}, "seconds": 60.0}, init_deadline_s=3)
    assert launch.run() == 1
    assert launch.last_line()["reason"] == "not ready within 3 s: rank 1 on here"
    launch.assert_nothing_left()


def test_taken_ports_are_passed_over(make: Make) -> None:
    free = make("direct-mlx", order={"twin": ""})
    assert free.run() == 0
    port = free.events("started")[0]["port"]
    with socket.create_server(("127.0.0.1", port + 509)):
        launch = make("direct-mlx", order={})
        assert launch.run() == 0
        (prepared,) = launch.events("prepared")
        assert prepared["busy"] == [port + 509]
        assert launch.events("started")[0]["port"] == port + 510


@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_a_launch_ends_what_an_older_one_left(make: Make, kind: str) -> None:
    old = make(kind, order={"twin": "", "seconds": 60.0})
    old.start()
    old.until_joined()
    os.kill(old.pid(), signal.SIGKILL)
    old.wait()
    kept = {old.rank_pid(rank) for rank in (0, 1)}
    launch = make(kind, order={"twin": "", "seconds": 0.5})
    assert launch.run() == 0, launch.output
    assert launch.events("prepared")[0]["ended"]
    assert not any(psutil.pid_exists(pid) for pid in kept)
    launch.assert_nothing_left()


def test_a_child_that_a_rank_leaves_is_ended(make: Make) -> None:
    launch = make("direct-mlx", order={"twin": "", "acts": {"0": "leave a child"}, "seconds": 1.0})
    launch.start()
    launch.until_joined()

    def children() -> list[psutil.Process]:
        sleepers = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "600"]]
        return [p for p in sleepers if p.environ().get("JUPITER_TEST") == str(launch.run_folders["here"])]

    assert len(launch.until(children, "the child")) == 1
    assert launch.wait() == 0
    assert children() == []


def test_a_program_that_is_not_there_is_refused(make: Make) -> None:
    launch = make("direct-mlx", program=["-m", "no_such_module"])
    assert launch.run() == 1
    assert "finds no no_such_module" in launch.last_line()["reason"]
    assert launch.events("host_failed")[0]["kind"] == "python"
    launch.assert_nothing_left()


@pytest.mark.parametrize("kind", ["direct-mlx", "mlx.launch"])
def test_the_launcher_sleeps_while_ranks_work(make: Make, kind: str) -> None:
    """mlx.launch by itself takes 10 CPU seconds in 10; see scripts/bench/launch."""
    launch = make(kind, order={"twin": "", "seconds": 60.0})
    launch.start()
    launch.until_joined()
    time.sleep(2.5)
    ranks = {launch.rank_pid(0), launch.rank_pid(1)}
    family = [psutil.Process(pid) for pid in launch.processes() if pid not in ranks]
    before = sum(sum(process.cpu_times()[:2]) for process in family)
    time.sleep(4.0)
    spent_s = sum(sum(process.cpu_times()[:2]) for process in family) - before
    assert len(family) >= 6
    assert spent_s < 0.5
    os.kill(launch.pid(), signal.SIGTERM)
    assert launch.wait() == 143


# -- three hosts ---------------------------------------------------------------------------------------
@needs_rig
@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_three_hosts_sum_and_their_logs_come_to_the_leader(make: Make, rig: Rig, kind: str) -> None:
    launch = make(kind, rig=rig, ranks=(1, 1, 1))
    assert launch.run() == 0, (launch.output, launch.events())
    for rank, name in enumerate(("node1", "node2", "node3")):
        said = launch.reports(rank)[1]
        assert (said["value"], said["host"]) == (6.0, name)
        there = launch.run_folders[name] / "ranks" / str(launch.generation)
        assert launch.log(rank) == (there / f"rank-{rank}.log").read_text()
        assert f"rank {rank} line 199\n" in launch.log(rank)
        assert launch.last_line()["ranks"][str(rank)] == {"host": name, "exit_status": 0, "signal": None}
        identity = next(event["process"] for event in launch.events("rank_started") if event["rank"] == rank)
        assert identity["pid"] == launch.reports(rank)[0]["process"]["pid"]
    launch.assert_nothing_left()


@needs_rig
@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_several_ranks_on_some_hosts(make: Make, rig: Rig, kind: str) -> None:
    launch = make(kind, rig=rig, ranks=(1, 2), order={"twin": ""})
    assert launch.run() == 0, launch.output
    assert [launch.reports(rank)[1]["host"] for rank in (0, 1, 2)] == ["node1", "node2", "node2"]
    launch.assert_nothing_left()


@needs_rig
@pytest.mark.parametrize("kind", QUICK_KINDS)
@pytest.mark.parametrize(("act", "exit_status", "number"), [("exit 3", 3, None), ("kill", None, "KILL")])
def test_a_far_rank_ends_the_launch_with_its_true_status(
    make: Make, rig: Rig, kind: str, act: str, exit_status: int | None, number: str | None
) -> None:
    launch = make(kind, rig=rig, ranks=(1, 1, 1), order={"twin": "", "acts": {"2": act}, "seconds": 60.0})
    assert launch.run() == 1
    assert launch.last_line()["ranks"]["2"] == {"host": "node3", "exit_status": exit_status, "signal": number}
    assert launch.last_line()["reason"].startswith("rank 2 on node3 ")
    launch.assert_nothing_left()


@needs_rig
@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_sigterm_ends_all_hosts(make: Make, rig: Rig, kind: str) -> None:
    launch = make(kind, rig=rig, ranks=(1, 1, 1), order={"twin": "", "seconds": 60.0})
    launch.start()
    launch.until_joined()
    os.kill(launch.pid(), signal.SIGTERM)
    # nsenter stands between us and it.
    assert launch.wait() == 143
    launch.assert_nothing_left()


@needs_rig
@pytest.mark.slow
@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_without_a_leader_the_lease_ends_far_ranks(make: Make, rig: Rig, kind: str) -> None:
    launch = make(kind, rig=rig, ranks=(1, 1, 1), order={"twin": "", "seconds": 60.0}, lease_s=3)
    launch.start()
    launch.until_joined()
    os.kill(launch.pid(), signal.SIGKILL)
    launch.wait()
    launch.assert_nothing_left(15.0)


@needs_rig
def test_a_host_that_is_not_there_is_named(make: Make, rig: Rig) -> None:
    rig["node3"].cut()
    try:
        launch = make("direct-mlx", rig=rig, ranks=(1, 1, 1), order={"twin": ""}, init_deadline_s=1)
        assert launch.run() == 1
    finally:
        rig["node3"].heal()
    assert launch.last_line()["reason"].startswith("not ready: node3: ")
    assert [event["host"] for event in launch.events("host_failed")] == ["node3"]
    launch.assert_nothing_left()


@needs_rig
def test_a_host_that_comes_late_takes_part(make: Make, rig: Rig) -> None:
    rig["node2"].power_off()
    launch = make("direct-mlx", rig=rig, ranks=(1, 1), order={"twin": ""})
    launch.start()
    time.sleep(1.5)
    rig["node2"].boot()
    assert launch.wait() == 0
    launch.assert_nothing_left()


@needs_rig
def test_another_order_on_a_host_is_refused(make: Make, rig: Rig) -> None:
    launch = make("direct-mlx", rig=rig, ranks=(1, 1), order={"twin": ""})
    (launch.run_folders["node2"] / "spec.json").write_text("{}")
    assert launch.run() == 1
    assert "another order than the leading host's" in launch.last_line()["reason"]


@needs_rig
@pytest.mark.slow
@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_power_loss_of_a_host(make: Make, rig: Rig, kind: str) -> None:
    launch = make(kind, rig=rig, ranks=(1, 1, 1), order={"twin": "", "seconds": 90.0}, lease_s=12)
    launch.start()
    launch.until_joined()
    off_at = time.time()
    rig["node2"].power_off()
    try:
        assert launch.until_event("host_silent", host="node2")["at"] - off_at < 10.0
        assert launch.wait() == 1
        last = launch.last_line()
        assert last["reason"].startswith("node2 has not answered for ")
        assert last["left"] == ["node2"]
        assert (last["ranks"]["1"]["host"], last["ranks"]["1"]["lost"]) == ("node2", True)
        assert time.time() - off_at < 12 + 15
        launch.assert_nothing_left()
    finally:
        rig["node2"].boot()


@needs_rig
@pytest.mark.slow
@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_a_host_that_is_cut_off_ends_its_ranks_itself(make: Make, rig: Rig, kind: str) -> None:
    launch = make(kind, rig=rig, ranks=(1, 1, 1), order={"twin": "", "seconds": 90.0}, lease_s=9)
    launch.start()
    launch.until_joined()
    rig["node3"].cut()
    try:
        assert launch.wait() == 1
        assert launch.last_line()["left"] == ["node3"]

        def living() -> list[str]:
            lines = [" ".join(psutil.Process(pid).cmdline()) for pid in rig["node3"].pids()]
            # The far ends of broken connections know nothing yet.
            return [line for line in lines if "sshd" not in line and " follow" not in line and line]

        launch.until(lambda: not living(), "the end of the ranks on node3", 20.0)
    finally:
        rig["node3"].heal()
    launch.assert_nothing_left(30.0)


@needs_rig
@pytest.mark.slow
def test_a_host_that_was_restarted_is_lost_at_once(make: Make, rig: Rig) -> None:
    launch = make("direct-mlx", rig=rig, ranks=(1, 1), order={"twin": "", "seconds": 90.0})
    launch.start()
    launch.until_joined()
    rig["node2"].power_off()
    rig["node2"].boot()
    booted_at = time.monotonic()
    assert launch.wait() == 1
    assert time.monotonic() - booted_at < 15.0
    # Whichever of the two records is read first after the boot: both are true.
    gone = ("node2: its node runner has gone", "node2: what watches its ranks has gone")
    assert launch.last_line()["reason"] in gone
    launch.assert_nothing_left()


@needs_rig
@pytest.mark.slow
@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_a_host_that_was_cut_off_for_a_while(make: Make, rig: Rig, kind: str) -> None:
    launch = make(kind, rig=rig, ranks=(1, 1, 1), order={"twin": "", "seconds": 16.0}, lease_s=60)
    launch.start()
    launch.until_joined()
    cut_at = time.time()
    rig["node3"].cut()
    try:
        assert launch.until_event("host_silent", host="node3")["at"] - cut_at < 10.0
    finally:
        rig["node3"].heal()
    launch.until_event("host_back", host="node3")
    assert launch.wait() == 0, launch.output
    assert launch.reports(2)[-1]["report"] == "over"
    launch.assert_nothing_left()


@needs_rig
@pytest.mark.slow
def test_a_far_stop_is_told(make: Make, rig: Rig) -> None:
    launch = make("direct-mlx", rig=rig, ranks=(1, 1), order={"twin": "", "seconds": 60.0})
    launch.start()
    launch.until_joined()
    os.kill(launch.rank_pid(1), signal.SIGSTOP)
    launch.until_event("rank_stopped", rank=1, host="node2")
    # A stopped rank can be ended all the same.
    os.kill(launch.pid(), signal.SIGTERM)
    assert launch.wait() == 143
    launch.assert_nothing_left()


@needs_rig
@pytest.mark.slow
@pytest.mark.parametrize("kind", QUICK_KINDS)
@pytest.mark.parametrize(
    ("verb", "reason"),
    [("keep-run", "node2: its node runner has gone"), ("rank-run", "node2: what watches its ranks has gone")],
)
def test_a_killed_part_of_the_launcher_ends_the_launch(make: Make, rig: Rig, kind: str, verb: str, reason: str) -> None:
    launch = make(kind, rig=rig, ranks=(1, 1), order={"twin": "", "seconds": 60.0})
    launch.start()
    launch.until_joined()
    (pid,) = [pid for pid in rig["node2"].pids() if verb in psutil.Process(pid).cmdline()]
    os.kill(pid, signal.SIGKILL)
    killed_at = time.monotonic()
    assert launch.wait() == 1
    assert time.monotonic() - killed_at < 25.0
    # A rank that the node runner ends because its keeper is gone may be heard of first.
    assert launch.last_line()["reason"] in (reason, "rank 1 on node2 was ended by signal TERM")
    launch.assert_nothing_left()


@needs_rig
@pytest.mark.slow
@pytest.mark.parametrize(("rank", "name"), [("0", "node1"), ("1", "node2")])
def test_a_full_disk_ends_the_launch_in_words(make: Make, rank: str, name: str) -> None:
    with Rig(2, disk_bytes=4 * 2**20) as small:
        order = {"twin": "", "acts": {rank: "fill"}, "seconds": 60.0}
        launch = make("direct-mlx", rig=small, ranks=(1, 1), order=order)
        assert launch.run() == 1
        assert launch.last_line()["reason"].startswith(f"{name}: ")
        assert "is full" in launch.last_line()["reason"] or "No space left" in launch.last_line()["reason"]
        launch.assert_nothing_left(10.0)


@needs_rig
@pytest.mark.slow
def test_far_ranks_can_see_whether_they_are_wanted(make: Make, rig: Rig) -> None:
    launch = make("direct-mlx", rig=rig, ranks=(1, 1), order={"twin": "", "seconds": 60.0})
    launch.start()
    launch.until_joined()
    look = (
        "import sys; from pathlib import Path; from jupiter_engine.worker.rank import _wanted; "
        "print(_wanted(Path(sys.argv[1]), int(sys.argv[2])))"
    )
    argv = ("env", f"PYTHONPATH={ROOT}", sys.executable, "-c", look, str(launch.run_folders["node2"]))
    assert rig["node2"].run(*argv, str(launch.generation)).stdout == "True\n"
    assert rig["node2"].run(*argv, str(launch.generation + 1)).stdout == "False\n"
    os.kill(launch.pid(), signal.SIGTERM)
    assert launch.wait() == 143
    assert rig["node2"].run(*argv, str(launch.generation)).stdout == "False\n"
