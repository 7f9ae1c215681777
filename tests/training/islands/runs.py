"""Runs with islands on this machine, and audits of what their ledger says."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil

from jupiter_engine.files import ProcessIdentity
from jupiter_engine.protocol.facts import RunState
from jupiter_engine.protocol.specs import IslandSpec, LaunchSpec, RoundSpec, Twin
from jupiter_engine.training.distributed import reports
from jupiter_engine.training.distributed.islands.island import block_tokens
from jupiter_engine.worker.train import check
from tests.training.nano import Run


def one_rank(twin: Twin = "torch") -> LaunchSpec:
    return LaunchSpec(twin=twin, threads_per_rank=1)


def two_ranks(twin: Twin) -> LaunchSpec:
    return LaunchSpec(
        twin=twin,
        ranks=2,
        launcher="torchrun" if twin == "torch" else "mlx.launch",
        threads_per_rank=1,
        restarts_per_hour=60,
    )


def islands(rounds: RoundSpec, **launches: LaunchSpec) -> LaunchSpec:
    made = tuple(IslandSpec(name=name, launch=launch) for name, launch in launches.items())
    return LaunchSpec(
        twin=next(iter(launches.values())).twin,
        ranks=sum(launch.ranks for launch in launches.values()),
        islands=made,
        rounds=rounds,
        restarts_per_hour=60,
    )


def start_hub(run: Run) -> subprocess.Popen[bytes]:
    with (run.folder / "worker.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "jupiter_engine.worker", str(run.folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def island_folder(run: Run, name: str) -> Path:
    return run.folder.with_name(f"{run.folder.name}.{name}")


def worker_of(folder: Path) -> psutil.Process | None:
    path = folder / "state.json"
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunState).worker.process()
    except psutil.NoSuchProcess:
        return None


def ranks_of(folder: Path) -> list[psutil.Process]:
    """Live rank processes of an island's newest launch."""
    path = folder / "ranks" / "group.json"
    if not path.exists():
        return []
    group = msgspec.json.decode(path.read_bytes(), type=reports.Group)
    reader = reports.ReportReader(folder / "ranks" / str(group.generation), 2)
    ready: list[ProcessIdentity] = [one.process for _, one in reader.read() if isinstance(one, reports.Ready)]
    return [process for identity in ready if (process := identity.process()) is not None]


@contextlib.contextmanager
def ending(run: Run) -> Iterator[None]:
    """Leave no process of the run behind."""
    try:
        yield
    finally:
        folders = [run.folder, *(island_folder(run, one.name) for one in run.order.launch.islands)]
        for folder in folders:
            for process in [worker_of(folder), *ranks_of(folder)]:
                if process is not None:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.send_signal(signal.SIGKILL)


def wait_for(what: Callable[[], object], run: Run, *, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, log_of(run)
        time.sleep(0.05)


def merged_blocks(run: Run) -> int:
    path = run.folder / "rounds.db"
    if not path.exists():
        return 0
    with contextlib.closing(sqlite3.connect(path, timeout=30)) as db:
        try:
            return int(db.execute("SELECT count(*) FROM merges").fetchone()[0])
        except sqlite3.OperationalError:
            return 0  # not made yet


def log_of(run: Run) -> str:
    parts = [run.folder / "worker.log", run.folder / "events.jsonl"]
    for island in run.order.launch.islands:
        folder = island_folder(run, island.name)
        parts += [folder / "worker.log", folder / "events.jsonl", *sorted(folder.glob("ranks/*/output.log"))]
    return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in parts if path.exists())


def audit(run: Run) -> None:
    """Every block of the data counts exactly once, with the tokens that the data has, and nothing is left over."""
    tokens = block_tokens(check(run.order, run.folder).data, run.order.recipe)
    with contextlib.closing(sqlite3.connect(run.folder / "rounds.db")) as db:
        blocks = db.execute("SELECT block, tokens, lease, round FROM blocks ORDER BY block").fetchall()
        merges = db.execute("SELECT block, round, island, attempt FROM merges ORDER BY block").fetchall()
        taken = db.execute(
            "SELECT round, island, attempt, used, tokens FROM contributions WHERE verdict = 'merged'"
        ).fetchall()
    assert [(block, count) for block, count, _, _ in blocks] == list(enumerate(tokens))
    assert all(lease is None and number is not None for _, _, lease, number in blocks)
    assert [block for block, *_ in merges] == list(range(len(tokens)))
    assert len({(number, island) for number, island, *_ in taken}) == len(taken)
    for number, island, attempt, used, count in taken:
        mine = [block for block, *rest in merges if tuple(rest) == (number, island, attempt)]
        assert len(mine) == used
        assert sum(tokens[block] for block in mine) == count
    assert sum(row[4] for row in taken) == sum(tokens) == run.metrics()[-1].tokens
    steps = [metric.step for metric in run.metrics()]
    assert steps == sorted(set(steps))
    assert steps[-1] == len(tokens)
