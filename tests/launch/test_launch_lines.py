"""Command lines and environments of the launchers, and specs that are refused."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from jupiter_engine.node import launch_lines
from jupiter_engine.node.errors import NodeError
from jupiter_engine.node.group_spec import Spec, read


def spec_json(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two Macs, the second with two links; one rank each."""
    hosts = [
        {
            "name": name,
            "ssh": ssh,
            "ranks": 1,
            "runner": ["/usr/bin/python3", f"/{name}/runner.pyz"],
            "python": f"/{name}/env/bin/python",
            "run_folder": run_folder,
            "addresses": addresses,
            "rdma": rdma,
            "env": {"PYTHONPATH": f"/{name}/code"},
        }
        for name, ssh, run_folder, addresses, rdma in (
            ("studio", "", str(folder), ["10.0.1.1", "10.0.2.1"], [None, ["rdma_en2", "rdma_en3"]]),
            ("mini", "mini-tb", "/mini/run", ["10.0.1.2", "10.0.2.2"], [["rdma_en4", "rdma_en5"], None]),
        )
    ]
    return {
        "version": 1,
        "run": "python-0001-train",
        "generation": 3,
        "twin": "mlx",
        "launcher": "direct",
        "backend": "ring",
        "folder": str(folder / "ranks" / "3"),
        "program": ["-m", "program", "{run_folder}", "{generation}"],
        "env": {"OMP_NUM_THREADS": "2"},
        "ssh_config": "/conf",
        "init_deadline_s": 90,
        "grace_s": 20,
        "lease_s": 60,
        "hosts": hosts,
        **changes,
    }


def spec(folder: Path, **changes: Any) -> Spec:
    path = folder / "spec.json"
    path.write_text(json.dumps(spec_json(folder, **changes)))
    return read(path)


def test_ring_has_a_port_for_every_rank_and_link(tmp_path: Path) -> None:
    two = spec(tmp_path)
    assert launch_lines.ports_needed(two) == 4
    plan = launch_lines.plan(two, two.hosts[1], 25000)
    assert json.loads(plan["files"]["ring.json"]) == [
        ["10.0.1.1:25000", "10.0.2.1:25001"],
        ["10.0.1.2:25002", "10.0.2.2:25003"],
    ]
    assert plan["ranks"] == {"1": {"MLX_RANK": "1", "MLX_HOSTFILE": "/mini/run/ranks/3/node/ring.json"}}
    assert plan["program"] == ["/mini/env/bin/python", "-m", "program", "/mini/run", "3"]
    assert plan["env"] == {"OMP_NUM_THREADS": "2", "PYTHONPATH": "/mini/code"}
    assert plan["command"] is None


@pytest.mark.parametrize("backend", ["jaccl", "jaccl-ring"])
def test_jaccl_has_devices_and_a_coordinator(tmp_path: Path, backend: str) -> None:
    two = spec(tmp_path, backend=backend)
    assert launch_lines.ports_needed(two) == 1
    plan = launch_lines.plan(two, two.hosts[1], 25000)
    environment = plan["ranks"]["1"]
    assert environment.pop("MLX_JACCL_RING", None) == ("1" if backend == "jaccl-ring" else None)
    assert environment == {
        "MLX_RANK": "1",
        "MLX_IBV_DEVICES": "/mini/run/ranks/3/node/devices.json",
        "MLX_JACCL_COORDINATOR": "10.0.1.1:25000",
    }
    assert json.loads(plan["files"]["devices.json"]) == [
        [None, ["rdma_en2", "rdma_en3"]],
        [["rdma_en4", "rdma_en5"], None],
    ]


# mlx does not close the host file that it reads.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("backend", ["ring", "jaccl", "jaccl-ring"])
def test_mlx_launch_reads_our_hostfile_and_gives_the_ranks_what_direct_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    launch = pytest.importorskip("mlx._distributed_utils.launch")
    two = spec(tmp_path, launcher="mlx.launch", backend=backend)
    plan = launch_lines.plan(two, two.hosts[0], 25000)
    (tmp_path / "ranks" / "3" / "node").mkdir(parents=True)
    (tmp_path / "ranks" / "3" / "node" / "hostfile.json").write_text(plan["files"]["hostfile.json"])
    seen: list[Any] = []

    def record(kind: Any, arguments: list[tuple[tuple[Any, ...], dict[str, Any]]], verbose: bool) -> None:
        seen.extend(positional for positional, _ in arguments)

    monkeypatch.setattr(launch, "_launch_with_io", record)
    monkeypatch.setattr("sys.argv", plan["command"][1:])
    launch.main()
    direct = spec(tmp_path, backend=backend)
    wanted = launch_lines.mlx_files(direct, 25000)
    for (rank, host, python, _cwd, files, env, command), name in zip(seen, ("127.0.0.1", "mini-tb"), strict=True):
        assert (host, python, command[:2]) == (name, None, ["/bin/sh", "-c"])
        (content,) = files.values()
        assert json.loads(content) == json.loads(next(iter(wanted.values())))
        given = {
            f"{key}={value}"
            for key, value in launch_lines.rank_environment(direct, direct.hosts[rank], rank, 25000).items()
        }
        files_and_rank = {entry for entry in given if entry.split("=")[0] in ("MLX_RANK", *files)}
        # mlx.launch adds the size of the terminal, where it finds one.
        told = {entry for entry in env if entry.split("=")[0] not in ("COLUMNS", "LINES")}
        assert told == given - files_and_rank
    assert launch_lines.plan(two, two.hosts[1], 25000)["command"] is None


def test_torchrun_numbers_the_hosts_itself(tmp_path: Path) -> None:
    two = spec(tmp_path, launcher="torchrun", twin="torch", backend="gloo")
    command = launch_lines.plan(two, two.hosts[1], 25000)["command"]
    options = dict(zip(command[3:-3:2], command[4:-3:2], strict=False))
    assert options["--node-rank"] == "1"
    assert options["--nnodes"] == "2"
    assert (options["--master-addr"], options["--master-port"]) == ("10.0.1.1", "25000")
    assert (options["--local-addr"], options["--max-restarts"]) == ("10.0.1.2", "0")
    direct = spec(tmp_path, twin="torch", backend="gloo")
    assert launch_lines.rank_environment(direct, direct.hosts[1], 1, 25000) == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "10.0.1.1",
        "MASTER_PORT": "25000",
    }


def test_every_generation_has_ports_of_its_own_below_the_ephemeral_ones(tmp_path: Path) -> None:
    firsts = [spec(tmp_path)._replace(generation=generation).first_port() for generation in range(1, 30)]
    assert all(20000 <= first <= 31400 for first in firsts)
    near = [abs(one - other) for one, other in itertools.pairwise(firsts)]
    assert min(near) > 100


def _without(name: str) -> Any:
    def change(value: dict[str, Any]) -> None:
        del value[name]

    return change


def _set(*path: Any, to: Any) -> Any:
    def change(value: Any) -> None:
        for step in path[:-1]:
            value = value[step]
        value[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without("hosts"), "KeyError"),
        (_set("version", to=2), "known is 1"),
        (_set("launcher", to="torchrun"), "does not start the 'mlx' twin"),
        (_set("backend", to="nccl"), "is none of the mlx twin"),
        (_set("hosts", to=[]), "no host"),
        (_set("hosts", 0, "ssh", to="studio"), "its ssh name is empty"),
        (_set("hosts", 1, "ssh", to="-oProxyCommand=evil"), "no usable ssh name"),
        (_set("hosts", 1, "name", to="studio"), "same name"),
        (_set("hosts", 1, "name", to="../up"), "cannot name a folder"),
        (_set("hosts", 1, "run_folder", to="run"), "not an absolute path"),
        (_set("hosts", 1, "ranks", to=0), "lacks ranks"),
        (_set("folder", to="/elsewhere"), "folder is not"),
        (_set("grace_s", to="soon"), "ValueError"),
    ],
)
def test_refused(tmp_path: Path, change: Any, words: str) -> None:
    value = copy.deepcopy(spec_json(tmp_path))
    change(value)
    path = tmp_path / "group.json"
    path.write_text(json.dumps(value))
    with pytest.raises(NodeError) as caught:
        read(path)
    assert words in caught.value.detail
    assert str(path) in caught.value.detail


def test_jaccl_without_a_device_for_every_host_is_refused(tmp_path: Path) -> None:
    value = spec_json(tmp_path, backend="jaccl")
    value["hosts"][1]["rdma"] = ["rdma_en4"]
    path = tmp_path / "group.json"
    path.write_text(json.dumps(value))
    with pytest.raises(NodeError, match="one RDMA device for every host"):
        read(path)
