"""A node's environment as this machine wants it: looked at, and built there only where something is missing.

Unchanged it costs one round trip: what the environment should be follows from notes of the last push, and
the node says whether that one is ready. Otherwise the wheels that its store lacks are sent (`carried`), or
the node gets them from its own package index (`index`) and only what that cannot give is sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from jupiter_engine.cluster.contents import HashCache, LocalFile
from jupiter_engine.cluster.conversation import Node, answer_of, ask, nonsense
from jupiter_engine.cluster.progress import Meter, OnTransfer
from jupiter_engine.cluster.project_wheel import project_wheel, wheel_name
from jupiter_engine.cluster.targets import IMPORTS, Kind, Target, kind_of, lowest_versions, requirements, target_of
from jupiter_engine.cluster.transfer import send_files
from jupiter_engine.cluster.wheels import Lock, NothingFits, Wheel, Wheelhouse
from jupiter_engine.cluster.wheels import constraints as wheel_constraints
from jupiter_engine.errors import JupiterError, StageFailed
from jupiter_engine.files import write_json
from jupiter_engine.node import wire
from jupiter_engine.protocol.fleet import Transfer
from jupiter_engine.settings.cluster import ClusterSettings, NodeSpec, node_by_name
from jupiter_engine.units import bytes_text, duration_text, plain_text

Mode = Literal["auto", "carried", "index"]
KEPT_ENVIRONMENTS = 2
"""The one of now and the one before it, for a way back."""
UNUSED_S = 30 * 86400
"""Files of a node's store that nothing has used for so long, and no folder holds, are removed with the next build."""
CLOCK_LIMIT_S = 86400.0
"""With a clock further off than this neither certificates nor times of files mean anything there."""
AT_ONCE = 8
PYTHONS_TRIED = 3


@dataclass(frozen=True, slots=True)
class Environment:
    """What runs Jupiter on a node."""

    python: str
    """Absolute, there."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables to be set for it."""
    hash: str = ""
    """Empty on this machine, whose own Python is used."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an environment must hold."""

    requirements: tuple[str, ...]
    imports: tuple[str, ...]


class _Note(msgspec.Struct, frozen=True, kw_only=True):
    """What the last push to a node came to."""

    kind: Kind
    requirements: tuple[str, ...]
    wanted_python: str
    python: str
    base: str
    """Digest of the lock; empty: the node's own packages."""

    def environment(self, code: LocalFile) -> str:
        parts = msgspec.json.encode([self.base, self.python, code.sha256])
        return hashlib.sha256(parts).hexdigest()[:32]


class Fleet(Protocol):
    """Where `push_all` gets its nodes from; see jupiter_engine.cluster.fleet."""

    async def runner(self, name: str) -> Node: ...


async def push_environment(
    node: Node,
    spec: NodeSpec,
    *,
    root: Path,
    hashes: HashCache,
    on_transfer: OnTransfer | None = None,
    mode: Mode = "auto",
    wanted: Callable[[Kind], Wanted] | None = None,
) -> Environment:
    """Make sure the node has the environment, and say what to run.

    `root` is the folder of the workspace; `wanted` says what a kind of machine needs (left out: what Jupiter does).
    Raises StageFailed if the node has no Python that will do, a wrong clock, or nothing can be installed there;
    NothingFits if there are no packages for it; DiskFull; RemoteError for a lost connection (push again: it goes on).
    """
    if spec.is_local():
        return Environment(python=sys.executable)
    wanted = wanted or _wanted
    house = Wheelhouse(root / ".jupiter" / "wheels")
    push = _Push(node, spec, house, hashes, on_transfer, mode, wanted)
    return await push.run()


async def push_all(
    fleet: Fleet,
    cluster: ClusterSettings,
    root: Path,
    names: Sequence[str],
    on_transfer: Callable[[str, Transfer], None] | None = None,
    *,
    mode: Mode = "auto",
) -> dict[str, Environment | JupiterError]:
    """`push_environment` to several nodes at once; by name what came of it, in the order of `names`."""
    hashes = HashCache(root / ".jupiter" / "hashes.db")
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(name: str) -> Environment | JupiterError:
        def tell(transfer: Transfer) -> None:
            if on_transfer is not None:
                on_transfer(name, transfer)

        async with gate:
            try:
                spec = node_by_name(cluster, name)
                if spec.is_local():
                    return Environment(python=sys.executable)
                node = await fleet.runner(name)
                return await push_environment(node, spec, root=root, hashes=hashes, on_transfer=tell, mode=mode)
            except JupiterError as error:
                return error

    found = await asyncio.gather(*(one(name) for name in names))
    return dict(zip(names, found, strict=True))


def _wanted(kind: Kind) -> Wanted:
    return Wanted(requirements(kind), IMPORTS[kind])


class _Push:
    """One push to one node."""

    def __init__(
        self,
        node: Node,
        spec: NodeSpec,
        house: Wheelhouse,
        hashes: HashCache,
        on_transfer: OnTransfer | None,
        mode: Mode,
        wanted: Callable[[Kind], Wanted],
    ) -> None:
        self._node, self._spec, self._house, self._hashes = node, spec, house, hashes
        self._on_transfer, self._mode, self._wanted = on_transfer, mode, wanted
        key = hashlib.sha256(f"{spec.title()}\n{spec.host}\n{node.workdir}".encode()).hexdigest()[:16]
        self._note_path = house.locks.parent / "nodes" / f"{key}.json"
        self._code = LocalFile("", "", 0, executable=False)

    async def run(self) -> Environment:
        self._code = await asyncio.to_thread(project_wheel, self._house.files)
        note = self._noted()
        name = note.environment(self._code) if note is not None else "-"
        arguments = (self._node.workdir, name, *((self._spec.python,) if self._spec.python else ()))
        answer = await ask(self._node, "environment-state", *arguments, limit_bytes=1 << 20)
        if isinstance(answer.get("ready"), dict):
            return self._environment(answer["ready"], name)
        facts = answer.get("facts")
        if not isinstance(facts, dict):
            raise nonsense(self._node, "without saying what is there")
        self._check_clock(facts)
        kind = kind_of(self._spec.device_type, facts)
        usable = self._usable(facts)
        if self._spec.environment == "own":
            return await self._own(kind, usable[0])
        return await self._built(kind, usable, facts)

    # -- what is known ---------------------------------------------------------------------------------
    def _noted(self) -> _Note | None:
        """The note of the last push, if it still says what is wanted."""
        try:
            note = msgspec.json.decode(self._note_path.read_bytes(), type=_Note)
        except (FileNotFoundError, msgspec.DecodeError):
            # Without a note the node is asked for everything.
            return None
        own = self._spec.environment == "own"
        same = (
            note.requirements == self._wanted(note.kind).requirements
            and note.wanted_python == (self._spec.python or "")
            and (note.base == "") == own
            and self._spec.device_type in (None, note.kind)
        )
        return note if same else None

    def _remember(self, note: _Note) -> None:
        self._note_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._note_path, note)

    def _environment(self, ready: dict[str, Any], name: str) -> Environment:
        python, env = ready.get("python"), ready.get("env")
        if not isinstance(python, str) or not python.startswith("/") or plain_text(python) != python:
            raise nonsense(self._node, f"{str(python)[:80]!r} as the Python of its environment")
        if not isinstance(env, dict) or any(key != "PYTHONPATH" for key in env):
            raise nonsense(self._node, f"{str(env)[:80]!r} as the variables of its environment")
        return Environment(python=python, env={key: str(value) for key, value in env.items()}, hash=name)

    def _check_clock(self, facts: dict[str, Any]) -> None:
        at = facts.get("at")
        skew_s = float(at) - time.time() if isinstance(at, int | float) else 0.0
        if abs(skew_s) > CLOCK_LIMIT_S:
            way = "ahead of" if skew_s > 0 else "behind"
            raise StageFailed(
                f"the clock of {self._spec.title()} is {duration_text(abs(skew_s))} {way} this machine's",
                fix="set it there (timedatectl set-ntp true; on a Mac: sudo sntp -sS time.apple.com)",
            )

    def _usable(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
        found = [one for one in facts.get("pythons", ()) if isinstance(one, dict)]
        usable = [one for one in found if "why" not in one]
        if usable:
            return usable
        seen = "; ".join(plain_text(f"{one.get('path')} {one.get('why')}") for one in found[:8]) or "none at all"
        named = f" as {self._spec.python}" if self._spec.python else ""
        raise StageFailed(
            f"{self._spec.title()} has no Python 3.11 or later{named}; found: {seen}",
            title="No usable Python",
            fix="install one there: brew install python@3.12 (Mac), sudo apt-get install python3 python3-venv (Debian, "
            "Ubuntu), sudo dnf install python3.12 (Fedora); or name one: `python: /path/to/python3.12` in cluster.yaml",
        )

    # -- a Python of the user's own --------------------------------------------------------------------
    async def _own(self, kind: Kind, python: dict[str, Any]) -> Environment:
        wanted = self._wanted(kind)
        note = self._note(kind, python, "")
        await send_files(self._node, [self._code], self._on_transfer)
        requires = {"requires": lowest_versions(wanted.requirements)}
        return await self._build(note, wanted, {"base": None, **requires})

    def _note(self, kind: Kind, python: dict[str, Any], base: str) -> _Note:
        return _Note(
            kind=kind,
            requirements=self._wanted(kind).requirements,
            wanted_python=self._spec.python or "",
            python=str(python["path"]),
            base=base,
        )

    # -- one that is built -----------------------------------------------------------------------------
    async def _built(self, kind: Kind, usable: list[dict[str, Any]], facts: dict[str, Any]) -> Environment:
        wanted = self._wanted(kind)
        python, lock = await self._locked(kind, usable, wanted)
        bases = facts.get("bases")
        there = isinstance(bases, list) and lock.digest() in bases
        wheels = lock.wheels if there else await self._deliver(lock, python)
        order = {
            "base": lock.digest(),
            "wheels": wheels,
            "installer": self._with_size(lock.installer),
        }
        if there:
            await send_files(self._node, [self._code], self._on_transfer)
        return await self._build(self._note(kind, python, lock.digest()), wanted, order)

    async def _locked(self, kind: Kind, usable: list[dict[str, Any]], wanted: Wanted) -> tuple[dict[str, Any], Lock]:
        """The newest Python for which there are packages as they are here, and those packages; failing that, the
        newest for which there are any."""
        if self._on_transfer is not None:
            self._on_transfer(
                Transfer(
                    what="environment",
                    sent_bytes=0,
                    total_bytes=0,
                    bytes_per_s=None,
                    eta_s=None,
                    step="choosing packages",
                )
            )
        reasons: dict[str, StageFailed] = {}
        for constraints in wheel_constraints(kind, wanted.requirements):
            for python in usable[:PYTHONS_TRIED]:
                try:
                    return python, await self._house.lock(self._target(python), wanted.requirements, constraints)
                except NothingFits as error:
                    reasons[str(python.get("path"))] = error
        detail = f"{self._spec.title()}: " + "; ".join(error.detail for error in reasons.values())
        raise NothingFits(detail, fix=next(iter(reasons.values())).fix)

    def _target(self, python: dict[str, Any]) -> Target:
        try:
            return target_of(python)
        except StageFailed as error:
            raise NothingFits(error.detail, fix=error.fix) from error
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise nonsense(self._node, f"{str(python)[:200]} as a description of a Python") from error

    def _with_size(self, wheel: Wheel) -> Wheel:
        here = self._house.local(wheel)
        return msgspec.structs.replace(wheel, size=here.size) if here is not None else wheel

    async def _deliver(self, lock: Lock, python: dict[str, Any]) -> tuple[Wheel, ...]:
        """Bring the lock's wheels and the code into the node's store; the wheels with their sizes."""
        if self._mode == "carried" or (self._mode == "auto" and self._house.complete(lock)):
            return await self._carry(lock)
        first = await self._files(lock.target, [lock.installer])
        await send_files(self._node, [*first, self._code], self._on_transfer)
        found, why = await self._from_index(lock, python)
        if found is not None:
            return found
        if self._mode == "index":
            detail = f"{self._spec.title()} could not get packages from its own index: {why}"
            raise StageFailed(detail, fix="push without forcing that: the packages are sent from here then")
        return await self._carry(lock)

    async def _carry(self, lock: Lock) -> tuple[Wheel, ...]:
        files = await self._files(lock.target, [*lock.wheels, lock.installer])
        await send_files(self._node, [*files, self._code], self._on_transfer)
        return tuple(self._with_size(wheel) for wheel in lock.wheels)

    async def _files(self, target: Target, wheels: Sequence[Wheel]) -> list[LocalFile]:
        """Wheels of this machine; one that its disk damaged is fetched anew."""
        files = await self._house.fetch(target, wheels, self._on_transfer)
        named = {file.sha256: Path(file.path) for file in files}
        contents = await asyncio.to_thread(self._hashes.contents, named)
        damaged = [file for name, file in contents.files.items() if file.sha256 != name]
        for file in damaged:
            self._house.drop(file)
        return await self._house.fetch(target, wheels, self._on_transfer) if damaged else files

    async def _from_index(self, lock: Lock, python: dict[str, Any]) -> tuple[tuple[Wheel, ...] | None, str]:
        """The wheels with their sizes, or why the node could not get them."""
        meter = Meter(self._on_transfer, "environment", step="downloading packages")
        order = {"python": python["path"], "installer": self._with_size(lock.installer), "wheels": lock.wheels}
        answer = await self._converse("environment-download", order, meter)
        if not isinstance(answer.get("wheels"), list):
            return None, plain_text(str(answer.get("failed")))[:500]
        sizes = {str(one.get("sha256")): one.get("size") for one in answer["wheels"] if isinstance(one, dict)}
        wheels: list[Wheel] = []
        for wheel in lock.wheels:
            size = sizes.get(wheel.sha256)
            if not isinstance(size, int) or size <= 0:
                raise nonsense(self._node, f"without {wheel.filename}, which it said it had")
            wheels.append(msgspec.structs.replace(wheel, size=size))
        return tuple(wheels), ""

    async def _build(self, note: _Note, wanted: Wanted, order: dict[str, Any]) -> Environment:
        name = note.environment(self._code)
        code = Wheel(name="jupiter", version="0", filename=wheel_name(), sha256=self._code.sha256, size=self._code.size)
        whole = {"hash": name, "python": note.python, "imports": wanted.imports, "code": code, **order}
        answer = await self._converse("environment-build", whole, Meter(self._on_transfer, "environment"))
        if not isinstance(answer.get("ready"), dict):
            raise nonsense(self._node, "without saying that its environment is ready")
        environment = self._environment(answer["ready"], name)
        await asyncio.to_thread(self._remember, note)
        arguments = (self._node.workdir, str(KEPT_ENVIRONMENTS))
        await ask(self._node, "environment-prune", *arguments, limit_bytes=1 << 20)
        await ask(self._node, "store-prune", self._node.workdir, str(UNUSED_S), limit_bytes=1 << 20)
        return environment

    async def _converse(self, verb: str, order: dict[str, Any], meter: Meter) -> dict[str, Any]:
        """Give an order, tell its steps on, and return its last answer."""
        stream = await self._node.connection.stream(self._node.argv(verb, self._node.workdir))
        try:
            await stream.write(msgspec.json.encode(order) + b"\n")
            await stream.close_input()
            while "step" in (answer := await answer_of(self._node, stream, wire.HEADER_BYTES)):
                meter.step(_step_text(answer))
            return answer
        finally:
            await stream.close()


def _step_text(answer: dict[str, Any]) -> str:
    step = plain_text(str(answer["step"]))[:40]
    done, total = answer.get("done"), answer.get("total")
    if isinstance(done, int) and isinstance(total, int) and total > 0:
        return f"{step} {done} of {total}"
    return f"{step} {bytes_text(done)}" if isinstance(done, int) and done > 0 else step
