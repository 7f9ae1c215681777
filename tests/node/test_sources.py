"""The node runner runs where nothing is installed: old Pythons, no site packages; and its file is always the same."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import jupiter_engine.node
from jupiter_engine.cluster import runner_file
from jupiter_engine.cluster.runner import PYTHON_FLAGS
from jupiter_engine.cluster.runner_file import PACKAGE, RunnerFile
from jupiter_engine.node import program
from jupiter_engine.node.__main__ import VERBS

SOURCES = sorted(Path(next(iter(jupiter_engine.node.__path__))).rglob("*.py"))
OLD = [
    *Path.home().glob(".pyenv/versions/3.[678].*/bin/python3"),
    *Path.home().glob(".pyenv/versions/2.7.*/bin/python2"),
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.name))
def test_sources_are_python_3_9_and_import_only_the_standard_library(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all(alias.name.partition(".")[0] in sys.stdlib_module_names for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 or (node.module or "").partition(".")[0] in sys.stdlib_module_names
    first = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not first or first[0].module == "__future__", "annotations of later Pythons are not to be evaluated"


def test_the_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    packed = runner_file._packed.__wrapped__()
    script = "from jupiter_engine.cluster.runner_file import RunnerFile; print(RunnerFile.packed().sha)"
    again = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    assert again.stdout.strip() == packed.sha
    assert packed.name == f"{packed.sha[:16]}.pyz"
    file = tmp_path / packed.name
    file.write_bytes(packed.data)
    with zipfile.ZipFile(file) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        names = archive.namelist()
    assert set(names) == {"__main__.py", *(f"{PACKAGE}/{path.relative_to(SOURCES[0].parent)}" for path in SOURCES)}


def pythons() -> list[str]:
    found = [str(path) for path in sorted(Path.home().glob(".pyenv/versions/3.*/bin/python3"))]
    fit = [path for path in found if int(path.split("/versions/3.")[1].split(".")[0]) >= 9]
    return [*fit, sys.executable]


@pytest.mark.parametrize("python", pythons())
def test_every_verb_can_be_loaded_by_every_python(python: str, tmp_path: Path) -> None:
    file = tmp_path / "runner.pyz"
    file.write_bytes(RunnerFile.packed().data)
    done = subprocess.run([python, *PYTHON_FLAGS, str(file), "hello"], capture_output=True, check=True, timeout=20)
    hello = json.loads(done.stdout)
    assert hello["version"] == RunnerFile.packed().sha
    verbs = [verb for verb, place in VERBS.items() if (SOURCES[0].parent / f"{place.split(':')[0]}.py").exists()]
    assert "follow" in verbs
    load = f"import sys; sys.path.insert(0, {str(file)!r}); from {PACKAGE}.__main__ import find; "
    load += f"assert all(callable(find(verb)) for verb in {verbs!r})"
    subprocess.run([python, "-I", "-S", "-W", "error", "-c", load], check=True, timeout=20)


@pytest.mark.skipif(not OLD, reason="no Python older than 3.9 on this machine")
def test_a_python_that_is_too_old_says_so(tmp_path: Path) -> None:
    file = tmp_path / "runner.pyz"
    file.write_bytes(RunnerFile.packed().data)
    for python in OLD:
        done = subprocess.run([str(python), str(file), "hello"], capture_output=True, check=False, timeout=20)
        assert done.returncode == 1
        assert json.loads(done.stdout)["error"]["kind"] == "python"


def test_flags_of_both_sides_agree() -> None:
    assert program.PYTHON_FLAGS == PYTHON_FLAGS


def test_run_from_the_source_tree() -> None:
    """Started again from a source tree, it finds itself."""
    done = subprocess.run(program.argv("hello"), capture_output=True, check=True, timeout=20)
    assert json.loads(done.stdout)["version"] == "source"
