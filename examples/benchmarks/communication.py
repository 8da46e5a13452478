"""What distillation sends between processes in a step, beside the gradients that any training sends.

    python examples/benchmarks/communication.py

Two processes (gloo) train a BERT for some steps of two micro-batches, with cached embeddings of several widths. Of a
step is counted what a process hands to collectives: the teacher's rows for the bank (the all-gather), the sizes of its
micro-batches, and the buckets of the gradient all-reduce. A ring sends an all-gather's bytes once for each other
process, and an all-reduce's nearly twice: the last column is the ratio of these.
"""

import json
import multiprocessing
import os
import socket
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, PrinterCallback, TrainerCallback

from hf_rrd import RelationalDistillationConfig, RelationalDistillationTrainer

PRELOADED = ["hf_rrd", "hf_rrd.trainer", "transformers.models.bert.modeling_bert"]
"""What a process need not import again."""


@dataclass
class Arguments:
    """What the command line may change."""

    processes: int = field(default=2, metadata={"help": "How many."})
    batch_size: int = field(default=32, metadata={"help": "Examples of a micro-batch, of which a step has two."})
    student_width: int = field(default=384, metadata={"help": "Of the student's 6 layers."})
    widths: list[int] = field(default_factory=lambda: [128, 384, 768, 1024], metadata={"help": "Of the embeddings."})
    steps: int = field(default=3, metadata={"help": "Optimizer steps of each."})


class Traffic(TrainerCallback):
    """Counts the bytes that this process hands to collectives while steps run."""

    def __init__(self) -> None:
        self.bytes = {"rows": 0, "sizes": 0, "gradients": 0}
        self.calls = {"rows": 0, "sizes": 0}
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on: the calibration is over."""
        gather = self.trainer.accelerator.gather

        def counted_gather(tensor: Tensor) -> Tensor:
            kind = "rows" if tensor.dim() == 2 else "sizes"
            self.bytes[kind] += tensor.nbytes
            self.calls[kind] += 1
            return gather(tensor)

        def counted_all_reduce(group: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
            self.bytes["gradients"] += bucket.buffer().nbytes
            return allreduce_hook(group, bucket)

        self.trainer.accelerator.gather = counted_gather
        self.trainer.model_wrapped.register_comm_hook(None, counted_all_reduce)


def student_of(args: Arguments) -> Any:
    """A BERT classifier."""
    width = args.student_width
    size = {"num_hidden_layers": 6, "num_attention_heads": width // 32, "intermediate_size": 4 * width}
    return BertForSequenceClassification(BertConfig(hidden_size=width, **size))


def texts_of(args: Arguments, width: int) -> datasets.Dataset:
    """Random texts of 8 tokens, with a teacher's embeddings in float32."""
    random, count = np.random.default_rng(0), 2 * args.batch_size * args.processes
    embeddings = random.standard_normal((count, width), dtype=np.float32)
    columns = {"input_ids": random.integers(1000, 2000, (count, 8)), "labels": random.integers(0, 2, count)}
    return datasets.Dataset.from_dict({**columns, "teacher_embedding": embeddings})


def train(rank: int, args: Arguments, port: int, folder: str) -> None:
    """What one process does: a training for each width."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": args.processes, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = {}
    for width in args.widths:
        traffic = Traffic()
        settings = RelationalDistillationConfig(
            output_dir=folder,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=2,
            bank_size=args.batch_size,  # below the number of examples: a bank that has them all takes no new rows
            max_steps=args.steps,
            ddp_find_unused_parameters=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = RelationalDistillationTrainer(
            student_of(args), settings, train_dataset=texts_of(args, width), callbacks=[traffic]
        )
        trainer.remove_callback(PrinterCallback)
        traffic.trainer = trainer
        trainer.train()
        found[width] = {"bytes": traffic.bytes, "calls": traffic.calls, "weights": trainer.model.num_parameters()}
    if rank == 0:
        Path(folder, "traffic.json").write_text(json.dumps(found))


def main() -> None:
    """Train in processes of their own, and print what the first of them sent in a step."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        children = [context.Process(target=train, args=(rank, args, port, folder)) for rank in range(args.processes)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        if any(child.exitcode for child in children):
            raise SystemExit(1)
        found = json.loads(Path(folder, "traffic.json").read_text())
    report(args, found)


def report(args: Arguments, found: dict[str, Any]) -> None:
    """Print the table."""
    weights = next(iter(found.values()))["weights"]
    table = Table(title=f"{args.processes} processes, 2 x {args.batch_size} examples each, {weights:,} weights")
    for column in (
        "width",
        "gathers of rows",
        "rows, bytes",
        "sizes, bytes",
        "gradients, bytes",
        "ratio",
        "on a ring",
    ):
        table.add_column(column, justify="right")
    for width, traffic in found.items():
        rows, sizes, gradients = (traffic["bytes"][name] / args.steps for name in ("rows", "sizes", "gradients"))
        ratio = (rows + sizes) / gradients
        others = args.processes - 1
        on_a_ring = ratio * others / (2 * others / args.processes)
        numbers = [
            f"{traffic['calls']['rows'] / args.steps:g} a step",
            *(f"{n:,.0f}" for n in (rows, sizes, gradients)),
        ]
        table.add_row(width, *numbers, f"{ratio:.4f}", f"{on_a_ring:.4f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
