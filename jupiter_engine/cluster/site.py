"""A machine made ready for this workspace: where its part lies there, and what runs it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from jupiter_engine.cluster.runner import NodeRunner
from jupiter_engine.files import write_atomic
from jupiter_engine.remote.port import Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A workspace's part of one machine: runs/, models/, corpus/ as in `.jupiter` here."""

    name: str
    local: bool
    runner: NodeRunner
    workspace: str
    """Absolute, there; for this machine the workspace's own `.jupiter`."""
    python: str = ""
    """Interpreter of the environment; empty where only files are looked at."""
    env: dict[str, str] = field(default_factory=dict)

    @property
    def connection(self) -> Connection:
        return self.runner.connection

    def path(self, relative: str) -> str:
        return str(PurePosixPath(self.workspace) / relative)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The machines of a stage with everything in place."""

    sites: tuple[Site, ...]
    """The leading one first."""
    group: bool
    islands: bool = False
    """The leading one is the hub; the others train in islands."""

    @property
    def leader(self) -> Site:
        return self.sites[0]

    def names(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.sites)


def workspace_id(home: Path) -> str:
    """What this workspace's folder is called on nodes: drawn once, kept in `.jupiter/id`."""
    path = home / "id"
    if not path.exists():
        write_atomic(path, secrets.token_hex(6).encode())
    return path.read_text().strip()
