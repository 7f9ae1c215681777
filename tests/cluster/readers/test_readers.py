"""Each reader on real forms: every number and name that it must find, and what it must refuse."""

from __future__ import annotations

import json

import pytest

from jupiter_engine.cluster.readers import MAC_TOOLS, apple, linux, network, nvidia, thunderbolt
from jupiter_engine.cluster.readers.network import MacInterface, Route, kind_by_name
from jupiter_engine.cluster.readers.nvidia import PeerAccess
from jupiter_engine.cluster.readers.reading import LIMIT_BYTES, ToolOutput, real, short, whole
from jupiter_engine.errors import rebuild
from tests.cluster.readers import answers
from tests.fake_tools.macs import FakeMac, behind_hub, device, macs, ring


# -- Thunderbolt ---------------------------------------------------------------------------------------
def test_thunderbolt_ports_of_a_ring() -> None:
    found = ring(3)
    ports = thunderbolt.thunderbolt_ports(found[0].raw()["thunderbolt"])
    assert [port.receptacle for port in ports] == ["1", "2", "3"]
    assert [port.connected for port in ports] == [True, True, False]
    assert [port.speed_bits_per_s for port in ports] == [40 * 10**9] * 3
    assert ports[1].peers[0].domain == found[1].domain(0)
    assert (ports[1].peers[0].model, ports[1].peers[0].hubs) == ("Mac16,11", ())


def test_thunderbolt_peers_are_found_behind_hubs_and_devices_are_none() -> None:
    found = behind_hub(generation=5)
    found[0].plug(1, device("Studio Display"))
    far = found[1].as_peer(1)
    found[0].plug(2, device("Hub 1", device("Disk"), device("Hub 2", far)))
    ports = thunderbolt.thunderbolt_ports(found[0].raw()["thunderbolt"])
    assert ports[0].peers[0].domain == found[1].domain(0)
    assert ports[0].peers[0].hubs == ("Fusiondock Ultra",)
    assert (ports[1].peers, ports[1].devices, ports[1].connected) == ((), ("Studio Display",), True)
    assert ports[2].peers[0].hubs == ("Hub 1", "Hub 2")
    assert ports[2].devices == ("Hub 1", "Disk", "Hub 2")
    assert ports[0].speed_bits_per_s == 80 * 10**9


def test_thunderbolt_takes_json_that_has_been_decoded_and_refuses_other_documents() -> None:
    raw = macs(1)[0].raw()["thunderbolt"]
    assert thunderbolt.thunderbolt_ports(json.loads(raw)) == thunderbolt.thunderbolt_ports(raw)
    for wrong in ("", "{", "[]", '{"SPThunderboltDataType": {}}', '{"SPHardwareDataType": []}', "[" * 100_000):
        with pytest.raises(ToolOutput, match="system_profiler SPThunderboltDataType -json"):
            thunderbolt.thunderbolt_ports(wrong)
    assert thunderbolt.thunderbolt_ports('{"SPThunderboltDataType": []}') == ()


def test_hardware_ports() -> None:
    raw = (
        "\nHardware Port: Ethernet Adapter (en3)\nDevice: en3\nEthernet Address: 02:00:00:00:00:04\n\n"
        "Hardware Port: Thunderbolt Bridge\nDevice: bridge0\nEthernet Address: 02:00:00:00:00:01\n\n"
        "Hardware Port: Thunderbolt 2\nDevice: en6\nEthernet Address: 02:00:00:00:00:02\n\n"
        "VLAN Configurations\n===================\n"
    )
    expected = {"Ethernet Adapter (en3)": "en3", "Thunderbolt Bridge": "bridge0", "Thunderbolt 2": "en6"}
    assert thunderbolt.hardware_ports(raw) == expected


def test_rdma_tools() -> None:
    assert thunderbolt.rdma_devices(answers.IBV_DEVICES) == ("rdma_en2", "rdma_en3")
    assert thunderbolt.rdma_devices(answers.IBV_DEVICES[:80]) == ()
    states = [(port.device, port.state) for port in thunderbolt.rdma_ports(answers.IBV_DEVINFO)]
    assert states == [("rdma_en2", "PORT_ACTIVE"), ("rdma_en3", "PORT_DOWN")]
    assert thunderbolt.rdma_state("enabled\n") == "enabled"
    assert thunderbolt.rdma_state(b"RDMA disabled") == "disabled"
    assert thunderbolt.rdma_state("command not found") == "unknown"


@pytest.mark.parametrize(("text", "version"), [("26.2", (26, 2)), ("26.2.1", (26, 2)), ("26", (26, 0)), ("x", None)])
def test_macos_version(text: str, version: tuple[int, int] | None) -> None:
    assert thunderbolt.macos_version(text) == version


# -- network -------------------------------------------------------------------------------------------
def test_mac_interfaces_and_kinds() -> None:
    found = network.mac_interfaces(answers.IFCONFIG)
    assert [one.name for one in found] == ["lo0", "en0", "en2", "bridge0", "utun4", "bridge100"]
    assert found[1] == MacInterface(
        name="en0", up=True, active=True, addresses=("192.168.1.237/24",), speed_bits_per_s=10 * 10**9
    )
    assert found[3].members == ("en2", "en3")
    assert found[4].addresses == ("100.101.102.103/32",)
    ports = {"Thunderbolt 1": "en2", "Ethernet": "en0", "Thunderbolt Bridge": "bridge0"}
    kinds = {one.name: (one.kind, one.up) for one in network.mac_kinds(found, ports)}
    assert kinds == {
        "lo0": ("loopback", True),
        "en0": ("ethernet", True),
        "en2": ("thunderbolt", False),
        "bridge0": ("bridge", False),
        "utun4": ("vpn", True),
        "bridge100": ("virtual", True),
    }


def test_mac_routes_are_written_out_and_neighbours_left_out() -> None:
    assert network.mac_routes(answers.NETSTAT) == (
        Route(network="0.0.0.0/0", interface="en0", gateway="192.168.1.1"),
        Route(network="10.0.0.0/8", interface="utun4"),
        Route(network="10.0.0.0/30", interface="en2"),
        Route(network="127.0.0.0/8", interface="lo0", gateway="127.0.0.1"),
        Route(network="169.254.0.0/16", interface="en0"),
        Route(network="192.168.1.0/24", interface="en0"),
        Route(network="192.168.1.1/32", interface="en0"),
        Route(network="224.0.0.0/4", interface="en0"),
        Route(network="255.255.255.255/32", interface="en0"),
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("utun7", "vpn"),
        ("tailscale0", "vpn"),
        ("wg0", "vpn"),
        ("ztabcdef12", "vpn"),
        ("docker0", "virtual"),
        ("br-5f2a1c0d9e3b", "virtual"),
        ("veth12ab@if3", "virtual"),
        ("awdl0", "virtual"),
        ("bridge101", "virtual"),
        ("bridge0", "bridge"),
        ("vmbr0", "bridge"),
        ("thunderbolt0", "thunderbolt"),
        ("wlp3s0", "wifi"),
        ("enp5s0", "ethernet"),
        ("eth0", "ethernet"),
        ("eno1.20", "ethernet"),
        ("uplink", "unknown"),
        ("lo", "loopback"),
    ],
)
def test_kind_by_name(name: str, kind: str) -> None:
    assert kind_by_name(name) == kind


def test_linux_interfaces_and_routes() -> None:
    raw = [
        {
            "ifname": "enp5s0",
            "flags": ["BROADCAST", "UP"],
            "operstate": "UP",
            "addr_info": [
                {"family": "inet6", "local": "fe80::1", "prefixlen": 64},
                {"family": "inet", "local": "192.168.1.7", "prefixlen": 24},
                {"family": "inet", "local": "nonsense", "prefixlen": 24},
            ],
        },
        {"ifname": "office", "flags": [], "operstate": "UP", "linkinfo": {"info_kind": "wireguard"}},
        {"ifname": "x" * 99},
        "nonsense",
    ]
    one, vpn = network.linux_interfaces(json.dumps(raw), {"enp5s0": 25 * 10**8})
    assert (one.kind, one.addresses, one.up, one.speed_bits_per_s) == (
        "ethernet",
        ("192.168.1.7/24",),
        True,
        2_500_000_000,
    )
    assert (vpn.kind, vpn.up) == ("vpn", False)
    routes = network.linux_routes(
        json.dumps(
            [
                {"dst": "default", "gateway": "192.168.1.1", "dev": "enp5s0"},
                {"dst": "10.0.0.5", "dev": "wg0"},
                {"type": "unreachable", "dst": "10.1.0.0/16"},
                {"dst": "not a network", "dev": "x"},
            ]
        )
    )
    assert [(route.network, route.interface, route.gateway) for route in routes] == [
        ("0.0.0.0/0", "enp5s0", "192.168.1.1"),
        ("10.0.0.5/32", "wg0", ""),
    ]


def test_net_speeds() -> None:
    assert network.net_speeds("enp5s0 2500\nwlp3s0 -1\nlo\nx y\n") == {"enp5s0": 2_500_000_000}


# -- a Mac about itself --------------------------------------------------------------------------------
def test_mac_hardware_and_system() -> None:
    hardware = apple.mac_hardware(answers.HARDWARE)
    assert (hardware.chip, hardware.model, hardware.name) == ("Apple M3 Ultra", "Mac15,14", "Mac Studio")
    assert (hardware.cores, hardware.performance_cores, hardware.efficiency_cores) == (32, 24, 8)
    assert hardware.memory_bytes == 512 << 30
    intel = apple.mac_hardware('{"SPHardwareDataType": [{"cpu_type": "Intel Core i9", "number_processors": 8}]}')
    assert (intel.chip, intel.cores, intel.memory_bytes) == ("Intel Core i9", 8, None)
    system = apple.mac_system(answers.SW_VERS)
    assert (system.version, system.build) == ("26.2", "25C56")
    with pytest.raises(ToolOutput, match="sw_vers"):
        apple.mac_system("command not found: sw_vers")


def test_sysctl() -> None:
    found = apple.sysctl(answers.SYSCTL)
    assert (found.memory_bytes, found.booted_at, found.wired_limit_mb) == (16 << 30, 1732000000, 12288)
    assert found.chip == "Apple M4"
    assert apple.sysctl("sysctl: unknown oid 'iogpu.wired_limit_mb'\n").wired_limit_mb is None


def test_power() -> None:
    sleep = apple.sleep_settings(answers.PMSET)
    assert sleep.sleep_minutes == 1
    assert sleep.prevented_by == ("powerd", "sharingd")
    assert sleep.settings["autorestart"] == "0"
    assert sleep.settings["Sleep On Power Button"] == "1"
    charge = apple.battery(answers.BATTERY)
    assert (charge.on_battery, charge.percent) == (True, 95)
    desk = apple.battery("Now drawing from 'AC Power'\n")
    assert (desk.on_battery, desk.percent) == (False, None)
    with pytest.raises(ToolOutput, match="pmset -g batt"):
        apple.battery("")
    assert apple.thermal(answers.THERMAL_LIMITED) == "CPU_Speed_Limit 62"
    assert apple.thermal("Note: No thermal warning level has been recorded\n") == "nominal"


def test_memory_and_firewall() -> None:
    memory = apple.memory_use(answers.VM_STAT)
    assert (memory.free_bytes, memory.wired_bytes) == (13312 * 16384, 200000 * 16384)
    with pytest.raises(ToolOutput, match="Pages wired down"):
        apple.memory_use(answers.VM_STAT.replace("Pages wired down", "Pages"))
    assert apple.firewall(answers.FIREWALL) == "on"
    assert apple.firewall("Firewall is disabled. (State = 0)") == "off"
    assert apple.firewall("Firewall is blocking all non-essential incoming connections. (State = 2)") == "block_all"


# -- NVIDIA --------------------------------------------------------------------------------------------
def test_cards() -> None:
    first, second = nvidia.cards(answers.NVIDIA)
    assert (first.index, first.gpu.name, first.mig) == (0, "NVIDIA GeForce RTX 4090", False)
    assert first.gpu.memory_total_bytes == 24564 << 20
    assert (first.gpu.utilisation_percent, first.gpu.temperature_c, first.gpu.power_w) == (97.0, 71.0, 412.35)
    assert first.gpu.driver == "580.95.05"
    assert (second.mig, second.gpu.utilisation_percent, second.gpu.power_w) == (True, None, None)
    assert nvidia.cards("") == ()
    with pytest.raises(ToolOutput, match="couldn't communicate with the NVIDIA driver"):
        nvidia.cards("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n")


def test_peer_access() -> None:
    found = nvidia.peer_access(answers.P2P)
    assert len(found) == 6
    assert found[0] == PeerAccess(a=0, b=1, state="CNS")
    assert [(one.a, one.b) for one in found if one.ok] == [(0, 2), (2, 0)]


def test_xids() -> None:
    first, second = nvidia.xids(answers.KERNEL_LOG)
    assert (first.bus, first.number, first.at) == ("0000:01:00", 79, "2026-11-20T10:00:01+01:00 box kernel:")
    assert first.text == "pid=1234, GPU has fallen off the bus."
    assert second.number == 13


# -- Linux ---------------------------------------------------------------------------------------------
def test_proc_files() -> None:
    assert linux.memory(answers.MEMINFO) == (24689436 * 1024, 18123456 * 1024)
    processor = linux.processor(answers.CPUINFO)
    assert (processor.name, processor.threads) == ("AMD EPYC", 2)
    assert linux.load("0.52 0.48") == 0.52
    times = linux.times(answers.STAT)
    assert (times.total, times.idle) == (1005, 845)
    assert linux.uptime_s("12345.67 1") == 12345.67
    for reader in (linux.memory, linux.load, linux.times, linux.uptime_s):
        with pytest.raises(ToolOutput, match="/proc/"):
            reader("nonsense")


def test_linger_and_clock() -> None:
    assert linux.linger("Linger=yes\n") == "yes"
    assert linux.linger("Linger=no\n") == "no"
    assert linux.linger("Failed to get user: User ID 0 is not logged in or lingering") == "unknown"
    clock = linux.clock("Timezone=Europe/Madrid\nNTP=yes\nNTPSynchronized=no\n")
    assert (clock.ntp, clock.synchronised, clock.zone) == (True, False, "Europe/Madrid")


# -- limits --------------------------------------------------------------------------------------------
def test_every_answer_has_a_limit() -> None:
    with pytest.raises(ToolOutput, match="more than the"):
        network.mac_interfaces("x" * (LIMIT_BYTES + 1))
    with pytest.raises(ToolOutput, match="more than the"):
        thunderbolt.hardware_ports("\n" * 30_000)
    with pytest.raises(ToolOutput, match="not text"):
        apple.sysctl(17)


def test_the_error_names_the_tool_and_survives_a_process_boundary() -> None:
    with pytest.raises(ToolOutput) as caught:
        apple.mac_system("")
    assert caught.value.tool == "sw_vers"
    assert caught.value.fix == "run `sw_vers` on the node and see what it says"
    again = rebuild(caught.value.kind, caught.value.title, caught.value.detail, caught.value.fix)
    assert again.sentence() == caught.value.sentence()


def test_strings_for_people_are_plain() -> None:
    mac = FakeMac("evil", number=1, product="\x1b[2J\x1b]0;title\x07Mac\nmini " + "x" * 500)
    other = ring(2)[0]
    other.plug(2, mac.as_peer(0))
    (peer,) = thunderbolt.thunderbolt_ports(other.raw()["thunderbolt"])[2].peers
    assert peer.name.startswith("Mac mini xxx")
    assert len(peer.name) <= 60
    assert short("a\ud800b").encode() == b"a?b"


def test_numbers_are_bounded() -> None:
    assert whole("9" * 18) == int("9" * 18)
    assert (whole("9" * 400), whole(2**70), whole("１２"), whole(True), whole("1.5")) == (None,) * 5
    assert real("1.5e3") == 1500.0
    assert (real("nan"), real("1e999"), real(10**400), real(True), real("0x1")) == (None,) * 5


def test_each_mac_tool_has_a_fake() -> None:
    raw = macs(1)[0].raw()
    assert set(MAC_TOOLS) - set(raw) == {"firewall"}
