"""Makes optimizers.npz: what torchao and Jupiter's own optimizers make of tests.backends.optimizer_runs.

    pip install --no-deps --target /tmp/references torchao==0.18.0
    TORCHDYNAMO_DISABLE=1 PYTHONPATH=/tmp/references:. .venv/bin/python tests/backends/golden/make_optimizers.py

torchao is not among the test dependencies; what it computed once, on a CPU with
torch 2.13 and without torch.compile, is kept. (bitsandbytes 0.50.2 has the same
rule and the same 256 numbers, but on CPUs it rounds to them by a coarse table:
a third of its codes of squares differ from the nearest.) The own results guard
against changes of a rule that both twins would share.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jupiter_engine.backends.torch import optimizers
from tests.backends import optimizer_runs as runs

FILE = Path(__file__).with_name("optimizers.npz")


def library(make: Callable[[list[Any]], Any], shapes: runs.Shapes) -> tuple[runs.Arrays, Any]:
    """(weights after LIBRARY_STEPS, the optimizer); `make` gets one parameter group."""
    weights = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in runs.start(shapes).items()}
    optimizer = make(list(weights.values()))
    for step, gradients in enumerate(runs.gradients(shapes, runs.LIBRARY_STEPS)):
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(runs.learning_rate(step))
            else:
                group["lr"] = runs.learning_rate(step)
        for name, value in gradients.items():
            weights[name].grad = torch.tensor(value)
        optimizer.step()
    return {name: value.detach().numpy() for name, value in weights.items()}, optimizer


def torchao() -> dict[str, Any]:
    from torchao.optim import AdamW8bit  # type: ignore[import-not-found]

    weights, optimizer = library(
        lambda p: AdamW8bit(p, lr=runs.RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), runs.TORCHAO_SHAPES
    )
    (state,) = optimizer.state.values()
    (weight,) = weights.values()
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    return {
        "weight": weight, "m8": mean.codes, "v8": square.codes, "ms": mean.scale, "vs": square.scale,
        "signed": mean.qmap, "unsigned": square.qmap,
    }  # fmt: skip


def own(name: str) -> dict[str, Any]:
    weights = {key: torch.tensor(value) for key, value in runs.start(runs.SHAPES).items()}
    optimizer = optimizers.build(runs.spec(name), runs.SHAPES)
    for step, gradients in enumerate(runs.gradients(runs.SHAPES, runs.OWN_STEPS)):
        optimizer.begin()
        optimizer.update_all(weights, {k: torch.tensor(v) for k, v in gradients.items()}, runs.learning_rate(step))
    return {key: value.reshape(-1)[:: runs.OWN_KEPT] for key, value in weights.items()}


def main() -> None:
    parts = {"torchao": torchao()} | {name: own(name) for name in runs.NAMES}
    arrays = {f"{part}/{key}": np.asarray(value) for part, values in parts.items() for key, value in values.items()}
    np.savez_compressed(FILE, **arrays)  # type: ignore[arg-type]
    print(FILE, FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
