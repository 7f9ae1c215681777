"""Every settings file that Jupiter comes with loads, and says what it seems to say."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from msgspec import inspect as mi

from jupiter_engine.settings import workspace
from jupiter_engine.settings.cluster import ClusterSettings, launch_spec, load_cluster, local_roles
from jupiter_engine.settings.domain import check_paths, load_domain
from jupiter_engine.settings.reader import leaves

SHIPPED = workspace.shipped_folder()
DOMAIN_FILES = sorted((SHIPPED / "domains").glob("*.yaml"))


def test_the_shipped_files_are_all_known_here() -> None:
    files = {str(file.relative_to(SHIPPED)) for file in SHIPPED.rglob("*") if file.is_file()}
    assert files == {"cluster.yaml", "domains/_template.yaml", "domains/python.yaml"}


@pytest.mark.parametrize("file", DOMAIN_FILES, ids=lambda file: file.name)
def test_a_shipped_domain_loads_without_a_warning(file: Path) -> None:
    assert load_domain(file).warnings == ()


def test_the_python_domain_runs_with_no_network_and_no_other_file() -> None:
    loaded = load_domain(SHIPPED / "domains" / "python.yaml")
    check_paths(loaded)
    settings = loaded.value
    assert {source.type for source in settings.sources} == {"stdlib"}
    assert settings.base == "smollm2"
    assert (settings.training.sequence_tokens, settings.training.batch_sequences) == (256, 8)
    assert settings.training.optimizer.learning_rate == 1e-4
    assert {template.type for template in settings.generation.templates} >= {"qa", "explanation", "rephrase", "code"}


def test_the_shipped_cluster_is_this_machine_for_everything() -> None:
    loaded = load_cluster(SHIPPED / "cluster.yaml")
    assert loaded.warnings == ()
    assert local_roles(loaded.value) == {"generate", "train", "evaluate"}
    assert launch_spec(loaded.value).launcher == "in_process"


def test_the_examples_of_the_shipped_cluster_are_true(tmp_path: Path) -> None:
    """Commented lines that look like settings, uncommented, load; the only notice is that the key file is missing."""
    text = (SHIPPED / "cluster.yaml").read_text()
    example = re.sub(r"(?m)^( *)# ( *(?:- )?[a-z_]+:(?: |$))", r"\1\2", text)
    assert example.count("# ") < text.count("# ") - 30
    file = tmp_path / "cluster.yaml"
    file.write_text(example)
    loaded = load_cluster(file)
    assert [node.host for node in loaded.value.nodes][1:] == ["mac-mini-1.local", "mac-mini-2.local", "192.168.1.100"]
    assert [group.name for group in loaded.value.groups] == ["macs", "cards"]
    assert loaded.value.launch.group == "macs"
    assert all("`nodes[3].identity`" in warning for warning in loaded.warnings)
    keys = {key for key, _ in leaves(mi.type_info(ClusterSettings))} - set(loaded.places)
    given = {re.sub(r"\[[0-9]+\]", "[]", key) for key in loaded.places}
    # Islands have an example of their own, in docs/config.md.
    left_out = {key for key in keys - given if not key.startswith("islands")}
    assert left_out == {"nodes[].can_generate", "nodes[].can_train"}


def test_the_package_carries_the_files_of_the_repository() -> None:
    """jupiter_engine/settings/shipped is a link to config/, so a wheel holds exactly those files."""
    link = Path(workspace.__file__).parent / "shipped"
    assert link.is_symlink()
    assert link.samefile(Path(workspace.__file__).parents[2] / "config")


@pytest.mark.slow
def test_a_wheel_brings_the_settings_along(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    root = Path(workspace.__file__).parents[2]
    for name in ("pyproject.toml", "README.md", "LICENSE", "jupiter_engine", "jupiter_tui", "config"):
        if (root / name).exists():
            (tmp_path / name).symlink_to(root / name)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    out = tmp_path / "wheel"
    run = subprocess.run([sys.executable, "-c", build, str(out)], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for file in SHIPPED.rglob("*.yaml"):
            packed = archive.read(f"jupiter_engine/settings/shipped/{file.relative_to(SHIPPED)}")
            assert packed == file.read_bytes()
