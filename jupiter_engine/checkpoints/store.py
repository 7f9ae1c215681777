"""Full training states on disk: written whole or not at all, verified on reading.

checkpoints/
  step-00000010/
    weights.safetensors     what is trained, float32: master weights or adapters
    optimizer.safetensors   the optimizer's moments
    rng.safetensors         random number generators
    metrics.jsonl           every optimizer step so far, as in the run's metrics.jsonl
    manifest.json           step, tokens, schedule and data position, identity, sizes and hashes; written last
                            (version 2: held-out loss, best step, left-out batches; version 1 is read as well)
  .step-00000020.partial/   a write that was killed; removed when the store is opened
  damaged-step-00000020/    set aside because it failed verification
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.checkpoints.tensors import Array, FileRecord, file_bytes, read_arrays, write_arrays
from jupiter_engine.errors import StateError
from jupiter_engine.files import (
    disk_full,
    read_json,
    require_free,
    sha256_file,
    sync_file,
    sync_folder,
    write_json,
)
from jupiter_engine.units import MIB

VERSION = 2
_READABLE = (1, 2)
"""Version 1 lacks the fields of `Manifest` that have a default, and holds AdamW's moments, as version 2 may."""
_ARRAYS = ("weights.safetensors", "optimizer.safetensors", "rng.safetensors")
_NAME = re.compile(r"step-(\d{8,})")
_SPARE_BYTES = 64 * MIB


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint belongs to; continuing with anything else would be another run."""

    recipe_sha256: str
    snapshot_sha256: str
    start_sha256: str
    """Hash of the start model's folder; for a from-scratch run the hash of its shape."""


class World(msgspec.Struct, frozen=True, kw_only=True):
    """Who wrote it: for people. A state does not depend on the number of ranks or on the twin."""

    twin: str
    ranks: int
    versions: dict[str, str]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    step: int
    """Optimizer steps done."""
    tokens: int
    """Counted target tokens trained so far."""
    tokens_total: int
    """Counted target tokens of the whole run: `tokens / tokens_total` is the schedule's position."""
    cursor_rows: int
    """Rows drawn from the data order so far, left-out batches included: the next batch starts there."""
    updates: int
    identity: Identity
    world: World
    files: dict[str, FileRecord]
    held_out_loss: float | None = None
    """Nats a token on the held-out rows, where it was measured at this step."""
    best_step: int | None = None
    """Of all steps so far, the one with the best held-out loss; its checkpoint is kept."""
    skipped_batches: tuple[int, ...] = ()
    """Numbers of batches (from 0, in data order) that the spike guard left out, ascending."""
    rollbacks: int = 0
    """How often the run has gone back for that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A training state with its place in the run; `metrics` are the encoded lines of all steps so far."""

    step: int
    tokens: int
    tokens_total: int
    cursor_rows: int
    identity: Identity
    world: World
    trainer: TrainerState
    metrics: bytes
    held_out_loss: float | None = None
    best_step: int | None = None
    skipped_batches: tuple[int, ...] = ()
    rollbacks: int = 0


class CheckpointStore:
    """The checkpoints of one run. One process writes.

    Kept are the `keep` newest ones, those of multiples of `keep_every` steps (0:
    none) and the one with the best held-out loss. An older one goes only when the
    one just written has been read back and is sound.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every: int = 0) -> None:
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(".step-*.partial"):
            shutil.rmtree(partial)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first (not verified)."""
        matches = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def write(self, checkpoint: Checkpoint) -> Path:
        """Store a state; on return it survives a power cut. Raises DiskFull, leaving the earlier ones untouched."""
        state = checkpoint.trainer
        parts: dict[str, dict[str, Array]] = {
            "weights.safetensors": state.weights,
            "optimizer.safetensors": state.moments,
            "rng.safetensors": state.rng,
        }
        needed = sum(file_bytes(part) for part in parts.values()) + len(checkpoint.metrics) + _SPARE_BYTES
        require_free(self._folder, needed, f"the checkpoint of step {checkpoint.step}")
        target = self.path(checkpoint.step)
        partial = self._folder / f".{target.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            files = {name: write_arrays(partial / name, part) for name, part in parts.items()}
            files["metrics.jsonl"] = _write_bytes(partial / "metrics.jsonl", checkpoint.metrics)
            write_json(partial / "manifest.json", _manifest(checkpoint, files))
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
            sync_folder(self._folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise disk_full(error, target) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._prune(checkpoint)
        return target

    def newest(self, identity: Identity, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest state that verifies, or None; each damaged one is set aside with a sentence to `warn`.

        A sound checkpoint of another recipe, data set or start model is a
        StateError: the run folder does not belong to this order.
        """
        for step in reversed(self.steps()):
            path = self.path(step)
            try:
                return self._read(path, identity)
            except Damaged as error:
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                earlier = [s for s in self.steps() if s < step]
                go_on = f"going on from step {earlier[-1]}" if earlier else "starting from the beginning"
                warn(f"The checkpoint of step {step} is damaged ({error.detail}); {go_on}")
        return None

    def weights(self, step: int, identity: Identity) -> dict[str, Array]:
        """The weights of one checkpoint, verified. StateError (Damaged) where they are not what was written."""
        path = self.path(step)
        manifest = _read_manifest(path, identity)
        name = _ARRAYS[0]
        try:
            return read_arrays(path / name, manifest.files[name])
        except (StateError, KeyError) as error:
            raise Damaged(str(error)) from error

    def clear(self) -> None:
        """Remove everything stored: the run is complete and its model published."""
        shutil.rmtree(self._folder)

    def _read(self, path: Path, identity: Identity) -> Checkpoint:
        manifest = _read_manifest(path, identity)
        try:
            arrays = {name: read_arrays(path / name, manifest.files[name]) for name in _ARRAYS}
            metrics = _read_bytes(path / "metrics.jsonl", manifest.files["metrics.jsonl"])
        except (StateError, KeyError) as error:
            raise Damaged(str(error)) from error
        return Checkpoint(
            step=manifest.step,
            tokens=manifest.tokens,
            tokens_total=manifest.tokens_total,
            cursor_rows=manifest.cursor_rows,
            identity=manifest.identity,
            world=manifest.world,
            trainer=TrainerState(
                weights=arrays["weights.safetensors"],
                moments=arrays["optimizer.safetensors"],
                updates=manifest.updates,
                rng=arrays["rng.safetensors"],
            ),
            metrics=metrics,
            held_out_loss=manifest.held_out_loss,
            best_step=manifest.best_step,
            skipped_batches=manifest.skipped_batches,
            rollbacks=manifest.rollbacks,
        )

    def _prune(self, written: Checkpoint) -> None:
        steps = self.steps()
        kept = {*steps[-self._keep :], written.step, written.best_step}
        if self._keep_every:
            kept |= {step for step in steps if step % self._keep_every == 0}
        old = [self.path(step) for step in steps if step not in kept]
        old += self._folder.glob("damaged-*")
        if not old:
            return
        self._verify(self.path(written.step), written.identity)
        for path in old:
            shutil.rmtree(path)

    def _verify(self, path: Path, identity: Identity) -> None:
        """Read back what was just written. StateError names what differs: nothing older is removed then."""
        for name, record in _read_manifest(path, identity).files.items():
            if (path / name).stat().st_size != record.bytes or sha256_file(path / name) != record.sha256:
                raise StateError(
                    f"{path / name} does not hold the bytes that were just written to it",
                    fix="check that disk; the checkpoints before are kept and a new start goes on from there",
                )


class Damaged(StateError):
    """A checkpoint whose files are not what was written."""


def _read_manifest(path: Path, identity: Identity) -> Manifest:
    """Damaged where it cannot be read; StateError for another format or another run's."""
    try:
        manifest = read_json(path / "manifest.json", Manifest)
    except (StateError, FileNotFoundError) as error:
        raise Damaged(str(error)) from error
    assert isinstance(manifest, Manifest)
    if manifest.version not in _READABLE:
        raise StateError(
            f"{path} has checkpoint format {manifest.version}, this Jupiter reads {_READABLE[0]} to {_READABLE[-1]}",
            fix="go on with the version that wrote it, or remove the run folder's checkpoints to train anew",
        )
    _same(path, manifest.identity, identity)
    return manifest


def _manifest(checkpoint: Checkpoint, files: dict[str, FileRecord]) -> Manifest:
    return Manifest(
        version=VERSION,
        step=checkpoint.step,
        tokens=checkpoint.tokens,
        tokens_total=checkpoint.tokens_total,
        cursor_rows=checkpoint.cursor_rows,
        updates=checkpoint.trainer.updates,
        identity=checkpoint.identity,
        world=checkpoint.world,
        files=files,
        held_out_loss=checkpoint.held_out_loss,
        best_step=checkpoint.best_step,
        skipped_batches=checkpoint.skipped_batches,
        rollbacks=checkpoint.rollbacks,
    )


def _same(path: Path, found: Identity, wanted: Identity) -> None:
    names = {"recipe_sha256": "recipe", "snapshot_sha256": "data snapshot", "start_sha256": "start model"}
    for field, what in names.items():
        was, now = getattr(found, field), getattr(wanted, field)
        if was != now:
            raise StateError(
                f"{path} was trained with another {what} ({was[:12]}) than the order names ({now[:12]})",
                fix=f"restore the {what}, or remove the run folder to train anew",
            )


def _write_bytes(path: Path, data: bytes) -> FileRecord:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        sync_file(file.fileno())
    return FileRecord(sha256=sha256_file(path), bytes=len(data))


def _read_bytes(path: Path, record: FileRecord) -> bytes:
    if not path.exists() or sha256_file(path) != record.sha256:
        raise StateError(f"{path} is missing or does not hold the bytes that were written")
    return path.read_bytes()
