"""Every way in which calling a machine fails, as one sentence with its facts and one that mends it.

`translate` turns what asyncssh and the operating system raise into NodeUnreachable; the constructors below
it are for what other rooms find out. A `reason` is one of:

    dns  refused  timeout  no_route  network                 the machine was not reached
    not_ssh  protocol                                        something else answered, or ssh could not agree
    auth  key  config                                        the user, the keys or the ssh settings
    host_key_unknown  host_key_changed  host_key_revoked     HostKeyRefused
    lost  sessions  shell                                    it was reached, and then
    no_python                                                it was called and cannot be used
"""

from __future__ import annotations

import errno
import platform
import re
import socket
from collections.abc import Sequence
from typing import Final

import msgspec

from jupiter_engine.errors import JupiterError, NodeUnreachable, RemoteError
from jupiter_engine.remote.addresses import TELLING
from jupiter_engine.units import plain_text

LASTING: Final = frozenset(
    {
        "auth",
        "key",
        "config",
        "host_key_unknown",
        "host_key_changed",
        "host_key_revoked",
        "not_ssh",
        "protocol",
        "shell",
        "no_python",
    }
)
"""Calling again does not mend these; a person has to."""


def _said(text: str) -> str:
    """Foreign text as part of a sentence: one line, no control characters, no novel."""
    return " ".join(plain_text(text).split())[:400]


def lasting(error: JupiterError) -> bool:
    return isinstance(error, NodeUnreachable) and error.reason in LASTING


class Call(msgspec.Struct, kw_only=True):
    """A call under way: what is known about it when it fails."""

    name: str
    """What people call the machine."""
    host: str
    port: int
    user: str
    through: tuple[str, ...] = ()
    """Jump hosts on the way to it, the first one first."""
    jump: bool = False
    """It is a jump host itself."""
    phase: str = "connecting"
    """connecting, ssh (the connection stands, ssh is being spoken)."""
    keys: tuple[str, ...] = ()
    """Keys that were offered, as people know them."""
    locked: tuple[str, ...] = ()
    """Key files that need a passphrase and that no agent holds."""
    timeout_s: float = 0.0

    def where(self) -> str:
        return f"{self.host}:{self.port}" if ":" not in self.host else f"[{self.host}]:{self.port}"


def failed(call: Call, reason: str, detail: str, *, fix: str = "") -> NodeUnreachable:
    who = f"jump host {call.name}" if call.jump else call.name
    return NodeUnreachable(
        f"{who}: {detail}", host=call.host, reason=reason, through=call.name if call.jump else "", fix=fix
    )


def translate(error: BaseException, call: Call) -> RemoteError:
    """What went wrong while calling, in Jupiter's words. RemoteErrors stay as they are."""
    # The library is loaded by whoever calls machines; the command line's help must not need it.
    import asyncssh

    if isinstance(error, RemoteError):
        return error
    if isinstance(error, TimeoutError) and not getattr(error, "errno", None):
        return _timeout(call)
    if isinstance(error, asyncssh.PermissionDenied):
        return _auth(call)
    if isinstance(error, asyncssh.ChannelOpenError):
        return _not_forwarded(error, call)
    if isinstance(error, asyncssh.DisconnectError):
        return _disconnected(error, call)
    if isinstance(error, asyncssh.ConfigParseError):
        text = f"the ssh settings cannot be read: {_said(str(error))}"
        return failed(call, "config", text, fix="correct ~/.ssh/config; `ssh -G HOST` shows what ssh makes of it")
    if isinstance(error, asyncssh.KeyImportError | asyncssh.KeyEncryptionError):
        return _key(error, call)
    if isinstance(error, OSError):
        return _network(error, call)
    if isinstance(error, ValueError) and call.phase == "ssh":
        return not_ssh(call, str(error))
    if isinstance(error, ValueError):
        return failed(call, "config", f"ssh settings not accepted: {_said(str(error))}", fix="correct ~/.ssh/config")
    return failed(call, "network", f"the call failed: {type(error).__name__}: {_said(str(error))}")


# -- not reached ---------------------------------------------------------------------------------------
def _timeout(call: Call) -> NodeUnreachable:
    if call.phase == "ssh":
        text = f"{call.where()} accepts connections but did not complete ssh's greeting in {call.timeout_s:g} s"
        fix = "look whether it is overloaded, or whether something other than sshd listens on that port"
    else:
        text = f"{call.where()} did not answer in {call.timeout_s:g} s"
        fix = "look whether it is switched on, awake and on this network, and whether a firewall drops the port"
    return failed(call, "timeout", text, fix=fix)


def _network(error: OSError, call: Call) -> NodeUnreachable:
    if isinstance(error, socket.gaierror):
        fix = "check the spelling; a Mac's name ends in .local; an address always works"
        return failed(call, "dns", f"nobody knows the name {call.host} ({error.strerror})", fix=fix)
    number = _errno(error)
    if number == errno.ECONNREFUSED:
        fix = "start its ssh server: Remote Login in a Mac's Sharing settings, `sudo systemctl start ssh` on Linux"
        return failed(call, "refused", f"{call.where()} refuses connections: nothing listens there", fix=fix)
    if number in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN):
        fix = "check cable, Wi-Fi and address; `ping` shows whether it answers at all"
        if platform.system() == "Darwin" and number == errno.EHOSTUNREACH:
            fix = (
                "allow this terminal under System Settings > Privacy & Security > Local Network (macOS blocks "
                "programs that may not look at the local network in just this way), then check cable and address"
            )
        return failed(call, "no_route", f"there is no way to {call.where()} ({error.strerror or error})", fix=fix)
    if number == errno.ETIMEDOUT:
        return _timeout(call)
    if isinstance(error, ConnectionError) and call.phase == "ssh":
        return _hung_up(call, str(error))
    return failed(call, "network", f"{call.where()} cannot be reached: {_said(str(error))}")


def _errno(error: OSError) -> int | None:
    """Of several addresses that all failed, the failure that says most."""
    if error.errno is not None:
        return error.errno
    found = {int(number) for number in re.findall(r"\[Errno (\d+)\]", str(error))}
    return next((number for number in TELLING if number in found), None)


def _not_forwarded(error: Exception, call: Call) -> NodeUnreachable:
    """A jump host was reached and would not go on."""
    jump = call.through[-1] if call.through else "the jump host"
    text = f"jump host {jump} cannot reach {call.where()}: {_said(str(error))}"
    fix = f"try it there: `ssh {jump} nc -vz {call.host} {call.port}`; its sshd needs AllowTcpForwarding yes"
    return NodeUnreachable(f"{call.name}: {text}", host=call.host, reason="no_route", through=jump, fix=fix)


# -- reached, but not let in ---------------------------------------------------------------------------
def _auth(call: Call) -> NodeUnreachable:
    if call.locked and not call.keys:
        return locked_key(call)
    offered = ", ".join(call.keys) if call.keys else "no key at all (none in ~/.ssh, none in an agent)"
    text = f"{call.where()} does not let user {call.user} in; offered were {offered}"
    if call.locked:
        text += f"; not usable without its passphrase: {', '.join(call.locked)}"
    fix = f"`ssh-copy-id -p {call.port} {call.user}@{call.host}` puts your key there; or set another ssh_user"
    return failed(call, "auth", text, fix=fix)


def locked_key(call: Call) -> NodeUnreachable:
    files = ", ".join(call.locked)
    fix = f"`ssh-add {call.locked[0]}` asks for it once; Jupiter never does"
    return failed(call, "key", f"the key {files} is protected by a passphrase and no ssh agent holds it", fix=fix)


def _key(error: Exception, call: Call) -> NodeUnreachable:
    text = f"the private key cannot be read: {_said(str(error))}"
    return failed(call, "key", text, fix="name the private key's file, not the .pub, in `identity` or IdentityFile")


def _disconnected(error: Exception, call: Call) -> NodeUnreachable:
    import asyncssh

    text = _said(str(error))
    if "Too many authentication failures" in text:
        text = f"{call.where()} gave up on user {call.user} after too many keys that it does not know"
        return failed(call, "auth", text, fix="name the right one as `identity` of the node")
    if isinstance(error, asyncssh.ConnectionLost):
        return _hung_up(call, text)
    if isinstance(error, asyncssh.KeyExchangeFailed):
        fix = "its ssh server is very old or restricted to algorithms that this machine does not have; update it"
        return failed(call, "protocol", f"{call.where()} and this machine share no ssh algorithms: {text}", fix=fix)
    if isinstance(error, asyncssh.ProtocolNotSupported | asyncssh.ProtocolError):
        return not_ssh(call, text)
    return failed(call, "network", f"{call.where()} ended the call: {text}")


def _hung_up(call: Call, text: str) -> NodeUnreachable:
    fix = "it may limit new connections (MaxStartups), ban addresses after failures, or not be an ssh server"
    return failed(call, "lost", f"{call.where()} hung up before ssh was set up: {_said(text)}", fix=fix)


def not_ssh(call: Call, text: str) -> NodeUnreachable:
    fix = "check host and ssh_port: another service answers there"
    return failed(call, "not_ssh", f"what answers at {call.where()} is no ssh server: {_said(text)}", fix=fix)


# -- once connected ------------------------------------------------------------------------------------
def lost(name: str, host: str, why: str, argv: Sequence[str] = ()) -> NodeUnreachable:
    """The connection ended under a command or a stream."""
    text = f"{name}: the connection was lost: {_said(why) or 'it was closed'}"
    fix = "what runs there goes on; Jupiter calls again by itself"
    return NodeUnreachable(text, host=host, reason="lost", argv=tuple(argv), fix=fix)


def sessions(name: str, host: str, argv: Sequence[str] = (), *, waited_s: float | None = None) -> NodeUnreachable:
    """sshd opens no further session on this connection, or (`waited_s`) all that we may open stayed in use."""
    if waited_s is None:
        text = f"{name}: its ssh server opens no further session on this connection"
    else:
        text = f"{name}: all sessions of this connection were in use for {waited_s:g} s"
    fix = "raise MaxSessions in its sshd_config (10 is the usual value), or wait for what runs there"
    return NodeUnreachable(text, host=host, reason="sessions", argv=tuple(argv), fix=fix)


def shell(name: str, host: str, argv: Sequence[str], said: bytes) -> NodeUnreachable:
    """The login shell ended, or kept talking, without running the command."""
    tail = _said(said[-2000:].decode("utf-8", "replace"))
    text = f"{name}: its login shell did not run the command" + (f" but said: {tail}" if tail else "")
    fix = f"`ssh {host} true` has to work; look at the account's shell and at what its start-up files do"
    return NodeUnreachable(text, host=host, reason="shell", argv=tuple(argv), output_tail=tail, fix=fix)


def no_python(name: str, host: str, *, tried: Sequence[str], needed: str) -> NodeUnreachable:
    """`needed` such as "3.9 or later"; `tried`: of each place that was looked at, what was wrong with it."""
    text = f"{name} has no Python {needed}: {'; '.join(_said(one) for one in tried)}"
    fix = "install Python 3.11 or later there, or name it: `python: /path/to/python3` in the cluster file"
    return NodeUnreachable(text, host=host, reason="no_python", fix=fix)
