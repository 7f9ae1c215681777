"""Cluster files: every key, every rule, and what this machine may do."""

from __future__ import annotations

import platform
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import inspect as mi

from jupiter_engine.errors import ConfigError, UsageError
from jupiter_engine.settings import cluster
from jupiter_engine.settings.cluster import (
    ClusterSettings,
    default_groups,
    group_nodes,
    launch_spec,
    load_cluster,
    local_roles,
    local_twin,
    node_by_name,
    node_twin,
    training_group,
)
from jupiter_engine.settings.reader import Loaded, leaves

LOST_S = ClusterSettings().retries.node_lost_after_s
BASE = "nodes: [{host: mac-1.local}]\n"
GROUP = "nodes: [{host: mac-1.local, device_type: mac}, {host: mac-2.local}]\n"
TWO = GROUP + "groups: [{name: a, nodes: [mac-1.local]}, {name: b, nodes: [mac-2.local]}]\n"
ISLANDS = "nodes: [{host: mac-1.local, device_type: mac}, {host: mac-2.local, device_type: mac}]\n"
CHANGES = {
    "nodes": "nodes: [{host: b}]",
    "nodes[].host": "nodes: [{host: b}]",
    "nodes[].name": "nodes: [{host: mac-1.local, name: b}]",
    "nodes[].device_type": "nodes: [{host: mac-1.local, device_type: mac}]",
    "nodes[].memory_gb": "nodes: [{host: mac-1.local, memory_gb: 16}]",
    "nodes[].chip": "nodes: [{host: mac-1.local, chip: M4}]",
    "nodes[].role": "nodes: [{host: mac-1.local, role: trainer}]",
    "nodes[].connection_type": "nodes: [{host: mac-1.local, connection_type: wifi}]",
    "nodes[].ssh_user": "nodes: [{host: mac-1.local, ssh_user: ada}]",
    "nodes[].ssh_port": "nodes: [{host: mac-1.local, ssh_port: 2222}]",
    "nodes[].identity": "nodes: [{host: mac-1.local, identity: key}]",
    "nodes[].jump": "nodes: [{host: mac-1.local, jump: gate}]",
    "nodes[].python": "nodes: [{host: mac-1.local, python: /usr/bin/python3}]",
    "nodes[].workdir": "nodes: [{host: mac-1.local, workdir: /data/jupiter}]",
    "nodes[].environment": "nodes: [{host: mac-1.local, environment: own, python: ~/env/bin/python}]",
    "nodes[].can_generate": "nodes: [{host: mac-1.local, can_generate: false}]",
    "nodes[].can_train": "nodes: [{host: mac-1.local, can_train: false}]",
    "nodes[].micro_batch_sequences": "nodes: [{host: mac-1.local, micro_batch_sequences: 2}]",
    "groups": GROUP + "groups: [{name: b, nodes: [mac-1.local]}]",
    "groups[].name": GROUP + "groups: [{name: b, nodes: [mac-1.local]}]",
    "groups[].nodes": GROUP + "groups: [{name: a, nodes: [mac-2.local]}]",
    "groups[].launcher": GROUP + "groups: [{name: a, nodes: [mac-1.local], launcher: direct}]",
    "groups[].backend": GROUP + "groups: [{name: a, nodes: [mac-1.local], backend: jaccl}]",
    "groups[].over": GROUP + "groups: [{name: a, nodes: [mac-1.local], over: ethernet}]",
    "groups[].ranks_per_node": GROUP + "groups: [{name: a, nodes: [mac-1.local], ranks_per_node: 2}]",
    "launch": BASE + "launch: {ranks: 2}",
    "launch.twin": BASE + "launch: {twin: mlx}",
    "launch.ranks": BASE + "launch: {ranks: 2}",
    "launch.launcher": BASE + "launch: {launcher: in_process}",
    "launch.group": TWO + "launch: {group: b}",
    "launch.threads_per_rank": BASE + "launch: {threads_per_rank: 1}",
    "launch.sharding": BASE + "launch: {sharding: zero1}",
    "launch.compile": BASE + "launch: {compile: 'off'}",
    "islands": ISLANDS + "islands: {groups: [mac-1.local], hub: mac-2.local}",
    "islands.groups": ISLANDS + "islands: {groups: [mac-2.local, mac-1.local]}",
    "islands.hub": ISLANDS + "islands: {groups: [mac-1.local], hub: mac-2.local}",
    "islands.rounds": ISLANDS + "islands: {groups: [mac-1.local], rounds: {round_s: 60}}",
    "islands.rounds.round_s": ISLANDS + "islands: {groups: [mac-1.local], rounds: {round_s: 60}}",
    "islands.rounds.max_steps": ISLANDS + "islands: {groups: [mac-1.local], rounds: {max_steps: 50}}",
    "islands.rounds.quorum": ISLANDS + "islands: {groups: [mac-1.local, mac-2.local], rounds: {quorum: 2}}",
    "islands.rounds.grace_s": ISLANDS + "islands: {groups: [mac-1.local], rounds: {grace_s: 5}}",
    "islands.rounds.payload": ISLANDS + "islands: {groups: [mac-1.local], rounds: {payload: int8}}",
    "islands.rounds.outer_learning_rate": ISLANDS
    + "islands: {groups: [mac-1.local], rounds: {outer_learning_rate: 0.5}}",
    "islands.rounds.outer_momentum": ISLANDS + "islands: {groups: [mac-1.local], rounds: {outer_momentum: 0.8}}",
    "islands.rounds.max_unsynced_rounds": ISLANDS
    + "islands: {groups: [mac-1.local], rounds: {max_unsynced_rounds: 5}}",
    "islands.rounds.clip_norm_factor": ISLANDS + "islands: {groups: [mac-1.local], rounds: {clip_norm_factor: 2}}",
    "connection": BASE + "connection: {keepalive_s: 1}",
    "connection.connect_timeout_s": BASE + "connection: {connect_timeout_s: 1}",
    "connection.keepalive_s": BASE + "connection: {keepalive_s: 1}",
    "connection.reconnect_max_s": BASE + "connection: {reconnect_max_s: 1}",
    "retries": BASE + "retries: {worker_restarts: 1}",
    "retries.worker_restarts": BASE + "retries: {worker_restarts: 1}",
    "retries.group_restarts_per_hour": BASE + "retries: {group_restarts_per_hour: 1}",
    "retries.node_lost_after_s": BASE + "retries: {node_lost_after_s: 60}",
}


def load(folder: Path, text: str) -> Loaded[ClusterSettings]:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return load_cluster(file)


def problems(folder: Path, text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    return caught.value.problems


@pytest.mark.parametrize("key", [key for key, _ in leaves(mi.type_info(ClusterSettings)) if key != "schema"])
def test_every_key_changes_what_is_loaded(key: str, tmp_path: Path) -> None:
    def at(value: Any) -> Any:
        for part in key.split("."):
            value = value[part.removesuffix("[]")]
            value = value[0] if part.endswith("[]") else value
        return value

    base = BASE if not key.startswith("groups") else GROUP + "groups: [{name: a, nodes: [mac-1.local]}]"
    before, after = (msgspec.to_builtins(load(tmp_path, text).value) for text in (base, CHANGES[key]))
    assert at(before) != at(after)


def test_an_almost_empty_file_means_this_machine(tmp_path: Path) -> None:
    loaded = load(tmp_path, "schema: jupiter/cluster@1\n")
    assert loaded.value == cluster.defaults()
    assert local_roles(loaded.value) == {"generate", "train", "evaluate"}
    assert loaded.warnings == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodes: []", "`nodes` is an empty list"),
        ("nodes:", "`nodes`: found nothing"),
        ("nodes: [{host: localhost, memory_gb: '16GB'}]", "write 16 without quotes or unit"),
        ("nodes: [{host: localhost, memory_gb: 0}]", "a number greater than 0"),
        ("nodes: [{hots: localhost}]", "did you mean `host`"),
        ("nodes: [{host: me@mac.local}]", "the user goes into ssh_user"),
        ("nodes: [{host: 'a b'}]", "no host name"),
        ("nodes: [{host: -oProxyCommand=x}]", "no host name"),
        ("nodes: [{host: 10}]", 'quote it: "10"'),
        ("nodes: [{host: a}, {host: A}]", '`nodes[1].host` is "A", which nodes[0] is already'),
        ("nodes: [{host: localhost}, {host: 127.0.0.1}]", "this machine, which nodes[0] is already"),
        ("nodes: [{name: ' '}]", "`nodes[0].name` is empty"),
        ("nodes: [{host: a, ssh_user: '-x'}]", "no user name"),
        ("nodes: [{host: a, ssh_port: 70000}]", "from 1 to 65535"),
        ("nodes: [{role: train}]", "did you mean trainer?"),
        ("nodes: [{role: generator, can_train: true}]", "role generator does not train; write `role: hybrid`"),
        ("nodes: [{role: generator, can_generate: false}]", "may do nothing"),
        ("nodes: [{device_type: apple}]", "expected one of cpu, mac, nvidia"),
        ("launch: {launcher: in_process, ranks: 2}", "launch.ranks is 2; write auto"),
        ("launch: {launcher: torchrun, twin: mlx}", "the twin of this machine is mlx"),
        ("launch: {launcher: mlx.launch, twin: torch}", "the twin of this machine is torch"),
        ("launch: {twin: pytorch}", "did you mean torch?"),
        ("retries: {worker_restarts: -1}", "from 0 to 100"),
        ("schema: jupiter/domain@1", "expected jupiter/cluster@1"),
    ],
)
def test_refusal(text: str, said: str, tmp_path: Path) -> None:
    (found,) = problems(tmp_path, text)
    assert said in found
    assert ", line 1, column " in found


MACS = "{host: a, device_type: mac}, {host: b, device_type: mac}, {host: c, device_type: nvidia}, {host: d}, "
MACS += "{host: e, role: generator}, {host: f, device_type: cpu}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodes: [{host: 'mac.local:22'}]", "the port goes into ssh_port: {host: mac.local, ssh_port: 22}"),
        ("nodes: [{host: 'fe80::g'}]", "no host name or address"),
        ("nodes: [{host: a, name: x}, {host: b, name: X}]", '`nodes[1].name` is "X", which nodes[0] is called already'),
        ("nodes: [{host: a}, {host: b, name: A}]", "which nodes[0] is called already"),
        ("nodes: [{host: a, name: --all}]", "does not begin with a dash"),
        ("nodes: [{host: a, identity: -i}]", "write the path of a private key file"),
        ("nodes: [{host: a, identity: ~/.ssh/id_ed25519.pub}]", "the public half of a key"),
        ("nodes: [{host: a, jump: -oProxyCommand=x}]", "no host name"),
        ("nodes: [{host: a, jump: 'ssh://gate'}]", "write an alias of ~/.ssh/config or user@host:port"),
        ("nodes: [{host: a, jump: '-l@gate'}]", "no user name"),
        ("nodes: [{host: a, jump: 'me@gate:99999'}]", "99999 is no port"),
        ("nodes: [{host: a, jump: 'gate,,gate2'}]", "separated by commas"),
        ("nodes: [{host: a, jump: '::1'}]", "user@host:port"),
        ("nodes: [{host: a, python: python3}]", "begins with / or ~/"),
        ("nodes: [{host: a, python: -c}]", "begins with / or ~/"),
        ("nodes: [{host: a, workdir: jupiter}]", "begins with / or ~/"),
        ("nodes: [{host: a, workdir: ~/}]", "begins with / or ~/"),
        ("nodes: [{host: a, environment: own}]", "name it with `python: /path/to/python`"),
        ("connection: {keepalive_s: 60}", f"noticed after 180 s, later than retries.node_lost_after_s ({LOST_S:g} s)"),
        ("connection: {reconnect_max_s: 0.1}", "less than the first pause"),
        ("connection: {keepalive: 2}", "did you mean `keepalive_s`"),
    ],
)
def test_how_a_machine_is_reached_must_make_sense(text: str, said: str, tmp_path: Path) -> None:
    (found,) = problems(tmp_path, text)
    assert said in found
    assert ", line 1, column " in found


@pytest.mark.parametrize(
    "jump", ["gate", "me@gate", "me@gate:2222", "gate:22", "[fe80::1]:22", "a,b@c:1", "10.0.0.1", "my_gate"]
)
def test_jump_hosts_as_ssh_takes_them(jump: str, tmp_path: Path) -> None:
    assert load(tmp_path, f"nodes: [{{host: a, jump: '{jump}'}}]").value.nodes[0].jump == jump


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ("{name: g, nodes: [a, B, x]}", 'is "x", which no node is called; known: a, b, c, d, e, f'),
        ("{name: g, nodes: [a], over: wifi}", "expected one of auto, ethernet, thunderbolt"),
        ("{name: g, nodes: []}", "is an empty list"),
        ("{name: g, nodes: [a, A]}", "is in this group already"),
        ("{name: -g, nodes: [a]}", "does not begin with a dash"),
        ("{name: g, nodes: [a, e]}", "may not train (role generator)"),
        ("{name: g, nodes: [a, c]}", "a group shares one framework: make two groups"),
        (
            "{name: g, nodes: [a, b], backend: gloo}",
            "for torch, but the machines train with MLX; write auto or one of:",
        ),
        ("{name: g, nodes: [c], backend: ring}", "for MLX, but the machines train with torch"),
        ("{name: g, nodes: [a], launcher: torchrun}", "for torch, but the machines train with MLX"),
        ("{name: g, nodes: [c], launcher: mlx.launch}", "for MLX, but the machines train with torch"),
        ("{name: g, nodes: [c, f], backend: nccl}", "but f is a cpu machine; write gloo"),
        ("{name: g, nodes: [a, b], backend: jaccl, over: ethernet}", "runs over Thunderbolt only"),
        ("{name: g, nodes: [a, b], backend: jaccl, ranks_per_node: 2}", "carries one rank a machine; write 1"),
        ("{name: g, nodes: [a]}, {name: g, nodes: [b]}", "which groups[0] is called already"),
        ("{name: g, nodes: [a]}, {name: h, nodes: [a]}", "is in groups[0] already; a machine trains in one group"),
        ("{name: g}", "`groups[0].nodes` is missing"),
    ],
)
def test_groups_that_cannot_train(group: str, said: str, tmp_path: Path) -> None:
    (found,) = problems(tmp_path, f"nodes: [{MACS}]\ngroups: [{group}]")
    assert said in found
    assert ", line 2, column " in found


def test_a_misspelt_member_is_recognised(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, "nodes: [{host: a, name: Mac Mini 1}]\ngroups: [{name: g, nodes: [Mac Mini]}]")
    assert 'did you mean "Mac Mini 1"?' in found


def test_networks_that_contradict(tmp_path: Path) -> None:
    nodes = "nodes: [{host: a, device_type: mac}, {host: b, device_type: mac, connection_type: ethernet}]\n"
    (found,) = problems(tmp_path, nodes + "groups: [{name: g, nodes: [a, b], over: thunderbolt}]")
    assert "nodes[1] (b) has connection_type ethernet" in found
    slow = nodes.replace("ethernet", "wifi") + "groups: [{name: g, nodes: [a, b]}]"
    (warning,) = load(tmp_path, slow).warnings
    assert "`nodes[1].connection_type` is wifi" in warning


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        ("{group: h}", 'is "h", but no group is called so; known: g'),
        ("{group: g, launcher: in_process}", "this machine trains alone, but launch.group names a group"),
        ("{launcher: torchrun}", "which starts torch, but the twin of the group g is mlx"),
        ("{twin: torch, launcher: mlx.launch}", "which starts mlx, but the twin of the group g is torch"),
    ],
)
def test_launch_settings_that_do_not_fit_the_group(launch: str, said: str, tmp_path: Path) -> None:
    (found,) = problems(tmp_path, f"nodes: [{MACS}]\ngroups: [{{name: g, nodes: [a, b]}}]\nlaunch: {launch}")
    assert said in found
    assert ", line 3, column " in found


def test_settings_that_a_group_makes_pointless_are_pointed_out(tmp_path: Path) -> None:
    text = f"nodes: [{MACS}]\ngroups: [{{name: g, nodes: [a, b]}}]\n"
    (warning,) = load(tmp_path, text + "launch: {ranks: 4}").warnings
    assert "`launch.ranks` has no effect: the group g trains" in warning
    loaded = load(tmp_path, text + "launch: {launcher: in_process}")
    assert "`groups` has no effect" in loaded.warnings[0]
    assert training_group(loaded.value) is None


def test_nodes_are_found_by_name_and_by_host(tmp_path: Path) -> None:
    value = load(tmp_path, "nodes: [{host: a.lan, name: Mac Mini 1}, {host: b.lan, name: a}]").value
    assert node_by_name(value, "mac mini 1").host == "a.lan"
    assert node_by_name(value, "B.lan").name == "a"
    assert node_by_name(value, "a").host == "b.lan"
    with pytest.raises(UsageError, match=r'no node "Mac Mini 2".*did you mean "Mac Mini 1"'):
        node_by_name(value, "Mac Mini 2")


def test_groups_that_follow_from_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    value = load(tmp_path, f"nodes: [{MACS}, {{host: localhost, name: me}}]").value
    macs, cards = default_groups(value)
    assert (macs.name, macs.nodes) == ("mlx", ("me", "a", "b"))
    assert (cards.name, cards.nodes) == ("torch", ("c", "f"))
    assert training_group(value) == macs
    assert [node.host for node in group_nodes(value, macs)] == ["localhost", "a", "b"]
    assert [node_twin(value, node) for node in value.nodes] == ["mlx", "mlx", "torch", None, None, "torch", "mlx"]
    chosen = load(tmp_path, f"nodes: [{MACS}, {{host: localhost, name: me}}]\nlaunch: {{group: torch}}").value
    assert training_group(chosen) == cards
    forced = load(tmp_path, f"nodes: [{MACS}]\nlaunch: {{twin: torch}}").value
    (one,) = default_groups(forced)
    assert one.nodes == ("a", "b", "c", "d", "f")


def test_equal_groups_stand_in_the_order_of_the_file(tmp_path: Path) -> None:
    value = load(tmp_path, "nodes: [{host: c, device_type: nvidia}, {host: a, device_type: mac}]").value
    assert [group.name for group in default_groups(value)] == ["torch", "mlx"]


@pytest.mark.parametrize(
    "nodes", ["{host: localhost}", "{host: localhost}, {host: a, role: generator}", "{host: localhost}, {host: a}"]
)
def test_this_machine_trains_alone_where_no_other_is_known_to_train(nodes: str, tmp_path: Path) -> None:
    value = load(tmp_path, f"nodes: [{nodes}]").value
    assert default_groups(value) == ()
    assert training_group(value) is None


def test_another_machine_is_no_reason_for_a_notice(tmp_path: Path) -> None:
    loaded = load(tmp_path, "nodes:\n- host: localhost\n- host: rtx.lan\n  device_type: nvidia\n")
    assert loaded.warnings == ()
    assert local_roles(loaded.value) == {"generate", "train", "evaluate"}
    (warning,) = load(tmp_path, "nodes: [{host: rtx.lan}]").warnings
    assert "so rtx.lan trains in no group; write mac, nvidia or cpu" in warning


def test_a_forwarded_port_is_another_machine(tmp_path: Path) -> None:
    text = "nodes: [{host: localhost}, {host: localhost, name: vm, ssh_port: 2222, device_type: cpu}]"
    value = load(tmp_path, text).value
    assert [node.is_local() for node in value.nodes] == [True, False]


def test_a_key_file_is_looked_at(tmp_path: Path) -> None:
    text = "nodes: [{host: a, device_type: mac, identity: keys/id}]"
    loaded = load(tmp_path, text)
    assert "which cannot be read now" in loaded.warnings[0]
    key = tmp_path / "keys" / "id"
    key.parent.mkdir()
    key.write_text("key")
    key.chmod(0o644)
    assert "chmod 600" in load(tmp_path, text).warnings[0]
    key.chmod(0o600)
    loaded = load(tmp_path, text)
    assert loaded.warnings == ()
    assert loaded.value.nodes[0].identity == str(key)


def test_ssh_settings_of_this_machine_are_pointed_out(tmp_path: Path) -> None:
    loaded = load(tmp_path, "nodes: [{host: localhost, ssh_port: 22, ssh_user: null, jump: gate}]")
    first, second = loaded.warnings
    assert "`nodes[0].ssh_port` has no effect" in first
    assert "`nodes[0].jump` has no effect" in second


@pytest.mark.parametrize(
    ("node", "roles"),
    [
        ("role: hybrid", {"generate", "train", "evaluate"}),
        ("role: generator", {"generate"}),
        ("role: trainer", {"train", "evaluate"}),
        ("role: evaluator", {"evaluate"}),
        ("role: hybrid, can_generate: false", {"train", "evaluate"}),
        ("role: hybrid, can_train: false", {"generate", "evaluate"}),
        ("role: trainer, can_train: false", {"evaluate"}),
        ("host: elsewhere.lan", set()),
    ],
)
def test_what_this_machine_may_do(node: str, roles: set[str], tmp_path: Path) -> None:
    assert local_roles(load(tmp_path, f"nodes: [{{{node}}}]").value) == roles


def test_this_machine_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "MacBook.fritz.box")
    for host in ("macbook", "MacBook.local", "macbook.fritz.box", "::1"):
        assert local_roles(load(tmp_path, f"nodes: [{{host: '{host}'}}]").value), host
    assert not local_roles(load(tmp_path, "nodes: [{host: macbook2.local}]").value)


@pytest.mark.parametrize(
    ("system", "machine", "text", "twin", "launcher"),
    [
        ("Darwin", "arm64", "{}", "mlx", "in_process"),
        ("Darwin", "x86_64", "{}", "torch", "in_process"),
        ("Linux", "x86_64", "launch: {ranks: 2}", "torch", "torchrun"),
        ("Darwin", "arm64", "launch: {ranks: 2}", "mlx", "mlx.launch"),
        ("Linux", "x86_64", "launch: {ranks: 2, twin: mlx}", "mlx", "mlx.launch"),
        ("Linux", "x86_64", "nodes: [{device_type: mac}]", "mlx", "in_process"),
        ("Darwin", "arm64", "nodes: [{device_type: cpu}]", "torch", "in_process"),
        ("Linux", "x86_64", "launch: {launcher: torchrun}", "torch", "torchrun"),
    ],
)
def test_what_auto_becomes(
    system: str, machine: str, text: str, twin: str, launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    value = load(tmp_path, text).value
    assert local_twin(value) == twin
    spec = launch_spec(value)
    assert (spec.twin, spec.launcher) == (twin, launcher)
