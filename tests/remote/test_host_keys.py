"""Known hosts files: what is trusted, what has changed, what is written."""

from __future__ import annotations

import multiprocessing
import stat
import subprocess
from pathlib import Path

import asyncssh
import pytest

from jupiter_engine.errors import HostKeyRefused
from jupiter_engine.remote import host_keys
from jupiter_engine.remote.host_keys import KnownHosts

OLD = asyncssh.generate_private_key("ssh-ed25519")
NEW = asyncssh.generate_private_key("ssh-ed25519")
RSA = asyncssh.generate_private_key("ssh-rsa", key_size=2048)


def public(key: asyncssh.SSHKey) -> str:
    return " ".join(key.export_public_key("openssh").decode().split()[:2])


def files(tmp_path: Path, text: str = "") -> KnownHosts:
    user = tmp_path / "user"
    user.write_text(text)
    return KnownHosts(tmp_path / "ws" / "known_hosts", user=(user,), system=())


def offer(known: KnownHosts, key: asyncssh.SSHKey, host: str = "mini", port: int = 22) -> host_keys.OfferedKey:
    return host_keys.offered(key, host, port, known.lookup(host, port))


@pytest.mark.parametrize(
    ("line", "host", "port", "standing"),
    [
        ("mini KEY", "mini", 22, "known"),
        ("mini KEY", "MINI", 22, "known"),
        ("mini,10.0.0.7 KEY comment", "10.0.0.7", 22, "known"),
        ("[mini]:2222 KEY", "mini", 2222, "known"),
        ("[mini]:2222 KEY", "mini", 22, "unknown"),
        ("mini KEY", "mini", 2222, "known"),
        ("*.local,!evil.local KEY", "studio.local", 22, "known"),
        ("*.local,!evil.local KEY", "evil.local", 22, "unknown"),
        ("mini OTHER", "mini", 22, "changed"),
        ("[mini]:2222 OTHER", "mini", 2222, "changed"),
        # Another server of the same machine: says nothing about the one at this port.
        ("mini OTHER", "mini", 2222, "unknown"),
        ("mini RSA", "mini", 22, "changed"),
        ("other KEY", "mini", 22, "unknown"),
        ("mini KEY\n@revoked * KEY", "mini", 22, "revoked"),
        ("rubbish\n\n# mini OTHER\n@what mini KEY\nmini KEY", "mini", 22, "known"),
        ("mini ssh-ed25519 AAAA", "mini", 22, "unknown"),
    ],
)
def test_standing(tmp_path: Path, line: str, host: str, port: int, standing: str) -> None:
    text = line.replace("KEY", public(OLD)).replace("OTHER", public(NEW)).replace("RSA", public(RSA))
    assert offer(files(tmp_path, text), OLD, host, port).standing == standing


def test_hashed_names_of_ssh_keygen_count(tmp_path: Path) -> None:
    path = tmp_path / "user"
    path.write_text(f"mini {public(OLD)}\n[mini]:2222 {public(NEW)}\n")
    subprocess.run(["ssh-keygen", "-H", "-f", str(path)], check=True, capture_output=True)
    assert "mini" not in path.read_text()
    known = KnownHosts(tmp_path / "own", user=(path,), system=())
    assert offer(known, OLD).standing == "known"
    assert offer(known, NEW, port=2222).standing == "known"
    assert offer(known, OLD, port=2222).standing == "changed"


def test_the_fingerprint_is_the_one_of_ssh_keygen(tmp_path: Path) -> None:
    path = tmp_path / "key.pub"
    path.write_text(public(OLD))
    shown = subprocess.run(["ssh-keygen", "-lf", str(path)], check=True, capture_output=True, text=True).stdout
    offered = offer(files(tmp_path), OLD, port=2222)
    assert offered.fingerprint in shown
    assert offered.line == f"[mini]:2222 {public(OLD)}"


def test_trusting_writes_a_private_file_and_only_that(tmp_path: Path) -> None:
    known = files(tmp_path, "other " + public(NEW) + "\n")
    known.trust(offer(known, OLD))
    known.trust(offer(known, OLD))
    assert known.own.read_text() == f"mini {public(OLD)}\n"
    assert stat.S_IMODE(known.own.stat().st_mode) == 0o600
    assert (tmp_path / "user").read_text() == "other " + public(NEW) + "\n"
    assert offer(known, OLD).standing == "known"


@pytest.mark.parametrize("where", ["own", "user"])
def test_a_changed_key_needs_more_than_plain_trust(tmp_path: Path, where: str) -> None:
    known = files(tmp_path, f"mini {public(OLD)}\n" if where == "user" else "")
    if where == "own":
        known.trust(offer(known, OLD))
    changed = offer(known, NEW)
    with pytest.raises(HostKeyRefused, match="HAS CHANGED") as caught:
        known.trust(changed)
    # Even if it was looked at before the other key was known.
    with pytest.raises(HostKeyRefused, match="HAS CHANGED"):
        known.trust(host_keys.offered(NEW, "mini", 22, host_keys.Known()))
    assert host_keys.fingerprint(OLD) in caught.value.detail
    assert host_keys.fingerprint(NEW) in caught.value.detail
    assert caught.value.reason == "host_key_changed"
    known.trust(changed, replace=True)
    assert offer(known, NEW).standing == "known"
    # The former key is no longer good, wherever it stands.
    assert offer(known, OLD).standing == "changed"
    known.trust(offer(known, OLD), replace=True)
    assert offer(known, OLD).standing == "known"
    assert known.own.read_text().count("\n") == 1


def test_a_revoked_key_is_never_trusted(tmp_path: Path) -> None:
    known = files(tmp_path, f"@revoked * {public(OLD)}\n")
    for replace in (False, True):
        with pytest.raises(HostKeyRefused, match="revoked"):
            known.trust(offer(known, OLD), replace=replace)
    assert not known.own.exists()


def test_forgetting_removes_that_machine_from_the_own_file_only(tmp_path: Path) -> None:
    known = files(tmp_path, f"third {public(OLD)}\n")
    for host, port in (("mini", 22), ("mini", 2222), ("studio", 22)):
        known.trust(offer(known, OLD, host, port))
    assert known.forget("mini", 2222) == 1
    assert known.forget("mini", 2222) == 0
    assert known.forget("third") == 0
    assert offer(known, OLD).standing == "known"
    assert known.own.read_text().splitlines() == [f"mini {public(OLD)}", f"studio {public(OLD)}"]


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    known = files(tmp_path)
    assert offer(known, OLD).standing == "unknown"
    (tmp_path / "user").write_text(f"mini {public(OLD)}\n")
    assert offer(known, OLD).standing == "known"


def _trust_twenty(own: Path, first: int) -> None:
    known = KnownHosts(own, user=(), system=())
    for number in range(first, first + 20):
        known.trust(offer(known, OLD, f"host{number}"))


def test_several_processes_lose_no_line(tmp_path: Path) -> None:
    own = tmp_path / "known_hosts"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_trust_twenty, args=(own, first)) for first in (0, 100)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len(set(own.read_text().splitlines())) == 40
