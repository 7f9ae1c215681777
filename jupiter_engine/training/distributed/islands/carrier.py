"""How files travel between the hub's exchange folder and that of an island, and how many bytes do.

`Local`: both are the same folder. `Ssh`: the hub pulls and pushes with the machine's own ssh, one file at a time,
under a .part name that is verified by its SHA-256 before it gets its real one; a copy that was cut is taken up where
it stopped. It works in a thread of its own: a slow line to one island holds up nobody else.

Beside what is exchanged lies `fence`, the highest fence of a hub that was ever there. Whoever has a lower one was
replaced, perhaps on another machine and without hearing of it: it writes nothing there any more (Deposed).
"""

from __future__ import annotations

import re
import shlex
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from jupiter_engine.errors import StateError
from jupiter_engine.files import sha256_file, sync_file, sync_folder, write_atomic
from jupiter_engine.training.distributed.islands import exchange
from jupiter_engine.training.distributed.islands.ledger import Deposed
from jupiter_engine.units import plain_text

_POLL_S = 2.0
_LIMIT_S = 6 * 3600.0
_CALL_S = 60.0


class Carrier(Protocol):
    """One island's line. All methods return at once."""

    island: str
    problem: str
    """Why the last try failed; empty while all is well."""
    down_bytes: int
    """Carried to the island so far, by this process."""
    up_bytes: int
    """Carried from it."""
    deposed: Deposed | None
    """Another hub was found to lead this island."""

    def begin(self, fence: int) -> None:
        """`fence`: of this hub."""
        ...

    def ask(self) -> None:
        """Find out now whether another hub leads this island. The one call that waits for the machine's answer."""
        ...

    def close(self) -> None: ...


class Local:
    """The island uses the hub's own folder: nothing is copied, what it reads and writes is counted."""

    def __init__(self, folder: Path, island: str) -> None:
        self.island, self._folder = island, folder
        self.problem = ""
        self.down_bytes = self.up_bytes = 0
        self.deposed: Deposed | None = None
        self._fence = 0

    def begin(self, fence: int) -> None:
        self._fence = fence
        self.ask()

    def ask(self) -> None:
        path = self._folder / exchange.FENCE
        said = path.read_text("utf-8", "replace").strip() if path.exists() else ""
        seen = int(said) if _NUMBER.fullmatch(said) else 0
        if seen > self._fence:
            self.deposed = _deposed(self.island, said)
        elif seen < self._fence:
            _replace(path, f"{self._fence}\n".encode())

    def close(self) -> None: ...

    def took_base(self, size: int) -> None:
        """The island was given a base of `size` bytes to work on."""
        self.down_bytes += size

    def gave(self, size: int) -> None:
        self.up_bytes += size


# $1: file.part there; says how many bytes of it are there.
_HAVE = 'if [ -f "$1" ]; then wc -c <"$1"; else echo 0; fi'
# $1: file; $2: from this byte on (counted from 1).
_SEND = 'tail -c "+$2" "$1"'
# $1: file.part; appended to.
_APPEND = 'mkdir -p "${1%/*}" && cat >>"$1"'
# $1: file.part, $2: file, $3: its SHA-256. Status 3: it is another file.
_SETTLE = """
if command -v sha256sum >/dev/null; then found=$(sha256sum "$1"); else found=$(shasum -a 256 "$1"); fi
if [ "${found%% *}" = "$3" ]; then [ "$1" = "$2" ] || mv -f "$1" "$2"; else rm -f "$1"; exit 3; fi
"""
# $1: exchange folder there, $2: number of the round; names of the contributions that are there in full.
_LIST = 'cd "$1/rounds/$2/up" 2>/dev/null && ls || true'
_READ = 'if [ -f "$1" ]; then cat "$1"; fi'
# $1: exchange folder there, $2: this hub's fence. Status 4: one with a higher fence was there; says which.
_LEAD = """
mkdir -p "$1"
seen=$(cat "$1/fence" 2>/dev/null)
case "$seen" in ''|*[!0-9]*) seen=0;; esac
if [ "$seen" -gt "$2" ]; then echo "$seen"; exit 4; fi
if [ "$seen" -lt "$2" ]; then echo "$2" >"$1/fence.$$" && mv -f "$1/fence.$$" "$1/fence" || exit 1; fi
"""
# $1 and $2 as in _LEAD, $3: file.
_WRITE = f'{_LEAD}mkdir -p "${{3%/*}}" && cat >"$3.$$" && mv -f "$3.$$" "$3"'
# $1: exchange folder there, $2 and $3: the folders of all other rounds go (higher ones are of a hub before this one).
_FORGET = """
cd "$1/rounds" 2>/dev/null || exit 0
for round in [0-9]*; do if [ "$round" != "$2" ] && [ "$round" != "$3" ]; then rm -rf "$round"; fi; done
"""
_OTHER_LEADS = 4
_NUMBER = re.compile(r"[0-9]{1,18}")


class Ssh:
    """Carries between the hub's folder here and the island's folder there."""

    def __init__(self, folder: Path, island: str, *, alias: str, there: str, ssh_config: str) -> None:
        """`there`: the island's exchange folder on the machine `alias`; an empty alias runs the same commands here
        (for tests)."""
        self.island, self._folder, self._there = island, folder, there
        self._alias, self._config = alias, ssh_config
        self.problem = ""
        self.down_bytes = self.up_bytes = 0
        self.deposed: Deposed | None = None
        self._fence = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"carrier of {island}", daemon=True)
        self._sent: dict[str, bytes] = {}
        """Small files as they were last written there."""

    def begin(self, fence: int) -> None:
        self._fence = fence
        self._thread.start()

    def close(self) -> None:
        """Say the end to the island if there is one to say, and stop."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=10.0)

    def _work(self) -> None:
        while not self._stop.wait(_POLL_S):
            self.turn()
        self.turn()

    def turn(self) -> None:
        """Everything that there is to carry now; nothing once another hub leads."""
        self._try(self._ask, self._down, self._up)

    def ask(self) -> None:
        self._try(self._ask)

    def _try(self, *parts: Callable[[], None]) -> None:
        try:
            for part in parts:
                if self.deposed is None:
                    part()
        except Deposed as error:
            self.deposed = error
        except (OSError, StateError, subprocess.TimeoutExpired, ValueError) as error:
            # ValueError: a machine whose shell says more than it was asked for.
            self.problem = error.detail if isinstance(error, StateError) else str(error)
        else:
            self.problem = ""

    def _ask(self) -> None:
        self._shell(_LEAD, self._there, str(self._fence))

    # -- to the island ---------------------------------------------------------------------------
    def _down(self) -> None:
        end = self._folder / exchange.END
        if end.exists():
            self._small(end, exchange.END)
        else:
            self._remove_end()
        plan = exchange.newest_plan(self._folder)
        if plan is None:
            return
        name = f"rounds/{plan.round:08d}"
        marker = f"{name}/{exchange.BASE}"
        if plan.base.sha256.encode() != self._sent.get(marker):
            self.push(self._folder / marker, marker, plan.base.sha256)
            self._sent[marker] = plan.base.sha256.encode()
            self._shell(_FORGET, self._there, f"{plan.round - 1:08d}", f"{plan.round:08d}")
        # Only now: a plan is followed as soon as it is there.
        self._small(self._folder / name / exchange.PLAN, f"{name}/{exchange.PLAN}")

    def _remove_end(self) -> None:
        if exchange.END in self._sent or not self._sent:
            self._shell('rm -f "$1"', f"{self._there}/{exchange.END}")
            self._sent.pop(exchange.END, None)

    def _small(self, path: Path, name: str) -> None:
        data = path.read_bytes()
        if self._sent.get(name) != data:
            self._shell(_WRITE, self._there, str(self._fence), f"{self._there}/{name}", data=data)
            self._sent[name] = data
            self.down_bytes += len(data)

    def push(self, path: Path, name: str, sha256: str) -> None:
        """Copy a file to `name` there, going on where an earlier try stopped. StateError if it arrives damaged."""
        target = f"{self._there}/{name}"
        have = int(self._shell(_HAVE, target).strip() or 0)
        size = path.stat().st_size
        if have == size and self._try_settle(target, target, sha256):
            return
        part = f"{target}.part"
        have = int(self._shell(_HAVE, part).strip() or 0)
        if have > size:
            self._shell('rm -f "$1"', part)
            have = 0
        with path.open("rb") as file:
            file.seek(have)
            argv = self._argv(_APPEND, part)
            done = subprocess.run(argv, stdin=file, capture_output=True, timeout=_LIMIT_S, check=False)
        if done.returncode != 0:
            raise StateError(f"{name} could not be sent: {_last(done.stderr)}")
        self.down_bytes += size - have
        if not self._try_settle(part, target, sha256):
            raise StateError(f"{name} arrived damaged; it is sent again")

    def _try_settle(self, part: str, target: str, sha256: str) -> bool:
        done = subprocess.run(
            self._argv(_SETTLE, part, target, sha256),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LIMIT_S,
            check=False,
        )
        if done.returncode not in (0, 3):
            raise StateError(f"{target}: {_last(done.stderr)}")
        return done.returncode == 0

    # -- from the island -------------------------------------------------------------------------
    def _up(self) -> None:
        here = self._shell(_READ, f"{self._there}/here/{self.island}.json")
        if here:
            _replace(exchange.here_path(self._folder, self.island), here)
            self.up_bytes += len(here)
        for number in exchange.rounds(self._folder):
            listed = self._shell(_LIST, self._there, f"{number:08d}").decode("utf-8", "replace").split()
            for name in sorted(listed):
                if name.startswith(f"{self.island}.") and name.endswith(".ok.json"):
                    self._pull_contribution(number, name)

    def _pull_contribution(self, number: int, ok_name: str) -> None:
        folder = exchange.up_folder(self._folder, number)
        if (folder / ok_name).exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        there = f"{self._there}/rounds/{number:08d}/up"
        said = self._shell(_READ, f"{there}/{ok_name}")
        found = folder / f".{ok_name}"
        found.write_bytes(said)
        up = exchange.read(found, exchange.Up)
        found.unlink()
        if up is None:
            raise StateError(f"{ok_name} of {self.island} cannot be read")
        name = ok_name.removesuffix(".ok.json") + ".safetensors"
        self.pull(f"{there}/{name}", folder / name, up.offer.file.sha256, up.offer.file.bytes)
        write_atomic(folder / ok_name, said)
        self.up_bytes += len(said)

    def pull(self, there: str, path: Path, sha256: str, size: int) -> None:
        """Copy a file of the island to `path`, going on where an earlier try stopped. StateError as `push`."""
        part = path.with_name(path.name + ".part")
        have = part.stat().st_size if part.exists() else 0
        if have > size:
            part.unlink()
            have = 0
        with part.open("ab") as file:
            done = subprocess.run(
                self._argv(_SEND, there, str(have + 1)),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.PIPE,
                timeout=_LIMIT_S,
                check=False,
            )
        self.up_bytes += part.stat().st_size - have
        if done.returncode != 0:
            raise StateError(f"{path.name} could not be fetched: {_last(done.stderr)}")
        if part.stat().st_size != size or sha256_file(part) != sha256:
            part.unlink()
            raise StateError(f"{path.name} arrived damaged; it is fetched again")
        # The hub enters it as held, so it must outlive a power cut.
        with part.open("rb") as file:
            sync_file(file.fileno())
        part.rename(path)
        sync_folder(path.parent)

    # -- commands --------------------------------------------------------------------------------
    def _argv(self, script: str, *arguments: str) -> list[str]:
        command = ["/bin/sh", "-c", script, "sh", *arguments]
        if not self._alias:
            return command
        config = ["-F", self._config] if self._config else []
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15"]
        return ["ssh", *config, *options, "--", self._alias, shlex.join(command)]

    def _shell(self, script: str, *arguments: str, data: bytes = b"") -> bytes:
        done = subprocess.run(
            self._argv(script, *arguments), input=data, capture_output=True, timeout=_CALL_S, check=False
        )
        if done.returncode == _OTHER_LEADS:
            raise _deposed(self.island, plain_text(done.stdout.decode("utf-8", "replace")).strip()[-20:])
        if done.returncode != 0:
            raise StateError(f"the machine of island {self.island}: {_last(done.stderr)}")
        return done.stdout


def _deposed(island: str, fence: str) -> Deposed:
    return Deposed(f"a hub with fence {fence} leads island {island}", fix="let the other one go on")


def _last(errors: bytes) -> str:
    said = plain_text(errors.decode("utf-8", "replace")).strip().splitlines()
    return said[-1][:300] if said else "the connection ended without a word"


def _replace(path: Path, data: bytes) -> None:
    """Whole or not at all; not synced, for what is told anew every few seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.rename(path)
