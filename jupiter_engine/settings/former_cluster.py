"""Cluster files written for Jupiter's first design: which of their keys are read on, and what became of the others."""

from __future__ import annotations

from typing import Final

from jupiter_engine.settings import former_domain
from jupiter_engine.settings.reader import Findings
from jupiter_engine.settings.tree import Mapping, Node, Place, Scalar, Sequence, quote

_DOMAIN = "it belongs to a domain; see config/domains/NAME.yaml"
_GUIDE = "this key of the former LiveCodeBench guide never had an effect; remove it"

REFUSED: Final[dict[str, str]] = {
    "sync_every_n_steps": "gradients are combined at every step; remove the key or write 1",
    "gradient_compression": "gradients are sent uncompressed; remove the key or write false",
    "checkpoint_on_failure": (
        "a checkpoint is written every `training.checkpoint_every_steps` steps (domain file) and survives"
        " any failure; remove the key"
    ),
    "training": f"{_DOMAIN}, section `training`",
    "generation": f"{_DOMAIN}, section `generation`",
    "evaluation": f"{_DOMAIN}, section `evaluation`",
    "gate": f"{_DOMAIN}, section `gate`",
    "mix": f"{_DOMAIN}, section `mix`",
    "sources": f"{_DOMAIN}, section `sources`",
    "domain": f"{_DOMAIN}, section `domain`",
    **{
        key: f"{reason} (in config/domains/NAME.yaml)"
        for key, reason in former_domain.REFUSED.items()
        if key.startswith("self_improvement")
    },
    "cluster": _GUIDE,
    "network": _GUIDE,
    "memory_optimization": _GUIDE,
    "nodes[].capabilities": "what a node may do follows from `role`",
    "nodes[].assigned_experts": "there is no swarm of experts in this version; one domain trains one model",
}
"""Dotted key (list positions written `[]`) -> why it is not taken and what to do instead."""

_NODE_KEYS: Final = {"connection": "connection_type", "gpu": "chip", "vram_gb": "memory_gb"}
"""Older names of keys of a node."""

# The former top-level `backend` -> the backend of a group; mpi was chosen for everything and is in nothing now.
_BACKENDS: Final = {
    "mpi": "auto",
    "torch": "auto",
    "auto": "auto",
    "ring": "ring",
    "jaccl": "jaccl",
    "gloo": "gloo",
    "nccl": "nccl",
}
_NETWORK: Final = ("backend", "network_interface", "use_thunderbolt_bridge")

# Older switches whose harmless setting says what Jupiter does anyway.
_AS_ALWAYS: Final = {"sync_every_n_steps": "1", "gradient_compression": "false", "checkpoint_on_failure": "true"}


def rewrite(top: Mapping, found: Findings) -> None:
    """Read older spellings as the present ones, in place; what they became is said as a warning."""
    for name, harmless in _AS_ALWAYS.items():
        value = top.get(name)
        if isinstance(value, Scalar) and not value.quoted and value.text.lower() == harmless:
            found.places[name] = value.place
            top.pop(name)
            found.warn(name, f"is {harmless}, as it always is now; the key can be removed")
    _auto_restart(top, found)
    _node_keys(top, found)
    _network(top, found)


def _auto_restart(top: Mapping, found: Findings) -> None:
    old = top.pop("auto_restart_failed_nodes")
    if old is None:
        return
    key, value = old
    if not isinstance(value, Scalar) or value.tag != "bool":
        shown = quote(value.text) if isinstance(value, Scalar) else "something else"
        found.problem_at(value.place, f"`auto_restart_failed_nodes`: found {shown}, expected true or false")
    elif "retries" in top.entries:
        text = "`auto_restart_failed_nodes` is the older form of `retries`, and the file holds both; keep `retries`"
        found.problem_at(key.place, text)
    else:
        found.places["auto_restart_failed_nodes"] = key.place
        if value.text.lower() in ("false", "no", "off"):
            retries = Mapping(key.place)
            retries.put("worker_restarts", Scalar("0", "int", False, value.place), value.place)
            top.put("retries", retries, key.place)
        found.warn(
            "auto_restart_failed_nodes", "is the older form of `retries: {worker_restarts: ...}` and read as such"
        )


def _node_keys(top: Mapping, found: Findings) -> None:
    """Keys of a node that have another name now."""
    nodes = top.get("nodes")
    for i, node in enumerate(nodes.items if isinstance(nodes, Sequence) else ()):
        if not isinstance(node, Mapping):
            continue
        for old, new in _NODE_KEYS.items():
            if old not in node.entries:
                continue
            if new in node.entries:
                text = f"`nodes[{i}].{old}` is the older name of `{new}`, and the node has both; keep `{new}`"
                found.problem_at(node.entries[old][0].place, text)
                node.pop(old)
                continue
            # In its old position, so that the keys keep their order.
            node.entries = {
                new if key == old else key: (Scalar(new, "str", False, entry[0].place), entry[1])
                if key == old
                else entry
                for key, entry in node.entries.items()
            }
            found.places[f"nodes[{i}].{old}"] = node.entries[new][0].place
            found.warn(f"nodes[{i}].{old}", f"is the older name of `{new}` and read as such")


def _network(top: Mapping, found: Findings) -> None:
    """`backend`, `network_interface`, `use_thunderbolt_bridge`: of the one group that there was, `groups` now."""
    taken = [(name, entry) for name in _NETWORK if (entry := top.pop(name)) is not None]
    if not taken:
        return
    if "groups" in top.entries:
        for name, (key, _) in taken:
            text = f"`{name}` is older than `groups`, and the file holds both; keep `groups`"
            found.problem_at(key.place, text)
        return
    given = {name: entry[1] for name, entry in taken}
    backend = _backend(given.get("backend"), found)
    over = _over(given, found)
    if backend is None or over is None:
        return
    group = {key: value for key, value in (("backend", backend), ("over", over)) if value != "auto"}
    members, why_none = _trainers(top)
    place = taken[0][1][0].place
    if group and members:
        top.put("groups", _group(group, members, place), place)
    for name, (key, value) in taken:
        found.places[name] = key.place
        became = "over" if name != "backend" else "backend"
        if became not in group:
            text = (
                f"{_shown(value)} is read as `groups: [{{{became}: auto}}]`, the fitting one is found; remove the key"
            )
        elif members:
            text = f"{_shown(value)} is the older form of `groups: [{{{became}: {group[became]}}}]` and read as such"
        else:
            text = f"{_shown(value)} has no effect: {why_none}"
        found.warn(name, text)


def _shown(value: Node) -> str:
    return quote(value.text) if isinstance(value, Scalar) else "its value"


def _backend(value: Node | None, found: Findings) -> str | None:
    """The group backend that the former one means; None: a problem was found."""
    if value is None or (isinstance(value, Scalar) and value.tag == "null"):
        return "auto"
    if isinstance(value, Scalar) and value.text in _BACKENDS:
        return _BACKENDS[value.text]
    found.problem_at(value.place, f"`backend`: found {_shown(value)}, expected one of {', '.join(sorted(_BACKENDS))}")
    return None


def _over(given: dict[str, Node], found: Findings) -> str | None:
    """The network that the former keys mean; None: a problem was found."""
    bridge, interface = given.get("use_thunderbolt_bridge"), given.get("network_interface")
    thunderbolt: bool | None = None
    if bridge is not None and not (isinstance(bridge, Scalar) and bridge.tag in ("bool", "null")):
        text = f"`use_thunderbolt_bridge`: found {_shown(bridge)}, expected true or false"
        found.problem_at(bridge.place, text)
        return None
    if isinstance(bridge, Scalar) and bridge.tag == "bool":
        thunderbolt = bridge.text.lower() in ("true", "yes", "on")
    if interface is not None and not isinstance(interface, Scalar):
        found.problem_at(
            interface.place, f"`network_interface`: found {_shown(interface)}, expected a name such as en0"
        )
        return None
    if interface is not None and interface.tag != "null":
        # macOS calls its Thunderbolt bridge bridge0.
        if interface.text.startswith("bridge"):
            return "thunderbolt"
        return "auto" if thunderbolt else "ethernet"
    return "ethernet" if thunderbolt is False else "auto"


def _trainers(top: Mapping) -> tuple[list[str], str]:
    """Names of the machines that train, all of one framework and more than one; else why there is no such group."""
    nodes = top.get("nodes")
    names: list[str] = []
    kinds: set[str] = set()
    for node in nodes.items if isinstance(nodes, Sequence) else ():
        if not isinstance(node, Mapping):
            continue
        scalars = {key: value for key, (_, value) in node.entries.items() if isinstance(value, Scalar)}
        text = {key: value.text for key, value in scalars.items() if value.tag != "null" or value.quoted}
        if text.get("role", "hybrid") not in ("trainer", "hybrid") or text.get("can_train", "true").lower() == "false":
            continue
        names.append(text.get("name") or text.get("host") or "localhost")
        if "device_type" in text:
            kinds.add("mac" if text["device_type"] == "mac" else "other")
    if len(names) < 2:
        return [], "fewer than two machines train"
    if len(kinds) > 1:
        return [], "Macs and other machines train in groups of their own; write them down as `groups`"
    return names, ""


def _group(keys: dict[str, str], members: list[str], place: Place) -> Sequence:
    def text(value: str) -> Scalar:
        return Scalar(value, "str", True, place)

    group = Mapping(place)
    group.put("name", text("trainers"), place)
    group.put("nodes", Sequence(place, [text(name) for name in members]), place)
    for key, value in keys.items():
        group.put(key, text(value), place)
    return Sequence(place, [group])
