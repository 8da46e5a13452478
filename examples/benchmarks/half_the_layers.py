"""Is a student better started from its teacher's layers? MiniLM with 3 of 6 layers on SST-2, against random weights.

    python examples/benchmarks/half_the_layers.py --data_dir data

Both students have the same config, are distilled with the defaults, with all labels, for one and a half epochs. Each
start's learning rate is the better of two on the validation split, with a seed of its own; the table is of the test
split. The teacher is that of `compare_losses.py --task sst2`, and is trained where there is none yet.
"""

import dataclasses
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compare_losses import TUNING_SEED, interval, run_of, train
from comparison_tasks import Task, sst2
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed

from hf_rrd import student_from_teacher

LEARNING_RATES = (1e-4, 4e-4)
STEPS = 162


@dataclasses.dataclass
class Arguments:
    """What the command line may change."""

    data_dir: str = dataclasses.field(default="data", metadata={"help": "Holds the folder sst2/."})
    output_dir: str = dataclasses.field(default="out/compare", metadata={"help": "Where the teacher is."})
    seeds: int = dataclasses.field(default=3, metadata={"help": "Runs of each start."})
    num_hidden_layers: int = dataclasses.field(default=3, metadata={"help": "Layers of the student, of 6."})
    max_steps: int = dataclasses.field(default=STEPS, metadata={"help": "Steps of 64 sentences."})


def starts(teacher: Path, layers: int) -> dict[str, Callable[[int], Any]]:
    """Each start by name: from a seed to a student."""

    def from_teacher(seed: int) -> Any:
        set_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(teacher)
        return student_from_teacher(model, num_hidden_layers=layers)

    def from_random(seed: int) -> Any:
        set_seed(seed)
        return AutoModelForSequenceClassification.from_config(
            AutoConfig.from_pretrained(teacher, num_hidden_layers=layers)
        )

    return {"from the teacher's layers": from_teacher, "from random weights": from_random}


def accuracy(task: Task, learning_rate: float, seed: int, split: str, steps: int) -> float:
    """A distilled student's accuracy in percent."""
    settings = {**task.settings, "learning_rate": learning_rate}
    run = run_of("all", {}, seed, split, package="as it is")
    return train(dataclasses.replace(task, settings=settings), run, steps)["accuracy"]


def main(args: Arguments) -> None:
    """Tune, run, print."""
    task = sst2(Path(args.data_dir), Path(args.output_dir) / "sst2")
    teacher = 100 * (task.test.logits[:, 0].argmax(-1) == task.test.labels).float().mean().item()
    scores: dict[str, list[float]] = {}
    chosen: dict[str, float] = {}
    for name, start in starts(task.teacher, args.num_hidden_layers).items():
        started = dataclasses.replace(task, student=start)
        tuned = {
            rate: accuracy(started, rate, TUNING_SEED, "validation", args.max_steps)
            for rate in track(LEARNING_RATES, f"{name}: learning rate")
        }
        chosen[name] = max(tuned, key=lambda rate: tuned[rate])
        scores[name] = [
            accuracy(started, chosen[name], seed, "test", args.max_steps)
            for seed in track(range(args.seeds), f"{name}: seeds")
        ]
    table = Table(title=f"SST-2, test split; teacher {teacher:.1f} %")
    for column in ("student", "learning rate", "accuracy, %", "seeds"):
        table.add_column(column)
    for name, values in scores.items():
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        table.add_row(name, f"{chosen[name]:g}", f"{statistics.fmean(values):.1f}{spread}", str(len(values)))
    console = Console(width=max(100, Console().width))
    console.print(table)
    first, second = scores.values()
    mean, half = interval([a - b for a, b in zip(first, second, strict=True)])
    console.print(f"difference, paired by seed, with its 95 % interval: {mean:+.1f} ± {half:.1f} points")


if __name__ == "__main__":
    from transformers import HfArgumentParser
    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="'pin_memory'")
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
