"""The three launchers: which environment and which commands start the ranks of a group.

direct      every host's rank agent starts its ranks. All that the frameworks need is an environment.
mlx.launch  the agent of the leading host runs mlx.launch; the other agents wait for the ranks that it starts.
torchrun    every host's rank agent runs one torchrun agent.

Under each of them the program is `hold`, the small parent that gives every rank its own log, notes its identity
and its true exit status: mlx.launch itself ends with 0 whatever happened, torchrun with 1.
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

from . import program
from .group_spec import Host, Spec, layout

PYTHON, RUNNER, HELD = "JUPITER_HOLD_PYTHON", "JUPITER_HOLD_RUNNER", "JUPITER_HOLD_FOLDER"
"""Variables that say, on each host in its own words, how `hold` is started; the command line is the same for all."""


def plan(spec: Spec, host: Host, port: int) -> dict[str, Any]:
    """What the agent of one host is to do (launch.json). `port` is the first of `ports_needed` free ones."""
    places = layout(spec.ranks_folder(host))
    found: dict[str, Any] = {
        "launcher": spec.launcher,
        "program": spec.program_on(host),
        "cwd": host.run_folder,
        "env": {**spec.env, **host.env},
        "grace_s": spec.grace_s,
        "ranks": {str(rank): {} for rank in host.ranks},
        "command": None,
        "command_env": {},
        "files": {},
    }
    if spec.launcher == "direct":
        found["ranks"] = {str(rank): rank_environment(spec, host, rank, port) for rank in host.ranks}
        found["files"] = mlx_files(spec, port) if spec.twin == "mlx" else {}
    elif spec.launcher == "torchrun":
        found["command"] = torchrun(spec, host, port)
        found["command_env"] = hold_environment(spec, host)
    elif host.number == 0:
        found["files"] = {"hostfile.json": json.dumps(mlx_launch_hostfile(spec))}
        found["command"] = mlx_launch(spec, host, port, str(places.keep / "hostfile.json"))
        found["command_env"] = hold_environment(spec, host)
        found["ssh"] = {other.ssh: _far_side(spec, other) for other in spec.hosts[1:]}
        found["ssh_config"] = spec.ssh_config
        # mlx.launch takes the end of its connection for the end of the rank: it shall bear with as much as we do.
        found["silence_s"] = spec.lease_s
    return found


def ports_needed(spec: Spec) -> int:
    """How many ports in a row the launch takes: one a rank and address in a ring, else one for the meeting point."""
    if spec.backend != "ring":
        return 1
    return sum(host.rank_count * len(host.addresses) for host in spec.hosts)


def rank_environment(spec: Spec, host: Host, rank: int, port: int) -> dict[str, str]:
    """Variables of one rank that is started without a launcher."""
    leader = spec.hosts[0].addresses[0]
    keep = layout(spec.ranks_folder(host)).keep
    if spec.twin == "torch":
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(spec.world),
            "LOCAL_RANK": str(rank - host.first),
            "LOCAL_WORLD_SIZE": str(host.rank_count),
            "MASTER_ADDR": leader,
            "MASTER_PORT": str(port),
        }
    if spec.backend == "ring":
        return {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(keep / "ring.json")}
    found = {
        "MLX_RANK": str(rank),
        "MLX_IBV_DEVICES": str(keep / "devices.json"),
        "MLX_JACCL_COORDINATOR": f"{leader}:{port}",
    }
    if spec.backend == "jaccl-ring":
        found["MLX_JACCL_RING"] = "1"
    return found


def mlx_files(spec: Spec, port: int) -> dict[str, str]:
    """Files that the variables of an MLX rank point at: name -> content."""
    if spec.backend != "ring":
        return {"devices.json": json.dumps([host.rdma for host in spec.hosts])}
    ring = []
    for host in spec.hosts:
        for _rank in host.ranks:
            ring.append([f"{address}:{port + index}" for index, address in enumerate(host.addresses)])
            port += len(host.addresses)
    return {"ring.json": json.dumps(ring)}


# -- mlx.launch ----------------------------------------------------------------------------------------
def mlx_launch_hostfile(spec: Spec) -> dict[str, Any]:
    """Its hostfile: one entry a rank. What it is to start itself is called 127.0.0.1 there."""
    entries = [
        {"ssh": host.ssh or "127.0.0.1", "ips": list(host.addresses), "rdma": list(host.rdma)}
        for host in spec.hosts
        for _rank in host.ranks
    ]
    return {"backend": spec.backend, "envs": [], "hosts": entries}


def mlx_launch(spec: Spec, host: Host, port: int, hostfile: str) -> list[str]:
    """Its command line. It numbers the ring's ports in the same order as `mlx_files`."""
    script = str(PurePosixPath(host.python).parent / "mlx.launch")
    flags = ["--backend", spec.backend, "--hostfile", hostfile, "--starting-port", str(port)]
    return [host.python, script, *flags, "--", "/bin/sh", "-c", hold_line("MLX_RANK")]


def hold_line(rank_variable: str) -> str:
    """What a launcher runs for each rank, on whatever host: sh, and only variables of that host."""
    flags = " ".join(program.PYTHON_FLAGS)
    return f'exec "${PYTHON}" {flags} "${RUNNER}" hold "${HELD}" "rank-${rank_variable}"'


def hold_environment(spec: Spec, host: Host) -> dict[str, str]:
    """The variables of `hold_line` on a host."""
    held = layout(spec.ranks_folder(host)).held
    return {PYTHON: host.runner[0], RUNNER: host.runner[1], HELD: str(held)}


def _far_side(spec: Spec, host: Host) -> dict[str, Any]:
    """What the stand-in for ssh needs to know of a host that mlx.launch calls."""
    temporary = layout(spec.ranks_folder(host)).temporary
    env = {**hold_environment(spec, host), "TMPDIR": str(temporary)}
    return {"runner": list(host.runner), "env": env}


# -- torchrun ------------------------------------------------------------------------------------------
def torchrun(spec: Spec, host: Host, port: int) -> list[str]:
    """The agent of one host.

    A static meeting point, not c10d: c10d numbers the nodes in order of arrival, but rank 0 has to be on the first
    host, where its checkpoints are wanted and the supervisor sits. No restarts by the agents: whoever started this
    launch restarts the group as a whole, from a checkpoint. Without --local-addr an agent gives the others its host
    name, which they may not be able to resolve. The ranks' output and exit status come from `hold`, not from it.
    """
    return [
        *(host.python, "-m", "torch.distributed.run"),
        *("--nnodes", str(len(spec.hosts)), "--node-rank", str(host.number), "--nproc-per-node", str(host.rank_count)),
        *("--master-addr", spec.hosts[0].addresses[0], "--master-port", str(port)),
        *("--local-addr", host.addresses[0], "--max-restarts", "0", "--monitor-interval", "0.5"),
        *("--no-python", "/bin/sh", "-c", hold_line("RANK")),
    ]
