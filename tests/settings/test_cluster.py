"""Cluster files: every key, every rule, and what this machine may do."""

from __future__ import annotations

import platform
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import inspect as mi

from jupiter_engine.errors import ConfigError
from jupiter_engine.settings import cluster
from jupiter_engine.settings.cluster import ClusterSettings, launch_spec, load_cluster, local_roles, local_twin
from jupiter_engine.settings.reader import Loaded, leaves

BASE = "nodes: [{host: mac-1.local}]\n"
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
    "nodes[].can_generate": "nodes: [{host: mac-1.local, can_generate: false}]",
    "nodes[].can_train": "nodes: [{host: mac-1.local, can_train: false}]",
    "launch": BASE + "launch: {ranks: 2}",
    "launch.twin": BASE + "launch: {twin: mlx}",
    "launch.ranks": BASE + "launch: {ranks: 2}",
    "launch.launcher": BASE + "launch: {launcher: in_process}",
    "launch.threads_per_rank": BASE + "launch: {threads_per_rank: 1}",
    "retries": BASE + "retries: {worker_restarts: 1}",
    "retries.worker_restarts": BASE + "retries: {worker_restarts: 1}",
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

    before, after = (msgspec.to_builtins(load(tmp_path, text).value) for text in (BASE, CHANGES[key]))
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


def test_another_machine_is_left_out_with_a_notice(tmp_path: Path) -> None:
    loaded = load(tmp_path, "nodes:\n- host: localhost\n- host: rtx.lan\n  device_type: nvidia\n")
    (warning,) = loaded.warnings
    assert "line 3" in warning
    assert "rtx.lan, another machine; this version runs on this machine only" in warning
    assert local_roles(loaded.value) == {"generate", "train", "evaluate"}


def test_ssh_settings_of_this_machine_are_pointed_out(tmp_path: Path) -> None:
    loaded = load(tmp_path, "nodes: [{host: localhost, ssh_port: 22, ssh_user: null}]")
    (warning,) = loaded.warnings
    assert "`nodes[0].ssh_port` has no effect" in warning


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
