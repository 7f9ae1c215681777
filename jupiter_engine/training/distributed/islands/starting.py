"""The train worker of one island, kept alive on the island's leading machine and told from the hub's.

The hub calls that machine by ssh, with the same leave and the same kind of files as the leading machine of a group
calls its members; on its own machine it calls nobody. The node runner there (verbs `keep`, `state` and `tell` of
jupiter_engine.node) keeps the worker, detached from every connection: an island trains on while its hub is gone, and
is found again by what the runner wrote down (pid, start time, boot), never by name. A lease ends it in the end: every
look of a hub renews it.

What lies in the island's run folder there:

spec.json      its order, the same bytes on each of its machines
node/          the node runner's: keep.json with the round, lease, identities, events
inbox/halt     asked to come to rest
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

import msgspec

from jupiter_engine.errors import NodeUnreachable, RemoteError
from jupiter_engine.node import program
from jupiter_engine.protocol.specs import IslandSpec
from jupiter_engine.units import plain_text

KEEP: Final = "node"
"""Folder of the node runner's own files below a run folder."""
STOP_GRACE_S: Final = 60.0
"""A step must fit in, so that a stop ends in a checkpoint and not in a kill."""
_CONNECT_S: Final = 10
_CALL_S: Final = 60.0
_AGAIN_S: Final = 30.0
_HALTED: Final = 75
"""A worker's exit status after a halt."""
_UNREACHED: Final = 255
"""ssh's exit status for its own failures."""
_LIMIT_BYTES: Final = 4 << 20
_ENV: Final = {
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
}

# $1: file, written whole or not at all.
_WRITE: Final = 'mkdir -p "${1%/*}" && cat >"$1.$$" && mv -f "$1.$$" "$1"'
_READ: Final = 'if [ -f "$1" ]; then cat "$1"; fi'
_LAST: Final = 'if [ -f "$1" ]; then tail -n 1 "$1" | head -c 65536; fi'
# $1: lease, then the command.
_RENEW: Final = 'if [ -d "${1%/*}" ]; then touch "$1"; fi; shift; exec "$@"'
_HALT: Final = 'mkdir -p "$1/inbox" && : >"$1/inbox/halt"'
_GO_ON: Final = 'rm -f "$1/inbox/halt"'
# On the leading machine: $1 its order, $2 its ssh_config, then pairs of a member's alias and the file there. Says the
# aliases of those that could not be given it.
_FORWARD: Final = r"""
order=$1 config=$2; shift 2
while [ $# -gt 0 ]; do
  ssh -F "$config" -o BatchMode=yes -o ConnectTimeout=10 -- "$1" \
    'mkdir -p '"$3"' && cat >'"$2"'.new && mv -f '"$2"'.new '"$2" <"$order" >/dev/null 2>&1 || echo "$1"
  shift 3
done
"""


class IslandState(msgspec.Struct, frozen=True, kw_only=True):
    """An island's worker as its leading machine shows it."""

    state: Literal["absent", "waiting", "running", "exited", "lost", "silent"]
    """`absent`: never started there; `waiting`: about to start; `lost`: ended and nobody knows how; `silent`: the
    machine does not answer."""
    round: int = 0
    """Starts so far."""
    pid: int | None = None
    """There."""
    exit_status: int | None = None
    """0: trained to the end; 75: came to rest when asked to; other: failed, events.jsonl of the run folder says why."""
    signal: str | None = None
    """KILL, TERM, ... if one ended it."""
    detail: str = ""
    """Why the machine is silent, or the worker could not be started."""

    @property
    def at_work(self) -> bool:
        return self.state in ("waiting", "running")

    @property
    def finished(self) -> bool:
        return self.state == "exited" and self.exit_status == 0


class Machine:
    """Runs commands on one machine: over ssh by its alias in `ssh_config`, or (alias empty) here."""

    def __init__(self, name: str, alias: str = "", ssh_config: str = "") -> None:
        self.name, self.alias, self.ssh_config = name, alias, ssh_config

    def argv(self, *command: str) -> list[str]:
        """What has to be started here for `command` to run there."""
        if not self.alias:
            return list(command)
        config = ["-F", self.ssh_config] if self.ssh_config else []
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_S}"]
        return ["ssh", *config, *options, "--", self.alias, shlex.join(command)]

    def run(self, *command: str, stdin: bytes = b"", timeout_s: float = _CALL_S) -> bytes:
        """Standard output. NodeUnreachable if the machine does not answer (in time), RemoteError for any other end
        than 0."""
        argv = self.argv(*command)
        try:
            done = subprocess.run(argv, input=stdin, capture_output=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise NodeUnreachable(
                f"{self.name} has not answered within {timeout_s:.0f} s", host=self.name, reason="timeout"
            ) from error
        except OSError as error:
            raise RemoteError(f"{argv[0]} cannot be started: {error}", host=self.name, argv=tuple(argv)) from error
        said = plain_text(done.stderr[-2000:].decode("utf-8", "replace")).strip()
        if self.alias and done.returncode == _UNREACHED:
            last = said.splitlines()[-1][:300] if said else "ssh ended without a word"
            raise NodeUnreachable(f"{self.name}: {last}", host=self.name, reason="closed")
        if done.returncode != 0:
            answer = said or plain_text(done.stdout[-500:].decode("utf-8", "replace"))
            raise RemoteError(
                f"{self.name}: {answer[-500:] or 'a command failed'}",
                host=self.name,
                argv=command,
                exit_status=done.returncode,
                output_tail=done.stdout[-4000:].decode("utf-8", "replace") or said,
            )
        return done.stdout[:_LIMIT_BYTES]

    def shell(self, script: str, *arguments: str, stdin: bytes = b"", timeout_s: float = _CALL_S) -> bytes:
        """`run` for a POSIX script with its arguments."""
        return self.run("/bin/sh", "-c", script, "sh", *arguments, stdin=stdin, timeout_s=timeout_s)


class RemoteIsland:
    """One island's worker. Everything may be called again at any time, by this hub or the next one: what is known
    about the worker lies on its own machine."""

    def __init__(self, spec: IslandSpec, *, hub_folder: Path, ssh_config: str, lease_s: float) -> None:
        """`hub_folder`: the hub's run folder here; `ssh_config`: the hub machine's file for its islands; `lease_s`:
        the worker is ended when no hub has looked for so long."""
        self.spec, self.lease_s = spec, lease_s
        leader = spec.leader
        self.machine = Machine(
            leader.name if leader is not None else "this machine",
            leader.ssh if leader is not None else "",
            ssh_config,
        )
        beside = hub_folder.absolute().with_name(f"{hub_folder.name}.{spec.name}")
        self.run_folder = leader.run_folder if leader is not None else str(beside)
        """Of the island, on its leading machine."""
        self._python = leader.python if leader is not None else sys.executable
        self._env = dict(leader.env) if leader is not None else {}
        self._runner = tuple(leader.runner) if leader is not None else ()
        self._keep = f"{self.run_folder}/{KEEP}"
        self.behind: tuple[str, ...] = ()
        """Machines of the island that do not have its order yet because they did not answer its leading one."""
        self._forward_due = 0.0

    # -- for the hub -----------------------------------------------------------------------------
    def start(self, order: bytes) -> IslandState:
        """See to it that a worker is at work on exactly this order, which becomes spec.json.

        One that is at work on it already is left alone, one that has finished it stays finished; one with another
        order is stopped first. NodeUnreachable if the machine does not answer, RemoteError if it cannot.
        """
        present = self._look("state")
        same = self._read_order() == order
        self.machine.shell(_GO_ON, self.run_folder)
        if same and (present.at_work or present.finished):
            present = self._look("keep") if present.at_work else present
            self._spread()
            return present
        if present.at_work:
            self._stop(present, STOP_GRACE_S)
        self.machine.shell(_WRITE, f"{self.run_folder}/spec.json", stdin=order)
        self._spread()
        self.machine.shell(_WRITE, f"{self._keep}/keep.json", stdin=self._keep_order(present.round + 1))
        return self._look("keep")

    def state(self) -> IslandState:
        """How it is now; renews the lease, and replaces a node runner that has died. Never raises for a machine that
        does not answer or does not understand: that is `silent`."""
        try:
            found = self._look("keep")
            if self.behind and time.monotonic() >= self._forward_due:
                self._spread()
        except RemoteError as error:
            return IslandState(state="silent", detail=error.detail)
        return found

    def ask_halt(self) -> None:
        """Have it come to rest at the next safe point, in its own time. NodeUnreachable, RemoteError."""
        self.machine.shell(_HALT, self.run_folder)

    def stop(self, *, grace_s: float = STOP_GRACE_S) -> IslandState:
        """End the worker with everything that it started, and wait for that; SIGKILL after `grace_s`. A machine
        on which nothing runs is left as it is. NodeUnreachable, RemoteError."""
        present = self._look("state")
        if not present.at_work:
            return present
        self._stop(present, grace_s)
        return self._look("state")

    # -- parts -----------------------------------------------------------------------------------
    def _verb(self, verb: str, *arguments: str) -> tuple[str, ...]:
        return (*self._runner, verb, *arguments) if self._runner else tuple(program.argv(verb, *arguments))

    def _stop(self, present: IslandState, grace_s: float) -> None:
        command = {"id": f"stop-{present.round}", "do": "stop", "grace_s": grace_s}
        self._answer(
            lambda: self.machine.run(
                *self._verb("tell", self._keep), stdin=json.dumps(command).encode(), timeout_s=1.5 * grace_s + 60.0
            )
        )

    def _keep_order(self, round_number: int) -> bytes:
        worker = {
            "name": "worker",
            "argv": [self._python, "-m", "jupiter_engine.worker", self.run_folder],
            # The order's paths are relative to the run folder.
            "cwd": self.run_folder,
            "log": f"{self.run_folder}/worker.log",
            "env": {**_ENV, **self._env},
        }
        order = {
            "version": 1,
            "id": PurePosixPath(self.run_folder).name,
            "processes": [worker],
            "grace_s": STOP_GRACE_S,
            "lease_s": self.lease_s,
            "restart": True,
            "round": round_number,
        }
        return json.dumps(order).encode()

    def _read_order(self) -> bytes:
        return self.machine.shell(_READ, f"{self.run_folder}/spec.json")

    def _spread(self) -> None:
        """Give the order to the island's other machines, from its leading one; `behind` are those that missed it."""
        members = [host for host in self.spec.launch.hosts if host.ssh]
        if not members:
            return
        self._forward_due = time.monotonic() + _AGAIN_S
        words: list[str] = []
        for host in members:
            words += [host.ssh, shlex.quote(f"{host.run_folder}/spec.json"), shlex.quote(host.run_folder)]
        said = self.machine.shell(
            _FORWARD,
            f"{self.run_folder}/spec.json",
            self.spec.launch.ssh_config,
            *words,
            timeout_s=_CALL_S + 15.0 * len(members),
        )
        missed = set(said.decode("utf-8", "replace").split())
        self.behind = tuple(host.name for host in members if host.ssh in missed)

    def _look(self, verb: Literal["keep", "state"]) -> IslandState:
        """`keep` also renews the lease and brings a node runner to work."""
        command = self._verb(verb, self._keep)
        if verb == "keep":
            answer = self._answer(lambda: self.machine.shell(_RENEW, f"{self._keep}/lease", *command))
        else:
            answer = self._answer(lambda: self.machine.run(*command))
        if answer is None:
            return IslandState(state="absent")
        worker = (answer.get("processes") or {}).get("worker")
        if not isinstance(worker, dict):
            raise RemoteError(f"{self.machine.name}: its node runner does not know the worker", host=self.machine.name)
        known = {key: worker[key] for key in ("state", "pid", "exit_status", "signal") if worker.get(key) is not None}
        shown = {**known, "round": answer.get("round") or 0, "detail": plain_text(str(worker.get("error") or ""))}
        runner = answer.get("runner") or {}
        if known.get("state") == "waiting" and runner.get("ended_at") and runner.get("round") == answer.get("round"):
            # Its round is over without it: it was stopped, or could not be started.
            shown |= {"state": "lost", "detail": "it was not started"}
        if (
            known.get("state") == "exited"
            and known.get("exit_status") not in (0, _HALTED, None)
            and not shown["detail"]
        ):
            shown["detail"] = self._last_words()
        try:
            return msgspec.convert(shown, IslandState)
        except msgspec.ValidationError as error:
            raise RemoteError(
                f"{self.machine.name}: its node runner answered what cannot be understood ({error})",
                host=self.machine.name,
            ) from error

    def _last_words(self) -> str:
        """What the worker gave as the reason of its failure; empty if it gave none."""
        said = _object(self.machine.shell(_LAST, f"{self.run_folder}/events.jsonl").decode("utf-8", "replace"))
        return plain_text(str(said.get("detail") or ""))[:1000] if said.get("fact") == "failed" else ""

    def _answer(self, ask: Callable[[], bytes]) -> dict[str, Any] | None:
        """The JSON object that a verb answers; None if there is no keep.json yet. RemoteError with the runner's own
        words if it refuses."""
        try:
            said = ask()
        except NodeUnreachable:
            raise
        except RemoteError as error:
            refused = _object(error.output_tail).get("error")
            if not isinstance(refused, dict):
                raise
            if refused.get("kind") == "missing":
                return None
            raise RemoteError(
                f"{self.machine.name}: {plain_text(str(refused.get('detail')))}",
                host=self.machine.name,
                fix=plain_text(str(refused.get("fix") or "")),
            ) from error
        answer = _object(said.decode("utf-8", "replace"))
        if not answer:
            raise RemoteError(f"{self.machine.name}: its node runner gave no answer", host=self.machine.name)
        return answer


def _object(text: str) -> dict[str, Any]:
    """The JSON object of the last line; empty if it holds none."""
    try:
        found = json.loads(text.strip().rpartition("\n")[2])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
