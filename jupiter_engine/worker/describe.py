"""`python -m jupiter_engine.worker.describe MODEL_FOLDER`: verify a model folder and print its facts as JSON.

The control wing asks this way: it never opens tensors itself. Errors are one JSON object
with kind, title, detail and fix, and the error's exit status.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from jupiter_engine.checkpoints.model_folder import folder_sha256, verify
from jupiter_engine.errors import ExitCode, JupiterError


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        sys.stderr.write("usage: python -m jupiter_engine.worker.describe MODEL_FOLDER\n")
        return ExitCode.USAGE
    folder = Path(argv[0])
    try:
        info = verify(folder)
        facts = {**msgspec.to_builtins(info), "parameters": info.parameters, "sha256": folder_sha256(folder)}
    except JupiterError as error:
        failure = {"kind": error.kind, "title": error.title, "detail": error.detail, "fix": error.fix}
        sys.stdout.write(msgspec.json.encode(failure).decode() + "\n")
        return error.exit_code
    sys.stdout.write(msgspec.json.encode(facts).decode() + "\n")
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
