"""The machines of config/cluster.yaml, changed without touching what else stands in the file.

A change is read back through the settings before the file is replaced, so it either loads or did not
happen; a file that somebody else changed in the meantime is left alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from jupiter_engine.cluster.yaml_text import Value, YamlText
from jupiter_engine.errors import ConfigError, UsageError
from jupiter_engine.files import sync_folder, write_atomic
from jupiter_engine.settings.cluster import ClusterSettings, GroupSpec, NodeSpec, load_cluster, node_by_name
from jupiter_engine.settings.reader import Loaded, nearest, shown
from jupiter_engine.settings.tree import quote

_BOM: Final = "\ufeff"
_EDITABLE: Final = tuple(NodeSpec.__struct_fields__)


class Inventory:
    """One reading of a cluster file and the changes made to it since; `save` writes them."""

    def __init__(self, path: Path) -> None:
        """ConfigError if the file does not load: a broken file is mended by hand, not edited further."""
        self.path = path
        self._read()

    def _read(self) -> None:
        self.loaded = load_cluster(self.path)
        raw = self.path.read_bytes()
        self._digest = hashlib.sha256(raw).hexdigest()
        text = raw.decode("utf-8")
        self._bom = _BOM if text.startswith(_BOM) else ""
        self._original = text.removeprefix(_BOM)
        self._text = YamlText(self._original)

    @property
    def cluster(self) -> ClusterSettings:
        """As read; changes show in what `save` returns."""
        return self.loaded.value

    def add(self, values: Mapping[str, Value]) -> None:
        """Add a node, its keys in the order of `values`; a file without `nodes` keeps this machine beside it."""
        _known(values)
        data = self._text.data()
        if "nodes" in data:
            self._text.append(("nodes",), values)
        else:
            self._text.append_section("nodes", [{"host": "localhost"}, values])

    def remove(self, name: str) -> str:
        """Take a node out, and out of its group; returns its title.

        UsageError for an unknown or the only node. A group of which nothing is left goes too.
        """
        now = self._now()
        node = node_by_name(now, name)
        if len(now.nodes) < 2:
            raise UsageError(
                f"{node.title()} is the only node", fix="add another one first; a cluster has at least one machine"
            )
        for i, group in reversed(list(enumerate(now.groups))):
            for k, member in reversed(list(enumerate(group.nodes))):
                if member.lower() in (node.title().lower(), node.host.lower()) and node_by_name(now, member) is node:
                    self._leave_group(i, k, len(group.nodes))
        self._text.remove_item(("nodes",), _position(now, node))
        return node.title()

    def _leave_group(self, group: int, position: int, members: int) -> None:
        if members > 1:
            self._text.remove_item(("groups", group, "nodes"), position)
        elif len(self._text.data()["groups"]) > 1:
            self._text.remove_item(("groups",), group)
        else:
            self._text.remove_key((), "groups")

    def set(self, name: str, values: Mapping[str, Value | None]) -> None:
        """Change keys of a node; None removes a key, so that its default holds."""
        _known(values)
        now = self._now()
        position = _position(now, node_by_name(now, name))
        if "nodes" not in self._text.data():
            self._text.append_section("nodes", [{"host": "localhost"}])
        for key, value in values.items():
            if value is not None:
                self._text.set(("nodes", position), key, value)
            elif key in self._text.data()["nodes"][position]:
                self._text.remove_key(("nodes", position), key)

    def _now(self) -> ClusterSettings:
        """Names of nodes and groups after the edits so far; nothing else of them, which need not fit together yet."""
        data = self._text.data()
        nodes = tuple(
            NodeSpec(
                host=str(node.get("host") or "localhost"), name=None if node.get("name") is None else str(node["name"])
            )
            for node in data.get("nodes", ({},))
        )
        groups = tuple(
            GroupSpec(name=str(group["name"]), nodes=tuple(str(member) for member in group["nodes"]))
            for group in data.get("groups", ())
        )
        return ClusterSettings(nodes=nodes, groups=groups)

    def revert(self) -> None:
        """Forget the changes since the file was read."""
        self._text = YamlText(self._original)

    def check(self) -> None:
        """ConfigError if the file would not load with the changes; nothing is written."""
        with self._trial(self.path.resolve()):
            pass

    def save(self) -> Loaded[ClusterSettings]:
        """Write the changes, whole or not at all; returns what the file says now.

        ConfigError, and the file as it was, if the result does not load or the file was changed meanwhile.
        """
        # A link (settings kept elsewhere) stays a link.
        target = self.path.resolve()
        with _locked(target):
            self._unchanged(target)
            with self._trial(target) as trial:
                self._unchanged(target)
                trial.replace(target)
            sync_folder(target.parent)
        self._read()
        return self.loaded

    @contextmanager
    def _trial(self, target: Path) -> Iterator[Path]:
        """A file beside the real one, which has been seen to load; it is gone afterwards."""
        trial = target.with_name(f".{target.name}.{os.getpid()}.edit")
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o644
        try:
            write_atomic(trial, (self._bom + self._text.text).encode("utf-8"), mode=mode)
            _loads(trial, self.path)
            yield trial
        finally:
            trial.unlink(missing_ok=True)

    def _unchanged(self, target: Path) -> None:
        try:
            same = hashlib.sha256(target.read_bytes()).hexdigest() == self._digest
        except FileNotFoundError:
            same = False
        if not same:
            raise ConfigError(
                f"{shown(self.path)} was changed by somebody else meanwhile; nothing was written",
                fix="do it again: the file is read anew",
            )


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One writer at a time; the lock is on the folder, so nothing is left behind."""
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _loads(trial: Path, named: Path) -> None:
    """ConfigError, worded as if about `named`, unless the file loads."""
    try:
        load_cluster(trial)
    except ConfigError as error:
        problems = tuple(problem.replace(shown(trial), shown(named)) for problem in error.problems)
        raise ConfigError(
            error.detail.replace(shown(trial), shown(named)),
            title="The change was not made",
            fix="correct what it says, or edit the file by hand",
            problems=problems,
        ) from error


def _position(cluster: ClusterSettings, node: NodeSpec) -> int:
    return next(i for i, other in enumerate(cluster.nodes) if other is node)


def _known(values: Mapping[str, object]) -> None:
    for key in values:
        if key not in _EDITABLE:
            guess = nearest(key, list(_EDITABLE))
            hint = f"; did you mean {guess}?" if guess else ""
            raise UsageError(f"a node has no key {quote(key)}{hint}", fix="see `nodes` in docs/config.md")


def node_values(node: NodeSpec) -> dict[str, Value]:
    """What is not a default of a node, as `add` takes it, in the order of the documentation."""
    default = NodeSpec()
    values = {name: getattr(node, name) for name in _EDITABLE if getattr(node, name) != getattr(default, name)}
    return {"host": node.host, **values}
