"""Domain: what the experts shall know."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import SuspendNotSupported
from textual.binding import BindingType
from textual.containers import Horizontal
from textual.widget import Widget

from jupiter_engine.errors import JupiterError
from jupiter_engine.protocol.state import CycleState
from jupiter_tui.screens.page import Page, bindings
from jupiter_tui.screens.sheets import AskSheet
from jupiter_tui.view.domain import domain_lines, domain_rows
from jupiter_tui.view.picture import DomainFile, Picture
from jupiter_tui.widgets.lines import Pane


class DomainPage(Page):
    PAGE = "domain"
    BINDINGS: ClassVar[list[BindingType]] = bindings("domain")
    AUTO_FOCUS = "#settings"

    _chosen = ""

    def body(self) -> Iterable[Widget]:
        with Horizontal(id="domain-columns"):
            yield Pane("Domains", id="domains")
            yield Pane("Settings", id="settings")

    def chosen(self) -> DomainFile | None:
        """The domain under the cursor; at first the one that the console is about."""
        domains = self.picture.domains
        names = [d.name for d in domains]
        name = self._chosen if self._chosen in names else self.picture.domain
        return next((d for d in domains if d.name == name), domains[0] if domains else None)

    def draw(self, picture: Picture) -> None:
        chosen = self.chosen()
        cursor = picture.domains.index(chosen) if chosen else -1
        rows = self.query_one("#domains", Pane)
        rows.show(lambda w: domain_rows(picture.domains, picture.state, cursor, w))
        rows.reveal(max(0, cursor))
        pane = self.query_one("#settings", Pane)
        if chosen is not None:
            last = _last_finished(picture, chosen.name)
            pane.show(lambda w: domain_lines(chosen, last, w))

    def available(self, action: str) -> bool:
        chosen = self.chosen()
        if action == "start":
            return chosen is not None and not chosen.problems
        return chosen is not None or action == "new"

    # -- actions ---------------------------------------------------------------------------------
    def action_move(self, step: int) -> None:
        names = [d.name for d in self.picture.domains]
        chosen = self.chosen()
        if chosen is None:
            return
        self._chosen = names[max(0, min(len(names) - 1, names.index(chosen.name) + step))]
        self.query_one("#settings", Pane).scroll_to(y=0, animate=False)
        self.desk.bridge.show_domain(self._chosen)
        self.show(self.picture)

    def action_start(self) -> None:
        if (chosen := self.chosen()) is not None:
            self.desk.bridge.show_domain(chosen.name)
            self.start_cycles(chosen.name)

    @work
    async def action_new(self) -> None:
        hint = "Small letters, digits, - and _. A file is made from the template; e opens it."
        name = await self.app.push_screen_wait(
            AskSheet("Name of the new domain", [[(hint, "dim")]], placeholder="my-domain")
        )
        if not name:
            return
        try:
            path = await self.desk.bridge.new_domain(name, "")
        except JupiterError as error:
            self.say(error.sentence(), bad=True)
            return
        self._chosen = name
        self.desk.bridge.show_domain(name)
        self.say(f"made {path}; put texts beside it and press e to edit")

    @work
    async def action_edit(self) -> None:
        chosen = self.chosen()
        if chosen is None:
            return
        try:
            path = await self.desk.bridge.domain_path(chosen.name)
        except JupiterError as error:
            self.say(error.sentence(), bad=True)
            return
        self._edit(path)

    def _edit(self, path: Path) -> None:
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
        try:
            with self.app.suspend():
                # The terminal is the editor's until it ends; the engine and its work go on meanwhile.
                subprocess.run([*shlex.split(editor), str(path)], check=False)
        except SuspendNotSupported:
            self.say(f"this terminal cannot be handed to an editor; edit {path} elsewhere, the page follows", bad=True)
        except (OSError, ValueError) as error:
            self.say(f"the editor {editor} did not start: {error}; set $EDITOR", bad=True)
        self.refresh()


def _last_finished(picture: Picture, domain: str) -> CycleState | None:
    mine = [c for c in picture.state.cycles.values() if c.domain == domain and c.status == "finished"]
    return mine[-1] if mine else None
