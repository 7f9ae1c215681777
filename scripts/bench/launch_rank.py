"""A rank of scripts/bench/launch.py: joins the ring, times sums and steps, and writes down what it saw.

launch_rank.py RUN_FOLDER GENERATION SECONDS; rank 0 writes RUN_FOLDER/result-GENERATION.jsonl.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

run_folder, generation, window_s = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
rank = int(os.environ["MLX_RANK"])
SMALL_SUMS = 200


def write(folder: Path, name: str, value: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a") as file:
        file.write(json.dumps(value) + "\n")


def say(**facts: Any) -> None:
    if rank == 0:
        write(run_folder, f"result-{generation}.jsonl", facts)


def total(array: mx.array) -> None:
    mx.eval(mx.distributed.all_sum(array, stream=mx.cpu))


write(run_folder / "ranks" / generation, f"rank-{rank}.jsonl", {"report": "ready"})
mx.distributed.init(strict=True, backend="ring")
total(mx.array([1.0]))
say(first_sum_at=time.time())
write(run_folder, f"pid-{generation}-{rank}.json", {"pid": os.getpid()})
small = mx.array([1.0])
latencies = []
for _ in range(SMALL_SUMS):
    began = time.perf_counter()
    total(small)
    latencies.append(time.perf_counter() - began)
say(latency_ms=statistics.median(latencies) * 1000)
# A step as in training: some arithmetic, then a sum of a megabyte of gradients.
weights, gradients = mx.random.normal((192, 192)), mx.zeros((1 << 18,))
mx.eval(weights, gradients)
say(window_begins_at=time.time())
steps, began = 0, time.perf_counter()
going = True
while going:
    mx.eval(weights @ weights)
    total(gradients)
    steps += 1
    if steps % 20 == 0:
        # All ranks leave together: rank 0's clock decides.
        more = mx.array([1.0 if rank == 0 and time.perf_counter() - began < window_s else 0.0])
        votes = mx.distributed.all_sum(more, stream=mx.cpu)
        mx.eval(votes)
        going = float(str(votes.sum().item())) > 0
say(steps_per_s=steps / (time.perf_counter() - began), window_ends_at=time.time())
