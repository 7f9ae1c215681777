from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from jupiter_engine.checkpoints import store as store_module
from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.checkpoints.store import Checkpoint, CheckpointStore, Damaged, Identity, World
from jupiter_engine.checkpoints.tensors import Array, FileRecord, file_bytes, read_arrays, write_arrays
from jupiter_engine.errors import DiskFull, StateError
from jupiter_engine.files import sha256_file, sync_file

IDENTITY = Identity(recipe_sha256="a" * 64, snapshot_sha256="b" * 64, start_sha256="c" * 64)


def checkpoint(step: int, value: float = 1.0) -> Checkpoint:
    weights = {"w": np.full((3, 2), value * step, dtype=np.float32), "g": np.ones(2, dtype=np.float32)}
    return Checkpoint(
        step=step,
        tokens=step * 10,
        tokens_total=1000,
        cursor_rows=step * 8,
        identity=IDENTITY,
        world=World(twin="torch", ranks=1, versions={"torch": "2"}),
        trainer=TrainerState(
            weights=weights,
            moments={f"{key}.{name}": array * 2 for name, array in weights.items() for key in ("m", "v")},
            updates=step,
            rng={"torch.cpu": np.arange(8, dtype=np.uint8)},
        ),
        metrics=b'{"step":1}\n' * step,
    )


def opened(folder: Path, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(folder, keep=keep)


def newest(folder: Path, identity: Identity = IDENTITY) -> tuple[Checkpoint | None, list[str]]:
    warnings: list[str] = []
    return opened(folder).newest(identity, warnings.append), warnings


def test_a_state_comes_back_whole(tmp_path: Path) -> None:
    written = checkpoint(5)
    opened(tmp_path).write(written)
    found, warnings = newest(tmp_path)
    assert found is not None
    assert warnings == []
    assert (found.step, found.tokens, found.tokens_total, found.cursor_rows) == (5, 50, 1000, 40)
    assert (found.trainer.updates, found.metrics, found.world) == (5, written.metrics, written.world)
    for part in ("weights", "moments", "rng"):
        before, after = getattr(written.trainer, part), getattr(found.trainer, part)
        assert before.keys() == after.keys()
        for name, array in before.items():
            assert array.dtype == after[name].dtype
            assert array.tobytes() == after[name].tobytes()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for step in (5, 10, 15):
        store.write(checkpoint(step))
    assert store.steps() == [10, 15]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]


def test_multiples_and_the_best_one_are_kept_besides_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1, keep_every=20)
    for step in range(5, 50, 5):
        store.write(dataclasses.replace(checkpoint(step), best_step=15 if step >= 15 else None))
    assert store.steps() == [15, 20, 40, 45]
    store.write(dataclasses.replace(checkpoint(50), best_step=50))
    assert store.steps() == [20, 40, 50]


def test_nothing_older_goes_until_the_new_one_was_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path, keep=1)
    store.write(checkpoint(5))

    def lying(path: Path, arrays: dict[str, Array]) -> FileRecord:
        record = write_arrays(path, arrays)
        if path.name == "optimizer.safetensors":
            _flip(path)
        return record

    monkeypatch.setattr(store_module, "write_arrays", lying)
    with pytest.raises(StateError, match=r"step-00000010/optimizer\.safetensors does not hold the bytes") as caught:
        store.write(checkpoint(10))
    assert caught.value.fix
    found, warnings = newest(tmp_path)
    assert found is not None
    assert found.step == 5
    assert "step 10 is damaged" in warnings[0]


def test_what_the_guard_and_the_measurements_know_comes_back(tmp_path: Path) -> None:
    written = dataclasses.replace(checkpoint(5), held_out_loss=2.5, best_step=3, skipped_batches=(1, 4), rollbacks=2)
    opened(tmp_path).write(written)
    found, _ = newest(tmp_path)
    assert found is not None
    assert (found.held_out_loss, found.best_step, found.skipped_batches, found.rollbacks) == (2.5, 3, (1, 4), 2)


def test_a_checkpoint_of_format_1_is_read(tmp_path: Path) -> None:
    opened(tmp_path).write(checkpoint(5))
    path = tmp_path / "step-00000005" / "manifest.json"
    former = json.loads(path.read_text())
    for name in ("held_out_loss", "best_step", "skipped_batches", "rollbacks"):
        del former[name]
    path.write_text(json.dumps({**former, "version": 1}))
    found, warnings = newest(tmp_path)
    assert found is not None
    assert (found.step, found.best_step, found.skipped_batches, warnings) == (5, None, (), [])
    assert found.trainer.moments.keys() == checkpoint(5).trainer.moments.keys()


def test_the_weights_alone_are_verified_too(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write(checkpoint(5))
    assert store.weights(5, IDENTITY)["w"].tobytes() == checkpoint(5).trainer.weights["w"].tobytes()
    _flip(tmp_path / "step-00000005" / "weights.safetensors")
    with pytest.raises(Damaged, match=r"weights\.safetensors"):
        store.weights(5, IDENTITY)


def test_on_macos_files_are_synced_through_the_drives_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []

    def control(descriptor: int, command: int) -> None:
        calls.append(("fcntl", command))
        if len(calls) > 1:
            raise OSError(errno.ENOTSUP, "not here")

    monkeypatch.setattr("jupiter_engine.files.sys.platform", "darwin")
    monkeypatch.setattr("jupiter_engine.files.fcntl", SimpleNamespace(F_FULLFSYNC=51, fcntl=control))
    monkeypatch.setattr("jupiter_engine.files.os.fsync", lambda _: calls.append(("fsync", 0)))
    with (tmp_path / "x").open("wb") as file:
        sync_file(file.fileno())
        sync_file(file.fileno())
    assert calls == [("fcntl", 51), ("fcntl", 51), ("fsync", 0)]


def test_nothing_stored_is_no_state(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") == (None, [])


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "rng.safetensors", "metrics.jsonl"])
@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink])
def test_a_damaged_file_falls_back_to_the_checkpoint_before(tmp_path: Path, name: str, damage: Any) -> None:
    store = opened(tmp_path)
    store.write(checkpoint(5))
    store.write(checkpoint(10))
    damage(tmp_path / "step-00000010" / name)
    found, warnings = newest(tmp_path)
    assert found is not None
    assert found.step == 5
    assert len(warnings) == 1
    assert "step 10 is damaged" in warnings[0]
    assert name in warnings[0]
    assert "going on from step 5" in warnings[0]
    opened(tmp_path).write(checkpoint(10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": 1}', None])
def test_a_damaged_manifest_counts_as_damage_and_the_run_starts_over_if_it_is_the_only_one(
    tmp_path: Path, content: bytes | None
) -> None:
    opened(tmp_path).write(checkpoint(5))
    manifest = tmp_path / "step-00000005" / "manifest.json"
    if content is None:
        manifest.unlink()
    else:
        manifest.write_bytes(content)
    found, warnings = newest(tmp_path)
    assert found is None
    assert "starting from the beginning" in warnings[0]


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("recipe_sha256", "another recipe"),
        ("snapshot_sha256", "another data snapshot"),
        ("start_sha256", "start model"),
    ],
)
def test_a_state_of_another_run_is_refused(tmp_path: Path, field: str, words: str) -> None:
    opened(tmp_path).write(checkpoint(5))
    other = msgspec.structs.replace(IDENTITY, **{field: "f" * 64})
    with pytest.raises(StateError, match=words) as caught:
        newest(tmp_path, other)
    assert "ffffffffffff" in caught.value.detail
    assert caught.value.fix
    assert opened(tmp_path).steps() == [5]


def test_a_format_of_the_future_is_refused_not_discarded(tmp_path: Path) -> None:
    opened(tmp_path).write(checkpoint(5))
    path = tmp_path / "step-00000005" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 3}))
    with pytest.raises(StateError, match="checkpoint format 3"):
        newest(tmp_path)
    assert opened(tmp_path).steps() == [5]


@pytest.mark.parametrize("fail_at", ["weights.safetensors", "optimizer.safetensors", "manifest.json"])
def test_a_disk_that_fills_up_while_writing_leaves_the_earlier_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: str
) -> None:
    opened(tmp_path).write(checkpoint(5))

    def no_room(path: Path, *_: object) -> FileRecord:
        if path.name == fail_at:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_arrays(path, *_)  # type: ignore[arg-type]

    def no_room_json(path: Path, value: object) -> None:
        no_room(path, value)

    monkeypatch.setattr(store_module, "write_arrays", no_room)
    if fail_at == "manifest.json":
        monkeypatch.setattr(store_module, "write_json", no_room_json)
    with pytest.raises(DiskFull, match="step-00000010"):
        opened(tmp_path).write(checkpoint(10))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jupiter_engine.files.shutil.disk_usage", lambda _: _Usage)
    with pytest.raises(DiskFull, match=r"the checkpoint of step 5 needs 64\.0 MiB .* 1\.0 MiB are free"):
        opened(tmp_path).write(checkpoint(5))
    assert list(tmp_path.iterdir()) == []


class _Usage:
    free = 1 << 20


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    opened(tmp_path).write(checkpoint(5))
    partial = tmp_path / ".step-00000010.partial"
    partial.mkdir()
    (partial / "weights.safetensors").write_bytes(b"half")
    assert opened(tmp_path).steps() == [5]
    assert not partial.exists()


def test_arrays_are_plain_safetensors_with_the_stated_hash(tmp_path: Path) -> None:
    arrays: dict[str, Array] = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "scalar": np.array(7, dtype=np.int64),
        "strided": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "bytes": np.frombuffer(b"abc", dtype=np.uint8),
    }
    path = tmp_path / "x.safetensors"
    record = write_arrays(path, arrays)
    assert record == FileRecord(sha256=sha256_file(path), bytes=path.stat().st_size)
    assert file_bytes(arrays) == record.bytes
    loaded = load_file(path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert read_arrays(path, record).keys() == arrays.keys()


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="complex64"):
        write_arrays(tmp_path / "x", {"a": np.zeros(2, dtype=np.complex64)})
