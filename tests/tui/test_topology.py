"""The text picture of how nodes are connected."""

from __future__ import annotations

import pytest

from jupiter_engine.protocol.fleet import GroupPlan, Link
from jupiter_tui.view.text import to_ascii
from jupiter_tui.view.topology import plan_lines, topology_lines


def link(a: str, b: str, **more: object) -> Link:
    plain: dict[str, object] = {"kind": "thunderbolt", "a_interface": "en3", "b_interface": "en2"}
    return Link(a=a, b=b, **{**plain, **more})  # type: ignore[arg-type]


RING = (
    link("mac-a", "mac-b", a_address="10.211.0.1", b_address="10.211.0.2", speed_bits_per_s=40 * 10**9),
    link("mac-b", "mac-c", a_address="10.211.0.5", b_address="10.211.0.6", speed_bits_per_s=40 * 10**9),
    link("mac-a", "mac-c", a_interface="en2", b_interface="en3", a_address="10.211.0.9", b_address="10.211.0.10"),
)


def test_a_ring_as_it_is_drawn() -> None:
    assert "\n".join(topology_lines(("mac-a", "mac-b", "mac-c"), RING)) == (
        "╭─ ┌─────────┐\n"
        "│  │ 0 mac-a │\n"
        "│  └─────────┘\n"
        "│    ║ Thunderbolt 40 Gb/s   en3 10.211.0.1 ══ en2 10.211.0.2\n"
        "│  ┌─────────┐\n"
        "│  │ 1 mac-b │\n"
        "│  └─────────┘\n"
        "│    ║ Thunderbolt 40 Gb/s   en3 10.211.0.5 ══ en2 10.211.0.6\n"
        "│  ┌─────────┐\n"
        "│  │ 2 mac-c │\n"
        "│  └─────────┘\n"
        "╰─── ║ Thunderbolt   en3 10.211.0.10 ══ en2 10.211.0.9   back to mac-a"
    )


def test_a_plan_names_its_backend_and_two_nodes_are_no_circle() -> None:
    plan = GroupPlan(
        name="pair",
        nodes=("one", "two"),
        twin="mlx",
        backend="jaccl",
        launcher="mlx.launch",
        links=(
            link("two", "one", speed_bits_per_s=80 * 10**9, rdma=("rdma_en3", "rdma_en2"), rtt_s=0.00041),
            link("one", "two", kind="wifi", a_interface="", b_interface="", speed_bits_per_s=866_000_000),
        ),
    )
    assert plan_lines(plan) == [
        "pair: jaccl through mlx.launch, 2 nodes",
        "   ┌───────┐",
        "   │ 0 one │",
        "   └───────┘",
        "     ║ Thunderbolt 80 Gb/s RDMA 0.41 ms   en2 ══ en3",
        "     : Wi-Fi 866 Mb/s",
        "   ┌───────┐",
        "   │ 1 two │",
        "   └───────┘",
    ]


def test_what_is_no_ring_shows_gaps_and_other_links() -> None:
    lines = topology_lines(("a", "b", "c"), (link("a", "b"), link("d", "b", kind="ethernet")))
    assert "       no link to c" in lines
    assert lines[-2:] == ["also:", "  d ── b: Ethernet   en3 ── en2"]
    assert not any(line.startswith(("╭", "╰")) for line in lines)
    assert topology_lines((), ()) == []
    assert len(topology_lines(("alone",), ())) == 3


def test_a_mesh_lists_what_runs_between_those_who_are_no_neighbours() -> None:
    names = ("a", "b", "c", "d")
    links = [link(one, other) for i, one in enumerate(names) for other in names[i + 1 :]]
    lines = topology_lines(names, links)
    assert [line.split(":")[0].strip() for line in lines[lines.index("also:") + 1 :]] == ["a ══ c", "b ══ d"]


@pytest.mark.parametrize("width", [1, 5, 12, 30, 200])
def test_no_line_is_too_long_and_nothing_can_drive_the_terminal(width: int) -> None:
    names = ("\x1b[2Jmac\n-" + "x" * 300, "b", "c")
    links = (link(names[0], "b", a_address="\x1b]0;t\x07"), link("c", names[0], a_interface="\u202een"))
    for line in topology_lines(names, links, width):
        assert len(line) <= width
        assert line.isprintable()


def test_it_can_be_drawn_in_ascii() -> None:
    for line in topology_lines(("mac-a", "mac-b", "mac-c"), RING):
        assert to_ascii(line).isascii()
        assert len(to_ascii(line)) == len(line)
