"""Multiple choice by likelihood: which option's text does the model find most probable, byte for byte?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jupiter_engine.protocol.rows import Item
from jupiter_engine.training.evaluation.scoring import Continuation
from jupiter_engine.training.evaluation.selection import drawn

PROMPT_VERSION = 1
"""Counts every change of the wording or of the rule below: scores of another version are never reused."""


def chosen_items(items: Iterable[Item], pool: str, slice_number: int, count: int, seed: int) -> list[Item]:
    """At most `count` items of a pool for this look, one document after another before a second from any.

    Vault items are those of the slice; known items (their documents are in training, so they have no slice) are drawn
    anew for each slice and seed.
    """
    eligible = [item for item in items if item.pool == pool and (pool == "known" or item.slice == slice_number)]
    return drawn(
        eligible,
        count,
        f"{pool} {slice_number} {seed}",
        name=lambda item: item.id,
        group=lambda item: item.document,
    )


def continuations(item: Item) -> list[Continuation]:
    """One continuation for each option, in the item's order.

    The options are not listed in the prompt: each option's full text is scored by itself after the question. So no
    option has a position, and nothing needs to be averaged over rotations of the list.
    """
    prompt = f"Question: {item.question.strip()}\nAnswer:"
    return [Continuation(prompt, f" {option}") for option in item.options]


def answer(item: Item, log_likelihoods: Sequence[float]) -> tuple[float, str]:
    """(1.0 or 0.0, text of the chosen option) for one item, given each option's log-likelihood in nats.

    Chosen is the largest log-likelihood over the UTF-8 bytes of the option's text (lm-eval's acc_norm), so a long
    option is not punished for its length. Right means that the right option alone is the largest: a tie counts 0.
    """
    rates = [
        nats / max(1, len(option.encode("utf-8"))) for nats, option in zip(log_likelihoods, item.options, strict=True)
    ]
    best = max(rates)
    chosen = [index for index, rate in enumerate(rates) if rate == best]
    return float(chosen == [item.answer]), " | ".join(item.options[index] for index in chosen)
