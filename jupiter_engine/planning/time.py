"""How fast devices train: arithmetic of a step, a table of what devices sustain, and what was measured here instead.

The table is a set of ranges from published runs and estimates (the sources stand at each row's group); a
calibration of a minute replaces it. Watts are of the whole machine under load, estimates too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from jupiter_engine.planning.budget import Device
from jupiter_engine.planning.memory import DeviceKind, trained_shapes
from jupiter_engine.protocol.shapes import Shape, flops_per_token
from jupiter_engine.protocol.specs import Recipe, Twin

Link = Literal["machine", "thunderbolt", "ethernet", "wifi"]
BYTES_PER_S: Final[dict[Link, float]] = {"machine": 2e9, "thunderbolt": 2e9, "ethernet": 117e6, "wifi": 30e6}
"""What TCP carries: within a machine (loopback rings measured 1 GB/s and more), Thunderbolt 4 (16 Gbit/s between
two machines), 1 GbE, Wi-Fi. A faster network's speed is taken from the link where it is known."""
_SPREAD: Final = 0.10
"""A measured speed is said to within so much: machines slow down as they warm up."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table."""

    match: str
    """Regular expression over the name that the system gives."""
    low: float
    high: float
    """Sustained TFLOPS in bfloat16 training."""
    watts: float
    peak: float | None = None
    """Dense bfloat16 TFLOPS by data sheet, where there is one."""
    float32: float = 1.0
    """Speed in float32 against bfloat16."""


TABLE: Final = (
    # Cards: ForgeLM's 4090 (46-52 % of peak), 3090 from plain to tuned code, A100 57 % (GPUburnout-1B); the
    # others: the same shares of their peaks.
    Entry(match=r"RTX 5090", low=90, high=115, watts=675, peak=209.5, float32=0.4),
    Entry(match=r"RTX 4090", low=70, high=85, watts=550, peak=165.2, float32=0.4),
    Entry(match=r"RTX 3090", low=25, high=36, watts=450, peak=71.0, float32=0.45),
    Entry(match=r"RTX 3080", low=18, high=28, watts=420, peak=59.5, float32=0.45),
    Entry(match=r"RTX A6000", low=45, high=75, watts=400, peak=154.8, float32=0.4),
    Entry(match=r"\bL40S?\b", low=80, high=140, watts=450, peak=362.0, float32=0.3),
    Entry(match=r"A100", low=140, high=180, watts=500, peak=312.0, float32=0.4),
    Entry(match=r"H100|H200|GH200", low=350, high=480, watts=850, peak=989.4, float32=0.4),
    Entry(match=r"\bT4\b", low=8, high=16, watts=120, peak=65.0, float32=0.3),
    # Macs: M4 family and M1 Max scaled from GEMM and LoRA runs (mlx-train-perf: 46 % of peak), M2 Max from
    # mlx-examples#127, M5 family from GEMM and prefill numbers only (low confidence).
    Entry(match=r"M5 Max", low=15, high=25, watts=130),
    Entry(match=r"M5 Pro", low=7, high=12, watts=85),
    Entry(match=r"\bM5\b", low=3.5, high=6, watts=45),
    Entry(match=r"M4 Max", low=4.8, high=8.6, watts=120),
    Entry(match=r"M4 Pro", low=2.4, high=4.2, watts=75),
    Entry(match=r"\bM4\b", low=1.6, high=2.2, watts=40),
    Entry(match=r"M3 Ultra", low=9, high=15, watts=230),
    Entry(match=r"M3 Max", low=4.0, high=7.0, watts=110),
    Entry(match=r"M3 Pro", low=2.0, high=3.2, watts=60),
    Entry(match=r"\bM3\b", low=1.3, high=1.9, watts=35),
    Entry(match=r"M2 Ultra", low=7, high=12, watts=215),
    Entry(match=r"M2 Max", low=3.5, high=5.8, watts=95),
    Entry(match=r"M2 Pro", low=1.9, high=3.1, watts=60),
    Entry(match=r"\bM2\b", low=1.1, high=1.7, watts=30),
    Entry(match=r"M1 Ultra", low=6, high=9.5, watts=200),
    Entry(match=r"M1 Max", low=3.3, high=4.8, watts=90),
    Entry(match=r"M1 Pro", low=1.6, high=2.5, watts=55),
    Entry(match=r"\bM1\b", low=0.8, high=1.2, watts=28),
)
_CORE_GFLOPS: Final[dict[tuple[Twin, str], tuple[float, float]]] = {
    ("torch", "float32"): (15, 75),
    ("torch", "bfloat16"): (10, 180),
    ("mlx", "float32"): (5, 45),
    ("mlx", "bfloat16"): (1, 10),
}
"""Sustained by one CPU core: from old cores without wide vectors to Zen 4 with AVX-512 (there 70, 175, 40)."""
_CORE_WATTS: Final = 8.0
_MACHINE_WATTS: Final = 25.0


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """One measured training of random weights on random rows: an entry of .jupiter/calibration.json."""

    node: str
    device: str
    """Chip or card by name."""
    kind: DeviceKind
    twin: Twin
    shape: Shape
    sequence_tokens: int
    micro_batch: int
    compute_dtype: str
    recompute: bool
    update: str
    optimizer: str
    threads: int = 0
    versions: dict[str, str] = {}
    micro_batch_s: float
    """Median time of one micro-batch, forward and backward."""
    update_s: float
    """Median time of one optimizer step beside its micro-batches."""
    peak_bytes: int
    """Of the whole process (CUDA: allocated on the card)."""
    steps: int
    seconds: float
    at: float
    """When, seconds since the epoch."""


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """How fast one rank is, without waiting for others."""

    low: float
    high: float
    """Input tokens a second over whole steps."""
    source: Literal["measured", "scaled", "table", "unknown"]
    """`scaled`: measured on this device with another shape or recipe, and converted by the amount of arithmetic."""
    watts: float
    """Of the machine, under load; an estimate."""
    mfu: float | None = None
    """Share of the device's peak at the middle of the range, where a peak is known."""

    @property
    def middle(self) -> float:
        return math.sqrt(self.low * self.high)


def train_flops(shape: Shape, recipe: Recipe) -> float:
    """Floating-point operations a token of a training step.

    Forward once, backward twice as much (with LoRA once: frozen weights get no
    gradient); recomputation adds a forward pass of the layers.
    """
    forward = flops_per_token(shape, recipe.sequence_tokens)
    passes = 2.0 if recipe.update == "lora" else 3.0
    return forward * (passes + (1.0 if recipe.recompute_activations else 0.0))


def entry_of(device: Device) -> Entry | None:
    """The device's row of the table; None for one that is not in it."""
    if device.kind == "cpu":
        low, high = _CORE_GFLOPS[device.twin, "bfloat16"]
        watts = _MACHINE_WATTS + _CORE_WATTS * device.cores
        return Entry(match="", low=low * device.cores / 1000, high=high * device.cores / 1000, watts=watts)
    return next((entry for entry in TABLE if re.search(entry.match, device.name, re.IGNORECASE)), None)


def speed_of(
    device: Device, shape: Shape, recipe: Recipe, *, ranks: int = 1, calibrations: Sequence[Calibration] = ()
) -> Speed:
    """One rank's speed on `device`, which it shares with `ranks` - 1 others: those on one processor, GPU or card
    divide its speed."""
    watts = _watts(device)
    rows = min(recipe.micro_batch_sequences, recipe.batch_sequences)
    found = _nearest_calibration(device, shape, recipe, calibrations)
    if found is not None:
        same, one = found
        micro = one.micro_batch_s
        if not same:
            work = train_flops(shape, recipe) * rows * recipe.sequence_tokens
            micro *= work / _work(one)
        count = recipe.batch_sequences / rows
        tokens = recipe.batch_sequences * recipe.sequence_tokens
        update = one.update_s * (1.0 if same else _updated(shape, recipe) / max(1, _updated(one.shape, _recipe(one))))
        rate = tokens / (count * micro + update) / device.ranks_on_one_pool(ranks)
        spread = _SPREAD if same else 3 * _SPREAD
        middle = train_flops(shape, recipe) * rate
        return Speed(
            low=rate * (1 - spread),
            high=rate * (1 + spread),
            source="measured" if same else "scaled",
            watts=watts,
            mfu=_mfu(device, recipe, middle),
        )
    low, high = _table_tflops(device, recipe)
    if high == 0:
        return Speed(low=0.0, high=0.0, source="unknown", watts=watts)
    share = 1e12 / train_flops(shape, recipe) / device.ranks_on_one_pool(ranks)
    return Speed(
        low=low * share,
        high=high * share,
        source="table",
        watts=watts,
        mfu=_mfu(device, recipe, math.sqrt(low * high) * 1e12),
    )


def _table_tflops(device: Device, recipe: Recipe) -> tuple[float, float]:
    if device.kind == "cpu":
        low, high = _CORE_GFLOPS[device.twin, recipe.compute_dtype]
        return low * device.cores / 1000, high * device.cores / 1000
    entry = entry_of(device)
    if entry is None:
        return 0.0, 0.0
    factor = entry.float32 if recipe.compute_dtype == "float32" else 1.0
    return entry.low * factor, entry.high * factor


def _watts(device: Device) -> float:
    entry = entry_of(device)
    if device.kind == "cuda" and device.power_w:
        return device.power_w * device.cards + 100.0
    if entry is None:
        return 0.0
    return entry.watts * (device.cards if device.kind == "cuda" else 1)


def _mfu(device: Device, recipe: Recipe, flops_per_s: float) -> float | None:
    entry = entry_of(device)
    if entry is None or entry.peak is None or recipe.compute_dtype != "bfloat16":
        return None
    # By convention without the arithmetic that recomputation repeats.
    passes = 3.0 if recipe.update == "full" else 2.0
    useful = passes / (passes + (1.0 if recipe.recompute_activations else 0.0))
    return flops_per_s * useful / (entry.peak * 1e12)


def _recipe(one: Calibration) -> Recipe:
    """The parts of the recipe that a calibration knows."""
    return msgspec.convert(
        {
            "update": one.update,
            "sequence_tokens": one.sequence_tokens,
            "recompute_activations": one.recompute,
            "compute_dtype": one.compute_dtype,
        },
        Recipe,
    )


def _work(one: Calibration) -> float:
    """Operations of one of its micro-batches."""
    return train_flops(one.shape, _recipe(one)) * one.micro_batch * one.sequence_tokens


def _updated(shape: Shape, recipe: Recipe) -> int:
    return sum(math.prod(size) for size in trained_shapes(shape, recipe).values())


def sizes_of(shape: Shape) -> tuple[object, ...]:
    """What of a shape decides its arithmetic."""
    return (
        shape.vocab_size,
        shape.hidden_size,
        shape.layers,
        shape.heads,
        shape.kv_heads,
        shape.intermediate_size,
        shape.head_dim,
        shape.tied,
    )


def same_work(one: Calibration, shape: Shape, recipe: Recipe) -> bool:
    """Whether a calibration was of just this training."""
    return sizes_of(one.shape) == sizes_of(shape) and (
        one.sequence_tokens,
        one.micro_batch,
        one.compute_dtype,
        one.recompute,
        one.update,
        one.optimizer,
    ) == (
        recipe.sequence_tokens,
        min(recipe.micro_batch_sequences, recipe.batch_sequences),
        recipe.compute_dtype,
        recipe.recompute_activations,
        recipe.update,
        recipe.optimizer.name,
    )


def _nearest_calibration(
    device: Device, shape: Shape, recipe: Recipe, calibrations: Sequence[Calibration]
) -> tuple[bool, Calibration] | None:
    """(of just this training?, the newest fitting one); in the same precision at least."""
    mine = [
        one
        for one in calibrations
        if (one.node, one.device, one.kind, one.twin) == (device.node, device.name, device.kind, device.twin)
        and one.compute_dtype == recipe.compute_dtype
    ]
    same = [one for one in mine if same_work(one, shape, recipe)]
    for chosen, exact in ((same, True), (mine, False)):
        if chosen:
            return exact, max(chosen, key=lambda one: one.at)
    return None


def reduce_seconds(gradient_bytes: float, ranks: int, bytes_per_s: float) -> float:
    """An all-reduce around a ring: every rank sends and receives 2 (n - 1) / n of the gradient."""
    return 0.0 if ranks < 2 else 2 * (ranks - 1) / ranks * gradient_bytes / bytes_per_s
