"""`python -m jupiter_engine.orchestrator WORKSPACE`: the engine process."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from jupiter_engine.errors import ExitCode, JupiterError
from jupiter_engine.orchestrator.engine import run_engine


def main(argv: list[str]) -> int:
    try:
        asyncio.run(run_engine(Path(argv[0])))
    except JupiterError as error:
        sys.stderr.write(error.sentence() + "\n")
        return error.exit_code
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
