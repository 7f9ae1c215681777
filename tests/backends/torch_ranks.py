"""One rank of a gloo group that trains and reports what it holds: `torch_ranks.py FOLDER`, under torchrun.

FOLDER/scenarios.json holds scenarios by name, carried out one after the other;
rank r writes what it saw to FOLDER/rank-r.json, rank 0 arrays to FOLDER/<name>/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from jupiter_engine.backends.torch.collectives import Alone
from jupiter_engine.backends.torch.train import TorchTrainer, join_group, open_trainer
from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.checkpoints.tensors import Array
from jupiter_engine.protocol.specs import Recipe
from jupiter_engine.training.trainer import Batch
from tests.training.nano import INFO, data, weights


def batch(rows: list[int]) -> Batch:
    """The nano data's `rows`; no rows: one row of which nothing counts (what the loop pads with)."""
    arrays, chosen = data(), rows or [0]
    tokens = arrays.tokens[chosen].astype(np.int64)
    counted = arrays.loss_mask[chosen][:, 1:] != 0
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segments=arrays.segments[chosen][:, :-1].astype(np.int64),
        counted=counted if rows else np.zeros_like(counted),
    )


def counted(rows: list[int]) -> int:
    return int(batch(rows).counted.sum()) if rows else 0


def write_state(path: Path, state: TrainerState) -> None:
    arrays: dict[str, Array] = {f"w/{name}": value for name, value in state.weights.items()}
    arrays |= {f"m/{name}": value for name, value in state.moments.items()}
    arrays["updates"] = np.array(state.updates)
    np.savez(path, **arrays)  # type: ignore[arg-type]  # its own keyword, allow_pickle, is none of ours


def read_state(path: Path) -> TrainerState:
    with np.load(path) as file:
        return TrainerState(
            weights={key[2:]: file[key] for key in file if key.startswith("w/")},
            moments={key[2:]: file[key] for key in file if key.startswith("m/")},
            updates=int(file["updates"]),
        )


def steps(trainer: TorchTrainer, parts: list[list[list[int]]], count: int) -> list[float]:
    """`count` updates; `parts[rank]` are this rank's micro-batches of each. Returns the gradient norms."""
    total = sum(counted(rows) for rank in parts for rows in rank)
    norms = []
    for step in range(count):
        for rows in parts[trainer.rank]:
            trainer.accumulate(batch(rows), 1.0 / total)
        norms.append(trainer.reduce())
        trainer.apply(1e-2 / (step + 1), min(1.0, 0.5 / norms[-1]))
    return norms


def play(scenario: dict[str, Any], out: Path, group: Alone) -> dict[str, Any]:
    recipe = msgspec.convert(scenario["recipe"], Recipe)
    out.mkdir(exist_ok=True)
    trainer = open_trainer(
        INFO,
        recipe,
        weights() if group.rank == 0 else None,
        group=group,
        threads=1,
        sharding=scenario["sharding"],
        compile="off",
    )
    seen: dict[str, Any] = {"lockstep": trainer.lockstep, "first": trainer.fingerprint()}
    if "resume" in scenario:
        if group.rank == 0:
            trainer.import_state(read_state(Path(scenario["resume"])))
        trainer.share_state(scenario["updates"])
    seen["norms"] = steps(trainer, scenario["parts"], scenario["steps"])
    # Every rank calls it the same number of times.
    seen["held_out"] = trainer.held_out(batch(scenario["parts"][group.rank][0]))
    seen["moment_bytes"] = trainer.state_bytes()
    if scenario.get("discard"):
        before = trainer.fingerprint()
        for rows in scenario["parts"][group.rank]:
            trainer.accumulate(batch(rows), 1.0)
        trainer.reduce()
        trainer.discard()
        seen["kept"] = trainer.fingerprint() == before
        seen["norm_after_discard"] = trainer.reduce()
        trainer.discard()
    state = trainer.export_state()
    whole = trainer.weights()
    assert (state is None) == (group.rank != 0) == (whole is None)
    if state is not None and whole is not None:
        write_state(out / "state.npz", state)
        seen["weights_equal_state"] = all(np.array_equal(whole[name], state.weights[name]) for name in whole)
    trainer.save(out if group.rank == 0 else None)
    seen["last"] = trainer.fingerprint()
    if scenario.get("adopt"):
        other = {name: value + 0.25 for name, value in whole.items()} if whole is not None else None
        trainer.adopt(other)
        seen["adopted"] = trainer.fingerprint()
        after = trainer.export_state()
        if after is not None and state is not None and other is not None:
            write_state(out / "adopted.npz", after)
        seen["norms_after_adopt"] = steps(trainer, scenario["parts"], 1)
    seen["agreed"] = float(trainer.exchange([float(group.rank)]).sum())
    return seen


def launch(scenarios: dict[str, dict[str, Any]], out: Path, ranks: int) -> dict[str, list[dict[str, Any]]]:
    """Carry out scenarios in one gloo group of `ranks`; what each rank saw, by scenario."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "scenarios.json").write_text(json.dumps(scenarios))
    python_path = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, str(Path(__file__)), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return {name: [one[name] for one in seen] for name in scenarios}


def main() -> None:
    folder = Path(sys.argv[1])
    scenarios = json.loads((folder / "scenarios.json").read_text())
    group = join_group()
    seen = {name: play(scenario, folder / name, group) for name, scenario in scenarios.items()}
    (folder / f"rank-{group.rank}.json").write_text(json.dumps(seen))
    group.close()
    # As worker/rank.py ends: past the interpreter's own end, where gloo's threads may still let go of tensors.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
