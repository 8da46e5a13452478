"""Distil a Vision Transformer on handwritten digits, from nothing to a student that loads anywhere.

    python examples/quickstart.py

Trains a teacher, a small student alone and the same student distilled (both students with one seed, as many steps) on
scikit-learn's 1,797 scans of handwritten digits, which need no download. Prints one table, saves all three models, and
checks in a process without `hf_rrd` that the saved student has the accuracy that was printed.
"""

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import HfArgumentParser, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_rrd import RelationalDistillationConfig, RelationalDistillationTrainer, relational_alignment


@dataclass
class Arguments:
    """What the command line may change."""

    output_dir: str = field(default="out/quickstart", metadata={"help": "Where the models go."})
    teacher_epochs: float = field(default=30, metadata={"help": "Passes of the teacher over the training digits."})
    epochs: float = field(default=30, metadata={"help": "Passes of each student."})
    seed: int = field(default=0, metadata={"help": "Of the split, the starting weights and the order of batches."})
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
def measure(folder: Path, test: dict[str, torch.Tensor], teacher: ViTForImageClassification) -> tuple[int, list[str]]:
    """How many held-out digits a saved model gets right, and its row of the table."""
    model = ViTForImageClassification.from_pretrained(folder).eval()
    pixels = test["pixel_values"]
    right = (model(pixels).logits.argmax(-1) == test["labels"]).sum().item()
    seconds = []
    for _ in range(21):
        start = time.perf_counter()
        model(pixels[:64])
        seconds.append(time.perf_counter() - start)
    student_embeddings, teacher_embeddings = (each.vit(pixels).last_hidden_state[:, 0] for each in (model, teacher))
    alignment = relational_alignment(student_embeddings, teacher_embeddings)
    return right, [
        f"{100 * right / len(pixels):.1f} %",
        f"{model.num_parameters():,}",
        f"{(folder / 'model.safetensors').stat().st_size / 1024:,.0f} KiB",
        f"{1000 * sorted(seconds)[10] / 64:.3f}",
        f"{alignment['cka']:.2f}",
        f"{100 * alignment['neighbor_overlap']:.0f} %",
    ]


def main() -> None:
    """Train, measure, print, check."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    out = Path(args.output_dir)
    train, test = digits(args.seed)
    common: dict[str, Any] = {
        "per_device_train_batch_size": 64,
        "learning_rate": 2e-3,
        "warmup_steps": 20,
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": "none",
        "seed": args.seed,
    }

    print("1 of 3: the teacher")
    teacher = vit(width=128, layers=4, seed=args.seed)
    settings = TrainingArguments(str(out / "teacher"), num_train_epochs=args.teacher_epochs, **common)
    runs: dict[str, Any] = {"teacher": Trainer(teacher, settings, train_dataset=train)}
    runs["teacher"].train()

    print("2 of 3: the student alone")
    settings = TrainingArguments(str(out / "alone"), num_train_epochs=args.epochs, **common)
    runs["alone"] = Trainer(vit(width=32, layers=2, seed=args.seed), settings, train_dataset=train)
    runs["alone"].train()

    print("3 of 3: the student distilled")
    settings = RelationalDistillationConfig(
        str(out / "distilled"),
        num_train_epochs=args.epochs,
        push_to_hub=args.push_to_hub,
        hub_model_id=args.hub_model_id,
        **common,
    )
    student = vit(width=32, layers=2, seed=args.seed)
    runs["distilled"] = RelationalDistillationTrainer(student, settings, train_dataset=train, teacher=teacher)
    runs["distilled"].train()

    table = Table(title=f"{len(train)} training digits, {len(test)} held out, seed {args.seed}")
    for column in ("", "accuracy", "parameters", "on disk", "ms/image", "CKA*", "neighbors*"):
        table.add_column(column, justify="left" if column == "" else "right")
    right = 0
    for name, run in runs.items():
        run.save_model()
        right, row = measure(out / name, test[:], teacher)
        table.add_row(name, *row)
    table.caption = (
        "* with the teacher: alignment of the embeddings, share of each digit's 10 nearest that is the same"
    )
    console = Console(width=max(80, Console().width))
    console.print(table)
    distilled = runs["distilled"]
    if args.report:
        console.print(distilled.report(test).table())
    card = {"dataset": "scikit-learn's handwritten digits", "model_name": None if args.hub_model_id else out.name}
    if args.push_to_hub:
        distilled.push_to_hub(**card)
    else:
        distilled.create_model_card(**card)

    save_file(test[:], out / "held-out.safetensors")
    check = [sys.executable, "-c", CHECK_IN_A_FRESH_PROCESS, str(out / "distilled"), str(out / "held-out.safetensors")]
    found = int(subprocess.run(check, check=True, stdout=subprocess.PIPE, text=True).stdout)
    if found != right:
        raise SystemExit(f"the saved student gets {found} digits right in a fresh process, {right} here.")
    print(
        f"{out / 'distilled'} loads with AutoModelForImageClassification, without hf_rrd, and has the same accuracy."
    )


if __name__ == "__main__":
    main()
