"""Distil a Vision Transformer on handwritten digits of which few have labels: is the student better?

    python examples/quickstart.py

Of 1,198 training digits (scikit-learn's, no download) 100 have a label for the student. Alone it learns these;
distilled it also sees all digits through a teacher, with no setting but the length of the run. Both take as many
steps, from three seeds. Prints one table and what it shows, saves the models, and checks in a process without `hf_rrd`
that the saved student of the first seed has the accuracy that was printed.
"""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_rrd import RelationalDistillationConfig, RelationalDistillationTrainer
from hf_rrd.training.arguments import parse_arguments

NO_LABEL = -100  # as everywhere in transformers: the loss leaves such an example out


@dataclass
class Arguments:
    """What the command line may change."""

    output_dir: str = field(default="out/quickstart", metadata={"help": "Where the models go."})
    labeled: int = field(default=100, metadata={"help": "Training digits whose label the student sees."})
    num_train_epochs: float = field(default=15, metadata={"help": "Passes over all training digits, of each model."})
    seeds: int = field(default=3, metadata={"help": "Students of each kind: their starting weights and batches."})
    report: bool = field(default=False, metadata={"help": "Compare student and teacher at the end, also in speed."})
    push_to_hub: bool = field(default=False, metadata={"help": "Push the distilled student with its card."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Its name there. Default: distilled."})


CHECK_IN_A_FRESH_PROCESS = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
model, digits = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval(), load_file(sys.argv[2])
with torch.no_grad():
    print((model(digits["pixel_values"]).logits.argmax(-1) == digits["labels"]).sum().item())
assert "hf_rrd" not in sys.modules
"""


def digits(seed: int) -> tuple[Dataset, Dataset]:
    """Training and held-out digits: `pixel_values`, (1, 8, 8) from -1 to 1, and `labels`."""
    scans = load_digits()
    pixels = (scans.images[:, None] / 8 - 1).astype("float32")  # (1797, 1, 8, 8)
    train, test = train_test_split(range(len(pixels)), test_size=1 / 3, stratify=scans.target, random_state=seed)
    parts = [Dataset.from_dict({"pixel_values": pixels[rows], "labels": scans.target[rows]}) for rows in (train, test)]
    return parts[0].with_format("torch"), parts[1].with_format("torch")


def vit(width: int, layers: int, seed: int) -> ViTForImageClassification:
    """A ViT for 8 x 8 grey images in patches of 2, with starting weights of a seed."""
    set_seed(seed)
    size = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
    }
    return ViTForImageClassification(ViTConfig(**size, image_size=8, patch_size=2, num_channels=1, num_labels=10))


@torch.no_grad()
def right(folder: Path, test: dict[str, torch.Tensor]) -> int:
    """How many held-out digits a saved model gets right."""
    model = ViTForImageClassification.from_pretrained(folder).eval()
    return int((model(test["pixel_values"]).logits.argmax(-1) == test["labels"]).sum())


def main() -> None:
    """Train, measure, print, check."""
    (args,) = parse_arguments(Arguments)
    out, (train, test) = Path(args.output_dir), digits(seed=0)
    labeled, unlabeled = train.select(range(args.labeled)), train.select(range(args.labeled, len(train)))
    partly = concatenate_datasets([labeled, unlabeled.map(lambda digit: {"labels": NO_LABEL})])
    common: dict[str, Any] = {
        "max_steps": round(args.num_train_epochs * len(train) / 64),
        "per_device_train_batch_size": 64,
        "learning_rate": 2e-3,
        "warmup_steps": 20,
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": "none",
    }
    print("the teacher, with all labels")
    teacher = vit(width=128, layers=4, seed=0)
    runs: dict[str, Any] = {}
    runs["teacher"] = Trainer(teacher, TrainingArguments(str(out / "teacher"), **common), train_dataset=train)
    runs["teacher"].train()
    runs["teacher"].save_model()
    found = {"teacher": [right(out / "teacher", test[:])], "student alone": [], "student distilled": []}

    for seed in range(args.seeds):
        folder = out if seed == 0 else out / f"seed-{seed}"
        settings = TrainingArguments(str(folder / "alone"), seed=seed, **common)
        alone = Trainer(vit(width=32, layers=2, seed=seed), settings, train_dataset=labeled)

        push = {"push_to_hub": args.push_to_hub and seed == 0, "hub_model_id": args.hub_model_id}
        settings = RelationalDistillationConfig(str(folder / "distilled"), seed=seed, **push, **common)
        student = vit(width=32, layers=2, seed=seed)
        distilled = RelationalDistillationTrainer(student, settings, train_dataset=partly, teacher=teacher)

        for name, run in (("student alone", alone), ("student distilled", distilled)):
            print(f"seed {seed}: the {name}")
            run.train()
            run.save_model()
            found[name].append(right(Path(run.args.output_dir), test[:]))
        if seed == 0:
            runs["distilled"] = distilled

    # The table, and in one sentence what it shows.
    accuracy = {name: [100 * count / len(test) for count in counts] for name, counts in found.items()}
    small, big = (runs[name].model.num_parameters() for name in ("distilled", "teacher"))
    table = Table(title=f"{len(train)} training digits, {args.labeled} of them labelled; {len(test)} held out")
    for column in ("", "parameters", "accuracy", "", "of each seed"):
        table.add_column(column, justify="right" if column in ("parameters", "accuracy") else "left")
    for name, each in accuracy.items():
        size, seeds = (big, "") if name == "teacher" else (small, " ".join(f"{value:.1f}" for value in each))
        table.add_row(name, f"{size:,}", f"{mean(each):.1f} %", "█" * round(mean(each) / 4), seeds)
    console = Console(width=max(90, Console().width))
    console.print(table)
    before, after = accuracy["student alone"], accuracy["student distilled"]
    gains = [found - alone for found, alone in zip(after, before, strict=True)]
    console.print(
        f"Distilled, the student gains {mean(gains):.1f} points ({min(gains):.1f} to {max(gains):.1f} over the seeds) "
        f"and comes to {mean(after):.1f} % of held-out digits. Its teacher, with {big // small} times the parameters "
        f"and all labels, comes to {accuracy['teacher'][0]:.1f} %."
    )

    if args.report:
        console.print(runs["distilled"].report(test).table())
    card: dict[str, Any] = {
        "dataset": "scikit-learn's handwritten digits",
        "model_name": None if args.hub_model_id else out.name,
        "baseline": {"accuracy": found["student alone"][0] / len(test)},
    }
    if args.push_to_hub:
        runs["distilled"].push_to_hub(**card)
    else:
        runs["distilled"].create_model_card(**card)

    save_file(test[:], out / "held-out.safetensors")
    check = [sys.executable, "-c", CHECK_IN_A_FRESH_PROCESS, str(out / "distilled"), str(out / "held-out.safetensors")]
    again = int(subprocess.run(check, check=True, stdout=subprocess.PIPE, text=True).stdout)
    if again != found["student distilled"][0]:
        raise SystemExit(f"the saved student gets {again} digits right in a fresh process, not as many here.")
    print(
        f"{out / 'distilled'} loads with AutoModelForImageClassification, without hf_rrd, and has the same accuracy."
    )


if __name__ == "__main__":
    main()
