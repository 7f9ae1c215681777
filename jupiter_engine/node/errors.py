"""What a verb of the node runner answers when it cannot do what it was asked: kind, detail and next step."""

from __future__ import annotations


class NodeError(Exception):
    """A failure that crosses to the control wing as one JSON line and is shown to a person there.

    `kind` is a short slug that code may look at (usage, missing, timeout, ...), `detail` carries the facts of this
    machine, `fix` says what to do next and may be empty.
    """

    def __init__(self, kind: str, detail: str, fix: str = "") -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.fix = fix

    def record(self) -> dict[str, dict[str, str]]:
        """The error as it travels: {"error": {"kind", "detail", "fix"}}."""
        return {"error": {"kind": self.kind, "detail": self.detail, "fix": self.fix}}
