"""A small language model from a bigger one of the same words: how well it tells the next word.

    python examples/benchmarks/language_models.py --data_dir data
    python examples/benchmarks/language_models.py --only_report

The texts are those of SST-2, TREC and MR in lower case, their words those that the training splits have 10 times. The
teacher is a GPT-2 of 4 layers, 192 wide, trained on them; the students have 2 layers, 96 wide, and fresh weights, and
see fewer texts. The figure is the mean loss on a word of the test splits, in nats: lower is better. Rows:

- `plain`: the next words alone.
- `KD`: beside them the teacher's probabilities, `kd_weight=1, relational_weight=0`.
- `ours, 4`: the defaults, with `kd_temperature=4`.
- `ours`: the defaults.
- `ours, its words`: the same, but of a student that starts with its teacher's embeddings, made narrow.

Same steps, batch, optimizer, schedule, rate and start for all. Each finished run is a file, so a killed benchmark goes
on where it was.
"""

import json
import statistics
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compare_losses import interval
from comparison_tasks import quiet, save_atomically
from datasets import Dataset, load_dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils import logging

from hf_rrd import RelationalDistillationConfig, RelationalDistillationTrainer, student_from_teacher

TABLES = {"sst2/{}": "sentence", "sentences/trec_{}": "text", "sentences/mr_{}": "text"}
PLAIN = {"kd_weight": 0.0, "relational_weight": 0.0}
ROWS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "KD": {"kd_weight": 1.0, "relational_weight": 0.0},
    "ours, 4": {"kd_temperature": 4.0},
    "ours": {},
    "ours, its words": {},
}
SIZES = {"teacher": (4, 192), "student": (2, 96)}  # layers, width
LENGTH, RATE = 32, 1e-3


@dataclass
class Arguments:
    """What the command line may change."""

    data_dir: str = field(default="data", metadata={"help": "Holds the folders sst2/ and sentences/."})
    output_dir: str = field(default="out/language_models", metadata={"help": "For teacher and figures."})
    seeds: int = field(default=5, metadata={"help": "Runs of each row."})
    steps: int = field(default=400, metadata={"help": "Of 16 texts; the teacher has three times as many of 64."})
    only_report: bool = field(default=False, metadata={"help": "Train nothing, print what is finished."})


class Words:
    """The texts of both splits as numbers of words, none of the test in the training split."""

    def __init__(self, data: Path) -> None:
        train, test = ([text for table in TABLES for text in column(data, table, part)] for part in ("train", "test"))
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
        special = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "unk_token", "bos_token", "eos_token")}
        kinds = trainers.WordLevelTrainer(min_frequency=10, special_tokens=[*special.values()], show_progress=False)
        tokenizer.train_from_iterator(train, kinds)
        tokenizer.post_processor = processors.TemplateProcessing("[BOS] $A [EOS]", None, [("[BOS]", 2), ("[EOS]", 3)])
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, **special)
        known = set(train)
        self.train, self.test = self.read(train), self.read([text for text in test if text not in known])
        self.collate = DataCollatorForLanguageModeling(self.tokenizer, mlm=False)

    def read(self, texts: list[str]) -> Dataset:
        """Without the types of their tokens, of which there is one."""
        rows = self.tokenizer(texts, truncation=True)
        return Dataset.from_dict({name: rows[name] for name in ("input_ids", "attention_mask")})

    def model(self, size: str, seed: int) -> GPT2LMHeadModel:
        """One of fresh weights."""
        set_seed(seed)
        layers, width = SIZES[size]
        ends = {f"{name}_token_id": getattr(self.tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        shape = {"n_layer": layers, "n_embd": width, "n_head": width // 48, "n_positions": LENGTH}
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(self.tokenizer), **shape, **ends))

    @torch.no_grad()
    def nats(self, model: Any) -> float:
        """Of a word of the test split."""
        total = count = 0.0
        for batch in DataLoader(self.test, batch_size=64, collate_fn=self.collate):
            words = int(batch["labels"][:, 1:].ne(-100).sum())
            total, count = total + words * model.eval()(**batch).loss.item(), count + words
        return total / count


def column(data: Path, table: str, part: str) -> list[str]:
    """The texts of one split of a table."""
    file = str(data / f"{table.format(part)}.csv")
    return list(load_dataset("csv", data_files=file, split="train")[TABLES[table]])


def trained(model: Any, words: Words, steps: int, batch_size: int, seed: int, teacher: Any, row: str) -> Any:
    """A model after a training, and its trainer."""
    with tempfile.TemporaryDirectory() as folder:
        how = {"learning_rate": RATE, "max_steps": steps, "warmup_steps": steps // 10, "bf16": True, "seed": seed}
        settings = quiet(Path(folder), per_device_train_batch_size=batch_size, **how)
        args = RelationalDistillationConfig(**settings, **ROWS[row])
        trainer = RelationalDistillationTrainer(model, args, words.collate, words.train, teacher=teacher)
        trainer.train()
    return trainer


def narrowed(teacher: GPT2LMHeadModel, seed: int) -> Any:
    """A student whose words are the teacher's."""
    set_seed(seed)
    layers, width = SIZES["student"]
    return student_from_teacher(teacher, layers, n_embd=width, n_head=width // 48)


def path_of(row: str, seed: int, args: Arguments) -> Path:
    """A run's file."""
    return Path(args.output_dir) / "runs" / f"{row.replace(', ', '-')}-{args.steps}-{seed}.json"


def train_all(args: Arguments) -> None:
    """Train what is not finished."""
    words, folder = Words(Path(args.data_dir)), Path(args.output_dir) / "teacher"
    if not (folder / "config.json").is_file():
        run = trained(words.model("teacher", 0), words, 3 * args.steps, 64, 0, None, "plain")
        save_atomically(run.model, None, folder)
    teacher = GPT2LMHeadModel.from_pretrained(folder)
    (folder.parent / "teacher.json").write_text(json.dumps([words.nats(teacher), len(words.tokenizer)]))
    for seed in range(args.seeds):
        for row in ROWS:
            path = path_of(row, seed, args)
            if path.is_file():
                continue
            taught, student = None if row == "plain" else teacher, words.model("student", 1 + seed)
            if row == "ours, its words":
                student = narrowed(teacher, 1 + seed)
            run = trained(student, words, args.steps, 16, seed, taught, row)
            about = {"row": row, "seed": seed, "nats": words.nats(run.model), **run.distillation.weights()}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".tmp").write_text(json.dumps(about))
            path.with_suffix(".tmp").replace(path)
            print(about, flush=True)


def report(args: Arguments) -> None:
    """Print the finished rows, and what each changes against others, seed for seed."""
    nats, words = json.loads((Path(args.output_dir) / "teacher.json").read_text())
    found: dict[str, dict[int, float]] = {}
    for row in ROWS:
        paths = {seed: path_of(row, seed, args) for seed in range(args.seeds)}
        found[row] = {n: json.loads(path.read_text())["nats"] for n, path in paths.items() if path.is_file()}
    table, lines = Table("", "nats of a word"), [f"{args.steps} steps of 16 texts, a vocabulary of {words:,} words"]
    table.add_row("teacher", f"{nats:.3f}")
    for row, figures in found.items():
        spread = f" ± {statistics.stdev(figures.values()):.3f}" if len(figures) > 1 else ""
        table.add_row(row, f"{statistics.fmean(figures.values()):.3f}{spread}" if figures else "")
    for one, other in (
        ("KD", "plain"),
        ("ours", "plain"),
        ("ours", "KD"),
        ("ours", "ours, 4"),
        ("ours, its words", "ours"),
    ):
        gaps = [found[one][seed] - found[other][seed] for seed in found[one].keys() & found[other].keys()]
        lines.append(f"{one} - {other}: {{:+.3f}} ± {{:.3f}}, {len(gaps)} seeds".format(*interval(gaps)))
    Console(width=100).print(table, *lines, sep="\n")


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="'pin_memory'")
    if not arguments.only_report:
        train_all(arguments)
    report(arguments)
