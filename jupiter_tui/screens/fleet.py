"""Fleet: all machines, one of them in full, the doctor, the groups, the engine."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Iterable
from typing import ClassVar, Final

from textual import work
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.widget import Widget

from jupiter_engine.errors import JupiterError
from jupiter_engine.protocol.fleet import Finding, FleetPicture, NodeStatus
from jupiter_tui.screens.page import Page, bindings
from jupiter_tui.view.findings import command_of, copied_command, doctor_title, list_findings, shown_findings
from jupiter_tui.view.fleet import abilities, doing_line, engine_lines, no_nodes_lines
from jupiter_tui.view.groups import group_lines, groups_title
from jupiter_tui.view.node import detail_lines
from jupiter_tui.view.nodes import head_line, layout, node_line, nodes_title, worst_by_node
from jupiter_tui.view.picture import Picture
from jupiter_tui.view.text import Line, one_line, plain_lines
from jupiter_tui.widgets.lines import Bar, Pane
from jupiter_tui.widgets.rows import Findings, Rows

LOWER: Final = ("node", "doctor", "groups", "engine")
PANES: Final = ("nodes", *LOWER)
NAMES: Final = {"node": "Node", "doctor": "Doctor", "groups": "Groups", "engine": "Engine"}
COPY_WIDTH: Final = 160


class FleetPage(Page):
    PAGE = "fleet"
    BINDINGS: ClassVar[list[BindingType]] = [
        *bindings("fleet"),
        Binding("tab", "pane(1)", "next pane", show=False),
        Binding("shift+tab", "pane(-1)", "pane before", show=False),
    ]
    AUTO_FOCUS = "#nodes"

    _node = ""
    """Name of the chosen node."""
    _finding = 0
    _folded = True
    _on = "node"
    """The lower pane that is shown where there is room for one."""
    _zoom = ""

    def body(self) -> Iterable[Widget]:
        yield Bar(id="doing")
        yield Rows("Nodes", id="nodes")
        with Container(id="fleet-lower"):
            yield Pane("Node", id="node")
            with Container(id="fleet-right"):
                yield Findings("Doctor", id="doctor")
                yield Pane("Groups", id="groups")
                yield Pane("Engine", id="engine")

    def on_screen_resume(self) -> None:
        self.desk.bridge.machines.watch(wanted=True)
        super().on_screen_resume()

    def on_screen_suspend(self) -> None:
        self.desk.bridge.machines.watch(wanted=False)

    # -- drawing ---------------------------------------------------------------------------------
    def draw(self, picture: Picture) -> None:
        self.set_class(bool(picture.fleet_doing), "-doing")
        self.query_one("#doing", Bar).show(lambda w: [doing_line(picture, w)])
        self._arrange(picture.fleet)
        self._draw_nodes(picture)
        self._draw_lower(picture)

    def _arrange(self, fleet: FleetPicture) -> None:
        """Which panes have how much room."""
        width, height = self.app.size
        lower = self._zoom in LOWER
        self.set_class(lower or width < 100 or height < 32, "-single")
        self.set_class(lower, "-zoom-lower")
        self.set_class(self._zoom == "nodes", "-zoom-nodes")
        for name in LOWER:
            self.set_class(name == self._on, f"-on-{name}")
        nodes = self.query_one("#nodes", Rows)
        edges = 1 if width < 100 or height < 32 else 2
        # Without nodes the reason stands there, which may be long.
        rows = len(fleet.nodes) + 1 if fleet.nodes else 7
        wanted = max(3, min(rows, (height - 4) * 2 // 5)) + edges
        if self._zoom != "nodes" and (nodes.styles.height is None or nodes.styles.height.value != wanted):
            # Only on change: a new height lays the whole page out again.
            nodes.styles.height = wanted

    def _draw_nodes(self, picture: Picture) -> None:
        fleet, table = picture.fleet, self.query_one("#nodes", Rows)
        width = table.content_size.width
        table.set_title(nodes_title(fleet))
        if not fleet.nodes:
            table.show_rows([], no_nodes_lines(picture, max(20, width)), 0)
            return
        form, worst, chosen = layout(fleet.nodes, width), worst_by_node(fleet.findings), self.chosen()
        rows = [
            node_line(status, form, picture.now, chosen=number == chosen, worst=worst.get(status.name))
            for number, status in enumerate(fleet.nodes)
        ]
        table.show_rows(head_line(form), rows, chosen)

    def _draw_lower(self, picture: Picture) -> None:
        fleet, status = picture.fleet, self.node()
        titles = {
            "node": one_line(status.name) if status is not None else "Node",
            "doctor": doctor_title(fleet, picture.now),
            "groups": groups_title(fleet),
            "engine": "Engine",
        }
        for name in LOWER:
            self.query_one(f"#{name}", Pane).set_title(self._strip(name, titles[name]))
        self.query_one("#node", Pane).show(lambda w: self._node_lines(picture, status, w))
        self.query_one("#groups", Pane).show(lambda w: group_lines(fleet, w))
        self.query_one("#engine", Pane).show(lambda w: engine_lines(picture, w))
        pane = self.query_one("#doctor", Findings)
        pane.show(lambda w: list_findings(fleet, w, self._finding, folded=self._folded).lines)

    def _strip(self, name: str, title: str) -> str:
        """The pane's title; where it is one of several in the same place, the others are named beside it."""
        if not self.has_class("-single") or self._zoom:
            return title
        others = " ".join(NAMES[other] for other in LOWER if other != name)
        return f"{title}  tab: {others}"

    def _node_lines(self, picture: Picture, status: NodeStatus | None, width: int) -> list[Line]:
        if status is None:
            return []
        may = abilities(picture.cluster, status.name)
        return detail_lines(status, picture.fleet.findings, may, picture.now, width)

    # -- what is chosen --------------------------------------------------------------------------
    def chosen(self) -> int:
        """Position of the chosen node; the first one if it is gone."""
        nodes = self.picture.fleet.nodes
        return next((i for i, status in enumerate(nodes) if status.name == self._node), 0)

    def node(self) -> NodeStatus | None:
        nodes = self.picture.fleet.nodes
        return nodes[self.chosen()] if nodes else None

    def finding(self) -> Finding | None:
        shown = shown_findings(self.picture.fleet.findings, folded=self._folded)
        return shown[min(self._finding, len(shown) - 1)] if shown else None

    def front(self) -> str:
        """The pane that has the focus."""
        focused = self.focused
        return focused.id if focused is not None and focused.id in PANES else "nodes"

    def available(self, action: str) -> bool:
        status, finding = self.node(), self.finding()
        match action:
            case "start_engine":
                return not self.picture.engine_lives
            case "push" | "trust":
                return status is not None and not status.local
            case "remove":
                return status is not None and len(self.picture.fleet.nodes) > 1
            case "link":
                return any(len(plan.nodes) > 1 for plan in self.picture.fleet.groups)
            case "fix":
                return finding is not None and finding.fix is not None and finding.fix.safe
            case "reconnect" | "examine":
                return bool(self.picture.fleet.nodes)
        return True

    # -- looking ---------------------------------------------------------------------------------
    def action_move(self, step: int) -> None:
        if self.front() == "doctor":
            self._move_finding(step)
        elif self.picture.fleet.nodes:
            last = len(self.picture.fleet.nodes) - 1
            self._node = self.picture.fleet.nodes[max(0, min(last, self.chosen() + step))].name
            self.query_one("#node", Pane).scroll_to(y=0, animate=False)
        self.show(self.picture)

    def _move_finding(self, step: int) -> None:
        pane = self.query_one("#doctor", Findings)
        listed = list_findings(self.picture.fleet, pane.content_size.width, 0, folded=self._folded)
        if not listed.shown:
            return
        self._finding = max(0, min(len(listed.shown) - 1, self._finding + step))
        start = listed.starts[self._finding]
        ends = [*listed.starts[1:], len(listed.lines)]
        pane.show(lambda w: list_findings(self.picture.fleet, w, self._finding, folded=self._folded).lines)
        pane.reveal(ends[self._finding] - 1)
        pane.reveal(start)

    def action_pane(self, step: int) -> None:
        order = [name for name in PANES if not self._zoom or name == self._zoom] if self._zoom else list(PANES)
        name = order[(order.index(self.front()) + step) % len(order)] if self.front() in order else order[0]
        if name in LOWER:
            self._on = name
        self._arrange(self.picture.fleet)
        self.query_one(f"#{name}", Pane).focus()
        self.show(self.picture)

    def action_zoom(self) -> None:
        front = self.front()
        self._zoom = "" if self._zoom else front
        if front in LOWER:
            self._on = front
        self._arrange(self.picture.fleet)
        self.call_after_refresh(lambda: self.show(self.picture))

    def action_fold(self) -> None:
        self._folded, self._finding = not self._folded, 0
        self.show(self.picture)

    def action_copy(self) -> None:
        finding, status, front = self.finding(), self.node(), self.front()
        text, what = "", ""
        if front == "doctor" and finding is not None:
            command = copied_command(finding.fix) if finding.fix is not None else ""
            text, what = command or one_line(finding.text), "the command" if command else "the finding"
        elif front == "groups":
            hostfiles = {plan.name: plan.hostfile for plan in self.picture.fleet.groups if plan.hostfile}
            text = json.dumps(hostfiles, indent=2) if hostfiles else ""
            text, what = text or plain_lines(group_lines(self.picture.fleet, COPY_WIDTH)), "the groups"
        elif status is not None:
            lines = self._node_lines(self.picture, status, COPY_WIDTH)
            text, what = plain_lines(lines), f"what is known of {one_line(status.name)}"
        if text:
            self.app.copy_to_clipboard(text)
            self.say(f"copied {what}: {one_line(text)[:200]}")

    @work
    async def action_examine(self) -> None:
        await self._examine()

    async def _examine(self) -> None:
        self._finding = 0
        if await self.tried(self.desk.bridge.machines.examine()):
            self.say("the doctor has looked")

    @work
    async def action_reconnect(self) -> None:
        await self.tried(self.desk.bridge.machines.reconnect(), "calling all machines")

    # -- changing --------------------------------------------------------------------------------
    async def said(self, asked: Awaitable[str]) -> bool:
        """Await something of the machines that ends with a sentence, and say it."""
        try:
            self.say(await asked)
        except JupiterError as error:
            self.say(error.sentence(), bad=True)
            return False
        return True

    @work
    async def action_fix(self) -> None:
        from jupiter_tui.screens.sheets import ConfirmSheet

        finding = self.finding()
        if finding is None or finding.fix is None:
            return
        fix = finding.fix
        where = f"on {one_line(fix.node)}" if fix.node else "on this machine"
        question = f"{one_line(fix.text)}?\n\n  $ {command_of(fix)}\n\nIt is run {where}."
        agreed = await self.app.push_screen_wait(ConfirmSheet(f"Mend: {one_line(finding.check)}", question))
        if agreed and await self.tried(self.desk.bridge.machines.apply_fix(fix), "done; the doctor looks again"):
            await self._examine()

    @work
    async def action_add(self) -> None:
        from jupiter_tui.screens.machines import AddSheet, NodeWish

        wish: NodeWish | None = NodeWish()
        while wish is not None:
            wish = await self.app.push_screen_wait(AddSheet(wish, self.desk.bridge.machines.discover))
            if wish is not None and await self.said(self.desk.bridge.machines.add_node(**wish.fields())):
                self._node = wish.name or wish.host
                return

    @work
    async def action_trust(self) -> None:
        if (status := self.node()) is not None:
            await self.said(self.desk.bridge.machines.trust(status.name))

    @work
    async def action_remove(self) -> None:
        from jupiter_tui.screens.sheets import TypeSheet

        if (status := self.node()) is None:
            return
        name = one_line(status.name)
        text = f"{name} shall be no node any more: it goes from config/cluster.yaml and from its group."
        lines: list[Line] = [[(text, "")], [("What Jupiter put on the machine stays there.", "dim")]]
        if await self.app.push_screen_wait(TypeSheet("Remove a node", lines, name)):
            await self.said(self.desk.bridge.machines.remove_node(status.name))

    @work
    async def action_push(self) -> None:
        from jupiter_tui.screens.sheets import ConfirmSheet

        if (status := self.node()) is None:
            return
        name = one_line(status.name)
        question = (
            f"Bring the environment of {name} up to date? What it lacks is sent and checked there; the one in use "
            "is replaced only when the new one is complete."
        )
        if await self.app.push_screen_wait(ConfirmSheet("Environment", question)):
            await self.tried(self.desk.bridge.machines.push(status.name), f"{name} has the environment")

    @work
    async def action_link(self) -> None:
        from jupiter_tui.screens.sheets import ChoiceSheet, ConfirmSheet

        plans = [plan for plan in self.picture.fleet.groups if len(plan.nodes) > 1]
        names = tuple(one_line(plan.name) for plan in plans)
        if not names:
            return
        chosen = names[0] if len(names) == 1 else await self.app.push_screen_wait(ChoiceSheet("Link a group", names))
        plan = next((plan for plan in plans if one_line(plan.name) == chosen), None)
        if plan is None:
            return
        leader, *others = map(one_line, plan.nodes)
        question = (
            f"{leader} leads the group {chosen} and must call {', '.join(others)} by ssh. A key of this workspace, "
            "good for nothing but that, is put into authorized_keys there. Go on?"
        )
        if await self.app.push_screen_wait(ConfirmSheet("Link a group", question)):
            await self.said(self.desk.bridge.machines.link(plan.name))

    @work
    async def action_start_engine(self) -> None:
        await self.tried(self.desk.bridge.wake_engine(), "the engine runs")
