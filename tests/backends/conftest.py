"""Tiny random models that both twins load."""

from __future__ import annotations

from pathlib import Path

import pytest

from jupiter_engine.checkpoints.model_folder import ModelInfo, publish
from jupiter_engine.files import write_atomic
from jupiter_engine.training.model.presets import write_random
from jupiter_engine.training.model.tokenizer import train_tokenizer, write_tokenizer

PLAIN = ModelInfo(
    vocab_size=320, hidden_size=32, layers=2, heads=4, kv_heads=4, head_dim=8, intermediate_size=48, context=128,
    dtype="float32", eos_ids=(2, 0), pad_id=0,
)  # fmt: skip
GROUPED = ModelInfo(
    vocab_size=320, hidden_size=48, layers=3, heads=6, kv_heads=2, head_dim=8, intermediate_size=64, context=256,
    rope_theta=500000.0, rms_norm_eps=1e-6, tied=False, dtype="float32", eos_ids=(2,), pad_id=0,
)  # fmt: skip
SCALED = ModelInfo(
    vocab_size=320, hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=32, intermediate_size=48, context=512,
    rope_theta=10000.0, dtype="float32", eos_ids=(2,), pad_id=0,
    rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64.0,
    },
)  # fmt: skip
KINDS = {"plain": PLAIN, "grouped": GROUPED, "scaled": SCALED}


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model folder for each of KINDS."""
    root = tmp_path_factory.mktemp("tiny")
    with publish(root / "tokenizer") as folder:
        write_tokenizer(folder, train_tokenizer(["def f(x):\n    return x\n" * 4], vocab_size=300), context=128)
        write_atomic(folder / "config.json", b'{"eos_token_id": [2, 0]}')
    for name, info in KINDS.items():
        write_random(root / name, info, tokenizer=root / "tokenizer", seed=7)
    return {name: root / name for name in KINDS}
