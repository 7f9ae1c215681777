"""Fitness as a generator: passages of the unseen slice, asked as the generate stage asks, judged by the filters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from jupiter_engine.protocol.rows import Chunk, Kind, Split
from jupiter_engine.protocol.specs import FilterSpec, GenerationSpec, TemplateSpec
from jupiter_engine.training.evaluation.fitness import Assignment, assignments, judge, prompt

QA = TemplateSpec(id="qa", type="qa", weight=3.0)
CODE = TemplateSpec(id="code", type="code", weight=1.0)
OFF = TemplateSpec(id="off", type="debug", weight=0.0)
GENERATION = GenerationSpec(templates=(QA, CODE, OFF))
TEXT = "The bisect module keeps a list in sorted order. insort inserts an item at the right place in the sorted list.\n"


class WordCodec:
    """Ids are positions in a list of seen texts; enough to read the prompt back."""

    eos_ids = (0,)

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        self.seen.append(text)
        return [len(self.seen) - 1]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.seen[one] for one in ids)

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.encode("".join(f"<{one['role']}>{one['content']}" for one in messages) + "<assistant>")


def chunk(
    number: int, *, split: Split = "vault", slice_number: int = 0, kind: Kind = "docs", text: str = TEXT
) -> Chunk:
    return Chunk(
        id=f"c{number}",
        document=f"d{number % 5}",
        ordinal=number,
        title="bisect",
        kind=kind,
        split=split,
        slice=slice_number,
        cluster=f"k{number % 5}",
        text=text,
    )


OWN = TemplateSpec(id="own", type="qa", prompt="Read: {chunk}\nAsk one question about {title} and answer it.")
"""A wording of its own, so that these tests do not hang on the built-in one."""


def passage(template: TemplateSpec = OWN) -> Assignment:
    return Assignment(chunk=chunk(0), template=template, topic="", seed=1)


def test_passages_come_from_this_slice_of_the_vault_one_cluster_after_another() -> None:
    chunks = [chunk(number) for number in range(20)]
    chunks += [chunk(100, split="train", slice_number=-1), chunk(101, slice_number=1), chunk(102, text="  \n")]
    found = assignments(chunks, GENERATION, 10, 0, 7)
    assert Counter(one.chunk.cluster for one in found) == {f"k{index}": 2 for index in range(5)}
    assert found == assignments(chunks[::-1], GENERATION, 10, 0, 7)
    assert {one.chunk.id for one in found} <= {f"c{number}" for number in range(20)}
    assert found != assignments(chunks, GENERATION, 10, 0, 8)
    assert len({one.seed for one in found}) == 10
    assert len(assignments(chunks, GENERATION, 100, 0, 7)) == 20


def test_templates_follow_their_weights_even_in_small_samples() -> None:
    chunks = [chunk(number) for number in range(40)]
    for count in (4, 8, 20, 40):
        used = Counter(one.template.id for one in assignments(chunks, GENERATION, count, 0, 0))
        assert abs(used["qa"] - 0.75 * count) <= 1.5
        assert used["off"] == 0
    assert assignments(chunks, msgspec.structs.replace(GENERATION, templates=(OFF,)), 4, 0, 0) == []


def test_documentation_is_preferred_where_there_is_any() -> None:
    code = [chunk(number, kind="code") for number in range(5)]
    assert {one.chunk.kind for one in assignments([*code, chunk(9)], GENERATION, 5, 0, 0)} == {"docs"}
    assert {one.chunk.kind for one in assignments(code, GENERATION, 5, 0, 0)} == {"code"}


def test_the_model_is_asked_as_the_generate_stage_asks() -> None:
    codec = WordCodec()
    asked = codec.decode(prompt(passage(), GENERATION, codec))
    assert asked.startswith("<user>Read: The bisect module")
    assert TEXT.strip() in asked
    assert asked.endswith("<assistant>Question:")


GOOD = (
    " Which function of bisect inserts an item?\nAnswer: The function insort inserts an item at the right place,"
    " so the list stays in sorted order."
)


def test_a_grounded_answer_is_usable_and_is_kept_for_reading() -> None:
    value, answer = judge(passage(), GOOD, finished=True, generation=GENERATION, rules=FilterSpec())
    assert value == 1.0
    assert answer.startswith("[usable] Which function of bisect inserts an item?\nThe function insort")


def test_what_the_filters_reject_is_worth_nothing_and_says_why() -> None:
    for text, reason in (
        (" Bananas ripen slowly", "empty"),
        (" What is insort?\nAnswer: A function.", "too short"),
        (
            " What is insort?\nAnswer: " + "Bananas ripen slowly under warm tropical sunlight every single year. " * 2,
            "",
        ),
    ):
        value, answer = judge(passage(), text, finished=True, generation=GENERATION, rules=FilterSpec())
        assert value == 0.0
        assert answer.startswith(f"[{reason}"), answer
        assert not answer.startswith("[usable]")


def test_stricter_rules_reject_more() -> None:
    strict = FilterSpec(min_words=60)
    assert judge(passage(), GOOD, finished=True, generation=GENERATION, rules=strict)[0] == 0.0
