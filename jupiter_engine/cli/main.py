"""The `jupiter` command: everything the console can do, without a screen.

Only argparse is loaded to parse; each command's module comes in when it is needed,
so `--help` and `--version` answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jupiter_engine import __version__
from jupiter_engine.errors import ConfigError, ExitCode, JupiterError

Handler = Callable[[argparse.Namespace], int]


def _lazy(module: str, function: str) -> Handler:
    def call(options: argparse.Namespace) -> int:
        import importlib

        handler: Handler = getattr(importlib.import_module(f"jupiter_engine.cli.{module}"), function)
        return handler(options)

    return call


def _count(text: str) -> int:
    """A whole number from 0 that a database can count to."""
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 2^63")
    return number


def parser() -> argparse.ArgumentParser:
    """The command line, complete; docs/commands.md is checked against it."""
    top = argparse.ArgumentParser(
        prog="jupiter",
        description="Train a domain-expert language model on your own machines, and keep improving it.",
        epilog="exit status: 0 done, 1 a stage failed, 2 wrong usage or configuration, 3 no usable node, "
        "4 not enough data to decide, 130 interrupted",
    )
    top.add_argument("--version", action="version", version=f"jupiter {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--workspace", type=Path, metavar="FOLDER", help="workspace to work on (see docs/commands.md)")
    state = argparse.ArgumentParser(add_help=False, parents=[common])
    state.add_argument("--json", action="store_true", help="print JSON instead of text")
    plain = argparse.ArgumentParser(add_help=False)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, text: str, module: str, parent: argparse.ArgumentParser = state) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", parents=[parent])
        sub.set_defaults(handler=_lazy(module, name.replace("-", "_")))
        return sub

    start = add("start", "run cycles of a domain", "cycles")
    start.add_argument("--domain", "-d", required=True, metavar="NAME")
    start.add_argument("--cycles", type=int, default=1, metavar="N", help="cycles to run (default 1)")
    how = start.add_mutually_exclusive_group()
    how.add_argument("--auto", action="store_true", help="run here to the end; filters and gate decide")
    how.add_argument("--interactive", action="store_true", help="open the console; a person reviews and decides")
    how.add_argument("--detach", action="store_true", help="start in the background and return at once")
    add("status", "what is running, how far it is, what waits", "cycles")
    for name, text in (
        ("stop", "end a cycle at the next safe point"),
        ("pause", "halt a cycle at the next safe point"),
        ("resume", "continue a paused, stopped or failed cycle"),
    ):
        add(name, text, "cycles").add_argument("--cycle", metavar="ID", help="default: the newest unfinished one")
    decide = add("decide", "answer the question whether the candidate becomes the generator", "cycles")
    decide.add_argument("answer", choices=("promote", "keep"))
    decide.add_argument("--cycle", metavar="ID", help="default: the one that waits")
    decide.add_argument("--override", action="store_true", help="promote although the gate says otherwise")
    add("check", "verify settings, disk, packages and model before any hour is spent", "setup")
    doctor = add("doctor", "look at every machine of the cluster, and at what is between them", "doctor")
    doctor.add_argument("--node", metavar="NAME", action="append", help="only findings about this machine (repeatable)")
    doctor.add_argument("--fix", metavar="CHECK", help="carry out the safe fixes of this check")
    init = add("init", "create a workspace with the shipped settings", "setup")
    init.add_argument("folder", nargs="?", type=Path, metavar="FOLDER")
    new_domain = add("new-domain", "create a domain file to fill in", "setup")
    new_domain.add_argument("name", metavar="NAME")
    new_domain.add_argument("--description", default="", metavar="TEXT")
    plan = add("plan", "what a cycle of a domain will do and need", "planning")
    plan.add_argument("--domain", "-d", required=True, metavar="NAME")
    plan.add_argument("--model", metavar="PRESET", help="plan this model from scratch instead of the domain's")
    plan.add_argument("--tokens", metavar="N", help="tokens to train on, such as 2e9 or 500M; default: the recipe's")
    plan.add_argument("--calibrate", action="store_true", help="measure how fast the machines train, and keep it")
    plan.add_argument("--seconds", type=float, default=60.0, metavar="S", help="of training on each machine (60)")
    info = add("model-info", "shapes, parameters and memory of presets or of a model", "models")
    info.add_argument("--preset", metavar="NAME")
    info.add_argument("--model", metavar="NAME_OR_FOLDER")
    generators = add("generators", "lineage of the generators of each domain", "models")
    generators.add_argument("--domain", "-d", metavar="NAME")
    rollback = add("rollback", "go back to an earlier generator", "models")
    rollback.add_argument("--domain", "-d", required=True, metavar="NAME")
    rollback.add_argument("--to", metavar="GENERATOR", help="default: the parent of the present one")
    samples = add("samples", "list, accept and reject generated samples", "data")
    samples.add_argument("--domain", "-d", metavar="NAME")
    samples.add_argument("--cycle", metavar="ID")
    samples.add_argument("--status", choices=("new", "accepted", "rejected", "reviewed", "unreviewed"))
    samples.add_argument("--search", default="", metavar="TEXT")
    samples.add_argument("--limit", type=_count, default=20, metavar="N")
    samples.add_argument("--offset", type=_count, default=0, metavar="N")
    samples.add_argument("--full", action="store_true", help="print prompt and response whole")
    verdict = samples.add_mutually_exclusive_group()
    verdict.add_argument("--accept", metavar="ID", action="append")
    verdict.add_argument("--reject", metavar="ID", action="append")
    verdict.add_argument("--undo", metavar="ID", action="append", help="take a verdict back")
    verdict.add_argument("--finish-review", metavar="CYCLE", help="the waiting review is done")
    samples.add_argument("--reason", default="", metavar="TEXT")
    add("why", "where a document, chunk, question or sample comes from", "data").add_argument("id", metavar="ID")
    runs = add("runs", "all cycles, the report of one, or trainings compared, exported, shown again", "runs")
    runs.add_argument(
        "words",
        nargs="*",
        metavar="CYCLE",
        help="a cycle: its report; `compare CYCLE CYCLE`; `export CYCLE FILE`; `replay CYCLE`",
    )
    runs.add_argument("--domain", "-d", metavar="NAME")
    runs.add_argument("--format", choices=("csv", "jsonl", "tensorboard"), help="of export (default: by FILE's ending)")
    runs.add_argument("--speed", type=float, default=60.0, metavar="X", help="of replay: so many times as fast")
    export = add("export", "write a model as a stock Hugging Face folder", "models")
    export.add_argument("model", metavar="NAME_OR_FOLDER")
    export.add_argument("target", type=Path, metavar="FOLDER")
    chat = add("chat", "talk with the current generator or another model", "models", common)
    chat.add_argument("--model", metavar="NAME_OR_FOLDER", help="default: the generator of --domain")
    chat.add_argument("--domain", "-d", metavar="NAME")
    chat.add_argument("--prompt", metavar="TEXT", help="ask once, print the answer and end")
    chat.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    chat.add_argument("--temperature", type=float, default=0.7, metavar="T")
    _nodes(add("nodes", "the machines: list, add, remove, trust, link, what lies between them", "nodes", plain), state)
    return top


def _nodes(nodes: argparse.ArgumentParser, state: argparse.ArgumentParser) -> None:
    """`jupiter nodes ...`."""
    actions = nodes.add_subparsers(dest="action", metavar="ACTION", required=True)

    def act(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", parents=[state])

    act("list", "every node as it is now, and what is wrong with it")
    add = act("add", "look at a machine and write it into the cluster file")
    add.add_argument("host", metavar="HOST", help="host name, address or alias of ~/.ssh/config; or user@host")
    add.add_argument("--name", metavar="NAME", help="what to call it (default: the host)")
    add.add_argument("--role", choices=("generator", "trainer", "hybrid", "evaluator"))
    add.add_argument("--user", metavar="NAME", help="user there")
    add.add_argument("--port", type=_count, metavar="N", help="ssh port")
    add.add_argument("--identity", metavar="FILE", help="private key")
    add.add_argument("--jump", metavar="HOST", help="host to go through, as `ssh -J` takes it")
    add.add_argument("--device-type", choices=("mac", "nvidia", "cpu"), help="default: found by looking")
    add.add_argument("--connection", choices=("thunderbolt", "ethernet", "wifi"), help="how it is connected")
    add.add_argument("--python", metavar="PATH", help="Python there")
    add.add_argument("--workdir", metavar="FOLDER", help="where Jupiter keeps its files there")
    add.add_argument("--environment", choices=("push", "own"), help="own: --python has everything already")
    add.add_argument("--yes", action="store_true", help="ask nothing; an unknown key needs --fingerprint")
    act("discover", "hosts that could be added: of ~/.ssh/config and of the local network")
    act("remove", "take a node out of the cluster file").add_argument("name", metavar="NAME")
    trust = act("trust", "decide about the ssh key of a node, a jump host or another machine")
    trust.add_argument("name", metavar="NAME")
    trust.add_argument("--replace", action="store_true", help="a key that has changed may be decided about too")
    for key in (add, trust):
        key.add_argument(
            "--fingerprint",
            metavar="SHA256:...",
            action="append",
            help="the key with this fingerprint is the right one",
        )
    push = act("push", "bring the environment of nodes up to date")
    push.add_argument("name", nargs="*", metavar="NAME", help="default: every other machine")
    push.add_argument("--mode", choices=("auto", "carried", "index"), default="auto", help="where packages come from")
    for name, text in (
        ("link", "let the leading node of a group call the others by ssh"),
        ("unlink", "take that back, everywhere"),
    ):
        act(name, text).add_argument("--group", metavar="NAME", help="default: every group")
    act("topology", "how each group would be launched, over which connections, and why")


def report(error: JupiterError) -> None:
    """Print an error for a person on stderr: title, facts, fix; never a traceback."""
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        print(f"{error.title}:", *(f"  {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
    else:
        print(error.sentence(), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the documented exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    for argument in given:
        if not argument.isprintable() and any("\ud800" <= character <= "\udfff" for character in argument):
            print(f"Wrong usage: the argument {argument!a} is not valid text", file=sys.stderr)
            return ExitCode.USAGE
    options = parser().parse_args(given)
    try:
        with contextlib.ExitStack() as options.resources:
            return int(options.handler(options))
    except JupiterError as error:
        report(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader (head, a pager) has gone; point stdout away so that the interpreter's last flush is silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
    except OSError as error:
        print(f"The system refused: {error.strerror or error}: {error.filename or ''}", file=sys.stderr)
        return ExitCode.STAGE_FAILED


if __name__ == "__main__":
    sys.exit(main())
