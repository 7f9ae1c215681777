"""Every check with both verdicts: what it says where all is well, and what where it is not."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest

from jupiter_engine.cluster.doctor import CHECKS, Evidence, Former, Login, Problem, examine, needed_nodes_fail
from jupiter_engine.cluster.doctor.capacity import orphans
from jupiter_engine.protocol.fleet import Fix, Interface
from jupiter_engine.settings.cluster import GroupSpec, NodeSpec
from jupiter_engine.units import GIB
from tests.cluster.doctor.made import (
    AWAKE,
    FIREWALL_OFF,
    MLX,
    NOW,
    TORCH,
    VM_STAT,
    card,
    edge,
    evidence,
    findings,
    ibv_devinfo,
    link,
    linux,
    mac,
    plan,
    studio,
    thunderbolt,
    torch_plan,
    uuid,
)

PAIR = (mac(), studio())
RANK = {"pid": 77, "parent": 1, "state": "S", "command": "python -m jupiter_engine.worker.rank /r 1"}


def pair(**more: Any) -> Evidence:
    return evidence(*PAIR, plans=(plan(),), **more)


class Case(NamedTuple):
    slug: str
    healthy: Evidence | None
    """None: the check is silent where all is well."""
    sick: Evidence
    severity: str
    phrase: str
    """In the sentence of the finding."""


CASES = [
    Case(
        "unreachable",
        pair(),
        evidence(
            mac(),
            specs=(NodeSpec(host="studio.local", name="studio"),),
            groups=(GroupSpec(name="macs", nodes=("mini", "studio")),),
            problems={"studio": Problem(text="connection refused", fix="switch Remote Login on")},
        ),
        "fail",
        "studio cannot be used: connection refused.",
    ),
    Case("login-shell", pair(), evidence(mac(node={"shell": "/opt/homebrew/bin/fish"})), "warn", "is fish"),
    Case(
        "login-shell",
        evidence(linux()),
        evidence(linux(node={"shell": "/bin/dash"}), plans=(plan("box"),)),
        "warn",
        "dash",
    ),
    Case(
        "login-output",
        pair(),
        evidence(mac(node={"shell_noise": "Welcome!\nbe kind"})),
        "warn",
        "prints 16 characters of its own: 'Welcome! be kind'",
    ),
    Case("clock-skew", pair(), evidence(mac(clock_skew_s=-3.5)), "warn", "3.5 s behind this machine's"),
    Case("clock-skew", pair(), evidence(linux(clock_skew_s=90.0)), "fail", "90.0 s ahead of"),
    Case(
        "reboot",
        evidence(mac(), former={"mini": Former(boot_id="1799000000", at=NOW - 60)}),
        evidence(mac(), former={"mini": Former(boot_id="1798000000", at=NOW - 7200)}),
        "info",
        "since the last look 2h00m ago",
    ),
    Case("linger", evidence(linux()), evidence(linux(node={"linger_file": False})), "warn", "lingering is off"),
    Case("framework", pair(), evidence(mac(versions={}, environment="abc")), "fail", "mlx and mlx-lm cannot be found"),
    Case("mlx-version", pair(), evidence(mac(versions={**MLX, "mlx": "0.31.2"})), "fail", "MLX 0.31.2; before 0.32.1"),
    Case(
        "mlx-version",
        pair(),
        evidence(mac(), studio(versions={**MLX, "mlx": "0.32.9"}), plans=(plan(),)),
        "fail",
        "0.32.4 on mini, 0.32.9 on studio",
    ),
    Case(
        "torch-version",
        evidence(linux(), linux("rig", versions={**TORCH, "torch": "2.13.0+cpu"}), plans=(torch_plan(),)),
        evidence(linux(), linux("rig", versions={**TORCH, "torch": "2.12.0"}), plans=(torch_plan(),)),
        "fail",
        "2.12.0 on rig, 2.13.0 on box",
    ),
    Case(
        "nccl-version",
        evidence(linux(), linux("rig"), plans=(torch_plan(),)),
        evidence(linux(), linux("rig", versions={**TORCH, "nvidia-nccl-cu12": "2.28.9"}), plans=(torch_plan(),)),
        "fail",
        "NCCL: 2.27.5 on box, 2.28.9 on rig",
    ),
    Case(
        "jupiter-version",
        pair(),
        evidence(mac(), studio(versions={**MLX, "jupiter": "0.2.0"}), plans=(plan(),)),
        "fail",
        "0.1.0 on mini, 0.2.0 on studio",
    ),
    Case("python-version", pair(), evidence(mac(python="3.9.6")), "fail", "3.9.6; training needs 3.11"),
    Case(
        "python-version",
        pair(),
        evidence(mac(), studio(python="3.13.1"), plans=(plan(),)),
        "warn",
        "3.12 on mini, 3.13 on studio",
    ),
    Case(
        "environment",
        pair(),
        evidence(mac(), studio(environment="other"), plans=(plan(),)),
        "warn",
        "abc123 on mini, other on studio",
    ),
    Case(
        "package-versions",
        pair(),
        evidence(mac(), studio(versions={**MLX, "tokenizers": "0.22.0"}), plans=(plan(),)),
        "warn",
        "tokenizers (0.22.0 on studio, 0.23.3 on mini)",
    ),
    Case(
        "fast-synch",
        pair(),
        evidence(mac(node={"environment": {"MLX_METAL_FAST_SYNCH": "1"}})),
        "fail",
        "MLX_METAL_FAST_SYNCH is 1 on mini",
    ),
    Case("disk", pair(), evidence(mac(disk_free_bytes=2 * GIB)), "fail", "2.0 GiB are free on mini; 3 checkpoints"),
    Case("disk", pair(), evidence(mac(disk_free_bytes=20 * GIB)), "info", "a billion parameters (34.9 GiB)"),
    Case("disk", pair(), evidence(mac(node={"disk": {"writable": False}})), "fail", "may not write"),
    Case(
        "memory-claim",
        evidence(mac(), specs=(NodeSpec(host="mini.local", name="mini", memory_gb=64),)),
        evidence(mac(memory_total_bytes=16 * GIB), specs=(NodeSpec(host="mini.local", name="mini", memory_gb=64),)),
        "warn",
        "16.0 GiB memory, config/cluster.yaml says 64 GB",
    ),
    Case(
        "memory-claim",
        evidence(linux(), specs=(NodeSpec(host="box", device_type="nvidia", memory_gb=24),)),
        evidence(linux(), specs=(NodeSpec(host="box", device_type="nvidia", memory_gb=48),)),
        "warn",
        "24.0 GiB on its card",
    ),
    Case("leftover", pair(), evidence(mac(node={"processes": [RANK]})), "warn", "1 process(es) of an earlier run"),
    Case("busy", pair(), evidence(mac(load_1m=13.0, cpu_percent=95.0)), "info", "load 13.0 on 14 cores"),
    Case("busy", pair(), evidence(mac(memory_used_bytes=60 * GIB)), "warn", "Only 4.0 GiB of 64.0 GiB"),
    Case(
        "small-memory", pair(), evidence(mac(memory_total_bytes=4 * GIB)), "warn", "4.0 GiB memory; the default model"
    ),
    Case("sleep", pair(), evidence(mac(sleep={**AWAKE, "sleep": "10"})), "warn", "after 10 idle minutes"),
    Case(
        "sleep",
        evidence(linux()),
        evidence(linux(raw={"sleep_target": "static\n"}, node={"power_supply": [{"type": "Battery", "online": ""}]})),
        "warn",
        "box is a laptop",
    ),
    Case("battery", pair(), evidence(mac(on_battery=True)), "warn", "runs on its battery"),
    Case("thermal", pair(), evidence(mac(thermal="CPU_Speed_Limit 60")), "warn", "CPU_Speed_Limit 60"),
    Case("thermal", pair(), evidence(linux(gpus=(card(temperature_c=91.0),))), "warn", "at 91 °C"),
    Case(
        "fanless",
        None,
        evidence(mac(raw={"hardware": json.dumps({"SPHardwareDataType": [{"machine_name": "MacBook Air"}]})})),
        "info",
        "mini has no fan",
    ),
    Case("low-power-mode", pair(), evidence(mac(sleep={**AWAKE, "lowpowermode": "1"})), "warn", "Low Power Mode is on"),
    Case("auto-restart", pair(), evidence(mac(sleep={**AWAKE, "autorestart": "0"})), "info", "stays off"),
    Case("auto-restart", pair(), evidence(mac(raw={"filevault": "FileVault is On.\n"})), "info", "FileVault is on"),
    Case("macos-build", pair(), evidence(mac(), studio(os_build="25D1"), plans=(plan(),)), "warn", "25C56 on mini"),
    Case(
        "macos-build",
        pair(),
        evidence(mac(), studio(os_build="25D1"), plans=(plan(backend="jaccl"),)),
        "fail",
        "RDMA needs equal ones",
    ),
    Case("auto-update", pair(), evidence(mac(raw={"update": "1\n"})), "warn", "installs macOS updates by itself"),
    Case(
        "display-sleep",
        evidence(mac(chip="Apple M5 Max")),
        evidence(mac(chip="Apple M5 Max", sleep={**AWAKE, "displaysleep": "0"})),
        "warn",
        "never sleeps",
    ),
    Case("wired-limit", pair(), evidence(mac(wired_limit_mb=63_000)), "fail", "leaves 2.5 GiB for macOS"),
    Case("wired-limit", pair(), evidence(mac(wired_limit_mb=48_000)), "info", "gone after a restart"),
    Case(
        "wired-limit",
        pair(),
        evidence(mac(), former={"mini": Former(boot_id="x", wired_limit_mb=48_000)}),
        "info",
        "it was 48000 before",
    ),
    Case(
        "leaked-memory",
        pair(),
        evidence(mac(raw={"vm_stat": VM_STAT.format(wired=2_000_000)})),
        "warn",
        "30.5 GiB of 64",
    ),
    Case(
        "crash-reports",
        evidence(mac(node={"crash_reports": [{"name": "old.panic", "at": NOW - 9 * 86400}]})),
        evidence(mac(node={"crash_reports": [{"name": "x.panic", "at": NOW - 3600}]})),
        "warn",
        "1h00m ago it panicked",
    ),
    Case("tool-answers", pair(), evidence(mac(raw={"thunderbolt": "not json"})), "info", "printed no JSON"),
    Case(
        "tool-answers",
        pair(),
        evidence(mac(raw={"timed_out": ["ibv_devinfo"]})),
        "info",
        "no answer in time from ibv_devinfo",
    ),
    Case("rdma", pair(), evidence(mac(raw={"rdma_ctl": "disabled\n"})), "info", "RDMA is switched off"),
    Case(
        "rdma",
        pair(),
        evidence(mac(raw={"thunderbolt": thunderbolt("Up to 40 Gb/s", (uuid(1), uuid(2)))})),
        "info",
        "run at 40 Gb/s: RDMA needs Thunderbolt 5, and that rdma_ctl says enabled means nothing",
    ),
    Case(
        "rdma",
        pair(),
        evidence(mac(raw={"ibv_devices": "head\n"}), studio(), plans=(plan(backend="jaccl"),)),
        "fail",
        "its group is set to use RDMA",
    ),
    Case(
        "rdma-port",
        pair(),
        evidence(mac(raw={"ibv_devinfo": ibv_devinfo("PORT_DOWN")}), studio(), plans=(plan(backend="jaccl"),)),
        "fail",
        "rdma_en2 on mini is PORT_DOWN",
    ),
    Case("rdma-port", pair(), evidence(mac(model="Mac16,9"), studio(), plans=(plan(),)), "warn", "next to Ethernet"),
    Case(
        "group-plan",
        pair(),
        evidence(*PAIR, plans=(plan(problems=("There is no ring.",)),)),
        "fail",
        "There is no ring.",
    ),
    Case(
        "mesh-size",
        evidence(*PAIR, plans=(plan(backend="jaccl"),)),
        evidence(*PAIR, plans=(plan(*[f"n{i}" for i in range(9)], backend="jaccl"),)),
        "fail",
        "has 9 nodes; a mesh over RDMA takes 8",
    ),
    Case("mesh-size", pair(), evidence(*PAIR, plans=(plan(links=(link(),) * 5),)), "warn", "5 cables between"),
    Case(
        "thunderbolt-bridge",
        pair(),
        evidence(
            mac(raw={"ifconfig": "bridge0: flags=8863<UP,BROADCAST> mtu 1500\n\tmember: en2 flags=3<LEARNING>\n"}),
            studio(),
            plans=(plan(),),
        ),
        "fail",
        "bridge0 on mini holds en2",
    ),
    Case(
        "thunderbolt-hub",
        None,
        evidence(mac(raw={"thunderbolt": thunderbolt("80 Gb/s", (uuid(1), uuid(2)), hub="CalDigit")})),
        "info",
        "through CalDigit",
    ),
    Case(
        "cable-speed", pair(), evidence(*PAIR, plans=(plan(links=(link(speed_bits_per_s=10**10),)),)), "warn", "10 Gb/s"
    ),
    Case(
        "group-addresses",
        pair(),
        evidence(*PAIR, plans=(plan(setup=(Fix(text="give en2 its address", argv=("sudo", "x"), node="mini"),)),)),
        "fail",
        "needs addresses on mini that are not set up",
    ),
    Case(
        "group-addresses",
        pair(),
        evidence(mac(), studio(interfaces=(Interface(name="en5", addresses=("10.4.0.2/30",)),)), plans=(plan(),)),
        "fail",
        "10.4.0.2 is on en5 of studio, but the cable of group macs is on en2",
    ),
    Case(
        "address-collision",
        pair(),
        evidence(
            mac(
                interfaces=(
                    Interface(name="en0", kind="wifi", addresses=("10.4.0.9/16",)),
                    Interface(name="en2", kind="thunderbolt", addresses=("10.4.0.1/30",)),
                )
            ),
            plans=(plan(),),
        ),
        "fail",
        "10.4.0.0/30 of en2 overlaps 10.4.0.0/16 of en0",
    ),
    Case(
        "vpn",
        pair(),
        evidence(mac(interfaces=(Interface(name="utun3", kind="vpn", addresses=("10.4.0.1/32",)),)), plans=(plan(),)),
        "fail",
        "through utun3 of mini",
    ),
    Case(
        "wifi",
        pair(),
        evidence(*PAIR, plans=(plan(links=(link(kind="wifi"),)),)),
        "warn",
        "over Wi-Fi between mini and",
    ),
    Case(
        "reachable",
        pair(edges=(edge(),)),
        pair(edges=(edge(rtt_s=None, error="No route to host"),)),
        "fail",
        "mini cannot reach studio at 10.4.0.2: No route to host",
    ),
    Case(
        "round-trip",
        pair(edges=(edge(),)),
        pair(edges=(edge(rtt_s=0.0052),)),
        "warn",
        "takes 5.20 ms over thunderbolt; 1 ms is usual",
    ),
    Case(
        "bandwidth",
        pair(edges=(edge(),)),
        pair(edges=(edge(to_bytes_per_s=4e9, from_bytes_per_s=1.1e8),)),
        "warn",
        "exchange 110 MB/s over thunderbolt of 10000",
    ),
    Case(
        "local-network",
        pair(edges=(edge(),)),
        pair(edges=(edge(detached_error="No route to host"),)),
        "fail",
        "A process of mini that no session owns cannot reach studio (No route to host)",
    ),
    Case(
        "firewall",
        pair(edges=(edge(),)),
        pair(edges=(edge(listen_error="timed out"),)),
        "fail",
        "A port that studio opens cannot be reached from mini (timed out)",
    ),
    Case(
        "firewall",
        evidence(mac(raw={"firewall": FIREWALL_OFF})),
        evidence(mac(raw={"firewall": "Firewall is enabled. (State = 1)\n"})),
        "info",
        "The firewall of mini is on",
    ),
    Case(
        "firewall", evidence(linux()), evidence(linux(node={"ufw_enabled": True})), "info", "The firewall of box is on"
    ),
    Case(
        "peer-login",
        pair(logins=(Login(a="mini", b="studio", works=True),)),
        pair(logins=(Login(a="mini", b="studio", works=False, text="Permission denied (publickey)."),)),
        "fail",
        "mini, which leads a group, cannot log in to studio: Permission denied (publickey).",
    ),
    Case(
        "own-name",
        evidence(linux(), linux("rig"), plans=(torch_plan(),)),
        evidence(linux(node={"own_name": {"hostname": "box", "addresses": []}}), plans=(torch_plan(),)),
        "fail",
        "resolves to nothing there. torchrun needs it.",
    ),
    Case(
        "own-name",
        pair(),
        evidence(linux(node={"own_name": {"hostname": "box", "addresses": ["127.0.1.1"]}}), plans=(torch_plan(),)),
        "info",
        "box resolves to 127.0.1.1 on box",
    ),
    Case(
        "socket-interface",
        pair(),
        evidence(linux(node={"environment": {"GLOO_SOCKET_IFNAME": "lo"}})),
        "fail",
        "reaches nobody else",
    ),
    Case(
        "socket-interface",
        pair(),
        evidence(linux(node={"environment": {"NCCL_SOCKET_IFNAME": "=enp9s0"}})),
        "fail",
        "NCCL_SOCKET_IFNAME is enp9s0 on box, which is no interface there",
    ),
    Case(
        "nvidia-driver",
        evidence(linux()),
        evidence(linux(gpus=(card(driver="470.1"),))),
        "fail",
        "470.1 on box is too old",
    ),
    Case(
        "nvidia-driver",
        evidence(linux()),
        evidence(linux(node={"packages": {"cuda": ""}})),
        "fail",
        "is built without CUDA",
    ),
    Case(
        "nvidia-driver",
        evidence(linux()),
        evidence(linux(gpus=()), specs=(NodeSpec(host="box", device_type="nvidia"),)),
        "fail",
        "nvidia-smi shows none",
    ),
    Case(
        "nvidia-xid",
        evidence(linux()),
        evidence(linux(raw={"kernel_log": "k: NVRM: Xid (PCI:0000:01:00): 79, pid=1, GPU has fallen off the bus.\n"})),
        "fail",
        "Xid 79 of 0000:01:00",
    ),
    Case(
        "nvidia-xid",
        evidence(linux()),
        evidence(linux(raw={"kernel_log": "k: NVRM: Xid (PCI:0000:01:00): 13, Graphics Exception\n"})),
        "warn",
        "Xid 13",
    ),
    Case(
        "nvidia-p2p",
        evidence(linux()),
        evidence(linux(gpus=(card(name="NVIDIA GeForce RTX 4090"), card(name="NVIDIA GeForce RTX 4090")))),
        "warn",
        "RTX 4090 has no peer access on box",
    ),
    Case(
        "nvidia-p2p",
        evidence(linux(gpus=(card(name="RTX 4090"),) * 2, node={"environment": {"NCCL_P2P_DISABLE": "1"}})),
        evidence(linux(raw={"nvidia_p2p": " \tGPU0\tGPU1\n GPU0\tX\tCNS\n GPU1\tCNS\tX\n"})),
        "warn",
        "Not all cards reach each other (CNS)",
    ),
    Case(
        "nvidia-busy",
        evidence(linux()),
        evidence(linux(gpus=(card(memory_used_bytes=20 * GIB),))),
        "warn",
        "20.0 GiB of 24.0 GiB of NVIDIA RTX 3090",
    ),
]


def test_every_check_has_a_case() -> None:
    assert {case.slug for case in CASES} == {check.slug for check in CHECKS}
    assert len(CHECKS) == len({check.slug for check in CHECKS}) >= 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.slug}-{case.severity}")
def test_both_verdicts(case: Case) -> None:
    if case.healthy is not None:
        found = findings(case.slug, case.healthy)
        assert {one.severity for one in found} == {"ok"}, found
        assert all(one.nodes and one.fix is None for one in found)
    sick = [one for one in findings(case.slug, case.sick) if one.severity != "ok"]
    assert [one.severity for one in sick if case.phrase in one.text] == [case.severity], [one.text for one in sick]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.slug}-{case.severity}")
def test_a_sentence_and_a_way_out(case: Case) -> None:
    for one in findings(case.slug, case.sick):
        assert one.text.endswith("."), one.text
        if one.severity in ("warn", "fail") and case.slug not in ("group-plan", "busy", "unreachable"):
            assert one.fix is not None or case.slug == "group-addresses", one.text
        if one.fix is not None and one.fix.safe:
            assert one.fix.argv
            assert "sudo" not in one.fix.argv


def test_a_safe_fix_is_offered() -> None:
    (found,) = findings("linger", evidence(linux(node={"linger_file": False})))
    assert found.fix is not None
    assert (found.fix.argv, found.fix.node, found.fix.safe) == (("loginctl", "enable-linger"), "box", True)


def test_what_a_node_did_not_tell_is_said() -> None:
    (found,) = findings("sleep", evidence(mac(sleep={})))
    assert (found.severity, found.text) == ("info", "Not known on mini: pmset gave no settings.")


def test_a_healthy_group_has_no_complaint() -> None:
    found = examine(pair(edges=(edge(),)))
    assert [one.text for one in found if one.severity in ("warn", "fail")] == []
    assert len({one.check for one in found}) > 30


def process(pid: int, parent: int, command: str, state: str = "S") -> dict[str, object]:
    return {"pid": pid, "parent": parent, "state": state, "command": f"python -I /n/0011223344556677.pyz {command}"}


@pytest.mark.parametrize(
    ("processes", "lost"),
    [
        ([process(5, 1, "keep-run /r/a"), process(6, 5, "hold /r/a worker")], []),
        # Its runner was killed and another one has adopted it.
        ([process(7, 1, "keep-run /r/a"), process(6, 1, "hold /r/a worker")], []),
        ([process(7, 1, "keep-run /r/ab"), process(6, 1, "hold /r/a worker")], [6]),
        ([process(8, 3, "rank-run /r/a/ranks/2"), process(6, 1, "hold /r/a/ranks/2/held rank-0")], []),
        ([process(6, 1, "hold /r/a/ranks/2/held rank-0")], [6]),
        ([process(6, 1, "hold /r/a worker", state="Z")], []),
        ([RANK, {**RANK, "pid": 78, "parent": 6}], [77]),
    ],
)
def test_who_is_left_over(processes: list[dict[str, object]], lost: list[int]) -> None:
    assert [one["pid"] for one in orphans(mac(node={"processes": processes}))] == lost


def test_findings_come_worst_first() -> None:
    found = examine(evidence(mac(python="3.9.6", on_battery=True)))
    order = [one.severity for one in found]
    assert order == sorted(order, key=("fail", "warn", "info", "ok").index)


def test_nothing_of_a_node_drives_the_terminal() -> None:
    hostile = mac(thermal="\x1b[2J\x07CPU 1", node={"own_name": {"hostname": "\x1b]0;x\x07evil", "addresses": []}})
    assert not any("\x1b" in one.text or "\x07" in one.text for one in examine(evidence(hostile)))


def test_a_node_that_nobody_needs_does_not_fail_the_cluster() -> None:
    down = {"spare": Problem(text="no answer within 10 s")}
    spare = evidence(mac(), specs=(NodeSpec(host="spare"),), problems=down)
    assert [one.severity for one in findings("unreachable", spare)] == ["warn", "ok"]
    assert not needed_nodes_fail(examine(spare))
    only = evidence(specs=(NodeSpec(host="spare"),), problems=down)
    assert needed_nodes_fail(examine(only))


def test_odd_shapes_of_what_a_node_says_are_survived() -> None:
    odd = linux(
        raw={"nvidia_p2p": "\0\0", "kernel_log": "NVRM: Xid", "timed_out": "x"},
        node={
            "processes": [1, None, {"pid": "x", "parent": 1, "state": 5, "command": None}],
            "own_name": [],
            "environment": [],
            "packages": [],
            "disk": 7,
            "shell": 9,
            "power_supply": {"a": 1},
        },
    )
    found = examine(evidence(odd, plans=(torch_plan("box"),)))
    assert {one.check for one in found} >= {"disk", "login-shell", "own-name"}
