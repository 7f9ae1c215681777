"""`python -m jupiter_engine.worker.tensorboard FOLDER`: optimizer steps from stdin as a TensorBoard event file.

stdin holds metric lines as in metrics.jsonl. The wall times of the events are those of the steps, so a run that was
exported later looks as if TensorBoard had been there. Needs the package tensorboardX (extra `tensorboard`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from jupiter_engine.errors import ConfigError, ExitCode, JupiterError
from jupiter_engine.protocol.facts import Metric

SCALARS = {
    "train/loss": "loss",
    "train/held_out_loss": "held_out_loss",
    "train/learning_rate": "learning_rate",
    "train/grad_norm": "grad_norm",
    "train/tokens": "tokens",
    "speed/tokens_per_s": "tokens_per_s",
    "speed/seconds": "seconds",
    "speed/mfu": "mfu",
}
OF_RANKS = {
    "ranks/compute_s": "rank_seconds",
    "ranks/data_s": "data_seconds",
    "ranks/communication_s": "communication_seconds",
    "ranks/idle_s": "idle_seconds",
    "ranks/rows": "rank_rows",
    "ranks/peak_bytes": "peak_bytes",
}


def write_events(folder: Path, metrics: list[Metric]) -> None:
    """Write all steps into a new event file of `folder`; values that a step does not know are left out."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "the package tensorboardX is not installed", fix="pip install 'jupiter[tensorboard]', or export as csv"
        ) from error
    with SummaryWriter(str(folder)) as writer:
        for metric in metrics:
            for tag, field in SCALARS.items():
                value = getattr(metric, field)
                if value is not None:
                    writer.add_scalar(tag, value, metric.step, walltime=metric.at)
            for tag, field in OF_RANKS.items():
                for rank, value in enumerate(getattr(metric, field)):
                    writer.add_scalar(f"{tag}/{rank}", value, metric.step, walltime=metric.at)


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        sys.stderr.write("usage: python -m jupiter_engine.worker.tensorboard FOLDER < metrics.jsonl\n")
        return ExitCode.USAGE
    decoder = msgspec.json.Decoder(Metric)
    try:
        write_events(Path(argv[0]), [decoder.decode(line) for line in sys.stdin.buffer if line.strip()])
    except JupiterError as error:
        sys.stderr.write(error.sentence() + "\n")
        return error.exit_code
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
