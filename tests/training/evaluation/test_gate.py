"""What the gate decides, and what it says about it."""

from __future__ import annotations

import random
import re

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jupiter_engine.errors import StateError
from jupiter_engine.protocol.decision import Decision, Endpoint
from jupiter_engine.protocol.orders import ModelRef
from jupiter_engine.protocol.rows import Score
from jupiter_engine.protocol.specs import GateSpec
from jupiter_engine.training.evaluation.gate import decide
from tests.training.evaluation.made_scores import CANDIDATE, INCUMBENT, World, items_of, score, scores

BETTER = World(bits=0.05, known=0.12, vault=0.05, usable=0.05)


def judged(
    rows: list[Score],
    gate: GateSpec | None = None,
    *,
    look: int = 1,
    candidate: ModelRef = CANDIDATE,
    incumbent: ModelRef = INCUMBENT,
) -> Decision:
    return decide(gate or GateSpec(), candidate, incumbent, rows, items_of(rows), look, 0, 7)


def endpoint(decision: Decision, name: str) -> Endpoint:
    return next(one for one in decision.endpoints if one.name == name)


# -- the four verdicts -----------------------------------------------------------------------------
def test_a_better_candidate_is_promoted_and_the_numbers_are_the_scores_own() -> None:
    rows = scores(BETTER, 1)
    decision = judged(rows)
    assert decision.verdict == "promote"
    assert [(one.name, one.role, one.passed) for one in decision.endpoints] == [
        ("mcq_known", "primary", True),
        ("vault_bpb", "guard", True),
        ("mcq_vault", "guard", True),
        ("yield", "guard", True),
    ]
    known = endpoint(decision, "mcq_known")
    ours = [row.value for row in rows if row.model == "cand" and row.task == "mcq_known"]
    theirs = [row.value for row in rows if row.model == "base" and row.task == "mcq_known"]
    assert (known.candidate, known.incumbent) == (sum(ours) / 300, sum(theirs) / 300)
    assert known.effect == pytest.approx((sum(ours) - sum(theirs)) / 300)
    assert known.low < known.effect < known.high
    assert (known.units, known.clusters) == (300, 150)


def test_an_equal_candidate_is_inconclusive_and_hears_what_would_be_needed() -> None:
    decision = judged(scores(World(), 4))
    assert decision.verdict == "inconclusive"
    assert endpoint(decision, "mcq_known").passed is False
    assert "Inconclusive" in decision.sentences[0]
    assert "nothing shows it to be worse" in decision.sentences[0]
    assert "with 80 % power" in endpoint(decision, "mcq_known").sentence


def test_a_candidate_that_forgot_is_worse() -> None:
    decision = judged(scores(World(known=-0.15), 2))
    assert decision.verdict == "worse"
    assert endpoint(decision, "mcq_known").high < 0
    assert "measurably worse (questions on known documents)" in decision.sentences[0]


def test_one_broken_guard_refuses_a_candidate_that_wins_the_primary() -> None:
    decision = judged(scores(World(known=0.15, bits=-0.08, usable=0.1), 3))
    assert endpoint(decision, "mcq_known").passed is True
    assert endpoint(decision, "vault_bpb").high < endpoint(decision, "vault_bpb").threshold < 0
    assert decision.verdict == "worse"


def test_a_guard_that_is_merely_not_shown_is_inconclusive() -> None:
    decision = judged(scores(World(known=0.15, bits=0.05, chunks=8), 3))
    assert endpoint(decision, "mcq_known").passed is True
    assert endpoint(decision, "yield").passed is False
    assert decision.verdict == "inconclusive"
    assert "fitness as a generator" in decision.sentences[0]


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (World(known=0.2, bits=0.1, items=40), "40 questions were asked, the gate wants at least 60"),
        (World(known=0.2, bits=0.1, windows=30), "30 windows were scored, the gate wants at least 40"),
        (World(known=0.2, bits=0.1, per_document=20), "come from 15 independent documents, the gate wants at least 20"),
        (World(known=0.2, bits=0.1, windows=0), "Unseen text: nothing was scored"),
    ],
)
def test_small_samples_are_not_enough_data(world: World, words: str) -> None:
    decision = judged(scores(world, 5))
    assert decision.verdict == "not_enough_data"
    assert any(words in sentence for sentence in decision.sentences), decision.sentences


def test_too_few_documents_leave_the_endpoint_undecided_however_large_the_effect() -> None:
    decision = judged(scores(World(known=0.2, bits=0.3, per_document=20), 5))
    assert endpoint(decision, "mcq_known").passed is None
    assert "too few units to decide" in endpoint(decision, "mcq_known").sentence


# -- rules -----------------------------------------------------------------------------------------
def test_the_same_weights_are_inconclusive_at_once() -> None:
    twin = ModelRef(name="copy", folder="/models/copy", sha256=INCUMBENT.sha256)
    decision = decide(GateSpec(), twin, INCUMBENT, scores(BETTER, 1), [], 1, 0, 0)
    assert decision.verdict == "inconclusive"
    assert decision.endpoints == ()
    assert "same model, byte for byte" in decision.sentences[0]


@pytest.mark.parametrize("primary", ["vault_bpb", "mcq_known", "mcq_vault"])
def test_any_task_may_be_primary_and_the_rest_guard(primary: str) -> None:
    gate = msgspec.convert({"primary": primary}, GateSpec)
    decision = judged(scores(World(bits=0.05, known=0.12, vault=0.12, usable=0.05), 1), gate)
    assert decision.verdict == "promote"
    assert [one.name for one in decision.endpoints if one.role == "primary"] == [primary]
    assert len([one for one in decision.endpoints if one.role == "guard"]) == 3
    assert any("favours a candidate that was trained plainly" in text for text in decision.sentences) == (
        primary == "vault_bpb"
    )


def test_a_task_that_was_not_asked_for_is_no_guard_and_that_is_said() -> None:
    rows = [row for row in scores(BETTER, 1) if row.task not in ("mcq_vault", "yield")]
    decision = judged(rows)
    assert decision.verdict == "promote"
    assert {one.name for one in decision.endpoints} == {"mcq_known", "vault_bpb"}
    assert sum("was not measured and guards nothing" in text for text in decision.sentences) == 2


def test_a_missing_primary_is_not_enough_data() -> None:
    rows = [row for row in scores(BETTER, 1) if row.task != "mcq_known"]
    assert judged(rows).verdict == "not_enough_data"


def test_the_text_margin_is_a_share_of_the_incumbents_level() -> None:
    text = endpoint(judged(scores(BETTER, 1)), "vault_bpb")
    assert text.threshold == pytest.approx(-0.01 * text.incumbent)


def test_min_effect_raises_the_bar() -> None:
    rows = scores(BETTER, 1)
    observed = endpoint(judged(rows), "mcq_known").effect
    decision = judged(rows, GateSpec(min_effect=observed))
    assert endpoint(decision, "mcq_known").threshold == observed
    assert decision.verdict == "inconclusive"


def test_later_looks_ask_for_more() -> None:
    rows = scores(World(bits=0.05, known=0.09, vault=0.05, usable=0.10), 15)
    first, fifth = judged(rows), judged(rows, look=5)
    assert first.verdict == "promote"
    assert fifth.verdict == "inconclusive"
    assert fifth.alpha == pytest.approx(first.alpha / 25)
    assert endpoint(fifth, "mcq_known").low < endpoint(first, "mcq_known").low


def test_more_units_make_the_detectable_effect_smaller() -> None:
    small, large = (judged(scores(World(items=items, windows=items // 3), 9)) for items in (150, 600))
    for name in ("mcq_known", "vault_bpb"):
        assert 1.6 < endpoint(small, name).mde / endpoint(large, name).mde < 2.5


# -- damaged evidence ------------------------------------------------------------------------------
def test_unpaired_units_are_refused_by_name() -> None:
    rows = scores(World(), 1)
    lost = next(row for row in rows if row.model == "cand" and row.task == "mcq_known")
    with pytest.raises(StateError, match=f"scored for one model only.*{lost.unit}"):
        judged([row for row in rows if row is not lost])


def test_a_unit_scored_twice_is_refused() -> None:
    rows = scores(World(), 1)
    with pytest.raises(StateError, match="scored twice"):
        judged([*rows, rows[0]])


def test_unequal_windows_are_refused() -> None:
    rows = scores(World(), 1)
    rows[0] = msgspec.structs.replace(rows[0], weight=rows[0].weight + 1)
    with pytest.raises(StateError, match="not the same unit"):
        judged(rows)


@pytest.mark.parametrize(("task", "value"), [("vault_bpb", float("nan")), ("mcq_known", 0.5)])
def test_impossible_values_are_refused(task: str, value: float) -> None:
    rows = scores(World(), 1)
    index = next(index for index, row in enumerate(rows) if row.task == task)
    rows[index] = msgspec.structs.replace(rows[index], value=value)
    with pytest.raises(StateError, match=r"no usable number|neither 0 nor 1"):
        judged(rows)


# -- what people read ------------------------------------------------------------------------------
def test_the_sentences_carry_the_numbers_that_check_them() -> None:
    decision = judged(scores(BETTER, 1))
    text = endpoint(decision, "vault_bpb")
    assert re.search(
        rf"needs {text.candidate:.3f} bits per byte where the incumbent needs {text.incumbent:.3f} on 90 windows"
        rf" from 45 documents .*improvement \+{text.effect:.3f}, 93.92 % interval \+{text.low:.3f} \.\."
        rf" \+{text.high:.3f}",
        text.sentence,
    )
    assert text.sentence in decision.sentences
    assert decision.sentences[-1].startswith("Look 1 at base on vault slice 0: 0.0304 of the error budget of 0.05")


def test_examples_are_real_answers_from_both_sides() -> None:
    decision = judged(scores(BETTER, 1))
    known = [example for example in decision.examples if example.task == "mcq_known"]
    assert [example.winner for example in known].count("candidate") == 3
    assert [example.winner for example in known].count("incumbent") == 3
    for example in known:
        unit = example.question.removeprefix("What is ").removesuffix("?")
        assert (example.right, example.candidate, example.incumbent) == ("second", f"cand on {unit}", f"base on {unit}")
    assert not any(example.task == "vault_bpb" for example in decision.examples)


def test_a_decision_survives_json() -> None:
    decision = judged(scores(World(known=-0.2), 1))
    assert msgspec.json.decode(msgspec.json.encode(decision), type=Decision) == decision


# -- properties ------------------------------------------------------------------------------------
worlds = st.builds(
    World,
    bits=st.sampled_from([-0.05, 0.0, 0.05]),
    known=st.sampled_from([-0.15, 0.0, 0.15]),
    vault=st.sampled_from([-0.15, 0.0, 0.15]),
    windows=st.integers(2, 60),
    items=st.integers(2, 120),
    chunks=st.integers(0, 30),
    per_document=st.integers(1, 4),
)
slow_ok = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(world=worlds, seed=st.integers(0, 1000))
@slow_ok
def test_the_order_of_the_rows_changes_nothing(world: World, seed: int) -> None:
    rows = scores(world, seed)
    mixed = random.Random(seed).sample(rows, len(rows))
    assert msgspec.json.encode(judged(rows)) == msgspec.json.encode(judged(mixed))


@given(world=worlds, seed=st.integers(0, 1000))
@slow_ok
def test_swapping_the_models_mirrors_every_effect(world: World, seed: int) -> None:
    rows = scores(world, seed)
    forward, backward = judged(rows), judged(rows, candidate=INCUMBENT, incumbent=CANDIDATE)
    for one in forward.endpoints:
        other = endpoint(backward, one.name)
        mirrored = [-one.effect, -one.high, -one.low]
        assert [other.effect, other.low, other.high] == pytest.approx(mirrored, abs=1e-12)
    assert {forward.verdict, backward.verdict} != {"promote"}


@given(world=worlds, seed=st.integers(0, 1000), look=st.integers(1, 5))
@slow_ok
def test_identical_scores_are_never_a_promotion(world: World, seed: int, look: int) -> None:
    theirs = [row for row in scores(world, seed) if row.model == "base"]
    ours = [msgspec.structs.replace(row, model="cand", model_sha256=CANDIDATE.sha256) for row in theirs]
    decision = judged([*theirs, *ours], look=look)
    assert decision.verdict in ("inconclusive", "not_enough_data")
    assert all(one.effect == 0 for one in decision.endpoints)


def test_rows_of_other_models_are_ignored() -> None:
    rows = scores(BETTER, 1)
    other = ModelRef(name="old", folder="/models/old", sha256="a" * 64)
    assert judged([*rows, score(other, "mcq_known", "stray", 1.0, cluster="x")]) == judged(rows)
