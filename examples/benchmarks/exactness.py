"""How exact the loss and the step are: errors against references, each with its bound.

    python examples/benchmarks/exactness.py

The references are double-precision loops over the formula, InfoNCE from torch, the same step cut another way, and the
same training on one process instead of two or four (gloo, on this machine).
"""

import math
import multiprocessing
import os
import socket
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import HfArgumentParser, ViTConfig, ViTForImageClassification

import hf_rrd.losses.relational
from hf_rrd import RelationalDistillationConfig, RelationalDistillationTrainer, cache_teacher_outputs, relational_loss
from hf_rrd.losses.relational import relational_terms

PRELOADED = ["hf_rrd", "hf_rrd.trainer", "transformers.models.vit.modeling_vit"]
"""What a process need not import again."""


@dataclass
class Arguments:
    """What the command line may change."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Where the runs write; default: a temporary folder."}
    )


def loop(student: Tensor, teacher: Tensor, bank: Tensor, own: bool) -> tuple[float, Tensor]:
    """The loss and its gradient, (batch, dim), from the formula, one number at a time; temperatures 0.1 and 0.02.

    The rows may have any length: the gradient of a cosine has no part along the student's row.
    """
    lengths = student.norm(dim=-1, keepdim=True)
    student, teacher, bank = (F.normalize(rows, dim=-1) for rows in (student, teacher, bank))
    total, gradient = 0.0, torch.zeros_like(student)
    for i, (f_s, f_t) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        rows = bank.tolist() + ([f_t] if own else [])
        s = [sum(a * b for a, b in zip(f_s, row, strict=True)) / 0.1 for row in rows]
        t = [sum(a * b for a, b in zip(f_t, row, strict=True)) / 0.02 for row in rows]
        s_norm, t_norm = (max(x) + math.log(sum(math.exp(v - max(x)) for v in x)) for x in (s, t))
        for k, row in enumerate(rows):
            p_t, p_s = math.exp(t[k] - t_norm), math.exp(s[k] - s_norm)
            total -= p_t * (s[k] - s_norm) / len(student)
            for d, value in enumerate(row):
                gradient[i, d] += (p_s - p_t) * value / 0.1 / len(student)
    return total, (gradient - (gradient * student).sum(-1, keepdim=True) * student) / lengths


def loss_errors(slice_rows: int, own: bool) -> tuple[float, float]:
    """Largest errors of loss and gradient in float64, batch 6, bank 37, dim 5."""
    torch.manual_seed(0)
    student, teacher, bank = (torch.randn(n, 5, dtype=torch.float64) for n in (6, 6, 37))
    hf_rrd.losses.relational.SLICE_ROWS = slice_rows
    student.requires_grad_()
    value = relational_loss(student, teacher, bank, include_own=own)
    value.backward()
    expected, gradient = loop(student.detach(), teacher, bank, own)
    assert student.grad is not None
    return abs(value.item() - expected), (student.grad - gradient).abs().max().item()


def limit_errors() -> tuple[float, float]:
    """Against InfoNCE at teacher_temperature 1e-6 with the own key in, and the divergence of identical inputs."""
    torch.manual_seed(1)
    student, teacher, bank = (F.normalize(torch.randn(n, 16, dtype=torch.float64), dim=-1) for n in (8, 8, 100))
    logits = torch.cat([student @ bank.T, (student * teacher).sum(-1, keepdim=True)], dim=1) / 0.1
    expected = F.cross_entropy(logits, torch.full((8,), 100))
    info_nce = relational_loss(student, teacher, bank, 0.1, 1e-6, include_own=True)
    divergence = relational_terms(student, student, bank, 0.1, 0.1, include_own=True)[1]
    return abs((info_nce - expected).item()), divergence.abs().max().item()


class Images(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random images in four classes."""

    pixels = torch.randn(256, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One image and its class."""
        return {"pixel_values": self.pixels[index], "labels": index % 4}


def vit(width: int) -> ViTForImageClassification:
    """A tiny model."""
    torch.manual_seed(width)
    size = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * width}
    shape = {"image_size": 16, "patch_size": 8, "num_labels": 4}
    return ViTForImageClassification(ViTConfig(**size, **shape, hidden_dropout_prob=0.0))


def settings_of(folder: str, steps: int = 5) -> dict[str, Any]:
    """What all runs share."""
    quiet = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    return {"output_dir": folder, "max_steps": steps, "learning_rate": 1e-3, **quiet}


def train(batch: int, accumulation: int, folder: str, steps: int = 5) -> dict[str, Tensor]:
    """All parameters that matter, head included, and the bank, after some steps of AdamW with all three terms.

    A bias of attention's keys shifts all scores of a query alike: its gradient is 0 but for rounding, which AdamW
    enlarges, and it is left out.
    """
    settings = RelationalDistillationConfig(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        kd_weight=0.5,
        bank_size=100,
        **settings_of(folder, steps),
    )
    run = RelationalDistillationTrainer(vit(16), settings, train_dataset=Images(), teacher=vit(24))
    run.train()
    named = [*run.model.named_parameters(), *run.distillation.head.projection.named_parameters()]
    weights = [weight for name, weight in named if not name.endswith(("k_proj.bias", "key.bias"))]
    parameters = torch.cat([weight.detach().flatten() for weight in weights])
    return {"parameters": parameters, "bank": run.distillation.bank.filled}


def train_as(rank: int, processes: int, port: int, folder: str) -> None:
    """20 steps of 64 examples as one of several processes, whose end is written to a file."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    save_file(train(64 // processes, 1, folder, steps=20), Path(folder, f"{rank}-of-{processes}.safetensors"))


def process_errors(folder: str) -> list[tuple[str, float, float]]:
    """The rows on several processes: against one process, and against each other."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    for processes in (1, 2, 4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [
            context.Process(target=train_as, args=(rank, processes, port, folder)) for rank in range(processes)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join()
    rows = []
    one = load_file(Path(folder, "0-of-1.safetensors"))
    for processes in (2, 4):
        ends = [load_file(Path(folder, f"{rank}-of-{processes}.safetensors")) for rank in range(processes)]
        for name, bound in (("parameters", 1e-5), ("bank", 1e-6)):
            error = (ends[0][name] - one[name]).abs().max().item()
            rows += [(f"20 steps on {processes} processes: {name} against one process", error, bound)]
        apart = max((end[name] - ends[0][name]).abs().max().item() for end in ends for name in one)
        rows += [(f"20 steps on {processes} processes: the processes against each other", apart, 0.0)]
    return rows


def cached_errors(dtype: str, folder: str) -> float:
    """The largest relative error of the terms of 5 steps from cached outputs against the teacher online, 64 images."""
    pixels = {"pixel_values": Images.pixels[:64].tolist(), "labels": [index % 4 for index in range(64)]}
    data, teacher = datasets.Dataset.from_dict(pixels), vit(24)
    cached = cache_teacher_outputs(data, teacher, batch_size=24, dtype=dtype, cache_dir=folder)
    logged = []
    for train, given in ((data, teacher), (cached, None)):
        settings = RelationalDistillationConfig(**settings_of(folder), logging_steps=1, kd_weight=0.5, bank_size=64)
        run = RelationalDistillationTrainer(vit(16), settings, train_dataset=train, teacher=given)
        run.train()
        names = ("task_loss", "kd_loss", "relational_loss")
        logged.append(
            torch.tensor([[line[name] for name in names] for line in run.state.log_history if "loss" in line])
        )
    online, offline = logged
    return ((online - offline).abs() / online.abs()).max().item()


def main() -> None:
    """Compute, print, and end with 1 where a bound is missed."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    rows: list[tuple[str, float, float]] = []
    slice_rows = hf_rrd.losses.relational.SLICE_ROWS
    for read_at_a_time in (slice_rows, 8):
        for own in (False, True):
            errors = loss_errors(read_at_a_time, own)
            name = f"{read_at_a_time} rows at a time, own key {'in' if own else 'out'}"
            rows += [(f"{name}: loss or gradient against the loop", max(errors), 1e-9)]
    hf_rrd.losses.relational.SLICE_ROWS = slice_rows
    info_nce, divergence = limit_errors()
    rows += [("teacher_temperature 1e-6, own key in: against InfoNCE", info_nce, 1e-9)]
    rows += [("KL of identical inputs", divergence, 0.0)]
    with tempfile.TemporaryDirectory() as folder:
        folder = args.output_dir or folder
        whole = train(64, 1, folder)["parameters"]
        for batch, accumulation in ((32, 2), (16, 4)):
            error = (whole - train(batch, accumulation, folder)["parameters"]).abs().max().item()
            rows += [(f"5 steps of {batch} x {accumulation}: parameters against 64 x 1", error, 1e-5)]
        rows += process_errors(folder)
        for dtype, bound in (("float32", 1e-5), ("float16", 5e-3)):
            rows += [
                (
                    f"losses of 5 steps from a cache in {dtype}: against online, relative",
                    cached_errors(dtype, folder),
                    bound,
                )
            ]
    table = Table("what", "largest error", "bound", "")
    for name, error, bound in rows:
        table.add_row(name, f"{error:.1e}", f"{bound:.0e}", "held" if error <= bound else "missed")
    Console(width=110).print(table)
    if any(error > bound for _, error, bound in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
