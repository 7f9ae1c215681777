"""The command `jupiter-tui`. Textual is imported only once it is certain that a screen is wanted."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from jupiter_engine import __version__
from jupiter_engine.errors import ExitCode, JupiterError, UsageError

THEME_NAMES = ("dark", "light", "ansi", "ansi-light", "mono")
EPILOG = """\
exit codes: 0 done or detached, 1 a stage failed, 2 wrong usage or configuration, 3 no usable node,
4 not enough data, 130 interrupted. NO_COLOR is honoured. Keys are listed in docs/console.md; ? shows them.
"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="jupiter-tui",
        description="The console of a Jupiter workspace: watch a cycle, review samples, decide on promotions.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--workspace",
        type=Path,
        metavar="FOLDER",
        help="the workspace (default: $JUPITER_HOME, this folder, ~/.jupiter)",
    )
    made.add_argument("--domain", default="", metavar="NAME", help="the domain to show, and to run with --auto")
    made.add_argument(
        "--auto", action="store_true", help="no screen: run cycles in the foreground, filters and gate decide"
    )
    made.add_argument("--cycles", type=int, metavar="N", help="with --auto: how many cycles (default 1)")
    made.add_argument("--json", action="store_true", help="with --auto: one JSON object per event")
    made.add_argument("--read-only", action="store_true", help="look only: every key that changes something is absent")
    made.add_argument("--ascii", action="store_true", help="draw with ASCII characters alone")
    made.add_argument("--theme", choices=THEME_NAMES, default="dark", help="colours (default: dark)")
    made.add_argument("--version", action="version", version=f"jupiter-tui {__version__}")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the console or, with --auto, cycles without it. Returns the exit status."""
    options = parser().parse_args(argv)
    try:
        return _auto(options) if options.auto else _console(options)
    except JupiterError as error:
        print(error.sentence(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return ExitCode.INTERRUPTED


def _auto(options: argparse.Namespace) -> int:
    cycles = 1 if options.cycles is None else options.cycles
    if cycles < 1:
        raise UsageError(f"--cycles must be 1 or more, not {cycles}")
    if options.read_only:
        raise UsageError("--auto runs cycles, which --read-only forbids", fix="leave one of the two out")
    from jupiter_engine.api import find_workspace
    from jupiter_engine.cli.headless import run_auto

    root = find_workspace(options.workspace, os.environ, Path.cwd())
    return run_auto(root, options.domain or "python", cycles, options.json)


def _console(options: argparse.Namespace) -> int:
    if options.cycles is not None or options.json:
        raise UsageError(
            "--cycles and --json belong to --auto", fix="add --auto, or start cycles with l in the console"
        )
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("the console needs a terminal", fix="use `jupiter-tui --auto` or `jupiter status` in scripts")
    if os.environ.get("TERM", "dumb") == "dumb":
        raise UsageError(
            "this terminal cannot place text (TERM=dumb)", fix="use `jupiter status` and `jupiter start --auto`"
        )
    # Textual reads these once, when it is imported.
    os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")
    os.environ.setdefault("TEXTUAL_FPS", "15" if os.environ.get("SSH_CONNECTION") else "30")
    from jupiter_tui.app import ConsoleApp

    app = ConsoleApp(
        workspace=options.workspace,
        domain=options.domain,
        read_only=options.read_only,
        ascii_only=options.ascii,
        theme=options.theme,
    )
    error = app.run()
    if error is not None:
        raise error
    if app.return_code:
        return int(app.return_code)
    _farewell(app.desk.picture.root, lives=app.desk.picture.engine_lives)
    return ExitCode.DONE


def _farewell(root: str, *, lives: bool) -> None:
    back = f"jupiter-tui --workspace {root}" if root else "jupiter-tui"
    print("Detached; the engine and its work go on." if lives else "Detached; no engine is running.")
    print(f"Come back with: {back}")


if __name__ == "__main__":
    sys.exit(main())
