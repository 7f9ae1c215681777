"""Verb `hello`: who and where this machine is."""

from __future__ import annotations

import json
import os
import platform
import pwd
import socket
import sys
import time
from pathlib import Path

from . import identity, program


def main(arguments: list[str]) -> int:
    """One line with version, python, system, machine, home, user, hostname, boot_id, at and shell.

    `at` is this machine's clock in seconds since the epoch; `shell` the login shell of the user.
    """
    del arguments
    try:
        user, shell = pwd.getpwuid(os.getuid())[0::6]
    except KeyError:
        # A container may run under a number that nobody has given a name.
        user, shell = str(os.getuid()), os.environ.get("SHELL", "")
    answer = {
        "version": program.version(),
        "python": sys.executable,
        "python_version": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "home": str(Path.home()),
        "user": user,
        "hostname": socket.gethostname(),
        "boot_id": identity.boot_id(),
        "shell": shell,
        "at": time.time(),
    }
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    return 0
