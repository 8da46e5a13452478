"""Does it help? Every loss, alone and with KD, in three regimes, several seeds, on one data set, with one budget.

    python examples/benchmarks/compare_losses.py --task sst2 --data_dir data
    python examples/benchmarks/compare_losses.py --task cifar10 --data_dir data

Regimes: `all` (every label), `few` (500 labels, all examples for distillation), `none` (no labels; a linear probe of
the frozen student). Every run has as many steps of the same batch size. A rival's weight is chosen from four on the
validation split in the regime `few` with a seed of its own; the test split is read for the tables alone. The teacher
is trained once and its outputs are computed once. Each finished run is a file, so a killed comparison goes on where
it was. Writes `runs.csv`, `summary.csv` and, with the extra [plots], `comparison.png` into the output folder.
"""

import csv
import hashlib
import json
import multiprocessing
import os
import statistics
import tempfile
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
from scipy.stats import t as student_t
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers.utils import logging

from hf_rrd import RelationalDistillationConfig, RelationalDistillationTrainer, relational_alignment
from hf_rrd.models.pooling import cls_pool, mean_pool

REGIMES = {"all": "all labels", "few": f"{LABELED} labels", "none": "no labels"}

DEFAULTS = {"teacher_projection": "center", "relational_weight": 10.0}
"""Those of the package that this comparison decided; said here, so that a run on record says what it was."""

PLAIN_ONE = {"teacher_projection": "none", "relational_weight": 1.0}

RELATIONAL: dict[str, dict[str, Any]] = {
    "rrd": DEFAULTS,
    "InfoNCE (CRD)": {"teacher_projection": "none", "relational_loss": "infonce"},
    "RKD distance": {"teacher_projection": "none", "relational_loss": "rkd_distance"},
    "RKD angle": {"teacher_projection": "none", "relational_loss": "rkd_angle"},
    "SP": {"teacher_projection": "none", "relational_loss": "similarity_preserving"},
    "PKT": {"teacher_projection": "none", "relational_loss": "pkt"},
    "CC": {"teacher_projection": "none", "relational_loss": "correlation_congruence"},
    "cosine": {"teacher_projection": "none", "relational_loss": "cosine"},
    "MSE": {"teacher_projection": "none", "relational_loss": "mse"},
}
"""The relational losses, each also run with KD. The first has the defaults, the others a weight of their own."""

KNOBS: dict[str, dict[str, Any]] = {
    "rrd, weight 30": {**DEFAULTS, "relational_weight": 30.0},
    "rrd, weight 3": {**DEFAULTS, "relational_weight": 3.0},
    "rrd, weight 1": {**DEFAULTS, "relational_weight": 1.0},
    "rrd, not centred": {**DEFAULTS, "teacher_projection": "none"},
    "rrd, PCA to 128": {**DEFAULTS, "teacher_projection": "pca", "projection_dim": 128},
    "rrd, batch as bank": {**DEFAULTS, "bank_size": 0},
    "rrd1": PLAIN_ONE,
    "rrd1, PCA to 128": {**PLAIN_ONE, "teacher_projection": "pca", "projection_dim": 128},
    "rrd1, random 128 (paper)": {**PLAIN_ONE, "teacher_projection": "orthogonal", "projection_dim": 128},
    "rrd1, perplexity 20": {**PLAIN_ONE, "teacher_perplexity": 20.0},
    "rrd1, sharper student": {**PLAIN_ONE, "student_temperature": 0.02, "teacher_temperature": 0.1},
    "rrd1, without own key": {**PLAIN_ONE, "include_own": False},
    "rrd1, bank of 256": {**PLAIN_ONE, "bank_size": 256},
    "rrd1, batch as bank": {**PLAIN_ONE, "bank_size": 0},
}
"""Settings of the first, alone only: the evidence for the defaults. "rrd1": weight 1, not centred."""

WEIGHTS = {
    "KD": (0.02, 0.1, 0.5, 2.5),
    "rrd": (0.3, 1.0, 3.0, 10.0),
    "InfoNCE (CRD)": (0.3, 1.0, 3.0, 10.0),
    "RKD distance": (2.5, 25.0, 250.0, 2500.0),
    "RKD angle": (5.0, 50.0, 500.0, 5000.0),
    "SP": (30.0, 300.0, 3000.0, 30000.0),
    "PKT": (300.0, 3000.0, 30000.0, 300000.0),
    "CC": (0.2, 2.0, 20.0, 200.0),
    "cosine": (1.0, 3.0, 10.0, 30.0),
    "MSE": (0.3, 3.0, 30.0, 300.0),
}
"""What each loss's weight is chosen from: around its paper's value, or around the size of the task loss."""

TUNING_SEED = 1000


@dataclass
class Arguments:
    """What the command line may change."""

    task: str = field(metadata={"help": "The data set.", "choices": list(TASKS)})
    data_dir: str = field(default="data", metadata={"help": "Holds the folders sst2/ and cifar10/."})
    output_dir: str = field(
        default="out/compare", metadata={"help": "Teacher, runs and tables go into a folder here."}
    )
    seeds: int = field(default=5, metadata={"help": "Runs of each loss alone."})
    kd_seeds: int = field(default=3, metadata={"help": "Runs of each loss together with KD."})
    workers: int = field(default=1, metadata={"help": "Runs at a time, each in a process of its own."})
    rows: list[str] | None = field(default=None, metadata={"help": "Only these rows of the tables; all if unset."})
    max_steps: int | None = field(default=None, metadata={"help": "Steps of a run, for a quick look."})
    only_report: bool = field(default=False, metadata={"help": "Train nothing, print what is finished."})


@dataclass(frozen=True)
class Run:
    """One training: its settings decide its file, so that equal settings are trained once."""

    regime: str
    settings: str  # JSON
    seed: int
    split: str = "test"

    @property
    def name(self) -> str:
        """A name that no other run has."""
        return hashlib.sha256(json.dumps([self.regime, self.settings, self.seed, self.split]).encode()).hexdigest()[
            :16
        ]


def run_of(regime: str, settings: dict[str, Any], seed: int, split: str = "test") -> Run:
    """A run of these settings of the trainer; without labels the task loss is off."""
    if regime == "none":
        settings = {**settings, "task_weight": 0.0}
    return Run(regime, json.dumps(settings, sort_keys=True), seed, split)


# ---- One run ----


def task_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross-entropy over the labelled examples of a batch; -100 marks the others."""
    summed = F.cross_entropy(outputs["logits"].float(), labels, ignore_index=-100, reduction="sum")
    return summed / (labels != -100).sum().clamp(min=1)


def trained(task: Task, run: Run, max_steps: int | None) -> Any:
    """A student trained from the run's seed, ready to be read."""
    settings = {**task.settings, **({"max_steps": max_steps} if max_steps else {}), **json.loads(run.settings)}
    with tempfile.TemporaryDirectory() as folder:
        args = RelationalDistillationConfig(
            **quiet(Path(folder), warmup_steps=30, remove_unused_columns=False, seed=run.seed, **settings)
        )
        distils = args.relational_weight > 0 or args.kd_weight > 0
        trainer = RelationalDistillationTrainer(
            task.student(run.seed),
            args,
            train_dataset=examples_of(task.train, run.regime, distils),
            compute_loss_func=task_loss if args.task_weight > 0 else None,
        )
        trainer.train()
    return trainer.model.eval()


def train(task: Task, run: Run, max_steps: int | None) -> dict[str, float]:
    """Train a student and measure it on the run's split."""
    return measure(trained(task, run, max_steps), task, getattr(task, run.split), probes=run.regime == "none")


@torch.no_grad()
def read(model: Any, split: Split) -> tuple[Tensor, Tensor]:
    """The student's pooled embeddings, (examples, width), and logits, (examples, classes), of the first views."""
    embeddings, logits = [], []
    for start in range(0, len(split.labels), 256):
        batch = {name: tensor[start : start + 256, 0] for name, tensor in split.inputs.items()}
        outputs = model.base_model(**batch)
        pool = mean_pool if "attention_mask" in batch else cls_pool
        embeddings.append(pool(outputs, batch.get("attention_mask")))
        logits.append(model(**batch).logits)
    return torch.cat(embeddings), torch.cat(logits)


def measure(model: Any, task: Task, split: Split, probes: bool) -> dict[str, float]:
    """Accuracy in percent, alignment with the teacher and, where asked, linear probes of all and of few labels."""
    embeddings, logits = read(model, split)
    alignment = relational_alignment(embeddings[:1000], split.embedding[:1000, 0], debiased=False)
    metrics = {
        "accuracy": 100 * (logits.argmax(-1) == split.labels).float().mean().item(),
        "cka": alignment["cka"],
        "neighbor_overlap": 100 * alignment["neighbor_overlap"],
    }
    if probes:
        known, _ = read(model, task.train)
        for name, count in (("probe", len(known)), ("probe_few", LABELED)):
            classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, C=0.1))
            classifier.fit(known[:count].numpy(), task.train.labels[:count].numpy())
            metrics[name] = 100 * classifier.score(embeddings.numpy(), split.labels.numpy())
    return metrics


# ---- All runs ----

_task: Task | None = None


def start_worker(args: Arguments) -> None:
    """Load the task once in each process."""
    global _task
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="'pin_memory'")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.workers))
    _task = TASKS[args.task](Path(args.data_dir), Path(args.output_dir) / args.task)


def finish(args: Arguments, run: Run) -> None:
    """Train one run in a worker and keep its figures in a file."""
    assert _task is not None
    path = path_of(args, run)
    text = json.dumps({**vars(run), **train(_task, run, args.max_steps)}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(f".{os.getpid()}").write_text(text)
    path.with_suffix(f".{os.getpid()}").replace(path)


def path_of(args: Arguments, run: Run) -> Path:
    """Where a run's figures are."""
    folder = "runs" if args.max_steps is None else f"runs-{args.max_steps}"
    return Path(args.output_dir) / args.task / folder / f"{run.name}.json"


def finish_all(args: Arguments, pool: ProcessPoolExecutor, runs: list[Run]) -> None:
    """Train what is not finished, in the order given."""
    missing = [run for run in dict.fromkeys(runs) if not path_of(args, run).is_file()]
    futures = [pool.submit(finish, args, run) for run in missing]
    for count, future in enumerate(as_completed(futures), 1):
        future.result()
        print(f"\r{count} of {len(missing)} runs", end="", flush=True)
    print()


def result(args: Arguments, run: Run) -> dict[str, Any] | None:
    """A run's figures, or None where it is not finished."""
    path = path_of(args, run)
    return json.loads(path.read_text()) if path.is_file() else None


def tuning_runs(name: str) -> list[tuple[float, Run]]:
    """A loss's candidates for its weight, each with its run on the validation split."""
    key = "kd_weight" if name == "KD" else "relational_weight"
    off = {"relational_weight": 0.0} if name == "KD" else RELATIONAL[name]
    return [(w, run_of("few", {**off, key: w}, TUNING_SEED, "validation")) for w in WEIGHTS[name]]


def chosen_weights(args: Arguments) -> dict[str, float]:
    """The weight with the best validation accuracy for each loss; the middle one where nothing is finished."""
    weights = {}
    for name, candidates in WEIGHTS.items():
        scored = [(figures["accuracy"], w) for w, run in tuning_runs(name) if (figures := result(args, run))]
        weights[name] = max(scored)[1] if scored else candidates[1]
    return weights


def _tunes(name: str, row: str) -> bool:
    """Whether a row needs the weight of a loss."""
    if name == "KD":
        return row.endswith("KD")
    return row.removesuffix(" + KD") == name


def methods(weights: dict[str, float]) -> dict[str, dict[str, Any]]:
    """All rows of the tables, with their settings."""
    kd = {"kd_weight": weights["KD"]}
    rows = {"plain": {"relational_weight": 0.0}, "KD": {"relational_weight": 0.0, **kd}}
    for name, settings in RELATIONAL.items():
        rows[name] = settings if name == "rrd" else {**settings, "relational_weight": weights[name]}
    rows |= KNOBS
    return rows | {f"{name} + KD": {**rows[name], **kd} for name in RELATIONAL}


def planned(args: Arguments, weights: dict[str, float]) -> list[tuple[str, str, Run]]:
    """Regime, row and run of the whole comparison, seed after seed."""
    plan = []
    for with_kd, seeds in ((False, args.seeds), (True, args.kd_seeds)):
        for seed in range(seeds):
            for regime in ("none", "few", "all"):
                for name, settings in methods(weights).items():
                    wanted = args.rows is None or name in args.rows
                    if wanted and name.endswith("+ KD") == with_kd and (regime, name) != ("none", "plain"):
                        plan.append((regime, name, run_of(regime, settings, seed)))
    return plan


# ---- The report ----


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 percent confidence interval, by Student's t; nan for fewer than 2 values."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("nan")
    return mean, float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def summarize(args: Arguments, plan: list[tuple[str, str, Run]]) -> list[dict[str, Any]]:
    """One dict per regime and row. Without labels the score is the probe, compared with plain training on few."""
    scores: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for regime, name, run in plan:
        figures = result(args, run)
        if figures is not None:
            scores.setdefault((regime, name), {})[run.seed] = figures
    summary = []
    for (regime, name), runs in scores.items():
        key = "probe" if regime == "none" else "accuracy"
        plain = scores.get(("few" if regime == "none" else regime, "plain"), {})
        paired = [runs[seed][key] - plain[seed]["accuracy"] for seed in runs if seed in plain]
        mean, half = interval(paired) if paired else (float("nan"), float("nan"))
        columns = [
            metric for metric in ("probe_few", "cka", "neighbor_overlap") if metric in next(iter(runs.values()))
        ]
        values = [figures[key] for figures in runs.values()]
        summary.append(
            {
                "regime": regime,
                "method": name,
                "seeds": len(runs),
                "score": statistics.fmean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else float("nan"),
                "difference": mean,
                "half_interval": half,
                **{metric: statistics.fmean(f[metric] for f in runs.values()) for metric in columns},
            }
        )
    return summary


def over_regimes(args: Arguments, plan: list[tuple[str, str, Run]]) -> list[tuple[str, float, float, float]]:
    """Row, mean score over the regimes, its difference to "rrd", paired by seed, and the standard error of that.

    Of the losses alone that have all regimes for as many seeds as "rrd".
    """
    scores: dict[str, dict[tuple[int, str], float]] = {}
    for regime, name, run in plan:
        figures = result(args, run)
        if figures is not None:
            scores.setdefault(name, {})[run.seed, regime] = figures["probe" if regime == "none" else "accuracy"]
    ours = scores.get("rrd", {})
    seeds = sorted({seed for seed, _ in ours})
    rows = []
    for name, own in scores.items():
        if own.keys() == ours.keys() and len(ours) == len(seeds) * len(REGIMES):
            differences = [statistics.fmean(own[s, r] - ours[s, r] for r in REGIMES) for s in seeds]
            error = statistics.stdev(differences) / len(seeds) ** 0.5 if len(seeds) > 1 else float("nan")
            rows.append((name, statistics.fmean(own.values()), statistics.fmean(differences), error))
    return sorted(rows, key=lambda row: -row[1])


def report(args: Arguments, plan: list[tuple[str, str, Run]], weights: dict[str, float]) -> None:
    """Print the tables; write them and the figure."""
    folder = Path(args.output_dir) / args.task
    summary = summarize(args, plan)
    console = Console(width=max(110, Console().width))
    for regime, title in REGIMES.items():
        score = "probe, %" if regime == "none" else "accuracy, %"
        table = Table(title=f"{args.task}, {title} (test split)")
        for column in ("", "seeds", score, "difference to plain*", "probe 500, %", "CKA", "neighbours, %"):
            table.add_column(column, justify="left" if column == "" else "right")
        for row in (row for row in summary if row["regime"] == regime):
            table.add_row(
                row["method"],
                str(row["seeds"]),
                f"{row['score']:.1f} ± {row['deviation']:.1f}",
                f"{row['difference']:+.1f} ± {row['half_interval']:.1f}",
                f"{row['probe_few']:.1f}" if "probe_few" in row else "",
                f"{row['cka']:.2f}",
                f"{row['neighbor_overlap']:.0f}",
            )
        table.caption = "* paired by seed, with its 95 % interval" + (
            f"; to the student trained on {LABELED} labels" if regime == "none" else ""
        )
        console.print(table)
    table = Table("", "mean score", "difference to rrd ± standard error", title=f"{args.task}, over the regimes")
    for name, mean, difference, error in over_regimes(args, plan):
        table.add_row(name, f"{mean:.2f}", f"{difference:+.2f} ± {error:.2f}")
    console.print(table)
    console.print("weights chosen on validation data:", json.dumps(weights))
    write_csv(folder / "summary.csv", summary)
    finished = [{"row": name, **figures} for _, name, run in plan if (figures := result(args, run))]
    write_csv(folder / "runs.csv", finished)
    draw(folder / "comparison.png", args.task, summary)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write dicts as a table with all their keys."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def draw(path: Path, task: str, summary: list[dict[str, Any]]) -> None:
    """One panel per regime: difference to the plain student with its interval."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure: pip install 'hf_rrd[plots]'")
        return
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (regime, title) in zip(figure.subplots(1, 3), REGIMES.items(), strict=True):
        rows = [row for row in summary if row["regime"] == regime and row["method"] != "plain"][::-1]
        axes.axvline(0, color="0.5", linewidth=1)
        axes.errorbar(
            [row["difference"] for row in rows],
            [row["method"] for row in rows],
            xerr=[0 if row["seeds"] < 2 else row["half_interval"] for row in rows],
            fmt="o",
            color="#0072B2",
            capsize=3,
        )
        axes.set_title(f"{task}, {title}")
        against = f"plain student of {LABELED} labels" if regime == "none" else "plain student"
        axes.set_xlabel(f"{'probe' if regime == 'none' else 'accuracy'}, points over the {against}")
        axes.tick_params(axis="y", labelsize=8)
    figure.savefig(path, dpi=150)


def main(args: Arguments) -> None:
    """Tune, run, report."""
    if not args.only_report:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, context, start_worker, (args,)) as pool:
            tuned = [name for name in WEIGHTS if args.rows is None or any(_tunes(name, row) for row in args.rows)]
            finish_all(args, pool, [run for name in tuned for _, run in tuning_runs(name)])
            finish_all(args, pool, [run for _, _, run in planned(args, chosen_weights(args))])
    weights = chosen_weights(args)
    report(args, planned(args, weights), weights)


if __name__ == "__main__":
    from transformers import HfArgumentParser

    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
