"""Every page at three sizes, and every flow of keys, against a recorded workspace."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path

import pytest

from jupiter_engine.protocol.commands import (
    Decide,
    FinishReview,
    Pause,
    Resume,
    Review,
    Rollback,
    StartCycles,
    Stop,
)
from jupiter_tui.app import ConsoleApp
from tests.tui.conftest import Open
from tests.tui.recorded import RecordedWorkspace

SIZES = [(80, 24), (120, 36), (200, 60)]


# -- every page at every size --------------------------------------------------------------------------
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
class TestSizes:
    async def test_train(self, console: Open, size: tuple[int, int]) -> None:
        async with console("train", size) as c:
            screen = await c.shows("67%", "40/60 steps", "ETA", "queued tokens", "step=40 loss=")
            assert ".. train" in screen
            assert "Loss  2.363" in screen
            assert ("Tokens/s" in screen) == (size[0] >= 100)
            assert ("learning rate" in screen) == (size[0] >= 120)
            assert "p pause" in screen
            assert "q detach" in screen

    async def test_review(self, console: Open, size: tuple[int, int]) -> None:
        async with console("review", size) as c:
            await c.press("3")
            screen = await c.shows("sample 1 of 12", "Question 1", "[bold]not markup[/bold]", "grounding 0.71")
            assert "3 Review·12" in screen
            if size[0] >= 100:
                await c.shows("The assert statement")
            await c.press("j", "j")
            await c.shows("sample 3 of 12", "rejected by the filters: copy")

    async def test_promote(self, console: Open, size: tuple[int, int]) -> None:
        async with console("decision", size) as c:
            await c.press("5")
            screen = await c.shows("waits for you", "PROMOTE", "vault_bpb", "ok passed", "ok active")
            assert "5 Promote·1" in screen
            assert "h keep" in screen

    async def test_history(self, console: Open, size: tuple[int, int]) -> None:
        async with console("finished", size) as c:
            await c.press("6")
            await c.shows("python-0001", "finished: promoted")
            await c.press("z")
            await c.shows("Stages", "ok prepare")
            await c.press("G")
            await c.shows("was measured on 90 windows")

    async def test_domain(self, console: Open, size: tuple[int, int]) -> None:
        async with console("empty", size) as c:
            await c.press("2")
            await c.shows("> ok python" if size[0] >= 100 else "python", "Sources", "stdlib", "l start cycle")

    async def test_fleet(self, console: Open, size: tuple[int, int]) -> None:
        async with console("empty", size) as c:
            await c.press("1")
            await c.shows("Nodes  3 of 6 answer", "> ok laptop", "!! mini-2", "lost 3m", "cpu", "disk")
            for _ in range(4):
                await c.press("tab")
            await c.shows("running, process 4242")


async def test_a_first_run_says_what_to_do(console: Open) -> None:
    async with console("empty") as c:
        await c.shows("No cycle has run yet: press l to start", "the work goes on", "-- prepare", "l start")


async def test_too_small_a_terminal_says_which_size_it_needs(console: Open) -> None:
    async with console("train", (50, 12)) as c:
        assert "60x16" in await c.shows("needs a terminal of")
        await c.pilot.resize_terminal(80, 24)
        await c.shows("40/60 steps")


async def test_only_ascii_reaches_the_terminal_if_asked(console: Open) -> None:
    async with console("train", ascii_only=True) as c:
        await c.shows("40/60 steps", "####")
        for page in "123456":
            await c.press(page)
            strips = c.app.screen._compositor.render_strips()
            shown = "".join(
                s.text
                for strip in strips
                for s in strip.apply_filter(c.app._filters[-1], c.app.screen.styles.background)
            )
            assert shown.isascii(), {character for character in shown if not character.isascii()}


@pytest.mark.parametrize("theme", ["dark", "light", "ansi", "ansi-light", "mono"])
async def test_every_theme_draws_states_as_words(console: Open, theme: str) -> None:
    async with console("failed", theme=theme) as c:
        await c.shows("!! train", "Training diverged")


# -- starting, pausing, stopping -----------------------------------------------------------------------
async def test_l_starts_cycles_as_wished(console: Open) -> None:
    async with console("empty") as c:
        await c.shows("l start")
        await c.press("l")
        await c.shows("Start cycles of python", "interactive")
        await c.press("plus", "m", "enter")
        await c.gave(StartCycles(domain="python", cycles=2, mode="auto"))
        await c.shows("cycle 1", "running")


async def test_escape_starts_nothing(console: Open) -> None:
    async with console("empty") as c:
        await c.press("l")
        await c.shows("Start cycles")
        await c.press("escape")
        await c.shows("No cycle has run")
        assert c.commands == []


async def test_pause_and_resume(console: Open) -> None:
    async with console("train") as c:
        await c.shows("p pause")
        await c.press("p")
        await c.gave(Pause(cycle="python-0002"))
        await c.shows("pausing")


async def test_stop_asks_and_names_the_cycle(console: Open) -> None:
    async with console("train") as c:
        await c.shows("x stop")
        await c.press("x")
        await c.shows("Stop cycle python-0002", "y yes")
        await c.press("n")
        await c.until(lambda: len(c.app.screen_stack) == 1, "the sheet closed")
        assert c.commands == []
        await c.press("x")
        await c.shows("Stop cycle python-0002")
        await c.press("y")
        await c.gave(Stop(cycle="python-0002"))


async def test_a_failed_cycle_is_resumed(console: Open) -> None:
    async with console("failed") as c:
        await c.shows("!! train: Training diverged", "R resume")
        await c.press("R")
        await c.gave(Resume(cycle="python-0002"))
        await c.shows("running")


async def test_a_dead_engine_is_woken(console: Open) -> None:
    async with console("train", engine=False) as c:
        await c.shows("the engine is not running", "-- no engine")
        await c.press("R")
        await c.shows("the engine runs again")


async def test_read_only_has_no_key_that_changes_anything(console: Open) -> None:
    async with console("train", read_only=True) as c:
        screen = await c.shows("40/60 steps", "read-only")
        assert "stop" not in screen
        assert "pause  " not in screen.replace("pause view", "")
        await c.press("x", "p", "l", "3", "a", "u", "5", "p", "h", "b")
        await c.pilot.pause(0.3)
        assert c.commands == []
        await c.press("question_mark")
        assert "Make the candidate the generator" not in await c.shows("Keys: Promote")


# -- the log -------------------------------------------------------------------------------------------
async def test_find_follow_and_the_paused_view(console: Open) -> None:
    async with console("train") as c:
        await c.shows("step=40 loss=", "FOLLOW")
        await c.press("slash")
        await c.shows("Find in the log")
        await c.type("CHAT TEMPLATE")
        await c.shows("WARNING: the tokenizer has no chat template", "1 of 1", "f follows")
        await c.press("f")
        await c.shows("FOLLOW", "step=40")
        await c.press("g")
        await c.shows("step=1 loss", "below, f follows")
        await c.press("space")
        await c.shows("VIEW PAUSED")
        await c.press("space")
        assert "VIEW PAUSED" not in c.screen()


async def test_new_log_lines_arrive_and_do_not_move_a_view_that_left_the_end(console: Open) -> None:
    async with console("train") as c:
        await c.shows("step=40 loss=")
        log = c.root / ".jupiter" / "runs" / "python-0002-train" / "worker.log"
        with log.open("a") as file:
            file.write("".join(f"later line {i}\n" for i in range(100)))
        await c.shows("later line 99")
        await c.press("g")
        await c.shows("step=1 loss")
        with log.open("a") as file:
            file.write("newest line\n")
        await c.until(lambda: c.app.desk.picture.log.lines[-1] == "newest line", "read")
        await c.pilot.pause(0.1)
        assert "step=1 loss" in c.screen()
        assert "newest line" not in c.screen()


async def test_smoothing_changes_live_and_zoom_gives_room(console: Open) -> None:
    async with console("train") as c:
        await c.shows("smoothed 0.6")
        await c.press("plus")
        await c.shows("smoothed 0.8")
        await c.press("minus", "minus", "minus")
        await c.until(lambda: "smoothed" not in c.screen(), "no smoothing")
        await c.press("z")
        await c.until(lambda: "queued tokens" not in c.screen(), "the log alone")
        await c.press("z")
        await c.until(lambda: "step=40 loss=" not in c.screen(), "the curves alone")
        await c.press("z")
        await c.shows("queued tokens", "step=40 loss=")


# -- review --------------------------------------------------------------------------------------------
async def test_accept_reject_and_unlimited_undo(console: Open) -> None:
    async with console("review") as c:
        await c.press("3")
        await c.shows("sample 1 of 12")
        await c.press("a")
        await c.gave(Review(sample="s2-01-abcdef", verdict="accept"))
        await c.shows("sample 2 of 12", "reviewed 1")
        await c.press("x")
        await c.shows("Why reject it?", "1  wrong")
        await c.press("1")
        await c.gave(Review(sample="s2-02-abcdef", verdict="reject", reason="wrong"))
        await c.shows("sample 3 of 12", "rejected 5", "reviewed 2", "3 Review·10")
        await c.press("u", "u")
        await c.gave(Review(sample="s2-02-abcdef", verdict="undecided"))
        await c.gave(Review(sample="s2-01-abcdef", verdict="undecided"))
        await c.shows("sample 1 of 12", "ok accepted by the filters", "reviewed 0", "3 Review·12")


async def test_a_reason_may_be_typed_and_escape_rejects_nothing(console: Open) -> None:
    async with console("review") as c:
        await c.press("3")
        await c.shows("sample 1 of 12")
        await c.press("x")
        await c.shows("Why reject it?")
        await c.press("escape")
        await c.press("x")
        await c.shows("Why reject it?")
        await c.type("made up")
        await c.gave(Review(sample="s2-01-abcdef", verdict="reject", reason="made up"))
        assert len(c.commands) == 1
        await c.press("k")
        await c.shows("!! rejected by user: made up")


async def test_the_filter_takes_status_and_text(console: Open) -> None:
    async with console("review") as c:
        await c.press("3")
        await c.shows("sample 1 of 12")
        await c.press("slash")
        await c.shows("Filter samples")
        await c.type("rejected")
        await c.shows("sample 1 of 4", "filter: rejected")
        await c.press("slash")
        await c.until(lambda: len(c.app.screen_stack) == 2, "the sheet")
        await c.press("end", *["backspace"] * 10)
        await c.type("Question 7:")
        await c.shows("sample 1 of 1", "Question 7")


async def test_the_review_is_finished_after_asking(console: Open) -> None:
    async with console("review") as c:
        await c.press("3")
        await c.shows("F finish", "** F finishes")
        await c.press("F")
        await c.shows("Finish the review of cycle python-0002", "12 samples")
        await c.press("y")
        await c.gave(FinishReview(cycle="python-0002"))
        await c.until(lambda: "Review·" not in c.screen(), "nothing waits")


# -- promotion -----------------------------------------------------------------------------------------
async def test_promotion_wants_the_candidates_name(console: Open) -> None:
    async with console("decision") as c:
        await c.press("5")
        await c.shows("p promote")
        await c.press("p")
        await c.shows("python-0002 shall replace base", "Type  python-0002")
        await c.type("python-0001")
        await c.shows("nothing was done")
        assert c.commands == []
        await c.press(*["backspace"] * 11)
        await c.type("python-0002")
        await c.gave(Decide(cycle="python-0002", answer="promote"))


async def test_promotion_against_the_gate_wants_the_word(console: Open) -> None:
    async with console("decision", verdict="worse") as c:
        await c.press("5")
        await c.shows("!! WORSE", "against the gate")
        await c.press("p")
        await c.shows("goes against the gate", "Type  OVERRIDE")
        await c.type("python-0002")
        assert c.commands == []
        await c.press(*["backspace"] * 11)
        await c.type("OVERRIDE")
        await c.gave(Decide(cycle="python-0002", answer="promote", override=True))


async def test_keep_asks_once(console: Open) -> None:
    async with console("decision") as c:
        await c.press("5")
        await c.shows("h keep")
        await c.press("h")
        await c.shows("Keep base?")
        await c.press("y")
        await c.gave(Decide(cycle="python-0002", answer="keep"))
        await c.shows("kept the generator")


async def test_rollback_to_a_chosen_generator_wants_its_name(console: Open) -> None:
    async with console("finished") as c:
        await c.press("5")
        await c.shows("ok active python-0001")
        await c.press("k")
        await c.shows("b roll back")
        await c.press("b")
        await c.shows("base shall be the generator of python again")
        await c.type("base")
        await c.gave(Rollback(domain="python", to="base"))
        await c.shows("ok active base")


async def test_a_refusal_is_shown_in_words(console: Open) -> None:
    async with console("decision") as c:
        await c.press("5")
        await c.shows("h keep")
        c.app.desk.bridge._poll_s = 60.0
        await c.pilot.pause(0.5)
        # Someone else answers, and this console has not looked since.
        RecordedWorkspace(c.root, []).perform(Decide(cycle="python-0002", answer="keep", by="other"))
        await c.press("h")
        await c.shows("Keep base?")
        await c.press("y")
        await c.shows("Refused:")


# -- domain --------------------------------------------------------------------------------------------
async def test_a_new_domain_is_made_and_a_broken_file_explained(console: Open) -> None:
    async with console("empty") as c:
        await c.press("2")
        await c.shows("n new")
        await c.press("n")
        await c.shows("Name of the new domain")
        await c.type("cooking")
        await c.shows("cooking", "made ")
        path = c.root / "config" / "domains" / "cooking.yaml"
        assert path.is_file()
        path.write_text(path.read_text() + "\nnonsense_key: 1\n")
        await c.shows("not accepted", "nonsense_key", "1 problems")
        await c.press("n")
        await c.shows("Name of the new domain")
        await c.type("Bad Name")
        await c.shows("cannot be the name of a domain")


async def test_edit_hands_the_terminal_to_the_editor_or_says_that_it_cannot(
    console: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", "true")
    async with console("empty") as c:
        await c.press("2")
        await c.shows("e edit")
        await c.press("e")
        await c.shows("cannot be handed to an editor")


# -- help, palette, leaving ----------------------------------------------------------------------------
async def test_help_and_alerts(console: Open) -> None:
    async with console("failed") as c:
        await c.shows("!! train")
        await c.press("question_mark")
        await c.shows(
            "Keys: Train", "Halt the cycle at the next safe point", "Close the console; the engine and its work go on"
        )
        await c.press("escape")
        await c.press("exclamation_mark")
        await c.shows("Alerts", "Training diverged", "Notices, newest first")


async def test_the_palette_holds_the_actions_that_work_now(console: Open) -> None:
    async with console("train") as c:
        await c.shows("p pause")
        titles = {command.title for command in c.app.get_system_commands(c.app.screen)}
        assert "pause  (p)" in titles
        assert "page: Review  (3)" in titles
        assert "theme: mono" in titles
        assert not any(title.startswith("start ") for title in titles)
        command = next(x for x in c.app.get_system_commands(c.app.screen) if x.title == "page: History  (6)")
        result = command.callback()
        assert isinstance(result, Awaitable)
        await result
        await c.shows("[6 History]")


async def test_a_click_on_a_tab_opens_its_page(console: Open) -> None:
    async with console("train") as c:
        await c.shows("40/60 steps")
        await c.pilot.click("#tabs", offset=(c.screen().split("\n")[1].index("6 History"), 0))
        await c.shows("[6 History]")


async def test_a_flood_of_log_lines_loses_none(console: Open) -> None:
    async with console("train") as c:
        await c.shows("step=40 loss=")
        before = c.app.desk.picture.log.total
        log = c.root / ".jupiter" / "runs" / "python-0002-train" / "worker.log"
        with log.open("a") as file:
            file.write("".join(f"flood {i} {'x' * 100}\n" for i in range(50_000)))
        await c.shows("flood 49999")
        assert c.app.desk.picture.log.total == before + 50_000


async def test_q_detaches(console: Open) -> None:
    async with console("train") as c:
        await c.press("q")
        await c.until(lambda: not c.app.is_running, "ended")
        assert c.app.return_value is None


async def test_a_workspace_that_cannot_be_opened_ends_with_its_error(tmp_path: Path) -> None:
    from jupiter_engine.errors import ConfigError
    from jupiter_tui.bridge import open_workspace

    (tmp_path / "file").write_text("not a folder")
    app = ConsoleApp(opener=lambda _: open_workspace(tmp_path / "file"))
    async with app.run_test() as pilot:
        for _ in range(100):
            await pilot.pause(0.02)
            if not app.is_running:
                break
    assert isinstance(app.return_value, ConfigError)
