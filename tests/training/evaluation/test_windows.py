"""Windows: same bytes for everyone, nothing but the slice's vault, no byte scored twice."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupiter_engine.protocol.rows import Chunk, Kind, Split
from jupiter_engine.protocol.specs import EvaluationSpec
from jupiter_engine.training.evaluation.windows import Window, vault_windows


def chunk(
    document: str, ordinal: int, text: str, *, split: Split = "vault", slice_number: int = 0, kind: Kind = "docs"
) -> Chunk:
    return Chunk(
        id=f"{document}#{ordinal}",
        document=document,
        ordinal=ordinal,
        title=document,
        kind=kind,
        split=split,
        slice=slice_number,
        cluster=f"cluster-{document}",
        text=text,
    )


def lines(count: int, word: str = "line") -> str:
    return "".join(f"{word} number {index:04d} of this text\n" for index in range(count))


SPEC = EvaluationSpec(windows=100, window_bytes=400, context_bytes=100)


def windows(chunks: list[Chunk], spec: EvaluationSpec = SPEC, seed: int = 0) -> list[Window]:
    return vault_windows(chunks, spec, 0, seed)


def test_only_the_vault_of_this_slice_is_scored() -> None:
    chunks = [
        chunk("here", 0, lines(40)),
        chunk("trained", 0, lines(40, "train"), split="train", slice_number=-1),
        chunk("later", 0, lines(40, "later"), slice_number=1),
    ]
    assert {window.document for window in windows(chunks)} == {"here"}


def test_scored_parts_tile_the_document_after_its_first_context() -> None:
    text = lines(100)
    found = sorted(windows([chunk("d", 0, text)]), key=lambda window: int(window.id.rsplit("+")[-1]))
    assert found[0].context + "".join(window.text for window in found) == text
    assert all(300 <= window.scored_bytes <= 400 for window in found[:-1])
    assert all(window.text.endswith("\n") for window in found)
    for before, after in pairwise(found):
        assert (before.context + before.text).endswith(after.context)
        assert len(after.context.encode()) in range(90, 101)


def test_chunks_of_a_document_are_joined_and_a_gap_is_a_new_stretch() -> None:
    text = lines(90)
    parts = [text[:1000], text[1000:1500], text[1500:]]
    whole = windows([chunk("d", 0, text)])
    pieces = windows([chunk("d", index, part) for index, part in enumerate(parts)])
    assert pieces == whole
    gapped = windows([chunk("d", 0, parts[0]), chunk("d", 2, parts[2])])
    assert not any(parts[0][-20:] + parts[2][:20] in window.context + window.text for window in gapped)


def test_documents_and_kinds_take_turns() -> None:
    chunks = [chunk("long", 0, lines(500)), *(chunk(f"s{index}", 0, lines(20)) for index in range(6))]
    chunks += [chunk("code", 0, lines(500, "code"), kind="code")]
    found = windows(chunks, EvaluationSpec(windows=14, window_bytes=400, context_bytes=100))
    assert [window.kind for window in found] == ["code", "docs"] * 7
    assert {window.document for window in found} == {"long", "code", *(f"s{index}" for index in range(6))}
    assert len(found) == 14


def test_the_draw_is_fixed_by_seed_and_slice_not_by_the_order_of_chunks() -> None:
    chunks = [chunk(f"d{index}", 0, lines(60)) for index in range(30)]
    spec = EvaluationSpec(windows=12, window_bytes=400, context_bytes=100)
    assert windows(chunks, spec) == windows(chunks[::-1], spec)
    assert windows(chunks, spec) != windows(chunks, spec, seed=1)


def test_short_documents_show_a_quarter_and_scraps_are_left_out() -> None:
    found = windows([chunk("short", 0, "a" * 160), chunk("scrap", 0, "b" * 80)])
    assert [(window.document, len(window.context), len(window.text)) for window in found] == [("short", 40, 120)]


@pytest.mark.parametrize("context_bytes", [0, 100])
@given(text=st.text(min_size=1, max_size=3000), window_bytes=st.integers(200, 700))
@settings(max_examples=60, deadline=None)
def test_every_cut_lies_between_characters(context_bytes: int, text: str, window_bytes: int) -> None:
    spec = EvaluationSpec(windows=1000, window_bytes=window_bytes, context_bytes=context_bytes)
    data = text.encode()
    covered: set[int] = set()
    for window in windows([chunk("d", 0, text)], spec):
        start = int(window.id.rsplit("+")[-1])
        assert data[start : start + window.scored_bytes] == window.text.encode()
        assert data[:start].endswith(window.context.encode())
        span = set(range(start, start + window.scored_bytes))
        assert not span & covered
        covered |= span
