"""Checks: the same software everywhere, and new enough."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

from jupiter_engine.cluster.doctor.evidence import Evidence, node_table
from jupiter_engine.cluster.doctor.registry import (
    Theme,
    Verdict,
    by_value,
    command,
    fail,
    info,
    names,
    ok,
    person,
    spread,
    warn,
)
from jupiter_engine.protocol.fleet import NodeFacts

MLX_FLOOR: Final = (0, 32, 1)
"""First release in which a lost ring peer raises instead of hanging (mlx pull request 4060)."""
PYTHON_FLOOR: Final = (3, 11)
ALSO_EQUAL: Final = ("numpy", "safetensors", "transformers", "tokenizers")

_theme = Theme()


def version(text: str) -> tuple[int, ...]:
    """(2, 13, 0) of '2.13.0+cu128'; empty for what is no version."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _package(name: str) -> Callable[[NodeFacts], str | None]:
    return lambda facts: facts.versions.get(name)


def _equal_in_groups(
    e: Evidence, what: str, value: Callable[[NodeFacts], str | None], *, twin: str = "", backend: str = ""
) -> Iterator[Verdict]:
    """A fail for every group whose nodes differ, an ok for every group that agrees."""
    for plan, facts in e.groups():
        if len(plan.nodes) < 2 or (twin and plan.twin != twin) or (backend and plan.backend != backend):
            continue
        found = by_value(facts, value)
        if len(found) > 1:
            text = f"The nodes of group {plan.name} have different versions of {what}: {spread(found)}."
            fix = person("write `environment: push` for all of them, so that Jupiter builds the same everywhere")
            yield fail([name for nodes in found.values() for name in nodes], text, fix)
        elif found:
            only = next(iter(found))
            yield ok(found[only], f"Group {plan.name} has {what} {only} on {names(found[only])}.")


@_theme.check("framework", "The framework of each node is there")
def framework(e: Evidence) -> Iterator[Verdict]:
    good = []
    for name, facts in e.facts.items():
        needed = ("mlx", "mlx-lm") if facts.twin == "mlx" else ("torch",)
        missing = [package for package in needed if package not in facts.versions]
        if not missing:
            good.append(name)
            continue
        spec = e.spec(name)
        pushed = spec is not None and spec.environment == "push" and not e.is_local(name)
        if pushed and not facts.environment:
            yield info((name,), f"Jupiter's environment is not on {name} yet; it is put there before the first run.")
        else:
            extra = "mac" if facts.twin == "mlx" else ("nvidia" if facts.gpus else "cpu")
            text = f"{' and '.join(missing)} cannot be found in the Python of {name}."
            yield fail((name,), text, person(f"on {name}: pip install 'jupiter[{extra}]' into that Python"))
    if good:
        yield ok(good, f"The framework for training is installed on {names(good)}.")


@_theme.check("mlx-version", "MLX is new enough and the same in a group")
def mlx_version(e: Evidence) -> Iterator[Verdict]:
    floor = ".".join(str(part) for part in MLX_FLOOR)
    with_mlx = {name: facts for name, facts in e.facts.items() if facts.twin == "mlx" and "mlx" in facts.versions}
    new = []
    for name, facts in with_mlx.items():
        if version(facts.versions["mlx"]) >= MLX_FLOOR:
            new.append(name)
            continue
        text = f"{name} has MLX {facts.versions['mlx']}; before {floor} a group hangs for ever when a peer dies."
        yield fail((name,), text, person(f"on {name}: pip install 'mlx>={floor}', or write `environment: push` for it"))
    if new:
        yield ok(new, f"MLX is {floor} or later on {names(new)}.")
    yield from _equal_in_groups(e, "mlx", _package("mlx"), twin="mlx")


@_theme.check("torch-version", "torch is the same in a group")
def torch_version(e: Evidence) -> Iterator[Verdict]:
    def plain(facts: NodeFacts) -> str | None:
        return facts.versions.get("torch", "").partition("+")[0] or None

    yield from _equal_in_groups(e, "torch", plain, twin="torch")


@_theme.check("nccl-version", "NCCL is the same in a group")
def nccl_version(e: Evidence) -> Iterator[Verdict]:
    def nccl(facts: NodeFacts) -> str | None:
        return next((facts.versions[name] for name in sorted(facts.versions) if name.startswith("nvidia-nccl")), None)

    yield from _equal_in_groups(e, "NCCL", nccl, backend="nccl")


@_theme.check("jupiter-version", "Jupiter is the same in a group")
def jupiter_version(e: Evidence) -> Iterator[Verdict]:
    yield from _equal_in_groups(e, "Jupiter", _package("jupiter"))


@_theme.check("python-version", "Python fits")
def python_version(e: Evidence) -> Iterator[Verdict]:
    floor = ".".join(str(part) for part in PYTHON_FLOOR)
    known = {name: facts for name, facts in e.facts.items() if facts.python}
    good = []
    for name, facts in known.items():
        if version(facts.python) >= PYTHON_FLOOR:
            good.append(name)
        else:
            text = f"Python on {name} is {facts.python}; training needs {floor} or later."
            yield fail((name,), text, person(f"install Python {floor} or later on {name}, or name one with `python:`"))
    if good:
        yield ok(good, f"Python is {floor} or later on {names(good)}.")
    for plan, facts_of in e.groups():
        found = by_value(facts_of, lambda facts: ".".join(facts.python.split(".")[:2]) if facts.python else None)
        if len(found) > 1:
            text = f"The nodes of group {plan.name} run different Pythons: {spread(found)}."
            yield warn([name for nodes in found.values() for name in nodes], text, person("use one of them everywhere"))


@_theme.check("environment", "The same environment in a group")
def environment(e: Evidence) -> Iterator[Verdict]:
    for plan, facts_of in e.groups():
        # The lock differs between platforms by its nature; within one it may not.
        by_platform: dict[str, dict[str, NodeFacts]] = {}
        for name, facts in facts_of.items():
            if facts.environment:
                by_platform.setdefault(f"{facts.system.split(' ')[0]} {facts.accelerator}", {})[name] = facts
        for platform, members in by_platform.items():
            found = by_value(members, lambda facts: facts.environment[:12])
            if len(found) > 1:
                text = f"The {platform} nodes of group {plan.name} have different environments: {spread(found)}."
                yield warn(members, text, person("start a run: Jupiter puts the present environment on all of them"))
            else:
                yield ok(members, f"{names(members)} of group {plan.name} have environment {next(iter(found))}.")


@_theme.check("package-versions", "Packages that touch data are the same in a group")
def package_versions(e: Evidence) -> Iterator[Verdict]:
    for plan, facts_of in e.groups():
        if len(plan.nodes) < 2:
            continue
        differing = []
        for package in ALSO_EQUAL:
            found = by_value(facts_of, _package(package))
            if len(found) > 1:
                differing.append(f"{package} ({spread(found)})")
        if differing:
            text = f"The nodes of group {plan.name} differ in {'; '.join(differing)}."
            yield warn(facts_of, text, person("write `environment: push` for all of them"))
        elif any(package in facts.versions for facts in facts_of.values() for package in ALSO_EQUAL):
            yield ok(facts_of, f"{', '.join(ALSO_EQUAL)} are the same in group {plan.name}.")


@_theme.check("fast-synch", "MLX_METAL_FAST_SYNCH is not set")
def fast_synch(e: Evidence) -> Iterator[Verdict]:
    good = []
    for name, facts in e.macs().items():
        value = node_table(facts, "environment").get("MLX_METAL_FAST_SYNCH", "")
        everywhere = str(facts.raw.get("launchctl_fast_synch") or "").strip()
        if not value and not everywhere:
            good.append(name)
            continue
        text = f"MLX_METAL_FAST_SYNCH is {value or everywhere} on {name}: with it the GPU was seen to hang."
        if everywhere:
            fix = command(f"unset it on {name}", "launchctl", "unsetenv", "MLX_METAL_FAST_SYNCH", node=name, safe=True)
        else:
            fix = person(f"take it out of the shell's start-up files on {name}")
        yield fail((name,), text, fix)
    if good:
        yield ok(good, f"MLX_METAL_FAST_SYNCH is not set on {names(good)}.")


CHECKS: Final = tuple(_theme.checks)
