"""Two verbs that stand between mlx.launch and ssh, so that both do what is wanted.

mlx.launch calls whatever `ssh` is first on its PATH: `ssh -tt -o LogLevel=QUIET HOST SCRIPT`, with a script in bash.
Here that is a file of two lines which runs `rank-ssh`. It

- uses the group's ssh configuration and leaves ~/.ssh alone;
- asks for no terminal: with one, the far side answers with CR LF, and mlx.launch then looks for files whose names end
  in a carriage return (so it neither ends the far rank nor removes what it left in /tmp);
- closes standard input, which mlx.launch would otherwise wait on in a busy loop (see rank_agent);
- hands the script to the far node runner (`rank-shell`), which runs it in bash, whatever the login shell there is, and
  with its temporary files in the folder of the launch.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Any

from . import program
from .errors import NodeError
from .files import read_json
from .host_calls import far_line, ssh_line

FOLDER_VARIABLE = "JUPITER_SHIM"
"""Says where the stand-in for ssh lies, so that it finds the real one."""

_NO_ECHO = "stty -echo; "
"""First words of mlx.launch's script; pointless (and an error message) where there is no terminal."""


def write(folder: Path, keep: Path) -> None:
    """Put a program called ssh into `folder`, for the launch whose keep folder is `keep`."""
    folder.mkdir(exist_ok=True)
    line = " ".join(_quoted(word) for word in program.argv("rank-ssh", str(keep)))
    path = folder / "ssh"
    path.write_text(f'#!/bin/sh\nexec {line} "$@"\n', "utf-8")
    path.chmod(0o755)


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def ssh(arguments: list[str]) -> int:
    """rank-ssh KEEP [-tt] [-o OPTION] HOST SCRIPT: becomes the real ssh."""
    if len(arguments) < 3:
        raise NodeError("usage", "rank-ssh KEEP [-tt] [-o OPTION] HOST SCRIPT")
    keep, host, script = arguments[0], arguments[-2], arguments[-1]
    launch = read_json(Path(keep) / "launch.json") or {}
    far = (launch.get("ssh") or {}).get(host)
    if far is None:
        raise NodeError("usage", f"{host!r} is no host of this launch", f"see {keep}/launch.json")
    line = far_line(far["runner"], "rank-shell", packed(script, far["env"]))
    argv = ssh_line(str(launch["ssh_config"]), host, line, silence_s=float(launch["silence_s"]))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.execvp(_real_ssh(argv[0]), argv)  # noqa: S606 - the arguments are a vector, no shell sees them


def packed(script: str, env: dict[str, str]) -> str:
    """A script and its environment as one word without any character that a login shell might touch."""
    return base64.urlsafe_b64encode(json.dumps({"script": script, "env": env}).encode("utf-8")).decode("ascii")


def shell(arguments: list[str]) -> int:
    """rank-shell WORD: becomes bash with the script in the word."""
    if len(arguments) != 1:
        raise NodeError("usage", "rank-shell WORD")
    try:
        order: dict[str, Any] = json.loads(base64.urlsafe_b64decode(arguments[0]))
    except ValueError as error:
        raise NodeError("protocol", f"the word holds no script: {error}") from error
    script = str(order["script"])
    if script.startswith(_NO_ECHO):
        script = script[len(_NO_ECHO) :]
    bash = shutil.which("bash") or "/bin/bash"
    if not Path(bash).exists():
        raise NodeError("missing", "mlx.launch needs bash, which is not installed here", "use launcher: direct")
    if not Path(order["env"]["TMPDIR"]).is_dir():
        # Made by rank-go, removed with everything else: nothing may be started after that.
        raise NodeError("over", "this launch has ended here")
    os.execve(bash, [bash, "-c", script], {**os.environ, **order["env"]})  # noqa: S606 - the script came over ssh


def _real_ssh(name: str) -> str:
    """The ssh that would be run if ours were not first on the PATH."""
    ours = os.environ.get(FOLDER_VARIABLE, "")
    path = [folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder and folder != ours]
    found = shutil.which(name, path=os.pathsep.join(path))
    if found is None:
        raise NodeError("missing", "ssh is not installed here", "install the OpenSSH client")
    return found
