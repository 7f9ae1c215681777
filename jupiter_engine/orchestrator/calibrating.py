"""Measuring how fast machines train: a `calibrate` order on each, here or through the machinery of stages."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import msgspec
from msgspec.structs import replace

from jupiter_engine.cluster.placement import Placement
from jupiter_engine.cluster.stage import STOP_GRACE_S
from jupiter_engine.errors import JupiterError, RemoteError, rebuild
from jupiter_engine.orchestrator.dispatch import Stages
from jupiter_engine.orchestrator.planner import remember_calibration
from jupiter_engine.orchestrator.supervision import WORKER_ENV
from jupiter_engine.planning.memory import rank_memory
from jupiter_engine.planning.plan import Member, Question
from jupiter_engine.planning.time import Calibration
from jupiter_engine.protocol import facts
from jupiter_engine.protocol.orders import CalibrateOrder
from jupiter_engine.protocol.specs import LaunchSpec
from jupiter_engine.remote.local import LocalRemote
from jupiter_engine.remote.port import Remote
from jupiter_engine.settings.cluster import ClusterSettings, NodeSpec, launch_spec, node_by_name
from jupiter_engine.units import bytes_text, plain_text

_POLL_S = 0.2
_REMOTE_S = 1800.0
"""Longest wait for a machine that has to be made ready first."""
Say = Callable[[str], None]


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker reports when it has calibrated."""

    micro_batch_s: float
    update_s: float
    tokens_per_s: float
    peak_bytes: int
    steps: int
    seconds: float
    versions: dict[str, str] = {}


async def calibrate(
    root: Path,
    domain: str,
    cluster: ClusterSettings,
    question: Question,
    *,
    seconds: float,
    stages: Callable[[], Stages],
    say: Say,
) -> tuple[tuple[Calibration, ...], tuple[str, ...]]:
    """Measure every training machine, one after the other; results are kept in the workspace.

    Returns (what was measured, sentences on machines that could not be measured). `stages` is asked for
    only if another machine is to be measured.
    """
    done: list[Calibration] = []
    problems: list[str] = []
    opened: Stages | None = None
    try:
        for member in question.members:
            node = _node(cluster, member.device.node)
            short = _too_large(question, member)
            if short:
                problems.append(short)
                continue
            say(f"{member.device.node}: training for {seconds:.0f} s with random weights")
            folder = root / ".jupiter" / "runs" / f"calibrate-{uuid4().hex[:12]}"
            folder.mkdir(parents=True)
            try:
                remote: Remote = LocalRemote()
                if node is not None and not node.is_local():
                    opened = opened or stages()
                    remote = opened.stage(cluster, Placement(nodes=(node,)), folder)
                order = _order(folder, domain, cluster, question, member, seconds)
                measured = await _measure(remote, folder, order, say)
            except JupiterError as error:
                problems.append(f"{member.device.node} was not measured: {error.sentence()}")
                continue
            shutil.rmtree(folder, ignore_errors=True)  # everything of use is in the result
            calibration = _calibration(question, member, cluster, measured)
            remember_calibration(root, calibration)
            done.append(calibration)
    finally:
        if opened is not None:
            await opened.close()
    return tuple(done), tuple(problems)


def _node(cluster: ClusterSettings, name: str) -> NodeSpec | None:
    try:
        return node_by_name(cluster, name)
    except JupiterError:
        return None  # a workspace without a cluster file: this machine


def _too_large(question: Question, member: Member) -> str:
    """Why it is not even tried; empty: it fits."""
    device = member.device
    one = rank_memory(question.shape, question.recipe, twin=device.twin, device=device.kind)
    if device.allowed is None or one.total <= device.allowed:
        return ""
    return (
        f"{device.node} was not measured: it needs {bytes_text(one.total)} and {bytes_text(device.allowed)} are allowed"
    )


def _order(
    folder: Path, domain: str, cluster: ClusterSettings, question: Question, member: Member, seconds: float
) -> CalibrateOrder:
    launch = launch_spec(cluster)
    return CalibrateOrder(
        run=folder.name,
        domain=domain,
        cycle=0,
        # A position table as long as the rows is all that is used of the context.
        shape=replace(question.shape, context=max(question.shape.context, question.recipe.sequence_tokens)),
        recipe=question.recipe,
        launch=LaunchSpec(twin=member.device.twin, threads_per_rank=launch.threads_per_rank, compile=launch.compile),
        seconds=seconds,
    )


async def _measure(remote: Remote, folder: Path, order: CalibrateOrder, say: Say) -> Measured:
    """Carry the order out and wait; raises what the worker failed with."""
    await remote.write(folder / "spec.json", msgspec.json.encode(order))
    process = await remote.start(
        (sys.executable, "-m", "jupiter_engine.worker", str(folder)),
        folder=folder,
        log=folder / "worker.log",
        env=WORKER_ENV,
    )
    deadline = time.monotonic() + order.seconds + _REMOTE_S
    try:
        told = ""
        while time.monotonic() < deadline:
            alive = await remote.alive(process)
            for fact in _facts(await remote.read(folder / "events.jsonl")):
                match fact:
                    case facts.Finished():
                        return msgspec.convert(fact.result, Measured)
                    case facts.Failed():
                        raise rebuild(fact.kind, plain_text(fact.title), plain_text(fact.detail), plain_text(fact.fix))
                    case facts.Progress() if fact.note and fact.note != told:
                        told = fact.note
                        say(f"  {plain_text(told)}")
            if not alive:
                tail = plain_text((await remote.read(folder / "worker.log"))[-1000:].decode("utf-8", "replace"))
                raise RemoteError(f"the worker died: {tail.strip()[-400:]}", host=remote.name)
            await asyncio.sleep(_POLL_S)
        raise RemoteError("the measurement took too long", host=remote.name)
    except msgspec.ValidationError as error:
        raise RemoteError(f"the worker reported what is no measurement: {error}", host=remote.name) from error
    finally:
        if await remote.alive(process):
            await remote.stop(process, grace_s=STOP_GRACE_S)


def _facts(data: bytes) -> Iterator[facts.AnyFact]:
    """Whole lines that are facts."""
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        try:
            yield facts.decoder.decode(line)
        except msgspec.DecodeError as error:
            raise RemoteError(f"the worker wrote a line that is none of its own: {error}", host="") from error


def _calibration(question: Question, member: Member, cluster: ClusterSettings, measured: Measured) -> Calibration:
    device, recipe = member.device, question.recipe
    return Calibration(
        node=device.node,
        device=device.name,
        kind=device.kind,
        twin=device.twin,
        shape=question.shape,
        sequence_tokens=recipe.sequence_tokens,
        micro_batch=min(recipe.micro_batch_sequences, recipe.batch_sequences),
        compute_dtype=recipe.compute_dtype,
        recompute=recipe.recompute_activations,
        update=recipe.update,
        optimizer=recipe.optimizer.name,
        threads=launch_spec(cluster).threads_per_rank,
        versions=measured.versions,
        micro_batch_s=measured.micro_batch_s,
        update_s=measured.update_s,
        peak_bytes=measured.peak_bytes,
        steps=measured.steps,
        seconds=measured.seconds,
        at=time.time(),
    )
