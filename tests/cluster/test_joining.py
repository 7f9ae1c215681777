"""Taking machines in: what is filled in, what stays as it was written. The calls: tests/cli/test_nodes.py."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from jupiter_engine.cluster.joining import completed, entry
from jupiter_engine.protocol.fleet import Gpu, NodeFacts
from jupiter_engine.settings.cluster import NodeSpec
from jupiter_engine.units import GIB

CPU = NodeFacts(
    name="box",
    host="box",
    system="Linux 6.1 x86_64",
    chip="AMD Ryzen 9",
    cores=16,
    cpu_percent=0.0,
    memory_total_bytes=int(31.2 * GIB),
    memory_used_bytes=0,
    disk_free_bytes=0,
    load_1m=0.0,
    python="3.12.1",
    twin="torch",
    accelerator="cpu",
)


def with_card(memory_bytes: int | None) -> NodeFacts:
    return replace(CPU, gpus=(Gpu(name="NVIDIA GeForce RTX 4090", memory_total_bytes=memory_bytes),))


def mac(memory_bytes: int) -> NodeFacts:
    return replace(CPU, twin="mlx", chip="Apple M4", memory_total_bytes=memory_bytes)


@pytest.mark.parametrize(
    ("facts", "kind", "chip", "memory_gb"),
    [
        (CPU, "cpu", "AMD Ryzen 9", 32.0),
        (mac(18 * GIB), "mac", "Apple M4", 18.0),
        (mac(16 * GIB), "mac", "Apple M4", 16.0),
        (with_card(24564 << 20), "nvidia", "NVIDIA GeForce RTX 4090", 24.0),
        (with_card(None), "nvidia", "NVIDIA GeForce RTX 4090", None),
        (mac(int(0.74 * GIB)), "mac", "Apple M4", 0.7),
    ],
)
def test_what_was_left_out_comes_from_the_machine(
    facts: NodeFacts, kind: str, chip: str, memory_gb: float | None
) -> None:
    node = completed(NodeSpec(host="box"), facts)
    assert (node.device_type, node.chip, node.memory_gb) == (kind, chip, memory_gb)


def test_what_a_person_wrote_stays() -> None:
    node = NodeSpec(host="box", device_type="cpu", chip="mine", memory_gb=5.0)
    assert completed(node, with_card(24 * GIB)) == node


def test_the_role_is_written_down_in_any_case_and_defaults_are_not() -> None:
    node = NodeSpec(host="box", name="Box", ssh_port=2222)
    assert list(entry(node).items()) == [("host", "box"), ("name", "Box"), ("role", "hybrid"), ("ssh_port", 2222)]
