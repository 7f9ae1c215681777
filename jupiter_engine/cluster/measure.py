"""What lies between nodes, measured from the nodes themselves: time to connect, detached too, and bytes a second."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Final

import msgspec

from jupiter_engine.cluster.doctor.evidence import Edge
from jupiter_engine.cluster.readers.reading import real, short, table
from jupiter_engine.cluster.runner import NodeRunner
from jupiter_engine.errors import RemoteError
from jupiter_engine.protocol.fleet import GroupPlan
from jupiter_engine.units import MIB

ECHO_BYTES: Final = 256 * MIB
"""At most, and for at most two seconds, in each direction."""
LISTEN_BYTES: Final = 64 * 1024
"""Where only the listening is tried, because a run is under way."""
LEAST_FOR_A_RATE: Final = 8 * MIB
_TIMEOUT_S: Final = 20.0

Runners = Mapping[str, NodeRunner]
Ask = Callable[[NodeRunner], Awaitable[dict[str, Any]]]


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """From node `a` to an address of node `b`, at a port where ssh listens."""

    a: str
    b: str
    address: str
    port: int

    def target(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def ways(plans: Sequence[GroupPlan], ports: Mapping[str, int]) -> tuple[Way, ...]:
    """Both directions of every link of the plans that has addresses, each once."""
    found: dict[tuple[str, str, str], Way] = {}
    for plan in plans:
        for link in plan.links:
            for a, b, address in ((link.a, link.b, link.b_address), (link.b, link.a, link.a_address)):
                if address and a != b:
                    found.setdefault((a, b, address), Way(a=a, b=b, address=address, port=ports.get(b, 22)))
    return tuple(found.values())


async def edges(
    between: Sequence[Way], runners: Runners, *, busy: Collection[str] = (), echo_bytes: int = ECHO_BYTES
) -> tuple[Edge, ...]:
    """Measure every way whose start answers. Nodes in `busy` work for a run: nothing big is sent to or from them."""
    known = [way for way in between if way.a in runners]
    plain = await _reach(known, runners)
    detached = await _reach(known, runners, "--detached")
    found: dict[Way, Edge] = {}
    for way in known:
        answer, alone = plain.get(way, {}), detached.get(way)
        found[way] = Edge(
            a=way.a,
            b=way.b,
            address=way.address,
            rtt_s=real(answer.get("rtt_s")),
            error=short(answer.get("error"), 200),
            detached_error=None if alone is None else _why(alone),
        )
    for group in _rounds([way for way in known if found[way].rtt_s is not None and way.b in runners and way.a < way.b]):
        sizes = [LISTEN_BYTES if {way.a, way.b} & set(busy) else echo_bytes for way in group]
        rates = await asyncio.gather(*(_echo(way, runners, size) for way, size in zip(group, sizes, strict=True)))
        for way, changes in zip(group, rates, strict=True):
            found[way] = msgspec.structs.replace(found[way], **changes)
    return tuple(found.values())


def _why(answer: Mapping[str, Any]) -> str:
    return "" if real(answer.get("rtt_s")) is not None else short(answer.get("error"), 200) or "no answer"


async def _reach(between: Sequence[Way], runners: Runners, *flags: str) -> dict[Way, dict[str, Any]]:
    """Answers by way; those of a node that gave none are missing."""
    by_start: dict[str, list[Way]] = {}
    for way in between:
        by_start.setdefault(way.a, []).append(way)

    async def ask(name: str) -> dict[Way, dict[str, Any]]:
        targets = ",".join(way.target() for way in by_start[name])
        try:
            answer = await runners[name].verb("probe", "--reach", targets, *flags, timeout_s=_TIMEOUT_S)
        except RemoteError:
            return {}
        reached = table(answer.get("reach"))
        return {way: table(reached[way.target()]) for way in by_start[name] if way.target() in reached}

    found: dict[Way, dict[str, Any]] = {}
    for part in await asyncio.gather(*(ask(name) for name in by_start)):
        found |= part
    return found


def _rounds(between: Sequence[Way]) -> list[list[Way]]:
    """The ways in rounds in which no node has two: transfers at the same time would share what is measured."""
    rounds: list[list[Way]] = []
    for way in between:
        for one in rounds:
            if not any({way.a, way.b} & {other.a, other.b} for other in one):
                one.append(way)
                break
        else:
            rounds.append([way])
    return rounds


async def _echo(way: Way, runners: Runners, size_bytes: int) -> dict[str, Any]:
    """What Edge has to say about listening and speed. Not tried (empty) if b could not be asked to listen."""
    server, limit = runners[way.b], str(size_bytes)
    try:
        argv = server.argv("probe", "--echo-serve", "--bind", way.address, "--echo-bytes", limit)
        stream = await server.connection.stream(argv)
    except RemoteError:
        return {}
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            hello = table(json.loads(await stream.read_line(4096) or b"{}"))
            port, token = hello.get("port"), str(hello.get("token", ""))
            if not isinstance(port, int) or not 0 < port < 65536 or not token.isalnum():
                return {}
            target = Way(a=way.a, b=way.b, address=way.address, port=port).target()
            arguments = ("--echo-to", target, "--token", token, "--echo-bytes", limit)
            answer = await runners[way.a].verb("probe", *arguments, timeout_s=_TIMEOUT_S)
    except (RemoteError, TimeoutError, ValueError):
        return {}
    finally:
        await stream.close()
    if answer.get("error"):
        return {"listen_error": short(answer["error"], 200)}
    if size_bytes < LEAST_FOR_A_RATE:
        return {"listen_error": ""}
    rates = {key: real(answer.get(key)) for key in ("to_bytes_per_s", "from_bytes_per_s")}
    return {"listen_error": "", **rates}
