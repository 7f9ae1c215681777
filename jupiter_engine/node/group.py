"""Verb `group SPEC.json`: starts a group of ranks on all its hosts, watches them, and leaves nothing of them behind.

It runs on the leading host. Two phases: every host says that it is ready, then all start. While the ranks work it
does next to nothing: it hears of deaths, silences and stops, copies the other hosts' reports and logs here, and tells
the others that somebody still leads (see host_links). It ends when all ranks have, or when one has failed.

    group.jsonl   what happened: prepared, started, ready, rank_started, rank_exited, rank_stopped, rank_resumed,
                  host_silent, host_back, host_lost, ended (with `reason` in words)
    hosts.json    rank -> name of its host
    hosts/<name>/ the other hosts' own records of the launch

The exit status is 0 if every rank's was, 143 after SIGTERM, else 1; the last line on stdout says why.
"""

from __future__ import annotations

import hashlib
import json
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from . import launch_lines
from .errors import NodeError
from .event_log import EventLog
from .files import write_json
from .group_spec import Host, Spec, read
from .host_calls import Calls
from .host_links import SILENT_S, Link, LocalLink, News, RemoteLink

STOPPED_STATUS = 128 + signal.SIGTERM
_PREPARE_S = 90.0
_GO_S = 45.0
_STOP_S = 40.0
"""Over the grace: ssh, and the agent's own patience."""
_SPARE_PORTS = 64
_SETTLE_S = 0.6
"""How long after a death others are listened to before it is decided who died first."""
_LAUNCHER_S = 4.0
_CATCH_UP_S = 6.0
_SWIFT_S, _CALM_S = 0.2, 1.0
_REFUSALS = 5
_ASKED = ("TERM", "INT", "HUP")
"""Signals by which a process is asked to end."""


class Failed(Exception):
    """Why a launch is over."""


def main(arguments: list[str]) -> int:
    """group SPEC.json."""
    if len(arguments) != 1:
        raise NodeError("usage", "group SPEC.json")
    group = Group(read(Path(arguments[0])))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, group.ask_to_end)
    return group.run()


class Ranks:
    """What is known of each rank."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self.known: dict[int, dict[str, Any]] = {
            rank: {"host": host.name, "exit_status": None, "signal": None} for host in spec.hosts for rank in host.ranks
        }
        self.over: set[int] = set()
        self.ready: set[int] = set()

    def ended(self, rank: int, facts: dict[str, Any], *, by_group: bool) -> dict[str, Any]:
        """Note how a rank ended; returns what is worth telling."""
        self.over.add(rank)
        found: dict[str, Any] = {
            key: facts[key] for key in ("exit_status", "signal", "lost", "error", "ended_at") if key in facts
        }
        told: dict[str, Any] = {
            "exit_status": None,
            "signal": None,
            **found,
            **({"ended_by": "group"} if by_group else {}),
        }
        self.known[rank].update(told)
        return told

    def all_well(self) -> bool:
        """Whether every rank has ended with status 0."""
        return all(rank in self.over and facts["exit_status"] == 0 for rank, facts in self.known.items())

    def look_for_ready(self) -> list[int]:
        """Ranks that have reported `ready` since the last look."""
        fresh = [rank for rank in self.known if rank not in self.ready and self._says_ready(rank)]
        self.ready.update(fresh)
        return fresh

    def _says_ready(self, rank: int) -> bool:
        try:
            lines = (self._spec.folder / f"rank-{rank}.jsonl").read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return False
        for line in lines:
            try:
                report = json.loads(line)
            except ValueError:
                continue
            if isinstance(report, dict) and report.get("report") == "ready":
                return True
        return False

    def in_words(self, rank: int) -> str:
        """`rank 2 on node3 ended with signal KILL`."""
        facts = self.known[rank]
        if facts.get("signal"):
            how = f"was ended by signal {facts['signal']}"
        elif facts["exit_status"] is not None:
            how = f"ended with status {facts['exit_status']}"
        else:
            how = "has gone and nobody knows how it ended"
        return f"rank {rank} on {facts['host']} {how}" + (f" ({facts['error']})" if facts.get("error") else "")


class Group:
    """One launch."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._asked = threading.Event()
        self._calls = Calls(spec.ssh_config, self._asked)
        self._ranks = Ranks(spec)
        self._links: dict[str, Link] = {}
        self._ending = False
        self._failures: list[tuple[int, dict[str, Any]]] = []
        self._failed_at: float | None = None
        self._launcher_ended: tuple[float, str] | None = None
        self._refused: dict[str, int] = {}
        self._renewed = 0.0
        spec.folder.mkdir(parents=True, exist_ok=True)
        self._log = EventLog(spec.folder / "group.jsonl")

    def ask_to_end(self, number: int, frame: object) -> None:
        """Signal handler."""
        del number, frame
        self._asked.set()
        self._news.put(("", "asked", {}))

    def run(self) -> int:
        """The whole life of the launch; returns the exit status."""
        if (self._spec.folder / "hosts.json").exists():
            raise NodeError("generation", f"{self._spec.folder} was started before", "use a fresh generation")
        names = {str(rank): facts["host"] for rank, facts in self._ranks.known.items()}
        write_json(self._spec.folder / "hosts.json", names)
        reason = ""
        try:
            port = self._prepare()
            self._go(port)
            self._watch()
        except Failed as error:
            reason = str(error)
        except NodeError as error:
            reason = f"{error.detail}; {error.fix}" if error.fix else error.detail
        except OSError as error:
            # A full disk, mostly. Whatever it is: the other hosts must not go on without us.
            reason = f"{self._spec.hosts[0].name}: {error}"
        if self._asked.is_set():
            reason = reason or "it was told to end"
        left = self._end()
        return self._close(reason, left)

    # -- prepare and go --------------------------------------------------------------------------
    def _prepare(self) -> int:
        """All hosts are ready; returns the first of the launch's ports."""
        leader = self._spec.hosts[0]
        order = Path(leader.run_folder) / "spec.json"
        try:
            sha256 = hashlib.sha256(order.read_bytes()).hexdigest()
        except OSError as error:
            raise Failed(f"{order}: {error.strerror}") from error
        needed = launch_lines.ports_needed(self._spec)
        first = self._spec.first_port()
        questions = [(host, self._asking(host, sha256, first, needed + _SPARE_PORTS)) for host in self._spec.hosts]
        answers = self._calls.ask("rank-prepare", questions, _PREPARE_S, repeat_s=self._spec.init_deadline_s)
        self._refuse_errors("not ready", answers)
        busy: set[int] = set()
        for name, answer in answers.items():
            assert isinstance(answer, dict)
            busy.update(int(port) for port in answer["busy"])
            facts = {key: answer[key] for key in ("hostname", "boot_id", "versions", "ended", "busy")}
            self._note("prepared", host=name, **facts)
        for port in range(first, first + _SPARE_PORTS):
            if busy.isdisjoint(range(port, port + needed)):
                return port
        raise Failed(f"no {needed} ports in a row are free on all hosts from {first} on")

    def _asking(self, host: Host, sha256: str, first: int, ports: int) -> dict[str, Any]:
        return {
            "run_folder": host.run_folder,
            "generation": self._spec.generation,
            "launcher": self._spec.launcher,
            "leads": host.number == 0,
            "twin": self._spec.twin,
            "python": host.python,
            "program": list(self._spec.program),
            "env": {**self._spec.env, **host.env},
            "addresses": list(host.addresses),
            "spec_sha256": sha256,
            "first_port": first,
            "ports": ports,
        }

    def _refuse_errors(self, what: str, answers: dict[str, dict[str, Any] | NodeError]) -> None:
        """Failed, with every host that has an error or said nothing."""
        if self._asked.is_set():
            raise Failed("it was told to end")
        said = []
        for host in self._spec.hosts:
            answer = answers.get(host.name)
            if isinstance(answer, NodeError):
                self._note("host_failed", host=host.name, kind=answer.kind, detail=answer.detail, fix=answer.fix)
                detail = answer.detail if host.name in answer.detail else f"{host.name}: {answer.detail}"
                said.append(detail + (f" ({answer.fix})" if answer.fix else ""))
        if said:
            raise Failed(f"{what}: {'; '.join(said)}")

    def _go(self, port: int) -> None:
        questions = [(host, self._order(host, port)) for host in self._spec.hosts]
        # mlx.launch on the leading host finds the other hosts waiting; the others may all start at once.
        first = questions[1:] if self._spec.launcher == "mlx.launch" else questions
        answers = self._calls.ask("rank-go", first, _GO_S)
        if len(first) < len(questions) and all(isinstance(answer, dict) for answer in answers.values()):
            answers.update(self._calls.ask("rank-go", questions[:1], _GO_S))
        for host in self._spec.hosts:
            self._links[host.name] = (
                RemoteLink(self._spec, host, self._news) if host.ssh else LocalLink(self._spec, host, self._news)
            )
        self._refuse_errors("did not start", answers)
        self._note("started", launcher=self._spec.launcher, backend=self._spec.backend, port=port)
        for link in self._links.values():
            link.start()

    def _order(self, host: Host, port: int) -> dict[str, Any]:
        return {
            "root": self._spec.ranks_folder(host),
            "run": self._spec.run,
            "generation": self._spec.generation,
            "leads": host.number == 0,
            "lease_s": self._spec.lease_s,
            "launch": launch_lines.plan(self._spec, host, port),
        }

    # -- watch -----------------------------------------------------------------------------------
    def _watch(self) -> None:
        """Until every rank has ended well; Failed for everything else."""
        deadline = time.monotonic() + self._spec.init_deadline_s
        while not self._ranks.all_well():
            joined = len(self._ranks.ready) == len(self._ranks.known)
            hurried = not joined or self._failed_at is not None or self._launcher_ended is not None
            self._hear(_SWIFT_S if hurried else _CALM_S)
            if self._asked.is_set():
                raise Failed("it was told to end")
            self._renew()
            self._watch_silence()
            self._log.flush()
            if not joined:
                self._watch_start(deadline)
            self._decide()

    def _hear(self, timeout_s: float) -> None:
        """Take in all news, waiting for the first."""
        try:
            news = self._news.get(timeout=timeout_s)
            while True:
                self._take(*news)
                news = self._news.get_nowait()
        except queue.Empty:
            return

    def _take(self, name: str, kind: str, facts: dict[str, Any]) -> None:
        if kind == "event":
            self._refused.pop(name, None)
            self._take_event(name, facts)
        elif kind == "back":
            link = self._links[name]
            if link.silent:
                link.silent = False
                self._note("host_back", host=name)
        elif kind == "gone" and not self._ending:
            self._lose(name, f"{name}: {facts['detail']}")
        elif kind == "refused":
            self._refused[name] = self._refused.get(name, 0) + 1
            if self._refused[name] >= _REFUSALS and not self._ending:
                self._lose(name, f"{name}: {facts['detail']}")
        elif kind == "failed":
            raise Failed(str(facts["detail"]))

    def _take_event(self, name: str, facts: dict[str, Any]) -> None:
        event, rank = facts.get("event"), facts.get("rank")
        mine = isinstance(rank, int) and self._ranks.known.get(rank, {}).get("host") == name
        if event == "rank_exited" and mine:
            assert isinstance(rank, int)
            told = self._ranks.ended(rank, facts, by_group=self._ending)
            if told["exit_status"] == 0 or self._ending:
                self._note("rank_exited", rank=rank, host=name, **told)
            else:
                # Told when it is clear who died first.
                self._failures.append((rank, told))
                self._failed_at = self._failed_at or time.monotonic()
        elif event in ("rank_started", "rank_stopped", "rank_resumed") and mine:
            self._note(event, rank=rank, host=name, **({"process": facts["process"]} if "process" in facts else {}))
        elif event == "launcher_exited":
            status = facts.get("exit_status")
            self._launcher_ended = self._launcher_ended or (time.monotonic(), f"{name}: its launcher ended ({status})")

    def _lose(self, name: str, why: str) -> None:
        """A host's ranks can no longer be watched."""
        for host in self._spec.hosts:
            for rank in host.ranks if host.name == name else ():
                if rank not in self._ranks.over:
                    self._note(
                        "rank_exited", rank=rank, host=name, **self._ranks.ended(rank, {"lost": True}, by_group=False)
                    )
        self._note("host_lost", host=name, detail=why)
        raise Failed(why)

    def _renew(self) -> None:
        now = time.monotonic()
        if now - self._renewed >= min(5.0, self._spec.lease_s / 6):
            self._renewed = now
            for link in self._links.values():
                link.renew()

    def _watch_silence(self) -> None:
        now = time.monotonic()
        for name, link in self._links.items():
            silence = now - link.heard_at
            if silence <= SILENT_S:
                continue
            if not link.silent:
                link.silent = True
                self._note("host_silent", host=name, since_s=round(silence, 1))
                if isinstance(link, RemoteLink):
                    link.drop()
            if silence > self._spec.lease_s:
                self._lose(name, f"{name} has not answered for {silence:.0f} s")

    def _watch_start(self, deadline: float) -> None:
        for rank in self._ranks.look_for_ready():
            self._note("ready", rank=rank, host=self._ranks.known[rank]["host"])
        missing = sorted(set(self._ranks.known) - self._ranks.ready)
        if missing and time.monotonic() > deadline:
            names = ", ".join(f"rank {rank} on {self._ranks.known[rank]['host']}" for rank in missing)
            raise Failed(f"not ready within {self._spec.init_deadline_s:.0f} s: {names}")

    def _decide(self) -> None:
        now = time.monotonic()
        if self._failed_at is not None and now - self._failed_at >= _SETTLE_S:
            raise Failed(self._tell_failures())
        if self._launcher_ended is not None and now - self._launcher_ended[0] >= _LAUNCHER_S:
            raise Failed(f"{self._launcher_ended[1]} before the ranks were done")

    def _tell_failures(self) -> str:
        """Note the deaths, the likeliest cause first, and return that one in words.

        Who was killed died before those who then failed for want of a peer; who was asked to end was asked by a
        launcher that had seen another's death.
        """

        def order(death: tuple[int, dict[str, Any]]) -> tuple[int, float]:
            told = death[1]
            kind = 1 if not told["signal"] else 2 if told["signal"] in _ASKED else 0
            return kind, told.get("ended_at") or 0.0

        deaths = sorted(self._failures, key=order)
        self._failures.clear()
        for index, (rank, told) in enumerate(deaths):
            if index and told["signal"] in _ASKED and self._spec.launcher != "direct":
                told["ended_by"] = self._ranks.known[rank]["ended_by"] = self._spec.launcher
            self._note("rank_exited", rank=rank, host=self._ranks.known[rank]["host"], **told)
        if not deaths:
            return ""
        reason = self._ranks.in_words(deaths[0][0])
        if deaths[0][1]["signal"] in _ASKED and self._spec.launcher != "direct":
            # The launcher lost a connection, or somebody ended a rank by hand.
            reason += f", which {self._spec.launcher} may have sent"
            silent = [name for name, link in self._links.items() if link.silent]
            reason += f"; {', '.join(silent)} cannot be reached" if silent else ""
        return reason

    # -- end -------------------------------------------------------------------------------------
    def _end(self) -> list[str]:
        """Nothing remains on any host that answers; returns the names of those that do not."""
        self._ending = True
        self._tell_failures()
        grace_s = self._spec.grace_s
        hosts = [host for host in self._spec.hosts if host.name in self._links]
        questions = [(host, self._stopping(host)) for host in hosts]
        answers = self._calls.ask("rank-stop", questions, grace_s + _STOP_S)
        left, sizes = [], {}
        for host in hosts:
            answer = answers[host.name]
            if isinstance(answer, NodeError):
                self._note("not_ended", host=host.name, detail=answer.detail, lease_s=self._spec.lease_s)
                left.append(host.name)
                continue
            sizes[host.name] = {path: int(size) for path, size in answer["sizes"].items()}
            if answer["alive"]:
                self._note("not_ended", host=host.name, detail=f"processes {answer['alive']} do not end")
                left.append(host.name)
        self._catch_up(sizes)
        for link in self._links.values():
            link.close()
        self._hear(0.0)
        return left

    def _stopping(self, host: Host) -> dict[str, Any]:
        paths = self._links[host.name].paths
        return {"root": self._spec.ranks_folder(host), "grace_s": self._spec.grace_s, "files": paths}

    def _catch_up(self, sizes: dict[str, dict[str, int]]) -> None:
        """The last reports and log lines of the hosts that answered are here, too."""
        deadline = time.monotonic() + _CATCH_UP_S
        while time.monotonic() < deadline and not all(self._links[name].has(known) for name, known in sizes.items()):
            try:
                self._hear(_SWIFT_S / 4)
            except Failed as error:
                self._note("link_failed", detail=str(error))

    def _close(self, reason: str, left: list[str]) -> int:
        if self._asked.is_set():
            ended, status = "stopped", STOPPED_STATUS
        else:
            ended, status = ("done", 0) if not reason and self._ranks.all_well() else ("failed", 1)
        keys = ("host", "exit_status", "signal", "lost", "ended_by", "error")
        ranks = {
            str(rank): {key: facts[key] for key in keys if key in facts} for rank, facts in self._ranks.known.items()
        }
        self._note("ended", result=ended, reason=reason, left=left)
        self._log.close()
        sys.stdout.write(json.dumps({"ended": ended, "reason": reason, "ranks": ranks, "left": left}) + "\n")
        sys.stdout.flush()
        return status

    def _note(self, event: str, **facts: Any) -> None:
        """One line of group.jsonl."""
        self._log.add(event, **facts)
