"""The control wing's side of a node runner: put it there, start its verbs, understand what it answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec

from jupiter_engine.cluster.frames import (
    HEADER_BYTES,
    BeatFrame,
    FileFrame,
    Frame,
    KeepState,
    NodeRefused,
    Position,
    ResetFrame,
    Told,
    distrusted,
    header_of,
    plain,
    refusal,
)
from jupiter_engine.cluster.runner_file import RunnerFile
from jupiter_engine.errors import RemoteError
from jupiter_engine.remote import failures
from jupiter_engine.remote.port import Connection, Stream
from jupiter_engine.units import plain_text

__all__ = [
    "BeatFrame", "FileFrame", "Frame", "Hello", "KeepOrder", "KeepProcess", "KeepState", "NodeRefused", "NodeRunner",
    "Position", "ResetFrame", "RunnerFile", "Told",
]  # fmt: skip

T = TypeVar("T")

PYTHON_FLAGS = ("-I", "-S", "-X", "utf8")
"""Only the standard library, whatever the node's environment says. See jupiter_engine.node.program."""

PYTHONS = (
    *(
        f"{folder}python3.{minor}"
        for minor in (13, 12, 11, 14)
        for folder in ("", "/opt/homebrew/bin/", "/usr/local/bin/")
    ),
    *(f"{folder}python3" for folder in ("", "/opt/homebrew/bin/", "/usr/local/bin/", "~/.local/bin/", "/usr/bin/")),
    "python3.10",
    "python3.9",
)
"""Tried in this order: a command over ssh does not see what a login shell puts on PATH."""

# $1 workdir, $2 name of the file, then the Pythons to try. First line: `found`, Python, workdir, file present or not.
_FIND = r"""
tab=$(printf '\t')
workdir=$1 name=$2; shift 2
case $workdir in "~") workdir=$HOME ;; "~/"*) workdir=$HOME/${workdir#"~/"} ;; esac
file=$workdir/node/$name
tried=
for python in "$@"; do
  case $python in "~/"*) python=$HOME/${python#"~/"} ;; esac
  if ! path=$(command -v "$python" 2>/dev/null); then tried="$tried$tab$python is not there"; continue; fi
  if [ "$path" = /usr/bin/python3 ] && [ "$(uname)" = Darwin ] && ! xcode-select -p >/dev/null 2>&1; then
    tried="$tried$tab$path only asks for Apple's command line tools"; continue
  fi
  if ! "$path" -I -S -c 'import sys; sys.exit(sys.version_info < (3, 9))' </dev/null >/dev/null 2>&1; then
    tried="$tried$tab$path is older than 3.9 or broken"; continue
  fi
  if [ -f "$file" ]; then
    printf 'found\t%s\t%s\tpresent\n' "$path" "$workdir"
    exec "$path" -I -S -X utf8 "$file" hello
  fi
  printf 'found\t%s\t%s\tmissing\n' "$path" "$workdir"
  exit 0
done
printf 'none%s\n' "$tried"
"""


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """Who and where a machine is."""

    version: str
    python: str
    python_version: str
    system: str
    """Linux, Darwin."""
    machine: str
    home: str
    user: str
    hostname: str
    boot_id: str
    shell: str
    at: float
    """The machine's clock, seconds since the epoch."""


class KeepProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process to keep. All paths are paths on the node, absolute."""

    name: str
    argv: tuple[str, ...]
    cwd: str
    log: str
    env: dict[str, str] = {}
    """Added to what the node runner itself has."""
    start: bool = True
    """False: a launcher starts it with verb `hold`; it is only watched, and ended with the others."""


class KeepOrder(msgspec.Struct, frozen=True, kw_only=True):
    """keep.json."""

    id: str
    processes: tuple[KeepProcess, ...]
    grace_s: float = 20.0
    lease_s: float | None = None
    """The processes are ended when the file `lease` beside keep.json has not been touched for so long."""
    restart: bool = False
    """What has ended in an older round is started again."""
    round: int = 0
    version: int = 1


class NodeRunner:
    """The node runner on one machine. Every method raises RemoteError if the machine cannot be reached, NodeRefused
    with the runner's own reason if it can but will not."""

    def __init__(self, connection: Connection, workdir: str = "~/.jupiter", python: str | None = None) -> None:
        """`python`: the one to use; None: the first usable one of PYTHONS. Nothing is done before `ensure`."""
        self.connection = connection
        self.workdir = workdir
        """Absolute once `ensure` has returned."""
        self.python = python or ""
        """Absolute once `ensure` has returned."""
        self.file = ""
        """Path of the runner on the node; empty before `ensure`."""
        self._wanted_python = python

    @property
    def host(self) -> str:
        return self.connection.host

    async def ensure(self) -> Hello:
        """Find a Python, put the runner there if it is missing (one round trip if not), and let it say hello."""
        packed = RunnerFile.packed()
        pythons = (self._wanted_python,) if self._wanted_python else PYTHONS
        script = ("/bin/sh", "-c", _FIND, "sh", self.workdir, packed.name, *pythons)
        found = await self.connection.run(script, timeout_s=60.0, limit_bytes=1 << 20)
        first, _, rest = found.stdout.partition(b"\n")
        words = first.decode("utf-8", "replace").split("\t")
        if words[0] != "found" or len(words) != 4 or not all(word.startswith("/") for word in words[1:3]):
            raise self._no_python(words, found.exit_status, found.stderr)
        self.python, self.workdir = words[1], words[2]
        self.file = f"{self.workdir}/node/{packed.name}"
        if words[3] == "present" and (hello := self._hello(rest, packed)) is not None:
            return hello
        await self.connection.write(self.file, packed.data)
        hello = self._hello(json.dumps(await self.verb("hello")).encode(), packed)
        if hello is None:
            raise distrusted("with another version than was sent there", self.host)
        return hello

    def _no_python(self, words: Sequence[str], exit_status: int | None, stderr: bytes) -> RemoteError:
        if words[0] != "none":
            said = plain_text((stderr or "\t".join(words).encode()).decode("utf-8", "replace")).strip()[-500:]
            return RemoteError(
                f"{self.host} did not run a plain sh script: {said}",
                host=self.host,
                argv=("/bin/sh",),
                exit_status=exit_status,
                output_tail=said,
                fix="log in there by hand: the account must allow commands, and its start files must print nothing",
            )
        return failures.no_python(self.connection.name, self.host, tried=words[1:], needed="3.9 or later")

    @staticmethod
    def _hello(line: bytes, packed: RunnerFile) -> Hello | None:
        """None for a runner file that is damaged: it is sent again."""
        try:
            hello = msgspec.convert(plain(msgspec.json.decode(line)), Hello)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        return hello if hello.version == packed.sha else None

    def argv(self, verb: str, *arguments: str) -> tuple[str, ...]:
        """Command that runs a verb on the node. `ensure` must have been called."""
        if not self.file:
            raise RemoteError(f"the node runner has not been put on {self.host} yet", host=self.host)
        return (self.python, *PYTHON_FLAGS, self.file, verb, *arguments)

    async def verb(
        self, name: str, *arguments: str, stdin: bytes = b"", timeout_s: float = 60.0, limit_bytes: int = 16 << 20
    ) -> dict[str, Any]:
        """Run a verb that answers with one JSON object (its last line), all texts in it made plain."""
        argv = self.argv(name, *arguments)
        done = await self.connection.run(argv, stdin=stdin, timeout_s=timeout_s, limit_bytes=limit_bytes)
        line = done.stdout.rstrip(b"\n").rpartition(b"\n")[2]
        if (refused := refusal(line, self.host)) is not None:
            raise refused
        try:
            answer = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            answer = None
        if done.exit_status != 0 or not isinstance(answer, dict):
            tail = plain_text((done.stderr or done.stdout).decode("utf-8", "replace")).strip()[-1000:]
            raise RemoteError(
                f"`{name}` on {self.host} ended with {done.signal or done.exit_status}: {tail}",
                host=self.host,
                argv=argv,
                exit_status=done.exit_status,
                output_tail=tail,
            )
        return {plain_text(key): plain(value) for key, value in answer.items()}

    async def hello(self) -> Hello:
        """Ask again who it is (and what its clock says)."""
        return self._typed(await self.verb("hello", timeout_s=30.0), Hello)

    async def keep(self, folder: str, order: KeepOrder | None = None) -> KeepState:
        """Make sure a runner looks after a folder; with an order, write that first. Safe to repeat."""
        if order is not None:
            await self.connection.write(f"{folder}/keep.json", msgspec.json.encode(order))
        return self._typed(await self.verb("keep", folder), KeepState)

    async def state(self, folder: str) -> KeepState:
        return self._typed(await self.verb("state", folder, timeout_s=30.0), KeepState)

    async def tell(self, folder: str, command: Mapping[str, Any]) -> Told:
        """Give a command and wait until it is done. The same id again gets the same answer, whatever happened between.

        `command`: {"id", "do": "stop"|"kill"|"signal"} and as wanted `name` (of one process; left out: all),
        `grace_s` (20 if left out here) and `signal` (USR1, STOP, ...).
        """
        whole = {"grace_s": 20.0, **command}
        timeout_s = 1.5 * float(whole["grace_s"]) + 60.0
        answer = await self.verb("tell", folder, stdin=msgspec.json.encode(whole), timeout_s=timeout_s)
        return self._typed(answer, Told)

    def _typed(self, answer: Mapping[str, Any], kind: type[T]) -> T:
        try:
            return msgspec.convert(answer, kind)
        except msgspec.ValidationError as error:
            raise distrusted(str(error), self.host) from error

    async def follow(
        self,
        root: str,
        patterns: Sequence[str],
        *,
        have: Mapping[str, Position] | None = None,
        keep: str | None = None,
        lease: str | None = None,
        renew_s: float = 5.0,
        beat_s: float = 5.0,
        poll_s: float = 0.2,
        limit_bytes_per_s: float | None = None,
    ) -> AsyncGenerator[Frame, None]:
        """Frames of the folder `root` on the node as they come (close the generator to let go of it).

        `patterns` name files below root, `*` and `?` stay within one level. `keep` is the keep folder whose state the
        beats carry (left out: root itself or `node` in it). `lease` is a file there that is touched every `renew_s`
        as long as we are here. It never ends by itself: RemoteError when the connection, the runner or its beat does.
        """
        request = {
            "root": root,
            "patterns": patterns,
            "have": have or {},
            "keep": keep,
            "lease": lease,
            "beat_s": beat_s,
            "poll_s": poll_s,
            "limit_bytes_per_s": limit_bytes_per_s,
        }
        stream = await self.connection.stream(self.argv("follow"))
        renewal: asyncio.Task[None] | None = None
        try:
            await stream.write(msgspec.json.encode(request) + b"\n")
            if lease is not None:
                renewal = asyncio.create_task(self._renew(stream, renew_s))
            async with aclosing(self._frames(stream, patterns, max(15.0, 3 * beat_s))) as frames:
                async for frame in frames:
                    yield frame
        finally:
            if renewal is not None:
                renewal.cancel()
                with suppress(asyncio.CancelledError):
                    await renewal
            await stream.close()

    @staticmethod
    async def _renew(stream: Stream, renew_s: float) -> None:
        # The reading side meets the same lost connection and says so.
        with suppress(RemoteError):
            while True:
                await asyncio.sleep(renew_s)
                await stream.write(b"\n")

    async def _frames(self, stream: Stream, patterns: Sequence[str], silence_s: float) -> AsyncGenerator[Frame, None]:
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    line = await stream.read_line(HEADER_BYTES)
                    if not line:
                        break
                    frame, size = header_of(line, patterns, self.host)
                    if isinstance(frame, FileFrame):
                        frame = msgspec.structs.replace(frame, data=await stream.read_exactly(size))
            except TimeoutError as error:
                raise RemoteError(f"{self.host} has said nothing for {silence_s:.0f} s", host=self.host) from error
            yield frame
        try:
            async with asyncio.timeout(5.0):
                done = await stream.wait()
        except TimeoutError:
            raise RemoteError(f"`follow` on {self.host} closed its output", host=self.host) from None
        tail = plain_text(done.stderr.decode("utf-8", "replace")).strip()[-1000:]
        raise RemoteError(
            f"`follow` on {self.host} ended with {done.signal or done.exit_status}{': ' if tail else ''}{tail}",
            host=self.host,
            argv=self.argv("follow"),
            exit_status=done.exit_status,
            output_tail=tail,
        )
