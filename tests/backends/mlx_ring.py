"""Real MLX rings on this machine: `run` starts the ranks, `python -m tests.backends.mlx_ring` is one of them.

Every case is a function of a group; what it returns comes back as arrays, rank by rank.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from jupiter_engine.backends.mlx import train as mlx_twin
from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.errors import JupiterError
from jupiter_engine.protocol.specs import LoraSpec, OptimizerSpec, Recipe
from jupiter_engine.training.loop import Batch
from tests.training.nano import INFO, data, recipe, weights

Found = dict[str, np.ndarray]

TIMEOUT_S = 90.0


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def run(folder: Path, ranks: int, case: str, **arguments: Any) -> list[Found]:
    """Run `case` on a ring of so many processes; returns each rank's arrays (a JupiterError's text as `error`)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(ranks)]))
    (folder / "case.json").write_text(json.dumps({"case": case, "arguments": arguments}))
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "MLX_RANK": str(rank),
            "MLX_HOSTFILE": str(folder / "hosts.json"),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        log = (folder / f"{rank}.log").open("wb")
        with log:
            argv = [sys.executable, "-m", "tests.backends.mlx_ring", str(folder)]
            processes.append(subprocess.Popen(argv, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * ranks, "\n".join((folder / f"{rank}.log").read_text() for rank in range(ranks))
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(ranks)]


# -- what the ranks do -----------------------------------------------------------------------------


def case_recipe(**changes: Any) -> Recipe:
    """nano's recipe; `optimizer` and `lora` are names or dictionaries of changes."""
    # eps: large enough that a gradient of rounding noise moves nothing.
    wanted = {"learning_rate": 3e-3, "weight_decay": 0.1, "eps": 1e-5, **changes.pop("optimizer", {})}
    changes["optimizer"] = OptimizerSpec(**wanted)
    if "lora" in changes:
        changes["lora"] = LoraSpec(**changes["lora"])
    return recipe(**changes)


def rows(batch: np.ndarray) -> Batch:
    arrays = data()
    tokens = arrays.tokens[batch].astype(np.int64)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segments=arrays.segments[batch][:, :-1].astype(np.int64),
        counted=arrays.loss_mask[batch][:, 1:] != 0,
    )


def shares(ranks: int, step: int, *, equal: bool) -> list[np.ndarray]:
    """Eight rows of the step dealt out unevenly (5, 3 and 5, 2, 1), or evenly with a ninth row left out."""
    batch = (np.arange(8) + 3 * step) % 24
    if equal:
        return np.array_split(batch[: 8 // ranks * ranks], ranks)
    return np.split(batch, {1: [], 2: [5], 3: [5, 7]}[ranks])


def steps(trainer: mlx_twin.MlxTrainer, first: int, last: int, *, equal: bool = False) -> list[float]:
    """Do steps `first` to `last` (excluded); returns losses and norms in turn."""
    said = []
    for step in range(first, last):
        parts = shares(trainer.ranks, step, equal=equal)
        tokens = sum(int(rows(part).counted.sum()) for part in parts)
        # Two micro-batches where there are rows enough, so that gradients are added up.
        mine = parts[trainer.rank]
        cuts = [mine] if equal or len(mine) < 4 else [mine[:2], mine[2:]]
        loss = sum(trainer.accumulate(rows(cut), 1.0 / tokens) for cut in cuts)
        said.append(float(trainer.exchange([loss])[:, 0].sum()) / tokens)
        norm = trainer.reduce()
        said.append(norm)
        trainer.apply(3e-3 / (step + 1), min(1.0, 1.0 / (norm + 1e-6)))
    return said


def opened(group: Any, sharding: str, changes: dict[str, Any]) -> mlx_twin.MlxTrainer:
    given = weights() if group is None or group.rank == 0 else None
    return mlx_twin.open_trainer(INFO, case_recipe(**changes), given, group=group, sharding=sharding)  # type: ignore[arg-type]


def state_arrays(state: TrainerState | None) -> Found:
    if state is None:
        return {}
    found = {f"w:{name}": np.array(value) for name, value in state.weights.items()}
    found |= {f"m:{name}": np.array(value) for name, value in state.moments.items()}
    return {**found, "updates": np.array(state.updates), "whole": np.array(1)}


def state_of(found: Found) -> TrainerState:
    return TrainerState(
        weights={key[2:]: value for key, value in found.items() if key.startswith("w:")},
        moments={key[2:]: value for key, value in found.items() if key.startswith("m:")},
        updates=int(found["updates"]),
    )


def train(group: Any, folder: Path, *, sharding: str, first: int, last: int, resume: str = "", **changes: Any) -> Found:
    """Steps from `first` to `last`, from the state in the file `resume` where one is given."""
    trainer = opened(group, sharding, changes)
    if resume:
        if trainer.rank == 0:
            trainer.import_state(state_of(dict(np.load(resume))))
        trainer.share_state(first)
    said = steps(trainer, first, last, equal=sharding == "fsdp")
    prints = trainer.exchange([float(int(trainer.fingerprint()[:12], 16))])[:, 0]
    found = state_arrays(trainer.export_state())
    found |= {"said": np.array(said), "prints": prints, "state_bytes": np.array(trainer.state_bytes())}
    if trainer.rank == 0:
        (folder / "model").mkdir(exist_ok=True)
    trainer.save(folder / "model" if trainer.rank == 0 else None)
    held = trainer.held_out(rows(np.arange(4)))
    trainer.close()
    return {**found, "held": np.array(held)}


def islands(group: Any, folder: Path, *, sharding: str, **changes: Any) -> Found:
    """Weights out, changed, and in again; a discarded gradient in between."""
    trainer = opened(group, sharding, changes)
    steps(trainer, 0, 2, equal=sharding == "fsdp")
    before = trainer.weights()
    trainer.accumulate(rows(np.arange(2)), 1.0)
    trainer.discard()
    trainer.adopt(None if before is None else {name: value + np.float32(0.5) for name, value in before.items()})
    after = trainer.weights()
    steps(trainer, 2, 3, equal=sharding == "fsdp")
    said = {} if before is None or after is None else {f"b:{name}": before[name] for name in before}
    said |= {} if after is None else {f"a:{name}": after[name] for name in after}
    return {**said, **state_arrays(trainer.export_state())}


def refused(group: Any, folder: Path, *, sharding: str, **changes: Any) -> Found:
    opened(group, sharding, changes)
    return {}


def traffic(group: Any, folder: Path, *, sharding: str) -> Found:
    """How often each collective was called, and how often not on the CPU stream or with values not yet computed."""
    import mlx.core as mx

    calls, wrong = {"all_sum": 0, "all_gather": 0}, []
    for name in calls:
        real = getattr(mx.distributed, name)

        def counted(x: Any, *, name: str = name, real: Callable[..., Any] = real, **given: Any) -> Any:
            calls[name] += 1
            if given.get("stream") != mx.cpu:
                wrong.append(f"{name} on {given.get('stream')}")
            return real(x, **given)

        setattr(mx.distributed, name, counted)
    trainer = opened(group, sharding, {})
    steps(trainer, 0, 2)
    trainer.export_state()
    trainer.share_state(2)
    trainer.weights()
    trainer.adopt(trainer.weights())
    return {"calls": np.array(list(calls.values())), "wrong": np.array(wrong, dtype="U80")}


def transport(group: Any, folder: Path) -> Found:
    """Odd arrays through broadcast and gather."""
    arrays = {
        "nan": np.array([np.nan, -0.0, np.inf], np.float32),
        "bytes": np.arange(7, dtype=np.uint8),
        "none": np.zeros((0, 3), np.float32),
        "one": np.array(5, np.uint64),
    }
    got = {f"b:{name}": value for name, value in group.broadcast(arrays if group.rank == 0 else None)}
    mine = {f"{name}.{group.rank}": value for name, value in arrays.items() if name != "none" or group.rank == 1}
    gathered = group.gather(mine)
    return {**got, **{f"g:{name}": value for name, value in (gathered or {}).items()}}


CASES: dict[str, Callable[..., Found]] = {
    "train": train,
    "islands": islands,
    "refused": refused,
    "traffic": traffic,
    "transport": transport,
}


@contextmanager
def scattering(wanted: bool) -> Iterator[None]:
    """Give the ring the sum_scatter that it lacks, as a sum of which each rank takes its part."""
    import mlx.core as mx

    real = mx.distributed.sum_scatter

    def emulated(x: Any, *, group: Any, stream: Any = None) -> Any:
        total = mx.distributed.all_sum(x, group=group, stream=stream)
        part = x.shape[0] // group.size()
        return total[group.rank() * part : (group.rank() + 1) * part]

    if wanted:
        mx.distributed.sum_scatter = emulated  # type: ignore[assignment]
    try:
        yield
    finally:
        mx.distributed.sum_scatter = real


def main(folder: Path) -> None:
    given = msgspec.json.decode((folder / "case.json").read_bytes())
    group = mlx_twin.join_group()
    arguments = given["arguments"]
    with scattering(arguments.pop("emulate", False)):
        try:
            found = CASES[given["case"]](group, folder, **arguments)
        except JupiterError as error:
            found = {"error": np.array(f"{error.detail} / {error.fix}")}
    np.savez(folder / f"{group.rank}.npz", **found)  # type: ignore[arg-type]
    group.exchange([0.0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
