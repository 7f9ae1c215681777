"""Which machine does what: roles decide, machines that do not answer are passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from jupiter_engine.cluster.placement import begun_islands, islands_text, place, require_duties
from jupiter_engine.errors import NoUsableNode
from jupiter_engine.settings.cluster import ClusterSettings, load_cluster

HERE = "{host: localhost, name: here, device_type: cpu, role: hybrid}"


def cluster(folder: Path, nodes: str, more: str = "") -> ClusterSettings:
    file = folder / "cluster.yaml"
    file.write_text(f"nodes: [{nodes}]\n{more}")
    return load_cluster(file).value


@pytest.mark.parametrize("stage", ["prepare", "collect", "filter", "queue", "gate"])
def test_stages_on_the_workspaces_own_files_run_where_it_lies(stage: str, tmp_path: Path) -> None:
    settings = cluster(tmp_path, "{host: far, device_type: cpu, role: hybrid}")
    assert place(stage, settings).here
    assert not place(stage, settings).nodes


@pytest.mark.parametrize(
    ("stage", "nodes", "where"),
    [
        ("generate", f"{HERE}, {{host: g, role: generator, device_type: mac}}", "g"),
        ("generate", f"{HERE}, {{host: h, role: hybrid, device_type: cpu, can_train: false}}", "here"),
        ("generate", "{host: h, role: hybrid, device_type: cpu}", "h"),
        ("evaluate", f"{HERE}, {{host: e, role: evaluator, device_type: cpu}}", "e"),
        ("evaluate", f"{HERE}, {{host: t, role: trainer, device_type: mac}}", "here"),
        (
            "evaluate",
            "{host: localhost, role: generator, name: here}, {host: t, role: trainer, device_type: mac}",
            "t",
        ),
    ],
)
def test_a_machine_kept_for_one_duty_comes_first_then_this_one(
    stage: str, nodes: str, where: str, tmp_path: Path
) -> None:
    assert place(stage, cluster(tmp_path, nodes)).names() == (where,)


def test_a_machine_that_does_not_answer_is_passed_over(tmp_path: Path) -> None:
    settings = cluster(tmp_path, f"{HERE}, {{host: g, role: generator, device_type: mac}}")
    assert place("generate", settings, lost={"g"}).names() == ("here",)
    alone = cluster(tmp_path, "{host: a, role: hybrid, device_type: cpu}")
    with pytest.raises(NoUsableNode, match="a may do it but does not answer"):
        place("evaluate", alone, lost={"a"})


def test_a_group_trains_without_its_lost_member_and_under_another_leader(tmp_path: Path) -> None:
    nodes = ", ".join(f"{{host: m{i}, device_type: mac, role: trainer}}" for i in (1, 2, 3))
    settings = cluster(tmp_path, f"{HERE}, {nodes}", "groups: [{name: macs, nodes: [m1, m2, m3]}]\n")
    whole = place("train", settings)
    assert (whole.names(), whole.here) == (("m1", "m2", "m3"), False)
    assert whole.group is not None
    assert place("train", settings, lost={"m1"}).names() == ("m2", "m3")
    with pytest.raises(NoUsableNode, match="no machine of the group macs answers"):
        place("train", settings, lost={"m1", "m2", "m3"})


def test_every_duty_of_a_cycle_needs_a_machine(tmp_path: Path) -> None:
    require_duties(cluster(tmp_path, "{host: g, role: generator}, {host: t, role: trainer, device_type: mac}"))
    with pytest.raises(NoUsableNode, match="generate"):
        require_duties(cluster(tmp_path, "{host: t, role: trainer, device_type: mac}"))


ISLANDS = (
    "groups: [{name: Studio Macs, nodes: [m1, m2]}, {name: studio-macs, nodes: [m3]}]\n"
    "islands: {groups: [Studio Macs, studio-macs, box]}\n"
)


def islands_of(folder: Path) -> ClusterSettings:
    nodes = ", ".join(f"{{host: m{i}, device_type: mac, role: trainer}}" for i in (1, 2, 3))
    return cluster(folder, f"{HERE}, {nodes}, {{host: box, device_type: nvidia, role: trainer}}", ISLANDS)


def test_islands_train_under_a_hub_and_each_has_a_name_of_its_own(tmp_path: Path) -> None:
    placement = place("train", islands_of(tmp_path))
    assert placement.names() == ("here", "m1", "m2", "m3", "box")
    assert [(one.name, one.names()) for one in placement.islands] == [
        ("studio-macs", ("m1", "m2")),
        ("studio-macs-2", ("m3",)),
        ("box", ("box",)),
    ]
    assert not placement.here
    assert placement.group is None
    assert place("generate", islands_of(tmp_path)).islands == ()


def test_islands_go_without_lost_machines_and_keep_their_names(tmp_path: Path) -> None:
    settings = islands_of(tmp_path)
    placement = place("train", settings, lost={"here", "m1", "m3"})
    # The hub was lost: the first island's leading machine merges.
    assert placement.names() == ("m2", "box")
    assert [(one.name, one.names()) for one in placement.islands] == [("studio-macs", ("m2",)), ("box", ("box",))]
    assert place("train", settings, lost={"m1", "m2"}).islands[0].name == "studio-macs-2"
    with pytest.raises(NoUsableNode, match="no machine of any island answers"):
        place("train", settings, lost={"m1", "m2", "m3", "box"})


def test_islands_that_were_begun_are_found_by_their_machines(tmp_path: Path) -> None:
    settings = islands_of(tmp_path)
    placement = begun_islands(settings, ("box", "m2", "m3"))
    assert placement.names() == ("box", "m2", "m3")
    assert [(one.name, one.names()) for one in placement.islands] == [
        ("studio-macs", ("m2",)),
        ("studio-macs-2", ("m3",)),
        ("box", ("box",)),
    ]


def test_who_trains_apart_is_one_sentence(tmp_path: Path) -> None:
    assert islands_text(islands_of(tmp_path)) == (
        "Islands: Studio Macs (m1, m2), studio-macs (m3), box. here merges what they have learnt every 10m00s."
    )
    assert islands_text(cluster(tmp_path, HERE)) == ""
