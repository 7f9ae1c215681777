"""The cluster file: which machines there are, what each may do, and how training ranks are started."""

from __future__ import annotations

import platform
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from jupiter_engine.protocol.specs import Count, CountOrZero, LaunchSpec, Positive, Spec, Twin
from jupiter_engine.settings import former_cluster
from jupiter_engine.settings.reader import Findings, Loaded, load
from jupiter_engine.settings.tree import quote

Ability = Literal["generate", "train", "evaluate"]

ABILITIES: Final[Mapping[str, frozenset[Ability]]] = {
    "generator": frozenset({"generate"}),
    # A file with generators and trainers only is complete: what trains a model can also measure it.
    "trainer": frozenset({"train", "evaluate"}),
    "evaluator": frozenset({"evaluate"}),
    "hybrid": frozenset({"generate", "train", "evaluate"}),
}
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.:-]{0,252}[A-Za-z0-9])?|::1")


class NodeSpec(Spec, frozen=True, kw_only=True):
    """One machine."""

    host: str = "localhost"
    """`localhost` for this machine, else a host name or address that ssh reaches."""
    name: str | None = None
    """What people call it; the host if left out."""
    device_type: Literal["mac", "nvidia", "cpu"] | None = None
    """Decides the framework of this machine: MLX on a `mac`, torch on `nvidia` and `cpu`. Left out:
    found by looking (Apple silicon or not)."""
    memory_gb: Positive | None = None
    """Memory (on NVIDIA machines: of the card) in GB; for people, the machine is measured."""
    chip: str | None = None
    """Processor or card, such as M4 or RTX 4090; for people, the machine is asked."""
    role: Literal["generator", "trainer", "hybrid", "evaluator"] = "hybrid"
    """What the machine does: a `generator` writes samples, a `trainer` trains and evaluates, an
    `evaluator` evaluates, a `hybrid` does all of it."""
    connection_type: Literal["thunderbolt", "ethernet", "wifi"] | None = None
    """How a remote machine is connected."""
    ssh_user: str | None = None
    """User on a remote machine; left out: ssh's own choice."""
    ssh_port: Annotated[int, Meta(ge=1, le=65535)] | None = None
    """ssh port of a remote machine; left out: ssh's own choice."""
    identity: str | None = None
    """File of the private key for a remote machine; left out: agent and ssh's own choice. Never a password."""
    jump: str | None = None
    """Host to go through, as `ssh -J` takes it: an alias of ~/.ssh/config or user@host:port."""
    python: str | None = None
    """Python on the machine, by path; left out: the newest one found that fits."""
    workdir: str = "~/.jupiter"
    """Folder on a remote machine under which Jupiter keeps everything of its own."""
    environment: Literal["push", "own"] = "push"
    """`push`: Jupiter builds the machine's environment from its own lock. `own`: `python` has everything
    already and is used as it is."""
    can_generate: bool | None = None
    """false: takes generating away from a `hybrid`."""
    can_train: bool | None = None
    """false: takes training away from a `hybrid` or `trainer`."""

    def is_local(self) -> bool:
        """Whether this entry means the machine we run on (names are compared, nothing is looked up)."""
        own = socket.gethostname().lower()
        short = own.partition(".")[0]
        names = {"localhost", "127.0.0.1", "::1", own, short, f"{short}.local"}
        return self.host.lower().rstrip(".") in names

    def abilities(self) -> frozenset[Ability]:
        """What this machine may do after `role`, `can_generate` and `can_train`."""
        taken: set[Ability] = set()
        if self.can_generate is False:
            taken.add("generate")
        if self.can_train is False:
            taken.add("train")
        return ABILITIES[self.role] - taken


class GroupSpec(Spec, frozen=True, kw_only=True):
    """Machines that train as one: every step combines their gradients."""

    name: str
    """What people call it."""
    nodes: tuple[str, ...]
    """Names (or hosts) of the machines, the one that leads first."""
    launcher: Literal["auto", "torchrun", "mlx.launch", "direct"] = "auto"
    """`auto`: mlx.launch for MLX, torchrun for torch; `direct`: Jupiter's node runners start the ranks themselves."""
    backend: Literal["auto", "ring", "jaccl", "jaccl-ring", "gloo", "nccl"] = "auto"
    """How the ranks talk; `auto`: the fastest that the machines' connections allow."""
    over: Literal["auto", "thunderbolt", "ethernet"] = "auto"
    """Network of the ranks; `auto`: Thunderbolt where all of them are wired with it."""
    ranks_per_node: Count = 1
    """Training processes on each machine."""


class LaunchSettings(Spec, frozen=True, kw_only=True):
    """How training is started."""

    twin: Literal["auto", "mlx", "torch"] = "auto"
    """Framework: `auto` takes MLX on Apple silicon and torch everywhere else."""
    ranks: Count = 1
    """Training processes; several share one batch."""
    launcher: Literal["auto", "in_process", "torchrun", "mlx.launch", "direct"] = "auto"
    """`auto`: in_process for one rank, else torchrun for torch and mlx.launch for MLX; a group may say otherwise."""
    group: str | None = None
    """Which of `groups` trains; left out: the first one, or this machine where there is none."""
    threads_per_rank: CountOrZero = 0
    """CPU threads of one rank; 0 leaves the choice to the framework."""


class RetrySettings(Spec, frozen=True, kw_only=True):
    """What happens when a worker dies."""

    worker_restarts: Annotated[int, Meta(ge=0, le=100)] = 2
    """How often a worker that died without a reason of its own is started again before the stage fails."""
    group_restarts_per_hour: CountOrZero = 5
    """How often a group of ranks may be started again from its last checkpoint within an hour."""
    node_lost_after_s: Positive = 120.0
    """A machine of a training group that has not answered for so long is left out, if the others can go on."""


class ConnectionSettings(Spec, frozen=True, kw_only=True):
    """How remote machines are called."""

    connect_timeout_s: Positive = 10.0
    """A machine that has not answered by then counts as unreachable."""
    keepalive_s: Positive = 5.0
    """A question to every connected machine so often; three without an answer end the connection."""
    reconnect_max_s: Positive = 30.0
    """Longest pause between two calls of a lost machine; the first is half a second, then it doubles."""


class ClusterSettings(Spec, frozen=True, kw_only=True):
    """The file config/cluster.yaml."""

    schema: Literal["jupiter/cluster@1"] = "jupiter/cluster@1"
    """Version of this file's form."""
    nodes: tuple[NodeSpec, ...] = (NodeSpec(),)
    """The machines; left out: this one."""
    groups: tuple[GroupSpec, ...] = ()
    """Machines that train together; left out: this machine trains alone."""
    launch: LaunchSettings = LaunchSettings()
    connection: ConnectionSettings = ConnectionSettings()
    retries: RetrySettings = RetrySettings()


def load_cluster(path: Path) -> Loaded[ClusterSettings]:
    """Read a cluster file; raises ConfigError with every problem in it."""
    return load(path, ClusterSettings, refused=former_cluster.REFUSED, rewrite=former_cluster.rewrite, check=_check)


def local_node(cluster: ClusterSettings) -> NodeSpec | None:
    """The entry of this machine, if the file has one."""
    return next((node for node in cluster.nodes if node.is_local()), None)


def local_roles(cluster: ClusterSettings) -> set[Ability]:
    """What this machine may do; empty if the file does not list it."""
    node = local_node(cluster)
    return set(node.abilities()) if node else set()


def local_twin(cluster: ClusterSettings) -> Twin:
    """The framework of this machine: `launch.twin`, else its `device_type`, else what it is."""
    if cluster.launch.twin != "auto":
        return cluster.launch.twin
    node = local_node(cluster)
    if node is not None and node.device_type is not None:
        return "mlx" if node.device_type == "mac" else "torch"
    return "mlx" if platform.system() == "Darwin" and platform.machine() == "arm64" else "torch"


def launch_spec(cluster: ClusterSettings) -> LaunchSpec:
    """How training starts on this machine, with every `auto` decided."""
    twin, launch = local_twin(cluster), cluster.launch
    launcher = launch.launcher
    if launcher == "auto":
        several: Literal["torchrun", "mlx.launch"] = "torchrun" if twin == "torch" else "mlx.launch"
        launcher = "in_process" if launch.ranks == 1 else several
    return LaunchSpec(twin=twin, ranks=launch.ranks, launcher=launcher, threads_per_rank=launch.threads_per_rank)


# -- rules between fields ------------------------------------------------------------------------------
def _check(cluster: ClusterSettings, found: Findings) -> ClusterSettings:
    if not cluster.nodes:
        found.problem("nodes", "is an empty list; this machine alone is {host: localhost, role: hybrid}")
    first: dict[str, int] = {}
    local: int | None = None
    for i, node in enumerate(cluster.nodes):
        key = f"nodes[{i}]"
        _check_node(node, key, found)
        host = node.host.lower()
        if host in first:
            found.problem(f"{key}.host", f"is {quote(node.host)}, which nodes[{first[host]}] is already")
        elif node.is_local() and local is not None:
            found.problem(f"{key}.host", f"is {quote(node.host)}: this machine, which nodes[{local}] is already")
        first.setdefault(host, i)
        if node.is_local() and local is None:
            local = i
    _check_launch(cluster, found)
    return cluster


def _check_node(node: NodeSpec, key: str, found: Findings) -> None:
    if not _HOST.fullmatch(node.host):
        found.problem(
            f"{key}.host", f"is {quote(node.host)}, which is no host name or address (the user goes into ssh_user)"
        )
        return
    for name in ("name", "chip"):
        text: str | None = getattr(node, name)
        if text is not None and not text.strip():
            found.problem(f"{key}.{name}", "is empty; write a text or remove the key")
    if node.ssh_user is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}", node.ssh_user):
        found.problem(f"{key}.ssh_user", f"is {quote(node.ssh_user)}, which is no user name")
    for switch, ability in (("can_generate", "generate"), ("can_train", "train")):
        value: bool | None = getattr(node, switch)
        if value is True and ability not in ABILITIES[node.role]:
            text = f"is true, but a node with role {node.role} does not {ability}; write `role: hybrid`"
            found.problem(f"{key}.{switch}", text)
    if not node.abilities():
        found.problem(
            key, f"may do nothing: role {node.role} with can_generate/can_train false; change role or switches"
        )
    if node.is_local():
        for name in ("connection_type", "ssh_user", "ssh_port"):
            if found.given(f"{key}.{name}") and getattr(node, name) is not None:
                found.warn(
                    f"{key}.{name}", "has no effect: the node is this machine, which is not reached over a network"
                )
    else:
        found.warn(
            f"{key}.host", f"is {node.host}, another machine; this version runs on this machine only and leaves it out"
        )


def _check_launch(cluster: ClusterSettings, found: Findings) -> None:
    launch, twin = cluster.launch, local_twin(cluster)
    if launch.launcher == "in_process" and launch.ranks > 1:
        text = f"is in_process, which is for one rank, but launch.ranks is {launch.ranks}; write auto"
        found.problem("launch.launcher", text)
    for launcher, needs in (("torchrun", "torch"), ("mlx.launch", "mlx")):
        if launch.launcher == launcher and twin != needs:
            text = (
                f"is {launcher}, which starts {needs}, but the twin of this machine is {twin}; write auto "
                "or set launch.twin"
            )
            found.problem("launch.launcher", text)


def defaults() -> ClusterSettings:
    """What a workspace without a cluster file has: this machine, for everything."""
    return msgspec.convert({}, ClusterSettings)
