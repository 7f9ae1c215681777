"""Stage `train` as one island of several: train on what the hub lends, contribute, until the hub ends the run."""

from __future__ import annotations

import importlib
import os
from typing import Any

from jupiter_engine import __version__
from jupiter_engine.checkpoints.store import CheckpointStore, World
from jupiter_engine.errors import StateError
from jupiter_engine.training.balance import Balance
from jupiter_engine.training.distributed.hosts import hosts_taking_part, micro_batch_sizes, ranks_asked_for
from jupiter_engine.training.distributed.islands.island import Island
from jupiter_engine.training.distributed.islands.pace import IslandReporter
from jupiter_engine.training.step import GroupStep
from jupiter_engine.worker.train import Ending, Job, checkpoint_folder


def train_island(job: Job, reporter: IslandReporter, *, joined: bool = False) -> Ending:
    """Train in this process, as the island's only rank or (`joined`) as one of the group that the launcher made.

    The result is None after a halt, and on ranks other than 0.
    """
    order, recipe = job.order, job.order.recipe
    assert order.island is not None
    threads = order.launch.threads_per_rank
    if threads:
        # Read by BLAS libraries when they are loaded.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", str(threads))
    twin = importlib.import_module(f"jupiter_engine.backends.{order.launch.twin}.train")
    group = twin.join_group() if joined else None
    wanted = ranks_asked_for(order.launch)
    if group is not None and group.ranks != wanted:
        raise StateError(f"{group.ranks} ranks were started, {wanted} were asked for")
    first = group is None or group.rank == 0
    store = CheckpointStore(checkpoint_folder(job.folder), keep=recipe.keep_checkpoints) if first else None
    checkpoint = store.newest(job.identity, lambda text: reporter.note(text, "warning")) if store is not None else None
    weights: Any = twin.load_weights(job.start_folder) if first else None
    trainer = twin.open_trainer(
        job.info,
        recipe,
        weights,
        group=group,
        threads=threads,
        sharding=order.launch.sharding,
        compile=order.launch.compile,
    )
    del weights
    world = World(twin=order.launch.twin, ranks=trainer.ranks, versions={"jupiter": __version__, **twin.versions()})
    sizes = micro_batch_sizes(order.launch, recipe, trainer.ranks, hosts_taking_part())
    island = Island(
        recipe,
        job.data,
        trainer,
        reporter,
        store,
        order.island,
        job.folder.absolute(),
        GroupStep(recipe, job.data, trainer, reporter, Balance(sizes, lockstep=trainer.lockstep)),
        identity=job.identity,
        world=world,
    )
    island.take_up(checkpoint)
    del checkpoint
    if first:
        reporter.begun(island.step)
    outcome = island.run()
    if outcome.halted or not first:
        return Ending(result=None, leave=island.close)
    result = {"island": order.island.name, "steps": outcome.steps, "tokens": outcome.tokens}
    return Ending(result=result, leave=island.close)
