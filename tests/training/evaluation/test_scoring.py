"""Likelihoods through a scorer whose every number is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jupiter_engine.backends.contract import ScoreRequest
from jupiter_engine.errors import Diverged, ModelInvalid
from jupiter_engine.training.evaluation.scoring import Continuation, in_pieces, log_likelihoods


class ByteCodec:
    """One token a byte; 256 ends a text."""

    eos_ids = (256,)

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        raise NotImplementedError


class LossyCodec(ByteCodec):
    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return list(text.lower().encode())


class CountingScorer:
    """Token t costs (t + 1) / 100 nats whatever precedes it; remembers the requests."""

    def __init__(self) -> None:
        self.requests: list[ScoreRequest] = []

    def logprobs(
        self,
        requests: Sequence[ScoreRequest],
        *,
        batch_tokens: int = 4096,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[float]]:
        self.requests += requests
        return [[-(token + 1) / 100 for token in request.tokens[request.first :]] for request in requests]


class BrokenScorer(CountingScorer):
    def logprobs(
        self,
        requests: Sequence[ScoreRequest],
        *,
        batch_tokens: int = 4096,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[float]]:
        return [[math.nan] * (len(request.tokens) - request.first) for request in requests]


def cost(text: str) -> float:
    return -sum((byte + 1) / 100 for byte in text.encode())


def test_the_sum_runs_over_the_text_and_never_over_the_prompt() -> None:
    found = log_likelihoods(
        [Continuation("ask", " yes"), Continuation("", "no")], ByteCodec(), CountingScorer(), context=64, model="m"
    )
    assert found == [pytest.approx(cost(" yes")), pytest.approx(cost("no"))]


def test_an_empty_prompt_stands_on_the_document_boundary() -> None:
    scorer = CountingScorer()
    log_likelihoods([Continuation("", "ab")], ByteCodec(), scorer, context=64, model="m")
    assert scorer.requests == [ScoreRequest(tokens=[256, 97, 98], first=1)]


def test_a_text_longer_than_the_context_is_scored_whole_in_pieces() -> None:
    scorer = CountingScorer()
    text = "abcdefghij" * 9
    found = log_likelihoods([Continuation("prompt", text)], ByteCodec(), scorer, context=16, model="m")
    assert found == [pytest.approx(cost(text))]
    assert all(len(request.tokens) <= 16 for request in scorer.requests)
    assert all(request.first >= 8 for request in scorer.requests[1:])


@given(length=st.integers(2, 200), context=st.integers(2, 40), data=st.data())
def test_pieces_score_every_token_once_in_order(length: int, context: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, length))
    tokens = list(range(length))
    pieces = in_pieces(tokens, first, context)
    assert [token for piece in pieces for token in piece.tokens[piece.first :]] == tokens[first:]
    assert all(1 <= piece.first <= len(piece.tokens) <= context for piece in pieces)


def test_probabilities_that_are_no_numbers_stop_the_evaluation_by_name() -> None:
    with pytest.raises(Diverged, match="cand gives probabilities that are not finite"):
        log_likelihoods([Continuation("a", "b")], ByteCodec(), BrokenScorer(), context=64, model="cand")


def test_a_tokenizer_that_loses_text_is_refused() -> None:
    with pytest.raises(ModelInvalid, match="does not give back the text"):
        log_likelihoods([Continuation("a", "Big")], LossyCodec(), CountingScorer(), context=64, model="m")
