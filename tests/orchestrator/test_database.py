"""The database: exactly once, whole or not at all, and clear words when it cannot be used."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec
import pytest

from jupiter_engine.errors import DiskFull, SchemaTooNew, StateError, UsageError
from jupiter_engine.orchestrator.database import SCHEMA_VERSION, Database
from jupiter_engine.orchestrator.lineage import trace
from jupiter_engine.protocol.commands import Pause
from jupiter_engine.protocol.journal import Noted
from jupiter_engine.protocol.rows import Sample, Verdict
from jupiter_engine.protocol.state import Failure, State
from tests.orchestrator.scripted_worker import chunk, document


def make_sample(number: int, template: str = "qa") -> Sample:
    return Sample(
        id=f"s{number:04d}",
        template=template,
        type="qa",
        prompt=f"Question {number}?",
        response="An answer with a Needle" if number == 3 else "An answer",
        chunk="k1",
        document="d1",
        generator="base",
        generator_sha256="",
        request_sha256=str(number),
        seed=number,
        prompt_tokens=1,
        new_tokens=1,
        finish="stop",
        cycle=1,
    )


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "jupiter.db")


def add(database: Database, table: str, *rows: object) -> None:
    with database.transaction():
        database.add_rows(table, "python", 1, "run", [msgspec.json.encode(row) for row in rows])


def test_samples_keep_their_order_and_are_found_by_status_and_text(database: Database) -> None:
    add(database, "samples", *(make_sample(n) for n in range(5)))
    verdicts = [Verdict(id=f"s{n:04d}", accepted=n > 1, reason="ok" if n > 1 else "short", scores={}) for n in range(4)]
    add(database, "verdicts", *verdicts)
    assert [v.sample.id for v in database.samples(status="accepted")] == ["s0002", "s0003"]
    assert [v.sample.id for v in database.samples(status="rejected")] == ["s0000", "s0001"]
    assert [v.sample.id for v in database.samples(status="new")] == ["s0004"]
    assert [v.sample.id for v in database.samples(search="needle")] == ["s0003"]
    assert [v.sample.id for v in database.samples(search="short")] == ["s0000", "s0001"]
    assert [v.sample.id for v in database.samples(limit=2, offset=1)] == ["s0001", "s0002"]
    assert database.count_samples(domain="python", cycle=1) == 5
    assert database.count_samples(domain="other") == 0


def test_a_persons_verdict_outweighs_the_filters_and_can_be_taken_back(database: Database) -> None:
    add(database, "samples", make_sample(1))
    add(database, "verdicts", Verdict(id="s0001", accepted=False, reason="short", scores={"words": 3.0}))
    database.set_review("s0001", "python", "accept", "fine", "ann")
    view = database.sample("s0001")
    assert view is not None
    assert (view.status, view.reviewer, view.scores) == ("accepted", "ann", {"words": 3.0})
    database.set_review("s0001", "python", "undecided", "", "ann")
    view = database.sample("s0001")
    assert view is not None
    assert view.status == "rejected"


def test_adding_rows_twice_changes_nothing(database: Database) -> None:
    for _ in range(2):
        add(database, "samples", make_sample(1), make_sample(2))
        add(database, "documents", document())
    assert database.count_samples() == 2
    assert len(database.documents("python")) == 1


def test_a_failing_transaction_leaves_nothing(database: Database) -> None:
    def half() -> None:
        with database.transaction():
            database.append(Noted(cycle=None, stage=None, level="info", text="half"))
            raise KeyError("boom")

    with pytest.raises(KeyError):
        half()
    assert database.entries() == []


def test_a_full_disk_is_named_and_what_was_acknowledged_stays(database: Database) -> None:
    with database.transaction():
        database.append(Noted(cycle=None, stage=None, level="info", text="kept"))
    pages = database._connection.execute("PRAGMA page_count").fetchone()[0]
    database._connection.execute(f"PRAGMA max_page_count={pages}")

    def fill() -> None:
        with database.transaction():
            database.append(Noted(cycle=None, stage=None, level="info", text="x" * 1_000_000))

    with pytest.raises(DiskFull, match="no room left while writing"):
        fill()
    assert len(database.entries()) == 1


def test_a_later_schema_is_refused(tmp_path: Path) -> None:
    Database(tmp_path / "jupiter.db").close()
    with sqlite3.connect(tmp_path / "jupiter.db") as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(SchemaTooNew, match=f"has schema {SCHEMA_VERSION + 1}") as caught:
        Database(tmp_path / "jupiter.db")
    assert caught.value.fix == "update Jupiter"


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "jupiter.db").write_bytes(b"not a database at all, " * 100)
    with pytest.raises(StateError, match="cannot be opened"):
        Database(tmp_path / "jupiter.db")


def test_commands_are_answered_once_and_in_order(database: Database) -> None:
    first, second = database.submit(Pause(cycle="a")), database.submit(Pause(cycle="b"))
    assert [number for number, _ in database.open_commands()] == [first, second]
    refusal = Failure(kind="UsageError", title="Wrong usage", detail="no such cycle", fix="")
    database.answer_command(first, refusal)
    assert database.command_answer(first) == (True, refusal)
    assert database.command_answer(second) == (False, None)
    assert [number for number, _ in database.open_commands()] == [second]


def test_why_tells_the_whole_lineage(database: Database) -> None:
    add(database, "documents", document())
    add(database, "chunks", chunk())
    add(database, "samples", make_sample(7), make_sample(71))
    lineage = trace(database, State(), "s0007")
    assert lineage.document == document()
    assert lineage.chunk == chunk()
    assert "stdlib:topic/assert (PSF-2.0)" in " ".join(lineage.sentences)
    assert "No model has been trained on it." in lineage.sentences
    assert trace(database, State(), "k1").what == "chunk"
    with pytest.raises(UsageError, match="nothing here"):
        trace(database, State(), "zzz")
