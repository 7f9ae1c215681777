"""A workspace whose domain is small enough for a whole real cycle in seconds: real stages, nano model, tiny corpus."""

from __future__ import annotations

import random
from pathlib import Path

from jupiter_engine.settings.workspace import create

WORDS = [
    "buffer",
    "socket",
    "thread",
    "parser",
    "token",
    "module",
    "object",
    "string",
    "integer",
    "float",
    "mapping",
    "sequence",
    "iterator",
    "generator",
    "decorator",
    "closure",
    "argument",
    "keyword",
    "default",
    "returns",
    "raises",
    "accepts",
    "opens",
    "closes",
    "reads",
    "writes",
    "flushes",
    "seeks",
    "encodes",
    "decodes",
    "splits",
    "joins",
    "strips",
    "copies",
    "sorts",
    "reverses",
    "counts",
    "maps",
    "filters",
    "reduces",
    "groups",
    "pairs",
    "chains",
]

DOMAIN = """\
schema: jupiter/domain@1
domain: {name: tiny, description: a tiny domain for tests}
base: nano
sources:
  - {id: notes, type: files, path: corpus, license: MIT}
chunk: {max_bytes: 800, min_bytes: 50}
generation:
  templates:
    - {id: qa, type: qa}
    - {id: rephrase, type: rephrase}
  samples: 12
  max_new_tokens: 12
  batch_size: 4
  context_bytes: 200
filters: {min_words: 1, min_grounding: 0.0, max_repetition: 1.0}
mix: {real_docs: 0.6, real_code: 0.2, synthetic: 0.2, real_floor: 0.4}
training:
  sequence_tokens: 32
  batch_sequences: 4
  micro_batch_sequences: 4
  steps: 12
  optimizer: {learning_rate: 1e-3}
  compute_dtype: float32
  checkpoint_every_steps: 3
evaluation:
  vault_share: 0.3
  slices: 1
  windows: 20
  window_bytes: 200
  context_bytes: 50
  mcq_known: 8
  mcq_vault: 4
  fitness_chunks: 4
gate: {primary: vault_bpb, min_windows: 5, min_items: 1, min_documents: 1, margin_mcq: 0.9, margin_yield: 0.9}
"""


def sentence(rng: random.Random) -> str:
    words = rng.choices(WORDS, k=rng.randint(6, 12))
    return " ".join(words).capitalize() + "."


def write_corpus(folder: Path, *, documents: int = 40, seed: int = 0) -> None:
    """Markdown notes and Python modules of made-up but regular text, no two alike."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        paragraphs = [" ".join(sentence(rng) for _ in range(5)) for _ in range(4)]
        (folder / f"note{number:03d}.md").write_text(f"# Note {number}\n\n" + "\n\n".join(paragraphs) + "\n")
    for number in range(documents // 4):
        functions = [
            f"def {rng.choice(WORDS)}_{number}_{i}({rng.choice(WORDS)}, {rng.choice(WORDS)}_{i}=None):\n"
            f'    """{sentence(rng)}"""\n    return {rng.randint(1, 999)}\n'
            for i in range(6)
        ]
        (folder / f"module{number:03d}.py").write_text(f'"""{sentence(rng)}"""\n\n\n' + "\n\n".join(functions))


def make_workspace(root: Path, *, domain: str = DOMAIN, documents: int = 40) -> Path:
    """Create the workspace `root` with the domain `tiny`; returns the domain file."""
    create(root)
    write_corpus(root / "config" / "domains" / "corpus", documents=documents)
    path = root / "config" / "domains" / "tiny.yaml"
    path.write_text(domain)
    return path
