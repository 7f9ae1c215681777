"""What the console loads, in processes of its own: static import contracts cannot see deferred imports."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import jupiter_tui

HEAVY = ("torch", "mlx", "mlx_lm", "numpy", "transformers", "asyncssh", "plotext", "tokenizers")


def loaded(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    tail = "\nimport sys\nprint('LOADED', ' '.join(sorted({m.partition('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.rpartition("LOADED ")[2].split())


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_no_screen_and_no_tensor_library(option: str) -> None:
    call = f"try:\n    main([{option!r}])\nexcept SystemExit as end:\n    assert not end.code"
    code = f"from jupiter_tui.main import main\n{call}"
    found = loaded(code)
    assert "jupiter_tui" in found
    assert not found & {"textual", "rich", "yaml", "msgspec", *HEAVY}


def test_the_app_with_all_pages_loads_no_tensor_library() -> None:
    pages = ("fleet", "domain", "review", "train", "promote", "history", "machines", "sheets")
    imports = "import jupiter_tui.app, jupiter_engine.api\n" + "\n".join(
        f"import jupiter_tui.screens.{p}" for p in pages
    )
    found = loaded(imports)
    assert "textual" in found
    assert not found & set(HEAVY)


def test_the_first_frame_waits_for_no_settings_reader() -> None:
    found = loaded("import jupiter_tui.app\nfrom jupiter_tui.app import page\nimport jupiter_tui.screens.train")
    assert not found & {"yaml", "sqlite3", "asyncssh"}


def test_the_view_knows_no_textual() -> None:
    names = sorted(path.stem for path in (Path(jupiter_tui.__file__).parent / "view").glob("[a-z]*.py"))
    assert "nodes" in names
    found = loaded("\n".join(f"import jupiter_tui.view.{name}" for name in names))
    assert not found & {"textual", "rich"}


def test_version_answers_fast(capsys: pytest.CaptureFixture[str]) -> None:
    best = min(timed("--version") for _ in range(3))
    with capsys.disabled():
        print(f"  jupiter-tui --version: {best * 1000:.0f} ms (best of 3)")
    assert best < 1.0


def timed(option: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "jupiter_tui.main", option], capture_output=True, check=True, timeout=30)
    return time.perf_counter() - started
