"""A run that is interrupted ends where an uninterrupted one does: every method, both twins, other ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from jupiter_engine.checkpoints.store import CheckpointStore
from jupiter_engine.protocol.specs import (
    EarlyStopSpec,
    LaunchSpec,
    LoraSpec,
    OptimizerSpec,
    Recipe,
    SpikeGuardSpec,
    Twin,
)
from jupiter_engine.training.data_order import BatchOrder
from jupiter_engine.training.loop import TrainingData
from jupiter_engine.worker.context import Halt, RunContext
from jupiter_engine.worker.train import run as run_stage
from tests.training.nano import Run, data, make_run, recipe, write_model, write_snapshot

OPTIMIZERS = ["adamw", "adamw8bit", "muon", "adafactor"]
BETWEEN_TWINS = 2e-3
"""Largest difference of a weight after the twins shared a run: their rounding differs from the first step on."""


def one(twin: Twin) -> LaunchSpec:
    return LaunchSpec(twin=twin, threads_per_rank=1)


def two(twin: Twin, **changes: Any) -> LaunchSpec:
    return LaunchSpec(
        twin=twin, ranks=2, launcher="torchrun" if twin == "torch" else "mlx.launch", threads_per_rank=1, **changes
    )


def carry_out(run: Run, launch: LaunchSpec | None = None, *, halt_at: int = -1) -> None:
    """The stage in this process, with another launch than the order's if given; halted at a step if asked for."""
    order = msgspec.structs.replace(run.order, launch=launch or run.order.launch)
    # The ranks of a group read it themselves.
    (run.folder / "spec.json").write_bytes(msgspec.json.encode(order))
    context, launch = RunContext(run.folder), order.launch
    inbox = run.folder / "inbox" / "halt"
    inbox.unlink(missing_ok=True)
    if halt_at >= 0 and launch.ranks == 1:
        context.halt_asked = lambda: len(run.metrics()) + 1 >= halt_at  # type: ignore[method-assign]
    elif halt_at >= 0:
        # The ranks are processes of their own and look for this file.
        threading.Thread(target=ask_for_a_halt, args=(run, halt_at), daemon=True).start()
    try:
        run_stage(context, order)
    except Halt:
        assert halt_at >= 0
    else:
        assert halt_at < 0
    finally:
        context.close()


def ask_for_a_halt(run: Run, step: int) -> None:
    deadline = time.monotonic() + 100
    while len(run.metrics()) < step and time.monotonic() < deadline:
        time.sleep(0.005)
    (run.folder / "inbox").mkdir(exist_ok=True)
    (run.folder / "inbox" / "halt").touch()


def interrupted(run: Run, first: LaunchSpec, second: LaunchSpec) -> None:
    carry_out(run, first, halt_at=4)
    stored = CheckpointStore(run.folder / "checkpoints", keep=2).steps()
    assert stored[-1] in (3, 4, 5)
    carry_out(run, second)
    assert [metric.step for metric in run.metrics()] == list(range(1, run.order.recipe.steps + 1))


def method(name: str, update: str) -> Recipe:
    rate = 3e-2 if name == "adafactor" else 3e-3
    return recipe(
        steps=9,
        optimizer=msgspec.structs.replace(recipe().optimizer, name=name, learning_rate=rate, weight_decay=0.1),
        update=update,
        lora=LoraSpec(rank=4, alpha=8.0),
    )


@pytest.mark.parametrize("twin", ["torch", "mlx"])
@pytest.mark.parametrize("update", ["full", "lora"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_method_resumes_bitwise(name: str, update: str, twin: Twin, tmp_path: Path) -> None:
    whole = make_run(tmp_path, method(name, update), one(twin), name="whole")
    carry_out(whole)
    run = make_run(tmp_path, method(name, update), one(twin), name="parts")
    interrupted(run, one(twin), one(twin))
    assert run.weights_sha256() == whole.weights_sha256()
    assert [m.loss for m in run.metrics()] == [m.loss for m in whole.metrics()]
    before = load_file(tmp_path / "models" / "start" / "model.safetensors")
    moved = {key: float(np.abs(value - before[key]).max()) for key, value in run.weights().items()}
    assert all(moved[key] > 1e-5 for key in moved if update == "full" or "_proj" in key), moved


def test_a_checkpoint_of_lora_holds_adapters_alone_and_the_published_model_has_them_merged(tmp_path: Path) -> None:
    run = make_run(tmp_path, method("adamw", "lora"), one("torch"))
    carry_out(run, halt_at=4)
    (folder,) = (run.folder / "checkpoints").glob("step-*")
    stored = load_file(folder / "weights.safetensors")
    assert {name.rpartition(".")[2] for name in stored} == {"lora_a", "lora_b"}
    carry_out(run)
    before = load_file(tmp_path / "models" / "start" / "model.safetensors")
    changed = {name for name, value in run.weights().items() if not np.array_equal(value, before[name])}
    assert changed == {name for name in before if ".self_attn." in name or ".mlp." in name}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_moves_from_one_twin_to_the_other(name: str, tmp_path: Path) -> None:
    whole = make_run(tmp_path, method(name, "full"), one("torch"), name="whole")
    carry_out(whole)
    for first, second in (("torch", "mlx"), ("mlx", "torch")):
        run = make_run(tmp_path, method(name, "full"), one(first), name=f"{first}-first")  # type: ignore[arg-type]
        interrupted(run, one(first), one(second))  # type: ignore[arg-type]
        for key, value in run.weights().items():
            apart = np.abs(value - whole.weights()[key])
            # One code of an 8-bit moment, or a sign near zero in Muon, is not rounding: few weights, not all.
            assert np.quantile(apart, 0.99) < BETWEEN_TWINS, key


@pytest.mark.slow
@pytest.mark.parametrize("twin", ["torch", "mlx"])
def test_the_number_of_ranks_and_the_sharding_may_change_in_between(twin: Twin, tmp_path: Path) -> None:
    wanted = recipe(steps=160, checkpoint_every_steps=30)
    whole = make_run(tmp_path, wanted, one(twin), name="whole")
    carry_out(whole)
    for name, first, second in (
        ("zero1-none", two(twin, sharding="zero1"), one(twin)),
        ("none-zero1", one(twin), two(twin, sharding="zero1")),
    ):
        run = make_run(tmp_path, wanted, first, name=name)
        carry_out(run, first, halt_at=6)
        assert 6 <= len(run.metrics()) < 160
        carry_out(run, second)
        assert [m.step for m in run.metrics()] == list(range(1, 161))
        assert {len(m.rank_rows) for m in run.metrics()} == {1, 2}
        for key, value in run.weights().items():
            apart = np.abs(value - whole.weights()[key])
            # AdamW divides a gradient that is nearly zero by its own size, rounding included.
            assert np.quantile(apart, 0.99) < 1e-4, key


# -- early stop and the spike guard through the whole stage -------------------------------------------


def with_held_out(root: Path, rows: TrainingData, held_out: TrainingData) -> None:
    write_model(root / "models" / "start")
    write_snapshot(root / "snapshot", root / "models" / "start", rows, held_out)


@pytest.mark.parametrize("twin", ["torch", "mlx"])
def test_the_stage_publishes_the_state_with_the_best_held_out_loss(twin: Twin, tmp_path: Path) -> None:
    rows = data(rows=4, seed=1)
    rows.loss_mask[:, 1:] = 1
    with_held_out(tmp_path, rows, data(rows=6, seed=9))
    wanted = recipe(
        steps=60,
        batch_sequences=4,
        micro_batch_sequences=4,
        optimizer=OptimizerSpec(learning_rate=2e-2),
        early_stop=EarlyStopSpec(every_steps=2, sequences=6, patience=2),
    )
    run = make_run(tmp_path, wanted, one(twin))
    carry_out(run)
    result = run.events("finished")[0]["result"]
    measured = {m.step: m.held_out_loss for m in run.metrics() if m.held_out_loss is not None}
    best = min(measured, key=lambda step: measured[step] or np.inf)
    assert (result["best_step"], result["stopped_early"], result["steps"]) == (best, True, best + 4)
    assert result["held_out_loss"] == measured[best]
    # A run that simply ends there publishes the same weights, if its schedule is the same up to there.
    flat = msgspec.structs.replace(wanted.schedule, kind="constant", warmup_share=0.0)
    long = make_run(tmp_path, msgspec.structs.replace(wanted, schedule=flat), one(twin), name="long")
    carry_out(long)
    until = long.events("finished")[0]["result"]["best_step"]
    short_recipe = recipe(
        steps=until,
        batch_sequences=4,
        micro_batch_sequences=4,
        optimizer=wanted.optimizer,
        schedule=flat,
    )
    short = make_run(tmp_path, short_recipe, one(twin), name="short")
    carry_out(short)
    assert short.weights_sha256() == long.weights_sha256()


BAD_BATCH = 25


def spiky(root: Path) -> Recipe:
    """40 batches of 8 rows; the targets of one are noise once the pattern is learnt."""
    rows = data(rows=336)
    bad = BatchOrder(336, 8, 0).batch(BAD_BATCH)
    rows.tokens[bad] = np.random.Generator(np.random.PCG64(5)).integers(45, 320, rows.tokens[bad].shape)
    write_model(root / "models" / "start")
    write_snapshot(root / "snapshot", root / "models" / "start", rows)
    return recipe(
        steps=40,
        checkpoint_every_steps=7,
        optimizer=OptimizerSpec(learning_rate=1e-2),
        spike_guard=SpikeGuardSpec(window=4, spike_factor=1.5, rollbacks=1),
    )


@pytest.mark.parametrize("twin", ["torch", "mlx"])
def test_a_spike_is_taken_back_and_each_step_stands_once_in_the_metrics(twin: Twin, tmp_path: Path) -> None:
    run = make_run(tmp_path, spiky(tmp_path), one(twin))
    carry_out(run)
    result = run.events("finished")[0]["result"]
    assert (result["skipped_batches"], result["rollbacks"], result["steps"]) == ([BAD_BATCH], 1, 40)
    assert [m.step for m in run.metrics()] == list(range(1, 41))
    assert run.metrics()[-1].tokens == result["tokens"]
    (note,) = [note["text"] for note in run.events("note") if "is left out" in note["text"]]
    assert note.startswith(f"Step {BAD_BATCH + 1}: the loss is ")
    assert f"Back to step 21; batch {BAD_BATCH + 1} is left out from now on (1 of 1 times)" in note


class Killed(BaseException):
    """Ends the stage where it is, as a kill would: nothing is tidied up by it."""


@pytest.mark.parametrize("where", ["newest", "import_state", "begun", "metric"])
def test_a_kill_while_the_run_goes_back_changes_nothing(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jupiter_engine.backends.torch.train import TorchTrainer
    from jupiter_engine.worker.train import ContextReporter

    wanted = spiky(tmp_path)
    whole = make_run(tmp_path, wanted, one("torch"), name="whole")
    carry_out(whole)
    run = make_run(tmp_path, wanted, one("torch"), name="killed")
    owner = {"newest": CheckpointStore, "import_state": TorchTrainer}.get(where, ContextReporter)
    known = getattr(owner, where)

    def dying(self: Any, *arguments: Any) -> Any:
        # The first calls belong to the start; `metric` dies in the first step that is done again.
        again = [note for note in run.events("note") if "is left out" in note["text"]]
        back = len(run.metrics()) == BAD_BATCH and where != "metric"
        if back or (again and where == "metric"):
            raise Killed
        return known(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(owner, where, dying)
        with pytest.raises(Killed):
            carry_out(run)
    carry_out(run)
    assert [m.step for m in run.metrics()] == list(range(1, 41))
    assert run.weights_sha256() == whole.weights_sha256()
    assert run.events("finished")[0]["result"]["skipped_batches"] == [BAD_BATCH]


@pytest.mark.slow
@pytest.mark.parametrize("twin", ["torch", "mlx"])
def test_two_ranks_take_a_spike_back_and_survive_a_kill_right_after(twin: Twin, tmp_path: Path) -> None:
    wanted = spiky(tmp_path)
    single = make_run(tmp_path, wanted, one(twin), name="single")
    carry_out(single)
    run = make_run(tmp_path, wanted, two(twin), name="two")
    argv = [sys.executable, "-m", "jupiter_engine.worker", str(run.folder)]
    with (run.folder / "worker.log").open("ab") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while not any("is left out" in note["text"] for note in run.events("note")):
            assert time.monotonic() < deadline, run.log()
            if process.poll() is not None:
                break
            time.sleep(0.005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert subprocess.run(argv, stdout=log, stderr=log, timeout=200, check=False).returncode == 0, run.log()
    result = run.events("finished")[-1]["result"]
    assert (result["skipped_batches"], result["steps"]) == ([BAD_BATCH], 40)
    assert [m.step for m in run.metrics()] == list(range(1, 41))
    assert len(list((run.folder / "ranks").glob("[0-9]*"))) <= 2
    for key, value in run.weights().items():
        np.testing.assert_allclose(value, single.weights()[key], rtol=0, atol=2e-4, err_msg=key)
    assert json.loads((run.folder / "trained.json").read_text())["result"]["rollbacks"] >= 1
