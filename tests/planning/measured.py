"""Train a random model for two steps in this process and print how far its memory rose above the bare runtime.

`python -m tests.planning.measured '{"twin": "torch", "shape": {...}, "recipe": {...}}'` prints one JSON line:
`baseline` (bytes resident after the tensor library did a small product), `rise` (the process's peak over two
optimizer steps, each of as many micro-batches as the recipe asks for, less the baseline), `seconds` of the second
step. Linux: the kernel's peak mark is set back after the baseline (/proc/self/clear_refs).
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from jupiter_engine.checkpoints.model_folder import ModelInfo
from jupiter_engine.protocol.shapes import Shape, tensor_shapes
from jupiter_engine.protocol.specs import Recipe


def _status(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def weights_of(shape: Shape, seed: int = 0) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Small random weights by name, float32."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(size, dtype=np.float32) * np.float32(0.02)
        if len(size) > 1
        else np.ones(size, np.float32)
        for name, size in tensor_shapes(shape).items()
    }


def _batches(shape: Shape, recipe: Recipe, seed: int) -> list[Any]:
    from jupiter_engine.training.trainer import Batch

    rng = np.random.default_rng(seed)
    size = (recipe.micro_batch_sequences, recipe.sequence_tokens)
    segments = np.zeros(size, np.int64)
    segments[:, recipe.sequence_tokens // 2 :] = 1  # packed rows: the masked attention is what training uses
    return [
        Batch(
            tokens=rng.integers(0, shape.vocab_size, size, dtype=np.int64),
            targets=rng.integers(0, shape.vocab_size, size, dtype=np.int64),
            segments=segments,
            counted=np.ones(size, np.bool_),
        )
        for _ in range(recipe.batch_sequences // recipe.micro_batch_sequences)
    ]


def _warm(twin: str) -> None:
    if twin == "torch":
        import torch

        x = torch.randn(64, 64, requires_grad=True)
        (x @ x).sum().backward()
        return
    import mlx.core as mx

    y = mx.random.normal((64, 64))
    mx.eval(mx.grad(lambda z: (z @ z).sum())(y))


def measure(case: Mapping[str, Any]) -> dict[str, float]:
    twin = case["twin"]
    if twin == "mlx":
        from jupiter_engine.backends.mlx import blas

        blas.preload()
    shape = msgspec.convert(case["shape"], Shape)
    recipe = msgspec.convert(case["recipe"], Recipe)
    module = importlib.import_module(f"jupiter_engine.backends.{twin}.train")
    _warm(twin)
    info = ModelInfo(**msgspec.structs.asdict(shape), dtype="float32", eos_ids=(0,), pad_id=0)
    batches = _batches(shape, recipe, 1)
    baseline = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    trainer = module.open_trainer(info, recipe, weights_of(shape), threads=1)
    opened = _status("VmHWM") - baseline
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        for batch in batches:
            trainer.accumulate(batch, 1.0 / (recipe.batch_sequences * recipe.sequence_tokens))
        computed = _status("VmHWM") - baseline
        norm = trainer.reduce()
        trainer.apply(1e-4, min(1.0, 1.0 / norm))
        seconds = time.perf_counter() - began
    trained = _status("VmHWM") - baseline
    trainer.export_state()
    rise = _status("VmHWM") - baseline
    return {
        "baseline": baseline,
        "opened": opened,
        "computed": computed,
        "trained": trained,
        "rise": rise,
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
