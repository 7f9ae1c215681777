"""The cluster as viewers see it: live facts of nodes, links between them, findings, what is being sent where."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from jupiter_engine.protocol.specs import Twin

Severity = Literal["ok", "info", "warn", "fail"]
"""`fail`: the plan cannot work until it is mended; `warn`: it works worse or may break; `info`: good to know."""

NodeState = Literal["unknown", "connecting", "online", "lost", "refused"]
"""`lost`: it answered before and is being called again; `refused`: calling again will not help (key, user, Python)."""


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    utilisation_percent: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    driver: str = ""


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """A network interface of a node."""

    name: str
    kind: Literal["thunderbolt", "ethernet", "wifi", "bridge", "vpn", "virtual", "loopback", "unknown"] = "unknown"
    addresses: tuple[str, ...] = ()
    """IPv4 addresses with prefix length: 192.168.1.7/24."""
    up: bool = True
    speed_bits_per_s: int | None = None


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a node says about itself now. None or empty: it could not be read there (never a made-up number)."""

    name: str
    host: str
    system: str
    """Operating system, release and machine type."""
    chip: str
    cores: int
    cpu_percent: float
    """Over the time since the previous reading, all cores = 100."""
    memory_total_bytes: int
    memory_used_bytes: int
    disk_free_bytes: int
    """Where Jupiter keeps its files on the node."""
    load_1m: float
    python: str
    twin: Twin
    accelerator: str
    """Metal, CUDA or cpu."""
    os_build: str = ""
    """macOS build (24G231) or the kernel's release."""
    model: str = ""
    """Hardware model, such as Mac16,10."""
    boot_id: str = ""
    """Changes with every boot."""
    gpus: tuple[Gpu, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    routes: tuple[str, ...] = ()
    """IPv4 networks with a route on the node: 192.168.1.0/24."""
    versions: dict[str, str] = {}
    """Installed packages of the environment that training would use: mlx, mlx-lm, torch, jupiter, ..."""
    clock_skew_s: float | None = None
    """The node's clock minus this machine's, after half a round trip; None for this machine."""
    rtt_s: float | None = None
    """Round trip of one command over the open connection."""
    sleep: dict[str, str] = {}
    """Sleep settings as the system's own tool gives them (pmset on a Mac)."""
    on_battery: bool | None = None
    thermal: str = ""
    """nominal, or what the system says about throttling."""
    wired_limit_mb: int | None = None
    """iogpu.wired_limit_mb of a Mac; 0: the system's default."""
    environment: str = ""
    """Hash of the environment that Jupiter put there; empty: none yet, or the node's own Python is used."""
    raw: dict[str, Any] = {}
    """Answers of system tools that only single checks read, by tool name."""


class Fix(msgspec.Struct, frozen=True, kw_only=True):
    """What mends a finding."""

    text: str
    """One sentence for a person."""
    argv: tuple[str, ...] = ()
    """A command that does it; empty: only a person can (plug in a cable)."""
    node: str = ""
    """Node on which `argv` runs; empty: this machine."""
    safe: bool = False
    """Changes nothing that cannot be taken back, needs no sudo: the console offers it as a key."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One result of one check of `jupiter doctor`."""

    check: str
    """Slug of the check: clock-skew. Also the heading in docs/troubleshooting.md."""
    severity: Severity
    nodes: tuple[str, ...]
    text: str
    """One sentence: what is so, with the numbers."""
    fix: Fix | None = None


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A connection between two nodes."""

    a: str
    b: str
    kind: Literal["thunderbolt", "ethernet", "wifi"]
    a_interface: str = ""
    b_interface: str = ""
    a_address: str = ""
    """Address that the group would use; empty: none is set up yet."""
    b_address: str = ""
    speed_bits_per_s: int | None = None
    """As negotiated, from the system's tools."""
    rtt_s: float | None = None
    """Measured."""
    rdma: tuple[str, str] | None = None
    """RDMA device at a and at b."""


class GroupPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How one group of nodes would be launched, and why so."""

    name: str
    nodes: tuple[str, ...]
    """In rank order."""
    twin: Twin
    backend: Literal["ring", "jaccl", "jaccl-ring", "gloo", "nccl"]
    launcher: Literal["in_process", "torchrun", "mlx.launch", "direct"]
    links: tuple[Link, ...] = ()
    reason: str = ""
    """Why this backend: one sentence."""
    hostfile: dict[str, Any] = {}
    """As `mlx.launch --hostfile` reads it; empty for torch groups."""
    setup: tuple[Fix, ...] = ()
    """Commands that bring the addresses of `hostfile` up where they are not yet."""
    problems: tuple[str, ...] = ()
    """Complete sentences; empty: it can be launched."""


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """Something being sent to (or fetched from) a node."""

    what: str
    """environment, inputs, results."""
    sent_bytes: int
    total_bytes: int
    bytes_per_s: float | None
    eta_s: float | None
    step: str = ""
    """sending, installing, verifying."""


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One node of the cluster file as it stands now."""

    name: str
    host: str
    role: str
    local: bool
    state: NodeState
    facts: NodeFacts | None = None
    problem: str = ""
    """Why it cannot be used, one sentence; empty while all is well."""
    fix: str = ""
    transfer: Transfer | None = None
    since: float = 0.0
    """Seconds since the epoch at which `state` began."""


class FleetPicture(msgspec.Struct, frozen=True, kw_only=True):
    """All of it at one moment."""

    at: float = 0.0
    nodes: tuple[NodeStatus, ...] = ()
    groups: tuple[GroupPlan, ...] = ()
    islands: str = ""
    """Which of them train apart, and who merges what they learn: one sentence; empty: one group trains."""
    findings: tuple[Finding, ...] = ()
    findings_at: float = 0.0
    """When the doctor last looked; 0: not yet."""
