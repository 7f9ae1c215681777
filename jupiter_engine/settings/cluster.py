"""The cluster file: which machines there are, what each may do, and how training ranks are started."""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from jupiter_engine.errors import UsageError
from jupiter_engine.protocol.specs import Count, CountOrZero, LaunchSpec, Positive, RoundSpec, Sharding, Spec, Twin
from jupiter_engine.settings import former_cluster
from jupiter_engine.settings.reader import Loaded, load, nearest
from jupiter_engine.settings.tree import quote

Ability = Literal["generate", "train", "evaluate"]

ABILITIES: Final[Mapping[str, frozenset[Ability]]] = {
    "generator": frozenset({"generate"}),
    # A file with generators and trainers only is complete: what trains a model can also measure it.
    "trainer": frozenset({"train", "evaluate"}),
    "evaluator": frozenset({"evaluate"}),
    "hybrid": frozenset({"generate", "train", "evaluate"}),
}
FIRST_RECONNECT_S: Final = 0.5
"""Pause before the first call of a lost machine."""
HUB: Final = "islands"
"""What the hub's machine and the islands' leading ones are called together, as if they were a group."""
UNANSWERED: Final = 3
"""So many unanswered keepalive questions end a connection."""


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
    micro_batch_sequences: CountOrZero = 0
    """Sequences computed at once on a rank of this machine, where its memory asks for another number than the
    domain's `training.micro_batch_sequences`; 0: that one."""

    def title(self) -> str:
        """What people call this machine: `name`, else `host`."""
        return self.name or self.host

    def is_local(self) -> bool:
        """Whether this entry means the machine we run on (names are compared, nothing is looked up).

        A port other than ssh's own on `localhost` is a forwarded one: another machine.
        """
        if self.ssh_port not in (None, 22):
            return False
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
    sharding: Literal["auto", "none", "zero1", "fsdp"] = "auto"
    """What the ranks of a group divide among themselves. `none`: nothing; `zero1`: the optimizer's state; `fsdp`:
    weights and gradients, too (torch, and MLX on jaccl). `auto`: none."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile: `auto` where a compiler is found and the run is long enough to earn its start-up."""


class IslandsSettings(Spec, frozen=True, kw_only=True):
    """Groups that train apart and are merged every few minutes (DiLoCo): for machines whose connection is too slow,
    or whose kind is too different, to share every step."""

    groups: tuple[str, ...] = ()
    """Names of groups, or of single machines, each an island; left out: one group trains, as `launch` says."""
    hub: str | None = None
    """Machine that merges what the islands have learnt; it may be one of theirs. Left out: this machine if it is
    among `nodes`, else the first island's leading one."""
    rounds: RoundSpec = RoundSpec()
    """When and how the islands are merged."""


class RetrySettings(Spec, frozen=True, kw_only=True):
    """What happens when a worker dies."""

    worker_restarts: Annotated[int, Meta(ge=0, le=100)] = 2
    """How often a worker that died without a reason of its own is started again before the stage fails."""
    group_restarts_per_hour: CountOrZero = 5
    """How often a group of ranks may be started again from its last checkpoint within an hour."""
    node_lost_after_s: Positive = 75.0
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
    islands: IslandsSettings = IslandsSettings()
    connection: ConnectionSettings = ConnectionSettings()
    retries: RetrySettings = RetrySettings()


def load_cluster(path: Path) -> Loaded[ClusterSettings]:
    """Read a cluster file; raises ConfigError with every problem in it."""
    # Loaded here: the rules are about the types of this module.
    from jupiter_engine.settings.cluster_rules import check

    return load(path, ClusterSettings, refused=former_cluster.REFUSED, rewrite=former_cluster.rewrite, check=check)


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


def sharding(cluster: ClusterSettings) -> Sharding:
    """What ranks divide among themselves, with `auto` decided."""
    return "none" if cluster.launch.sharding == "auto" else cluster.launch.sharding


def launch_spec(cluster: ClusterSettings) -> LaunchSpec:
    """How training starts on this machine, with every `auto` decided."""
    twin, launch, node = local_twin(cluster), cluster.launch, local_node(cluster)
    launcher = launch.launcher
    if launcher == "auto":
        several: Literal["torchrun", "mlx.launch"] = "torchrun" if twin == "torch" else "mlx.launch"
        launcher = "in_process" if launch.ranks == 1 else several
    return LaunchSpec(
        twin=twin,
        ranks=launch.ranks,
        launcher=launcher,
        threads_per_rank=launch.threads_per_rank,
        sharding=sharding(cluster),
        compile=launch.compile,
        micro_batch_sequences=node.micro_batch_sequences if node is not None else 0,
        restarts_per_hour=cluster.retries.group_restarts_per_hour,
    )


# -- nodes and groups ----------------------------------------------------------------------------------
def find(cluster: ClusterSettings, text: str) -> NodeSpec | None:
    """By name (any case), else by host."""
    low = text.lower()
    by_name = next((node for node in cluster.nodes if node.title().lower() == low), None)
    return by_name or next((node for node in cluster.nodes if node.host.lower() == low), None)


def guess(text: str, known: list[str]) -> str:
    """For a message about a name that is none: the nearest one, and all of them."""
    near = nearest(text, known)
    return (f"did you mean {quote(near)}? " if near else "") + f"known: {', '.join(known) or 'none'}"


def node_by_name(cluster: ClusterSettings, text: str) -> NodeSpec:
    """The node that people call so (name in any case, else host); UsageError with the nearest name if there is none."""
    node = find(cluster, text)
    if node is None:
        names = [node.title() for node in cluster.nodes]
        raise UsageError(
            f"there is no node {quote(text)} in config/cluster.yaml ({guess(text, names)})",
            fix="name one of these; `jupiter nodes list` shows them",
        )
    return node


def group_nodes(cluster: ClusterSettings, group: GroupSpec) -> tuple[NodeSpec, ...]:
    """The machines of a group in rank order, the leading one first; UsageError for a name that is none."""
    return tuple(node_by_name(cluster, name) for name in group.nodes)


def node_twin(cluster: ClusterSettings, node: NodeSpec) -> Twin | None:
    """Framework of a machine after `launch.twin` and `device_type`; None: another machine that was not asked yet."""
    if node.is_local():
        return local_twin(cluster)
    if cluster.launch.twin != "auto":
        return cluster.launch.twin
    if node.device_type is None:
        return None
    return "mlx" if node.device_type == "mac" else "torch"


def default_groups(cluster: ClusterSettings) -> tuple[GroupSpec, ...]:
    """The groups of a file without `groups`: all trainers of one framework, where one of them is another machine.

    The largest comes first (of equal ones that with this machine, then the order of the file), so it is
    the one that trains. This machine leads its group. A machine whose framework is unknown is in none.
    """
    if cluster.groups:
        return ()
    found: list[tuple[int, int, GroupSpec]] = []
    for twin in ("mlx", "torch"):
        nodes = [n for n in cluster.nodes if "train" in n.abilities() and node_twin(cluster, n) == twin]
        if all(node.is_local() for node in nodes):
            continue
        nodes.sort(key=lambda node: not node.is_local())  # stable: the others stay in order
        group = GroupSpec(name=twin, nodes=tuple(node.title() for node in nodes))
        here = min((0 if node.is_local() else 1 + cluster.nodes.index(node)) for node in nodes)
        found.append((-len(nodes), here, group))
    return tuple(group for _, _, group in sorted(found, key=lambda entry: entry[:2]))


def training_group(cluster: ClusterSettings) -> GroupSpec | None:
    """The group that trains: `launch.group`, else the first; None: this machine trains alone."""
    if cluster.launch.launcher == "in_process":
        return None
    groups = cluster.groups or default_groups(cluster)
    if cluster.launch.group is None:
        return groups[0] if groups else None
    return next((group for group in groups if group.name == cluster.launch.group), None)


# -- islands -------------------------------------------------------------------------------------------
def island_named(cluster: ClusterSettings, text: str) -> GroupSpec | None:
    """The group that is called so, else a group of the one machine that is; None if there is neither."""
    group = next((one for one in cluster.groups or default_groups(cluster) if one.name == text), None)
    if group is not None:
        return group
    node = find(cluster, text)
    if node is None:
        return None
    return GroupSpec(name=node.title(), nodes=(node.title(),), ranks_per_node=cluster.launch.ranks)


def islands(cluster: ClusterSettings) -> tuple[GroupSpec, ...]:
    """The groups that train apart, in the order of the file; empty: one group (or machine) trains."""
    found = (island_named(cluster, text) for text in cluster.islands.groups)
    return tuple(group for group in found if group is not None)


def hub_node(cluster: ClusterSettings) -> NodeSpec:
    """The machine that merges the islands; UsageError if there are none."""
    if cluster.islands.hub is not None:
        return node_by_name(cluster, cluster.islands.hub)
    groups = islands(cluster)
    if not groups:
        raise UsageError("config/cluster.yaml names no islands", fix="name groups or machines in its `islands.groups`")
    return local_node(cluster) or group_nodes(cluster, groups[0])[0]


def hub_group(cluster: ClusterSettings, *, whole: bool = False) -> GroupSpec | None:
    """The hub's machine with the islands' leading ones, which it calls by ssh; `whole`: with all their machines, each
    of which may have to lead one day. None: there are no islands."""
    groups = islands(cluster)
    if not groups:
        return None
    found = [hub_node(cluster)]
    for group in groups:
        members = group_nodes(cluster, group)
        found += members if whole else members[:1]
    return GroupSpec(name=HUB, nodes=tuple(dict.fromkeys(node.title() for node in found)))


def defaults() -> ClusterSettings:
    """What a workspace without a cluster file has: this machine, for everything."""
    return msgspec.convert({}, ClusterSettings)
