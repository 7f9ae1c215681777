"""Cluster files written for Jupiter's first design: which of their keys are read on, and what became of the others."""

from __future__ import annotations

from typing import Final

from jupiter_engine.settings import former_domain
from jupiter_engine.settings.reader import Findings
from jupiter_engine.settings.tree import Mapping, Scalar, quote

_DOMAIN = "it belongs to a domain; see config/domains/NAME.yaml"
_GUIDE = "this key of the former LiveCodeBench guide never had an effect; remove it"

REFUSED: Final[dict[str, str]] = {
    "backend": (
        "the group follows from the framework (ring for MLX, gloo or NCCL for torch); choose with "
        "`launch: {twin: ...}` or leave it out"
    ),
    "network_interface": "training processes run on this machine and talk over the loopback interface; remove the key",
    "use_thunderbolt_bridge": (
        "training processes run on this machine and talk over the loopback interface; remove the key"
    ),
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
    "nodes[].connection": "it is called `connection_type` now",
    "nodes[].gpu": "it is called `chip` now",
    "nodes[].vram_gb": "it is called `memory_gb` now",
    "nodes[].capabilities": "what a node may do follows from `role`",
    "nodes[].assigned_experts": "there is no swarm of experts in this version; one domain trains one model",
}
"""Dotted key (list positions written `[]`) -> why it is not taken and what to do instead."""

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
