"""ssh servers inside the test process, with scripted answers: many machines for the price of one.

    async with ssh_hosts(tmp_path, 64, {("uname", "-s"): "Darwin\\n"}) as hosts:
        connection = await connect(hosts[0].node(), settings, known_hosts=hosts[0].known_hosts())

Answers are a table as for `ScriptedConnection` (longest prefix of the vector wins); a Play
takes the whole command over, for hostile and endless ones.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncssh

from jupiter_engine.remote.host_keys import KnownHosts
from jupiter_engine.remote.port import Completed
from jupiter_engine.settings.cluster import NodeSpec

ServerProcess = asyncssh.SSHServerProcess[bytes]


@dataclass(frozen=True)
class Play:
    """A command played by an async function that gets asyncssh's server process and the vector."""

    function: Callable[[ServerProcess, tuple[str, ...]], Awaitable[None]]


Given = Completed | str | bytes
Reply = Given | Callable[[tuple[str, ...], bytes], Given] | Play
PID = 4_000_001


def parse(line: str) -> tuple[str, tuple[str, ...]]:
    """Mark and vector of a command line that Jupiter made, as /bin/sh would understand it."""
    start, program, option, script, mark, *words = shlex.split(line)
    assert (start, program, option) == ("exec", "/bin/sh", "-c"), line
    if "printf" not in script:
        return mark, tuple(words)
    decoded = [
        re.sub(rb"\\0([0-7]{3})", lambda m: bytes([int(m[1], 8)]), word.encode()).decode("utf-8", "surrogateescape")
        for word in words
    ]
    return mark, tuple(decoded)


@dataclass
class SshHost:
    """One scripted machine."""

    name: str
    port: int
    identity: Path
    known_hosts_line: str
    folder: Path
    server: asyncssh.SSHAcceptor
    asked: list[tuple[str, ...]] = field(default_factory=list)
    connections: list[asyncssh.SSHServerConnection] = field(default_factory=list)
    host: str = "127.0.0.1"
    user: str = "tester"

    def node(self, **more: object) -> NodeSpec:
        fields = {"name": self.name, "host": self.host, "ssh_port": self.port, "ssh_user": self.user}
        return NodeSpec(**{**fields, "identity": str(self.identity), **more})  # type: ignore[arg-type]

    def known_hosts(self) -> KnownHosts:
        """A Jupiter-owned file that trusts this machine only."""
        own = self.folder / f"known_hosts_{self.name}"
        own.write_text(self.known_hosts_line + "\n")
        return KnownHosts(own, user=(), system=())

    def cut(self) -> None:
        """Drop every open connection."""
        for connection in self.connections:
            connection.abort()
        self.connections.clear()

    async def stop(self) -> None:
        self.server.close()
        self.cut()
        await self.server.wait_closed()


async def start_ssh_host(
    folder: Path,
    answers: Mapping[tuple[str, ...], Reply],
    *,
    name: str = "fake",
    identity: Path | None = None,
    host_key: asyncssh.SSHKey | None = None,
    start_up_noise: bytes = b"",
    port: int = 0,
) -> SshHost:
    """`start_up_noise` is printed before each command, as a talkative .bashrc would."""
    identity = identity or new_identity(folder)
    host_key = host_key or asyncssh.generate_private_key("ssh-ed25519")
    asked: list[tuple[str, ...]] = []
    connections: list[asyncssh.SSHServerConnection] = []

    class Server(asyncssh.SSHServer):
        def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
            connections.append(conn)

    async def serve(process: ServerProcess) -> None:
        process.stdout.write(start_up_noise)
        mark, argv = parse(process.command or "")
        asked.append(argv)
        for output in (process.stdout, process.stderr):
            output.write(f"{mark} {PID}\n".encode())
        await _answer(process, argv, answers)

    server = await asyncssh.listen(
        "127.0.0.1",
        port,
        server_factory=Server,
        server_host_keys=[host_key],
        authorized_client_keys=str(identity.with_name(identity.name + ".pub")),
        process_factory=serve,
        encoding=None,
    )
    public = " ".join(host_key.export_public_key("openssh").decode().split()[:2])
    chosen = server.get_port()
    return SshHost(
        name=name,
        port=chosen,
        identity=identity,
        known_hosts_line=f"[127.0.0.1]:{chosen} {public}",
        folder=folder,
        server=server,
        asked=asked,
        connections=connections,
    )


def new_identity(folder: Path) -> Path:
    """A private key file with its .pub, without starting a program."""
    folder.mkdir(parents=True, exist_ok=True)
    key = asyncssh.generate_private_key("ssh-ed25519", comment="jupiter test")
    path = folder / "id_fake"
    key.write_private_key(path)
    path.chmod(0o600)
    key.write_public_key(path.with_name("id_fake.pub"))
    return path


async def _answer(process: ServerProcess, argv: tuple[str, ...], answers: Mapping[tuple[str, ...], Reply]) -> None:
    reply: Reply = Completed(exit_status=127, stderr=f"sh: 1: exec: {argv[0]}: not found\n".encode())
    for length in range(len(argv), -1, -1):
        if argv[:length] in answers:
            reply = answers[argv[:length]]
            break
    try:
        if isinstance(reply, Play):
            await reply.function(process, argv)
            return
        if callable(reply):
            reply = reply(argv, await process.stdin.read())
        if not isinstance(reply, Completed):
            reply = Completed(exit_status=0, stdout=reply.encode() if isinstance(reply, str) else reply)
        process.stdout.write(reply.stdout)
        process.stderr.write(reply.stderr)
        if reply.signal:
            process.exit_with_signal(reply.signal)
        else:
            process.exit(reply.exit_status or 0)
    except (OSError, asyncssh.Error):
        # The caller hung up in the middle; that is for its test to judge.
        return


@asynccontextmanager
async def ssh_hosts(
    folder: Path, count: int, answers: Mapping[tuple[str, ...], Reply], *, names: Sequence[str] = ()
) -> AsyncIterator[list[SshHost]]:
    """`count` machines with one key to get in and a host key each, for as long as the block lasts."""
    identity = new_identity(folder)
    hosts = [
        await start_ssh_host(folder, answers, name=names[i] if names else f"fake{i:02d}", identity=identity)
        for i in range(count)
    ]
    try:
        yield hosts
    finally:
        await asyncio.gather(*(host.stop() for host in hosts))


def fleet_known_hosts(hosts: Sequence[SshHost], path: Path) -> KnownHosts:
    """One file that trusts them all."""
    path.write_text("".join(host.known_hosts_line + "\n" for host in hosts))
    return KnownHosts(path, user=(), system=())
