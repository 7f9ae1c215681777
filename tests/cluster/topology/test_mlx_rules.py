"""Any cabling at all: MLX's own code, with its ssh calls answered in-process, and our planner choose the same."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from jupiter_engine.cluster.topology import plan_group
from tests.cluster.topology.test_mlx_agrees import assert_same
from tests.fake_tools import mac_tool
from tests.fake_tools.macs import FakeMac, cable, device, macs, tools


@pytest.fixture(scope="module")
def config() -> Any:
    pytest.importorskip("mlx._distributed_utils.config")
    return importlib.import_module("mlx._distributed_utils.config")


def answer(found: list[FakeMac], command: list[str]) -> str:
    """Standard output of MLX's `ssh [-o OPTION]... HOST COMMAND...`."""
    words = command[1:]
    while words[0] == "-o":
        words = words[2:]
    mac = next(mac for mac in found if mac.name == words[0])
    argv = words[1:] if len(words) > 2 else shlex.split(words[1])
    if argv[0] in ("echo", "sudo"):
        return ""
    text = mac_tool.answer(mac.state, argv[0], argv[1:])
    assert text is not None, argv
    return text


@contextlib.contextmanager
def no_ssh(config: Any, found: list[FakeMac], arguments: list[str]) -> Iterator[None]:
    def run(command: list[str], **options: Any) -> SimpleNamespace:
        text = answer(found, command)
        return SimpleNamespace(returncode=0, stdout=text if options.get("text") else text.encode())

    before, argv = config.run, sys.argv
    config.run, sys.argv = run, ["mlx.distributed_config", *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        config.run, sys.argv = before, argv


def mlx_hostfile(config: Any, found: list[FakeMac], *arguments: str) -> dict[str, Any] | None:
    """What MLX decides for these Macs; None where it gives up."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "hosts.json"
        hosts = ",".join(mac.name for mac in found)
        with no_ssh(config, found, ["--hosts", hosts, "--auto-setup", "--output-hostfile", str(out), *arguments]):
            try:
                config.main()
            except SystemExit:
                return None
        decided: dict[str, Any] = json.loads(out.read_text())
        return decided


@st.composite
def cabled(draw: st.DrawFn) -> list[FakeMac]:
    """Two to six Macs with any cables between them: none, several a pair, all of them; monitors in some sockets."""
    count = draw(st.integers(2, 6))
    generation, rdma = draw(st.sampled_from([(4, False), (5, False), (5, True)]))
    found = macs(count, sockets=10, generation=generation, rdma=rdma)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    wish = draw(st.sampled_from(["some", "ring", "mesh"]))
    chosen = draw(st.lists(st.sampled_from(pairs), max_size=10))
    if wish == "mesh":
        chosen = [*pairs, *chosen[:3]]
    elif wish == "ring":
        order = draw(st.permutations(range(count)))
        chosen += [pairs[_place(pairs, order[k - 1], order[k])] for k in range(0 if count > 2 else 1, count)]
    free = [0] * count
    cables = Counter[tuple[int, int]]()
    for i, j in draw(st.permutations(chosen)):
        cables[i, j] += 1
        # More than four between two is what MLX's configuration allows and its ring of RDMA then refuses.
        if max(free[i], free[j]) < 9 and cables[i, j] <= 4:
            cable(found[i], free[i], found[j], free[j])
            free[i] += 1
            free[j] += 1
    for mac in draw(st.lists(st.sampled_from(found), max_size=2, unique_by=lambda mac: mac.name)):
        mac.plug(9, device("Studio Display"))
    return found


def _place(pairs: list[tuple[int, int]], i: int, j: int) -> int:
    return pairs.index((min(i, j), max(i, j)))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(found=cabled())
def test_any_cabling(config: Any, found: list[FakeMac]) -> None:
    theirs = mlx_hostfile(config, found)
    ours = plan_group("group", tools(found), twin="mlx", over="thunderbolt")
    event(theirs["backend"] if theirs else "none")
    if theirs is None:
        assert ours.hostfile == {}
        assert ours.problems
        return
    assert_same(ours, theirs)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(found=cabled(), backend=st.sampled_from(["ring", "jaccl", "jaccl-ring"]))
def test_a_backend_that_is_asked_for(config: Any, found: list[FakeMac], backend: Any) -> None:
    theirs = mlx_hostfile(config, found, "--backend", backend)
    ours = plan_group("group", tools(found), twin="mlx", over="thunderbolt", backend=backend)
    if theirs is None:
        assert ours.hostfile == {}
        return
    assert_same(ours, theirs)
