"""Questions: which are asked, what is scored, and what counts as right."""

from __future__ import annotations

from typing import Literal

from jupiter_engine.protocol.rows import Item
from jupiter_engine.training.evaluation.mcq import answer, chosen_items, continuations


def item(number: int, *, pool: Literal["known", "vault"] = "known", document: str = "", slice_number: int = -1) -> Item:
    return Item(
        id=f"{pool}-{number}",
        pool=pool,
        maker="test",
        document=document or f"d{number % 7}",
        chunk="c",
        cluster="k",
        slice=slice_number,
        question=f"Which one is {number}? ",
        options=("os", "os.path.join", "höhe", "x"),
        answer=1,
        evidence="os.path.join",
    )


def test_every_document_is_asked_about_before_any_is_asked_twice() -> None:
    pool = [item(number) for number in range(70)]
    chosen = chosen_items(pool, "known", 0, 14, 0)
    assert sorted(one.document for one in chosen) == sorted([f"d{index}" for index in range(7)] * 2)


def test_known_items_change_with_slice_and_seed_and_vault_items_stay_in_their_slice() -> None:
    pool = [item(number) for number in range(70)]
    pool += [item(number, pool="vault", slice_number=number % 3) for number in range(60)]
    first = chosen_items(pool, "known", 0, 20, 0)
    assert first == chosen_items(pool[::-1], "known", 0, 20, 0)
    assert {one.id for one in first} != {one.id for one in chosen_items(pool, "known", 1, 20, 0)}
    assert {one.id for one in first} != {one.id for one in chosen_items(pool, "known", 0, 20, 1)}
    assert {one.slice for one in chosen_items(pool, "vault", 2, 100, 0)} == {2}
    assert len(chosen_items(pool, "vault", 2, 100, 0)) == 20
    assert chosen_items(pool, "known", 0, 0, 0) == []


def test_each_options_text_is_scored_after_a_question_that_lists_none_of_them() -> None:
    asked = continuations(item(3))
    assert [one.text for one in asked] == [" os", " os.path.join", " höhe", " x"]
    assert {one.prompt for one in asked} == {"Question: Which one is 3?\nAnswer:"}


def test_the_largest_log_likelihood_per_byte_is_chosen() -> None:
    # Rates: -1.0, -0.5 (12 bytes), -0.6 (5 bytes: the umlaut counts two), -2.
    assert answer(item(1), [-2.0, -6.0, -3.0, -2.0]) == (1.0, "os.path.join")
    assert answer(item(1), [-2.0, -6.0, -2.4, -2.0]) == (0.0, "höhe")


def test_a_tie_with_the_right_option_is_not_right() -> None:
    assert answer(item(1), [-1.0, -6.0, -5.0, -2.0]) == (0.0, "os | os.path.join")
