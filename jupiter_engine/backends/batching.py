"""Continuous batching, the same for both twins: a row of the batch is refilled as soon as its request ends."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jupiter_engine.backends.contract import Completion, GenerateRequest, GenerateStats
from jupiter_engine.backends.planning import uniform


class DecodingEngine(Protocol):
    """What a twin computes; logits stay in the twin's own arrays."""

    def open(self, rows: int, capacity: int) -> None:
        """Make an empty key/value cache of `rows` sequences of at most `capacity` tokens."""
        ...

    def prefill(self, place: int, prompt: list[int]) -> Any:
        """Run one prompt into row `place`; logits [1, V] of the next token.

        A prompt is run alone, so that its arithmetic cannot depend on other prompts.
        """
        ...

    def step(self, tokens: list[int], positions: list[int]) -> Any:
        """Run one token in each of the rows 0..len(tokens)-1; logits [rows, V]."""
        ...

    def move(self, source: int, target: int) -> None:
        """Copy row `source` of the cache over row `target`."""
        ...

    def choose(self, logits: Any, draws: list[float], temperature: float, top_p: float) -> list[int]:
        """One token a row: the most probable one at temperature 0, else sampled at `draws` in [0, 1)."""
        ...

    def close(self) -> None:
        """Give the cache's memory back."""
        ...


@dataclass(slots=True)
class _Row:
    index: int
    request: GenerateRequest
    limit: int
    new: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Where the newest token stands."""
        return len(self.request.prompt) + len(self.new) - 1

    def draw(self) -> float:
        return uniform(self.request.seed, len(self.new))

    def completion(self, stops: frozenset[int]) -> Completion | None:
        """None while the request goes on."""
        if self.new[-1] in stops:
            return Completion(index=self.index, tokens=self.new[:-1], finish="stop")
        if len(self.new) >= self.limit:
            return Completion(index=self.index, tokens=self.new, finish="length")
        return None


def decode_all(
    engine: DecodingEngine,
    requests: Sequence[GenerateRequest],
    stats: GenerateStats,
    *,
    context: int,
    temperature: float,
    top_p: float,
    batch_size: int,
    stop_ids: Sequence[int],
) -> Iterator[Completion]:
    """Yield completions as requests end; `requests` were checked. Rows in use are always 0..n-1."""
    waiting = deque(
        _Row(index, request, min(request.max_new_tokens, context - len(request.prompt)))
        for index, request in enumerate(requests)
    )
    if not waiting:
        return
    stops = frozenset(stop_ids)
    width = min(batch_size, len(waiting))
    engine.open(width, max(len(row.request.prompt) + row.limit for row in waiting))
    rows: list[_Row] = []
    try:
        while waiting or rows:
            while waiting and len(rows) < width:
                row = waiting.popleft()
                began = time.perf_counter()
                row.new += engine.choose(
                    engine.prefill(len(rows), row.request.prompt), [row.draw()], temperature, top_p
                )
                stats.prefill_seconds += time.perf_counter() - began
                stats.prompt_tokens += len(row.request.prompt)
                completion = row.completion(stops)
                if completion is None:
                    rows.append(row)
                else:
                    yield completion
            if not rows:
                continue
            began = time.perf_counter()
            logits = engine.step([row.new[-1] for row in rows], [row.position for row in rows])
            chosen = engine.choose(logits, [row.draw() for row in rows], temperature, top_p)
            stats.decode_seconds += time.perf_counter() - began
            stats.new_tokens += len(rows)
            for row, token in zip(rows, chosen, strict=True):
                row.new.append(token)
            yield from _take_ended(engine, rows, stops)
    finally:
        engine.close()


def stream_one(
    engine: DecodingEngine,
    request: GenerateRequest,
    *,
    context: int,
    temperature: float,
    top_p: float,
    stop_ids: Sequence[int],
) -> Iterator[int]:
    """Yield one request's new tokens as they come (a chat), without the stop token."""
    row = _Row(0, request, min(request.max_new_tokens, context - len(request.prompt)))
    stops = frozenset(stop_ids)
    engine.open(1, len(request.prompt) + row.limit)
    try:
        logits = engine.prefill(0, request.prompt)
        while True:
            row.new += engine.choose(logits, [row.draw()], temperature, top_p)
            if row.new[-1] in stops:
                return
            yield row.new[-1]
            if len(row.new) >= row.limit:
                return
            logits = engine.step([row.new[-1]], [row.position])
    finally:
        engine.close()


def _take_ended(engine: DecodingEngine, rows: list[_Row], stops: frozenset[int]) -> Iterator[Completion]:
    """Remove ended rows; the last row, which was looked at before, takes an ended one's place."""
    for place in range(len(rows) - 1, -1, -1):
        completion = rows[place].completion(stops)
        if completion is None:
            continue
        last = rows.pop()
        if place < len(rows):
            engine.move(len(rows), place)
            rows[place] = last
        yield completion
