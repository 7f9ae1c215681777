"""Words and code stay together: names, sizes, documents, shipped files."""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from jupiter_engine.cli.main import parser
from jupiter_engine.errors import ExitCode

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = sorted([*ROOT.glob("jupiter_engine/**/*.py"), *ROOT.glob("jupiter_tui/**/*.py")])
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "core"}
LONGEST_MODULE = 620
LONGEST_FUNCTION = 90


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_module(path: Path) -> None:
    source = path.read_text()
    tree = ast.parse(source)
    assert not FORBIDDEN_NAMES & set(path.relative_to(ROOT).with_suffix("").parts), "name says nothing"
    if source.strip():
        assert ast.get_docstring(tree), "module without a docstring"
    assert source.count("\n") <= LONGEST_MODULE
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            # The command line is one long declaration.
            assert length <= LONGEST_FUNCTION or (path.name, node.name) == ("main.py", "parser"), node.name


def test_broad_handlers_say_what_they_survive() -> None:
    for path in PRODUCT:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"except (Exception|BaseException)\b", line) and "BLE001" in line:
                assert re.search(r"BLE001 - .{10,}", line), f"{path}:{number}"


def test_nothing_pickles_or_uses_a_shell() -> None:
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert "pickle" not in names, path
            if isinstance(node, ast.keyword) and node.arg == "shell":
                raise AssertionError(f"{path}: shell=")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path


def commands() -> dict[str, argparse.ArgumentParser]:
    actions = parser()._actions
    subparsers = next(a for a in actions if isinstance(a, argparse._SubParsersAction))
    return dict(subparsers.choices)


def test_every_command_and_option_is_documented() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    for name, sub in commands().items():
        assert f"`{name}" in text, name
        for action in sub._actions:
            for option in action.option_strings:
                if option.startswith("--") and option != "--help":
                    assert option in text, f"{name} {option}"


def test_every_documented_command_exists() -> None:
    known = set(commands())
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for name in re.findall(r"\bjupiter ([a-z][a-z-]+)\b", path.read_text()):
            if f"`jupiter {name}" in path.read_text():
                assert name in known, f"{path.name}: jupiter {name}"


def test_every_exit_status_is_documented() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    for code in ExitCode:
        assert f"| {int(code)} |" in text, code


def test_links_between_documents_lead_somewhere() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} -> {target}"


def test_extras_named_in_the_readme_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"mac", "nvidia", "cpu", "dev"} <= set(project["optional-dependencies"])
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for extra in re.findall(r"jupiter\[([a-z,]+)\]|\.\[([a-z,]+)\]", path.read_text()):
            for name in "".join(extra).split(","):
                assert name in project["optional-dependencies"], f"{path.name}: {name}"


def test_no_artefact_is_tracked() -> None:
    for name in tracked():
        assert not re.search(r"\.(pyc|log|db|safetensors|gguf|npy)$|^\.jupiter/|\.coverage", name), name
        if (ROOT / name).is_file():
            assert (ROOT / name).stat().st_size < 1_000_000, name


def test_scripts_run_from_anywhere_and_are_executable() -> None:
    for name in ("demo", "test", "check"):
        path = ROOT / "scripts" / name
        assert path.stat().st_mode & 0o111, name
        assert 'cd "$(dirname "$0")/.."' in path.read_text(), name
    assert "./scripts/test" in (ROOT / ".ci" / "run").read_text()
