"""What a stage is asked to do, in typed parts: settings compose them, orders carry them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, Meta(gt=0.0)]
NotNegative = Annotated[float, Meta(ge=0.0)]
Margin = Annotated[float, Meta(ge=0.0, lt=1.0)]
"""A difference of shares that still counts as none; at 1 nothing could ever exceed it."""
Count = Annotated[int, Meta(ge=1)]
CountOrZero = Annotated[int, Meta(ge=0)]
Seed = Annotated[int, Meta(ge=0, le=2**62)]
Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]

Twin = Literal["mlx", "torch"]
Sharding = Literal["none", "zero1", "fsdp"]


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all specs: immutable, keyword-only, unknown keys refused."""


class SourceSpec(Spec, frozen=True, kw_only=True):
    """One place that documents come from."""

    id: Name
    """Name of the source; stands with every document, shown in lists."""
    type: Literal["stdlib", "files"]
    """`stdlib`: the running interpreter's standard library; `files`: a local file or folder."""
    parts: tuple[Literal["topics", "docstrings", "source"], ...] = ("topics", "docstrings", "source")
    """For `stdlib`: language-reference topics, docstrings, source code."""
    path: str | None = None
    """For `files`: a file or folder; relative paths start at the domain file's folder."""
    include: tuple[str, ...] = ("*.md", "*.rst", "*.txt", "*.py")
    """For `files`: globs over file names or paths within the folder; a file must match one."""
    exclude: tuple[str, ...] = ()
    """For `files`: globs of what is left out although it is included."""
    license: str = "unknown"
    """SPDX identifier stored with every document of the source."""
    weight: Positive = 1.0
    """Relative share of this source when training tokens are drawn."""
    max_bytes: Annotated[int, Meta(ge=1)] | None = None
    """Keep at most this many bytes of text from the source (whole documents, deterministic choice)."""


class ChunkSpec(Spec, frozen=True, kw_only=True):
    """How documents are cut into the pieces that samples and training text are made of."""

    max_bytes: Annotated[int, Meta(ge=200)] = 2400
    """Longest chunk, in UTF-8 bytes; a chunk never cuts a line."""
    min_bytes: CountOrZero = 200
    """Shortest chunk where the text allows it; a shorter rest joins its neighbour."""


class TemplateSpec(Spec, frozen=True, kw_only=True):
    """One way of asking the generator for a sample."""

    id: Name
    """Name of the template; stands with every sample."""
    type: Literal["qa", "explanation", "rephrase", "tutorial", "code", "debug", "conversation"]
    """What kind of sample is asked for; fixes the built-in wording."""
    prompt: str | None = None
    """Own wording; may use {title}, {chunk}, {topic}. None: the built-in wording of the type.
    A wording without {chunk} stands below the text."""
    system_prompt: str | None = None
    """Instruction to the generator before the prompt. None: no such message."""
    topics: tuple[str, ...] = ()
    """Fill {topic} of the prompt, one after the other; without any, the text's title does."""
    weight: NotNegative = 1.0
    """Relative share of the samples asked with this template."""


class GenerationSpec(Spec, frozen=True, kw_only=True):
    """What the generator is asked for in one cycle."""

    templates: tuple[TemplateSpec, ...]
    """The ways of asking; at least one."""
    samples: Count = 96
    """Raw samples asked of the generator in one cycle."""
    max_new_tokens: Count = 128
    """Longest answer, in tokens of the generator; a longer one is cut and marked."""
    temperature: NotNegative = 0.7
    """0: always the likeliest token; higher: more varied, less safe."""
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.95
    """Tokens are drawn from the likeliest ones that hold this share of the probability."""
    batch_size: Count = 16
    """Answers generated side by side; more is faster and takes more memory."""
    context_bytes: Count = 1200
    """How much of a chunk is shown to the generator."""


class FilterSpec(Spec, frozen=True, kw_only=True):
    """Thresholds of the filter chain; a sample that fails one is kept, with the reason, as rejected."""

    min_words: Count = 12
    """Shortest answer, in words."""
    max_words: Count = 600
    """Longest answer, in words."""
    min_grounding: Share = 0.35
    """Least share of the answer's content words that occur in its source chunk."""
    max_copy: Share = 0.9
    """Largest share of the answer's word 8-grams that stand verbatim in the chunk."""
    max_repetition: Share = 0.3
    """Largest share of the answer's words inside repeated word 4-grams."""
    near_duplicate: Share = 0.75
    """MinHash-estimated Jaccard similarity of word 5-grams from which a sample counts as a near duplicate."""
    max_vault_run_words: Count = 30
    """A sample sharing a run of this many words with a vault document is dropped (contamination)."""


class MixSpec(Spec, frozen=True, kw_only=True):
    """Shares of training tokens by class; they are normalised over the classes that have data."""

    real_docs: NotNegative = 0.45
    """Prose documents."""
    real_code: NotNegative = 0.25
    """Source code."""
    synthetic: NotNegative = 0.30
    """Generated samples that passed filters and review."""
    real_floor: Share = 0.40
    """Real tokens never fall below this share, whatever the other numbers say."""


class OptimizerSpec(Spec, frozen=True, kw_only=True):
    name: Literal["adamw", "adamw8bit", "muon", "adafactor"] = "adamw"
    """Update rule; the same arithmetic in both twins. `adamw8bit`: AdamW with moments in blocks of 8-bit
    numbers; `muon`: orthogonalised momentum for the layers' matrices, AdamW for embeddings and norms;
    `adafactor`: factored second moments, no first. Bytes of state a parameter: 8, 2.1, 4, about 0."""
    learning_rate: Positive = 1e-4
    """Peak rate of the schedule."""
    beta1: Share = 0.9
    """Decay of the gradient's running mean (AdamW; `adafactor` has none)."""
    beta2: Share = 0.95
    """Decay of the squared gradient's running mean (AdamW; `adafactor`'s moves with the step: 1 - step^-0.8)."""
    eps: Positive = 1e-8
    """Added to the denominator of the update (AdamW)."""
    weight_decay: NotNegative = 0.01
    """Decoupled decay of matrices per step, times the learning rate."""
    momentum: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.95
    """For `muon`: decay of the running gradient (Nesterov)."""


class ScheduleSpec(Spec, frozen=True, kw_only=True):
    kind: Literal["constant", "cosine", "wsd"] = "cosine"
    """Course of the learning rate after the warm-up: level, falling along a cosine, or level and then
    falling linearly over the last `decay_share` (warm-up, stable, decay)."""
    warmup_share: Share = 0.1
    """Share of the run's tokens over which the rate rises linearly from zero."""
    final_share: Share = 0.1
    """Rate at the end, as a share of the peak (cosine, wsd)."""
    decay_share: Share = 0.2
    """For `wsd`: share of the run's tokens over which the rate falls at the end."""


class LoraSpec(Spec, frozen=True, kw_only=True):
    """Low-rank adapters; the rest of the model stays as it is. The published model has them merged in."""

    rank: Count = 16
    """Inner size of an adapter."""
    alpha: Positive = 32.0
    """An adapter's output is multiplied by alpha / rank."""
    targets: tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Which projections of every layer get one."""


class SpikeGuardSpec(Spec, frozen=True, kw_only=True):
    """What happens when a step's loss is not finite or far above what it was."""

    spike_factor: Annotated[float, Meta(ge=0.0)] = 3.0
    """A loss of more than so many times the median of the last `window` steps counts as a spike, if it lies at
    least half a nat above it, too. 0: only a loss or gradient that is not finite counts."""
    window: Annotated[int, Meta(ge=4)] = 32
    """Steps that the median is taken over; there is no spike before so many are done."""
    rollbacks: CountOrZero = 2
    """How often the run goes back to its last checkpoint and leaves out the batch of the bad step. Then it fails."""


class EarlyStopSpec(Spec, frozen=True, kw_only=True):
    """The loss on held-out text that training never sees, and when it ends the run."""

    every_steps: CountOrZero = 0
    """Measure so often (and after the last step); 0: never. The best measured state is published."""
    sequences: Count = 16
    """Held-out sequences that are measured."""
    patience: CountOrZero = 0
    """End after so many measurements without a better one; 0: never end early."""
    min_improvement: NotNegative = 0.0
    """A loss counts as better when it is lower by more than this, in nats a token."""


class Recipe(Spec, frozen=True, kw_only=True):
    """Everything that fixes a training run except its data: the same recipe runs on either twin."""

    start: str = "generator"
    """`generator`: continue from the current generator; `scratch`: random weights of `preset`; else a model folder."""
    preset: str | None = None
    """Shape of a from-scratch model: nano, 125m, 350m, 500m, 1b, 3b."""
    tokenizer: Literal["base", "corpus"] = "base"
    """For `start: scratch`: the base model's tokenizer, or an own one trained on the domain's documents."""
    vocabulary: Annotated[int, Meta(ge=512, le=262144)] = 32768
    """For `tokenizer: corpus`: how many tokens it may have."""
    method: Literal["auto", "pretrain", "continued", "sft"] = "auto"
    """`pretrain` (needs `start: scratch`) and `continued`: rows of the domain's `mix`; `sft`: rows of samples
    only, of which the answers are learnt. `auto`: pretrain from scratch, else continued."""
    update: Literal["full", "lora"] = "full"
    """Train all weights, or adapters beside frozen ones."""
    lora: LoraSpec = LoraSpec()
    """For `update: lora`."""
    sequence_tokens: Annotated[int, Meta(ge=8)] = 256
    """Length of a training sequence, in tokens."""
    batch_sequences: Count = 8
    """Sequences of one optimizer step, over all ranks and micro-batches."""
    micro_batch_sequences: Count = 8
    """Sequences computed at once on one rank; must divide batch_sequences. Smaller needs less memory."""
    recompute_activations: bool = False
    """Keep only each layer's input and compute the rest again in the backward pass: far less memory, a third
    more arithmetic."""
    steps: Count = 30
    """Optimizer steps of one cycle."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """How weights are updated."""
    schedule: ScheduleSpec = ScheduleSpec()
    """How the learning rate moves."""
    max_grad_norm: Positive = 1.0
    """A gradient with a larger L2 norm is scaled down to this."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of matrix products; master weights and optimizer state stay float32."""
    spike_guard: SpikeGuardSpec = SpikeGuardSpec()
    """What happens after a bad step."""
    early_stop: EarlyStopSpec = EarlyStopSpec()
    """Held-out loss during training."""
    checkpoint_every_steps: Count = 10
    """A killed run loses less than twice this many steps: checkpoints are written beside the training."""
    keep_checkpoints: Count = 2
    """How many of a run's checkpoints stay on disk."""
    keep_every_steps: CountOrZero = 0
    """Checkpoints of multiples of this stay until the run is done, besides the newest; 0: none."""
    seed: Seed = 0
    """Start of all random choices of the domain: split, data order, sampling."""


class HostSpec(Spec, frozen=True, kw_only=True):
    """One machine of a group, as the machine that leads the group sees it. Ranks are numbered in order of hosts."""

    name: str
    ssh: str
    """Name in the group's `ssh_config`; empty for the leading machine itself."""
    ranks: Count
    runner: tuple[str, ...]
    """How the node runner is started there: (python, file)."""
    python: str
    """The ranks' interpreter there."""
    run_folder: str
    """The run's folder there."""
    addresses: tuple[str, ...]
    """Addresses for the ranks' own connections; several: several links (ring)."""
    rdma: tuple[str | tuple[str, ...] | None, ...] = ()
    """jaccl: RDMA device(s) towards each host in order, None towards itself."""
    env: dict[str, str] = {}
    """Further environment of the ranks there (where their code lies)."""
    micro_batch_sequences: CountOrZero = 0
    """Sequences computed at once on a rank there, where memory asks for another number than the recipe's (0)."""


class RoundSpec(Spec, frozen=True, kw_only=True):
    """How islands (groups that train apart) are merged: rounds of DiLoCo, carried as files by a hub."""

    round_s: Positive = 600.0
    """An island stops at the first step boundary after so long and contributes what it has learnt."""
    max_steps: CountOrZero = 0
    """An island contributes after so many steps of its own although the round's time is not over; 0: no limit."""
    quorum: Count = 1
    """So many contributions must be there before a round is merged."""
    grace_s: NotNegative = 60.0
    """So long after `round_s` the hub no longer waits for islands that have not contributed, if the quorum is there. It
    merges earlier as soon as every island that is alive and has data lent has contributed."""
    payload: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """How contributions travel, and bases; int8 in blocks of 256 with a scale each (bases then go as bfloat16)."""
    outer_learning_rate: Positive | None = None
    """Of the outer Nesterov step; left out: 0.4, 0.6, 0.6, 0.8 for 1, 2, 4, 8 islands (Scaling Laws for DiLoCo)."""
    outer_momentum: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.9
    """Of the outer Nesterov step."""
    max_unsynced_rounds: Count = 2
    """Rounds that an island goes on by itself when it hears nothing of the hub; then it waits."""
    clip_norm_factor: Annotated[float, Meta(ge=1.0)] = 3.0
    """A contribution whose norm, divided by steps**0.75, exceeds the median of all islands (of two: the lower) more
    than so many times is refused and its data goes back; one above the median is scaled down to it."""


class LaunchSpec(Spec, frozen=True, kw_only=True):
    """How the ranks of a training group are started."""

    twin: Twin
    ranks: Count = 1
    """Over all hosts."""
    launcher: Literal["in_process", "torchrun", "mlx.launch", "direct"] = "in_process"
    threads_per_rank: CountOrZero = 0
    """CPU threads of one rank; 0 leaves the choice to the framework."""
    backend: Literal["ring", "jaccl", "jaccl-ring", "gloo", "nccl", ""] = ""
    """How the ranks talk; empty: ring or gloo on this machine."""
    hosts: tuple[HostSpec, ...] = ()
    """The machines, the leading one first; empty: this machine alone."""
    ssh_config: str = ""
    """The leading machine's file that says how the others are reached."""
    restarts_per_hour: CountOrZero = 5
    """How often the ranks may be started again within an hour."""
    host_lost_after_s: Positive = 75.0
    """A host that could not be reached for so long is left out, if others remain."""
    sharding: Sharding = "none"
    """`none`: every rank holds everything; `zero1`: the optimizer's state is divided among the ranks; `fsdp`:
    weights and gradients, too (torch, and MLX on jaccl)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile: `auto` where a compiler is found and the run is long enough to earn its start-up."""
    micro_batch_sequences: CountOrZero = 0
    """Without `hosts`: sequences that a rank of this machine computes at once; 0: the recipe's number."""

    islands: tuple[IslandSpec, ...] = ()
    """Groups that train apart under a hub; then the worker of the order is the hub and trains nothing itself."""
    rounds: RoundSpec = RoundSpec()
    """For islands."""


class IslandSpec(Spec, frozen=True, kw_only=True):
    """One group of machines that trains by itself between two merges."""

    name: Name
    launch: LaunchSpec
    """How it trains, as its own leading machine sees it; holds no islands."""
    leader: HostSpec | None = None
    """Its leading machine as the hub's machine sees it (`ranks` means nothing here, `run_folder` is the island's
    own: runs/<run>.<island>); None: the hub's machine itself."""


class EvaluationSpec(Spec, frozen=True, kw_only=True):
    """What is held out, and how much of it a candidate and its incumbent are measured on."""

    vault_share: Annotated[float, Meta(gt=0.0, lt=0.5)] = 0.10
    """Share of the text that is held out: never trained upon, only measured with."""
    slices: Count = 6
    """Vault slices; each look at a new candidate uses the next one."""
    windows: Count = 90
    """Vault text windows scored for bits per byte at one look (at most what the slice holds)."""
    window_bytes: Annotated[int, Meta(ge=200)] = 1200
    """Length of a scored window, in bytes."""
    context_bytes: CountOrZero = 300
    """Bytes before each window that are shown but not scored."""
    mcq_known: CountOrZero = 150
    """K-items per look: facts from train documents (did it learn?)."""
    mcq_vault: CountOrZero = 100
    """V-items per look: facts from vault documents (does it generalise?)."""
    fitness_chunks: CountOrZero = 32
    """Vault chunks on which both models generate a sample; the filter chain says which are usable."""


class GateSpec(Spec, frozen=True, kw_only=True):
    """When a candidate replaces the generator."""

    primary: Literal["vault_bpb", "mcq_known", "mcq_vault"] = "mcq_known"
    """What the candidate must be better at; the other measures are guards: it may not be worse."""
    alpha: Annotated[float, Meta(gt=0.0, lt=0.5)] = 0.05
    """Chance that an incumbent is ever replaced by a candidate that is no better, over all looks."""
    min_effect: Margin = 0.0
    """The lower confidence bound of the improvement must exceed this."""
    margin_vault_bpb: NotNegative = 0.01
    """As a guard: bits per byte may be worse by no more than this share of the incumbent's."""
    margin_mcq: Margin = 0.08
    """As a guard: accuracy may be lower by no more than this."""
    margin_yield: Margin = 0.25
    """As a guard: the share of usable generated samples may be lower by no more than this."""
    min_windows: Count = 40
    """No decision on fewer windows than this."""
    min_items: Count = 60
    """No decision on fewer questions of a kind than this."""
    min_documents: Count = 20
    """No decision unless the units come from at least this many independent documents."""
