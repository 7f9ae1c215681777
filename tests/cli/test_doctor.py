"""`jupiter doctor` as a person or a script meets it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jupiter_engine.cli.main import main
from jupiter_engine.cluster.fleet import KNOWN_HOSTS
from jupiter_engine.errors import ExitCode
from tests.fake_tools.macs import FakeMac, make_fake_mac
from tests.sshd import Sshd, free_port, start_sshd


@pytest.fixture
def mac(tmp_path: Path) -> Iterator[Sshd]:
    tools = make_fake_mac(tmp_path / "tools", FakeMac("mini", number=1))
    loginctl = tools / "launchctl"
    loginctl.write_text(
        f'#!/bin/sh\nF={tmp_path}/synch\ncase "$*" in\n  "getenv MLX_METAL_FAST_SYNCH") [ -e $F ] && echo 1;;\n'
        '  "unsetenv MLX_METAL_FAST_SYNCH") rm $F; echo gone;;\nesac\n'
    )
    loginctl.chmod(0o755)
    server = start_sshd(tmp_path / "sshd", path_first=tools)
    yield server
    server.stop()


def workspace(folder: Path, *nodes: str) -> Path:
    (folder / "config").mkdir(parents=True)
    (folder / "config" / "cluster.yaml").write_text(
        "\n".join(["schema: jupiter/cluster@1", "nodes:", *(f"  - {node}" for node in nodes)]) + "\n"
    )
    return folder


def entry(server: Sshd, folder: Path, *more: str) -> str:
    known = folder / KNOWN_HOSTS
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(server.known_hosts_line + "\n")
    own = (f"host: {server.host}", "name: mini", f"ssh_port: {server.port}", f"ssh_user: {server.user}")
    place = (f"identity: {server.identity}", f"workdir: {folder}/there", f"python: {sys.executable}")
    return "{" + ", ".join((*own, *place, "environment: own", "device_type: mac", *more)) + "}"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        status = main(argv)
    except SystemExit as error:
        status = int(error.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_one_machine_that_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = workspace(tmp_path / "w", "{host: localhost}")
    status, out, err = run(capsys, "doctor", "--workspace", str(root))
    assert (status, err) == (ExitCode.DONE, "")
    assert "ok unreachable " in out
    assert "looked at and well:" in out
    assert out.splitlines()[-1].startswith("0 to mend, ")


def test_findings_by_severity_with_what_mends_them(
    mac: Sshd, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = workspace(tmp_path / "w", "{host: localhost}", entry(mac, tmp_path / "w", "role: generator"))
    status, out, _ = run(capsys, "doctor", "--workspace", str(root))
    lines = out.splitlines()
    assert status == ExitCode.DONE, out
    sleep = next(number for number, line in enumerate(lines) if line.startswith(".. sleep "))
    assert "mini goes to sleep after 1 idle minutes" in lines[sleep]
    assert lines[sleep + 1].strip() == "-> let mini stay awake: on mini: sudo pmset -a sleep 0"
    assert lines.index("works worse, or may break:") < sleep < lines.index("looked at and well:")


def test_a_script_gets_findings_and_an_exit_status(
    mac: Sshd, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = workspace(tmp_path / "w", "{host: localhost, role: generator}", entry(mac, tmp_path / "w", "role: trainer"))
    (tmp_path / "synch").touch()
    status, out, _ = run(capsys, "doctor", "--workspace", str(root), "--json", "--node", "mini")
    found = json.loads(out)
    assert status == ExitCode.STAGE_FAILED
    assert [one["check"] for one in found if one["severity"] == "fail"] == ["fast-synch"]
    assert all("mini" in one["nodes"] or not one["nodes"] for one in found)
    assert found[0]["fix"]["safe"] is True


def test_a_safe_fix_is_carried_out(mac: Sshd, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = workspace(tmp_path / "w", "{host: localhost, role: generator}", entry(mac, tmp_path / "w", "role: trainer"))
    (tmp_path / "synch").touch()
    at = ("--workspace", str(root))
    status, out, _ = run(capsys, "doctor", *at, "--fix", "fast-synch")
    assert status == ExitCode.DONE
    assert "-> unset it on mini: on mini: launchctl unsetenv MLX_METAL_FAST_SYNCH\ngone\n" in out
    assert not (tmp_path / "synch").exists()
    status, out, _ = run(capsys, "doctor", *at, "--fix", "fast-synch")
    assert (status, out) == (ExitCode.DONE, "ok fast-synch: there is nothing to mend\n")
    status, out, _ = run(capsys, "doctor", *at, "--fix", "sleep")
    assert status == ExitCode.STAGE_FAILED
    assert "a person has to: let mini stay awake" in out


def test_a_machine_that_is_needed_and_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = f"{{host: 127.0.0.1, name: gone, ssh_port: {free_port()}, ssh_user: ada, device_type: cpu, role: trainer}}"
    root = workspace(tmp_path / "w", "{host: localhost, role: generator}", gone)
    status, out, _ = run(capsys, "doctor", "--workspace", str(root))
    assert status == ExitCode.NO_NODE
    assert "!! unreachable " in out
    assert "gone cannot be used: 127.0.0.1" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--node", "nobody"), "there is no node 'nobody'"),
        (("--fix", "clock-scew"), "there is no check 'clock-scew' -> did you mean clock-skew?"),
    ],
)
def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], said: str) -> None:
    root = workspace(tmp_path / "w", "{host: localhost}")
    status, _, err = run(capsys, "doctor", "--workspace", str(root), *argv)
    assert status == ExitCode.USAGE
    assert said.replace("'", "") in err.replace("'", "").replace('"', "")


def test_progress_is_for_a_terminal_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = workspace(tmp_path / "w", "{host: localhost}")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    _, out, err = run(capsys, "doctor", "--workspace", str(root))
    assert err.startswith("\rasking 1 node(s)")
    assert err.endswith(" \r")
    assert "\r" not in out
    assert os.linesep in out
