"""A fleet as the console sees it, without machines: pictures that a test sets, and what the console asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from msgspec.structs import replace

from jupiter_engine.api import Discovered, OfferedKey
from jupiter_engine.cluster.joining import Joined
from jupiter_engine.cluster.upkeep import Removed
from jupiter_engine.errors import JupiterError
from jupiter_engine.protocol.fleet import (
    Finding,
    Fix,
    FleetPicture,
    Gpu,
    GroupPlan,
    Interface,
    Link,
    NodeFacts,
    NodeStatus,
    Transfer,
)
from jupiter_engine.settings.cluster import NodeSpec
from jupiter_engine.units import GIB, MIB

ESCAPES = "\x1b]52;c;cm0gLXJm\x07\x1b[2J\x1b[31mred\x1b[0m \u202ereversed"


def facts(name: str, **more: Any) -> NodeFacts:
    given: dict[str, Any] = {
        "name": name,
        "host": f"{name}.local",
        "system": "Darwin 25.2.0 arm64",
        "os_build": "25C56",
        "chip": "Apple M4 Max",
        "model": "Mac16,9",
        "cores": 16,
        "cpu_percent": 31.0,
        "memory_total_bytes": 64 * GIB,
        "memory_used_bytes": 45 * GIB,
        "disk_free_bytes": 812 * GIB,
        "load_1m": 3.25,
        "python": "3.13.7",
        "twin": "mlx",
        "accelerator": "Metal",
        "environment": "7f3c9a1e0b5d",
        "versions": {"mlx": "0.32.4", "jupiter": "0.1.0", "numpy": "2.4.6"},
        "clock_skew_s": 0.003,
        "rtt_s": 0.0004,
        "thermal": "nominal",
        "on_battery": False,
        "sleep": {"sleep": "0", "womp": "1"},
        "wired_limit_mb": 0,
        "interfaces": (
            Interface(name="en2", kind="thunderbolt", addresses=("10.211.0.1/30",), speed_bits_per_s=80_000_000_000),
            Interface(name="en0", kind="ethernet", addresses=("192.168.1.7/24",), speed_bits_per_s=1_000_000_000),
        ),
        "routes": ("192.168.1.0/24",),
    }
    return NodeFacts(**{**given, **more})


def node(name: str, state: str = "online", **more: Any) -> NodeStatus:
    known = facts(name) if state == "online" else None
    given: dict[str, Any] = {
        "name": name,
        "host": f"{name}.local",
        "role": "trainer",
        "local": False,
        "state": state,
        "facts": known,
        "since": time.time() - 192,
    }
    return NodeStatus(**{**given, **more})


CARD = Gpu(
    name="NVIDIA GeForce RTX 4090",
    memory_total_bytes=24 * GIB,
    memory_used_bytes=22 * GIB,
    utilisation_percent=97.0,
    temperature_c=71.0,
    power_w=410.0,
    power_limit_w=450.0,
    driver="580.95.05",
)

FIX = Fix(text="Let the machine stay awake while it works", argv=("caffeinate", "-is"), node="studio", safe=True)
FINDINGS = (
    Finding(
        check="unreachable",
        severity="fail",
        nodes=("mini-2",),
        text="mini-2 refuses connections.",
        fix=Fix(text="switch on Remote Login there"),
    ),
    Finding(check="sleep", severity="warn", nodes=("studio",), text="studio may fall asleep after 10 min.", fix=FIX),
    Finding(check="own-name", severity="info", nodes=("box",), text="box resolves to 127.0.1.1.", fix=None),
    Finding(check="disk", severity="ok", nodes=("studio", "box"), text="More than 100 GiB are free.", fix=None),
)

RING = GroupPlan(
    name="macs",
    nodes=("studio", "mini-1", "mini-2"),
    twin="mlx",
    backend="ring",
    launcher="mlx.launch",
    links=(
        Link(
            a="studio",
            b="mini-1",
            kind="thunderbolt",
            a_interface="en2",
            b_interface="en3",
            a_address="10.211.0.1",
            b_address="10.211.0.2",
            speed_bits_per_s=40_000_000_000,
            rtt_s=0.00042,
        ),
        Link(a="mini-1", b="mini-2", kind="thunderbolt"),
        Link(a="mini-2", b="studio", kind="thunderbolt"),
    ),
    reason="ring over Thunderbolt: mini-1 has Thunderbolt 4, which has no RDMA.",
    hostfile={"backend": "ring", "hosts": [{"ssh": "studio", "ips": ["10.211.0.1"]}]},
    setup=(Fix(text="give en2 its address", argv=("sudo", "ifconfig", "en2", "10.211.0.1/30"), node="studio"),),
)


def several(**more: Any) -> FleetPicture:
    """One node of every kind."""
    box = facts(
        "box",
        system="Linux 6.12.0 x86_64",
        os_build="6.12.0",
        chip="AMD Ryzen 9 7950X",
        gpus=(CARD,),
        twin="torch",
        accelerator="CUDA",
        environment="",
        clock_skew_s=4.2,
    )
    sending = Transfer(
        what="environment",
        sent_bytes=12 * MIB,
        total_bytes=27 * MIB,
        bytes_per_s=11.2 * MIB,
        eta_s=1.4,
        step="sending",
    )
    nodes = (
        node("laptop", local=True, role="hybrid", facts=facts("laptop", clock_skew_s=None)),
        node("studio", transfer=sending),
        node("mini-1", "connecting"),
        node("mini-2", "lost", problem="mini-2.local refuses connections.", fix="switch on Remote Login there"),
        node("mini-3", "refused", problem="another key than the known one", fix="`jupiter nodes trust mini-3`"),
        node("box", facts=box, role="hybrid"),
    )
    given: dict[str, Any] = {"at": time.time(), "nodes": nodes, "groups": (RING,)}
    return FleetPicture(**{**given, **more})


def hostile() -> FleetPicture:
    """Names and texts that would drive a terminal, be read as markup, or be much too long."""
    evil = f"evil[bold red]{ESCAPES}[/] name"
    known = facts(evil, chip=ESCAPES + "[on red]chip", versions={"mlx[/]": ESCAPES}, system="Linux\n\nmore\r[blink]")
    first = node(evil, facts=known, host="h[b]" + ESCAPES, role="trainer")
    second = node("n" * 300, "lost", problem=ESCAPES + "[link=x]" + "p" * 2000, fix="[@click=app.exit]go[/]")
    plan = replace(RING, name="g[b]" + ESCAPES, nodes=(evil, "n" * 300), links=(), reason=ESCAPES + "r" * 500)
    command = Fix(text=ESCAPES + "[b]", argv=("rm", "-rf", ESCAPES), node=evil, safe=True)
    bad = Finding(check="c[b]" + ESCAPES, severity="warn", nodes=(evil,), text=ESCAPES + "t" * 900, fix=command)
    return FleetPicture(nodes=(first, second), groups=(plan,), findings=(bad,), findings_at=time.time())


def many(count: int = 64, at: float = 0.0) -> FleetPicture:
    """A large fleet; `at` moves the numbers of every tenth node."""
    nodes = tuple(
        node(f"node-{i:02d}", facts=facts(f"node-{i:02d}", load_1m=1.0 + (at if i % 10 == 0 else 0.0)))
        for i in range(count)
    )
    return FleetPicture(at=at, nodes=nodes)


class PlayedMachines:
    """What `Workspace.fleet()` gives, played: no thread, no connection."""

    def __init__(self, shown: FleetPicture | None = None) -> None:
        self.shown = shown or FleetPicture()
        self.problem = ""
        self.asked: list[tuple[str, Any]] = []
        self.watched: list[bool] = []
        self.closed = False
        self.findings: tuple[Finding, ...] = FINDINGS
        self.failure: JupiterError | None = None
        """What the next request ends with instead of an answer."""
        self.key: OfferedKey | None = None
        """Put before a person by `add` and `trust`."""
        self.says: tuple[str, ...] = ()
        self.offers = Discovered()
        self.held: Future[Any] | None = None
        """Given as the answer of `examine` if set, so that a test decides when it ends."""

    def picture(self) -> FleetPicture:
        return self.shown

    def watch(self, *, wanted: bool) -> None:
        self.watched.append(wanted)

    def wake(self) -> None:
        self.asked.append(("wake", None))

    def close(self) -> None:
        self.closed = True

    def _done(self, what: str, about: Any, result: Any) -> Future[Any]:
        self.asked.append((what, about))
        future: Future[Any] = Future()
        failure, self.failure = self.failure, None
        if failure is not None:
            future.set_exception(failure)
        else:
            future.set_result(result)
        return future

    def examine(self, progress: Callable[[str], None] | None = None) -> Future[tuple[Finding, ...]]:
        if progress is not None:
            for text in self.says:
                progress(text)
        self.shown = replace(self.shown, findings=self.findings, findings_at=time.time())
        if self.held is not None:
            self.asked.append(("examine", None))
            return self.held
        return self._done("examine", None, self.findings)

    def apply(self, fix: Fix) -> Future[str]:
        return self._done("apply", fix, "done")

    def discover(self) -> Future[Discovered]:
        return self._done("discover", None, self.offers)

    def add(
        self, node: NodeSpec, ask: Callable[[OfferedKey, str], Future[bool]], say: Callable[[str], None]
    ) -> Future[Any]:
        say(f"looking at {node.title()}")
        if self.key is None:
            return self._done("add", node, Joined(node=node, facts=facts(node.title())))
        return self._decided("add", node, ask, node.title(), Joined(node=node, facts=facts(node.title())))

    def trust(self, name: str, ask: Callable[[OfferedKey, str], Future[bool]]) -> Future[tuple[OfferedKey, bool]]:
        return self._decided("trust", name, ask, name)

    def _decided(
        self, what: str, about: Any, ask: Callable[[OfferedKey, str], Future[bool]], who: str, result: Any = None
    ) -> Future[Any]:
        assert self.key is not None
        key = self.key
        future: Future[Any] = Future()

        def answered(answer: Future[bool]) -> None:
            self.asked.append((what, (about, answer.result())))
            future.set_result(result or (key, answer.result()))

        ask(key, who).add_done_callback(answered)
        return future

    def remove(self, name: str) -> Future[Removed]:
        return self._done("remove", name, Removed(name=name, workdir="~/.jupiter"))

    def push(self, name: str) -> Future[str]:
        return self._done("push", name, "/home/x/.jupiter/environments/7f3c/bin/python")

    def link(self, group: str) -> Future[tuple[str, tuple[str, ...]]]:
        return self._done("link", group, ("studio", ("mini-1", "mini-2")))
