"""The students of the comparison, trained again with the defaults, saved and described: `model_cards/`.

    python examples/benchmarks/write_cards.py --task sst2 --data_dir data
    python examples/benchmarks/write_cards.py --task cifar10 --data_dir data

Reads what `compare_losses.py` has finished in the same output folder. For each regime the student of seed 0 is trained
again (and where its figures are not those on record, it says so) and saved under `students` beside the runs, with its
card. The cards, the picture and the index also go to `--cards_dir`.
"""

import csv
import json
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare_losses import REGIMES, Arguments, Run, chosen_weights, measure, methods, result, run_of, trained
from comparison_tasks import LABELED, TASKS, Task
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoImageProcessor, AutoTokenizer

from hf_rrd import RelationalDistillationConfig

ROW = "rrd"


@dataclass(frozen=True)
class Subject:
    """What is said of a task's students.

    Args:
        name: Of the pages, before the regime.
        dataset: Its Hub name.
        pipeline: The Hub's name of the task.
        teacher, student: One line each.
        processor: The class that the saved students' processor is loaded with.
    """

    name: str
    dataset: str
    pipeline: str
    teacher: str
    student: str
    processor: Any


SUBJECTS = {
    "sst2": Subject(
        "sst2-bert-2x128",
        "stanfordnlp/sst2",
        "text-classification",
        "MiniLM (all-MiniLM-L6-v2: 6 layers, 384 wide), fine-tuned on all labels for 2 epochs",
        "BERT, 2 layers, 128 wide, from fresh weights",
        AutoTokenizer,
    ),
    "cifar10": Subject(
        "cifar10-vit-3x64",
        "uoft-cs/cifar10",
        "image-classification",
        "RegNet (825,000 parameters), trained on 45,000 images for 6 epochs",
        "ViT, 3 layers, 64 wide, patches of 8, from fresh weights, on 10,000 of those images",
        AutoImageProcessor,
    ),
}


@dataclass
class CardArguments:
    """What the command line may change."""

    task: str = field(metadata={"help": "The data set.", "choices": list(TASKS)})
    data_dir: str = field(default="data", metadata={"help": "Holds the folders sst2/ and cifar10/."})
    output_dir: str = field(default="out/compare", metadata={"help": "Where the comparison's results are."})
    cards_dir: str = field(default="model_cards", metadata={"help": "Where the cards go."})


def comparison(args: CardArguments) -> Arguments:
    """The arguments of the comparison that the cards are of."""
    return Arguments(args.task, args.data_dir, args.output_dir)


def student_again(args: CardArguments, task: Task, run: Run, folder: Path) -> Any:
    """Train a run's student, compare it with the one on record, save it with its processor."""
    recorded = result(comparison(args), run)
    if recorded is None:
        raise SystemExit(f"No finished run of {ROW!r}, {run.regime!r}, seed {run.seed}: run compare_losses.py first.")
    model = trained(task, run, None)
    measured = measure(model, task, task.test, probes=run.regime == "none")
    differing = {name: (value, recorded[name]) for name, value in measured.items() if value != recorded[name]}
    if differing:
        print(f"{run.regime}: not the figures on record (now, then): {differing}")
    # Without labels the classification head has learnt nothing: the body alone is the student.
    (model.base_model if run.regime == "none" else model).save_pretrained(folder)
    SUBJECTS[args.task].processor.from_pretrained(task.teacher).save_pretrained(folder)
    return model


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table, its first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figures(row: dict[str, str]) -> list[str]:
    """The cells of one row of `summary.csv`."""
    seeds = int(row["seeds"])
    score, spread = float(row["score"]), float(row["deviation"])
    difference, half = float(row["difference"]), float(row["half_interval"])
    return [
        row["method"],
        f"{score:.1f} ± {spread:.1f}" if seeds > 1 else f"{score:.1f}",
        "" if row["method"] == "plain" else f"{difference:+.1f} ± {half:.1f}" if seeds > 1 else f"{difference:+.1f}",
        f"{float(row['probe_few']):.1f}" if row["probe_few"] else "",
        f"{float(row['cka']):.2f}",
        f"{float(row['neighbor_overlap']):.0f}",
        str(seeds),
    ]


def settings_of(task: Task, run: Run) -> str:
    """What the run sets, and what of the package's defaults decides it."""
    changed = {**task.settings, "warmup_steps": 30, "seed": run.seed, **json.loads(run.settings)}
    defaults = RelationalDistillationConfig(output_dir="none", use_cpu=True)
    names = ("relational_weight", "student_temperature", "teacher_temperature", "bank_size", "calibration_examples")
    values = {**{name: getattr(defaults, name) for name in names}, **changed}
    return markdown(["setting", "value"], [[f"`{name}`", f"{value}"] for name, value in values.items()])


def card(args: CardArguments, task: Task, run: Run, model: Any, rows: list[dict[str, str]]) -> ModelCard:
    """The page of a student."""
    subject = SUBJECTS[args.task]
    own = [row for row in rows if row["regime"] == run.regime]
    (row,) = (row for row in own if row["method"] == ROW)
    score = "linear probe" if run.regime == "none" else "accuracy"
    title = f"{subject.name}-{run.regime}"
    labels = {"all": "all labels", "few": f"{LABELED} labels, all examples distilled", "none": "no labels"}[run.regime]
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag=subject.pipeline if run.regime != "none" else "feature-extraction",
        tags=["hf_rrd", "knowledge-distillation"],
        datasets=[subject.dataset],
        model_name=title,
        eval_results=[
            EvalResult(
                task_type=subject.pipeline,
                dataset_type=subject.dataset,
                dataset_name=args.task,
                dataset_split="test",
                metric_type="accuracy",
                metric_name=f"{score}, mean of {row['seeds']} seeds",
                metric_value=round(float(row["score"]) / 100, 4),
            )
        ],
    )
    parameters = sum(each.numel() for each in model.base_model.parameters())
    teacher = 100 * (task.test.logits[:, 0].argmax(-1) == task.test.labels).float().mean().item()
    header = ["", f"{score}, %", "difference", "probe of 500", "CKA", "neighbours, %", "seeds"]
    against = f"student trained on {LABELED} labels" if run.regime == "none" else "student alone (`plain`)"
    text = f"""
# {title}

{subject.student}; {parameters:,} parameters in its body. Distilled on `{subject.dataset}` with {labels}.
Teacher: {subject.teacher}; {teacher:.1f} % on the test split.

## Figures

Test split; mean and standard deviation over seeds, and the difference to the {against}, paired by seed, with its 95 %
interval. CKA and neighbours (how many of an example's 10 nearest are the teacher's, in percent) say how near the
student's relations are to the teacher's. This student is the row `{ROW}`.

{markdown(header, [figures(each) for each in own])}

![Differences of all losses]({args.task}.png)

## Settings

{settings_of(task, run)}

## Command

```
python examples/benchmarks/compare_losses.py --task {args.task} --data_dir data
python examples/benchmarks/write_cards.py --task {args.task} --data_dir data
```

The second saves this student in `out/compare/{args.task}/students/{run.regime}`.
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def index(folder: Path) -> str:
    """The table of all cards in a folder, from what they say of themselves."""
    rows = []
    for path in sorted(folder.glob("*.md")):
        if path.name != "README.md":
            data = ModelCard.load(path).data
            (evaluated,) = data.eval_results
            values = [f"[{path.stem}]({path.name})", f"`{data.datasets[0]}`", evaluated.metric_name]
            rows.append([*values, f"{100 * evaluated.metric_value:.1f} %"])
    return (
        "# Model cards\n\nThe students that `examples/benchmarks/compare_losses.py` trained with the defaults, on the "
        "test split. None is on the Hub: each page has the commands that make it.\n\n"
        + markdown(["student", "data", "figure", ""], rows)
        + "\n"
    )


def main(args: CardArguments) -> None:
    """Train, save, describe."""
    results = Path(args.output_dir) / args.task
    with (results / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    task = TASKS[args.task](Path(args.data_dir), results)
    cards = Path(args.cards_dir)
    settings = methods(chosen_weights(comparison(args)))[ROW]
    for regime in REGIMES:
        run = run_of(regime, settings, seed=0)
        folder = results / "students" / regime
        model = student_again(args, task, run, folder)
        page = card(args, task, run, model, rows)
        page.save(folder / "README.md")
        page.save(cards / f"{SUBJECTS[args.task].name}-{regime}.md")
        shutil.copyfile(results / "comparison.png", folder / f"{args.task}.png")
    shutil.copyfile(results / "comparison.png", cards / f"{args.task}.png")
    (cards / "README.md").write_text(index(cards))


if __name__ == "__main__":
    from transformers import HfArgumentParser
    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="'pin_memory'")
    main(*HfArgumentParser(CardArguments).parse_args_into_dataclasses())
