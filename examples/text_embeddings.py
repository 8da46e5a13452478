"""Distil an embedding model without labels: the student learns the relations that its teacher sees between sentences.

    python examples/text_embeddings.py \
        --train_file data/sst2/train.csv --validation_file data/sst2/test.csv --text_column_name sentence \
        --label_column_name label --max_length 64 \
        --teacher_model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --student_num_layers 2 \
        --output_dir out/text_embeddings --num_train_epochs 3 --per_device_train_batch_size 64 --learning_rate 2e-4 \
        --student_projection none --warmup_steps 50 --save_strategy no

Evaluated are the teacher, the student before and the student after, on the held-out sentences: retrieval (how often
the sentence nearest by the teacher is among the student's 10 nearest), and, where `--label_column_name` is given, a
linear probe and k-NN, which learn labels from frozen embeddings. Labels have no part in the training.

`--student_projection none` trains the very embedding that is saved, and needs student and teacher to be of one width:
for a narrower student add `--teacher_projection pca --projection_dim` with its width. The student is pretrained
(`--student_model_name_or_path`), or new (`--student_config_name`), or has some of the teacher's layers
(`--student_num_layers`). Every field of `RelationalDistillationConfig` is a flag, too. Instead of flags one YAML or
JSON file will do, and `accelerate launch` instead of `python` where there are several devices.

Needs `pip install 'hf_rrd[demo]'`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from datasets import DatasetDict, load_dataset
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoTokenizer, HfArgumentParser, set_seed

from hf_rrd import (
    RelationalDistillationConfig,
    RelationalDistillationTrainer,
    cache_teacher_outputs,
    embed,
    student_from_teacher,
)


@dataclass
class ModelArguments:
    """The teacher, and where the student comes from."""

    teacher_model_name_or_path: str = field(metadata={"help": "Hub name or folder of the teacher."})
    student_model_name_or_path: str | None = field(default=None, metadata={"help": "The same for the student."})
    student_config_name: str | None = field(default=None, metadata={"help": "A new student: model type or config."})
    student_num_layers: int | None = field(default=None, metadata={"help": "Of the teacher's layers. Unset: all."})
    student_config_overrides: str = field(default="", metadata={"help": "Changes to either: 'hidden_size=128'."})
    card_teacher: str | None = field(default=None, metadata={"help": "For the card: what to call the teacher."})


@dataclass
class DataArguments:
    """The sentences: a data set on the Hub or in a folder, or files."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or folder of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which of its configurations."})
    train_file: str | None = field(default=None, metadata={"help": "A csv, json or parquet file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    text_column_name: str = field(default="text", metadata={"help": "The column with the sentences."})
    label_column_name: str | None = field(default=None, metadata={"help": "Labels, to evaluate with."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a sentence, at most."})
    cache_teacher: bool = field(default=False, metadata={"help": "Run the teacher once, before the training."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many only, drawn at random."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many only, drawn at random."})
    report: bool = field(default=False, metadata={"help": "Compare student and teacher at the end, also in speed."})
    card_dataset: str | None = field(default=None, metadata={"help": "For the card: the Hub name of files' data set."})


def parse() -> tuple[ModelArguments, DataArguments, RelationalDistillationConfig]:
    """Flags, or one YAML or JSON file."""
    parser = HfArgumentParser((ModelArguments, DataArguments, RelationalDistillationConfig))
    read = {".yaml": parser.parse_yaml_file, ".yml": parser.parse_yaml_file, ".json": parser.parse_json_file}
    given = read.get(Path(sys.argv[-1]).suffix) if len(sys.argv) == 2 else None
    return given(sys.argv[1]) if given else parser.parse_args_into_dataclasses()


def load(args: DataArguments) -> DatasetDict:
    """The sentences to train on and those to evaluate on, cut to size."""
    if args.dataset_name:
        data = load_dataset(args.dataset_name, args.dataset_config_name)
    elif args.train_file and args.validation_file:
        kind = Path(args.train_file).suffix.removeprefix(".").replace("jsonl", "json")
        data = load_dataset(kind, data_files={"train": args.train_file, "validation": args.validation_file})
    else:
        raise SystemExit("Give --dataset_name, or --train_file and --validation_file.")
    columns = data["train"].column_names
    if absent := {args.text_column_name, args.label_column_name or args.text_column_name} - set(columns):
        raise SystemExit(
            f"No column {sorted(absent)} among {columns}: set --text_column_name and --label_column_name."
        )
    splits = {"train": data["train"], "validation": data["validation" if "validation" in data else "test"]}
    for split, rows in splits.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        splits[split] = rows.shuffle(seed=0).select(range(limit)) if limit and limit < len(rows) else rows
    return DatasetDict(splits)


@torch.no_grad()
def encode_texts(model: Any, tokenizer: Any, texts: list[str], pooling: str, max_length: int) -> torch.Tensor:
    """Unit embeddings of texts, (texts, width), on the CPU."""
    model.eval()
    parts = []
    for start in range(0, len(texts), 64):
        batch = texts[start : start + 64]
        inputs = tokenizer(batch, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        parts.append(F.normalize(embed(model, inputs.to(model.device), pooling), dim=-1).float().cpu())
    return torch.cat(parts)


def measure(rows: dict[str, torch.Tensor], teacher: torch.Tensor, labels: dict[str, list[Any]]) -> dict[str, float]:
    """Retrieval, and with labels a linear probe and k-NN, as shares from 0 to 1.

    Args:
        rows: Embeddings of the `train` and the `validation` sentences, (sentences, width).
        teacher: The teacher's of the validation sentences.
        labels: Of both, or empty.
    """
    similarity, wanted = (each @ each.T for each in (rows["validation"], teacher))  # (sentences, sentences)
    nearest = wanted.fill_diagonal_(-2).argmax(1)  # (sentences,)
    found = similarity.fill_diagonal_(-2).topk(min(10, len(similarity) - 1)).indices  # (sentences, 10)
    results = {"retrieval": (found == nearest.unsqueeze(1)).any(1).float().mean().item()}
    probes = {"linear_probe": LogisticRegression(max_iter=1000), "knn": KNeighborsClassifier(10, metric="cosine")}
    for name, probe in probes.items() if labels else ():
        probe.fit(rows["train"].numpy(), labels["train"])
        results[name] = float(probe.score(rows["validation"].numpy(), labels["validation"]))
    return results


def main() -> None:
    """Load, build, train, evaluate, print."""
    model_args, data_args, args = parse()
    args.task_weight = 0.0  # no labels, no task
    set_seed(args.seed)
    with args.main_process_first():
        data = load(data_args)
    texts = {split: data[split][:][data_args.text_column_name] for split in data}
    column = data_args.label_column_name
    labels = {split: data[split][:][column] for split in data} if column else {}

    # The teacher, and the student.
    teacher_name, student_name = model_args.teacher_model_name_or_path, model_args.student_model_name_or_path
    teacher = AutoModel.from_pretrained(teacher_name)
    teacher_tokenizer = AutoTokenizer.from_pretrained(teacher_name)
    tokenizer = AutoTokenizer.from_pretrained(student_name or teacher_name)
    overrides = yaml.safe_load(f"{{{model_args.student_config_overrides.replace('=', ': ')}}}")  # YAML knows numbers
    if student_name:
        student = AutoModel.from_pretrained(student_name)
    elif model_args.student_config_name:
        name = model_args.student_config_name
        settings = {"vocab_size": teacher.config.vocab_size, "pad_token_id": tokenizer.pad_token_id} | overrides
        config = (AutoConfig.for_model if name in CONFIG_MAPPING else AutoConfig.from_pretrained)(name, **settings)
        if unknown := [field for field in overrides if not hasattr(type(config)(), field)]:
            raise SystemExit(f"--student_config_overrides: a {type(config).__name__} has no {unknown}.")
        student = AutoModel.from_config(config)
    else:
        student = student_from_teacher(teacher, num_hidden_layers=model_args.student_num_layers, **overrides)

    # What each of them reads: the teacher has columns of its own only where its tokenizer is another.
    sample = texts["train"][:100]
    shared = tokenizer.get_vocab() == teacher_tokenizer.get_vocab() and tokenizer(sample) == teacher_tokenizer(sample)

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        sentences, cut = batch[data_args.text_column_name], {"truncation": True, "max_length": data_args.max_length}
        own = {} if shared else teacher_tokenizer(sentences, **cut)
        return dict(tokenizer(sentences, **cut)) | {f"teacher_{name}": values for name, values in own.items()}

    with args.main_process_first():
        data = data.map(encode, batched=True, remove_columns=data["train"].column_names)

    # Embeddings of the student as it starts; in this part of the work the main process is alone.
    def embeddings(model: Any, its_tokenizer: Any, pooling: str) -> dict[str, torch.Tensor]:
        return {
            split: encode_texts(model, its_tokenizer, texts[split], pooling, data_args.max_length) for split in texts
        }

    rows = {}
    if args.process_index == 0:
        rows["teacher"] = embeddings(teacher.to(args.device), teacher_tokenizer, args.teacher_pooling)
        rows["student before"] = embeddings(student.to(args.device), tokenizer, args.student_pooling)

    if data_args.cache_teacher:
        data = cache_teacher_outputs(
            data,
            teacher,
            args.per_device_eval_batch_size,
            processing_class=teacher_tokenizer,
            pooling=args.teacher_pooling,
            with_logits=False,
        )
    trainer = RelationalDistillationTrainer(
        model=student,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        teacher=None if data_args.cache_teacher else teacher,
        teacher_processing_class=teacher_tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = trainer.evaluate()

    # Evaluate the student as it was saved, without the projection into the teacher's width; print.
    if trainer.is_world_process_zero():
        saved = AutoModel.from_pretrained(args.output_dir).to(args.device)
        rows["student after"] = embeddings(saved, tokenizer, args.student_pooling)
        results = {name: measure(rows[name], rows["teacher"]["validation"], labels) for name in rows}
        table = Table("", "parameters", *results["teacher"], title=f"{len(texts['validation'])} sentences")
        for (name, shares), model in zip(results.items(), (teacher, saved, saved), strict=True):
            table.add_row(name, f"{model.num_parameters():,}", *(f"{100 * share:.1f} %" for share in shares.values()))
        Console().print(table)
        metrics |= {f"eval_{name}": share for name, share in results["student after"].items()}
        trainer.log(metrics)
    trainer.save_metrics("eval", metrics)

    # Describe the student, and push it if asked.
    report = trainer.report(teacher=teacher) if data_args.report else None
    if report is not None:
        Console().print(report.table())
    card = {"dataset_tags": data_args.dataset_name or data_args.card_dataset, "teacher_name": model_args.card_teacher}
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
