"""What static contracts cannot see: the modules that really get loaded, in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "mlx", "numpy", "transformers", "safetensors", "tokenizers")
SCREEN = ("textual", "rich", "plotext")


def loaded(code: str) -> set[str]:
    """Top-level names of all modules loaded after running `code`."""
    script = f"{code}\nimport sys, json\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "module",
    [
        "jupiter_engine.api",
        "jupiter_engine.cli.main",
        "jupiter_engine.cli.headless",
        "jupiter_engine.cli.cycles",
        "jupiter_engine.cli.data",
        "jupiter_engine.cli.models",
        "jupiter_engine.cli.planning",
        "jupiter_engine.cli.setup",
        "jupiter_engine.orchestrator.engine",
    ],
)
def test_the_control_wing_loads_no_tensor_library_and_no_screen(module: str) -> None:
    assert not loaded(f"import {module}") & {*HEAVY, *SCREEN, "jupiter_tui"}


@pytest.mark.parametrize("program", ["jupiter_engine.cli.main", "jupiter_tui.main"])
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_almost_nothing(program: str, option: str) -> None:
    code = (
        f"import sys\nfrom {program} import main\n"
        f"try:\n    main([{option!r}])\nexcept SystemExit as error:\n    assert error.code == 0, error.code"
    )
    names = loaded(code)
    assert not names & {*HEAVY, *SCREEN, "asyncssh", "yaml", "sqlite3", "asyncio"}


@pytest.mark.parametrize(
    "module", ["jupiter_engine.worker.collect", "jupiter_engine.worker.filter", "jupiter_engine.worker.gate"]
)
def test_stages_without_a_model_load_no_framework(module: str) -> None:
    assert not loaded(f"import {module}") & {"torch", "mlx", "transformers", *SCREEN, "asyncssh"}


def test_a_worker_never_loads_the_control_wing() -> None:
    code = "import jupiter_engine.worker.__main__, jupiter_engine.worker.train, jupiter_engine.worker.evaluate, sys\n"
    code += "bad = [m for m in sys.modules if m.startswith(('jupiter_engine.api', 'jupiter_engine.cli', "
    code += "'jupiter_engine.orchestrator', 'jupiter_engine.cluster', 'jupiter_engine.remote', 'jupiter_tui'))]\n"
    code += "assert not bad, bad"
    assert not loaded(code) & {*SCREEN, "asyncssh"}
