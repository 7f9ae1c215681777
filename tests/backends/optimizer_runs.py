"""The same few steps for any optimizer: start weights and gradients drawn from a fixed seed, odd shapes among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from jupiter_engine.protocol.specs import OptimizerSpec

Arrays = dict[str, npt.NDArray[np.float32]]
Shapes = dict[str, tuple[int, ...]]

NAMES = ("adamw", "adamw8bit", "muon", "adafactor")
SHAPES: Shapes = {
    "model.embed_tokens.weight": (320, 33),  # 41.25 blocks of 256
    "model.layers.0.self_attn.q_proj.weight": (65, 70),  # 17.8 blocks
    "model.layers.0.mlp.down_proj.weight": (32, 160),  # whole blocks
    "model.layers.0.mlp.up_proj.lora_a": (3, 65),  # too small for 8 bits
    "model.layers.0.input_layernorm.weight": (33,),
    "model.norm.weight": (1,),
    "lm_head.weight": (7, 5),
}
TORCHAO_SHAPES: Shapes = {"model.layers.0.mlp.down_proj.weight": (64, 128)}
"""torchao quantises whole blocks only."""
LIBRARY_STEPS, OWN_STEPS = 20, 30
OWN_KEPT = 8
"""Every so many of an own result's numbers are kept."""
RATE = 3e-3


def spec(name: str) -> OptimizerSpec:
    return OptimizerSpec(name=name, learning_rate=RATE, weight_decay=0.1)  # type: ignore[arg-type]


def start(shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    rng = np.random.default_rng(1)
    return {name: rng.normal(0.0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}


def gradients(shapes: Mapping[str, tuple[int, ...]], steps: int) -> Iterator[Arrays]:
    """Noise about a slope that stays; the sizes of a parameter's rows lie up to three decades apart."""
    rng = np.random.default_rng(2)
    slopes = {name: rng.normal(0.0, 1.0, shape) for name, shape in shapes.items()}
    sizes = {
        name: 10.0 ** rng.uniform(-3.0, 0.0, (shape[0], *[1] * (len(shape) - 1))) for name, shape in shapes.items()
    }
    for _ in range(steps):
        yield {
            name: (sizes[name] * (slopes[name] + rng.normal(0.0, 1.0, shape))).astype(np.float32)
            for name, shape in shapes.items()
        }


def learning_rate(step: int) -> float:
    """A rate that moves, as schedules do."""
    return RATE * (1.0 - 0.02 * step)
