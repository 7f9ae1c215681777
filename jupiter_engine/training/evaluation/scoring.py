"""From texts to the scorer's requests and back: log-probability of a continuation given a prompt.

Prompt and continuation are encoded separately and their ids joined, so the scored tokens cover exactly the
continuation's bytes: no token can span the boundary, whatever the tokenizer would do with the joined text. Every
tokenizer pays the same rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from jupiter_engine.backends.contract import Scorer, ScoreRequest
from jupiter_engine.errors import Diverged, ModelInvalid


class Codec(Protocol):
    """What evaluation needs of training.model.text.TextCodec."""

    @property
    def eos_ids(self) -> Sequence[int]: ...

    def encode(self, text: str, *, bos: bool = False) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Continuation:
    """`text` is scored, given `prompt` (which may be empty)."""

    prompt: str
    text: str


def log_likelihoods(
    continuations: Sequence[Continuation], codec: Codec, scorer: Scorer, *, context: int, model: str
) -> list[float]:
    """Natural-log probability of each continuation's text given its prompt: the sum over its tokens.

    The prompt begins with the tokenizer's document boundary (beginning-of-text, else end-of-text id), which also
    gives an empty prompt something to stand on. `context`: the model's longest sequence in tokens; longer ones are
    scored in pieces that overlap by half.
    Raises Diverged if a probability is not a finite number, ModelInvalid if the tokenizer loses text.
    """
    requests: list[ScoreRequest] = []
    owners: list[int] = []
    for index, continuation in enumerate(continuations):
        prompt = _prompt(continuation.prompt, codec)
        scored = codec.encode(continuation.text)
        if codec.decode(scored).strip() != continuation.text.strip():
            raise ModelInvalid(
                f"the tokenizer of {model} does not give back the text it encodes: {continuation.text[:60]!r}",
                fix="use a tokenizer that covers every byte; bits per byte would mean nothing otherwise",
            )
        pieces = in_pieces(prompt + scored, len(prompt), context)
        requests += pieces
        owners += [index] * len(pieces)
    sums = [0.0] * len(continuations)
    for owner, values in zip(owners, scorer.logprobs(requests), strict=True):
        sums[owner] += math.fsum(values)
    if not all(math.isfinite(value) for value in sums):
        raise Diverged(
            f"{model} gives probabilities that are not finite numbers",
            fix="look at the training run's loss curve; train again with a lower learning rate",
        )
    return sums


def _prompt(text: str, codec: Codec) -> list[int]:
    ids = codec.encode(text, bos=True)
    if ids and ids != codec.encode(text):
        return ids  # the tokenizer has a beginning-of-text id of its own
    return [*codec.eos_ids[:1], *ids] or codec.encode("\n")


def in_pieces(tokens: list[int], first: int, context: int) -> list[ScoreRequest]:
    """Requests that score each of tokens[first:] once, none longer than `context`.

    Every piece but the first scores at most half a context, so each scored token sees at least half a context before
    it (or everything there is).
    """
    pieces: list[ScoreRequest] = []
    scored = first
    while scored < len(tokens):
        end = min(len(tokens), max(scored - (context - context // 2), 0) + context)
        start = max(0, end - context)
        pieces.append(ScoreRequest(tokens=tokens[start:end], first=scored - start))
        scored = end
    return pieces
