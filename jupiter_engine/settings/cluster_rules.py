"""What must hold between the keys of a cluster file, each broken rule told as a sentence with its place."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from jupiter_engine.protocol.specs import Twin
from jupiter_engine.settings.cluster import (
    ABILITIES,
    FIRST_RECONNECT_S,
    HUB,
    UNANSWERED,
    ClusterSettings,
    GroupSpec,
    NodeSpec,
    default_groups,
    find,
    guess,
    island_named,
    islands,
    local_twin,
    node_twin,
    training_group,
)
from jupiter_engine.settings.reader import Findings
from jupiter_engine.settings.tree import quote

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_])?")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_HOP = re.compile(
    r"(?:(?P<user>[^@\[\]:]+)@)?(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^@:\[\]]+))(?::(?P<port>[0-9]{1,5}))?"
)
_OF_SSH: Final = ("connection_type", "ssh_user", "ssh_port", "identity", "jump", "python", "environment")
_TWIN_OF_BACKEND: Final[Mapping[str, Twin]] = {
    "ring": "mlx",
    "jaccl": "mlx",
    "jaccl-ring": "mlx",
    "gloo": "torch",
    "nccl": "torch",
}
_TWIN_OF_LAUNCHER: Final[Mapping[str, Twin]] = {"torchrun": "torch", "mlx.launch": "mlx"}


def check(cluster: ClusterSettings, found: Findings) -> ClusterSettings:
    """Write down what is wrong with a cluster file, and return it with key files as whole paths."""
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
    _check_sharding(cluster, found)
    _check_islands(cluster, found)
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
        node = find(cluster, name)
        if node is None:
            known = [node.title() for node in cluster.nodes]
            found.problem(f"{key}.nodes[{i}]", f"is {quote(name)}, which no node is called; {guess(name, known)}")
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
            node = find(cluster, name)
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
            text = f"is {quote(launch.group)}, but no group is called so; {guess(launch.group, names)}"
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
    if cluster.islands.groups:
        return
    if group is not None and launch.ranks > 1:
        text = f"has no effect: the group {group.name} trains, with `groups[].ranks_per_node` ranks on each machine"
        found.warn("launch.ranks", text)


def _check_launcher(cluster: ClusterSettings, group: GroupSpec | None, found: Findings) -> None:
    launcher = cluster.launch.launcher
    if launcher not in _TWIN_OF_LAUNCHER or (group is not None and group.launcher != "auto"):
        return
    needs, twins, whose = _TWIN_OF_LAUNCHER[launcher], {local_twin(cluster)}, "of this machine"
    if group is not None:
        members = (find(cluster, name) for name in group.nodes)
        twins = {twin for node in members if node is not None and (twin := node_twin(cluster, node)) is not None}
        whose = f"of the group {group.name}"
    if twins and needs not in twins:
        text = f"is {launcher}, which starts {needs}, but the twin {whose} is {min(twins)}; write auto"
        found.problem("launch.launcher", f"{text} or set launch.twin")


def _check_sharding(cluster: ClusterSettings, found: Findings) -> None:
    """Whether weights can be divided over the backend that carries the ranks."""
    launch = cluster.launch
    apart = islands(cluster)
    groups = apart or tuple(group for group in (training_group(cluster),) if group is not None)
    twins = {_twin_of_group(cluster, group) for group in groups} or {local_twin(cluster)}
    if launch.sharding == "fsdp":
        for group in groups:
            if _twin_of_group(cluster, group) == "mlx" and group.backend == "ring":
                text = f"is fsdp, which MLX can do on jaccl only, but the group {group.name} has backend ring"
                found.problem("launch.sharding", f"{text}; write zero1")
        if not groups and twins == {"mlx"}:
            text = "is fsdp, which MLX can do on jaccl only, but ranks of one machine talk over a ring"
            found.problem("launch.sharding", f"{text}; write zero1")
    if launch.compile == "on" and twins == {"mlx"}:
        found.warn("launch.compile", "has no effect: it is torch's, and everything trains with MLX")


def _twin_of_group(cluster: ClusterSettings, group: GroupSpec) -> Twin | None:
    members = (find(cluster, name) for name in group.nodes)
    return next((twin for node in members if node is not None and (twin := node_twin(cluster, node))), None)


def _check_islands(cluster: ClusterSettings, found: Findings) -> None:
    section = cluster.islands
    if not section.groups:
        if found.given("islands"):
            text = "names no island; name at least one group or machine in `islands.groups`, or remove the section"
            found.problem("islands.groups" if found.given("islands.groups") else "islands", text)
        return
    nodes = [node.title() for node in cluster.nodes]
    groups = [group.name for group in cluster.groups or default_groups(cluster)]
    taken: dict[str, int] = {}
    for i, name in enumerate(section.groups):
        key, island = f"islands.groups[{i}]", island_named(cluster, name)
        if island is None:
            text = f"is {quote(name)}, which no group and no node is called; {guess(name, [*groups, *nodes])}"
            found.problem(key, text)
            continue
        members = [node for node in (find(cluster, one) for one in island.nodes) if node is not None]
        unfit = next((node for node in members if "train" not in node.abilities()), None)
        if unfit is not None and island.name not in groups:
            text = f"is {quote(name)}, which may not train (role {unfit.role}); give it the role trainer or hybrid"
            found.problem(key, text)
        both = next((node for node in members if node.title() in taken), None)
        if both is not None:
            other = section.groups[taken[both.title()]]
            text = f"is {quote(name)}, but {both.title()} is in the island {other} already; a machine is in one island"
            found.problem(key, text)
        taken.update({node.title(): i for node in members})
    for i, group in enumerate(cluster.groups):
        if group.name == HUB:
            text = f"is {HUB}, which is what the hub and the islands' leading machines are called; write another name"
            found.problem(f"groups[{i}].name", text)
    if section.hub is not None and find(cluster, section.hub) is None:
        found.problem("islands.hub", f"is {quote(section.hub)}, which no node is called; {guess(section.hub, nodes)}")
    if section.rounds.quorum > len(section.groups):
        text = f"is {section.rounds.quorum}, more than there are islands; write {len(section.groups)} or less"
        found.problem("islands.rounds.quorum", text)
    if cluster.launch.launcher == "in_process":
        text = "is in_process: this machine trains alone, but `islands` names others; write auto"
        found.problem("launch.launcher", text)
    if cluster.launch.group is not None:
        found.warn("launch.group", "has no effect: all islands train")


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
