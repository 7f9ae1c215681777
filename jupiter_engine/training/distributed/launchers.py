"""The command lines that start a group of ranks on this machine: torchrun and mlx.launch."""

from __future__ import annotations

import os
import socket
import sys
from itertools import chain
from pathlib import Path

import jupiter_engine
from jupiter_engine.errors import ConfigError
from jupiter_engine.protocol.specs import LaunchSpec

PROGRAM = "jupiter_engine.worker.rank"


def launch_command(launch: LaunchSpec, run_folder: Path, generation: int) -> list[str]:
    """Argument vector of the launcher; every rank runs `PROGRAM run_folder generation`."""
    program = ["-m", PROGRAM, str(run_folder), str(generation)]
    if launch.launcher == "torchrun" and launch.twin == "torch":
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        return [*torchrun, "--standalone", "--nproc-per-node", str(launch.ranks), *program]
    if launch.launcher == "mlx.launch" and launch.twin == "mlx":
        # A path that the environment's own interpreter runs: nothing depends on PATH.
        script = [sys.executable, str(Path(sys.executable).with_name("mlx.launch"))]
        ring = ["-n", str(launch.ranks), "--backend", "ring", "--starting-port", str(_free_ports(launch.ranks))]
        return [*script, *ring, "--python", sys.executable, "--", *program]
    raise ConfigError(
        f"{launch.ranks} ranks of the {launch.twin} twin cannot be started with {launch.launcher}",
        fix="use launcher torchrun with the torch twin, mlx.launch with the mlx twin",
    )


def launch_environment(launch: LaunchSpec) -> dict[str, str]:
    """The ranks' environment: this one, unbuffered output, this Jupiter importable, threads shared out."""
    threads = str(launch.threads_per_rank or max(1, (os.cpu_count() or 1) // launch.ranks))
    root = str(Path(jupiter_engine.__file__).parents[1])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
    }


def _free_ports(count: int) -> int:
    """First of `count` consecutive TCP ports that are free on the loopback right now.

    Below the kernels' ephemeral ranges (32768 on Linux, 49152 on macOS), so no
    outgoing connection takes one in between.
    """
    start = 20000 + os.getpid() % 100 * 100
    for first in chain(range(start, 32000, count), range(20000, start, count)):
        if all(_bindable(first + index) for index in range(count)):
            return first
    raise ConfigError(f"no {count} consecutive free ports between 20000 and 32000", fix="close what listens there")


def _bindable(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
