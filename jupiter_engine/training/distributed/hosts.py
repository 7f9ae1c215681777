"""A launch over several machines: the launcher's specification, and what it tells while it runs.

The launcher is the node runner's `group` command (jupiter_engine.node), a program of the standard
library; it is told everything in one JSON file and answers in files of the launch's folder:

group.jsonl   what happened: prepared, started, rank_exited, host_silent, host_back, rank_stopped, ended
hosts.json    rank -> name of its host
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from jupiter_engine.errors import StateError
from jupiter_engine.files import whole_lines, write_json
from jupiter_engine.planning.memory import rows_at_once
from jupiter_engine.protocol.specs import HostSpec, LaunchSpec, Recipe

BACKEND_VARIABLE = "JUPITER_BACKEND"
RANKS_VARIABLE = "JUPITER_RANKS"
HOSTS_VARIABLE = "JUPITER_HOSTS"
UNREACHED = ("unreachable",)
"""Kinds of the launcher's errors about a host that mean it was not reached."""
_ASK_S = 8.0
_EXCUSES = 4


def write_group_spec(
    launch: LaunchSpec, hosts: tuple[HostSpec, ...], run_folder: Path, generation: int, program: str
) -> Path:
    """Write the launcher's specification into the launch's folder; returns its path."""
    folder = run_folder / "ranks" / str(generation)
    threads = launch.threads_per_rank
    env = {
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",
        BACKEND_VARIABLE: launch.backend,
        RANKS_VARIABLE: str(sum(host.ranks for host in hosts)),
        HOSTS_VARIABLE: ",".join(host.name for host in hosts),
        **({"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)} if threads else {}),
    }
    spec = {
        "version": 1,
        "run": run_folder.name,
        "generation": generation,
        "twin": launch.twin,
        "launcher": launch.launcher,
        "backend": launch.backend or ("ring" if launch.twin == "mlx" else "gloo"),
        "folder": str(folder.absolute()),
        "program": ["-m", program, "{run_folder}", "{generation}"],
        "env": env,
        "ssh_config": launch.ssh_config,
        "init_deadline_s": 90,
        "grace_s": 20,
        "lease_s": launch.host_lost_after_s,
        "hosts": [msgspec.to_builtins(host) for host in hosts],
    }
    path = folder / "group-spec.json"
    write_json(path, spec)
    return path


class GroupEvents:
    """What the launcher has said since the last look."""

    def __init__(self, folder: Path) -> None:
        self._path, self._offset = folder / "group.jsonl", 0

    def read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        found: list[dict[str, Any]] = []
        for line, offset in whole_lines(self._path, self._offset):
            self._offset = offset
            event = msgspec.json.decode(line)
            if isinstance(event, dict):
                found.append(event)
        return found


class Roll:
    """Which hosts of the group take part in the next launch.

    One that could not be reached for `host_lost_after_s` is left out as long as others remain, and
    asked again before each later launch. The leading host is this machine and always takes part.
    """

    def __init__(self, launch: LaunchSpec) -> None:
        self._launch = launch
        self._silent_since: dict[str, float] = {}
        self._excuses: dict[str, int] = {}
        """Launches in a row that failed for want of a host."""
        self.left_out: set[str] = set()

    def lost(self, name: str) -> None:
        if name != self._launch.hosts[0].name and name not in self._silent_since:
            self._silent_since[name] = time.monotonic()
            self._excuses[name] = self._excuses.get(name, 0) + 1

    def answered(self, name: str) -> None:
        self._silent_since.pop(name, None)

    def took_part(self, name: str) -> None:
        """It trained: whatever was the matter with it is over."""
        self.answered(name)
        self._excuses.pop(name, None)

    def missed(self) -> set[str]:
        """Hosts that are silent but not given up yet."""
        return set(self._silent_since) - self.left_out

    def present(self) -> tuple[HostSpec, ...]:
        """The hosts that take part."""
        return tuple(host for host in self._launch.hosts if host.name not in self.left_out)

    def look(self) -> list[str]:
        """Ask the silent ones; returns sentences about who was left out or has come back."""
        said: list[str] = []
        for host in self._launch.hosts[1:]:
            since = self._silent_since.get(host.name)
            if since is None:
                continue
            # One that answers ssh but fails launch after launch is as good as gone.
            if self._excuses.get(host.name, 0) < _EXCUSES and self._reachable(host):
                if host.name in self.left_out:
                    self.left_out.discard(host.name)
                    said.append(f"{host.name} answers again and takes part")
                self.answered(host.name)
            elif host.name not in self.left_out and self._given_up(since):
                self.left_out.add(host.name)
                silence = time.monotonic() - since
                said.append(f"{host.name} has not answered for {silence:.0f} s; the group goes on without it")
        return said

    def _given_up(self, since: float) -> bool:
        return time.monotonic() - since > self._launch.host_lost_after_s

    def _reachable(self, host: HostSpec) -> bool:
        config = ["-F", self._launch.ssh_config] if self._launch.ssh_config else []
        argv = ["ssh", *config, "-o", "BatchMode=yes", "-o", "ConnectTimeout=4", "--", host.ssh, "true"]
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_ASK_S, check=False)
        except (subprocess.TimeoutExpired, OSError):
            return False
        return done.returncode == 0


def ranks_asked_for(launch: LaunchSpec) -> int:
    """Ranks of the launch that this process belongs to: fewer than the order's where a host was left out."""
    return int(os.environ.get(RANKS_VARIABLE) or launch.ranks)


def hosts_taking_part() -> tuple[str, ...]:
    """Names of the hosts of the launch that this process belongs to, in order of ranks; empty outside a group."""
    return tuple(name for name in os.environ.get(HOSTS_VARIABLE, "").split(",") if name)


def host_here(launch: LaunchSpec) -> HostSpec | None:
    """The host of the launch that this process is on: its rank's in a group, else the leading one; None: it has none.

    StateError for a rank that no host has.
    """
    present = hosts_taking_part()
    if not present:
        return launch.hosts[0] if launch.hosts else None
    left = rank = int(os.environ.get("RANK", os.environ.get("MLX_RANK", "0")))
    hosts = [host for host in launch.hosts if host.name in present]
    for host in hosts:
        if left < host.ranks:
            return host
        left -= host.ranks
    raise StateError(f"this is rank {rank}, the hosts that take part have {rank - left} ranks")


def micro_batch_sizes(launch: LaunchSpec, recipe: Recipe, ranks: int, present: Sequence[str]) -> list[int]:
    """Rows that each of `ranks` ranks computes at once: its host's (or launch's) number where it has one,
    else the recipe's.

    At most an equal share of the batch, as the planner reckons: ranks that are given more rows than that later on
    compute them one micro-batch after another.
    `present`: names of the hosts that take part (see `hosts_taking_part`), none: all of the launch. StateError if they
    do not make up `ranks`.
    """
    hosts = [host for host in launch.hosts if not present or host.name in present]
    if not hosts:
        return [rows_at_once(recipe, ranks, launch.micro_batch_sequences)] * ranks
    sizes = [rows_at_once(recipe, ranks, host.micro_batch_sequences) for host in hosts for _ in range(host.ranks)]
    if len(sizes) != ranks:
        raise StateError(f"{ranks} ranks take part, their hosts should have {len(sizes)}")
    return sizes
