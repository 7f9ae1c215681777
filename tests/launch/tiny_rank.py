"""A rank that does little: reports ready, joins, sums, and then ends in the way that the order asks for.

RUN_FOLDER/spec.json: {"twin": "mlx" | "torch" | "", "acts": {"1": "raise"}, "seconds": 2.0}
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

run_folder, generation = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ.get("RANK", os.environ.get("MLX_RANK", "-1")))
order = json.loads((run_folder / "spec.json").read_text())
act = order["acts"].get(str(rank), "work")


def report(**facts: Any) -> None:
    with (run_folder / "ranks" / generation / f"rank-{rank}.jsonl").open("a") as file:
        file.write(json.dumps(facts) + "\n")


def joined() -> Any:
    """A function that sums a number over all ranks."""
    if order["twin"] == "mlx":
        import mlx.core as mx

        group = mx.distributed.init(strict=True, backend="ring")

        def sum_mlx(value: float) -> float:
            total = mx.distributed.all_sum(mx.array([value]), group=group)
            mx.eval(total)
            return float(str(total.item()))

        return sum_mlx
    if order["twin"] == "torch":
        import torch

        torch.distributed.init_process_group("gloo")

        def sum_torch(value: float) -> float:
            total = torch.tensor([value])
            torch.distributed.all_reduce(total)
            return float(total.item())

        return sum_torch
    return lambda value: value


if act == "never ready":
    time.sleep(600)
report(report="ready", process={"pid": os.getpid()}, threads=os.environ.get("OMP_NUM_THREADS"))
total = joined()
report(report="sum", value=total(rank + 1.0), host=os.uname().nodename)
for index in range(200):
    print(f"rank {rank} line {index}", flush=index % 50 == 0)
print(f"rank {rank} errs", file=sys.stderr, flush=True)
if act == "raise":
    raise ValueError(f"rank {rank} does not like this")
if act == "exit 3":
    os._exit(3)
if act == "fill":
    with (run_folder / "big").open("wb") as file:
        while True:
            file.write(b"x" * 65536)
if act == "kill":
    os.kill(os.getpid(), 9)
if act == "leave a child":
    import subprocess

    subprocess.Popen(["sleep", "600"], start_new_session=True)
until = time.monotonic() + order["seconds"]
while time.monotonic() < until:
    # Alone in its sum, a rank would wait for the others for ever: all decide alike.
    time.sleep(0.05)
report(report="over")
if order["twin"] == "torch":
    import torch

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
