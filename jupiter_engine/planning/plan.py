"""The whole plan of a training: what fits where, how long it takes, what it costs, and what would work instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from jupiter_engine.planning.budget import Device
from jupiter_engine.planning.islands import loss_penalty, round_cost
from jupiter_engine.planning.memory import (
    DeviceKind,
    RankMemory,
    Sharding,
    checkpoint_bytes,
    rank_memory,
    rows_at_once,
    trained_shapes,
)
from jupiter_engine.planning.time import BYTES_PER_S, Calibration, Link, Speed, reduce_seconds, speed_of
from jupiter_engine.protocol.shapes import PRESETS, Shape, parameter_count, weight_bytes
from jupiter_engine.protocol.specs import Recipe, RoundSpec, Twin
from jupiter_engine.units import bytes_text, count_text

TOKENS_PER_PARAMETER: Final = 20
"""From scratch, compute-optimal (Hoffmann et al. 2022)."""
MOST_EPOCHS: Final = 4.0
"""Repeating text is about as good as new text up to here (Muennighoff et al. 2023)."""
SMALL_ISLAND: Final = 0.05
"""An island with a smaller share of the tokens is hardly worth its merges."""
_DAY: Final = 86400.0


# -- one run of a worker (what `worker.train` checks before it starts) ----------------------------------
class TrainingPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All sizes in bytes; memory is that of one rank."""

    parameters: int
    parts: RankMemory
    checkpoint: int
    """One checkpoint on disk: float32 weights and moments of what is trained."""
    checkpoints: int
    """Most that lie on disk at once: those kept and the one being written."""
    target: int
    """The published model's weights."""
    input_tokens: int
    """steps x batch x sequence."""
    kind: DeviceKind
    """What the rank trains on."""

    @property
    def memory(self) -> int:
        """While training; `writing` comes on top while a checkpoint is written."""
        return self.parts.total

    @property
    def writing(self) -> int:
        """Copy of the state that is written beside the training (rank 0; left out where memory is short)."""
        return self.parts.writing

    def host_memory(self, ranks: int = 1) -> int:
        """Of the memory of a machine with `ranks` of the ranks.

        All of it, except on cards: there only the first rank's start weights and copy of the state pass through.
        """
        if self.kind != "cuda":
            return ranks * self.memory
        return 4 * self.parameters + self.writing + ranks * self.parts.runtime

    @property
    def disk(self) -> int:
        return self.checkpoints + self.target


def plan_training(
    shape: Shape,
    recipe: Recipe,
    ranks: int = 1,
    *,
    twin: Twin = "torch",
    kind: DeviceKind = "cpu",
    sharding: Sharding = "none",
    micro_batch: int = 0,
) -> TrainingPlan:
    """Sizes of a run of `recipe` on a model of `shape` by `ranks` data-parallel ranks.

    `micro_batch`: sequences at once on the rank that is told about, where it is not the recipe's number.
    """
    checkpoint = checkpoint_bytes(shape, recipe)
    kept = min(recipe.keep_checkpoints, (recipe.steps - 1) // recipe.checkpoint_every_steps) + 1
    if recipe.early_stop.every_steps:
        # Each new best state is stored, whatever the step, and stays beside the newest ones.
        kept = recipe.keep_checkpoints + 2
    if recipe.keep_every_steps:
        kept += recipe.steps // recipe.keep_every_steps
    return TrainingPlan(
        parameters=parameter_count(shape),
        parts=rank_memory(
            shape, recipe, twin=twin, device=kind, ranks=ranks, sharding=sharding, micro_batch=micro_batch
        ),
        checkpoint=checkpoint,
        checkpoints=kept * checkpoint,
        target=weight_bytes(shape, recipe.compute_dtype),
        input_tokens=recipe.steps * recipe.batch_sequences * recipe.sequence_tokens,
        kind=kind,
    )


# -- the question --------------------------------------------------------------------------------------
class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One node of the training."""

    device: Device
    ranks: int = 1
    link: Link = "machine"
    """How it reaches the others."""
    island: str = ""
    """The group it trains in where there are several under a hub; empty: there is one group."""
    micro_batch: int = 0
    """Sequences at once on a rank here; 0: the recipe's number."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of the planner."""

    shape: Shape
    recipe: Recipe
    members: tuple[Member, ...]
    sharding: Sharding = "none"
    rounds: RoundSpec | None = None
    """Set where islands are merged by a hub."""
    tokens: int | None = None
    """Input tokens of the whole training; None: the recipe's."""
    available: int | None = None
    """Distinct tokens of the domain, at least; None: not known yet."""
    calibrations: tuple[Calibration, ...] = ()

    @property
    def total_tokens(self) -> int:
        recipe = self.recipe
        return self.tokens or recipe.steps * recipe.batch_sequences * recipe.sequence_tokens


# -- the answer ----------------------------------------------------------------------------------------
class NodePlan(msgspec.Struct, frozen=True, kw_only=True):
    """One node's part."""

    node: str
    kind: DeviceKind
    twin: Twin
    device: str
    ranks: int
    memory: RankMemory
    """Of one rank."""
    needed: int
    """Of all ranks that share what `allowed` is about."""
    allowed: int | None
    why: str
    """How `allowed` was found."""
    fits: bool | None
    """None: it is not known what the node allows."""
    micro_batch: int
    """Sequences at once: the recipe's, fewer where the node's memory asks for it."""
    speed: Speed
    """Of all its ranks together."""
    adds: float
    """Share of the cluster's tokens that it computes."""
    without: float | None
    """Factor on the training's time without this node; None: nothing is left."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Another way to the model that is wanted."""

    name: str
    tokens: int
    memory: int
    """Of one rank on the node with the least room."""
    fits: bool | None
    days_low: float
    days_high: float


class Nearest(msgspec.Struct, frozen=True, kw_only=True):
    """The plan with the fewest changes that fits."""

    changes: tuple[str, ...]
    """Sentences, in the order in which they are made."""
    recipe: Recipe
    sharding: Sharding
    needed: int
    """Bytes of the rank that then comes nearest to its limit."""


class Outlook(msgspec.Struct, frozen=True, kw_only=True):
    """The planner's answer."""

    parameters: int
    trained: int
    """Values that are updated."""
    tokens: int
    nodes: tuple[NodePlan, ...]
    fits: bool | None
    """All nodes; None: at least one could not be judged and none is known not to fit."""
    refusal: str = ""
    """One sentence on why this cannot work; empty: it can, as far as is known."""
    nearest: Nearest | None = None
    tokens_per_s_low: float
    tokens_per_s_high: float
    source: str
    """Of the speeds: measured, scaled, table, unknown, mixed."""
    seconds_low: float | None
    seconds_high: float | None
    """None: a speed is unknown."""
    sync_share: float
    """Of the time that goes into gradients or merges travelling (middle of the speeds)."""
    energy_kwh_low: float | None
    energy_kwh_high: float | None
    """An estimate: watts of the table times hours."""
    islands: int
    penalty: float
    """Expected rise of the loss against one group (share)."""
    tokens_wanted: int
    """20 a parameter."""
    available: int | None
    epochs: float | None
    comparisons: tuple[Comparison, ...]
    checkpoint: int
    """Bytes of one."""
    warnings: tuple[str, ...] = ()

    @property
    def days(self) -> tuple[float, float] | None:
        if self.seconds_low is None or self.seconds_high is None:
            return None
        return self.seconds_low / _DAY, self.seconds_high / _DAY


def outlook(question: Question, *, compare: bool = True) -> Outlook:
    """Judge a training: memory of each node, time, energy, loss, and the nearest plan where this one does not fit."""
    ranks = sum(member.ranks for member in question.members)
    nodes = _nodes(question)
    verdicts = [node.fits for node in nodes]
    fits = False if False in verdicts else (None if None in verdicts else True)
    nearest = _nearest(question) if fits is False else None
    low, high, share = _rates(question, nodes)
    known = low > 0
    seconds = (question.total_tokens / high, question.total_tokens / low) if known else None
    watts = sum(node.speed.watts for node in nodes)
    islands = len({member.island for member in question.members})
    parameters = parameter_count(question.shape)
    sources = {node.speed.source for node in nodes}
    epochs = question.total_tokens / question.available if question.available else None
    return Outlook(
        parameters=parameters,
        trained=_trained(question),
        tokens=question.total_tokens,
        nodes=nodes,
        fits=fits,
        refusal=_refusal(question, nodes) if fits is False else "",
        nearest=nearest,
        tokens_per_s_low=low,
        tokens_per_s_high=high,
        source=sources.pop() if len(sources) == 1 else "mixed",
        seconds_low=seconds[0] if seconds else None,
        seconds_high=seconds[1] if seconds else None,
        sync_share=share,
        energy_kwh_low=watts * seconds[0] / 3.6e6 if seconds else None,
        energy_kwh_high=watts * seconds[1] / 3.6e6 if seconds else None,
        islands=islands,
        penalty=loss_penalty(parameters, islands) if question.rounds is not None else 0.0,
        tokens_wanted=TOKENS_PER_PARAMETER * parameters,
        available=question.available,
        epochs=epochs,
        comparisons=_comparisons(question) if compare else (),
        checkpoint=checkpoint_bytes(question.shape, question.recipe),
        warnings=tuple(_warnings(question, nodes, epochs, ranks)),
    )


def _trained(question: Question) -> int:
    return sum(math.prod(size) for size in trained_shapes(question.shape, question.recipe).values())


def _group_ranks(question: Question, member: Member) -> int:
    """Ranks that share the member's batch and state."""
    return sum(other.ranks for other in question.members if other.island == member.island)


def _memory(question: Question, member: Member) -> tuple[RankMemory, int]:
    """(one rank, all ranks on one pool)."""
    device = member.device
    one = rank_memory(
        question.shape,
        question.recipe,
        twin=device.twin,
        device=device.kind,
        ranks=_group_ranks(question, member),
        sharding=question.sharding,
        micro_batch=member.micro_batch,
    )
    return one, one.total * device.ranks_on_one_pool(member.ranks)


def _nodes(question: Question) -> tuple[NodePlan, ...]:
    drafts: list[NodePlan] = []
    for member in question.members:
        device = member.device
        rows = rows_at_once(question.recipe, _group_ranks(question, member), member.micro_batch)
        one, needed = _memory(question, member)
        speed = speed_of(
            device, question.shape, question.recipe, ranks=member.ranks, calibrations=question.calibrations
        )
        if member.ranks > 1:
            speed = replace(speed, low=speed.low * member.ranks, high=speed.high * member.ranks)
        drafts.append(
            NodePlan(
                node=device.node,
                kind=device.kind,
                twin=device.twin,
                device=device.name or "unknown",
                ranks=member.ranks,
                memory=one,
                needed=needed,
                allowed=device.allowed,
                why=device.why,
                fits=None if device.allowed is None else needed <= device.allowed,
                micro_batch=rows,
                speed=speed,
                adds=0.0,
                without=None,
            )
        )
    total = sum(draft.speed.middle for draft in drafts)
    if not total:
        return tuple(replace(draft, adds=1 / len(drafts)) for draft in drafts)
    return tuple(
        replace(
            draft,
            adds=draft.speed.middle / total,
            without=_without(question, tuple(drafts), index, draft.speed.middle),
        )
        for index, draft in enumerate(drafts)
    )


def _without(question: Question, nodes: tuple[NodePlan, ...], index: int, own: float) -> float | None:
    """How much longer the training takes when this node is left out."""
    if len(nodes) == 1 or own <= 0:
        return None if len(nodes) == 1 else 1.0
    rest = replace(question, members=question.members[:index] + question.members[index + 1 :])
    low, high, _ = _rates(question, nodes)
    low_rest, high_rest, _ = _rates(rest, nodes[:index] + nodes[index + 1 :])
    before, after = math.sqrt(low * high), math.sqrt(low_rest * high_rest)
    return before / after if after > 0 else None


def _rates(question: Question, nodes: Sequence[NodePlan]) -> tuple[float, float, float]:
    """(tokens a second of the cluster at the low and the high speeds, share of time spent on the wire at the middle).

    0 where a speed is unknown.
    """
    if not nodes or any(node.speed.source == "unknown" for node in nodes):
        return 0.0, 0.0, 0.0
    low, _ = _rate(question, [node.speed.low for node in nodes])
    high, _ = _rate(question, [node.speed.high for node in nodes])
    _, share = _rate(question, [node.speed.middle for node in nodes])
    return low, high, share


def _rate(question: Question, speeds: Sequence[float]) -> tuple[float, float]:
    """(tokens a second, share of time on the wire) where nodes compute at `speeds` and batches follow the speeds."""
    recipe = question.recipe
    batch = recipe.batch_sequences * recipe.sequence_tokens
    groups: dict[str, list[tuple[Member, float]]] = {}
    for member, speed in zip(question.members, speeds, strict=True):
        groups.setdefault(member.island, []).append((member, speed))
    total = waited = 0.0
    for members in groups.values():
        compute = batch / sum(speed for _, speed in members)
        ranks = sum(member.ranks for member, _ in members)
        slowest = min(BYTES_PER_S[member.link] for member, _ in members)
        wire = reduce_seconds(4.0 * _trained(question), ranks, slowest)
        rate = batch / (compute + wire)
        share = wire / (compute + wire)
        if question.rounds is not None:
            cost = round_cost(
                _trained(question),
                payload=question.rounds.payload,
                bytes_per_s=slowest if len(groups) > 1 else BYTES_PER_S["machine"],
                round_s=question.rounds.round_s,
            )
            share = 1 - (1 - share) * (1 - cost.share)
            rate *= 1 - cost.share
        total += rate
        waited += rate * share
    return total, waited / total


# -- what would fit ------------------------------------------------------------------------------------
_Change = Callable[[Question], Iterator[tuple[str, Question]]]


def _fits(question: Question) -> bool:
    return all(
        member.device.allowed is None or _memory(question, member)[1] <= member.device.allowed
        for member in question.members
    )


def _with(question: Question, text: str, **changes: object) -> tuple[str, Question]:
    return text, replace(question, recipe=replace(question.recipe, **changes))


def _recompute(question: Question) -> Iterator[tuple[str, Question]]:
    if not question.recipe.recompute_activations:
        text = "set training.recompute_activations: true (a third more arithmetic)"
        yield _with(question, text, recompute_activations=True)


def _smaller_micro_batch(question: Question) -> Iterator[tuple[str, Question]]:
    recipe = question.recipe
    for rows in range(recipe.micro_batch_sequences - 1, 0, -1):
        if recipe.batch_sequences % rows == 0:
            yield _with(question, f"set training.micro_batch_sequences: {rows}", micro_batch_sequences=rows)


def _smaller_optimizer(question: Question) -> Iterator[tuple[str, Question]]:
    recipe = question.recipe
    for name in ("adamw8bit", "muon"):
        if recipe.optimizer.name == "adamw":
            text = f"set training.optimizer.name: {name}"
            yield _with(question, text, optimizer=replace(recipe.optimizer, name=name))


def _shorter(question: Question) -> Iterator[tuple[str, Question]]:
    tokens = question.recipe.sequence_tokens
    while tokens > 256:
        tokens //= 2
        yield _with(question, f"set training.sequence_tokens: {tokens}", sequence_tokens=tokens)


def _zero1(question: Question) -> Iterator[tuple[str, Question]]:
    ranks = max(_group_ranks(question, member) for member in question.members)
    if question.sharding == "none" and ranks > 1:
        yield (
            f"divide the optimizer's state among the {ranks} ranks (sharding: zero1)",
            replace(question, sharding="zero1"),
        )


def _lora(question: Question) -> Iterator[tuple[str, Question]]:
    if question.recipe.update == "full" and question.recipe.start != "scratch":
        yield _with(question, "set training.update: lora (adapters beside the frozen model)", update="lora")


def _smaller_preset(question: Question) -> Iterator[tuple[str, Question]]:
    if question.recipe.start != "scratch":
        return
    size = parameter_count(question.shape)
    presets = sorted(PRESETS.values(), key=lambda preset: -parameter_count(preset.shape))
    for preset in presets:
        if parameter_count(preset.shape) < size:
            recipe = replace(question.recipe, preset=preset.name)
            yield f"set training.preset: {preset.name}", replace(question, shape=preset.shape, recipe=recipe)


_ORDER: Final[tuple[_Change, ...]] = (
    _recompute,
    _smaller_micro_batch,
    _smaller_optimizer,
    _shorter,
    _zero1,
    _lora,
    _smaller_preset,
)
_SAME_MODEL: Final = _ORDER[:5]
"""Changes after which the same model is trained."""


def _nearest(question: Question) -> Nearest | None:
    """One change if any single one is enough, the first in order; else changes added up in that order.

    Adapters and a smaller model come last: they are another model than the one that was asked for.
    """
    for change in _SAME_MODEL:
        for text, changed in change(question):
            if _fits(changed):
                return _answer((text,), changed)
    current = question
    texts: list[str] = []
    for change in _ORDER:
        last: tuple[str, Question] | None = None
        for text, changed in change(current):
            if _fits(changed):
                return _answer((*texts, text), changed)
            last = (text, changed)
        if last is not None and _most_needed(last[1]) < _most_needed(current):
            texts.append(last[0])
            current = last[1]
    return None


def _most_needed(question: Question) -> float:
    """The largest share of its limit that any node needs."""
    return max(
        _memory(question, member)[1] / member.device.allowed if member.device.allowed else math.inf
        for member in question.members
        if member.device.allowed is not None
    )


def _answer(texts: tuple[str, ...], question: Question) -> Nearest:
    needs = [_memory(question, member)[1] for member in question.members]
    return Nearest(changes=texts, recipe=question.recipe, sharding=question.sharding, needed=max(needs))


def _refusal(question: Question, nodes: Sequence[NodePlan]) -> str:
    short = [node for node in nodes if node.fits is False]
    worst = max(short, key=lambda node: node.needed / (node.allowed or 1))
    also = f" (and {len(short) - 1} more)" if len(short) > 1 else ""
    ranks = f" for {worst.ranks} ranks" if worst.ranks > 1 else ""
    return (
        f"training {count_text(parameter_count(question.shape))} parameters needs {bytes_text(worst.needed)} on "
        f"{worst.node}{ranks}, which allows {bytes_text(worst.allowed or 0)}{also}"
    )


# -- comparisons and warnings --------------------------------------------------------------------------
def _comparisons(question: Question) -> tuple[Comparison, ...]:
    """From scratch, continued and LoRA on the same machines."""
    parameters = parameter_count(question.shape)
    ways = (
        ("from scratch (20 tokens a parameter)", TOKENS_PER_PARAMETER * parameters, {"update": "full"}),
        ("continued, all weights", _more_tokens(question), {"update": "full"}),
        ("LoRA adapters", _more_tokens(question), {"update": "lora"}),
    )
    found = []
    for name, tokens, changes in ways:
        other = replace(question, recipe=replace(question.recipe, **changes), tokens=tokens)
        answer = outlook(other, compare=False)
        days = answer.days or (math.nan, math.nan)
        found.append(
            Comparison(
                name=name,
                tokens=tokens,
                memory=max(node.memory.total for node in answer.nodes),
                fits=answer.fits,
                days_low=days[0],
                days_high=days[1],
            )
        )
    return tuple(found)


def _more_tokens(question: Question) -> int:
    """What continued training is compared at: the tokens asked for, at most four passes over the domain's text."""
    most = int(MOST_EPOCHS * question.available) if question.available else question.total_tokens
    return min(question.total_tokens, most)


def _warnings(question: Question, nodes: Sequence[NodePlan], epochs: float | None, ranks: int) -> Iterator[str]:
    parameters = parameter_count(question.shape)
    wanted = TOKENS_PER_PARAMETER * parameters
    if question.recipe.start == "scratch" and question.total_tokens < wanted / 10:
        yield (
            f"{count_text(question.total_tokens)} tokens are few for {count_text(parameters)} weights from scratch: "
            f"{count_text(wanted)} are usual; continue from a trained model instead"
        )
    if epochs is not None and epochs > MOST_EPOCHS:
        yield (
            f"the text is read up to {epochs:.0f} times over; beyond {MOST_EPOCHS:.0f} times it teaches little: "
            "collect more, or train less"
        )
    for node in nodes:
        if node.fits is None:
            yield f"it is not known what {node.node} allows ({node.why}): whether the plan fits there is open"
        if node.speed.source == "unknown":
            yield f"nothing is known about the speed of {node.device} ({node.node}); `--calibrate` measures it"
        if question.rounds is not None and len(nodes) > 1 and node.adds < SMALL_ISLAND:
            yield (
                f"{node.node} adds {node.adds:.0%} of the tokens: hardly worth its merges; it may serve better "
                "at generating samples"
            )
        # A card's copy lies in the machine's memory.
        beside = node.memory.writing if node.kind != "cuda" and node is nodes[0] else 0
        if node.allowed and node.fits and node.needed + beside > node.allowed:
            yield (
                f"{node.node} has no room for a second copy of the state: training waits while a checkpoint is written"
            )
    if ranks > 1 and question.sharding == "fsdp" and any(node.twin == "mlx" for node in nodes):
        yield "fsdp with MLX needs jaccl (Thunderbolt 5); on the ring use zero1"
