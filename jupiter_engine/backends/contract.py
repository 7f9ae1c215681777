"""What both twins promise: the same requests in, the same kind of answers out. No tensor library here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Continue `prompt` by at most `max_new_tokens` tokens.

    What is sampled depends on the model, the prompt, `seed` and the sampling
    parameters only, not on the other requests of a batch (as far as the
    hardware's arithmetic allows: another batch size may round differently).
    """

    prompt: list[int]
    seed: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    index: int
    """Position of the request in the sequence given to `generate`."""
    tokens: list[int]
    """New tokens, without the stop token."""
    finish: Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """Log-probabilities of tokens[first:], each given everything before it; 1 <= first <= len(tokens)."""

    tokens: list[int]
    first: int


@dataclass(slots=True, kw_only=True)
class GenerateStats:
    """Measured by a generator over its whole life; seconds of wall time."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class Generator(Protocol):
    stats: GenerateStats

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        temperature: float,
        top_p: float,
        batch_size: int,
        stop_ids: Sequence[int],
    ) -> Iterator[Completion]:
        """Yield each request's completion as soon as it is finished, in order of finishing.

        `temperature` 0 takes the most probable token. A request whose prompt
        is empty, holds an id outside the vocabulary, or does not fit the
        model's context with one new token is a ValueError before anything is
        computed; `max_new_tokens` is cut to what the context still holds.
        """
        ...

    def stream(
        self, request: GenerateRequest, *, temperature: float, top_p: float, stop_ids: Sequence[int]
    ) -> Iterator[int]:
        """Yield the new tokens of one request as they come, without the stop token."""
        ...


class Scorer(Protocol):
    def logprobs(
        self,
        requests: Sequence[ScoreRequest],
        *,
        batch_tokens: int = 4096,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[float]]:
        """Natural-log probabilities in float32, one list a request, in request order.

        `progress(done, total)` counts requests. At most about `batch_tokens`
        tokens (padding included) go through the model at once.
        """
        ...


def check_generate_requests(requests: Sequence[GenerateRequest], *, vocab_size: int, context: int) -> None:
    """Raise ValueError for a request that no model call could serve."""
    for index, request in enumerate(requests):
        if not request.prompt:
            raise ValueError(f"request {index}: the prompt is empty")
        if not 0 <= min(request.prompt) <= max(request.prompt) < vocab_size:
            raise ValueError(f"request {index}: the prompt holds a token id outside 0..{vocab_size - 1}")
        if len(request.prompt) >= context:
            raise ValueError(
                f"request {index}: the prompt has {len(request.prompt)} tokens, the model's context holds {context}"
            )
        if request.max_new_tokens < 1:
            raise ValueError(f"request {index}: max_new_tokens is {request.max_new_tokens}, it must be at least 1")


def check_score_requests(requests: Sequence[ScoreRequest], *, vocab_size: int, context: int) -> None:
    """Raise ValueError for a request that no model call could serve."""
    for index, request in enumerate(requests):
        if not 1 <= request.first <= len(request.tokens):
            raise ValueError(f"request {index}: first is {request.first}, it must be in 1..{len(request.tokens)}")
        if not 0 <= min(request.tokens) <= max(request.tokens) < vocab_size:
            raise ValueError(f"request {index}: it holds a token id outside 0..{vocab_size - 1}")
        if len(request.tokens) > context:
            raise ValueError(
                f"request {index}: it has {len(request.tokens)} tokens, the model's context holds {context}"
            )
