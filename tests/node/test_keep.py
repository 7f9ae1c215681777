"""Kept processes: started once, adopted, ended whole, and their ends known, whatever is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from tests.node.kept import Node, kill, state_of, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def ended(node: Node) -> bool:
    return bool(node.named("ended"))


def test_an_end_is_known_with_its_status_and_everything_is_told_once(node: Node) -> None:
    node.order(
        node.process("good", "exit 0"), node.process("bad", "sleep 0.3; exit 7"), node.process("shot", "kill -9 $$")
    )
    assert node.keep()["runner"]["alive"]
    until(lambda: ended(node))
    processes = node.state()["processes"]
    assert (processes["good"]["state"], processes["good"]["exit_status"]) == ("exited", 0)
    assert processes["bad"]["exit_status"] == 7
    assert processes["shot"]["signal"] == "KILL"
    assert "exit_status" not in processes["shot"]
    told = [(event["event"], event.get("name")) for event in node.events()]
    for name in ("good", "bad", "shot"):
        assert told.count(("started", name)) == told.count(("exited", name)) == 1
        assert node.starts(name) == 1
    assert told[-1][0] == "ended"
    until(lambda: not node.of_ours())
    assert node.keep()["processes"]["bad"]["exit_status"] == 7, "keep after the end starts nothing"
    assert node.starts("bad") == 1


def test_a_program_that_is_not_there_is_an_end_with_a_reason(node: Node) -> None:
    node.order({**node.process("worker", ""), "argv": ["/no/such/python"]})
    node.keep()
    until(lambda: ended(node))
    process = node.state()["processes"]["worker"]
    assert (process["state"], process["exit_status"]) == ("exited", 127)
    assert "No such file" in process["error"]


def test_many_keeps_at_once_make_one_runner_and_one_start(node: Node) -> None:
    node.order(node.process("worker", "sleep 60"))
    with ThreadPoolExecutor(6) as pool:
        states = list(pool.map(lambda _: node.keep(), range(6)))
    assert len({state["runner"]["pid"] for state in states}) == 1
    until(lambda: node.state()["processes"]["worker"]["state"] == "running")
    assert node.starts("worker") == 1
    node.tell(id="x", do="kill")


def test_output_and_environment_arrive_and_no_input_does(node: Node) -> None:
    node.order({**node.process("worker", "echo out $LETTER; echo err >&2; cat; echo end"), "env": {"LETTER": "ä\nb"}})
    node.keep()
    until(lambda: ended(node))
    assert (node.folder / "worker.log").read_text() == "out ä b\nerr\nend\n"


def test_the_channel_that_started_a_runner_closes_at_once(node: Node) -> None:
    node.order(node.process("worker", "sleep 60"))
    began = time.monotonic()
    with subprocess.Popen(node.argv("keep", node.keep_folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as keep:
        # Both pipes end only when nobody holds them any more: not the runner, not the worker.
        out, _ = keep.communicate(timeout=20)
    assert json.loads(out)["runner"]["alive"]
    assert time.monotonic() - began < 15
    runner = node.state()["runner"]["pid"]
    assert os.getsid(runner) == runner
    kill(runner, signal.SIGHUP)
    time.sleep(0.3)
    assert node.state()["runner"]["alive"], "a hang-up means nothing to it"
    node.tell(id="x", do="kill")


def test_a_killed_runner_is_replaced_and_adopts(node: Node) -> None:
    node.order(node.process("worker", "sleep 60"))
    node.keep()
    until(lambda: node.named("started"))
    first = node.state()
    kill(first["runner"]["pid"])
    until(lambda: not node.state()["runner"]["alive"])
    assert node.state()["processes"]["worker"]["state"] == "running"
    second = node.keep()
    assert second["runner"]["alive"]
    assert second["runner"]["pid"] != first["runner"]["pid"]
    assert second["processes"]["worker"]["pid"] == first["processes"]["worker"]["pid"]
    until(lambda: node.named("adopted"))
    node.tell(id="x", do="kill")
    assert node.starts("worker") == 1
    assert len(node.named("started")) == len(node.named("exited")) == 1


def test_an_end_while_no_runner_lived_is_known_all_the_same(node: Node) -> None:
    node.order(node.process("worker", "sleep 1; exit 5"))
    node.keep()
    until(lambda: node.named("started"))
    kill(node.state()["runner"]["pid"])
    until(lambda: node.state()["processes"]["worker"]["state"] == "exited")
    assert not node.named("exited"), "nobody was there to tell it"
    node.keep()
    until(lambda: ended(node))
    assert [event["exit_status"] for event in node.named("exited")] == [5]
    assert node.starts("worker") == 1


def test_without_its_parent_a_process_runs_on_and_its_end_is_lost(node: Node) -> None:
    node.order(node.process("worker", "sleep 1.5; exit 5"))
    node.keep()
    until(lambda: node.named("started"))
    kill(node.record("worker.pid.json")["hold"]["pid"])
    time.sleep(0.5)
    assert node.state()["processes"]["worker"]["state"] == "running"
    until(lambda: ended(node))
    assert node.state()["processes"]["worker"]["state"] == "lost"
    assert len(node.named("lost")) == 1
    assert node.starts("worker") == 1


def test_after_a_restart_of_the_machine_its_processes_are_lost(node: Node) -> None:
    node.order(node.process("worker", "sleep 60"))
    node.keep()
    until(lambda: node.named("started"))
    kill(node.state()["runner"]["pid"])
    record = node.record("worker.pid.json")
    for path in node.keep_folder.glob("*.json"):
        # Neither boot nor mark of any process that lives now.
        path.write_text(path.read_text().replace(record["boot_id"], "before").replace(record["variable"], "X_BEFORE"))
    assert node.state()["processes"]["worker"]["state"] == "lost"
    node.keep()
    until(lambda: ended(node))
    assert state_of(record["pid"]) == "S", "a process with that number is somebody else's after a restart"


def test_stop_ends_the_whole_session_and_what_left_it(node: Node) -> None:
    script = """
        trap 'echo told >> told' TERM
        sleep 61 & setsid sleep 62 & (setsid sh -c 'sleep 63 & trap "" TERM; sleep 64' &)
        while :; do sleep 0.1; done
    """
    node.order(node.process("worker", script), node.process("other", "sleep 60"))
    node.keep()
    until(lambda: len(node.marked()) >= 8)
    answer = node.tell(id="one", do="stop", name="worker", grace_s=0.6)
    assert answer["done"]
    assert answer["processes"]["worker"]["signal"] == "KILL"
    assert (node.folder / "told").exists(), "it was asked before it was killed"
    assert node.state()["processes"]["other"]["state"] == "running", "only the one that was named"
    assert len(node.marked()) == 2
    assert node.named("stopped")[0]["killed"]
    node.tell(id="two", do="kill")
    assert node.marked() == []
    until(lambda: not node.of_ours())


def test_a_gentle_end_within_the_grace_is_no_kill(node: Node) -> None:
    node.order(node.process("worker", "trap 'exit 3' TERM; while :; do sleep 0.05; done"))
    node.keep()
    until(lambda: node.named("started"))
    time.sleep(0.3)
    kill(node.state()["processes"]["worker"]["pid"], signal.SIGSTOP)
    answer = node.tell(id="one", do="stop", grace_s=10)
    assert answer["processes"]["worker"]["exit_status"] == 3, "a stopped process was set going to end by itself"
    assert not node.named("stopped")[0]["killed"]


def test_what_a_dead_process_left_behind_is_swept(node: Node) -> None:
    node.order(node.process("worker", "sleep 61 & (setsid sleep 62 &) ; sleep 0.5; kill -9 $$"))
    node.keep()
    until(lambda: ended(node))
    assert node.marked() == []
    assert len(node.named("swept")[0]["pids"]) == 2


def test_descendants_are_found_although_hold_and_process_were_killed(node: Node) -> None:
    node.order(node.process("worker", "setsid sh -c 'sleep 61 & sleep 62' & sleep 63"))
    node.keep()
    until(lambda: len(node.record("processes.json")["worker"]["members"]) >= 3)
    pid = node.state()["processes"]["worker"]["pid"]
    kill(node.state()["runner"]["pid"])
    kill(node.record("worker.pid.json")["hold"]["pid"])
    kill(pid)
    node.keep()
    until(lambda: ended(node))
    assert node.marked() == []
    assert node.state()["processes"]["worker"]["state"] == "lost"


def test_a_descendant_that_nobody_ever_saw_is_found_by_its_mark(node: Node) -> None:
    """Its parents, `hold` and runner were all shot before a runner had looked: nothing leads to it."""
    node.order(node.process("worker", "while ! [ -e go ]; do sleep 0.02; done; setsid sleep 62 & sleep 63"))
    node.keep()
    until(lambda: node.named("started"))
    victims = [node.state()["runner"]["pid"], node.record("worker.pid.json")["hold"]["pid"]]
    kill(victims[0])
    (node.folder / "go").touch()
    until(lambda: len([pid for pid in node.marked() if os.getsid(pid) == pid]) == 2)
    kill(victims[1])
    kill(node.state()["processes"]["worker"]["pid"])
    assert len(node.marked()) >= 1
    node.keep()
    until(lambda: ended(node))
    assert node.marked() == []


def test_the_same_command_twice_is_done_once_and_answered_alike(node: Node) -> None:
    script = "trap 'echo got >> got' USR1; while :; do sleep 0.05; done"
    node.order(node.process("worker", script))
    node.keep()
    until(lambda: node.named("started"))
    time.sleep(0.3)
    first = node.tell(id="sig-1", do="signal", signal="USR1")
    assert first["sent"] == 1
    assert node.tell(id="sig-1", do="signal", signal="USR1") == first
    until(lambda: (node.folder / "got").exists())
    time.sleep(0.3)
    assert (node.folder / "got").read_text() == "got\n"
    stopped = node.tell(id="stop-1", do="stop")
    assert node.tell(id="stop-1", do="stop") == stopped, "even when all is over"
    assert len([event for event in node.events() if event.get("id") == "stop-1"]) == 1


def test_a_stop_survives_the_runner_that_began_it(node: Node) -> None:
    node.order(node.process("worker", "trap '' TERM; while :; do sleep 0.1; done"))
    node.keep()
    until(lambda: node.named("started"))
    command = json.dumps({"id": "s", "do": "stop", "grace_s": 1.5}).encode()
    with subprocess.Popen(
        node.argv("tell", node.keep_folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as tell:
        assert tell.stdin
        tell.stdin.write(command)
        tell.stdin.close()
        tell.stdin = None
        until(lambda: node.named("ending"))
        kill(node.state()["runner"]["pid"])
        out, _ = tell.communicate(timeout=30)
    assert json.loads(out)["processes"]["worker"]["signal"] == "KILL"
    assert node.marked() == []
    assert len(node.named("ending")) == 1


def test_a_command_that_cannot_be_is_refused(node: Node) -> None:
    node.order(node.process("worker", "sleep 60"))
    for command in (
        {"id": "../x", "do": "stop"},
        {"id": "x", "do": "rm"},
        {"id": "x", "do": "signal", "signal": "DFL"},
    ):
        assert node.tell(**command)["error"]["kind"] == "usage"
    assert node.tell(id="x", do="stop", name="nobody")["error"]["kind"] == "order"
    assert not (node.keep_folder / "inbox").exists()


def test_a_process_that_was_stopped_before_it_began_never_begins(node: Node) -> None:
    node.order(node.process("worker", "sleep 60"))
    answer = node.tell(id="early", do="stop")
    assert answer["done"]
    assert node.marked() == []
    node.keep()
    assert node.starts("worker") <= 1
    until(lambda: not node.of_ours())


def test_a_new_round_starts_what_has_ended_and_leaves_what_lives(node: Node) -> None:
    fails, lives = node.process("fails", "exit 1"), node.process("lives", "sleep 60")
    node.order(fails, lives, restart=True, round=1)
    node.keep()
    until(lambda: node.named("exited"))
    assert node.keep()["processes"]["fails"]["exit_status"] == 1
    assert node.starts("fails") == 1, "the same round again changes nothing"
    node.order(fails, lives, restart=True, round=2)
    node.keep()
    until(lambda: len(node.named("exited")) == 2)
    assert (node.starts("fails"), node.starts("lives")) == (2, 1)
    node.tell(id="all", do="kill")
    node.order(fails, lives, restart=True, round=3)
    node.keep()
    until(lambda: node.starts("lives") == 2)
    node.tell(id="all-again", do="kill")
    until(lambda: not node.of_ours())


def test_a_lease_that_nobody_renews_ends_the_processes(node: Node) -> None:
    node.order(node.process("worker", "sleep 60"), lease_s=2)
    node.keep()
    lease = node.keep_folder / "lease"
    for _ in range(8):
        lease.touch()
        time.sleep(0.4)
    assert node.state()["processes"]["worker"]["state"] == "running", "renewed for longer than the lease"
    until(lambda: ended(node))
    assert len(node.named("leased_out")) == 1
    assert node.state()["processes"]["worker"]["signal"] == "TERM"
    node.keep()
    assert node.starts("worker") == 1
    assert node.marked() == []


def test_a_removed_folder_ends_its_processes(node: Node) -> None:
    node.order(node.process("worker", "sleep 60"))
    node.keep()
    until(lambda: node.named("started"))
    subprocess.run(["rm", "-rf", str(node.keep_folder)], check=True)
    until(lambda: not node.marked() and not node.of_ours())


def test_hold_under_a_launcher_takes_its_rank_from_the_environment(node: Node) -> None:
    ranks = [node.process(f"rank-{rank}", f"echo rank {rank} of $WORLD; exit {rank}", start=False) for rank in (0, 1)]
    node.order(*ranks, lease_s=60)
    assert node.keep()["processes"]["rank-1"]["state"] == "waiting"
    time.sleep(0.5)
    assert node.starts("rank-0") == 0, "the launcher starts it, not the runner"
    holds = [
        subprocess.Popen(
            node.argv("hold", node.keep_folder, "rank-{RANK}"),
            env={**os.environ, "RANK": str(rank), "WORLD": "2"},
            stdin=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    assert [hold.wait(20) for hold in holds] == [0, 1]
    for hold in holds:
        assert hold.stdin
        hold.stdin.close()
    until(lambda: ended(node))
    assert (node.folder / "rank-1.log").read_text() == "rank 1 of 2\n"
    assert sorted(event["exit_status"] for event in node.named("exited")) == [0, 1]


def test_what_a_launcher_sends_to_hold_reaches_the_process(node: Node) -> None:
    node.order(node.process("worker", "trap 'exit 9' HUP; while :; do sleep 0.05; done", start=False))
    with subprocess.Popen(node.argv("hold", node.keep_folder, "worker")) as hold:
        until(lambda: node.starts("worker"))
        time.sleep(0.2)
        hold.send_signal(signal.SIGHUP)
        assert hold.wait(10) == 9
    again = subprocess.run(node.argv("hold", node.keep_folder, "worker"), check=False, timeout=20)
    assert again.returncode == 75, "a second start of the same round is refused"
    assert node.starts("worker") == 1


@pytest.mark.parametrize("broken", ["{", "[]", '{"version": 2}', '{"version": 1, "processes": []}'])
def test_an_order_that_cannot_be_followed_is_an_answer(node: Node, broken: str) -> None:
    (node.keep_folder / "keep.json").write_text(broken)
    assert node.keep()["error"]["kind"] in ("order", "missing")
    assert node.verb("nonsense")["error"]["kind"] == "usage"


def fill(path: Path) -> None:
    """Write until the disk takes no more."""
    with path.open("wb", buffering=0) as file:
        for size in (4096, 256, 1):
            with pytest.raises(OSError, match="No space"):
                write_for_ever(file, b"x" * size)


def write_for_ever(file: IO[bytes], data: bytes) -> None:
    while True:
        file.write(data)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_loses_no_event_and_ends_no_runner(node: Node) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(node.keep_folder)], check=True)
    try:
        go = node.folder / "go"
        node.order(
            node.process("worker", f"while ! [ -e {go} ]; do sleep 0.05; done; exit 4"), node.process("b", "sleep 60")
        )
        node.keep()
        until(lambda: len(node.named("started")) == 2)
        fill(node.keep_folder / "filler")
        before = node.state()
        assert before["disk_full"]
        kill(before["processes"]["b"]["pid"])
        go.touch()
        # Its end can be written down nowhere: its parent waits with it, and it counts as running.
        until(lambda: node.state()["processes"]["worker"]["status"] == "Z")
        time.sleep(2.5)
        assert node.state()["runner"]["alive"]
        assert node.state()["runner"]["beat_at"] > before["runner"]["beat_at"], "the beat needs no new room"
        (node.keep_folder / "filler").unlink()
        until(lambda: ended(node))
        assert sorted(event["name"] for event in node.named("exited")) == ["b", "worker"]
        seqs = [event["seq"] for event in node.events()]
        assert seqs == list(range(1, len(seqs) + 1))
        until(lambda: not node.of_ours())
    finally:
        node.clean()
        until(lambda: not node.of_ours())
        subprocess.run(["umount", str(node.keep_folder)], check=True)


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from jupiter_node.event_log import EventLog
path = Path(sys.argv[2])
log = EventLog(path)
for number in range(5):
    log.add("one", number=number)
size = path.stat().st_size
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, hard))
log.add("two")
log.add("three")
assert path.stat().st_size == size, "no half line stays"
assert log.waiting == 3 and log.problem, (log.waiting, log.problem)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.flush()
assert not log.waiting and not log.problem
"""


def test_events_wait_in_memory_while_nothing_can_be_written(node: Node) -> None:
    path = node.folder / "events.jsonl"
    subprocess.run([node.python, "-I", "-S", "-c", LIMITED, str(node.file), str(path)], check=True, timeout=20)
    events = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [event["event"] for event in events] == ["one"] * 5 + ["two", "disk_full", "three"]
    assert [event["seq"] for event in events] == list(range(1, 9))


@pytest.mark.parametrize("seed", range(3))
def test_kills_at_any_moment(node: Node, seed: int) -> None:
    """Runner, hold and process are shot at random instants; nothing is started, told or left over twice."""
    chance = random.Random(seed)
    node.order(*(node.process(f"w{number}", "sleep 61 & setsid sleep 62 & wait") for number in range(3)))
    for _ in range(6):
        with subprocess.Popen(node.argv("keep", node.keep_folder), stdout=subprocess.DEVNULL) as keep:
            time.sleep(chance.uniform(0, 0.35))
            ours = node.of_ours()
            victims = [pid for pid in ours if pid != keep.pid]
            processes = [pid for pid in node.marked() if pid not in victims]
            for pid in chance.sample(victims, min(len(victims), 1)) + chance.sample(processes, len(processes) // 8):
                kill(pid)
            keep.wait(30)
    node.keep()
    answer = node.tell(id="end", do="stop", grace_s=0.5)
    assert answer["done"]
    until(lambda: ended(node))
    until(lambda: not node.of_ours())
    assert node.marked() == []
    assert all(node.starts(f"w{number}") <= 1 for number in range(3))
    seqs = [event["seq"] for event in node.events()]
    assert seqs == list(range(1, len(seqs) + 1))
    for event in ("started", "exited", "lost"):
        names = [entry["name"] for entry in node.named(event)]
        assert len(names) == len(set(names))
    for process in node.state()["processes"].values():
        assert process["state"] in ("exited", "lost", "waiting")


def test_other_processes_of_the_same_number_are_left_alone(node: Node) -> None:
    """A record whose pid belongs to somebody else now must not get that process killed."""
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as bystander:
        node.order(node.process("worker", "sleep 60"))
        record = {"name": "worker", "round": 0, "pid": bystander.pid, "session": bystander.pid, "mark": "1"}
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        record |= {
            "boot_id": boot_id,
            "started_at": 1.0,
            "hold": {"pid": bystander.pid, "mark": "1", "boot_id": boot_id},
        }
        (node.keep_folder / "worker.pid.json").write_text(json.dumps(record))
        assert node.tell(id="x", do="kill")["processes"]["worker"]["state"] == "lost"
        until(lambda: ended(node))
        assert bystander.poll() is None
        bystander.kill()
