"""How other machines are reached from this one: time to connect, bytes a second, and from a detached process."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from typing import IO, Any

TRIES = 5
CONNECT_TIMEOUT_S = 1.0
ECHO_SECONDS = 2.0
ECHO_LIMIT_BYTES = 256 << 20
ECHO_WAIT_S = 10.0
"""An --echo-serve that nobody calls ends by itself after so long."""
CHUNK_BYTES = 1 << 20
ORPHAN_DEADLINE_S = 8.0


def address_of(target: str) -> tuple[str, int]:
    """("10.0.0.1", 22) of "10.0.0.1:22"; brackets around an IPv6 address."""
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{target!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def connect_time(target: str, tries: int = TRIES) -> dict[str, Any]:
    """{"rtt_s": best time of a TCP connection, "tries", "answered", "refused", "error"}.

    A refusal is an answer of the machine, too: its time counts and `refused` says so.
    """
    best: float | None = None
    answered, refused, error_text, code = 0, False, "", 0
    host, port = address_of(target)
    for _ in range(tries):
        before = time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S):
                took = time.monotonic() - before
        except ConnectionRefusedError:
            took, refused = time.monotonic() - before, True
        except OSError as error:
            error_text, code = str(error) or type(error).__name__, error.errno or 0
            # No route and no name do not change within a second; a lost packet may.
            if isinstance(error, socket.gaierror) or code in (errno.EHOSTUNREACH, errno.ENETUNREACH):
                break
            continue
        answered += 1
        best = took if best is None else min(best, took)
    return {
        "rtt_s": best,
        "tries": tries,
        "answered": answered,
        "refused": refused,
        "error": "" if answered else error_text,
        "errno": 0 if answered else code,
    }


def reach(targets: Sequence[str]) -> dict[str, Any]:
    """Time to connect to each target, all at once."""
    answers: dict[str, Any] = {}

    def work(target: str) -> None:
        try:
            answers[target] = connect_time(target)
        except ValueError as error:
            answers[target] = {"rtt_s": None, "tries": 0, "answered": 0, "refused": False, "error": str(error)}

    threads = [threading.Thread(target=work, args=(target,), daemon=True) for target in targets[:256]]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + TRIES * CONNECT_TIMEOUT_S + 1.0
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    silent = {"rtt_s": None, "tries": TRIES, "answered": 0, "refused": False, "error": "no answer in time", "errno": 0}
    return {"at": time.time(), "reach": {target: answers.get(target, silent) for target in targets[:256]}}


def reach_detached(targets: Sequence[str]) -> dict[str, Any]:
    """The same from a process that has left the session: what a run sees once its ssh connection has gone.

    macOS decides per responsible process who may talk to the local network. A command that ssh runs may;
    a process that nobody owns may not always.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _orphan(targets, reader, writer)
    os.close(writer)
    os.waitpid(child, 0)
    data, deadline = b"", time.monotonic() + ORPHAN_DEADLINE_S
    while time.monotonic() < deadline:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        part = os.read(reader, 65536) if ready else b""
        if not part:
            break
        data += part
    os.close(reader)
    if not data:
        return {"at": time.time(), "reach": {}, "error": "the detached process did not answer"}
    answer: dict[str, Any] = json.loads(data)
    answer["detached"] = True
    return answer


def _orphan(targets: Sequence[str], reader: int, writer: int) -> None:
    """Leave the session, let init adopt us, connect, and end; never returns."""
    status = 1
    try:
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        os.close(reader)
        parent = os.getppid()
        while os.getppid() == parent and parent != 1:
            time.sleep(0.01)
        os.write(writer, json.dumps(reach(targets)).encode())
        status = 0
    finally:
        os._exit(status)


def echo_serve(bind: str, out: IO[str], limit_bytes: int = ECHO_LIMIT_BYTES) -> dict[str, Any]:
    """Print {"port", "token"}, take one peer's bytes, send as many back; ends after one peer or ECHO_WAIT_S."""
    token = os.urandom(16).hex()
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.bind((bind, 0))
        server.listen(4)
        out.write(json.dumps({"port": server.getsockname()[1], "token": token}) + "\n")
        out.flush()
        deadline = time.monotonic() + ECHO_WAIT_S
        while time.monotonic() < deadline:
            server.settimeout(max(0.05, deadline - time.monotonic()))
            try:
                peer, _ = server.accept()
            except OSError:
                # Nobody came in time (Python 3.9 has no TimeoutError for it).
                break
            with peer:
                peer.settimeout(ECHO_SECONDS + 3.0)
                # Somebody else's connection to this port is closed, and the peer still waited for.
                if _exactly(peer, len(token)) != token.encode():
                    continue
                try:
                    return _serve_peer(peer, limit_bytes)
                except OSError as error:
                    return {"error": f"the peer was lost: {error}"}
    return {"error": f"nobody connected within {ECHO_WAIT_S:.0f} s"}


def _serve_peer(peer: socket.socket, limit_bytes: int) -> dict[str, Any]:
    received, seconds = _drain(peer)
    peer.sendall(json.dumps({"received_bytes": received, "seconds": seconds}).encode() + b"\n")
    sent = _flood(peer, limit_bytes)
    peer.shutdown(socket.SHUT_WR)
    return {"received_bytes": received, "receive_s": seconds, "sent_bytes": sent}


def echo_to(target: str, token: str, limit_bytes: int = ECHO_LIMIT_BYTES) -> dict[str, Any]:
    """{"to_bytes_per_s", "from_bytes_per_s", "sent_bytes", "received_bytes"}: both directions, one after the other."""
    try:
        with socket.create_connection(address_of(target), timeout=3.0) as peer:
            peer.settimeout(ECHO_SECONDS + 5.0)
            peer.sendall(token.encode())
            sent = _flood(peer, limit_bytes)
            peer.shutdown(socket.SHUT_WR)
            head = b""
            while not head.endswith(b"\n"):
                byte = peer.recv(1)
                if not byte or len(head) > 1000:
                    return {"error": "the other side closed the connection"}
                head += byte
            there = json.loads(head)
            received, seconds = _drain(peer)
    except (OSError, ValueError) as error:
        return {"error": str(error) or type(error).__name__}
    to_s = float(there["seconds"])
    return {
        "sent_bytes": sent,
        "received_bytes": received,
        "to_bytes_per_s": int(there["received_bytes"]) / to_s if to_s > 0 else None,
        "from_bytes_per_s": received / seconds if seconds > 0 else None,
    }


def _exactly(peer: socket.socket, size: int) -> bytes:
    data = b""
    try:
        while len(data) < size:
            part = peer.recv(size - len(data))
            if not part:
                break
            data += part
    except OSError:
        return b""
    return data


def _flood(peer: socket.socket, limit_bytes: int) -> int:
    """Send for ECHO_SECONDS or `limit_bytes`, whichever is first; returns the bytes handed to the system."""
    chunk, sent, deadline = memoryview(bytes(CHUNK_BYTES)), 0, time.monotonic() + ECHO_SECONDS
    while sent < limit_bytes and time.monotonic() < deadline:
        sent += peer.send(chunk[: limit_bytes - sent])
    return sent


def _drain(peer: socket.socket) -> tuple[int, float]:
    """(bytes until the other side stops, seconds from the first to the last of them)."""
    buffer, received, began, ended = bytearray(CHUNK_BYTES), 0, 0.0, 0.0
    while True:
        size = peer.recv_into(buffer)
        now = time.monotonic()
        if size == 0:
            return received, ended - began
        if received == 0:
            began = now
        received, ended = received + size, now
