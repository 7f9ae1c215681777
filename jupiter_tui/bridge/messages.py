"""What the bridge's threads say to the app."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from textual.message import Message

from jupiter_engine.errors import JupiterError
from jupiter_tui.view.picture import Picture

if TYPE_CHECKING:
    from jupiter_engine.api import OfferedKey


class Pictured(Message):
    """The workspace as it is now."""

    def __init__(self, picture: Picture) -> None:
        super().__init__()
        self.picture = picture

    def can_replace(self, message: Message) -> bool:
        return isinstance(message, Pictured)


class Broken(Message):
    """The workspace could not be opened or read; the console cannot go on."""

    def __init__(self, error: JupiterError) -> None:
        super().__init__()
        self.error = error


class KeyAsked(Message):
    """A machine presents a key that is not trusted; whoever handles this sets the answer."""

    def __init__(self, key: OfferedKey, who: str, answer: Future[bool]) -> None:
        super().__init__()
        self.key = key
        self.who = who
        """Whose key it is: the machine, or a jump host before it."""
        self.answer = answer
