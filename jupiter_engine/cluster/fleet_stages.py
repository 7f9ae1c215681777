"""Makes machines ready for a stage: environment, inputs, order; for a group also how its ranks find each other."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import msgspec

from jupiter_engine.cluster.contents import HashCache
from jupiter_engine.cluster.fleet import Fleet
from jupiter_engine.cluster.hostfile import node_addresses, node_interfaces, node_rdma
from jupiter_engine.cluster.link import LinkFiles, has_leave, link
from jupiter_engine.cluster.placement import Island, Placement, with_hub
from jupiter_engine.cluster.push import push_environment
from jupiter_engine.cluster.runner import Hello, NodeRunner
from jupiter_engine.cluster.shipping import Shipment, ship
from jupiter_engine.cluster.site import Ready, Site, workspace_id
from jupiter_engine.cluster.stage import KEEP, RemoteStage, Successor, read_placement
from jupiter_engine.cluster.transfer import fetch_tree, send_tree
from jupiter_engine.errors import NodeUnreachable, NoUsableNode, RemoteError
from jupiter_engine.protocol.facts import Progress
from jupiter_engine.protocol.fleet import GroupPlan, Transfer
from jupiter_engine.protocol.orders import decoder as order_decoder
from jupiter_engine.protocol.specs import HostSpec, IslandSpec, LaunchSpec, Twin
from jupiter_engine.remote.failures import lasting
from jupiter_engine.settings.cluster import (
    HUB,
    ClusterSettings,
    GroupSpec,
    NodeSpec,
    load_cluster,
    node_by_name,
    sharding,
)

T = TypeVar("T")
Say = Callable[[str], None]
At = Callable[[Progress], None]
OUTPUT_LIMIT_BYTES = 64 << 30
"""More than the weights of any model that these machines train; a node is not to fill our disk."""


class FleetStages:
    """The engine's way to other machines; one fleet of open lines serves all its stages."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / ".jupiter"
        self.hashes = HashCache(self.home / "hashes.db")
        self._fleet: Fleet | None = None
        self._opened_with: ClusterSettings | None = None

    def stage(self, cluster: ClusterSettings, placement: Placement, folder: Path) -> RemoteStage:
        return RemoteStage(folder, self.home, placement.names(), _Preparation(self, cluster, placement, folder))

    def silent(self) -> frozenset[str]:
        if self._fleet is None:
            return frozenset()
        nodes = self._fleet.picture().nodes
        return frozenset(node.name for node in nodes if not node.local and node.state in ("lost", "refused"))

    async def fleet(self) -> Fleet:
        """The open fleet of the cluster file as it is now."""
        cluster = load_cluster(self.root / "config" / "cluster.yaml").value
        if self._fleet is not None and cluster != self._opened_with:
            await self.close()
        if self._fleet is None:
            self._fleet, self._opened_with = Fleet(cluster, self.root), cluster
            await self._fleet.open()
        return self._fleet

    async def runner(self, name: str) -> tuple[NodeRunner, Hello]:
        """The node runner of a machine, in place and up to date."""
        runner = await (await self.fleet()).runner(name)
        return runner, await runner.ensure()

    def workspace_on(self, runner: NodeRunner, *, local: bool) -> str:
        if local:
            return str(self.home)
        return str(PurePosixPath(runner.workdir) / "workspaces" / workspace_id(self.home))

    async def successor(self, others: Sequence[str], run: str) -> Successor | None:
        """Which of a group's other machines should lead instead, or which island's machine should merge: the one with
        the newest copy of a checkpoint, or of the hub's state. None as long as one of them still hears of the leading
        machine, or none answers."""
        found: list[Successor] = []
        for name in others:
            try:
                runner, _ = await self.runner(name)
                runs = PurePosixPath(self.workspace_on(runner, local=self._is_local(name))) / "runs"
                # The leading machine touches the leases every few seconds as long as it leads: of a group's ranks in
                # its own run folder, of an island's worker in the island's.
                heard = [
                    await runner.connection.run(
                        ("find", str(runs / run / "ranks"), "-path", "*/node/lease", "-mmin", "-1")
                    ),
                    await runner.connection.run(
                        ("find", str(runs), "-maxdepth", "3", "-path", f"*/{run}.*/node/lease", "-mmin", "-1")
                    ),
                ]
                listed = [
                    await runner.connection.run(("ls", str(runs / run / one))) for one in ("checkpoints", "copies")
                ]
            except RemoteError:
                continue
            if any(one.stdout.strip() for one in heard):
                return None
            names = "\n".join(one.stdout.decode("utf-8", "replace") for one in listed)
            found.append(Successor(name=name, step=_newest(names)))
        return max(found, key=lambda one: one.step, default=None)

    def _is_local(self, name: str) -> bool:
        assert self._opened_with is not None
        return node_by_name(self._opened_with, name).is_local()

    async def stop_abandoned(self, node: str, workspace: str, run: str, number: int) -> bool:
        try:
            runner, _ = await self.runner(node)
            await stop_run(runner, str(PurePosixPath(workspace) / "runs" / run), f"abandoned-{number}")
        except RemoteError:
            return False
        return True

    async def close(self) -> None:
        fleet, self._fleet = self._fleet, None
        if fleet is not None:
            await fleet.close()


def _newest(names: str) -> int:
    """How far the newest of the listed copies is: a checkpoint by its step, a hub's state by fence and round; -1: there
    is none."""
    steps = [int(step) for step in re.findall(r"^step-(\d{8})$", names, re.MULTILINE)]
    steps += [int(f"{fence}{number}") for fence, number in re.findall(r"^(\d{8})\.(\d{8})$", names, re.MULTILINE)]
    return max(steps, default=-1)


async def stop_run(runner: NodeRunner, run: str, command_id: str) -> None:
    """End what is kept for a run folder on a machine, if anything is."""
    if await runner.connection.read(f"{run}/{KEEP}/keep.json"):
        await runner.tell(f"{run}/{KEEP}", {"id": command_id, "do": "stop"})


async def _together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, or the first failure once the others have been ended: nothing goes on behind anybody's back."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


class _Preparation:
    """The Maker of one stage."""

    def __init__(self, stages: FleetStages, cluster: ClusterSettings, placement: Placement, folder: Path) -> None:
        self._stages, self._cluster, self._placement, self._folder = stages, cluster, placement, folder
        self._outputs: tuple[tuple[str, Path], ...] | None = None

    # -- Maker -----------------------------------------------------------------------------------
    async def prepare(self, say: Say, at: At) -> Ready:
        if self._placement.islands:
            return await self._prepare_islands(say, at)
        nodes = await self._answering(say)
        meter = _Meter(at)
        sites = await _together(self._site(node, meter) for node in nodes)
        twin = await self._twin(sites, nodes)
        launch, sites = await self._launch(self._placement.group, sites, twin, say)
        shipment = self._shipment(twin, launch)
        self._outputs = shipment.outputs
        await self._hand_over(sites[0])
        await _together(self._send(site, shipment, meter) for site in sites)
        return Ready(sites=tuple(sites), group=self._placement.group is not None)

    async def _prepare_islands(self, say: Say, at: At) -> Ready:
        """Everything on every machine; the order goes to the hub, which gives its islands theirs."""
        placement = await self._answering_islands(say)
        meter = _Meter(at)
        made = await _together(self._site(node, meter) for node in placement.nodes)
        sites = {site.name: site for site in made}
        hub, launches, leaders = made[0], [], []
        for island in placement.islands:
            own = [sites[name] for name in island.names()]
            twin = await self._twin(own, island.nodes)
            launch, ordered = await self._launch(island.group, own, twin, say, run=f"{self._folder.name}.{island.name}")
            launches.append(launch)
            leaders.append(ordered[0])
        links = await self._hub_links(hub, leaders)
        specs = tuple(
            IslandSpec(name=island.name, launch=launch, leader=self._island_leader(island, site, launch, links))
            for island, site, launch in zip(placement.islands, leaders, launches, strict=True)
        )
        whole = msgspec.structs.replace(
            self._alone(launches[0].twin, sum(launch.ranks for launch in launches)),
            islands=specs,
            rounds=self._cluster.islands.rounds,
            ssh_config=links.ssh_config,
        )
        say(f"{hub.name} merges the islands {', '.join(island.name for island in placement.islands)}")
        shipment = self._shipment(whole.twin, whole)
        self._outputs = shipment.outputs
        await self._hand_over(hub)
        await _together(self._send(site, shipment, meter, order=site is hub) for site in made)
        return Ready(sites=tuple(made), group=False, islands=True)

    async def leader(self, name: str) -> Site:
        node = node_by_name(self._cluster, name)
        runner, _ = await self._stages.runner(node.title())
        local = node.is_local()
        workspace = self._stages.workspace_on(runner, local=local)
        return Site(name=node.title(), local=local, runner=runner, workspace=workspace)

    def outputs(self) -> tuple[Path, ...]:
        if self._outputs is None:
            self._outputs = self._shipment("torch", LaunchSpec(twin="torch")).outputs
        return tuple(here for _, here in self._outputs)

    async def fetch(self, site: Site, at: At) -> None:
        if site.local:
            await self._clear_copies(site)
            return
        self.outputs()
        meter = _Meter(at)
        for there, here in self._outputs or ():
            await fetch_tree(
                site.runner,
                site.path(there),
                here,
                self._stages.hashes,
                meter.of(site.name),
                limit_bytes=OUTPUT_LIMIT_BYTES,
            )
        await self._clear_copies(site)

    async def _clear_copies(self, leader: Site) -> None:
        """Copies of checkpoints on the group's other machines are of no use once the model is home, nor are what hub
        and islands have exchanged."""
        if self._placement.islands:
            await self._clear_islands()
            return
        for node in self._placement.nodes:
            if node.title() == leader.name:
                continue
            # A machine that does not answer now keeps its copy until it is cleaned by hand; it costs only room.
            with contextlib.suppress(RemoteError):
                runner, _ = await self._stages.runner(node.title())
                run = self._stages.workspace_on(runner, local=node.is_local()) + f"/runs/{self._folder.name}"
                await runner.connection.run(["rm", "-rf", f"{run}/checkpoints"])

    async def _clear_islands(self) -> None:
        name = self._folder.name
        of = {node: island.name for island in self._placement.islands for node in island.names()}
        for node in self._placement.nodes:
            title = node.title()
            # Any of them may have been the hub before another one took over.
            big = [f"{name}/{one}" for one in ("copies", "state", "exchange")]
            if title in of:
                big += [f"{name}.{of[title]}/{one}" for one in ("checkpoints", "exchange")]
            # As above: what stays costs only room.
            with contextlib.suppress(RemoteError):
                runner, _ = await self._stages.runner(title)
                runs = self._stages.workspace_on(runner, local=node.is_local()) + "/runs"
                await runner.connection.run(["rm", "-rf", *(f"{runs}/{one}" for one in big)])

    # -- machines --------------------------------------------------------------------------------
    async def _answering(self, say: Say) -> list[NodeSpec]:
        """The machines that can be called now; a group goes without members that do not answer."""
        nodes = self._placement.nodes
        found = await asyncio.gather(*(self._stages.runner(node.title()) for node in nodes), return_exceptions=True)
        usable: list[NodeSpec] = []
        for node, answer in zip(nodes, found, strict=True):
            if not isinstance(answer, BaseException):
                usable.append(node)
            elif not isinstance(answer, NodeUnreachable) or lasting(answer) or node is nodes[0]:
                raise answer
            else:
                say(f"{node.title()} is left out of the group: {answer.detail}")
        return usable

    async def _answering_islands(self, say: Say) -> Placement:
        """The hub and those islands that can be called now, each without members that do not answer.

        NodeUnreachable (try again) if the hub does not answer, or too few islands for a merge do.
        """
        nodes = self._placement.nodes
        answers = await asyncio.gather(*(self._stages.runner(node.title()) for node in nodes), return_exceptions=True)
        silent: dict[str, NodeUnreachable] = {}
        for node, answer in zip(nodes, answers, strict=True):
            if isinstance(answer, BaseException):
                if not isinstance(answer, NodeUnreachable) or lasting(answer) or node is nodes[0]:
                    raise answer
                silent[node.title()] = answer
        usable: list[Island] = []
        for island in self._placement.islands:
            rest = tuple(node for node in island.nodes if node.title() not in silent)
            if rest:
                usable.append(replace(island, nodes=rest))
        if len(usable) < max(1, self._cluster.islands.rounds.quorum):
            raise next(iter(silent.values()))
        for name, error in silent.items():
            say(f"{name} is left out of its island: {error.detail}")
        return with_hub(nodes[0], usable)

    async def _site(self, node: NodeSpec, meter: _Meter) -> Site:
        runner, _ = await self._stages.runner(node.title())
        local = node.is_local()
        environment = await push_environment(
            runner, node, root=self._stages.root, hashes=self._stages.hashes, on_transfer=meter.of(node.title())
        )
        return Site(
            name=node.title(),
            local=local,
            runner=runner,
            workspace=self._stages.workspace_on(runner, local=local),
            python=environment.python,
            env=environment.env,
        )

    async def _twin(self, sites: Sequence[Site], nodes: Sequence[NodeSpec]) -> Twin:
        twins: dict[str, Twin] = {}
        for site, node in zip(sites, nodes, strict=True):
            twins[site.name] = await self._twin_of(site, node)
        if len(set(twins.values())) > 1:
            named = ", ".join(f"{name} {twin}" for name, twin in twins.items())
            raise NoUsableNode(
                f"one group cannot mix frameworks ({named})", fix="make a group of each kind in config/cluster.yaml"
            )
        return next(iter(twins.values()))

    async def _twin_of(self, site: Site, node: NodeSpec) -> Twin:
        if self._cluster.launch.twin != "auto":
            return self._cluster.launch.twin
        if node.device_type is not None:
            return "mlx" if node.device_type == "mac" else "torch"
        hello = await site.runner.hello()
        return "mlx" if (hello.system, hello.machine) == ("Darwin", "arm64") else "torch"

    # -- launch ----------------------------------------------------------------------------------
    def _alone(self, twin: Twin, ranks: int) -> LaunchSpec:
        """What the cluster file says about every launch."""
        launch, retries = self._cluster.launch, self._cluster.retries
        return LaunchSpec(
            twin=twin,
            ranks=ranks,
            threads_per_rank=launch.threads_per_rank,
            sharding=sharding(self._cluster),
            compile=launch.compile,
            restarts_per_hour=retries.group_restarts_per_hour,
            host_lost_after_s=retries.node_lost_after_s,
        )

    async def _launch(
        self, group: GroupSpec | None, sites: Sequence[Site], twin: Twin, say: Say, *, run: str = ""
    ) -> tuple[LaunchSpec, list[Site]]:
        """How training starts on these machines, and the machines in rank order; `run`: name of its run folder there,
        where it is not the stage's own."""
        alone = self._alone(twin, self._cluster.launch.ranks if group is None else group.ranks_per_node)
        if group is None or (len(sites) == 1 and group.launcher != "direct"):
            several = "torchrun" if twin == "torch" else "mlx.launch"
            launcher = "in_process" if alone.ranks == 1 else several
            own = node_by_name(self._cluster, sites[0].name).micro_batch_sequences
            return msgspec.structs.replace(alone, launcher=launcher, micro_batch_sequences=own), list(sites)
        present = msgspec.structs.replace(group, nodes=tuple(site.name for site in sites))
        plan = await (await self._stages.fleet()).plan(present)
        if plan.problems:
            raise NoUsableNode(
                f"the group {group.name} cannot be launched: {' '.join(plan.problems)}",
                fix="`jupiter nodes topology` and `jupiter doctor` show what is missing",
            )
        say(f"group {group.name}: {plan.reason}")
        by_name = {site.name: site for site in sites}
        ordered = [by_name[name] for name in plan.nodes]
        links = await self._links(present, plan, ordered)
        hosts = tuple(self._host(site, plan, links, group, run or self._folder.name) for site in ordered)
        whole = msgspec.structs.replace(
            alone,
            ranks=sum(host.ranks for host in hosts),
            launcher="direct" if group.launcher == "direct" else ("torchrun" if twin == "torch" else "mlx.launch"),
            backend=plan.backend,
            hosts=hosts,
            ssh_config=links.ssh_config,
        )
        return whole, ordered

    async def _links(self, group: GroupSpec, plan: GroupPlan, sites: Sequence[Site]) -> LinkFiles:
        if len(sites) == 1:
            return LinkFiles(ssh_config="", aliases={})
        if not has_leave(self._stages.root, group):
            raise NoUsableNode(
                f"{plan.nodes[0]}, which leads the group {group.name}, has no leave to call the other machines by ssh",
                fix=f"`jupiter nodes link --group {group.name}` gives it a key of this workspace for that",
            )
        fleet = await self._stages.fleet()
        connections = {site.name: site.connection for site in sites}
        ordered = msgspec.structs.replace(group, nodes=plan.nodes)
        return await link(self._cluster, ordered, connections, root=self._stages.root, known_hosts=fleet.known_hosts)

    async def _hub_links(self, hub: Site, leaders: Sequence[Site]) -> LinkFiles:
        """The hub's way to the machines that lead the islands."""
        others = [site for site in leaders if site.name != hub.name]
        if not others:
            return LinkFiles(ssh_config="", aliases={})
        whole = GroupSpec(name=HUB, nodes=(hub.name, *(site.name for site in others)))
        if not has_leave(self._stages.root, whole):
            raise NoUsableNode(
                f"{hub.name}, which merges the islands, has no leave to call their leading machines by ssh",
                fix=f"`jupiter nodes link --group {HUB}` gives it a key of this workspace for that",
            )
        fleet = await self._stages.fleet()
        connections = {site.name: site.connection for site in (hub, *others)}
        return await link(self._cluster, whole, connections, root=self._stages.root, known_hosts=fleet.known_hosts)

    def _island_leader(self, island: Island, site: Site, launch: LaunchSpec, links: LinkFiles) -> HostSpec:
        return HostSpec(
            name=site.name,
            ssh=links.aliases.get(site.name, ""),
            ranks=launch.hosts[0].ranks if launch.hosts else launch.ranks,
            runner=(site.runner.python, site.runner.file),
            python=site.python,
            run_folder=site.path(f"runs/{self._folder.name}.{island.name}"),
            addresses=("127.0.0.1",),
            env=site.env,
        )

    def _host(self, site: Site, plan: GroupPlan, links: LinkFiles, group: GroupSpec, run: str) -> HostSpec:
        env = dict(site.env)
        interface = node_interfaces(plan).get(site.name)
        if interface and plan.twin == "torch":
            # Without it gloo and NCCL may take a VPN's or Docker's interface.
            env |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
        return HostSpec(
            name=site.name,
            ssh=links.aliases.get(site.name, ""),
            ranks=group.ranks_per_node,
            runner=(site.runner.python, site.runner.file),
            python=site.python,
            run_folder=site.path(f"runs/{run}"),
            addresses=node_addresses(plan).get(site.name) or ("127.0.0.1",),
            rdma=node_rdma(plan).get(site.name, ()),
            env=env,
            micro_batch_sequences=node_by_name(self._cluster, site.name).micro_batch_sequences,
        )

    # -- files -----------------------------------------------------------------------------------
    def _shipment(self, twin: Twin, launch: LaunchSpec) -> Shipment:
        order = order_decoder.decode((self._folder / "order.json").read_bytes())
        return ship(order, home=self._stages.home, run_folder=self._folder, twin=twin, launch=launch)

    async def _hand_over(self, site: Site) -> None:
        """The machine's run folder tells the same story as ours, which the worker there then goes on with.

        Ours is ahead where another machine had the stage before; there is none where the stage is to be done anew.
        Either way whatever else lies there is of a former attempt: it is ended and put aside. Checkpoints stay, each
        names the training it belongs to.
        """
        if site.local:
            return
        run = site.path(f"runs/{self._folder.name}")
        events = self._folder / "events.jsonl"
        ours = events.read_bytes() if events.exists() else b""
        theirs = await site.connection.read(f"{run}/events.jsonl", limit_bytes=max(1, len(ours) + 1))
        if theirs[: len(ours)] == ours and bool(theirs) == bool(ours):
            return
        await stop_run(site.runner, run, f"anew-{read_placement(self._folder).round}")
        stale = ("events.jsonl", "metrics.jsonl", "state.json", "results", "trained.json", KEEP)
        paths = [f"{run}/{name}" for name in stale] if ours else [run]
        await site.connection.run(["rm", "-rf", *paths])
        if not ours:
            return
        for path in (events, *sorted(self._folder.glob("results/*.jsonl"))):
            await site.connection.write(f"{run}/{path.relative_to(self._folder).as_posix()}", path.read_bytes())

    async def _send(self, site: Site, shipment: Shipment, meter: _Meter, *, order: bool = True) -> None:
        run = site.path(f"runs/{self._folder.name}")
        spec = msgspec.json.encode(shipment.order)
        if not site.local:
            files: dict[str, dict[str, Path]] = {}
            for here, there in shipment.inputs:
                if here.is_dir():
                    await send_tree(site.runner, here, site.path(there), self._stages.hashes, meter.of(site.name))
                else:
                    folder, _, name = there.rpartition("/")
                    files.setdefault(folder, {})[name] = here
            for folder, named in files.items():
                await send_tree(site.runner, named, site.path(folder), self._stages.hashes, meter.of(site.name))
        if order:
            await site.connection.write(f"{run}/spec.json", spec)


class _Meter:
    """Transfers to several machines at once as one progress."""

    def __init__(self, at: At) -> None:
        self._at = at
        self._transfers: dict[str, Transfer] = {}

    def of(self, name: str) -> Callable[[Transfer], None]:
        def take(transfer: Transfer) -> None:
            self._transfers[name] = transfer
            self._report()

        return take

    def _report(self) -> None:
        found = list(self._transfers.values())
        rates = [one.bytes_per_s for one in found if one.bytes_per_s is not None]
        etas = [one.eta_s for one in found if one.eta_s is not None]
        busy = [f"{name}: {one.what} {one.step}" for name, one in self._transfers.items() if one.step]
        self._at(
            Progress(
                seq=0,
                at=time.time(),
                done=sum(one.sent_bytes for one in found),
                total=sum(one.total_bytes for one in found),
                unit="bytes",
                rate_per_s=sum(rates) if rates else None,
                eta_s=max(etas) if etas else None,
                note=", ".join(busy),
            )
        )
