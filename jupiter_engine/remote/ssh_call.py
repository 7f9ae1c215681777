"""Calling a machine: the user's ssh config, keys, jump hosts and host keys, up to a connection that stands."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import asyncssh
import msgspec
from asyncssh.public_key import get_default_certificate_algs

from jupiter_engine.errors import RemoteError
from jupiter_engine.remote import failures, host_keys, ssh_keys
from jupiter_engine.remote.addresses import open_socket
from jupiter_engine.remote.failures import Call
from jupiter_engine.remote.host_keys import SSH_CONFIG as SSH_CONFIG
from jupiter_engine.remote.host_keys import Known, KnownHosts, OfferedKey
from jupiter_engine.remote.ssh_keys import Keys
from jupiter_engine.settings.cluster import ConnectionSettings, NodeSpec

# ssh itself stops at a depth of its own; a config that jumps in a circle is found here.
LONGEST_WAY: Final = 8
KEEPALIVES: Final = 3
# Before asyncssh's own order, whose first is computed in Python around a library: twice as fast in bulk, and a third
# less work in calling (scripts/bench/fanout.py). Every OpenSSH has them.
CIPHERS_FIRST: Final = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"
_PREFERRED_KEYS: Final = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "rsa-sha2-512",
    "rsa-sha2-256",
)
_HOP = re.compile(r"(?:ssh://)?(?:(?P<user>[^@]+)@)?(?P<host>\[[^\]]+\]|[^:]+)(?::(?P<port>\d+))?/?")


_T = TypeVar("_T")


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where to call: a node, or a jump host on the way to it."""

    name: str
    host: str
    port: int | None = None
    user: str | None = None
    identity: str | None = None
    jump: str | None = None
    """None: as the ssh config says."""
    is_jump: bool = False

    @staticmethod
    def of(node: NodeSpec) -> Place:
        return Place(
            name=node.name or node.host,
            host=node.host,
            port=node.ssh_port,
            user=node.ssh_user,
            identity=node.identity,
            jump=node.jump,
        )


class Called(msgspec.Struct, kw_only=True):
    """A connection that stands, with the connections that it goes through (nearest first)."""

    connection: asyncssh.SSHClientConnection
    client: Client
    hops: list[Called] = []

    async def close(self) -> None:
        """End it and then what it went through; never waits long for a machine that has gone."""
        self.connection.close()
        try:
            async with asyncio.timeout(2):
                await self.connection.wait_closed()
        except TimeoutError:
            self.connection.abort()
            await self.connection.wait_closed()
        for hop in reversed(self.hops):
            await hop.close()


class Client(asyncssh.SSHClient):
    """asyncssh's view of us: notes how far a call has come, which key was presented, and how it ended."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.known = Known()
        self.presented: OfferedKey | None = None
        self.lookup_name = (call.host, call.port)
        self.cause: Exception | None = None

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:  # noqa: ARG002
        self.call.phase = "ssh"

    def connection_lost(self, exc: Exception | None) -> None:
        self.cause = exc

    def note(self, key: asyncssh.SSHKey) -> None:
        self.presented = host_keys.offered(key, *self.lookup_name, self.known)

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:  # noqa: ARG002
        self.note(key)
        return False

    def validate_host_ca_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:  # noqa: ARG002
        return False


class _Tcp:
    """asyncssh's way to a machine without a jump host: tries a name's addresses side by side."""

    def __init__(self, options: asyncssh.SSHClientConnectionOptions) -> None:
        self._options = options

    async def create_connection(self, factory: Callable[[], Any], host: str, port: int) -> tuple[Any, Any]:
        options = self._options
        sock = await open_socket(host, port, family=options.family, local_address=options.local_addr)
        return await asyncio.get_running_loop().create_connection(factory, sock=sock)


def _over(options: asyncssh.SSHClientConnectionOptions, way: Called | None) -> Any:
    """What carries the connection: a jump host, or TCP; None where the config has a ProxyCommand of its own."""
    if way is not None:
        return way.connection
    return None if options.proxy_command else _Tcp(options)


class Caller:
    """One call with everything that it opens on the way; used once."""

    def __init__(self, settings: ConnectionSettings, known_hosts: KnownHosts, ssh_config: Path | None) -> None:
        self._settings = settings
        self._known_hosts = known_hosts
        config = ssh_config.expanduser() if ssh_config is not None else None
        # An empty list keeps asyncssh from taking ~/.ssh/config by itself.
        self._config = [str(config)] if config is not None and config.is_file() else []
        self._hops: list[Called] = []
        self._at: Call | None = None

    async def connect(self, node: NodeSpec) -> Called:
        """Raises NodeUnreachable or HostKeyRefused; `connect_timeout_s` covers the jump hosts too."""
        place = Place.of(node)

        async def reach() -> Called:
            called = await self._reach(place, None, 0)
            called.hops = self._hops
            return called

        return await self._timed(place, reach)

    async def offered_key(self, node: NodeSpec) -> OfferedKey:
        """The key with which the node presents itself now. Raises like `connect`, for jump hosts as well."""
        place = Place.of(node)
        try:
            return await self._timed(place, lambda: self._look(place))
        finally:
            await self._close_hops()

    async def _timed(self, place: Place, work: Callable[[], Awaitable[_T]]) -> _T:
        """Within the time; whatever was opened on the way is closed again if it fails."""
        self._at = self._call(place)
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                return await work()
        except TimeoutError as error:
            await self._close_hops()
            raise failures.translate(error, self._at) from None
        except BaseException:
            await self._close_hops()
            raise

    async def _close_hops(self) -> None:
        while self._hops:
            await self._hops.pop().close()

    def _call(self, place: Place) -> Call:
        return Call(
            name=place.name,
            host=place.host,
            port=place.port or host_keys.SSH_PORT,
            user=place.user or "",
            jump=place.is_jump,
            timeout_s=self._settings.connect_timeout_s,
        )

    # -- one machine ---------------------------------------------------------------------------------------
    async def _reach(self, place: Place, tunnel: Called | None, depth: int) -> Called:
        """Connect to one machine, after the jump hosts before it."""
        call = self._at = self._call(place)
        client = Client(call)
        try:
            options = await self._options(place, call)
            keys = await asyncio.to_thread(ssh_keys.choose, call, identity=place.identity, config=options.config)
            way = await self._way(place, options, tunnel, depth)
            self._at = call
            connection = await asyncssh.connect(
                place.host,
                place.port or (),
                # The config has been read once for `options`; with many machines in it, that is most of a call.
                config=None,
                options=options,
                username=place.user or (),
                tunnel=_over(options, way),
                proxy_command=options.proxy_command if way is None else None,
                known_hosts=self._trusted(client, options),
                server_host_key_algs=self._kinds(client, options),
                client_factory=lambda: client,
                **self._how(keys),
                encryption_algs=() if options.config.get("Ciphers") else CIPHERS_FIRST,
            )
        except (OSError, ValueError, asyncssh.Error, asyncssh.ConfigParseError, asyncssh.KeyImportError) as error:
            if isinstance(error, asyncssh.PermissionDenied):
                await ssh_keys.describe(keys, call)
            raise await self._failure(error, client) from error
        return Called(connection=connection, client=client)

    def _how(self, keys: Keys) -> dict[str, Any]:
        """Keys or an agent and nothing else; nothing is forwarded to the machine but what Jupiter sends."""
        return {
            "client_keys": keys.usable,
            "agent_path": keys.agent,
            "agent_identities": keys.only or None,
            "password": None,
            "password_auth": False,
            "kbdint_auth": False,
            "host_based_auth": False,
            "gss_host": None,
            "x509_trusted_certs": None,
            "agent_forwarding": False,
            "x11_forwarding": False,
            "request_pty": False,
            "compression_algs": "none",
            "keepalive_interval": self._settings.keepalive_s,
            "keepalive_count_max": KEEPALIVES,
            # The time limit around the whole call is ours.
            "connect_timeout": None,
            "login_timeout": self._settings.connect_timeout_s,
            "encoding": None,
        }

    async def _options(self, place: Place, call: Call) -> asyncssh.SSHClientConnectionOptions:
        """What the ssh config says about a machine; `call` learns the address that it stands for."""
        options: asyncssh.SSHClientConnectionOptions = await asyncssh.SSHClientConnectionOptions.construct(
            config=self._config,
            host=place.host,
            port=place.port or (),
            username=place.user or (),
            client_keys=None,
            agent_path=None,
            x509_trusted_certs=None,
        )
        call.host, call.port, call.user = options.host, options.port, options.username
        return options

    def _trusted(
        self, client: Client, options: asyncssh.SSHClientConnectionOptions
    ) -> Callable[[str, str, int | None], Any]:
        """Looks host keys up once it is certain under which name."""

        def lookup(host: str, addr: str, port: int | None) -> Any:  # noqa: ARG001
            client.lookup_name = (host, port or host_keys.SSH_PORT)
            client.known = self._known_hosts.lookup(
                host,
                port or host_keys.SSH_PORT,
                user=_files(options.config.get("UserKnownHostsFile")),
                system=_files(options.config.get("GlobalKnownHostsFile")),
            )
            return client.known.for_asyncssh()

        return lookup

    def _kinds(self, client: Client, options: asyncssh.SSHClientConnectionOptions) -> Any:
        """Kinds of host keys to ask for. asyncssh would ask for the known kinds only, and a machine that has lost its
        known key would then hang up instead of showing the one that it has now."""
        self._trusted(client, options)(options.host_key_alias or options.host, "", options.port)
        if options.config.get("HostKeyAlgorithms") or not client.known.keys:
            return ()
        certificates = get_default_certificate_algs() if client.known.authorities else []
        return [*(algorithm.decode() for algorithm in certificates), *_algorithms(client.known)]

    async def _failure(self, error: BaseException, client: Client) -> RemoteError:
        """Why the call failed; with host keys, which of the several reasons that asyncssh does not tell apart."""
        call = client.call
        if isinstance(error, asyncssh.HostKeyNotVerifiable):
            key = client.presented
            if key is None and "revoked" in str(error):
                return host_keys.revoked(call.host, name=call.name, jump=call.jump)
            if key is None:
                text = f"its host certificate is not accepted: {error}"
                return failures.failed(call, "host_key_changed", text, fix="ask whoever signs your machines' keys")
            return host_keys.refused(key, name=call.name, jump=call.jump)
        return failures.translate(error, call)

    # -- the way there -------------------------------------------------------------------------------------
    async def _way(
        self, place: Place, options: asyncssh.SSHClientConnectionOptions, tunnel: Called | None, depth: int
    ) -> Called | None:
        """The connection to go through: given, or made by the node's `jump` or the config's ProxyJump."""
        if tunnel is not None:
            return tunnel
        text = place.jump if place.jump is not None else options.tunnel
        if not isinstance(text, str) or text.strip().lower() in ("", "none"):
            return None
        assert self._at is not None
        call = self._at
        if depth >= LONGEST_WAY:
            raise failures.failed(
                call, "config", "its jump hosts lead in a circle", fix="look at ProxyJump in ~/.ssh/config"
            )
        for name in text.split(","):
            hop = _hop(name.strip(), call)
            tunnel = await self._reach(hop, tunnel, depth + 1)
            self._hops.append(tunnel)
            call.through = (*call.through, hop.name)
        return tunnel

    async def _look(self, place: Place) -> OfferedKey:
        """Connect as far as the key exchange, with whatever key is presented."""
        call = self._at = self._call(place)
        client = Client(call)
        try:
            options = await self._options(place, call)
            way = await self._way(place, options, None, 0)
            self._at = call
            self._trusted(client, options)(options.host_key_alias or options.host, "", options.port)
            key = await asyncssh.get_server_host_key(
                place.host,
                place.port or (),
                config=self._config,
                tunnel=_over(options, way),
                proxy_command=options.proxy_command if way is None else None,
                server_host_key_algs=_algorithms(client.known),
            )
        except (OSError, ValueError, asyncssh.Error, asyncssh.ConfigParseError) as error:
            raise await self._failure(error, client) from error
        if key is None:
            raise failures.not_ssh(call, "it has no host key")
        client.note(key)
        assert client.presented is not None
        return client.presented


def _hop(text: str, call: Call) -> Place:
    found = _HOP.fullmatch(text)
    if found is None:
        raise failures.failed(
            call, "config", f"{text!r} is no jump host", fix="write user@host:port or a name of ~/.ssh/config"
        )
    port = found["port"]
    return Place(
        name=text,
        host=found["host"].strip("[]"),
        port=int(port) if port else None,
        user=found["user"],
        is_jump=True,
    )


def _files(value: object) -> list[Path] | None:
    """A list of files of the ssh config; None if it has none."""
    if not isinstance(value, list):
        return None
    return [Path(str(item)) for item in value if item != "none"]


def _algorithms(known: Known) -> list[str]:
    """Kinds of keys to ask for: the known ones first, so that a known machine shows the known key."""
    kinds = [algorithm.decode() for entry in known.keys for algorithm in entry.key.sig_algorithms]
    return [*dict.fromkeys([*(kind for kind in kinds if kind in _PREFERRED_KEYS), *_PREFERRED_KEYS])]
