"""Distil an embedding model of images without labels: the student learns the relations that its teacher sees.

    python examples/image_embeddings.py \
        --train_file data/cifar10/train.parquet --validation_file data/cifar10/test.parquet --image_column_name img \
        --label_column_name label --teacher_model_name_or_path out/compare/cifar10/teacher \
        --student_config_name vit --student_config_overrides \
        "patch_size=8,hidden_size=128,num_hidden_layers=4,num_attention_heads=4,intermediate_size=256" \
        --output_dir out/image_embeddings --num_train_epochs 5 --per_device_train_batch_size 64 --learning_rate 1e-3 \
        --warmup_steps 200 --save_strategy no --max_train_samples 10000 --max_eval_samples 2000

The teacher is a model that sees, such as a ViT, a DINO, a classifier without its head, or one side of CLIP or SigLIP.
The student is pretrained (`--student_model_name_or_path`), or new (`--student_config_name`), or has some of the
teacher's layers (`--student_num_layers`). `--student_format sentence_transformers` keeps its projection into the
teacher's space, and saves it as a model of that library. docs/guides/image_embeddings.md says what is printed. Labels
are there to evaluate with and have no part in the training.

Every field of `RelationalDistillationConfig` is a flag, too. Flags may come from a YAML or JSON file, too (`--config
file.yaml`); those beside it win. `accelerate launch` instead of `python` runs it on several devices.

Needs `pip install 'hf_rrd[demo]'`.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, DatasetDict, Image, load_dataset
from PIL import ImageOps
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPVisionModelWithProjection,
    SiglipVisionModel,
    set_seed,
)

from hf_rrd import (
    RelationalDistillationConfig,
    RelationalDistillationTrainer,
    cache_teacher_outputs,
    embed,
    relational_alignment,
    student_from_teacher,
    with_views,
)
from hf_rrd.training.arguments import parse_arguments

DEFAULTS = {"alignment_examples": 2000}  # of the settings, so that an evaluation has eval_teacher_retrieval
TOWERS = {"clip": CLIPVisionModelWithProjection, "siglip": SiglipVisionModel}  # of models that read texts, too


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
    """The images: a data set on the Hub, a folder of images, or files."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or folder of a data set or images."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which of its configurations."})
    train_file: str | None = field(default=None, metadata={"help": "A parquet, csv or json file to train on."})
    validation_file: str | None = field(
        default=None, metadata={"help": "The same, to evaluate on. Without: a tenth of the training set, held out."}
    )
    image_column_name: str = field(default="image", metadata={"help": "The column with the images or their paths."})
    label_column_name: str | None = field(default=None, metadata={"help": "Labels, to evaluate with."})
    smallest_crop: float = field(default=0.5, metadata={"help": "Share of an image's area that a crop keeps; 1: all."})
    cached_views: int = field(
        default=0,
        metadata={"help": "Run the teacher once, on so many views of each image; 0: in every step, on new ones."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many only, drawn at random."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many only, drawn at random."})
    report: bool = field(default=False, metadata={"help": "Compare student and teacher at the end, also in speed."})
    card_dataset: str | None = field(default=None, metadata={"help": "For the card: the Hub name of files' data set."})


def load(args: DataArguments) -> DatasetDict:
    """The images to train on and those to evaluate on, cut to size."""
    if (args.dataset_name is None) == (args.train_file is None):
        raise SystemExit("Give either --dataset_name or --train_file.")
    if args.dataset_name:
        data = load_dataset(args.dataset_name, args.dataset_config_name)
    else:
        files = {"train": args.train_file, "validation": args.validation_file}
        kind = Path(args.train_file).suffix.removeprefix(".").replace("jsonl", "json")
        data = load_dataset(kind, data_files={split: file for split, file in files.items() if file})
    columns = data["train"].column_names
    if absent := {args.image_column_name, args.label_column_name or args.image_column_name} - set(columns):
        raise SystemExit(
            f"No column {sorted(absent)} among {columns}: set --image_column_name and --label_column_name."
        )
    held_out = next((split for split in ("validation", "test") if split in data), None)
    if held_out is None:
        data, held_out = data["train"].train_test_split(0.1, seed=0), "test"
    splits = {"train": data["train"], "validation": data[held_out]}
    for split, rows in splits.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        splits[split] = rows.shuffle(seed=0).select(range(limit)) if limit and limit < len(rows) else rows
    return DatasetDict(splits).cast_column(args.image_column_name, Image())


def vision_model(name: str) -> Any:
    """A model without a head, or the part of one that sees, with its projection, if it has one."""
    config = AutoConfig.from_pretrained(name)
    projects = "CLIPVisionModelWithProjection" in (config.architectures or ())
    return TOWERS.get("clip" if projects else config.model_type, AutoModel).from_pretrained(name)


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


def see(batch: dict[str, list[Any]], column: str, processors: dict[str, Any], smallest: float = 1) -> dict[str, Any]:
    """What the models read of a batch; student and teacher see the same views, each in its own size and colours."""
    images = [image.convert("RGB") for image in batch[column]]
    if smallest < 1:
        seeds = batch.get("view_seed", [None] * len(images))
        images = [random_view(image, smallest, seed) for image, seed in zip(images, seeds, strict=True)]
    return {name: processor(images, return_tensors="pt")["pixel_values"] for name, processor in processors.items()}


@torch.no_grad()
def encode(model: Any, processor: Any, images: Dataset, column: str, pooling: str) -> torch.Tensor:
    """Embeddings of images, (images, width), on the CPU."""
    parts = []
    for batch in images.select_columns(column).iter(64):
        pixels = see(batch, column, {"pixel_values": processor})["pixel_values"].to(model.device)
        parts.append(embed(model.eval(), {"pixel_values": pixels}, pooling).float().cpu())
    return torch.cat(parts)


def measure(rows: dict[str, torch.Tensor], teacher: torch.Tensor, labels: dict[str, list[Any]]) -> dict[str, float]:
    """Neighbours in common with the teacher, and with labels a linear probe and k-NN, as shares from 0 to 1.

    Args:
        rows: Embeddings of the `validation` images, and with labels of the `train` ones, (images, width).
        teacher: The teacher's of the validation images.
        labels: Of both, or empty.
    """
    results = {"neighbours": relational_alignment(rows["validation"], teacher)["neighbor_overlap"]}
    probes = {
        "linear_probe": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "knn": KNeighborsClassifier(10, metric="cosine"),
    }
    for name, probe in probes.items() if labels else ():
        probe.fit(rows["train"].numpy(), labels["train"])
        results[name] = float(probe.score(rows["validation"].numpy(), labels["validation"]))
    return results


def main() -> None:
    """Load, build, train, evaluate, print."""
    model_args, data_args, args = parse_arguments(
        ModelArguments, DataArguments, RelationalDistillationConfig, **DEFAULTS
    )
    args.task_weight = 0.0  # no labels, no task
    args.remove_unused_columns = False  # the models read what a transform makes of the images
    set_seed(args.seed)
    with args.main_process_first():
        data = load(data_args)
    image, label = data_args.image_column_name, data_args.label_column_name
    labels = {split: list(data[split][label]) for split in data} if label else {}
    splits = list(labels) or ["validation"]

    # The teacher and the student.
    teacher_name, student_name = model_args.teacher_model_name_or_path, model_args.student_model_name_or_path
    teacher, teacher_processor = vision_model(teacher_name), AutoImageProcessor.from_pretrained(teacher_name)
    if isinstance(teacher, SiglipVisionModel) and args.teacher_pooling == "auto":
        args.teacher_pooling = "pooler"  # what it compares with texts
    processor = AutoImageProcessor.from_pretrained(student_name or teacher_name)
    overrides = yaml.safe_load(f"{{{model_args.student_config_overrides.replace('=', ': ')}}}")  # YAML knows numbers
    if student_name:
        student = vision_model(student_name)
    elif model_args.student_config_name:
        name = model_args.student_config_name
        pixels = see(data["train"][:1], image, {"pixel_values": processor})["pixel_values"]
        settings = {"image_size": pixels.shape[-1]} | overrides
        config = (AutoConfig.for_model if name in CONFIG_MAPPING else AutoConfig.from_pretrained)(name, **settings)
        if unknown := [field for field in overrides if not hasattr(type(config)(), field)]:
            raise SystemExit(f"--student_config_overrides: a {type(config).__name__} has no {unknown}.")
        student = AutoModel.from_config(config)
    else:
        student = student_from_teacher(teacher, num_hidden_layers=model_args.student_num_layers, **overrides)

    # The embeddings of the student as it starts; in this part of the work the main process is alone.
    rows, results = {}, {}

    def evaluate(name: str, model: Any, its_processor: Any, pooling: str) -> None:
        model.to(args.device)
        rows[name] = {split: encode(model, its_processor, data[split], image, pooling) for split in splits}
        size = {"parameters": model.num_parameters(), "width": rows[name]["validation"].shape[1]}
        results[name] = size | measure(rows[name], rows["teacher"]["validation"], labels)

    if args.process_index == 0:
        evaluate("teacher", teacher, teacher_processor, args.teacher_pooling)
        evaluate("student before", student, processor, args.student_pooling)

    # What they read, made of the images as they are drawn; the teacher's outputs, if they are to be computed once.
    processors = {"pixel_values": processor}
    if processor.to_dict() != teacher_processor.to_dict():
        processors["teacher_pixel_values"] = teacher_processor
    look, count = partial(see, column=image, processors=processors), data_args.cached_views
    train, validation = data["train"], data["validation"].with_transform(look)
    if count:
        train = with_views(train, count)
        args.num_train_epochs /= count  # an epoch is that many passes now
    train = train.with_transform(partial(look, smallest=data_args.smallest_crop))
    if count:
        how = {"pooling": args.teacher_pooling, "with_logits": False}
        cache = partial(cache_teacher_outputs, teacher=teacher, batch_size=args.per_device_eval_batch_size, **how)
        train, validation = cache(train), cache(validation)

    trainer = RelationalDistillationTrainer(
        model=student,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
        teacher=None if count else teacher,
        teacher_processing_class=teacher_processor,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = trainer.evaluate()

    # Evaluate the student as it was saved, by its layers alone; print.
    if trainer.is_world_process_zero():
        evaluate("student after", type(student).from_pretrained(args.output_dir), processor, args.student_pooling)
        after = results["student after"]
        after |= {f"recall@{most}": metrics.get(f"eval_teacher_retrieval@{most}", "") for most in (1, 10)}
        table = Table("", *results, title=f"{len(data['validation'])} images")
        for name in after:
            cells = [found.get(name, "") for found in results.values()]
            table.add_row(name, *(f"{100 * cell:.1f} %" if isinstance(cell, float) else f"{cell}" for cell in cells))
        Console().print(table)
        metrics |= {f"eval_{name}": after[name] for name in ("neighbours", "linear_probe", "knn") if name in after}
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
