"""Machines that could be added: hosts of ~/.ssh/config, and what announces ssh on the local network.

Nothing is called here; an offer is a name and an address, no more. What other machines announce is theirs
to choose: it is limited in number, made printable, and refused where it is no host name.
"""

from __future__ import annotations

import asyncio
import fnmatch
import glob
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec
import psutil

from jupiter_engine.units import plain_text

if TYPE_CHECKING:
    from zeroconf import ServiceStateChange, Zeroconf

SSH_CONFIG: Final = Path("~/.ssh/config")
SERVICES: Final = ("_ssh._tcp.local.", "_sftp-ssh._tcp.local.")
"""What macOS (Remote Login) and Linux (Avahi) announce for ssh. Jupiter itself announces nothing."""
LISTEN_S: Final = 2.5
_ANSWER_MS: Final = 1000
_MOST: Final = 256
_MAX_CONFIG_BYTES: Final = 1 << 20
_MAX_INCLUDES: Final = 16
_HOST: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_])?")


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that could become a node."""

    name: str
    """What it is called where it was found."""
    host: str
    """What goes into the cluster file: an alias of ~/.ssh/config or a host name."""
    address: str = ""
    """Where that leads, if another text: HostName of the alias, an address of the announcement."""
    port: int | None = None
    """None: ssh's own. For an alias ssh's config says it already."""
    user: str = ""
    source: Literal["ssh config", "bonjour"]


class Discovered(msgspec.Struct, frozen=True, kw_only=True):
    offers: tuple[Offer, ...] = ()
    notes: tuple[str, ...] = ()
    """Why something could not be looked at; complete sentences."""


async def discover(
    ssh_config: Path = SSH_CONFIG, *, listen_s: float = LISTEN_S, interfaces: Sequence[str] | None = None
) -> Discovered:
    """Everything that could be added, aliases first; takes `listen_s` plus about a second, with or without a network.

    `interfaces`: addresses of the interfaces to listen on; None: all.
    """
    from_config = configured(ssh_config)
    announced = await announced_hosts(listen_s=listen_s, interfaces=interfaces)
    known = {offer.address.lower() or offer.host.lower() for offer in from_config.offers}
    others = [offer for offer in announced.offers if offer.host.lower() not in known]
    return Discovered(offers=(*from_config.offers, *others), notes=(*from_config.notes, *announced.notes))


# -- ~/.ssh/config -------------------------------------------------------------------------------------
class _Line(msgspec.Struct):
    """One setting, and under which `Host` lines (of the files around it, outermost first) it stands."""

    conditions: tuple[tuple[str, ...], ...]
    key: str
    value: str


def configured(file: Path) -> Discovered:
    """The hosts that an ssh config names one by one (patterns name none); `Include` is followed.

    `Match` sections are passed over: what they depend on can only be known when ssh calls.
    """
    file = file.expanduser()
    notes: list[str] = []
    lines = list(_lines(file, (), notes, [0], file.parent))
    aliases: dict[str, None] = {}
    for line in lines:
        if line.key == "host":
            for word in line.value.split():
                if _HOST.fullmatch(word) and all(_matches(word, patterns) for patterns in line.conditions):
                    aliases.setdefault(word)
    offers = [_resolved(alias, lines) for alias in list(aliases)[:_MOST]]
    # An alias with the user git leads to a code host, which runs no commands.
    return Discovered(offers=tuple(offer for offer in offers if offer.user != "git"), notes=tuple(notes))


def _resolved(alias: str, lines: Sequence[_Line]) -> Offer:
    """As ssh does it: of every setting the first one that applies holds."""
    found: dict[str, str] = {}
    for line in lines:
        if line.key in ("hostname", "port", "user") and all(_matches(alias, patterns) for patterns in line.conditions):
            found.setdefault(line.key, line.value)
    address = found.get("hostname", alias).replace("%h", alias).replace("%%", "%")
    port = found.get("port", "")
    return Offer(
        name=alias,
        host=alias,
        address=address if address != alias else "",
        port=int(port) if port.isdecimal() and 1 <= int(port) <= 65535 else None,
        user=found.get("user", ""),
        source="ssh config",
    )


def _matches(alias: str, patterns: Sequence[str]) -> bool:
    """`Host` patterns: one must match, none with `!` may."""
    hit = False
    for pattern in patterns:
        if fnmatch.fnmatchcase(alias.lower(), pattern.lstrip("!").lower()):
            if pattern.startswith("!"):
                return False
            hit = True
    return hit


def _lines(
    file: Path, outer: tuple[tuple[str, ...], ...], notes: list[str], opened: list[int], base: Path
) -> Iterator[_Line]:
    """All settings of a file and the files it includes, with the `Host` lines that they stand under."""
    opened[0] += 1
    if opened[0] > _MAX_INCLUDES:
        notes.append(f"{file} was not read: more than {_MAX_INCLUDES} files are included.")
        return
    conditions = outer
    for text in _read(file, notes).splitlines():
        key, value = _split(text)
        if key == "host":
            conditions = (*outer, tuple(value.split()))
            yield _Line(outer, key, value)
        elif key == "match":
            conditions = (*outer, ())  # nothing matches an empty list
        elif key == "include":
            for pattern in value.split():
                # Relative names are below ~/.ssh, where the file itself is.
                for found in sorted(glob.glob(str(base / Path(pattern).expanduser()))):  # noqa: PTH207 - absolute patterns
                    yield from _lines(Path(found), conditions, notes, opened, base)
        elif key:
            yield _Line(conditions, key, value)


def _read(file: Path, notes: list[str]) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_CONFIG_BYTES)
    except FileNotFoundError:
        return ""
    except OSError as error:
        notes.append(f"{file} cannot be read: {error.strerror}.")
        return ""
    return plain_text(data.decode("utf-8", "replace"))


def _split(text: str) -> tuple[str, str]:
    """`Key value`, `Key=value`, `Key "value"`; comments and empty lines have no key."""
    stripped = text.strip()
    if not stripped or stripped.startswith("#"):
        return "", ""
    key, _, rest = re.sub(r"\s*=\s*|\s+", " ", stripped, count=1).partition(" ")
    return key.lower(), re.sub(r'"([^"]*)"', r"\1", rest).strip()


# -- Bonjour -------------------------------------------------------------------------------------------
async def announced_hosts(*, listen_s: float = LISTEN_S, interfaces: Sequence[str] | None = None) -> Discovered:
    """Machines of the local network that announce ssh. Without a network: none, and a note that says so."""
    # Loaded here: the command line's help must not need it.
    from zeroconf import InterfaceChoice, IPVersion
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

    if interfaces is None and not any(
        a.family == socket.AF_INET for card in psutil.net_if_addrs().values() for a in card
    ):
        return Discovered(notes=("The local network cannot be listened to: no interface is up.",))
    try:
        zeroconf = AsyncZeroconf(
            interfaces=InterfaceChoice.All if interfaces is None else list(interfaces), ip_version=IPVersion.V4Only
        )
    except OSError as error:
        return Discovered(notes=(f"The local network cannot be listened to: {error.strerror or error}.",))
    seen: dict[tuple[str, str], None] = {}

    def take(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:  # noqa: ARG001
        if len(seen) < _MOST:
            seen.setdefault((service_type, name))

    browser = None
    try:
        browser = AsyncServiceBrowser(zeroconf.zeroconf, list(SERVICES), handlers=[take])
        await asyncio.sleep(listen_s)
        found = await asyncio.gather(*(_asked(zeroconf.zeroconf, kind, name) for kind, name in list(seen)))
    finally:
        if browser is not None:
            await browser.async_cancel()
        await zeroconf.async_close()
    # One machine may announce both services, and each on several interfaces.
    unique = {(offer.host.lower(), offer.port): offer for offer in reversed(found) if offer is not None}
    return Discovered(offers=tuple(sorted(unique.values(), key=lambda offer: offer.host.lower())))


async def _asked(zeroconf: Zeroconf, kind: str, name: str) -> Offer | None:
    """What a service says about itself; None if it does not answer or names no usable host."""
    from zeroconf import BadTypeInNameException
    from zeroconf.asyncio import AsyncServiceInfo

    try:
        service = AsyncServiceInfo(kind, name)
        if not await service.async_request(zeroconf, _ANSWER_MS):
            return None
    except BadTypeInNameException:
        return None
    host = (service.server or "").rstrip(".")
    if not _HOST.fullmatch(host) or not service.port:
        return None
    addresses = service.parsed_addresses()
    title = " ".join(plain_text(name.removesuffix("." + kind)).split())[:60]
    return Offer(
        name=title or host,
        host=host,
        address=addresses[0] if addresses else "",
        port=service.port if service.port != 22 else None,
        source="bonjour",
    )
