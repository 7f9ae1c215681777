"""What every page has: title, tabs, alert and keys around its own body."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.events import Click
from textual.screen import Screen
from textual.widget import Widget

from jupiter_engine.errors import JupiterError
from jupiter_tui import actions
from jupiter_tui.screens.desk import Desk
from jupiter_tui.view.header import alert_line, tab_at, tabs_line, title_line
from jupiter_tui.view.picture import Picture
from jupiter_tui.view.text import Line, plain
from jupiter_tui.widgets.lines import Bar

SMALLEST = (60, 16)


def bindings(page: str) -> list[BindingType]:
    """The registry's actions of a page (`*`: of the app) as Textual bindings."""
    return [
        Binding(a.keys, a.name, a.label, show=a.footer, tooltip=a.help, id=f"{page}.{a.name}")
        for a in actions.ACTIONS
        if a.page == page
    ]


class Page(Screen[None]):
    """Base of the six pages. Subclasses give PAGE, `body`, `draw` and their actions."""

    PAGE: ClassVar[str] = ""
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-normal"), (160, "-wide")]  # noqa: RUF012 - Textual declares it so
    VERTICAL_BREAKPOINTS = [(0, "-low"), (32, "-tall")]  # noqa: RUF012 - Textual declares it so

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self.desk = desk
        self._open_actions: tuple[bool, ...] = ()
        self._ready = False

    # -- for subclasses --------------------------------------------------------------------------
    def body(self) -> Iterable[Widget]:
        """The page's own widgets."""
        return ()

    def draw(self, picture: Picture) -> None:
        """Show the picture in the page's own widgets."""

    def available(self, action: str) -> bool:  # noqa: ARG002 - the default asks nothing
        """Whether an action makes sense now; others are neither shown nor carried out."""
        return True

    # -- frame -----------------------------------------------------------------------------------
    def compose(self) -> ComposeResult:
        yield Bar(id="too-small")
        with Vertical(id="frame"):
            yield Bar(id="title")
            yield Bar(id="tabs")
            with Vertical(id="body"):
                yield from self.body()
            yield Bar(id="alert")
            yield Bar(id="keys")

    def on_mount(self) -> None:
        self._ready = True
        self.show(self.desk.picture)

    def on_unmount(self) -> None:
        self._ready = False

    def on_screen_resume(self) -> None:
        self.show(self.desk.picture)

    def on_resize(self) -> None:
        self.show(self.desk.picture)

    def _fit(self) -> None:
        width, height = self.app.size
        small = width < SMALLEST[0] or height < SMALLEST[1]
        self.set_class(small, "-small")
        text = (
            f"jupiter needs a terminal of {SMALLEST[0]}x{SMALLEST[1]}; this one is {width}x{height}. The work goes on."
        )
        self.query_one("#too-small", Bar).show(lambda w: [[(text[i : i + w], "warn")] for i in range(0, len(text), w)])

    async def on_click(self, event: Click) -> None:
        """A click on a tab opens its page; everything works by key too."""
        bar = self.query_one("#tabs", Bar)
        if event.widget is bar:
            name = tab_at(self.picture, self.PAGE, bar.size.width, event.x)
            if name is not None:
                await self.app.run_action(f"page('{name}')")

    def show(self, picture: Picture) -> None:
        """Draw everything; called for each new picture while the page is in front."""
        if not self._ready or self._pruning:
            # Textual resumes and resizes a screen before its widgets are there and takes them away before it says
            # so; pictures come at any time.
            return
        self._fit()
        self.query_one("#title", Bar).show(lambda w: [title_line(picture, w, read_only=self.desk.read_only)])
        self.query_one("#tabs", Bar).show(lambda w: [tabs_line(picture, self.PAGE, w)])
        self.query_one("#alert", Bar).show(lambda w: [alert_line(picture, w)])
        self.draw(picture)
        self.update_keys()

    @property
    def picture(self) -> Picture:
        return self.desk.picture

    def update_keys(self) -> None:
        """The footer from the bindings that work now."""
        mine = actions.for_page(self.PAGE)
        now = tuple(self.check_action(a.name.partition("(")[0], ()) is True for a in mine)
        if now != self._open_actions:
            self._open_actions = now
            self.refresh_bindings()
        self.query_one("#keys", Bar).show(self._key_line)

    def _key_line(self, width: int) -> list[Line]:
        live = self.active_bindings
        left: list[Line] = []
        right: Line = []
        for action in actions.for_page(self.PAGE):
            first = action.keys.split(",")[0]
            binding = live.get(first)
            if not action.footer or binding is None or not binding.enabled:
                continue
            part: Line = [(action.shown_key, "title"), (f" {action.label}  ", "")]
            if action.page == "*":
                right += part
            else:
                left.append(part)
        line: Line = [(" ", "")]
        room = width - len(plain(right))
        for part in left:
            # Whole keys only: half a key helps nobody, and ? shows them all.
            if len(plain(line)) + len(plain(part)) <= room:
                line += part
        return [[*line, (" " * (room - len(plain(line))), ""), *right]]

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002 - Textual's signature
        known = next((a for a in actions.ACTIONS if a.page == self.PAGE and a.name.partition("(")[0] == action), None)
        if known is None:
            return True
        if known.mutates and (self.desk.read_only or not self.picture.loaded):
            return False
        return self.available(action)

    # -- asking the engine -----------------------------------------------------------------------
    def say(self, text: str, *, bad: bool = False) -> None:
        """A short message over the page."""
        self.notify(text, severity="error" if bad else "information", timeout=8 if bad else 4, markup=False)

    async def tried(self, asked: Awaitable[object], done: str = "") -> bool:
        """Await something of the bridge; an expected failure becomes a message and False."""
        try:
            await asked
        except JupiterError as error:
            self.say(error.sentence(), bad=True)
            return False
        if done:
            self.say(done)
        return True

    @work
    async def plan_start(self, domain: str, show: Callable[[list[Line]], None]) -> None:
        """Ask the planner about a domain's training, and show its answer or why there is none."""
        from jupiter_tui.view.outlook import outlook_lines

        try:
            answer, fix = await self.desk.bridge.outlook(domain)
        except JupiterError as error:
            show([[(error.sentence(), "warn")]])
            return
        show(outlook_lines(answer, fix))

    @work
    async def start_cycles(self, domain: str) -> None:
        """Ask how, then start cycles of a domain."""
        # Sheets bring Textual's Input, whose import would delay the first frame.
        from jupiter_engine.protocol.commands import StartCycles
        from jupiter_tui.screens.sheets import StartSheet, StartWish

        sheet = StartSheet(domain, self.picture)
        self.plan_start(domain, sheet.planned)
        wish = await self.app.push_screen_wait(sheet)
        if isinstance(wish, StartWish):
            self.say(f"starting the engine for {domain}…")
            command = StartCycles(domain=domain, cycles=wish.cycles, mode="auto" if wish.auto else "interactive")
            await self.tried(self.desk.bridge.perform(command))
