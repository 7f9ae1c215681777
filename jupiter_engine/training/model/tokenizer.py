"""Train a byte-level BPE tokenizer on a domain's own text, with chat markers and a chat template.

Byte-level means lossless: every text, code with any indentation included,
decodes to itself. Digits are separate tokens and line indentation may merge
into one token, which suits source code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from jupiter_engine.checkpoints.model_folder import publish
from jupiter_engine.errors import NotEnoughData
from jupiter_engine.files import write_atomic

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
"""Ids 0, 1 and 2 of every tokenizer trained here."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML. `tokenizer_config.json` carries it, where transformers, mlx-lm and vLLM look for it."""

_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
"""GPT-2's pattern with single digits; newlines stay with the punctuation or blanks before them."""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE over `texts`, at most `vocab_size` ids (256 bytes and the special tokens included).

    The same texts in the same order give the same tokenizer. Too little text
    for the vocabulary gives fewer ids; no text at all is NotEnoughData.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}, a byte-level tokenizer needs at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = _Counter(texts)
    tokenizer.train_from_iterator(seen, trainer=trainer)
    if not seen.characters:
        raise NotEnoughData("there is no text to train a tokenizer on", fix="add sources to the domain")
    return tokenizer


class _Counter:
    """Passes texts on and counts their characters."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.characters += len(text)
            yield text


def write_tokenizer(folder: Path, tokenizer: Tokenizer, *, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json so that transformers and mlx-lm open them."""
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": CHAT_TEMPLATE,
    }
    write_atomic(folder / "tokenizer_config.json", msgspec.json.format(msgspec.json.encode(settings), indent=2) + b"\n")


def publish_tokenizer(target: Path, tokenizer: Tokenizer, *, context: int) -> None:
    """A folder that TextCodec and write_scratch open: the tokenizer's files and the ids that end an answer."""
    with publish(target) as folder:
        write_tokenizer(folder, tokenizer, context=context)
        ends = [tokenizer.token_to_id(token) for token in (TURN_END, END_OF_TEXT)]
        ids = {"eos_token_id": ends, "pad_token_id": ends[1]}
        write_atomic(folder / "config.json", msgspec.json.encode(ids))
