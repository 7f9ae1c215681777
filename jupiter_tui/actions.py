"""Everything a person can do, once: bindings, footer, help, palette and the documentation come from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Action:
    """One thing to do. `page` is a page's name, or `*` for every page."""

    name: str
    keys: str
    """Comma-separated Textual key names; the first is shown."""
    label: str
    """Two words at most, for the footer."""
    help: str
    page: str = "*"
    mutates: bool = False
    """Changes something outside the console: absent with --read-only."""
    footer: bool = True

    @property
    def shown_key(self) -> str:
        return shown(self.keys.split(",")[0])


_NAMES: Final = {
    "question_mark": "?", "ctrl+p": "^p", "slash": "/", "plus": "+", "minus": "-", "full_stop": ".", "space": "space",
    "exclamation_mark": "!", "enter": "enter", "escape": "esc",
}  # fmt: skip


def shown(key: str) -> str:
    """A key as people read it: `question_mark` -> `?`."""
    return _NAMES.get(key, key)


ACTIONS: Final = (
    # Everywhere
    Action("page('fleet')", "1", "Fleet", "The machines, their groups, the doctor and the engine", footer=False),
    Action("page('domain')", "2", "Domain", "The domains and their settings", footer=False),
    Action("page('review')", "3", "Review", "Look at samples, accept or reject them", footer=False),
    Action("page('train')", "4", "Train", "The running cycle: stages, curves, funnel, logs", footer=False),
    Action("page('promote')", "5", "Promote", "The gate's decision and the generators", footer=False),
    Action("page('history')", "6", "History", "All cycles, what they measured and reported", footer=False),
    Action("alerts", "exclamation_mark", "alerts", "All alerts and the newest notices", footer=False),
    Action("help", "question_mark", "help", "The keys of this page"),
    Action("command_palette", "ctrl+p", "palette", "Find any action by its name", footer=False),
    Action("detach", "q", "detach", "Close the console; the engine and its work go on"),
    # Fleet
    Action("move(1)", "j", "next", "The next node; in the doctor's pane the next finding", "fleet", footer=False),
    Action("move(-1)", "k", "previous", "The node before; in the doctor's pane the finding", "fleet", footer=False),
    Action("examine", "d", "doctor", "Let the doctor look at all machines and what lies between them", "fleet"),
    Action("fix", "f", "fix…", "Do what mends the chosen finding, if that is safe; asks first", "fleet", mutates=True),
    Action("fold", "o", "all findings", "Show what is well, too, or hide it", "fleet", footer=False),
    Action("add", "n", "add…", "Take a machine in as a node", "fleet", mutates=True),
    Action("push", "e", "environment…", "Bring the chosen node's environment up to date", "fleet", mutates=True),
    Action("link", "l", "link…", "Let a group's leading node call the others by ssh", "fleet", mutates=True),
    Action("trust", "t", "trust…", "Look at the ssh key that the chosen node presents", "fleet", mutates=True),
    Action("remove", "x", "remove…", "Take the chosen node out, by name", "fleet", mutates=True),
    Action("reconnect", "w", "reconnect", "Call the machines that are away now, and ask all of them", "fleet"),
    Action("zoom", "z,enter", "zoom", "Give the pane that has the focus the whole page, or go back", "fleet"),
    Action("copy", "y", "copy", "Copy what the pane is about: the fix's command, the node, the groups", "fleet"),
    Action("start_engine", "E", "start engine", "Start the engine process if none runs", "fleet", mutates=True),
    # Domain
    Action("move(1)", "j,down", "next", "Choose the next domain", "domain", footer=False),
    Action("move(-1)", "k,up", "previous", "Choose the domain before", "domain", footer=False),
    Action("start", "l", "start cycle", "Start a cycle of the chosen domain", "domain", mutates=True),
    Action("edit", "e", "edit", "Open the domain's YAML file in $EDITOR and check it after", "domain", mutates=True),
    Action("new", "n", "new", "Make a new domain from the template", "domain", mutates=True),
    # Review
    Action("accept", "a", "accept", "Accept this sample and go to the next", "review", mutates=True),
    Action("reject", "x", "reject", "Reject this sample with a reason and go to the next", "review", mutates=True),
    Action("move(1)", "j,space", "next", "The next sample, this one stays as it is", "review"),
    Action("move(-1)", "k", "previous", "The sample before", "review", footer=False),
    Action("undo", "u", "undo", "Take the last verdict back; again for the one before", "review", mutates=True),
    Action("filter", "slash", "filter", "Show samples by status and text", "review"),
    Action("reload", "r", "reload", "Read the samples again", "review", footer=False),
    Action("finish", "F", "finish", "End the review; the rest keeps what the filters said", "review", mutates=True),
    # Train
    Action("start", "l", "start", "Start cycles of the domain", "train", mutates=True),
    Action("pause", "p", "pause", "Halt the cycle at the next safe point", "train", mutates=True),
    Action("resume", "R", "resume", "Continue a cycle that stands still, or wake its engine", "train", mutates=True),
    Action("stop", "x", "stop…", "End the cycle at the next safe point, after asking", "train", mutates=True),
    Action("freeze", "space", "pause view", "Hold the picture still; the work and its data go on", "train"),
    Action("follow", "f", "follow", "Keep the log at its end", "train"),
    Action("find", "slash", "find", "Find text in the log", "train"),
    Action("match(1)", "n", "next match", "Go to the next match in the log", "train", footer=False),
    Action("match(-1)", "N", "match before", "Go to the match before", "train", footer=False),
    Action("smooth(1)", "plus,equals_sign", "smooth", "Smooth the curves more", "train", footer=False),
    Action("smooth(-1)", "minus", "less smooth", "Smooth the curves less", "train", footer=False),
    Action("rank(1)", "o", "ranks", "Show what the next rank of a group prints, then the worker's log", "train"),
    Action("rank(-1)", "O", "rank before", "Show what the rank before prints", "train", footer=False),
    Action("zoom", "z", "zoom", "Show the log alone, the curves alone, or both", "train"),
    # Promote
    Action("promote", "p", "promote…", "Make the candidate the generator; asks for its name", "promote", mutates=True),
    Action("keep", "h", "keep", "Keep the present generator", "promote", mutates=True),
    Action("move(1)", "j", "next", "Choose the next generator of the lineage", "promote", footer=False),
    Action("move(-1)", "k", "previous", "Choose the generator before", "promote", footer=False),
    Action("rollback", "b", "roll back…", "Make the chosen generator active, by name", "promote", mutates=True),
    # History
    Action("move(1)", "j", "next", "Choose the next cycle", "history"),
    Action("move(-1)", "k", "previous", "Choose the cycle before", "history"),
    Action("zoom", "z,enter", "open", "Give the chosen cycle the whole page, or go back", "history"),
)  # fmt: skip


def for_page(page: str) -> list[Action]:
    """The actions of one page, then those of every page."""
    return [a for a in ACTIONS if a.page == page] + [a for a in ACTIONS if a.page == "*"]


def find(page: str, name: str) -> Action | None:
    """The action called `name` (without arguments) on a page."""
    return next((a for a in for_page(page) if a.name.partition("(")[0] == name), None)


SCROLL_HELP: Final = (
    ("up down pgup pgdn", "Scroll the pane that has the focus"),
    ("g G", "Its first and its last line"),
    ("tab shift+tab", "Go to the next or former pane"),
)


def keyboard_table() -> str:
    """All keys as Markdown, page by page (docs/console.md holds exactly this)."""
    parts = []
    titles = {"*": "Everywhere", "train": "Train", "review": "Review", "promote": "Promote", "domain": "Domain"}
    for page in ("*", "fleet", "domain", "review", "train", "promote", "history"):
        rows = [a for a in ACTIONS if a.page == page]
        parts.append(
            f"### {titles.get(page, page.capitalize())}\n\n| Key | What it does | Changes something |\n|---|---|---|"
        )
        for action in rows:
            keys = " ".join(f"`{shown(key)}`" for key in action.keys.split(",") if key != "equals_sign")
            parts.append(f"| {keys} | {action.help} | {'yes' if action.mutates else ''} |")
        if page == "*":
            parts += [f"| {' '.join(f'`{key}`' for key in keys.split())} | {text} | |" for keys, text in SCROLL_HELP]
        parts.append("")
    return "\n".join(parts)
