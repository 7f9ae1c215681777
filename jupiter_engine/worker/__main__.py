"""`python -m jupiter_engine.worker RUN_FOLDER`: carry out the order that lies there.

Exit status: 0 finished, 75 halted on request (start again to continue), else the
error's documented code. Every outcome is also a fact in events.jsonl.
"""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from pathlib import Path

from jupiter_engine.errors import ExitCode, JupiterError
from jupiter_engine.files import disk_full
from jupiter_engine.worker.context import Halt, RunContext

HALTED = 75  # EX_TEMPFAIL: nothing went wrong, try again


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m jupiter_engine.worker RUN_FOLDER", file=sys.stderr)
        return ExitCode.USAGE
    folder = Path(argv[0])
    try:
        context = RunContext(folder)
    except JupiterError as error:
        print(error.sentence(), file=sys.stderr)
        return error.exit_code

    def ask_halt(_signal: int, _frame: object) -> None:
        (folder / "inbox" / "halt").touch()

    signal.signal(signal.SIGTERM, ask_halt)
    signal.signal(signal.SIGINT, ask_halt)
    stage = type(context.order).__struct_config__.tag
    try:
        # Stage modules are imported here, not at the top: each loads only the libraries that it needs.
        run = importlib.import_module(f"jupiter_engine.worker.{stage}").run
        run(context, context.order)
    except Halt:
        context.halted()
        return HALTED
    except JupiterError as error:
        context.fail(error.kind, error.title, error.detail, error.fix)
        print(error.sentence(), file=sys.stderr)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the worker's outermost frame: a bug must reach the journal as a failed stage
        translated = disk_full(error, folder) if isinstance(error, OSError) else error
        traceback.print_exc()
        if isinstance(translated, JupiterError):
            context.fail(translated.kind, translated.title, translated.detail, translated.fix)
            return translated.exit_code
        context.fail(
            "StageFailed", f"The {stage} stage failed", f"{type(error).__name__}: {error}", f"see {folder}/worker.log"
        )
        return ExitCode.STAGE_FAILED
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
