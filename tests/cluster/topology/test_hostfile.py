"""Host files: MLX's own parser takes them, its launcher runs a ring from one, and wrong ones are refused."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jupiter_engine.cluster.hostfile import Entry, for_leader, hostfile, node_addresses, node_interfaces, node_rdma
from jupiter_engine.cluster.machine import NodeTools
from jupiter_engine.cluster.topology import plan_group
from jupiter_engine.protocol.fleet import GroupPlan
from tests.fake_tools.linux_box import FakeLinux
from tests.fake_tools.macs import mesh, ring, tools, two_cables
from tests.sshd import free_port

# MLX's parser leaves the file it reads open until it is collected.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

LAUNCH = Path(sys.executable).with_name("mlx.launch")


def mlx_parser() -> Any:
    common = pytest.importorskip("mlx._distributed_utils.common")
    return common.Hostfile


def plans() -> list[GroupPlan]:
    found = [ring(3), mesh(4, generation=5, rdma=True), ring(4, generation=5, rdma=True), two_cables()]
    found.append(two_cables(generation=5, rdma=True))
    return [plan_group("group", tools(macs), twin="mlx") for macs in found]


@pytest.mark.parametrize("number", range(5))
def test_mlx_reads_back_what_was_written(tmp_path: Path, number: int) -> None:
    made = plans()[number]
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps(made.hostfile))
    read = mlx_parser().from_file(path)
    assert read.backend == made.backend
    assert [host.ssh_hostname for host in read.hosts] == list(made.nodes)
    assert [tuple(host.ips) for host in read.hosts] == list(node_addresses(made).values())
    assert read.to_json() == made.hostfile


@pytest.mark.parametrize("number", [1, 2, 4])
def test_mlx_launch_accepts_the_rdma_lists(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own checks of a jaccl host file, up to where it would start processes."""
    pytest.importorskip("mlx._distributed_utils.launch")
    launch = importlib.import_module("mlx._distributed_utils.launch")
    started: list[Any] = []
    monkeypatch.setattr(launch, "_launch_with_io", lambda *call: started.append(call))
    path = tmp_path / "hosts.json"
    made = plans()[number]
    path.write_text(json.dumps(made.hostfile))
    monkeypatch.setattr(sys, "argv", ["mlx.launch", "--hostfile", str(path), "--", "true"])
    launch.main()
    ((_, calls, _),) = started
    assert len(calls) == len(made.nodes)
    devices = json.loads(calls[0][0][4]["MLX_IBV_DEVICES"])
    assert devices == [host["rdma"] for host in made.hostfile["hosts"]]
    assert list(node_rdma(made)) == list(made.nodes)


def test_parts_of_a_plan_by_node() -> None:
    made = plans()[1]
    assert node_rdma(made)["mac-b"] == ("rdma_en2", None, "rdma_en3", "rdma_en4")
    assert node_rdma(plans()[0]) == {}
    boxes = plan_group("cards", [FakeLinux("one", 1).tools(), FakeLinux("two", 2).tools()], twin="torch")
    assert node_addresses(boxes) == {"one": ("192.168.1.61",), "two": ("192.168.1.62",)}
    assert node_interfaces(boxes) == {"one": "enp5s0", "two": "enp5s0"}


def test_the_leader_starts_its_own_ranks_without_ssh() -> None:
    made = plan_group("group", tools(ring(3)), twin="mlx", ranks_per_node=2)
    hosts = for_leader(made.hostfile)["hosts"]
    assert [host["ssh"] for host in hosts] == ["127.0.0.1", "127.0.0.1", "mac-b", "mac-b", "mac-c", "mac-c"]
    assert made.hostfile["hosts"][0]["ssh"] == "mac-a"
    assert node_addresses(made)["mac-b"] == tuple(hosts[2]["ips"])


RING = (Entry(ssh="a", addresses=("10.0.0.1",)), Entry(ssh="b", addresses=("10.0.0.2",)))
RDMA = (
    Entry(ssh="a", addresses=("10.0.0.1",), rdma=(None, "rdma_en2")),
    Entry(ssh="b", addresses=("10.0.0.2",), rdma=("rdma_en2", None)),
)


@pytest.mark.parametrize(
    ("backend", "entries", "ranks", "words"),
    [
        ("ring", (), 1, "at least one host"),
        ("ring", (Entry(ssh="-oProxyCommand=x", addresses=("10.0.0.1",)),), 1, "begins like an option"),
        ("ring", (RING[0], Entry(ssh="b", addresses=())), 1, "b has no address"),
        ("ring", (RING[0], Entry(ssh="b", addresses=("10.0.0.2", "10.0.0.3"))), 1, "same number of addresses"),
        ("jaccl", RDMA, 2, "one rank a machine"),
        ("jaccl", (Entry(ssh="a", addresses=(), rdma=RDMA[0].rdma), RDMA[1]), 1, "no address at which"),
        ("jaccl", (RDMA[0], Entry(ssh="b", addresses=(), rdma=("rdma_en2",))), 1, "lists 1 RDMA devices for 2"),
        ("jaccl", (RDMA[0], Entry(ssh="b", addresses=(), rdma=("x", "y"))), 1, "towards itself"),
        ("jaccl-ring", (RDMA[0], Entry(ssh="b", addresses=(), rdma=(None, None))), 1, "no RDMA device towards a"),
        ("nccl", RING, 1, "no host file for nccl"),
    ],
)
def test_what_would_not_work_is_refused(backend: str, entries: tuple[Entry, ...], ranks: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        hostfile(backend, entries, ranks_per_node=ranks)


PROGRAM = """
import json, os, sys
import mlx.core as mx
group = mx.distributed.init(strict=True, backend="ring")
total = mx.distributed.all_sum(mx.array([float(group.rank() + 1)]), stream=mx.cpu)
mx.eval(total)
print(json.dumps({"rank": group.rank(), "size": group.size(), "sum": total.item()}), flush=True)
"""


@pytest.mark.slow
def test_mlx_launch_runs_a_ring_from_our_host_file(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    if not LAUNCH.exists():
        pytest.skip("needs mlx.launch")
    # 127.0.0.1 is what mlx.launch starts without ssh; the ring's own addresses are those of the hosts.
    nodes = [NodeTools(name=f"n{i}", ssh="127.0.0.1", host=f"127.0.0.{i + 2}", system="Linux") for i in range(3)]
    made = plan_group("here", nodes, twin="mlx")
    assert [host["ips"] for host in made.hostfile["hosts"]] == [["127.0.0.2"], ["127.0.0.3"], ["127.0.0.4"]]
    path, program = tmp_path / "hosts.json", tmp_path / "ring.py"
    path.write_text(json.dumps(made.hostfile))
    program.write_text(PROGRAM)
    port = str(min(free_port(), 60000))
    done = subprocess.run(
        [str(LAUNCH), "--hostfile", str(path), "--starting-port", port, "--python", sys.executable, str(program)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        # Its ranks would outlive it if it were ended; the whole session goes then.
        start_new_session=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(one["rank"] for one in found) == [0, 1, 2], done.stderr
    assert {(one["size"], one["sum"]) for one in found} == {(3, 6.0)}
