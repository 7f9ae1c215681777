"""Text to token ids and back, with the model's own chat template; loads in a fraction of a second.

Uses `tokenizers` and jinja2 directly: transformers reads the same files but
takes seconds to import.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from jupiter_engine.errors import ModelInvalid

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""

_QUOTED = re.compile("(\ue0f0[0-9]+\ue0f1)")
"""Stands, between rendering and encoding, for a special token's text inside a message (private-use characters)."""

_REDO = "copy the tokenizer's files again from where the model came from"


class TextCodec:
    """The tokenizer of a model folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:
            # tokenizers raises plain Exception for every fault of the file.
            raise ModelInvalid(f"{folder / 'tokenizer.json'} cannot be read: {error}", fix=_REDO) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _optional_json(folder / "config.json")
        settings = _optional_json(folder / "tokenizer_config.json")
        self.bos_id = self._id_of(settings.get("bos_token"), config.get("bos_token_id"))
        self.eos_ids = self._eos_ids(config, settings)
        self.pad_id = self._id_of(settings.get("pad_token"), config.get("pad_token_id"))
        self._settings = settings
        self._template = self._chat_template(settings)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = sorted((token.content for token in added.values()), key=len, reverse=True)
        self._special_ids = set(added)
        self._spaced = self._tokenizer.encode("a", add_special_tokens=False).tokens[:1] not in ([], ["a"])

    # -- plain text ------------------------------------------------------------------------------
    @property
    def vocab_size(self) -> int:
        """Number of ids: the largest id in use plus one."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of `text` as it stands: a special token's name in it is read as its characters.

        With `bos` the model's beginning-of-text id is put first, where it has one.
        """
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are left out. Bytes cut in mid-character become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def bytes_per_token(self, ids: Sequence[int]) -> float:
        """UTF-8 bytes of the decoded text per token (0.0 for no tokens)."""
        return len(self.decode(ids).encode()) / len(ids) if ids else 0.0

    # -- chat ------------------------------------------------------------------------------------
    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation up to and including the header of the answer that is to come."""
        if self._template is None:
            return self.encode(_plain_chat(messages) + "Assistant:", bos=True)
        return self._encode_rendered(self._render(messages, prompt=True))

    def chat_example(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """A training conversation: ids, and a mask with 1 where assistant text and its end-of-turn stand.

        Each answer is located by rendering the conversation up to it, so any
        template that only appends works; another one is a ModelInvalid.
        """
        if self._template is None:
            return self._plain_example(messages)
        ids: list[int] = []
        mask: list[int] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            head = self._render(messages[:index], prompt=True)
            whole = self._render(messages[: index + 1], prompt=False)
            if not head.startswith(done) or not whole.startswith(head):
                raise ModelInvalid(
                    f"{self.folder}: the chat template rewrites earlier turns, so answers cannot be located in it",
                    fix="use a template that only appends turns (ChatML does)",
                )
            answer, ending = self._split_turn(whole[len(head) :])
            for part, counts in ((head[len(done) :], 0), (answer, 1), (ending, 0)):
                found = self._encode_rendered(part, after=ids)
                ids += found
                mask += [counts] * len(found)
            done = whole
        return ids, mask

    def _split_turn(self, text: str) -> tuple[str, str]:
        """An answer with its end-of-turn marker, and what the template puts after the marker (a newline)."""
        ends = [text.rfind(marker) + len(marker) for marker in self._eos_texts() if marker in text]
        cut = max(ends, default=len(text))
        return text[:cut], text[cut:]

    def _plain_example(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        ids: list[int] = [] if self.bos_id is None else [self.bos_id]
        mask = [0] * len(ids)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = max((i + 1 for i in range(index) if messages[i]["role"] == "assistant"), default=0)
            shown = self.encode(_plain_chat(messages[start:index]) + "Assistant:")
            counted = [*self.encode(f" {message['content'].strip()}"), *self.eos_ids[:1]]
            ids += shown + counted
            mask += [0] * len(shown) + [1] * len(counted)
        return ids, mask

    # -- parts -----------------------------------------------------------------------------------
    @property
    def _plain(self) -> Tokenizer:
        """The tokenizer reading special tokens in a text as the characters that they are written with."""
        self._tokenizer.encode_special_tokens = True
        return self._tokenizer

    def _encode_rendered(self, text: str, *, after: Sequence[int] = ()) -> list[int]:
        """Ids of rendered chat text: the template's special tokens count as such, those in messages as characters.

        `after`: what stands before it. Tokenizers of the SentencePiece kind (Llama 2, TinyLlama, Mistral) put a space
        before a text; one that goes on after other text must not get it, or training would see other ids than
        a prompt gives. After a special token they put it even within a text.
        """
        ids: list[int] = []
        for part in _QUOTED.split(text):
            before = ids[-1:] or list(after[-1:])
            goes_on = bool(before) and before[0] not in self._special_ids
            if quoted := _QUOTED.fullmatch(part):
                ids += self._encode_on(self._special[int(quoted[0][1:-1])], special=False, goes_on=goes_on)
            elif part:
                ids += self._encode_on(part, special=True, goes_on=goes_on)
        return ids

    def _encode_on(self, text: str, *, special: bool, goes_on: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = not special
        if goes_on and self._spaced:
            lead = self._tokenizer.encode("\n", add_special_tokens=False).ids
            whole: list[int] = self._tokenizer.encode(f"\n{text}", add_special_tokens=False).ids
            # A newline is a token of its own there, so what follows it is what follows any text.
            if whole[: len(lead)] == lead:
                return whole[len(lead) :]
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def _quote(self, message: Message) -> Message:
        """The message with special tokens' texts in its content replaced, so that no text can fake a turn."""
        content = message["content"]
        for number, special in enumerate(self._special):
            content = content.replace(special, f"\ue0f0{number}\ue0f1")
        return {**message, "content": content}

    def _render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        assert self._template is not None
        try:
            return self._template.render(
                messages=[self._quote(message) for message in messages],
                add_generation_prompt=prompt,
                bos_token=self._token_text("bos_token"),
                eos_token=self._token_text("eos_token"),
            )
        except jinja2.TemplateError as error:
            raise ModelInvalid(
                f"{self.folder}: the chat template failed: {error}", fix="check the roles of the messages"
            ) from error

    def _token_text(self, key: str) -> str:
        value = self._settings.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else ""

    def _eos_texts(self) -> list[str]:
        texts = (self._tokenizer.id_to_token(one) for one in self.eos_ids)
        return [text for text in texts if text]

    def _id_of(self, token: object, fallback: object) -> int | None:
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found: int | None = self._tokenizer.token_to_id(token)
            if found is not None:
                return found
        return fallback if isinstance(fallback, int) and not isinstance(fallback, bool) else None

    def _eos_ids(self, config: dict[str, Any], settings: dict[str, Any]) -> tuple[int, ...]:
        """Ids that end an answer: those of config.json first, then the tokenizer's own."""
        value = config.get("eos_token_id")
        listed = [value] if isinstance(value, int) else value if isinstance(value, list) else []
        own = self._id_of(settings.get("eos_token"), None)
        found = dict.fromkeys([*(one for one in listed if isinstance(one, int)), *([] if own is None else [own])])
        if not found:
            raise ModelInvalid(f"{self.folder} names no end-of-text token", fix="set eos_token_id in its config.json")
        return tuple(found)

    def _chat_template(self, settings: dict[str, Any]) -> jinja2.Template | None:
        source = settings.get("chat_template")
        path = self.folder / "chat_template.jinja"
        if path.exists():
            source = path.read_text("utf-8")
        if not isinstance(source, str):
            return None
        # The options that Hugging Face templates are written for; sandboxed, because a template is foreign code.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value: msgspec.json.encode(value).decode()
        try:
            return environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelInvalid(f"{self.folder}: the chat template cannot be read: {error}", fix=_REDO) from error


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _plain_chat(messages: Sequence[Message]) -> str:
    names = {"system": "", "user": "User: ", "assistant": "Assistant: "}
    return "".join(f"{names.get(one['role'], '')}{one['content'].strip()}\n\n" for one in messages)


def _optional_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelInvalid(f"{path} cannot be read: {error}", fix=_REDO) from error
