"""An order for another machine: which files go along, and how its paths read there.

A workspace's part on a node has the same layout as `.jupiter` here (runs/, models/, corpus/, scores/),
and the worker is started in its run folder; so every path of the order is written relative to that
folder and means the right thing on each machine, whatever its home is called. The same spec.json,
byte for byte, serves all machines of a group.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from jupiter_engine.errors import StateError
from jupiter_engine.protocol.orders import AnyOrder, CalibrateOrder, EvaluateOrder, GenerateOrder, ModelRef, TrainOrder
from jupiter_engine.protocol.specs import LaunchSpec, Twin


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipment:
    """What a stage needs on a node, and what comes back."""

    order: AnyOrder
    inputs: tuple[tuple[Path, str], ...]
    """(file or folder here, where it lies below the workspace's folder there)"""
    outputs: tuple[tuple[str, Path], ...]
    """(folder below the workspace's folder there, where it goes here)"""


@dataclass(slots=True)
class _Rewriter:
    home: Path
    run_folder: Path
    inputs: dict[Path, str] = field(default_factory=dict)

    def place(self, path: str) -> str:
        """Where a path of this machine lies below the workspace's folder on the node."""
        real = Path(path)
        if real.is_relative_to(self.home):
            return str(PurePosixPath(real.relative_to(self.home)))
        # Files of the user's own, such as a base model folder: by a name that only this path has.
        return f"inputs/{hashlib.sha256(str(real).encode()).hexdigest()[:16]}/{real.name}"

    def there(self, path: str) -> str:
        """The path as the worker in its run folder reads it."""
        return os.path.relpath(self.place(path), f"runs/{self.run_folder.name}")

    def bring(self, path: str) -> str:
        self.inputs[Path(path)] = self.place(path)
        return self.there(path)

    def model(self, model: ModelRef) -> ModelRef:
        return msgspec.structs.replace(model, folder=self.bring(model.folder))


def ship(order: AnyOrder, *, home: Path, run_folder: Path, twin: Twin, launch: LaunchSpec) -> Shipment:
    """The order as a node with `twin` gets it; `launch` is how it starts training."""
    rewriter = _Rewriter(home, run_folder)
    outputs: list[tuple[str, Path]] = []
    there: AnyOrder
    match order:
        case GenerateOrder():
            there = msgspec.structs.replace(
                order, generator=rewriter.model(order.generator), chunks=rewriter.bring(order.chunks), twin=twin
            )
        case EvaluateOrder():
            there = msgspec.structs.replace(
                order,
                models=tuple(rewriter.model(model) for model in order.models),
                chunks=rewriter.bring(order.chunks),
                items=rewriter.bring(order.items),
                # Scores stay on the node that computed them: finding them again is all they are for.
                cache=rewriter.there(order.cache),
                twin=twin,
            )
        case TrainOrder():
            there = msgspec.structs.replace(
                order,
                launch=launch,
                snapshot=rewriter.bring(order.snapshot),
                start=rewriter.model(order.start) if order.start is not None else None,
                tokenizer=rewriter.bring(order.tokenizer) if order.tokenizer is not None else None,
                target=rewriter.there(order.target),
            )
            outputs.append((rewriter.place(order.target), Path(order.target)))
        case CalibrateOrder():
            there = msgspec.structs.replace(order, launch=msgspec.structs.replace(order.launch, twin=twin))
        case _:
            raise StateError(f"the {type(order).__struct_config__.tag} stage runs where the workspace lies")
    return Shipment(order=there, inputs=tuple(rewriter.inputs.items()), outputs=tuple(outputs))


def localise(value: Any, *, home: Path, run_folder: Path, workspace_there: str, outputs: tuple[Path, ...] = ()) -> Any:
    """A result of a node with its paths turned into paths here. Whatever is no path stays as it is.

    A path leads into the run folder or to one of the stage's `outputs`; any other is a StateError: a node does not
    choose what later stages read here, or send elsewhere.
    """

    def text(found: str) -> str:
        if found.startswith(f"{workspace_there}/"):
            here = home / os.path.normpath(found[len(workspace_there) + 1 :])
        elif found.startswith("../"):
            here = home / os.path.normpath(f"runs/{run_folder.name}/{found}")
        elif found.startswith("/"):
            here = Path(found)
        else:
            return found
        if here in outputs or (here.is_relative_to(run_folder) and ".." not in here.parts):
            return str(here)
        raise StateError(f"a node reported the path {found[:200]!r}, which is none of its own")

    return _map_text(value, text)


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_text(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_map_text(inner, change) for inner in value]
    return value
