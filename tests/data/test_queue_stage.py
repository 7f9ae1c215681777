"""The queue stage with real tokenizers: own vocabulary, fine-tuning rows, held-out rows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jupiter_engine.data.queue.snapshot import read_snapshot
from jupiter_engine.errors import NotEnoughData, StateError
from jupiter_engine.files import sha256_file
from jupiter_engine.protocol import commands, facts, orders, rows, shapes, specs
from jupiter_engine.protocol.orders import HeldOutText, OwnTokenizer, QueueOrder, TrainOrder
from jupiter_engine.protocol.specs import LaunchSpec, MixSpec, Recipe, SourceSpec
from jupiter_engine.training.model.text import TextCodec
from jupiter_engine.training.model.tokenizer import publish_tokenizer, train_tokenizer
from jupiter_engine.worker import queue, train
from tests.data.rows import chunk, sample
from tests.data.test_worker_stages import carry_out, write_rows


def real_order(tmp_path: Path, **changes: Any) -> QueueOrder:
    """A queue order over this package's own source, and vault text of three slices."""
    texts = [Path(str(module.__file__)).read_text("utf-8") for module in (commands, facts, orders, rows, shapes, specs)]
    chunks = [
        chunk(f"c{n}.{part}", document=f"d{n}", ordinal=part, kind="code", text=text[part * 1500 : (part + 1) * 1500])
        for n, text in enumerate(texts)
        for part in range(-(-len(text) // 1500))
    ]
    chunks += [
        chunk(f"v{n}", document=f"vd{n}", split="vault", slice=n % 3, text=f"secret {n} of slice {n % 3}\n" * 20)
        for n in range(9)
    ]
    tokenizer = tmp_path / "base"
    if not tokenizer.exists():
        publish_tokenizer(tokenizer, train_tokenizer(["base text\n"] * 9, vocab_size=300), context=128)
    order = QueueOrder(
        run="r",
        domain="d",
        cycle=1,
        mix=MixSpec(),
        tokenizer=str(tokenizer),
        chunks=write_rows(tmp_path / "chunks.jsonl", chunks),
        accepted=write_rows(
            tmp_path / "accepted.jsonl",
            [sample(f"s{n}", prompt=f"What is {n}?", response=f"It is {n}. " * (n % 13 + 1)) for n in range(120)],
        ),
        sources=(SourceSpec(id="here", type="files", path=str(tmp_path)),),
        target=str(tmp_path / "snapshot"),
        sequence_tokens=128,
        sequences=30,
    )
    return msgspec.structs.replace(order, **changes)


def own(tmp_path: Path, vocabulary: int = 700) -> OwnTokenizer:
    return OwnTokenizer(vocabulary=vocabulary, context=2048, target=str(tmp_path / "run" / "tokenizer"))


def test_an_own_tokenizer_is_trained_on_train_documents_only(tmp_path: Path) -> None:
    order = real_order(tmp_path, own_tokenizer=own(tmp_path))
    result = carry_out(queue, tmp_path / "run", order)
    folder = Path(result["tokenizer"])
    assert folder == tmp_path / "run" / "tokenizer"
    codec = TextCodec(folder)
    snapshot = read_snapshot(Path(result["snapshot"]))
    assert codec.vocab_size == snapshot.manifest.vocab_size == 700
    assert snapshot.manifest.tokenizer_sha256 == sha256_file(folder / "tokenizer.json")
    row, segments = snapshot.tokens[0], snapshot.segments[0]
    assert "".join(codec.decode(row[segments == one].tolist()) for one in set(segments.tolist())).strip()
    # Neither merges nor rows hold a vault word: "secret" stands there a hundred times and is still several tokens.
    assert len(codec.encode("secret")) > 2
    line = "    name: str | None = None"
    assert len(codec.encode(line)) < len(TextCodec(tmp_path / "base").encode(line)) / 2


def test_the_own_tokenizer_is_the_same_each_time_and_follows_its_settings(tmp_path: Path) -> None:
    results = []
    for name, vocabulary in (("a", 700), ("b", 700), ("c", 600)):
        (tmp_path / name).mkdir()
        order = real_order(tmp_path / name, own_tokenizer=own(tmp_path / name, vocabulary))
        results.append(carry_out(queue, tmp_path / name / "run", order))
    assert results[0]["sha256"] == results[1]["sha256"] != results[2]["sha256"]


def test_a_lost_tokenizer_is_trained_again_and_must_be_the_same(tmp_path: Path) -> None:
    order = real_order(tmp_path, own_tokenizer=own(tmp_path))
    first = carry_out(queue, tmp_path / "run", order)
    shutil.rmtree(first["tokenizer"])
    assert carry_out(queue, tmp_path / "run", order) == first
    shutil.rmtree(first["tokenizer"])
    write_rows(tmp_path / "chunks.jsonl", [chunk("x", text="quite another text, " * 50)])
    with pytest.raises(StateError, match="encoded with another tokenizer"):
        carry_out(queue, tmp_path / "run", order)


def test_too_little_text_for_the_vocabulary_is_said(tmp_path: Path) -> None:
    carry_out(queue, tmp_path / "run", real_order(tmp_path, own_tokenizer=own(tmp_path, 50000)))
    notes = list(map(facts.decoder.decode, (tmp_path / "run" / "events.jsonl").read_bytes().splitlines()))
    assert any(isinstance(f, facts.Note) and "50000 were wanted" in f.text for f in notes)


def test_a_model_from_scratch_with_the_own_tokenizer_takes_the_snapshot(tmp_path: Path) -> None:
    """What the queue stage leaves is what worker.train asks for: vocabulary, special tokens, tokenizer hash."""
    order = real_order(tmp_path, own_tokenizer=own(tmp_path), held_out=HeldOutText(sequences=4, slice=1))
    result = carry_out(queue, tmp_path / "run", order)
    train_order = TrainOrder(
        run="t",
        domain="d",
        cycle=1,
        recipe=Recipe(start="scratch", preset="nano", tokenizer="corpus", sequence_tokens=128),
        launch=LaunchSpec(twin="torch"),
        snapshot=result["snapshot"],
        start=None,
        tokenizer=result["tokenizer"],
        target=str(tmp_path / "model"),
    )
    (tmp_path / "train-run").mkdir()
    job = train.check(train_order, tmp_path / "train-run")
    assert (job.info.vocab_size, job.info.eos_ids, job.info.pad_id) == (704, (2, 0), 0)
    assert job.info.tied
    assert TextCodec(job.start_folder).encode("class Order:") == TextCodec(Path(result["tokenizer"])).encode(
        "class Order:"
    )


def test_fine_tuning_takes_samples_only(tmp_path: Path) -> None:
    result = carry_out(queue, tmp_path / "run", real_order(tmp_path, method="sft", sequence_tokens=512))
    snapshot = read_snapshot(Path(result["snapshot"]))
    assert result["mix"] == {"synthetic": 1.0}
    assert result["useful_share"] == round(1 - result["padding_tokens"] / (30 * 512), 5) > 0.99
    codec = TextCodec(tmp_path / "base")
    counted = snapshot.tokens[snapshot.loss_mask.astype(bool)].tolist()
    assert "What is" not in codec.decode(counted), "only answers are learnt"
    assert "It is" in codec.decode(counted)
    order = real_order(tmp_path, method="sft", target=str(tmp_path / "other"))
    write_rows(tmp_path / "accepted.jsonl", [])
    with pytest.raises(NotEnoughData, match="no accepted sample to fine-tune on"):
        carry_out(queue, tmp_path / "run2", order)


@pytest.mark.parametrize(("length", "said"), [(40, "samples longer than 40 tokens were cut"), (150, "is padding")])
def test_padding_and_cut_samples_are_said(tmp_path: Path, length: int, said: str) -> None:
    order = real_order(tmp_path, method="sft", sequence_tokens=length)
    if said == "is padding":
        # All samples are of one length, and two do not fit a row.
        write_rows(
            tmp_path / "accepted.jsonl", [sample(f"s{n}", prompt=f"{n:02}", response="x" * 50) for n in range(9)]
        )
    carry_out(queue, tmp_path / "run", order)
    notes = list(map(facts.decoder.decode, (tmp_path / "run" / "events.jsonl").read_bytes().splitlines()))
    assert [said in f.text for f in notes if isinstance(f, facts.Note) and f.level == "warning"].count(True) == 1


def test_held_out_rows_come_from_the_named_slice(tmp_path: Path) -> None:
    order = real_order(tmp_path, held_out=HeldOutText(sequences=2, slice=1))
    result = carry_out(queue, tmp_path / "run", order)
    snapshot = read_snapshot(Path(result["snapshot"]))
    assert snapshot.held_out is not None
    assert result["held_out_sequences"] == len(snapshot.held_out.tokens) == 2
    text = TextCodec(tmp_path / "base").decode(snapshot.held_out.tokens.reshape(-1).tolist())
    assert "of slice 1" in text
    assert not any(word in text for word in ("slice 0", "slice 2"))
    assert "secret" not in TextCodec(tmp_path / "base").decode(snapshot.tokens.reshape(-1).tolist())
