"""From the state of a cycle to the order of its next stage. Pure: state and settings in, order out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jupiter_engine.errors import StateError
from jupiter_engine.protocol.orders import (
    AnyOrder,
    CollectOrder,
    EvaluateOrder,
    FilterOrder,
    GateOrder,
    GenerateOrder,
    HeldOutText,
    ModelRef,
    OwnTokenizer,
    PrepareOrder,
    QueueOrder,
    TrainOrder,
)
from jupiter_engine.protocol.shapes import PRESETS
from jupiter_engine.protocol.specs import LaunchSpec, Recipe
from jupiter_engine.protocol.state import CycleState, State
from jupiter_engine.settings.domain import DomainSettings


class Places:
    """Where things lie in a workspace."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / ".jupiter"

    def run(self, run: str) -> Path:
        return self.home / "runs" / run

    def model(self, name: str) -> Path:
        return self.home / "models" / name

    def snapshot(self, cycle: str) -> Path:
        return self.home / "corpus" / cycle

    @property
    def scores(self) -> Path:
        return self.home / "scores"


def run_name(cycle: str, stage: str) -> str:
    return f"{cycle}-{stage}"


def base_name(settings: DomainSettings) -> str:
    """Name of the domain's base generator, also of its model folder."""
    if settings.base in ("smollm2", "nano"):
        return {"smollm2": "smollm2-135m-instruct", "nano": "nano"}[settings.base]
    return "base-" + Path(settings.base).name.lower()


def incumbent(state: State, cycle: CycleState) -> ModelRef:
    generator = state.active_generator(cycle.domain)
    if generator is None:
        raise StateError(f"domain {cycle.domain} has no generator", fix="run the cycle's prepare stage again")
    return generator.model


def start_of_training(state: State, cycle: CycleState) -> ModelRef:
    """Where training begins: the last candidate if it was undecided against today's generator, else the generator.

    A candidate that was neither better nor worse only needs more training; one that was
    shown to be worse, or that a person refused, is left behind.
    """
    generator = incumbent(state, cycle)
    earlier = [c for c in state.cycles.values() if c.domain == cycle.domain and c.number < cycle.number]
    if not earlier:
        return generator
    last = earlier[-1]
    undecided = last.decision is not None and last.decision.verdict in ("inconclusive", "not_enough_data")
    if undecided and last.outcome == "kept" and last.answered_by == "gate" and last.decision is not None:
        candidate = candidate_of(last)
        if last.decision.incumbent_sha256 == generator.sha256 and candidate is not None:
            return candidate
    return generator


def candidate_of(cycle: CycleState) -> ModelRef | None:
    result = cycle.stages["train"].result
    return ModelRef(**result["model"]) if result else None


def look_number(state: State, cycle: CycleState) -> int:
    """The coming look is the k-th against today's generator (k from 1)."""
    generator = state.active_generator(cycle.domain)
    return 1 + (generator.looks if generator is not None else 0)


def seed_of(cycle: CycleState, settings: DomainSettings) -> int:
    """Every cycle draws anew, and the same cycle always the same."""
    return settings.training.seed * 1_000_003 + cycle.number


def method_of(recipe: Recipe) -> Literal["pretrain", "continued", "sft"]:
    """What `auto` means: pre-training from scratch, else continued pre-training."""
    if recipe.method == "auto":
        return "pretrain" if recipe.start == "scratch" else "continued"
    return recipe.method


class OrderWriter:
    """Writes the order of each worker stage of one cycle."""

    def __init__(
        self, state: State, cycle: CycleState, settings: DomainSettings, launch: LaunchSpec, places: Places
    ) -> None:
        self.state = state
        self.cycle = cycle
        self.settings = settings
        self.launch = launch
        self.places = places
        self.seed = seed_of(cycle, settings)

    def write(self, stage: str) -> AnyOrder:
        """The complete order of `stage`; StateError if a stage that it builds on has no result."""
        writers: dict[str, Callable[[dict[str, Any]], AnyOrder]] = {
            "prepare": self._prepare,
            "collect": self._collect,
            "generate": self._generate,
            "filter": self._filter,
            "queue": self._queue,
            "train": self._train,
            "evaluate": self._evaluate,
            "gate": self._gate,
        }
        who = {"run": run_name(self.cycle.id, stage), "domain": self.cycle.domain, "cycle": self.cycle.number}
        return writers[stage](who)

    def _result(self, stage: str, key: str) -> str:
        try:
            return str(self.cycle.stages[stage].result[key])
        except KeyError:
            raise StateError(f"cycle {self.cycle.id}: stage {stage} has no {key}", fix="start a new cycle") from None

    def _candidate(self) -> ModelRef:
        candidate = candidate_of(self.cycle)
        if candidate is None:
            raise StateError(f"cycle {self.cycle.id} has no trained model", fix="start a new cycle")
        return candidate

    def _prepare(self, who: dict[str, Any]) -> PrepareOrder:
        target = str(self.places.model(base_name(self.settings)))
        match self.settings.base:
            case "smollm2":
                return PrepareOrder(**who, kind="smollm2", target=target)
            case "nano":
                return PrepareOrder(**who, kind="nano", target=target)
            case folder:
                return PrepareOrder(**who, kind="folder", source=folder, target=target)

    def _collect(self, who: dict[str, Any]) -> CollectOrder:
        return CollectOrder(
            **who,
            sources=self.settings.sources,
            keywords=self.settings.domain.keywords,
            negative_keywords=self.settings.domain.negative_keywords,
            chunk=self.settings.chunk,
            evaluation=self.settings.evaluation,
            previous=_previous_collection(self.state, self.cycle, self.places),
            # The split must not move between cycles, so every cycle of a domain uses one seed.
            seed=self.settings.training.seed,
        )

    def _generate(self, who: dict[str, Any]) -> GenerateOrder:
        return GenerateOrder(
            **who,
            generation=self.settings.generation,
            generator=incumbent(self.state, self.cycle),
            chunks=self._result("collect", "chunks_path"),
            twin=self.launch.twin,
            threads=self.launch.threads_per_rank,
            seed=self.seed,
        )

    def _filter(self, who: dict[str, Any]) -> FilterOrder:
        earlier = (
            c.stages["generate"].result.get("samples_path")
            for c in self.state.cycles.values()
            if c.domain == self.cycle.domain and c.number < self.cycle.number
        )
        return FilterOrder(
            **who,
            filter=self.settings.filters,
            samples=self._result("generate", "samples_path"),
            chunks=self._result("collect", "chunks_path"),
            items=self._result("collect", "items_path"),
            earlier_samples=tuple(path for path in earlier if path),
        )

    def _queue(self, who: dict[str, Any]) -> QueueOrder:
        recipe = self.settings.training
        run = self.places.run(str(who["run"]))
        start = self._start()
        own = None
        if start is None and recipe.tokenizer == "corpus":
            assert recipe.preset is not None, "settings refuse `start: scratch` without a preset"
            own = OwnTokenizer(
                vocabulary=recipe.vocabulary,
                context=PRESETS[recipe.preset].shape.context,
                target=str(run / "tokenizer"),
            )
        return QueueOrder(
            **who,
            mix=self.settings.mix,
            # What is trained reads the snapshot with its own tokenizer, which need not be today's generator's.
            tokenizer=(incumbent(self.state, self.cycle) if start is None else start).folder,
            own_tokenizer=own,
            method=method_of(recipe),
            held_out=self._held_out(),
            chunks=self._result("collect", "chunks_path"),
            accepted=str(run / "accepted.jsonl"),
            sources=self.settings.sources,
            target=str(self.places.snapshot(self.cycle.id)),
            sequence_tokens=recipe.sequence_tokens,
            sequences=recipe.steps * recipe.batch_sequences,
            seed=self.seed,
        )

    def _held_out(self) -> HeldOutText | None:
        """Text for the held-out loss, from the slice behind the coming look's.

        The best checkpoint is chosen by this text; the gate must not judge it on the same, so its slice is left
        out. Looks go round the slices: the slice behind comes up again last.
        """
        early_stop = self.settings.training.early_stop
        if not early_stop.every_steps:
            return None
        slices = self.settings.evaluation.slices
        return HeldOutText(sequences=early_stop.sequences, slice=(self._slice() - 1) % slices)

    def _start(self) -> ModelRef | None:
        """The model that training begins with; None: from scratch."""
        recipe = self.settings.training
        if recipe.start == "generator":
            return start_of_training(self.state, self.cycle)
        if recipe.start == "scratch":
            return None
        # Its hash is not known here; the worker verifies the folder before it builds anything.
        return ModelRef(name=Path(recipe.start).name, folder=recipe.start, sha256="")

    def _train(self, who: dict[str, Any]) -> TrainOrder:
        recipe = self.settings.training
        start = self._start()
        tokenizer = None
        if start is None:
            own = recipe.tokenizer == "corpus"
            tokenizer = self._result("queue", "tokenizer") if own else incumbent(self.state, self.cycle).folder
        return TrainOrder(
            **who,
            recipe=recipe,
            launch=self.launch,
            snapshot=self._result("queue", "snapshot"),
            start=start,
            tokenizer=tokenizer,
            target=str(self.places.model(self.cycle.id)),
        )

    def _evaluate(self, who: dict[str, Any]) -> EvaluateOrder:
        return EvaluateOrder(
            **who,
            evaluation=self.settings.evaluation,
            filter=self.settings.filters,
            generation=self.settings.generation,
            models=(incumbent(self.state, self.cycle), self._candidate()),
            chunks=self._result("collect", "chunks_path"),
            items=self._result("collect", "items_path"),
            slice=self._slice(),
            cache=str(self.places.scores),
            twin=self.launch.twin,
            threads=self.launch.threads_per_rank,
            seed=self.settings.training.seed,
        )

    def _slice(self) -> int:
        return (look_number(self.state, self.cycle) - 1) % self.settings.evaluation.slices

    def _gate(self, who: dict[str, Any]) -> GateOrder:
        return GateOrder(
            **who,
            gate=self.settings.gate,
            candidate=self._candidate(),
            incumbent=incumbent(self.state, self.cycle),
            scores=self._result("evaluate", "scores_path"),
            items=self._result("collect", "items_path"),
            look=look_number(self.state, self.cycle),
            slice=self._slice(),
            seed=self.settings.training.seed,
        )


def _previous_collection(state: State, cycle: CycleState, places: Places) -> str | None:
    """Run folder of the newest earlier collection of the domain that holds data of its own."""
    for other in reversed(list(state.cycles.values())):
        stage = other.stages["collect"]
        if other.domain == cycle.domain and other.number < cycle.number and stage.status == "done":
            chunks_path = stage.result.get("chunks_path")
            # A reused collection points into the folder that really holds the rows.
            return str(Path(chunks_path).parent.parent) if chunks_path else str(places.run(stage.run))
    return None
