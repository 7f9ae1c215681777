"""Islands against plain data parallel training at equal tokens: the loss ratio, and the bytes between islands.

    .venv/bin/python scripts/bench/islands.py [--steps 240] [--island-steps 80] [--payload int8] [--twins mlx,torch]

On this machine: an island of two MLX ranks on a ring, one of two torch ranks on gloo, and the hub, each in processes of
its own; the reference is one torch run over the same rows with batches as large as the islands' together. What exactly
is compared, and how bytes are counted, is said in tests/training/islands/comparison.py.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.training.islands.comparison import Settings, compare  # noqa: E402 - found only with the line above
from tests.training.islands.runs import one_rank, two_ranks  # noqa: E402


def main() -> None:
    usual = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=usual.steps, help="updates one after the other")
    parser.add_argument("--warm-steps", type=int, default=usual.warm_steps, help="plain steps before, shared by both")
    parser.add_argument("--island-steps", type=int, default=usual.island_steps, help="steps between two merges")
    parser.add_argument("--batch", type=int, default=usual.batch, help="rows of an island's step")
    parser.add_argument("--sequence", type=int, default=usual.sequence)
    parser.add_argument("--learning-rate", type=float, default=usual.learning_rate)
    parser.add_argument("--payload", choices=["float32", "bfloat16", "int8"], default=usual.payload)
    parser.add_argument("--outer-learning-rate", type=float, default=usual.outer_learning_rate)
    parser.add_argument("--outer-momentum", type=float, default=usual.outer_momentum)
    parser.add_argument("--twins", default="mlx,torch", help="one island each, of two ranks")
    parser.add_argument("--ranks", type=int, choices=[1, 2], default=2, help="of an island")
    parser.add_argument("--seed", type=int, default=usual.seed)
    chosen = parser.parse_args()
    settings = Settings(
        warm_steps=chosen.warm_steps,
        steps=chosen.steps,
        island_steps=chosen.island_steps,
        batch=chosen.batch,
        sequence=chosen.sequence,
        learning_rate=chosen.learning_rate,
        payload=chosen.payload,
        outer_learning_rate=chosen.outer_learning_rate,
        outer_momentum=chosen.outer_momentum,
        seed=chosen.seed,
    )
    make = one_rank if chosen.ranks == 1 else two_ranks
    launches = {f"{twin}-{number}": make(twin) for number, twin in enumerate(chosen.twins.split(","))}
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), settings, launches)
    print(f"machine   {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"islands   {', '.join(launches)}; {chosen.ranks} rank(s) each")
    print("settings  " + ", ".join(f"{name} {value}" for name, value in asdict(settings).items()))
    print(f"model     nano, {found.parameters} parameters; {found.rounds} rounds")
    print(f"before    held-out loss {found.warm_loss:.4f} nats: where both begin")
    print(f"plain     held-out loss {found.plain_loss:.4f} nats, {found.plain_s:.0f} s with its start")
    print(f"islands   held-out loss {found.islands_loss:.4f} nats, {found.islands_s:.0f} s with their start")
    print(
        f"loss      {100 * (found.loss_ratio - 1):+.2f} % against plain data parallel at equal tokens; "
        f"{100 * found.kept:.0f} % of its improvement"
    )
    print(
        f"bytes     {found.plain_bytes / found.island_bytes:.0f} times fewer between islands "
        f"({found.island_bytes} against {found.plain_bytes} of float32 gradients)"
    )


if __name__ == "__main__":
    main()
