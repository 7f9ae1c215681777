"""The documentation of settings and the settings themselves say the same."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import yaml
from msgspec import inspect as mi

from jupiter_engine.settings import former_cluster, former_domain, reference, workspace
from jupiter_engine.settings.cluster import hub_node, islands, load_cluster
from jupiter_engine.settings.domain import load_domain
from jupiter_engine.settings.reader import leaves

ROOT = Path(workspace.__file__).parents[2]
CONFIG = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")


def test_the_tables_are_up_to_date() -> None:
    assert reference.rewritten(CONFIG) == CONFIG, "run scripts/config_reference"


@pytest.mark.parametrize("file", reference.FILES)
def test_every_key_is_documented_with_its_meaning_and_its_reader(file: str) -> None:
    kind = reference.FILES[file]
    rows = list(reference.rows(kind))
    assert [row.key for row in rows] == [key for key, _ in leaves(mi.type_info(kind))]
    assert [row.key for row in rows if not row.meaning] == []
    assert [row.key for row in rows if not row.reader and "." in row.key] == []
    for row in rows:
        assert f"| `{row.key}` |" in CONFIG


def test_no_reader_is_named_for_a_key_that_is_gone() -> None:
    keys = {row.key for kind in reference.FILES.values() for row in reference.rows(kind)}
    assert set(reference.READERS) <= keys


def test_the_documented_defaults_are_the_ones_that_are_used() -> None:
    rows = {row.key: row.default for row in reference.rows(reference.FILES["config/domains/NAME.yaml"])}
    assert rows["training.optimizer.learning_rate"] == "0.0001"
    assert rows["sources"] == rows["sources[].id"] == "required"
    assert rows["sources[].max_bytes"] == "none"
    assert rows["sources[].include"] == '["*.md", "*.rst", "*.txt", "*.py"]'
    assert rows["domain.description"] == '""'


def test_a_missing_marker_is_not_overlooked() -> None:
    with pytest.raises(ValueError, match="substring not found"):
        reference.rewritten("no markers")


def test_the_yaml_of_the_documentation_loads(tmp_path: Path) -> None:
    domains = CONFIG[CONFIG.index("## config/domains/NAME.yaml") :]
    smallest = domains.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "rocks.yaml").write_text(smallest)
    settings = yaml.safe_load(smallest)
    guide = (ROOT / "docs" / "new_domain.md").read_text(encoding="utf-8")
    source, template = (block.split("```")[0] for block in guide.split("```yaml\n")[1:])
    settings["sources"] = yaml.safe_load(source)["sources"]
    settings["generation"]["templates"] += yaml.safe_load(template)
    (tmp_path / "stones.yaml").write_text(yaml.safe_dump(settings).replace("name: rocks", "name: stones"))
    assert load_domain(tmp_path / "rocks.yaml").warnings == ()
    assert load_domain(tmp_path / "stones.yaml").warnings == ()


def test_the_islands_of_the_documentation_are_two(tmp_path: Path) -> None:
    section = CONFIG[CONFIG.index("## config/cluster.yaml") : CONFIG.index("## config/domains/NAME.yaml")]
    example = textwrap.dedent(section.split("```yaml\n")[1].split("```")[0])
    nodes = (
        "nodes: [{host: mini-1, device_type: mac}, {host: mini-2, device_type: mac}, {host: box, device_type: nvidia}]"
    )
    (tmp_path / "cluster.yaml").write_text(f"{nodes}\n{example}")
    loaded = load_cluster(tmp_path / "cluster.yaml")
    assert loaded.warnings == ()
    assert [island.nodes for island in islands(loaded.value)] == [("mini-1", "mini-2"), ("box",)]
    assert hub_node(loaded.value).host == "mini-1"


def test_every_older_key_is_mentioned() -> None:
    section = CONFIG[CONFIG.index("## Files of Jupiter's first design") :]
    for key in ("data_sources", "evaluation.benchmarks", "self_improvement", "backend", "network_interface"):
        assert key in section
    older = [*former_domain.REFUSED, *former_cluster.REFUSED]
    for key in ("use_thunderbolt_bridge", "vram_gb", "gpu", "capabilities"):
        assert key in section
    for key in ("custom_eval_file", "min_accuracy", "min_coherence", "assigned_experts", "examples"):
        assert key in section
        assert any(known.endswith(key) for known in older)
