"""Small sheets over a page: questions before something happens, and help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input

from jupiter_tui import actions
from jupiter_tui.view.picture import Picture
from jupiter_tui.view.text import Line, one_line, pad, wrap
from jupiter_tui.widgets.lines import Bar, Pane, bordered

R = TypeVar("R")


class Sheet(ModalScreen[R | None]):
    """Base: a titled box with lines; escape gives None."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "back", show=False)]

    def __init__(self, title: str, lines: list[Line]) -> None:
        super().__init__()
        self._title = title
        self._lines = lines

    def compose(self) -> ComposeResult:
        with Vertical(classes="sheet") as box:
            box.border_title = bordered(self._title)
            text = Bar(classes="sheet-text")
            yield text
            yield from self.answers()

    def answers(self) -> ComposeResult:
        """The widgets below the text."""
        yield from ()

    def on_mount(self) -> None:
        self._show()

    def on_resize(self) -> None:
        self._show()

    def _show(self) -> None:
        text = self.query_one(".sheet-text", Bar)
        width = min(72, self.app.size.width - 8)
        wrapped = [piece for line in self._lines for piece in (_wrapped(line, width) or [[]])]
        text.styles.height = len(wrapped)
        text.show(lambda _: wrapped)

    def action_leave(self) -> None:
        self.dismiss(None)


def _wrapped(line: Line, width: int) -> list[Line]:
    return wrap(line[0][0], width, line[0][1]) if len(line) == 1 else [line]


class ConfirmSheet(Sheet[bool]):
    """A yes/no question; anything but y means no."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "yes", show=False),
        Binding("n,enter", "answer(False)", "no", show=False),
    ]

    def __init__(self, title: str, question: str) -> None:
        super().__init__(title, [[(question, "")], [], [("y yes   n no", "title")]])

    def say(self, lines: list[Line]) -> None:
        """Ask with these lines instead, which name the keys themselves."""
        self._lines = lines

    def action_answer(self, yes: bool) -> None:  # noqa: FBT001 - comes from a binding
        self.dismiss(yes)


class TypeSheet(Sheet[bool]):
    """Done only after a word has been typed exactly."""

    def __init__(self, title: str, lines: list[Line], word: str) -> None:
        super().__init__(title, [*lines, [], [(f"Type  {word}  and press enter, or escape to leave.", "title")]])
        self.word = word

    def answers(self) -> ComposeResult:
        yield Input(placeholder=one_line(self.word), select_on_focus=False)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if event.value.strip() == self.word:
            self.dismiss(True)
        else:
            self.notify(f"that is not {self.word}; nothing was done", severity="warning", markup=False)


class AskSheet(Sheet[str]):
    """One line of text; escape gives None, enter what stands there."""

    def __init__(self, title: str, lines: list[Line], *, value: str = "", placeholder: str = "") -> None:
        super().__init__(title, lines)
        self._value, self._placeholder = value, placeholder

    def answers(self) -> ComposeResult:
        yield Input(self._value, placeholder=self._placeholder)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.dismiss(event.value.strip())


class ChoiceSheet(Sheet[str]):
    """One of a few answers by digit, or typed words."""

    def __init__(
        self, title: str, choices: tuple[str, ...], *, placeholder: str = "or type it and press enter"
    ) -> None:
        super().__init__(title, [[(f"{i}  {choice}", "")] for i, choice in enumerate(choices, 1)])
        self._choices = choices
        self._placeholder = placeholder

    def answers(self) -> ComposeResult:
        yield Input(placeholder=self._placeholder)

    def on_input_changed(self, event: Input.Changed) -> None:
        """A digit as the first letter chooses at once."""
        if len(event.value) == 1 and event.value.isdigit() and 1 <= int(event.value) <= len(self._choices):
            self.dismiss(self._choices[int(event.value) - 1])

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if event.value.strip():
            self.dismiss(event.value.strip())


@dataclass(frozen=True)
class StartWish:
    """How cycles shall be started."""

    cycles: int
    auto: bool


class StartSheet(Sheet[StartWish]):
    """How many cycles, and who decides."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("m", "mode", "mode", show=False),
        Binding("plus,equals_sign,up,right", "count(1)", "more", show=False),
        Binding("minus,down,left", "count(-1)", "fewer", show=False),
        Binding("enter,y", "start", "start", show=False),
        Binding("n", "leave", "back", show=False),
    ]

    def __init__(self, domain: str, picture: Picture) -> None:
        super().__init__(f"Start cycles of {domain}", [])
        self._domain = domain
        self._picture = picture
        self._cycles, self._auto = 1, False
        self._plan: list[Line] = [[("plan       being worked out", "dim")]]

    def planned(self, lines: list[Line]) -> None:
        """Show what the planner says about the training."""
        self._plan = lines
        if self.is_mounted:
            self._show()

    def _show(self) -> None:
        mode, who = (
            ("auto", "filters and gate decide everything")
            if self._auto
            else ("interactive", "the domain's review and the promotion wait for you")
        )
        self._lines = [
            [("cycles  ", "dim"), (str(self._cycles), "bold"), ("    + more, - fewer", "dim")],
            [("mode    ", "dim"), (mode, "bold"), ("    m changes it", "dim")],
            [("        ", "dim"), (who, "")],
            [],
            *self._plan,
            [],
            [("enter starts, escape leaves", "title")],
        ]
        unfinished = [
            c
            for c in self._picture.state.cycles.values()
            if c.domain == self._domain and c.status in ("paused", "failed")
        ]
        if unfinished:
            self._lines.insert(
                0, [(f"Cycle {unfinished[-1].number} is {unfinished[-1].status}: it is continued first.", "warn")]
            )
        super()._show()

    def action_mode(self) -> None:
        self._auto = not self._auto
        self._show()

    def action_count(self, step: int) -> None:
        self._cycles = max(1, min(999, self._cycles + step))
        self._show()

    def action_start(self) -> None:
        self.dismiss(StartWish(self._cycles, self._auto))


class TextSheet(Sheet[None]):
    """Lines to read and scroll; any of escape, q, enter closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,enter,question_mark,exclamation_mark", "leave", "back", show=False)
    ]

    def compose(self) -> ComposeResult:
        pane = Pane(self._title, classes="sheet tall")
        yield pane

    def _show(self) -> None:
        pane = self.query_one(Pane)
        pane.show(lambda width: [piece for line in self._lines for piece in (_wrapped(line, width) or [[]])])
        pane.focus()


def help_sheet(page: str, title: str, *, read_only: bool) -> TextSheet:
    """The keys of a page and those that work everywhere."""
    lines: list[Line] = []
    shown = [a for a in actions.for_page(page) if not (a.mutates and read_only)]
    for heading, group in (
        (title, [a for a in shown if a.page != "*"]),
        ("Everywhere", [a for a in shown if a.page == "*"]),
    ):
        lines.append([(heading, "title"), ("", "")])
        for action in group:
            keys = " ".join(actions.shown(k) for k in action.keys.split(",") if k != "equals_sign")
            lines.append([(pad(f"  {keys}", 14), "bold"), (action.help, "")])
        lines.append([])
    lines += [[(pad(f"  {keys}", 20), "bold"), (text, "")] for keys, text in actions.SCROLL_HELP]
    marks = "ok done   .. running   !! wrong   ** waits for you   == halted   -- not yet"
    lines += [[], [("Marks", "title"), ("", "")], [("  " + marks, ""), ("", "")]]
    return TextSheet(f"Keys: {title}", lines)
