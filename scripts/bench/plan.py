#!/usr/bin/env python3
"""How far the planner's time and memory are off: a calibration, then a real training of the same recipe.

    scripts/bench/plan.py [--twin torch] [--preset nano] [--seconds 20] [--steps 40] [--sequence 256] [--batch 16]
                          [--micro 4] [--dtype float32]

The calibration is the worker's own order (`calibrate`), in a process of its own; the training is the loop that every
run goes through, over random rows, in another. Printed: seconds predicted and measured for the training, and the
resident peak of the training's process against the plan. Other work on the machine between the two shows as error.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np

from jupiter_engine.checkpoints.model_folder import ModelInfo
from jupiter_engine.checkpoints.store import Identity, World
from jupiter_engine.planning.budget import Device
from jupiter_engine.planning.memory import rank_memory
from jupiter_engine.planning.time import Calibration, speed_of
from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.orders import CalibrateOrder
from jupiter_engine.protocol.shapes import PRESETS, Shape
from jupiter_engine.protocol.specs import LaunchSpec, Recipe
from jupiter_engine.training.loop import Training
from jupiter_engine.training.trainer import TrainingData
from jupiter_engine.units import bytes_text
from jupiter_engine.worker.calibrate import random_weights


class Silent:
    """A reporter that keeps the seconds of steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def begun(self, step: int) -> None: ...

    def metric(self, metric: Metric) -> None:
        self.seconds.append(metric.seconds)

    def progress(self, done: int, total: int, note: str) -> None: ...

    def at(self, step: int, *, waiting: bool) -> None: ...

    def note(self, text: str, level: str = "info") -> None: ...

    def halt_asked(self) -> bool:
        return False


def calibrated(options: argparse.Namespace, shape: Shape, recipe: Recipe) -> Calibration:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "calibrate"
        run.mkdir()
        launch = LaunchSpec(twin=options.twin, threads_per_rank=options.threads)
        order = CalibrateOrder(
            run="calibrate", domain="bench", cycle=0, shape=shape, recipe=recipe, launch=launch, seconds=options.seconds
        )
        (run / "spec.json").write_bytes(msgspec.json.encode(order))
        subprocess.run([sys.executable, "-m", "jupiter_engine.worker", str(run)], check=True)
        last = json.loads((run / "events.jsonl").read_bytes().splitlines()[-1])["result"]
    return Calibration(
        node="here", device="cpu", kind="cpu", twin=options.twin, shape=shape, sequence_tokens=recipe.sequence_tokens,
        micro_batch=recipe.micro_batch_sequences, compute_dtype=recipe.compute_dtype,
        recompute=recipe.recompute_activations, update=recipe.update, optimizer=recipe.optimizer.name,
        micro_batch_s=last["micro_batch_s"], update_s=last["update_s"], peak_bytes=last["peak_bytes"],
        steps=last["steps"], seconds=last["seconds"], at=time.time(),
    )  # fmt: skip


def trained(options: argparse.Namespace, shape: Shape, recipe: Recipe) -> dict[str, float]:
    """Seconds of all steps and the process's peak; this process trains."""
    rng = np.random.default_rng(0)
    rows = recipe.batch_sequences * min(recipe.steps, 8)
    size = (rows, recipe.sequence_tokens + 1)
    mask = np.ones(size, np.uint8)
    mask[:, 0] = 0
    segments = np.zeros(size, np.uint16)
    segments[:, recipe.sequence_tokens // 2 :] = 1
    tokens = rng.integers(0, shape.vocab_size, size, dtype=np.uint32)
    data = TrainingData(tokens=tokens, loss_mask=mask, segments=segments, sha256="0" * 64)
    twin = importlib.import_module(f"jupiter_engine.backends.{options.twin}.train")
    fields = {name: getattr(shape, name) for name in Shape.__struct_fields__}
    info = ModelInfo(**fields, dtype="float32", eos_ids=(0,), pad_id=0)
    trainer = twin.open_trainer(info, recipe, random_weights(shape), threads=options.threads)
    reporter = Silent()
    identity = Identity(recipe_sha256="r" * 64, snapshot_sha256="s" * 64, start_sha256="m" * 64)
    world = World(twin=options.twin, ranks=1, versions={})
    Training(recipe, data, trainer, reporter, None, identity=identity, world=world, shape=shape).run()
    return {"seconds": sum(reporter.seconds), "peak": float(trainer.peak_bytes())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--twin", choices=("torch", "mlx"), default="torch")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="nano")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--train-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = PRESETS[options.preset].shape
    recipe = Recipe(
        start="scratch", preset=options.preset, sequence_tokens=options.sequence, batch_sequences=options.batch,
        micro_batch_sequences=options.micro, steps=options.steps, compute_dtype=options.dtype,
    )  # fmt: skip
    if options.train_only:
        print(json.dumps(trained(options, shape, recipe)))
        return
    one = calibrated(options, shape, recipe)
    device = Device(node="here", kind="cpu", twin=options.twin, name="cpu")
    speed = speed_of(device, shape, recipe, calibrations=(one,))
    total = options.steps * options.batch * options.sequence
    predicted = total / speed.middle
    argv = [sys.executable, __file__, *sys.argv[1:], "--train-only"]
    found = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print(f"settings   {vars(options)}")
    print(f"calibrated {one.steps} steps in {one.seconds:.1f} s: {speed.middle:.0f} tokens/s")
    error = predicted / found["seconds"] - 1
    print(f"time       predicted {predicted:.1f} s, measured {found['seconds']:.1f} s: {error:+.1%}")
    plan = rank_memory(shape, recipe, twin=options.twin).total
    over = plan / found["peak"] - 1
    print(f"memory     predicted {bytes_text(plan)}, resident peak {bytes_text(found['peak'])}: {over:+.1%}")


if __name__ == "__main__":
    main()
