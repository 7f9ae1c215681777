"""Stage `train` with islands: this worker is the hub. It starts the islands, merges them, and publishes the model.

It loads no tensor library and needs some hundred MB for a model of any size; islands train in workers of their own
(RUN_FOLDER.<island>), here or on other machines.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from jupiter_engine.backends.lora import adapter_shapes, initial_adapters, merge
from jupiter_engine.checkpoints.model_folder import (
    copy_text_files,
    folder_sha256,
    publish,
    verify,
    weight_files,
    write_config,
)
from jupiter_engine.errors import ConfigError, StageFailed, StateError
from jupiter_engine.files import ProcessIdentity, write_json
from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.orders import IslandOrder, TrainOrder
from jupiter_engine.protocol.shapes import tensor_shapes
from jupiter_engine.protocol.specs import IslandSpec
from jupiter_engine.training.distributed.islands.carrier import Carrier, Ssh
from jupiter_engine.training.distributed.islands.copies import HubCopies, adopt
from jupiter_engine.training.distributed.islands.hub import Hub, HubRun
from jupiter_engine.training.distributed.islands.island import block_tokens
from jupiter_engine.training.distributed.islands.keeping import Keeper
from jupiter_engine.training.distributed.islands.ledger import Deposed
from jupiter_engine.training.distributed.islands.local import LocalIsland
from jupiter_engine.training.distributed.islands.payload import Payload, Source, of_arrays, write_payload
from jupiter_engine.training.distributed.islands.starting import Machine, RemoteIsland
from jupiter_engine.worker.context import Halt, RunContext
from jupiter_engine.worker.train import Job, Trained, check, rewind_metrics

_EXCHANGE = "exchange"
_END_S = 60.0
_LEASE_S = 3600.0
"""An island elsewhere is ended when no hub has looked for so long beyond the rounds that it may go on by itself."""


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Who leads, as the next hub recognises it."""

    host: str
    process: ProcessIdentity

    @staticmethod
    def me() -> str:
        owner = Owner(host=socket.gethostname(), process=ProcessIdentity.of(os.getpid()))
        return msgspec.json.encode(owner).decode()


def owner_gone(text: str) -> bool:
    """Whether a hub has surely ended: one of this machine whose process is gone. Of others only the lease tells."""
    try:
        owner = msgspec.json.decode(text, type=Owner)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return owner.host == socket.gethostname() and not owner.process.alive()


def run(context: RunContext, order: TrainOrder) -> None:
    """Carry the order out; called by stage `train` for an order with islands."""
    context.check_halt()
    job = check(order, context.folder)
    _refuse(job)
    folder = context.folder.absolute()
    islands = order.launch.islands
    listener = HubListener(context, order)
    taken_over = adopt(folder)
    if taken_over:
        context.note(taken_over)
    keepers = [_keeper(order, island, folder) for island in islands]
    copies = _copies(order, folder, listener)
    with _start_weights(job) as (shapes, start):
        hub = Hub(
            folder,
            HubRun(
                identity=_identity(job),
                tokens=block_tokens(job.data, order.recipe),
                block_inputs=order.recipe.batch_sequences * order.recipe.sequence_tokens,
                shapes=shapes,
                start=start,
                islands=tuple(island.name for island in islands),
                spec=order.launch.rounds,
            ),
            listener,
            owner=Owner.me(),
            gone=owner_gone,
            carriers=_carriers(order, folder),
            tend=lambda: _tend(keepers, order.launch.rounds.quorum, listener, copies, hub),
        )
        replaced = False
        try:
            kept = hub.ledger.metrics()
            rewind_metrics(folder / "metrics.jsonl", b"".join(kept))
            _announce(context, order, hub)
            for keeper in keepers:
                keeper.begin()
            done = hub.run()
            # The workers come to their end now, and must not be started again.
            for keeper in keepers:
                keeper.leave()
            result = _publish(job, hub, _carried(hub)) if done else None
        except Deposed:
            # The islands are another hub's.
            replaced = True
            raise
        except BaseException:
            # Whatever went wrong here: no island trains on for nobody.
            try:
                hub.say_end("halted")
            except Deposed:
                replaced = True
            raise
        finally:
            # First all of them: while one worker is waited for, no other is started again.
            for keeper in keepers:
                keeper.leave()
            for keeper in keepers if not replaced else ():
                keeper.end(grace_s=_END_S)
            if copies is not None:
                copies.close()
            hub.close()
    if result is None:
        raise Halt
    write_json(context.folder / "trained.json", Trained(result=result))
    context.finish(result)


class HubListener:
    """Speaks through the run context."""

    def __init__(self, context: RunContext, order: TrainOrder) -> None:
        self._context, self._steps = context, order.recipe.steps

    def metric(self, metric: Metric) -> None:
        self._context.metric(metric)

    def progress(self, done: int, total: int, note: str) -> None:
        self._context.progress(done, total, "steps", note)

    def note(self, text: str, level: str = "info") -> None:
        self._context.note(text, level)

    def halt_asked(self) -> bool:
        return self._context.halt_asked()


def _refuse(job: Job) -> None:
    """ConfigError for what islands do not do."""
    launch, recipe = job.order.launch, job.order.recipe
    names = [island.name for island in launch.islands]
    if len(set(names)) != len(names):
        raise ConfigError(f"two islands have the same name: {', '.join(sorted(names))}", fix="give each its own")
    if launch.rounds.quorum > len(names):
        raise ConfigError(
            f"a round needs {launch.rounds.quorum} contributions, there are {len(names)} islands",
            fix="lower islands.rounds.quorum",
        )
    if recipe.early_stop.every_steps:
        raise ConfigError(
            "islands measure no held-out loss during training",
            fix="set recipe.early_stop.every_steps to 0, or train in one group",
        )
    empty = [block + 1 for block, tokens in enumerate(block_tokens(job.data, recipe)) if tokens == 0]
    if empty:
        raise StateError(
            f"no target counts in batch {empty[0]} (and {len(empty) - 1} more): its loss is undefined",
            fix="use larger batches, or a snapshot with fewer masked rows",
        )


def _identity(job: Job) -> str:
    return hashlib.sha256(msgspec.json.encode(job.identity)).hexdigest()


def _announce(context: RunContext, order: TrainOrder, hub: Hub) -> None:
    totals, names = hub.ledger.totals(), ", ".join(island.name for island in order.launch.islands)
    context.progress(totals.merged, totals.blocks, "steps")
    context.note(
        f"Merging the islands {names} every {order.launch.rounds.round_s:g} s; {totals.merged} of {totals.blocks} "
        f"steps are merged, every island makes steps of {order.recipe.batch_sequences} sequences of its own"
    )


# -- islands -------------------------------------------------------------------------------------


def island_order(order: TrainOrder, island: IslandSpec, exchange: str) -> TrainOrder:
    """What an island is asked to do."""
    return msgspec.structs.replace(
        order,
        run=f"{order.run}.{island.name}",
        launch=island.launch,
        island=IslandOrder(name=island.name, exchange=exchange, rounds=order.launch.rounds),
    )


def _elsewhere(island: IslandSpec) -> bool:
    return island.leader is not None and bool(island.leader.ssh)


def _keeper(order: TrainOrder, island: IslandSpec, folder: Path) -> Keeper:
    exchange = _EXCHANGE if _elsewhere(island) else str(folder / _EXCHANGE)
    told = msgspec.json.encode(island_order(order, island, exchange))
    rounds = order.launch.rounds
    worker: LocalIsland | RemoteIsland
    if island.leader is None:
        worker = LocalIsland(island.name, folder.with_name(f"{folder.name}.{island.name}"))
    else:
        worker = RemoteIsland(
            island,
            hub_folder=folder,
            ssh_config=order.launch.ssh_config,
            lease_s=_LEASE_S + (1 + rounds.max_unsynced_rounds) * (rounds.round_s + rounds.grace_s),
        )
    restarts = order.launch.restarts_per_hour
    return Keeper(island.name, worker, told, restarts_per_hour=restarts, near=not _elsewhere(island))


def _carriers(order: TrainOrder, folder: Path) -> dict[str, Carrier]:
    """For the islands on other machines."""
    return {
        island.name: Ssh(
            folder / _EXCHANGE,
            island.name,
            alias=island.leader.ssh,
            there=f"{island.leader.run_folder}/{_EXCHANGE}",
            ssh_config=order.launch.ssh_config,
        )
        for island in order.launch.islands
        if island.leader is not None and island.leader.ssh
    }


class _Copies:
    """A second copy of what is merged on an island's machine; says once when that fails."""

    def __init__(self, copies: HubCopies, listener: HubListener) -> None:
        self._copies, self._listener = copies, listener
        self._problem = ""

    def look(self, hub: Hub) -> None:
        current = hub.ledger.current()
        if current is not None:
            self._copies.look(current.number)
        problem = self._copies.problem
        if problem and not self._problem:
            self._listener.note(
                f"What is merged could not be copied to {self._copies.machine.name}: {problem}", "warning"
            )
        self._problem = problem

    def close(self) -> None:
        self._copies.close()


def _copies(order: TrainOrder, folder: Path, listener: HubListener) -> _Copies | None:
    """To the first island's machine that is not this one; None: there is none."""
    leader = next((one.leader for one in order.launch.islands if one.leader is not None and one.leader.ssh), None)
    if leader is None:
        return None
    there = PurePosixPath(leader.run_folder).with_name(folder.name)
    machine = Machine(leader.name, leader.ssh, order.launch.ssh_config)
    return _Copies(HubCopies(folder, machine, str(there)), listener)


def _tend(keepers: list[Keeper], quorum: int, listener: HubListener, copies: _Copies | None, hub: Hub) -> None:
    """StageFailed once too few islands are left to merge."""
    if copies is not None:
        copies.look(hub)
    for keeper in keepers:
        while not keeper.said.empty():
            listener.note(*keeper.said.get())
    lost = [keeper for keeper in keepers if keeper.given_up]
    left, quorum = len(keepers) - len(lost), min(quorum, len(keepers))
    if lost and left < max(quorum, 1):
        train = "no island trains any more" if not left else f"{left} of {len(keepers)} islands still train"
        needed = f", a round needs {quorum} contributions" if left else ""
        raise StageFailed(
            f"{train}{needed}; {lost[0].name}: {lost[0].given_up}",
            fix="see worker.log in the islands' run folders; start again to go on from the last merge",
        )


def _carried(hub: Hub) -> dict[str, Any]:
    return {island: {"down_bytes": down, "up_bytes": up} for island, (down, up) in hub.carried.items()}


# -- models --------------------------------------------------------------------------------------


class _StartModel:
    """The start model's tensors, read from its files in chunks as float32."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._of: dict[str, Payload] = {}
        for path in weight_files(folder):
            payload = stack.enter_context(Payload(path))
            self._of.update(dict.fromkeys(payload.shapes, payload))

    def read(self, name: str, first: int, end: int) -> npt.NDArray[np.float32]:
        return self._of[name].read(name, first, end)

    def array(self, name: str) -> npt.NDArray[np.float32]:
        return self._of[name].array(name)


@contextmanager
def _start_weights(job: Job) -> Iterator[tuple[Mapping[str, tuple[int, ...]], Source]]:
    """What is trained, and its first values: the whole model, or the adapters."""
    recipe = job.order.recipe
    if recipe.update == "lora":
        shapes = adapter_shapes(job.info, recipe.lora)
        yield shapes, of_arrays(initial_adapters(job.info, recipe.lora, recipe.seed))
        return
    with ExitStack() as stack:
        yield tensor_shapes(job.info), _StartModel(job.start_folder, stack).read


def _publish(job: Job, hub: Hub, carried: dict[str, Any]) -> dict[str, Any]:
    """Write the merged model in the recipe's compute precision; returns the stage's result."""
    order, recipe = job.order, job.order.recipe
    target = Path(order.target)
    with ExitStack() as stack, publish(target) as folder:
        theta = stack.enter_context(Payload(hub.theta()))
        source: Source = theta.read
        if recipe.update == "lora":
            source = _Merged(_StartModel(job.start_folder, stack), theta, job).read
        write_payload(
            folder / "model.safetensors",
            tensor_shapes(job.info),
            recipe.compute_dtype,
            source,
            metadata={"format": "pt"},
        )
        write_config(folder, msgspec.structs.replace(job.info, dtype=recipe.compute_dtype))
        copy_text_files(job.start_folder, folder)
        verify(folder)
    metrics = [msgspec.json.decode(line, type=Metric) for line in hub.ledger.metrics()]
    totals = hub.ledger.totals()
    inputs = totals.blocks * recipe.batch_sequences * recipe.sequence_tokens
    return {
        "model": {"name": target.name, "folder": order.target, "sha256": folder_sha256(target)},
        "steps": totals.merged,
        "tokens": totals.tokens_merged,
        "first_loss": metrics[0].loss,
        "last_loss": metrics[-1].loss,
        "tokens_per_s": inputs / sum(metric.seconds for metric in metrics),
        "rounds": len(metrics),
        "islands": carried,
    }


class _Merged:
    """The start model with the adapters added in; one merged tensor is held at a time."""

    def __init__(self, start: _StartModel, adapters: Payload, job: Job) -> None:
        self._start, self._job = start, job
        self._adapters = adapters.arrays()
        self._name = ""
        self._value: npt.NDArray[np.float32] = np.empty(0, dtype=np.float32)

    def read(self, name: str, first: int, end: int) -> npt.NDArray[np.float32]:
        if name != self._name:
            merged = merge(name, self._start.array(name), self._adapters, self._job.order.recipe.lora)
            self._name, self._value = name, merged.reshape(-1)
        return self._value[first:end]
