"""What `group` is asked to start: SPEC.json, checked, and where each thing of a launch lies on a host."""

from __future__ import annotations

import json
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from .errors import NodeError

VERSION = 1
MLX_BACKENDS = ("ring", "jaccl", "jaccl-ring")
TORCH_BACKENDS = ("gloo", "nccl")
LAUNCHERS = {"direct": ("mlx", "torch"), "mlx.launch": ("mlx",), "torchrun": ("torch",)}
"""Launcher -> the twins it can start."""


class Host(NamedTuple):
    """One machine of the group. Ranks are numbered in order of hosts, `first` is its lowest."""

    number: int
    """Its place in the list of hosts; 0 leads."""
    name: str
    ssh: str
    """Name in the ssh configuration; empty for the leading machine, which is this one."""
    first: int
    rank_count: int
    runner: tuple[str, ...]
    python: str
    run_folder: str
    addresses: tuple[str, ...]
    rdma: tuple[Any, ...]
    env: dict[str, str]
    """What its ranks' environment has beyond everybody's."""

    @property
    def ranks(self) -> range:
        """Numbers of its ranks."""
        return range(self.first, self.first + self.rank_count)


class Spec(NamedTuple):
    """One launch of a group."""

    run: str
    generation: int
    twin: str
    launcher: str
    backend: str
    folder: Path
    """The leader's folder of this launch: <its run folder>/ranks/<generation>."""
    program: tuple[str, ...]
    """Arguments of the ranks' Python; `{run_folder}` and `{generation}` stand for each host's own."""
    env: dict[str, str]
    ssh_config: str
    init_deadline_s: float
    grace_s: float
    lease_s: float
    hosts: tuple[Host, ...]

    @property
    def world(self) -> int:
        """Number of ranks over all hosts."""
        return sum(host.rank_count for host in self.hosts)

    def host_of(self, rank: int) -> Host:
        """The machine that a rank runs on."""
        return next(host for host in self.hosts if rank in host.ranks)

    def ranks_folder(self, host: Host) -> str:
        """Folder of this launch on a host, in that host's own words."""
        return str(PurePosixPath(host.run_folder) / "ranks" / str(self.generation))

    def program_on(self, host: Host) -> list[str]:
        """The command of one rank on a host."""
        filled = {"{run_folder}": host.run_folder, "{generation}": str(self.generation)}
        return [host.python, *(filled.get(word, word) for word in self.program)]

    def first_port(self) -> int:
        """Where to look for free ports first: another place for each run and generation.

        Between 20000 and 32000, below the systems' ephemeral ranges (32768 on Linux, 49152 on macOS), so that no
        outgoing connection takes one in between; and never where the launch before this one had its own.
        """
        return 20000 + (zlib.crc32(self.run.encode("utf-8")) + self.generation * 509) % 11400


class _Layout(NamedTuple):
    root: Path

    @property
    def keep(self) -> Path:
        """Folder of the node runner that keeps the launch on this host."""
        return self.root / "node"

    @property
    def held(self) -> Path:
        """Folder of the ranks' small parents (verb hold): their identities and exit statuses."""
        return self.keep / "ranks"

    @property
    def events(self) -> Path:
        """What the rank agent saw, one JSON object a line."""
        return self.keep / "ranks.jsonl"

    @property
    def launch(self) -> Path:
        """What the rank agent is to start."""
        return self.keep / "launch.json"

    @property
    def lease(self) -> Path:
        """Touched as long as somebody leads."""
        return self.keep / "lease"

    @property
    def temporary(self) -> Path:
        """Temporary files of the launcher; removed at the end."""
        return self.root / "tmp"


def layout(root: str | Path) -> _Layout:
    """Names below <run folder>/ranks/<generation> on a host."""
    return _Layout(Path(root))


def read(path: Path) -> Spec:
    """The spec in a file. NodeError when it is not one, or asks for what no launcher can do."""
    try:
        found = json.loads(path.read_text("utf-8"))
        spec = _parsed(found)
    except OSError as error:
        raise NodeError("spec", f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise NodeError("spec", f"{path} is no group spec: {type(error).__name__}: {error}") from error
    problem = _problem(spec)
    if problem:
        raise NodeError("spec", f"{path}: {problem}", "correct the group in cluster.yaml")
    return spec


def _parsed(found: dict[str, Any]) -> Spec:
    if found["version"] != VERSION:
        raise ValueError(f"version {found['version']}, known is {VERSION}")
    hosts, first = [], 0
    for number, entry in enumerate(found["hosts"]):
        count = int(entry["ranks"])
        rdma = tuple(tuple(device) if isinstance(device, list) else device for device in entry.get("rdma") or ())
        host = Host(
            number=number,
            name=str(entry["name"]),
            ssh=str(entry["ssh"]),
            first=first,
            rank_count=count,
            runner=tuple(str(word) for word in entry["runner"]),
            python=str(entry["python"]),
            run_folder=str(entry["run_folder"]),
            addresses=tuple(str(address) for address in entry["addresses"]),
            rdma=rdma,
            env={str(name): str(value) for name, value in (entry.get("env") or {}).items()},
        )
        hosts.append(host)
        first += count
    return Spec(
        run=str(found["run"]),
        generation=int(found["generation"]),
        twin=str(found["twin"]),
        launcher=str(found["launcher"]),
        backend=str(found["backend"]),
        folder=Path(found["folder"]),
        program=tuple(str(word) for word in found["program"]),
        env={str(name): str(value) for name, value in found["env"].items()},
        ssh_config=str(found["ssh_config"]),
        init_deadline_s=float(found["init_deadline_s"]),
        grace_s=float(found["grace_s"]),
        lease_s=float(found["lease_s"]),
        hosts=tuple(hosts),
    )


def _problem(spec: Spec) -> str:
    """Why this cannot be started; empty if it can."""
    known = MLX_BACKENDS if spec.twin == "mlx" else TORCH_BACKENDS
    if spec.launcher not in LAUNCHERS or spec.twin not in LAUNCHERS[spec.launcher]:
        return f"launcher {spec.launcher!r} does not start the {spec.twin!r} twin"
    if spec.backend not in known:
        return f"backend {spec.backend!r} is none of the {spec.twin} twin: {', '.join(known)}"
    if not spec.hosts:
        return "no host"
    if spec.hosts[0].ssh:
        return "the first host leads and is this machine: its ssh name is empty"
    names = [host.name for host in spec.hosts]
    if len(set(names)) < len(names):
        return "two hosts have the same name"
    if Path(spec.ranks_folder(spec.hosts[0])) != spec.folder:
        return f"folder is not {spec.ranks_folder(spec.hosts[0])}"
    return next(filter(None, (_problem_of(spec, host) for host in spec.hosts)), "")


def _problem_of(spec: Spec, host: Host) -> str:
    if host.number and (not host.ssh or host.ssh.startswith("-")):
        return f"host {host.name} has no usable ssh name"
    if host.rank_count < 1 or len(host.runner) < 2 or not host.addresses:
        return f"host {host.name} lacks ranks, runner or addresses"
    if "/" in host.name or host.name.startswith("."):
        return f"{host.name!r} cannot name a folder"
    if not PurePosixPath(host.run_folder).is_absolute():
        return f"the run folder of {host.name} is not an absolute path"
    if spec.backend.startswith("jaccl"):
        if host.rank_count != 1:
            return f"{spec.backend} has one rank on a host, {host.name} has {host.rank_count}"
        if len(host.rdma) != len(spec.hosts) or host.rdma[host.number] is not None:
            return f"host {host.name} needs one RDMA device for every host, null for itself"
    return ""
