from __future__ import annotations

from collections import Counter
from typing import Literal

from jupiter_engine.data import items, knowledge, makers
from jupiter_engine.data.chunks import cut
from jupiter_engine.protocol.rows import Chunk, Document, Item
from jupiter_engine.protocol.specs import ChunkSpec
from tests.data.fixture_corpus import topic_page


def source(name: str, text: str, split: Literal["train", "vault"] = "train", slice_number: int = -1) -> items.Source:
    document = Document(
        id=name,
        source="s",
        uri=name,
        title=name,
        kind="docs",
        license="MIT",
        bytes=len(text),
        sha256="",
        cluster=f"k{name}",
        split=split,
        slice=slice_number,
    )
    chunks = [
        Chunk(
            id=f"{name}#{n}",
            document=name,
            ordinal=n,
            title=piece.heading,
            kind="docs",
            split=split,
            slice=slice_number,
            cluster=document.cluster,
            text=piece.text,
        )
        for n, piece in enumerate(cut(text, "docs", ChunkSpec(max_bytes=1500)))
    ]
    return items.Source(document, text, chunks)


def corpus() -> list[items.Source]:
    return [
        source(f"topic{n:02d}", topic_page(n), "vault" if n % 4 == 0 else "train", n % 3 if n % 4 == 0 else -1)
        for n in range(24)
    ]


def made() -> tuple[list[Item], list[items.Source]]:
    sources = corpus()
    found, _ = items.make(sources, seed=7)
    return found, sources


def test_every_item_has_four_different_options_and_its_answer_stands_in_its_chunk() -> None:
    found, sources = made()
    chunks = {chunk.id: chunk for one in sources for chunk in one.chunks}
    assert len(found) > 200
    for item in found:
        answer = item.options[item.answer]
        assert len(set(item.options)) == 4
        assert item.evidence in chunks[item.chunk].text
        assert answer in " ".join(item.evidence.split())
        assert not makers_contains(item.question, answer)
        assert item.pool == ("known" if chunks[item.chunk].split == "train" else "vault")
        assert item.slice == chunks[item.chunk].slice
        assert item.cluster == chunks[item.chunk].cluster


def makers_contains(question: str, answer: str) -> bool:
    return f" {answer.lower()} " in f" {question.lower()} "


def test_no_question_is_asked_twice_and_ids_are_unique() -> None:
    found, _ = made()
    assert len({(item.maker, item.question) for item in found}) == len(found)
    assert len({item.id for item in found}) == len(found)


def test_items_are_the_same_each_time_and_follow_the_seed() -> None:
    sources = corpus()
    first, _ = items.make(sources, seed=7)
    assert first == items.make(sources, seed=7)[0]
    assert first != items.make(sources, seed=8)[0]


def test_neither_the_position_nor_the_length_gives_the_answer_away() -> None:
    found, _ = made()
    positions = Counter(item.answer for item in found)
    assert max(positions.values()) < 0.35 * len(found)
    lengths = [[len(option) for option in item.options] for item in found]
    longest = sum(
        size[item.answer] > max(size[: item.answer] + size[item.answer + 1 :])
        for item, size in zip(found, lengths, strict=True)
    )
    assert longest < 0.35 * len(found)


def test_all_kinds_of_statement_are_used() -> None:
    found, _ = made()
    assert {item.maker for item in found} >= {
        "purpose",
        "signature",
        "summary",
        "default",
        "module",
        "option",
        "parameter",
    }


def test_an_option_that_is_also_right_is_never_offered() -> None:
    pages = []
    for n in range(8):
        body = f"# box{n}\n\nText of box {n}.\n\n"
        body += f"## box{n}.shared(value{n}, other)\n\nReturns what was put inside it last.\n"
        body += "".join(f"\n## box{n}.only{n}{k}(arg{k})\n\nDoes a thing for the number {n} {k}.\n" for k in range(4))
        pages.append(source(f"box{n}", body))
    found, _ = items.make(pages, seed=1)
    assert not [item for item in found if item.maker == "module" and "shared" in item.question]


def test_a_vault_item_that_train_text_answers_is_rejected() -> None:
    text = topic_page(0)
    sources = [source("a", text), *corpus()[1:4], source("b", text, "vault", 0)]
    found, report = items.make(sources, seed=1)
    assert report.rejected is not None
    assert report.rejected["asked already"] > 0
    assert not [item for item in found if item.document == "b"]


def test_a_page_entry_gives_name_signature_summary_and_parameters() -> None:
    text = (
        "# m\n\n## m.cut(text, width=70, *, mark='...')\n\n"
        "Cut it short at a word. More.\n\nwidth -- the longest line wanted\n"
    )
    (entry,) = knowledge.callables(text, "docs", "m")
    assert (entry.qualified, entry.params, entry.summary) == (
        "m.cut",
        "text, width=70, *, mark='...'",
        "Cut it short at a word.",
    )
    assert [(p.name, p.default) for p in entry.parameters] == [("text", None), ("width", "70"), ("mark", "'...'")]
    assert text[entry.heading_start : entry.summary_end].endswith("at a word.")
    assert [(m.parameter, m.meaning) for m in knowledge.meanings(text, entry)] == [("width", "the longest line wanted")]


def test_code_entries_carry_their_class_and_skip_inner_and_private_functions() -> None:
    text = (
        "class Box:\n"
        '    """A box that holds many things."""\n\n'
        "    def put(self, thing):\n"
        '        """Put one thing into the box."""\n'
        "        def inner(x):\n"
        '            """Not a member of the class."""\n\n'
        "    def _hide(self):\n"
        '        """Not for the public eye."""\n\n'
        "def free(size=3):\n"
        '    """Make room for other things."""\n'
    )
    entries = knowledge.callables(text, "code", "boxes")
    assert [entry.qualified for entry in entries] == ["boxes.Box", "boxes.Box.put", "boxes.free"]
    assert entries[2].parameters == (knowledge.Parameter(name="size", default="3"),)


def test_a_gap_is_made_for_a_quoted_term_that_stands_once() -> None:
    text = (
        'The "yield" expression is used when defining a generator function here.\n\n'
        'The "if" and "if" stand twice in this one sentence.\n'
    )
    (cloze,) = knowledge.clozes(text)
    assert cloze.term == "yield"
    assert text[cloze.start : cloze.end] == cloze.sentence
    drafts = list(makers.drafts(source("t", text).document, text))
    assert drafts[0].question.startswith('Which term fills the gap: The "____" expression')
