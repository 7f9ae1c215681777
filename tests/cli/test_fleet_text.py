"""Nodes, groups and transfers as lines of text."""

from __future__ import annotations

import io
import sys

import pytest
from msgspec.structs import replace

from jupiter_engine.cli.fleet_text import Ticker, node_rows, plan_lines, transfer_text
from jupiter_engine.protocol.fleet import Fix, Gpu, GroupPlan, Link, NodeFacts, NodeStatus, Transfer

FACTS = NodeFacts(
    name="rtx",
    host="rtx.lan",
    system="Linux",
    chip="AMD Ryzen 9",
    cores=16,
    cpu_percent=3.0,
    memory_total_bytes=64 << 30,
    memory_used_bytes=1 << 30,
    disk_free_bytes=100 << 30,
    load_1m=0.1,
    python="3.12",
    twin="torch",
    accelerator="CUDA",
    gpus=(Gpu(name="RTX 4090", memory_total_bytes=24 << 30),),
    rtt_s=0.0123,
    environment="0123456789abcdef",
)
STATUS = NodeStatus(name="rtx", host="rtx.lan", role="trainer", local=False, state="online", facts=FACTS)
SENDING = Transfer(
    what="environment", sent_bytes=3 << 20, total_bytes=10 << 20, bytes_per_s=float(1 << 20), eta_s=7.0, step="sending"
)


def test_a_node_with_a_card_is_its_card() -> None:
    head, card, unknown = node_rows([STATUS, replace(STATUS, name="new", state="lost", facts=None)])
    said = dict(zip(head, card, strict=True))
    assert (said["CHIP"], said["MEMORY"], said["TRAINS WITH"]) == ("RTX 4090", "24.0 GiB", "torch (CUDA)")
    assert (said["ENVIRONMENT"], said["RTT"]) == ("0123456789ab", "12.3 ms")
    assert unknown == ("new", "rtx.lan", "trainer", "lost", "-", "-", "-", "-", "-", "-")


def test_a_group_tells_its_cables_and_what_has_to_be_done() -> None:
    plan = GroupPlan(
        name="macs",
        nodes=("a", "b"),
        twin="mlx",
        backend="jaccl",
        launcher="mlx.launch",
        reason="Every pair is wired with Thunderbolt 5 and has RDMA.",
        links=(
            Link(
                a="a",
                b="b",
                kind="thunderbolt",
                a_interface="en3",
                b_interface="en4",
                a_address="10.0.0.1",
                speed_bits_per_s=80_000_000_000,
                rtt_s=0.00031,
                rdma=("rdma_en3", "rdma_en4"),
            ),
        ),
        setup=(Fix(text="give en3 its address", argv=("sudo", "ifconfig", "en3", "inet", "10.0.0.1"), node="a"),),
        problems=("b has not said yet what it is.",),
    )
    assert plan_lines(plan) == [
        "macs: 2 node(s), mlx, backend jaccl, launcher mlx.launch",
        "  Every pair is wired with Thunderbolt 5 and has RDMA.",
        "  0  a",
        "  1  b",
        "  a en3 10.0.0.1 ═══ b en4  (thunderbolt, 80 Gb/s, 0.31 ms, RDMA rdma_en3, rdma_en4)",
        "  !! b has not said yet what it is.",
        "  before the first launch:",
        "    on a: sudo ifconfig en3 inet 10.0.0.1",
    ]


def test_a_transfer_is_told_with_its_rate() -> None:
    assert transfer_text(SENDING) == "environment: sending 3.0 MiB of 10.0 MiB, 1.0 MiB/s, 7s left"
    assert transfer_text(replace(SENDING, total_bytes=0, bytes_per_s=None, eta_s=None, step="installing")) == (
        "environment: installing"
    )


def test_where_nobody_watches_there_is_a_line_for_each_step_and_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with Ticker() as ticker:
        for sent in (0, 1 << 19, 1 << 20, 1 << 20):
            ticker.tell("rtx", replace(SENDING, sent_bytes=sent))
        ticker.tell("rtx", replace(SENDING, step="in\x1b[2Jstalling"))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert "\x1b" not in said[2]


def test_on_a_terminal_one_line_is_written_over_and_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Ticker() as ticker:
        ticker.tell("a", SENDING)
        ticker.tell("b", SENDING)
    text = terminal.getvalue()
    assert "\n" not in text
    assert text.count("\r") == 4
    assert text.endswith(" \r")
