"""Every failure has its sentence, its reason and its fix."""

from __future__ import annotations

import errno
import socket

import asyncssh
import pytest

from jupiter_engine import errors
from jupiter_engine.errors import HostKeyRefused, NodeUnreachable, RemoteError, StageFailed
from jupiter_engine.remote import failures
from jupiter_engine.remote.failures import Call, translate


def call(**more: object) -> Call:
    fields = {"name": "mini", "host": "10.0.0.7", "port": 22, "user": "ada", "timeout_s": 10.0}
    return Call(**{**fields, **more})  # type: ignore[arg-type]


def os_error(number: int) -> OSError:
    return OSError(number, "system text")


SEVERAL = OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 1), [Errno 113] No route")


@pytest.mark.parametrize(
    ("error", "phase", "reason"),
    [
        (TimeoutError(), "connecting", "timeout"),
        (TimeoutError(), "ssh", "timeout"),
        (os_error(errno.ETIMEDOUT), "connecting", "timeout"),
        (socket.gaierror(-2, "Name or service not known"), "connecting", "dns"),
        (os_error(errno.ECONNREFUSED), "connecting", "refused"),
        (SEVERAL, "connecting", "refused"),
        (os_error(errno.EHOSTUNREACH), "connecting", "no_route"),
        (os_error(errno.ENETUNREACH), "connecting", "no_route"),
        (os_error(errno.EADDRNOTAVAIL), "connecting", "network"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "ssh", "lost"),
        (asyncssh.PermissionDenied("no"), "ssh", "auth"),
        (asyncssh.DisconnectError(2, "Too many authentication failures"), "ssh", "auth"),
        (asyncssh.ConnectionLost("Connection lost"), "ssh", "lost"),
        (asyncssh.KeyExchangeFailed("No match for kex"), "ssh", "protocol"),
        (asyncssh.ProtocolNotSupported("Unsupported SSH version"), "ssh", "not_ssh"),
        (asyncssh.ProtocolError("bad packet"), "ssh", "not_ssh"),
        (ValueError("bad packet"), "ssh", "not_ssh"),
        (asyncssh.ChannelOpenError(2, "Connection refused"), "connecting", "no_route"),
        (asyncssh.ConfigParseError("line 3"), "connecting", "config"),
        (asyncssh.KeyImportError("Invalid private key"), "connecting", "key"),
        (ValueError("not a port"), "connecting", "config"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_error_becomes_one_sentence(error: Exception, phase: str, reason: str) -> None:
    told = translate(error, call(phase=phase))
    assert isinstance(told, NodeUnreachable)
    assert told.reason == reason
    assert told.detail.startswith("mini: ")
    assert told.host == "10.0.0.7"
    assert told.fix or reason == "network"
    assert failures.lasting(told) == (reason in failures.LASTING)
    jump = translate(error, call(phase=phase, jump=True))
    assert isinstance(jump, NodeUnreachable)
    if reason != "no_route" or isinstance(error, OSError):
        assert jump.detail.startswith("jump host mini: ")
        assert jump.through == "mini"


def test_a_mac_that_may_not_see_the_network_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert "Local Network" in translate(os_error(errno.EHOSTUNREACH), call()).fix
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert "Local Network" not in translate(os_error(errno.EHOSTUNREACH), call()).fix


def test_what_machines_say_drives_no_terminal() -> None:
    nasty = "\x1b[2J\x1b]0;owned\x07two\nlines" + "x" * 5000
    for error in (asyncssh.DisconnectError(2, nasty), asyncssh.ProtocolError(nasty), os_error(errno.EADDRNOTAVAIL)):
        sentence = translate(error, call(phase="ssh")).sentence()
        assert "\x1b" not in sentence
        assert "\n" not in sentence
        assert len(sentence) < 1000
    told = failures.shell("mini", "10.0.0.7", ("true",), nasty.encode())
    assert "\x1b" not in told.sentence()


def test_addresses_are_written_as_people_write_them() -> None:
    assert "[fe80::1]:22" in translate(os_error(errno.ECONNREFUSED), call(host="fe80::1")).detail


def test_failures_that_other_rooms_find() -> None:
    told = failures.no_python("mini", "10.0.0.7", tried=("python3.13", "/usr/bin/python3"), needed="3.9 or later")
    assert (told.reason, "/usr/bin/python3" in told.detail, "3.9 or later" in told.detail) == ("no_python", True, True)
    assert failures.lasting(told)


def test_an_error_of_jupiter_stays_what_it_is() -> None:
    error = RemoteError("as it was", host="h")
    assert translate(error, call()) is error
    assert not failures.lasting(error)


@pytest.mark.parametrize("kind", ["RemoteError", "NodeUnreachable", "HostKeyRefused"])
def test_remote_errors_cross_a_process_boundary_as_their_sentence(kind: str) -> None:
    rebuilt = errors.rebuild(kind, "title", "detail", "fix")
    assert isinstance(rebuilt, StageFailed)
    assert rebuilt.sentence() == "title: detail -> fix"


def test_the_tree_in_the_docstring_has_them() -> None:
    assert errors.__doc__ is not None
    for cls in (NodeUnreachable, HostKeyRefused):
        assert cls.__name__ in errors.__doc__
