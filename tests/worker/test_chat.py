"""The chat program: JSON lines in, JSON lines out."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jupiter_engine.backends.contract import Completion, GenerateRequest, GenerateStats
from jupiter_engine.errors import ExitCode
from jupiter_engine.training.model.text import TextCodec
from jupiter_engine.worker import chat, prepare


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("chat") / "nano"
    prepare.make_nano(target, seed=0)
    return target


class Parrot:
    """A generator that answers with fixed tokens and keeps the prompts that it was given."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.requests: list[GenerateRequest] = []
        self.stats = GenerateStats()

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        temperature: float,
        top_p: float,
        batch_size: int,
        stop_ids: Sequence[int],
    ) -> Iterator[Completion]:
        raise NotImplementedError("a chat streams")

    def stream(
        self, request: GenerateRequest, *, temperature: float, top_p: float, stop_ids: Sequence[int]
    ) -> Iterator[int]:
        self.requests.append(request)
        yield from self.tokens[: request.max_new_tokens]


def talk(nano: Path, parrot: Parrot, *lines: object, max_new_tokens: int = 200) -> list[dict[str, Any]]:
    sink = io.BytesIO()
    one = chat.Chat(parrot, TextCodec(nano), context=256, max_new_tokens=max_new_tokens, temperature=0.7, seed=3)
    source = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    chat.serve(one, io.BytesIO(source), sink)
    return [json.loads(line) for line in sink.getvalue().splitlines()]


def ask(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def test_an_answer_arrives_whole_however_characters_are_cut(nano: Path) -> None:
    text = "näïve 🤖 漢字 done"
    parrot = Parrot(TextCodec(nano).encode(text))
    *deltas, done = talk(nano, parrot, ask("hi"))
    assert "".join(record["delta"] for record in deltas) == text
    assert not any("\ufffd" in record["delta"] for record in deltas)
    assert len(deltas) > 3
    assert done["done"] is True
    assert done["tokens"] == len(parrot.tokens)
    assert done["finish"] == "stop"
    assert parrot.requests[0].prompt == TextCodec(nano).chat_prompt(ask("hi")["messages"])
    assert parrot.requests[0].seed == 3


def test_an_answer_that_ends_in_half_a_character_is_still_shown(nano: Path) -> None:
    *deltas, done = talk(nano, Parrot(TextCodec(nano).encode("a🤖")[:-1]), ask("hi"))
    assert "".join(record["delta"] for record in deltas).startswith("a\ufffd")
    assert done["done"] is True


def test_the_limit_is_said(nano: Path) -> None:
    done = talk(nano, Parrot([70] * 50), ask("hi"), max_new_tokens=7)[-1]
    assert (done["tokens"], done["finish"]) == (7, "length")


def test_bad_lines_are_answered_and_the_talk_goes_on(nano: Path) -> None:
    records = talk(
        nano, Parrot([70]), b"{", {"messages": []}, {"messages": [{"role": "king", "content": "x"}]}, b"", ask("hi")
    )
    assert [record["error"]["kind"] for record in records[:3]] == ["UsageError"] * 3
    assert "king" in records[2]["error"]["detail"]
    assert records[-1]["done"] is True


def test_old_turns_are_left_out_when_the_talk_outgrows_the_context(nano: Path) -> None:
    parrot = Parrot([70])
    turns = [{"role": "system", "content": "Be kind."}]
    for number in range(12):
        turns += [{"role": "user", "content": f"q{number} word"}, {"role": "assistant", "content": f"a{number} word"}]
    turns.append({"role": "user", "content": "last"})
    talk(nano, parrot, {"messages": turns}, max_new_tokens=60)
    shown = TextCodec(nano).decode(parrot.requests[0].prompt)
    assert shown.startswith("system\nBe kind.\nuser\nq")
    assert "q0 " not in shown
    assert "q11 word" in shown
    assert shown.endswith("user\nlast\nassistant\n")
    assert len(parrot.requests[0].prompt) <= 196


def test_a_question_larger_than_the_context_is_refused(nano: Path) -> None:
    [record] = talk(nano, Parrot([70]), ask("x1 " * 400))
    assert "fit the model's context" in record["error"]["detail"]


@pytest.mark.slow
def test_the_program_end_to_end(nano: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jupiter_engine.worker.chat", "--model", str(nano), "--max-new-tokens", "5"],
        input=json.dumps(ask("What is a list?")) + "\n", capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert records[0]["ready"] is True
    assert records[-1]["done"] is True
    assert 0 < records[-1]["tokens"] <= 5


def test_a_missing_model_is_an_error_record(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert chat.main(["--model", str(tmp_path / "none")]) == ExitCode.STAGE_FAILED
    record = json.loads(capsysbinary.readouterr().out)
    assert record["error"]["kind"] == "ModelInvalid"
