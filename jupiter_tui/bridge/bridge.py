"""The console's side of the front door."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from textual.message import Message

from jupiter_engine.errors import JupiterError
from jupiter_engine.protocol.state import CycleState
from jupiter_engine.units import plain_text
from jupiter_tui.bridge.machines import MachineRoom
from jupiter_tui.bridge.messages import Broken, Pictured
from jupiter_tui.bridge.reader import Reader
from jupiter_tui.bridge.threads import Errand, Opener, Worker, open_workspace
from jupiter_tui.view.picture import Curve

if TYPE_CHECKING:
    from jupiter_engine.api import Outlook, SampleView, Workspace
    from jupiter_engine.protocol.commands import AnyCommand
    from jupiter_engine.protocol.rows import Chunk

T = TypeVar("T")

POLL_S: Final = 0.25
SLOW_POLL_S: Final = 0.5
"""Over ssh: fewer frames leave the line free for the answers to keys."""


class Bridge:
    """The console's side of the front door. All methods are called from the event loop."""

    def __init__(
        self,
        post: Callable[[Message], object],
        *,
        workspace: Path | None,
        domain: str = "",
        opener: Opener | None = None,
    ) -> None:
        chosen = opener or open_workspace
        self._post = post
        self.machines = MachineRoom(post, self.ask, self._later)
        self._reader = Reader(machines=self.machines, wanted_domain=domain)
        self._poll_s = SLOW_POLL_S if os.environ.get("SSH_CONNECTION") else POLL_S
        self._readers = Worker("jupiter-read", lambda: chosen(workspace), self._look)
        self._orders = Worker("jupiter-orders", lambda: chosen(workspace), lambda _: None)
        for worker in (self._readers, self._orders):
            worker.failed = self._failed
        self._readers.ended = self.machines.hang_up
        self._orders_started = False

    def start(self) -> None:
        """Open the workspace and begin to look; the first picture is posted as soon as it is read."""
        self._readers.start()

    def stop(self) -> None:
        """End the threads after what they do now; commands already given still go out."""
        self._readers.errands.put(None)
        self._orders.errands.put(None)
        if self._orders_started:
            self._orders.join(timeout=2.0)
        if self._readers.ident is not None:
            self._readers.join(timeout=2.0)

    def _failed(self, error: JupiterError) -> None:
        self._post(Broken(error))

    # -- questions -------------------------------------------------------------------------------
    async def ask(self, function: Callable[[Workspace], T]) -> T:
        """Run `function` in the reading thread; its JupiterErrors are raised here."""
        errand = Errand(function)
        self._readers.errands.put(errand)
        result: T = await asyncio.wrap_future(errand.future)
        return result

    async def samples(
        self, domain: str, cycle: int, *, status: str | None, search: str, limit: int
    ) -> list[SampleView]:
        return await self.ask(
            lambda w: w.samples(domain=domain, cycle=cycle, status=status, search=search, limit=limit)
        )

    async def count_samples(self, domain: str, cycle: int) -> dict[str, int]:
        """Samples of a cycle by status."""
        statuses = ("new", "accepted", "rejected", "reviewed")
        return await self.ask(
            lambda w: {status: w.count_samples(domain=domain, cycle=cycle, status=status) for status in statuses}
        )

    async def chunk(self, domain: str, chunk_id: str) -> Chunk | None:
        return await self.ask(lambda w: w.chunk(domain, chunk_id))

    async def outlook(self, domain: str) -> tuple[Outlook, str]:
        """The planner's answer for a domain's training, and what would make it fit."""
        from jupiter_engine.api import nearest_text

        def work_out(workspace: Workspace) -> tuple[Outlook, str]:
            answer = workspace.outlook(domain, compare=False)
            return answer, nearest_text(answer)

        return await self.ask(work_out)

    async def curve(self, cycle: CycleState) -> Curve:
        """The optimizer steps of a cycle's training, whole."""
        run = cycle.stages["train"].run

        def read(workspace: Workspace) -> Curve:
            curve = Curve(run=run)
            if run:
                curve.extend(workspace.metrics(run)[0])
            return curve

        return await self.ask(read)

    async def report(self, cycle: CycleState) -> str:
        """The text of a cycle's report; empty while there is none."""

        def read(workspace: Workspace) -> str:
            if not cycle.report:
                return ""
            path = workspace.root / cycle.report
            try:
                return plain_text(path.read_text(encoding="utf-8", errors="replace"))
            except OSError as error:
                return f"{path} cannot be read: {error.strerror or error}"

        return await self.ask(read)

    async def domain_path(self, name: str) -> Path:
        return await self.ask(lambda w: w.domain_path(name))

    async def new_domain(self, name: str, description: str) -> Path:
        """Write a new domain file from the template; raises UsageError or ConfigError."""

        def make(workspace: Workspace) -> Path:
            from jupiter_engine.settings.workspace import new_domain

            path = new_domain(workspace.root, name, description)
            self._reader.files_due = 0.0
            return path

        return await self.ask(make)

    # -- wishes of the screen --------------------------------------------------------------------
    def _later(self, function: Callable[[Workspace], None]) -> None:
        """Run something in the reading thread, and look at once after it."""
        self._readers.errands.put(Errand(function))
        self._readers.errands.put(Errand(self._look))

    def show_domain(self, name: str) -> None:
        """Make the pages about another domain."""

        def choose(_: Workspace) -> None:
            self._reader.wanted_domain = name

        self._later(choose)

    def show_rank(self, rank: int | None) -> None:
        """Follow the output of this rank; None: of none."""

        def choose(_: Workspace) -> None:
            self._reader.wanted_rank = rank

        self._later(choose)

    # -- commands --------------------------------------------------------------------------------
    async def perform(self, command: AnyCommand) -> None:
        """Give a command and wait for the engine's answer; a refusal raises UsageError with its sentence."""
        await self._order(lambda w: w.perform(command))

    async def wake_engine(self) -> None:
        """Start the engine process if none lives."""
        await self._order(lambda w: w.ensure_engine())

    async def _order(self, function: Callable[[Workspace], Any]) -> None:
        if not self._orders_started:
            self._orders_started = True
            self._orders.start()
        errand = Errand(function)
        self._orders.errands.put(errand)
        # Shielded: leaving a page must not withdraw a command that was already given.
        await asyncio.shield(asyncio.wrap_future(errand.future))
        # Look at once instead of at the next turn: the answer should be seen as soon as it is there.
        self._readers.errands.put(Errand(self._look))

    def _look(self, workspace: Workspace) -> float:
        """In the reading thread: post a picture if anything that a person can see has changed."""
        picture = self._reader.look(workspace)
        if picture is not None:
            self._post(Pictured(picture))
        return self._poll_s
