"""What `group` hears from each host while the ranks work: one thread a host, everything else through one queue."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from .errors import NodeError
from .group_spec import Host, Spec, layout
from .host_calls import line
from .keep_folder import KeepFolder
from .mirror import Mirror
from .ranks import AGENT

BEAT_S = 1.0
SILENT_S = 7.0
"""So long without a beat, and a host counts as silent."""
_POLL_S = 0.2
_RETRY_S = 1.0
_RUNNER_EVERY_S = 1.0
_GONE_S = 1.5
_FULL_S = 5.0
_FULL = "its disk is full"
_NOISE_LINES = 50
"""Lines of a talkative login shell that may come before the first frame."""

_EVENTS = "node/ranks.jsonl"

News = tuple[str, str, dict[str, Any]]
"""(host, kind, facts): kind is `event` (a line of ranks.jsonl), `back`, `gone` or `failed`."""


def _problem_in(state: dict[str, Any]) -> str:
    """Why a host can no longer be relied upon; empty if it can."""
    agent = (state.get("processes") or {}).get(AGENT) or {}
    if agent.get("state") in ("exited", "lost"):
        # In this order: without anything to keep the node runner goes, too.
        return "what watches its ranks has gone"
    if not (state.get("runner") or {}).get("alive"):
        return "its node runner has gone"
    # Nothing can be written down any more, not even a death.
    return _FULL if state.get("disk_full") else ""


class Events:
    """New lines of a host's ranks.jsonl."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.offset = 0
        """Bytes read."""

    def read(self) -> list[dict[str, Any]]:
        """Whole lines since the last time."""
        try:
            with self._path.open("rb") as file:
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        found = (json.loads(text) for text in whole.splitlines())
        return [event for event in found if isinstance(event, dict)]


class Link:
    """One host: what it says goes into `news`, and it is told that somebody still leads."""

    def __init__(self, spec: Spec, host: Host, news: queue.SimpleQueue[News]) -> None:
        self.host = host
        self._spec, self._news = spec, news
        self._closing = threading.Event()
        self.heard_at = time.monotonic()
        """When the host last gave a sign of life (monotonic clock)."""
        self.silent = False
        """Set by the group when it has said so."""
        self.ended = False
        """Nothing of the launch lives there any more."""
        self._gone_since: float | None = None
        self._thread = threading.Thread(target=self._guarded, name=f"link {host.name}", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def renew(self) -> None:
        """Tell the host that it is still led."""
        raise NotImplementedError

    @property
    def paths(self) -> list[str]:
        """Files of the launch's folder there that are read."""
        raise NotImplementedError

    def has(self, sizes: dict[str, int]) -> bool:
        """Whether everything up to these sizes has been read: path -> bytes."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop listening."""
        self._closing.set()
        self._hang_up()
        self._thread.join(5.0)

    def _hang_up(self) -> None:
        """Make the thread's wait end."""

    def _run(self) -> None:
        raise NotImplementedError

    def _guarded(self) -> None:
        try:
            self._run()
        except OSError as error:
            # What is written is written on the leading host, whoever sent it.
            self._say("failed", {"detail": f"{self._spec.hosts[0].name}: {error}"})
        except Exception as error:  # noqa: BLE001 - a thread that dies unheard would leave the group waiting for ever
            self._say("failed", {"detail": f"{self.host.name}: {type(error).__name__}: {error}"})

    def _say(self, kind: str, facts: dict[str, Any]) -> None:
        self._news.put((self.host.name, kind, facts))

    def _tell(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            self._say("event", event)
            self.ended = self.ended or event.get("event") == "ended"

    def _beat(self, state: dict[str, Any]) -> None:
        """A sign of life, with what the host's node runner knows (verb state)."""
        self.heard_at = time.monotonic()
        if self.silent:
            self._say("back", {})
        problem = "" if self.ended else _problem_in(state)
        if not problem:
            self._gone_since = None
        elif self._gone_since is None:
            # Its last event may be on the way; room may be made.
            self._gone_since = time.monotonic()
        elif time.monotonic() - self._gone_since > (_FULL_S if problem == _FULL else _GONE_S):
            self._say("gone", {"detail": problem})


class LocalLink(Link):
    """The leading host itself: its files are already where they are wanted."""

    def __init__(self, spec: Spec, host: Host, news: queue.SimpleQueue[News]) -> None:
        super().__init__(spec, host, news)
        self._events = Events(layout(spec.folder).events)

    def renew(self) -> None:
        """See Link."""
        # Removed only by hand, and then the node runner ends the launch, which is what was wanted.
        with contextlib.suppress(FileNotFoundError):
            layout(self._spec.folder).lease.touch()

    @property
    def paths(self) -> list[str]:
        """See Link."""
        return [_EVENTS]

    def has(self, sizes: dict[str, int]) -> bool:
        """See Link."""
        return self._events.offset >= sizes[_EVENTS]

    def _run(self) -> None:
        places = layout(self._spec.folder)
        events, looked = self._events, 0.0
        keep = KeepFolder(places.keep)
        while not self._closing.wait(_POLL_S):
            ended = self.ended
            self._tell(events.read())
            self.heard_at = time.monotonic()
            if ended or time.monotonic() - looked > _RUNNER_EVERY_S:
                looked = time.monotonic()
                # In this order: an agent that ends in between has written its last event before.
                state = keep.state()
                self._tell(events.read())
                self._beat(state)


class RemoteLink(Link):
    """A host behind ssh, followed through connections that may break; what it wrote meanwhile is caught up."""

    def __init__(self, spec: Spec, host: Host, news: queue.SimpleQueue[News]) -> None:
        super().__init__(spec, host, news)
        here = spec.folder
        targets = {
            f"rank-{rank}.{kind}": here / f"rank-{rank}.{kind}" for rank in host.ranks for kind in ("jsonl", "log")
        }
        own = here / "hosts" / host.name
        for name in ("ranks.jsonl", "events.jsonl", "launcher.log"):
            targets[f"node/{name}"] = own / name
        self._mirror = Mirror(targets)
        self._events = Events(own / "ranks.jsonl")
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def renew(self) -> None:
        """See Link."""
        with self._lock:
            if self._process is None or self._process.stdin is None:
                return
            try:
                self._process.stdin.write(b"{}\n")
                self._process.stdin.flush()
            except (BrokenPipeError, ValueError):
                pass  # the connection has ended; its thread sees that and makes another

    @property
    def paths(self) -> list[str]:
        """See Link."""
        return self._mirror.paths

    def has(self, sizes: dict[str, int]) -> bool:
        """See Link."""
        return self._mirror.holds(sizes)

    def drop(self) -> None:
        """End a connection that has gone silent, so that another one is tried."""
        with self._lock:
            if self._process is not None:
                self._process.kill()

    def _hang_up(self) -> None:
        with self._lock:
            if self._process is None or self._process.stdin is None:
                return
            with contextlib.suppress(BrokenPipeError):
                # The end of its input ends `follow` in good order.
                self._process.stdin.close()
        self._thread.join(2.0)
        self.drop()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._connection()
            except NodeError as error:
                # Said by the host itself (its folder is gone, it was restarted with another disk) or garbled.
                self._say("refused", {"kind": error.kind, "detail": error.detail})
            self._closing.wait(_RETRY_S)

    def _connection(self) -> None:
        """Follow the host over one connection, to its end."""
        root = self._spec.ranks_folder(self.host)
        self._mirror.started = False
        request = {
            "root": root,
            "patterns": self._mirror.paths,
            "have": self._mirror.have(),
            "beat_s": BEAT_S,
            "poll_s": _POLL_S,
            "lease": str(layout(root).lease),
            "keep": str(layout(root).keep),
        }
        argv = line(self.host, self._spec.ssh_config, "follow")
        errors = self._spec.folder / "hosts" / self.host.name / "ssh.log"
        with errors.open("ab") as log:
            process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        with self._lock:
            self._process = process
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request).encode("utf-8") + b"\n")
                process.stdin.flush()
            self._listen(process)
        finally:
            with self._lock:
                self._process = None
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    assert stream is not None
                    stream.close()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        stream = process.stdout
        assert stream is not None
        noise = 0
        while True:
            try:
                frame = self._mirror.take(stream)
            except NodeError as error:
                # Lines that a login shell writes come before everything else.
                noise += 1
                if error.kind != "protocol" or noise > _NOISE_LINES or self._mirror.started:
                    raise
                continue
            if frame is None:
                return
            self._tell(self._events.read())
            if frame["f"] == "beat":
                self._beat(frame.get("state") or {})
            else:
                self.heard_at = time.monotonic()
