"""What stands between mlx.launch and ssh, run for real: an ssh that only notes how it was called, and bash."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from jupiter_engine.node import program, shim
from jupiter_engine.node.errors import NodeError

# What no quoting may break: quotes, dollars, newlines, backslashes, a history mark.
SCRIPT = """stty -echo; printf '%s\\n' "it's \\"$JUPITER_HOLD_FOLDER\\" !x \\\\ ü"
if [[ -d / ]]; then cmd=(cat); "${cmd[@]}"; fi; echo "$TMPDIR" """


@pytest.fixture
def keep(tmp_path: Path) -> Path:
    keep = tmp_path / "node"
    keep.mkdir()
    far = {"runner": ["/py", "/far/run ner.pyz"], "env": {"TMPDIR": str(tmp_path / "tmp")}}
    (keep / "launch.json").write_text(json.dumps({"ssh": {"node2": far}, "ssh_config": "/conf", "silence_s": 60}))
    return keep


def run_shim(keep: Path, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The file that mlx.launch finds, with a stand-in for the real ssh behind it on the PATH."""
    folder, real = tmp_path / "shim", tmp_path / "real"
    shim.write(folder, keep)
    real.mkdir()
    (real / "ssh").write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done; cat\n')
    (real / "ssh").chmod(0o755)
    environment = {**os.environ, shim.FOLDER_VARIABLE: str(folder), "PATH": f"{folder}:{real}:{os.environ['PATH']}"}
    return subprocess.run(
        ["ssh", *arguments], env=environment, input="nobody reads this", capture_output=True, text=True, check=False
    )


def test_ssh_gets_our_configuration_no_terminal_and_no_input(keep: Path, tmp_path: Path) -> None:
    done = run_shim(keep, tmp_path, "-tt", "-o", "LogLevel=QUIET", "node2", SCRIPT)
    *options, host, line = done.stdout.splitlines()
    assert options[:2] == ["-F", "/conf"]
    assert "-T" in options
    assert "-tt" not in options
    assert "ServerAliveCountMax=30" in options
    assert (options[-1], host) == ("--", "node2")
    assert line.startswith("exec /py ")
    assert "'/far/run ner.pyz' rank-shell " in line


def test_a_host_of_another_launch_is_refused(keep: Path, tmp_path: Path) -> None:
    done = run_shim(keep, tmp_path, "node3", "true")
    assert done.returncode == 1
    assert "'node3' is no host of this launch" in json.loads(done.stdout)["error"]["detail"]


@pytest.mark.parametrize("login_shell", ["/bin/dash", "/bin/bash"])
def test_the_script_arrives_in_bash_as_it_was(tmp_path: Path, login_shell: str) -> None:
    if not Path(login_shell).exists():
        pytest.skip(f"no {login_shell}")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    word = shim.packed(SCRIPT, {"TMPDIR": str(temporary), "JUPITER_HOLD_FOLDER": "/a b"})
    line = "exec " + " ".join(f"'{part}'" for part in _quotable(program.argv("rank-shell", word)))
    done = subprocess.run([login_shell, "-c", line], capture_output=True, text=True, check=True, input="")
    assert done.stdout == f'it\'s "/a b" !x \\ ü\n{temporary}\n'
    assert done.stderr == ""


def test_nothing_starts_after_the_end_of_the_launch(tmp_path: Path) -> None:
    word = shim.packed("echo started", {"TMPDIR": str(tmp_path / "removed")})
    with pytest.raises(NodeError, match="has ended here"):
        shim.shell([word])


def _quotable(words: list[str]) -> list[str]:
    return [word.replace("'", "'\\''") for word in words]
