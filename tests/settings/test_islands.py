"""Groups that train apart: which machines are islands, who merges them, and what a file may not say about it."""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec
import pytest

from jupiter_engine.errors import ConfigError, UsageError
from jupiter_engine.protocol.specs import LaunchSpec
from jupiter_engine.settings.cluster import ClusterSettings, hub_group, hub_node, islands, launch_spec, load_cluster

NODES = (
    "nodes: [{host: a, device_type: mac}, {host: b, device_type: mac}, {host: Box, device_type: nvidia},"
    " {host: gen, device_type: cpu, role: generator}]\n"
    "groups: [{name: macs, nodes: [a, b]}]\n"
)


def load(folder: Path, text: str) -> ClusterSettings:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return load_cluster(file).value


def problems(folder: Path, text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    return caught.value.problems


def test_groups_and_single_machines_are_islands(tmp_path: Path) -> None:
    cluster = load(tmp_path, NODES + "islands: {groups: [macs, box], rounds: {round_s: 60, quorum: 2}}\n")
    found = islands(cluster)
    assert [(group.name, group.nodes) for group in found] == [("macs", ("a", "b")), ("Box", ("Box",))]
    # This machine is no node: the first island's leading machine merges.
    assert hub_node(cluster).title() == "a"
    group = hub_group(cluster)
    assert group is not None
    assert group.nodes == ("a", "Box")
    assert (cluster.islands.rounds.round_s, cluster.islands.rounds.quorum) == (60.0, 2)


def test_this_machine_merges_where_it_is_a_node_and_a_named_one_before_it(tmp_path: Path) -> None:
    here = NODES.replace("nodes: [", f"nodes: [{{host: {socket.gethostname()}, name: here, device_type: cpu}}, ", 1)
    cluster = load(tmp_path, here + "islands: {groups: [macs, Box]}\n")
    assert hub_node(cluster).title() == "here"
    group = hub_group(cluster)
    assert group is not None
    assert group.nodes == ("here", "a", "Box")
    named = load(tmp_path, here + "islands: {groups: [macs, Box], hub: gen}\n")
    assert hub_node(named).title() == "gen"


def test_a_single_machine_has_the_ranks_of_launch(tmp_path: Path) -> None:
    cluster = load(tmp_path, NODES + "islands: {groups: [Box, macs]}\nlaunch: {ranks: 3}\n")
    assert [group.ranks_per_node for group in islands(cluster)] == [3, 1]


def test_without_the_section_nothing_is_an_island(tmp_path: Path) -> None:
    cluster = load(tmp_path, NODES)
    assert islands(cluster) == ()
    assert hub_group(cluster) is None
    with pytest.raises(UsageError, match="names no islands"):
        hub_node(cluster)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{groups: [mac]}", 'did you mean "macs"?'),
        ("{groups: [macs, Bix]}", 'did you mean "Box"?'),
        ("{groups: [macs, b]}", "b is in the island macs already; a machine is in one island"),
        ("{groups: [macs, macs]}", "a is in the island macs already"),
        ("{groups: [macs, gen]}", "may not train (role generator)"),
        ("{groups: []}", "names no island; name at least one"),
        ("{hub: a}", "names no island; name at least one"),
        ("{groups: [macs], hub: c}", "which no node is called"),
        ("{groups: [macs, Box], rounds: {quorum: 3}}", "is 3, more than there are islands; write 2 or less"),
        ("{groups: [macs], rounds: {outer_momentum: 1}}", "outer_momentum"),
        ("{groups: [macs], rounds: {payload: int4}}", "payload"),
    ],
)
def test_sections_that_cannot_be(section: str, said: str, tmp_path: Path) -> None:
    (found,) = problems(tmp_path, f"{NODES}islands: {section}")
    assert said in found
    assert ", line 3, column " in found


def test_a_machine_that_trains_alone_has_no_islands(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, f"{NODES}islands: {{groups: [macs]}}\nlaunch: {{launcher: in_process}}")
    assert "this machine trains alone, but `islands` names others" in found


@pytest.mark.parametrize(
    ("launch", "field", "value"),
    [
        ("{}", "sharding", "none"),
        ("{sharding: auto}", "sharding", "none"),
        ("{sharding: zero1}", "sharding", "zero1"),
        ("{twin: torch, sharding: fsdp}", "sharding", "fsdp"),
        ("{}", "compile", "auto"),
        ("{twin: torch, compile: on}", "compile", "on"),
        ("{compile: off}", "compile", "off"),
    ],
)
def test_what_launch_says_reaches_the_order(launch: str, field: str, value: str, tmp_path: Path) -> None:
    spec = launch_spec(load(tmp_path, f"launch: {launch}\n"))
    assert getattr(spec, field) == value
    assert msgspec.json.decode(msgspec.json.encode(spec), type=LaunchSpec) == spec


def test_weights_are_not_divided_over_an_mlx_ring(tmp_path: Path) -> None:
    ring = NODES.replace("nodes: [a, b]", "nodes: [a, b], backend: ring")
    (found,) = problems(tmp_path, f"{ring}launch: {{sharding: fsdp}}")
    assert "the group macs has backend ring; write zero1" in found
    (found,) = problems(tmp_path, "nodes: [{device_type: mac}]\nlaunch: {sharding: fsdp, ranks: 2}")
    assert "ranks of one machine talk over a ring" in found
    assert load(tmp_path, f"{NODES}launch: {{sharding: fsdp}}").launch.sharding == "fsdp"


def test_torchs_compiler_is_no_help_to_mlx(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(f"{NODES}launch: {{compile: on}}\n")
    (warning,) = load_cluster(file).warnings
    assert "`launch.compile` has no effect" in warning


def test_the_example_of_the_documentation_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    example = text.partition("# config/cluster.yaml\n")[2].partition("```")[0]
    assert "islands:" in example
    nodes = """\
nodes:
  - {host: m1, device_type: mac, role: trainer}
  - {host: m2, device_type: mac, role: trainer}
  - {host: box, device_type: nvidia, role: trainer}
  - {host: tower, device_type: nvidia, role: trainer}
groups: [{name: macs, nodes: [m1, m2]}, {name: cards, nodes: [box, tower]}]
"""
    cluster = load(tmp_path, nodes + example)
    assert hub_node(cluster).title() == "box"
    assert [group.name for group in islands(cluster)] == ["macs", "cards"]
