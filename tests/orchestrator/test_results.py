"""What another machine's worker may write into results, times, steps and progress: read, or left out, never fatal."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jupiter_engine.orchestrator.database import Recorded
from jupiter_engine.orchestrator.process import read_metrics
from jupiter_engine.orchestrator.report import cycle_report
from jupiter_engine.orchestrator.results import FORMS, told
from jupiter_engine.orchestrator.sentences import progress_text, result_text, sentence
from jupiter_engine.orchestrator.state import apply
from jupiter_engine.protocol import journal as j
from jupiter_engine.protocol.facts import Metric, Progress
from jupiter_engine.protocol.state import State

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
MODEL = {"name": "m", "folder": "/m", "sha256": "0"}
GOOD: dict[str, dict[str, Any]] = {
    "prepare": {"model": MODEL, "parameters": 135},
    "collect": {"documents": 2, "chunks": 3, "items": 1, "bytes": 2048, "vault_bytes": 10, "reused": False},
    "generate": {"samples": 6, "new_tokens": 30, "tokens_per_s": 9.0},
    "filter": {"accepted": 5, "rejected": {"short": 1, "copy": 2}},
    "review": {"accepted": 5, "rejected": 1, "reviewed": 2, "by": "me"},
    "queue": {"sequences": 2, "tokens": 512, "mix": {"real_docs": 1}},
    "train": {"model": MODEL, "steps": 2, "first_loss": 3.0, "last_loss": 2, "tokens_per_s": 400.0},
    "evaluate": {"units": {"vault_bpb": 90}, "cached": 4},
}
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A result in which some values are anything, missing or more than expected; or one that is nothing at all."""
    stage = draw(st.sampled_from(sorted(FORMS)) | st.text(max_size=8))
    result = dict(GOOD.get(stage, {}))
    keys = [*sorted(result), "model", "reused"]
    for key in draw(st.lists(st.sampled_from(keys) | st.text(max_size=6), max_size=4)):
        if draw(st.booleans()):
            result.pop(key, None)
        else:
            result[key] = draw(ANY)
    return stage, result


def cycle_with(stage: str, result: dict[str, Any], *more: j.AnyEntry) -> State:
    created = j.CycleCreated(cycle="c", domain="d", number=1, mode="auto", remaining=0, settings={}, by="me")
    state = State()
    for number, entry in enumerate((created, j.StageFinished(cycle="c", stage=stage, run="r", result=result), *more)):
        apply(Recorded(seq=number + 1, at=1_700_000_000.0 + number, entry=entry), state)
    return state


@given(damaged())
@example(("train", {"tokens_per_s": "x"}))
@example(("generate", {}))
@example(("filter", {"accepted": 1, "rejected": {"a": "b"}}))
@example(("collect", {**GOOD["collect"], "bytes": 10**400}))
@example(("queue", {**GOOD["queue"], "mix": [1]}))
def test_no_result_stops_whoever_reads_it(case: tuple[str, dict[str, Any]]) -> None:
    stage, result = case
    text = result_text(stage, result)
    assert not CONTROL.search(text)
    assert (text == "") == (told(stage, result) is None)
    said = sentence(j.StageFinished(cycle="c", stage=stage, run="r", result=result))
    assert said is not None
    if stage in j.STAGES:
        state = cycle_with(stage, result)
        assert "## What was done" in cycle_report(state.cycles["c"], state)


def test_good_results_are_told() -> None:
    assert {stage: result_text(stage, GOOD[stage]) for stage in GOOD} == {
        "prepare": "base generator m, 135 parameters",
        "collect": "2 documents (2.0 KiB), 3 chunks, 1 questions, 10 B held out in the vault",
        "generate": "6 samples, 30 tokens at 9 tokens/s",
        "filter": "5 accepted, 3 rejected (copy 2, short 1)",
        "review": "5 accepted, 1 rejected, 2 seen by a person",
        "queue": "2 sequences, 512 tokens (real_docs 100%)",
        "train": "2 steps, loss 3.000 -> 2.000, 400 tokens/s, model /m",
        "evaluate": "90 vault_bpb for each model, 4 from cache",
    }
    assert cycle_with("collect", GOOD["collect"]).cycles["c"].counts == {"documents": 2, "chunks": 3, "items": 1}


def test_a_worker_does_not_drive_the_terminal() -> None:
    evil = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31mred\r\nnew line"
    result = {**GOOD["train"], "model": {**MODEL, "folder": evil}}
    assert result_text("train", result).endswith("model 31mred new line")
    progress = Progress(seq=0, at=0.0, done=1, total=2, unit=evil, rate_per_s=2.0, eta_s=None, note=evil)
    assert not CONTROL.search(progress_text("train", progress))
    note = j.Noted(cycle=None, stage=None, level="info", text=evil)
    assert "\x1b" not in str(sentence(note))
    state = cycle_with("filter", {"accepted": 1, "rejected": {"a | b\n\n# c": 1}})
    (line,) = [line for line in cycle_report(state.cycles["c"], state).splitlines() if line.startswith("| filter")]
    assert r"a \| b # c 1" in line


@pytest.mark.parametrize("happened_at", [-1e18, 1e18, -1e308, math.inf, math.nan])
def test_a_time_that_cannot_be_is_unknown(happened_at: float) -> None:
    note = j.Noted(cycle=None, stage="train", level="info", text="hello", happened_at=happened_at)
    assert sentence(note) == "train: (at an unknown time) hello"
    state = cycle_with("collect", {}, note)
    assert state.notices[-1].at == 1_700_000_002.0, "when it was learnt is known"


def test_a_late_note_is_told_with_its_time() -> None:
    note = j.Noted(cycle=None, stage="train", level="info", text="hello", happened_at=1_600_000_000.0)
    assert "2020-09-1" in str(sentence(note))
    assert cycle_with("collect", {}, note).notices[-1].at == 1_600_000_000.0


def metric(step: int) -> bytes:
    return msgspec.json.encode(
        Metric(step=step, tokens=1, loss=1.0, learning_rate=1e-3, grad_norm=1.0, tokens_per_s=1.0, seconds=1.0, at=1.0)
    )


def test_lines_that_are_no_metric_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    bad = [b'{"step":1}', b"", b"\x00\x00", b"[" * 100_000, b'{"step":\xff}', metric(3)[:40] + metric(3)]
    path.write_bytes(b"\n".join([metric(1), *bad, metric(4)]) + b"\n" + metric(5)[:20])
    metrics, offset = read_metrics(path, 0)
    assert [one.step for one in metrics] == [1, 4]
    assert offset == path.stat().st_size - 20, "what is not whole yet is read next time"
    assert read_metrics(path, offset) == ([], offset)
