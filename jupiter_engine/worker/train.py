"""Stage `train`: carry out a recipe on a snapshot and publish the trained model.

One rank trains inside this process; several are started by torchrun or
mlx.launch (jupiter_engine.worker.rank) while this process only supervises.
Either way every step, checkpoint and the published model come from `train_here`.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import psutil

from jupiter_engine import __version__
from jupiter_engine.backends.lora import initial_adapters
from jupiter_engine.checkpoints.model_folder import (
    ModelInfo,
    copy_text_files,
    folder_sha256,
    publish,
    verify,
    write_config,
)
from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.checkpoints.store import Checkpoint, CheckpointStore, Identity, World
from jupiter_engine.data.queue.snapshot import Snapshot, read_snapshot
from jupiter_engine.errors import ConfigError, ModelInvalid, NoUsableNode, StateError
from jupiter_engine.files import read_json, require_free, sha256_file, write_atomic, write_json
from jupiter_engine.planning.memory import DeviceKind
from jupiter_engine.planning.plan import TrainingPlan, plan_training
from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.orders import TrainOrder
from jupiter_engine.protocol.shapes import Shape, weight_bytes
from jupiter_engine.training.distributed.hosts import (
    host_here,
    hosts_taking_part,
    micro_batch_sizes,
    ranks_asked_for,
)
from jupiter_engine.training.distributed.supervise import Supervisor
from jupiter_engine.training.loop import Outcome, Reporter, Training, TrainingData, recipe_sha256
from jupiter_engine.training.model.presets import preset_shape, write_scratch
from jupiter_engine.training.model.text import TextCodec
from jupiter_engine.units import bytes_text
from jupiter_engine.worker.context import Halt, RunContext

_SPARE_BYTES = 256 << 20
_ALL_STEPS = "trained-metrics.jsonl"
"""Every step of a finished training, as in metrics.jsonl; written before trained.json."""


class RunReporter(Reporter, Protocol):
    """What a stage's training reports to."""


class Trained(msgspec.Struct, frozen=True, kw_only=True):
    """trained.json: written after the model is published, so a kill before `finish` repeats nothing."""

    result: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An order whose inputs were found sound and to fit together."""

    order: TrainOrder
    folder: Path
    info: ModelInfo
    data: TrainingData
    held_out: TrainingData | None
    """Rows of held-out text, where the snapshot has some."""
    identity: Identity
    start_folder: Path
    """The start model; the published model's tokenizer files come from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    result: dict[str, Any] | None
    """The stage's result once the model is published."""
    leave: Callable[[], None]
    """Leave the group; waits for the other ranks."""


def run(context: RunContext, order: TrainOrder) -> None:
    done = finished_before(context.folder, order)
    if done is not None:
        # An attempt killed while it tidied up, or a group that finished after its supervisor was killed: nobody has
        # carried over the steps that its ranks did alone.
        kept = context.folder / _ALL_STEPS
        if kept.exists():
            rewind_metrics(context.folder / "metrics.jsonl", kept.read_bytes())
        shutil.rmtree(checkpoint_folder(context.folder), ignore_errors=True)
        context.finish(done)
        return
    if order.launch.islands:
        importlib.import_module("jupiter_engine.worker.hub").run(context, order)
        return
    context.check_halt()
    job = check(order, context.folder)
    _announce(context, job)
    reporter = ContextReporter(context, order)
    result = train_here(job, reporter).result if order.launch.ranks == 1 else _supervise(context, order, reporter)
    if result is None:
        raise Halt
    context.finish(result)


def _supervise(context: RunContext, order: TrainOrder, reporter: ContextReporter) -> dict[str, Any] | None:
    return Supervisor(context.folder, order.launch, reporter).run()


class ContextReporter:
    """Speaks through the run context; also the supervisor's listener."""

    def __init__(self, context: RunContext, order: TrainOrder) -> None:
        self._context, self._steps = context, order.recipe.steps

    def begun(self, step: int) -> None:
        """metrics.jsonl then holds each step up to `step` exactly once."""
        path, stored = self._context.folder / "metrics.jsonl", checkpoint_folder(self._context.folder)
        try:
            kept = (stored / f"step-{step:08d}" / "metrics.jsonl").read_bytes() if step else b""
        except FileNotFoundError:
            # The ranks have gone on and removed it, so they wrote these lines here before.
            kept = b"".join(path.read_bytes().splitlines(keepends=True)[:step])
        rewind_metrics(path, kept)
        self._context.progress(step, self._steps, "steps")

    def metric(self, metric: Metric) -> None:
        self._context.metric(metric)
        self.progress(metric.step, self._steps, f"loss {metric.loss:.3f}")

    def progress(self, done: int, total: int, note: str) -> None:
        self._context.progress(done, total, "steps", note)

    def alive(self) -> None:
        """An island of one rank that waits for its hub is this process: seen to be alive."""

    def at(self, step: int, *, waiting: bool) -> None:
        """One rank waits for nobody."""

    def note(self, text: str, level: str = "info") -> None:
        self._context.note(text, level)

    def halt_asked(self) -> bool:
        return self._context.halt_asked()


def rewind_metrics(path: Path, kept: bytes) -> None:
    """Make `path` hold exactly `kept`: steps after a checkpoint are done again, those before are kept byte by byte.

    The file is changed in place: whoever follows it keeps its place in what stays.
    """
    path.touch()
    with path.open("r+b") as file:
        found = file.read(len(kept))
        if found != kept:
            file.seek(0)
            file.write(kept)
        file.truncate(len(kept))
        file.flush()
        os.fsync(file.fileno())


# -- before anything is computed -----------------------------------------------------------------


def check(order: TrainOrder, folder: Path) -> Job:
    """Refuse what cannot work before a tensor library is loaded.

    Raises ModelInvalid (start model damaged, changed or with another
    vocabulary than the snapshot), StateError (snapshot damaged or made for
    another sequence length), ConfigError (a recipe that contradicts itself).
    """
    recipe = order.recipe
    info, start_sha256, start_folder = _start(order, folder)
    snapshot = read_snapshot(Path(order.snapshot))
    manifest = snapshot.manifest
    if manifest.sequence_tokens != recipe.sequence_tokens:
        raise StateError(
            f"{order.snapshot} holds sequences of {manifest.sequence_tokens} tokens, the recipe asks for "
            f"{recipe.sequence_tokens}",
            fix="build the snapshot again with the recipe's sequence_tokens",
        )
    # read_snapshot made sure that no id lies outside the snapshot's own vocabulary.
    if manifest.vocab_size > info.vocab_size:
        raise ModelInvalid(
            f"the snapshot's tokenizer knows {manifest.vocab_size} tokens, "
            f"the model's embedding has only {info.vocab_size} rows",
            fix="build the snapshot with the start model's own tokenizer",
        )
    if manifest.tokenizer_sha256 != sha256_file(start_folder / "tokenizer.json"):
        raise ModelInvalid(
            f"{order.snapshot} was encoded with another tokenizer than {start_folder}/tokenizer.json",
            fix="build the snapshot again with the start model's own tokenizer",
        )
    if recipe.sequence_tokens > info.context:
        raise ConfigError(
            f"sequence_tokens is {recipe.sequence_tokens}, the model's context only {info.context}",
            fix="lower recipe.sequence_tokens",
        )
    data = TrainingData(
        tokens=snapshot.tokens,
        loss_mask=snapshot.loss_mask,
        segments=snapshot.segments,
        sha256=snapshot.sha256,
    )
    identity = Identity(recipe_sha256=recipe_sha256(recipe), snapshot_sha256=data.sha256, start_sha256=start_sha256)
    return Job(
        order=order,
        folder=folder,
        info=info,
        data=data,
        held_out=_held_out(snapshot),
        identity=identity,
        start_folder=start_folder,
    )


def _held_out(snapshot: Snapshot) -> TrainingData | None:
    """The snapshot's held-out rows, where it has some."""
    rows = snapshot.held_out
    if rows is None:
        return None
    return TrainingData(tokens=rows.tokens, loss_mask=rows.loss_mask, segments=rows.segments, sha256=snapshot.sha256)


def _start(order: TrainOrder, run_folder: Path) -> tuple[ModelInfo, str, Path]:
    """(what is trained, hash of its folder, the folder); a from-scratch model is made here, once."""
    if order.start is not None:
        folder = Path(order.start.folder)
        info = verify(folder)
        found = folder_sha256(folder)
        # A folder that the recipe names by path has no registered hash.
        if order.start.sha256 and found != order.start.sha256:
            raise ModelInvalid(
                f"{folder} has changed: its hash is {found[:12]}, {order.start.name} was registered as "
                f"{order.start.sha256[:12]}",
                fix="restore the folder, or register the changed model under a new name",
            )
        return info, found, folder
    if order.recipe.preset is None or order.tokenizer is None:
        raise ConfigError(
            "training from scratch needs a preset and a tokenizer folder; "
            f"got preset {order.recipe.preset!r} and tokenizer {order.tokenizer!r}",
            fix="set recipe.preset, or train from an existing model",
        )
    folder = run_folder / "start"
    with (run_folder / "start.lock").open("w") as lock:
        # Several ranks of one machine come here at the same time where no worker was before them.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            # Asked before gigabytes of random weights are made: can this machine hold the run at all?
            shape = preset_shape(order.recipe.preset, vocab_size=TextCodec(Path(order.tokenizer)).vocab_size)
            _require_room(run_folder, _plan(shape, order), order, start=shape)
            write_scratch(folder, preset=order.recipe.preset, tokenizer=Path(order.tokenizer), seed=order.recipe.seed)
    return verify(folder), folder_sha256(folder), folder


def _plan(shape: Shape, order: TrainOrder) -> TrainingPlan:
    """What a rank of the run takes here."""
    launch, host = order.launch, host_here(order.launch)
    kind: DeviceKind = "cpu"
    if launch.twin == "mlx" and sys.platform == "darwin":
        kind = "metal"
    elif launch.twin == "torch" and shutil.which("nvidia-smi"):
        kind = "cuda"
    return plan_training(
        shape,
        order.recipe,
        launch.ranks,
        twin=launch.twin,
        kind=kind,
        sharding=launch.sharding,
        micro_batch=host.micro_batch_sequences if host is not None else launch.micro_batch_sequences,
    )


def _ranks_here(order: TrainOrder) -> int:
    """Ranks on this machine."""
    host = host_here(order.launch)
    return host.ranks if host is not None else order.launch.ranks


def _require_room(
    folder: Path, plan: TrainingPlan, order: TrainOrder, *, stored: int = 0, start: Shape | None = None
) -> None:
    """Raise DiskFull or NoUsableNode if the machine cannot hold the run, whatever else it does.

    `stored`: bytes of checkpoints that lie there already; `start`: a model that has to be made first.
    """
    needed = max(plan.disk - stored, plan.target) + _SPARE_BYTES
    needed += weight_bytes(start, "float32") if start is not None else 0
    require_free(folder, needed, "training (checkpoints and the trained model)")
    memory, total = plan.host_memory(_ranks_here(order)), psutil.virtual_memory().total
    if memory > total:
        raise NoUsableNode(
            f"training {plan.parameters / 1e6:.0f}M parameters needs about {bytes_text(memory)} of memory, "
            f"this machine has {bytes_text(total)}",
            fix="lower training.micro_batch_sequences or choose a smaller model",
        )


def _announce(context: RunContext, job: Job) -> None:
    """Say what the run takes; refuse a disk that cannot hold it."""
    recipe, ranks = job.order.recipe, job.order.launch.ranks
    plan = _plan(job.info, job.order)
    stored = sum(path.stat().st_size for path in checkpoint_folder(job.folder).rglob("*.safetensors"))
    _require_room(job.folder, plan, job.order, stored=stored)
    context.note(
        f"Training {plan.parameters / 1e6:.1f}M parameters on {plan.input_tokens} tokens in {recipe.steps} steps with "
        f"{ranks} rank(s) of the {job.order.launch.twin} twin; about {bytes_text(plan.memory)} of memory a rank "
        f"({bytes_text(plan.writing)} more while a checkpoint is written), "
        f"{bytes_text(plan.disk)} of disk"
    )
    available = psutil.virtual_memory().available
    memory = plan.host_memory(_ranks_here(job.order))
    if memory > available:
        context.note(
            f"The plan needs {bytes_text(memory)} of memory, {bytes_text(available)} are available: "
            "training may be slow or be ended by the system. Lower micro_batch_sequences or choose a smaller model",
            "warning",
        )


# -- training ------------------------------------------------------------------------------------


def checkpoint_folder(run_folder: Path) -> Path:
    return run_folder / "checkpoints"


def train_here(job: Job, reporter: RunReporter, *, joined: bool = False) -> Ending:
    """Train in this process, as the only rank or (`joined`) as one of the group the launcher made.

    The result is None after a halt, and on ranks other than 0.
    """
    order, recipe = job.order, job.order.recipe
    if order.island is not None:
        ending: Ending = importlib.import_module("jupiter_engine.worker.island").train_island(
            job, reporter, joined=joined
        )
        return ending
    threads = order.launch.threads_per_rank
    if threads:
        # Read by BLAS libraries when they are loaded; the twins' own setters come too late for MLX.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", str(threads))
    twin = importlib.import_module(f"jupiter_engine.backends.{order.launch.twin}.train")
    group = twin.join_group() if joined else None
    wanted = ranks_asked_for(order.launch)
    if group is not None and group.ranks != wanted:
        raise StateError(f"{group.ranks} ranks were started, {wanted} were asked for")
    if group is not None and group.rank > 0:
        training = _training(job, reporter, twin, group, None, None)
        if not training.run().halted:
            training.save(None)
        return Ending(result=None, leave=training.close)
    store = CheckpointStore(
        checkpoint_folder(job.folder), keep=recipe.keep_checkpoints, keep_every=recipe.keep_every_steps
    )
    checkpoint = store.newest(job.identity, lambda text: reporter.note(text, "warning"))
    training = _training(job, reporter, twin, group, store, checkpoint)
    del checkpoint  # gigabytes that the trainer has taken over
    reporter.begun(training.step)
    outcome = training.run()
    if outcome.halted:
        return Ending(result=None, leave=training.close)
    with publish(Path(order.target)) as folder:
        training.save(folder)
        write_config(folder, msgspec.structs.replace(job.info, dtype=recipe.compute_dtype))
        copy_text_files(job.start_folder, folder)
        verify(folder)
    result = _result(order, outcome)
    write_atomic(job.folder / _ALL_STEPS, training.metrics)
    write_json(job.folder / "trained.json", Trained(result=result))
    store.clear()
    return Ending(result=result, leave=training.close)


def _result(order: TrainOrder, outcome: Outcome) -> dict[str, Any]:
    """What the stage reports of a run whose model is published."""
    return {
        "model": {
            "name": Path(order.target).name,
            "folder": order.target,
            "sha256": folder_sha256(Path(order.target)),
        },
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "first_loss": outcome.first_loss,
        "last_loss": outcome.last_loss,
        "tokens_per_s": outcome.tokens_per_s,
        "best_step": outcome.best_step,
        "held_out_loss": outcome.held_out_loss,
        "stopped_early": outcome.stopped_early,
        "skipped_batches": list(outcome.skipped_batches),
        "rollbacks": outcome.rollbacks,
    }


def _training(
    job: Job,
    reporter: RunReporter,
    twin: Any,
    group: Any,
    store: CheckpointStore | None,
    checkpoint: Checkpoint | None,
) -> Training:
    """Build this rank's part; on ranks other than 0 (`store` None) weights and state come from rank 0."""
    recipe, launch = job.order.recipe, job.order.launch
    weights = None
    if store is not None and (checkpoint is None or recipe.update == "lora"):
        # A checkpoint of LoRA holds adapters alone: the frozen rest is the start model, each time.
        weights = twin.load_weights(job.start_folder)
    elif checkpoint is not None:
        weights = checkpoint.trainer.weights
    trainer = twin.open_trainer(
        job.info,
        recipe,
        weights,
        group=group,
        threads=launch.threads_per_rank,
        sharding=launch.sharding,
        compile=launch.compile,
    )
    training = Training(
        recipe,
        job.data,
        trainer,
        reporter,
        store,
        identity=job.identity,
        world=World(twin=launch.twin, ranks=trainer.ranks, versions={"jupiter": __version__, **twin.versions()}),
        shape=job.info,
        held_out=job.held_out,
        start=lambda: _start_state(job, twin),
        sizes=micro_batch_sizes(launch, recipe, trainer.ranks, hosts_taking_part()),
    )
    training.take_up(checkpoint)
    return training


def _start_state(job: Job, twin: Any) -> TrainerState:
    """What is trained, as it was before the first step."""
    recipe = job.order.recipe
    if recipe.update == "lora":
        return TrainerState(weights=initial_adapters(job.info, recipe.lora, recipe.seed), moments={}, updates=0)
    return TrainerState(weights=twin.load_weights(job.start_folder), moments={}, updates=0)


def finished_before(folder: Path, order: TrainOrder) -> dict[str, Any] | None:
    """The result of an attempt that was killed after publishing, if its model is still what it wrote."""
    path = folder / "trained.json"
    if not path.exists() or not Path(order.target).exists():
        return None
    trained = read_json(path, Trained)
    assert isinstance(trained, Trained)
    if folder_sha256(Path(order.target)) != trained.result["model"]["sha256"]:
        return None
    return trained.result
