"""A nano model folder, a snapshot and an order: everything a training test needs, made in milliseconds."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from jupiter_engine.checkpoints.model_folder import ModelInfo, folder_sha256, publish, write_config
from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.checkpoints.store import CheckpointStore, Identity, World
from jupiter_engine.files import sha256_file, write_json
from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.orders import ModelRef, TrainOrder
from jupiter_engine.protocol.shapes import tensor_shapes
from jupiter_engine.protocol.specs import LaunchSpec, OptimizerSpec, Recipe, Twin
from jupiter_engine.training.loop import Outcome, Trainer, Training, TrainingData
from jupiter_engine.training.model.presets import write_tensors
from jupiter_engine.training.model.tokenizer import train_tokenizer, write_tokenizer

SEQUENCE = 16
INFO = ModelInfo(
    vocab_size=320,
    hidden_size=64,
    layers=2,
    heads=4,
    kv_heads=2,
    intermediate_size=128,
    context=64,
    head_dim=16,
    dtype="float32",
    eos_ids=(2,),
    pad_id=0,
)
IDENTITY = Identity(recipe_sha256="r" * 64, snapshot_sha256="s" * 64, start_sha256="m" * 64)
WORLD = World(twin="torch", ranks=1, versions={})

Weights = dict[str, npt.NDArray[np.float32]]


def recipe(**changes: Any) -> Recipe:
    base = Recipe(
        sequence_tokens=SEQUENCE,
        batch_sequences=8,
        micro_batch_sequences=8,
        steps=12,
        optimizer=OptimizerSpec(learning_rate=3e-3, weight_decay=0.1),
        compute_dtype="float32",
        checkpoint_every_steps=5,
    )
    return msgspec.structs.replace(base, **changes)


def weights(seed: int = 1) -> Weights:
    """Random weights away from symmetry: norm gains differ from one."""
    random = np.random.Generator(np.random.PCG64(seed))
    return {
        name: random.normal(1.0 if len(size) == 1 else 0.0, 0.05, size).astype(np.float32)
        for name, size in tensor_shapes(INFO).items()
    }


def start_state(initial: Weights) -> TrainerState:
    """A run's state before its first step."""
    return TrainerState(weights=dict(initial), moments={}, updates=0)


def data(rows: int = 24, seed: int = 0) -> TrainingData:
    """Learnable rows (a noisy counting pattern), two documents a row, uneven masks."""
    random = np.random.Generator(np.random.PCG64(seed))
    start = random.integers(0, 40, (rows, 1))
    tokens = ((start + np.arange(SEQUENCE + 1)) % 40 + 3).astype(np.uint32)
    segments = np.zeros_like(tokens, dtype=np.uint16)
    segments[:, 9:] = 1
    loss_mask = (random.random(tokens.shape) < random.uniform(0.2, 1.0, (rows, 1))).astype(np.uint8)
    loss_mask[:, 0] = 0
    loss_mask[:, 9] = 0
    loss_mask[:, 1] = 1
    return TrainingData(tokens=tokens, loss_mask=loss_mask, segments=segments, sha256="s" * 64)


@dataclass
class Listener:
    """A reporter that remembers."""

    metrics: list[Metric] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    halt_at: int = -1
    """Ask for a halt once this many steps are done."""

    def begun(self, step: int) -> None:
        self.notes.append(f"begun {step}")

    def metric(self, metric: Metric) -> None:
        self.metrics.append(metric)

    def progress(self, done: int, total: int, note: str) -> None:
        pass

    def at(self, step: int, *, waiting: bool) -> None:
        pass

    def note(self, text: str, level: str = "info") -> None:
        self.notes.append(f"{level}: {text}")

    def halt_asked(self) -> bool:
        return len(self.metrics) + 1 == self.halt_at


def open_trainer(twin: Twin, wanted: Recipe, initial: Weights | None = None) -> Trainer:
    if twin == "torch":
        from jupiter_engine.backends.torch.train import open_trainer as torch_trainer

        return torch_trainer(INFO, wanted, initial or weights(), threads=1)
    from jupiter_engine.backends.mlx.train import open_trainer as mlx_trainer

    return mlx_trainer(INFO, wanted, initial or weights())


def train(
    twin: Twin, wanted: Recipe, folder: Path, listener: Listener | None = None, *, rows: TrainingData | None = None
) -> tuple[Outcome, Trainer]:
    """Run the loop in this process, from a checkpoint in `folder` if there is one."""
    listener = listener or Listener()
    trainer = open_trainer(twin, wanted)
    store = CheckpointStore(folder / "checkpoints", keep=wanted.keep_checkpoints)
    training = Training(wanted, rows or data(), trainer, listener, store, identity=IDENTITY, world=WORLD)
    training.take_up(store.newest(IDENTITY, listener.note))
    return training.run(), trainer


# -- whole orders, for the worker program ----------------------------------------------------------


def write_model(folder: Path) -> ModelRef:
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n"] * 3, vocab_size=INFO.vocab_size)
    with publish(folder) as temp:
        write_config(temp, INFO)
        write_tokenizer(temp, tokenizer, context=INFO.context)
        write_tensors(temp / "model.safetensors", dict(weights()), "float32")
    return ModelRef(name=folder.name, folder=str(folder), sha256=folder_sha256(folder))


def write_snapshot(
    folder: Path, model: Path, rows: TrainingData | None = None, held_out: TrainingData | None = None, **changes: Any
) -> None:
    rows = rows or data()
    folder.mkdir(parents=True)
    files: dict[str, str] = {}
    for prefix, part in (("", rows), ("held_out_", held_out)):
        for name in ("tokens", "loss_mask", "segments") if part is not None else ():
            np.save(folder / f"{prefix}{name}.npy", getattr(part, name))
            files[f"{prefix}{name}.npy"] = sha256_file(folder / f"{prefix}{name}.npy")
    if held_out is not None:
        tokens = int(held_out.loss_mask[:, 1:].sum())
        changes = {"held_out": {"slice": 1, "sequences": len(held_out.tokens), "tokens": tokens}, **changes}
    manifest: dict[str, Any] = {
        "version": 1,
        "tokenizer_sha256": sha256_file(model / "tokenizer.json"),
        "vocab_size": INFO.vocab_size,
        "sequence_tokens": SEQUENCE,
        "sequences": len(rows.tokens),
        "tokens": int(rows.loss_mask.sum()),
        "distinct_tokens": int(rows.loss_mask.sum()),
        "mix": {"real_docs": 1.0},
        "epochs": {"real_docs": 1.0},
        "files": files,
        "sample_ids": 0,
        "seed": 0,
        **changes,
    }
    write_json(folder / "manifest.json", manifest)


@dataclass(frozen=True)
class Run:
    """A run folder with an order, carried out by the real worker program."""

    folder: Path
    order: TrainOrder

    def start(self, *, log: str = "worker.log") -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as output:
            argv = [sys.executable, "-m", "jupiter_engine.worker", str(self.folder)]
            return subprocess.Popen(argv, stdout=output, stderr=output, start_new_session=True)

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        if not path.exists():
            return []
        found = [json.loads(line) for line in path.read_bytes().splitlines() if line.endswith(b"}")]
        return [event for event in found if event["fact"] == kind]

    def metrics(self) -> list[Metric]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [msgspec.json.decode(line, type=Metric) for line in lines if line.endswith(b"\n")]

    def weights(self) -> Weights:
        from safetensors.numpy import load_file

        return dict(load_file(Path(self.order.target) / "model.safetensors"))

    def weights_sha256(self) -> str:
        return hashlib.sha256((Path(self.order.target) / "model.safetensors").read_bytes()).hexdigest()

    def log(self) -> str:
        parts = [self.folder / "worker.log", *sorted(self.folder.glob("ranks/*/output.log"))]
        return "\n".join(path.read_text(errors="replace") for path in parts if path.exists())


def make_run(root: Path, wanted: Recipe, launch: LaunchSpec, *, name: str = "nano-0001-train") -> Run:
    """A run folder under `root`; model and snapshot are shared by the runs of one root."""
    model = root / "models" / "start"
    ref = write_model(model) if not model.exists() else None
    if ref is None:
        ref = ModelRef(name="start", folder=str(model), sha256=folder_sha256(model))
    if not (root / "snapshot").exists():
        write_snapshot(root / "snapshot", model)
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    order = TrainOrder(
        run=name,
        domain="nano",
        cycle=1,
        recipe=wanted,
        launch=launch,
        snapshot=str(root / "snapshot"),
        start=ref,
        target=str(root / "models" / name),
    )
    (folder / "spec.json").write_bytes(msgspec.json.encode(order))
    return Run(folder, order)
