"""Sheets about machines: taking one in, and deciding about the key with which one presents itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widgets import Input

from jupiter_engine.errors import JupiterError
from jupiter_tui.screens.sheets import ConfirmSheet, Sheet, TypeSheet
from jupiter_tui.view.text import Line, one_line, pad, wrap
from jupiter_tui.widgets.lines import Bar, Pane

if TYPE_CHECKING:
    from jupiter_engine.api import Discovered, Offer, OfferedKey

ROLES: Final = ("hybrid", "generator", "trainer", "evaluator")
FIELDS: Final = ("host", "name", "user", "port")
COMPARE: Final = "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub"
"""Typed at a machine itself, it shows the fingerprint of its key."""


@dataclass(frozen=True)
class NodeWish:
    """A machine that somebody wants as a node, as typed."""

    host: str = ""
    name: str = ""
    role: str = "hybrid"
    user: str = ""
    port: str = ""

    def problem(self) -> str:
        """Why this cannot be; empty if it can."""
        if not self.host:
            return "a host is needed: a name or address that ssh reaches"
        if self.port and not (self.port.isdecimal() and 1 <= int(self.port) <= 65535):
            return f"{self.port} is no port; ssh's own is 22"
        return ""

    def fields(self) -> dict[str, Any]:
        """As the cluster file names them, without what was left out."""
        given: dict[str, Any] = {"host": self.host, "name": self.name, "role": self.role, "ssh_user": self.user}
        found = {key: value for key, value in given.items() if value}
        return {**found, "ssh_port": int(self.port)} if self.port else found


class Pick(Bar, can_focus=True):
    """One of a few words; left, right and space change it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right,space", "turn(1)", "next", show=False),
        Binding("left", "turn(-1)", "before", show=False),
    ]

    def __init__(self, label: str, words: tuple[str, ...], value: str) -> None:
        super().__init__()
        self._label, self._words, self.value = label, words, value

    def on_mount(self) -> None:
        self._draw()

    def action_turn(self, step: int) -> None:
        self.value = self._words[(self._words.index(self.value) + step) % len(self._words)]
        self._draw()

    def _draw(self) -> None:
        words: Line = [(pad(self._label, 8), "dim")]
        for word in self._words:
            words += [(f"[{word}]" if word == self.value else f" {word} ", "bold" if word == self.value else "dim")]
        self.show(lambda _: [words])


class AddSheet(Sheet[NodeWish]):
    """Host, name, role, user, port; what ssh's config and the local network offer is filled in by up and down."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "offer(-1)", "offer before", show=False, priority=True),
        Binding("down", "offer(1)", "next offer", show=False, priority=True),
        Binding("enter", "take", "take it in", show=False, priority=True),
    ]

    def __init__(self, wish: NodeWish, discover: Callable[[], Awaitable[Discovered]]) -> None:
        hint = "up and down fill in a machine that was found; tab goes on; enter calls it, escape leaves"
        super().__init__("Add a node", [[(hint, "dim")]])
        self._wish = wish
        self._discover = discover
        self._offers: tuple[Offer, ...] = ()
        self._notes: tuple[str, ...] = ()
        self._listening = True
        self._at = -1

    def answers(self) -> ComposeResult:
        for field in FIELDS:
            with Horizontal():
                yield Bar(id=f"label-{field}", classes="label")
                yield Input(getattr(self._wish, field), id=f"add-{field}", placeholder=_HINTS[field])
        yield Pick("role", ROLES, self._wish.role)
        yield Pane("Found", id="offers")

    def on_mount(self) -> None:
        super().on_mount()
        for field in FIELDS:
            self.query_one(f"#label-{field}", Bar).show(lambda _, name=field: [[(name, "dim")]])  # type: ignore[misc]
        self._show_offers()
        self.query_one("#add-host", Input).focus()
        self._listen()

    @work
    async def _listen(self) -> None:
        try:
            found = await self._discover()
        except JupiterError as error:
            self._notes = (error.sentence(),)
        else:
            self._offers, self._notes = found.offers, found.notes
        self._listening = False
        self._show_offers()

    def _show_offers(self) -> None:
        self.query_one("#offers", Pane).show(self._offer_lines)

    def _offer_lines(self, width: int) -> list[Line]:
        lines: list[Line] = []
        for number, offer in enumerate(self._offers):
            where = " ".join(filter(None, (offer.address, f"port {offer.port}" if offer.port else "", offer.user)))
            chosen = number == self._at
            lines.append(
                [
                    ("> " if chosen else "  ", "title"),
                    (pad(one_line(offer.host), 26), "bold" if chosen else ""),
                    (f" {pad(one_line(where), 24)} {offer.source}", "dim"),
                ]
            )
        if self._listening:
            lines.append([("  .. ", "accent"), ("reading ssh's config, listening to the local network", "dim")])
        elif not self._offers:
            lines.append([("  nothing was found; any host that ssh reaches can be typed", "dim")])
        return lines + [line for note in self._notes for line in wrap(one_line(note), width, "dim", indent="  ")]

    def action_offer(self, step: int) -> None:
        if not self._offers:
            return
        self._at = max(0, min(len(self._offers) - 1, self._at + step))
        offer = self._offers[self._at]
        # An alias of ssh's config brings its user and port with it.
        own = offer.source != "ssh config"
        name = offer.host.partition(".")[0].lower()
        values = {
            "host": offer.host,
            "name": name if name != offer.host else "",
            "user": offer.user if own else "",
            "port": str(offer.port) if own and offer.port else "",
        }
        for field, value in values.items():
            self.query_one(f"#add-{field}", Input).value = value
        self._show_offers()
        self.query_one("#offers", Pane).reveal(self._at)

    def action_take(self) -> None:
        typed = {field: self.query_one(f"#add-{field}", Input).value.strip() for field in FIELDS}
        wish = replace(NodeWish(**typed), role=self.query_one(Pick).value)
        user, at, host = wish.host.rpartition("@")
        if at and not wish.user:
            wish = replace(wish, user=user, host=host)
        problem = wish.problem()
        if problem:
            self.notify(problem, severity="warning", markup=False)
        else:
            self.dismiss(wish)


_HINTS: Final = {
    "host": "name, address or alias of ~/.ssh/config",
    "name": "what people call it; left out: the host",
    "user": "left out: ssh's own choice",
    "port": "left out: ssh's own choice",
}


def key_sheet(key: OfferedKey, who: str) -> Sheet[bool]:
    """A question about a key that is not trusted. One that has changed wants the machine's name typed."""
    name = one_line(who)
    where = f"{one_line(key.host)}, port {key.port}"
    shown: list[Line] = [
        [(f"{name} ({where}) presents its {one_line(key.algorithm)} key", "")],
        [(one_line(key.fingerprint), "bold")],
        [],
        [(f"Compare with `{COMPARE}` typed at the machine itself.", "")],
    ]
    if key.standing != "changed":
        sheet = ConfirmSheet("Is this its key?", "")
        sheet.say([*shown, [], [("y it is the same   n it is not, or I do not know", "title")]])
        return sheet
    warning: list[Line] = [
        [(f"THE KEY OF {name} HAS CHANGED.", "bad")],
        [("Either the machine was set up anew, or another machine answers in its place.", "warn")],
        *[[(f"known until now: {one_line(text)}", "")] for text in key.known],
        [],
    ]
    return TypeSheet("The key has changed", [*warning, *shown], name)
