"""The Fleet page's text, drawn from played fleets at many widths."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from jupiter_engine.protocol.fleet import FleetPicture, Gpu, GroupPlan, NodeStatus, Transfer
from jupiter_engine.protocol.journal import STAGES
from jupiter_engine.protocol.state import CycleState, Notice, StageState
from jupiter_engine.units import GIB
from jupiter_tui.view import findings, fleet, groups, header, log, node, nodes, text
from jupiter_tui.view.picture import Picture
from tests.tui import played_fleet as played

WIDTHS = (58, 78, 116, 196)


def table(shown: FleetPicture, width: int, *, chosen: int = 0) -> list[str]:
    form = nodes.layout(shown.nodes, width)
    worst = nodes.worst_by_node(shown.findings)
    rows = [
        nodes.node_line(one, form, time.time(), chosen=i == chosen, worst=worst.get(one.name))
        for i, one in enumerate(shown.nodes)
    ]
    return [text.plain(line) for line in [nodes.head_line(form), *rows]]


# -- the table -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_fit_every_width_and_say_every_state_in_words(width: int) -> None:
    rows = table(played.several(), width)
    assert max(map(len, rows)) <= width
    shown = "\n".join(rows)
    for part in ("> ok laptop", "ok studio", ".. mini-1", "!! mini-2", "lost 3m", "!! mini-3", "cannot be used"):
        assert part in shown
    if width >= 78:
        assert "45/64G" in rows[1]
        assert "refuses connections" in shown
        assert "97%" in rows[6]


def test_columns_come_in_the_order_of_their_worth() -> None:
    titles = {width: [c.title for c in nodes.layout(played.several().nodes, width).columns] for width in WIDTHS}
    assert titles[58][:3] == ["ROLE", "MEMORY", "GPU"]
    assert {"LOAD", "DISK", "RTT", "CPU"} <= set(titles[78])
    assert {"HOST", "CHIP", "CLOCK"} <= set(titles[116])
    assert titles[196] == [c.title for c in nodes._COLUMNS]
    for width in WIDTHS[:-1]:
        assert set(titles[width]) < set(titles[196])


def test_a_transfer_is_shown_with_bytes_and_time_left() -> None:
    words = "environment: sending 44%  12.0 MiB of 27.0 MiB  11.2 MiB/s  ETA 1s"
    assert words in table(played.several(), 116)[2]
    wide = table(played.several(), 230)[2]
    assert words in wide
    assert "45/64G" in wide, "where there is room the numbers stay"
    unknown = Transfer(what="inputs", sent_bytes=0, total_bytes=0, bytes_per_s=None, eta_s=None, step="verifying")
    assert nodes.transfer_text(unknown) == "inputs: verifying"


def test_a_verdict_of_the_doctor_marks_the_row() -> None:
    shown = played.several(findings=played.FINDINGS, findings_at=time.time())
    rows = table(shown, 116)
    assert "** studio" in rows[2]
    assert "ok box" in rows[6], "an info is no warning"
    worse = replace(shown, findings=(replace(played.FINDINGS[1], severity="fail"), *played.FINDINGS))
    assert "!! studio" in table(worse, 116)[2]


def test_names_get_the_room_that_is_left_and_are_cut_visibly() -> None:
    long = FleetPicture(nodes=(played.node("a-name-that-is-rather-long-for-a-table"),))
    assert "a-name-that-is-r… " in table(long, 78)[1]
    assert "a-name-that-is-rather-l…" in table(long, 196)[1]


def test_a_clock_that_is_off_and_a_full_disk_stand_out() -> None:
    known = played.facts("n", clock_skew_s=-4.2, disk_free_bytes=3 * GIB, load_1m=80.0)
    shown = played.node("n", facts=known)
    form = nodes.layout((shown,), 196)
    line = nodes.node_line(shown, form, 0.0, chosen=False)
    styles = {part.strip(): style for part, style in line}
    assert styles["-4.2 s"] == "warn"
    assert styles["3.0G"] == "warn"
    assert styles["80.0"] == "warn"


def test_what_is_not_known_is_a_dash_never_a_number() -> None:
    bare = played.facts("n", memory_total_bytes=0, rtt_s=None, clock_skew_s=None, environment="", gpus=(Gpu(name="x"),))
    cells = {c.title: c.cell(played.node("n"), bare)[0] for c in nodes._COLUMNS}
    assert (cells["MEMORY"], cells["RTT"], cells["CLOCK"], cells["GPU"], cells["GPU MEM"]) == ("-", "-", "-", "-", "-")
    assert cells["ENV"] == "none"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (0.0004, "0.4 ms"), (0.0123, "12 ms"), (2.13, "2.1 s"), (-0.25, "-250 ms"), (-4000, "-1h06m")],
)
def test_seconds(seconds: float | None, shown: str) -> None:
    assert nodes.seconds_text(seconds, signed=True) == (f"+{shown}" if seconds and seconds > 0 else shown)


def test_the_title_counts_and_names_the_common_environment() -> None:
    assert nodes.nodes_title(FleetPicture()) == "Nodes"
    assert nodes.nodes_title(played.several()) == "Nodes  3 of 6 answer  environment 7f3c9a1e on 2"


# -- hostile texts -------------------------------------------------------------------------------------
def everything(shown: FleetPicture, width: int) -> list[text.Line]:
    form = nodes.layout(shown.nodes, width)
    lines = [nodes.head_line(form)]
    for one in shown.nodes:
        lines.append(nodes.node_line(one, form, 1.0, chosen=True))
        lines += node.detail_lines(one, shown.findings, "train", 1.0, width)
    lines += findings.list_findings(shown, width, 0, folded=False).lines
    lines += groups.group_lines(shown, width)
    lines += [[(title, "")] for title in (nodes.nodes_title(shown), groups.groups_title(shown))]
    return [*lines, header.alert_line(Picture(loaded=True, fleet=shown), width)]


@pytest.mark.parametrize("width", WIDTHS)
def test_no_text_of_a_node_drives_the_terminal_or_leaves_its_pane(width: int) -> None:
    lines = everything(played.hostile(), width)
    shown = text.plain_lines(lines)
    assert not [c for c in shown if c != "\n" and (ord(c) < 32 or 0x7F <= ord(c) <= 0x9F)]
    assert "\u202e" not in shown
    assert max(len(text.plain(line)) for line in lines) <= width
    assert "[bold red]" in shown, "markup is text like any other"


@given(st.text(max_size=80), st.integers(20, 220))
def test_any_text_fits_and_is_harmless(words: str, width: int) -> None:
    known = played.facts(words, chip=words, versions={words: words}, environment=words)
    status = NodeStatus(name=words, host=words, role=words, local=False, state="online", facts=known, problem=words)
    plan = GroupPlan(name=words, nodes=(words, words), twin="mlx", backend="ring", launcher="direct", reason=words)
    lines = everything(FleetPicture(nodes=(status,), groups=(plan,)), width)
    for line in lines:
        plain = text.plain(line)
        assert len(plain) <= max(width, 60)
        assert not [c for c in plain if ord(c) < 32 or 0x7F <= ord(c) <= 0x9F]


# -- one node ------------------------------------------------------------------------------------------
def test_everything_that_is_known_of_a_node_is_told() -> None:
    shown = played.several(findings=played.FINDINGS, findings_at=1.0)
    box = next(one for one in shown.nodes if one.name == "box")
    said = text.plain_lines(node.detail_lines(box, shown.findings, "evaluate, train", time.time(), 160))
    for part in (
        "ok box  answers",
        "evaluate, train",
        "NVIDIA GeForce RTX 4090, 97% busy, 22.0 GiB of 24.0 GiB, 71 °C, 410 of 450 W, driver 580.95.05",
        "clock +4.2 s against ours",
        "round trip 0.4 ms",
        "torch on CUDA",
        "jupiter 0.1.0, mlx 0.32.4, numpy 2.4.6",
        "en2         thunderbolt 10.211.0.1/30 80 Gb/s",
        "192.168.1.0/24",
        "sleep 0, womp 1",
        "the system's own",
        "none that Jupiter put there",
    ):
        assert part in said
    assert "own-name" not in said, "only what is to be mended is repeated here"
    studio = next(one for one in shown.nodes if one.name == "studio")
    said = text.plain_lines(node.detail_lines(studio, shown.findings, "train", time.time(), 100))
    assert "environment: sending 44%" in said
    assert "may fall asleep" in said
    assert "Darwin 25.2.0 arm64, build 25C56" in said


def test_a_node_that_cannot_be_used_says_why_and_what_to_do() -> None:
    lost = played.several().nodes[3]
    said = text.plain_lines(node.detail_lines(lost, (), "", time.time(), 60))
    assert "!! mini-2  lost 3m" in said
    assert "mini-2.local refuses connections." in said
    assert "-> switch on Remote Login there" in said


# -- the doctor ----------------------------------------------------------------------------------------
def test_findings_are_listed_with_fix_and_key_and_the_well_ones_folded() -> None:
    shown = FleetPicture(findings=played.FINDINGS, findings_at=1.0)
    listed = findings.list_findings(shown, 100, 1, folded=True)
    said = text.plain_lines(listed.lines)
    assert [one.check for one in listed.shown] == ["unreachable", "sleep", "own-name"]
    assert said.splitlines()[listed.starts[1]].startswith("> ** sleep  studio")
    assert "$ on studio: caffeinate -is   [f does it]" in said
    assert "-> switch on Remote Login there" in said
    assert "ok 1 check is well" in said
    assert "More than 100 GiB" not in said
    unfolded = findings.list_findings(shown, 100, 0, folded=False)
    assert "ok disk  More than 100 GiB are free." in text.plain_lines(unfolded.lines)
    assert len(unfolded.shown) == 4
    assert "[f does it]" not in text.plain_lines(unfolded.lines), "the chosen one has no safe fix"
    title = findings.doctor_title(shown, 193.0)
    assert title == "Doctor  1 to mend, 1 warning  3m12s ago"
    assert "has not looked yet" in text.plain_lines(findings.list_findings(FleetPicture(), 80, 0, folded=True).lines)


# -- groups --------------------------------------------------------------------------------------------
def test_a_group_shows_wiring_launcher_reason_and_what_comes_first() -> None:
    said = text.plain_lines(groups.group_lines(FleetPicture(groups=(played.RING,)), 110))
    for part in (
        "ok macs: ring through mlx.launch, 3 nodes",
        "mini-1 has Thunderbolt 4, which has no RDMA",
        "0 studio",
        "Thunderbolt 40 Gb/s 0.42 ms",
        "back to studio",
        "before the first launch:",
        "on studio: sudo ifconfig en2 10.211.0.1/30",
    ):
        assert part in said
    broken = replace(played.RING, problems=("mini-2 has not said yet what it is.",))
    said = text.plain_lines(groups.group_lines(FleetPicture(groups=(broken,)), 110))
    assert "!! macs: ring" in said
    assert "!! mini-2 has not said yet" in said
    assert groups.groups_title(FleetPicture(groups=(broken,))) == "Groups  1  1 cannot be launched"
    assert "trains alone" in text.plain_lines(groups.group_lines(FleetPicture(), 80))


def test_islands_are_named_before_the_groups() -> None:
    said = "Islands: macs (studio, mini-1), box. studio merges what they have learnt every 10m00s."
    first, *rest = groups.group_lines(FleetPicture(groups=(played.RING,), islands=said), 110)
    assert text.plain(first) == said
    assert "ok macs: ring" in text.plain_lines(rest)
    alone = text.plain_lines(groups.group_lines(FleetPicture(islands=said), 60))
    assert "trains alone" not in alone
    assert alone.replace("\n", " ") == said


# -- alerts, cluster file ------------------------------------------------------------------------------
def test_lost_machines_and_failures_are_alerts_once_each() -> None:
    shown = played.several(findings=played.FINDINGS, findings_at=1.0)
    found = header.alerts(Picture(loaded=True, fleet=shown))
    assert found[0] == ("bad", "mini-2.local refuses connections. -> switch on Remote Login there  (1)")
    assert found[1][1].startswith("mini-3: another key")
    assert len(found) == 2, "what the doctor says of a lost machine is known already"
    assert "1 Fleet·2!" in text.plain(header.tabs_line(Picture(loaded=True, fleet=shown), "train", 100))


def test_a_cluster_file_that_is_not_accepted_is_told_in_place_of_the_table() -> None:
    broken = Picture(loaded=True, cluster_problems=("cluster.yaml, line 3: `hots` is unknown",))
    assert "line 3" in text.plain_lines(fleet.no_nodes_lines(broken, 80))
    nodes_of_file = [{"name": None, "host": "localhost", "abilities": ["evaluate", "train"]}]
    assert fleet.abilities({"nodes": nodes_of_file}, "localhost") == "evaluate, train"
    assert fleet.abilities({"nodes": nodes_of_file}, "other") == ""


# -- ranks that stand still ----------------------------------------------------------------------------
def cycle_in_training(started_at: float) -> CycleState:
    stages = {name: StageState(stage=name, status="done") for name in STAGES}
    stages["train"] = StageState(stage="train", status="running", run="r", started_at=started_at)
    for later in list(STAGES)[list(STAGES).index("train") + 1 :]:
        stages[later] = StageState(stage=later)
    return CycleState(
        id="python-0001",
        domain="python",
        number=1,
        mode="auto",
        remaining=0,
        settings={},
        created_at=1.0,
        by="user",
        stages=stages,
    )


def test_a_stall_is_shown_until_the_ranks_go_on() -> None:
    def notice(at: float, words: str) -> Notice:
        return Notice(at=at, cycle="python-0001", stage="train", level="warning", text=words)

    cycle = cycle_in_training(10.0)
    standing = notice(20.0, "STALLED: no step for 41 s (a step takes 2.0 s); the others wait for rank 3 on mini-2")
    assert "rank 3 on mini-2" in log.stalled(cycle, [standing])
    assert log.stalled(cycle, [standing, notice(25.0, "mini-1 does not answer any more")])
    assert log.stalled(cycle, [standing, notice(30.0, "the ranks go on: step 9 after 44 s of standing still")]) == ""
    again = notice(30.0, "rank 3 died; starting the ranks again from the last checkpoint in 5 s")
    assert log.stalled(cycle, [standing, again]) == ""
    assert log.stalled(cycle_in_training(25.0), [standing]) == "", "of an earlier attempt"
