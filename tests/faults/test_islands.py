"""kill -9 of the hub, an island's worker, its launcher or any rank, at any time: no token counts twice or is lost.

The ledger is compared with the data at the end (runs.audit): every block was merged exactly once, with the tokens that
the snapshot holds for it.
"""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from jupiter_engine.checkpoints.model_folder import verify
from jupiter_engine.protocol.specs import LaunchSpec, RoundSpec, Twin
from jupiter_engine.training.distributed.islands import exchange
from tests.training.islands.runs import (
    audit,
    ending,
    island_folder,
    islands,
    log_of,
    merged_blocks,
    one_rank,
    ranks_of,
    start_hub,
    two_ranks,
    wait_for,
    worker_of,
)
from tests.training.nano import INFO, Run, make_run, recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 600
ROUNDS = RoundSpec(round_s=1.0, grace_s=3.0, quorum=1, payload="int8", max_steps=12)


def prepared(root: Path, **launches: LaunchSpec) -> Run:
    return make_run(root, recipe(steps=STEPS, checkpoint_every_steps=7), islands(ROUNDS, **launches))


def victims(run: Run, kind: str) -> list[psutil.Process]:
    """Living processes of a kind: hub, worker, rank."""
    if kind == "hub":
        found = [worker_of(run.folder)]
    else:
        folders = [island_folder(run, island.name) for island in run.order.launch.islands]
        found = [worker_of(folder) for folder in folders]
        if kind == "rank":
            found = [process for folder in folders for process in ranks_of(folder)]
    return [process for process in found if process is not None]


def kill_one(run: Run, kind: str, chance: random.Random) -> str:
    there = victims(run, kind)
    if not there:
        return ""
    victim = chance.choice(there)
    try:
        victim.kill()
        victim.wait(timeout=10)
    except psutil.NoSuchProcess:
        return ""
    return f"{kind} {victim.pid}"


@pytest.mark.parametrize(("seed", "twin"), [(1, "torch"), (2, "torch"), (3, "mlx")])
def test_anything_may_be_killed_at_any_time(seed: int, twin: Twin, tmp_path: Path) -> None:
    chance = random.Random(seed)
    run = prepared(tmp_path, solo=one_rank(), pair=two_ranks(twin))
    killed: list[str] = []
    with ending(run):
        hub: subprocess.Popen[bytes] = start_hub(run)
        wait_for(lambda: merged_blocks(run), run)
        kinds = ["hub", "worker", "rank", "hub", "rank", "worker"]
        chance.shuffle(kinds)
        for kind in kinds:
            time.sleep(chance.uniform(0.2, 5.0))
            if hub.poll() is not None:
                break
            name = kill_one(run, kind, chance)
            if name:
                killed.append(f"{name} at {merged_blocks(run)}")
            if kind == "hub":
                hub.wait(timeout=20)
                # For a while the islands are alone.
                time.sleep(chance.uniform(0.0, 2.0))
                hub = start_hub(run)
        assert hub.wait(timeout=400) == 0, f"{killed}\n{log_of(run)}"
    print(f"killed: {killed}")
    assert len(killed) >= 3
    audit(run)
    assert verify(Path(run.order.target)) == INFO
    assert all(np.isfinite(value).all() for value in run.weights().values())


def test_islands_train_on_without_a_hub_and_the_next_hub_finds_them(tmp_path: Path) -> None:
    run = prepared(tmp_path, a=one_rank(), b=one_rank())
    with ending(run):
        hub = start_hub(run)
        wait_for(lambda: merged_blocks(run) >= 24, run)
        workers = {process.pid for process in victims(run, "worker")}
        hub.kill()
        hub.wait(timeout=20)
        done = merged_blocks(run)
        steps = {name: len((island_folder(run, name) / "metrics.jsonl").read_bytes().splitlines()) for name in "ab"}
        # Patience and a round's time: then they go on, offer the longer work, and in the end wait.
        plan = exchange.newest_plan(run.folder / "exchange")
        assert plan is not None
        newest = plan.round
        wait_for(
            lambda: all((name, 2) in exchange.attempts(run.folder / "exchange", newest) for name in "ab"),
            run,
        )
        assert merged_blocks(run) == done
        for name in "ab":
            now = len((island_folder(run, name) / "metrics.jsonl").read_bytes().splitlines())
            assert now > steps[name]
        assert {process.pid for process in victims(run, "worker")} == workers
        second = start_hub(run)
        wait_for(lambda: merged_blocks(run) > done, run)
        assert {process.pid for process in victims(run, "worker")} == workers
        assert second.wait(timeout=300) == 0, log_of(run)
    audit(run)


def test_a_halt_rests_everything_and_the_run_goes_on_from_there(tmp_path: Path) -> None:
    run = prepared(tmp_path, a=one_rank(), b=one_rank())
    with ending(run):
        hub = start_hub(run)
        wait_for(lambda: merged_blocks(run) >= 24, run)
        hub.terminate()
        assert hub.wait(timeout=120) == 75, log_of(run)
        assert victims(run, "worker") == []
        (run.folder / "inbox" / "halt").unlink()
        done = merged_blocks(run)
        again = start_hub(run)
        wait_for(lambda: merged_blocks(run) > done, run)
        assert again.wait(timeout=300) == 0, log_of(run)
    audit(run)
