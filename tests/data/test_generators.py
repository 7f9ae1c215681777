from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from jupiter_engine.data.generators import wordings
from jupiter_engine.data.generators.plan import plan, spread
from jupiter_engine.errors import ConfigError, NotEnoughData
from jupiter_engine.protocol.rows import Chunk
from jupiter_engine.protocol.specs import TemplateSpec
from tests.data.rows import chunk


def template(kind: Any = "qa", **fields: Any) -> TemplateSpec:
    return TemplateSpec(**{"id": kind, "type": kind, **fields})


def chunks(documents: int = 10, each: int = 3) -> list[Chunk]:
    return [
        chunk(f"d{d}c{c}", document=f"d{d}", ordinal=c, title=f"t{d}.{c}")
        for d in range(documents)
        for c in range(each)
    ]


@pytest.mark.parametrize("kind", list(wordings.WORDINGS))
def test_every_type_shows_the_chunk_and_its_title_and_no_placeholder(kind: Any) -> None:
    ask = wordings.ask(template(kind), chunk(), context_bytes=1200)
    message = ask.messages[-1]
    assert [m["role"] for m in ask.messages] == ["user", "assistant", "user"][3 - len(ask.messages) :]
    assert "Collapse and truncate the given text" in message["content"]
    assert "textwrap.shorten" in message["content"]
    assert "{" not in message["content"]


def test_braces_in_a_chunk_stay_as_they_are() -> None:
    ask = wordings.ask(template(), chunk(text="print({chunk}, {title}, {x})\n"), context_bytes=1200)
    assert "print({chunk}, {title}, {x})" in ask.messages[-1]["content"]


def test_own_wording_gets_its_fields_and_a_system_prompt_and_always_the_text() -> None:
    own = template("explanation", prompt="Tell a child about {topic} ({title}).", system_prompt="Be kind.")
    ask = wordings.ask(own, chunk(), topic="short texts", context_bytes=1200)
    assert [m["role"] for m in ask.messages] == ["system", "user"]
    assert ask.messages[1]["content"].startswith("Collapse and truncate")
    assert ask.messages[1]["content"].endswith("Tell a child about short texts (textwrap.shorten).")
    assert ask.opening == ""


def test_an_unknown_placeholder_names_template_and_fix() -> None:
    with pytest.raises(ConfigError, match=r"template qa: the prompt uses \{chunks\}") as caught:
        wordings.ask(template(prompt="{chunks}"), chunk(), context_bytes=100)
    assert "{chunk}" in caught.value.fix


def test_a_long_chunk_is_shown_up_to_a_line_end() -> None:
    assert wordings.shown("one line\ntwo lines\nthree lines\n", 20) == "one line\ntwo lines"
    assert wordings.shown("é" * 50, 11) == "é" * 5


@pytest.mark.parametrize(
    ("text", "prompt", "response"),
    [
        ("Question: What is it for?\nAnswer: It is for texts.", "What is it for?", "It is for texts."),
        ("Question:\n\nWhat is it for?\n\nAnswer:\nIt is for\ntexts.\n", "What is it for?", "It is for\ntexts."),
        ("**Question:** What is it for?\n**Answer:** Texts.", "What is it for?", "Texts."),
        ("Q: What is it for?\nA: Texts.\n\nQ: And then?\nA: No.", "What is it for?", "Texts."),
        ("Question: What is it for?\nAnswer: Texts.\n\nNote: I added a note.", "What is it for?", "Texts."),
        ("Question 1: What is it for?\nAnswer: Texts.\nQuestion 2: More?", "What is it for?", "Texts."),
    ],
)
def test_questions_and_answers_are_read_tolerantly(text: str, prompt: str, response: str) -> None:
    assert wordings.parse(template(), chunk(), text, finished=True) == wordings.Parsed(prompt, response)


@pytest.mark.parametrize("text", ["Question: What is it for?", "Question: ...\nAnswer: ...", "Just some text."])
def test_an_answer_without_the_form_has_no_prompt_but_keeps_the_text(text: str) -> None:
    assert wordings.parse(template(), chunk(), text, finished=True) == wordings.Parsed("", text)


def test_a_cut_off_answer_ends_at_its_last_whole_sentence() -> None:
    text = "Question: What is it for?\nAnswer: It is for texts. It also does"
    assert wordings.parse(template(), chunk(), text, finished=False).response == "It is for texts."
    more = text + " more.\nQuestion: And th"
    assert wordings.parse(template(), chunk(), more, finished=False).response == "It is for texts. It also does more."
    assert wordings.parse(template("rephrase"), chunk(), "No end in si", finished=False) == wordings.Parsed(
        "", "No end in si"
    )


def test_code_keeps_the_first_block_only() -> None:
    text = "```python\nx = 1\nprint(x)\n```\n\nThis prints one."
    parsed = wordings.parse(template("code"), chunk(), text, finished=True)
    assert parsed.response == "```python\nx = 1\nprint(x)\n```"
    assert "textwrap.shorten" in parsed.prompt
    assert wordings.parse(template("code"), chunk(), "```python\nx = 1\n", finished=False).prompt == ""


def test_prose_stops_at_repetition_headings_code_and_five_sentences() -> None:
    def response(text: str) -> str:
        return wordings.parse(template("rephrase"), chunk(), text, finished=True).response

    assert response("It cuts. It ends. It cuts. It goes on.") == "It cuts. It ends."
    assert response("It cuts text.\n\n# Example\nMore.") == "It cuts text."
    assert response("It cuts text.\n```python\nx = 1\n```") == "It cuts text."
    assert response("A b. C d. E f. G h. I j. K l.") == "A b. C d. E f. G h. I j."
    assert response("It uses os.path and e.g. more.") == "It uses os.path and e.g. more."


def test_the_example_turn_is_never_taken_for_an_answer() -> None:
    example = wordings.WORDINGS["explanation"].example
    text = f"It cuts text at a word. {example}"
    parsed = wordings.parse(template("explanation"), chunk(), text, finished=True)
    assert parsed.response == "It cuts text at a word."
    pair = "Question: What does it do?\n" + wordings.WORDINGS["qa"].example.partition("\n")[2]
    assert wordings.parse(template(), chunk(), pair, finished=True).prompt == ""


def test_cut_off_code_ends_with_its_last_whole_statement() -> None:
    whole = "```python\nimport textwrap\nx = textwrap.wrap('a')\n"
    expected = whole.rstrip("\n") + "\n```"
    for rest in ("def f():\n    if x:\n        ret", "for y in x:\n    print(", "print(x", "y = [\n    1,\n    2"):
        assert wordings.parse(template("code"), chunk(), whole + rest, finished=False).response == expected
    only_import = "```python\nimport textwrap\ndef f():\n    ret"
    assert wordings.parse(template("code"), chunk(), only_import, finished=False).prompt == ""


def test_a_name_opens_the_answer_and_a_phrase_does_not() -> None:
    named = wordings.ask(template(), chunk(), context_bytes=500).opening
    assert named in [f.replace("{title}", "textwrap.shorten") for f in wordings.WORDINGS["qa"].openings]
    assert wordings.ask(template(), chunk(title="guide: How to begin"), context_bytes=500).opening == "Question:"
    own = wordings.ask(template(prompt="{chunk} Ask."), chunk(), context_bytes=500)
    assert (own.opening, len(own.messages)) == ("Question:", 1)


def test_headings_are_shown_without_marks_and_code_as_it_is() -> None:
    text = "## class textwrap.TextWrapper\n\nWraps.\n"
    assert "about textwrap.shorten:\n\ntextwrap.TextWrapper\n\nWraps." in _asked(chunk(text=text))
    assert "## class textwrap.TextWrapper" in _asked(chunk(text=text, kind="code"))


def _asked(one: Chunk) -> str:
    return wordings.ask(template(), one, context_bytes=500).messages[-1]["content"]


def test_a_conversation_is_the_students_question_and_the_teachers_answer() -> None:
    text = "Student: How does it shorten?\nTeacher: It drops words.\nStudent: Thanks!\nTeacher: Welcome."
    assert wordings.parse(template("conversation"), chunk(), text, finished=True) == wordings.Parsed(
        "How does it shorten?", "It drops words."
    )


def test_the_trained_prompt_never_holds_the_chunk_and_varies_over_chunks() -> None:
    prompts = {
        wordings.parse(template("rephrase"), one, "It shortens.", finished=True).prompt.replace(one.title, "X")
        for one in chunks()
    }
    assert len(prompts) == 3
    assert not [p for p in prompts if "Collapse" in p]


def test_templates_follow_their_weights_at_every_length() -> None:
    templates = [template("qa", weight=3.0), template("rephrase"), template("code", weight=0.0)]
    draws = plan(templates, chunks(), samples=40, seed=1)
    assert Counter(d.template.id for d in draws) == {"qa": 30, "rephrase": 10}
    assert Counter(d.template.id for d in draws[:8]) == {"qa": 6, "rephrase": 2}


def test_no_pair_repeats_before_all_chunks_are_used_and_few_samples_cover_many_documents() -> None:
    templates = [template("qa"), template("rephrase")]
    draws = plan(templates, chunks(), samples=60, seed=1)
    assert len({(d.template.id, d.chunk.id) for d in draws}) == 60
    assert len({d.chunk.document for d in draws[:10]}) >= 8
    assert len({d.seed for d in draws}) == 60


def test_a_longer_plan_begins_with_the_shorter_one() -> None:
    templates = [template("qa"), template("rephrase", weight=0.4)]
    assert plan(templates, chunks(), samples=50, seed=2)[:20] == plan(templates, chunks(), samples=20, seed=2)
    assert plan(templates, chunks(), samples=20, seed=2) != plan(templates, chunks(), samples=20, seed=3)


def test_vault_chunks_are_never_drawn_and_prose_is_asked_of_docs() -> None:
    mixed = [
        *chunks(4, 2),
        chunk("v", document="dv", split="vault", slice=0),
        chunk("k", document="dk", kind="code"),
    ]
    assert {d.chunk.id for d in plan([template("qa")], mixed, samples=50, seed=0)} == {c.id for c in chunks(4, 2)}
    with pytest.raises(NotEnoughData):
        plan([template()], [chunk(split="vault", slice=0)], samples=1, seed=0)
    with pytest.raises(ConfigError, match="weight"):
        plan([template(weight=0.0)], chunks(), samples=1, seed=0)


def test_topics_take_turns_and_find_the_chunk_that_speaks_of_them() -> None:
    pool = [*chunks(), chunk("wal", document="dw", text="The write ahead log keeps changes.\n")]
    draws = plan([template("qa", topics=("write ahead log", "nothing else"))], pool, samples=4, seed=0)
    assert [d.topic for d in draws] == ["write ahead log", "nothing else"] * 2
    assert draws[0].chunk.id == "wal"
    assert draws[2].chunk.id != "wal"


def test_chunks_are_spread_in_rounds_over_documents() -> None:
    order = spread(chunks(5, 3), seed=4)
    assert len({c.document for c in order[:5]}) == 5
    assert sorted(c.id for c in order) == sorted(c.id for c in chunks(5, 3))
