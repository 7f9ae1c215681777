"""The data wing's stages as the worker runs them: results, resuming after a kill, halting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jupiter_engine.backends.contract import Completion, GenerateRequest
from jupiter_engine.data.queue.snapshot import read_snapshot
from jupiter_engine.errors import StateError
from jupiter_engine.files import write_json
from jupiter_engine.protocol import facts
from jupiter_engine.protocol.orders import CollectOrder, FilterOrder, GenerateOrder, ModelRef, Order, QueueOrder
from jupiter_engine.protocol.rows import Chunk, Document, Item, Sample, Verdict
from jupiter_engine.protocol.specs import (
    ChunkSpec,
    EvaluationSpec,
    FilterSpec,
    GenerationSpec,
    MixSpec,
    SourceSpec,
    TemplateSpec,
)
from jupiter_engine.worker import collect, generate, queue
from jupiter_engine.worker import filter as filter_stage
from jupiter_engine.worker.context import Halt, RunContext, read_rows
from tests.data.fixture_corpus import write_corpus
from tests.data.rows import chunk, item, sample
from tests.data.test_queue import END, ByteCodec


def carry_out(stage: Any, folder: Path, order: Order) -> dict[str, Any]:
    """Run a stage in a run folder and return its result."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "spec.json", order)
    context = RunContext(folder)
    try:
        stage.run(context, order)
    finally:
        context._lock.close()
        context._events.close()
        for file in context._files.values():
            file.close()
    last = facts.decoder.decode((folder / "events.jsonl").read_bytes().splitlines()[-1])
    assert isinstance(last, facts.Finished)
    return last.result


# -- collect -----------------------------------------------------------------------------------------


def collect_order(corpus: Path, **fields: Any) -> CollectOrder:
    values: dict[str, Any] = {
        "run": "r",
        "domain": "d",
        "cycle": 1,
        "sources": (SourceSpec(id="here", type="files", path=str(corpus)),),
        "chunk": ChunkSpec(max_bytes=900, min_bytes=100),
        "evaluation": EvaluationSpec(vault_share=0.2, slices=2),
    }
    return CollectOrder(**{**values, **fields})


def test_a_collection_fits_together(tmp_path: Path) -> None:
    result = carry_out(collect, tmp_path / "run", collect_order(write_corpus(tmp_path / "corpus")))
    documents = {row.id: row for row in read_rows(Path(result["documents_path"]), Document)}
    chunks = read_rows(Path(result["chunks_path"]), Chunk)
    items = read_rows(Path(result["items_path"]), Item)
    assert (result["documents"], result["chunks"], result["items"]) == (36, len(chunks), len(items))
    assert result["bytes"] == sum(d.bytes for d in documents.values()) == result["train_bytes"] + result["vault_bytes"]
    assert 0.05 < result["vault_bytes"] / result["bytes"] <= 0.2
    assert sum(len(c.text.encode()) for c in chunks) == result["bytes"]
    for one in chunks:
        assert (one.split, one.slice, one.cluster) == (
            documents[one.document].split,
            documents[one.document].slice,
            documents[one.document].cluster,
        )
    assert {i.pool for i in items} == {"known", "vault"}
    assert not result["reused"]


def test_an_unchanged_source_is_reused_whole_and_a_changed_one_keeps_its_split(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    first = carry_out(collect, tmp_path / "one", collect_order(corpus))
    second = carry_out(collect, tmp_path / "two", collect_order(corpus, previous=str(tmp_path / "one")))
    assert second == {**first, "reused": True}
    assert not (tmp_path / "two" / "results" / "chunks.jsonl").exists()
    (corpus / "docs" / "new.md").write_text("# new\n\n" + "A page that is new here. " * 20, "utf-8")
    third = carry_out(collect, tmp_path / "three", collect_order(corpus, previous=str(tmp_path / "two")))
    assert (third["documents"], third["reused"]) == (37, False)
    before = {d.uri: (d.split, d.slice) for d in read_rows(Path(first["documents_path"]), Document)}
    after = {d.uri: (d.split, d.slice) for d in read_rows(Path(third["documents_path"]), Document)}
    assert {uri: after[uri] for uri in before} == before


def test_a_killed_collection_goes_on_without_writing_a_row_twice(tmp_path: Path) -> None:
    order = collect_order(write_corpus(tmp_path / "corpus"))
    whole = carry_out(collect, tmp_path / "whole", order)
    carry_out(collect, tmp_path / "killed", order)
    rows = tmp_path / "killed" / "results" / "chunks.jsonl"
    data = rows.read_bytes()
    rows.write_bytes(data[: len(data) // 2])  # torn in the middle of a line
    (tmp_path / "killed" / "results" / "items.jsonl").unlink()
    carry_out(collect, tmp_path / "killed", order)
    for name in ("documents", "chunks", "items"):
        killed = (tmp_path / "killed" / "results" / f"{name}.jsonl").read_bytes()
        assert killed == Path(whole[f"{name}_path"]).read_bytes()


def test_sources_that_change_during_an_interruption_are_not_mixed(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    carry_out(collect, tmp_path / "run", collect_order(corpus))
    (corpus / "docs" / "topic01.md").write_text("other text " * 40, "utf-8")
    with pytest.raises(StateError, match="sources changed"):
        carry_out(collect, tmp_path / "run", collect_order(corpus))


@pytest.mark.parametrize(
    ("title", "heading", "expected"),
    [
        ("textwrap", "textwrap.shorten(text, width)", "textwrap.shorten"),
        ("textwrap", "class textwrap.TextWrapper(Base)", "textwrap.TextWrapper"),
        ("textwrap", "wrap", "textwrap.wrap"),
        ("assert", "", "assert"),
        ("assert", "assert", "assert"),
        ("guide", "How to begin", "guide: How to begin"),
    ],
)
def test_a_chunk_is_named_by_what_it_is_about(title: str, heading: str, expected: str) -> None:
    assert collect.subject(title, heading) == expected


# -- generate ----------------------------------------------------------------------------------------


class ChatCodec(ByteCodec):
    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - 3 for i in ids).decode()

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.encode("".join(m["content"] for m in messages))


class Model:
    """Answers every request in the asked form, in reverse order; stops after `limit` completions."""

    def __init__(self, limit: int = 10**9) -> None:
        self.asked: list[GenerateRequest] = []
        self._left = limit

    def generate(self, requests: Sequence[GenerateRequest], **_parameters: Any) -> Iterator[Completion]:
        for index in reversed(range(len(requests))):
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1
            self.asked.append(requests[index])
            text = f" What is number {requests[index].seed}?\nAnswer: It is {requests[index].seed} exactly."
            yield Completion(index=index, tokens=ChatCodec().encode(text), finish="stop")


def use(monkeypatch: pytest.MonkeyPatch, model: Model) -> Model:
    monkeypatch.setattr(generate, "TextCodec", lambda _folder: ChatCodec())
    monkeypatch.setattr(generate, "load_generator", lambda *_place, **_options: model)
    return model


def generate_order(tmp_path: Path, samples: int = 20, cycle: int = 1) -> GenerateOrder:
    chunks = [chunk(f"c{n}", document=f"d{n % 7}", title=f"guide: part {n}", text=f"Text {n}.\n") for n in range(15)]
    chunks.append(chunk("v", split="vault", slice=0))
    (tmp_path / "chunks.jsonl").write_bytes(b"".join(msgspec.json.encode(c) + b"\n" for c in chunks))
    return GenerateOrder(
        run="r",
        domain="d",
        cycle=cycle,
        generation=GenerationSpec(templates=(TemplateSpec(id="qa", type="qa"),), samples=samples, batch_size=4),
        generator=ModelRef(name="base", folder=str(tmp_path), sha256="ab" * 32),
        chunks=str(tmp_path / "chunks.jsonl"),
        twin="torch",
    )


def test_samples_are_parsed_stored_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = use(monkeypatch, Model())
    result = carry_out(generate, tmp_path / "run", generate_order(tmp_path))
    samples = read_rows(Path(result["samples_path"]), Sample)
    assert (result["samples"], result["reused"], len(samples)) == (20, 0, 20)
    assert result["new_tokens"] == sum(s.new_tokens for s in samples) > 0
    assert result["tokens_per_s"] > 0
    assert all(s.prompt == f"What is number {s.seed}?" for s in samples)
    assert all(s.response == f"It is {s.seed} exactly." for s in samples)
    assert len({s.id for s in samples}) == len({s.request_sha256 for s in samples}) == 20
    assert "v" not in {s.chunk for s in samples}
    text = ChatCodec().decode(model.asked[0].prompt)
    assert text.endswith("Question:")


def test_a_killed_generation_asks_only_for_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = generate_order(tmp_path)
    use(monkeypatch, Model(limit=10))
    with pytest.raises(KeyboardInterrupt):
        carry_out(generate, tmp_path / "run", order)
    stored = read_rows(tmp_path / "run" / "results" / "samples.jsonl", Sample)
    assert len(stored) == 8  # two whole batches of four; the half batch is asked again
    second = use(monkeypatch, Model())
    result = carry_out(generate, tmp_path / "run", order)
    assert (result["samples"], result["reused"], len(second.asked)) == (20, 8, 12)
    samples = read_rows(Path(result["samples_path"]), Sample)
    assert len({s.request_sha256 for s in samples}) == len(samples) == 20
    assert result["new_tokens"] == sum(s.new_tokens for s in samples)


def test_a_finished_generation_loads_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = generate_order(tmp_path)
    use(monkeypatch, Model())
    carry_out(generate, tmp_path / "run", order)
    third = use(monkeypatch, Model())
    result = carry_out(generate, tmp_path / "run", order)
    assert (result["reused"], result["tokens_per_s"], third.asked) == (20, 0.0, [])


def test_a_halt_leaves_whole_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = generate_order(tmp_path)
    use(monkeypatch, Model())
    (tmp_path / "run" / "inbox").mkdir(parents=True)
    (tmp_path / "run" / "inbox" / "halt").touch()
    with pytest.raises(Halt):
        carry_out(generate, tmp_path / "run", order)
    assert len(read_rows(tmp_path / "run" / "results" / "samples.jsonl", Sample)) == 4


def test_another_cycle_draws_other_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Model())
    found = []
    for cycle in (1, 2):
        result = carry_out(generate, tmp_path / f"run{cycle}", generate_order(tmp_path, cycle=cycle))
        found.append({s.seed for s in read_rows(Path(result["samples_path"]), Sample)})
    assert not found[0] & found[1]


# -- filter ------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Sequence[Any]) -> str:
    path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    return str(path)


def filter_order(tmp_path: Path) -> FilterOrder:
    good = "The function collapses the given text and truncates it until it does fit in the width given."
    samples = [
        sample("a", response=good),
        sample("b", response=good),
        sample("c", response="No."),
        sample("d", prompt="", response="no form at all"),
        sample(
            "e", response=good.replace("collapses", "can collapse") + " It is short.", prompt="Anything else to say?"
        ),
    ]
    return FilterOrder(
        run="r",
        domain="d",
        cycle=1,
        filter=FilterSpec(near_duplicate=0.95),
        samples=write_rows(tmp_path / "samples.jsonl", samples),
        chunks=write_rows(tmp_path / "chunks.jsonl", [chunk()]),
        items=write_rows(tmp_path / "items.jsonl", [item()]),
    )


def test_every_sample_gets_one_verdict_and_reasons_are_counted(tmp_path: Path) -> None:
    result = carry_out(filter_stage, tmp_path / "run", filter_order(tmp_path))
    verdicts = read_rows(Path(result["verdicts_path"]), Verdict)
    assert [v.id for v in verdicts] == ["a", "b", "c", "d", "e"]
    assert [v.accepted for v in verdicts] == [True, False, False, False, True]
    assert result["accepted"] == 2
    assert result["rejected"] == {"exact duplicate": 1, "too short": 1, "empty": 1}


def test_an_interrupted_filter_run_writes_the_same_verdicts_once(tmp_path: Path) -> None:
    order = filter_order(tmp_path)
    first = carry_out(filter_stage, tmp_path / "run", order)
    path = Path(first["verdicts_path"])
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]) + b'{"id":"torn')
    assert carry_out(filter_stage, tmp_path / "run", order) == first
    assert path.read_bytes() == whole


# -- queue -------------------------------------------------------------------------------------------


def queue_order(tmp_path: Path) -> QueueOrder:
    chunks = [chunk(f"c{n}", document=f"d{n}", text=f"Text number {n} is here.\n" * 4) for n in range(20)]
    chunks.append(chunk("v", split="vault", slice=0, text="never " * 50))
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    return QueueOrder(
        run="r",
        domain="d",
        cycle=1,
        mix=MixSpec(),
        tokenizer=str(tmp_path),
        chunks=write_rows(tmp_path / "chunks.jsonl", chunks),
        accepted=write_rows(tmp_path / "accepted.jsonl", [sample(f"s{n}", response=f"Answer {n}.") for n in range(3)]),
        sources=(SourceSpec(id="here", type="files", path=str(tmp_path)),),
        target=str(tmp_path / "snapshot"),
        sequence_tokens=64,
        sequences=50,
    )


def test_the_queue_writes_a_snapshot_without_a_vault_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = ChatCodec()
    codec.vocab_size = 300  # type: ignore[attr-defined]
    monkeypatch.setattr(queue, "TextCodec", lambda _folder: codec)
    result = carry_out(queue, tmp_path / "run", queue_order(tmp_path))
    snapshot = read_snapshot(Path(result["snapshot"]))
    text = codec.decode([t for t in snapshot.tokens.reshape(-1).tolist() if t > 2])
    assert "never" not in text
    assert "Text number" in text
    assert END in snapshot.tokens
    assert result["tokens"] == int(snapshot.loss_mask.sum())
    assert (result["sequences"], result["sha256"]) == (50, snapshot.sha256)
    assert result["mix"]["synthetic"] == pytest.approx(0.4, abs=0.05)
    assert result["epochs"]["synthetic"] > 1.0
    notes = list(map(facts.decoder.decode, (tmp_path / "run" / "events.jsonl").read_bytes().splitlines()))
    assert any(isinstance(f, facts.Note) and "fewer distinct tokens" in f.text for f in notes)


def test_a_finished_snapshot_is_verified_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = ChatCodec()
    codec.vocab_size = 300  # type: ignore[attr-defined]
    monkeypatch.setattr(queue, "TextCodec", lambda _folder: codec)
    order = queue_order(tmp_path)
    first = carry_out(queue, tmp_path / "run", order)
    written = (tmp_path / "snapshot" / "tokens.npy").stat().st_mtime_ns
    assert carry_out(queue, tmp_path / "run", order)["sha256"] == first["sha256"]
    assert (tmp_path / "snapshot" / "tokens.npy").stat().st_mtime_ns == written
    (tmp_path / "snapshot" / "tokens.npy").write_bytes(b"damage")
    with pytest.raises(StateError, match=r"tokens\.npy is damaged"):
        carry_out(queue, tmp_path / "run", order)
