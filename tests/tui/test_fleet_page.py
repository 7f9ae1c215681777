"""The Fleet page driven by keys, with played machines."""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from jupiter_engine.api import Discovered, Offer, OfferedKey
from jupiter_engine.errors import RemoteError
from jupiter_engine.orchestrator.database import Database
from jupiter_engine.protocol import journal as j
from jupiter_engine.protocol.fleet import FleetPicture
from jupiter_tui.widgets.rows import Rows
from tests.tui import played_fleet as played
from tests.tui.conftest import Open, Session
from tests.tui.played_fleet import FINDINGS, PlayedMachines

SIZES = [(60, 16), (80, 24), (120, 36), (120, 24), (90, 40), (200, 60)]
LOOKED = played.several(findings=FINDINGS, findings_at=time.time())
KEY = OfferedKey(
    host="studio.local", port=22, algorithm="ssh-ed25519", fingerprint="SHA256:" + "k" * 43, line="studio.local ..."
)


async def opened(c: Session) -> None:
    await c.press("1")
    await c.shows("[1 Fleet")


# -- looking -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
async def test_the_page_fits_every_size(console: Open, size: tuple[int, int]) -> None:
    async with console("train", size, machines=PlayedMachines(LOOKED)) as c:
        await opened(c)
        await c.shows("> ok laptop", "** studio", "3 of 6 answer")
        if size[0] >= 100 and size[1] >= 32:
            await c.shows("── Now", "sleep  studio", "macs: ring", "running, process 4242")
            return
        assert "── Engine" not in c.screen()
        await c.press("tab", "tab")
        await c.shows("1 to mend, 1 warning", "unreachable")
        await c.press("tab")
        await c.shows("macs: ring")
        await c.press("tab")
        await c.shows("running, process 4242")
        await c.press("tab", "j")
        await c.shows("> ** studio")


async def test_machines_are_opened_by_the_first_look_and_asked_only_while_it_lasts(console: Open) -> None:
    async with console("train") as c:
        await c.pilot.pause(0.4)
        assert c.machines.watched == []
        await opened(c)
        await c.until(lambda: c.machines.watched[-1:] == [True], "watched")
        await c.press("4")
        await c.until(lambda: c.machines.watched[-1] is False, "not watched")
        await opened(c)
        await c.until(lambda: c.machines.watched[-1] is True, "watched again")
        assert not c.machines.closed
    assert c.machines.closed


async def test_nodes_are_walked_and_one_that_goes_takes_the_choice_home(console: Open) -> None:
    async with console("empty", machines=PlayedMachines(LOOKED)) as c:
        await opened(c)
        await c.press("j", "down", "j")
        await c.shows("> !! mini-2", "!! mini-2  lost", "-> switch on Remote Login there")
        await c.press("G")
        await c.shows("> ok box", "97% busy")
        await c.press("j")
        await c.shows("> ok box")
        await c.press("up")
        await c.shows("> !! mini-3")
        c.machines.shown = replace(LOOKED, nodes=LOOKED.nodes[:2])
        await c.shows("> ok laptop", "Nodes  2 of 2")


async def test_zoom_gives_the_focused_pane_the_page(console: Open) -> None:
    async with console("empty", machines=PlayedMachines(LOOKED)) as c:
        await opened(c)
        await c.shows("macs: ring", "unreachable")
        await c.press("z")
        await c.until(lambda: "macs: ring" not in c.screen(), "the table alone")
        await c.press("z")
        await c.shows("macs: ring")
        await c.press("tab", "tab", "tab", "z")
        await c.until(lambda: "NODE" not in c.screen() and "back to studio" in c.screen(), "the groups alone")
        await c.press("z")
        await c.shows("> ok laptop")


async def test_no_nodes_yet_and_a_broken_cluster_file_are_said(console: Open) -> None:
    async with console("empty", (80, 24), machines=PlayedMachines(FleetPicture())) as c:
        await opened(c)
        await c.shows("reading config/cluster.yaml", "n add")
        assert "d doctor" not in c.screen(), "there is nobody to be examined"
        (c.root / "config" / "cluster.yaml").write_text("schema: jupiter/cluster@1\nnodse: []\n")
        await c.shows("is not accepted", "nodse", "1 Fleet·1!")


@pytest.mark.parametrize("size", [(80, 24), (200, 60)], ids=lambda s: f"{s[0]}x{s[1]}")
async def test_hostile_names_are_drawn_as_text(console: Open, size: tuple[int, int]) -> None:
    async with console("empty", size, machines=PlayedMachines(played.hostile())) as c:
        await opened(c)
        screen = await c.shows("evil[bold red")
        for keys in (["j"], ["tab"], ["tab"], ["tab"], ["x"]):
            await c.press(*keys)
            screen += c.screen()
        await c.shows("Remove a node")
        assert "\x1b" not in screen
        assert "\u202e" not in screen
        assert c.app.is_running


async def test_only_ascii_is_drawn_if_asked(console: Open) -> None:
    async with console("empty", (200, 60), machines=PlayedMachines(LOOKED), ascii_only=True) as c:
        await opened(c)
        await c.shows("macs: ring")
        strips = c.app.screen._compositor.render_strips()
        ground = c.app.screen.styles.background
        shown = "".join(s.text for strip in strips for s in strip.apply_filter(c.app._filters[-1], ground))
        assert not [letter for letter in shown if not letter.isascii() and letter != "°"]


# -- the doctor ----------------------------------------------------------------------------------------
async def test_the_doctor_says_what_it_does_and_what_it_found(console: Open) -> None:
    machines = PlayedMachines(played.several())
    machines.held, machines.says = Future(), ("asking 6 node(s)", "measuring 12 connection(s) between nodes")
    async with console("empty", (200, 60), machines=machines) as c:
        await opened(c)
        await c.shows("has not looked yet")
        await c.press("d")
        await c.shows(".. measuring 12 connection(s) between nodes")
        machines.held.set_result(FINDINGS)
        await c.until(lambda: "measuring" not in c.screen(), "done")
        await c.shows("1 to mend, 1 warning", "!! unreachable", "ok 1 check is well")
        await c.press("o")
        await c.shows("More than 100 GiB")
        await c.press("o")
        await c.until(lambda: "More than 100 GiB" not in c.screen(), "folded")


async def test_a_safe_fix_is_done_after_asking_and_the_doctor_looks_again(console: Open) -> None:
    async with console("empty", machines=PlayedMachines(LOOKED)) as c:
        await opened(c)
        await c.shows("unreachable")
        await c.press("tab", "tab")
        assert "f fix" not in c.screen(), "only a person can do that one"
        await c.press("f")
        assert len(c.app.screen_stack) == 1
        await c.press("j")
        await c.shows("f fix", "[f does it]")
        await c.press("f")
        await c.shows("$ caffeinate -is", "on studio")
        await c.press("n")
        assert c.machines.asked == []
        await c.press("f")
        await c.shows("$ caffeinate -is")
        await c.press("y")
        await c.until(lambda: ("examine", None) in c.machines.asked, "examined again")
        assert c.machines.asked[0] == ("apply", FINDINGS[1].fix)


async def test_a_fix_that_fails_says_so_and_is_not_examined(console: Open) -> None:
    machines = PlayedMachines(LOOKED)
    machines.failure = RemoteError("caffeinate ended with 1: [b]no[/]", host="studio")
    async with console("empty", machines=machines) as c:
        await opened(c)
        await c.press("tab", "tab", "j")
        await c.shows("f fix")
        await c.press("f", "y")
        await c.shows("caffeinate ended with 1: [b]no[/]")
        assert [what for what, _ in c.machines.asked] == ["apply"]


async def test_copy_takes_what_the_pane_is_about(console: Open) -> None:
    async with console("empty", machines=PlayedMachines(LOOKED)) as c:
        copied: list[str] = []
        c.app.copy_to_clipboard = copied.append  # type: ignore[method-assign,assignment]
        await opened(c)
        await c.press("y")
        assert "Apple M4 Max" in copied[-1]
        await c.press("tab", "tab", "j", "y")
        assert copied[-1] == "caffeinate -is"
        await c.press("tab", "y")
        assert msgspec.json.decode(copied[-1])["macs"]["backend"] == "ring"
        await c.shows("copied the groups")


# -- changing ------------------------------------------------------------------------------------------
async def test_read_only_has_no_key_that_changes_a_machine(console: Open) -> None:
    async with console("empty", machines=PlayedMachines(LOOKED), read_only=True) as c:
        await opened(c)
        await c.press("j")
        screen = await c.shows("> ** studio", "d doctor")
        for word in ("add", "remove", "trust", "environment…", "link…"):
            assert word not in screen.splitlines()[-1]
        await c.press("n", "x", "t", "e", "l", "E")
        await c.press("tab", "tab", "j", "f")
        assert len(c.app.screen_stack) == 1
        await c.press("question_mark")
        assert "Take a machine in" not in await c.shows("Keys: Fleet", "Let the doctor look")
        assert c.machines.asked == []


async def test_a_found_machine_is_filled_in_its_key_confirmed_and_added(console: Open) -> None:
    machines = PlayedMachines(played.several())
    offers = (
        Offer(name="gpu-box", host="gpu-box", address="10.0.0.5", user="ada", port=2222, source="ssh config"),
        Offer(name="Mini [b]9[/]", host="mini-9.local", address="192.168.1.19", source="bonjour"),
    )
    machines.offers = Discovered(offers=offers, notes=("The local network cannot be listened to: no.",))
    machines.key = KEY
    async with console("empty", (80, 24), machines=machines) as c:
        await opened(c)
        await c.press("n")
        await c.shows("Add a node", "gpu-box", "10.0.0.5 port 2222 ada", "mini-9.local", "cannot be listened")
        await c.press("enter")
        await c.shows("a host is needed")
        await c.press("down", "down")
        await c.shows("> mini-9.local", "mini-9 ")
        await c.press("tab", "tab", *"ada", "tab", *"22x", "enter")
        await c.shows("22x is no port")
        await c.press("backspace", "tab", "right", "right")
        await c.shows("[trainer]")
        await c.press("enter")
        await c.shows("Is this its key?", KEY.fingerprint, "ssh-keygen -lf")
        await c.press("y")
        await c.until(lambda: any(what == "add" for what, _ in c.machines.asked), "added")
        node, yes = next(about for what, about in c.machines.asked if what == "add")
        assert yes
        assert (node.host, node.name, node.role, node.ssh_user, node.ssh_port) == (
            "mini-9.local",
            "mini-9",
            "trainer",
            "ada",
            22,
        )


async def test_a_host_with_a_user_is_taken_apart_and_a_failure_keeps_what_was_typed(console: Open) -> None:
    machines = PlayedMachines(played.several())
    async with console("empty", machines=machines) as c:
        await opened(c)
        await c.press("n")
        await c.shows("Add a node")
        await c.until(lambda: ("discover", None) in machines.asked, "discovered")
        machines.failure = RemoteError("mini-9 refuses connections", host="mini-9")
        await c.press(*"eve@mini-9", "enter")
        await c.shows("mini-9 refuses connections", "Add a node", "eve")
        node = next(about for what, about in machines.asked if what == "add")
        assert (node.host, node.ssh_user) == ("mini-9", "eve")
        await c.press("escape")
        await c.until(lambda: len(c.app.screen_stack) == 1, "left")


async def test_a_changed_key_wants_the_machines_name(console: Open) -> None:
    machines = PlayedMachines(LOOKED)
    machines.key = msgspec.structs.replace(KEY, standing="changed", known=("ssh-ed25519 SHA256:old (known_hosts)",))
    async with console("empty", machines=machines) as c:
        await opened(c)
        await c.press("j", "t")
        await c.shows("THE KEY OF studio HAS CHANGED", "SHA256:old", KEY.fingerprint, "Type  studio")
        await c.type("yes")
        await c.shows("that is not studio")
        await c.press(*["backspace"] * 3)
        await c.type("studio")
        await c.until(lambda: ("trust", ("studio", True)) in machines.asked, "trusted")
        await c.shows("studio is trusted")


async def test_escape_before_a_key_is_a_no(console: Open) -> None:
    machines = PlayedMachines(LOOKED)
    machines.key = KEY
    async with console("empty", machines=machines) as c:
        await opened(c)
        await c.press("j", "t")
        await c.shows("Is this its key?")
        await c.press("escape")
        await c.until(lambda: ("trust", ("studio", False)) in machines.asked, "answered with no")


async def test_removing_wants_the_name(console: Open) -> None:
    async with console("empty", machines=PlayedMachines(LOOKED)) as c:
        await opened(c)
        await c.press("j", "x")
        await c.shows("studio shall be no node any more", "Type  studio")
        await c.type("laptop")
        assert c.machines.asked == []
        await c.press(*["backspace"] * 6)
        await c.type("studio")
        await c.until(lambda: ("remove", "studio") in c.machines.asked, "removed")
        await c.shows("studio is no node any more", "~/.jupiter")


async def test_environment_link_and_reconnect(console: Open) -> None:
    async with console("empty", machines=PlayedMachines(LOOKED)) as c:
        await opened(c)
        await c.shows("> ok laptop")
        assert "e environment" not in c.screen(), "this machine has its own"
        await c.press("j")
        await c.shows("e environment")
        await c.press("e")
        await c.shows("Bring the environment of studio up to date?")
        await c.press("y")
        await c.until(lambda: ("push", "studio") in c.machines.asked, "pushed")
        await c.press("l")
        await c.shows("studio leads the group macs", "call mini-1, mini-2")
        await c.press("y")
        await c.until(lambda: ("link", "macs") in c.machines.asked, "linked")
        await c.shows("macs: studio leads and calls mini-1, mini-2")
        await c.press("w")
        await c.until(lambda: ("wake", None) in c.machines.asked, "called")


async def test_a_lost_machine_is_an_alert_on_every_page(console: Open) -> None:
    async with console("empty", machines=PlayedMachines(LOOKED)) as c:
        await opened(c)
        await c.press("6")
        await c.shows("mini-2.local refuses connections", "1 Fleet·2!")


# -- many nodes ----------------------------------------------------------------------------------------
async def test_sixty_four_nodes_stay_fluid_and_only_changed_rows_are_drawn(
    console: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    machines = PlayedMachines(played.many())
    async with console("empty", (120, 36), machines=machines) as c:
        await opened(c)
        await c.shows("> ok node-00", "64 of 64 answer", "below")
        table = c.app.screen.query_one("#nodes", Rows)
        await c.pilot.pause(0.3)
        drawn = table.drawn
        machines.shown = played.many(at=5.0)
        await c.shows("6.0")
        visible = table.rows_in_sight()
        assert 1 <= table.drawn - drawn <= 1 + visible // 10, (drawn, table.drawn, visible)
        took = []
        for step in range(40):
            if step % 4 == 0:
                machines.shown = played.many(at=10.0 + step)
            began = time.perf_counter()
            await c.pilot.press("j")
            took.append(time.perf_counter() - began)
        await c.shows("> ok node-40")
        took.sort()
        with capsys.disabled():
            print(f"  key to frame with 64 nodes: median {took[20] * 1000:.0f} ms, p95 {took[37] * 1000:.0f} ms")
        assert took[20] < 0.5


async def test_pictures_of_many_nodes_arrive_without_end_and_keys_still_count(console: Open) -> None:
    machines = PlayedMachines(played.many())
    async with console("empty", (200, 60), machines=machines) as c:
        await opened(c)
        for step in range(12):
            machines.shown = played.many(at=float(step))
            await c.press("j")
            await c.pilot.pause(0.05)
        await c.shows("> ok node-12")


# -- output of ranks -----------------------------------------------------------------------------------
async def test_the_log_shows_the_output_of_a_rank(console: Open) -> None:
    async with console("train") as c:
        await c.shows("step=40 loss=")
        assert "o ranks" not in c.screen()
        ranks = c.root / ".jupiter" / "runs" / "python-0002-train" / "ranks"
        (ranks / "1").mkdir(parents=True)
        (ranks / "1" / "hosts.json").write_text('{"0": "studio", "1": "mini-2[b]"}')
        (ranks / "1" / "rank-1.log").write_text(f"rank one says {played.ESCAPES}hello\n")
        await c.shows("o ranks")
        await c.press("o", "o")
        await c.shows("[r1 mini-2[b]]", "rank one says", "hello", "launch 1")
        assert "step=40 loss=" not in c.screen()
        with (ranks / "1" / "rank-1.log").open("a") as file:
            file.write("and more\n")
        await c.shows("and more")
        (ranks / "2").mkdir()
        (ranks / "2" / "rank-1.log").write_text("a new life of rank one, longer than the former output was\n" * 3)
        (ranks / "2" / "hosts.json").write_text('{"0": "studio", "1": "mini-2[b]"}')
        screen = await c.shows("launch 2", "a new life")
        assert screen.count("a new life") == 3
        assert "and more" in screen
        await c.press("O")
        await c.shows("[r0 studio]")
        await c.press("O")
        await c.shows("step=40 loss=")


async def test_ranks_that_stand_still_are_named_under_the_stages(console: Open) -> None:
    async with console("train") as c:
        await c.shows("40/60 steps")
        _note(c.root, "STALLED: no step for 41 s (a step takes 2.0 s); the others wait for rank 3 on mini-2")
        screen = await c.shows("!! STALLED: no step for 41 s")
        assert screen.count("rank 3 on mini-2") == 3, "under the stages, in the log and in the alert line"
        _note(c.root, "the ranks go on: step 41 after 44 s of standing still")
        await c.until(lambda: "!! STALLED" not in c.screen(), "gone again")


def _note(root: Path, text: str) -> None:
    database = Database(root / ".jupiter" / "jupiter.db")
    database.append(j.Noted(cycle="python-0002", stage="train", level="warning", text=text))
    database.close()
