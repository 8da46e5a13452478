"""How much smaller MiniLM is with the vocabulary of some sentences, and whether its outputs stay bitwise the same.

    python examples/benchmarks/vocabulary.py --data_dir data
    python examples/benchmarks/vocabulary.py --data_dir data --accuracy --min_counts 1 3 8
    python examples/benchmarks/vocabulary.py --data_dir data --accuracy --min_counts 1 3 8 --prune_first

The texts are those of the task `sentences` of `compare_losses.py`, SST-2's among them: nothing is trained here.

With `--accuracy` a student is: two layers of the SST-2 teacher of `compare_losses.py`, distilled with the defaults and
all labels. Then its vocabulary is pruned to SST-2's training split, or with `--prune_first` that of the teacher before
the student is made of it. Each student is exported as int8: bytes, and accuracy on the test split, over some seeds.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comparison_tasks import Texts, examples_of, minilm_folder, quiet, save_atomically, sst2
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, PrinterCallback, set_seed

from hf_rrd import (
    RelationalDistillationConfig,
    RelationalDistillationTrainer,
    prune_vocabulary,
    student_from_teacher,
)
from hf_rrd.results.export import OnnxModel, export_onnx

TRAINED_ON = {"sst2/train": ["sentence"], "sentences/stsb_train": ["sentence1", "sentence2"]}
TRAINED_ON |= {"sentences/trec_train": ["text"], "sentences/mr_train": ["text"]}
TESTED_ON = {"sentences/stsb_test": ["sentence1", "sentence2"], "sentences/trec_test": ["text"]}
TESTED_ON |= {"sentences/mr_test": ["text"]}


@dataclasses.dataclass
class Arguments:
    """What the command line may change."""

    data_dir: str = dataclasses.field(default="data", metadata={"help": "Holds the folders sst2/ and sentences/."})
    min_counts: list[int] = dataclasses.field(
        default_factory=lambda: [1, 2, 3, 5, 8, 10], metadata={"help": "A row of the table for each."}
    )
    num_hidden_layers: int = dataclasses.field(default=2, metadata={"help": "Layers of the small student, of 6."})
    accuracy: bool = dataclasses.field(default=False, metadata={"help": "Bytes and accuracy of students, instead."})
    output_dir: str = dataclasses.field(default="out/compare", metadata={"help": "Where the SST-2 teacher is."})
    seeds: int = dataclasses.field(default=3, metadata={"help": "Students that are trained for the accuracy."})
    prune_first: bool = dataclasses.field(default=False, metadata={"help": "Prune before the student is trained."})
    max_steps: int = dataclasses.field(default=162, metadata={"help": "Of 64 sentences, for each of them."})
    compared: int = dataclasses.field(default=1000, metadata={"help": "Texts whose outputs are compared."})


def bytes_of(model: Any) -> int:
    """The size of a model's saved weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def keeping(tokenizer: Any, pruned: Any, texts: list[str]) -> list[str]:
    """The texts whose tokens are all in the pruned vocabulary."""
    names, kept = tokenizer.get_vocab(), pruned.get_vocab().keys()
    ids = {number for token, number in names.items() if token in kept}
    read = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [text for text, row in zip(texts, read, strict=True) if ids.issuperset(row)]


@torch.no_grad()
def equal(one: tuple[Any, Any], other: tuple[Any, Any], texts: list[str]) -> int:
    """How many texts have bitwise the same hidden states in two models, each with its tokenizer."""
    count = 0
    for start in range(0, len(texts), 50):
        batch = texts[start : start + 50]
        states = [
            model(**tokenizer(batch, padding=True, truncation=True, return_tensors="pt")).last_hidden_state
            for model, tokenizer in (one, other)
        ]
        count += sum(torch.equal(*pair) for pair in zip(*states, strict=True))
    return count


def main(args: Arguments) -> None:
    """Prune, measure, print."""
    data = Texts(Path(args.data_dir))
    corpus, *tests = (
        [
            *dict.fromkeys(
                text for table, names in tables.items() for name in names for text in data.column(table, name)
            )
        ]
        for tables in (TRAINED_ON, *({table: names} for table, names in TESTED_ON.items()))
    )
    model, tokenizer = AutoModel.from_pretrained(minilm_folder()).eval(), data.tokenizer
    parameters, size = model.num_parameters(), bytes_of(model)
    title = f"MiniLM: {len(tokenizer):,} tokens, {parameters:,} parameters, {size / 1e6:.1f} MB; {len(corpus):,} texts"
    table = Table(title=title)
    for column in ("min_count", "tokens", "parameters", "of all", "MB", "of all", f"{args.num_hidden_layers} layers"):
        table.add_column(column)
    table.add_column("texts that keep their tokens")
    table.add_column("bitwise equal")
    for name in TESTED_ON:
        table.add_column(f"{Path(name).name} keeps its tokens")
    for min_count in args.min_counts:
        smaller, pruned = prune_vocabulary(model, tokenizer, corpus, min_count=min_count)
        student = student_from_teacher(smaller, num_hidden_layers=args.num_hidden_layers)
        kept, count = keeping(tokenizer, pruned, corpus), bytes_of(smaller)
        compared = kept[:: max(1, len(kept) // args.compared)]
        shares = [f"{len(keeping(tokenizer, pruned, texts))} of {len(texts)}" for texts in tests]
        table.add_row(
            *(str(min_count), f"{len(pruned):,}", f"{smaller.num_parameters():,}"),
            *(f"{smaller.num_parameters() / parameters:.3f}", f"{count / 1e6:.1f}", f"{count / size:.3f}"),
            *(f"{bytes_of(student) / size:.3f}", f"{len(kept)} of {len(corpus)}"),
            *(f"{equal((model, tokenizer), (smaller, pruned), compared)} of {len(compared)}", *shares),
        )
    Console(width=max(160, Console().width)).print(table)


# ---- Bytes and accuracy ----


def distilled(task: Any, teacher: Any, args: Arguments, seed: int) -> Any:
    """Some layers of the teacher, trained with the defaults, once."""
    name = f"{args.num_hidden_layers}-{args.max_steps}-{teacher.config.vocab_size}-{seed}"
    saved = Path(args.output_dir) / "small" / name
    if not (saved / "config.json").is_file():
        train(task, teacher, args, seed, saved)
    # As it is saved: one that was trained just now would still be read in bfloat16.
    return AutoModelForSequenceClassification.from_pretrained(saved).eval()


def train(task: Any, teacher: Any, args: Arguments, seed: int, saved: Path) -> None:
    """Train such a student and save it."""
    set_seed(seed)
    student = student_from_teacher(teacher, num_hidden_layers=args.num_hidden_layers)
    with tempfile.TemporaryDirectory() as folder:
        how = task.settings | {"learning_rate": 4e-4, "max_steps": args.max_steps, "seed": seed}
        settings = RelationalDistillationConfig(**quiet(Path(folder), **how))
        trainer = RelationalDistillationTrainer(
            student, settings, train_dataset=examples_of(task, "all", distils=True)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    save_atomically(student, None, saved)


@torch.no_grad()
def accuracy(model: Callable[..., Any], inputs: dict[str, Tensor], labels: Tensor) -> float:
    """Of a model or an ONNX file, in percent."""
    batches = zip(*(each.split(64) for each in inputs.values()), strict=True)
    logits = [model(**dict(zip(inputs, batch, strict=True)))["logits"] for batch in batches]
    return 100 * (torch.cat(logits).argmax(-1) == labels).float().mean().item()


def read(texts: Any, tokenizer: Any) -> dict[str, Tensor]:
    """Texts as the task has them, all of one length."""
    how = {"padding": "max_length", "truncation": True, "max_length": 32, "return_tensors": "pt"}
    return {name: tokenizer(texts, **how)[name] for name in ("input_ids", "attention_mask")}


def measured(model: Any, tokenizer: Any, args: Arguments, examples: list[str]) -> dict[str, tuple[int, float]]:
    """Bytes and accuracy of a model in float32 and in int8."""
    data = Texts(Path(args.data_dir))
    inputs = read(data.column("sst2/test", "sentence"), tokenizer)
    labels = torch.tensor(data.column("sst2/test", "label"))
    found = {"float32": (bytes_of(model), accuracy(model, inputs, labels))}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        figures = export_onnx(model, file, read(examples, tokenizer), atol=1e-3, quantize="int8", min_agreement=0.9)
        print({name: round(value, 4) for name, value in figures.items()}, flush=True)
        found["int8"] = (file.stat().st_size, accuracy(OnnxModel(file), inputs, labels))
    return found


def accuracies(args: Arguments) -> None:
    """Train, prune, export, print."""
    task, data = sst2(Path(args.data_dir), Path(args.output_dir) / "sst2"), Texts(Path(args.data_dir))
    corpus = data.column("sst2/train", "sentence")
    teacher = AutoModelForSequenceClassification.from_pretrained(task.teacher).eval()
    size = bytes_of(teacher)
    tested = {name: each[:, 0] for name, each in task.test.inputs.items()}
    rows: dict[str, list[tuple[int, float]]] = {"teacher": [(size, accuracy(teacher, tested, task.test.labels))]}
    for seed in range(args.seeds):
        student = distilled(task, teacher, args, seed)
        kinds = {f"{args.num_hidden_layers} layers": (student, data.tokenizer)}
        for count in args.min_counts:
            whole = teacher if args.prune_first else student
            model, tokenizer = prune_vocabulary(whole, data.tokenizer, corpus, min_count=count)
            if args.prune_first:
                inputs = {name: each[:, None] for name, each in read(corpus, tokenizer).items()}
                split = dataclasses.replace(task.train, inputs=inputs)
                model = distilled(dataclasses.replace(task, train=split), model, args, seed)
            kinds[f"min_count={count}"] = model, tokenizer
        for name, (model, tokenizer) in kinds.items():
            for kind, figures in measured(model, tokenizer, args, corpus[:300]).items():
                rows.setdefault(f"{name}, {kind}", []).append(figures)
                print(seed, name, kind, figures, flush=True)
    table = Table(
        "", "MB", "of the teacher's", "accuracy, %", "less than in float32 with all words", title="SST-2, test"
    )
    unpruned = [each for _, each in rows[f"{args.num_hidden_layers} layers, float32"]]
    for name, found in rows.items():
        figures = [each for _, each in found]
        gaps = [] if name == "teacher" else [a - b for a, b in zip(unpruned, figures, strict=True)]
        cells = [f"{statistics.fmean(figures):.1f}", f"{statistics.fmean(gaps):+.2f}" if gaps else ""]
        table.add_row(name, f"{found[0][0] / 1e6:.1f}", f"{found[0][0] / size:.3f}", *cells)
    Console(width=max(120, Console().width)).print(table)


if __name__ == "__main__":
    from transformers import HfArgumentParser
    from transformers.utils import logging

    logging.set_verbosity_error()
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    (accuracies if arguments.accuracy else main)(arguments)
