"""Domain files: every key changes what is loaded, every rule between keys is enforced where it is broken."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from msgspec import inspect as mi

from jupiter_engine.errors import ConfigError
from jupiter_engine.settings.domain import DomainSettings, check_paths, load_domain
from jupiter_engine.settings.reader import Loaded, leaves

SMALLEST: dict[str, Any] = {
    "domain": {"name": "rocks"},
    "sources": [{"id": "docs", "type": "files", "path": "rocks"}],
    "generation": {"templates": [{"id": "qa", "type": "qa"}]},
}


def write(folder: Path, content: object, name: str = "rocks") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return file


def changed(**edits: Any) -> dict[str, Any]:
    """SMALLEST with `training__steps=3` put at training.steps; a number steps into a list."""
    content = copy.deepcopy(SMALLEST)
    for key, value in edits.items():
        at: Any = content
        *path, last = [int(part) if part.isdigit() else part for part in key.split("__")]
        for part in path:
            at = at.setdefault(part, {}) if isinstance(at, dict) else at[part]
        if value is ...:
            del at[last]
        else:
            at[last] = value
    return content


def load(folder: Path, **edits: Any) -> Loaded[DomainSettings]:
    return load_domain(write(folder, changed(**edits)))


def problems(file: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_domain(file)
    return caught.value.problems


# -- values -----------------------------------------------------------------------------------------
FILES = "sources__0__"
STDLIB = {"sources": [{"id": "docs", "type": "stdlib"}]}
TEMPLATE = "generation__templates__0__"
CHANGES: dict[str, dict[str, Any]] = {
    "schema": {},  # has one value
    "domain": {"domain__description": "About rocks"},
    "domain.name": {"domain__name": "stones"},
    "domain.description": {"domain__description": "About rocks"},
    "domain.language": {"domain__language": "es", TEMPLATE + "prompt": "Explica {chunk}"},
    "domain.keywords": {"domain__keywords": ["granite"]},
    "domain.negative_keywords": {"domain__negative_keywords": ["roll"]},
    "base": {"base": "nano"},
    "sources": {"sources": [{"id": "b", "type": "stdlib"}]},
    "sources[].id": {FILES + "id": "other"},
    "sources[].type": STDLIB,
    "sources[].parts": {"sources": [{"id": "docs", "type": "stdlib", "parts": ["topics"]}]},
    "sources[].path": {FILES + "path": "pebbles"},
    "sources[].include": {FILES + "include": ["*.tex"]},
    "sources[].exclude": {FILES + "exclude": ["old/*"]},
    "sources[].license": {FILES + "license": "MIT"},
    "sources[].weight": {FILES + "weight": 2},
    "sources[].max_bytes": {FILES + "max_bytes": 1000},
    "generation": {"generation__samples": 5},
    "generation.templates": {"generation__templates": [{"id": "b", "type": "code"}]},
    "generation.templates[].id": {TEMPLATE + "id": "ask"},
    "generation.templates[].type": {TEMPLATE + "type": "code"},
    "generation.templates[].prompt": {TEMPLATE + "prompt": "Ask about {chunk}"},
    "generation.templates[].system_prompt": {TEMPLATE + "system_prompt": "You know rocks."},
    "generation.templates[].topics": {TEMPLATE + "topics": ["basalt"]},
    "generation.templates[].weight": {TEMPLATE + "weight": 0.5},
    "review.mode": {"review__mode": "manual"},
    "review.share": {"review": {"mode": "sample", "share": 0.3}},
    "training.start": {"training__start": "./model"},
    "training.preset": {"training": {"start": "scratch", "preset": "125m"}},
    "training.tokenizer": {"training": {"start": "scratch", "preset": "125m", "tokenizer": "corpus"}},
    "training.method": {"training__method": "sft"},
    "training.lora.targets": {"training__lora__targets": ["q_proj"]},
    "training.recompute_activations": {"training__recompute_activations": True},
    "training.micro_batch_sequences": {"training__micro_batch_sequences": 4},
    "training.batch_sequences": {"training__batch_sequences": 16},
    "gate.min_windows": {"gate__min_windows": 30},
}


def _other(kind: mi.Type, default: Any) -> Any:
    """A value that the type allows and that is not the default."""
    if isinstance(kind, mi.LiteralType):
        return next((value for value in kind.values if value != default), None)
    if isinstance(kind, mi.IntType):
        return default + 1
    if isinstance(kind, mi.FloatType):
        return default * 0.9 if default else 0.05
    raise AssertionError(f"add the key to CHANGES: {kind}")


def _change_of(key: str, item: mi.Field) -> dict[str, Any]:
    if key in CHANGES:
        return CHANGES[key]
    if isinstance(item.type, mi.StructType):
        below = next(iter(item.type.fields))
        return _change_of(f"{key}.{below.name}", below)
    value = _other(item.type, item.default)
    return {key.replace(".", "__"): value} if value is not None else {}


KEYS = dict(leaves(mi.type_info(DomainSettings)))
ONE_VALUE = {"schema"}


@pytest.mark.parametrize("key", KEYS)
def test_every_key_changes_what_is_loaded(key: str, tmp_path: Path) -> None:
    edits = _change_of(key, KEYS[key])
    if key in ONE_VALUE:
        assert edits in ({}, {"schema": "jupiter/domain@1"})
        return
    assert edits, key
    before = msgspec.to_builtins(load_domain(write(tmp_path, SMALLEST)).value)
    name = edits.get("domain__name", "rocks")
    after = msgspec.to_builtins(load_domain(write(tmp_path, changed(**edits), name)).value)

    def at(value: Any) -> Any:
        for part in key.split("."):
            value = value[part.removesuffix("[]")]
            value = value[0] if part.endswith("[]") else value
        return value

    assert at(before) != at(after)


def test_a_file_with_only_what_is_required_has_the_documented_defaults(tmp_path: Path) -> None:
    value = load_domain(write(tmp_path, SMALLEST)).value
    assert (value.base, value.review.mode, value.training.start, value.domain.language) == (
        "smollm2",
        "auto",
        "generator",
        "en",
    )


def test_paths_start_at_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.chdir(tmp_path)
    write(tmp_path, changed(base="~/model", training__start="../start"))
    value = load_domain(Path("rocks.yaml")).value
    assert value.sources[0].path == str(tmp_path / "rocks")
    assert value.base == "/home/ada/model"
    assert value.training.start == str(tmp_path.parent / "start")


def test_settings_survive_the_journal(tmp_path: Path) -> None:
    value = load_domain(write(tmp_path, SMALLEST)).value
    assert msgspec.convert(json.loads(msgspec.json.encode(value)), DomainSettings) == value


# -- rules between keys -----------------------------------------------------------------------------
RULES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "name and file": ({"domain__name": "stones"}, ("`domain.name`", '"stones"', '"rocks.yaml"')),
    "a later form": ({"schema": "jupiter/domain@2"}, ("`schema`", "jupiter/domain@1")),
    "language": ({"domain__language": "English"}, ("`domain.language`", "language code")),
    "empty keyword": ({"domain__keywords": ["a", " "]}, ("`domain.keywords[1]` is empty",)),
    "keyword on both sides": (
        {"domain__keywords": ["Wal"], "domain__negative_keywords": ["wal"]},
        ("`domain.negative_keywords[0]`", "domain.keywords holds as well"),
    ),
    "base mistyped": ({"base": "smolm2"}, ("`base`", "did you mean `smollm2`", "./NAME")),
    "start mistyped": ({"training__start": "generater"}, ("`training.start`", "did you mean `generator`")),
    "no source": ({"sources": []}, ("`sources` is an empty list",)),
    "two sources, one id": (
        {"sources": [{"id": "a", "type": "stdlib"}, {"id": "a", "type": "stdlib"}]},
        ("`sources[1].id`", "sources[0] is called already"),
    ),
    "files without path": ({FILES + "path": ...}, ("`sources[0].path` is missing",)),
    "files that match nothing": ({FILES + "include": []}, ("`sources[0].include`",)),
    "files with parts": ({FILES + "parts": ["topics"]}, ("`sources[0].parts` has no meaning", "type files")),
    "stdlib with path": ({FILES + "type": "stdlib"}, ("`sources[0].path` has no meaning", "type stdlib")),
    "stdlib of nothing": (
        {"sources": [{"id": "a", "type": "stdlib", "parts": []}]},
        ("`sources[0].parts` is an empty list",),
    ),
    "address for path": ({FILES + "path": "https://x.org/a"}, ("`sources[0].path`", "download")),
    "someone's home": ({FILES + "path": "~eve/docs"}, ("`sources[0].path`", "~/")),
    "chunk bounds": ({"chunk__min_bytes": 5000}, ("`chunk.min_bytes`", "larger than chunk.max_bytes (2400)")),
    "no template": ({"generation__templates": []}, ("`generation.templates` is an empty list",)),
    "two templates, one id": (
        {"generation__templates": [{"id": "a", "type": "qa"}, {"id": "a", "type": "code"}]},
        ("`generation.templates[1].id`",),
    ),
    "all weights zero": ({TEMPLATE + "weight": 0}, ("`generation.templates` all have weight 0",)),
    "unknown placeholder": ({TEMPLATE + "prompt": "{chunk} {tittle}"}, ("{tittle}", "did you mean {title}?")),
    "empty prompt": ({TEMPLATE + "prompt": " "}, ("`generation.templates[0].prompt` is empty",)),
    "empty topic": ({TEMPLATE + "topics": [""]}, ("`generation.templates[0].topics[0]` is empty",)),
    "filter bounds": ({"filters__min_words": 700}, ("`filters.min_words`", "larger than filters.max_words (600)")),
    "answers too short to pass": (
        {"generation__max_new_tokens": 10},
        ("`filters.min_words`", "larger than generation.max_new_tokens (10)"),
    ),
    "review of all": ({"review": {"mode": "sample", "share": 1.0}}, ("`review.share`", "mode: manual")),
    "mix of nothing": ({"mix": {"real_docs": 0, "real_code": 0, "synthetic": 0}}, ("`mix` holds only zeros",)),
    "floor without real text": ({"mix": {"real_docs": 0, "real_code": 0}}, ("`mix.real_floor`", "set real_floor: 0")),
    "micro batch": (
        {"training__micro_batch_sequences": 3},
        ("`training.micro_batch_sequences` is 3", "does not divide batch_sequences (8)"),
    ),
    "beta": ({"training__optimizer": {"beta1": 1.0}}, ("`training.optimizer.beta1` is 1",)),
    "preset mistyped": (
        {"training": {"start": "scratch", "preset": "125M"}},
        ("`training.preset`", "did you mean 125m?"),
    ),
    "scratch without preset": ({"training": {"start": "scratch"}}, ("`training.preset` is missing",)),
    "preset without scratch": ({"training__preset": "125m"}, ("`training.preset` has no meaning",)),
    "pretraining a trained model": ({"training__method": "pretrain"}, ("`training.method`", "needs `start: scratch`")),
    "fine-tuning nothing": (
        {"training": {"start": "scratch", "preset": "125m", "method": "sft"}},
        ("`training.method` is `sft`", "needs a trained model"),
    ),
    "adapters beside random weights": (
        {"training": {"start": "scratch", "preset": "125m", "update": "lora"}},
        ("`training.update` is `lora`", "use `full`"),
    ),
    "another tokenizer for a trained model": (
        {"training__tokenizer": "corpus"},
        ("`training.tokenizer` is `corpus`", "start: scratch"),
    ),
    "no adapters": (
        {"training__update": "lora", "training__lora": {"targets": []}},
        ("`training.lora.targets` is an empty list", "name at least one"),
    ),
    "an adapter twice": (
        {"training__update": "lora", "training__lora": {"targets": ["q_proj", "q_proj"]}},
        ("`training.lora.targets` names a projection twice",),
    ),
    "decay longer than the run": (
        {"training__schedule": {"kind": "wsd", "warmup_share": 0.25, "decay_share": 0.8}},
        ("`training.schedule.decay_share` is 0.8", "use at most 0.75"),
    ),
    "every step a spike": (
        {"training__spike_guard": {"spike_factor": 0.9}},
        ("`training.spike_guard.spike_factor` is 0.9", "use more than 1, or 0"),
    ),
    "one slice for two uses": (
        {"evaluation__slices": 1, "training__early_stop": {"every_steps": 5}},
        ("`evaluation.slices` is 1", "2 or more"),
    ),
    "too few windows": (
        {"gate": {"primary": "vault_bpb"}, "evaluation__windows": 20},
        ("`gate.min_windows` is 40", "evaluation.windows = 20"),
    ),
    "too few windows for the guard": ({"evaluation__windows": 20}, ("`gate.min_windows` is 40",)),
    "too few items for a guard": ({"evaluation__mcq_vault": 59}, ("`gate.min_items` is 60", "mcq_vault = 59")),
    "no items for the primary": (
        {"gate": {"primary": "mcq_vault"}, "evaluation__mcq_vault": 0},
        ("`gate.min_items` is 60", "mcq_vault = 0"),
    ),
    "too few items": (
        {"gate": {"primary": "mcq_known"}, "evaluation__mcq_known": 10},
        ("`gate.min_items` is 60", "evaluation.mcq_known = 10"),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str, tmp_path: Path) -> None:
    edits, said = RULES[name]
    found = problems(write(tmp_path, changed(**edits)))
    assert len(found) == 1, found
    assert ", line " in found[0]
    for words in said:
        assert words in found[0]


WARNINGS: dict[str, tuple[dict[str, Any], str]] = {
    "mix does not add up": ({"mix__synthetic": 1.0}, "`mix` adds up to 1.7"),
    "less real text than the floor": (
        {"mix": {"real_docs": 0.1, "real_code": 0.1, "synthetic": 0.8}},
        "raises that to 40%",
    ),
    "share without sampling": ({"review": {"share": 0.5}}, "`review.share` has no effect while review.mode is auto"),
    "topic without topics": ({TEMPLATE + "prompt": "{chunk} {topic}"}, "the template has no topics"),
    "topics unused": (
        {TEMPLATE + "prompt": "{chunk}", TEMPLATE + "topics": ["x"]},
        "`generation.templates[0].topics` has no effect",
    ),
    "English wording": ({"domain__language": "es"}, "will ask in English"),
    "keywords unused": ({"domain__keywords": ["granite"]}, "`domain.keywords` has no effect"),
    "no fitness": ({"evaluation__fitness_chunks": 0}, "cannot see whether a candidate still generates well"),
    "lora unused": ({"training__lora": {"rank": 4}}, "`training.lora` has no effect"),
    "vocabulary unused": ({"training__vocabulary": 1000}, "`training.vocabulary` has no effect"),
    "mix unused": ({"training__method": "sft", "mix__synthetic": 0.3}, "`mix` has no effect"),
    "decay unused": (
        {"training__schedule": {"kind": "cosine", "decay_share": 0.5}},
        "`training.schedule.decay_share` has no effect with `kind: cosine`",
    ),
    "momentum unused": (
        {"training__optimizer": {"momentum": 0.9}},
        "`training.optimizer.momentum` has no effect with `name: adamw`",
    ),
    "betas unused": (
        {"training__optimizer": {"name": "adafactor", "beta1": 0.8}},
        "`training.optimizer.beta1` has no effect with `name: adafactor`",
    ),
    "adapters that hardly move": (
        {"training__update": "lora", "training__optimizer": {"name": "adafactor"}},
        "adapters begin at 0 and would hardly learn",
    ),
    "patience unused": (
        {"training__early_stop": {"patience": 3}},
        "`training.early_stop.patience` has no effect with `every_steps: 0`",
    ),
    "measured too seldom": (
        {"training__early_stop": {"every_steps": 1000}, "training__steps": 20},
        "only the last one is measured",
    ),
    "window unused": (
        {"training__spike_guard": {"spike_factor": 0, "window": 8}},
        "`training.spike_guard.window` has no effect with `spike_factor: 0`",
    ),
    "checkpoints that are never written": (
        {"training__keep_every_steps": 7, "training__checkpoint_every_steps": 5},
        "`training.keep_every_steps` is 7, not a multiple of checkpoint_every_steps (5)",
    ),
    "constant": (
        {"training__schedule": {"kind": "constant", "final_share": 0.5}},
        "has no effect with `kind: constant`",
    ),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_warning(name: str, tmp_path: Path) -> None:
    edits, said = WARNINGS[name]
    warnings = load(tmp_path, **edits).warnings
    assert any(said in warning for warning in warnings), warnings
    assert all(warning.startswith(str(tmp_path)) and ", line " in warning for warning in warnings)


# -- paths ------------------------------------------------------------------------------------------
def test_missing_paths_are_found_when_asked(tmp_path: Path) -> None:
    loaded = load(tmp_path, base="./model", training__start="HuggingFaceTB/SmolLM2-135M")
    with pytest.raises(ConfigError) as caught:
        check_paths(loaded)
    source, base, start = sorted(caught.value.problems, key=lambda text: ("start" in text, "base" in text))
    assert "`sources[0].path`" in source
    assert "does not exist" in source
    assert f"names the model folder {tmp_path}/model, which does not exist" in base
    assert "not downloaded by name" in start


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "rocks").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    loaded = load(tmp_path, base="./model")
    with pytest.raises(ConfigError, match=r"lacks tokenizer\.json, \*\.safetensors"):
        check_paths(loaded)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    check_paths(loaded)
