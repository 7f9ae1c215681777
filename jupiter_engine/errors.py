"""The error tree: every failure a person can meet has a title, a detail and a next step.

JupiterError
 +- UsageError            wrong command-line use                          exit 2
 +- ConfigError           a settings file is wrong (file, line, key, fix) exit 2
 +- NoUsableNode          no machine can do what the plan asks            exit 3
 +- NotEnoughData         too little data to train on or to decide        exit 4
 +- StageFailed           a stage of the cycle could not be completed     exit 1
 |   +- DiskFull          the disk has no room for what comes next
 |   +- ModelInvalid      a model folder is damaged or does not fit together
 |   +- CorpusEmpty       a domain's sources gave no usable document (exit 4)
 |   +- Diverged          a loss or gradient stopped being a finite number
 +- StateError            the workspace's own files contradict each other
 |   +- SchemaTooNew      written by a later Jupiter
 +- RemoteError           a process or a connection failed, with all facts
 |   +- NodeUnreachable    a machine cannot be called, or not be used once called
 |       +- HostKeyRefused its ssh key is unknown, revoked, or another one than before
 +- Interrupted           stopped by the user or a signal                 exit 130
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's exit status means; documented in docs/commands.md."""

    DONE = 0
    STAGE_FAILED = 1
    USAGE = 2
    NO_NODE = 3
    NOT_ENOUGH_DATA = 4
    INTERRUPTED = 130


class JupiterError(Exception):
    """Base of all expected failures: shown to people without a traceback.

    `title` names what happened in a few words, `detail` carries the facts,
    `fix` says what to do next. `kind` survives a process boundary: a worker's
    error arrives in the control wing as its kind, title, detail and fix.
    """

    title = "Jupiter could not go on"
    exit_code = ExitCode.STAGE_FAILED

    def __init__(self, detail: str, *, title: str | None = None, fix: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.fix = fix
        if title is not None:
            self.title = title

    @property
    def kind(self) -> str:
        return type(self).__name__

    def sentence(self) -> str:
        """One line for a terminal: title, detail and the fix where there is one."""
        return f"{self.title}: {self.detail}" + (f" -> {self.fix}" if self.fix else "")


class UsageError(JupiterError):
    title = "Wrong usage"
    exit_code = ExitCode.USAGE


class ConfigError(JupiterError):
    """A settings file that cannot be accepted; `problems` are complete sentences."""

    title = "Configuration not accepted"
    exit_code = ExitCode.USAGE

    def __init__(self, detail: str, *, title: str | None = None, fix: str = "", problems: tuple[str, ...] = ()) -> None:
        super().__init__(detail, title=title, fix=fix)
        self.problems = problems or (detail,)


class NoUsableNode(JupiterError):
    title = "No usable node"
    exit_code = ExitCode.NO_NODE


class NotEnoughData(JupiterError):
    title = "Not enough data to decide"
    exit_code = ExitCode.NOT_ENOUGH_DATA


class StageFailed(JupiterError):
    title = "A stage failed"


class DiskFull(StageFailed):
    title = "The disk is full"


class ModelInvalid(StageFailed):
    title = "The model folder cannot be used"


class CorpusEmpty(StageFailed):
    title = "The corpus is empty"
    exit_code = ExitCode.NOT_ENOUGH_DATA


class Diverged(StageFailed):
    title = "Training diverged"


class StateError(JupiterError):
    title = "The workspace's state is damaged"


class SchemaTooNew(StateError):
    title = "The workspace was written by a later Jupiter"


class RemoteError(JupiterError):
    """A process or connection that failed, with every fact known about it."""

    title = "A process failed"

    def __init__(
        self,
        detail: str,
        *,
        host: str,
        argv: tuple[str, ...] = (),
        exit_status: int | None = None,
        signal: int | None = None,
        output_tail: str = "",
        fix: str = "",
    ) -> None:
        super().__init__(detail, fix=fix)
        self.host = host
        self.argv = argv
        self.exit_status = exit_status
        self.signal = signal
        self.output_tail = output_tail


class NodeUnreachable(RemoteError):
    """A machine that cannot be called or used. `reason` names the way it failed for programs (remote/failures.py
    lists them), `through` the jump host that it was if not the machine itself."""

    title = "A machine cannot be used"

    def __init__(
        self,
        detail: str,
        *,
        host: str,
        reason: str,
        through: str = "",
        argv: tuple[str, ...] = (),
        output_tail: str = "",
        fix: str = "",
    ) -> None:
        super().__init__(detail, host=host, argv=argv, output_tail=output_tail, fix=fix)
        self.reason = reason
        self.through = through


class HostKeyRefused(NodeUnreachable):
    """`offered` is the key with which it presented itself (remote/host_keys.py: OfferedKey), so that a person can
    decide about exactly that one; None if it could not be learnt."""

    title = "A machine's ssh key is not accepted"

    def __init__(
        self, detail: str, *, host: str, reason: str, offered: object = None, through: str = "", fix: str = ""
    ) -> None:
        super().__init__(detail, host=host, reason=reason, through=through, fix=fix)
        self.offered = offered


class Interrupted(JupiterError):
    title = "Interrupted"
    exit_code = ExitCode.INTERRUPTED


def _tree(base: type[JupiterError]) -> dict[str, type[JupiterError]]:
    found: dict[str, type[JupiterError]] = {base.__name__: base}
    for child in base.__subclasses__():
        found.update(_tree(child))
    return found


def rebuild(kind: str, title: str, detail: str, fix: str) -> JupiterError:
    """The error that crossed a process boundary as its parts (unknown kinds: StageFailed)."""
    cls = _tree(JupiterError).get(kind, StageFailed)
    # RemoteError needs facts that did not travel; its sentence did.
    return (StageFailed if issubclass(cls, RemoteError) else cls)(detail, title=title, fix=fix)


def exit_code_of(kind: str) -> ExitCode:
    """The exit status for an error kind that crossed a process boundary (unknown kinds: STAGE_FAILED)."""
    cls = _tree(JupiterError).get(kind)
    return cls.exit_code if cls is not None else ExitCode.STAGE_FAILED
