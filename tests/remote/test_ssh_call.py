"""Calling real sshd: host keys, users' keys, agents, jump hosts, and everything that can be wrong with them."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from jupiter_engine.errors import HostKeyRefused, NodeUnreachable
from jupiter_engine.remote.failures import LASTING, Call, lasting
from jupiter_engine.remote.host_keys import KnownHosts, OfferedKey
from jupiter_engine.remote.ssh import connect, offered_key
from jupiter_engine.remote.ssh_keys import choose
from jupiter_engine.settings.cluster import ConnectionSettings, NodeSpec
from tests.sshd import Sshd, free_port, make_key, start_sshd

QUICK = ConnectionSettings(connect_timeout_s=1.0)


@pytest.fixture
def nothing_known(tmp_path: Path) -> KnownHosts:
    return KnownHosts(tmp_path / "ws" / "known_hosts", user=(), system=())


@pytest.fixture
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


async def refusal(
    node: NodeSpec, known: KnownHosts, settings: ConnectionSettings = QUICK, config: Path | None = None
) -> NodeUnreachable:
    with pytest.raises(NodeUnreachable) as caught:
        await connect(node, settings, known_hosts=known, ssh_config=config)
    # One sentence for a person, with something to do.
    assert "\n" not in caught.value.detail
    assert caught.value.fix
    return caught.value


async def works(node: NodeSpec, known: KnownHosts, config: Path | None = None) -> tuple[str, ...]:
    """The jump hosts gone through."""
    connection = await connect(node, ConnectionSettings(), known_hosts=known, ssh_config=config)
    try:
        assert (await connection.run(["echo", "here"])).stdout == b"here\n"
        return connection.through
    finally:
        await connection.close()


def ssh_keygen(*options: str) -> str:
    return subprocess.run(["ssh-keygen", *options], check=True, capture_output=True, text=True).stdout


# -- host keys -----------------------------------------------------------------------------------------
async def test_first_contact_shows_the_key_and_goes_on_once_it_is_trusted(
    sshd: Sshd, nothing_known: KnownHosts, settings: ConnectionSettings
) -> None:
    error = await refusal(sshd.node(), nothing_known)
    assert isinstance(error, HostKeyRefused)
    assert (error.reason, lasting(error)) == ("host_key_unknown", True)
    seen = await offered_key(sshd.node(), settings, known_hosts=nothing_known, ssh_config=None)
    shown = ssh_keygen("-lf", str(sshd.folder / "host_key.pub"))
    assert seen.fingerprint in shown
    assert seen.fingerprint in error.detail
    assert seen == error.offered
    assert seen.line == sshd.known_hosts_line
    nothing_known.trust(seen)
    await works(sshd.node(), nothing_known)
    again = await offered_key(sshd.node(), settings, known_hosts=nothing_known, ssh_config=None)
    assert again.standing == "known"


async def test_a_changed_key_is_told_from_an_unknown_one(sshd: Sshd, tmp_path: Path, nothing_known: KnownHosts) -> None:
    other = make_key(tmp_path / "other").with_name("other.pub").read_text().split()
    nothing_known.own.parent.mkdir()
    nothing_known.own.write_text(f"[{sshd.host}]:{sshd.port} {other[0]} {other[1]}\n")
    error = await refusal(sshd.node(), nothing_known)
    assert error.reason == "host_key_changed"
    assert "HAS CHANGED" in error.detail
    assert len(set(re.findall(r"SHA256:\S{43}", error.detail))) == 2
    assert isinstance(error, HostKeyRefused)
    assert isinstance(error.offered, OfferedKey)
    with pytest.raises(HostKeyRefused):
        nothing_known.trust(error.offered)
    nothing_known.trust(error.offered, replace=True)
    await works(sshd.node(), nothing_known)


async def test_a_machine_that_lost_its_kind_of_key_counts_as_changed(
    sshd: Sshd, tmp_path: Path, nothing_known: KnownHosts, settings: ConnectionSettings
) -> None:
    other = make_key(tmp_path / "other", kind="rsa").with_name("other.pub").read_text().split()
    nothing_known.own.parent.mkdir()
    nothing_known.own.write_text(f"[{sshd.host}]:{sshd.port} {other[0]} {other[1]}\n")
    error = await refusal(sshd.node(), nothing_known)
    assert error.reason == "host_key_changed"
    assert "ssh-rsa" in error.detail
    assert "ssh-ed25519" in error.detail
    seen = await offered_key(sshd.node(), settings, known_hosts=nothing_known, ssh_config=None)
    assert seen.standing == "changed"


async def test_a_revoked_key_and_a_certificate_authority(tmp_path: Path, nothing_known: KnownHosts) -> None:
    authority, host_key = make_key(tmp_path / "authority"), make_key(tmp_path / "host")
    ssh_keygen("-q", "-s", str(authority), "-h", "-I", "test", "-n", "127.0.0.1", str(tmp_path / "host.pub"))
    options = [f"HostCertificate {tmp_path / 'host-cert.pub'}"]
    server = start_sshd(tmp_path / "sshd", host_key=host_key, options=options)
    try:
        nothing_known.own.parent.mkdir()
        public = " ".join((tmp_path / "authority.pub").read_text().split()[:2])
        nothing_known.own.write_text(f"@cert-authority [127.0.0.1]:* {public}\n")
        await works(server.node(), nothing_known)
        nothing_known.own.write_text(f"{server.known_hosts_line}\n@revoked * {server.public_key}\n")
        error = await refusal(server.node(), nothing_known)
        assert error.reason == "host_key_revoked"
    finally:
        server.stop()


# -- keys of the user ----------------------------------------------------------------------------------
@pytest.mark.usefixtures("no_agent")
async def test_a_stranger_is_told_who_was_refused_and_with_what(sshd: Sshd, tmp_path: Path) -> None:
    stranger = make_key(tmp_path / "stranger")
    error = await refusal(sshd.node(identity=str(stranger)), sshd.trusted())
    assert (error.reason, lasting(error)) == ("auth", True)
    assert f"user {sshd.user}" in error.detail
    assert str(stranger) in error.detail
    assert "ssh-copy-id" in error.fix


@pytest.mark.usefixtures("no_agent")
async def test_unusable_identities(sshd: Sshd, tmp_path: Path) -> None:
    error = await refusal(sshd.node(identity=str(tmp_path / "none")), sshd.trusted())
    assert (error.reason, "No such file" in error.detail) == ("key", True)
    (tmp_path / "text").write_text("hello")
    error = await refusal(sshd.node(identity=str(tmp_path / "text")), sshd.trusted())
    assert (error.reason, "no private key" in error.detail) == ("key", True)
    for kind in ("ed25519", "rsa"):
        locked = make_key(tmp_path / f"locked_{kind}", passphrase="secret", kind=kind)
        error = await refusal(sshd.node(identity=str(locked)), sshd.trusted())
        assert error.reason == "key"
        assert f"{locked} is protected by a passphrase" in error.detail
        assert "ssh-add" in error.fix


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An ssh-agent of this test's own."""
    socket = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL)
    for _ in range(100):
        if socket.exists():
            break
        time.sleep(0.02)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
    yield socket
    process.terminate()
    process.wait()


def add_to_agent(key: Path, passphrase: str, folder: Path) -> None:
    ask = folder / "ask"
    ask.write_text(f"#!/bin/sh\necho '{passphrase}'\n")
    ask.chmod(0o755)
    environment = {**os.environ, "SSH_ASKPASS": str(ask), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": "none"}
    subprocess.run(["ssh-add", str(key)], check=True, env=environment, stdin=subprocess.DEVNULL, capture_output=True)


async def test_a_locked_key_works_through_the_agent(tmp_path: Path, agent: Path) -> None:
    key = make_key(tmp_path / "locked", passphrase="secret")
    server = start_sshd(tmp_path / "sshd", identity=key)
    try:
        error = await refusal(server.node(), server.trusted())
        assert error.reason in ("auth", "key")
        assert str(key) in error.detail
        # More keys than sshd lets anybody try: only the right one may be offered.
        for number in range(8):
            add_to_agent(make_key(tmp_path / f"other{number}"), "", tmp_path)
        add_to_agent(key, "secret", tmp_path)
        await works(server.node(), server.trusted())
        key.with_name("locked.pub").unlink()
        await works(server.node(), server.trusted())
        # Without `identity` all of them are offered.
        error = await refusal(server.node(identity=None), server.trusted())
        assert (error.reason, "too many keys" in error.detail) == ("auth", True)
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("named", "agent"),
    [
        (None, "/env"),
        ("SSH_AUTH_SOCK", "/env"),
        ("$OTHER", "/other"),
        ("${OTHER}", "/other"),
        ("$UNSET", None),
        ("none", None),
        ("/a b/agent.sock", "/a b/agent.sock"),
    ],
)
def test_the_agent_of_the_config(named: str | None, agent: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", "/env")
    monkeypatch.setenv("OTHER", "/other")
    monkeypatch.delenv("UNSET", raising=False)
    call = Call(name="mini", host="mini", port=22, user="ada")
    assert choose(call, identity=None, config={"IdentityAgent": named}).agent == agent


async def test_an_agent_that_is_gone_does_no_harm(sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "gone"))
    await works(sshd.node(), sshd.trusted())
    config = sshd.ssh_config("alias", tmp_path / "config")
    await works(NodeSpec(host="alias"), sshd.trusted(), config)


# -- the ssh config ------------------------------------------------------------------------------------
@pytest.mark.usefixtures("no_agent")
async def test_the_ssh_config_is_honoured(sshd: Sshd, nothing_known: KnownHosts, tmp_path: Path) -> None:
    config = sshd.ssh_config("mini", tmp_path / "config")
    # Its UserKnownHostsFile counts, and so do lines that only ssh itself understands, and keys that are not there.
    extra = "  AddKeysToAgent yes\n  UseKeychain yes\n  IdentityFile /nowhere/id\n  StrictHostKeyChecking accept-new\n"
    config.write_text(config.read_text() + extra)
    await works(NodeSpec(host="mini"), nothing_known, config)
    (tmp_path / "outer").write_text(f"Include {config}\nHost other\n  HostName 127.0.0.1\n  HostKeyAlias somebody\n")
    await works(NodeSpec(host="mini"), nothing_known, tmp_path / "outer")
    node = sshd.node(host="other")
    error = await refusal(node, nothing_known, config=tmp_path / "outer")
    assert isinstance(error, HostKeyRefused)
    assert isinstance(error.offered, OfferedKey)
    assert error.offered.host == "somebody"


async def test_a_broken_ssh_config_is_named(sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("Host *\n  Port many\n")
    error = await refusal(sshd.node(ssh_port=None), sshd.trusted(), config=tmp_path / "config")
    assert error.reason == "config"
    assert "many" in error.detail


async def test_a_proxy_command_of_the_config_is_used(sshd: Sshd, tmp_path: Path) -> None:
    config = sshd.ssh_config("mini", tmp_path / "config")
    relay = tmp_path / "relay.py"
    relay.write_text(
        "import socket, sys, threading, os\n"
        "s = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        "def up():\n    while d := os.read(0, 65536): s.sendall(d)\n"
        "threading.Thread(target=up, daemon=True).start()\n"
        "while d := s.recv(65536): os.write(1, d)\n"
    )
    config.write_text(config.read_text() + f"  ProxyCommand python3 {relay} %h %p\n")
    await works(NodeSpec(host="mini"), sshd.trusted(), config)


# -- jump hosts ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def jump(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    server = start_sshd(tmp_path_factory.mktemp("jump"))
    yield server
    server.stop()


@pytest.fixture
def way(sshd: Sshd, jump: Sshd, tmp_path: Path) -> Path:
    """A config with the jump host as `gate` (and again as `inner`), and machines behind it."""
    hosts = tmp_path / "both"
    hosts.write_text(f"{sshd.known_hosts_line}\n{jump.known_hosts_line}\n")

    def block(name: str, server: Sshd, *more: str) -> str:
        lines = [
            f"HostName {server.host}",
            f"Port {server.port}",
            f"User {server.user}",
            f"IdentityFile {server.identity}",
        ]
        return f"Host {name}\n" + "".join(f"  {line}\n" for line in (*lines, f"UserKnownHostsFile {hosts}", *more))

    config = tmp_path / "config"
    config.write_text(
        block("gate inner", jump)
        + block("behind", sshd, "ProxyJump gate")
        + block("plain", sshd)
        + block("twice", sshd, "ProxyJump gate,inner")
        + block("circle", sshd, "ProxyJump circle")
    )
    return config


async def test_through_jump_hosts(way: Path, jump: Sshd, nothing_known: KnownHosts) -> None:
    assert await works(NodeSpec(host="plain"), nothing_known, way) == ()
    assert await works(NodeSpec(host="behind"), nothing_known, way) == ("gate",)
    assert await works(NodeSpec(host="behind", jump="none"), nothing_known, way) == ()
    assert await works(NodeSpec(host="plain", jump="gate"), nothing_known, way) == ("gate",)
    assert await works(NodeSpec(host="twice"), nothing_known, way) == ("gate", "inner")
    seen = await offered_key(NodeSpec(host="behind"), ConnectionSettings(), known_hosts=nothing_known, ssh_config=way)
    assert seen.standing == "known"
    for _ in range(100):
        if not jump.sessions():
            break
        await asyncio.sleep(0.05)
    assert not jump.sessions(), "connections to the jump host were left open"


async def test_failures_of_the_jump_host_are_called_so(
    sshd: Sshd, jump: Sshd, way: Path, nothing_known: KnownHosts, tmp_path: Path
) -> None:
    spec = f"{jump.user}@{jump.host}:{jump.port}"
    error = await refusal(sshd.node(jump=spec), sshd.trusted())
    assert isinstance(error, HostKeyRefused)
    assert (error.reason, error.through) == ("host_key_unknown", spec)
    assert "jump host" in error.detail
    # The jump host's own key can be trusted from the error.
    assert isinstance(error.offered, OfferedKey)
    assert error.offered.line == jump.known_hosts_line
    error = await refusal(sshd.node(jump=f"127.0.0.1:{free_port()}"), sshd.trusted())
    assert (error.reason, "jump host" in error.detail) == ("refused", True)
    error = await refusal(NodeSpec(host="plain", jump="gate", ssh_port=free_port()), nothing_known, config=way)
    assert error.reason == "no_route"
    assert "jump host gate cannot reach 127.0.0.1" in error.detail
    error = await refusal(NodeSpec(host="circle"), nothing_known, config=way)
    assert (error.reason, "circle" in error.detail) == ("config", True)
    error = await refusal(sshd.node(jump="a:b:c"), sshd.trusted())
    assert error.reason == "config"


# -- not reached ---------------------------------------------------------------------------------------
async def test_names_ports_and_routes(sshd: Sshd) -> None:
    assert (await refusal(NodeSpec(host="no-such-machine.invalid"), sshd.trusted())).reason == "dns"
    error = await refusal(NodeSpec(host="127.0.0.1", ssh_port=free_port()), sshd.trusted())
    assert (error.reason, lasting(error)) == ("refused", False)
    assert "Remote Login" in error.fix
    error = await refusal(NodeSpec(host="localhost", ssh_port=free_port()), sshd.trusted())
    assert error.reason == "refused"


@asynccontextmanager
async def talker(said: bytes) -> AsyncIterator[int]:
    """The port of a server that says this to everybody and then waits, or hangs up at once for b"closed"."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            if said != b"closed":
                writer.write(said)
                await reader.read()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1")
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(
    ("said", "reason", "word"),
    [
        (b"", "timeout", "greeting"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 100_000, "not_ssh", "no ssh server"),
        (b"220 mail\r\n" * 3000, "not_ssh", "no ssh server"),
        (b"SSH-1.5-old\r\n", "not_ssh", "no ssh server"),
        (b"SSH-2.0-x\r\n" + bytes(5000), "not_ssh", "no ssh server"),
        (b"closed", "lost", "hung up"),
        (b"SSH-1.0-\x1b[2J\x1b]0;owned\x07\r\n", "not_ssh", "no ssh server"),
    ],
    ids=["silent", "http", "smtp", "ssh1", "zeros", "closed", "escapes"],
)
async def test_what_is_no_ssh_server_is_found_out(sshd: Sshd, said: bytes, reason: str, word: str) -> None:
    async with talker(said) as port:
        error = await refusal(NodeSpec(host="127.0.0.1", ssh_port=port), sshd.trusted())
    assert error.reason == reason
    assert word in error.detail
    assert "\x1b" not in error.sentence()


async def test_the_time_limit_covers_the_jump_host_too(sshd: Sshd) -> None:
    async with talker(b"") as port:
        began = time.monotonic()
        error = await refusal(sshd.node(jump=f"127.0.0.1:{port}"), sshd.trusted())
        assert time.monotonic() - began < 5
    assert (error.reason, error.through) == ("timeout", f"127.0.0.1:{port}")


async def test_a_cancelled_call_leaves_nothing_behind(sshd: Sshd) -> None:
    for delay_s in (0.0, 0.005, 0.02, 0.05):
        task = asyncio.create_task(connect(sshd.node(), QUICK, known_hosts=sshd.trusted(), ssh_config=None))
        await asyncio.sleep(delay_s)
        task.cancel()
        done = (await asyncio.gather(task, return_exceptions=True))[0]
        if not isinstance(done, BaseException):
            await done.close()
    for _ in range(100):
        if not sshd.sessions():
            break
        await asyncio.sleep(0.05)
    assert not sshd.sessions()


def test_every_lasting_reason_is_documented() -> None:
    from jupiter_engine.remote import failures

    assert failures.__doc__ is not None
    for reason in LASTING:
        assert reason in failures.__doc__
