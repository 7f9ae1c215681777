"""Generation and training speed of the torch twin against transformers, same model, same machine, same run.

    .venv/bin/python scripts/bench/model_speed.py --model FOLDER [--batch 16] [--prompt-tokens 300] [--new-tokens 64]

Each pair is measured in turn (ours, theirs, ours, theirs, ...) and the median ratio is printed,
so that a machine whose speed drifts does not favour either. FOLDER: any model folder of a workspace.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from jupiter_engine.backends import load_generator
from jupiter_engine.backends.contract import GenerateRequest
from jupiter_engine.backends.torch.train import load_weights, open_trainer
from jupiter_engine.checkpoints.model_folder import verify
from jupiter_engine.protocol.specs import Recipe
from jupiter_engine.training.loop import Batch

ROWS, LENGTH = 8, 256


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


def training(folder: Path, options: argparse.Namespace) -> None:
    info = verify(folder)
    data = np.random.default_rng(0).integers(10, info.vocab_size, (ROWS, LENGTH + 1))
    half = ROWS // 2
    trainer = open_trainer(info, Recipe(micro_batch_sequences=half), load_weights(folder))

    def part(rows: slice) -> Batch:
        tokens = data[rows]
        whole = np.zeros((half, LENGTH), dtype=np.int64)
        return Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], segments=whole, counted=whole == 0)

    def ours() -> None:
        for rows in (slice(0, half), slice(half, ROWS)):
            trainer.accumulate(part(rows), 1.0 / (ROWS * LENGTH))
        trainer.reduce()
        trainer.apply(1e-5, 1.0)

    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peer.train()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-5, fused=True)

    def theirs() -> None:
        for rows in (slice(0, half), slice(half, ROWS)):
            tokens = torch.tensor(data[rows])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = peer(tokens, labels=tokens).loss / 2
            loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    compare("training", "tokens", ROWS * LENGTH, ours, theirs, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    generation(options.model, options)
    training(options.model, options)


if __name__ == "__main__":
    main()
