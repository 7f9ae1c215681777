"""Bytes that one rank of a training run holds, part by part, for both twins on CPUs, NVIDIA cards and Macs.

The state is exact: counts of tensors times their precision. What a layer keeps
for the backward pass is counted, too: from the events of torch's profiler and
MLX's own peak counter over tiny shapes that differ in one width.

What allocators make of it on CPUs is fitted (`_Allocator`): the resident peaks
of separate processes (tests/planning/measured.py) on 17 trainings with torch and
10 with MLX of 400 MB to 1.1 GB, by the linear programme "never under any of
them, and the largest overshoot smallest". Drawn shapes then showed trainings that
were under (adapters with torch by up to 25 %, MLX by up to 16 %), and the shares
were raised until the drawn ones were covered: full trainings are now said up to
45 % too large with torch and 40 % with MLX, adapters with torch up to 2.5 times.
That is far from the tenth that is wanted. Torch's shares are large, probably
because glibc's heap, which the trainer tells to keep what is freed, does not reuse
aligned blocks well: a layer's short-lived arrays leave holes, most of all with
recomputed activations and with adapters.

CUDA and Metal: the same counts and a margin; nothing was measured there.
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

LOSS_CHUNK: Final[Mapping[Twin, int]] = {"torch": 512, "mlx": 256}
"""Targets whose logits exist at once in a twin's loss."""
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
    """Short-lived: a layer's gradients, the start weights while they are handed over, the update's workspace,
    buckets of the exchange."""
    margin: int
    """What allocators hold beyond what is asked of them."""
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
    constant: float = 0.0
    scores: float = 0.0
    """Times query heads x sequence length: attention weights that every layer keeps."""
    rebuilt: float = 0.0
    """Times query heads x sequence length, for one layer at a time: scores that the backward pass builds again."""


class _Allocator(msgspec.Struct, frozen=True, kw_only=True):
    """Factors on what is asked of memory (see the module's head)."""

    base: int = 0
    kept: float = 1.0
    """On what layers keep."""
    again: float = 1.0
    """On the one layer that is computed again."""
    layer: float = 1.0
    """On a layer's short-lived arrays: 4 d + 3 f values a token."""
    logits: float = 1.0
    biggest: float = 1.0
    """On the largest tensor's gradient in compute precision."""
    opening: float = 1.0
    """On what the float32 start weights need beyond what training uses later anyway."""
    adapters: float = 0.0
    """With LoRA, on the outputs of one layer's projections."""
    head: float = 0.0
    """With LoRA, on the logits in addition: the output projection is frozen then."""
    tree: float = 0.0
    """On the trained weights in float32: gradients of a backward pass before they are added."""
    rest: float = 0.0
    """Share of all that changes during a step: where nothing was measured."""
    chunk: int = 0
    """Targets at once that the fit reckoned with, where these were fewer than the twin takes; 0: as many."""


_ALLOCATORS: Final[Mapping[tuple[Twin, DeviceKind], _Allocator]] = {
    ("torch", "cpu"): _Allocator(
        base=15 * MIB,
        kept=1.79,
        again=4.84,
        layer=1.2,
        logits=3.25,
        biggest=0.0,
        opening=1.22,
        adapters=5.2,
        head=2.2,
        rest=0.03,
        # `logits` and `head` are shares of half of what the loss really holds at once.
        chunk=256,
    ),
    ("mlx", "cpu"): _Allocator(
        kept=1.09, again=2.48, layer=3.02, logits=2.27, biggest=1.06, opening=1.87, adapters=2.1, tree=1.75, rest=0.02
    ),
}
_UNMEASURED: Final = _Allocator(rest=0.15, adapters=2.0)


def _kept(twin: Twin, device: DeviceKind, dtype: str) -> _Kept:
    e = BYTES_OF_DTYPE[dtype]
    if twin == "torch":
        # rms_norm keeps its input and the normalised rows in float32 and the result in e bytes, twice a layer; the
        # MLP gate, its silu, up and their product; attention queries, keys, values and the result.
        return _Kept(d=2 * (8 + e), q=2 * e, kv=2 * e, f=4 * e, constant=8)
    # MLX's fused attention is light forwards; on Metal its backward builds s x s one layer at a time, 3.2 times
    # (mlx-train-perf: 25.7 against 12.8 GiB at 8,192 tokens and 32 heads); on CPUs every layer keeps its scores, in
    # 3.2 bytes for bfloat16 (measured).
    scores = 4.0 if dtype == "float32" else 3.2
    counts = _Kept(d=6 * e, q=2.5 * e, kv=2.5 * e, f=5 * e)
    if device == "cpu":
        return msgspec.structs.replace(counts, scores=1.12 * scores)
    return msgspec.structs.replace(counts, rebuilt=3.2 * e)


class _Step(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes asked for by one micro-batch."""

    kept: float
    again: float
    attention: float
    layer: float
    logits: float
    fitted: float
    """Share of `logits` that an allocator's factors are about."""
    projections: float


def _step(shape: Shape, recipe: Recipe, rows: int, twin: Twin, device: DeviceKind) -> _Step:
    kept = _kept(twin, device, recipe.compute_dtype)
    e = BYTES_OF_DTYPE[recipe.compute_dtype]
    d, f = shape.hidden_size, shape.intermediate_size
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tokens = rows * recipe.sequence_tokens
    one = tokens * (kept.d * d + kept.q * q + kept.kv * kv + kept.f * f + kept.constant)
    square = tokens * recipe.sequence_tokens * shape.heads
    again = recipe.recompute_activations
    lora = recipe.update == "lora"
    # float32 logits and their gradient, in bfloat16 the product's own result as well.
    a_logit = 8 if e == BYTES_OF_DTYPE["float32"] else 10
    chunk = min(tokens, LOSS_CHUNK[twin])
    if twin == "torch" and device != "cpu" and tokens > chunk:
        # A chunk's softmax is made while that of the chunk before still lies there, as its slope does.
        a_logit += 4
    fitted = _ALLOCATORS.get((twin, device), _UNMEASURED).chunk or chunk
    return _Step(
        kept=shape.layers * (tokens * d * e if again else one),
        again=one if again else 0.0,
        attention=square * (kept.scores * (1 if again else shape.layers) + kept.rebuilt),
        layer=tokens * e * (4 * d + 3 * f),
        logits=chunk * shape.vocab_size * a_logit,
        fitted=min(chunk, fitted) / chunk,
        projections=tokens * e * (2 * d + q + 2 * kv + 2 * f) if lora else 0.0,
    )


# -- the whole -----------------------------------------------------------------------------------------
_RUNTIME: Final[Mapping[tuple[Twin, DeviceKind], int]] = {
    ("torch", "cpu"): 360 * MIB,
    ("mlx", "cpu"): 160 * MIB,
    ("torch", "cuda"): 512 * MIB,
    ("torch", "metal"): 700 * MIB,
    ("mlx", "metal"): 700 * MIB,
    ("mlx", "cuda"): 700 * MIB,
}
"""Interpreter and libraries before any training (CPU: 277 and 53 MiB were measured for the tensor library alone; the
rest is room for what the worker itself holds). On CUDA this is the allocator's slack on the card; its context is taken
off what the card allows (planning.budget)."""


def rows_at_once(recipe: Recipe, ranks: int, own: int = 0) -> int:
    """Sequences that one of `ranks` ranks computes at once: its `own` number (0: the recipe's), at most its share."""
    return min(own or recipe.micro_batch_sequences, -(-recipe.batch_sequences // ranks))


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

    `micro_batch`: the rank's own number of sequences at once (see `rows_at_once`).
    """
    e = BYTES_OF_DTYPE[recipe.compute_dtype]
    rows = rows_at_once(recipe, ranks, micro_batch)
    shapes = trained_shapes(shape, recipe)
    trained, whole = _values(shapes), parameter_count(shape)
    lora = recipe.update == "lora"
    weights_part = 1 / ranks if sharding == "fsdp" else 1.0
    state_part = 1 / ranks if sharding in ("zero1", "fsdp") else 1.0
    # zero1 divides the masters, too, where every rank has a copy in another precision to compute with.
    masters_part = state_part if e != BYTES_OF_DTYPE["float32"] and not lora else weights_part
    copy = 0 if e == BYTES_OF_DTYPE["float32"] else e * trained
    factors = _ALLOCATORS.get((twin, device), _UNMEASURED)
    step = _step(shape, recipe, rows, twin, device)
    logits = step.fitted * step.logits
    asked = step.kept + step.again + step.layer + logits
    # On other devices the start weights lie in the machine's memory, not in the card's.
    opening = 0.0 if lora or device == "cuda" else factors.opening * max(0.0, 4 * whole - asked)
    short_lived = factors.layer * step.layer + opening + factors.tree * 4 * trained
    short_lived += 0.0 if lora else factors.biggest * e * max(math.prod(size) for size in shapes.values())
    # The update begins when a step's activations are gone: only what it takes beyond them counts.
    update = max(0.0, _update_workspace(recipe.optimizer, shapes, twin) - asked - step.attention - short_lived)
    transients = short_lived + update + _exchange(shape, shapes, e, ranks, sharding)
    margin = factors.base + (factors.kept - 1) * step.kept + (factors.again - 1) * step.again
    margin += factors.logits * logits - step.logits + factors.adapters * step.projections
    margin += factors.head * logits if lora else 0.0
    changing = step.kept + step.again + step.attention + step.logits + transients + margin
    return RankMemory(
        weights=int((e if lora else 4) * whole * masters_part),
        compute_copy=0 if lora else int(copy * weights_part),
        gradients=0 if lora else int(4 * trained * weights_part),
        optimizer=int(optimizer_state_bytes(recipe.optimizer, shapes) * state_part),
        adapters=8 * trained + copy if lora else 0,
        activations=int(step.kept + step.again),
        attention=int(step.attention),
        logits=int(step.logits),
        transients=int(transients),
        margin=int(margin + factors.rest * changing),
        runtime=_RUNTIME[(twin, device)],
        writing=checkpoint_bytes(shape, recipe),
    )


def _exchange(shape: Shape, shapes: Sizes, e: int, ranks: int, sharding: Sharding) -> float:
    """Buckets on the wire; with fsdp two gathered layers (or embeddings), with zero1 one whole tensor."""
    if ranks == 1:
        return 0.0
    buckets = 2.0 * _BUCKET
    if sharding == "fsdp":
        table = shape.vocab_size * shape.hidden_size
        layer = (parameter_count(shape) - table * (1 if shape.tied else 2)) // shape.layers
        return buckets + 2 * e * max(layer, table)
    if sharding == "zero1":
        return buckets + 4 * max(math.prod(size) for size in shapes.values())
    return buckets


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
