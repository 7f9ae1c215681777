"""Generation speed of the torch twin against transformers, same model, same machine, same run.

    .venv/bin/python scripts/bench/model_speed.py --model FOLDER [--batch 16] [--prompt-tokens 300] [--new-tokens 64]

Each pair is measured in turn (ours, theirs, ours, theirs, ...) and the median ratio is printed,
so that a machine whose speed drifts does not favour either. FOLDER: any model folder of a workspace.
Training speed: scripts/bench/train.py.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from jupiter_engine.backends import load_generator
from jupiter_engine.backends.contract import GenerateRequest
from jupiter_engine.checkpoints.model_folder import verify


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(
    name: str, unit: str, amount: int, ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> None:
    """Print both speeds in `unit`/s (medians) and the median of ours/theirs, pair by pair."""
    ours()
    theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    mine, peer = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    both = f"jupiter {amount / mine:7.0f} {unit}/s   transformers {amount / peer:7.0f} {unit}/s"
    print(f"{name:<12} {both}   ratio {ratio:.2f}")


def generation(folder: Path, options: argparse.Namespace) -> None:
    vocabulary = verify(folder).vocab_size
    rng = random.Random(0)
    prompts = [[rng.randrange(10, vocabulary) for _ in range(options.prompt_tokens)] for _ in range(options.batch)]
    generator = load_generator("torch", folder)
    requests = [GenerateRequest(prompt=p, seed=i, max_new_tokens=options.new_tokens) for i, p in enumerate(prompts)]
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokens = torch.tensor(prompts)

    def ours() -> object:
        return list(generator.generate(requests, temperature=0.7, top_p=0.95, batch_size=options.batch, stop_ids=[]))

    def theirs() -> object:
        with torch.inference_mode():
            return peer.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=True,
                temperature=0.7,
                top_p=0.95,
                min_new_tokens=options.new_tokens,
                max_new_tokens=options.new_tokens,
            )

    compare("generation", "new tokens", options.batch * options.new_tokens, ours, theirs, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    generation(options.model, options)


if __name__ == "__main__":
    main()
