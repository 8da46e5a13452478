"""Few labels, many texts, other heads than one label: a reranker's score, several labels at once, a tag for each word.

    python examples/benchmarks/heads.py --data_dir data
    python examples/benchmarks/heads.py --only_report

- `score`: one logit for a pair of STS-B's sentences, how alike they are. Spearman's correlation, in percent.
- `several`: two of TREC's questions joined to one text; which of the six types of question are in it. The share of
  texts of which all six are right, in percent.
- `tags`: TREC's questions in lower case; which words the question as it was written has with a capital, or with
  several as in USA. The first word does not count. F1 of the words with capitals, in percent.

Of each task the first 2,500 texts are for training. The teacher is MiniLM, fine-tuned with all their labels; the
student starts from two of its six layers, and has 100 or 200 labels, drawn by the seed, and all texts. Rows:

- `plain`: the labelled texts alone, with the task's own loss.
- `KD`: all texts, `kd_weight=1, relational_weight=0`; every second is one of the labelled.
- `ours`: the same with the defaults.

Same steps, batch, optimizer, schedule, rate and start for all. Each finished run is a file, so a killed benchmark goes
on where it was.
"""

import json
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from compare_losses import interval
from comparison_tasks import Texts, minilm_folder, quiet, save_atomically
from datasets import Dataset, concatenate_datasets
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)
from transformers.utils import logging

from hf_rrd import (
    DataCollatorForDistillation,
    RelationalDistillationConfig,
    RelationalDistillationTrainer,
    cache_teacher_outputs,
    prune_vocabulary,
    student_from_teacher,
)

ROWS: dict[str, dict[str, Any]] = {
    "plain": {"kd_weight": 0.0, "relational_weight": 0.0},
    "KD": {"kd_weight": 1.0, "relational_weight": 0.0},
    "ours": {},
}
STEPS = {"tags": 240, "several": 400, "score": 300}
TEACHER_STEPS = 450
LABELED = {"tags": 100, "several": 200, "score": 200}
RATE, LENGTH, PARTS = 3e-4, 32, {"train": 2500, "test": 500}


@dataclass
class Arguments:
    """What the command line may change."""

    data_dir: str = field(default="data", metadata={"help": "Holds the folder sentences/."})
    output_dir: str = field(default="out/heads", metadata={"help": "Where teachers and the runs' figures go."})
    seeds: int = field(default=5, metadata={"help": "Runs of each row."})
    steps: int | None = field(default=None, metadata={"help": "Of 16 texts, and of 32 of a teacher; as set above."})
    only_report: bool = field(default=False, metadata={"help": "Train nothing, print what is finished."})


@dataclass
class Head:
    """A task: the splits, tokenized; a model of its kind; its loss where labels may lack; and how good logits are."""

    train: Dataset
    test: Dataset
    model: Callable[[str], Any]
    collate: Any
    quality: Callable[[list[Tensor], list[Any]], float]
    loss: Callable[..., Tensor] | None = None
    cached: bool = True


# ---- The tasks ----


def small(texts: Texts, folder: Path) -> Texts:
    """The texts as MiniLM reads them with the words of these tasks alone, saved: halves the time of a step."""
    columns = {"stsb": ["sentence1", "sentence2"], "trec": ["text"]}
    tables = [(f"sentences/{task}_{part}", name) for task in columns for part in PARTS for name in columns[task]]
    found = [each for table in tables for each in texts.column(*table)]
    model, texts.tokenizer = prune_vocabulary(AutoModel.from_pretrained(minilm_folder()), texts.tokenizer, found)
    model.save_pretrained(folder)
    return texts


def split_of(rows: Any, labels: list[Any], part: str) -> Dataset:
    """The first examples of a split."""
    return Dataset.from_dict({name: each[: PARTS[part]] for name, each in (dict(rows) | {"labels": labels}).items()})


def sequences(texts: Texts, split: Any, quality: Any, loss: Any, **config: Any) -> Head:
    """A classifier, whose task loss leaves out the labels that are -100."""

    def of_known(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        known = labels != -100
        each = loss(outputs["logits"].float().view_as(labels), labels, reduction="none") * known
        return each.sum() / (num_items_in_batch or known.sum().clamp(min=1))

    model = partial(AutoModelForSequenceClassification.from_pretrained, **config)
    return Head(split("train"), split("test"), model, DataCollatorWithPadding(texts.tokenizer), quality, of_known)


def score(texts: Texts) -> Head:
    """How alike two sentences are, from 0 to 1, by one logit."""

    def split(name: str) -> Dataset:
        pairs = [texts.column(f"sentences/stsb_{name}", f"sentence{side}") for side in (1, 2)]
        rows = texts.tokenizer(*pairs, truncation=True, max_length=LENGTH)
        scores = texts.column(f"sentences/stsb_{name}", "score")
        return split_of(rows, [each / 5 for each in scores], name)

    def quality(logits: list[Tensor], labels: list[float]) -> float:
        return 100 * float(spearmanr(torch.cat(logits).numpy(), labels).statistic)

    return sequences(texts, split, quality, mse_loss, num_labels=1, problem_type="regression")


def several(texts: Texts) -> Head:
    """Which of six types of questions are in a text of two, by six logits."""

    def pairs(name: str) -> Dataset:
        questions, types = (texts.column(f"sentences/trec_{name}", column) for column in ("text", "label"))
        partner = torch.randperm(len(types), generator=torch.Generator().manual_seed(0)).tolist()
        joined = [f"{one} {questions[other]}" for one, other in zip(questions, partner, strict=True)]
        asked = [{one, types[other]} for one, other in zip(types, partner, strict=True)]
        labels = [[float(each in both) for each in range(6)] for both in asked]
        rows = texts.tokenizer(joined, truncation=True, max_length=LENGTH)
        return split_of(rows, labels, name)

    def quality(logits: list[Tensor], labels: list[list[float]]) -> float:
        return 100 * ((torch.stack(logits) > 0) == (torch.tensor(labels) > 0)).all(1).float().mean().item()

    kind = {"num_labels": 6, "problem_type": "multi_label_classification"}
    return sequences(texts, pairs, quality, binary_cross_entropy_with_logits, **kind)


def tags(texts: Texts) -> Head:
    """Which words are written with capitals, by three logits a token; of a word the first token has the label."""

    def split(name: str) -> Dataset:
        questions = [text.split() for text in texts.column(f"sentences/trec_{name}", "text")]
        rows = texts.tokenizer(questions, is_split_into_words=True, truncation=True, max_length=LENGTH)
        labels = []
        for number, words in enumerate(questions):
            places = rows.word_ids(number)
            begins = [place not in (None, 0, before) for before, place in pairwise([None, *places])]
            capitals = [sum(map(str.isupper, words[place or 0])) for place in places]
            labels.append([min(2, count) if new else -100 for new, count in zip(begins, capitals, strict=True)])
        return split_of(rows, labels, name)

    def quality(logits: list[Tensor], labels: list[list[int]]) -> float:
        answers = torch.cat([row[: len(label)].argmax(-1) for row, label in zip(logits, labels, strict=True)])
        truth = torch.tensor([each for label in labels for each in label])
        answers, truth = answers[truth != -100], truth[truth != -100]
        right = ((answers == truth) & (truth > 0)).sum()
        return 200 * (right / ((answers > 0).sum() + (truth > 0).sum())).item()

    model = partial(AutoModelForTokenClassification.from_pretrained, num_labels=3)
    collate = DataCollatorForTokenClassification(texts.tokenizer)
    return Head(split("train"), split("test"), model, collate, quality, cached=False)


HEADS = {"tags": tags, "several": several, "score": score}


# ---- Runs ----


def settings_of(folder: Any, rate: float, steps: int, batch_size: int, **more: Any) -> dict[str, Any]:
    """What all trainings share."""
    more |= {"learning_rate": rate, "max_steps": steps, "warmup_steps": steps // 10, "bf16": True}
    return quiet(folder, per_device_train_batch_size=batch_size, **more)


def teacher_of(name: str, head: Head, args: Arguments) -> Any:
    """MiniLM fine-tuned with all labels, once."""
    folder = Path(args.output_dir) / name / "teacher"
    if not (folder / "config.json").is_file():
        set_seed(0)
        model = head.model(str(Path(args.output_dir) / "minilm"))
        settings = settings_of(folder, RATE / 2, args.steps or TEACHER_STEPS, 32)
        how = RelationalDistillationConfig(**settings, **ROWS["plain"])
        RelationalDistillationTrainer(model, how, head.collate, head.train).train()
        save_atomically(model, None, folder)
    return head.model(folder).eval()


def examples_of(head: Head, count: int, seed: int, distils: bool) -> Dataset:
    """The training set of a run: the labelled alone, or all, where these come so often that they are half of it."""
    train = head.train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    labeled, others = train.select(order[:count]), train.select(order[count:])
    if not distils:
        return labeled
    without = [torch.full_like(torch.tensor(each), -100).tolist() for each in others["labels"]]
    others = others.remove_columns("labels").add_column("labels", without, feature=train.features["labels"])
    return concatenate_datasets([others, *[labeled] * (len(others) // count)])


@torch.no_grad()
def quality_of(model: Any, head: Head) -> float:
    """A model's figure on the test split."""
    logits: list[Tensor] = []
    for batch in DataLoader(head.test, batch_size=64, collate_fn=head.collate):
        logits.extend(model.eval()(**batch).logits.float())
    return head.quality(logits, head.test["labels"][:])


def finish(name: str, row: str, seed: int, head: Head, teacher: Any, args: Arguments) -> None:
    """Train, measure and write a run's file, unless there is one."""
    path = path_of(name, row, seed, args)
    if not path.is_file():
        set_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            student = student_from_teacher(teacher, num_hidden_layers=2)
            settings = settings_of(folder, RATE, args.steps or STEPS[name], 16, seed=seed)
            trainer = RelationalDistillationTrainer(
                student,
                RelationalDistillationConfig(**settings, **ROWS[row]),
                DataCollatorForDistillation(head.collate),
                examples_of(head, LABELED[name], seed, distils=row != "plain"),
                teacher=None if head.cached or row == "plain" else teacher,
                compute_loss_func=head.loss,
            )
            seconds = trainer.train().metrics["train_runtime"]
        figure = quality_of(student, head)
        about = {"head": name, "row": row, "seed": seed, "figure": figure, "seconds": seconds}
        about |= {key: float(value) for key, value in trainer.distillation.weights().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(about))
        path.with_suffix(".tmp").replace(path)
        print(about, flush=True)


def path_of(name: str, row: str, seed: int, args: Arguments) -> Path:
    """A run's file."""
    return Path(args.output_dir) / name / "runs" / f"{row}-{LABELED[name]}-{args.steps or STEPS[name]}-{seed}.json"


def train_all(args: Arguments) -> None:
    """Train what is not finished."""
    texts = small(Texts(Path(args.data_dir)), Path(args.output_dir) / "minilm")
    for name in HEADS:
        head = HEADS[name](texts)
        teacher = teacher_of(name, head, args)
        figures = [quality_of(model, head) for model in (teacher, student_from_teacher(teacher, num_hidden_layers=2))]
        (Path(args.output_dir) / name / "teacher.json").write_text(json.dumps(figures))
        if head.cached:
            how: dict[str, Any] = {"processing_class": texts.tokenizer, "cache_dir": Path(args.output_dir) / "cache"}
            head.train = cache_teacher_outputs(head.train, teacher, 64, **how)
        for seed in range(args.seeds):
            for row in ROWS:
                finish(name, row, seed, head, teacher, args)


def report(args: Arguments) -> None:
    """Print the finished rows, and what KD and `ours` are ahead by, seed for seed."""
    table, lines = Table("head", "labelled", "teacher", "layers alone", *ROWS), []
    for name in [name for name in HEADS if (Path(args.output_dir) / name / "teacher.json").is_file()]:
        found: dict[str, dict[int, float]] = {}
        for row in ROWS:
            paths = {seed: path_of(name, row, seed, args) for seed in range(args.seeds)}
            found[row] = {n: json.loads(path.read_text())["figure"] for n, path in paths.items() if path.is_file()}
        known = json.loads((Path(args.output_dir) / name / "teacher.json").read_text())
        cells = [f"{statistics.fmean(each.values()):.1f}" if each else "" for each in found.values()]
        table.add_row(name, str(LABELED[name]), *(f"{each:.1f}" for each in known), *cells)
        for one, other in (("KD", "plain"), ("ours", "plain"), ("ours", "KD")):
            gaps = [found[one][seed] - found[other][seed] for seed in found[one].keys() & found[other].keys()]
            lines.append(f"{name}: {one} - {other}: {{:+.2f}} ± {{:.2f}}, {len(gaps)} seeds".format(*interval(gaps)))
    Console(width=100).print(table, *lines, sep="\n")


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="'pin_memory'")
    if not arguments.only_report:
        train_all(arguments)
    report(arguments)
