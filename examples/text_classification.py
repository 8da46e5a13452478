"""Distil a text classifier: its labels, and the relations that a bigger one sees between texts.

    python examples/text_classification.py \
        --train_file data/sst2/train.csv --validation_file data/sst2/validation.csv --test_file data/sst2/test.csv \
        --text_column_name sentence --max_length 64 \
        --teacher_model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --teacher_epochs 1 \
        --student_config_name bert --student_config_overrides \
        "hidden_size=128,num_hidden_layers=2,num_attention_heads=2,intermediate_size=512" \
        --output_dir out/text_classification --num_train_epochs 4 --per_device_train_batch_size 32 \
        --learning_rate 5e-4 --warmup_steps 100 --kd_weight 1 --eval_strategy epoch --save_strategy no

The teacher is fine-tuned first for `--teacher_epochs`, and kept in `teacher` under the output folder: a second run
takes it from there. The student is pretrained (`--student_model_name_or_path`), or new (`--student_config_name`), or
has some of the teacher's layers (`--student_num_layers`). A text whose label is empty teaches through the teacher
alone, so give all that you have. Every field of `RelationalDistillationConfig` is a flag, too:
`--train_sampling_strategy group_by_length` (in transformers 5.0 `--group_by_length`) takes this command from 8.5 to 5
minutes on two cores. Flags may come from a YAML or JSON file, too (`--config file.yaml`); those beside it win.
`accelerate launch` instead of `python` runs it on several devices.

Needs `pip install 'hf_rrd[demo]'`.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import ClassLabel, DatasetDict, load_dataset
from rich.console import Console
from rich.table import Table
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    Trainer,
    set_seed,
)

from hf_rrd import (
    RelationalDistillationConfig,
    RelationalDistillationTrainer,
    cache_teacher_outputs,
    student_from_teacher,
)
from hf_rrd.models.logits import class_order
from hf_rrd.results.measure import size_of
from hf_rrd.training.arguments import parse_arguments


@dataclass
class ModelArguments:
    """The teacher, and where the student comes from."""

    teacher_model_name_or_path: str = field(metadata={"help": "Hub name or folder of the teacher."})
    teacher_epochs: float = field(default=0, metadata={"help": "Fine-tune the teacher first, for so many epochs."})
    student_model_name_or_path: str | None = field(default=None, metadata={"help": "The same for the student."})
    student_config_name: str | None = field(default=None, metadata={"help": "A new student: model type or config."})
    student_num_layers: int | None = field(default=None, metadata={"help": "Of the teacher's layers. Unset: all."})
    student_config_overrides: str = field(default="", metadata={"help": "Changes to either: 'hidden_size=128'."})
    card_teacher: str | None = field(default=None, metadata={"help": "For the card: what to call the teacher."})


@dataclass
class DataArguments:
    """The texts and their labels: a data set on the Hub or in a folder, or files."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or folder of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which of its configurations."})
    train_file: str | None = field(default=None, metadata={"help": "A csv, json or parquet file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on once at the end."})
    text_column_name: str = field(default="text", metadata={"help": "The column with the texts."})
    label_column_name: str = field(
        default="label", metadata={"help": "The column with the labels, of any kind; some may be empty."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens of a text, at most."})
    cache_teacher: bool = field(default=False, metadata={"help": "Run the teacher once, before the training."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many only, drawn at random."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many only, drawn at random."})
    report: bool = field(default=False, metadata={"help": "Compare student and teacher at the end, also in speed."})
    card_baseline: str | None = field(
        default=None, metadata={"help": "For the card: the same without distillation, '{\"accuracy\": 0.8}'."}
    )
    card_dataset: str | None = field(default=None, metadata={"help": "For the card: the Hub name of files' data set."})


def load(args: DataArguments) -> DatasetDict:
    """The splits."""
    if (args.dataset_name is None) == (args.train_file is None):
        raise SystemExit("Give either --dataset_name or --train_file.")
    if args.dataset_name:
        data = load_dataset(args.dataset_name, args.dataset_config_name)
    else:
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        kind = Path(args.train_file).suffix.removeprefix(".").replace("jsonl", "json")
        data = load_dataset(kind, data_files={split: file for split, file in files.items() if file})
    columns = data["train"].column_names
    if absent := {args.text_column_name, args.label_column_name} - set(columns):
        raise SystemExit(
            f"No column {sorted(absent)} among {columns}: set --text_column_name and --label_column_name."
        )
    return data


def label_ids(data: DatasetDict, column: str, known: dict[str, int]) -> tuple[dict[str, int], dict[Any, int]]:
    """Ids of the labels by name, the teacher's own if it knows just these; and by their value in the data."""
    feature = data["train"].features[column]
    found = [value for value in data["train"].unique(column) if value is not None]
    values = range(feature.num_classes) if isinstance(feature, ClassLabel) else sorted(found)
    of_floats = feature.dtype.startswith("float")  # whole numbers in a file with empty cells
    names = feature.names if isinstance(feature, ClassLabel) else [f"{v:g}" if of_floats else str(v) for v in values]
    lower = {name.lower(): number for name, number in known.items()}
    same = lower.keys() == {name.lower() for name in names} and len(lower) == len(names)
    label2id = {name: lower[name.lower()] if same else number for number, name in enumerate(names)}
    return label2id, {value: label2id[name] for value, name in zip(values, names, strict=True)} | {None: -100}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share that is right, of those with a label."""
    labels = prediction.label_ids
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == labels)[labels != -100].mean())}


def main() -> None:
    """Load, build, train, evaluate, print."""
    model_args, data_args, args = parse_arguments(ModelArguments, DataArguments, RelationalDistillationConfig)
    set_seed(args.seed)

    # A teacher that an earlier run has fine-tuned is there to its end when its last file is.
    teacher_name, teacher_folder = model_args.teacher_model_name_or_path, Path(args.output_dir, "teacher")
    fine_tune = model_args.teacher_epochs > 0
    if fine_tune and (teacher_folder / "training_args.bin").exists():
        teacher_name, fine_tune = str(teacher_folder), False

    # The data, with labels as the teacher numbers them. Test sets on the Hub may hide theirs, as -1.
    with args.main_process_first():
        data = load(data_args)
    known = AutoConfig.from_pretrained(teacher_name).label2id
    label2id, ids = label_ids(data, data_args.label_column_name, known)
    labels = {"label2id": label2id, "id2label": {number: name for name, number in label2id.items()}}
    unknown = {split: set(data[split].unique(data_args.label_column_name)) - set(ids) for split in data}
    evaluated = [split for split in ("validation", "test") if split in data and unknown[split] != {-1}]
    data = DatasetDict({split: data[split] for split in ("train", *evaluated)})
    for split, rows in data.items():
        limit = data_args.max_train_samples if split == "train" else data_args.max_eval_samples
        data[split] = rows.shuffle(seed=0).select(range(limit)) if limit and limit < len(rows) else rows

    # The teacher; of its weights, those that its files lack are new, such as the head of an embedding model.
    teacher, loading = AutoModelForSequenceClassification.from_pretrained(
        teacher_name, **labels, ignore_mismatched_sizes=True, output_loading_info=True
    )
    has_head = fine_tune or not (loading["missing_keys"] or loading["mismatched_keys"])
    asked = args.kd_weight not in (0, "auto")
    if asked and not has_head:
        raise SystemExit(f"--kd_weight needs a teacher of the labels {list(label2id)}: try --teacher_epochs 2.")
    if not has_head:  # a new one has these names, too
        args.kd_weight = 0.0
    if asked and not fine_tune:  # the names above have replaced its own
        class_order(sorted(label2id, key=lambda name: label2id[name]), sorted(known, key=lambda name: known[name]))
    teacher_tokenizer = AutoTokenizer.from_pretrained(teacher_name)
    tokenizer = AutoTokenizer.from_pretrained(model_args.student_model_name_or_path or teacher_name)

    # What they read: the teacher has columns of its own only where its tokenizer is another.
    sample = data["train"][:100][data_args.text_column_name]
    shared = tokenizer.get_vocab() == teacher_tokenizer.get_vocab() and tokenizer(sample) == teacher_tokenizer(sample)

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts, cut = batch[data_args.text_column_name], {"truncation": True, "max_length": data_args.max_length}
        own = {} if shared else teacher_tokenizer(texts, **cut)
        columns = dict(tokenizer(texts, **cut)) | {f"teacher_{name}": values for name, values in own.items()}
        return columns | {"labels": [ids[value] for value in batch[data_args.label_column_name]]}

    with args.main_process_first():
        data = data.map(encode, batched=True, remove_columns=data["train"].column_names)
    own = {name: name.removeprefix("teacher_") for name in data["train"].column_names if name.startswith("teacher_")}
    teacher_data = data.select_columns([*own, "labels"]).rename_columns(own) if own else data

    # Train the teacher, if it is to be.
    teacher_args = {"num_train_epochs": model_args.teacher_epochs, "max_steps": -1, "learning_rate": 5e-5}
    without = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "push_to_hub": False}

    def trainer_of_teacher() -> Trainer:
        return Trainer(
            teacher,
            replace(args, output_dir=str(teacher_folder), report_to="none", **teacher_args, **without),
            train_dataset=teacher_data["train"].filter(lambda row: row["labels"] != -100),
            processing_class=teacher_tokenizer,
            compute_metrics=accuracy,
        )

    if fine_tune:
        if args.deepspeed_plugin is not None or args.fsdp:
            raise SystemExit("--teacher_epochs: a process has one sharded training. Fine-tune the teacher on its own.")
        teacher_trainer = trainer_of_teacher()
        teacher_trainer.train()
        teacher_trainer.save_model()

    # The student: pretrained, new, or a part of the teacher; seeded as if that had not been trained just now.
    set_seed(args.seed)
    overrides = yaml.safe_load(f"{{{model_args.student_config_overrides.replace('=', ': ')}}}")  # YAML knows numbers
    if model_args.student_model_name_or_path:
        student = AutoModelForSequenceClassification.from_pretrained(
            model_args.student_model_name_or_path, **labels, ignore_mismatched_sizes=True
        )
    elif model_args.student_config_name:
        name, vocabulary = model_args.student_config_name, teacher.config.vocab_size
        settings = {"vocab_size": vocabulary, "pad_token_id": tokenizer.pad_token_id} | labels | overrides
        config = (AutoConfig.for_model if name in CONFIG_MAPPING else AutoConfig.from_pretrained)(name, **settings)
        if unknown := [field for field in overrides if not hasattr(type(config)(), field)]:
            raise SystemExit(f"--student_config_overrides: a {type(config).__name__} has no {unknown}.")
        student = AutoModelForSequenceClassification.from_config(config)
    else:
        student = student_from_teacher(teacher, num_hidden_layers=model_args.student_num_layers, **overrides)

    # Train the student, from the teacher's outputs if they are to be computed once.
    if data_args.cache_teacher:
        data = cache_teacher_outputs(
            data,
            teacher,
            args.per_device_eval_batch_size,
            processing_class=teacher_tokenizer,
            pooling=args.teacher_pooling,
            with_logits=args.kd_weight != 0,
        )
    trainer = RelationalDistillationTrainer(
        model=student,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data[evaluated[0]] if evaluated else None,
        processing_class=tokenizer,
        compute_metrics=accuracy,
        teacher=None if data_args.cache_teacher else teacher,
        teacher_processing_class=teacher_tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()

    # Evaluate, print; without the teacher where it is sharded.
    table = Table("", "parameters", *evaluated, title="Accuracy")
    rows = {"student": (trainer, data)}
    if has_head and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        rows["teacher"] = (trainer_of_teacher(), teacher_data)
    for name, (run, splits) in rows.items():
        metrics = {split: run.evaluate(splits[split], metric_key_prefix=split) for split in evaluated}
        for split in evaluated:
            run.save_metrics(split, metrics[split])
        shares = [f"{100 * metrics[split][f'{split}_accuracy']:.1f} %" for split in evaluated]
        table.add_row(name, f"{size_of(run.model)['parameters']:,}", *shares)
    if trainer.is_world_process_zero():
        Console().print(table)

    # Describe the student, and push it if asked.
    report = trainer.report(data[evaluated[-1]], teacher) if data_args.report and evaluated else None
    if report is not None:
        Console().print(report.table())
    teacher_name, epochs = model_args.card_teacher, model_args.teacher_epochs
    if teacher_name is None and epochs > 0:
        name = Path(model_args.teacher_model_name_or_path)
        teacher_name = f"{name.name if name.exists() else name}, fine-tuned on the same data for {epochs:g} epochs"
    card = {"dataset_tags": data_args.dataset_name or data_args.card_dataset, "teacher_name": teacher_name}
    card |= {"baseline": json.loads(data_args.card_baseline or "{}")}
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
