"""What distillation adds to a step of a plain Trainer, with cached outputs of the teacher and with the teacher online.

    python examples/benchmarks/step_time.py --student vit
    python examples/benchmarks/step_time.py --student bert

A cached step is compared with the step of `Trainer` on the same student and examples, an online step with that and the
teacher's forward alone. All trainers train in turn, some steps each, and the first of these is not counted; a step is
timed from its beginning to that of the next. The ratio is the median of the rounds'
ratios, each of medians of its steps, so that a slow drift of the machine cancels. The bank is full from the start.
Models and examples are random: a step takes as long. Batches lie in the device's memory, so that reading is not timed
(`--read` takes them from a data set). Two rivals have rows: with a teacher online a trainer after transformers' guide
to distillation, whose teacher runs outside of autocast; of a BERT, where sentence-transformers is installed, its
`EmbedDistillLoss`. Operations count that are neither views nor allocations: on a GPU each is a launch.
"""

import importlib.util
import tempfile
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from operations import Operations
from rich.console import Console
from rich.table import Table
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

from hf_rrd import RelationalDistillationConfig, RelationalDistillationTrainer
from hf_rrd.losses.relational import relational_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Arguments:
    """What the command line may change."""

    student: str = field(
        default="vit", metadata={"help": "Its family, and its teacher's.", "choices": ["vit", "bert"]}
    )
    student_width: int | None = field(default=None, metadata={"help": "Default: 192 of a ViT, 384 of a BERT."})
    student_layers: int = field(default=6, metadata={"help": "Of the student; the teacher has 12."})
    teacher_width: int | None = field(default=None, metadata={"help": "Default: 384 of a ViT, 768 of a BERT."})
    image_size: int = field(
        default=224, metadata={"help": "In pixels; there are 14 x 14 patches at 224, 8 x 8 at 32."}
    )
    length: int = field(default=64, metadata={"help": "Tokens of a text."})
    batch_size: int = field(default=64, metadata={"help": "Examples of a step."})
    bank_size: int = field(default=16_384, metadata={"help": "Rows in the bank."})
    cached_widths: list[int] = field(
        default_factory=lambda: [384, 768, 128], metadata={"help": "Of cached embeddings, each a row of the report."}
    )
    online: bool = field(default=True, metadata={"help": "Also with the teacher online."})
    read: bool = field(default=False, metadata={"help": "Read batches from a data set, and time that, too."})
    bf16: bool = field(default=False, metadata={"help": "Under autocast to bfloat16."})
    steps: int = field(default=4, metadata={"help": "Of each trainer in each round; the first is not counted."})
    rounds: int = field(default=8, metadata={"help": "How often each trainer has its turn."})


def model_of(args: Arguments, width: int, layers: int) -> Any:
    """A classifier, with heads of 64."""
    size = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": max(1, width // 64)}
    size |= {"intermediate_size": 4 * width}
    if args.student == "bert":
        return BertForSequenceClassification(BertConfig(**size))
    patch = 16 if args.image_size >= 64 else 4
    return ViTForImageClassification(ViTConfig(**size, image_size=args.image_size, patch_size=patch, num_labels=10))


def student_of(args: Arguments) -> Any:
    """The student of a run, from fresh weights."""
    return model_of(args, args.student_width or 0, args.student_layers)


def examples_of(args: Arguments) -> datasets.Dataset:
    """Four batches."""
    random, count = np.random.default_rng(0), 4 * args.batch_size
    columns: dict[str, Any] = {"labels": random.integers(0, 2, count)}
    features = {"labels": datasets.Value("int64")}
    if args.student == "bert":
        columns["input_ids"] = random.integers(1000, 30_000, (count, args.length))
        features["input_ids"] = datasets.List(datasets.Value("int32"))
    else:
        shape = (3, args.image_size, args.image_size)
        columns["pixel_values"] = random.standard_normal((count, *shape), dtype=np.float32)
        features["pixel_values"] = datasets.Array3D(shape, "float32")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features)).with_format("torch")


def with_embeddings(data: datasets.Dataset, width: int) -> datasets.Dataset:
    """With random cached embeddings in float16."""
    rows = np.random.default_rng(1).standard_normal((len(data), width)).astype("float16")
    kept = datasets.List(datasets.Value("float16"), length=width)
    return data.with_format(None).add_column("teacher_embedding", rows.tolist(), feature=kept).with_format("torch")


class OnDevice:
    """A data set's batches in the device's memory: a list of examples, and a collator that gives the next batch."""

    def __init__(self, data: datasets.Dataset, batch_size: int) -> None:
        pieces = [data[start : start + batch_size] for start in range(0, len(data), batch_size)]
        self.batches = [{name: column.to(DEVICE) for name, column in piece.items()} for piece in pieces]
        self.examples = [data[row] for row in range(len(data))]
        self._given = 0

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        """The next batch, for as many examples."""
        self._given += 1
        return {
            name: column[: len(features)] for name, column in self.batches[self._given % len(self.batches)].items()
        }


class GuideTrainer(Trainer):
    """Distillation on logits as transformers' guide does it: a teacher in `compute_loss`, which nobody prepares."""

    teacher: Any = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Half of the task, half of the teacher at a temperature of 5."""
        outputs = model(**inputs)
        with torch.no_grad():
            logits = self.teacher(**inputs).logits
        pair = (F.log_softmax(outputs.logits / 5, dim=-1), F.softmax(logits / 5, dim=-1))
        loss = 0.5 * outputs.loss + 0.5 * 25 * F.kl_div(*pair, reduction="batchmean")
        return (loss, outputs) if return_outputs else loss


class Embedding(torch.nn.Module):
    """A classifier's body as `EmbedDistillLoss` wants a model: a dict in, one with the mean over the tokens out."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body, self.device = body, torch.device(DEVICE)

    def get_embedding_dimension(self) -> int:
        """Its width."""
        return int(self.body.config.hidden_size)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Without padding."""
        return {"sentence_embedding": self.body(**features).last_hidden_state.mean(1)}


class EmbedDistillTrainer(Trainer):
    """sentence-transformers' loss with its projection, in a plain `Trainer`."""

    loss: Any = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The loss alone: there is no task."""
        loss = self.loss([{"input_ids": inputs["input_ids"]}], inputs["teacher_embedding"])
        return (loss, {}) if return_outputs else loss


class Clock(TrainerCallback):
    """The seconds of each step, from its beginning to that of the next."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.counts_next = False  # operations, in a training of its own
        self.operations = 0
        self._counted: Operations | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time, or begin and end to count in the third step."""
        if self._counted is not None:
            self._counted.__exit__(None, None, None)
            self.operations, self._counted, self.counts_next = len(self._counted.names), None, False
        elif self.counts_next and state.global_step == 2:
            self._counted = Operations()
            self._counted.__enter__()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def take(self) -> list[float]:
        """The steps since the last call, but for the first."""
        marks, self.marks = self.marks, []
        return [later - earlier for earlier, later in zip(marks[1:], marks[2:], strict=False)]


def settings_of(args: Arguments, folder: str) -> dict[str, Any]:
    """What all trainers share."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": args.batch_size,
        "max_steps": max(4, args.steps + 1),
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": args.bf16,
        "dataloader_pin_memory": args.read,
        "remove_unused_columns": False,
    }


def reading_of(args: Arguments, data: datasets.Dataset) -> dict[str, Any]:
    """What a trainer reads, and how it makes a batch of it."""
    if args.read:
        return {"train_dataset": data}
    batches = OnDevice(data, args.batch_size)
    return {"train_dataset": batches.examples, "data_collator": batches}


def rivals(args: Arguments, settings: TrainingArguments, data: datasets.Dataset, teacher: Any) -> dict[str, Trainer]:
    """Others' ways to distil, as far as they can be had."""
    made: dict[str, Trainer] = {}
    if teacher is not None:
        student = student_of(args)
        guide = GuideTrainer(student, settings, **reading_of(args, data))
        guide.teacher = teacher
        made[f"transformers' guide, {args.teacher_width} wide"] = guide
    if args.student == "bert" and importlib.util.find_spec("sentence_transformers") is not None:
        from sentence_transformers.losses import EmbedDistillLoss

        width, student = args.cached_widths[0], Embedding(student_of(args).bert)
        loss = EmbedDistillLoss(student.to(DEVICE), "cosine", projection_dim=width)
        run = EmbedDistillTrainer(loss, settings, **reading_of(args, with_embeddings(data, width)))
        run.loss = loss
        made[f"EmbedDistillLoss, {width} wide"] = run
    return made


def distillation(args: Arguments, folder: str, data: datasets.Dataset, teacher: Any) -> Any:
    """A trainer of ours whose bank is full when a training starts."""
    run = RelationalDistillationTrainer(
        student_of(args),
        RelationalDistillationConfig(bank_size=args.bank_size, teacher_projection="none", **settings_of(args, folder)),
        teacher=teacher,
        **reading_of(args, data),
    )
    bank = run.distillation.bank
    assert bank is not None
    rows = F.normalize(torch.randn(bank.size, bank.dim), dim=-1)
    run._calibrate = lambda: bank.enqueue(rows.to(run.args.device))  # type: ignore[method-assign]
    return run


@torch.no_grad()
def forward_seconds(args: Arguments, teacher: Any, data: datasets.Dataset) -> list[float]:
    """Of the teacher's forward alone, for each batch of the examples."""
    times = []
    names = [name for name in data.column_names if name != "labels"]
    for start in range(0, len(data), args.batch_size):
        inputs = {name: data[start : start + args.batch_size][name].to(DEVICE) for name in names}
        begin = time.perf_counter()
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=args.bf16):
            teacher(**inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return times


def loss_seconds(args: Arguments, width: int) -> float:
    """Of the loss alone, forward and backward."""
    rows = [
        F.normalize(torch.randn(n, width, device=DEVICE), dim=-1) for n in (args.batch_size,) * 2 + (args.bank_size,)
    ]
    times = []
    for _ in range(8):
        start = time.perf_counter()
        relational_loss(rows[0].requires_grad_(), *rows[1:], include_own=True).backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def main() -> None:
    """Measure, print."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    logging.set_verbosity_error()
    args.student_width = args.student_width or {"vit": 192, "bert": 384}[args.student]
    args.teacher_width = args.teacher_width or {"vit": 384, "bert": 768}[args.student]
    data, times = examples_of(args), {}
    teacher = model_of(args, args.teacher_width, 12).eval().to(DEVICE) if args.online else None
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(**settings_of(args, folder))
        plain = Trainer(student_of(args), settings, **reading_of(args, data))
        runs = {"plain": plain} | {
            f"cached, {width} wide": distillation(args, folder, with_embeddings(data, width), None)
            for width in args.cached_widths
        }
        if teacher is not None:
            runs[f"online, {args.teacher_width} wide"] = distillation(args, folder, data, teacher)
        runs |= rivals(args, settings, data, teacher)
        clocks = {name: Clock() for name in runs}
        for name, run in runs.items():
            run.remove_callback(PrinterCallback)
            run.add_callback(clocks[name])
            times[name] = []
        forwards: list[list[float]] = []
        for _ in range(args.rounds):
            for name, run in runs.items():
                run.train()
                times[name].append(clocks[name].take())
            if teacher is not None:
                forwards.append(forward_seconds(args, teacher, data)[1:])
        for name, run in runs.items():
            clocks[name].counts_next = True
            run.train()

    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    reads = f"{args.length} tokens" if args.student == "bert" else f"{args.image_size} pixels"
    console = Console(width=130)
    line = f"{where}, {'bf16' if args.bf16 else 'float32'}, {args.student} student of {args.student_layers} layers, "
    line += f"{args.student_width} wide, {reads}, batch {args.batch_size}, bank {args.bank_size:,}; "
    line += f"medians of {args.rounds * (args.steps - 1)} steps. The teacher has 12 layers."
    console.print(line, highlight=False, soft_wrap=True)
    table = Table("step", "seconds", "against", "seconds", "ratio", "least to most", "the loss alone", "operations")
    plain_step = median(sum(times["plain"], []))
    table.add_row("plain", f"{plain_step:.4f}", "", "", "", "", "", str(clocks["plain"].operations))
    for name in list(runs)[1:]:
        width, is_online = int(name.split()[-2]), name.startswith(("online", "transformers"))
        is_ours = name.startswith(("online", "cached"))
        forward = median(sum(forwards, [])) if is_online else 0.0
        step, limit = median(sum(times[name], [])), plain_step + forward
        rounds = [
            median(times[name][turn]) / (median(times["plain"][turn]) + (median(forwards[turn]) if forward else 0.0))
            for turn in range(args.rounds)
        ]
        against = "plain + teacher" if forward else "plain"
        spread = f"{min(rounds):.3f} to {max(rounds):.3f}"
        alone = f"{100 * loss_seconds(args, width) / limit:.1f} %" if is_ours else ""
        figures = [f"{step:.4f}", against, f"{limit:.4f}", f"{median(rounds):.3f}", spread, alone]
        table.add_row(name, *figures, str(clocks[name].operations))
    console.print(table)


if __name__ == "__main__":
    main()
