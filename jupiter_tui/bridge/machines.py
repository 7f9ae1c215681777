"""The machines behind the Fleet page: opened when they are first looked at, asked only while somebody looks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from textual.message import Message

from jupiter_tui.bridge.messages import KeyAsked
from jupiter_tui.view.picture import Picture

if TYPE_CHECKING:
    from jupiter_engine.api import Discovered, OfferedKey, Workspace
    from jupiter_engine.protocol.fleet import Finding, Fix, FleetPicture
    from jupiter_engine.settings.cluster import NodeSpec

T = TypeVar("T")
Say = Callable[[str], None]
AskPerson = Callable[["OfferedKey", str], Future[bool]]


class Machines(Protocol):
    """What the console needs of `Workspace.fleet()`; its methods may be called from any thread."""

    problem: str

    def picture(self) -> FleetPicture: ...
    def watch(self, *, wanted: bool) -> None: ...
    def wake(self) -> None: ...
    def examine(self, progress: Say | None = None) -> Future[tuple[Finding, ...]]: ...
    def apply(self, fix: Fix) -> Future[str]: ...
    def discover(self) -> Future[Discovered]: ...
    def add(self, node: NodeSpec, ask: AskPerson, say: Say) -> Future[Any]: ...
    def trust(self, name: str, ask: AskPerson) -> Future[tuple[OfferedKey, bool]]: ...
    def remove(self, name: str) -> Future[Any]: ...
    def push(self, name: str) -> Future[str]: ...
    def link(self, group: str) -> Future[tuple[str, tuple[str, ...]]]: ...
    def close(self) -> None: ...


class AskWorkspace(Protocol):
    """Runs a function with the workspace in the reading thread."""

    def __call__(self, function: Callable[[Workspace], T], /) -> Awaitable[T]: ...


class MachineRoom:
    """The console's side of `Workspace.fleet()`."""

    def __init__(
        self,
        post: Callable[[Message], object],
        ask: AskWorkspace,
        later: Callable[[Callable[[Workspace], None]], None],
    ) -> None:
        """`ask` and `later` run something in the reading thread, with and without an answer."""
        self._post = post
        self._ask = ask
        self._later = later
        self._machines: Machines | None = None
        self._wanted = False
        self._doing: dict[object, str] = {}
        """What is under way; one entry each, in the order of their beginning."""

    # -- in the reading thread -------------------------------------------------------------------
    def look(self, workspace: Workspace, picture: Picture) -> Picture:
        """The picture with the machines in it, if they were ever looked at."""
        picture = replace(picture, fleet_doing=tuple(self._doing.values()))
        if self._machines is None and not self._wanted:
            return picture
        machines = self._open(workspace)
        return replace(picture, fleet=machines.picture(), fleet_problem=machines.problem)

    def _open(self, workspace: Workspace) -> Machines:
        if self._machines is None:
            self._machines = workspace.fleet()
            self._machines.watch(wanted=self._wanted)
        return self._machines

    def hang_up(self) -> None:
        """End all connections; nothing may be asked for after that."""
        if self._machines is not None:
            self._machines.close()

    # -- from the event loop ---------------------------------------------------------------------
    def watch(self, *, wanted: bool) -> None:
        """Whether somebody looks at the machines; they are called when this is first wanted."""
        self._wanted = wanted

        def tell(_: Workspace) -> None:
            if self._machines is not None:
                self._machines.watch(wanted=self._wanted)

        self._later(tell)

    async def _of(self, what: str, function: Callable[[Machines, Say], Future[T]]) -> T:
        """Await something that the machines' thread does; what it says stands in the picture meanwhile."""
        with self._under_way(what) as say:
            promised = await self._ask(lambda w: function(self._open(w), say))
            # Shielded: leaving a page must not end what was begun.
            result: T = await asyncio.shield(asyncio.wrap_future(promised))
        # Look at once instead of at the next turn.
        self._later(lambda _: None)
        return result

    @contextmanager
    def _under_way(self, what: str) -> Iterator[Say]:
        key = object()

        def say(text: str) -> None:
            # Words that come after the end are not shown any more.
            if key in self._doing:
                self._doing[key] = text

        self._doing[key] = what
        try:
            yield say
        finally:
            del self._doing[key]

    def _ask_person(self, key: OfferedKey, who: str) -> Future[bool]:
        answer: Future[bool] = Future()
        self._post(KeyAsked(key, who, answer))
        return answer

    async def reconnect(self) -> None:
        """Call machines that are away, and ask all of them now."""
        await self._ask(lambda w: self._open(w).wake())

    async def examine(self) -> tuple[Finding, ...]:
        """Let the doctor look at everything."""
        return await self._of("the doctor begins", lambda m, say: m.examine(say))

    async def apply_fix(self, fix: Fix) -> str:
        """Do what a safe fix says; returns what its command printed."""
        return await self._of(f"doing: {fix.text}", lambda m, _: m.apply(fix))

    async def discover(self) -> Discovered:
        """Machines that could be added."""
        return await self._of("looking for machines", lambda m, _: m.discover())

    async def add_node(self, **fields: Any) -> str:
        """Take a machine in (fields of a node of cluster.yaml); returns a sentence about it."""
        from jupiter_engine.settings.cluster import NodeSpec

        node = NodeSpec(**fields)
        joined = await self._of(f"calling {node.title()}", lambda m, say: m.add(node, self._ask_person, say))
        about = ", ".join(filter(None, (joined.node.device_type, joined.node.chip)))
        return " ".join([f"{joined.node.title()} is a node now: {about}.", *joined.warnings])

    async def trust(self, name: str) -> str:
        """Settle a node's key; returns a sentence about it."""
        key, decided = await self._of(f"calling {name}", lambda m, _: m.trust(name, self._ask_person))
        since = "from now on" if decided else "already"
        return f"{name} is trusted {since}, with {key.algorithm} {key.fingerprint}"

    async def remove_node(self, name: str) -> str:
        """Take a node out of cluster.yaml; returns a sentence about it."""
        removed = await self._of(f"taking {name} out", lambda m, _: m.remove(name))
        text = f"{removed.name} is no node any more; what Jupiter put there stays in {removed.workdir}"
        return ". ".join([text, *removed.stays, *removed.warnings])

    async def push(self, name: str) -> str:
        """Bring a node's environment up to date; returns its Python."""
        return await self._of(f"environment of {name}", lambda m, _: m.push(name))

    async def link(self, group: str) -> str:
        """Let a group's leading node call the others; returns a sentence about it."""
        leader, reached = await self._of(f"linking {group}", lambda m, _: m.link(group))
        return f"{group}: {leader} leads and calls {', '.join(reached) or 'nobody else: it is alone'}"
