"""The generate stage: the current generator writes samples from train chunks; done requests are never asked again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from jupiter_engine.backends import load_generator
from jupiter_engine.backends.contract import Completion, GenerateRequest
from jupiter_engine.data.generators import wordings
from jupiter_engine.data.generators.plan import Draw, plan
from jupiter_engine.protocol.orders import GenerateOrder
from jupiter_engine.protocol.rows import Chunk, Sample
from jupiter_engine.training.model.text import TextCodec
from jupiter_engine.worker.context import RunContext, read_rows


class Codec(Protocol):
    """The part of TextCodec that generating needs."""

    @property
    def eos_ids(self) -> Sequence[int]: ...
    def encode(self, text: str, *, bos: bool = False) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]: ...


class Generating(Protocol):
    """The part of a backend's generator that generating needs."""

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        temperature: float,
        top_p: float,
        batch_size: int,
        stop_ids: Sequence[int],
    ) -> Iterator[Completion]: ...


def run(context: RunContext, order: GenerateOrder) -> None:
    """Generate `order.generation.samples` samples; resumes by request hash."""
    codec: Codec = TextCodec(Path(order.generator.folder))
    work = _Work(context, order, codec, read_rows(Path(order.chunks), Chunk))
    context.progress(work.done, work.total, "samples")
    if work.waiting:
        context.note(f"loading {order.generator.name}")
        work.finish_with(load_generator(order.twin, Path(order.generator.folder), threads=order.threads))
    context.finish(work.result())


class _Work:
    """The requests of one run: which are done, which wait, and the totals of both."""

    def __init__(self, context: RunContext, order: GenerateOrder, codec: Codec, chunks: Sequence[Chunk]) -> None:
        self._context, self._order, self._codec = context, order, codec
        seed = order.seed * 1_000_003 + order.cycle
        existing = {sample.request_sha256: sample for sample in context.existing(Sample)}
        self.waiting: list[tuple[Draw, GenerateRequest, str]] = []
        self.reused = self.new_tokens = 0
        for draw in plan(order.generation.templates, chunks, samples=order.generation.samples, seed=seed):
            request, digest = self._request(draw)
            if digest in existing:
                self.reused += 1
                self.new_tokens += existing[digest].new_tokens
            else:
                self.waiting.append((draw, request, digest))
        self.total = self.reused + len(self.waiting)
        self.done = self.reused
        self._tokens_now = 0
        self._seconds = 0.0

    def _request(self, draw: Draw) -> tuple[GenerateRequest, str]:
        generation = self._order.generation
        ask = wordings.ask(draw.template, draw.chunk, topic=draw.topic, context_bytes=generation.context_bytes)
        prompt = self._codec.chat_prompt(ask.messages)
        if ask.opening:
            prompt = [*prompt, *self._codec.encode(ask.opening)]
        request = GenerateRequest(prompt=prompt, seed=draw.seed, max_new_tokens=generation.max_new_tokens)
        parts = {
            "model": self._order.generator.sha256,
            "prompt": prompt,
            "seed": draw.seed,
            "max_new_tokens": generation.max_new_tokens,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
        }
        return request, hashlib.sha256(msgspec.json.encode(parts)).hexdigest()

    def finish_with(self, generator: Generating) -> None:
        """Ask all waiting requests, in groups of a few batches; each finished batch of samples is on disk at once."""
        generation = self._order.generation
        group_size = 4 * generation.batch_size
        for first in range(0, len(self.waiting), group_size):
            group = self.waiting[first : first + group_size]
            started = time.monotonic()
            completions = generator.generate(
                [request for _, request, _ in group],
                temperature=generation.temperature,
                top_p=generation.top_p,
                batch_size=generation.batch_size,
                stop_ids=list(self._codec.eos_ids),
            )
            batch: list[Sample] = []
            for completion in completions:
                batch.append(self._sample(*group[completion.index], completion))
                self.done += 1
                self._tokens_now += len(completion.tokens)
                if len(batch) >= generation.batch_size:
                    self._context.records(batch)
                    batch = []
                    self._context.check_halt()
                seconds = self._seconds + time.monotonic() - started
                self._context.progress(
                    self.done, self.total, "samples", f"{self._tokens_now / max(seconds, 1e-9):.0f} tokens/s"
                )
            self._context.records(batch)
            self._seconds += time.monotonic() - started
            self._context.check_halt()
        self.new_tokens += self._tokens_now

    def _sample(self, draw: Draw, request: GenerateRequest, digest: str, completion: Completion) -> Sample:
        ask = wordings.ask(
            draw.template, draw.chunk, topic=draw.topic, context_bytes=self._order.generation.context_bytes
        )
        text = ask.opening + self._codec.decode(completion.tokens)
        finished = completion.finish == "stop"
        parsed = wordings.parse(draw.template, draw.chunk, text, finished=finished, topic=draw.topic)
        return Sample(
            id=hashlib.sha256(f"{self._order.domain}\0{self._order.cycle}\0{digest}".encode()).hexdigest()[:16],
            template=draw.template.id,
            type=draw.template.type,
            prompt=parsed.prompt,
            response=parsed.response,
            chunk=draw.chunk.id,
            document=draw.chunk.document,
            generator=self._order.generator.name,
            generator_sha256=self._order.generator.sha256,
            request_sha256=digest,
            seed=draw.seed,
            prompt_tokens=len(request.prompt),
            new_tokens=len(completion.tokens),
            finish=completion.finish,
            cycle=self._order.cycle,
        )

    def result(self) -> dict[str, object]:
        """The stage's result; `tokens_per_s` is measured over this attempt only (0.0 if it generated nothing)."""
        return {
            "samples": self.total,
            "new_tokens": self.new_tokens,
            "tokens_per_s": round(self._tokens_now / self._seconds, 2) if self._seconds else 0.0,
            "samples_path": str(self._context.results("samples")),
            "reused": self.reused,
        }
