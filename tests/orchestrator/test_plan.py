"""Orders of the queue and train stages: which tokenizer, which rows, which held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from jupiter_engine.errors import StateError
from jupiter_engine.orchestrator.plan import OrderWriter, Places, method_of
from jupiter_engine.protocol.commands import StartCycles
from jupiter_engine.protocol.orders import EvaluateOrder, QueueOrder, TrainOrder
from jupiter_engine.protocol.specs import EarlyStopSpec, LaunchSpec, Recipe
from jupiter_engine.settings.domain import load_domain
from tests.orchestrator.conftest import Rig

CYCLES = StartCycles(domain="python", cycles=2, mode="auto")


def writer(rig: Rig, cycle: str = "python-0001", slices: int = 6, **training: Any) -> OrderWriter:
    settings = load_domain(rig.root / "config" / "domains" / "python.yaml").value
    settings = msgspec.structs.replace(
        settings,
        training=msgspec.structs.replace(settings.training, **training),
        evaluation=msgspec.structs.replace(settings.evaluation, slices=slices),
    )
    state = rig.engine.state
    return OrderWriter(state, state.cycles[cycle], settings, LaunchSpec(twin="torch"), Places(rig.root))


def queue_of(made: OrderWriter) -> QueueOrder:
    order = made.write("queue")
    assert isinstance(order, QueueOrder)
    return order


def train_of(made: OrderWriter) -> TrainOrder:
    order = made.write("train")
    assert isinstance(order, TrainOrder)
    return order


async def finished(rig: Rig, verdict: str = "better") -> Rig:
    rig.worker.verdict = verdict
    assert rig.ask(CYCLES) is None
    await rig.steps()
    return rig


async def test_rows_are_read_with_the_tokenizer_of_what_is_trained(rig: Rig, tmp_path: Path) -> None:
    await finished(rig, "inconclusive")
    # An undecided candidate is trained on: its tokenizer, not the generator's, reads the rows.
    second = writer(rig, "python-0002")
    start = train_of(second).start
    assert start is not None
    assert start.name == "python-0001"
    assert queue_of(second).tokenizer == start.folder
    # A folder of one's own brings its own tokenizer.
    other = writer(rig, start=str(tmp_path / "llama"))
    assert queue_of(other).tokenizer == str(tmp_path / "llama") == train_of(other).start.folder  # type: ignore[union-attr]
    assert train_of(other).tokenizer is None


async def test_from_scratch_the_base_tokenizer_or_an_own_one(rig: Rig) -> None:
    await finished(rig)
    base = writer(rig, start="scratch", preset="1b")
    assert queue_of(base).own_tokenizer is None
    assert train_of(base).tokenizer == queue_of(base).tokenizer
    own = writer(rig, start="scratch", preset="1b", tokenizer="corpus", vocabulary=5000)
    asked = queue_of(own).own_tokenizer
    assert asked is not None
    assert (asked.vocabulary, asked.context) == (5000, 4096)
    assert asked.target == str(Places(rig.root).run("python-0001-queue") / "tokenizer")
    own.cycle.stages["queue"].result.pop("tokenizer", None)
    with pytest.raises(StateError, match="stage queue has no tokenizer"):
        train_of(own)
    own.cycle.stages["queue"].result["tokenizer"] = asked.target
    assert train_of(own).tokenizer == asked.target


async def test_the_method_reaches_the_queue(rig: Rig) -> None:
    await finished(rig)
    assert queue_of(writer(rig)).method == "continued"
    assert queue_of(writer(rig, method="sft")).method == "sft"
    assert queue_of(writer(rig, start="scratch", preset="nano")).method == "pretrain"
    assert method_of(Recipe(method="continued")) == "continued"


async def test_held_out_text_is_never_of_the_slice_that_the_coming_look_measures_with(rig: Rig) -> None:
    await finished(rig, "inconclusive")
    assert queue_of(writer(rig)).held_out is None
    for slices in (2, 3, 6):
        for cycle in ("python-0001", "python-0002"):
            made = writer(rig, cycle, slices, early_stop=EarlyStopSpec(every_steps=5, sequences=7))
            held_out = queue_of(made).held_out
            look = made.write("evaluate")
            assert isinstance(look, EvaluateOrder)
            assert held_out is not None
            assert held_out.sequences == 7
            assert held_out.slice == (look.slice - 1) % slices != look.slice
