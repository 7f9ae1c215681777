"""Facts, plans and measurements made for single checks: a healthy Mac, Linux box and NVIDIA box to change."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from jupiter_engine.cluster.doctor import CHECKS, Edge, Evidence
from jupiter_engine.cluster.doctor.registry import examine_with
from jupiter_engine.protocol.fleet import Finding, Gpu, GroupPlan, Interface, Link, NodeFacts
from jupiter_engine.settings.cluster import ClusterSettings, GroupSpec, NodeSpec
from jupiter_engine.units import GIB

NOW = 1_800_000_000.0
MLX = {"mlx": "0.32.4", "mlx-lm": "0.32.2", "jupiter": "0.1.0", "numpy": "2.4.6", "tokenizers": "0.23.3"}
TORCH = {"torch": "2.13.0+cu128", "jupiter": "0.1.0", "numpy": "2.4.6", "nvidia-nccl-cu12": "2.27.5"}
AWAKE = {"sleep": "0", "displaysleep": "10", "lowpowermode": "0", "autorestart": "1"}
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                              100000.
Pages active:                            200000.
Pages inactive:                          200000.
Pages speculative:                         1000.
Pages throttled:                              0.
Pages wired down:                        {wired}.
Pages occupied by compressor:              1000.
"""
FIREWALL_OFF = "Firewall is disabled. (State = 0)\n"


def thunderbolt(speed: str, *peers: tuple[str, str], hub: str = "") -> str:
    """`system_profiler SPThunderboltDataType -json` of a Mac: (own domain, peer's domain) for each socket."""
    buses = []
    for number, (own, peer) in enumerate(peers, 1):
        items: list[dict[str, Any]] = [{"_name": "Mac mini", "domain_uuid_key": peer, "device_name_key": "Mac16,11"}]
        if hub:
            items = [{"_name": hub, "_items": items}]
        buses.append(
            {
                "_name": f"thunderboltusb4_bus_{number}",
                "domain_uuid_key": own,
                "receptacle_1_tag": {"receptacle_id_key": str(number), "current_speed_key": speed},
                "_items": items,
            }
        )
    return json.dumps({"SPThunderboltDataType": buses})


def uuid(number: int) -> str:
    return f"{number:08X}-0000-4000-8000-000000000000"


PORTS = "Hardware Port: Thunderbolt 1\nDevice: en2\nEthernet Address: 36:00:00:00:00:01\n\n"
IBV = "    device          \t   node GUID\n    ------          \t----------------\n    rdma_en2 \t0000000000000001\n"


def ibv_devinfo(state: str) -> str:
    return f"hca_id:\trdma_en2\n\ttransport:\t\tThunderbolt (3)\n\t\tport:\t1\n\t\t\tstate:\t\t\t{state} (4)\n"


def mac(
    name: str = "mini", *, node: dict[str, Any] | None = None, raw: dict[str, Any] | None = None, **changes: Any
) -> NodeFacts:
    """A Mac mini with M4 Pro and Thunderbolt 5 on which all is well."""
    facts = NodeFacts(
        name=name,
        host=f"{name}.local",
        system="Darwin 25.2.0 arm64",
        chip="Apple M4 Pro",
        cores=14,
        cpu_percent=3.0,
        memory_total_bytes=64 * GIB,
        memory_used_bytes=12 * GIB,
        disk_free_bytes=500 * GIB,
        load_1m=0.5,
        python="3.12.4",
        twin="mlx",
        accelerator="Metal",
        os_build="25C56",
        model="Mac16,11",
        boot_id="1799000000",
        versions=dict(MLX),
        clock_skew_s=0.01,
        rtt_s=0.001,
        sleep=dict(AWAKE),
        on_battery=False,
        thermal="nominal",
        wired_limit_mb=0,
        environment="abc123",
        interfaces=(
            Interface(name="en0", kind="ethernet", addresses=("192.168.1.7/24",)),
            Interface(name="en2", kind="thunderbolt", addresses=("10.4.0.1/30",)),
        ),
        raw={
            "sw_vers": "ProductName: macOS\nProductVersion: 26.2\nBuildVersion: 25C56\n",
            "vm_stat": VM_STAT.format(wired=200_000),
            "firewall": FIREWALL_OFF,
            "update": "0\n",
            "filevault": "FileVault is Off.\n",
            "hardware": json.dumps({"SPHardwareDataType": [{"machine_name": "Mac mini", "chip_type": "Apple M4 Pro"}]}),
            "thunderbolt": thunderbolt("80 Gb/s", (uuid(1), uuid(2))),
            "hardware_ports": PORTS,
            "ibv_devices": IBV,
            "ibv_devinfo": ibv_devinfo("PORT_ACTIVE"),
            "rdma_ctl": "enabled\n",
            "launchctl_fast_synch": "",
            **(raw or {}),
            "node": {
                "shell": "/bin/zsh",
                "user": "ada",
                "shell_noise": "",
                "environment": {},
                "processes": [],
                "crash_reports": [],
                "disk": {"writable": True},
                "own_name": {"hostname": name, "addresses": ["192.168.1.7"]},
                **(node or {}),
            },
        },
    )
    return msgspec.structs.replace(facts, **changes)


def linux(
    name: str = "box", *, node: dict[str, Any] | None = None, raw: dict[str, Any] | None = None, **changes: Any
) -> NodeFacts:
    """A Linux machine with two cards on which all is well."""
    facts = NodeFacts(
        name=name,
        host=name,
        system="Linux 6.8.0 x86_64",
        chip="AMD EPYC",
        cores=16,
        cpu_percent=2.0,
        memory_total_bytes=64 * GIB,
        memory_used_bytes=8 * GIB,
        disk_free_bytes=500 * GIB,
        load_1m=0.2,
        python="3.12.4",
        twin="torch",
        accelerator="CUDA",
        os_build="6.8.0",
        boot_id="boot-1",
        versions=dict(TORCH),
        clock_skew_s=-0.02,
        on_battery=False,
        environment="def456",
        gpus=(card(), card()),
        interfaces=(Interface(name="eth0", kind="ethernet", addresses=("192.168.1.9/24",)),),
        raw={
            "kernel_log": "-- No entries --\n",
            "nvidia_p2p": " \tGPU0\tGPU1\t\n GPU0\tX\tOK\t\n GPU1\tOK\tX\t\n",
            "sleep_target": "masked\n",
            **(raw or {}),
            "node": {
                "shell": "/bin/bash",
                "user": "ada",
                "shell_noise": "",
                "environment": {},
                "processes": [],
                "systemd": True,
                "linger_file": True,
                "power_supply": [],
                "packages": {"cuda": "12.8"},
                "own_name": {"hostname": name, "addresses": ["192.168.1.9"]},
                **(node or {}),
            },
        },
    )
    return msgspec.structs.replace(facts, **changes)


def card(**changes: Any) -> Gpu:
    gpu = Gpu(
        name="NVIDIA RTX 3090",
        memory_total_bytes=24 * GIB,
        memory_used_bytes=GIB,
        temperature_c=45.0,
        driver="570.86.10",
    )
    return msgspec.structs.replace(gpu, **changes)


def link(a: str = "mini", b: str = "studio", **changes: Any) -> Link:
    made = Link(
        a=a,
        b=b,
        kind="thunderbolt",
        a_interface="en2",
        b_interface="en2",
        a_address="10.4.0.1",
        b_address="10.4.0.2",
        speed_bits_per_s=80_000_000_000,
        rdma=("rdma_en2", "rdma_en2"),
    )
    return msgspec.structs.replace(made, **changes)


def studio(**changes: Any) -> NodeFacts:
    """The other end of `link`."""
    interfaces = (
        Interface(name="en0", kind="ethernet", addresses=("192.168.1.8/24",)),
        Interface(name="en2", kind="thunderbolt", addresses=("10.4.0.2/30",)),
    )
    raw = {"thunderbolt": thunderbolt("80 Gb/s", (uuid(2), uuid(1))), **changes.pop("raw", {})}
    return mac("studio", raw=raw, **{"interfaces": interfaces, **changes})


def plan(*nodes: str, **changes: Any) -> GroupPlan:
    made = GroupPlan(
        name="macs",
        nodes=nodes or ("mini", "studio"),
        twin="mlx",
        backend="ring",
        launcher="mlx.launch",
        links=(link(),),
        reason="ring over Thunderbolt: the cables form a ring.",
    )
    return msgspec.structs.replace(made, **changes)


def torch_plan(*nodes: str, **changes: Any) -> GroupPlan:
    return plan(*(nodes or ("box", "rig")), twin="torch", backend="nccl", launcher="torchrun", links=(), **changes)


def edge(**changes: Any) -> Edge:
    made = Edge(
        a="mini",
        b="studio",
        address="10.4.0.2",
        rtt_s=0.0004,
        detached_error="",
        listen_error="",
        to_bytes_per_s=4e9,
        from_bytes_per_s=4e9,
    )
    return msgspec.structs.replace(made, **changes)


def evidence(
    *facts: NodeFacts, specs: tuple[NodeSpec, ...] = (), groups: tuple[GroupSpec, ...] = (), **more: Any
) -> Evidence:
    """Of these nodes, and a cluster file that names them (and this machine)."""
    given = {spec.title() for spec in specs}
    nodes = (NodeSpec(), *specs, *(NodeSpec(host=one.host, name=one.name) for one in facts if one.name not in given))
    return Evidence(
        cluster=ClusterSettings(nodes=nodes, groups=groups),
        facts={one.name: one for one in facts},
        at=NOW,
        **more,
    )


def findings(slug: str, e: Evidence) -> list[Finding]:
    """What one check finds."""
    (check,) = [check for check in CHECKS if check.slug == slug]
    return list(examine_with([check], e))
