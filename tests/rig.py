"""Real test hosts on this machine: each has its own network, processes, host name, disk and sshd.

    with Rig(3) as rig:
        rig["node1"].run("hostname")              # as if sitting in front of it
        subprocess.run(["ssh", "-F", str(rig.ssh_config), "node2", "hostname"])
        rig["node2"].power_off()                  # every process gone at once, no packet says so
        rig["node2"].boot()                       # disk as it was, another boot id

A host is a set of Linux namespaces (network, processes, mounts, host name), so a rig needs root. Its disk is a
tmpfs of a given size at the same path inside and outside; it is /tmp and the home folder of the host as well,
and hidden from the other hosts. Everything else of this machine (Python, the checkout) can be read by all of them.

What a test that was killed leaves behind is swept away by the next rig.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import psutil
import pytest

ROOT = Path("/run/jupiter-rig")
CHECKOUT = Path(__file__).resolve().parents[1]
_TOOLS = ("ip", "unshare", "nsenter", "mount", "umount", "ssh", "ssh-keygen", "/usr/sbin/sshd")
_BOOT_S = 10.0
_MIB = 2**20

# The first process of a host: sets the host up, starts sshd, buries orphans. Everything dies with it.
_INIT = r"""
import json, os, subprocess, sys
me = json.loads(sys.argv[1])
def mount(*words):
    subprocess.run(["mount", *words], check=True)
subprocess.run(["hostname", me["name"]], check=True)
for source, target in me["binds"]:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    mount("--rbind", source, target)
for hidden in me["hidden"]:
    mount("-t", "tmpfs", "-o", "ro,size=4k", "none", hidden)
for name in list(os.environ):
    if name not in ("PATH", "LANG", "TZ"):
        del os.environ[name]
subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", me["sshd_config"], "-E", me["sshd_log"]], stdin=subprocess.DEVNULL)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""


def why_no_rig() -> str | None:
    """Why there can be no rig on this machine; None where there can."""
    if sys.platform != "linux":
        return "namespaces are a Linux thing"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    probe = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"namespaces are refused: {probe.stderr.strip()}" if probe.returncode else None


needs_rig = pytest.mark.skipif(why_no_rig() is not None, reason=why_no_rig() or "")
"""Decorates a test that needs a rig."""


class RigHost:
    """One host of a rig."""

    def __init__(self, rig: Rig, number: int) -> None:
        self._rig, self._number = rig, number
        self.name = f"node{number}"
        self.address = f"10.{rig.subnet // 250 + 200}.{rig.subnet % 250}.{number + 10}"
        self.port = 22
        self.disk = rig.folder / self.name
        """Its disk: the same path inside and outside."""
        self.home = self.disk / "home"
        self._netns = f"{rig.id}n{number}"
        self._init: subprocess.Popen[bytes] | None = None
        self.boots = 0

    @property
    def up(self) -> bool:
        return self._init is not None

    def boot(self) -> None:
        """Switch the host on and wait for its sshd. Its boot id is another one at each boot."""
        if self._init is not None:
            raise RuntimeError(f"{self.name} is up already")
        self._plug_in()
        self.boots += 1
        (self.disk / "etc" / "boot_id").write_text(f"{uuid.uuid4()}\n")
        (self.disk / "tmp").mkdir(exist_ok=True)
        argv = ["nsenter", f"--net=/run/netns/{self._netns}"]
        argv += ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
        # -I: no site, no environment: the first process is there in 20 ms.
        argv += [sys.executable, "-I", "-S", "-c", _INIT, json.dumps(self._description())]
        self._init = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True, cwd="/")
        self._wait_for_sshd()

    def power_off(self) -> None:
        """Like pulling the plug: no process gets to do anything, and no packet tells the other hosts."""
        if self._init is None:
            return
        self.cut()
        self._init.kill()
        self._init.wait()
        self._init = None
        deadline = time.monotonic() + _BOOT_S
        # The processes are told by the kernel to die with their first one; a netns lives until they have.
        while self.pids():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: processes survive: {self.pids()}")
            time.sleep(0.01)
        _ip("netns", "delete", self._netns)
        _forget_link(self._netns)

    def cut(self) -> None:
        """Pull the network cable: connections stay as they are, and silent."""
        _ip("link", "set", self._netns, "down")

    def heal(self) -> None:
        """Plug the network cable in again."""
        _ip("link", "set", self._netns, "up")

    def temporary_files(self) -> list[Path]:
        """What lies in its /tmp (where the way to the checkout may begin, which is not its own)."""
        way = {self.disk / Path(*CHECKOUT.parts[1:3])}
        return [path for path in (self.disk / "tmp").iterdir() if path not in way]

    def pids(self) -> list[int]:
        """Processes of the host, by this machine's numbers, without its first one."""
        found = subprocess.run(["ip", "netns", "pids", self._netns], capture_output=True, text=True, check=False)
        own = {self._init.pid, *_children(self._init.pid)} if self._init else set()
        return [pid for pid in map(int, found.stdout.split()) if pid not in own and not _zombie(pid)]

    def run(
        self, *argv: str, input_text: str | None = None, check: bool = True, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the host without going over the network."""
        return subprocess.run(
            self.command(*argv),
            input=input_text,
            capture_output=True,
            text=True,
            check=check,
            timeout=timeout_s,
            env=self.environment,
        )

    def start(self, *argv: str) -> subprocess.Popen[str]:
        """Start a command on the host, with pipes to its standard input and output. Its own pid is another process's:
        see `outer_pid`."""
        pipe = subprocess.PIPE
        return subprocess.Popen(self.command(*argv), stdin=pipe, stdout=pipe, text=True, env=self.environment)

    @property
    def environment(self) -> dict[str, str]:
        """What a login there would have."""
        return {"HOME": str(self.home), "PATH": os.environ["PATH"], "USER": "root"}

    def command(self, *argv: str) -> list[str]:
        """The command that runs `argv` on the host without going over the network."""
        if self._init is None:
            raise RuntimeError(f"{self.name} is off")
        (first,) = _children(self._init.pid)
        return ["nsenter", f"--target={first}", "--net", "--mount", "--uts", "--pid", f"--wd={self.home}", *argv]

    def inner_pid(self, pid: int) -> int:
        """What the host itself calls a process that this machine calls `pid`."""
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
        raise RuntimeError(f"/proc/{pid}/status has no NSpid")

    def outer_pid(self, pid: int) -> int | None:
        """What this machine calls a process that the host calls `pid`; None: there is none (zombies do not count)."""
        for outer in self.pids():
            with contextlib.suppress(OSError):
                if self.inner_pid(outer) == pid:
                    return outer
        return None

    # -- parts -----------------------------------------------------------------------------------
    def make_disk(self, disk_bytes: int, shell: str) -> None:
        self.disk.mkdir()
        options = f"size={disk_bytes},mode=755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(self.disk)], check=True)
        (self.disk / "tmp").mkdir(mode=0o1777)
        self.home.mkdir(mode=0o700)
        etc = self.disk / "etc"
        etc.mkdir()
        # ssh and sshd take home folder and login shell from here; HOME would not convince them.
        users = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
        root = f"root:x:0:0:root:{self.home}:{shell}"
        (etc / "passwd").write_text("\n".join([root, *users]) + "\n")
        (etc / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(etc / "host_key")], check=True)

    def write_settings(self) -> None:
        """Files that name all hosts; the addresses are known once all of them exist."""
        etc = self.disk / "etc"
        names = "".join(f"{host.address} {host.name}\n" for host in self._rig.hosts)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        settings = [
            f"Port {self.port}",
            f"ListenAddress {self.address}",
            f"HostKey {etc}/host_key",
            "PidFile none",
            f"AuthorizedKeysFile {self._rig.folder}/ssh/authorized_keys .ssh/authorized_keys",
            "PasswordAuthentication no",
            "StrictModes no",
            "UsePAM no",
            "UseDNS no",
            "PrintMotd no",
            "MaxStartups 100:30:200",
            "Subsystem sftp internal-sftp",
        ]
        (etc / "sshd_config").write_text("\n".join(settings) + "\n")

    def delete(self) -> None:
        self.power_off()
        _unmount(self.disk)

    def _description(self) -> dict[str, object]:
        etc = self.disk / "etc"
        binds = [(str(etc / name), f"/etc/{name}") for name in ("hosts", "passwd", "resolv.conf")]
        binds.append((str(etc / "boot_id"), "/proc/sys/kernel/random/boot_id"))
        if CHECKOUT.is_relative_to("/tmp"):
            # The host's own /tmp would hide it.
            binds.append((str(CHECKOUT), str(self.disk / CHECKOUT.relative_to("/"))))
        binds.append((str(self.disk / "tmp"), "/tmp"))
        hidden = [str(host.disk) for host in self._rig.hosts if host is not self]
        return {
            "name": self.name,
            "binds": binds,
            "hidden": hidden,
            "sshd_config": str(etc / "sshd_config"),
            "sshd_log": str(etc / "sshd.log"),
        }

    def _plug_in(self) -> None:
        name, inside = self._netns, ("-n", self._netns)
        _ip("netns", "add", name)
        # The same hardware address at each boot: the others need not find it again.
        address = f"02:4a:{self._rig.subnet // 256:02x}:{self._rig.subnet % 256:02x}:00:{self._number:02x}"
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "address", address, "netns", name)
        _ip("link", "set", name, "master", self._rig.id, "up")
        _ip(*inside, "link", "set", "lo", "up")
        _ip(*inside, "address", "add", f"{self.address}/24", "dev", "eth0")
        _ip(*inside, "link", "set", "eth0", "up")
        _ip(*inside, "route", "add", "default", "via", self._rig.gateway)

    def _wait_for_sshd(self) -> None:
        deadline = time.monotonic() + _BOOT_S
        while True:
            assert self._init is not None
            if self._init.poll() is not None or time.monotonic() > deadline:
                log = self.disk / "etc" / "sshd.log"
                raise RuntimeError(f"{self.name} did not boot: {log.read_text() if log.exists() else 'no sshd'}")
            try:
                with socket.create_connection((self.address, self.port), timeout=1.0) as probe:
                    if probe.recv(4) == b"SSH-":
                        return
            except OSError:
                pass  # not there yet
            time.sleep(0.01)


class Rig:
    """`hosts` hosts, called node1, node2, ..., on one network of their own.

    `disk_bytes` is the size of each host's disk, `shell` root's login shell there.
    """

    def __init__(self, hosts: int = 3, *, disk_bytes: int = 256 * _MIB, shell: str = "/bin/bash") -> None:
        with _alone():
            _sweep()
            self.id, self.subnet = _claim()
        self.folder = ROOT / self.id
        self.gateway = f"10.{self.subnet // 250 + 200}.{self.subnet % 250}.1"
        self.hosts: list[RigHost] = []
        self._ssh = self.folder / "ssh"
        self.ssh_config = self._ssh / "config"
        """For plain ssh and asyncssh alike, from this process and from each host: names as aliases."""
        self.identity = self._ssh / "identity"
        self.known_hosts = self._ssh / "known_hosts"
        try:
            self._make(hosts, disk_bytes, shell)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> RigHost:
        for host in self.hosts:
            if host.name == name:
                return host
        raise KeyError(name)

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take everything down again."""
        for host in self.hosts:
            host.delete()
        _erase(self.folder)

    def ssh(self, name: str, command: str, *, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Run a command on a host over ssh."""
        argv = ["ssh", "-F", str(self.ssh_config), name, command]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=timeout_s)

    def _make(self, count: int, disk_bytes: int, shell: str) -> None:
        self._ssh.mkdir()
        Path("/run/sshd").mkdir(exist_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.identity)], check=True)
        shutil.copy(self.identity.with_suffix(".pub"), self._ssh / "authorized_keys")
        _ip("link", "add", self.id, "type", "bridge")
        _ip("address", "add", f"{self.gateway}/24", "dev", self.id)
        _ip("link", "set", self.id, "up")
        for number in range(1, count + 1):
            host = RigHost(self, number)
            self.hosts.append(host)
            host.make_disk(disk_bytes, shell)
        self._write_ssh_config()
        for host in self.hosts:
            host.write_settings()
            host.boot()

    def _write_ssh_config(self) -> None:
        known, config = [], []
        for host in self.hosts:
            kind, key = (host.disk / "etc" / "host_key.pub").read_text().split()[:2]
            known.append(f"{host.address} {kind} {key}\n")
            config.append(f"Host {host.name}\n  HostName {host.address}\n  Port {host.port}\n")
        self.known_hosts.write_text("".join(known))
        config.append(
            f"Host *\n  User root\n  IdentityFile {self.identity}\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.known_hosts}\n  GlobalKnownHostsFile /dev/null\n"
            "  StrictHostKeyChecking yes\n  BatchMode yes\n  ConnectTimeout 5\n"
        )
        self.ssh_config.write_text("".join(config))


# -- bookkeeping: who owns which rig -----------------------------------------------------------------
@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process at a time makes or sweeps rigs."""
    ROOT.mkdir(exist_ok=True)
    with (ROOT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _claim() -> tuple[str, int]:
    """A name and a subnet number that no living rig has; recorded with their owner."""
    taken = {json.loads(path.read_text())["subnet"] for path in ROOT.glob("*/owner.json")}
    me = psutil.Process()
    first = me.pid % 10_000
    subnet = next(number for number in (*range(first, 10_000), *range(first)) if number not in taken)
    # Interface names hold 15 characters: "jr" + 4 digits + "n" + the host's number.
    name = f"jr{subnet}"
    folder = ROOT / name
    folder.mkdir()
    (folder / "owner.json").write_text(json.dumps({"pid": me.pid, "started": me.create_time(), "subnet": subnet}))
    return name, subnet


def _sweep() -> None:
    """Take down the rigs of processes that are gone."""
    for folder in ROOT.iterdir():
        if not folder.is_dir():
            continue
        owner = folder / "owner.json"
        if owner.exists():
            record = json.loads(owner.read_text())
            with contextlib.suppress(psutil.NoSuchProcess):
                if abs(psutil.Process(record["pid"]).create_time() - record["started"]) < 1.0:
                    continue
        _erase(folder)


def _erase(folder: Path) -> None:
    """Remove everything that carries the rig's name: processes, networks, disks, files."""
    name = folder.name
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for netns in [line.split()[0] for line in listed.splitlines() if line.startswith(f"{name}n")]:
        for _attempt in range(200):
            pids = subprocess.run(["ip", "netns", "pids", netns], capture_output=True, text=True, check=False).stdout
            if not pids:
                break
            for pid in pids.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.02)
        _ip("netns", "delete", netns)
        _forget_link(netns)
    _forget_link(name)
    for disk in folder.glob("node*"):
        _unmount(disk)
    shutil.rmtree(folder, ignore_errors=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _forget_link(name: str) -> None:
    """Delete a network interface; its other end may have taken it along already."""
    if Path(f"/sys/class/net/{name}").exists():
        subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True)


def _unmount(disk: Path) -> None:
    if disk.is_mount():
        # Lazily: a process that was just killed may still hold a file for a moment.
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
