"""The carrier between two folders, through its own shell scripts: whole or not at all, taken up where it was cut."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from jupiter_engine.checkpoints.tensors import FileRecord
from jupiter_engine.errors import StateError
from jupiter_engine.files import write_json
from jupiter_engine.training.distributed.islands import carrier as module
from jupiter_engine.training.distributed.islands import exchange
from jupiter_engine.training.distributed.islands.carrier import Local, Ssh
from jupiter_engine.training.distributed.islands.ledger import Deposed, Offer

pytestmark = pytest.mark.timeout(120)

DATA = np.random.default_rng(0).bytes(300_000)
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def line(tmp_path: Path) -> Ssh:
    exchange.make_folders(tmp_path / "hub")
    return Ssh(tmp_path / "hub", "far", alias="", there=str(tmp_path / "there"), ssh_config="")


def publish(folder: Path, number: int, data: bytes = DATA, fence: int = 1) -> exchange.Plan:
    record = FileRecord(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    plan = exchange.Plan(
        round=number,
        fence=fence,
        base=record,
        deadline_s=1.0,
        max_steps=0,
        patience_s=1.0,
        tokens_done=0,
        tokens_total=10,
        leases={},
    )
    made = exchange.round_folder(folder, number)
    made.mkdir(parents=True, exist_ok=True)
    (made / exchange.BASE).write_bytes(data)
    write_json(made / exchange.PLAN, plan)
    return plan


def put_up(folder: Path, number: int, data: bytes = DATA, told: bytes = DATA, attempt: int = 1) -> exchange.Up:
    record = FileRecord(sha256=hashlib.sha256(told).hexdigest(), bytes=len(told))
    offer = Offer(
        round=number,
        island="far",
        attempt=attempt,
        lease=1,
        fence=1,
        base_sha256="b",
        file=record,
        used=1,
        tokens=1,
    )
    up = exchange.Up(offer=offer, steps=1, loss_sum=1.0, grad_norm=1.0, learning_rate=0.1, seconds=1.0, versions={})
    exchange.up_folder(folder, number).mkdir(parents=True, exist_ok=True)
    part = exchange.up_folder(folder, number) / f"far.{attempt}.safetensors.part"
    part.write_bytes(data)
    exchange.put_up(folder, up, part)
    return up


def test_bases_and_plans_go_there_and_contributions_come_back(line: Ssh, tmp_path: Path) -> None:
    hub, there = tmp_path / "hub", tmp_path / "there"
    plan = publish(hub, 3)
    line.turn()
    assert line.problem == ""
    assert exchange.newest_plan(there) == plan
    assert (exchange.round_folder(there, 3) / exchange.BASE).read_bytes() == DATA
    assert len(DATA) < line.down_bytes < len(DATA) + 2000
    up = put_up(there, 3)
    here = exchange.Here(island="far", beat=7, round=3, used=1, waiting=False)
    exchange.make_folders(there)
    write_json(exchange.here_path(there, "far"), here)
    line.turn()
    assert line.problem == ""
    assert exchange.read(exchange.here_path(hub, "far"), exchange.Here) == here
    found = exchange.attempts(hub, 3)
    assert exchange.read(found["far", 1], exchange.Up) == up
    assert exchange.contribution_path(hub, 3, "far", 1).read_bytes() == DATA
    assert len(DATA) < line.up_bytes < len(DATA) + 2000
    # Nothing is carried twice; a plan that has changed is.
    before = (line.down_bytes, line.up_bytes)
    line.turn()
    assert line.down_bytes == before[0]
    assert line.up_bytes - before[1] < 200  # the sign of life
    again = publish(hub, 3, fence=2)
    line.turn()
    assert exchange.newest_plan(there) == again


def test_old_rounds_go_and_the_end_is_said_and_taken_back(line: Ssh, tmp_path: Path) -> None:
    hub, there = tmp_path / "hub", tmp_path / "there"
    for number in (1, 2, 3):
        publish(hub, number)
        line.turn()
    assert exchange.rounds(there) == [2, 3]
    # A ledger that was begun anew is at a round before those of the former one.
    exchange.forget_before(hub, 9)
    publish(hub, 1, fence=2)
    line = led(hub, there, 2)
    line.turn()
    assert exchange.rounds(there) == [1]
    end = exchange.End(reason="halted", fence=1)
    write_json(hub / exchange.END, end)
    line.turn()
    assert exchange.read(there / exchange.END, exchange.End) == end
    (hub / exchange.END).unlink()
    line.turn()
    assert not (there / exchange.END).exists()


def led(folder: Path, there: Path, fence: int) -> Ssh:
    """The line of a hub that has begun; the test takes its turns."""
    exchange.make_folders(folder)
    line = Ssh(folder, "far", alias="", there=str(there), ssh_config="")
    line._fence = fence
    return line


def test_a_hub_that_was_replaced_writes_nothing_to_the_island_any_more(tmp_path: Path) -> None:
    there = tmp_path / "there"
    old, new = led(tmp_path / "old", there, 3), led(tmp_path / "new", there, 7)
    publish(tmp_path / "old", 2, fence=3)
    old.turn()
    taken = publish(tmp_path / "new", 2, fence=7)
    new.turn()
    assert (new.problem, new.deposed, (there / exchange.FENCE).read_text()) == ("", None, "7\n")
    # It wakes in the midst of a turn: no small file is written even so.
    old._sent.clear()
    publish(tmp_path / "old", 2, fence=4)
    with pytest.raises(Deposed, match="fence 7 leads island far"):
        old._down()
    write_json(tmp_path / "old" / exchange.END, exchange.End(reason="halted", fence=3))
    old.turn()
    assert old.deposed is not None
    assert not (there / exchange.END).exists()
    assert exchange.newest_plan(there) == taken
    new.turn()
    assert (new.problem, new.deposed) == ("", None)


def test_the_fence_beside_a_local_exchange_counts_as_well(tmp_path: Path) -> None:
    old, new = Local(tmp_path, "near"), Local(tmp_path, "near")
    old.begin(3)
    new.begin(7)
    assert (old.deposed, new.deposed) == (None, None)
    old.ask()
    assert old.deposed is not None
    new.ask()
    assert new.deposed is None


def test_a_line_that_has_not_begun_is_closed(line: Ssh) -> None:
    line.close()


def test_a_machine_whose_shell_talks_is_a_problem_and_no_crash(
    line: Ssh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "hub", 1)
    monkeypatch.setattr(line, "_shell", lambda *_, **__: b"Welcome!\n0\n")
    line.turn()
    assert "invalid literal" in line.problem


def test_a_copy_that_was_cut_goes_on_where_it_stopped(line: Ssh, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "there" / "rounds" / "x"
    source.write_bytes(DATA)
    target.parent.mkdir(parents=True)
    (target.parent / "x.part").write_bytes(DATA[:200_000])
    line.push(source, "rounds/x", SHA)
    assert target.read_bytes() == DATA
    assert line.down_bytes == 100_000
    # It is there: nothing goes again.
    line.push(source, "rounds/x", SHA)
    assert (line.down_bytes, target.read_bytes()) == (100_000, DATA)
    (tmp_path / "got.part").write_bytes(DATA[:250_000])
    line.pull(str(target), tmp_path / "got", SHA, len(DATA))
    assert (tmp_path / "got").read_bytes() == DATA
    assert line.up_bytes == 50_000


def test_what_arrives_damaged_is_not_used_and_comes_again(line: Ssh, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "there" / "x"
    source.write_bytes(DATA)
    target.parent.mkdir()
    (target.parent / "x.part").write_bytes(b"other" + DATA[5:1000])
    with pytest.raises(StateError, match="damaged"):
        line.push(source, "x", SHA)
    assert not target.exists()
    line.push(source, "x", SHA)
    assert target.read_bytes() == DATA
    (tmp_path / "got.part").write_bytes(b"other")
    with pytest.raises(StateError, match="damaged"):
        line.pull(str(target), tmp_path / "got", SHA, len(DATA))
    assert not (tmp_path / "got").exists()
    line.pull(str(target), tmp_path / "got", SHA, len(DATA))
    assert (tmp_path / "got").read_bytes() == DATA


def test_a_contribution_cut_on_the_island_itself_is_never_there_for_the_hub(line: Ssh, tmp_path: Path) -> None:
    hub, there = tmp_path / "hub", tmp_path / "there"
    publish(hub, 1)
    put_up(there, 1, data=DATA[:1000])
    line.turn()
    assert "damaged" in line.problem
    assert exchange.attempts(hub, 1) == {}
    put_up(there, 1, attempt=1)
    line.turn()
    assert (line.problem, list(exchange.attempts(hub, 1))) == ("", [("far", 1)])


def test_what_is_fetched_is_on_the_disk_before_it_gets_its_name(
    line: Ssh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, there = tmp_path / "hub", tmp_path / "there"
    publish(hub, 1)
    put_up(there, 1)
    synced: list[tuple[int, bool]] = []
    named = exchange.contribution_path(hub, 1, "far", 1)

    def sync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, named.exists()))
        real(descriptor)

    real = os.fsync
    monkeypatch.setattr(os, "fsync", sync)
    line.turn()
    assert line.problem == ""
    assert (named.stat().st_ino, False) in synced
    assert (named.parent.stat().st_ino, True) in synced
    message = exchange.ok_path(hub, 1, "far", 1)
    assert (message.stat().st_ino, True) in synced


def test_a_machine_that_cannot_be_called_is_a_problem_and_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_POLL_S", 0.05)
    exchange.make_folders(tmp_path / "hub")
    publish(tmp_path / "hub", 1)
    config = tmp_path / "config"
    config.write_text("Host far\n  HostName 127.0.0.1\n  Port 1\n")
    line = Ssh(tmp_path / "hub", "far", alias="far", there=str(tmp_path / "there"), ssh_config=str(config))
    line.begin(1)
    for _ in range(200):
        if line.problem:
            break
        threading.Event().wait(0.1)
    line.close()
    assert "island far" in line.problem
