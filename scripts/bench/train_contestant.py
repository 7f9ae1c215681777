"""A contestant of scripts/bench/train.py: one trainer in a process of its own, which works only when told to.

train_contestant.py NAME SETTINGS.json ROWS.npy. Orders come on standard input, a line each: `go N` (train N optimizer
steps and answer with one line of JSON) or the end of the input (leave). Between orders the process only waits, so that
contestants of different frameworks can take turns although each runs its own real loop: the loops are held where they
have finished a step, in a callback or where they ask for the next batch.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ENDLESS = 4000
"""Steps that a loop is set up for; no round comes near."""


@dataclass
class Gate:
    """Holds a loop after each step until the next order; measures what an order took."""

    answers: Any
    left: int = 0
    began: float = 0.0
    cpu: float = 0.0
    facts: dict[str, float] = field(default_factory=dict)

    def __call__(self) -> None:
        """The loop is between two steps."""
        self.left -= 1
        if self.left > 0:
            return
        if self.left == 0:
            seconds, cpu = time.perf_counter() - self.began, time.process_time() - self.cpu
            self.say(seconds=seconds, cpu=cpu, **self.facts)
        line = sys.stdin.readline()
        if not line:
            # Loops of other people's making have no way to be told to stop that does not save a model first.
            os._exit(0)
        self.left = int(line.split()[1])
        self.facts = {}
        self.began, self.cpu = time.perf_counter(), time.process_time()

    def say(self, **facts: float) -> None:
        self.answers.write(json.dumps(facts) + "\n")
        self.answers.flush()


@dataclass
class Task:
    """What all contestants of a case are given."""

    shape: dict[str, Any]
    rows: Any
    """uint32 [N, T + 1]."""
    batch: int
    micro: int
    learning_rate: float
    threads: int
    options: dict[str, Any]

    @property
    def length(self) -> int:
        return int(self.rows.shape[1]) - 1

    def micro_batches(self) -> Iterator[tuple[bool, Any]]:
        """(first of a step?, rows [micro, T + 1]) for ever."""
        parts = self.batch // self.micro
        for number in range(10**9):
            start = (number * self.micro) % (len(self.rows) - self.micro + 1)
            yield number % parts == 0, self.rows[start : start + self.micro].astype(np.int64)


# -- Jupiter -----------------------------------------------------------------------------------------------------------


class Held:
    """A reporter that holds the loop at the gate and counts what its metrics say."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def begun(self, step: int) -> None: ...

    def at(self, step: int, *, waiting: bool) -> None: ...

    def note(self, text: str, level: str = "info") -> None:
        print(level, text, file=sys.stderr)

    def halt_asked(self) -> bool:
        return False

    def metric(self, metric: Any) -> None:
        facts = self._gate.facts
        for name in ("data_seconds", "communication_seconds", "idle_seconds"):
            facts[name] = facts.get(name, 0.0) + sum(getattr(metric, name)) / max(1, len(getattr(metric, name)))
        facts["loss"] = metric.loss

    def progress(self, done: int, total: int, note: str) -> None:  # noqa: ARG002 - the protocol's names
        self._gate()


def jupiter(task: Task, gate: Gate, twin: str) -> None:
    """The real loop over a memory-mapped snapshot; `store`: with a checkpoint every so many steps."""
    if twin == "mlx":
        from jupiter_engine.backends.mlx import blas

        print("BLAS", blas.preload(), file=sys.stderr)
    import importlib

    from jupiter_engine.checkpoints.model_folder import ModelInfo
    from jupiter_engine.checkpoints.store import CheckpointStore, Identity, World
    from jupiter_engine.protocol.shapes import tensor_shapes
    from jupiter_engine.protocol.specs import OptimizerSpec, Recipe, ScheduleSpec, SpikeGuardSpec
    from jupiter_engine.training.loop import Training, TrainingData

    module = importlib.import_module(f"jupiter_engine.backends.{twin}.train")
    info = ModelInfo(**task.shape, dtype="float32", eos_ids=(0,), pad_id=0)
    every = task.options.get("checkpoint_every", 0)
    recipe = Recipe(
        sequence_tokens=task.length,
        batch_sequences=task.batch,
        micro_batch_sequences=task.micro,
        steps=ENDLESS,
        optimizer=OptimizerSpec(name=task.options.get("optimizer", "adamw"), learning_rate=task.learning_rate),
        schedule=ScheduleSpec(kind="constant", warmup_share=0.0),
        compute_dtype="bfloat16" if twin == "torch" else "float32",
        spike_guard=SpikeGuardSpec(spike_factor=0.0),
        checkpoint_every_steps=every or ENDLESS,
        keep_checkpoints=1,
    )
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(0.0, 0.02, size).astype(np.float32) if len(size) > 1 else np.ones(size, np.float32)
        for name, size in tensor_shapes(info).items()
    }
    group = module.join_group() if task.options.get("ranks", 1) > 1 else None
    alone = group is None or group.rank == 0
    trainer = module.open_trainer(
        info,
        recipe,
        weights if alone else None,
        group=group,
        threads=task.threads,
        compile=task.options.get("compile", "auto"),
    )
    counted = np.ones(task.rows.shape, np.uint8)
    counted[:, 0] = 0
    data = TrainingData(
        tokens=task.rows, loss_mask=counted, segments=np.zeros(task.rows.shape, np.uint16), sha256="0" * 64
    )
    with tempfile.TemporaryDirectory() as folder:
        training = Training(
            recipe,
            data,
            trainer,
            Held(gate),
            CheckpointStore(Path(folder), keep=1) if every and alone else None,
            identity=Identity(recipe_sha256="0" * 64, snapshot_sha256="0" * 64, start_sha256="0" * 64),
            world=World(twin=twin, ranks=trainer.ranks, versions={}),
        )
        gate()
        training.run()


# -- Hugging Face Trainer ----------------------------------------------------------------------------------------------


def hugging_face(task: Task, gate: Gate) -> None:
    import torch
    from torch.utils.data import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    shape = task.shape
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape["vocab_size"],
            hidden_size=shape["hidden_size"],
            intermediate_size=shape["intermediate_size"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            max_position_embeddings=shape["context"],
            tie_word_embeddings=shape["tied"],
            attn_implementation="sdpa",
        )
    )

    class Rows(Dataset):
        def __len__(self) -> int:
            return ENDLESS * task.batch

        def __getitem__(self, index: int) -> dict[str, Any]:
            row = torch.from_numpy(task.rows[index % len(task.rows)][: task.length].astype(np.int64))
            return {"input_ids": row, "labels": row}

    class Hold(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if gate.began == 0.0:
                gate()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=task.micro,
            gradient_accumulation_steps=task.batch // task.micro,
            max_steps=ENDLESS,
            learning_rate=task.learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            bf16=True,
            use_cpu=True,
            torch_compile=task.options.get("compile") == "on",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Hold()]).train()


# -- litgpt ------------------------------------------------------------------------------------------------------------


def litgpt(task: Task, gate: Gate) -> None:
    """litgpt's own `pretrain`, as its command calls it: bf16-mixed, compiled, AdamW."""
    import torch
    from litgpt import Config
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule
    from litgpt.pretrain import setup
    from torch.utils.data import DataLoader, IterableDataset

    shape = task.shape

    class Rows(IterableDataset):
        def __init__(self, *, held: bool) -> None:
            self._held = held

        def __iter__(self) -> Iterator[Any]:
            for first, rows in task.micro_batches():
                if first and self._held:
                    gate()
                yield torch.from_numpy(rows)

    class Data(DataModule):
        def connect(self, *_: Any, **__: Any) -> None: ...

        def train_dataloader(self) -> Any:
            return DataLoader(Rows(held=True), batch_size=None)

        def val_dataloader(self) -> Any:
            return DataLoader(Rows(held=False), batch_size=None)

    with tempfile.TemporaryDirectory() as folder:
        setup(
            "contestant",
            model_config=Config(
                name="contestant",
                block_size=task.length,
                vocab_size=shape["vocab_size"],
                padded_vocab_size=shape["vocab_size"],
                n_layer=shape["layers"],
                n_head=shape["heads"],
                n_query_groups=shape["kv_heads"],
                n_embd=shape["hidden_size"],
                head_size=shape["head_dim"],
                intermediate_size=shape["intermediate_size"],
                rotary_percentage=1.0,
                parallel_residual=False,
                bias=False,
                norm_class_name="RMSNorm",
                mlp_class_name="LLaMAMLP",
            ),
            out_dir=Path(folder),
            data=Data(),
            train=TrainArgs(
                global_batch_size=task.batch,
                micro_batch_size=task.micro,
                max_tokens=ENDLESS * task.batch * task.length,
                max_norm=1.0,
                lr_warmup_steps=1,
                tie_embeddings=shape["tied"],
                log_interval=1,
            ),
            eval=EvalArgs(interval=ENDLESS, max_iters=1),
            optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": task.learning_rate}},
            devices=1,
            logger_name="csv",
        )


# -- a loop in nanochat's manner ---------------------------------------------------------------------------------------


def nanochat_style(task: Task, gate: Gate) -> None:
    """nanochat is no package: a plain loop with its choices (github.com/karpathy/nanochat), on the same Llama shape.

    float32 weights that each layer casts to bfloat16, rms_norm and scaled_dot_product_attention of torch,
    torch.compile(dynamic=False), logits in float32, fused AdamW, the gradient dropped with set_to_none.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F  # noqa: N812 - the name that everybody knows

    shape = task.shape
    d, heads, kv, width = (shape[key] for key in ("hidden_size", "heads", "kv_heads", "head_dim"))

    class Linear(nn.Linear):
        def forward(self, x: Any) -> Any:
            return F.linear(x, self.weight.to(x.dtype))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (Linear(d, n * width, bias=False) for n in (heads, kv, kv))
            self.o = Linear(heads * width, d, bias=False)
            self.gate, self.up = (Linear(d, shape["intermediate_size"], bias=False) for _ in range(2))
            self.down = Linear(shape["intermediate_size"], d, bias=False)
            self.norms = nn.ParameterList([nn.Parameter(torch.ones(d)) for _ in range(2)])

        def forward(self, x: Any, cos: Any, sin: Any) -> Any:
            y = F.rms_norm(x, (d,), self.norms[0].to(x.dtype))
            q, k, v = (
                f(y).view(*y.shape[:2], n, width).transpose(1, 2)
                for f, n in ((self.q, heads), (self.k, kv), (self.v, kv))
            )
            q, k = (rotate(part, cos, sin) for part in (q, k))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv != heads)
            x = x + self.o(y.transpose(1, 2).reshape(*x.shape[:2], -1))
            y = F.rms_norm(x, (d,), self.norms[1].to(x.dtype))
            return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def rotate(x: Any, cos: Any, sin: Any) -> Any:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(shape["vocab_size"], d)
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.blocks = nn.ModuleList([Block() for _ in range(shape["layers"])])
            self.norm = nn.Parameter(torch.ones(d))
            self.head = None if shape["tied"] else Linear(d, shape["vocab_size"], bias=False)
            angle = torch.outer(
                torch.arange(task.length).float(), 1.0 / 10000 ** (torch.arange(0, width, 2).float() / width)
            )
            self.register_buffer("cos", angle.cos().bfloat16())
            self.register_buffer("sin", angle.sin().bfloat16())

        def forward(self, tokens: Any, targets: Any) -> Any:
            x = self.embedding(tokens).bfloat16()
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            x = F.rms_norm(x, (d,), self.norm.to(x.dtype))
            table = self.embedding.weight if self.head is None else self.head.weight
            logits = F.linear(x, table.to(x.dtype)).float()
            return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    model = Model()
    compiled = torch.compile(model, dynamic=False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=task.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    parts = task.batch // task.micro
    batches = task.micro_batches()
    gate()
    while True:
        total = 0.0
        for _ in range(parts):
            rows = torch.from_numpy(next(batches)[1])
            loss = compiled(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
            total += loss.detach()
            (loss / parts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.facts["loss"] = float(total) / parts
        gate()


# -- mlx_lm ------------------------------------------------------------------------------------------------------------


def mlx_lm_full(task: Task, gate: Gate, *, embeddings: bool) -> None:
    """mlx_lm.lora's own loop, prepared as `--fine-tune-type full` prepares it (which leaves embeddings frozen)."""
    from jupiter_engine.backends.mlx import blas

    print("BLAS", blas.preload(), file=sys.stderr)
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches, train

    shape = task.shape
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=shape["hidden_size"],
            num_hidden_layers=shape["layers"],
            intermediate_size=shape["intermediate_size"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            rms_norm_eps=1e-5,
            vocab_size=shape["vocab_size"],
            max_position_embeddings=shape["context"],
            tie_word_embeddings=shape["tied"],
        )
    )
    mx.eval(model.parameters())
    model.freeze()
    for layer in model.layers:
        layer.unfreeze()
    if embeddings:
        model.unfreeze()
    trained, everything = (
        sum(value.size for _, value in tree_flatten(tree))
        for tree in (model.trainable_parameters(), model.parameters())
    )
    print(f"trains {trained} of {everything}", file=sys.stderr)

    class Rows:
        def __len__(self) -> int:
            return len(task.rows)

        def __getitem__(self, index: int) -> Any:
            return task.rows[index]

        def process(self, row: Any) -> Any:
            return row.tolist(), 0

    parts = task.batch // task.micro

    def held(**arguments: Any) -> Iterator[Any]:
        for number, batch in enumerate(iterate_batches(**arguments)):
            if number % parts == 0:
                gate()
            yield batch

    with tempfile.TemporaryDirectory() as folder:
        train(
            model,
            optim.AdamW(learning_rate=task.learning_rate),
            CacheDataset(Rows()),
            args=TrainingArgs(
                batch_size=task.micro,
                iters=ENDLESS * parts,
                steps_per_report=ENDLESS * parts,
                steps_per_save=ENDLESS * parts,
                max_seq_length=task.length + 1,
                adapter_file=str(Path(folder) / "adapters.safetensors"),
                grad_accumulation_steps=parts,
            ),
            iterate_batches=held,
        )


CONTESTANTS: dict[str, Callable[[Task, Gate], None]] = {
    "jupiter torch": lambda task, gate: jupiter(task, gate, "torch"),
    "jupiter mlx": lambda task, gate: jupiter(task, gate, "mlx"),
    "Hugging Face Trainer": hugging_face,
    "litgpt": litgpt,
    "nanochat-style": nanochat_style,
    "mlx_lm.lora full": lambda task, gate: mlx_lm_full(task, gate, embeddings=False),
    "mlx_lm.lora full + embeddings": lambda task, gate: mlx_lm_full(task, gate, embeddings=True),
}


def main() -> None:
    name, settings, rows = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), sys.argv[3]
    # Libraries print: their lines go where errors go, answers alone to the output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if "torch" in name or name in ("Hugging Face Trainer", "litgpt", "nanochat-style"):
        import torch

        torch.set_num_threads(settings["threads"])
        torch.manual_seed(0)
    CONTESTANTS[name](Task(rows=np.load(rows, mmap_mode="r"), **settings), Gate(answers))


if __name__ == "__main__":
    main()
