"""Distil a text classifier in a loop of your own: the losses and the bank alone, with Accelerate and without Trainer.

    python examples/own_training_loop.py \
        --train_file data/sst2/train.csv --validation_file data/sst2/validation.csv --text_column_name sentence \
        --teacher_model_name_or_path out/text_classification/teacher \
        --student_num_layers 2 --output_dir out/own_training_loop

`accelerate launch` instead of `python` runs it on several devices, and `--mixed_precision bf16` there does what it
says. Flags may come from a YAML or JSON file, too (`--config file.yaml`); those beside it win. The labels are whole
numbers from 0. `hf upload user/name out/own_training_loop` pushes student and card. Needs `pip install
'hf_rrd[demo,plots]'`.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_rrd import FeatureBank, compare_models, embed, logit_loss, relational_loss, student_from_teacher, write_card
from hf_rrd.training.arguments import parse_arguments


@dataclass
class Arguments:
    """All that the command line may change."""

    teacher_model_name_or_path: str = field(metadata={"help": "Hub name or folder of a classifier."})
    train_file: str = field(metadata={"help": "A csv, json or parquet file with texts and labels."})
    validation_file: str = field(metadata={"help": "The same, to evaluate on."})
    output_dir: str = field(metadata={"help": "Where the student goes."})
    student_num_layers: int | None = field(default=None, metadata={"help": "Of the teacher's layers. Unset: all."})
    text_column_name: str = field(default="text", metadata={"help": "The column with the texts."})
    label_column_name: str = field(default="label", metadata={"help": "The column with the labels."})
    max_length: int = field(default=64, metadata={"help": "Tokens of a text, at most."})
    num_train_epochs: int = field(default=2, metadata={"help": "Passes over the training file."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Examples of one step on one device."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of AdamW."})
    relational_weight: float = field(default=10.0, metadata={"help": "Weight of the relational loss."})
    kd_weight: float = field(default=0.0, metadata={"help": "Weight of distillation on logits."})
    bank_size: int = field(default=4096, metadata={"help": "Teacher embeddings to compare with."})
    seed: int = field(default=0, metadata={"help": "Of new weights and of the order of batches."})
    card_teacher: str | None = field(default=None, metadata={"help": "For the card: what to call the teacher."})
    card_baseline: str | None = field(
        default=None, metadata={"help": "For the card: the same without distillation, '{\"accuracy\": 0.8}'."}
    )
    card_dataset: str | None = field(default=None, metadata={"help": "For the card: the Hub name of files' data set."})


def main() -> None:
    """Load, build, train, evaluate, print."""
    (args,) = parse_arguments(Arguments)
    accelerator = Accelerator()
    set_seed(args.seed)

    # The teacher, whose gradients nobody needs, and the data.
    teacher = AutoModelForSequenceClassification.from_pretrained(args.teacher_model_name_or_path)
    teacher = teacher.requires_grad_(False).eval().to(accelerator.device)
    tokenizer = AutoTokenizer.from_pretrained(args.teacher_model_name_or_path)
    kind = args.train_file.rpartition(".")[2].replace("jsonl", "json")
    with accelerator.main_process_first():
        data = load_dataset(kind, data_files={"train": args.train_file, "validation": args.validation_file})
    columns = data["train"].column_names
    if absent := {args.text_column_name, args.label_column_name} - set(columns):
        raise SystemExit(
            f"No column {sorted(absent)} among {columns}: set --text_column_name and --label_column_name."
        )

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = [example[args.text_column_name] for example in examples]
        batch = tokenizer(texts, truncation=True, max_length=args.max_length, padding=True, return_tensors="pt")
        return dict(batch) | {"labels": torch.tensor([example[args.label_column_name] for example in examples])}

    loader = DataLoader(data["train"], args.per_device_train_batch_size, shuffle=True, collate_fn=collate)

    # The student, and a projection into the teacher's width, which is trained with it and then thrown away.
    student = student_from_teacher(teacher, num_hidden_layers=args.student_num_layers)
    project = torch.nn.Linear(student.config.hidden_size, teacher.config.hidden_size)
    optimizer = torch.optim.AdamW([*student.parameters(), *project.parameters()], lr=args.learning_rate)
    student, project, optimizer, loader = accelerator.prepare(student, project, optimizer, loader)

    # Teacher embeddings to compare with from the first step on, less their mean.
    parts: list[torch.Tensor] = []
    for batch in loader:
        with torch.no_grad():
            parts.append(accelerator.gather(embed(teacher, batch)))  # the loader gives all as many examples
        if sum(map(len, parts)) >= args.bank_size:
            break
    mean = torch.cat(parts).mean(0)
    bank = FeatureBank(args.bank_size, len(mean), device=accelerator.device)
    bank.enqueue(torch.cat(parts) - mean)

    for epoch in range(args.num_train_epochs):
        student.train()
        for batch in loader:
            with torch.no_grad():
                teacher_rows, teacher_outputs = embed(teacher, batch, return_outputs=True)
            student_rows, outputs = embed(student, batch, "head", return_outputs=True)
            rows = teacher_rows - mean  # (batch, width)
            relational = relational_loss(project(student_rows), rows, bank.filled, include_own=True)
            kd = logit_loss(outputs.logits, teacher_outputs.logits)
            loss = outputs.loss + args.relational_weight * relational + args.kd_weight * kd
            bank.enqueue(accelerator.gather(rows))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f} in the last of {len(loader)} steps")

    # Save, compare with the teacher, print, and write the card.
    if accelerator.is_main_process:
        student = accelerator.unwrap_model(student)
        student.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        report = compare_models(student, teacher, data["validation"], collate)
        report.save(args.output_dir)
        Console().print(report.table())
        settings = {"task_weight": 1.0, "relational_weight": args.relational_weight, "kd_weight": args.kd_weight}
        settings |= {"bank_size": len(bank.filled)}
        about: dict[str, Any] = {"settings": settings, "processing_class": tokenizer}
        about["training"] = {"epochs": args.num_train_epochs, "learning_rate": args.learning_rate, "seed": args.seed}
        about |= {"teacher": teacher, "teacher_name": args.card_teacher, "dataset": args.card_dataset}
        about["baseline"] = json.loads(args.card_baseline or "{}")
        write_card(args.output_dir, student, report=report, **about)
    accelerator.wait_for_everyone()  # torch 2.13 may hang where the group ends right after a gather
    accelerator.end_training()


if __name__ == "__main__":
    main()
