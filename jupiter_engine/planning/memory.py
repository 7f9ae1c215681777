"""Bytes that one rank of a training run holds, part by part, for both twins on CPUs, NVIDIA cards and Macs.

The state is exact (counts of tensors times their precision). Activations on
CPUs are exact counts of what the twins keep for the backward pass, found with
torch's saved-tensor hooks and with MLX's own peak counter over pairs of shapes
that differ in one width (scripts/bench/plan.py shows the counting again). What
allocators add is fitted: `_MARGIN` and the runtime sizes below come from the
resident peaks of separate processes over shapes with 300 MB to 2 GB of training
memory (tests/planning/test_measured.py repeats a sample of them). Numbers for
CUDA and Metal follow from the same counts and were not measured here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from jupiter_engine.protocol.shapes import BYTES_OF_DTYPE, Shape, parameter_count, tensor_shapes
from jupiter_engine.protocol.specs import LoraSpec, OptimizerSpec, Recipe, Twin
from jupiter_engine.units import MIB

DeviceKind = Literal["cpu", "cuda", "metal"]
Sharding = Literal["none", "zero1", "fsdp"]
Sizes = Mapping[str, tuple[int, ...]]

LOSS_CHUNK: Final = 256
"""Targets whose logits exist at once in both twins."""
_BLOCK: Final = 256
"""Values that share one scale in 8-bit moments."""
_SMALLEST_QUANTISED: Final = 4096
"""Parameters with fewer values keep float32 moments under adamw8bit."""
_NOT_MUON: Final = frozenset({"embed_tokens", "lm_head"})
_BUCKET: Final = 32 * MIB
"""Gradients of several ranks travel in buckets of so many bytes, each with a copy."""


class RankMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one rank's parts at the run's peak."""

    weights: int
    """float32 masters of all trained weights; with LoRA the frozen model in the compute precision."""
    compute_copy: int
    """Trained weights once more in the compute precision; 0 for float32."""
    gradients: int
    """float32 sums over the micro-batches of a step."""
    optimizer: int
    """Moments."""
    adapters: int
    """With LoRA: the adapters' masters, compute copies and gradients."""
    activations: int
    """Kept from the forward pass for the backward pass."""
    attention: int
    """Masks and score matrices of attention."""
    logits: int
    """One chunk of the loss, forward and backward."""
    transients: int
    """Gradients of a backward pass before they are added, workspace of the update, buckets of the exchange."""
    margin: int
    """What allocators hold beyond what is asked of them, fitted to measured peaks."""
    runtime: int
    """Interpreter and libraries; for CUDA the allocator's slack."""
    writing: int
    """Copy of the state on rank 0 while a checkpoint is written; left out where memory is short."""

    @property
    def total(self) -> int:
        """While training; `writing` comes on top on rank 0 while a checkpoint is written."""
        return self.training + self.runtime

    @property
    def training(self) -> int:
        """Without the bare runtime: what a process grows by when it trains."""
        return sum(size for name, size in self.parts().items() if name not in ("runtime", "writing"))

    def parts(self) -> dict[str, int]:
        return msgspec.structs.asdict(self)


# -- state ---------------------------------------------------------------------------------------------
def optimizer_state_bytes(spec: OptimizerSpec, shapes: Sizes) -> int:
    """Bytes of the optimizer's moments for tensors of these names and shapes.

    adamw: two float32 values a weight. adamw8bit: two bytes and two float32
    scales a block of 256; tensors of fewer than 4,096 values as adamw. muon: one
    float32 value for each weight of the layers' matrices, the rest as adamw.
    adafactor: a row and a column of float32 a matrix, one value a weight of vectors.
    """
    return sum(_state_of(spec.name, name, shape) for name, shape in shapes.items())


def _state_of(rule: str, name: str, shape: tuple[int, ...]) -> int:
    values = math.prod(shape)
    if rule == "muon" and len(shape) == 2 and _NOT_MUON.isdisjoint(name.split(".")):
        return 4 * values
    if rule == "adamw8bit" and values >= _SMALLEST_QUANTISED:
        return 2 * values + 2 * 4 * -(-values // _BLOCK)
    if rule == "adafactor":
        if len(shape) < 2:
            return 4 * values
        return 4 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])
    return 8 * values


def adapter_shapes(shape: Shape, lora: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of LoRA's pairs: `<module>.lora_a` [rank, in], `<module>.lora_b` [out, rank]."""
    found: dict[str, tuple[int, ...]] = {}
    for name, size in tensor_shapes(shape).items():
        module = name.removesuffix(".weight")
        if len(size) == 2 and module.rpartition(".")[2] in lora.targets:
            found[f"{module}.lora_a"] = (lora.rank, size[1])
            found[f"{module}.lora_b"] = (size[0], lora.rank)
    return found


def trained_shapes(shape: Shape, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """The tensors that are updated: all of the model, or LoRA's adapters."""
    return adapter_shapes(shape, recipe.lora) if recipe.update == "lora" else tensor_shapes(shape)


def checkpoint_bytes(shape: Shape, recipe: Recipe) -> int:
    """One checkpoint: float32 weights and the moments of what is trained."""
    shapes = trained_shapes(shape, recipe)
    return 4 * _values(shapes) + optimizer_state_bytes(recipe.optimizer, shapes)


def _values(shapes: Sizes) -> int:
    return sum(math.prod(size) for size in shapes.values())


# -- activations ---------------------------------------------------------------------------------------
class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that one layer keeps for the backward pass, by width and token (see the module's head)."""

    d: float
    """Times hidden size."""
    q: float
    """Times query heads x head size."""
    kv: float
    """Times key heads x head size."""
    f: float
    """Times intermediate size."""
    head: float = 0.0
    """Times query heads."""
    constant: float = 0.0
    mask: float = 0.0
    """Times sequence length: a mask over all keys, for each layer."""
    scores: float = 0.0
    """Times query heads x sequence length, for each layer: the matrix of attention weights."""
    rebuilt: float = 0.0
    """Times query heads x sequence length, for one layer at a time: scores that the backward pass builds again."""


def _kept(twin: Twin, device: DeviceKind, dtype: str) -> _Kept:
    e = BYTES_OF_DTYPE[dtype]
    if twin == "torch":
        # rms_norm keeps its input and the normalised rows in float32 and the result in e bytes, twice a layer; the
        # MLP gate, its silu, up and their product; attention queries, keys, values, the result and a float32 sum a
        # head. CPU attention turns the boolean mask into one of e bytes that each layer keeps; CUDA's
        # memory-efficient kernel does so, too.
        return _Kept(d=2 * (8 + e), q=2 * e, kv=2 * e, f=4 * e, head=4, constant=8, mask=e)
    if device == "metal":
        # Fused attention with a light forward pass; its backward builds s x s one layer at a time, 3.2 times
        # (mlx-train-perf: 25.7 against 12.8 GiB at 8,192 tokens and 32 heads).
        return _Kept(d=8 * e, q=3 * e, kv=3 * e, f=5 * e, head=4, constant=8, rebuilt=3.2 * e)
    return _Kept(d=8 * e, q=3 * e, kv=3 * e, f=5 * e, head=4, constant=8, scores=2 * e)


def _layer_bytes(shape: Shape, kept: _Kept, rows: int, tokens: int) -> tuple[float, float, float]:
    """(activations of one layer, its masks and scores, scores rebuilt for one layer) for rows of `tokens` tokens."""
    positions = rows * tokens
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    widths = kept.d * shape.hidden_size + kept.q * q + kept.kv * kv + kept.f * shape.intermediate_size
    linear = positions * (widths + kept.head * shape.heads + kept.constant)
    square = positions * tokens * (kept.mask + kept.scores * shape.heads)
    return linear, square, positions * tokens * kept.rebuilt * shape.heads


def _activations(shape: Shape, recipe: Recipe, rows: int, twin: Twin, device: DeviceKind) -> tuple[int, int]:
    """(activations, attention) of one micro-batch of `rows` sequences."""
    kept = _kept(twin, device, recipe.compute_dtype)
    linear, square, rebuilt = _layer_bytes(shape, kept, rows, recipe.sequence_tokens)
    positions = rows * recipe.sequence_tokens
    e = BYTES_OF_DTYPE[recipe.compute_dtype]
    # Embedding, final norm, the loss's own copy of the hidden states and their gradient; cosines and sines.
    ends = positions * ((8 + 4 * e) * shape.hidden_size + 4 * e * shape.head_dim)
    if recipe.update == "lora":
        linear += positions * recipe.lora.rank * len(set(recipe.lora.targets)) * 2 * e
    if recipe.recompute_activations:
        inputs = shape.layers * positions * shape.hidden_size * e
        return int(inputs + linear + ends), int(square + rebuilt)
    return int(shape.layers * linear + ends), int(shape.layers * square + rebuilt)


# -- the whole -----------------------------------------------------------------------------------------
_RUNTIME: Final[Mapping[tuple[Twin, DeviceKind], int]] = {
    ("torch", "cpu"): 330 * MIB,
    ("mlx", "cpu"): 200 * MIB,
    ("torch", "cuda"): 512 * MIB,
    ("torch", "metal"): 700 * MIB,
    ("mlx", "metal"): 700 * MIB,
    ("mlx", "cuda"): 700 * MIB,
}
"""Interpreter and tensor library before any training (CPU: measured with one thread, 232 MiB for torch; the rest is
room for what the worker itself holds). On CUDA this is the allocator's slack on the card; its context is taken off
what the card allows (planning.budget)."""

_MARGIN: Final[Mapping[tuple[Twin, DeviceKind], float]] = {
    ("torch", "cpu"): 0.08,
    ("mlx", "cpu"): 0.08,
}
"""Share of all that changes during a step that allocators hold in addition. Elsewhere: 0.15, not measured."""


def rank_memory(
    shape: Shape,
    recipe: Recipe,
    *,
    twin: Twin,
    device: DeviceKind = "cpu",
    ranks: int = 1,
    sharding: Sharding = "none",
    micro_batch: int = 0,
) -> RankMemory:
    """Bytes of one of `ranks` ranks of a run of `recipe` on a model of `shape`.

    `micro_batch`: sequences at once on this rank; 0: the recipe's, and at most its share of the batch.
    """
    dtype = recipe.compute_dtype
    e = BYTES_OF_DTYPE[dtype]
    rows = micro_batch or min(recipe.micro_batch_sequences, -(-recipe.batch_sequences // ranks))
    shapes = trained_shapes(shape, recipe)
    trained = _values(shapes)
    whole = parameter_count(shape)
    lora = recipe.update == "lora"
    weights_part = 1 / ranks if sharding == "fsdp" else 1.0
    state_part = 1 / ranks if sharding in ("zero1", "fsdp") else 1.0
    optimizer = optimizer_state_bytes(recipe.optimizer, shapes)
    copy = 0 if dtype == "float32" else e * trained
    activations, attention = _activations(shape, recipe, rows, twin, device)
    targets = min(rows * recipe.sequence_tokens, LOSS_CHUNK)
    logits = targets * shape.vocab_size * (e + 4 * 3)
    transients = _transients(shape, recipe, shapes, twin=twin, ranks=ranks, sharding=sharding)
    base = 4 * whole * weights_part if not lora else e * whole * weights_part
    own = 4 * trained + copy + 4 * trained
    changing = activations + attention + logits + transients
    margin = int(_MARGIN.get((twin, device), 0.15) * changing)
    return RankMemory(
        weights=int(base),
        compute_copy=0 if lora else int(copy * weights_part),
        gradients=0 if lora else int(4 * trained * weights_part),
        optimizer=int(optimizer * state_part),
        adapters=int(own * weights_part) if lora else 0,
        activations=activations,
        attention=attention,
        logits=logits,
        transients=transients,
        margin=margin,
        runtime=_RUNTIME[(twin, device)],
        writing=checkpoint_bytes(shape, recipe),
    )


def _transients(
    shape: Shape,
    recipe: Recipe,
    shapes: Sizes,
    *,
    twin: Twin,
    ranks: int,
    sharding: Sharding,
) -> int:
    """Short-lived copies of weights' size: gradients of a backward pass, the update's workspace, exchange buckets."""
    e = BYTES_OF_DTYPE[recipe.compute_dtype]
    biggest = max(math.prod(size) for size in shapes.values())
    gradients = e * _values(shapes) / (ranks if sharding == "fsdp" else 1)
    update = _update_workspace(recipe.optimizer, shapes, twin)
    exchange = 0 if ranks == 1 else 2 * _BUCKET
    gathered = 0
    if sharding == "fsdp":
        d = shape.hidden_size
        layer = (parameter_count(shape) - shape.vocab_size * d * (1 if shape.tied else 2)) // shape.layers
        gathered = 2 * e * max(layer, shape.vocab_size * d)
    elif sharding == "zero1":
        exchange += 4 * biggest
    return int(max(gradients, update) + exchange + gathered)


def _update_workspace(spec: OptimizerSpec, shapes: Sizes, twin: Twin) -> float:
    """Bytes beside the state while weights are updated."""
    biggest = max(math.prod(size) for size in shapes.values())
    if spec.name == "muon":
        # The iteration's matrix, its product and two squares of the shorter side, in float32 (CPU) or bfloat16.
        return 5 * 4 * max((math.prod(s) for s in shapes.values() if len(s) == 2), default=0)
    if twin == "mlx":
        # Functional updates: new weights and moments stand beside the old ones of a group of tensors.
        return 3 * 4 * biggest
    return 2 * 4 * biggest if spec.name != "adamw" else 0
