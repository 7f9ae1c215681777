"""A second copy of every checkpoint on another machine of the group: the loss of the leading one loses no training.

Copies go over ssh as one tar stream, at most one at a time and beside the training; what arrives is verified when it
is read, like every checkpoint. A copy that fails is said once and tried again with the next checkpoint.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import threading
from pathlib import Path

from jupiter_engine.checkpoints.store import Manifest
from jupiter_engine.errors import StateError
from jupiter_engine.files import read_json
from jupiter_engine.protocol.specs import HostSpec
from jupiter_engine.units import plain_text

_NAME = re.compile(r"step-(\d{8,})")
_LIMIT_S = 3600.0
"""A copy that takes longer is given up: by then there is a newer checkpoint."""

# $1 checkpoints folder there, $2 name of the checkpoint, $3 how many stay, $4 name of one that stays besides. The name
# with .partial is swept by checkpoints.store when a training begins there.
_RECEIVE = """
set -e
mkdir -p "$1" && cd "$1"
rm -rf .step-*.partial
mkdir ".$2.partial"
tar xf - -C ".$2.partial"
rm -rf "$2"
mv ".$2.partial" "$2"
ls -d step-* | sort | awk -v keep="$3" -v best="$4" '
  {name[NR]=$0} END {for (i=1; i<=NR-keep; i++) if (name[i] != best) print name[i]}' | xargs rm -rf
"""


def _name(step: int) -> str:
    return f"step-{step:08d}"


class CheckpointCopies:
    """Copies the newest checkpoint of a run, and the one with the best held-out loss, to one other host.

    There stay the newest `keep` copies and the best one. What is kept for other
    reasons (`keep_every_steps`) stays on the leading machine alone.
    """

    def __init__(self, folder: Path, host: HostSpec, ssh_config: str, *, keep: int) -> None:
        """`folder`: checkpoints of the run here."""
        self.folder, self.host, self.keep = folder, host, keep
        self._ssh_config = ssh_config
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.copied: set[int] = set()
        """Steps of the checkpoints that arrived whole."""
        self._tried: set[int] = set()
        self.problem = ""
        """Why the last copy failed; empty after one that worked."""

    def look(self) -> None:
        """Begin a copy if a checkpoint is missing there and none is under way. Returns at once."""
        if self._thread is not None and self._thread.is_alive():
            return
        steps = sorted(int(m[1]) for p in self._entries() if (m := _NAME.fullmatch(p.name)))
        if not steps:
            return
        best = self._best(steps[-1])
        wanted = [steps[-1], *(step for step in steps if step == best)]
        step = next((one for one in wanted if one not in self._tried), None)
        if step is None:
            return
        self._tried.add(step)
        self._thread = threading.Thread(target=self._copy, args=(step, best), name="checkpoint copy", daemon=True)
        self._thread.start()

    def _best(self, newest: int) -> int:
        """The step with the best held-out loss, as the newest checkpoint says; -1 for none."""
        try:
            manifest = read_json(self.folder / _name(newest) / "manifest.json", Manifest)
        except (StateError, FileNotFoundError):
            # Removed since the folder was listed: there is a newer one by now.
            return -1
        assert isinstance(manifest, Manifest)
        return manifest.best_step if manifest.best_step is not None else -1

    def close(self) -> None:
        """End a copy that is under way; the next supervisor makes it anew."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        if self._thread is not None:
            self._thread.join(timeout=10.0)

    def _entries(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.exists() else []

    def _copy(self, step: int, best: int) -> None:
        name = _name(step)
        there = f"{self.host.run_folder}/checkpoints"
        command = shlex.join(["/bin/sh", "-c", _RECEIVE, "sh", there, name, str(self.keep), _name(best)])
        config = ["-F", self._ssh_config] if self._ssh_config else []
        argv = ["ssh", *config, "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--", self.host.ssh, command]
        sender = subprocess.Popen(
            ["tar", "cf", "-", "-C", str(self.folder / name), "."], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._process = subprocess.Popen(argv, stdin=sender.stdout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert sender.stdout is not None
        sender.stdout.close()
        try:
            _, errors = self._process.communicate(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            _, errors = self._process.communicate()
        sent = sender.wait()
        if self._process.returncode == 0 and sent == 0:
            self.problem = ""
            self.copied.add(step)
        else:
            said = plain_text(errors.decode("utf-8", "replace")).strip().splitlines()
            self.problem = said[-1][:300] if said else "the copy was cut short"
