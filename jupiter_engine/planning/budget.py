"""What a machine really lets a training process have: from a node's facts, or from what the cluster file says."""

from __future__ import annotations

from typing import Final

import msgspec

from jupiter_engine.planning.memory import DeviceKind
from jupiter_engine.protocol.fleet import NodeFacts
from jupiter_engine.protocol.specs import Twin
from jupiter_engine.settings.cluster import NodeSpec
from jupiter_engine.units import GIB, MIB, bytes_text

METAL_SHARE: Final = 2 / 3
METAL_SHARE_LARGE: Final = 3 / 4
METAL_LARGE: Final = 36 * GIB
"""macOS lets the GPU wire two thirds of the memory, three quarters where there are more than 36 GiB, unless
iogpu.wired_limit_mb says otherwise (recommendedMaxWorkingSetSize)."""
CUDA_CONTEXT: Final = 1024 * MIB
"""Driver context, kernels and cuBLAS workspace of one process on a card: 0.8 to 1.2 GiB."""
SYSTEM_LEAST: Final = 1 * GIB
SYSTEM_SHARE: Final = 0.06
"""Of a CPU machine's memory: left to the system."""


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """What trains on one node."""

    node: str
    kind: DeviceKind
    twin: Twin
    name: str
    """Chip or card, as the table of speeds knows it."""
    cores: int = 1
    cards: int = 1
    allowed: int | None = None
    """Bytes that all ranks on one pool (the machine's memory, or one card) may have together; None: not known."""
    why: str = ""
    """How `allowed` was found."""
    power_w: float | None = None
    """The card's own limit, where it was read."""
    measured: bool = False
    """The node was asked; else the cluster file says so."""

    def ranks_on_one_pool(self, ranks: int) -> int:
        """How many of a node's ranks share the memory that `allowed` is about."""
        return -(-ranks // self.cards) if self.kind == "cuda" else ranks


def device_of(facts: NodeFacts, *, twin: Twin | None = None, name: str = "") -> Device:
    """The training device of a node that was asked."""
    framework = twin or facts.twin
    node = name or facts.name
    if framework == "torch" and facts.gpus:
        smallest = min(facts.gpus, key=lambda card: card.memory_total_bytes or 0)
        total = smallest.memory_total_bytes
        return Device(
            node=node,
            kind="cuda",
            twin=framework,
            name=smallest.name,
            cores=facts.cores,
            cards=len(facts.gpus),
            allowed=_positive(total - CUDA_CONTEXT) if total else None,
            why=f"{bytes_text(total)} on the card less {bytes_text(CUDA_CONTEXT)} for the driver" if total else "",
            power_w=smallest.power_limit_w,
            measured=True,
        )
    if framework == "mlx" and facts.accelerator == "Metal":
        allowed, why = _metal(facts.memory_total_bytes, facts.wired_limit_mb)
        kind: DeviceKind = "metal"
    else:
        allowed, why = _main_memory(facts.memory_total_bytes)
        kind = "cpu"
    return Device(
        node=node,
        kind=kind,
        twin=framework,
        name=facts.chip,
        cores=facts.cores,
        allowed=allowed if facts.memory_total_bytes else None,
        why=why if facts.memory_total_bytes else "",
        measured=True,
    )


def device_from_settings(node: NodeSpec, twin: Twin | None) -> Device:
    """The training device of a node that was not asked, as the cluster file describes it."""
    total = int(node.memory_gb * GIB) if node.memory_gb else 0
    framework = twin or ("mlx" if node.device_type == "mac" else "torch")
    if node.device_type == "nvidia":
        kind: DeviceKind = "cuda"
        allowed, why = _positive(total - CUDA_CONTEXT), f"memory_gb less {bytes_text(CUDA_CONTEXT)} for the driver"
    elif node.device_type == "mac":
        kind = "metal"
        allowed, why = _metal(total, None)
    else:
        kind = "cpu"
        allowed, why = _main_memory(total)
    return Device(
        node=node.title(),
        kind=kind,
        twin=framework,
        name=node.chip or "",
        allowed=allowed if total else None,
        why=f"{why} (as config/cluster.yaml says)" if total else "config/cluster.yaml names no memory_gb",
    )


def _metal(total: int, wired_limit_mb: int | None) -> tuple[int, str]:
    if wired_limit_mb:
        return wired_limit_mb * MIB, f"iogpu.wired_limit_mb is {wired_limit_mb}"
    share = METAL_SHARE if total <= METAL_LARGE else METAL_SHARE_LARGE
    return int(total * share), f"the GPU's share of {bytes_text(total)}, unless iogpu.wired_limit_mb is raised"


def _main_memory(total: int) -> tuple[int, str]:
    system = max(SYSTEM_LEAST, int(total * SYSTEM_SHARE))
    return _positive(total - system), f"{bytes_text(total)} less {bytes_text(system)} for the system"


def _positive(size: int) -> int:
    return max(0, size)
