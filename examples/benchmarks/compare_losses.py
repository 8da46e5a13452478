"""Does it help? Every loss on nine cells: four tasks, with all labels, with 500, and with none.

    python examples/benchmarks/compare_losses.py --data_dir data
    python examples/benchmarks/compare_losses.py --data_dir data --task sst2 --row 'weight 3={"relational_weight": 3}'
    python examples/benchmarks/compare_losses.py --only_report

Regimes: `all` (every label), `few` (500 labels, all examples for distillation), `none` (no labels; a linear probe of
the frozen student, or on sentences the correlation with people's scores). Every run of a task has as many steps of the
same batch size. `ours` is the package with nothing set. A rival's weight is chosen for each task from four or five on
the validation split, in the regime `few` (`none` where there are no labels), with a seed of its own; the test split is
read for the tables alone. The teacher is trained once and its outputs are computed once. Each finished run is a file,
so a killed comparison goes on where it was, and several may work in one folder. Writes `runs.csv` into each task's
folder and `cells.csv` beside them.
"""

import csv
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from comparison_tasks import LABELED, TASKS, Split, Task, examples_of, quiet
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from scipy.stats import t as student_t
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import PrinterCallback, TrainingArguments
from transformers.utils import logging

from hf_rrd import RelationalDistillationConfig, RelationalDistillationTrainer, relational_alignment

REGIMES = {"all": "all labels", "few": f"{LABELED} labels", "none": "no labels"}
CELLS = {
    "sst2": ("all", "few", "none"),
    "cifar10": ("all", "few", "none"),
    "sst2_raw": ("all", "few"),
    "sentences": ("none",),
    "digits": ("few",),
}
"""The regimes of each task. The last is the quickstart's, and none of the nine cells."""

FIXED: dict[str, Any] = {
    "kd_weight": 0.0,
    "kd_temperature": 4.0,
    "relational_weight": 0.0,
    "balance_losses": False,
    "student_temperature": 0.1,
    "bank_size": 4096,
    "student_projection": "linear",
    "teacher_projection": "center",
}
"""What `plain` and the rivals start from, whatever the package's defaults are. No part of the name of a run: add a
setting where a new default would change them, with the value that leaves them as they were."""

RIVALS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "KD": ({}, (0.3, 1.0, 3.0, 10.0, 30.0)),
    "DIST": ({"kd_loss": "dist"}, (1.0, 4.0, 16.0, 64.0)),
    "InfoNCE (CRD)": ({"relational_loss": "infonce"}, (0.1, 0.5, 2.5, 12.5, 60.0)),
    "MSE": ({"relational_loss": "mse"}, (0.3, 3.0, 30.0, 300.0)),
    "cosine": ({"relational_loss": "cosine"}, (0.3, 2.0, 10.0, 60.0)),
    "SRD": ({"relational_loss": "srd"}, (0.05, 0.3, 2.0, 10.0)),
    "RKD distance": ({"relational_loss": "rkd_distance"}, (2.5, 25.0, 250.0, 2500.0)),
}
"""Settings of each rival, and what its weight is chosen from: around its paper's value, or its gradient's size."""

OF_LOGITS = ("KD", "DIST")
WITH_LOGITS = ("sst2", "cifar10", "digits")  # tasks whose teacher has them
TUNING_SEED = 1000


@dataclass
class Arguments:
    """What the command line may change."""

    task: list[str] = field(
        default_factory=lambda: list(TASKS)[:4],
        metadata={"help": "The tasks; those of the nine cells if unset.", "choices": list(TASKS)},
    )
    data_dir: str = field(default="data", metadata={"help": "Holds the folders sst2/, cifar10/ and sentences/."})
    output_dir: str = field(
        default="out/compare", metadata={"help": "Teacher, runs and tables of each task go into a folder here."}
    )
    seeds: int = field(default=5, metadata={"help": "Runs of each row in each cell."})
    first_seed: int = field(default=0, metadata={"help": "The first of these seeds."})
    workers: int = field(default=1, metadata={"help": "Runs at a time, each in a process of its own."})
    rows: list[str] | None = field(default=None, metadata={"help": "Only these rows of the tables; all if unset."})
    regimes: list[str] | None = field(default=None, metadata={"help": "Train only these regimes; all if unset."})
    row: list[str] = field(
        default_factory=list, metadata={"help": "More rows: name={...}, the package's defaults with these settings."}
    )
    code: str = field(
        default="", metadata={"help": "A name for the package's code, so that `ours` of another is trained again."}
    )
    max_steps: int | None = field(default=None, metadata={"help": "Steps of a run, for a quick look."})
    steps_factor: int = field(default=1, metadata={"help": "Runs so many times as long, in a folder of their own."})
    only_report: bool = field(default=False, metadata={"help": "Train nothing, print what is finished."})


def defaults_of_package() -> str:
    """The settings that are ours, as a run of `ours` finds them."""
    own = [each for each in dataclasses.fields(RelationalDistillationConfig)]
    return json.dumps({e.name: e.default for e in own if e.name not in TrainingArguments.__dataclass_fields__})


@dataclass(frozen=True)
class Run:
    """One training: its settings decide its file, so that equal settings are trained once."""

    regime: str
    settings: str  # JSON
    seed: int
    split: str = "test"
    package: str = ""  # the defaults and the code that it starts from; empty where that is `FIXED`

    @property
    def name(self) -> str:
        """A name that no other run has."""
        return hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode()).hexdigest()[:16]


def run_of(regime: str, settings: dict[str, Any], seed: int, split: str = "test", package: str = "") -> Run:
    """A run of these settings of the trainer."""
    return Run(regime, json.dumps(settings, sort_keys=True), seed, split, package)


# ---- One run ----


def task_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross-entropy over the labelled examples of a batch; -100 marks the others."""
    summed = F.cross_entropy(outputs["logits"].float(), labels, ignore_index=-100, reduction="sum")
    return summed / (labels != -100).sum().clamp(min=1)


def trained(task: Task, run: Run, max_steps: int | None = None, steps_factor: int = 1) -> Any:
    """A trainer whose student is trained from the run's seed, ready to be read."""
    fixed = {} if run.package else {**FIXED, "student_pooling": task.pooling}
    settings = {**task.settings, **fixed, **json.loads(run.settings)}
    settings["max_steps"] = max_steps or task.settings["max_steps"] * steps_factor
    if run.regime == "none":
        settings["task_weight"] = 0.0
    with tempfile.TemporaryDirectory() as folder:
        args = RelationalDistillationConfig(
            **quiet(Path(folder), warmup_steps=30, remove_unused_columns=False, seed=run.seed, **settings)
        )
        distils = args.relational_weight != 0 or args.kd_weight != 0
        trainer = RelationalDistillationTrainer(
            task.student(run.seed),
            args,
            train_dataset=examples_of(task, run.regime, distils),
            compute_loss_func=task_loss if args.task_weight > 0 else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    trainer.model.eval()
    return trainer


def train(task: Task, run: Run, max_steps: int | None = None, steps_factor: int = 1) -> dict[str, float]:
    """Train a student and measure it on the run's split."""
    trainer = trained(task, run, max_steps, steps_factor)
    return measure_sentences(trainer, task, run) if task.probes else measure(trainer, task, run)


@torch.no_grad()
def read(trainer: Any, split: Split, view: int = 0) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The student's embedding, that projected, and its logits, (examples, ...) each.

    The embedding is what was compared with the teacher's, or where nothing was, the input of the classifier.
    """
    student = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # in float32
    parts, seen = [], []
    trainer.distillation.wear()
    asked = {} if trainer.distillation.head is None else {"with_relational_embedding": True}
    if not asked:
        hook = student.classifier.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    for start in range(0, len(split), 256):
        batch = {name: each[start : start + 256, view].to(student.device) for name, each in split.inputs.items()}
        outputs = student(**batch, **asked)
        own = outputs["relational_pooled"] if asked else seen.pop()
        parts.append((own, outputs.get("relational_embedding"), outputs.get("logits")))
    if not asked:
        hook.remove()
    found = [None if each[0] is None else torch.cat(each).cpu() for each in zip(*parts, strict=True)]
    return found[0], found[1], found[2]


def probe(known: Tensor, labels: Tensor, new: Tensor, truth: Tensor) -> float:
    """Accuracy in percent of a linear classifier of embeddings."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, C=0.1))
    return 100 * float(classifier.fit(known.numpy(), labels.numpy()).score(new.numpy(), truth.numpy()))


def measure(trainer: Any, task: Task, run: Run) -> dict[str, float]:
    """Accuracy in percent, alignment with the teacher and, without labels, linear probes of all and of few labels."""
    split = getattr(task, run.split)
    embeddings, _, logits = read(trainer, split)
    alignment = relational_alignment(embeddings[:1000], split.embedding[:1000, 0], debiased=False)
    accuracy = 100 * (logits.argmax(-1) == split.labels).float().mean().item()
    metrics = {"score": accuracy, "accuracy": accuracy, "cka": alignment["cka"]}
    metrics["neighbor_overlap"] = 100 * alignment["neighbor_overlap"]
    if run.regime == "none":
        known, labels = read(trainer, task.train)[0], task.train.labels
        metrics["score"] = metrics["probe"] = probe(known, labels, embeddings, split.labels)
        metrics["probe_few"] = probe(known[: task.labeled], labels[: task.labeled], embeddings, split.labels)
    return metrics


def measure_sentences(trainer: Any, task: Task, run: Run) -> dict[str, float]:
    """Spearman's correlation in percent of the own embedding and of the projected one; for the tables also probes."""
    split, metrics = getattr(task, run.split), {}
    one, other = (read(trainer, split, view) for view in (0, 1))
    for name, first, second in zip(("own", "projected"), one, other, strict=False):
        metrics[name] = 100 * float(spearmanr(F.cosine_similarity(first, second), split.labels).statistic)
    if run.split == "test":
        for name, splits in task.probes.items():
            fitted, measured = (read(trainer, each)[0] for each in splits)
            metrics[name] = probe(fitted, splits[0].labels, measured, splits[1].labels)
    return {"score": (metrics["own"] + metrics["projected"]) / 2, **metrics}


# ---- All runs ----

_task: Task | None = None


def start_worker(args: Arguments, task: str) -> None:
    """Load the task once in each process."""
    global _task
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="'pin_memory'")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // args.workers))))
    _task = TASKS[task](Path(args.data_dir), Path(args.output_dir) / task)


def finish(args: Arguments, task: str, run: Run) -> None:
    """Train one run in a worker and keep its figures in a file, unless another process does."""
    assert _task is not None
    path = path_of(args, task, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed when this process ends, however it does
        if not path.is_file():
            start = time.perf_counter()
            figures = train(_task, run, args.max_steps, args.steps_factor)
            text = json.dumps({**vars(run), **figures, "seconds": time.perf_counter() - start}, indent=1)
            path.with_suffix(".tmp").write_text(text)
            path.with_suffix(".tmp").replace(path)
    path.with_suffix(".lock").unlink(missing_ok=True)


def path_of(args: Arguments, task: str, run: Run) -> Path:
    """Where a run's figures are."""
    folder = "runs" + (f"-{args.max_steps}" if args.max_steps else f"-x{args.steps_factor}" * (args.steps_factor > 1))
    return Path(args.output_dir) / task / folder / f"{run.name}.json"


def finish_all(args: Arguments, task: str, pool: ProcessPoolExecutor, runs: list[Run]) -> None:
    """Train what is not finished, in the order given."""
    missing = [run for run in dict.fromkeys(runs) if not path_of(args, task, run).is_file()]
    futures = [pool.submit(finish, args, task, run) for run in missing]
    for count, future in enumerate(as_completed(futures), 1):
        future.result()
        print(f"\r{task}: {count} of {len(missing)} runs", end="", flush=True)
    print()


def result(args: Arguments, task: str, run: Run) -> dict[str, Any] | None:
    """A run's figures, or None where it is not finished."""
    path = path_of(args, task, run)
    return json.loads(path.read_text()) if path.is_file() else None


def candidates(task: str, name: str) -> list[tuple[float, Run]]:
    """A rival's candidates for its weight, each with its run on the validation split."""
    settings, weights = RIVALS[name]
    key = "kd_weight" if name in OF_LOGITS else "relational_weight"
    regime = "few" if "few" in CELLS[task] else "none"
    return [(weight, run_of(regime, {**settings, key: weight}, TUNING_SEED, "validation")) for weight in weights]


def chosen_weights(args: Arguments, task: str) -> dict[str, float]:
    """The weight with the best validation score of each rival that the task can have and whose runs are finished."""
    weights, args = {}, dataclasses.replace(args, steps_factor=1)
    for name in RIVALS:
        scored = [(figures["score"], w) for w, run in candidates(task, name) if (figures := result(args, task, run))]
        if len(scored) == len(candidates(task, name)):
            weights[name] = max(scored)[1]
    return weights


def rows_of(args: Arguments, weights: dict[str, float]) -> dict[str, tuple[dict[str, Any], str]]:
    """All rows of the tables: their settings, and of those that start from the package's defaults which these are."""
    rows: dict[str, tuple[dict[str, Any], str]] = {"plain": ({}, "")}
    for name, weight in weights.items():
        key = "kd_weight" if name in OF_LOGITS else "relational_weight"
        rows[name] = ({**RIVALS[name][0], key: weight}, "")
    package = defaults_of_package() + args.code
    return rows | {name: (settings, package) for name, settings in ours(args).items()}


def ours(args: Arguments) -> dict[str, dict[str, Any]]:
    """The rows that start from the package's defaults, with what they set."""
    more = (row.partition("=") for row in args.row)
    return {"ours": {}} | {name: json.loads(settings) for name, _, settings in more}


def planned(args: Arguments, task: str, weights: dict[str, float]) -> list[tuple[str, str, Run]]:
    """Regime, row and run of a task's whole comparison, seed after seed."""
    return [
        (regime, name, run_of(regime, settings, seed, package=package))
        for seed in range(args.first_seed, args.first_seed + args.seeds)
        for regime in CELLS[task][::-1]
        for name, (settings, package) in rows_of(args, weights).items()
        if (args.rows is None or name in args.rows) and (regime, name) != ("none", "plain")
    ]


# ---- The report ----

Scores = dict[tuple[str, str], dict[str, dict[int, dict[str, Any]]]]  # by cell, row and seed: a run's figures


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 percent confidence interval, by Student's t; nan for fewer than 2 values."""
    mean = statistics.fmean(values) if values else float("nan")
    if len(values) < 2:
        return mean, float("nan")
    return mean, float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def difference(one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> tuple[float, float]:
    """Mean difference of the scores, paired by seed, with half its interval."""
    return interval([one[seed]["score"] - other[seed]["score"] for seed in one if seed in other])


def collected(args: Arguments) -> Scores:
    """The figures of all finished runs of the tables; writes each task's `runs.csv`."""
    scores: Scores = {}
    for task in args.task:
        finished = []
        for regime, name, run in planned(args, task, chosen_weights(args, task)):
            if figures := result(args, task, run):
                finished.append({"row": name, **figures})
                scores.setdefault((task, regime), {}).setdefault(name, {})[run.seed] = figures
        write_csv(Path(args.output_dir) / task / "runs.csv", finished)
    return scores


def plain_of(scores: Scores, task: str, regime: str) -> dict[int, dict[str, Any]]:
    """What a cell is compared with: the student alone; without labels that of few."""
    return scores.get((task, "few" if regime == "none" else regime), {}).get("plain", {})


def summarized(scores: Scores) -> list[dict[str, Any]]:
    """One dict per cell and row: the means of all figures, and the difference to plain."""
    summary = []
    for (task, regime), cell in scores.items():
        for name, runs in cell.items():
            values, first = [figures["score"] for figures in runs.values()], next(iter(runs.values()))
            mean, half = difference(runs, plain_of(scores, task, regime))
            deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
            row = {"task": task, "regime": regime, "row": name, "settings": first["settings"], "seeds": len(runs)}
            row |= {"score": statistics.fmean(values), "deviation": deviation}
            row |= {"difference": mean, "half_interval": half}
            metrics = [key for key in first if isinstance(first[key], float) and key != "score"]
            summary.append(row | {key: statistics.fmean(f[key] for f in runs.values()) for key in metrics})
    return summary


def against(scores: Scores, name: str) -> list[dict[str, Any]]:
    """A row of ours in each cell against plain, KD, InfoNCE and the rival that is best in the cell."""
    found = []
    for (task, regime), cell in scores.items():
        own, rivals = cell.get(name, {}), {rival: cell[rival] for rival in RIVALS if rival in cell}
        if not own:
            continue
        line: dict[str, Any] = {"cell": f"{task} {regime}", "plain": difference(own, plain_of(scores, task, regime))}
        line |= {rival: difference(own, cell[rival]) for rival in ("KD", "InfoNCE (CRD)") if rival in cell}
        if rivals:
            means = {rival: statistics.fmean(f["score"] for f in runs.values()) for rival, runs in rivals.items()}
            line["rival"] = max(means, key=lambda rival: means[rival])
            line["best rival"] = difference(own, rivals[line["rival"]])
        found.append(line)
    return found


def report(args: Arguments) -> None:
    """Print the tables; write them."""
    scores = collected(args)
    summary = summarized(scores)
    write_csv(Path(args.output_dir) / "cells.csv", summary)
    console = Console(width=200)
    table = Table("", *(f"{task} {regime}" for task, regime in scores), title="Test split", show_lines=True)
    for name in dict.fromkeys(name for cell in scores.values() for name in cell):
        own = {(row["task"], row["regime"]): row for row in summary if row["row"] == name}
        table.add_row(
            name,
            *(
                f"{row['score']:.1f} ± {row['deviation']:.1f} ({row['seeds']})\n"
                f"{row['difference']:+.1f} ± {row['half_interval']:.1f}"
                if (row := own.get(cell))
                else ""
                for cell in scores
            ),
        )
    table.caption = (
        f"score ± deviation (seeds); under it the difference to plain, without labels to plain of {LABELED}, paired "
        "by seed, with its 95 % interval"
    )
    console.print(table)
    if ("sentences", "none") in scores:
        table = Table("sentences", "own", "projected", "trec", "mr")
        for row in (row for row in summary if row["task"] == "sentences"):
            table.add_row(row["row"], *(f"{row[key]:.1f}" for key in ("own", "projected", "trec", "mr")))
        console.print(table)
    for name in ours(args):
        lines, columns = against(scores, name), ("plain", "KD", "InfoNCE (CRD)", "best rival")
        table = Table(f"{name} against", *columns, "which is", title="Difference, paired by seed, 95 % interval")
        for line in lines:
            shown = (f"{line[key][0]:+.1f} ± {line[key][1]:.1f}" if key in line else "" for key in columns)
            table.add_row(line["cell"], *shown, line.get("rival", ""))
        console.print(table)
        for key in columns:
            found = [line[key] for line in lines if key in line and line[key][0] == line[key][0]]
            if found:
                console.print(
                    f"{name} against {key}: above in {sum(mean - half > 0 for mean, half in found)} of {len(found)} "
                    f"cells, below in {sum(mean + half < 0 for mean, half in found)} (intervals off zero); mean "
                    f"{statistics.fmean(mean for mean, _ in found):+.2f}, worst {min(found)[0]:+.2f}"
                )
    for task in args.task:
        weights = chosen_weights(args, task)
        console.print(f"weights on {task}, chosen on validation data:", json.dumps(weights))
        highest = [name for name, weight in weights.items() if weight == max(RIVALS[name][1])]
        console.print("of these the highest candidate:", ", ".join(highest) or "none")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write dicts as a table with all their keys."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def main(args: Arguments) -> None:
    """Tune, run, report."""
    for task in [] if args.only_report else args.task:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, context, start_worker, (args, task)) as pool:
            tuned = [
                name
                for name in RIVALS
                if (args.rows is None or name in args.rows) and (name not in OF_LOGITS or task in WITH_LOGITS)
            ]
            usual = dataclasses.replace(args, steps_factor=1)  # a weight is chosen once, at that length
            finish_all(usual, task, pool, [run for name in tuned for _, run in candidates(task, name)])
            plan = planned(args, task, chosen_weights(args, task))
            finish_all(args, task, pool, [run for r, _, run in plan if args.regimes is None or r in args.regimes])
    report(args)


if __name__ == "__main__":
    from transformers import HfArgumentParser

    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
