from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupiter_engine.data.queue import pack
from jupiter_engine.data.queue.best_fit import fullest
from jupiter_engine.data.queue.pack import Class, Unit
from jupiter_engine.data.queue.snapshot import MANIFEST, read_snapshot, write_snapshot
from jupiter_engine.errors import NotEnoughData, StateError
from jupiter_engine.protocol.specs import MixSpec
from tests.data.rows import chunk, sample

END = 1


class ByteCodec:
    """One token a byte (offset 3); chat examples are <2> prompt <2> answer <1>."""

    eos_ids = (END,)

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        self.encoded += 1
        return [byte + 3 for byte in text.encode()]

    def chat_example(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]:
        asked, answered = (self.encode(m["content"]) for m in messages)
        return [2, *asked, 2, *answered, END], [0] * (len(asked) + 2) + [1] * (len(answered) + 1)


def units(codec: ByteCodec, *, docs: int = 20, code: int = 20, samples: int = 10, seed: int = 0) -> dict[Class, Any]:
    chunks = [chunk(f"d{n}", document=f"dd{n}", text=f"docs {n:03d} " * 8) for n in range(docs)]
    chunks += [chunk(f"k{n}", document=f"kk{n}", kind="code", text=f"code {n:03d} " * 8) for n in range(code)]
    made = pack.real_units(chunks, codec, weights={}, document_source={}, seed=seed)
    accepted = [sample(f"s{n}", prompt=f"ask {n}", response=f"answer number {n}") for n in range(samples)]
    made["synthetic"] = pack.synthetic_units(accepted, codec, seed=seed)
    return made


def packed(
    codec: ByteCodec | None = None, sequences: int = 40, mix: MixSpec | None = None, **counts: int
) -> pack.Packed:
    codec = codec or ByteCodec()
    return pack.pack(units(codec, **counts), mix or MixSpec(), sequences=sequences, sequence_tokens=32, end_id=END)


def test_every_row_is_full_and_segments_count_up_from_zero() -> None:
    found = packed()
    assert found.tokens.shape == found.loss_mask.shape == found.segments.shape == (40, 33)
    arrays = (found.tokens, found.loss_mask, found.segments)
    assert [array.dtype.name for array in arrays] == ["uint32", "uint8", "uint16"]
    for row in found.segments:
        assert row[0] == 0
        assert set(np.diff(row.astype(int))) <= {0, 1}


def test_the_first_token_of_a_segment_is_never_a_target() -> None:
    found = packed()
    starts = np.diff(found.segments.astype(int), axis=1, prepend=-1) != 0
    assert not found.loss_mask[starts].any()


def test_only_the_answer_of_a_sample_counts() -> None:
    found = packed(docs=1, code=0, samples=4, mix=MixSpec(real_docs=0.0, real_code=0, synthetic=1, real_floor=0.0))
    row, mask = found.tokens[0].tolist(), found.loss_mask[0].tolist()
    end = row.index(END)
    text = bytes(t - 3 for t in row[1:end] if t > 2).decode()
    counted = bytes(t - 3 for t, m in zip(row[: end + 1], mask, strict=False) if m and t > 2).decode()
    assert text.startswith("ask ")
    assert counted.startswith("answer number ")
    assert mask[end] == 1


@pytest.mark.parametrize("mix", [MixSpec(), MixSpec(real_docs=1, real_code=1, synthetic=2, real_floor=0.3)])
def test_the_mix_is_met_in_tokens(mix: MixSpec) -> None:
    found = packed(sequences=120, mix=mix)
    wanted = pack.shares(mix, pack.CLASSES)
    for name in pack.CLASSES:
        assert found.mix[name] == pytest.approx(wanted[name], abs=0.02)
    assert sum(found.mix.values()) == pytest.approx(1.0, abs=0.001)


def test_real_text_keeps_its_floor() -> None:
    greedy = MixSpec(real_docs=0.05, real_code=0.05, synthetic=0.9, real_floor=0.4)
    assert pack.shares(greedy, pack.CLASSES) == pytest.approx({"real_docs": 0.2, "real_code": 0.2, "synthetic": 0.6})
    found = packed(sequences=120, mix=greedy)
    assert found.mix["real_docs"] + found.mix["real_code"] == pytest.approx(0.4, abs=0.02)


def test_shares_are_normalised_over_the_classes_that_have_data() -> None:
    assert pack.shares(MixSpec(), ["real_docs"]) == {"real_docs": 1.0}
    assert pack.shares(MixSpec(), ["real_docs", "synthetic"])["synthetic"] == pytest.approx(0.4)


def test_nothing_to_train_on_is_said() -> None:
    with pytest.raises(NotEnoughData):
        pack.shares(MixSpec(), [])
    with pytest.raises(NotEnoughData, match="at least 40% real text"):
        pack.shares(MixSpec(), ["synthetic"])
    with pytest.raises(NotEnoughData):
        pack.pack({}, MixSpec(), sequences=2, sequence_tokens=8, end_id=END)


def test_few_tokens_are_repeated_and_the_passes_reported() -> None:
    found = packed(docs=2, code=2, samples=1, sequences=60)
    assert found.epochs["real_docs"] > 3
    assert found.distinct_tokens < 0.3 * found.tokens.size
    assert found.sample_ids == 1


def test_only_as_much_text_is_tokenised_as_the_rows_need() -> None:
    codec = ByteCodec()
    packed(codec, docs=500, code=500, samples=10, sequences=10)
    assert codec.encoded < 40


def test_packing_is_the_same_each_time_and_follows_the_seed() -> None:
    first, again, other = packed(seed=1), packed(seed=1), packed(seed=2)
    assert np.array_equal(first.tokens, again.tokens)
    assert np.array_equal(first.loss_mask, again.loss_mask)
    assert not np.array_equal(first.tokens, other.tokens)


def test_cut_text_goes_on_in_a_later_row_without_loss() -> None:
    codec = ByteCodec()
    text = "".join(chr(33 + n % 90) for n in range(150))
    made = pack.real_units([chunk(text=text)], codec, weights={}, document_source={}, seed=0)
    found = pack.pack(made, MixSpec(), sequences=5, sequence_tokens=32, end_id=END)
    flat = found.tokens.reshape(-1)[:151].tolist()
    assert bytes(t - 3 for t in flat[:150]).decode() == text
    assert flat[150] == END


def test_a_sample_is_never_cut_unless_it_is_longer_than_a_row() -> None:
    class Recorder(ByteCodec):
        pass

    found = packed(Recorder(), sequences=60)
    for row, segments in zip(found.tokens, found.segments, strict=True):
        for segment in range(int(segments.max()) + 1):
            ids = row[segments == segment].tolist()
            if ids[0] == 2:
                assert ids[-1] == END
                assert ids.count(2) == 2


ONLY_SAMPLES = MixSpec(real_docs=0, real_code=0, synthetic=1, real_floor=0.0)


def test_samples_that_cannot_fill_a_row_leave_padding_that_counts_nowhere() -> None:
    # A sample has 23 tokens; a row of 33 holds one.
    found = packed(docs=0, code=0, samples=3, sequences=4, mix=ONLY_SAMPLES)
    assert found.padding_tokens == 4 * (32 - 23)
    for tokens, mask, segments in zip(found.tokens, found.loss_mask, found.segments, strict=True):
        assert (tokens[23:] == END).all()
        assert not mask[23:].any()
        assert set(segments[:23].tolist()) == {0}
        assert set(segments[23:].tolist()) == {1}, "the padding is a segment of its own"


def made_samples(lengths: Sequence[int]) -> list[Callable[[], Unit]]:
    """Units of the given lengths, each of tokens that only it has; every other token counts."""

    def unit(number: int, length: int) -> Callable[[], Unit]:
        return lambda: Unit(str(number), [10 + number] * length, [n % 2 for n in range(length)])

    return [unit(number, length) for number, length in enumerate(lengths)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    sequences=st.integers(1, 12),
    synthetic=st.sampled_from([0.3, 1.0]),
)
def test_every_counted_token_is_a_placed_units(lengths: list[int], sequences: int, synthetic: float) -> None:
    """The sum over the units that were placed, found again in the arrays, is what the arrays count."""
    mix = MixSpec(real_docs=1 - synthetic, real_code=0, synthetic=synthetic, real_floor=0.0)
    text = [chunk(f"d{n}", document=f"dd{n}", text=f"docs {n:03d} " * 8) for n in range(3)]
    found_units = pack.real_units(text, ByteCodec(), weights={}, document_source={}, seed=0)
    found_units["synthetic"] = made_samples(lengths)
    try:
        found = pack.pack(found_units, mix, sequences=sequences, sequence_tokens=32, end_id=END)
    except NotEnoughData:
        assert max(lengths) == 1, "a sample of one token has no target"
        return
    counted = padding = cut = 0
    for tokens, segments in zip(found.tokens, found.segments, strict=True):
        for segment in range(int(segments.max()) + 1):
            where = np.flatnonzero(segments == segment)
            ids = tokens[where]
            if synthetic == 1.0:
                if (ids == END).all():
                    padding += int((where < 32).sum())
                    continue
                length = lengths[int(ids[0]) - 10]
                assert (ids == ids[0]).all()
                assert len(ids) == min(length, 33), "a sample stands whole, or its first 33 tokens where it is longer"
                counted += sum(n % 2 for n in range(1, len(ids)))
                cut += length > 33
    assert found.counted_tokens == int(found.loss_mask[:, 1:].sum()) == int(found.loss_mask.sum())
    if synthetic == 1.0:
        assert (found.counted_tokens, found.padding_tokens, found.cut_samples) == (counted, padding, cut)
    else:
        assert found.padding_tokens == 0, "real text fills every gap"


def test_rows_of_samples_are_at_least_99_percent_useful() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.2, 0.6, 3000), 12, 256).astype(int).tolist()
    found = pack.pack(
        {"synthetic": made_samples(lengths)}, ONLY_SAMPLES, sequences=600, sequence_tokens=256, end_id=END
    )
    assert found.padding_tokens <= 0.01 * 600 * 256
    assert found.cut_samples == 0
    assert found.epochs["synthetic"] <= 1.02, "gaps are not filled by repeating the short samples again and again"


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), max_size=9), width=st.integers(1, 60))
def test_the_fullest_choice_is_the_fullest(lengths: list[int], width: int) -> None:
    chosen = fullest(lengths, width)
    every = [
        sum(lengths[number] for number in range(len(lengths)) if choice >> number & 1)
        for choice in range(1 << len(lengths))
    ]
    assert sum(lengths[number] for number in chosen) == max(total for total in every if total <= width)


def test_few_different_lengths_are_packed_tightly_too() -> None:
    # Best-fit decreasing alone would put 2 x 40 into rows of 100 and leave a fifth empty.
    found = pack.pack(
        {"synthetic": made_samples([40, 30] * 50)}, ONLY_SAMPLES, sequences=20, sequence_tokens=99, end_id=END
    )
    assert found.padding_tokens <= 0.01 * 20 * 99
    assert found.epochs["synthetic"] == 1.0


def test_samples_are_used_once_before_any_is_repeated() -> None:
    found = pack.pack(
        {"synthetic": made_samples([8] * 100)}, ONLY_SAMPLES, sequences=20, sequence_tokens=39, end_id=END
    )
    assert found.sample_ids == 100
    assert found.epochs == {"synthetic": 1.0}
    assert found.padding_tokens == 0


VAULT = [
    chunk(f"v{n}", document=f"vd{n}", split="vault", slice=n % 3, text=f"vault {n:02d} slice {n % 3} ")
    for n in range(30)
]


def test_held_out_rows_are_vault_text_of_one_slice() -> None:
    train = [chunk(f"t{n}", document=f"td{n}", text="train ") for n in range(5)]
    found = pack.held_out_rows([*train, *VAULT], ByteCodec(), slice_number=1, sequences=4, sequence_tokens=32, seed=0)
    text = bytes(t - 3 for t in found.tokens.reshape(-1).tolist() if t != END).decode()
    assert found.tokens.shape == found.loss_mask.shape == found.segments.shape == (4, 33)
    assert "slice 1" in text
    assert not any(word in text for word in ("slice 0", "slice 2", "train"))
    starts = np.diff(found.segments.astype(int), axis=1, prepend=-1) != 0
    assert not found.loss_mask[starts].any()
    assert found.loss_mask[~starts].all()
    other = pack.held_out_rows(VAULT, ByteCodec(), slice_number=1, sequences=4, sequence_tokens=32, seed=1)
    assert not np.array_equal(found.tokens, other.tokens)


def test_held_out_rows_end_with_the_text() -> None:
    found = pack.held_out_rows(VAULT, ByteCodec(), slice_number=0, sequences=50, sequence_tokens=32, seed=0)
    tokens = 10 * len("vault 00 slice 0 ")
    assert len(found.tokens) == -(-tokens // 33) < 50
    assert int((found.tokens != END).sum()) == tokens, "every byte once, the rest is padding"
    padded = found.tokens == END
    assert not found.loss_mask[padded].any()
    with pytest.raises(NotEnoughData, match="vault slice 7 holds no text"):
        pack.held_out_rows(VAULT, ByteCodec(), slice_number=7, sequences=2, sequence_tokens=32, seed=0)


def test_the_end_of_text_stands_only_after_a_documents_last_chunk() -> None:
    parts = [chunk("a", ordinal=0, text="first "), chunk("b", ordinal=1, text="second")]
    made = pack.real_units(parts, ByteCodec(), weights={}, document_source={}, seed=0)
    found: dict[str, Unit] = {}
    make: Callable[[], Unit]
    for make in made["real_docs"]:
        found[make().id] = make()
    assert found["a"].ids[-1] != END
    assert found["b"].ids[-1] == END


def test_a_source_of_more_weight_comes_earlier() -> None:
    parts = [chunk(f"{s}{n}", document=f"{s}d{n}") for s in ("x", "y") for n in range(100)]
    sources = {f"{s}d{n}": s for s in ("x", "y") for n in range(100)}
    made = pack.real_units(parts, ByteCodec(), weights={"x": 4.0, "y": 1.0}, document_source=sources, seed=0)
    first = [make().id[0] for make in made["real_docs"][:50]]
    assert 33 <= first.count("x") <= 47  # expected about 40


def test_a_vault_chunk_is_refused() -> None:
    with pytest.raises(StateError, match="vault"):
        pack.real_units([chunk(split="vault", slice=0)], ByteCodec(), weights={}, document_source={}, seed=0)


def write(folder: Path, held_out: pack.HeldOut | None = None) -> Path:
    found = packed()
    write_snapshot(
        folder,
        found,
        held_out=held_out,
        held_out_slice=2,
        describe={
            "tokenizer_sha256": "t",
            "vocab_size": 300,
            "padding_tokens": found.padding_tokens,
            "distinct_tokens": found.distinct_tokens,
            "mix": found.mix,
            "epochs": found.epochs,
            "sample_ids": found.sample_ids,
            "seed": 0,
        },
    )
    return folder


def test_a_snapshot_reads_back_as_memory_maps(tmp_path: Path) -> None:
    snapshot = read_snapshot(write(tmp_path / "snap"))
    expected = packed()
    assert isinstance(snapshot.tokens, np.memmap)
    assert np.array_equal(snapshot.tokens, expected.tokens)
    assert np.array_equal(snapshot.segments, expected.segments)
    assert snapshot.manifest.tokens == int(expected.loss_mask.sum())
    assert (snapshot.manifest.sequences, snapshot.manifest.sequence_tokens) == (40, 32)
    assert len(snapshot.sha256) == 64


def test_the_manifest_accounts_for_every_token(tmp_path: Path) -> None:
    manifest = read_snapshot(write(tmp_path / "snap")).manifest
    expected = packed()
    assert manifest.input_tokens == 40 * 32
    assert manifest.tokens == expected.counted_tokens
    assert manifest.padding_tokens == expected.padding_tokens == 0
    assert manifest.held_out is None


def test_held_out_rows_are_listed_hashed_and_read(tmp_path: Path) -> None:
    rows = pack.held_out_rows(VAULT, ByteCodec(), slice_number=2, sequences=3, sequence_tokens=32, seed=0)
    folder = write(tmp_path / "snap", rows)
    snapshot = read_snapshot(folder)
    assert snapshot.held_out is not None
    assert isinstance(snapshot.held_out.tokens, np.memmap)
    for name in ("tokens", "loss_mask", "segments"):
        assert np.array_equal(getattr(snapshot.held_out, name), getattr(rows, name))
        assert f"held_out_{name}.npy" in snapshot.manifest.files
    facts = snapshot.manifest.held_out
    assert facts is not None
    assert (facts.sequences, facts.tokens, facts.slice) == (3, int(rows.loss_mask.sum()), 2)
    assert snapshot.sha256 != read_snapshot(write(tmp_path / "without")).sha256
    data = bytearray((folder / "held_out_tokens.npy").read_bytes())
    data[-1] ^= 1
    (folder / "held_out_tokens.npy").write_bytes(data)
    with pytest.raises(StateError, match=r"held_out_tokens\.npy is damaged"):
        read_snapshot(folder)
    assert read_snapshot(tmp_path / "without").held_out is None


@pytest.mark.parametrize("name", ["tokens.npy", "loss_mask.npy", "segments.npy"])
def test_a_damaged_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "snap")
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(StateError, match=f"{name} is damaged"):
        read_snapshot(folder)
    (folder / name).unlink()
    with pytest.raises(StateError, match=f"{name} is missing"):
        read_snapshot(folder)


def test_a_snapshot_without_manifest_is_not_complete(tmp_path: Path) -> None:
    folder = write(tmp_path / "snap")
    (folder / MANIFEST).write_bytes(b"{")
    with pytest.raises(StateError, match="cannot be read"):
        read_snapshot(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(StateError, match="not complete"):
        read_snapshot(folder)


def test_ids_outside_the_vocabulary_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    rows = np.full((1, 3), 300, dtype=np.uint32)
    with pytest.raises(StateError, match="token id 300 does not exist in a vocabulary of 300"):
        write_snapshot(
            tmp_path / "snap",
            pack.HeldOut(rows, np.ones((1, 3), dtype=np.uint8), np.zeros((1, 3), dtype=np.uint16)),
            describe={"vocab_size": 300},
        )
    assert not (tmp_path / "snap").exists()
