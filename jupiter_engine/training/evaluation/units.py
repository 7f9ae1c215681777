"""Everything one look measures, as a flat list: the same units, in the same order, for every model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jupiter_engine.protocol.rows import Chunk, Item
from jupiter_engine.protocol.specs import EvaluationSpec, FilterSpec, GenerationSpec
from jupiter_engine.training.evaluation import mcq
from jupiter_engine.training.evaluation.evidence import Task
from jupiter_engine.training.evaluation.fitness import FITNESS_VERSION, Assignment, assignments, request_text
from jupiter_engine.training.evaluation.score_cache import content_key
from jupiter_engine.training.evaluation.windows import Window, vault_windows

WINDOW_VERSION = 1
"""Counts every change of how a window's text becomes tokens."""

BYTES_PER_TOKEN = 3.5
"""Only for the estimate of remaining time."""
DECODE_EFFORT = 6.0
"""Time of one generated token over that of one scored token, only for the estimate of remaining time. Measured with
SmolLM2-135M in bfloat16 on two CPU cores, 16 samples side by side: 7.8 ms against 1.3 ms of CPU time a core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    task: Task
    id: str
    document: str
    cluster: str
    weight: float
    key: str
    """Hash of all that fixes the score besides the model's weights."""
    effort: float
    """Relative cost in scored tokens."""
    subject: Window | Item | Assignment


def units_of_look(
    chunks: Sequence[Chunk],
    items: Sequence[Item],
    evaluation: EvaluationSpec,
    generation: GenerationSpec,
    filter_spec: FilterSpec,
    *,
    slice_number: int,
    seed: int,
    arithmetic: str,
) -> list[Unit]:
    """Windows, known items, vault items and fitness passages of one look.

    `arithmetic` names what computes the numbers (twin and precision): scores of different arithmetic are kept apart.
    """
    units = [_window_unit(window, arithmetic) for window in vault_windows(chunks, evaluation, slice_number, seed)]
    pools: tuple[tuple[str, Task, int], ...] = (
        ("known", "mcq_known", evaluation.mcq_known),
        ("vault", "mcq_vault", evaluation.mcq_vault),
    )
    for pool, task, count in pools:
        chosen = mcq.chosen_items(items, pool, slice_number, count, seed)
        units += [_item_unit(item, task, arithmetic) for item in chosen]
    passages = assignments(chunks, generation, evaluation.fitness_chunks, slice_number, seed)
    units += [_fitness_unit(passage, generation, filter_spec, arithmetic) for passage in passages]
    return units


def _window_unit(window: Window, arithmetic: str) -> Unit:
    context, text = window.context, window.text
    return Unit(
        task="vault_bpb",
        id=window.id,
        document=window.document,
        cluster=window.cluster,
        weight=float(window.scored_bytes),
        key=content_key("window", WINDOW_VERSION, arithmetic, context, text),
        effort=(len(context) + len(text)) / BYTES_PER_TOKEN,
        subject=window,
    )


def _item_unit(item: Item, task: Task, arithmetic: str) -> Unit:
    return Unit(
        task=task,
        id=item.id,
        document=item.document,
        cluster=item.cluster,
        weight=1.0,
        key=content_key("mcq", mcq.PROMPT_VERSION, arithmetic, item.question, item.options, item.answer),
        effort=(len(item.question) + sum(len(option) for option in item.options)) / BYTES_PER_TOKEN,
        subject=item,
    )


def _fitness_unit(passage: Assignment, generation: GenerationSpec, filter_spec: FilterSpec, arithmetic: str) -> Unit:
    sampling = (generation.temperature, generation.top_p, generation.max_new_tokens, passage.seed)
    asked = request_text(passage, generation)
    return Unit(
        task="yield",
        id=passage.chunk.id,
        document=passage.chunk.document,
        cluster=passage.chunk.cluster,
        weight=1.0,
        key=content_key(
            "yield",
            FITNESS_VERSION,
            arithmetic,
            sampling,
            generation.batch_size,
            passage.template,
            asked,
            passage.chunk.text,
            filter_spec,
        ),
        effort=len(asked) / BYTES_PER_TOKEN + generation.max_new_tokens * DECODE_EFFORT,
        subject=passage,
    )
