"""Which private keys are offered to a machine: those of the node, of the ssh config, of ~/.ssh, and of an agent.

Nothing here asks a person for anything: a key with a passphrase counts only if an agent holds it.
"""

from __future__ import annotations

import base64
import binascii
import functools
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import asyncssh
import msgspec

from jupiter_engine.remote import failures
from jupiter_engine.remote.failures import Call

DEFAULT_FILES: Final = tuple(
    Path("~/.ssh") / name for name in ("id_ed25519_sk", "id_ecdsa_sk", "id_ed25519", "id_ecdsa", "id_rsa")
)
_ARMOUR = re.compile(rb"-----BEGIN ([A-Z0-9 ]*PRIVATE KEY)-----\s*(.*?)-----END \1-----", re.DOTALL)
_OPENSSH_MAGIC: Final = b"openssh-key-v1\0"


class Keys(msgspec.Struct, kw_only=True):
    """What to offer, and how to tell people about it."""

    usable: list[Any] = []
    """asyncssh keys, or (key, certificate)."""
    names: list[str] = []
    locked: list[str] = []
    """Files that need a passphrase."""
    agent: str | None = None
    """Socket of the agent; None: not asked."""
    only: list[bytes] = []
    """The only keys of the agent to offer; empty: all that it has."""


def choose(call: Call, *, identity: str | None, config: Any) -> Keys:
    """`config` is asyncssh's parsed ssh config of the machine. Raises NodeUnreachable (key) if the node's own
    `identity` cannot be used at all."""
    listed = [Path(text).expanduser() for text in config.get("IdentityFile", ())]
    only_listed = bool(config.get("IdentitiesOnly")) or identity is not None
    files = [Path(identity).expanduser()] if identity is not None else listed
    keys = Keys(agent=_agent(config.get("IdentityAgent")))
    public: list[bytes] = []
    for file in files or [path.expanduser() for path in DEFAULT_FILES]:
        blob = _add(file, keys, call, required=identity is not None)
        if blob is not None:
            public.append(blob)
    if only_listed:
        keys.only = public
        if not public or (identity is not None and keys.usable):
            # asyncssh takes an empty list of allowed keys for "all".
            keys.agent = None
    if identity is not None and not keys.usable and keys.agent is None:
        call.locked = tuple(keys.locked)
        raise failures.locked_key(call)
    return keys


def _agent(named: str | None) -> str | None:
    """Socket of the agent, as IdentityAgent of the ssh config names it; None: there is none."""
    if named is None or named == "SSH_AUTH_SOCK":
        named = "$SSH_AUTH_SOCK"
    if named.startswith("$"):
        named = os.environ.get(named[1:].strip("{}"), "")
    return None if named in ("", "none") else str(Path(named).expanduser())


def _add(file: Path, keys: Keys, call: Call, *, required: bool) -> bytes | None:
    """Take a key file in; returns its public half if that can be known."""
    try:
        status = file.stat()
        data = file.read_bytes()
    except OSError as error:
        # Config files list keys that only some machines have; ssh passes over them too.
        if required:
            text = f"the key {file} cannot be read: {error.strerror}"
            raise failures.failed(call, "key", text, fix="correct `identity` of the node") from error
        return None
    found = _ARMOUR.search(data)
    if found is None:
        return _public_only(file, data, call, required=required)
    if _is_locked(found[1], found[2]):
        keys.locked.append(str(file))
        return _public_beside(file) or _public_inside(found[1], found[2])
    try:
        key, certificates = _load(file, status.st_mtime_ns, status.st_size)
    except (ValueError, asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
        if required:
            raise failures.translate(error, call) from error
        return None
    keys.usable += [*((key, certificate) for certificate in certificates), key]
    keys.names.append(str(file))
    return bytes(key.public_data)


@functools.lru_cache(maxsize=64)
def _load(file: Path, changed_ns: int, size_bytes: int) -> tuple[asyncssh.SSHKey, Sequence[Any]]:  # noqa: ARG001
    """A fleet is called with one key: checking an RSA key anew for each machine would take longer than the call."""
    key = asyncssh.read_private_key(file)
    certificate = file.with_name(f"{file.name}-cert.pub")
    return key, asyncssh.load_certificates(str(certificate)) if certificate.is_file() else ()


def _public_only(file: Path, data: bytes, call: Call, *, required: bool) -> bytes | None:
    """A .pub file names a key that an agent holds."""
    try:
        return bytes(asyncssh.import_public_key(data).public_data)
    except (ValueError, asyncssh.KeyImportError) as error:
        if required:
            text = f"{file} holds no private key"
            raise failures.failed(call, "key", text, fix="correct `identity` of the node") from error
        return None


def _is_locked(kind: bytes, body: bytes) -> bool:
    if kind == b"OPENSSH PRIVATE KEY":
        return _openssh_parts(body)[:1] != [b"none"]
    return kind.startswith(b"ENCRYPTED") or b"ENCRYPTED" in body.split(b"\n\n", 1)[0]


def _openssh_parts(body: bytes) -> list[bytes]:
    """Cipher, key derivation, its options, and the public key: the part of an OpenSSH key that is never encrypted."""
    try:
        data = base64.b64decode(body, validate=False)
        if not data.startswith(_OPENSSH_MAGIC):
            return []
        at, parts = len(_OPENSSH_MAGIC), []
        for index in range(4):
            if index == 3:
                at += 4  # the number of keys in the file
            (size,) = struct.unpack_from(">I", data, at)
            parts.append(data[at + 4 : at + 4 + size])
            at += 4 + size
    except (binascii.Error, struct.error):
        return []
    return parts


def _public_inside(kind: bytes, body: bytes) -> bytes | None:
    parts = _openssh_parts(body) if kind == b"OPENSSH PRIVATE KEY" else []
    return parts[3] if len(parts) == 4 else None


def _public_beside(file: Path) -> bytes | None:
    try:
        return bytes(asyncssh.read_public_key(file.with_name(file.name + ".pub")).public_data)
    except (OSError, ValueError, asyncssh.KeyImportError):
        return None


async def describe(keys: Keys, call: Call) -> None:
    """Note in `call` what was offered, for the sentence about a machine that let nobody in."""
    names = list(keys.names)
    locked = list(keys.locked)
    if keys.agent is not None:
        try:
            agent = await asyncssh.connect_agent(keys.agent)
        except OSError:
            names.append(f"(no agent answers at {keys.agent})")
        else:
            try:
                held = await agent.get_keys(keys.only or None)
                names += [f"{key.get_comment() or key.get_algorithm()} (agent)" for key in held]
            except (OSError, ValueError):
                names.append("(the agent refused to list its keys)")
            finally:
                agent.close()
                await agent.wait_closed()
    call.keys, call.locked = tuple(names), tuple(locked)
