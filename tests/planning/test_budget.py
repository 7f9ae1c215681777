from __future__ import annotations

from jupiter_engine.planning.budget import CUDA_CONTEXT, device_from_settings, device_of
from jupiter_engine.protocol.fleet import Gpu, NodeFacts
from jupiter_engine.settings.cluster import NodeSpec
from jupiter_engine.units import GIB

FACTS = NodeFacts(
    name="n", host="h", system="Linux 6.1 x86_64", chip="EPYC", cores=8, cpu_percent=0.0, memory_total_bytes=32 * GIB,
    memory_used_bytes=GIB, disk_free_bytes=GIB, load_1m=0.0, python="3.11", twin="torch", accelerator="cpu",
)  # fmt: skip


def facts(**changes: object) -> NodeFacts:
    from msgspec.structs import replace

    return replace(FACTS, **changes)


def test_a_processor_leaves_the_system_its_share() -> None:
    device = device_of(FACTS)
    assert device.kind == "cpu"
    assert device.allowed is not None
    assert 29 * GIB < device.allowed < 31 * GIB
    small = device_of(facts(memory_total_bytes=4 * GIB)).allowed
    assert small == 3 * GIB


def test_a_mac_gives_two_thirds_or_what_its_limit_says() -> None:
    mac = {"twin": "mlx", "accelerator": "Metal", "system": "Darwin 25", "chip": "Apple M4"}
    assert device_of(facts(**mac, memory_total_bytes=16 * GIB)).allowed == int(16 * GIB * 2 / 3)
    assert device_of(facts(**mac, memory_total_bytes=64 * GIB)).allowed == 48 * GIB
    assert device_of(facts(**mac, memory_total_bytes=16 * GIB, wired_limit_mb=13 * 1024)).allowed == 13 * GIB
    assert device_of(facts(**mac, memory_total_bytes=16 * GIB, wired_limit_mb=0)).allowed == int(16 * GIB * 2 / 3)


def test_the_smallest_card_counts_less_the_drivers_part() -> None:
    cards = (
        Gpu(name="NVIDIA GeForce RTX 4090", memory_total_bytes=24 * GIB, power_limit_w=450.0),
        Gpu(name="NVIDIA GeForce RTX 3080", memory_total_bytes=10 * GIB, power_limit_w=320.0),
    )
    device = device_of(facts(gpus=cards, accelerator="CUDA"))
    assert (device.kind, device.cards, device.allowed) == ("cuda", 2, 10 * GIB - CUDA_CONTEXT)
    assert device.power_w == 320.0
    assert device.ranks_on_one_pool(2) == 1
    assert device.ranks_on_one_pool(3) == 2
    assert device_of(FACTS).ranks_on_one_pool(2) == 2


def test_memory_that_nobody_told_is_unknown() -> None:
    assert device_of(facts(memory_total_bytes=0)).allowed is None
    assert device_of(facts(gpus=(Gpu(name="card"),))).allowed is None
    assert device_from_settings(NodeSpec(host="far"), None).allowed is None


def test_the_cluster_file_speaks_for_machines_that_were_not_asked() -> None:
    box = device_from_settings(NodeSpec(host="far", device_type="nvidia", memory_gb=24, chip="RTX 4090"), None)
    assert (box.kind, box.twin, box.allowed) == ("cuda", "torch", 24 * GIB - CUDA_CONTEXT)
    assert not box.measured
    assert "cluster.yaml" in box.why
    mac = device_from_settings(NodeSpec(host="far", device_type="mac", memory_gb=16, chip="Apple M4"), "mlx")
    assert (mac.kind, mac.allowed) == ("metal", int(16 * GIB * 2 / 3))
