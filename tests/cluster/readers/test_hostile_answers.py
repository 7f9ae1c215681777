"""Whatever a node's tools print, a reader gives a record that can be sent on, or ToolOutput: never anything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jupiter_engine.cluster.machine import NodeTools
from jupiter_engine.cluster.readers.reading import ToolOutput
from jupiter_engine.cluster.topology import plan_group
from jupiter_engine.protocol.fleet import GroupPlan
from tests.cluster.readers.answers import REAL
from tests.fake_tools.macs import ring

EXAMPLES = 60
QUICK = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])

NAMES = sorted(REAL)
KEYS = [
    "SPThunderboltDataType", "SPHardwareDataType", "_items", "domain_uuid_key", "receptacle_1_tag", "receptacle_id_key",
    "current_speed_key", "_name", "device_name_key", "number_processors", "physical_memory", "ifname", "flags",
    "addr_info", "family", "local", "prefixlen", "linkinfo", "info_kind", "dst", "dev", "gateway", "operstate",
]  # fmt: skip
VALUES = ["inet", "UP", "default", "10.0.0.1", "10.0.0.0/99", "80 Gb/s", "0" * 40, "\x1b[2J", "A" * 300, "\ud800"]

documents: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(VALUES) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=6)
    ),
    max_leaves=25,
)


def read(name: str, raw: object) -> None:
    reader: Callable[[object], object] = REAL[name][0]
    try:
        found = reader(raw)
    except ToolOutput as error:
        found = [error.detail, error.fix]
        named = bool(error.tool) and error.tool in error.detail
    else:
        named = True
    assert named
    # A record that could not be sent to a viewer would break there, far from its cause.
    msgspec.json.encode(found)


@pytest.mark.parametrize("name", NAMES)
@QUICK
@given(raw=st.text() | st.binary() | st.none() | st.integers())
def test_any_text_or_bytes(name: str, raw: object) -> None:
    read(name, raw)


@pytest.mark.parametrize("name", ["thunderbolt_ports", "mac_hardware", "linux_interfaces", "linux_routes"])
@QUICK
@given(document=documents, decoded=st.booleans())
def test_any_json(name: str, document: Any, decoded: bool) -> None:
    if name in ("thunderbolt_ports", "mac_hardware") and isinstance(document, list):
        document = {"SPThunderboltDataType": document, "SPHardwareDataType": document}
    read(name, document if decoded else json.dumps(document))


@pytest.mark.parametrize("name", NAMES)
@QUICK
@given(data=st.data())
def test_damaged_real_answers(name: str, data: st.DataObject) -> None:
    """Real answers with pieces cut out, doubled, or replaced."""
    text = REAL[name][1]
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 80)))
        middle = data.draw(st.just("") | st.just(text[start:end] * 2) | st.sampled_from(VALUES) | st.text(max_size=10))
        text = text[:start] + middle + text[end:]
    read(name, text if data.draw(st.booleans()) else text.encode("utf-8", "surrogatepass"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_plan_is_made_of_anything(data: st.DataObject) -> None:
    """Nodes whose answers were tampered with: there is a plan, and it can be sent and read again."""
    macs = ring(3, generation=5, rdma=True)
    nodes: list[NodeTools] = []
    for mac in macs:
        raw: dict[str, Any] = dict(mac.raw())
        for key in data.draw(st.lists(st.sampled_from(sorted(raw)), max_size=4)):
            text = raw[key]
            if isinstance(text, str):
                start = data.draw(st.integers(0, len(text)))
                end = data.draw(st.integers(start, min(len(text), start + 200)))
                other = raw[data.draw(st.sampled_from(sorted(raw)))]
                raw[key] = data.draw(
                    st.just(text[:start] + text[end:]) | st.just(other) | st.none() | st.binary(max_size=40) | documents
                )
        nodes.append(NodeTools(name=mac.name, system="Darwin", raw=raw))
    made = plan_group("group", nodes, twin=data.draw(st.sampled_from(["mlx", "torch"])))
    assert msgspec.json.decode(msgspec.json.encode(made), type=GroupPlan) == made
    assert made.hostfile or made.problems or made.twin == "torch"
