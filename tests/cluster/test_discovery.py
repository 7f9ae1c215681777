"""Hosts offered for adding: a real ssh config, a real Bonjour responder on loopback."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from zeroconf import IPVersion, ServiceInfo
from zeroconf.asyncio import AsyncZeroconf

from jupiter_engine.cluster.discovery import Offer, announced_hosts, configured, discover

LOOPBACK = ["127.0.0.1"]

CONFIG = """\
# Mine
Include extra/*.conf
Host mini mini-2 *.lan !bad
    HostName %h.local
    User ada
Host rtx
  Port=2222
  HostName "192.168.1.100"
  ProxyJump gate
Host *.example.org ??
  User nobody
Host github.com
  User git
Match host secret
  User root
Host -oProxyCommand=x  $(touch x)  ok
Host *
  User late
  Port 22
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / ".ssh" / "config"
    (file.parent / "extra").mkdir(parents=True)
    file.write_text(CONFIG)
    (file.parent / "extra" / "a.conf").write_text("Host included\n  HostName inc.lan\n  Port 99999\n")
    return file


def test_hosts_of_an_ssh_config(config: Path) -> None:
    found = configured(config)
    assert found.notes == ()
    assert {offer.host: (offer.address, offer.port, offer.user) for offer in found.offers} == {
        "mini": ("mini.local", 22, "ada"),
        "mini-2": ("mini-2.local", 22, "ada"),
        "rtx": ("192.168.1.100", 2222, "late"),
        "included": ("inc.lan", None, "late"),
        "ok": ("", 22, "nobody"),
    }


@pytest.mark.skipif(shutil.which("ssh") is None, reason="needs OpenSSH's ssh")
def test_hosts_are_resolved_as_ssh_does(config: Path) -> None:
    """`ssh -G` is the oracle."""
    # Relative includes are below ~/.ssh for ssh, below the file's folder here.
    file = config.with_name("absolute")
    file.write_text(config.read_text().replace("extra/", f"{config.parent}/extra/").replace("Port 99999", "Port 9"))
    (config.parent / "extra" / "a.conf").write_text("Host included\n  HostName inc.lan\n  Port 99\n")
    for offer in configured(file).offers:
        done = subprocess.run(["ssh", "-G", "-F", str(file), offer.host], capture_output=True, text=True, check=True)
        said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
        assert (offer.address or offer.host, offer.port, offer.user) == (
            said["hostname"],
            int(said["port"]),
            said["user"],
        )
    assert {offer.host for offer in configured(file).offers} == {"mini", "mini-2", "rtx", "included", "ok"}


def test_files_included_in_each_other_end(tmp_path: Path) -> None:
    file = tmp_path / "config"
    file.write_text(f"Include {file}\nHost a\n")
    found = configured(file)
    assert [offer.host for offer in found.offers] == ["a"]
    assert "more than 16 files" in found.notes[0]


def test_no_config_and_an_unreadable_one(tmp_path: Path) -> None:
    assert configured(tmp_path / "none").offers == ()
    (tmp_path / "folder").mkdir()
    assert "cannot be read" in configured(tmp_path / "folder").notes[0]


def test_garbage_harms_nobody(tmp_path: Path) -> None:
    file = tmp_path / "config"
    file.write_bytes(b"\x00\xff\nHost \x1b[31mred a\x07b\nHost\nInclude\nPort\nHost fine\n")
    assert "fine" in [offer.host for offer in configured(file).offers]
    assert all(offer.host.isprintable() for offer in configured(file).offers)


@pytest.fixture
async def responder() -> AsyncIterator[AsyncZeroconf]:
    zeroconf = AsyncZeroconf(interfaces=LOOPBACK, ip_version=IPVersion.V4Only)
    yield zeroconf
    await zeroconf.async_unregister_all_services()
    await zeroconf.async_close()


def service(name: str, *, kind: str = "_ssh._tcp.local.", port: int = 22, server: str = "mini.local.") -> ServiceInfo:
    return ServiceInfo(kind, f"{name}.{kind}", port=port, addresses=[socket.inet_aton("127.0.0.1")], server=server)


async def test_machines_that_announce_ssh(responder: AsyncZeroconf) -> None:
    await asyncio.gather(
        responder.async_register_service(service("Mac Mini 1")),
        responder.async_register_service(service("Mac Mini 1", kind="_sftp-ssh._tcp.local.")),
        responder.async_register_service(service("rtx", port=2222, server="rtx.local.")),
        responder.async_register_service(service("bad", server="$(reboot).local.")),
        responder.async_register_service(service("web", kind="_http._tcp.local.", server="web.local.")),
    )
    found = await announced_hosts(listen_s=1.0, interfaces=LOOPBACK)
    assert found.offers == (
        Offer(name="Mac Mini 1", host="mini.local", address="127.0.0.1", port=None, source="bonjour"),
        Offer(name="rtx", host="rtx.local", address="127.0.0.1", port=2222, source="bonjour"),
    )


async def test_a_machine_that_ssh_knows_is_offered_once(responder: AsyncZeroconf, config: Path) -> None:
    await responder.async_register_service(service("Mini", server="mini.local."))
    await responder.async_register_service(service("Other", server="other.local."))
    found = await discover(config, listen_s=1.0, interfaces=LOOPBACK)
    assert [(offer.host, offer.source) for offer in found.offers if offer.host in ("mini", "mini.local")] == [
        ("mini", "ssh config")
    ]
    assert ("other.local", "bonjour") in [(offer.host, offer.source) for offer in found.offers]


LISTEN = """
import asyncio, sys
from pathlib import Path
from jupiter_engine.cluster.discovery import discover
found = asyncio.run(discover(Path(sys.argv[1]), listen_s=0.2))
print([offer.host for offer in found.offers], *found.notes, sep="\\n")
"""


def test_without_a_network_there_is_a_note(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("needs a network namespace")
    (tmp_path / "config").write_text("Host a\n")
    command = ["unshare", "--net", sys.executable, "-W", "error", "-c", LISTEN, str(tmp_path / "config")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines() == ["['a']", "The local network cannot be listened to: no interface is up."]
    assert done.stderr == ""
