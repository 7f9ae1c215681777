"""Domain files written for Jupiter's first design: which of their keys are read on, and what became of the others."""

from __future__ import annotations

from typing import Final

from jupiter_engine.settings.reader import Findings
from jupiter_engine.settings.tree import Mapping, Node, Scalar, Sequence

_DOWNLOAD = (
    "this version reads local files and the standard library; {what}, then name the folder in `sources`: "
    "{{id: docs, type: files, path: FOLDER}}"
)
_GATE = "a candidate is now judged by paired statistics on held-out text; see `gate` and `evaluation`"
_EXPERT = (
    "files of single swarm experts are not read; describe what the expert shall know as a domain "
    "(`jupiter new-domain NAME`)"
)
_SWARM = "there is no swarm of experts in this version; one domain trains one model"

REFUSED: Final[dict[str, str]] = {
    "data_sources": (
        "sources are now one list; write `sources:` with entries such as {id: docs, type: files, path: FOLDER}"
    ),
    "data_sources.documentation": _DOWNLOAD.format(what="download the pages"),
    "data_sources.websites": _DOWNLOAD.format(what="download the pages"),
    "data_sources.forums": _DOWNLOAD.format(what="export the threads as text"),
    "data_sources.github": _DOWNLOAD.format(what="clone the repositories"),
    "data_sources.youtube": _DOWNLOAD.format(what="save the transcripts as text"),
    "data_sources.huggingface_datasets": _DOWNLOAD.format(what="export the data set as text files"),
    "generation.generator_model": (
        "the first generator is named by `base` at the top of this file; later ones win their place at the gate"
    ),
    "generation.max_tokens": "it is called `max_new_tokens` now",
    "generation.queue_size": "it is called `samples` now and counts the samples of one cycle",
    "generation.min_quality_score": "one mixed score no longer decides; see the single thresholds under `filters`",
    "generation.dedup_threshold": "it is `filters.near_duplicate` now",
    "generation.templates[].examples": (
        "example answers are not shown to the generator; put one into `prompt` if it helps"
    ),
    "evaluation.benchmarks": (
        "the tasks are fixed: vault_bpb, mcq_known, mcq_vault and generation yield; remove the key"
    ),
    "evaluation.custom_eval_file": (
        "questions are made from the corpus itself; to have your own facts asked, add them to a source"
    ),
    "evaluation.min_accuracy": f"{_GATE}; a guard such as gate.margin_mcq replaces the fixed bar",
    "evaluation.min_coherence": f"{_GATE}; gate.margin_yield guards how usable generated samples are",
    "self_improvement": f"{_GATE}; the base generator is always kept",
    "self_improvement.eval_every_steps": (
        "every cycle ends with an evaluation; set the length of a cycle with `training.steps`"
    ),
    "self_improvement.improvement_threshold": f"{_GATE}; gate.min_effect is the least improvement that must be shown",
    "self_improvement.min_steps_before_replace": (
        "every cycle trains `training.steps` steps before a candidate is judged"
    ),
    "self_improvement.benchmark_samples": "see evaluation.windows, evaluation.mcq_known and evaluation.mcq_vault",
    "self_improvement.keep_last_n_checkpoints": (
        "within a run it is `training.keep_checkpoints`; every generator that was in use is kept"
    ),
    "self_improvement.always_keep_base_generator": "the base generator is always kept; remove the key",
    "training.model_size": (
        "write `training: {start: scratch, preset: 125m}` for a new model, or leave it out to train the generator on"
    ),
    "training.vocab_size": "the vocabulary belongs to the starting model's tokenizer; remove the key",
    "training.max_seq_length": "it is called `sequence_tokens` now",
    "training.batch_size": "it is called `batch_sequences` now",
    "training.gradient_accumulation_steps": (
        "give `micro_batch_sequences`: batch_sequences divided by the accumulation steps"
    ),
    "training.learning_rate": "it is `training.optimizer.learning_rate` now",
    "training.weight_decay": "it is `training.optimizer.weight_decay` now",
    "training.warmup_steps": "it is `training.schedule.warmup_share` now, a share of the run",
    "training.max_steps": "it is called `steps` now and counts the steps of one cycle",
    "training.save_every_steps": "it is called `checkpoint_every_steps` now",
    "training.eval_every_steps": "every cycle ends with an evaluation; set the length of a cycle with `training.steps`",
    "training.use_mixed_precision": "write `compute_dtype: bfloat16` or float32",
    "training.real_ratio": "it is `mix.real_docs` and `mix.real_code` now",
    "training.synthetic_ratio": "it is `mix.synthetic` now",
    "training.fresh_ratio": "new documents join the corpus at the next collection; see `mix` for the shares",
    "mix_ratio": "it is called `mix` now, with the keys real_docs, real_code and synthetic",
    "nodes": "machines are described in config/cluster.yaml",
    # config/experts/**.yaml and the swarm file
    "name": f"{_EXPERT}; the domain's name is `domain.name`",
    "description": f"{_EXPERT}; the domain's description is `domain.description`",
    "keywords": f"{_EXPERT}; the domain's keywords are `domain.keywords`",
    "model_path": f"{_EXPERT}; a model folder to begin with is named by `base`",
    "base_model": f"{_EXPERT}; the model to begin with is named by `base`",
    "max_tokens": f"{_EXPERT}; see `generation.max_new_tokens`",
    "temperature": f"{_EXPERT}; see `generation.temperature`",
    "top_p": f"{_EXPERT}; see `generation.top_p`",
    "system_prompt": f"{_EXPERT}; see `generation.templates`",
    "capabilities": _EXPERT,
    "assigned_node": _EXPERT,
    **dict.fromkeys(
        (
            "mode",
            "experts_dir",
            "router",
            "synthesizer",
            "max_parallel_experts",
            "timeout_seconds",
            "enable_expert_collaboration",
            "collaboration_rounds",
            "auto_load_experts",
            "unload_idle_experts",
            "idle_timeout_seconds",
        ),
        _SWARM,
    ),
}
"""Dotted key (list positions written `[]`) -> why it is not taken and what to do instead."""

_MIX_SYNTHETIC = ("synthetic_qa", "synthetic_tutorials", "synthetic_debug")


def rewrite(top: Mapping, found: Findings) -> None:
    """Read older spellings as the present ones, in place; what they became is said as a warning."""
    _mix_ratio(top, found)
    sources = top.get("data_sources")
    if isinstance(sources, Mapping):
        _drop_empty_sources(top, sources)
    generation = top.get("generation")
    if isinstance(generation, Mapping):
        templates = generation.get("templates")
        each = (
            [item for item in templates.items if isinstance(item, Mapping)] if isinstance(templates, Sequence) else []
        )
        for i, template in enumerate(each):
            _tasks(template, i, found)
        _give_ids(each)
        _template_weights(generation, each, found)


def _drop_empty_sources(top: Mapping, sources: Mapping) -> None:
    """Empty lists of an older file ask for nothing; only what names something is refused."""
    for key, (_, value) in list(sources.entries.items()):
        if _says_nothing(value):
            sources.pop(key)
    if not sources.entries:
        top.pop("data_sources")


def _says_nothing(node: Node) -> bool:
    if isinstance(node, Sequence):
        return not node.items
    if isinstance(node, Mapping):
        return all(_says_nothing(value) for _, value in node.entries.values())
    return node.tag == "null" and not node.quoted


def _number(node: Node) -> float | None:
    """A scalar's number if it is plainly one; the schema complains about the rest later."""
    if not isinstance(node, Scalar) or node.quoted:
        return None
    try:
        value = float(node.text)
    except ValueError:
        return None
    return value if 0.0 <= value < 1e6 else None


def _mix_ratio(top: Mapping, found: Findings) -> None:
    old = top.entries.get("mix_ratio")
    if old is None:
        return
    key, shares = old
    if not isinstance(shares, Mapping):
        return
    if "mix" in top.entries:
        found.problem_at(key.place, "`mix_ratio` is the older name of `mix`, and the file holds both; keep `mix`")
        top.pop("mix_ratio")
        return
    parts = {name: shares.entries[name] for name in _MIX_SYNTHETIC if name in shares.entries}
    values = {name: _number(value) for name, (_, value) in parts.items()}
    for name, value in values.items():
        if value is None:
            found.problem_at(parts[name][1].place, f"`mix_ratio.{name}`: expected a number of at least 0")
    if parts:
        if "synthetic" in shares.entries:
            found.problem_at(key.place, "`mix_ratio` holds `synthetic` as well as its older parts; keep `synthetic`")
        total = sum(value or 0.0 for value in values.values())
        place = next(iter(parts.values()))[1].place
        for name in parts:
            shares.pop(name)
        shares.put("synthetic", Scalar(f"{total:.6f}", "float", False, place), place)
    top.pop("mix_ratio")
    top.put("mix", shares, key.place)
    found.places["mix"] = key.place
    found.warn("mix", "stands under its older name `mix_ratio`; its synthetic parts are read as one share")


def _tasks(template: Mapping, i: int, found: Findings) -> None:
    old = template.pop("tasks")
    if old is not None:
        key, tasks = old
        if not _says_nothing(template.get("topics") or Sequence(key.place)):
            name = f"generation.templates[{i}]"
            found.problem_at(key.place, f"`{name}` has `topics` and `tasks`, which mean the same; keep `topics`")
        elif not _says_nothing(tasks):
            template.put("topics", tasks, key.place)
    prompt = template.get("prompt")
    if isinstance(prompt, Scalar):
        prompt.text = prompt.text.replace("{task}", "{topic}")


def _give_ids(templates: list[Mapping]) -> None:
    """Templates without an id are called after their type: qa, qa-2, ..."""
    taken = {node.text for item in templates if isinstance(node := item.get("id"), Scalar)}
    for item in templates:
        kind = item.get("type")
        if "id" in item.entries or not isinstance(kind, Scalar) or kind.quoted or kind.tag != "str":
            continue
        name, number = kind.text, 2
        while name in taken:
            name, number = f"{kind.text}-{number}", number + 1
        taken.add(name)
        item.put("id", Scalar(name, "str", True, kind.place), kind.place)


def _template_weights(generation: Mapping, templates: list[Mapping], found: Findings) -> None:
    """`template_weights: {qa: 0.4}` gives the templates of a type that weight together."""
    old = generation.pop("template_weights")
    if old is None:
        return
    key, weights = old
    if not isinstance(weights, Mapping):
        if not _says_nothing(weights):
            text = "`generation.template_weights`: expected a mapping of template types to numbers"
            found.problem_at(weights.place, text)
        return
    by_type: dict[str, list[Mapping]] = {}
    matching = True
    for item in templates:
        kind = item.get("type")
        if isinstance(kind, Scalar):
            by_type.setdefault(kind.text, []).append(item)
    for name, (_, value) in weights.entries.items():
        number, same = _number(value), by_type.get(name, [])
        shown = f"`generation.template_weights.{name[:40]}`"
        if number is None:
            found.problem_at(value.place, f"{shown}: expected a number of at least 0")
        elif not same:
            matching = False
            known = ", ".join(by_type) or "none"
            found.problem_at(value.place, f"{shown} names a type that no template has (types here: {known})")
        elif any("weight" in item.entries for item in same):
            found.problem_at(value.place, f"{shown}: its templates have a `weight` of their own; keep one of the two")
        else:
            for item in same:
                item.put("weight", Scalar(f"{number / len(same):.6f}", "float", False, value.place), value.place)
    if weights.entries and matching:
        for name, items in by_type.items():
            if name not in weights.entries and not any("weight" in item.entries for item in items):
                # A type that is left out got a quarter in the first design; say so rather than guess on.
                text = f"`generation.template_weights` gives no weight for the type {name}; add one"
                found.problem_at(key.place, text)
