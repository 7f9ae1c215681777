"""`jupiter plan` for a person and for a program; plans that cannot work are refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jupiter_engine.cli.main import main
from jupiter_engine.cli.plan_text import span_text
from jupiter_engine.cluster.shipping import ship
from jupiter_engine.errors import ExitCode, NoUsableNode, UsageError
from jupiter_engine.orchestrator.planner import (
    calibrations,
    remember_calibration,
    require_workable,
    with_preset,
)
from jupiter_engine.planning.time import Calibration
from jupiter_engine.protocol.orders import CalibrateOrder
from jupiter_engine.protocol.shapes import PRESETS, SMOLLM2_135M, parameter_count, shape_of_config
from jupiter_engine.protocol.specs import LaunchSpec, Recipe
from jupiter_engine.protocol.state import State
from jupiter_engine.settings.cluster import load_cluster
from jupiter_engine.settings.domain import load_domain
from jupiter_engine.settings.workspace import create, domain_file

SMALL_BOX = """\
nodes:
  - host: localhost
    role: generator
  - host: trainer.lan
    name: box
    device_type: nvidia
    chip: RTX 3080
    memory_gb: 3
    role: hybrid
groups:
  - name: g
    nodes: [box]
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    create(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        status = main(list(argv))
    except SystemExit as error:
        status = int(error.code or 0)
    return (status, *capsys.readouterr())


def test_a_person_reads_parts_verdict_time_and_ways(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "plan", "--domain", "python", "--workspace", str(workspace))
    assert status == ExitCode.DONE
    for text in (
        "optimizer",
        "activations",
        "allowed",
        "fits",
        "tokens/s",
        "kWh",
        "LoRA adapters",
        "134.5M parameters",
    ):
        assert text in out
    assert all(len(line) <= 130 for line in out.splitlines())


def test_a_program_gets_the_same_numbers(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("plan", "--domain", "python", "--workspace", str(workspace), "--json")
    training: Any = json.loads(run(capsys, *at)[1])["training"]
    assert training["parameters"] == parameter_count(SMOLLM2_135M)
    assert training["nodes"][0]["fits"] is True
    more: Any = json.loads(run(capsys, *at, "--tokens", "2M")[1])["training"]
    assert more["tokens"] == 2_000_000
    assert more["seconds_high"] > 50 * training["seconds_high"]
    nano: Any = json.loads(run(capsys, *at, "--model", "nano")[1])["training"]
    assert nano["parameters"] < training["parameters"] / 10
    assert nano["nodes"][0]["needed"] < training["nodes"][0]["needed"]


def test_wrong_options_are_refused_in_words(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("plan", "--domain", "python", "--workspace", str(workspace))
    for extra, told in (
        (("--tokens", "many"), "500M"),
        (("--tokens", "-3"), "500M"),
        (("--model", "1bb"), "did you mean 1b"),
        (("--calibrate", "--seconds", "0"), "more than 0"),
    ):
        status, _, err = run(capsys, *at, *extra)
        assert status == ExitCode.USAGE
        assert told in err


def test_a_calibration_is_kept_and_used(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("plan", "--domain", "python", "--workspace", str(workspace), "--model", "nano", "--json")
    before: Any = json.loads(run(capsys, *at)[1])["training"]
    assert before["source"] == "table"
    after: Any = json.loads(run(capsys, *at, "--calibrate", "--seconds", "0.2")[1])["training"]
    assert after["source"] == "measured"
    (entry,) = calibrations(workspace)
    assert entry.steps >= 2
    assert entry.peak_bytes > 50 << 20
    assert "torch" in entry.versions
    assert 1 / 1.35 < after["seconds_high"] / after["seconds_low"] / 1.22 < 1.35
    again: Any = json.loads(run(capsys, *at)[1])["training"]
    assert again["tokens_per_s_low"] == after["tokens_per_s_low"]
    assert not list((workspace / ".jupiter" / "runs").glob("calibrate-*"))


def test_the_newest_calibration_of_a_training_replaces_the_one_before(workspace: Path) -> None:
    one = Calibration(
        node="n", device="d", kind="cpu", twin="torch", shape=PRESETS["nano"].shape, sequence_tokens=64, micro_batch=1,
        compute_dtype="float32", recompute=False, update="full", optimizer="adamw", micro_batch_s=1.0, update_s=1.0,
        peak_bytes=1, steps=2, seconds=1.0, at=1.0,
    )  # fmt: skip
    from msgspec.structs import replace

    for new in (one, replace(one, micro_batch_s=0.5, at=2.0), replace(one, micro_batch=2, at=3.0)):
        remember_calibration(workspace, new)
    assert [(entry.micro_batch, entry.micro_batch_s) for entry in calibrations(workspace)] == [(1, 0.5), (2, 1.0)]


def test_start_refuses_what_cannot_work_and_names_what_can(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "config" / "cluster.yaml").write_text(SMALL_BOX)
    for mode in ("--auto", "--detach"):
        status, _, err = run(capsys, "start", "--domain", "python", mode, "--workspace", str(workspace))
        assert status == ExitCode.NO_NODE
        assert "The plan cannot work" in err
        assert "box" in err
        assert "training." in err.split("->")[1]
    assert not list((workspace / ".jupiter" / "runs").glob("*"))


def test_what_is_not_known_is_not_refused(workspace: Path) -> None:
    settings = load_domain(domain_file(workspace, "python")).value
    (workspace / "config" / "cluster.yaml").write_text(SMALL_BOX.replace("    memory_gb: 3\n", ""))
    cluster = load_cluster(workspace / "config" / "cluster.yaml").value
    require_workable(workspace, State(), "python", settings, cluster)
    (workspace / "config" / "cluster.yaml").write_text(SMALL_BOX)
    with pytest.raises(NoUsableNode):
        require_workable(
            workspace, State(), "python", settings, load_cluster(workspace / "config" / "cluster.yaml").value
        )


def test_presets_by_name() -> None:
    assert with_preset(Recipe(), "1b").preset == "1b"
    with pytest.raises(UsageError, match="did you mean"):
        with_preset(Recipe(), "1B ")


def test_a_model_folders_shape_is_read() -> None:
    config = {
        "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "intermediate_size": 5632, "max_position_embeddings": 2048,
    }  # fmt: skip
    assert parameter_count(shape_of_config(config)) == 1_100_048_384  # TinyLlama, untied
    with pytest.raises(KeyError):
        shape_of_config({"hidden_size": 1, "num_attention_heads": 1})


def test_spans_are_told_in_one_unit() -> None:
    assert span_text(3600, 9000) == "1.0 to 2.5 h"
    assert span_text(86400 * 19, 86400 * 23) == "19 to 23 days"
    assert span_text(40, 40.2) == "40 s"


def test_another_machine_calibrates_with_its_own_framework(tmp_path: Path) -> None:
    order = CalibrateOrder(
        run="calibrate-1", domain="d", cycle=0, shape=PRESETS["nano"].shape, recipe=Recipe(),
        launch=LaunchSpec(twin="torch", threads_per_rank=3), seconds=5.0,
    )  # fmt: skip
    shipment = ship(
        order, home=tmp_path, run_folder=tmp_path / "runs" / "calibrate-1", twin="mlx", launch=LaunchSpec(twin="mlx")
    )
    assert isinstance(shipment.order, CalibrateOrder)
    assert shipment.order.launch == LaunchSpec(twin="mlx", threads_per_rank=3)
    assert (shipment.inputs, shipment.outputs) == ((), ())
