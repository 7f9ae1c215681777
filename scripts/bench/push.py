"""Sending folders to a machine: Jupiter and rsync -a, through the same sshd, in the same run.

    .venv/bin/python scripts/bench/push.py [--rounds 5] [--folder /dev/shm] [--small 5000] [--large-mb 200]

Trees: many small files (4 KB each in folders of 100), one large file, both together, and the sources of this project.
Contestants take turns; printed are medians and the median of the ratios, round by round. `cold`: the machine has
nothing, and (for us) no file here has been hashed before; `unchanged`: the same once more; `changed`: one small file
is another. Ours goes over a connection that stands, as pushes do, and (`anew`) as a program that first calls, looks
after the node runner and lets go; rsync always calls, as it must. After every transfer the trees are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jupiter_engine.cluster.contents import HashCache  # noqa: E402
from jupiter_engine.cluster.runner import NodeRunner  # noqa: E402
from jupiter_engine.cluster.transfer import send_tree  # noqa: E402
from jupiter_engine.remote.ssh import connect  # noqa: E402
from jupiter_engine.settings.cluster import ConnectionSettings  # noqa: E402
from tests.sshd import Sshd, start_sshd  # noqa: E402

GOALS = {"cold": 1.2, "unchanged": 0.5}
OLD_S = 1.7e9
"""Modification time of the files: old enough that their hashes are remembered."""


# -- trees ---------------------------------------------------------------------------------------------
def make_trees(folder: Path, small: int, large_mb: int) -> dict[str, Path]:
    trees = {name: folder / name for name in ("small", "large", "mixed", "project")}
    chance = random.Random(7)
    for name in ("small", "mixed"):
        for i in range(small):
            path = trees[name] / f"part-{i // 100:03d}" / f"sample-{i:05d}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(chance.randbytes(4096))
    for name in ("large", "mixed"):
        trees[name].mkdir(exist_ok=True)
        with (trees[name] / "weights.bin").open("wb") as file:
            for _ in range(large_mb):
                file.write(chance.randbytes(1 << 20))
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    for line in filter(None, listed.decode().split("\0")):
        source, target = ROOT / line, trees["project"] / line
        if source.is_file() and not source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    for path in folder.rglob("*"):
        touch(path)
    return trees


def touch(path: Path) -> None:
    os.utime(path, (OLD_S, OLD_S))


# -- contestants ---------------------------------------------------------------------------------------
class Rsync:
    """rsync -a over ssh."""

    def __init__(self, server: Sshd, there: Path) -> None:
        self._config, self._there = server.ssh_config("bench"), there

    def send(self, tree: Path, to: str) -> None:
        target = self._there / "rsync" / to
        target.parent.mkdir(parents=True, exist_ok=True)
        argv = ["rsync", "-a", "--delete", "-e", f"ssh -F {self._config}", f"{tree}/", f"bench:{target}/"]
        subprocess.run(argv, check=True)

    def target(self, to: str) -> Path:
        return self._there / "rsync" / to


class Ours:
    """send_tree, calling anew or over a connection that stands."""

    def __init__(self, server: Sshd, folder: Path, there: Path) -> None:
        self._server, self._folder, self._there = server, folder, there
        self._trusted = server.trusted(folder / "known_hosts")

    async def runner(self, to: str) -> NodeRunner:
        connection = await connect(
            self._server.node(), ConnectionSettings(), known_hosts=self._trusted, ssh_config=None
        )
        runner = NodeRunner(connection, str(self._there / "ours" / to), sys.executable)
        await runner.ensure()
        return runner

    async def send(self, runner: NodeRunner, tree: Path, to: str) -> None:
        await send_tree(runner, tree, "tree", HashCache(self._folder / f"{to}.db"))

    async def send_anew(self, tree: Path, to: str) -> None:
        runner = await self.runner(to)
        try:
            await self.send(runner, tree, to)
        finally:
            await runner.connection.close()

    def target(self, to: str) -> Path:
        return self._there / "ours" / to / "tree"


# -- rounds --------------------------------------------------------------------------------------------
async def timed(work: Callable[[], Awaitable[None]]) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


def compare(tree: Path, got: Path) -> None:
    subprocess.run(["diff", "-rq", str(tree), str(got)], check=True)


def small_file(tree: Path) -> Path | None:
    return next((path for path in sorted(tree.rglob("*")) if path.is_file() and path.stat().st_size < 1 << 20), None)


async def one_round(name: str, tree: Path, i: int, ours: Ours, rsync: Rsync) -> dict[str, tuple[float, float, float]]:
    """(rsync, ours, ours over a standing connection) for each occasion, in seconds."""
    # The runner is on every machine long before a folder is sent.
    for to in (f"{name}-{i}", f"{name}-{i}-standing"):
        await (await ours.runner(to)).connection.close()
    standing = await ours.runner(f"{name}-{i}-standing")
    times: dict[str, tuple[float, float, float]] = {}
    changing = small_file(tree)
    for occasion in ("cold", "unchanged", "changed"):
        if occasion == "changed":
            if changing is None:
                continue
            # Longer as well: rsync looks at size and time only.
            changing.write_bytes(changing.read_bytes() + b"x")
            touch(changing)
        contestants: list[Callable[[], Awaitable[None]]] = [
            lambda: asyncio.to_thread(rsync.send, tree, f"{name}-{i}"),
            lambda: ours.send_anew(tree, f"{name}-{i}"),
            lambda: ours.send(standing, tree, f"{name}-{i}-standing"),
        ]
        took = [0.0, 0.0, 0.0]
        for turn in range(3):
            # Everyone begins once in three rounds, with nothing of the others left to be written to the disk.
            at = (turn + i) % 3
            await asyncio.to_thread(os.sync)
            took[at] = await timed(contestants[at])
        times[occasion] = (took[0], took[1], took[2])
        compare(tree, ours.target(f"{name}-{i}"))
        compare(tree, rsync.target(f"{name}-{i}"))
    await standing.connection.close()
    for path in (rsync.target(f"{name}-{i}"), ours.target(f"{name}-{i}").parent):
        shutil.rmtree(path)
    shutil.rmtree(ours.target(f"{name}-{i}-standing").parent)
    return times


async def run(arguments: argparse.Namespace, folder: Path) -> bool:
    server = start_sshd(folder / "sshd")
    met = True
    try:
        trees = make_trees(folder / "trees", arguments.small, arguments.large_mb)
        ours, rsync = Ours(server, folder, folder / "there"), Rsync(server, folder / "there")
        print(f"{'tree':9}{'':11}{'rsync':>9}{'ours':>9}{'ratio':>8}{'goal':>7}{'anew':>10}{'ratio':>8}")
        for name, tree in trees.items():
            if arguments.only and name not in arguments.only:
                continue
            rounds = [await one_round(name, tree, i, ours, rsync) for i in range(arguments.rounds)]
            for occasion in rounds[0]:
                columns = list(zip(*(one[occasion] for one in rounds), strict=True))
                theirs, anew, mine = (statistics.median(column) for column in columns)
                ratios = [statistics.median(o[at] / o[0] for o in (one[occasion] for one in rounds)) for at in (2, 1)]
                goal = GOALS.get(occasion)
                met = met and (goal is None or ratios[0] <= goal)
                shown = f"{theirs:8.2f}s{mine:8.2f}s{ratios[0]:8.2f}{f'{goal:7.1f}' if goal else '      -'}"
                print(f"{name:9}{occasion:11}{shown}{anew:9.2f}s{ratios[1]:8.2f}", flush=True)
    finally:
        server.stop()
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where all of it happens; /dev/shm leaves out the disk"
    )
    parser.add_argument("--small", type=int, default=5000, help="number of small files")
    parser.add_argument("--large-mb", type=int, default=200, help="size of the large file")
    parser.add_argument("--only", nargs="*", default=(), help="these trees only")
    arguments = parser.parse_args()
    if shutil.which("rsync") is None:
        print("rsync is not installed: nothing to compare with")
        return 2
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        (Path(name) / "sshd").mkdir()
        return 0 if asyncio.run(run(arguments, Path(name))) else 1


if __name__ == "__main__":
    sys.exit(main())
