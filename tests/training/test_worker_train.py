"""The train stage through the real worker program: launchers, kills at any instant, refusals."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

from jupiter_engine.checkpoints.model_folder import folder_sha256, verify
from jupiter_engine.checkpoints.store import CheckpointStore
from jupiter_engine.errors import ConfigError, JupiterError, ModelInvalid, NoUsableNode, StateError
from jupiter_engine.planning.plan import plan_training
from jupiter_engine.protocol.orders import TrainOrder
from jupiter_engine.protocol.shapes import PRESETS, parameter_count
from jupiter_engine.protocol.specs import HostSpec, LaunchSpec, Recipe, Twin
from jupiter_engine.training.distributed import reports
from jupiter_engine.training.distributed.hosts import HOSTS_VARIABLE
from jupiter_engine.training.model.text import TextCodec
from jupiter_engine.worker.context import Halt, RunContext
from jupiter_engine.worker.train import _plan, _require_room, check, rewind_metrics
from jupiter_engine.worker.train import run as run_stage
from tests.training.nano import INFO, Run, data, make_run, recipe, write_snapshot

ONE = {"torch": LaunchSpec(twin="torch", threads_per_rank=1), "mlx": LaunchSpec(twin="mlx", threads_per_rank=1)}
TWO = {
    "torch": LaunchSpec(twin="torch", ranks=2, launcher="torchrun", threads_per_rank=1),
    "mlx": LaunchSpec(twin="mlx", ranks=2, launcher="mlx.launch", threads_per_rank=1),
}
TWO_RANKS_TOLERANCE = 2e-5
"""Largest difference of a final weight between one rank and two: the order of float32 sums differs."""


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes] | None = None, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        assert process is None or process.poll() is None, f"the worker ended with {process.returncode}"
        time.sleep(0.02)


def in_this_process(run: Run) -> None:
    """The stage without the worker's own process: for everything that needs no kill."""
    context = RunContext(run.folder)
    assert isinstance(context.order, TrainOrder)
    try:
        run_stage(context, context.order)
    finally:
        context.close()


def ranks_of(run: Run) -> list[psutil.Process]:
    """Live rank processes of the newest launch."""
    group = msgspec.json.decode((run.folder / "ranks" / "group.json").read_bytes(), type=reports.Group)
    reader = reports.ReportReader(run.folder / "ranks" / str(group.generation), run.order.launch.ranks)
    ready = [report.process for _, report in reader.read() if isinstance(report, reports.Ready)]
    return [process for identity in ready if (process := identity.process()) is not None]


def launcher_of(run: Run) -> psutil.Process:
    group = msgspec.json.decode((run.folder / "ranks" / "group.json").read_bytes(), type=reports.Group)
    assert group.launcher is not None
    process = group.launcher.process()
    assert process is not None
    return process


def each_step_once(run: Run) -> None:
    assert [metric.step for metric in run.metrics()] == list(range(1, run.order.recipe.steps + 1))


# -- one rank --------------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", ["torch", "mlx"])
def test_a_run_publishes_a_sound_model_and_says_what_it_did(twin: Twin, tmp_path: Path) -> None:
    run = make_run(tmp_path, recipe(), ONE[twin])
    in_this_process(run)
    each_step_once(run)
    result = run.events("finished")[0]["result"]
    target = Path(run.order.target)
    metrics = run.metrics()
    assert verify(target) == INFO
    assert result["model"] == {"name": target.name, "folder": str(target), "sha256": folder_sha256(target)}
    assert (result["steps"], result["tokens"]) == (12, metrics[-1].tokens)
    assert (result["first_loss"], result["last_loss"]) == (metrics[0].loss, metrics[-1].loss)
    assert result["last_loss"] < result["first_loss"] - 1.0
    assert result["tokens_per_s"] == pytest.approx(12 * 8 * 16 / sum(metric.seconds for metric in metrics))
    assert (target / "tokenizer.json").read_bytes() == (tmp_path / "models/start/tokenizer.json").read_bytes()
    assert not (run.folder / "checkpoints").exists()
    assert run.events("progress")[-1]["done"] == 12


def test_a_kill_after_publishing_repeats_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, recipe(), ONE["torch"])
    in_this_process(run)
    before, stamp = run.metrics(), (Path(run.order.target) / "model.safetensors").stat().st_mtime_ns
    in_this_process(run)
    first, second = run.events("finished")
    assert first["result"] == second["result"]
    assert run.metrics() == before
    assert (Path(run.order.target) / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_published_model_that_was_changed_is_trained_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path, recipe(steps=3), ONE["torch"])
    in_this_process(run)
    good = run.weights_sha256()
    (Path(run.order.target) / "model.safetensors").write_bytes(b"broken")
    in_this_process(run)
    assert run.weights_sha256() == good


def test_from_scratch_makes_the_presets_shape_with_the_tokenizers_vocabulary(tmp_path: Path) -> None:
    model = make_run(tmp_path, recipe(), ONE["torch"], name="other").order.start
    assert model is not None
    base = make_run(tmp_path, recipe(steps=2, preset="nano", start="scratch"), ONE["torch"])
    order = msgspec.structs.replace(base.order, start=None, tokenizer=model.folder)
    (base.folder / "spec.json").write_bytes(msgspec.json.encode(order))
    in_this_process(base)
    made = verify(Path(order.target))
    assert (made.layers, made.hidden_size, made.vocab_size % 64) == (4, 128, 0)
    assert base.metrics()[0].loss == pytest.approx(np.log(made.vocab_size), abs=0.3)


def test_room_is_asked_for_by_the_tokenizers_own_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_run(tmp_path, recipe(), ONE["torch"], name="other").order.start
    assert model is not None
    base = make_run(tmp_path, recipe(steps=2, preset="1b", start="scratch"), ONE["torch"])
    order = msgspec.structs.replace(base.order, start=None, tokenizer=model.folder)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1 << 30, available=1 << 30))
    own = -(-TextCodec(Path(model.folder)).vocab_size // 64) * 64
    shape = msgspec.structs.replace(PRESETS["1b"].shape, vocab_size=own)
    assert own < PRESETS["1b"].shape.vocab_size
    with pytest.raises(NoUsableNode, match=f"training {parameter_count(shape) / 1e6:.0f}M parameters"):
        check(order, base.folder)
    assert not (base.folder / "start").exists()


def test_a_machine_with_cards_needs_memory_for_the_first_ranks_weights_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A billion weights and their moments are 16 GB; each further rank brings its runtime alone."""
    launch = LaunchSpec(twin="torch", ranks=8, launcher="torchrun")
    order = msgspec.structs.replace(make_run(tmp_path, recipe(), launch).order, launch=launch)
    shape = PRESETS["1b"].shape
    plan = plan_training(shape, order.recipe, 8, kind="cuda")
    monkeypatch.setattr("jupiter_engine.worker.train.require_free", lambda *_: None)
    for total, fits in ((24 << 30, True), (16 << 30, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda total=total: SimpleNamespace(total=total))
        with contextlib.nullcontext() if fits else pytest.raises(NoUsableNode):
            _require_room(tmp_path, plan, order)


def test_a_machine_in_a_group_is_judged_by_its_own_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def host(name: str, micro: int) -> HostSpec:
        return HostSpec(
            name=name,
            ssh=name,
            ranks=1,
            runner=("", ""),
            python="",
            run_folder="",
            addresses=(),
            micro_batch_sequences=micro,
        )

    launch = LaunchSpec(twin="torch", ranks=2, launcher="torchrun", hosts=(host("small", 1), host("big", 0)))
    order = msgspec.structs.replace(make_run(tmp_path, recipe(), launch).order, launch=launch)
    shape = PRESETS["125m"].shape
    assert _plan(shape, order).parts.activations * 4 == pytest.approx(
        plan_training(shape, order.recipe, 2).parts.activations, rel=0.01
    )
    monkeypatch.setenv(HOSTS_VARIABLE, "small,big")
    monkeypatch.setenv("RANK", "1")
    assert _plan(shape, order).memory == plan_training(shape, order.recipe, 2).memory


def test_metrics_are_rewound_in_place(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rewind_metrics(path, b"a\n")
    inode = path.stat().st_ino
    path.write_bytes(b"a\nb\nc\n")
    rewind_metrics(path, b"a\nb\n")
    assert path.read_bytes() == b"a\nb\n"
    rewind_metrics(path, b"a\nx\ny\nz\n")
    assert path.read_bytes() == b"a\nx\ny\nz\n"
    rewind_metrics(path, b"")
    assert path.read_bytes() == b""
    assert path.stat().st_ino == inode


# -- refusals --------------------------------------------------------------------------------------


def _other_model(run: Run, root: Path) -> TrainOrder:
    (root / "models/start/config.json").write_text("{}")
    return run.order


def _changed_model(run: Run, root: Path) -> TrainOrder:
    path = root / "models/start/model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    return run.order


def _replaced_snapshot(**changes: Any) -> Callable[[Run, Path], TrainOrder]:
    def damage(run: Run, root: Path) -> TrainOrder:
        shutil.rmtree(root / "snapshot")
        write_snapshot(root / "snapshot", root / "models/start", **changes)
        return run.order

    return damage


def _large_token(run: Run, root: Path) -> TrainOrder:
    rows = data()
    rows.tokens[3, 3] = INFO.vocab_size
    shutil.rmtree(root / "snapshot")
    write_snapshot(root / "snapshot", root / "models/start", rows)
    return run.order


def _no_preset(run: Run, root: Path) -> TrainOrder:
    return msgspec.structs.replace(run.order, start=None, tokenizer=str(root / "models/start"))


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (_other_model, ModelInvalid, "model_type"),
        (_changed_model, ModelInvalid, "has changed"),
        (_replaced_snapshot(sequence_tokens=32), StateError, "32"),
        (_replaced_snapshot(vocab_size=5000), ModelInvalid, "knows 5000 tokens"),
        (_replaced_snapshot(tokenizer_sha256="0" * 64), ModelInvalid, "another tokenizer"),
        (_large_token, StateError, "outside its vocabulary"),
        (_no_preset, ConfigError, "from scratch needs a preset"),
    ],
)
def test_what_cannot_work_is_refused_before_a_tensor_library_is_needed(
    damage: Callable[[Run, Path], TrainOrder], error: type[JupiterError], words: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path, recipe(), ONE["torch"])
    with pytest.raises(error, match=words) as caught:
        check(damage(run, tmp_path), run.folder)
    assert caught.value.fix


def test_ranks_need_the_launcher_of_their_twin(tmp_path: Path) -> None:
    run = make_run(tmp_path, recipe(), LaunchSpec(twin="mlx", ranks=2, launcher="torchrun"))
    with pytest.raises(ConfigError, match="mlx twin cannot be started with torchrun"):
        in_this_process(run)


def test_a_recipe_changed_under_a_checkpoint_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, recipe(), ONE["torch"])
    (run.folder / "inbox").mkdir()
    context = RunContext(run.folder)
    calls = iter([False, False, True])
    context.halt_asked = lambda: next(calls, True)  # type: ignore[method-assign]
    with pytest.raises(Halt):
        run_stage(context, run.order)
    assert CheckpointStore(run.folder / "checkpoints", keep=2).steps() == [2]
    changed = msgspec.structs.replace(run.order, recipe=recipe(seed=9))
    context.halt_asked = lambda: False  # type: ignore[method-assign]
    with pytest.raises(StateError, match="another recipe"):
        run_stage(context, changed)
    context.close()


# -- killed and started again ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "twin",
    [
        # Bit for bit alone; beside other tests the two runs have ended in two different models. Not understood.
        pytest.param("torch", marks=pytest.mark.xfail(reason="differs under load, cause not found", strict=False)),
        "mlx",
    ],
)
def test_kill_9_in_mid_run_and_start_again_gives_bitwise_the_same_model(twin: Twin, tmp_path: Path) -> None:
    wanted = recipe(steps=80, checkpoint_every_steps=10)
    whole = make_run(tmp_path, wanted, ONE[twin], name="whole")
    in_this_process(whole)
    killed = make_run(tmp_path, wanted, ONE[twin], name="killed")
    process = killed.start()
    wait_for(lambda: len(killed.metrics()) >= 37, process)
    process.kill()
    process.wait()
    assert 37 <= len(killed.metrics()) < 80
    assert killed.start().wait(120) == 0, killed.log()
    each_step_once(killed)
    assert killed.weights_sha256() == whole.weights_sha256()
    assert [m.loss for m in killed.metrics()] == [m.loss for m in whole.metrics()]


@pytest.mark.slow
def test_a_termination_signal_halts_with_a_checkpoint_and_the_next_start_finishes(tmp_path: Path) -> None:
    run = make_run(tmp_path, recipe(steps=150, checkpoint_every_steps=1000), ONE["torch"])
    process = run.start()
    wait_for(lambda: len(run.metrics()) >= 5, process)
    process.terminate()
    assert process.wait(60) == 75, run.log()
    done = len(run.metrics())
    assert CheckpointStore(run.folder / "checkpoints", keep=2).steps() == [done]
    (run.folder / "inbox" / "halt").unlink()
    assert run.start().wait(120) == 0, run.log()
    each_step_once(run)


# -- two real ranks ------------------------------------------------------------------------------------


def same_model(run: Run, other: Run) -> float:
    ours, theirs = run.weights(), other.weights()
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("twin", ["torch", "mlx"])
def test_two_ranks_survive_a_killed_rank_and_a_killed_supervisor_and_equal_one_rank(twin: Twin, tmp_path: Path) -> None:
    # Three rows a batch: the ranks' shares are uneven.
    wanted = recipe(steps=160, batch_sequences=3, checkpoint_every_steps=20)
    single = make_run(tmp_path, wanted, ONE[twin], name="single")
    in_this_process(single)
    run = make_run(tmp_path, wanted, TWO[twin], name="two")
    process = run.start()
    wait_for(lambda: len(run.metrics()) >= 30, process)
    ranks = ranks_of(run)
    assert len(ranks) == 2
    ranks[1].kill()
    wait_for(lambda: any("starting the ranks again" in note["text"] for note in run.events("note")), process)
    wait_for(lambda: len(run.metrics()) >= 60 and len(ranks_of(run)) == 2, process)
    left = ranks_of(run)
    process.kill()
    process.wait()
    wait_for(lambda: not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in left))
    assert run.start().wait(120) == 0, run.log()
    each_step_once(run)
    assert same_model(run, single) < TWO_RANKS_TOLERANCE
    assert all(len(metric.rank_seconds) == 2 for metric in run.metrics())
    assert ranks_of(run) == []


@pytest.mark.slow
@pytest.mark.parametrize("twin", ["torch", "mlx"])
def test_a_hung_rank_is_noticed_ended_and_the_run_goes_on(
    twin: Twin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jupiter_engine.training.distributed.supervise import Patience, Supervisor

    run = make_run(tmp_path, recipe(steps=60, checkpoint_every_steps=10), TWO[twin])
    context = RunContext(run.folder)
    frozen: list[int] = []

    class Freezing:
        """Stops one rank, as a lost network or a sleeping machine would, once."""

        def begun(self, step: int) -> None:
            context.note(f"begun at {step}")

        def metric(self, metric: Any) -> None:
            if metric.step == 25 and not frozen:
                frozen.append(ranks_of(run)[1].pid)
                os.kill(frozen[0], signal.SIGSTOP)

        def note(self, text: str, level: str = "info") -> None:
            context.note(text, level)

        def halt_asked(self) -> bool:
            return False

    result = Supervisor(run.folder, run.order.launch, Freezing(), patience=Patience(step=3.0)).run()
    context.close()
    assert result is not None
    assert result["steps"] == 60
    notes = [note["text"] for note in run.events("note")]
    assert any("no rank reported anything for" in note for note in notes), notes
    assert not psutil.pid_exists(frozen[0]) or psutil.Process(frozen[0]).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_a_failure_of_the_ranks_is_the_workers_failure(tmp_path: Path) -> None:
    rising: Recipe = recipe(steps=60, optimizer=msgspec.structs.replace(recipe().optimizer, learning_rate=1e30))
    run = make_run(tmp_path, rising, TWO["torch"])
    process = run.start()
    assert process.wait(120) == 1, run.log()
    failed = run.events("failed")[0]
    assert failed["kind"] == "Diverged"
    assert "step 2" in failed["detail"]
    assert len(list((run.folder / "ranks").glob("[0-9]*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("twin", ["torch", "mlx"])
def test_a_halt_reaches_all_ranks_and_the_launcher_does_not_spin(twin: Twin, tmp_path: Path) -> None:
    run = make_run(tmp_path, recipe(steps=100_000, checkpoint_every_steps=1000), TWO[twin])
    process = run.start()
    wait_for(lambda: len(run.metrics()) >= 5, process)
    launcher = launcher_of(run)
    before = sum(launcher.cpu_times()[:2])
    time.sleep(2.0)
    used = sum(launcher.cpu_times()[:2]) - before
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, run.log()
    assert used < 0.6, f"the launcher used {used:.2f} s of CPU in 2 s"
    steps = CheckpointStore(run.folder / "checkpoints", keep=2).steps()
    assert steps[-1] == len(run.metrics())
    assert ranks_of(run) == []
