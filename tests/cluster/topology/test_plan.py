"""What is planned for a group: backend, order, addresses, set-up, and the reasons in words."""

from __future__ import annotations

import os
import plistlib
import subprocess
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from jupiter_engine.cluster import cables
from jupiter_engine.cluster.addressing import daemon_plist
from jupiter_engine.cluster.machine import NodeTools, read_machine
from jupiter_engine.cluster.topology import fleet_links, plan_group
from jupiter_engine.protocol.fleet import GroupPlan
from tests.fake_tools.linux_box import FakeLinux
from tests.fake_tools.macs import (
    FakeMac,
    behind_hub,
    cable,
    chain,
    device,
    macs,
    make_fake_mac,
    mesh,
    ring,
    state_of,
    tools,
    two_cables,
)


def plan(found: list[FakeMac], **options: object) -> GroupPlan:
    return plan_group("group", tools(found), twin="mlx", **options)  # type: ignore[arg-type]


def ips(found: GroupPlan) -> list[list[str]]:
    return [host["ips"] for host in found.hostfile["hosts"]]


def set_up(found: list[FakeMac], made: GroupPlan) -> None:
    """Do to the fake Macs what the plan's set-up says."""
    by_name = {mac.name: mac for mac in found}
    for fix in made.setup:
        state = by_name[fix.node].state
        match fix.argv[1:]:
            case ("ifconfig", "bridge0", "down"):
                state["bridge_up"] = False
            case ("ifconfig", name, "inet", address, "netmask", _, *more):
                own = state["addresses"].setdefault(name, [])
                own[:] = [*(own if more else []), f"{address}/30"]


# -- the choice ----------------------------------------------------------------------------------------
def test_thunderbolt_4_ring_listens_on_the_cable_to_the_previous_rank() -> None:
    made = plan(ring(3))
    assert (made.backend, made.launcher, made.nodes) == ("ring", "mlx.launch", ("mac-a", "mac-b", "mac-c"))
    for i, (own,) in enumerate(ips(made)):
        before = made.nodes[i - 1]
        link = next(one for one in made.links if {one.a, one.b} == {made.nodes[i], before})
        assert own == (link.a_address if link.a == made.nodes[i] else link.b_address)
    assert "40 Gb/s" in made.reason
    assert "Thunderbolt 5" in made.reason
    # A Thunderbolt 4 Mac can never do RDMA: nobody is sent into Recovery for it.
    assert "Recovery" not in made.reason


def test_thunderbolt_4_never_gets_jaccl_even_with_rdma_devices() -> None:
    made = plan(mesh(3, rdma=True))
    assert made.backend == "ring"
    asked = plan(mesh(3, rdma=True), backend="jaccl")
    assert asked.hostfile == {}
    assert "40 Gb/s" in asked.problems[0]


def test_thunderbolt_5_mesh_with_rdma_is_jaccl() -> None:
    found = mesh(4, generation=5, rdma=True)
    made = plan(found)
    assert made.backend == "jaccl"
    rdma = [host["rdma"] for host in made.hostfile["hosts"]]
    for i, one in enumerate(found):
        for j, other in enumerate(found):
            if i == j:
                assert rdma[i][j] is None
                continue
            interface = rdma[i][j].removeprefix("rdma_")
            port = next(port for port in one.state["ports"] if port["interface"] == interface)
            assert port["items"][0]["domain_uuid_key"] in {peer["domain"] for peer in other.state["ports"]}
    assert all(link.rdma == (f"rdma_{link.a_interface}", f"rdma_{link.b_interface}") for link in made.links)
    assert ips(made) == [["192.168.1.11"], ["192.168.1.12"], ["192.168.1.13"], ["192.168.1.14"]]


def test_thunderbolt_5_ring_with_rdma_is_jaccl_ring() -> None:
    made = plan(ring(4, generation=5, rdma=True))
    assert made.backend == "jaccl-ring"
    assert made.hostfile["hosts"][0]["rdma"] == [None, "rdma_en3", None, "rdma_en2"]
    assert "no Thunderbolt cable between mac-a and mac-c" in made.reason


def test_a_mesh_without_rdma_says_how_to_switch_it_on() -> None:
    made = plan(mesh(3, generation=5))
    assert made.backend == "ring"
    assert "rdma_ctl enable" in made.reason
    assert made.reason.startswith("ring over Thunderbolt (80 Gb/s)")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("old macOS", "mac-b has macOS 26.1; RDMA needs 26.2"),
        ("device missing", "ibv_devices of mac-b has no rdma_en3"),
        ("port down", "The port of rdma_en3 on mac-b is down"),
        ("no devices", "RDMA is switched on for mac-b, but ibv_devices lists nothing"),
        ("slow cable", "A cable of mac-b (en3) runs at 40 Gb/s"),
    ],
)
def test_what_stands_against_rdma_is_named(change: str, words: str) -> None:
    found = mesh(3, generation=5, rdma=True)
    state = found[1].state
    if change == "old macOS":
        state["macos"] = "26.1"
    elif change == "device missing":
        state["rdma_devices"].remove("rdma_en3")
    elif change == "port down":
        state["rdma_down"].append("rdma_en3")
    elif change == "no devices":
        state["rdma_devices"].clear()
    else:
        state["ports"][1]["speed"] = "40 Gb/s"
    assert any(words in problem for problem in plan(found, backend="jaccl").problems)
    assert plan(found).backend == "ring"


def test_two_cables_between_two_are_both_used() -> None:
    made = plan(two_cables())
    first, second = ips(made)
    assert len(first) == len(second) == 2
    assert "2 cables a pair" in made.reason
    # The n-th address of one host and of the other are the two ends of one cable.
    for one, other in zip(first, second, strict=True):
        assert int(IPv4Address(one)) >> 2 == int(IPv4Address(other)) >> 2
    fast = plan(two_cables(generation=5, rdma=True))
    assert [host["rdma"] for host in fast.hostfile["hosts"]] == [
        [None, ["rdma_en2", "rdma_en3"]],
        [["rdma_en3", "rdma_en2"], None],
    ]


def test_a_ring_uses_as_many_cables_as_its_narrowest_pair_has() -> None:
    found = ring(3, sockets=4)
    cable(found[0], 2, found[1], 2)
    assert [len(one) for one in ips(plan(found))] == [1, 1, 1]
    assert [link.a_interface for link in fleet_links(tools(found))] == ["en3", "en4", "en2", "en3"]


def test_jaccl_ring_takes_four_cables_at_most() -> None:
    found = macs(2, sockets=6, generation=5, rdma=True)
    for socket in range(5):
        cable(found[0], socket, found[1], socket)
    made = plan(found, backend="jaccl-ring")
    assert made.hostfile["hosts"][0]["rdma"][1] == ["rdma_en2", "rdma_en3", "rdma_en4", "rdma_en5"]


def test_a_mesh_of_nine_is_a_jaccl_ring() -> None:
    made = plan(mesh(9, generation=5, rdma=True))
    assert made.backend == "jaccl-ring"
    assert "at most 8 Macs" in made.reason
    assert "at most 8 Macs" in plan(mesh(9, generation=5, rdma=True), backend="jaccl").problems[0]


def test_a_peer_behind_a_hub_counts_although_one_end_sees_the_hub_first() -> None:
    made = plan(behind_hub(generation=5, rdma=True))
    assert made.backend == "jaccl"
    assert len(made.links) == 1


def test_a_cable_that_only_one_end_names_counts() -> None:
    found = macs(2, generation=5, rdma=True)
    found[0].plug(0, device("Studio Display"))
    found[1].plug(2, found[0].as_peer(0))
    made = plan(found)
    assert made.backend == "jaccl"
    assert (made.links[0].a_interface, made.links[0].b_interface) == ("en2", "en4")


def test_two_peers_behind_one_socket_get_an_address_each() -> None:
    found = macs(3)
    found[0].plug(0, device("Hub", found[1].as_peer(0), found[2].as_peer(0)))
    found[1].plug(0, found[0].as_peer(0))
    found[2].plug(0, found[0].as_peer(0))
    cable(found[1], 1, found[2], 1)
    made = plan(found)
    assert made.backend == "ring"
    given = [fix.argv for fix in made.setup if fix.node == "mac-a" and fix.argv[1:4] == ("ifconfig", "en2", "inet")]
    assert [argv[-1] == "alias" for argv in given] == [False, True]
    set_up(found, made)
    assert plan(found).problems == ()


def test_monitors_disks_and_cables_into_the_same_mac_are_no_peers() -> None:
    found = ring(3, sockets=4)
    found[0].plug(2, device("Studio Display"))
    cable(found[1], 2, found[1], 3)
    assert plan(found).backend == "ring"
    assert len(plan(found).links) == 3


# -- less than a ring ----------------------------------------------------------------------------------
def test_a_chain_falls_back_to_ethernet_and_names_the_missing_cable() -> None:
    made = plan(chain(3))
    assert (made.backend, made.problems, made.setup) == ("ring", (), ())
    assert ips(made) == [["192.168.1.11"], ["192.168.1.12"], ["192.168.1.13"]]
    assert "one between mac-c and mac-a is missing" in made.reason
    assert {link.kind for link in made.links} == {"ethernet"}
    asked = plan(chain(3), over="thunderbolt")
    assert asked.hostfile == {}
    assert "one between mac-c and mac-a is missing" in asked.problems[0]
    assert len(asked.links) == 2


def test_other_shapes_without_a_ring_are_told_apart() -> None:
    star = macs(4)
    for i in (1, 2, 3):
        cable(star[0], i - 1, star[i], 0)
    assert "mac-b, mac-c, mac-d needs a second one" in plan(star, over="thunderbolt").problems[0]
    apart = [*chain(2), FakeMac("mac-x", number=9)]
    assert "mac-x has none to the others" in plan(apart, over="thunderbolt").problems[0]
    none = plan(macs(2), over="thunderbolt")
    assert "No Thunderbolt cable" in none.problems[0]


def test_rdma_is_refused_over_ethernet_and_torch_backends_for_mlx() -> None:
    assert "does not go over Ethernet" in plan(ring(3), backend="jaccl", over="ethernet").problems[0]
    assert "is a backend of torch" in plan(ring(3), backend="gloo").problems[0]


def test_several_ranks_a_node() -> None:
    made = plan(mesh(2, generation=5, rdma=True), ranks_per_node=2)
    assert made.backend == "ring"
    assert [host["ssh"] for host in made.hostfile["hosts"]] == ["mac-a", "mac-a", "mac-b", "mac-b"]
    assert "one rank a Mac" in plan(mesh(2, generation=5, rdma=True), backend="jaccl", ranks_per_node=2).problems[0]


def test_one_node_alone() -> None:
    made = plan(macs(1), ranks_per_node=3)
    assert [(host["ssh"], host["ips"]) for host in made.hostfile["hosts"]] == [("127.0.0.1", ["127.0.0.1"])] * 3
    assert plan(macs(1)).launcher == "in_process"
    assert "alone" in plan(macs(1), backend="jaccl").problems[0]


# -- addresses -----------------------------------------------------------------------------------------
def networks_of(made: GroupPlan) -> list[IPv4Network]:
    return [IPv4Network(f"{link.a_address}/30", strict=False) for link in made.links]


def test_addresses_collide_with_no_route_of_any_node() -> None:
    found = ring(3, lan="10.211.0")
    found[1].add_vpn("10.8.0.2/32", "10.187/16", "172.16/12")
    made = plan(found)
    taken = [IPv4Network(text) for text in ("10.211.0.0/24", "10.187.0.0/16", "172.16.0.0/12")]
    for network in networks_of(made):
        assert not any(network.overlaps(other) for other in taken), network
    assert len(set(networks_of(made))) == 3


def test_where_a_vpn_claims_every_private_network_other_ones_are_found() -> None:
    found = ring(3)
    found[0].add_vpn("10.9.9.9/32", "10", "172.16/12", "192.168.0/16", "default")
    assert all(network.subnet_of(IPv4Network("198.18.0.0/16")) for network in networks_of(plan(found)))
    found[1].add_vpn("10.9.9.8/32", "198.18/15")
    made = plan(found)
    assert made.hostfile == {}
    assert "end the VPN" in made.problems[0]


def test_set_up_addresses_are_kept_and_nothing_is_left_to_do() -> None:
    found = ring(3)
    first = plan(found)
    assert {fix.node for fix in first.setup} == {"mac-a", "mac-b", "mac-c"}
    assert all(fix.argv[0] == "sudo" and not fix.safe for fix in first.setup)
    assert any("not set up on mac-a, mac-b, mac-c" in problem for problem in first.problems)
    assert any("Thunderbolt Bridge is up" in problem for problem in first.problems)
    set_up(found, first)
    second = plan(found)
    assert (second.setup, second.problems) == ((), ())
    assert second.hostfile == first.hostfile


def test_an_address_lost_at_one_end_is_given_again_and_the_other_end_keeps_its_own() -> None:
    found = ring(3)
    first = plan(found)
    set_up(found, first)
    found[1].state["addresses"] = {}
    second = plan(found)
    assert second.hostfile == first.hostfile
    assert {fix.node for fix in second.setup} == {"mac-b"}


def test_addresses_of_mlx_are_kept_unless_they_collide_with_the_home_network() -> None:
    found = ring(3)
    for i, (one, other) in enumerate(((0, 1), (1, 2), (2, 0))):
        found[one].state["addresses"]["en3"] = [f"192.168.0.{4 * i + 1}/30"]
        found[other].state["addresses"]["en2"] = [f"192.168.0.{4 * i + 2}/30"]
    kept = plan(found)
    assert all(network.subnet_of(IPv4Network("192.168.0.0/24")) for network in networks_of(kept))
    at_home = ring(3, lan="192.168.0")
    for mac, old in zip(at_home, found, strict=True):
        mac.state["addresses"] = old.state["addresses"]
    moved = plan(at_home)
    assert not any(network.overlaps(IPv4Network("192.168.0.0/24")) for network in networks_of(moved))


def test_self_assigned_addresses_are_not_kept() -> None:
    found = ring(2)
    for mac in found:
        mac.state["addresses"] = {name: [f"169.254.{mac.number}.7/16"] for name in ("en2", "en3")}
    assert not any(network.overlaps(IPv4Network("169.254.0.0/16")) for network in networks_of(plan(found)))


def test_a_bridge_that_is_down_is_left_alone_but_not_at_the_next_start() -> None:
    made = plan(ring(3, bridge_up=False))
    assert not any(fix.argv[1:] == ("ifconfig", "bridge0", "down") for fix in made.setup)
    assert not any("Bridge" in problem for problem in made.problems)
    lasting = [fix for fix in made.setup if "restart" in fix.text]
    assert len(lasting) == 3
    assert all("ifconfig bridge0 down; ifconfig en" in fix.argv[-1] for fix in lasting)


def test_the_start_up_script_sets_everything_again(tmp_path: Path) -> None:
    found = ring(3, sockets=4)
    found[0].state["addresses"]["en5"] = ["10.50.0.1/30"]
    made = plan(found)
    (lasting,) = (fix for fix in made.setup if fix.node == "mac-a" and "restart" in fix.text)
    assert lasting.argv[-2] == "/Library/LaunchDaemons/jupiter.thunderbolt.plist"
    daemon = plistlib.loads(lasting.argv[-1].encode())
    assert (daemon["Label"], daemon["RunAtLoad"]) == ("jupiter.thunderbolt", True)
    set_up(found, made)
    wanted = found[0].state["addresses"]
    # As after a restart: the bridge is up again and no address is left.
    folder = make_fake_mac(tmp_path / "mac", FakeMac("mac-a", number=1, sockets=4))
    done = subprocess.run(
        daemon["ProgramArguments"], env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}, check=True, timeout=20
    )
    assert done.returncode == 0
    after = state_of(folder)
    assert (after["addresses"], after["bridge_up"]) == (wanted, False)


def test_no_strange_word_gets_into_a_start_up_script() -> None:
    with pytest.raises(ValueError, match="no place in a start-up command"):
        daemon_plist([("ifconfig", "en2; reboot", "down")])


# -- the network that all share ------------------------------------------------------------------------
def test_wired_beats_wifi_and_vpn_and_containers_never_count() -> None:
    found = macs(2)
    for mac in found:
        mac.state["lan"][1]["addresses"] = [f"10.5.5.{mac.number}/24"]
        mac.add_vpn(f"10.1.1.{mac.number}/24", "10.1.1/24", name="utun4")
        mac.add_vpn(f"100.90.0.{mac.number}/24", "100.90.0/24", name="tailscale0")
    wired = plan(found)
    assert ips(wired) == [["192.168.1.11"], ["192.168.1.12"]]
    assert wired.links[0].kind == "ethernet"
    assert wired.links[0].speed_bits_per_s == 10**9
    found[0].state["lan"][0]["addresses"] = []
    air = plan(found)
    assert ips(air) == [["10.5.5.1"], ["10.5.5.2"]]
    assert "Wi-Fi" in air.reason
    found[0].state["lan"][1]["addresses"] = []
    lost = plan(found)
    assert lost.hostfile == {}
    assert "No network is shared" in lost.problems[0]


def test_a_faster_network_beats_a_slower_one() -> None:
    one, other = FakeLinux("one", 1), FakeLinux("two", 2)
    raws = [dict(one.raw()), dict(other.raw())]
    for i, raw in enumerate(raws):
        raw["ip_addr"] = raw["ip_addr"].replace(
            "[{",
            f'[{{"ifname": "enp9s0", "flags": ["UP"], "addr_info": [{{"family": "inet", "local": "10.0.0.{i + 1}", '
            '"prefixlen": 24}]}, {',
            1,
        )
        raw["net_speeds"] += "enp9s0 10000\n"
    nodes = [NodeTools(name=f"n{i}", system="Linux", raw=raw) for i, raw in enumerate(raws)]
    made = plan_group("g", nodes, twin="torch")
    assert [made.links[0].a_address, made.links[0].b_address] == ["10.0.0.1", "10.0.0.2"]
    assert "10 Gb/s" in made.reason


def test_two_nodes_with_one_address_are_named() -> None:
    found = macs(2)
    found[1].state["lan"][0]["addresses"] = found[0].state["lan"][0]["addresses"]
    made = plan(found)
    assert made.hostfile == {}
    assert any("mac-a and mac-b both say that they are 192.168.1.11" in problem for problem in made.problems)


def test_torch_groups() -> None:
    boxes = [FakeLinux("one", 1).tools(), FakeLinux("two", 2).tools()]
    made = plan_group("cards", boxes, twin="torch", ranks_per_node=2)
    assert (made.backend, made.launcher, made.hostfile, made.problems) == ("nccl", "torchrun", {}, ())
    assert [(link.a_interface, link.b_address) for link in made.links] == [("enp5s0", "192.168.1.62")]
    mixed = plan_group("cards", [*boxes, FakeLinux("cpu", 3, cards=0).tools()], twin="torch")
    assert mixed.backend == "gloo"
    forced = plan_group("cards", [*boxes, FakeLinux("cpu", 3, cards=0).tools()], twin="torch", backend="nccl")
    assert any("cpu has 0 for 1" in problem for problem in forced.problems)
    with_mac = plan_group("cards", [boxes[0], macs(1)[0].tools()], twin="torch")
    assert any("gloo cannot connect a Mac with a Linux machine" in problem for problem in with_mac.problems)
    assert any("is a backend of MLX" in p for p in plan_group("c", boxes, twin="torch", backend="jaccl").problems)


def test_nodes_named_by_loopback_addresses_are_this_machine() -> None:
    nodes = [NodeTools(name=f"n{i}", host=f"127.0.0.{i + 2}", system="Linux") for i in range(3)]
    made = plan_group("here", nodes, twin="mlx")
    assert ips(made) == [["127.0.0.2"], ["127.0.0.3"], ["127.0.0.4"]]
    led = plan_group("here", [NodeTools(name="me", host="localhost", system="Linux"), *nodes[:1]], twin="torch")
    assert (led.links[0].a_address, led.links[0].b_address) == ("127.0.0.1", "127.0.0.2")


# -- answers that cannot be read -----------------------------------------------------------------------
def test_an_unreadable_answer_is_a_note_where_it_was_not_needed_and_a_problem_where_it_was() -> None:
    nodes = tools(macs(2))
    raw = {**nodes[1].raw, "sw_vers": "garbage"}
    noted = plan_group("g", [nodes[0], NodeTools(name="mac-b", system="Darwin", raw=raw)], twin="mlx")
    assert noted.problems == ()
    assert "mac-b: `sw_vers` has no ProductVersion." in noted.reason
    raw = {"ifconfig": b"\xff" * 10, "thunderbolt": "{"}
    blind = plan_group("g", [nodes[0], NodeTools(name="mac-b", system="Darwin", raw=raw)], twin="mlx")
    assert any("`system_profiler SPThunderboltDataType -json` printed no JSON" in text for text in blind.problems)


def test_a_socket_without_a_network_port_is_named() -> None:
    found = ring(2)
    nodes = tools(found)
    raw = {**nodes[0].raw, "hardware_ports": nodes[0].raw["hardware_ports"].replace("Thunderbolt 1", "Thunderbolt X")}
    machine = read_machine(NodeTools(name="mac-a", system="Darwin", raw=raw))
    assert "no hardware port `Thunderbolt 1`" in machine.unread[0]


def test_a_search_for_a_ring_ends_where_there_is_none() -> None:
    # Two full meshes that share one node: no ring, and a naive search would try millions of walks.
    halves = [{*range(9)}, {0, *range(9, 17)}]
    matrix = [[int(i != j and any({i, j} <= half for half in halves)) for j in range(17)] for i in range(17)]
    assert cables.find_ring(matrix) is None
