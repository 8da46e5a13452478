"""Do layers below the last teach? Students of a fine-tuned MiniLM with and without `layer_weight`.

    python examples/benchmarks/layer_terms.py --data_dir data
    python examples/benchmarks/layer_terms.py --data_dir data --speed
    python examples/benchmarks/layer_terms.py --only_report

Two students: 3 of the teacher's 6 layers, which are compared by hidden states, and a fresh BERT of 3 layers, 192 wide,
compared by the relations of MiniLMv2. Four cells: SST-2 with all labels and with 500 (the other sentences without),
questions (TREC) and reviews (MR). Both rows of a cell have the package's defaults, the same steps and the same rate.
The weight of each student is the one of `WEIGHTS` with the best mean over the cells of `TUNED_ON`, measured on
validation data with a seed of its own; the test split is read for the table alone. The teachers are trained once. Each
finished run is a file, so a killed benchmark goes on where it was, and several may work in one folder.
"""

import fcntl
import hashlib
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from compare_losses import interval, task_loss
from comparison_tasks import LABELED, minilm_folder, quiet, save_atomically
from datasets import Dataset, load_dataset
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_rrd import RelationalDistillationConfig, RelationalDistillationTrainer, student_from_teacher

DATA = {"sst2": ("sst2/", "sentence"), "trec": ("sentences/trec_", "text"), "mr": ("sentences/mr_", "text")}
CELLS = {"sst2 500": LABELED, "trec": None, "mr": None, "sst2": None}
"""The data of each cell, and how many of them have a label; None for all."""

VALIDATED = 800
"""Examples of the training split that stand in for a validation split where there is none: its last ones."""

STUDENTS = {"3 layers": (2e-4, 100), "fresh 3 x 192": (1e-3, 200)}
"""The learning rate and the steps of each."""

LENGTH = 24
"""Tokens of a sentence at most."""

WEIGHTS = (1.0, 3.0, 10.0)
TUNED_ON = ("sst2 500", "trec")
TUNING_SEED = 1000


@dataclass
class Arguments:
    """What the command line may change."""

    data_dir: str = field(default="data", metadata={"help": "Holds the folders sst2/ and sentences/."})
    output_dir: str = field(default="out/layer_terms", metadata={"help": "Where teachers and figures go."})
    student: list[str] = field(default_factory=lambda: list(STUDENTS), metadata={"help": "Only these students."})
    cells: list[str] = field(default_factory=lambda: list(CELLS), metadata={"help": "Only these cells."})
    seeds: int = field(default=5, metadata={"help": "Runs of each row."})
    steps: int | None = field(default=None, metadata={"help": "Steps of a run; by the student if unset."})
    weight: float | None = field(default=None, metadata={"help": "The layers' weight; tuned if unset."})
    batch_size: int = field(default=16, metadata={"help": "Sentences of a step."})
    speed: bool = field(default=False, metadata={"help": "Only measure the time and the memory of a step."})
    only_report: bool = field(default=False, metadata={"help": "Train nothing, print what is finished."})


@dataclass(frozen=True)
class Run:
    """One training."""

    cell: str
    student: str
    weight: float
    seed: int
    steps: int
    batch_size: int

    def path(self, args: Arguments) -> Path:
        """Of its figures."""
        return Path(args.output_dir) / "runs" / f"{hashlib.sha256(repr(self).encode()).hexdigest()[:16]}.json"


# ---- Data and models ----


@cache
def split_of(data_dir: str, name: str, part: str) -> Dataset:
    """A data set's split: `train`, `validation` or `test`, as tokens of MiniLM."""
    start, column = DATA[name]
    known = part != "validation" or name == "sst2"
    table: Any = load_dataset("csv", data_files=f"{data_dir}/{start}{part if known else 'train'}.csv", split="train")
    if name != "sst2" and part != "test":
        whole = range(len(table))
        table = table.select(whole[-VALIDATED:] if part == "validation" else whole[:-VALIDATED])
    tokens = AutoTokenizer.from_pretrained(minilm_folder())(table[column][:], truncation=True, max_length=LENGTH)
    return Dataset.from_dict(
        {**{key: tokens[key] for key in ("input_ids", "attention_mask")}, "labels": table["label"]}
    )


def teacher_of(args: Arguments, name: str) -> Any:
    """MiniLM fine-tuned on a data set, once."""
    folder = Path(args.output_dir) / name / "teacher"
    if not (folder / "config.json").is_file():
        train, tokenizer = split_of(args.data_dir, name, "train"), AutoTokenizer.from_pretrained(minilm_folder())
        set_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            minilm_folder(), num_labels=1 + max(train["labels"])
        )
        settings = quiet(folder, max_steps=200, per_device_train_batch_size=32, learning_rate=1e-4)
        settings |= {
            "warmup_steps": 50,
            "bf16": torch.cuda.is_available(),
            "train_sampling_strategy": "group_by_length",
        }
        Trainer(model, TrainingArguments(**settings), DataCollatorWithPadding(tokenizer), train).train()
        save_atomically(model, tokenizer, folder)
    return AutoModelForSequenceClassification.from_pretrained(folder)


def student_of(kind: str, seed: int, teacher: Any) -> Any:
    """A student of one of the kinds."""
    set_seed(seed)
    if kind == "3 layers":
        return student_from_teacher(teacher, num_hidden_layers=3)
    size = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 768}
    words, classes = teacher.config.vocab_size, teacher.config.num_labels
    return BertForSequenceClassification(BertConfig(vocab_size=words, num_labels=classes, **size))


def trainer_of(run: Run, args: Arguments, folder: str) -> Any:
    """A trainer of the run."""
    name = run.cell.split()[0]
    teacher, train = teacher_of(args, name), split_of(args.data_dir, name, "train")
    if (labeled := CELLS[run.cell]) is not None:
        labels = [label if place < labeled else -100 for place, label in enumerate(train["labels"])]
        train = train.remove_columns("labels").add_column("labels", labels)
    settings = quiet(Path(folder), learning_rate=STUDENTS[run.student][0], max_steps=run.steps, seed=run.seed)
    settings |= {"warmup_steps": run.steps // 10, "per_device_train_batch_size": run.batch_size, "bank_size": 1024}
    settings |= {"per_device_eval_batch_size": 64, "bf16": torch.cuda.is_available()}
    trainer = RelationalDistillationTrainer(
        student_of(run.student, run.seed, teacher),
        RelationalDistillationConfig(**settings, layer_weight=run.weight),
        train_dataset=train,
        processing_class=AutoTokenizer.from_pretrained(minilm_folder()),
        compute_loss_func=task_loss,
        teacher=teacher,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@torch.no_grad()
def accuracy(model: Any, split: Dataset) -> float:
    """In percent."""
    collate, rows = DataCollatorWithPadding(AutoTokenizer.from_pretrained(minilm_folder())), split.to_list()
    rows.sort(key=lambda row: len(row["input_ids"]))
    right = 0.0
    for start in range(0, len(rows), 64):
        batch = collate(rows[start : start + 64]).to(model.device)
        labels = batch.pop("labels")
        right += (model(**batch).logits.argmax(-1) == labels).sum().item()
    return 100 * right / len(rows)


# ---- Runs ----


def finish(run: Run, args: Arguments) -> dict[str, Any]:
    """A run's figures, from its file or from a training; of another process's run after that."""
    path = run.path(args)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                trainer = trainer_of(run, args, folder)
                trainer.train()
            model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
            part = "validation" if run.seed == TUNING_SEED else "test"
            figures = {"accuracy": accuracy(model, split_of(args.data_dir, run.cell.split()[0], part))}
            figures["seconds"] = time.perf_counter() - start
            path.with_suffix(".tmp").write_text(json.dumps({**vars(run), **figures}, indent=1))
            path.with_suffix(".tmp").replace(path)
    path.with_suffix(".lock").unlink(missing_ok=True)
    return dict(json.loads(path.read_text()))


def finished(run: Run, args: Arguments) -> dict[str, Any] | None:
    """A run's figures, if there are any."""
    return json.loads(run.path(args).read_text()) if run.path(args).is_file() else None


def run_of(cell: str, kind: str, weight: float, seed: int, args: Arguments) -> Run:
    """A run with what the command line says."""
    return Run(cell, kind, weight, seed, args.steps or STUDENTS[kind][1], args.batch_size)


def tried(kind: str, weight: float, args: Arguments) -> list[Run]:
    """The runs by which a weight is chosen."""
    return [run_of(cell, kind, weight, TUNING_SEED, args) for cell in TUNED_ON]


def chosen_weight(kind: str, args: Arguments) -> float:
    """The best weight of a student among those that are measured."""
    scores = {weight: [finished(run, args) for run in tried(kind, weight, args)] for weight in WEIGHTS}
    whole = {weight: [each["accuracy"] for each in runs if each] for weight, runs in scores.items() if all(runs)}
    return args.weight or max(whole, key=lambda weight: statistics.fmean(whole[weight]), default=1.0)


def train_all(args: Arguments) -> None:
    """Tune, then train what is not finished: seed after seed."""
    for kind in args.student:  # the rows of one student before the other is tuned
        for weight in () if args.weight else WEIGHTS:
            found = [finish(run, args)["accuracy"] for run in tried(kind, weight, args)]
            print(f"{kind}, validation, weight {weight}: {statistics.fmean(found):.2f} {found}", flush=True)
        for seed in range(args.seeds):
            for cell in args.cells:
                for weight in (0.0, chosen_weight(kind, args)):
                    figures = finish(run_of(cell, kind, weight, seed, args), args)
                    told = {name: round(figures[name], 2) for name in ("accuracy", "seconds")}
                    print(cell, kind, weight, seed, told, flush=True)


def report(args: Arguments) -> None:
    """Print both rows of each cell, and their difference, paired by seed, with its 95 percent interval."""
    table = Table("", "weight", "without", "with", "with - without", "seeds")
    for kind in args.student:
        weight = chosen_weight(kind, args)
        for cell in args.cells:
            pairs = [
                [finished(run_of(cell, kind, each, seed, args), args) for each in (0.0, weight)] for seed in range(20)
            ]
            scores = [[run["accuracy"] for run in pair] for pair in pairs if all(pair)]
            if scores:
                without, having = ([pair[place] for pair in scores] for place in (0, 1))
                mean, half = interval([pair[1] - pair[0] for pair in scores])
                cells = [f"{statistics.fmean(each):.2f}" for each in (without, having)]
                table.add_row(f"{kind}, {cell}", f"{weight:g}", *cells, f"{mean:+.2f} ± {half:.2f}", f"{len(scores)}")
    Console(width=120).print(table)


# ---- Speed ----


def timed(run: Run, args: Arguments, answers: Any) -> None:
    """Seconds of a step, the median of those after the fifth, and the peak memory in MiB, in a process of its own.

    On a CPU the seconds are those of the processor, which other work on the machine does not lengthen much.
    """
    logging.set_verbosity_error()
    seconds: list[float] = []
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(run, args, folder)
        step = trainer.training_step

        def timed_step(*given: Any, **kwargs: Any) -> Any:
            start = clock()
            loss = step(*given, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(clock() - start)
            return loss

        trainer.training_step = timed_step
        trainer.train()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    memory = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else memory
    answers.put((statistics.median(seconds[5:]), memory))


def speed(args: Arguments) -> None:
    """Print what a step costs with and without the layers, three times in turns."""
    context = multiprocessing.get_context("spawn")
    for kind in args.student:
        found: dict[float, list[Any]] = {0.0: [], 1.0: []}
        for _ in range(3):
            for weight, each in found.items():
                answers = context.Queue()
                run = Run("sst2", kind, weight, 0, args.steps or 25, args.batch_size)
                process = context.Process(target=timed, args=(run, args, answers))
                process.start()
                each.append(answers.get())
                process.join()
        (before, less), (after, more) = (map(statistics.median, zip(*each, strict=True)) for each in found.values())
        print(f"{kind}: a step takes {1000 * before:.0f} ms without, {1000 * after:.0f} with ({after / before:.3f})")
        print(f"{kind}: the peak is {less:.0f} MiB without, {more:.0f} with")


def main() -> None:
    """Train what is missing, and print."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="'pin_memory'")
    if args.speed:
        return speed(args)
    if not args.only_report:
        train_all(args)
    report(args)


if __name__ == "__main__":
    main()
