"""model-info, generators, rollback, export, chat."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jupiter_engine.api import Workspace
from jupiter_engine.cli.output import open_workspace, print_json, print_table
from jupiter_engine.errors import ExitCode, JupiterError, ModelInvalid, UsageError
from jupiter_engine.orchestrator.supervision import WORKER_ENV
from jupiter_engine.protocol.commands import Rollback
from jupiter_engine.protocol.shapes import PRESETS, parameter_count, training_memory, weight_bytes
from jupiter_engine.units import bytes_text, plain_text


def model_folder(workspace: Workspace, name: str | None, domain: str | None) -> Path:
    """The folder of a generator or trained model by name, a folder by path, or the current generator."""
    state = workspace.state
    if name is None:
        domains = [domain] if domain else list(state.generators)
        active = [g for d in domains if (g := state.active_generator(d)) is not None]
        if not active:
            raise UsageError("there is no generator yet", fix="run a cycle first, or name a model with --model")
        return Path(active[-1].model.folder)
    for generators in state.generators.values():
        for generator in generators:
            if generator.name == name:
                return Path(generator.model.folder)
    own = workspace.root / ".jupiter" / "models" / name
    if own.is_dir():
        return own
    # os.path's expanduser leaves an unknown ~user as it is instead of failing.
    path = Path(os.path.expanduser(name))  # noqa: PTH111
    if path.is_dir():
        return path.absolute()
    models = workspace.root / ".jupiter" / "models"
    known = sorted(p.name for p in models.iterdir() if not p.name.startswith(".")) if models.exists() else []
    raise UsageError(
        f"there is no model {name!r}, neither in the workspace nor as a folder",
        fix=f"known models: {', '.join(known) or 'none yet'}",
    )


def _describe(folder: Path) -> dict[str, Any]:
    """Verified facts of a model folder, read by a worker (tensors are none of the control wing's business)."""
    done = subprocess.run(
        [sys.executable, "-m", "jupiter_engine.worker.describe", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **WORKER_ENV},
    )
    try:
        facts: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise JupiterError(f"the model could not be examined: {plain_text(done.stderr)[-400:].strip()}") from None
    if done.returncode != 0:
        raise ModelInvalid(facts["detail"], title=facts["title"], fix=facts["fix"])
    return facts


def model_info(options: argparse.Namespace) -> int:
    if options.model:
        facts = _describe(model_folder(open_workspace(options), options.model, None))
        if options.json:
            print_json(facts)
        else:
            for key, value in facts.items():
                print(f"{key:<22} {value}")
        return ExitCode.DONE
    if options.preset and options.preset.lower() not in PRESETS:
        raise UsageError(f"there is no preset {options.preset!r}", fix=f"presets: {', '.join(PRESETS)}")
    chosen = [PRESETS[options.preset.lower()]] if options.preset else list(PRESETS.values())
    if options.json:
        print_json(
            [
                {
                    "preset": p.name,
                    "purpose": p.purpose,
                    "shape": p.shape,
                    "parameters": parameter_count(p.shape),
                    "weights_bfloat16_bytes": weight_bytes(p.shape),
                    "training_state_bytes": training_memory(p.shape).total,
                }
                for p in chosen
            ]
        )
        return ExitCode.DONE
    rows = [
        (
            p.name,
            f"{parameter_count(p.shape):,}",
            p.shape.layers,
            p.shape.hidden_size,
            f"{p.shape.heads}/{p.shape.kv_heads}",
            p.shape.vocab_size,
            p.shape.context,
            f"{p.shape.rope_theta:g}",
            "yes" if p.shape.tied else "no",
            bytes_text(weight_bytes(p.shape)),
            bytes_text(training_memory(p.shape).total),
        )
        for p in chosen
    ]
    head = (
        "preset", "parameters", "layers", "hidden", "heads/kv", "vocab", "context", "rope theta", "tied",
        "weights bf16", "training state",
    )  # fmt: skip
    print_table(head, rows)
    print("parameters: exact, with the preset's own vocabulary; a tied output projection is the embedding itself")
    print("training state: fp32 master weights, bf16 copy, gradients and AdamW moments, without activations")
    return ExitCode.DONE


def generators(options: argparse.Namespace) -> int:
    workspace = open_workspace(options)
    lineages = {d: g for d, g in workspace.state.generators.items() if options.domain in (None, d)}
    if options.json:
        print_json(lineages)
        return ExitCode.DONE
    rows = [
        (
            domain,
            ("* " if g.active else "  ") + g.name,
            g.parent or "-",
            g.cycle or "base",
            g.looks,
            time.strftime("%Y-%m-%d %H:%M", time.localtime(g.registered_at)),
            g.model.sha256[:12],
        )
        for domain, lineage in lineages.items()
        for g in lineage
    ]
    if not rows:
        print("no generator yet; the first cycle prepares the base")
        return ExitCode.DONE
    print_table(("domain", "generator", "parent", "from", "looks", "since", "sha256"), rows)
    print("* generates now")
    return ExitCode.DONE


def rollback(options: argparse.Namespace) -> int:
    workspace = open_workspace(options)
    workspace.perform(Rollback(domain=options.domain, to=options.to))
    active = workspace.state.active_generator(options.domain)
    assert active is not None
    if options.json:
        print_json(active)
    else:
        print(f"the generator of {options.domain} is {active.name} again")
    return ExitCode.DONE


def export(options: argparse.Namespace) -> int:
    workspace = open_workspace(options)
    folder = model_folder(workspace, options.model, None)
    argv = [sys.executable, "-m", "jupiter_engine.worker.export", "--model", str(folder)]
    argv += ["--target", str(options.target.absolute())]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, **WORKER_ENV})
    if done.returncode != 0:
        words = plain_text(done.stderr or done.stdout).strip().splitlines()
        raise ModelInvalid(words[-1] if words else "no reason was given", title="The export failed")
    if options.json:
        print_json({"model": str(folder), "target": str(options.target.absolute())})
    else:
        print(f"wrote {options.target}; transformers, mlx-lm and vLLM open it as it is")
    return ExitCode.DONE


class ChatProcess:
    """A worker that holds a model and answers; JSON lines both ways."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        argv = [sys.executable, "-m", "jupiter_engine.worker.chat", "--model", str(folder)]
        argv += ["--max-new-tokens", str(options.max_new_tokens), "--temperature", str(options.temperature)]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **WORKER_ENV}
        )

    def ask(self, messages: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        """Events of one answer: {"delta": text} pieces, then {"done": true, ...}."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"messages": messages}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; whatever it said is read below
        for line in self._process.stdout:
            event: dict[str, Any] = json.loads(line)
            if "error" in event:
                raise ModelInvalid(str(event["error"]), title="The model could not answer")
            yield event
            if event.get("done"):
                return
        raise JupiterError(f"the chat worker ended with status {self._process.wait()}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def chat(options: argparse.Namespace) -> int:
    workspace = open_workspace(options)
    folder = model_folder(workspace, options.model, options.domain)
    workspace.close()
    worker = ChatProcess(folder, options)
    messages: list[dict[str, str]] = []

    def answer(question: str) -> None:
        messages.append({"role": "user", "content": question})
        said = ""
        for event in worker.ask(messages):
            piece = plain_text(str(event.get("delta", "")))
            said += piece
            print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": said})

    try:
        if options.prompt is not None:
            answer(options.prompt)
            return ExitCode.DONE
        print(f"{folder.name}; an empty line or ctrl+d ends the talk", file=sys.stderr)
        while True:
            try:
                question = input("> ")
            except EOFError:
                return ExitCode.DONE
            if not question.strip():
                return ExitCode.DONE
            answer(question)
    finally:
        worker.close()
