"""The test hosts behave like hosts: own names, disks, processes and networks; off is off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import rig as rig_module
from tests.rig import ROOT, Rig, needs_rig

pytestmark = needs_rig


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig(2, disk_bytes=8 * 2**20) as made:
        yield made


def test_hosts_are_apart_and_reach_each_other(rig: Rig) -> None:
    here = rig.ssh(
        "node1", f"hostname; echo $HOME; touch /tmp/mine; ssh -F {rig.ssh_config} node2 'hostname; ls /tmp/mine'"
    )
    assert here.stdout.split() == ["node1", str(rig["node1"].home), "node2"], here.stderr
    assert (rig["node1"].disk / "tmp" / "mine").exists()
    assert rig["node2"].run("ls", str(rig["node1"].disk)).stdout == ""


def test_power_off_takes_processes_not_files_and_boot_changes_the_boot_id(rig: Rig) -> None:
    host = rig["node2"]
    before = host.run("cat", "/proc/sys/kernel/random/boot_id").stdout
    assert rig.ssh("node2", "echo kept > ~/file; setsid sleep 600 >/dev/null 2>&1 </dev/null &").returncode == 0
    sleeper = next(pid for pid in host.pids() if b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes())
    host.power_off()
    assert not Path(f"/proc/{sleeper}").exists()
    assert not host.up
    host.boot()
    assert rig.ssh("node2", "cat ~/file; pgrep sleep").stdout == "kept\n"
    after = host.run("cat", "/proc/sys/kernel/random/boot_id").stdout
    assert len(after.split()) == 1
    assert after != before


def test_a_cut_host_is_silent_until_healed(rig: Rig) -> None:
    host = rig["node2"]
    command = ["ssh", "-F", str(rig.ssh_config), "node2", "echo one; read line; echo $line"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as ssh:
        assert ssh.stdin is not None
        assert ssh.stdout is not None
        assert ssh.stdout.readline() == "one\n"
        host.cut()
        assert rig.ssh("node1", f"ssh -F {rig.ssh_config} -o ConnectTimeout=1 node2 true").returncode == 255
        assert ssh.poll() is None
        host.heal()
        ssh.stdin.write("two\n")
        ssh.stdin.flush()
        assert ssh.stdout.readline() == "two\n"


def test_disk_has_its_size(rig: Rig) -> None:
    full = rig["node1"].run("dd", "if=/dev/zero", "of=big", "bs=1M", "count=20", check=False)
    assert full.returncode == 1
    assert "No space left" in full.stderr
    rig["node1"].run("rm", "big")


def test_login_shell_and_inner_pids() -> None:
    with Rig(1, shell="/bin/dash") as rig:
        said = rig.ssh("node1", "[[ -d / ]] && echo bash; readlink /proc/$$/exe")
        assert Path(said.stdout.strip()).name == "dash"
        rig.ssh("node1", "setsid sleep 600 >/dev/null 2>&1 </dev/null & echo $! > ~/pid")
        inner = int((rig["node1"].home / "pid").read_text())
        outer = rig["node1"].outer_pid(inner)
        assert outer is not None
        assert rig["node1"].inner_pid(outer) == inner
        folder = rig.folder
    assert not folder.exists()


def test_rig_of_a_killed_test_is_swept(tmp_path: Path) -> None:
    script = (
        "import sys, time; from tests.rig import Rig; rig = Rig(1); "
        "print(rig.folder, rig.hosts[0]._init.pid, flush=True); time.sleep(600)"
    )
    root = str(Path(rig_module.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as owner:
        assert owner.stdout is not None
        folder, pid = owner.stdout.readline().split()
        owner.kill()
    assert json.loads((Path(folder) / "owner.json").read_text())["pid"] == owner.pid
    with Rig(1):
        assert not Path(folder).exists()
        deadline = time.monotonic() + 5
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert [path.name for path in ROOT.iterdir() if path.name == Path(folder).name] == []
