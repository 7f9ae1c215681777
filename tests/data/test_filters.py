from __future__ import annotations

import pytest

from jupiter_engine.data.filters import chain, rules
from jupiter_engine.data.filters.chain import Contamination, Duplicates, FilterChain, usable
from jupiter_engine.protocol.specs import FilterSpec
from tests.data.fixture_corpus import words_of
from tests.data.rows import item, sample

CHUNK = (
    "textwrap.shorten(text, width, **kwargs): Collapse and truncate the given text to fit in the given width. "
    "First the whitespace in text is collapsed. If the result fits in the width, it is returned. Otherwise, enough "
    "words are dropped from the end so that the remaining words plus the placeholder fit within width."
)
GOOD = "It collapses the whitespace of the text and drops words from the end until the rest fits within the width."


def reason(
    response: str, *, kind: str = "qa", prompt: str = "What does shorten do?", spec: FilterSpec | None = None
) -> str:
    return usable(kind, prompt, response, CHUNK, spec or FilterSpec())[1]


def test_a_good_answer_passes_with_its_scores() -> None:
    good, why, scores = usable("qa", "What does shorten do?", GOOD, CHUNK, FilterSpec())
    assert (good, why) == (True, "ok")
    assert scores["words"] == 20
    assert scores["grounding"] > 0.7
    assert scores["copy"] < 0.5
    assert scores["repetition"] == 0.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", chain.EMPTY),
        ("   \n", chain.EMPTY),
        (GOOD + " <|im_start|>", chain.LEFTOVERS),
        ("As an AI language model I can say that " + GOOD, chain.META),
        ("I'm sorry, but I need more. " + GOOD, chain.META),
        ("Based on the text, " + GOOD, chain.META),
        ("It truncates the text.", chain.SHORT),
        (words_of("long", 700), chain.LONG),
        ("The text fits in the width here. " * 6, chain.REPETITIVE),
        ("Paris is the capital of France and lies on a river with many famous bridges and towers.", chain.UNGROUNDED),
        (CHUNK, chain.COPIED),
    ],
)
def test_each_rule_names_itself(response: str, expected: str) -> None:
    assert reason(response) == expected


def test_a_question_without_its_form_is_empty() -> None:
    assert reason(GOOD, prompt="") == chain.EMPTY


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            "```python\nimport textwrap\ntext = 'the words of a text'\nprint(textwrap.shorten(text, width=12))\n```",
            "ok",
        ),
        (
            "```python\nimport textwrap\nprint(textwrap.shorten(text, width=12\ntext words width fit end drop\n```",
            chain.NOT_PYTHON,
        ),
        (
            "```javascript\nconst text = shorten(words, width, text, placeholder, given, end, first, rest, fit)\n```",
            chain.NOT_PYTHON,
        ),
        (GOOD, chain.NOT_PYTHON),
        ("```\n# text width words only a comment that says nothing at all but text\n```", chain.NOT_PYTHON),
    ],
)
def test_code_must_be_python_that_parses(code: str, expected: str) -> None:
    assert reason(code, kind="code") == expected


def test_an_interactive_session_parses_without_its_output() -> None:
    assert rules.python_parses("```\n>>> x = [1,\n...      2]\n>>> x\n[1, 2]\n```")


def test_repetition_is_a_share_of_words() -> None:
    assert rules.repetition("one two three four one two three four") == 1.0
    assert rules.repetition("one two three four five six seven eight nine ten one two three four") == pytest.approx(
        8 / 14
    )


def test_grounding_sees_through_plural_and_verb_endings() -> None:
    assert rules.grounding("collapses truncating widths", CHUNK) == 1.0
    assert rules.grounding("the and of", CHUNK) == 0.0


def test_a_run_shared_with_the_vault_is_measured_in_words() -> None:
    vault = words_of("vault", 200)
    run = " ".join(vault.split()[50:90])
    checker = Contamination([vault], [], 30)
    scores: dict[str, float] = {}
    assert checker.reason(words_of("x", 10) + " " + run + " " + words_of("y", 10), scores) == chain.VAULT
    assert scores["vault_run"] == 40.0
    assert checker.reason(" ".join(run.split()[:29]), scores) == ""
    assert scores["vault_run"] == 29.0
    assert checker.reason(" ".join(run.split()[:30]), scores) == chain.VAULT


def test_boilerplate_of_the_vault_is_no_contamination() -> None:
    licence = words_of("licence", 60)
    checker = Contamination([f"{licence} {words_of(str(n), 50)}" for n in range(11)], [], 30)
    assert checker.reason(licence, {}) == ""


def test_a_run_shared_with_an_item_counts_from_60_percent_of_its_words() -> None:
    one = item()  # 14 words of question and 1 of answer: 60 % are 9 words
    checker = Contamination([], [one], 30)
    scores: dict[str, float] = {}
    asked = one.question.split()
    assert checker.reason(" ".join(asked[:8]), scores) == ""
    assert scores["item_run"] == 8.0
    assert checker.reason(" ".join(asked[:9]), scores) == chain.ITEM


def test_exact_and_near_duplicates_are_told_apart() -> None:
    duplicates = Duplicates(0.75)
    text = words_of("base", 100)
    duplicates.add(text)
    scores: dict[str, float] = {}
    assert duplicates.reason(text.upper() + "!", "", scores) == chain.EXACT
    assert duplicates.reason(text + " extra words", "", scores) == chain.NEAR
    assert scores["nearest"] > 0.9
    assert duplicates.reason(words_of("other", 100), "", scores) == ""
    assert scores["nearest"] < 0.2


def test_the_near_duplicate_estimate_agrees_with_exact_jaccard() -> None:
    left = words_of("left", 400).split()
    for replaced in (20, 100, 200):
        right = [*left[:-replaced], *words_of(f"r{replaced}", replaced).split()]
        a, b = ({tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (left, right))
        exact = len(a & b) / len(a | b)
        estimate = chain._minhash(" ".join(left)).jaccard(chain._minhash(" ".join(right)))
        assert estimate == pytest.approx(exact, abs=0.13)


def test_the_chain_keeps_the_first_of_two_and_knows_earlier_cycles() -> None:
    earlier = sample("old", prompt="How long may the shortened text become at most?", response=GOOD + " So it fits.")
    judge = FilterChain(FilterSpec(), [], [], [earlier])
    first, again, old = (
        sample("a", response=GOOD),
        sample("b", response=GOOD),
        sample("c", prompt=earlier.prompt, response=earlier.response),
    )
    verdicts = [judge.judge(one, CHUNK) for one in (first, again, old)]
    assert [v.reason for v in verdicts] == ["ok", chain.EXACT, chain.EXACT]
    assert [v.accepted for v in verdicts] == [True, False, False]
    assert [v.id for v in verdicts] == ["a", "b", "c"]


def test_a_rejected_sample_does_not_block_a_later_one() -> None:
    judge = FilterChain(FilterSpec(min_grounding=0.9), [], [])
    assert judge.judge(sample("a", response=GOOD), "something else").reason == chain.UNGROUNDED
    assert judge.judge(sample("b", response=GOOD), " ".join(reversed(GOOD.split()))).accepted


def test_contamination_is_judged_in_the_chain() -> None:
    judge = FilterChain(FilterSpec(max_copy=1.0), [CHUNK], [])
    assert judge.judge(sample(response=CHUNK), CHUNK).reason == chain.VAULT
