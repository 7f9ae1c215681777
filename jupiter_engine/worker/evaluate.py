"""Stage evaluate: measure every model of the order on the same units, reusing whatever was measured before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar, cast

import numpy as np

from jupiter_engine.backends import load_generator, load_scorer
from jupiter_engine.backends.contract import Dtype, GenerateRequest
from jupiter_engine.checkpoints.model_folder import ModelInfo, folder_sha256, verify
from jupiter_engine.errors import ModelInvalid
from jupiter_engine.protocol.orders import EvaluateOrder, ModelRef
from jupiter_engine.protocol.rows import Chunk, Item, Score
from jupiter_engine.training.evaluation import fitness, mcq
from jupiter_engine.training.evaluation.evidence import TASKS, Task
from jupiter_engine.training.evaluation.fitness import Assignment
from jupiter_engine.training.evaluation.score_cache import CachedScore, ScoreCache
from jupiter_engine.training.evaluation.scoring import Codec, Continuation, log_likelihoods
from jupiter_engine.training.evaluation.statistics import bits_per_byte
from jupiter_engine.training.evaluation.units import Unit, units_of_look
from jupiter_engine.training.evaluation.windows import Window
from jupiter_engine.training.model.text import TextCodec
from jupiter_engine.worker.context import RunContext, read_rows

DTYPE: Dtype = "bfloat16"
"""Precision of evaluation on either twin; part of every cached score's key."""
BATCH_UNITS = 16
"""Units scored between two safe points; at the end of each the rows are on disk."""

_T = TypeVar("_T")

_TITLES: dict[Task, str] = {
    "vault_bpb": "unseen text",
    "mcq_known": "questions on known documents",
    "mcq_vault": "questions on unseen documents",
    "yield": "fitness as a generator",
}


def run(context: RunContext, order: EvaluateOrder) -> None:
    """Score all models; rows of an earlier attempt are kept, finished units come from the cache."""
    units = units_of_look(
        read_rows(Path(order.chunks), Chunk),
        read_rows(Path(order.items), Item),
        order.evaluation,
        order.generation,
        order.filter,
        slice_number=order.slice,
        seed=order.seed,
        arithmetic=f"{order.twin} {DTYPE}",
    )
    models = list({model.sha256: model for model in order.models}.values())
    journal = _Journal(context, units, models)
    for model in models:
        _Evaluation(context, order, model, journal).run(units)
    scores = journal.finished()
    context.finish(
        {
            "scores_path": str(context.results("scores")),
            "summary": {model.name: summary(scores, model.sha256) for model in order.models},
            "units": {task: sum(unit.task == task for unit in units) for task in TASKS},
            "cached": journal.cached,
        }
    )


def summary(scores: Iterable[Score], model_sha256: str) -> dict[str, float]:
    """Of each measured task: bits per byte over all windows, or the share of ones."""
    found: dict[str, list[Score]] = {}
    for score in scores:
        if score.model_sha256 == model_sha256:
            found.setdefault(score.task, []).append(score)
    levels: dict[str, float] = {}
    for task, rows in found.items():
        values = np.array([row.value for row in rows])
        weights = np.array([row.weight for row in rows])
        levels[task] = bits_per_byte(values, weights) if task == "vault_bpb" else float(values.mean())
    return levels


class _Journal:
    """Rows and progress over all models and tasks; knows what an earlier attempt already wrote."""

    def __init__(self, context: RunContext, units: Sequence[Unit], models: Sequence[ModelRef]) -> None:
        self._context = context
        self._efforts = {_key(model, unit): unit.effort for model in models for unit in units}
        rows = [row for row in context.existing(Score) if _place(row) in self._efforts]
        self._rows = {_place(row): row for row in rows}
        self.cached = 0

    def missing(self, model: ModelRef, units: Sequence[Unit]) -> list[Unit]:
        return [unit for unit in units if _key(model, unit) not in self._rows]

    def add(self, model: ModelRef, scored: Sequence[tuple[Unit, CachedScore]]) -> None:
        rows = [
            Score(
                id=f"{model.sha256[:16]}:{unit.task}:{unit.id}",
                model=model.name,
                model_sha256=model.sha256,
                task=unit.task,
                unit=unit.id,
                document=unit.document,
                cluster=unit.cluster,
                value=score.value,
                weight=unit.weight,
                answer=score.answer,
            )
            for unit, score in scored
        ]
        self._context.records(rows)
        self._rows.update((_place(row), row) for row in rows)
        if rows:
            self._progress(f"{model.name}: {_TITLES[rows[-1].task]}")

    def finished(self) -> list[Score]:
        return list(self._rows.values())

    def _progress(self, note: str) -> None:
        """Effort, not units: a written sample takes as long as dozens of questions, and an ETA must know that."""
        total = sum(self._efforts.values())
        done = sum(self._efforts[place] for place in self._rows)
        percent = 100.0 if len(self._rows) == len(self._efforts) else min(99.9, 100.0 * done / total)
        self._context.progress(percent, 100.0, "percent", f"{note}, {len(self._rows)} of {len(self._efforts)} units")


def _key(model: ModelRef, unit: Unit) -> tuple[str, str, str]:
    return (model.sha256, unit.task, unit.id)


def _place(row: Score) -> tuple[str, str, str]:
    return (row.model_sha256, row.task, row.unit)


class _Evaluation:
    """One model over all units. Loads the model only if some unit was never measured before."""

    def __init__(self, context: RunContext, order: EvaluateOrder, model: ModelRef, journal: _Journal) -> None:
        self._context = context
        self._order = order
        self._model = model
        self._journal = journal
        self._folder = Path(model.folder)

    def run(self, units: Sequence[Unit]) -> None:
        missing = self._journal.missing(self._model, units)
        if not missing:
            return
        self._cache = ScoreCache(Path(self._order.cache), self._model.sha256)
        known = [(unit, score) for unit in missing if (score := self._cache.get(unit.key)) is not None]
        self._journal.add(self._model, known)
        self._journal.cached += len(known)
        missing = self._journal.missing(self._model, missing)
        if not missing:
            return
        self._context.check_halt()
        info = self._verified()
        codec: Codec = TextCodec(self._folder)
        texts = [unit for unit in missing if unit.task != "yield"]
        if texts:
            self._score_texts(texts, codec, info)
        samples = [unit for unit in missing if unit.task == "yield"]
        if samples:
            self._write_samples(samples, codec, info)

    def _verified(self) -> ModelInfo:
        """The folder is whole and is the very model that the order names: its scores will be kept under that hash."""
        info = verify(self._folder)
        actual = folder_sha256(self._folder)
        if actual != self._model.sha256:
            raise ModelInvalid(
                f"{self._folder} holds {actual[:12]}, the order names {self._model.name} as {self._model.sha256[:12]}",
                fix="the model folder was changed after it was registered; restore it or register it anew",
            )
        return info

    def _keep(self, scored: Sequence[tuple[Unit, float, str]]) -> None:
        """Cache first, then the run's rows: whatever a kill leaves between the two is found again in the cache."""
        finished = [(unit, CachedScore(key=unit.key, value=value, answer=answer)) for unit, value, answer in scored]
        self._cache.add(score for _, score in finished)
        self._journal.add(self._model, finished)
        self._context.check_halt()

    # -- likelihoods -------------------------------------------------------------------------------
    def _score_texts(self, units: Sequence[Unit], codec: Codec, info: ModelInfo) -> None:
        scorer = load_scorer(self._order.twin, self._folder, dtype=DTYPE, threads=self._order.threads)

        def likelihoods(continuations: Sequence[Continuation]) -> list[float]:
            return log_likelihoods(continuations, codec, scorer, context=info.context, model=self._model.name)

        for task in TASKS:
            for batch in _batches([unit for unit in units if unit.task == task], BATCH_UNITS):
                self._keep(_windows(batch, likelihoods) if task == "vault_bpb" else _questions(batch, likelihoods))

    # -- samples -----------------------------------------------------------------------------------
    def _write_samples(self, units: Sequence[Unit], codec: Codec, info: ModelInfo) -> None:
        generation = self._order.generation
        asked: list[tuple[Unit, Assignment, GenerateRequest]] = []
        for unit in units:
            passage = cast("Assignment", unit.subject)
            prompt = fitness.prompt(passage, generation, codec)
            if len(prompt) >= info.context:
                # As a generator it could not even read the passage: that is a measurement, not a failure.
                self._keep([(unit, 0.0, "[the request does not fit the model's context]")])
                continue
            request = GenerateRequest(prompt=prompt, seed=passage.seed, max_new_tokens=generation.max_new_tokens)
            asked.append((unit, passage, request))
        if not asked:
            return
        generator = load_generator(self._order.twin, self._folder, dtype=DTYPE, threads=self._order.threads)
        completions = generator.generate(
            [request for _, _, request in asked],
            temperature=generation.temperature,
            top_p=generation.top_p,
            batch_size=generation.batch_size,
            stop_ids=list(codec.eos_ids),
        )
        for completion in completions:
            unit, passage, _ = asked[completion.index]
            value, answer = fitness.judge(
                passage,
                codec.decode(completion.tokens),
                finished=completion.finish == "stop",
                generation=generation,
                rules=self._order.filter,
            )
            self._keep([(unit, value, answer)])


_Likelihoods = Callable[[Sequence[Continuation]], list[float]]


def _windows(units: Sequence[Unit], likelihoods: _Likelihoods) -> list[tuple[Unit, float, str]]:
    windows = [cast("Window", unit.subject) for unit in units]
    nats = likelihoods([Continuation(window.context, window.text) for window in windows])
    return [(unit, -value, "") for unit, value in zip(units, nats, strict=True)]


def _questions(units: Sequence[Unit], likelihoods: _Likelihoods) -> list[tuple[Unit, float, str]]:
    items = [cast("Item", unit.subject) for unit in units]
    asked = [mcq.continuations(item) for item in items]
    flat = iter(likelihoods([continuation for options in asked for continuation in options]))
    scored: list[tuple[Unit, float, str]] = []
    for unit, item, options in zip(units, items, asked, strict=True):
        value, answer = mcq.answer(item, [next(flat) for _ in options])
        scored.append((unit, value, answer))
    return scored


def _batches(sequence: Sequence[_T], size: int) -> Iterable[Sequence[_T]]:
    return (sequence[start : start + size] for start in range(0, len(sequence), size))
