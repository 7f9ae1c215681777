"""Order `calibrate`: how fast this device trains a model of some shape, and what it takes, measured for a minute.

Weights and rows are random: speed and memory do not depend on what they say. The first step is left out, in which
libraries load their kernels and code is compiled.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from jupiter_engine.checkpoints.model_folder import ModelInfo
from jupiter_engine.errors import ConfigError
from jupiter_engine.protocol.orders import CalibrateOrder
from jupiter_engine.protocol.shapes import Shape, tensor_shapes
from jupiter_engine.protocol.specs import Recipe
from jupiter_engine.training.trainer import Batch
from jupiter_engine.worker.context import RunContext

_BLOCK = 1 << 20
"""Random numbers that are drawn; larger tensors repeat them."""
_LEAST_STEPS = 2
_MICRO_BATCHES = 4
"""Of a step at most: the rest of a long step says nothing new."""


def run(context: RunContext, order: CalibrateOrder) -> None:
    """Finishes with micro_batch_s, update_s (means), tokens_per_s of whole steps, peak_bytes, steps and versions."""
    recipe, launch = order.recipe, order.launch
    rows = min(recipe.micro_batch_sequences, recipe.batch_sequences)
    if recipe.sequence_tokens > order.shape.context:
        raise ConfigError(
            f"sequence_tokens is {recipe.sequence_tokens}, the model's context only {order.shape.context}",
            fix="lower training.sequence_tokens",
        )
    context.progress(0, order.seconds, "seconds", "building the model")
    twin = importlib.import_module(f"jupiter_engine.backends.{launch.twin}.train")
    fields = {name: getattr(order.shape, name) for name in Shape.__struct_fields__}
    info = ModelInfo(**fields, dtype="float32", eos_ids=(0,), pad_id=0)
    trainer = twin.open_trainer(
        info, recipe, random_weights(order.shape), threads=launch.threads_per_rank, compile=launch.compile
    )
    batches = [_batch(order.shape, recipe, rows, seed) for seed in range(_MICRO_BATCHES)]
    count = max(1, min(_MICRO_BATCHES, recipe.batch_sequences // rows))
    _step(trainer, recipe, batches[:count])
    micro: list[float] = []
    updates: list[float] = []
    began = time.perf_counter()
    while len(updates) < _LEAST_STEPS or time.perf_counter() - began < order.seconds:
        context.check_halt()
        computed, updated = _step(trainer, recipe, batches[:count])
        micro.append(computed / count)
        updates.append(updated)
        context.progress(min(order.seconds, time.perf_counter() - began), order.seconds, "seconds", "training")
    micro_batch_s, update_s = sum(micro) / len(micro), sum(updates) / len(updates)
    whole = recipe.batch_sequences / rows * micro_batch_s + update_s
    result: dict[str, Any] = {
        "micro_batch_s": micro_batch_s,
        "update_s": update_s,
        "tokens_per_s": recipe.batch_sequences * recipe.sequence_tokens / whole,
        "peak_bytes": int(trainer.peak_bytes()),
        "steps": len(updates),
        "seconds": time.perf_counter() - began,
        "versions": twin.versions(),
    }
    trainer.close()
    context.finish(result)


def random_weights(shape: Shape) -> dict[str, npt.NDArray[np.float32]]:
    """Small random matrices and norms of one, float32 by name; gigabytes of them in a second or two."""
    block = np.random.default_rng(0).standard_normal(_BLOCK, dtype=np.float32) * np.float32(0.02)
    return {
        name: np.ones(size, np.float32) if len(size) == 1 else np.resize(block, size)
        for name, size in tensor_shapes(shape).items()
    }


def _batch(shape: Shape, recipe: Recipe, rows: int, seed: int) -> Batch:
    """Rows of two packed documents each, every target counted."""
    rng = np.random.default_rng(seed)
    size = (rows, recipe.sequence_tokens)
    segments = np.zeros(size, np.int64)
    segments[:, recipe.sequence_tokens // 2 :] = 1
    return Batch(
        tokens=rng.integers(0, shape.vocab_size, size, dtype=np.int64),
        targets=rng.integers(0, shape.vocab_size, size, dtype=np.int64),
        segments=segments,
        counted=np.ones(size, np.bool_),
    )


def _step(trainer: Any, recipe: Recipe, batches: list[Batch]) -> tuple[float, float]:
    """(seconds of the micro-batches, seconds of the rest) of one optimizer step; the weights hardly move."""
    began = time.perf_counter()
    tokens = sum(batch.tokens.size for batch in batches)
    for batch in batches:
        trainer.accumulate(batch, 1.0 / tokens)
    computed = time.perf_counter()
    norm = trainer.reduce()
    trainer.apply(1e-6, min(1.0, recipe.max_grad_norm / (norm + 1e-6)))
    return computed - began, time.perf_counter() - computed
