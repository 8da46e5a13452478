"""Distil an image classifier: its labels, and the relations that a bigger one sees between images.

    python examples/image_classification.py \
        --train_file data/cifar10/train.parquet --test_file data/cifar10/test.parquet --image_column_name img \
        --teacher_model_name_or_path out/compare/cifar10/teacher \
        --student_config_name vit --student_config_overrides \
        "patch_size=8,hidden_size=128,num_hidden_layers=4,num_attention_heads=4,intermediate_size=256" \
        --output_dir out/image_classification --num_train_epochs 5 --per_device_train_batch_size 64 \
        --learning_rate 1e-3 --warmup_steps 200 --save_strategy no --max_train_samples 10000 --max_eval_samples 2000

The student is pretrained (`--student_model_name_or_path`), or new (`--student_config_name`), or has some of the
teacher's layers (`--student_num_layers`). Every field of `RelationalDistillationConfig` is a flag, too. Flags may come
from a YAML or JSON file, too (`--config file.yaml`); those beside it win. `accelerate launch` instead of `python` runs
it on several devices.

Needs `pip install 'hf_rrd[demo]'`.
"""

import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import ClassLabel, DatasetDict, Image, load_dataset
from PIL import ImageOps
from rich.console import Console
from rich.table import Table
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    Trainer,
    set_seed,
)

from hf_rrd import (
    RelationalDistillationConfig,
    RelationalDistillationTrainer,
    cache_teacher_outputs,
    student_from_teacher,
    with_views,
)
from hf_rrd.models.logits import class_order
from hf_rrd.results.measure import size_of
from hf_rrd.training.arguments import parse_arguments


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
    """The images and their labels: a data set on the Hub or in a folder, or files."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or folder of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which of its configurations."})
    train_file: str | None = field(default=None, metadata={"help": "A parquet, csv or json file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on at the end."})
    image_column_name: str = field(default="image", metadata={"help": "The column with the images or their paths."})
    label_column_name: str = field(
        default="label", metadata={"help": "The column with the labels, of any kind; some may be empty."}
    )
    smallest_crop: float = field(default=0.5, metadata={"help": "Share of an image's area that a crop keeps; 1: all."})
    cached_views: int = field(
        default=0,
        metadata={"help": "Run the teacher once, on so many views of each image; 0: in every step, on new ones."},
    )
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
    if absent := {args.image_column_name, args.label_column_name} - set(columns):
        raise SystemExit(
            f"No column {sorted(absent)} among {columns}: set --image_column_name and --label_column_name."
        )
    return data.cast_column(args.image_column_name, Image())


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


def random_view(image: Any, smallest: float, seed: int | None = None) -> Any:
    """A random part of a PIL image, of at least this share of its area, mirrored half of the time."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    share, shape, left, top, side = torch.rand(5, generator=generator).tolist()
    area = image.width * image.height * (smallest + share * (1 - smallest))
    ratio = (3 / 4) ** (1 - 2 * shape)  # of width to height, from 3/4 to 4/3
    width, height = min(image.width, round((area * ratio) ** 0.5)), min(image.height, round((area / ratio) ** 0.5))
    left, top = round(left * (image.width - width)), round(top * (image.height - height))
    image = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(image) if side < 0.5 else image


def see(
    batch: dict[str, list[Any]], args: DataArguments, ids: dict[Any, int], processors: dict[str, Any], training: bool
) -> dict[str, Any]:
    """What the models read of a batch; student and teacher see the same views, each in its own size and colours."""
    images = [image.convert("RGB") for image in batch[args.image_column_name]]
    if training and args.smallest_crop < 1:
        seeds = batch.get("view_seed", [None] * len(images))
        images = [random_view(image, args.smallest_crop, seed) for image, seed in zip(images, seeds, strict=True)]
    columns = {column: one(images, return_tensors="pt")["pixel_values"] for column, one in processors.items()}
    return columns | {"labels": [ids[value] for value in batch[args.label_column_name]]}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share that is right, of those with a label."""
    labels = prediction.label_ids
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == labels)[labels != -100].mean())}


def main() -> None:
    """Load, build, train, evaluate, print."""
    model_args, data_args, args = parse_arguments(ModelArguments, DataArguments, RelationalDistillationConfig)
    set_seed(args.seed)
    teacher_name = model_args.teacher_model_name_or_path

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

    # The teacher; of its weights, those that its files lack are new, such as the head for other labels.
    teacher, loading = AutoModelForImageClassification.from_pretrained(
        teacher_name, **labels, ignore_mismatched_sizes=True, output_loading_info=True
    )
    has_head = not (loading["missing_keys"] or loading["mismatched_keys"])
    asked = args.kd_weight not in (0, "auto")
    if asked and not has_head:
        raise SystemExit(f"--kd_weight needs a teacher of the labels {list(label2id)}: {teacher_name} is of others.")
    if not has_head:  # a new one has these names, too
        args.kd_weight = 0.0
    if asked:  # the names above have replaced its own
        class_order(sorted(label2id, key=lambda name: label2id[name]), sorted(known, key=lambda name: known[name]))
    teacher_processor = AutoImageProcessor.from_pretrained(teacher_name)
    processor = AutoImageProcessor.from_pretrained(model_args.student_model_name_or_path or teacher_name)

    # The student: pretrained, new, or a part of the teacher.
    overrides = yaml.safe_load(f"{{{model_args.student_config_overrides.replace('=', ': ')}}}")  # YAML knows numbers
    if model_args.student_model_name_or_path:
        student = AutoModelForImageClassification.from_pretrained(
            model_args.student_model_name_or_path, **labels, ignore_mismatched_sizes=True
        )
    elif model_args.student_config_name:
        name = model_args.student_config_name
        pixels = see(data["train"][:1], data_args, ids, {"pixel_values": processor}, training=False)["pixel_values"]
        settings = {"image_size": pixels.shape[-1]} | labels | overrides
        config = (AutoConfig.for_model if name in CONFIG_MAPPING else AutoConfig.from_pretrained)(name, **settings)
        if unknown := [field for field in overrides if not hasattr(type(config)(), field)]:
            raise SystemExit(f"--student_config_overrides: a {type(config).__name__} has no {unknown}.")
        student = AutoModelForImageClassification.from_config(config)
    else:
        student = student_from_teacher(teacher, num_hidden_layers=model_args.student_num_layers, **overrides)

    # What they read, made of the images as they are drawn.
    args.remove_unused_columns = False
    processors = {"pixel_values": processor}
    if processor.to_dict() != teacher_processor.to_dict():
        processors["teacher_pixel_values"] = teacher_processor
    look = partial(see, args=data_args, ids=ids, processors=processors)
    train, count = data["train"], data_args.cached_views
    if count:
        train = with_views(train, count)
        args.num_train_epochs /= count  # an epoch is that many passes now
    train = train.with_transform(partial(look, training=True))
    views = {split: data[split].with_transform(partial(look, training=False)) for split in evaluated}

    # The teacher's outputs, if they are to be computed once.
    if count:
        how = {"pooling": args.teacher_pooling, "with_logits": args.kd_weight != 0}
        cache = partial(cache_teacher_outputs, teacher=teacher, batch_size=args.per_device_eval_batch_size, **how)
        train, views = cache(train), {split: cache(views[split]) for split in evaluated}

    # Train.
    trainer = RelationalDistillationTrainer(
        model=student,
        args=args,
        train_dataset=train,
        eval_dataset=views[evaluated[0]] if evaluated else None,
        processing_class=processor,
        compute_metrics=accuracy,
        teacher=None if count else teacher,
        teacher_processing_class=teacher_processor,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()

    # Evaluate, print; without the teacher where it is sharded.
    table = Table("", "parameters", *evaluated, title="Accuracy")
    rows = {"student": (trainer, views)}
    if has_head and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        look = partial(look, processors={"pixel_values": teacher_processor}, training=False)
        teacher_args = replace(args, report_to="none", push_to_hub=False)
        teacher_views = {split: data[split].with_transform(look) for split in evaluated}
        rows["teacher"] = (Trainer(teacher, teacher_args, compute_metrics=accuracy), teacher_views)
    for name, (run, splits) in rows.items():
        metrics = {split: run.evaluate(splits[split], metric_key_prefix=split) for split in evaluated}
        for split in evaluated if run is trainer else ():
            run.save_metrics(split, metrics[split])
        shares = [f"{100 * metrics[split][f'{split}_accuracy']:.1f} %" for split in evaluated]
        table.add_row(name, f"{size_of(run.model)['parameters']:,}", *shares)
    if trainer.is_world_process_zero():
        Console().print(table)

    # Describe the student, and push it if asked.
    report = trainer.report(views[evaluated[-1]], teacher) if data_args.report and evaluated else None
    if report is not None:
        Console().print(report.table())
    card = {"dataset_tags": data_args.dataset_name or data_args.card_dataset, "teacher_name": model_args.card_teacher}
    card |= {"baseline": json.loads(data_args.card_baseline or "{}")}
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
