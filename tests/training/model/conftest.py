"""A small tokenizer trained on this package's own source."""

from __future__ import annotations

from pathlib import Path

import pytest

import jupiter_engine
from jupiter_engine.checkpoints.model_folder import publish
from jupiter_engine.files import write_atomic
from jupiter_engine.training.model.tokenizer import train_tokenizer, write_tokenizer


@pytest.fixture(scope="session")
def sources() -> list[str]:
    root = Path(jupiter_engine.__file__).parent
    return [path.read_text("utf-8") for path in sorted((root / "protocol").glob("*.py"))]


@pytest.fixture(scope="session")
def tokenizer_folder(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("text") / "tokenizer"
    with publish(target) as folder:
        write_tokenizer(folder, train_tokenizer(sources, vocab_size=600), context=256)
        write_atomic(folder / "config.json", b'{"eos_token_id": [2, 0]}')
    return target
