"""From a workspace to the planner's question: model, recipe, machines and what was measured on them before."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from jupiter_engine.cluster.placement import Placement, place
from jupiter_engine.cluster.probe import probe_local
from jupiter_engine.cluster.readers import apple, nvidia
from jupiter_engine.cluster.readers.reading import ToolOutput
from jupiter_engine.errors import NoUsableNode, UsageError
from jupiter_engine.files import read_json, write_json
from jupiter_engine.planning.budget import Device, device_from_settings, device_of
from jupiter_engine.planning.plan import Member, Outlook, Question, outlook
from jupiter_engine.planning.time import Calibration, Link
from jupiter_engine.protocol.fleet import NodeFacts
from jupiter_engine.protocol.shapes import PRESETS, SMOLLM2_135M, Shape, shape_of_config
from jupiter_engine.protocol.specs import Recipe
from jupiter_engine.protocol.state import State
from jupiter_engine.settings.cluster import ClusterSettings, NodeSpec, launch_spec, node_twin
from jupiter_engine.settings.domain import DomainSettings
from jupiter_engine.settings.reader import nearest

CALIBRATIONS: Final = "calibration.json"
"""In .jupiter: what was measured on which machine."""
DEVICES: Final = "devices.json"
"""In .jupiter: what machines said of themselves when `jupiter plan` last asked them."""
_TOOL_S: Final = 5.0
_NVIDIA_QUERY: Final = (
    "index,uuid,name,memory.total,memory.used,utilization.gpu,temperature.gpu,power.draw,power.limit,"
    "driver_version,mig.mode.current"
)


class Calibrations(msgspec.Struct, frozen=True, kw_only=True):
    """calibration.json"""

    entries: tuple[Calibration, ...] = ()


class Devices(msgspec.Struct, frozen=True, kw_only=True):
    """devices.json"""

    by_node: dict[str, Device] = {}


# -- what is remembered --------------------------------------------------------------------------------
def calibrations(root: Path) -> tuple[Calibration, ...]:
    path = root / ".jupiter" / CALIBRATIONS
    if not path.exists():
        return ()
    found = read_json(path, Calibrations)
    assert isinstance(found, Calibrations)
    return found.entries


def remember_calibration(root: Path, new: Calibration) -> None:
    """Keep it instead of an earlier one of the same training on the same device with the same versions."""

    def key(one: Calibration) -> bytes:
        whole = replace(one, micro_batch_s=0.0, update_s=0.0, peak_bytes=0, steps=0, seconds=0.0, at=0.0)
        return msgspec.json.encode(whole, order="deterministic")

    kept = tuple(one for one in calibrations(root) if key(one) != key(new))
    write_json(root / ".jupiter" / CALIBRATIONS, Calibrations(entries=(*kept, new)))


def remembered_devices(root: Path) -> dict[str, Device]:
    path = root / ".jupiter" / DEVICES
    if not path.exists():
        return {}
    found = read_json(path, Devices)
    assert isinstance(found, Devices)
    return found.by_node


def remember_devices(root: Path, found: Mapping[str, Device]) -> None:
    write_json(root / ".jupiter" / DEVICES, Devices(by_node={**remembered_devices(root), **found}))


# -- machines ------------------------------------------------------------------------------------------
def local_facts(root: Path) -> NodeFacts:
    """This machine with its cards or its GPU's limit, which take a tool to read."""
    facts = probe_local(root)
    if facts.accelerator == "CUDA":
        said = _tool("nvidia-smi", f"--query-gpu={_NVIDIA_QUERY}", "--format=csv,noheader,nounits")
        try:
            return replace(facts, gpus=tuple(card.gpu for card in nvidia.cards(said)))
        except ToolOutput:
            # The tool is there, but no driver or card: torch will use the processor.
            return replace(facts, accelerator="cpu")
    if platform.system() == "Darwin":
        said = _tool("sysctl", "iogpu.wired_limit_mb", "machdep.cpu.brand_string")
        try:
            read = apple.sysctl(said)
        except ToolOutput:
            return facts
        return replace(facts, wired_limit_mb=read.wired_limit_mb, chip=read.chip or facts.chip)
    return facts


def _tool(*argv: str) -> str:
    """What a tool prints; empty if it is missing, fails or is late."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=_TOOL_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def members_of(
    root: Path, cluster: ClusterSettings, facts: Mapping[str, NodeFacts] | None = None
) -> tuple[Member, ...]:
    """Who trains, as the cluster file places it. `facts`: by node, of those that were asked just now."""
    placement = place("train", cluster)
    known = remembered_devices(root)
    if not placement.nodes:
        return (Member(device=_here(root, cluster, None), ranks=launch_spec(cluster).ranks),)

    def member(node: NodeSpec, ranks: int, over: str, island: str = "") -> Member:
        device = _device(root, cluster, node, facts, known)
        if device.kind == "cuda" and not device.measured:
            # The cluster file tells a card's memory, not how many there are: a rank has one to itself.
            device = replace(device, cards=max(1, ranks))
        return Member(
            device=device,
            ranks=ranks,
            link=_link(node, placement, over),
            island=island,
            micro_batch=node.micro_batch_sequences,
        )

    if placement.islands:
        return tuple(
            member(node, island.group.ranks_per_node, island.group.over, island.name)
            for island in placement.islands
            for node in island.nodes
        )
    group = placement.group
    if group is None:
        return tuple(member(node, launch_spec(cluster).ranks, "auto") for node in placement.nodes)
    return tuple(member(node, group.ranks_per_node, group.over) for node in placement.nodes)


def _here(root: Path, cluster: ClusterSettings, node: NodeSpec | None) -> Device:
    twin = launch_spec(cluster).twin
    return device_of(local_facts(root), twin=twin, name=node.title() if node is not None else "this machine")


def _device(
    root: Path,
    cluster: ClusterSettings,
    node: NodeSpec,
    facts: Mapping[str, NodeFacts] | None,
    known: Mapping[str, Device],
) -> Device:
    """Asked just now, else what it said last, else what the cluster file says."""
    name, twin = node.title(), node_twin(cluster, node)
    if facts is not None and name in facts:
        return device_of(facts[name], twin=twin, name=name)
    if node.is_local():
        return _here(root, cluster, node)
    if name in known:
        return known[name]
    return device_from_settings(node, twin)


def _link(node: NodeSpec, placement: Placement, over: str) -> Link:
    """How a member reaches the others."""
    if len(placement.nodes) == 1:
        return "machine"
    if over in ("thunderbolt", "ethernet"):
        return "thunderbolt" if over == "thunderbolt" else "ethernet"
    return node.connection_type or "ethernet"


# -- model and data ------------------------------------------------------------------------------------
def with_preset(recipe: Recipe, preset: str) -> Recipe:
    """The recipe for a model of `preset` from scratch; UsageError for an unknown name."""
    if preset not in PRESETS:
        guess = nearest(preset, list(PRESETS))
        hint = f"did you mean {guess}? " if guess else ""
        raise UsageError(f"there is no preset {preset!r} ({hint}known: {', '.join(PRESETS)})")
    return replace(recipe, start="scratch", preset=preset)


def start_shape(settings: DomainSettings, state: State, domain: str) -> Shape:
    """The shape of what would be trained, from the recipe and the model folders that exist."""
    recipe = settings.training
    if recipe.start == "scratch":
        shape = PRESETS[recipe.preset or "nano"].shape
        vocabulary = (
            recipe.vocabulary if recipe.tokenizer == "corpus" else _base_shape(settings, state, domain).vocab_size
        )
        # As scratch models are made: rounded up to a multiple of 64.
        return replace(shape, vocab_size=-(-vocabulary // 64) * 64)
    if recipe.start != "generator":
        return _folder_shape(Path(recipe.start))
    return _base_shape(settings, state, domain)


def _base_shape(settings: DomainSettings, state: State, domain: str) -> Shape:
    generator = state.active_generator(domain)
    if generator is not None and (Path(generator.model.folder) / "config.json").exists():
        return _folder_shape(Path(generator.model.folder))
    if settings.base == "smollm2":
        return SMOLLM2_135M
    if settings.base == "nano":
        return PRESETS["nano"].shape
    return _folder_shape(Path(settings.base))


def _folder_shape(folder: Path) -> Shape:
    path = folder / "config.json"
    try:
        return shape_of_config(msgspec.json.decode(path.read_bytes()))
    except (OSError, msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} describes no model that can be trained: {error}", fix="name a Llama model folder"
        ) from error


def distinct_tokens(state: State, domain: str) -> int | None:
    """Distinct tokens that the domain has at least: those of its newest sealed training data, if it had to repeat some.

    None before the first, and where the data took only a part of the domain's text.
    """
    for cycle in reversed(list(state.cycles.values())):
        stage = cycle.stages["queue"]
        if cycle.domain == domain and stage.status == "done":
            if max(stage.result.get("epochs", {}).values(), default=0.0) <= 1.0:
                return None
            count = stage.result.get("distinct_tokens")
            return count if isinstance(count, int) and count > 0 else None
    return None


# -- the question --------------------------------------------------------------------------------------
def question_of(
    root: Path,
    state: State,
    domain: str,
    settings: DomainSettings,
    cluster: ClusterSettings,
    *,
    facts: Mapping[str, NodeFacts] | None = None,
    preset: str | None = None,
    tokens: int | None = None,
) -> Question:
    """What the planner is asked for a domain. `preset`: another model than the domain's, from scratch."""
    if preset is not None:
        settings = replace(settings, training=with_preset(settings.training, preset))
    rounds = cluster.islands.rounds if cluster.islands.groups else None
    return Question(
        shape=start_shape(settings, state, domain),
        recipe=settings.training,
        members=members_of(root, cluster, facts),
        sharding=launch_spec(cluster).sharding,
        rounds=rounds,
        tokens=tokens,
        available=distinct_tokens(state, domain),
        calibrations=calibrations(root),
    )


def nearest_text(answer: Outlook) -> str:
    """What would fit, as a fix."""
    if answer.nearest is None:
        return "choose a smaller model (`jupiter model-info` lists sizes), or give training to a larger machine"
    return "; ".join(answer.nearest.changes) + ": that fits"


def require_workable(root: Path, state: State, domain: str, settings: DomainSettings, cluster: ClusterSettings) -> None:
    """NoUsableNode with the nearest plan that works, if the domain's training cannot fit its machines."""
    answer = outlook(question_of(root, state, domain, settings, cluster), compare=False)
    if answer.fits is False:
        raise NoUsableNode(answer.refusal, title="The plan cannot work", fix=nearest_text(answer))
