"""Composes the console: themes, pages, the bridge. Nothing else happens here."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from textual.app import App, SystemCommand
from textual.binding import BindingType
from textual.dom import DOMNode
from textual.screen import Screen
from textual.theme import Theme

from jupiter_engine.errors import JupiterError
from jupiter_tui import actions
from jupiter_tui.bridge import Bridge, Broken, KeyAsked, Opener, Pictured
from jupiter_tui.screens.desk import Desk
from jupiter_tui.screens.page import Page, bindings
from jupiter_tui.view.header import PAGES, alerts
from jupiter_tui.view.text import Line, clock, mark, one_line
from jupiter_tui.widgets.ink import AsciiOnly

# Okabe and Ito's palette, lightened or darkened for the ground: told apart by colour-blind eyes too.
DARK = Theme(
    name="jupiter-dark",
    primary="#7fb4e6",
    secondary="#a8b8c8",
    accent="#56b4e9",
    success="#35c49a",
    warning="#e6b422",
    error="#ee7f4a",
    background="#10141a",
    surface="#171d26",
    panel="#1c2430",
    foreground="#d6dde6",
    variables={"border-blurred": "#3a4656"},
)
LIGHT = Theme(
    name="jupiter-light",
    primary="#0b5a94",
    secondary="#4a5866",
    accent="#0072b2",
    success="#00724f",
    warning="#8a6100",
    error="#b03a00",
    background="#fbfbf8",
    surface="#f2f2ec",
    panel="#e6e8e6",
    foreground="#1b2026",
    dark=False,
    variables={"border-blurred": "#b4bcc4"},
)
MONO = Theme(
    name="jupiter-mono",
    primary="#ffffff",
    secondary="#c8c8c8",
    accent="#e8e8e8",
    success="#e8e8e8",
    warning="#ffffff",
    error="#ffffff",
    background="#000000",
    surface="#101010",
    panel="#202020",
    foreground="#d0d0d0",
    variables={"border-blurred": "#606060"},
)
THEMES = {"dark": DARK.name, "light": LIGHT.name, "mono": MONO.name, "ansi": "ansi-dark", "ansi-light": "ansi-light"}


def page(name: str, desk: Desk) -> Page:
    """Make one of the six pages. Its module is imported now: only the first page's may delay the first frame."""
    module = importlib.import_module(f"jupiter_tui.screens.{name}")
    made: Page = getattr(module, f"{name.capitalize()}Page")(desk)
    return made


class ConsoleApp(App[JupiterError]):
    """The console. Its result is the error that ended it, None after a plain detach."""

    CSS_PATH = "console.tcss"
    TITLE = "jupiter"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = bindings("*")

    def __init__(
        self,
        *,
        workspace: Path | None = None,
        domain: str = "",
        read_only: bool = False,
        ascii_only: bool = False,
        theme: str = "dark",
        opener: Opener | None = None,
    ) -> None:
        super().__init__()
        self.desk = Desk(
            Bridge(self.post_message, workspace=workspace, domain=domain, opener=opener), read_only=read_only
        )
        for own in (DARK, LIGHT, MONO):
            self.register_theme(own)
        self.theme = THEMES[theme]
        if ascii_only:
            self._filters.append(AsciiOnly())
        for name, _ in PAGES:
            self.add_mode(name, partial(page, name, self.desk))

    def on_mount(self) -> None:
        self.switch_mode("train")
        # The workspace is opened after the first frame, so that something is seen at once.
        self.call_after_refresh(self.desk.bridge.start)

    def on_unmount(self) -> None:
        self.desk.bridge.stop()

    # -- what the bridge says --------------------------------------------------------------------
    def on_pictured(self, message: Pictured) -> None:
        self.desk.picture = message.picture
        front = next((s for s in reversed(self.screen_stack) if isinstance(s, Page)), None)
        if front is not None:
            front.show(message.picture)

    def on_broken(self, message: Broken) -> None:
        self.exit(message.error)

    def on_key_asked(self, message: KeyAsked) -> None:
        """A person decides about a machine's key, whichever page is in front."""
        from jupiter_tui.screens.machines import key_sheet

        def answered(yes: bool | None) -> None:  # noqa: FBT001 - Textual's callback has one value
            message.answer.set_result(bool(yes))

        self.push_screen(key_sheet(message.key, message.who), answered)

    def notify(self, message: str, *, title: str = "", markup: bool = False, **options: Any) -> None:
        """A message over the page. Names of machines and words of tools stand in such: nothing of them is obeyed."""
        super().notify(one_line(message), title=one_line(title), markup=markup, **options)

    # -- actions ---------------------------------------------------------------------------------
    def action_page(self, name: str) -> None:
        self.switch_mode(name)

    def action_detach(self) -> None:
        self.exit()

    def action_help(self) -> None:
        if isinstance(self.screen, Page):
            from jupiter_tui.screens.sheets import help_sheet

            name = self.screen.PAGE
            self.push_screen(help_sheet(name, dict(PAGES)[name], read_only=self.desk.read_only))

    def action_alerts(self) -> None:
        from jupiter_tui.screens.sheets import TextSheet

        picture = self.desk.picture
        lines: list[Line] = [[(f"{'!!' if kind == 'bad' else '**'} {text}", kind)] for kind, text in alerts(picture)]
        lines = lines or [[mark("ok"), (" nothing is wrong and nothing waits", "")]]
        lines += [[], [("Notices, newest first", "title"), ("", "")]]
        for notice in reversed(picture.state.notices[-100:]):
            level = {"error": "bad", "warning": "warn"}.get(notice.level, "")
            where = f"{notice.cycle or ''} {notice.stage or ''}".strip()
            lines.append([(f"{clock(notice.at)}  {where}  {one_line(notice.text)}", level)])
        self.push_screen(TextSheet("Alerts", lines))

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The palette: every action of the page and of the app that works now."""
        name_of_page = screen.PAGE if isinstance(screen, Page) else ""
        for action in actions.for_page(name_of_page):
            name = action.name.partition("(")[0]
            if name == "command_palette":
                continue
            allowed = screen.check_action(name, ()) is True if action.page != "*" else True
            if allowed:
                run = self._runner(action.name, screen if action.page != "*" else self)
                where = "page: " if name == "page" else ""
                yield SystemCommand(f"{where}{action.label}  ({action.shown_key})", action.help, run)
        for title, theme in THEMES.items():
            yield SystemCommand(
                f"theme: {title}", "Change the colours", lambda theme=theme: setattr(self, "theme", theme)
            )

    def _runner(self, action: str, namespace: DOMNode) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            await self.run_action(action, namespace)

        return run
