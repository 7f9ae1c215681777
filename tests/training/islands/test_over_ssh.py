"""A run with one island beside the hub and one behind a real sshd: started, carried to and from, and ended over ssh."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from jupiter_engine.protocol.specs import HostSpec, IslandSpec, RoundSpec
from jupiter_engine.training.distributed.islands import exchange
from jupiter_engine.training.distributed.islands.ledger import Ledger
from tests.node.kept import Node
from tests.sshd import start_sshd
from tests.training.islands.runs import audit, ending, islands, log_of, one_rank, start_hub
from tests.training.nano import make_run, recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(sys.platform != "linux", reason="the node's processes are found in /proc"),
]

ROOT = Path(__file__).resolve().parents[3]


def test_an_island_behind_ssh_takes_part_with_a_folder_of_its_own(tmp_path: Path) -> None:
    server = start_sshd(tmp_path / "sshd")
    config = server.ssh_config("islander")
    node = Node(tmp_path, sys.executable)
    far_folder = tmp_path / "far" / "runs" / "nano-0001-train.far"
    node.keep_folder = far_folder / "node"
    leader = HostSpec(
        name="mini",
        ssh="islander",
        ranks=1,
        runner=(node.python, str(node.file)),
        python=sys.executable,
        run_folder=str(far_folder),
        addresses=("127.0.0.1",),
        env={"PYTHONPATH": str(ROOT), node.mark: "1"},
    )
    rounds = RoundSpec(round_s=100.0, grace_s=100.0, quorum=2, payload="int8", max_steps=20)
    launch = islands(rounds, near=one_rank())
    far = IslandSpec(name="far", launch=one_rank(), leader=leader)
    launch = msgspec.structs.replace(launch, islands=(*launch.islands, far), ssh_config=str(config), ranks=2)
    run = make_run(tmp_path, recipe(steps=80), launch)
    try:
        with ending(run):
            assert start_hub(run).wait(timeout=350) == 0, log_of(run)
        audit(run)
        result = run.events("finished")[0]["result"]
        assert result["last_loss"] < result["first_loss"] - 1.0
        # Its folder is not the hub's: what lies there came over ssh, and the other way.
        there = far_folder / "exchange"
        end = exchange.read(there / exchange.END, exchange.End)
        assert end is not None
        assert end.reason == "done"
        assert exchange.newest_plan(there) is not None
        far_bytes, near_bytes = result["islands"]["far"], result["islands"]["near"]
        for way in ("down_bytes", "up_bytes"):
            # Plans and signs of life come on top of what both have: bases and contributions.
            assert near_bytes[way] <= far_bytes[way] < 2 * near_bytes[way]
        ledger = Ledger(run.folder / "rounds.db")
        assert {island for _, _, island, _ in ledger.merges()} == {"near", "far"}
        ledger.close()
    finally:
        node.clean()
        server.stop()
