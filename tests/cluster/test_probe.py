"""A node's probe: this machine for real, fake Macs and NVIDIA boxes through a real sshd, and hostile answers."""

from __future__ import annotations

import io
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jupiter_engine.cluster import probe
from jupiter_engine.cluster.probe import Reading, facts_of, renewed, ticks_of
from jupiter_engine.cluster.readers import LINUX_TOOLS, MAC_TOOLS, NVIDIA_TOOLS
from jupiter_engine.cluster.runner import NodeRunner, RunnerFile
from jupiter_engine.errors import RemoteError
from jupiter_engine.node import probe as node_probe
from jupiter_engine.node import reach, tools
from jupiter_engine.protocol.fleet import NodeFacts
from jupiter_engine.remote.host_keys import KnownHosts
from jupiter_engine.remote.ssh import connect
from jupiter_engine.remote.this_machine import LocalConnection
from jupiter_engine.settings.cluster import ConnectionSettings, NodeSpec
from tests.fake_tools.linux_box import FakeLinux, make_fake_linux
from tests.fake_tools.macs import make_fake_mac, mesh, ring
from tests.sshd import Sshd, start_sshd

NOW = 1_800_000_000.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
OLD_PYTHON = Path.home() / ".pyenv/versions/3.9.18/bin/python"


def reading(**changes: Any) -> Reading:
    answer = {"version": 1, "started_at": NOW, "at": NOW, "tools": {}, **changes}
    return Reading(answer=answer, sent_at=NOW, received_at=NOW)


def ask_node(*arguments: str, python: str = sys.executable, env: dict[str, str] | None = None) -> dict[str, Any]:
    """The verb as a process of its own, the way a node runs it."""
    argv = [python, "-m", "jupiter_engine.node", "probe", *arguments]
    done = subprocess.run(argv, capture_output=True, check=True, env={**os.environ, **(env or {})}, timeout=30)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


# -- this machine --------------------------------------------------------------------------------------
async def test_this_machine_by_the_same_path(tmp_path: Path) -> None:
    runner = NodeRunner(LocalConnection(), str(tmp_path), sys.executable)
    await runner.ensure()
    first = await probe.ask(runner, workdir=str(tmp_path), python=sys.executable)
    facts = facts_of("here", "localhost", first, local=True)
    memory = psutil.virtual_memory()
    assert facts.memory_total_bytes == memory.total
    assert abs(facts.memory_used_bytes - (memory.total - memory.available)) < memory.total * 0.2
    assert facts.cores == os.cpu_count()
    assert facts.system == f"{os.uname().sysname} {os.uname().release} {os.uname().machine}"
    assert facts.python == sys.version.split()[0]
    assert facts.versions["mlx"] >= "0.32.1"
    assert {"torch", "jupiter", "numpy"} <= set(facts.versions)
    assert facts.boot_id == BOOT_ID
    assert facts.clock_skew_s is None
    assert "127.0.0.1/8" in [address for one in facts.interfaces for address in one.addresses]
    assert facts.raw["node"]["own_name"]["hostname"] == socket.gethostname()
    again = renewed(facts, await probe.ask(runner, workdir=str(tmp_path), fast=True), before=ticks_of(first))
    assert 0 <= again.cpu_percent <= 100
    assert again.versions == facts.versions
    assert again.interfaces == facts.interfaces
    assert again.raw["node"]["shell"] == facts.raw["node"]["shell"]


@pytest.mark.skipif(not OLD_PYTHON.exists(), reason="needs a Python 3.9")
def test_a_node_with_python_39_answers(tmp_path: Path) -> None:
    runner = tmp_path / "runner.pyz"
    runner.write_bytes(RunnerFile.packed().data)
    argv = [str(OLD_PYTHON), "-I", "-S", "-X", "utf8", str(runner), "probe", "--workdir", str(tmp_path)]
    done = subprocess.run([*argv, "--python", sys.executable], capture_output=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["node_python"]["version"].startswith("3.9.")
    assert answer["packages"]["packages"]["mlx"] >= "0.32.1"
    assert json.loads(subprocess.run([*argv, "--fast"], capture_output=True, check=True).stdout)["fast"] is True


def test_packages_of_the_newest_environment_on_the_node(tmp_path: Path) -> None:
    for name, age in (("old", 100), ("new", 0)):
        folder = tmp_path / "environments" / name
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to(sys.executable)
        (folder / "ready.json").write_text("{}")
        os.utime(folder / "ready.json", (time.time() - age,) * 2)
    (tmp_path / "environments" / "half").mkdir()
    answer = ask_node("--workdir", str(tmp_path))
    assert [one["hash"] for one in answer["environments"]] == ["new", "old"]
    assert answer["packages"]["environment"] == "new"
    assert facts_of("n", "n", reading(**answer)).environment == "new"


def test_an_interpreter_that_is_not_there_is_recorded() -> None:
    assert ask_node("--python", "/nowhere/python")["packages"]["error"] == "not found"


# -- tools that misbehave ------------------------------------------------------------------------------
def script(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_a_tool_that_hangs_is_left_behind_with_its_children(tmp_path: Path) -> None:
    script(tmp_path, "nvidia-smi", f"sleep 600 & echo $! > {tmp_path}/child; echo half; wait")
    began = time.monotonic()
    answer = ask_node("--fast", env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert time.monotonic() - began < 3
    assert answer["tools"]["nvidia_smi"] == {"out": "half\n", "err": "", "timed_out": True}
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        if psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.02)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_tool_that_floods_is_cut_off(tmp_path: Path) -> None:
    script(tmp_path, "flood", "exec yes 0123456789")
    answer = tools.run_tool((str(tmp_path / "flood"),), 5.0, limit_bytes=100_000)
    assert len(answer["out"]) == 100_000
    assert answer["truncated"] is True


def test_every_tool_hanging_at_once_takes_no_longer(tmp_path: Path) -> None:
    for tool in ("ip", "nvidia-smi", "journalctl", "dmesg", "loginctl", "systemctl", "ibv_devices", "timedatectl"):
        script(tmp_path, tool, "sleep 60")
    began = time.monotonic()
    answer = ask_node("--timeout-s", "1", env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert time.monotonic() - began < 3
    assert answer["tools"]["ip_addr"]["timed_out"] is True
    facts = facts_of("n", "n", reading(**answer))
    assert "ip_addr" in facts.raw["timed_out"]
    assert facts.interfaces == ()


def test_a_missing_tool_is_no_error() -> None:
    assert tools.run_tool(("no-such-tool-anywhere",), 1.0) == {"missing": True}


def test_tools_are_asked_as_their_readers_expect() -> None:
    asked = {**node_probe.TOOLS["Darwin"], **node_probe.FAST_TOOLS["Darwin"]}
    for key, argv in MAC_TOOLS.items():
        if key == "sysctl":
            assert set(argv) <= set(asked[key])
        else:
            assert asked[key] == argv, key
    for key, argv in {**LINUX_TOOLS, **NVIDIA_TOOLS}.items():
        assert node_probe.TOOLS["Linux"][key] == argv, key


# -- between nodes -------------------------------------------------------------------------------------
@pytest.fixture
def listener() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield server.getsockname()[1]


def test_reach_measures_and_says_why_not(listener: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        closed = taken.getsockname()[1]
        targets = [f"127.0.0.1:{listener}", f"127.0.0.1:{closed}", "no-host.invalid:22", "nonsense"]
        found = reach.reach(targets)["reach"]
    assert 0 < found[targets[0]]["rtt_s"] < 0.5
    assert found[targets[0]]["answered"] == reach.TRIES
    # A machine that refuses has answered: that takes a round trip, too.
    assert found[targets[1]]["refused"] is True
    assert found[targets[1]]["rtt_s"] is not None
    assert found[targets[2]]["rtt_s"] is None
    assert found[targets[2]]["error"]
    assert "is not HOST:PORT" in found["nonsense"]["error"]


def test_reach_from_a_process_without_a_session(listener: int) -> None:
    answer = ask_node("--reach", f"127.0.0.1:{listener}", "--detached")
    assert answer["detached"] is True
    assert answer["reach"][f"127.0.0.1:{listener}"]["rtt_s"] > 0


def test_echo_in_both_directions_and_only_with_the_token() -> None:
    argv = [sys.executable, "-m", "jupiter_engine.node", "probe", "--echo-serve", "--bind", "127.0.0.1"]
    with subprocess.Popen([*argv, "--echo-bytes", "3000000"], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        hello = json.loads(server.stdout.readline())
        target = f"127.0.0.1:{hello['port']}"
        with socket.create_connection(("127.0.0.1", hello["port"])) as stranger:
            stranger.sendall(b"x" * len(hello["token"]))
            assert stranger.recv(10) == b""
        answer = reach.echo_to(target, hello["token"], 3_000_000)
        served = json.loads(server.stdout.readline())
    assert (answer["sent_bytes"], answer["received_bytes"]) == (3_000_000, 3_000_000)
    assert answer["to_bytes_per_s"] > 1e6
    assert answer["from_bytes_per_s"] > 1e6
    assert served["received_bytes"] == 3_000_000


def test_an_echo_that_nobody_calls_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "ECHO_WAIT_S", 0.2)
    assert "nobody connected" in reach.echo_serve("127.0.0.1", io.StringIO())["error"]


# -- machines that look like others --------------------------------------------------------------------
async def facts_over_ssh(server: Sshd, tmp_path: Path, name: str) -> NodeFacts:
    node = NodeSpec(
        host=server.host, name=name, ssh_port=server.port, ssh_user=server.user, identity=str(server.identity)
    )
    known = KnownHosts(server.known_hosts(), user=(), system=())
    connection = await connect(node, ConnectionSettings(), known_hosts=known, ssh_config=None)
    try:
        runner = NodeRunner(connection, str(tmp_path / "work"), sys.executable)
        await runner.ensure()
        answer = await probe.ask(runner, workdir=runner.workdir, python=sys.executable)
        return facts_of(name, server.host, answer, rtt_s=await probe.round_trip(connection))
    finally:
        await connection.close()


async def test_a_fake_mac_end_to_end(tmp_path: Path) -> None:
    found = mesh(3, generation=5, rdma=True)
    server = start_sshd(tmp_path / "sshd", path_first=make_fake_mac(tmp_path / "tools", found[0]))
    try:
        facts = await facts_over_ssh(server, tmp_path, "mac-a")
    finally:
        server.stop()
    assert facts.system == "Darwin 25.2.0 arm64"
    assert (facts.twin, facts.accelerator) == ("mlx", "Metal")
    assert (facts.chip, facts.model, facts.os_build) == ("Apple M4 Pro", "Mac16,11", "25C56")
    assert facts.memory_total_bytes == 64 << 30
    assert facts.cores == 14
    assert facts.boot_id == "1732000000"
    assert facts.wired_limit_mb == 0
    assert facts.sleep["sleep"] == "1"
    assert facts.on_battery is False
    assert facts.thermal == "nominal"
    kinds = {one.name: one.kind for one in facts.interfaces}
    assert (kinds["en0"], kinds["en1"], kinds["en2"]) == ("ethernet", "wifi", "thunderbolt")
    assert "192.168.1.0/24" in facts.routes
    # Both clocks are one: what is measured is the error of the measuring.
    assert facts.clock_skew_s is not None
    assert abs(facts.clock_skew_s) < 1.5
    assert facts.rtt_s is not None
    assert facts.raw["ibv_devices"].count("rdma_en") == 2


async def test_a_fake_mac_that_answers_less(tmp_path: Path) -> None:
    folder = make_fake_mac(tmp_path / "tools", ring(3)[0])
    for tool in ("sysctl", "pmset", "vm_stat"):
        script(folder, tool, "echo nonsense; exit 3")
    server = start_sshd(tmp_path / "sshd", path_first=folder)
    try:
        facts = await facts_over_ssh(server, tmp_path, "mac-a")
    finally:
        server.stop()
    assert facts.memory_total_bytes == 64 << 30
    assert facts.sleep == {}
    assert facts.on_battery is None
    assert facts.wired_limit_mb is None


async def test_a_fake_nvidia_box_end_to_end(tmp_path: Path) -> None:
    box = FakeLinux("rig", number=1, xid=True)
    server = start_sshd(tmp_path / "sshd", path_first=make_fake_linux(tmp_path / "tools", box))
    try:
        facts = await facts_over_ssh(server, tmp_path, "rig")
    finally:
        server.stop()
    assert (facts.twin, facts.accelerator) == ("torch", "CUDA")
    assert [gpu.name for gpu in facts.gpus] == ["NVIDIA GeForce RTX 4090"] * 2
    assert facts.gpus[0].driver == "580.95.05"
    assert {one.name: one.kind for one in facts.interfaces}["tailscale0"] == "vpn"
    assert "Xid" in facts.raw["kernel_log"]


async def test_noise_of_the_login_shell_is_seen(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in (".bashrc", ".zshenv"):
        (home / name).write_text("echo welcome to the machine\n")
    shell = ask_node(env={"HOME": str(home), "SSH_CLIENT": "127.0.0.1 1 22"})["shell_noise"]
    here = psutil.Process().username()
    if Path(os.environ.get("SHELL", "/bin/bash")).name not in ("bash", "zsh"):
        pytest.skip(f"the login shell of {here} reads neither file")
    assert shell == "welcome to the machine\n"


# -- answers that are none -----------------------------------------------------------------------------
@pytest.mark.parametrize("answer", [{}, {"version": 2, "tools": {}}, {"version": 1}, {"version": 1, "tools": [1]}])
def test_what_is_no_answer_of_a_probe_is_refused(answer: dict[str, Any]) -> None:
    with pytest.raises(RemoteError, match="answered a probe with something else"):
        facts_of("n", "n", Reading(answer=answer, sent_at=0, received_at=0))


HOSTILE: list[Any] = [
    None,
    -1,
    2**80,
    1e400,
    "x" * 1_000_000,
    "\x1b[2J\x07evil\u202e",
    [],
    [[[[[[]]]]]],
    {"a": {"b": {"c": {"d": {"e": 1}}}}},
    {"free_bytes": "9" * 400, "version": {"x": 1}, "after": {"busy": "no", "total": -1}, "packages": [1], "cuda": []},
]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_values_anywhere_harm_nobody(value: Any) -> None:
    keys = ["load", "disk", "boot_id", "meminfo", "cpu", "cores", "packages", "interfaces", "power_supply", "cpuinfo"]
    keys += ["own_name", "processes", "node_python", "started_at", "at", "dmi", "environments"]
    every = dict.fromkeys(keys, value)
    names = {**MAC_TOOLS, **LINUX_TOOLS, **NVIDIA_TOOLS}
    odd = {name: {"out": value if isinstance(value, str) else "\x1b[2J", "status": 0} for name in names}
    for system in ("Darwin 25.2.0 arm64", "Linux 6 x86_64", "\x1b[2J"):
        fooled = {**odd, "uname": {"out": system, "status": 0}, "x": value}
        facts = facts_of("n", "n", reading(**every, tools=fooled))
        assert 0 <= facts.cpu_percent <= 100
        assert len(repr(facts)) < 16_000_000
        assert "\x1b" not in repr(facts)
        assert "\\x1b" not in repr(facts)
        renewed(facts, reading(**every, tools=fooled))


# -- arithmetic ----------------------------------------------------------------------------------------
def test_clock_skew_is_taken_at_half_the_round_trip() -> None:
    # 0.2 s on the way there, 1 s of work, 0.4 s on the way back; the node's clock is 5 s ahead.
    answer = {"started_at": NOW + 0.2 + 5, "at": NOW + 1.2 + 5}
    skew = probe.clock_skew(Reading(answer=answer, sent_at=NOW, received_at=NOW + 1.6))
    assert skew == pytest.approx(5 - 0.1)


def test_load_of_the_processor_is_since_the_reading_before() -> None:
    cpu = {"before": {"busy": 90.0, "total": 190.0}, "after": {"busy": 100.0, "total": 200.0}}
    alone = facts_of("n", "n", reading(cpu=cpu))
    assert alone.cpu_percent == 100.0
    longer = facts_of("n", "n", reading(cpu=cpu), before=probe.Ticks(busy=50.0, total=100.0))
    assert longer.cpu_percent == 50.0
    top = "CPU usage: 50.0% user, 50.0% sys, 0.0% idle\nCPU usage: 3.0% user, 5.5% sys, 91.5% idle\n"
    mac = facts_of("n", "n", reading(tools={"top": {"out": top, "status": 0}}))
    assert mac.cpu_percent == pytest.approx(8.5)


@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ([], None),
        ([{"type": "Mains", "online": "1"}], None),
        ([{"type": "Battery"}, {"type": "Mains", "online": "1"}], False),
        ([{"type": "Battery"}, {"type": "Mains", "online": "0"}], True),
    ],
)
def test_a_linux_laptop_on_its_battery(supplies: list[dict[str, str]], expected: bool | None) -> None:
    assert facts_of("n", "n", reading(power_supply=supplies)).on_battery is expected


def test_processes_of_jupiter_are_listed(tmp_path: Path) -> None:
    code = f"import time; time.sleep(60)  # jupiter_engine.worker.rank {shlex.quote(str(tmp_path))}"
    with subprocess.Popen([sys.executable, "-c", code]) as rank:
        try:
            found = {one["pid"]: one for one in ask_node()["processes"]}
        finally:
            rank.kill()
    assert found[rank.pid]["parent"] == os.getpid()
    assert "jupiter_engine.worker.rank" in found[rank.pid]["command"]


def test_threads_end_with_the_probe() -> None:
    before = threading.active_count()
    tools.run_tools({"a": ("true",), "b": ("sleep", "30")}, 0.2)
    deadline = time.monotonic() + 2
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() == before
