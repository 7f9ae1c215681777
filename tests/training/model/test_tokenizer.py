"""Tokenizers trained here lose nothing and are the same every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupiter_engine.errors import NotEnoughData
from jupiter_engine.training.model.text import TextCodec
from jupiter_engine.training.model.tokenizer import SPECIAL_TOKENS, train_tokenizer

CODE = st.text(alphabet=st.sampled_from("abxyz_ 0123456789\t\n\r()[]{}:=#'\"\\éß漢🤖\u200d\u0301<|>"), max_size=80)


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(CODE, st.text(max_size=60), st.sampled_from([f"a{token}b" for token in SPECIAL_TOKENS])))
def test_every_text_decodes_to_itself(tokenizer_codec: TextCodec, text: str) -> None:
    # Lone surrogates are no text: they cannot be written as UTF-8.
    text = text.encode("utf-8", "ignore").decode()
    ids = tokenizer_codec.encode(text)
    assert tokenizer_codec.decode(ids) == text
    assert not set(ids) & {0, 1, 2}, "text never makes a special token"


@pytest.fixture(scope="session")
def tokenizer_codec(tokenizer_folder: Path) -> TextCodec:
    return TextCodec(tokenizer_folder)


def test_the_standard_librarys_source_survives(tokenizer_codec: TextCodec) -> None:
    """Every module of the top level, as it stands: tabs, form feeds, odd letters and all."""
    paths = sorted(Path(json.__file__).parent.parent.glob("*.py"))
    assert len(paths) > 100
    for path in paths:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read()
        assert tokenizer_codec.decode(tokenizer_codec.encode(text)) == text, path.name


def test_digits_stay_apart(tokenizer_codec: TextCodec) -> None:
    assert len(tokenizer_codec.encode("2026")) == 4


def test_it_compresses_what_it_was_trained_on(tokenizer_codec: TextCodec, sources: list[str]) -> None:
    ids = tokenizer_codec.encode(sources[0])
    assert tokenizer_codec.bytes_per_token(ids) > 1.8
    assert tokenizer_codec.bytes_per_token([]) == 0.0


def test_the_same_texts_give_the_same_bytes(sources: list[str]) -> None:
    first, second = (train_tokenizer(sources, vocab_size=500).to_str() for _ in range(2))
    assert first == second
    assert train_tokenizer(sources, vocab_size=500).get_vocab_size() == 500


def test_special_tokens_have_the_first_ids(sources: list[str]) -> None:
    tokenizer = train_tokenizer(sources, vocab_size=300)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]


def test_no_text_is_refused() -> None:
    with pytest.raises(NotEnoughData, match="no text"):
        train_tokenizer([], vocab_size=500)
    with pytest.raises(ValueError, match="at least 259"):
        train_tokenizer(["x"], vocab_size=100)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # transformers' own warnings are not ours to fix
def test_transformers_reads_it_alike(tokenizer_folder: Path, tokenizer_codec: TextCodec, sources: list[str]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer_folder)
    for text in sources:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer_codec.encode(text)
    messages = [{"role": "user", "content": "What is 12?"}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(rendered) == tokenizer_codec.chat_prompt(messages)
