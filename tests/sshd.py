"""A real OpenSSH server on loopback with throw-away keys, for tests that need the genuine article.

`start_sshd` needs no root: it serves the user who runs the tests. `path_first` puts a folder of scripted
tools in front of PATH for every command, `shell` makes another program the login shell, `force` runs
something else altogether. What the server is asked and answers is in `log`.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from jupiter_engine.remote.host_keys import KnownHosts
from jupiter_engine.settings.cluster import NodeSpec

START_DEADLINE_S = 10.0


def sshd_program() -> str | None:
    """The server program; it lives outside a user's PATH and insists on being called by its whole path."""
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/sbin")


def require_sshd() -> None:
    """Skip the test where no OpenSSH server can be run."""
    if sshd_program() is None or shutil.which("ssh-keygen") is None:
        pytest.skip("needs OpenSSH's sshd and ssh-keygen")
    if os.geteuid() == 0:
        # sshd drops privileges into this folder and refuses to start without it.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)


def make_key(path: Path, *, passphrase: str = "", kind: str = "ed25519") -> Path:
    """A new private key at `path` and its public half beside it."""
    size = ["-b", "2048"] if kind == "rsa" else []
    command = ["ssh-keygen", "-q", "-t", kind, *size, "-N", passphrase, "-C", "jupiter test", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return path


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@dataclass
class Sshd:
    """A running server. `known_hosts_line` is what a known_hosts file needs to trust it."""

    host: str
    port: int
    user: str
    identity: Path
    known_hosts_line: str
    folder: Path
    process: subprocess.Popen[bytes]
    log: Path
    public_key: str = ""
    """Of the host: `ssh-ed25519 AAAA...`."""
    _stopped: bool = field(default=False, repr=False)

    def node(self, **more: object) -> NodeSpec:
        """Its entry in a cluster file."""
        fields = {"name": "node", "host": self.host, "ssh_port": self.port, "ssh_user": self.user}
        return NodeSpec(**{**fields, "identity": str(self.identity), **more})  # type: ignore[arg-type]

    def trusted(self, own: Path | None = None) -> KnownHosts:
        """Known hosts of a workspace that trust exactly this server; nothing of the real user's counts."""
        return KnownHosts(self.known_hosts(own), user=(), system=())

    def known_hosts(self, path: Path | None = None) -> Path:
        """A known_hosts file that trusts exactly this server."""
        path = path or self.folder / "known_hosts"
        path.write_text(self.known_hosts_line + "\n")
        return path

    def ssh_config(self, alias: str, path: Path | None = None) -> Path:
        """An ssh_config through which `ssh -F PATH ALIAS` (or an asyncssh caller) reaches this server."""
        path = path or self.folder / "ssh_config"
        lines = [
            f"Host {alias}",
            f"  HostName {self.host}",
            f"  Port {self.port}",
            f"  User {self.user}",
            f"  IdentityFile {self.identity}",
            "  IdentitiesOnly yes",
            f"  UserKnownHostsFile {self.known_hosts()}",
            "  BatchMode yes",
        ]
        path.write_text("\n".join(lines) + "\n")
        return path

    def sessions(self) -> list[psutil.Process]:
        """The server's processes of open connections (not the commands that run in them)."""
        try:
            below = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [child for child in below if _name(child).startswith("sshd")]

    def cut(self) -> None:
        """Kill every open connection, as a crash of the machine would; the server goes on listening."""
        for child in self.sessions():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()

    def stop(self) -> None:
        """End the server and everything that was started through it and still has it as an ancestor."""
        if self._stopped:
            return
        self._stopped = True
        try:
            below = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            below = []
        self.process.terminate()
        for child in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.wait(timeout=10)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def start_sshd(
    folder: Path,
    *,
    path_first: Path | None = None,
    force_env: Mapping[str, str] | None = None,
    force: str | None = None,
    shell: str | None = None,
    options: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int | None = None,
    identity: Path | None = None,
    host_key: Path | None = None,
) -> Sshd:
    """Start a server that lets the present user in with `identity` (made here if not given).

    `force_env` is set for every command; `force` is a ForceCommand (the asked-for command is in
    SSH_ORIGINAL_COMMAND); `shell` is the login shell to pretend, by path; `options` are further lines of
    its sshd_config, which win over the ones here. A given `port` and `host_key` make a server again that
    was there before.
    """
    require_sshd()
    folder.mkdir(parents=True, exist_ok=True)
    identity = identity or make_key(folder / "id_test")
    host_key = host_key or make_key(folder / "host_key")
    (folder / "authorized_keys").write_text(identity.with_name(identity.name + ".pub").read_text())
    (folder / "authorized_keys").chmod(0o600)
    for attempt in range(5):
        chosen = port if port is not None else free_port(host)
        config = folder / "sshd_config"
        config.write_text(_config(folder, host, chosen, host_key, path_first, force_env or {}, force, shell, options))
        server = _launch(folder, config, host, chosen)
        if server is not None:
            break
        if port is not None or attempt == 4:
            pytest.fail(f"sshd did not start: {(folder / 'sshd.log').read_text()[-2000:]}")
    assert server is not None
    public = " ".join(host_key.with_name(host_key.name + ".pub").read_text().split()[:2])
    return Sshd(
        host=host,
        port=chosen,
        user=getpass.getuser(),
        identity=identity,
        known_hosts_line=f"[{host}]:{chosen} {public}" if chosen != 22 else f"{host} {public}",
        folder=folder,
        process=server,
        log=folder / "sshd.log",
        public_key=public,
    )


def _config(
    folder: Path,
    host: str,
    port: int,
    host_key: Path,
    path_first: Path | None,
    force_env: Mapping[str, str],
    force: str | None,
    shell: str | None,
    options: Sequence[str],
) -> str:
    if (path_first is not None or shell is not None) and force is None:
        # Not by SetEnv: the start-up file of the real login shell may put other folders first.
        path = f'PATH={shlex.quote(str(path_first))}:"$PATH" ' if path_first is not None else ""
        force = f'{path}exec {shlex.quote(shell or "/bin/sh")} -c "$SSH_ORIGINAL_COMMAND"'
    lines = [
        *options,
        f"ListenAddress {host}",
        f"Port {port}",
        f"HostKey {host_key}",
        f"PidFile {folder / 'sshd.pid'}",
        f"AuthorizedKeysFile {folder / 'authorized_keys'}",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "StrictModes no",
        "UsePAM no",
        "UseDNS no",
        "PrintMotd no",
        "MaxStartups 200:30:400",
        "LogLevel VERBOSE",
        "Subsystem sftp internal-sftp",
    ]
    if force_env:
        # Only the first SetEnv line counts, so all of them go on one.
        lines.append("SetEnv " + " ".join(f'"{key}={value}"' for key, value in force_env.items()))
    if force is not None:
        lines.append(f"ForceCommand {force}")
    return "\n".join(lines) + "\n"


def _launch(folder: Path, config: Path, host: str, port: int) -> subprocess.Popen[bytes] | None:
    """The server once it accepts connections; None if it ended (its port was taken meanwhile)."""
    program = sshd_program()
    assert program is not None
    with (folder / "sshd.log").open("ab") as log:
        # Its own session: a signal that ends the test run from a terminal reaches it through stop() only.
        process = subprocess.Popen(
            [program, "-D", "-e", "-f", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return None
        try:
            with socket.create_connection((host, port), timeout=1):
                return process
        except OSError:
            time.sleep(0.02)
    process.kill()
    process.wait()
    return None
