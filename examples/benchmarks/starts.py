"""Is a student better started from its teacher? MiniLM, trained on SST-2, teaches students that differ in their start.

    python examples/benchmarks/starts.py --data_dir data

Two sizes: 3 of the teacher's 6 layers, 384 wide; and 2 layers, 128 wide, which can only take over its words, made
narrow. Each is distilled with the defaults, with all labels and with 500, from its teacher and from fresh weights. The
learning rate is the better of two on the validation split, with a seed of its own; the table is of the test
split. The teacher is that of `compare_losses.py --task sst2`, and is trained where there is none yet. A run that is
finished is in a file, so a killed comparison goes on where it was.
"""

import json
import statistics
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compare_losses import TUNING_SEED, interval, run_of, train
from comparison_tasks import SIZE, Task, sst2
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForSequenceClassification, HfArgumentParser, set_seed
from transformers.utils import logging

from hf_rrd import student_from_teacher

SIZES: dict[str, dict[str, int]] = {"2 x 128": SIZE, "3 x 384": {"num_hidden_layers": 3}}
RATES = {"3 x 384": (1e-4, 4e-4), "2 x 128": (5e-4, 1e-3)}
STEPS = {"3 x 384": 162, "2 x 128": 324}
STARTS = ("its teacher", "fresh weights")
REGIMES = {"all": "all labels", "few": "500 labels"}


@dataclass
class Arguments:
    """What the command line may change."""

    data_dir: str = field(default="data", metadata={"help": "Holds the folder sst2/."})
    output_dir: str = field(default="out/compare", metadata={"help": "Where the teacher is, and the runs go."})
    seeds: int = field(default=3, metadata={"help": "Runs of each start."})
    max_steps: int | None = field(default=None, metadata={"help": "Steps of 64 sentences; by the size if unset."})


def student_of(teacher: Path, size: str, start: str, seed: int) -> Any:
    """A student of a size and a start."""
    set_seed(seed)
    if start == STARTS[0]:
        return student_from_teacher(AutoModelForSequenceClassification.from_pretrained(teacher), **SIZES[size])
    return AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(teacher, **SIZES[size]))


def accuracy(args: Arguments, task: Task, size: str, start: str, regime: str, rate: float, seed: int) -> float:
    """A distilled student's accuracy in percent, from its file or from a training."""
    split, steps = "validation" if seed == TUNING_SEED else "test", args.max_steps or STEPS[size]
    name = "-".join([size, start, regime, f"{rate:g}", str(seed), str(steps)]).replace(" ", "_")
    path = Path(args.output_dir) / "starts" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        settings = {**task.settings, "learning_rate": rate}
        started = replace(task, settings=settings, student=lambda seed: student_of(task.teacher, size, start, seed))
        figures = train(started, run_of(regime, {}, seed, split, package="as it is"), steps)
        path.with_suffix(".tmp").write_text(json.dumps(figures))
        path.with_suffix(".tmp").replace(path)
    value = float(json.loads(path.read_text())["accuracy"])
    print(size, start, regime, f"{rate:g}", split, seed, f"{value:.1f}", flush=True)
    return value


def main(args: Arguments) -> None:
    """Tune, run, print."""
    task = sst2(Path(args.data_dir), Path(args.output_dir) / "sst2")
    teacher = 100 * (task.test.logits[:, 0].argmax(-1) == task.test.labels).float().mean().item()
    table = Table("student", "labels", "start", "learning rate", "accuracy, %")
    table.title = f"SST-2, test split, {args.seeds} seeds; teacher {teacher:.1f} %"
    gaps = []
    for size in SIZES:
        for regime, labels in REGIMES.items():
            scores: dict[str, list[float]] = {}
            for start in STARTS:
                how = (args, task, size, start, regime)
                tuned = {rate: accuracy(*how, rate, TUNING_SEED) for rate in RATES[size]}
                rate = max(tuned, key=lambda rate: tuned[rate])
                values = scores[start] = [accuracy(*how, rate, seed) for seed in range(args.seeds)]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                table.add_row(size, labels, start, f"{rate:g}", f"{statistics.fmean(values):.1f}{spread}")
            mean, half = interval([one - other for one, other in zip(*scores.values(), strict=True)])
            gaps.append(f"{size}, {labels}: {mean:+.1f} ± {half:.1f} points")
    console = Console(width=max(100, Console().width))
    console.print(table)
    console.print("what the teacher's start gains, paired by seed, with its 95 % interval:", *gaps, sep="\n")


if __name__ == "__main__":
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="'pin_memory'")
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
