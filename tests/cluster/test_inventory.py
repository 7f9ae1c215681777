"""The cluster file is changed in place: comments, order and layout stay, and what does not load is not written."""

from __future__ import annotations

import difflib
import json
import multiprocessing
import random
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jupiter_engine.cluster.inventory import Inventory, node_values
from jupiter_engine.cluster.yaml_text import Value, YamlText, written
from jupiter_engine.errors import ConfigError, UsageError
from jupiter_engine.settings.cluster import NodeSpec, load_cluster, node_by_name
from jupiter_engine.settings.workspace import shipped_folder

MAC: dict[str, Value] = {
    "host": "mac-1.local",
    "name": "Mac: 1",
    "device_type": "mac",
    "memory_gb": 16,
    "role": "trainer",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config" / "cluster.yaml"
    path.parent.mkdir()
    path.write_bytes((shipped_folder() / "cluster.yaml").read_bytes())
    return path


def changed(before: str, after: str) -> list[str]:
    """Lines taken out and put in, without those that stayed."""
    return [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[0] in "+-"]


def test_a_node_is_added_behind_the_last_one_and_everything_else_stays(file: Path) -> None:
    before = file.read_text()
    inventory = Inventory(file)
    inventory.add(MAC)
    loaded = inventory.save()
    node = node_by_name(loaded.value, "Mac: 1")
    assert (node.host, node.memory_gb, node.role) == ("mac-1.local", 16, "trainer")
    assert changed(before, file.read_text()) == [
        "+   - host: mac-1.local",
        '+     name: "Mac: 1"',
        "+     device_type: mac",
        "+     memory_gb: 16",
        "+     role: trainer",
    ]


def test_adding_and_removing_leaves_the_file_byte_for_byte(file: Path) -> None:
    before = file.read_bytes()
    inventory = Inventory(file)
    inventory.add(MAC)
    inventory.save()
    assert inventory.remove("mac-1.local") == "Mac: 1"
    inventory.save()
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["cluster.yaml"]


def test_a_role_is_changed_where_it_stands(file: Path) -> None:
    before = file.read_text()
    inventory = Inventory(file)
    inventory.set("this machine", {"role": "generator", "memory_gb": 24.5})
    assert inventory.save().value.nodes[0].abilities() == {"generate"}
    assert changed(before, file.read_text()) == ["-     role: hybrid", "+     role: generator", "+     memory_gb: 24.5"]
    inventory.set("this machine", {"role": "hybrid", "memory_gb": None})
    inventory.save()
    assert file.read_text() == before


LAYOUTS = {
    "flow": "nodes: [{host: localhost}, {host: a, role: trainer}]  # two\ngroups: [{name: g, nodes: [a]}]\n",
    "flow over lines": "nodes: [\n  {host: localhost},  # here\n  {host: a, role: trainer},\n]\n",
    "dash in the first column": "nodes:\n- host: localhost\n# the Mac\n- host: a  # Mini\n  role: trainer\n# end\n",
    "dash alone": "nodes:\n  -\n    host: localhost\n  -\n    host: a\n    role: trainer\n",
    "no newline at the end": "nodes:\n  - host: localhost\n  - host: a\n    role: trainer",
    "windows": "# c\r\nnodes:\r\n  - host: localhost\r\n  - host: a\r\n    role: trainer\r\nlaunch: {ranks: 1}\r\n",
    "byte order mark": "\ufeffnodes:\n  - host: localhost\n  - {host: a, role: trainer}\n",
    "role first": "nodes:\n  - host: localhost\n  - role: trainer\n    host: a\n",
    "block text": "nodes:\n- host: localhost\n- host: a\n  role: trainer\n  chip: >\n    M4\n    Pro\n\nlaunch: {}\n",
    "empty value": "nodes:\n  - host: localhost\n  - host: a\n    name:\n    role: trainer\n    chip:\n",
    "whole file in braces": "{nodes: [{host: localhost}, {host: a, role: trainer}], launch: {ranks: 1}}\n",
    "quotes": "'nodes':\n  - \"host\": 'localhost'\n  - host: \"a\"\n    role: 'trainer'\n",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    text = LAYOUTS[layout]
    file.write_bytes(text.encode())
    inventory = Inventory(file)
    inventory.add({"host": "b", "device_type": "cpu"})
    inventory.set("a", {"role": "evaluator" if "groups" not in text else "hybrid", "chip": "M4, #1", "ssh_port": 2222})
    nodes = inventory.save().value.nodes
    assert [node.host for node in nodes] == ["localhost", "a", "b"]
    assert (nodes[1].role != "trainer", nodes[1].chip, nodes[1].ssh_port) == (True, "M4, #1", 2222)
    inventory.set("a", {"ssh_port": None, "role": None})
    assert inventory.save().value.nodes[1].ssh_port is None
    inventory.remove("localhost")
    inventory.remove("b")
    loaded = inventory.save()
    assert [(node.host, node.role) for node in loaded.value.nodes] == [("a", "hybrid")]
    raw = file.read_bytes().decode()
    assert raw.startswith("\ufeff") == text.startswith("\ufeff")
    assert raw.count("\r\n") == (raw.count("\n") if "\r\n" in text else 0)
    comments = [line[line.index("#") :] for line in text.splitlines() if "#" in line and "# here" not in line]
    assert all(comment in raw for comment in comments if comment != "# Mini" or "host: a" in raw)


def test_a_file_without_nodes_keeps_this_machine(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("# mine\nlaunch: {ranks: 2}")
    inventory = Inventory(file)
    inventory.add({"host": "a", "device_type": "cpu"})
    assert [node.host for node in inventory.save().value.nodes] == ["localhost", "a"]
    assert file.read_text().startswith("# mine\nlaunch: {ranks: 2}\n")


def test_a_removed_node_leaves_its_group(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    nodes = "nodes: [{host: localhost}, {host: a, name: A1, device_type: cpu}, {host: b, device_type: cpu}]\n"
    file.write_text(
        nodes + "groups:\n  # both\n  - name: g\n    nodes: [a, b]\n  - name: h\n    nodes:\n      - localhost\n"
    )
    inventory = Inventory(file)
    inventory.remove("a1")
    assert [group.nodes for group in inventory.save().value.groups] == [("b",), ("localhost",)]
    inventory.remove("b")
    assert [group.name for group in inventory.save().value.groups] == ["h"]
    assert "# both" in file.read_text()
    inventory.add({"host": "c", "device_type": "cpu"})
    inventory.remove("localhost")
    assert inventory.save().value.groups == ()
    assert "groups" not in file.read_text()


def test_the_last_node_and_the_last_member_of_the_chosen_group_stay(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("nodes: [{host: a, device_type: cpu}]\n")
    with pytest.raises(UsageError, match="a is the only node"):
        Inventory(file).remove("a")
    text = "nodes: [{host: a, device_type: cpu}, {host: b, device_type: cpu}]\ngroups: [{name: g, nodes: [a]}, "
    text += "{name: h, nodes: [b]}]\nlaunch: {group: g}\n"
    file.write_text(text)
    inventory = Inventory(file)
    inventory.remove("a")
    with pytest.raises(ConfigError, match="no group is called so; known: h"):
        inventory.save()
    assert file.read_text() == text


def test_what_does_not_load_is_not_written_and_is_said_about_the_file_itself(file: Path) -> None:
    before = file.read_bytes()
    cases: list[tuple[dict[str, Value], str]] = [
        ({"host": "localhost"}, "which nodes[0] is already"),
        ({"host": "-oProxyCommand=x"}, "no host name"),
        ({"host": "a", "role": "boss"}, "expected one of"),
        ({"host": "a", "name": "x\x1b[2J"}, "control character"),
    ]
    for values, said in cases:
        inventory = Inventory(file)
        inventory.add(values)
        with pytest.raises(ConfigError) as caught:
            inventory.save()
        assert caught.value.title == "The change was not made"
        assert said in caught.value.problems[0]
        assert caught.value.problems[0].startswith(f"{file}, line ")
        assert file.read_bytes() == before
        assert [path.name for path in file.parent.iterdir()] == ["cluster.yaml"]


def test_keys_that_a_node_does_not_have(file: Path) -> None:
    with pytest.raises(UsageError, match=r'no key "rol"; did you mean role'):
        Inventory(file).set("localhost", {"rol": "trainer"})
    with pytest.raises(UsageError, match='no node "mac"'):
        Inventory(file).set("mac", {"role": "trainer"})


def test_a_file_changed_by_somebody_else_is_left_alone(file: Path) -> None:
    inventory = Inventory(file)
    inventory.add(MAC)
    file.write_text(file.read_text() + "# mine\n")
    with pytest.raises(ConfigError, match="changed by somebody else meanwhile"):
        inventory.save()
    assert file.read_text().endswith("# mine\n")
    assert "mac-1" not in file.read_text().replace("mac-mini-1", "")
    file.unlink()
    with pytest.raises(ConfigError, match="changed by somebody else meanwhile"):
        inventory.save()


def test_a_broken_file_is_not_edited(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("nodes: [{hots: a}]\n")
    with pytest.raises(ConfigError, match="did you mean `host`"):
        Inventory(file)


def test_mode_and_link_of_the_file_stay(tmp_path: Path) -> None:
    real = tmp_path / "dotfiles" / "cluster.yaml"
    real.parent.mkdir()
    real.write_text("nodes:\n  - host: localhost\n")
    real.chmod(0o640)
    link = tmp_path / "cluster.yaml"
    link.symlink_to(real)
    inventory = Inventory(link)
    inventory.add(MAC)
    inventory.save()
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert "mac-1.local" in real.read_text()


def add_until_done(path: str, number: int) -> None:
    while True:
        inventory = Inventory(Path(path))
        inventory.add({"host": f"node-{number}", "device_type": "cpu"})
        try:
            inventory.save()
        except ConfigError as error:
            if "meanwhile" not in error.detail:
                raise
        else:
            return


def test_writers_at_the_same_time_lose_nothing(file: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=add_until_done, args=(str(file), number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    hosts = {node.host for node in load_cluster(file).value.nodes}
    assert hosts == {"localhost", "node-0", "node-1", "node-2", "node-3"}
    assert [path.name for path in file.parent.iterdir()] == ["cluster.yaml"]


def test_a_node_written_out_reads_back_as_itself(tmp_path: Path) -> None:
    node = NodeSpec(
        host="fe80::1",
        name="on",
        chip="x: # y",
        memory_gb=0.5,
        ssh_user="ada",
        identity="/keys/a b/id",
        jump="me@[::1]:22",
        python="~/p y/bin/python",
        environment="own",
        can_train=False,
    )
    file = tmp_path / "cluster.yaml"
    file.write_text("nodes:\n  - host: localhost\n")
    inventory = Inventory(file)
    inventory.add(node_values(node))
    assert inventory.save().value.nodes[1] == node


TEXTS = st.text(alphabet=st.sampled_from(list(" \t-:?[]{},#&*!|>'\"%@`~<=\\abyesno01.eE_xñ\u2028")), max_size=12)


@given(value=TEXTS)
def test_any_text_is_written_as_yaml_reads_it_back(value: str) -> None:
    for text in (f"k: {written(value)}", "{k: " + written(value) + "}", f"- {written(value)}"):
        read: Any = yaml.safe_load(text)
        assert (read["k"] if isinstance(read, dict) else read[0]) == value


def random_file(chance: random.Random) -> tuple[str, int]:
    """A cluster file in some layout, and how many nodes it has."""
    count, indent = chance.randrange(1, 4), chance.choice(("", "  ", "    "))
    lines = chance.choice(([], ["# top", ""], ["launch: {ranks: 1}"]))
    lines = [*lines, "nodes:" + chance.choice(("", "  # all of them"))]
    for number in range(count):
        if chance.random() < 0.3:
            lines.append(chance.choice(("", f"{indent}# number {number}", f"{indent}  # - host: no")))
        keys = [f"host: h{number}", *chance.sample([f"name: n{number}", "role: trainer", "chip: 'a # b'"], 2)]
        if chance.random() < 0.3:
            lines.append(f"{indent}- {{{', '.join(keys)}}}" + chance.choice(("", " # flow")))
            continue
        lines.append(f"{indent}- {keys[0]}")
        lines += [f"{indent}  {key}" + chance.choice(("", "  # why")) for key in keys[1:]]
    lines += chance.choice(([], ["", "# end"], ["retries:", "  worker_restarts: 1"], [f"{indent}# - host: commented"]))
    return "\n".join(lines) + chance.choice(("", "\n")), count


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_random_edits_of_random_layouts(seed: int) -> None:
    """YamlText proves each edit itself; here none is refused, and no comment outside a removed node is lost."""
    chance = random.Random(seed)
    source, count = random_file(chance)
    text = YamlText(source)
    data = yaml.safe_load(source)
    for step in range(chance.randrange(1, 6)):
        kind, at = chance.choice(("append", "set", "remove", "unset")), chance.randrange(count)
        if kind == "append":
            text.append(("nodes",), {"host": f"new{step}", "chip": "x, y"})
            data["nodes"].append({"host": f"new{step}", "chip": "x, y"})
            count += 1
        elif kind == "set":
            text.set(("nodes", at), "chip", f"chip {step}")
            data["nodes"][at]["chip"] = f"chip {step}"
        elif kind == "unset" and "chip" in data["nodes"][at] and len(data["nodes"][at]) > 1:
            text.remove_key(("nodes", at), "chip")
            del data["nodes"][at]["chip"]
        elif kind == "remove" and count > 1:
            text.remove_item(("nodes",), at)
            del data["nodes"][at]
            count -= 1
    assert json.dumps(text.data()) == json.dumps(data)
    own_lines = [line for line in source.splitlines() if line.strip().startswith("#")]
    for line in own_lines:
        assert line in text.text, text.text
