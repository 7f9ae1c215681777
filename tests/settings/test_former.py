"""Settings files of the first design: every key is read on or refused with a reason and what to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from jupiter_engine.errors import ConfigError
from jupiter_engine.settings import former_cluster, former_domain
from jupiter_engine.settings.cluster import load_cluster, local_roles
from jupiter_engine.settings.domain import load_domain

FORMER_DOMAIN = """\
domain:
  name: "unreal_engine"
  description: "Expert in video game development"
  language: "en"
  keywords: [blueprint, actor]
  negative_keywords: [unity]
data_sources:
  documentation: ["https://dev.epicgames.com/documentation"]
  github:
    repos: ["EpicGames/UnrealEngine"]
    file_types: [".cpp", ".h"]
    exclude_patterns: ["ThirdParty/*"]
    max_file_size_kb: 500
  websites: ["https://a.org"]
  forums: ["https://b.org"]
  youtube:
    channels: ["x"]
  huggingface_datasets: ["a/b"]
generation:
  templates:
    - type: qa
      system_prompt: "You are an expert."
      prompt: "Answer about {topic}: {chunk}"
      topics: [Actors, Pawns]
      examples: [{q: a}]
    - type: tutorial
      prompt: "Write {task} after {chunk}"
      tasks: ["a door"]
  template_weights:
    qa: 0.4
    tutorial: 0.6
evaluation:
  benchmarks: [code_syntax]
  custom_eval_file: null
  min_accuracy: 0.75
  min_coherence: 0.8
mix_ratio:
  real_docs: 0.25
  real_code: 0.25
  synthetic_qa: 0.2
  synthetic_tutorials: 0.2
  synthetic_debug: 0.1
"""

FORMER_CLUSTER = """\
backend: "mpi"
network_interface: en0
use_thunderbolt_bridge: true
sync_every_n_steps: 1
gradient_compression: false
checkpoint_on_failure: true
auto_restart_failed_nodes: true
nodes:
  - host: "localhost"
    name: "Main MacBook"
    device_type: "cpu"
    memory_gb: 24
    chip: "M4"
    role: "generator"
    connection_type: "thunderbolt"
    ssh_user: null
    ssh_port: 22
    can_generate: true
    can_train: false
  - host: "mac-mini-1.local"
    name: "Mac Mini 1"
    device_type: "mac"
    memory_gb: 16
    chip: "M4"
    role: "trainer"
    connection_type: "thunderbolt"
    ssh_user: null
    ssh_port: 22
    can_generate: false
    can_train: true
self_improvement:
  eval_every_steps: 5000
  improvement_threshold: 0.05
  min_steps_before_replace: 10000
  benchmark_samples: 500
  keep_last_n_checkpoints: 3
  always_keep_base_generator: true
"""


def problems(file: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        (load_cluster if file.name == "cluster.yaml" else load_domain)(file)
    return caught.value.problems


def refused(found: tuple[str, ...]) -> set[str]:
    assert all(" is not accepted: " in problem or " is missing" in problem for problem in found), found
    return {problem.split("`")[1] for problem in found if " is not accepted: " in problem}


def test_a_former_domain_file(tmp_path: Path) -> None:
    file = tmp_path / "unreal_engine.yaml"
    file.write_text(FORMER_DOMAIN)
    assert refused(problems(file)) == {
        "data_sources.documentation",
        "data_sources.github",
        "data_sources.websites",
        "data_sources.forums",
        "data_sources.youtube",
        "data_sources.huggingface_datasets",
        "generation.templates[0].examples",
        "evaluation.benchmarks",
        "evaluation.custom_eval_file",
        "evaluation.min_accuracy",
        "evaluation.min_coherence",
    }


def test_what_is_read_on_of_a_former_domain_file(tmp_path: Path) -> None:
    text = FORMER_DOMAIN
    for start, end, instead in (
        (
            "data_sources:",
            "generation:",
            "sources: [{id: a, type: stdlib}]\ndata_sources: {forums: [], github: null}\n",
        ),
        ("      examples:", "    - type: tutorial", ""),
        ("evaluation:", "mix_ratio:", ""),
    ):
        text = text[: text.index(start)] + instead + text[text.index(end) :]
    file = tmp_path / "unreal_engine.yaml"
    file.write_text(text)
    loaded = load_domain(file)
    first, second = loaded.value.generation.templates
    assert (first.id, first.weight, first.topics) == ("qa", 0.4, ("Actors", "Pawns"))
    assert (second.id, second.weight, second.topics) == ("tutorial", 0.6, ("a door",))
    assert second.prompt == "Write {topic} after {chunk}"
    assert loaded.value.domain.negative_keywords == ("unity",)
    mix = loaded.value.mix
    assert (mix.real_docs, mix.real_code, mix.synthetic) == (0.25, 0.25, 0.5)
    assert any("older name `mix_ratio`" in warning for warning in loaded.warnings)


def with_generation(tmp_path: Path, generation: str, rest: str = "") -> Path:
    file = tmp_path / "a.yaml"
    file.write_text(f"domain: {{name: a}}\nsources: [{{id: a, type: stdlib}}]\ngeneration: {generation}\n{rest}")
    return file


@pytest.mark.parametrize(
    ("generation", "rest", "said"),
    [
        ("{templates: [{type: qa}], template_weights: {qa: x}}", "", "template_weights.qa`: expected a number"),
        (
            "{templates: [{type: qa}], template_weights: {code: 1}}",
            "",
            "names a type that no template has (types here: qa)",
        ),
        ("{templates: [{type: qa, weight: 1}], template_weights: {qa: 1}}", "", "have a `weight` of their own"),
        ("{templates: [{type: qa}, {type: code}], template_weights: {qa: 1}}", "", "gives no weight for the type code"),
        ("{templates: [{type: qa}], template_weights: [1]}", "", "expected a mapping of template types"),
        ("{templates: [{type: qa, topics: [a], tasks: [b]}]}", "", "`topics` and `tasks`, which mean the same"),
        ("{templates: [{type: qa}]}", "mix: {}\nmix_ratio: {}\n", "older name of `mix`"),
        (
            "{templates: [{type: qa}]}",
            "mix_ratio: {synthetic_qa: a lot}\n",
            "`mix_ratio.synthetic_qa`: expected a number",
        ),
        ("{templates: [{type: qa}]}", "mix_ratio: {synthetic: 1, synthetic_qa: 1}\n", "keep `synthetic`"),
        ("{templates: [{type: qa}]}", "mix_ratio: 3\n", "it is called `mix` now"),
    ],
)
def test_former_spellings_that_contradict(generation: str, rest: str, said: str, tmp_path: Path) -> None:
    (found,) = problems(with_generation(tmp_path, generation, rest))
    assert said in found
    assert ", line " in found


def test_templates_of_one_type_share_its_weight_and_get_their_own_ids(tmp_path: Path) -> None:
    file = with_generation(tmp_path, "{templates: [{type: qa}, {type: qa}], template_weights: {qa: 0.5}}")
    assert [(t.id, t.weight) for t in load_domain(file).value.generation.templates] == [("qa", 0.25), ("qa-2", 0.25)]


def test_a_former_cluster_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(FORMER_CLUSTER)
    assert refused(problems(file)) == {
        "self_improvement.eval_every_steps",
        "self_improvement.improvement_threshold",
        "self_improvement.min_steps_before_replace",
        "self_improvement.benchmark_samples",
        "self_improvement.keep_last_n_checkpoints",
        "self_improvement.always_keep_base_generator",
    }


def test_what_is_read_on_of_a_former_cluster_file(tmp_path: Path) -> None:
    text = FORMER_CLUSTER[: FORMER_CLUSTER.index("self_improvement")]
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    loaded = load_cluster(file)
    assert local_roles(loaded.value) == {"generate"}
    assert [node.name for node in loaded.value.nodes] == ["Main MacBook", "Mac Mini 1"]
    warnings = "\n".join(loaded.warnings)
    for said in (
        "`sync_every_n_steps` is 1",
        "`gradient_compression` is false",
        "`auto_restart_failed_nodes`",
        '`backend` "mpi" is read as `groups: [{backend: auto}]`',
        '`use_thunderbolt_bridge` "true" is read as `groups: [{over: auto}]`',
    ):
        assert said in warnings
    assert loaded.value.groups == ()


MACS = "nodes: [{host: localhost, role: generator}, {host: a, device_type: mac}, {host: b, device_type: mac}]\n"


@pytest.mark.parametrize(
    ("text", "backend", "over"),
    [
        ("backend: ring", "ring", "auto"),
        ("backend: jaccl\nuse_thunderbolt_bridge: true", "jaccl", "auto"),
        ("use_thunderbolt_bridge: false", "auto", "ethernet"),
        ("network_interface: en0", "auto", "ethernet"),
        ("network_interface: bridge0", "auto", "thunderbolt"),
        ("backend: ring\nnetwork_interface: null", "ring", "auto"),
    ],
)
def test_the_former_network_keys_become_a_group(text: str, backend: str, over: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(MACS + text + "\n")
    loaded = load_cluster(file)
    (group,) = loaded.value.groups
    assert (group.nodes, group.backend, group.over) == (("a", "b"), backend, over)
    assert all(f"line {4 + i}" in warning or "line" in warning for i, warning in enumerate(loaded.warnings))
    assert len(loaded.warnings) == text.count(":")


def test_former_network_keys_without_a_group_to_apply_to(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("backend: ring\nnodes: [{host: localhost}]\n")
    (warning,) = load_cluster(file).warnings
    assert '`backend` "ring" has no effect: fewer than two machines train' in warning
    file.write_text(
        "use_thunderbolt_bridge: no\nnodes: [{host: a, device_type: mac}, {host: b, device_type: nvidia}]\n"
    )
    loaded = load_cluster(file)
    assert "write them down as `groups`" in loaded.warnings[0]
    assert loaded.value.groups == ()


def test_former_names_of_node_keys(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "nodes:\n- host: a\n  gpu: RTX 4090\n  vram_gb: 24\n  connection: ethernet\n  device_type: nvidia\n"
    )
    loaded = load_cluster(file)
    (node,) = loaded.value.nodes
    assert (node.chip, node.memory_gb, node.connection_type) == ("RTX 4090", 24, "ethernet")
    assert ["line 5" in loaded.warnings[0], "line 3" in loaded.warnings[1], "line 4" in loaded.warnings[2]] == [
        True
    ] * 3
    assert "`nodes[0].gpu` is the older name of `chip`" in loaded.warnings[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sync_every_n_steps: 4", "combined at every step"),
        ("gradient_compression: true", "sent uncompressed"),
        ("checkpoint_on_failure: false", "survives any failure"),
        ("auto_restart_failed_nodes: perhaps", "expected true or false"),
        ("auto_restart_failed_nodes: true\nretries: {}", "keep `retries`"),
        ("backend: banana", "expected one of auto, gloo, jaccl, mpi, nccl, ring, torch"),
        ("backend: [ring]", "found its value, expected one of"),
        ("use_thunderbolt_bridge: perhaps", "expected true or false"),
        ("network_interface: [en0]", "expected a name such as en0"),
        ("backend: ring\ngroups: []", "keep `groups`"),
        ("nodes: [{host: a, gpu: x, chip: y}]", "keep `chip`"),
        ("nodes: [{host: a, vram_gb: 24GB}]", "write 24 without quotes or unit"),
        ("training: {batch_size: 32}", "config/domains/NAME.yaml"),
        ("generation: {}", "config/domains/NAME.yaml"),
    ],
)
def test_former_cluster_keys_with_another_meaning(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    (found,) = problems(file)
    assert said in found
    assert ", line " in found


def test_restarting_can_still_be_switched_off(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("auto_restart_failed_nodes: false\n")
    assert load_cluster(file).value.retries.worker_restarts == 0


@pytest.mark.parametrize("key", sorted(former_domain.REFUSED))
def test_each_refused_domain_key_says_why(key: str, tmp_path: Path) -> None:
    refusal(tmp_path / "a.yaml", key, former_domain.REFUSED[key])


@pytest.mark.parametrize("key", sorted(former_cluster.REFUSED))
def test_each_refused_cluster_key_says_why(key: str, tmp_path: Path) -> None:
    refusal(tmp_path / "cluster.yaml", key, former_cluster.REFUSED[key])


def refusal(file: Path, key: str, reason: str) -> None:
    lines = []
    indent = ""
    for part in key.split("."):
        lines.append(f"{indent}{part.removesuffix('[]')}:")
        indent += "  "
        if part.endswith("[]"):
            lines.append(f"{indent}- type: qa" if "templates" in part else f"{indent}- host: a")
            indent += "  "
    file.write_text("\n".join(lines) + " 2\n")
    shown = key.replace("[]", "[0]")
    (found,) = [problem for problem in problems(file) if f"`{shown}` is not accepted" in problem]
    assert reason in found
    assert f"line {len(lines)}, " in found


def test_a_key_cannot_be_both_known_and_refused() -> None:
    from msgspec import inspect as mi

    from jupiter_engine.settings.cluster import ClusterSettings
    from jupiter_engine.settings.domain import DomainSettings
    from jupiter_engine.settings.reader import leaves

    assert not {key for key, _ in leaves(mi.type_info(DomainSettings))} & set(former_domain.REFUSED)
    assert not {key for key, _ in leaves(mi.type_info(ClusterSettings))} & set(former_cluster.REFUSED)
