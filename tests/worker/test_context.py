"""The run folder after a kill: what was written is reported, exactly once."""

from __future__ import annotations

from pathlib import Path

import msgspec

from jupiter_engine.files import whole_lines
from jupiter_engine.protocol import facts
from jupiter_engine.protocol.orders import FilterOrder
from jupiter_engine.protocol.rows import Verdict
from jupiter_engine.protocol.specs import FilterSpec
from jupiter_engine.worker.context import RunContext


def verdict(name: str) -> Verdict:
    return Verdict(id=name, accepted=True, reason="ok", scores={})


def make(folder: Path) -> RunContext:
    order = FilterOrder(run="r", domain="d", cycle=1, filter=FilterSpec(), samples="", chunks="", items="")
    folder.mkdir(exist_ok=True)
    (folder / "spec.json").write_bytes(msgspec.json.encode(order))
    return RunContext(folder)


def announced(folder: Path) -> list[tuple[int, int, int]]:
    found = [facts.decoder.decode(line) for line, _ in whole_lines(folder / "events.jsonl")]
    return [(f.offset_bytes, f.length_bytes, f.count) for f in found if isinstance(f, facts.Records)]


def test_rows_written_but_not_reported_before_a_kill_are_reported_by_the_next_attempt(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    context = make(folder)
    context.records([verdict("a")])
    context.close()
    size = (folder / "results/verdicts.jsonl").stat().st_size
    # The kill came after the rows were on disk and before the fact; a torn row follows them.
    line = msgspec.json.encode(verdict("b")) + b"\n"
    with (folder / "results/verdicts.jsonl").open("ab") as file:
        file.write(line + b'{"id":"to')
    context = make(folder)
    assert [row.id for row in context.existing(Verdict)] == ["a", "b"]
    context.records([verdict("c")])
    context.close()
    assert announced(folder) == [(0, size, 1), (size, len(line), 1), (size + len(line), len(line), 1)]


def test_sequence_numbers_go_on_over_attempts(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    make(folder).close()
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b'{"fact":"started","seq":')
    context = make(folder)
    context.note("again")
    context.close()
    assert context.attempt == 2
    assert [facts.decoder.decode(line).seq for line, _ in whole_lines(folder / "events.jsonl")] == [1, 2, 3]
