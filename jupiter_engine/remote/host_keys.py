"""Which machines' ssh keys are trusted: the user's known_hosts files, read only, and one file of Jupiter's own.

A machine's key is its identity. A key that is not known is shown to a person once and then kept in
`.jupiter/known_hosts`; a key that differs from the known one is never taken by the way. Once Jupiter's own
file has a key for a machine, that file decides about it; revocations and certificate authorities count
from all files.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from jupiter_engine.errors import HostKeyRefused, StateError
from jupiter_engine.files import write_atomic

if TYPE_CHECKING:
    import asyncssh

SSH_CONFIG: Final = Path("~/.ssh/config")
USER_FILES: Final = (Path("~/.ssh/known_hosts"), Path("~/.ssh/known_hosts2"))
SYSTEM_FILES: Final = (Path("/etc/ssh/ssh_known_hosts"), Path("/etc/ssh/ssh_known_hosts2"))
SSH_PORT: Final = 22

Standing = Literal["known", "unknown", "changed", "revoked"]


class OfferedKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key with which a machine has just presented itself."""

    host: str
    """As it is looked up: HostKeyAlias or HostName of the ssh config, else the host."""
    port: int
    algorithm: str
    """ssh-ed25519, ecdsa-sha2-nistp256, ssh-rsa."""
    fingerprint: str
    """SHA256:..., as ssh-keygen -l shows it."""
    line: str
    """What a known_hosts file needs to trust it."""
    standing: Standing = "unknown"
    known: tuple[str, ...] = ()
    """Algorithm and fingerprint of the keys that are trusted for this machine instead, with the file they are in."""


class Entry(msgspec.Struct, frozen=True):
    """A trusted key and where that is written."""

    key: Any
    file: Path

    def text(self) -> str:
        return f"{self.key.get_algorithm()} {fingerprint(self.key)} ({self.file})"


class Known(msgspec.Struct, kw_only=True):
    """What all files together say about one machine."""

    keys: list[Entry] = []
    elsewhere: list[Entry] = []
    """Keys of the same name at the ordinary port: good enough to trust, but no reason to call others changed."""
    authorities: list[Any] = []
    revoked: list[Any] = []

    def for_asyncssh(self) -> tuple[list[Any], list[Any], list[Any]]:
        return [entry.key for entry in (*self.keys, *self.elsewhere)], self.authorities, self.revoked

    def standing(self, key: asyncssh.SSHKey) -> Standing:
        data = key.public_data
        if any(other.public_data == data for other in self.revoked):
            return "revoked"
        if any(entry.key.public_data == data for entry in (*self.keys, *self.elsewhere)):
            return "known"
        return "changed" if self.keys else "unknown"


def fingerprint(key: asyncssh.SSHKey) -> str:
    return key.get_fingerprint("sha256")


def written(host: str, port: int) -> str:
    """A machine's name in a known_hosts file."""
    return host.lower() if port == SSH_PORT else f"[{host.lower()}]:{port}"


class KnownHosts:
    """The files of one workspace. `own` is made on first use; nothing else is ever written."""

    def __init__(
        self,
        own: Path,
        *,
        user: Sequence[Path] = USER_FILES,
        system: Sequence[Path] = SYSTEM_FILES,
    ) -> None:
        self.own = own
        self.user = tuple(user)
        self.system = tuple(system)
        # By path: (size and time of change, parsed); a fleet looks the same files up again and again.
        self._parsed: dict[Path, tuple[tuple[int, int], asyncssh.SSHKnownHosts]] = {}

    def lookup(
        self, host: str, port: int, *, user: Sequence[Path] | None = None, system: Sequence[Path] | None = None
    ) -> Known:
        """What is known of a machine. `user` and `system` stand for the usual files, as the ssh config may say."""
        known = Known()
        files = [self.own, *(self.user if user is None else user), *(self.system if system is None else system)]
        for file in files:
            # Own entries decide: a key that was replaced on purpose may still be in the user's file.
            settled = file != self.own and bool(known.keys)
            self._add(known, file.expanduser(), host.lower(), port, settled=settled)
        if known.keys:
            known.elsewhere = []
        return known

    def _add(self, known: Known, file: Path, host: str, port: int, *, settled: bool) -> None:
        parsed = self._parse(file)
        if parsed is None:
            return
        exact = parsed.match(written(host, port), "", None)
        plain = parsed.match(host, "", None) if port != SSH_PORT else ([], [], [])
        known.authorities += [*exact[1], *plain[1]]
        known.revoked += [*exact[2], *plain[2]]
        if not settled:
            known.keys += [Entry(key, file) for key in exact[0]]
            known.elsewhere += [Entry(key, file) for key in plain[0]]

    def _parse(self, file: Path) -> asyncssh.SSHKnownHosts | None:
        try:
            status = file.stat()
            mark = (status.st_size, status.st_mtime_ns)
            if file in self._parsed and self._parsed[file][0] == mark:
                return self._parsed[file][1]
            text = file.read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StateError(f"{file} cannot be read: {error.strerror}", fix="look at its permissions") from error
        # The library is loaded by whoever calls machines; the command line's help must not need it.
        import asyncssh

        parsed = asyncssh.SSHKnownHosts()
        for line in text.splitlines():
            try:
                parsed.load(line)
            except ValueError:
                # As ssh does: a line that nobody understands trusts nobody.
                continue
        self._parsed[file] = (mark, parsed)
        return parsed

    # -- changes -------------------------------------------------------------------------------------------
    def trust(self, offered: OfferedKey, *, replace: bool = False) -> None:
        """Write the key to the own file. A changed one only with `replace`, which removes the former ones there;
        a revoked one never (HostKeyRefused)."""
        key = _key(offered)
        standing = self.lookup(offered.host, offered.port).standing(key)
        if standing == "revoked" or offered.standing == "revoked":
            raise refused(msgspec.structs.replace(offered, standing="revoked"), name=offered.host)
        changed = "changed" in (standing, offered.standing)
        if changed and not replace:
            known = self.lookup(offered.host, offered.port).keys
            texts = tuple(entry.text() for entry in known) or offered.known
            raise refused(msgspec.structs.replace(offered, standing="changed", known=texts), name=offered.host)
        with self._locked() as lines:
            if changed:
                lines[:] = [line for line in lines if not _is_of(line, offered.host, offered.port)]
            line = f"{written(offered.host, offered.port)} {_public(key)}"
            if line not in lines:
                lines.append(line)

    def forget(self, host: str, port: int = SSH_PORT) -> int:
        """Remove a machine from the own file; returns the number of keys removed. Other files stay as they are."""
        with self._locked() as lines:
            before = len(lines)
            lines[:] = [line for line in lines if not _is_of(line, host, port)]
            return before - len(lines)

    @contextmanager
    def _locked(self) -> Iterator[list[str]]:
        """The own file's lines to change; written whole, by one process at a time, readable by the user only."""
        self.own.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.own.with_name(self.own.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            text = self.own.read_text(errors="replace") if self.own.exists() else ""
            lines = text.splitlines()
            yield lines
            new = "".join(line + "\n" for line in lines)
            if new != text:
                write_atomic(self.own, new.encode(), mode=0o600)
            self._parsed.pop(self.own, None)
        finally:
            os.close(lock)


def _is_of(line: str, host: str, port: int) -> bool:
    """Whether a line of the own file (which has one plain name a line) trusts this machine."""
    return line.split(" ", 1)[0] == written(host, port)


def _public(key: asyncssh.SSHKey) -> str:
    return " ".join(key.export_public_key("openssh").decode().split()[:2])


def _key(offered: OfferedKey) -> asyncssh.SSHKey:
    import asyncssh

    return asyncssh.import_public_key(offered.line.split(" ", 1)[1])


def offered(key: asyncssh.SSHKey, host: str, port: int, known: Known) -> OfferedKey:
    """A key as it was presented, and where it stands with what is known."""
    return OfferedKey(
        host=host,
        port=port,
        algorithm=key.get_algorithm(),
        fingerprint=fingerprint(key),
        line=f"{written(host, port)} {_public(key)}",
        standing=known.standing(key),
        known=tuple(entry.text() for entry in known.keys),
    )


def refused(key: OfferedKey, *, name: str, jump: bool = False) -> HostKeyRefused:
    """Why a machine that presented itself with this key is not talked to. The error's `offered` is the key."""
    who = f"jump host {name}" if jump else name
    shown = f"{key.algorithm} {key.fingerprint}"
    if key.standing == "revoked":
        text = f"{who} presented {shown}, a key that is marked as revoked: it has been stolen or withdrawn"
        fix = "do not go on; ask whoever looks after the machine"
    elif key.standing == "changed":
        text = (
            f"THE KEY OF {who} HAS CHANGED. Presented was {shown}, known is {'; '.join(key.known)}. Either the machine "
            f"was set up anew, or another machine answers in its place and reads everything that is sent to it"
        )
        fix = (
            "compare with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` typed at the machine itself; "
            f"only if it is the same: `jupiter nodes trust {name} --replace`"
        )
    else:
        text = f"{who} is not known yet; it presented {shown}"
        fix = (
            f"compare with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` there, then `jupiter nodes trust {name}`"
        )
    return HostKeyRefused(
        text,
        host=key.host,
        reason=f"host_key_{key.standing}",
        through=name if jump else "",
        fix=fix,
        offered=key,
    )


def revoked(host: str, *, name: str, jump: bool = False) -> HostKeyRefused:
    """A key on the list of revoked ones, which asyncssh refuses without showing it."""
    who = f"jump host {name}" if jump else name
    text = f"{who} presented a key that a known_hosts file marks as revoked: it has been stolen or withdrawn"
    return HostKeyRefused(
        text,
        host=host,
        reason="host_key_revoked",
        through=name if jump else "",
        fix="do not go on; ask whoever looks after the machine",
    )
