"""Training speed against what people use today: same shape, same data, same machine, same run.

    .venv/bin/python scripts/bench/train.py --case torch|mlx|ranks|checkpoint|data [--twin torch|mlx] [--shape 15m|135m]
        [--rounds 5] [--seconds 15] [--threads N] [--batch 8] [--micro 4] [--sequence 512] [--compile auto|on|off]

Every contestant is a process of its own that runs its own real loop (train_contestant.py). They take turns, in another
order each round, while the others wait; ratios are medians over the rounds of the ratio within a round, so that a
machine whose speed drifts, or that others use, favours none. Processor time is printed beside wall time: on a busy
machine it is the steadier of the two.

torch       Jupiter, Hugging Face Trainer (eager and compiled), litgpt's pretrain and a nanochat-style loop, bfloat16
mlx         Jupiter and mlx_lm.lora --fine-tune-type full, float32 (MLX has no fast bfloat16 on CPUs)
ranks       two ranks against twice one rank, each pinned to a core of its own with one thread; also two ranks that do
            not talk to each other, which shows what the machine's shared memory costs
checkpoint  Jupiter with an asynchronous checkpoint every four steps and without
data        share of a step that Jupiter waits for its data (a memory-mapped snapshot)

litgpt is installed by pip into a folder under the cache folder (JUPITER_BENCH_CACHE, or ~/.cache/jupiter-bench) once.
How many tokens packing wastes: scripts/bench/packing.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CONTESTANT = Path(__file__).with_name("train_contestant.py")
LITGPT = ("litgpt==0.5.13", "lightning==2.6.6", "torchmetrics", "lightning-utilities", "jsonargparse<=4.41")
LITGPT_ALSO = ("docstring-parser", "typeshed-client", "importlib_resources", "typing_extensions")
SHAPES: dict[str, dict[str, Any]] = {
    "15m": {"hidden_size": 384, "layers": 7, "heads": 6, "kv_heads": 6, "intermediate_size": 1024, "vocab_size": 8192},
    "135m": {
        "hidden_size": 576, "layers": 30, "heads": 9, "kv_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
    },
}  # fmt: skip
CHECKPOINT_EVERY = 4


@dataclass(frozen=True)
class Entry:
    """A line of the table: one or more processes that work at the same time."""

    label: str
    contestant: str
    options: dict[str, Any]
    ranks: int = 1
    together: bool = True
    """Several ranks form one group; else each is alone."""
    pinned: bool = False


class Runner:
    """The processes of one entry."""

    def __init__(self, entry: Entry, settings: argparse.Namespace, folder: Path, rows: Path) -> None:
        self.entry = entry
        own = folder / f"{len(list(folder.iterdir()))}"
        own.mkdir()
        self.log = own / "log"
        group = entry.ranks if entry.together else 1
        threads = 1 if entry.pinned else settings.threads
        task = {
            "shape": shape_of(settings), "batch": settings.batch * group, "micro": settings.micro,
            "learning_rate": 3e-4, "threads": threads, "options": entry.options | {"ranks": group},
        }  # fmt: skip
        (own / "settings.json").write_text(json.dumps(task))
        ports = [free_port() for _ in range(entry.ranks)]
        hosts = own / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        self._children: list[subprocess.Popen[str]] = []
        for rank in range(entry.ranks):
            environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
            environment |= {"PYTHONPATH": f"{ROOT}:{litgpt_folder()}", "HF_HUB_OFFLINE": "1"}
            if group > 1:
                environment |= {
                    "RANK": str(rank), "WORLD_SIZE": str(group),
                    "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(group),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0]),
                    "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "JUPITER_RANKS": str(group),
                }  # fmt: skip
            pin = ["taskset", "-c", str(sorted(os.sched_getaffinity(0))[rank])] if entry.pinned else []
            argv = [*pin, sys.executable, str(CONTESTANT), entry.contestant, str(own / "settings.json"), str(rows)]
            with self.log.open("a") as log:
                self._children.append(
                    subprocess.Popen(
                        argv,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                        env=environment,
                        start_new_session=True,
                    )
                )

    def go(self, steps: int) -> dict[str, float]:
        """Train so many steps; the slowest rank's seconds, the processor time of all."""
        for child in self._children:
            assert child.stdin is not None
            child.stdin.write(f"go {steps}\n")
            child.stdin.flush()
        answers = []
        for child in self._children:
            assert child.stdout is not None
            line = child.stdout.readline()
            if not line:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                raise SystemExit(f"{self.entry.label} ended:\n{tail}")
            answers.append(json.loads(line))
        facts: dict[str, float] = dict(answers[0])
        facts["seconds"] = max(answer["seconds"] for answer in answers)
        facts["cpu"] = sum(answer["cpu"] for answer in answers)
        return facts

    def close(self) -> None:
        for child in self._children:
            assert child.stdin is not None
            child.stdin.close()
        for child in self._children:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


def shape_of(settings: argparse.Namespace) -> dict[str, Any]:
    shape = SHAPES[settings.shape]
    head = shape["hidden_size"] // shape["heads"]
    return shape | {"head_dim": head, "context": settings.sequence, "tied": not settings.untied}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def litgpt_folder() -> Path:
    cache = os.environ.get("JUPITER_BENCH_CACHE") or Path.home() / ".cache" / "jupiter-bench"
    return Path(cache) / LITGPT[0]


def install_litgpt() -> None:
    """Without its dependencies on torch and others, which are here."""
    if not (litgpt_folder() / "litgpt").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(litgpt_folder())]
        subprocess.run([*pip, *LITGPT, *LITGPT_ALSO], check=True)


def entries(settings: argparse.Namespace) -> list[Entry]:
    """The first is the one that the others are compared with."""
    ours = f"jupiter {settings.twin}"
    own = {"compile": settings.compile}
    match settings.case:
        case "torch":
            install_litgpt()
            return [
                Entry(f"jupiter ({settings.compile})", ours, own),
                Entry("Hugging Face Trainer", "Hugging Face Trainer", {}),
                Entry("HF Trainer, torch_compile", "Hugging Face Trainer", {"compile": "on"}),
                Entry("litgpt pretrain", "litgpt", {}),
                Entry("nanochat-style", "nanochat-style", {}),
            ]
        case "mlx":
            names = ("mlx_lm.lora full", "mlx_lm.lora full + embeddings")
            return [Entry("jupiter", ours, own), *(Entry(name, name, {}) for name in names)]
        case "ranks":
            return [
                Entry("one rank", ours, own, pinned=True),
                Entry("two ranks", ours, own, ranks=2, pinned=True),
                Entry("two alone", ours, own, ranks=2, together=False, pinned=True),
            ]
        case "checkpoint":
            return [
                Entry("without", ours, own),
                Entry(f"every {CHECKPOINT_EVERY} steps", ours, own | {"checkpoint_every": CHECKPOINT_EVERY}),
            ]
        case _:
            return [Entry("jupiter", ours, own)]


def measure(runners: list[Runner], settings: argparse.Namespace, rounds: list[list[dict[str, float]]]) -> None:
    """Fill `rounds` (x runners) with facts a step. Two steps warm each up, one more says how many make a round."""
    for runner in runners:
        runner.go(2)
    steps = []
    for runner in runners:
        guess = runner.go(1)["seconds"]
        steps.append(max(1, round(settings.seconds / guess)))
        if settings.case == "checkpoint":
            # As many steps for both; each round holds whole intervals of checkpoints.
            steps[-1] = max(CHECKPOINT_EVERY, steps[0] // CHECKPOINT_EVERY * CHECKPOINT_EVERY)
    for number in range(settings.rounds):
        found: list[dict[str, float]] = [{} for _ in runners]
        for index in random.Random(number).sample(range(len(runners)), len(runners)):
            facts = runners[index].go(steps[index])
            found[index] = {key: value if key == "loss" else value / steps[index] for key, value in facts.items()}
        rounds.append(found)
        wall, cpu = (" ".join(f"{facts[key]:.3f}" for facts in found) for key in ("seconds", "cpu"))
        print(f"round {number + 1}: s/step {wall}, cpu {cpu}, load {os.getloadavg()[0]:.1f}", flush=True)


def report(found: list[Entry], rounds: list[list[dict[str, float]]], settings: argparse.Namespace) -> None:
    heads = f"{'tokens/s':>10}{'s/step':>9}{'cpu s/step':>12}{'ratio':>8}{'cpu ratio':>11}   (quartiles of the ratio)"
    print(f"\n{'':32}{heads}")
    for index, entry in enumerate(found):
        mine = [facts[index] for facts in rounds]
        tokens = settings.batch * settings.sequence * entry.ranks
        seconds, cpu = (statistics.median(f[key] for f in mine) for key in ("seconds", "cpu"))
        wall, busy = (
            [facts[index][key] / facts[0][key] / (entry.ranks if key == "cpu" else 1) for facts in rounds]
            for key in ("seconds", "cpu")
        )
        low, _, high = statistics.quantiles(wall, n=4) if len(wall) > 1 else (wall[0],) * 3
        print(
            f"{entry.label:32}{tokens / seconds:10.0f}{seconds:9.3f}{cpu:12.3f}{statistics.median(wall):8.3f}"
            f"{statistics.median(busy):11.3f}   ({low:.3f} - {high:.3f})"
        )
    print("ratio: seconds a step over those of the first line, within a round; above 1: the first line is faster")
    conclude(rounds, settings)


def conclude(rounds: list[list[dict[str, float]]], settings: argparse.Namespace) -> None:
    """The number that the case is about."""

    def middle(index: int, base: int = 0) -> float:
        return statistics.median(facts[index]["seconds"] / facts[base]["seconds"] for facts in rounds)

    if settings.case in ("torch", "mlx"):
        for key, what in (("seconds", "wall time"), ("cpu", "processor time")):
            fastest = statistics.median(min(f[key] for f in facts[1:]) / facts[0][key] for facts in rounds)
            print(f"jupiter against the best of the others in each round, by {what}: {fastest:.3f} times as fast")
    elif settings.case == "ranks":
        print(f"two ranks reach {1 / middle(1):.1%} of twice one rank; two that do not talk reach {1 / middle(2):.1%}")
        print(f"two ranks against two that do not talk: {1 / middle(1, base=2):.1%}")
    elif settings.case == "checkpoint":
        extra = statistics.median(facts[1]["seconds"] - facts[0]["seconds"] for facts in rounds) * CHECKPOINT_EVERY
        step = statistics.median(facts[0]["seconds"] for facts in rounds)
        print(f"a checkpoint costs {extra:.3f} s: {extra / step:.1%} of one step, {extra / step / 10:.2%} of ten")
    if "data_seconds" in rounds[0][0]:
        share = statistics.median(facts[0]["data_seconds"] / facts[0]["seconds"] for facts in rounds)
        print(f"jupiter waits for its data {share:.3%} of the time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["torch", "mlx", "ranks", "checkpoint", "data"], required=True)
    parser.add_argument("--twin", choices=["torch", "mlx"])
    parser.add_argument("--shape", choices=list(SHAPES), default="15m")
    parser.add_argument("--untied", action="store_true", help="an output projection of its own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each contestant in each round, about")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step and rank")
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="of Jupiter")
    parser.add_argument("--only", default="", help="contestants whose names hold one of these, comma-separated")
    settings = parser.parse_args()
    settings.twin = settings.twin or (settings.case if settings.case in ("torch", "mlx") else "torch")
    found = entries(settings)
    wanted = settings.only.split(",") if settings.only else []
    found = [e for i, e in enumerate(found) if i == 0 or not wanted or any(w in e.label for w in wanted)]
    threads = 1 if settings.case == "ranks" else settings.threads
    print(
        f"{settings.case}: {settings.twin}, shape {settings.shape} {shape_of(settings)}, batch {settings.batch} x "
        f"{settings.sequence} tokens a rank, micro-batch {settings.micro}, AdamW, clipping at 1, "
        f"threads {threads}, {settings.rounds} rounds of {settings.seconds} s"
    )
    packages = ("torch", "transformers", "mlx", "mlx-lm", "numpy")
    print(*(f"{name} {version(name)}" for name in packages), LITGPT[0], platform.platform(), f"{os.cpu_count()} cores")
    print(f"load average at the start: {os.getloadavg()[0]:.2f}")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        rows = Path(folder) / "rows.npy"
        vocabulary = shape_of(settings)["vocab_size"]
        many = max(256, 64 * settings.batch)
        np.save(rows, np.random.default_rng(0).integers(0, vocabulary, (many, settings.sequence + 1), dtype=np.uint32))
        runners = []
        for entry in found:
            runner = Runner(entry, settings, Path(folder), rows)
            stack.callback(runner.close)
            runners.append(runner)
        rounds: list[list[dict[str, float]]] = []
        try:
            measure(runners, settings, rounds)
        except KeyboardInterrupt:
            print(f"interrupted: {len(rounds)} whole rounds")
        if rounds:
            report(found, rounds, settings)


if __name__ == "__main__":
    main()
