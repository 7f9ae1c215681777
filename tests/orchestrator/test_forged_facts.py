"""A worker on a hostile machine writes what it likes: the stage fails in words, nothing of it enters the database."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from jupiter_engine.errors import StateError
from jupiter_engine.orchestrator.database import Database
from jupiter_engine.orchestrator.supervision import StageRun
from jupiter_engine.protocol import facts
from jupiter_engine.remote.local import LocalRemote


def stage_run(root: Path, *, stage: str = "generate") -> StageRun:
    database = Database(root / "jupiter.db")
    folder = root / "runs" / f"tiny-0001-{stage}"
    (folder / "results").mkdir(parents=True)
    with database.transaction():
        database.add_run(folder.name, "tiny", 1, stage)
    return StageRun(database, LocalRemote(), folder, cycle="tiny-0001", domain="tiny", number=1, stage=stage)


def write(run: StageRun, *lines: bytes) -> None:
    with (run.folder / "events.jsonl").open("ab") as file:
        file.write(b"".join(line + b"\n" for line in lines))


def records(table: str, data: bytes, count: int) -> bytes:
    return msgspec.json.encode(
        facts.Records(seq=1, at=time.time(), table=table, offset_bytes=0, length_bytes=len(data), count=count)
    )


@pytest.mark.parametrize(
    "line", [b"no json", b'{"fact":"conquered"}', b'{"fact":"note","seq":"one"}', b"\xff\xfe", b"[" * 100_000]
)
async def test_a_line_that_is_no_fact(line: bytes, tmp_path: Path) -> None:
    run = stage_run(tmp_path)
    write(run, line)
    with pytest.raises(StateError, match="no worker writes"):
        await run.take_in()
    assert run._database.entries() == []


@pytest.mark.parametrize("table", ["verdicts", "documents", "../../jupiter", "nothing"])
async def test_rows_that_the_stage_does_not_make(table: str, tmp_path: Path) -> None:
    run = stage_run(tmp_path)
    write(run, records(table, b"{}\n", 1))
    with pytest.raises(StateError, match="does not make"):
        await run.take_in()


async def test_rows_that_are_none(tmp_path: Path) -> None:
    run = stage_run(tmp_path)
    data = b'{"id": 3}\n'
    (run.folder / "results" / "samples.jsonl").write_bytes(data)
    write(run, records("samples", data, 1))
    with pytest.raises(StateError, match="no row of samples"):
        await run.take_in()
    assert run._database.samples(domain="tiny", limit=-1) == []


async def test_a_repeated_or_older_number_changes_nothing(tmp_path: Path) -> None:
    run = stage_run(tmp_path)
    note = facts.Note(seq=5, at=time.time(), level="info", text="first\x1b]52;c;evil\x07")
    write(run, msgspec.json.encode(note))
    await run.take_in()
    write(run, msgspec.json.encode(msgspec.structs.replace(note, text="again")))
    write(run, msgspec.json.encode(facts.Failed(seq=4, at=0.0, kind="X", title="t", detail="d", fix="f")))
    await run.take_in()
    assert run.outcome is None
    (entry,) = run._database.entries()
    assert getattr(entry.entry, "text", "") == "first"
