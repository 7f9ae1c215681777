"""All machines of a cluster file as one: a line to each, what they say about themselves, and the doctor.

Everything runs in one event loop. A machine that cannot be used never stops the others: it is in the picture with
its problem and what mends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import msgspec

from jupiter_engine.cluster import doctor, link, measure, probe
from jupiter_engine.cluster.doctor import Evidence, Former, Problem
from jupiter_engine.cluster.doctor.evidence import Login, node_fact
from jupiter_engine.cluster.machine import NodeTools
from jupiter_engine.cluster.placement import islands_text
from jupiter_engine.cluster.runner import NodeRunner
from jupiter_engine.cluster.topology import plan_group
from jupiter_engine.errors import JupiterError, RemoteError, StateError
from jupiter_engine.files import read_json, write_json
from jupiter_engine.protocol.fleet import (
    Finding,
    Fix,
    FleetPicture,
    GroupPlan,
    NodeFacts,
    NodeState,
    NodeStatus,
    Transfer,
)
from jupiter_engine.protocol.specs import Twin
from jupiter_engine.remote import failures
from jupiter_engine.remote.host_keys import KnownHosts
from jupiter_engine.remote.line import SSH_CONFIG, Line, line_to
from jupiter_engine.remote.port import Connection
from jupiter_engine.settings.cluster import (
    ClusterSettings,
    GroupSpec,
    NodeSpec,
    default_groups,
    group_nodes,
    hub_group,
    node_by_name,
    node_twin,
)
from jupiter_engine.units import plain_text

AT_ONCE: Final = 64
"""Machines that are called or asked at the same time."""
KNOWN_HOSTS: Final = Path(".jupiter") / "known_hosts"
SEEN: Final = Path(".jupiter") / "fleet.json"
FIX_TIMEOUT_S: Final = 60.0


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What the doctor saw the last time, by node."""

    nodes: dict[str, Former] = {}
    version: int = 1


@dataclass(slots=True)
class Member:
    """One machine with all that is known of it."""

    node: NodeSpec
    line: Line
    runner: NodeRunner | None = None
    on: Connection | None = None
    """The connection that `runner` was made for."""
    facts: NodeFacts | None = None
    ticks: probe.Ticks | None = None
    failure: JupiterError | None = None
    """Why it cannot be used although its line is up: no Python, an answer that is none."""
    failed_at: float = 0.0
    transfer: Transfer | None = None
    ensuring: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        return self.node.title()


class Fleet:
    """The machines of one cluster file."""

    def __init__(
        self,
        cluster: ClusterSettings,
        root: Path,
        *,
        known_hosts: KnownHosts | None = None,
        ssh_config: Path | None = SSH_CONFIG,
        at_once: int = AT_ONCE,
    ) -> None:
        """`root`: the workspace. Nothing is called before `open`."""
        self.cluster = cluster
        self.root = root
        self.known_hosts = known_hosts or KnownHosts(root / KNOWN_HOSTS)
        self._members: dict[str, Member] = {}
        for node in cluster.nodes:
            line = line_to(node, cluster.connection, known_hosts=self.known_hosts, ssh_config=ssh_config)
            member = Member(node=node, line=line)
            self._members[member.name] = member
            line.listen(lambda _: self._changed())
        self._room = asyncio.Semaphore(at_once)
        self._groups: tuple[GroupPlan, ...] = ()
        self._findings: tuple[Finding, ...] = ()
        self._findings_at = 0.0
        self._listeners: list[Callable[[], None]] = []
        self._calling: set[asyncio.Task[None]] = set()

    def inherit(self, former: Fleet) -> None:
        """Take over what an earlier fleet of this workspace knows of the machines that are still the same."""
        for name, member in self._members.items():
            known = former._members.get(name)
            if known is not None and known.node == member.node:
                member.facts, member.ticks = known.facts, known.ticks
        self._findings = tuple(one for one in former._findings if set(one.nodes) <= set(self._members))
        self._findings_at = former._findings_at

    # -- open and close ------------------------------------------------------------------------------------
    async def open(self) -> None:
        """Begin to call every machine, at most `at_once` at a time; returns at once."""
        for member in self._members.values():
            task = asyncio.create_task(self._first_call(member))
            self._calling.add(task)
            task.add_done_callback(self._calling.discard)

    async def _first_call(self, member: Member) -> None:
        async with self._room:
            # What comes of it stands in the line's state; here only the number of calls at once counts.
            with contextlib.suppress(JupiterError):
                await member.line.connection()

    async def close(self) -> None:
        """Hang up everywhere."""
        for task in [*self._calling]:
            task.cancel()
        await asyncio.gather(*self._calling, return_exceptions=True)
        await asyncio.gather(*(member.line.close() for member in self._members.values()))

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Fleet]:
        """`open` on the way in, `close` on the way out."""
        await self.open()
        try:
            yield self
        finally:
            await self.close()

    def wake(self, names: Iterable[str] | None = None) -> None:
        """Call machines at once that wait for their next call (all of them without names)."""
        for member in self._some(names):
            member.failure = None
            if member.line.state != "online":
                member.line.wake()

    # -- looking -------------------------------------------------------------------------------------------
    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Be told after every change of the picture; the result ends that."""
        self._listeners.append(listener)

        def end() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return end

    def _changed(self) -> None:
        for listener in [*self._listeners]:
            listener()

    def picture(self) -> FleetPicture:
        """Everything as it is known now; never waits."""
        return FleetPicture(
            at=time.time(),
            nodes=tuple(self._status(member) for member in self._members.values()),
            groups=self._groups,
            islands=islands_text(self.cluster),
            findings=self._findings,
            findings_at=self._findings_at,
        )

    def _status(self, member: Member) -> NodeStatus:
        problem = self._problem(member)
        state: NodeState = member.line.state
        if state == "online" and member.failure is not None and failures.lasting(member.failure):
            state = "refused"
        return NodeStatus(
            name=member.name,
            host=member.node.host,
            role=member.node.role,
            local=member.node.is_local(),
            state=state,
            facts=member.facts,
            problem=problem.text if problem is not None else "",
            fix=problem.fix if problem is not None else "",
            transfer=member.transfer,
            since=max(member.line.since, member.failed_at),
        )

    def _problem(self, member: Member) -> Problem | None:
        failure = member.line.failure or member.failure
        return None if failure is None else Problem(text=plain_text(failure.detail), fix=plain_text(failure.fix))

    def names(self) -> tuple[str, ...]:
        return tuple(self._members)

    def facts(self, name: str) -> NodeFacts | None:
        """What the node last said; None before its first answer. UsageError if it is no node."""
        return self._named(name).facts

    def show_transfer(self, name: str, transfer: Transfer | None) -> None:
        """Something is being sent to this node; None: no longer. Nothing is shown of what is no node any more."""
        member = self._members.get(name)
        if member is not None:
            member.transfer = transfer
            self._changed()

    # -- machines ------------------------------------------------------------------------------------------
    async def connection(self, name: str, *, wait_s: float | None = None) -> Connection:
        """The node's connection; see Line.connection. JupiterError with the reason if there is none, UsageError if
        it is no node of the cluster file (any more)."""
        return await self._named(name).line.connection(wait_s=wait_s)

    async def runner(self, name: str, *, wait_s: float | None = None) -> NodeRunner:
        """The node's runner, put there if need be. JupiterError with the reason if it cannot be, UsageError if it is
        no node of the cluster file (any more)."""
        member = self._named(name)
        connection = await member.line.connection(wait_s=wait_s)
        async with member.ensuring:
            if member.runner is not None and member.on is connection:
                return member.runner
            node = member.node
            if node.is_local():
                runner = NodeRunner(connection, str(self.root / ".jupiter"), sys.executable)
            else:
                runner = NodeRunner(connection, node.workdir, node.python)
            try:
                await runner.ensure()
            except JupiterError as error:
                self._fail(member, error)
                raise
            member.runner, member.on = runner, connection
            return runner

    def _fail(self, member: Member, error: JupiterError) -> None:
        # A connection that broke is the line's own news; here is only what keeps a reachable machine from use.
        if member.line.state == "online":
            member.failure, member.failed_at = error, time.time()
            self._changed()

    def _some(self, names: Iterable[str] | None) -> list[Member]:
        return [self._named(name) for name in names] if names is not None else list(self._members.values())

    def _named(self, name: str) -> Member:
        """The machine of this title, or that people call so; UsageError, which names those there are, if none is."""
        member = self._members.get(name)
        return member if member is not None else self._members[node_by_name(self.cluster, name).title()]

    # -- facts ---------------------------------------------------------------------------------------------
    async def refresh_facts(
        self, *, fast: bool = False, names: Iterable[str] | None = None, wait_s: float | None = None
    ) -> None:
        """Ask the machines (all of them without names) about themselves. `fast`: only what changes from second to
        second, where the rest is known. A machine's problem is in the picture and not raised; UsageError for a name
        that is no node's."""
        members = self._some(names)
        await asyncio.gather(*(self._refresh(member, fast, wait_s) for member in members))

    async def _refresh(self, member: Member, fast: bool, wait_s: float | None) -> None:  # noqa: FBT001
        local = member.node.is_local()
        async with self._room:
            try:
                runner = await self.runner(member.name, wait_s=wait_s)
                if fast and member.facts is not None:
                    reading = await probe.ask(runner, workdir=runner.workdir, fast=True)
                    facts = probe.renewed(member.facts, reading, local=local, before=member.ticks)
                else:
                    rtt_s = await probe.round_trip(runner.connection)
                    reading = await probe.ask(runner, workdir=runner.workdir, python=self._python(member.node))
                    facts = probe.facts_of(
                        member.name,
                        member.node.host,
                        reading,
                        twin=node_twin(self.cluster, member.node),
                        local=local,
                        rtt_s=rtt_s,
                        before=member.ticks,
                    )
            except JupiterError as error:
                self._fail(member, error)
                return
            member.facts, member.ticks, member.failure = facts, probe.ticks_of(reading), None
        self._changed()

    @staticmethod
    def _python(node: NodeSpec) -> str:
        """Whose packages are meant: this interpreter, the named one, or (empty) the newest environment there."""
        if node.is_local():
            return sys.executable
        return (node.python or "") if node.environment == "own" else ""

    # -- groups --------------------------------------------------------------------------------------------
    async def plans(self, *, ask: bool = False) -> tuple[GroupPlan, ...]:
        """How each group would be launched, from the facts there are; `ask`: machines that have given none first."""
        groups = self.cluster.groups or default_groups(self.cluster)
        silent = {
            node.title()
            for group in groups
            for node in group_nodes(self.cluster, group)
            if self._members[node.title()].facts is None
        }
        if silent and ask:
            await self.refresh_facts(names=sorted(silent))
        self._groups = tuple(self._plan(group) for group in groups)
        self._changed()
        return self._groups

    async def plan(self, group: GroupSpec) -> GroupPlan:
        """How these machines would be launched now, from fresh facts; a group need not be one of the cluster file's."""
        await self.refresh_facts(names=[node.title() for node in group_nodes(self.cluster, group)])
        return self._plan(group)

    def _plan(self, group: GroupSpec) -> GroupPlan:
        nodes = group_nodes(self.cluster, group)
        facts = {node.title(): self._members[node.title()].facts for node in nodes}
        known = {name: one for name, one in facts.items() if one is not None}
        twins = sorted({one.twin for one in known.values()})
        twin: Twin = twins[0] if twins else (node_twin(self.cluster, nodes[0]) or "torch")
        problems = [f"{name} has not said yet what it is." for name in facts if name not in known]
        if len(twins) > 1:
            told = ", ".join(f"{name} {one.twin}" for name, one in known.items())
            problems.append(f"Its nodes have different frameworks ({told}); a group has one.")
        plan = plan_group(
            group.name,
            [tools_of(node, known.get(node.title())) for node in nodes],
            twin=twin,
            backend=group.backend,
            over=group.over,
            launcher=group.launcher,
            ranks_per_node=group.ranks_per_node,
        )
        if not problems:
            return plan
        # Without the answers of all of them whatever else the plan complains of may be wrong.
        return msgspec.structs.replace(plan, problems=tuple(problems), setup=())

    # -- the doctor ----------------------------------------------------------------------------------------
    async def examine(
        self,
        *,
        names: Collection[str] | None = None,
        echo_bytes: int = measure.ECHO_BYTES,
        progress: Callable[[str], None] | None = None,
    ) -> tuple[Finding, ...]:
        """Look at everything: facts of all machines, plans of all groups, what lies between them.

        `names`: only findings about these nodes. `progress` is told what is being done.
        """
        say = progress or (lambda _: None)
        say(f"asking {len(self._members)} node(s)")
        # One call of each decides: who is away now is reported, not waited for.
        self.wake()
        await self.refresh_facts()
        plans = await self.plans()
        evidence = self._evidence(plans)
        runners = {
            member.name: member.runner
            for member in self._members.values()
            if member.name in evidence.facts and member.runner is not None
        }
        between = measure.ways(plans, {member.name: member.node.ssh_port or 22 for member in self._members.values()})
        if between:
            say(f"measuring {len(between)} connection(s) between nodes")
        busy = {name for name, facts in evidence.facts.items() if node_fact(facts, "processes")}
        edges = await measure.edges(between, runners, busy=busy, echo_bytes=echo_bytes)
        found = doctor.examine(
            msgspec.structs.replace(evidence, edges=edges, logins=await self._logins(), at=time.time())
        )
        self._remember(evidence)
        if names is not None:
            found = tuple(one for one in found if not one.nodes or set(one.nodes) & set(names))
        else:
            self._findings, self._findings_at = found, time.time()
        self._changed()
        return found

    def _evidence(self, plans: tuple[GroupPlan, ...]) -> Evidence:
        usable = {
            member.name: member.facts
            for member in self._members.values()
            if member.facts is not None and member.line.state == "online" and member.failure is None
        }
        problems = {}
        for member in self._members.values():
            if member.name not in usable:
                problem = self._problem(member)
                problems[member.name] = problem or Problem(text="it has not answered yet", fix="look again in a moment")
        return Evidence(
            cluster=self.cluster,
            facts=usable,
            plans=plans,
            problems=problems,
            former=self._seen().nodes,
        )

    async def _logins(self) -> tuple[Login, ...]:
        """Whether each group's leading node gets into the others, where that has been set up before."""

        async def of(group: GroupSpec) -> list[Login]:
            leader, *others = group_nodes(self.cluster, group)
            usable = [self._members[node.title()] for node in (leader, *others)]
            if not others or any(member.line.state != "online" for member in usable[:1]):
                return []
            try:
                connection = await self.connection(leader.title())
                files = await link.made(self.cluster, group, connection, root=self.root)
                said = await link.check_links(connection, files) if files is not None else {}
            except JupiterError:
                # The leading node itself was lost meanwhile, which is said elsewhere.
                return []
            up = {member.name for member in usable if member.line.state == "online"}
            return [
                Login(a=leader.title(), b=name, works=not text, text=text) for name, text in said.items() if name in up
            ]

        groups = self.cluster.groups or default_groups(self.cluster)
        hub = hub_group(self.cluster)
        groups += (hub,) if hub is not None else ()
        return tuple(login for logins in await asyncio.gather(*(of(group) for group in groups)) for login in logins)

    def _seen(self) -> Seen:
        path = self.root / SEEN
        if not path.exists():
            return Seen()
        try:
            seen = read_json(path, Seen)
        except StateError:
            # Only a comparison with last time is lost.
            return Seen()
        assert isinstance(seen, Seen)
        return seen

    def _remember(self, evidence: Evidence) -> None:
        now = time.time()
        fresh = {
            name: Former(boot_id=facts.boot_id, wired_limit_mb=facts.wired_limit_mb, at=now)
            for name, facts in evidence.facts.items()
        }
        path = self.root / SEEN
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, Seen(nodes={**evidence.former, **fresh}))

    async def apply(self, fix: Fix) -> str:
        """Do what a safe fix says; returns what the command printed. JupiterError if it is not safe or fails."""
        if not fix.safe or not fix.argv:
            raise RemoteError(f"this is for a person to do: {fix.text}", host=fix.node or "this machine")
        local = next((member.name for member in self._members.values() if member.node.is_local()), None)
        name = fix.node or local
        if name is None or name not in self._members:
            raise RemoteError(f"there is no node {fix.node!r} to do it on", host=fix.node)
        connection = await self.connection(name, wait_s=self.cluster.connection.connect_timeout_s)
        done = await connection.run(fix.argv, timeout_s=FIX_TIMEOUT_S, limit_bytes=1 << 20)
        said = plain_text((done.stdout + done.stderr).decode("utf-8", "replace")).strip()
        if done.exit_status != 0:
            raise RemoteError(
                f"{' '.join(fix.argv)} on {name} ended with {done.exit_status}: {said[-400:] or 'it said nothing'}",
                host=connection.host,
                argv=fix.argv,
                exit_status=done.exit_status,
                output_tail=said[-2000:],
            )
        return said


def tools_of(node: NodeSpec, facts: NodeFacts | None) -> NodeTools:
    """A node as the planner of groups wants it."""
    if facts is None:
        return NodeTools(name=node.title(), host=node.host)
    system: Literal["Darwin", "Linux"] = "Darwin" if facts.system.startswith("Darwin") else "Linux"
    return NodeTools(name=node.title(), host=node.host, system=system, raw=facts.raw)
