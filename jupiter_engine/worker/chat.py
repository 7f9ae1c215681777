"""`python -m jupiter_engine.worker.chat --model FOLDER`: a conversation over JSON lines.

stdin   {"messages": [{"role": "user", "content": "..."}, ...]}     one question with its history a line
stdout  {"ready": true, ...} once the model is loaded, then for each question
        {"delta": "..."} any number of times, then {"done": true, "tokens": n, "tokens_per_s": x, "finish": "stop"}
        {"error": {"kind", "title", "detail", "fix"}} in place of all that when a question cannot be answered
Ends when stdin does, with status 0; with the error's documented status when the model cannot be loaded.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Literal

import msgspec
from msgspec import Meta

from jupiter_engine.backends import load_generator
from jupiter_engine.backends.contract import GenerateRequest, Generator
from jupiter_engine.checkpoints.model_folder import verify
from jupiter_engine.errors import JupiterError, UsageError
from jupiter_engine.training.model.text import TextCodec


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str


class _Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    messages: Annotated[tuple[_Message, ...], Meta(min_length=1)]


def text_pieces(codec: TextCodec, tokens: Iterable[int]) -> Iterator[str]:
    """The decoded text of `tokens`, piece by piece; a character is held back until all its bytes are there."""
    ids: list[int] = []
    given = ""
    for token in tokens:
        ids.append(token)
        text = codec.decode(ids)
        # An incomplete character decodes to U+FFFD at the end; the next token may complete it.
        if not text.endswith("\ufffd") and len(text) > len(given):
            yield text[len(given) :]
            given = text
    rest = codec.decode(ids)[len(given) :]
    if rest:
        yield rest


class Chat:
    """Answers questions one after the other."""

    def __init__(
        self,
        generator: Generator,
        codec: TextCodec,
        *,
        context: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        self._generator, self._codec, self._context = generator, codec, context
        self._max_new_tokens, self._temperature, self._seed = max_new_tokens, temperature, seed

    def answer(self, line: bytes) -> Iterator[dict[str, object]]:
        """The records that answer one line of input; UsageError when it is no question or does not fit."""
        try:
            question = msgspec.json.decode(line, type=_Question)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"the line is no question: {error}", fix='send {"messages": [...]}') from error
        prompt = self._prompt([{"role": one.role, "content": one.content} for one in question.messages])
        request = GenerateRequest(prompt=prompt, seed=self._seed, max_new_tokens=self._max_new_tokens)
        count = 0

        def counted() -> Iterator[int]:
            nonlocal count
            for token in self._generator.stream(
                request, temperature=self._temperature, top_p=0.95, stop_ids=self._codec.eos_ids
            ):
                count += 1
                yield token

        began = time.perf_counter()
        for piece in text_pieces(self._codec, counted()):
            yield {"delta": piece}
        seconds = time.perf_counter() - began
        limit = min(self._max_new_tokens, self._context - len(prompt))
        yield {
            "done": True,
            "tokens": count,
            "tokens_per_s": round(count / seconds, 2) if count and seconds > 0 else 0.0,
            "seconds": round(seconds, 3),
            "finish": "length" if count >= limit else "stop",
        }

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """The conversation's ids; when it outgrows the context the oldest turns (not the system text) are left out."""
        room = max(self._context - self._max_new_tokens, self._context // 2)
        head = messages[:1] if messages[0]["role"] == "system" else []
        turns = messages[len(head) :]
        while True:
            prompt = self._codec.chat_prompt([*head, *turns])
            if len(prompt) <= room:
                return prompt
            if len(turns) <= 1:
                raise UsageError(
                    f"the question has {len(prompt)} tokens, {room} fit the model's context",
                    fix="ask something shorter",
                )
            later = [i for i in range(1, len(turns)) if turns[i]["role"] == "user"]
            turns = turns[later[0] :] if later else turns[-1:]


def error_record(error: JupiterError) -> dict[str, object]:
    return {"error": {"kind": error.kind, "title": error.title, "detail": error.detail, "fix": error.fix}}


def serve(chat: Chat, source: IO[bytes], sink: IO[bytes]) -> None:
    """Answer every line of `source` on `sink` until it ends."""
    for line in iter(source.readline, b""):
        if not line.strip():
            continue
        try:
            for record in chat.answer(line):
                _write(sink, record)
        except JupiterError as error:
            _write(sink, error_record(error))


def _write(sink: IO[bytes], record: dict[str, object]) -> None:
    sink.write(msgspec.json.encode(record) + b"\n")
    sink.flush()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m jupiter_engine.worker.chat", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="model folder")
    parser.add_argument("--twin", choices=("torch", "mlx"), default="torch")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the most probable token")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(argv)
    if chosen.max_new_tokens < 1 or chosen.temperature < 0:
        parser.error("--max-new-tokens must be at least 1 and --temperature at least 0")
    sink = sys.stdout.buffer
    try:
        began = time.perf_counter()
        info = verify(chosen.model)
        chat = Chat(
            load_generator(chosen.twin, chosen.model, dtype=chosen.dtype, threads=chosen.threads),
            TextCodec(chosen.model),
            context=info.context,
            max_new_tokens=chosen.max_new_tokens,
            temperature=chosen.temperature,
            seed=chosen.seed,
        )
    except JupiterError as error:
        _write(sink, error_record(error))
        return error.exit_code
    seconds = round(time.perf_counter() - began, 3)
    _write(sink, {"ready": True, "model": str(chosen.model), "parameters": info.parameters, "seconds": seconds})
    try:
        serve(chat, sys.stdin.buffer, sink)
    except (BrokenPipeError, KeyboardInterrupt):
        # The person on the other side left in mid-answer: nothing is lost and nobody is there to tell.
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
