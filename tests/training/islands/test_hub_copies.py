"""The hub's state on a second machine: taken over with everything merged, never by something older or damaged."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jupiter_engine.checkpoints.tensors import FileRecord
from jupiter_engine.files import write_json
from jupiter_engine.training.distributed.islands import exchange
from jupiter_engine.training.distributed.islands.copies import HubCopies, adopt, state_folder
from jupiter_engine.training.distributed.islands.ledger import Ledger, RoundFiles
from jupiter_engine.training.distributed.islands.payload import of_arrays, shapes_of, write_payload
from jupiter_engine.training.distributed.islands.starting import Machine

HERE = Machine("here")


def hub(folder: Path, *, fences: int = 1, values: int = 6) -> Ledger:
    """A run folder in whose ledger round 1 is open, after so many changes of the lead; long ago, so that fences and
    leases count from 1."""
    folder.mkdir(parents=True)
    ledger = Ledger(folder / "rounds.db", clock=lambda: 0.0)
    ledger.create("run", [7] * 12)
    fence = 0
    for number in range(fences):
        fence = ledger.take_lead(f"hub {number}", 60.0, lambda _: True)
    state = folder / "state" / f"1.{fence}"
    state.mkdir(parents=True)
    arrays = {"w": np.arange(values, dtype=np.float32).reshape(2, -1)}
    theta, base = (
        write_payload(state / f"{name}.safetensors", shapes_of(arrays), "float32", of_arrays(arrays))
        for name in ("theta", "base")
    )
    ledger.begin(fence, RoundFiles(theta=theta, momentum=None, base=base))
    return ledger


def copied(folder: Path, there: Path, number: int = 1) -> HubCopies:
    copies = HubCopies(folder, HERE, str(there))
    copies.look(number)
    assert copies.wait(30.0)
    return copies


def test_a_copy_is_taken_over_with_a_fence_that_no_earlier_hub_had(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    ledger = hub(first, fences=3)
    copies = copied(first, second)
    assert (copies.copied, copies.problem) == (1, "")
    assert not (first / ".copy").exists()
    # The ledger that was copied goes on undisturbed.
    assert ledger.lend(3, 1, "macs", 4) is not None
    assert "round 1" in adopt(second)
    taken = Ledger(second / "rounds.db")
    current, before = taken.current(), ledger.current()
    assert current == before
    assert current is not None
    theta = second / state_folder(current) / "theta.safetensors"
    assert theta.read_bytes() == (first / state_folder(current) / "theta.safetensors").read_bytes()
    # At once, although the lease of the first hub still runs there.
    fence = taken.take_lead("second", 60.0)
    assert fence > time.time() / 60 + 9
    assert taken.totals().free == 12
    # Nor does a lease have the number of one that the first hub gave after the copy was made.
    lease = taken.lend(fence, 1, "macs", 4)
    assert lease is not None
    assert lease.lease > 100_000
    # What is the state now is not taken over once more.
    assert adopt(second) == ""
    taken.close()
    ledger.close()


def test_a_hub_that_is_further_keeps_its_own_state(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    hub(first, fences=1).close()
    hub(second, fences=2).close()
    copied(first, second)
    assert (second / "copies").is_dir()
    assert adopt(second) == ""
    copied(second, first)
    assert adopt(first) != ""


def test_damaged_copies_are_passed_over(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    hub(first).close()
    copied(first, second)
    (copy,) = (second / "copies").iterdir()
    theta = copy / "state" / "1.1" / "theta.safetensors"
    whole = theta.read_bytes()
    theta.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert adopt(second) == ""
    theta.unlink()
    assert adopt(second) == ""
    theta.write_bytes(whole)
    database = (copy / "rounds.db").read_bytes()
    (copy / "rounds.db").write_bytes(b"no database" * 100)
    assert adopt(second) == ""
    (copy / "rounds.db").write_bytes(database)
    assert adopt(second) != ""


def test_a_copy_that_cannot_be_made_says_why_and_leaves_the_former_one(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    hub(first).close()
    copied(first, second)
    shutil.rmtree(first / "state")
    with sqlite3.connect(first / "rounds.db") as database:
        database.execute("UPDATE lead SET fence = 2")
    broken = copied(first, second)
    assert broken.copied == 0
    assert "state/1.1" in broken.problem
    (left,) = (path for path in (second / "copies").iterdir() if not path.name.startswith("."))
    assert left.name == "00000001.00000001"
    assert adopt(second) != ""
    second.joinpath("file").write_text("")
    blocked = copied(first, second / "file")
    assert blocked.problem != ""


def test_one_copy_stays_and_a_round_is_copied_once(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    ledger = hub(first)
    copies = copied(first, second)
    (copy,) = (second / "copies").iterdir()
    before = copy.stat().st_mtime_ns
    copies.look(1)
    assert copies.wait(30.0)
    assert copy.stat().st_mtime_ns == before
    ledger.take_lead("next", 60.0, lambda _: True)
    copied(first, second)
    (copy,) = (second / "copies").iterdir()
    assert copy.name == "00000002.00000001"
    ledger.close()


class Slow(Machine):
    """Takes what comes only after a while."""

    def argv(self, *command: str) -> list[str]:
        if "tar" not in command[2]:
            return list(command)
        receive, *rest = command[2:]
        return ["/bin/sh", "-c", f"sleep 1.5; {receive}", *rest]


def test_a_copy_may_take_longer_than_the_round_that_it_is_of(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    # More than a pipe holds: tar is in the midst of it when the files go.
    ledger = hub(first, values=1 << 20)
    state = state_folder(current) if (current := ledger.current()) is not None else ""
    copies = HubCopies(first, Slow("far"), str(second))
    copies.look(1)
    time.sleep(0.8)
    shutil.rmtree(first / state)
    assert copies.wait(30.0)
    assert (copies.copied, copies.problem) == (1, "")
    assert not (first / ".copy").exists()
    assert adopt(second) != ""
    ledger.close()


def test_a_copy_that_finds_no_room_says_so_and_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    ledger = hub(first, values=1 << 18)
    copied(first, second)
    (before,) = (second / "copies").iterdir()
    # The other machine has as much room as the copy takes without the ledger.
    programs = tmp_path / "bin"
    programs.mkdir()
    played = programs / "df"
    played.write_text("#!/bin/sh\necho head\necho disk 9999 9999 2048 50% /\n")
    played.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    ledger.take_lead("next", 60.0, lambda _: True)
    copies = copied(first, second)
    assert copies.copied == 0
    assert "2048 KiB are free" in copies.problem
    assert [path.name for path in (second / "copies").iterdir()] == [before.name]
    ledger.close()


def test_no_copy_is_made_where_the_hub_would_lack_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    hub(first, values=1 << 18).close()
    # One round is two files of 1 MiB.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4 << 20))
    copies = copied(first, second)
    assert copies.copied == 0
    assert "while a round of it is copied" in copies.problem
    assert not (first / ".copy").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 20))
    assert copied(first, second).copied == 1


def test_what_is_taken_over_is_on_the_disk_before_the_copy_counts_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    ledger = hub(first)
    current = ledger.current()
    assert current is not None
    ledger.close()
    copied(first, second)
    synced: set[int] = set()

    def sync(descriptor: int) -> None:
        if not (second / "rounds.db").exists():
            synced.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    real = os.fsync
    monkeypatch.setattr(os, "fsync", sync)
    assert adopt(second) != ""
    state = second / state_folder(current)
    wanted = [second / "rounds.db", second, second / "state", state, *state.iterdir()]
    assert {path.stat().st_ino for path in wanted} <= synced


@pytest.mark.parametrize("how", ["gone", "cut short"])
def test_a_state_whose_files_the_disk_lost_gives_way_to_an_older_copy(how: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    hub(first).close()
    copied(first, second)
    assert adopt(second) != ""
    taken = Ledger(second / "rounds.db")
    current = taken.current()
    taken.close()
    assert current is not None
    theta = second / state_folder(current) / "theta.safetensors"
    whole = theta.read_bytes()
    if how == "gone":
        theta.unlink()
    else:
        theta.write_bytes(b"")
    assert "round 1" in adopt(second)
    assert theta.read_bytes() == whole


def test_a_hub_that_goes_on_from_an_older_round_is_followed(tmp_path: Path) -> None:
    for number, fence in ((4, 2), (5, 2), (4, 1002)):
        folder = exchange.round_folder(tmp_path, number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / exchange.BASE).write_bytes(b"x" * 8)
        plan = exchange.Plan(
            round=number,
            fence=fence,
            base=FileRecord(sha256="0" * 64, bytes=8),
            deadline_s=1.0,
            patience_s=1.0,
            max_steps=0,
            tokens_done=0,
            tokens_total=8,
            leases={},
        )
        write_json(folder / exchange.PLAN, plan)
        found = exchange.newest_plan(tmp_path)
        assert found is not None
        assert (found.round, found.fence) == (number, fence)
    # Its base has not arrived in full: the plan before it stands.
    (exchange.round_folder(tmp_path, 4) / exchange.BASE).write_bytes(b"x")
    found = exchange.newest_plan(tmp_path)
    assert found is not None
    assert (found.round, found.fence) == (5, 2)
