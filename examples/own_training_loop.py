"""Distil a text classifier in a loop of your own: the losses and the bank alone, with Accelerate and without Trainer.

    python examples/own_training_loop.py \
        --train_file data/sst2/train.csv --validation_file data/sst2/validation.csv --text_column_name sentence \
        --teacher_model_name_or_path out/text_classification/teacher \
        --student_num_layers 2 --output_dir out/own_training_loop

`accelerate launch` instead of `python` runs it on several devices, and `--mixed_precision bf16` there does what it
says. The labels are whole numbers from 0. Instead of flags one YAML or JSON file will do.

Needs `pip install 'hf_rrd[demo,plots]'`.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from huggingface_hub import create_repo, upload_folder
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    get_linear_schedule_with_warmup,
)
from transformers.modeling_outputs import BaseModelOutput

from hf_rrd import FeatureBank, compare_models, logit_loss, relational_loss, student_from_teacher, write_card
from hf_rrd.models.pooling import mean_pool


@dataclass
class Arguments:
    """All that the command line may change."""

    teacher_model_name_or_path: str = field(metadata={"help": "Hub name or folder of a classifier."})
    train_file: str = field(metadata={"help": "A csv, json or parquet file with texts and labels."})
    validation_file: str = field(metadata={"help": "The same, to evaluate on."})
    output_dir: str = field(metadata={"help": "Where the student goes."})
    student_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A pretrained student with the teacher's tokenizer."}
    )
    student_num_layers: int | None = field(
        default=None, metadata={"help": "Without one: a student with so many of the teacher's layers. Unset: all."}
    )
    text_column_name: str = field(default="text", metadata={"help": "The column with the texts."})
    label_column_name: str = field(default="label", metadata={"help": "The column with the labels."})
    max_length: int = field(default=64, metadata={"help": "Tokens of a text, at most."})
    num_train_epochs: int = field(default=2, metadata={"help": "Passes over the training file."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many only, drawn at random."})
    batch_size: int = field(default=32, metadata={"help": "Examples of one step on one device."})
    learning_rate: float = field(default=1e-4, metadata={"help": "After a warm-up of a tenth of the steps."})
    relational_weight: float = field(default=10.0, metadata={"help": "Weight of the relational loss."})
    kd_weight: float = field(default=0.0, metadata={"help": "Weight of distillation on logits; 0 leaves it out."})
    bank_size: int = field(default=4096, metadata={"help": "Teacher embeddings to compare with."})
    seed: int = field(default=0, metadata={"help": "Of new weights and of the order of batches."})
    push_to_hub: bool = field(default=False, metadata={"help": "Push student, tokenizer and card at the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Their name there. Default: the folder's."})
    report: bool = field(default=False, metadata={"help": "Compare student and teacher at the end, and write a card."})
    card_dataset: str | None = field(default=None, metadata={"help": "For the card: the Hub name of files' data set."})
    card_teacher: str | None = field(default=None, metadata={"help": "For the card: what to call the teacher."})


def parse() -> Arguments:
    """Flags, or one YAML or JSON file."""
    parser = HfArgumentParser(Arguments)
    read = {".yaml": parser.parse_yaml_file, ".yml": parser.parse_yaml_file, ".json": parser.parse_json_file}
    given = read.get(Path(sys.argv[-1]).suffix) if len(sys.argv) == 2 else None
    return (given(sys.argv[1]) if given else parser.parse_args_into_dataclasses())[0]


def embed_and_classify(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of the last hidden states, (batch, width), and the logits, (batch, classes)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    outputs = model(**inputs, output_hidden_states=True)
    return mean_pool(BaseModelOutput(outputs.hidden_states[-1]), batch["attention_mask"]), outputs.logits


def describe(args: Arguments, student: Any, teacher: Any, tokenizer: Any, rows: Any, collate: Any) -> None:
    """Compare with the teacher, write the card of the facts, push if asked. In a Trainer's run this is one call."""
    report = compare_models(student, teacher, rows, collate)
    Console().print(report.table())
    report.save(args.output_dir)
    write_card(
        args.output_dir,
        student,
        teacher=teacher,
        teacher_name=args.card_teacher,
        dataset=args.card_dataset,
        settings={"task_weight": 1.0}
        | {name: getattr(args, name) for name in ("relational_weight", "kd_weight", "bank_size")},
        training={"epochs": args.num_train_epochs, "learning_rate": args.learning_rate, "seed": args.seed},
        report=report,
        processing_class=tokenizer,
        repository=args.hub_model_id,
    )
    if args.push_to_hub:
        repository = create_repo(args.hub_model_id or Path(args.output_dir).name, exist_ok=True).repo_id
        files = ["README.md", "figures/*", "*.safetensors", "config.json", "token*", "vocab*", "special_tokens*"]
        upload_folder(repo_id=repository, folder_path=args.output_dir, allow_patterns=files)


def main() -> None:
    """Load, build, train, evaluate, print."""
    args = parse()
    accelerator = Accelerator()
    set_seed(args.seed)

    teacher = AutoModelForSequenceClassification.from_pretrained(args.teacher_model_name_or_path)
    teacher = teacher.requires_grad_(False).eval().to(accelerator.device)
    tokenizer = AutoTokenizer.from_pretrained(args.teacher_model_name_or_path)

    kind = Path(args.train_file).suffix.removeprefix(".").replace("jsonl", "json")
    with accelerator.main_process_first():
        data = load_dataset(kind, data_files={"train": args.train_file, "validation": args.validation_file})
    train, limit = data["train"], args.max_train_samples
    train = train.shuffle(seed=0).select(range(limit)) if limit and limit < len(train) else train

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = [example[args.text_column_name] for example in examples]
        batch = tokenizer(texts, truncation=True, max_length=args.max_length, padding=True, return_tensors="pt")
        return dict(batch) | {"labels": torch.tensor([example[args.label_column_name] for example in examples])}

    train_loader = DataLoader(train, args.batch_size, shuffle=True, collate_fn=collate)
    validation_loader = DataLoader(data["validation"], args.batch_size, collate_fn=collate)

    if args.student_model_name_or_path:
        student = AutoModelForSequenceClassification.from_pretrained(
            args.student_model_name_or_path, num_labels=teacher.config.num_labels, ignore_mismatched_sizes=True
        )
    else:
        student = student_from_teacher(teacher, num_hidden_layers=args.student_num_layers)
    # Into the teacher's width; it is trained with the student, and then thrown away.
    project = torch.nn.Linear(student.config.hidden_size, teacher.config.hidden_size)
    optimizer = torch.optim.AdamW([*student.parameters(), *project.parameters()], lr=args.learning_rate)
    student, project, optimizer, train_loader, validation_loader = accelerator.prepare(
        student, project, optimizer, train_loader, validation_loader
    )
    steps = args.num_train_epochs * len(train_loader)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)

    # Teacher embeddings to compare with from the first step on.
    bank = FeatureBank(args.bank_size, teacher.config.hidden_size, device=accelerator.device)
    for batch in train_loader:
        with torch.no_grad():
            rows = F.normalize(embed_and_classify(teacher, batch)[0], dim=-1)
        bank.enqueue(accelerator.gather(rows))  # the loader gives all processes as many examples
        if len(bank) == bank.size:
            break

    for epoch in range(args.num_train_epochs):
        student.train()
        total = 0.0
        for batch in train_loader:
            with torch.no_grad():
                embedding, teacher_logits = embed_and_classify(teacher, batch)
                teacher_rows = F.normalize(embedding, dim=-1)  # (batch, width)
            embedding, logits = embed_and_classify(student, batch)
            student_rows = F.normalize(project(embedding), dim=-1)  # (batch, width)
            loss = F.cross_entropy(logits, batch["labels"])
            loss = loss + args.relational_weight * relational_loss(
                student_rows, teacher_rows, bank.filled, include_own=True
            )
            if args.kd_weight > 0:
                loss = loss + args.kd_weight * logit_loss(logits, teacher_logits)
            bank.enqueue(accelerator.gather(teacher_rows))
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        accelerator.print(f"epoch {epoch + 1}: loss {total / len(train_loader):.3f} in {len(train_loader)} steps")

    # Evaluate, save, print.
    student.eval()
    right: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    for batch in validation_loader:
        for name, model in (("student", student), ("teacher", teacher)):
            with torch.no_grad():
                found = embed_and_classify(model, batch)[1].argmax(-1) == batch["labels"]  # (batch,)
            right[name].append(accelerator.gather_for_metrics(found))
    accuracy = {name: torch.cat(parts).float().mean().item() for name, parts in right.items()}
    if accelerator.is_main_process:
        accelerator.unwrap_model(student).save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        Path(args.output_dir, "results.json").write_text(json.dumps(accuracy, indent=2))
    accelerator.print(
        f"accuracy: student {100 * accuracy['student']:.1f} %, teacher {100 * accuracy['teacher']:.1f} %"
    )
    if accelerator.is_main_process and (args.report or args.push_to_hub):
        describe(args, accelerator.unwrap_model(student), teacher, tokenizer, data["validation"], collate)
    accelerator.wait_for_everyone()  # torch 2.13 may hang where the group ends right after a gather
    accelerator.end_training()


if __name__ == "__main__":
    main()
