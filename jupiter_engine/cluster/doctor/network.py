"""Checks: addresses, routes and what was measured between nodes."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Interface, IPv4Network, ip_address
from typing import Final

from jupiter_engine.cluster.doctor.evidence import Edge, Evidence, node_fact, node_table, tool_text
from jupiter_engine.cluster.doctor.registry import Theme, Unread, Verdict, each, fail, info, names, ok, person, warn
from jupiter_engine.cluster.readers.apple import firewall as read_firewall
from jupiter_engine.protocol.fleet import GroupPlan, Interface, Link, NodeFacts

RTT_LIMIT_S: Final = {"thunderbolt": 0.001, "ethernet": 0.005, "wifi": 0.0}
"""Above it something else than the cable carries the packets: published Thunderbolt TCP round trips are 0.3-0.95 ms."""
SPEED_SHARE: Final = 0.25
"""Of the negotiated speed; Thunderbolt's TCP reaches about half of it (52-63 of 80 Gbit/s on the fastest Macs)."""
SLOW_BYTES_PER_S: Final = 50_000_000
"""Half of gigabit Ethernet."""
NOT_A_LAN: Final = frozenset({"vpn", "virtual"})
"""Loopback is chosen only where all nodes are one machine, and there it is right."""

_theme = Theme()


def _ends(link: Link) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
    """(node, interface, address) at both ends."""
    return (link.a, link.a_interface, link.a_address), (link.b, link.b_interface, link.b_address)


def _interface(e: Evidence, node: str, address: str) -> Interface | None:
    """The interface of a node that has this address."""
    facts = e.facts.get(node)
    for interface in facts.interfaces if facts is not None else ():
        if any(text.split("/")[0] == address for text in interface.addresses):
            return interface
    return None


def _kind(e: Evidence, edge: Edge) -> str:
    """thunderbolt, ethernet or wifi: what the edge's address belongs to, after the plans."""
    for _, link in e.links():
        if edge.address in (link.a_address, link.b_address):
            return link.kind
    interface = _interface(e, edge.b, edge.address)
    return interface.kind if interface is not None else "ethernet"


@_theme.check("group-addresses", "The group's addresses are set up")
def group_addresses(e: Evidence) -> Iterator[Verdict]:
    for plan in e.plans:
        for fix in plan.setup:
            text = f"Group {plan.name} needs addresses on {fix.node or 'this machine'} that are not set up."
            yield fail((fix.node,) if fix.node else plan.nodes, text, fix)
        if plan.setup or not plan.links:
            continue
        wrong = list(_misplaced(e, plan))
        yield from wrong
        if not wrong:
            yield ok(plan.nodes, f"The {len(plan.links)} link(s) of group {plan.name} have their addresses.")


def _misplaced(e: Evidence, plan: GroupPlan) -> Iterator[Verdict]:
    for link in plan.links:
        for node, wanted, address in _ends(link):
            if not address or node not in e.facts or not e.facts[node].interfaces:
                continue
            has = _interface(e, node, address)
            if has is None:
                yield fail((node,), f"{address}, which group {plan.name} would use, is no address of {node}.")
            elif wanted and has.name != wanted:
                text = f"{address} is on {has.name} of {node}, but the cable of group {plan.name} is on {wanted}."
                yield fail((node,), text, person(f"take {address} off {has.name} and run the group's setup commands"))


@_theme.check("address-collision", "No address is in two networks")
def address_collision(e: Evidence) -> Iterator[Verdict]:
    used = {(node, interface) for _, link in e.links() for node, interface, _ in _ends(link) if interface}
    good = []
    for name in sorted({node for node, _ in used}):
        facts = e.facts.get(name)
        if facts is None:
            continue
        clash = next(_clashes(facts, {interface for node, interface in used if node == name}), None)
        if clash is None:
            good.append(name)
        else:
            text = f"On {name} the network {clash[1]} of {clash[0]} overlaps {clash[3]} of {clash[2]}."
            yield fail((name,), text, person("give one of them addresses of another range"))
    if good:
        yield ok(good, f"The groups' networks overlap no other on {names(good)}.")


def _clashes(facts: NodeFacts, used: set[str]) -> Iterator[tuple[str, IPv4Network, str, IPv4Network]]:
    networks = [
        (interface.name, IPv4Interface(text).network)
        for interface in facts.interfaces
        if interface.up and interface.kind != "loopback"
        for text in interface.addresses
    ]
    for name, network in networks:
        for other, taken in networks:
            if name in used and other != name and network.overlaps(taken):
                yield name, network, other, taken


@_theme.check("vpn", "No group runs through a VPN or container network")
def vpn(e: Evidence) -> Iterator[Verdict]:
    good: set[str] = set()
    for plan, link in e.links():
        for node, _, address in _ends(link):
            interface = _interface(e, node, address) if address else None
            # Ranks of one machine talk over its loopback, and that is as it should be.
            if interface is None or link.a == link.b:
                continue
            if interface.kind in NOT_A_LAN:
                text = f"Group {plan.name} would talk through {interface.name} of {node}, a {interface.kind} interface."
                yield fail((node,), text, person("name the node by an address of the cable or the local network"))
            else:
                good.add(node)
    if good:
        yield ok(sorted(good), f"{names(sorted(good))} talk over real interfaces.")


@_theme.check("wifi", "No group runs over Wi-Fi")
def wifi(e: Evidence) -> Iterator[Verdict]:
    for plan in e.plans:
        over = sorted({name for link in plan.links if link.kind == "wifi" for name in (link.a, link.b)})
        if over:
            text = f"Group {plan.name} would talk over Wi-Fi between {names(over)}: 5-50 ms for every step's exchange."
            yield warn(over, text, person("connect them with a cable"))
        elif plan.links:
            yield ok(plan.nodes, f"Group {plan.name} talks over cables.")


@_theme.check("reachable", "Nodes of a group reach each other")
def reachable(e: Evidence) -> Iterator[Verdict]:
    for edge in e.edges:
        if edge.rtt_s is None:
            text = f"{edge.a} cannot reach {edge.b} at {edge.address}: {edge.error or 'no answer'}."
            yield fail((edge.a, edge.b), text, person("check the cable, the addresses and the firewall of both"))
    good = [edge for edge in e.edges if edge.rtt_s is not None]
    if good:
        nodes = sorted({name for edge in good for name in (edge.a, edge.b)})
        yield ok(nodes, f"{len(good)} connection(s) between {names(nodes)} work.")


@_theme.check("round-trip", "Round trips are as short as the cable allows")
def round_trip(e: Evidence) -> Iterator[Verdict]:
    good: list[Edge] = []
    for edge in e.edges:
        if edge.rtt_s is None:
            continue
        kind = _kind(e, edge)
        limit = RTT_LIMIT_S.get(kind, RTT_LIMIT_S["ethernet"])
        if limit and edge.rtt_s > limit:
            text = f"{edge.a} to {edge.b} at {edge.address} takes {edge.rtt_s * 1000:.2f} ms over {kind};"
            fix = person("see that the address belongs to the cable, and that neither end saves energy on its port")
            yield warn((edge.a, edge.b), f"{text} {limit * 1000:.0f} ms is usual.", fix)
        else:
            good.append(edge)
    if good:
        slowest = max(edge.rtt_s or 0.0 for edge in good)
        nodes = sorted({name for edge in good for name in (edge.a, edge.b)})
        yield ok(nodes, f"Round trips between {names(nodes)} take at most {slowest * 1000:.2f} ms.")


@_theme.check("bandwidth", "Connections are as fast as the cable")
def bandwidth(e: Evidence) -> Iterator[Verdict]:
    for edge in e.edges:
        rates = [rate for rate in (edge.to_bytes_per_s, edge.from_bytes_per_s) if rate is not None]
        if not rates:
            continue
        slower, kind = min(rates), _kind(e, edge)
        speed = next(
            (link.speed_bits_per_s for _, link in e.links() if edge.address in (link.a_address, link.b_address)), None
        )
        least = speed / 8 * SPEED_SHARE if speed else SLOW_BYTES_PER_S
        text = f"{edge.a} and {edge.b} exchange {slower / 1e6:.0f} MB/s over {kind}"
        of = f" of {speed / 8e6:.0f} that the link can carry" if speed else ""
        if slower < least:
            fix = person("try another cable; the slowest link sets the group's pace")
            yield warn((edge.a, edge.b), f"{text}{of}.", fix)
        else:
            yield ok((edge.a, edge.b), f"{text}{of}.")


@_theme.check("local-network", "Detached processes may use the local network")
def local_network(e: Evidence) -> Iterator[Verdict]:
    good: set[str] = set()
    for edge in e.edges:
        if edge.detached_error is None or edge.rtt_s is None:
            continue
        if edge.detached_error:
            text = f"A process of {edge.a} that no session owns cannot reach {edge.b} ({edge.detached_error}),"
            where = "System Settings > Privacy & Security > Local Network"
            fix = person(f"allow Python under {where} on {edge.a}, or let the runner start as a launch daemon")
            yield fail((edge.a,), f"{text} though one of the ssh session can: macOS guards the local network.", fix)
        else:
            good.add(edge.a)
    if good:
        yield ok(sorted(good), f"Detached processes of {names(sorted(good))} reach the others.")


@_theme.check("firewall", "Firewalls let the ranks through")
def firewall(e: Evidence) -> Iterator[Verdict]:
    proven = {edge.b for edge in e.edges if edge.listen_error == ""}
    blocked: set[str] = set()
    for edge in e.edges:
        if edge.listen_error:
            blocked.add(edge.b)
            text = f"A port that {edge.b} opens cannot be reached from {edge.a} ({edge.listen_error}), though ssh can."
            yield fail((edge.b,), text, person(f"let Python take connections in the firewall of {edge.b}"))

    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        on = False
        if name in e.macs():
            answer = tool_text(facts, "firewall")
            if answer is None:
                raise Unread("the state of the firewall could not be read")
            state = read_firewall(answer)
            if state == "block_all":
                text = f"The firewall of {name} blocks all incoming connections."
                return fail((name,), text, person("switch `Block all incoming connections` off, or the firewall"))
            on = state == "on"
        else:
            on = bool(node_fact(facts, "ufw_enabled"))
        if on and name not in proven:
            text = f"The firewall of {name} is on; whether it lets the ranks through was not measured."
            return info((name,), text, person(f"allow Python (a Mac) or the group's network (ufw) on {name}"))
        return None

    yield from each({n: f for n, f in e.facts.items() if n not in blocked}, judge, good="No firewall is in the way")


@_theme.check("peer-login", "The leading node gets into the others")
def peer_login(e: Evidence) -> Iterator[Verdict]:
    good = []
    for login in e.logins:
        if login.works:
            good.append(login.b)
        else:
            text = f"{login.a}, which leads a group, cannot log in to {login.b}: {login.text or 'ssh gave no reason'}."
            yield fail((login.a, login.b), text, person("run `jupiter nodes link` to set it up anew"))
    if good:
        yield ok(good, f"The leading node logs in to {names(good)} without a question.")


@_theme.check("own-name", "A node's name means the node")
def own_name(e: Evidence) -> Iterator[Verdict]:
    grouped = {name for plan in e.plans if plan.twin == "torch" and len(plan.nodes) > 1 for name in plan.nodes}

    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        found = node_table(facts, "own_name")
        if "hostname" not in found:
            raise Unread("its name was not looked up in time")
        addresses = [str(address) for address in found.get("addresses") or ()]
        if not addresses:
            text = f"{found['hostname']}, the name of {name}, resolves to nothing there."
            fix = person(f"add `127.0.1.1 {found['hostname']}` to /etc/hosts on {name}")
            return fail((name,), f"{text} torchrun needs it.", fix) if name in grouped else info((name,), text, fix)
        if name in grouped and all(ip_address(address).is_loopback for address in addresses):
            text = f"{found['hostname']} resolves to {addresses[0]} on {name}: others could not call it by that name."
            return info((name,), f"{text} Jupiter passes addresses, so its own runs do not mind.")
        return None

    yield from each(e.facts, judge, good="The machine's own name resolves")


@_theme.check("socket-interface", "No variable forces a wrong interface")
def socket_interface(e: Evidence) -> Iterator[Verdict]:
    good = []
    for name, facts in e.facts.items():
        variables = node_table(facts, "environment")
        forced = {
            key: str(variables[key]).lstrip("=^").split(",")[0]
            for key in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
            if variables.get(key)
        }
        known = {interface.name for interface in facts.interfaces}
        for key, value in forced.items():
            missing = (
                bool(known)
                and not value.startswith("lo")
                and not any(interface.startswith(value) for interface in known)
            )
            if value.startswith("lo") or missing:
                why = "is no interface there" if missing else "reaches nobody else"
                text = f"{key} is {value} on {name}, which {why}."
                yield fail((name,), text, person(f"take {key} out of the shell's start-up files on {name}"))
            else:
                yield info(
                    (name,), f"{key} is {value} on {name}: it wins over the interface that Jupiter would choose."
                )
        if not forced:
            good.append(name)
    if good:
        yield ok(good, f"No variable chooses an interface on {names(good)}.")


CHECKS: Final = tuple(_theme.checks)
