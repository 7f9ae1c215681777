from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from jupiter_engine.data.chunks import cut
from jupiter_engine.protocol.specs import ChunkSpec
from tests.data.fixture_corpus import module_source, topic_page

LINES = st.lists(st.sampled_from(["", "# Title", "word " * 30, "def f(x):", "    pass", "```", "é" * 50]), max_size=60)


@settings(max_examples=60, deadline=None)
@given(lines=LINES, code=st.booleans(), minimum=st.integers(0, 300))
def test_chunks_joined_are_the_document_and_no_line_is_cut(lines: list[str], code: bool, minimum: int) -> None:
    text = "\n".join(lines)
    pieces = cut(text, "code" if code else "docs", ChunkSpec(max_bytes=400, min_bytes=minimum))
    assert "".join(piece.text for piece in pieces) == text
    offset = 0
    for piece in pieces:
        assert piece.start == offset
        assert len(piece.text.encode()) <= 400
        offset += len(piece.text)
    assert all(piece.text.endswith("\n") for piece in pieces[:-1])


def test_a_line_longer_than_the_limit_stays_whole() -> None:
    pieces = cut("short\n" + "x" * 900 + "\nshort\n", "docs", ChunkSpec(max_bytes=300, min_bytes=0))
    assert [len(p.text) for p in pieces] == [6, 901, 6]


def test_prose_is_cut_at_headings_and_named_after_them() -> None:
    pieces = cut(topic_page(1), "docs", ChunkSpec(max_bytes=1000, min_bytes=200))
    assert len(pieces) > 3
    assert all(piece.text.startswith(("# ", "## ")) for piece in pieces)
    assert pieces[1].heading.startswith("topic01.f")


def test_a_comment_in_a_fence_is_no_heading() -> None:
    text = "# Real\n\n" + "text\n" * 20 + "```python\n# not a heading\nx = 1\n```\n" + "more\n" * 30
    assert {piece.heading for piece in cut(text, "docs", ChunkSpec(max_bytes=200, min_bytes=0))} == {"Real"}


def test_underlined_headings_count() -> None:
    text = "First\n=====\n\n" + "text\n" * 30 + "\nSecond\n------\n\n" + "text\n" * 30
    pieces = cut(text, "docs", ChunkSpec(max_bytes=220, min_bytes=50))
    assert [piece.text.splitlines()[0] for piece in pieces] == ["First", "Second"]


def test_code_is_cut_before_definitions_with_their_decorators() -> None:
    text = module_source(1) + "\n\n@decorated\ndef last(value):\n" + "    value += 1\n" * 20
    pieces = cut(text, "code", ChunkSpec(max_bytes=420, min_bytes=100))
    starts = [piece.text.lstrip("\n").splitlines()[0] for piece in pieces]
    assert "@decorated" in starts
    assert all(start.startswith(("def ", "@", '"""')) for start in starts)


def test_no_scrap_below_the_minimum_is_left_where_an_earlier_cut_avoids_it() -> None:
    text = "a line of text\n" * 28  # 420 bytes: 390 + 30 without care
    assert [len(p.text) for p in cut(text, "docs", ChunkSpec(max_bytes=400, min_bytes=100))] == [315, 105]
