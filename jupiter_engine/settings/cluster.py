"""The cluster file: which machines there are, what each may do, and how training ranks are started."""

from __future__ import annotations

import ipaddress
import platform
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from jupiter_engine.errors import UsageError
from jupiter_engine.protocol.specs import Count, CountOrZero, LaunchSpec, Positive, Spec, Twin
from jupiter_engine.settings import former_cluster
from jupiter_engine.settings.reader import Findings, Loaded, load, nearest
from jupiter_engine.settings.tree import quote

Ability = Literal["generate", "train", "evaluate"]

ABILITIES: Final[Mapping[str, frozenset[Ability]]] = {
    "generator": frozenset({"generate"}),
    # A file with generators and trainers only is complete: what trains a model can also measure it.
    "trainer": frozenset({"train", "evaluate"}),
    "evaluator": frozenset({"evaluate"}),
    "hybrid": frozenset({"generate", "train", "evaluate"}),
}
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_])?")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_HOP = re.compile(
    r"(?:(?P<user>[^@\[\]:]+)@)?(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^@:\[\]]+))(?::(?P<port>[0-9]{1,5}))?"
)
FIRST_RECONNECT_S: Final = 0.5
"""Pause before the first call of a lost machine."""
UNANSWERED: Final = 3
"""So many unanswered keepalive questions end a connection."""
_OF_SSH: Final = ("connection_type", "ssh_user", "ssh_port", "identity", "jump", "python", "environment")
_TWIN_OF_BACKEND: Final[Mapping[str, Twin]] = {
    "ring": "mlx",
    "jaccl": "mlx",
    "jaccl-ring": "mlx",
    "gloo": "torch",
    "nccl": "torch",
}
_TWIN_OF_LAUNCHER: Final[Mapping[str, Twin]] = {"torchrun": "torch", "mlx.launch": "mlx"}


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
    return LaunchSpec(
        twin=twin,
        ranks=launch.ranks,
        launcher=launcher,
        threads_per_rank=launch.threads_per_rank,
        restarts_per_hour=cluster.retries.group_restarts_per_hour,
    )


# -- nodes and groups ----------------------------------------------------------------------------------
def _find(cluster: ClusterSettings, text: str) -> NodeSpec | None:
    """By name (any case), else by host."""
    low = text.lower()
    by_name = next((node for node in cluster.nodes if node.title().lower() == low), None)
    return by_name or next((node for node in cluster.nodes if node.host.lower() == low), None)


def _guess(text: str, known: list[str]) -> str:
    guess = nearest(text, known)
    return (f"did you mean {quote(guess)}? " if guess else "") + f"known: {', '.join(known) or 'none'}"


def node_by_name(cluster: ClusterSettings, text: str) -> NodeSpec:
    """The node that people call so (name in any case, else host); UsageError with the nearest name if there is none."""
    node = _find(cluster, text)
    if node is None:
        names = [node.title() for node in cluster.nodes]
        raise UsageError(
            f"there is no node {quote(text)} in config/cluster.yaml ({_guess(text, names)})",
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


# -- rules between fields ------------------------------------------------------------------------------
def _check(cluster: ClusterSettings, found: Findings) -> ClusterSettings:
    if not cluster.nodes:
        found.problem("nodes", "is an empty list; this machine alone is {host: localhost, role: hybrid}")
    for i, node in enumerate(cluster.nodes):
        _check_node(node, f"nodes[{i}]", found)
        _check_reach(node, f"nodes[{i}]", found)
        if not cluster.groups and "train" in node.abilities() and node_twin(cluster, node) is None:
            text = f"is left out, so {node.title()} trains in no group; write mac, nvidia or cpu"
            found.warn(f"nodes[{i}].device_type", f"{text} (`jupiter nodes add` finds it by looking)")
    _check_distinct(cluster.nodes, found)
    for i, group in enumerate(cluster.groups):
        _check_group(cluster, group, f"groups[{i}]", found)
    _check_membership(cluster, found)
    _check_launch(cluster, found)
    _check_times(cluster, found)
    # A relative key file starts at the folder of the file that names it, like every path of the settings.
    base = found.path.absolute().parent
    nodes = tuple(
        node if node.identity is None else msgspec.structs.replace(node, identity=str(_file(node.identity, base)))
        for node in cluster.nodes
    )
    return msgspec.structs.replace(cluster, nodes=nodes)


def _file(text: str, base: Path) -> Path:
    try:
        return base / Path(text).expanduser()
    except RuntimeError:  # ~somebody who does not exist
        return base / text


def _is_host(text: str) -> bool:
    if ":" not in text:
        return bool(_HOST.fullmatch(text))
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _check_distinct(nodes: tuple[NodeSpec, ...], found: Findings) -> None:
    hosts: dict[tuple[str, int], int] = {}
    names: dict[str, int] = {}
    local: int | None = None
    for i, node in enumerate(nodes):
        host = (node.host.lower(), node.ssh_port or 22)
        if host in hosts:
            found.problem(f"nodes[{i}].host", f"is {quote(node.host)}, which nodes[{hosts[host]}] is already")
            continue
        hosts[host] = i
        if node.is_local():
            if local is not None:
                text = f"is {quote(node.host)}: this machine, which nodes[{local}] is already"
                found.problem(f"nodes[{i}].host", text)
                continue
            local = i
        title = node.title().lower()
        if title in names:
            text = f"is {quote(node.title())}, which nodes[{names[title]}] is called already; give it another name"
            found.problem(f"nodes[{i}].name", text)
        names.setdefault(title, i)


def _check_node(node: NodeSpec, key: str, found: Findings) -> None:
    if not _is_host(node.host):
        name, _, port = node.host.rpartition(":")
        advice = "the user goes into ssh_user"
        if name and _is_host(name) and port.isdecimal():
            advice = f"the port goes into ssh_port: {{host: {name}, ssh_port: {port}}}"
        found.problem(f"{key}.host", f"is {quote(node.host)}, which is no host name or address ({advice})")
        return
    for name in ("name", "chip"):
        text: str | None = getattr(node, name)
        if text is not None and not text.strip():
            found.problem(f"{key}.{name}", "is empty; write a text or remove the key")
    if node.name is not None and node.name.startswith("-"):
        found.problem(f"{key}.name", f"is {quote(node.name)}; a name does not begin with a dash")
    for switch, ability in (("can_generate", "generate"), ("can_train", "train")):
        value: bool | None = getattr(node, switch)
        if value is True and ability not in ABILITIES[node.role]:
            said = f"is true, but a node with role {node.role} does not {ability}; write `role: hybrid`"
            found.problem(f"{key}.{switch}", said)
    if not node.abilities():
        found.problem(
            key, f"may do nothing: role {node.role} with can_generate/can_train false; change role or switches"
        )


def _check_reach(node: NodeSpec, key: str, found: Findings) -> None:
    """The keys that say how a machine is reached and where Jupiter's files are on it."""
    if node.ssh_user is not None and not _USER.fullmatch(node.ssh_user):
        found.problem(f"{key}.ssh_user", f"is {quote(node.ssh_user)}, which is no user name")
    if node.jump is not None:
        wrong = _wrong_hop(node.jump)
        if wrong:
            found.problem(f"{key}.jump", f"is {quote(node.jump)}: {wrong}")
    for name in ("python", "workdir"):
        path: str | None = getattr(node, name)
        if path is not None and (not path.startswith(("/", "~/")) or path.rstrip("/") in ("", "~")):
            said = f"is {quote(path)}; write a path on the machine that begins with / or ~/"
            found.problem(f"{key}.{name}", said)
    if node.environment == "own" and node.python is None and not node.is_local():
        text = "is own, but nothing says which Python has everything; name it with `python: /path/to/python`"
        found.problem(f"{key}.environment", text)
    if node.identity is not None:
        _check_identity(node.identity, f"{key}.identity", found)
    if node.is_local():
        for name in _OF_SSH:
            if found.given(f"{key}.{name}") and getattr(node, name) is not None:
                found.warn(
                    f"{key}.{name}", "has no effect: the node is this machine, which is not reached over a network"
                )


def _wrong_hop(jump: str) -> str:
    """What is wrong with a jump host as `ssh -J` takes it; empty: nothing."""
    for hop in jump.split(","):
        parts = _HOP.fullmatch(hop)
        if parts is None:
            return "write an alias of ~/.ssh/config or user@host:port (several hosts: separated by commas)"
        user, host, v6, port = parts.group("user", "host", "v6", "port")
        if user is not None and not _USER.fullmatch(user):
            return f"{quote(user)} is no user name"
        if not _is_host(v6 or host or ""):
            return f"{quote(v6 or host or '')} is no host name or address"
        if port is not None and not 1 <= int(port) <= 65535:
            return f"{port} is no port"
    return ""


def _check_identity(text: str, key: str, found: Findings) -> None:
    if not text.strip() or text.startswith("-"):
        found.problem(key, f"is {quote(text)}; write the path of a private key file")
        return
    if text.endswith(".pub"):
        found.problem(key, f"is {quote(text)}, the public half of a key; name the private one, without .pub")
        return
    file = _file(text, found.path.absolute().parent)
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError):
        found.warn(key, f"names {quote(str(file))}, which cannot be read now; ssh will not be able to use it")
        return
    if mode & 0o077:
        found.warn(key, f"names {quote(str(file))}, which others may read; ssh refuses such a key: chmod 600 it")


def _check_group(cluster: ClusterSettings, group: GroupSpec, key: str, found: Findings) -> None:
    if not group.name.strip() or group.name.startswith("-"):
        found.problem(f"{key}.name", f"is {quote(group.name)}; write a name that does not begin with a dash")
    if not group.nodes:
        found.problem(f"{key}.nodes", "is an empty list; name the machines that train together")
    members: list[NodeSpec] = []
    for i, name in enumerate(group.nodes):
        node = _find(cluster, name)
        if node is None:
            known = [node.title() for node in cluster.nodes]
            found.problem(f"{key}.nodes[{i}]", f"is {quote(name)}, which no node is called; {_guess(name, known)}")
        elif "train" not in node.abilities():
            text = f"is {quote(name)}, which may not train (role {node.role}); give it the role trainer or hybrid"
            found.problem(f"{key}.nodes[{i}]", text)
        else:
            members.append(node)
    twins = {twin: node for node in reversed(members) if (twin := node_twin(cluster, node)) is not None}
    if len(twins) > 1:
        text = (
            f"has {twins['mlx'].title()}, which trains with MLX, and {twins['torch'].title()}, which trains with "
            "torch; a group shares one framework: make two groups"
        )
        found.problem(f"{key}.nodes", text)
    elif twins:
        _check_fitting(cluster, group, members, next(iter(twins)), key, found)


def _check_fitting(
    cluster: ClusterSettings, group: GroupSpec, members: list[NodeSpec], twin: Twin, key: str, found: Findings
) -> None:
    """Whether a group's launcher, backend and network fit its machines."""
    words = {"mlx": "MLX", "torch": "torch"}
    for name, of in (("backend", _TWIN_OF_BACKEND), ("launcher", _TWIN_OF_LAUNCHER)):
        value: str = getattr(group, name)
        if of.get(value, twin) != twin:
            fitting = ", ".join(choice for choice, needs in of.items() if needs == twin)
            text = f"is {value}, which is for {words[of[value]]}, but the machines train with {words[twin]}"
            found.problem(f"{key}.{name}", f"{text}; write auto or one of: {fitting}")
    without_card = next((node for node in members if node.device_type == "cpu"), None)
    if group.backend == "nccl" and twin == "torch" and without_card is not None:
        text = f"is nccl, which needs an NVIDIA card, but {without_card.title()} is a cpu machine; write gloo"
        found.problem(f"{key}.backend", text)
    if group.backend in ("jaccl", "jaccl-ring") and twin == "mlx":
        if group.over == "ethernet":
            text = f"is ethernet, but backend {group.backend} runs over Thunderbolt only; write auto"
            found.problem(f"{key}.over", text)
        if group.ranks_per_node > 1:
            text = f"is {group.ranks_per_node}, but backend {group.backend} carries one rank a machine; write 1"
            found.problem(f"{key}.ranks_per_node", text)
    for node in members:
        i = cluster.nodes.index(node)
        if group.over == "thunderbolt" and node.connection_type in ("ethernet", "wifi"):
            text = f"is thunderbolt, but nodes[{i}] ({node.title()}) has connection_type {node.connection_type}"
            found.problem(f"{key}.over", f"{text}; write auto, or correct the node")
        if node.connection_type == "wifi" and len(members) > 1:
            text = "is wifi, which makes every step of its group wait; connect it by Ethernet or Thunderbolt"
            found.warn(f"nodes[{i}].connection_type", text)


def _check_membership(cluster: ClusterSettings, found: Findings) -> None:
    names: dict[str, int] = {}
    groups: dict[tuple[str, int | None], int] = {}
    for i, group in enumerate(cluster.groups):
        if group.name in names:
            text = f"is {quote(group.name)}, which groups[{names[group.name]}] is called already; give it another name"
            found.problem(f"groups[{i}].name", text)
        names.setdefault(group.name, i)
        for k, name in enumerate(group.nodes):
            node = _find(cluster, name)
            if node is None:
                continue
            identity = (node.host.lower(), node.ssh_port)
            if identity in groups:
                where = "this group" if groups[identity] == i else f"groups[{groups[identity]}]"
                text = f"is {quote(name)}, which is in {where} already; a machine trains in one group"
                found.problem(f"groups[{i}].nodes[{k}]", text)
            groups.setdefault(identity, i)


def _check_launch(cluster: ClusterSettings, found: Findings) -> None:
    launch = cluster.launch
    if launch.launcher == "in_process" and launch.ranks > 1:
        text = f"is in_process, which is for one rank, but launch.ranks is {launch.ranks}; write auto"
        found.problem("launch.launcher", text)
    names = [group.name for group in cluster.groups]
    if launch.group is not None and launch.group not in names:
        names = names or [group.name for group in default_groups(cluster)]
        if launch.group not in names:
            text = f"is {quote(launch.group)}, but no group is called so; {_guess(launch.group, names)}"
            found.problem("launch.group", text)
            return
    if launch.launcher == "in_process":
        if launch.group is not None:
            text = "is in_process: this machine trains alone, but launch.group names a group; write auto"
            found.problem("launch.launcher", text)
        elif cluster.groups:
            found.warn("launch.launcher", "is in_process: this machine trains alone and `groups` has no effect")
    group = training_group(cluster)
    _check_launcher(cluster, group, found)
    if group is not None and launch.ranks > 1:
        text = f"has no effect: the group {group.name} trains, with `groups[].ranks_per_node` ranks on each machine"
        found.warn("launch.ranks", text)


def _check_launcher(cluster: ClusterSettings, group: GroupSpec | None, found: Findings) -> None:
    launcher = cluster.launch.launcher
    if launcher not in _TWIN_OF_LAUNCHER or (group is not None and group.launcher != "auto"):
        return
    needs, twins, whose = _TWIN_OF_LAUNCHER[launcher], {local_twin(cluster)}, "of this machine"
    if group is not None:
        members = (_find(cluster, name) for name in group.nodes)
        twins = {twin for node in members if node is not None and (twin := node_twin(cluster, node)) is not None}
        whose = f"of the group {group.name}"
    if twins and needs not in twins:
        text = f"is {launcher}, which starts {needs}, but the twin {whose} is {min(twins)}; write auto"
        found.problem("launch.launcher", f"{text} or set launch.twin")


def _check_times(cluster: ClusterSettings, found: Findings) -> None:
    link, lost_after = cluster.connection, cluster.retries.node_lost_after_s
    if link.reconnect_max_s < FIRST_RECONNECT_S:
        text = f"is {link.reconnect_max_s:g}, less than the first pause; write at least {FIRST_RECONNECT_S:g}"
        found.problem("connection.reconnect_max_s", text)
    noticed = UNANSWERED * link.keepalive_s
    if noticed > lost_after:
        text = (
            f"is {link.keepalive_s:g}: a silent machine is noticed after {noticed:g} s, later than "
            f"retries.node_lost_after_s ({lost_after:g} s); write {lost_after / UNANSWERED:g} or less"
        )
        found.problem("connection.keepalive_s", text)


def defaults() -> ClusterSettings:
    """What a workspace without a cluster file has: this machine, for everything."""
    return msgspec.convert({}, ClusterSettings)
