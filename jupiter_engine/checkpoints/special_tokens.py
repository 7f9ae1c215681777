"""A tokenizer's files against its model: every id has a row in the embedding, special tokens mean the same in both.

Read from JSON alone, before any graph is built: a wrong id would end in an
index error deep inside a kernel, or in a model that never stops.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from jupiter_engine.errors import ModelInvalid

REDO = "copy the folder again from where it came from, or prepare the model anew"
_OTHER = "use the tokenizer that belongs to the model"


class SpecialIds(msgspec.Struct, frozen=True, kw_only=True):
    """Ids that mean something to a generator; None and () where nothing is said."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


def check(folder: Path, stated: SpecialIds, vocab_size: int) -> SpecialIds:
    """Compare the tokenizer's files with what config.json states; return both together.

    What config.json leaves open is taken from tokenizer_config.json. Raises
    ModelInvalid for an id outside the embedding's `vocab_size` rows (in the
    vocabulary, among added tokens, as bos, eos or pad), for a special token
    that the vocabulary does not hold, and for a bos or eos token that
    config.json numbers otherwise.
    """
    path = folder / "tokenizer.json"
    ids = _ids_of_tokens(path)
    if max(ids.values()) >= vocab_size:
        raise ModelInvalid(
            f"{path} uses token ids up to {max(ids.values())}, the embedding has {vocab_size} rows", fix=_OTHER
        )
    for name, one in (("bos", stated.bos), ("pad", stated.pad), *(("eos", eos) for eos in stated.eos)):
        if one is not None and not 0 <= one < vocab_size:
            raise ModelInvalid(
                f"{folder}/config.json: {name}_token_id {one} is outside the vocabulary of {vocab_size}", fix=REDO
            )
    settings = folder / "tokenizer_config.json"
    values = load_json(settings) if settings.exists() else {}
    _check_added(folder, values, vocab_size)
    bos = _agreed(settings, "bos", values, ids, () if stated.bos is None else (stated.bos,))
    eos = _agreed(settings, "eos", values, ids, stated.eos)
    # Padding is never attended to nor counted, and published folders often disagree on it: any id that exists will do.
    pad = _agreed(settings, "pad", values, ids, ())
    return SpecialIds(
        bos=bos if stated.bos is None else stated.bos,
        eos=stated.eos or (() if eos is None else (eos,)),
        pad=pad if stated.pad is None else stated.pad,
    )


def _ids_of_tokens(path: Path) -> dict[str, int]:
    """Token -> id from tokenizer.json; a Unigram vocabulary is a list of [token, score]."""
    values = load_json(path)
    try:
        vocab = values["model"]["vocab"]
        if isinstance(vocab, list):
            ids = {str(piece[0]): number for number, piece in enumerate(vocab)}
        else:
            ids = {str(token): int(number) for token, number in vocab.items()}
        ids |= {str(token["content"]): int(token["id"]) for token in values.get("added_tokens") or []}
        smallest = min(ids.values())
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ModelInvalid(f"{path} holds no vocabulary of a known form", fix=REDO) from error
    if smallest < 0:
        raise ModelInvalid(f"{path} uses the token id {smallest}", fix=REDO)
    return ids


def _check_added(folder: Path, settings: Mapping[str, Any], vocab_size: int) -> None:
    """Tokens that other readers would add to the vocabulary: in tokenizer_config.json, and in the older file."""
    added: dict[str, int] = {}
    try:
        for number, token in (settings.get("added_tokens_decoder") or {}).items():
            added[str(token["content"]) if isinstance(token, dict) else str(token)] = int(number)
        if (folder / "added_tokens.json").exists():
            added |= {str(token): int(number) for token, number in load_json(folder / "added_tokens.json").items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelInvalid(f"{folder}: the list of added tokens is of no known form", fix=REDO) from error
    for token, number in added.items():
        if not 0 <= number < vocab_size:
            raise ModelInvalid(
                f"{folder}: the added token {token!r} has the id {number}, the embedding has {vocab_size} rows",
                fix="use the model whose embedding was made larger for the added tokens, or the tokenizer without them",
            )


def _agreed(
    path: Path, name: str, settings: Mapping[str, Any], ids: Mapping[str, int], stated: tuple[int, ...]
) -> int | None:
    """Id of the tokenizer's own bos, eos or pad token; None where it names none."""
    token = settings.get(f"{name}_token")
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str):
        return None
    if token not in ids:
        raise ModelInvalid(
            f"{path}: {name}_token is {token!r}, which tokenizer.json does not hold; it would become an id that the "
            "embedding has no row for",
            fix=_OTHER,
        )
    if stated and ids[token] not in stated:
        listed = ", ".join(str(one) for one in stated)
        raise ModelInvalid(
            f"{path}: {name}_token {token!r} has the id {ids[token]}, config.json says {name}_token_id {listed}",
            fix=f"make {name}_token_id in config.json and {name}_token in tokenizer_config.json the same token",
        )
    return ids[token]


def load_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise ModelInvalid(f"{path} is missing", fix=REDO) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelInvalid(f"{path} cannot be read: {error}", fix=REDO) from error
