"""Data sets and batches: what is known of a set before it is read, how examples are collated, some of them drawn."""

import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
    default_data_collator,
)
from transformers.trainer_pt_utils import find_batch_size
from transformers.utils import logging

from hf_rrd.errors import described, named_errors
from hf_rrd.models.body import unwrapped
from hf_rrd.models.columns import CACHED_COLUMNS, TEACHER_PREFIX, is_label, is_teacher_input
from hf_rrd.models.logits import names_of
from hf_rrd.models.sentence_transformers import own_tokenizer

logger = logging.get_logger(__name__)


class DataCollatorForDistillation:
    """Collates the student's columns, and those that begin with `teacher_` on their own.

    So two tokenizers or two image processors can serve one data set: each side is padded by its own. The teacher's
    columns keep their prefix in the batch; `teacher_embedding` and `teacher_logits` are stacked. Labels that are
    texts are left out.

    Args:
        student: A tokenizer, feature extractor or other processor, or any data collator. None collates without
            padding.
        teacher: The same for the teacher's columns.
    """

    def __init__(self, student: Any = None, teacher: Any = None) -> None:
        self.tokenizer = student if isinstance(student, PreTrainedTokenizerBase) else None
        self.processors = (student, teacher)
        self._collate_student = collator_of(student)
        self._collate_teacher = collator_of(teacher)

    def __call__(self, features: list[Any]) -> dict[str, Tensor]:
        """Make one batch of examples given as dicts; a ValueError where they do not make one names the columns."""
        with named_errors("making a batch", features[0] if features else None):
            features = [dict(feature) if isinstance(feature, Mapping) else dict(vars(feature)) for feature in features]
            for name in [name for name, value in features[0].items() if is_label(name) and isinstance(value, str)]:
                features = [{key: value for key, value in each.items() if key != name} for each in features]
            prefixed = [name for name in features[0] if is_teacher_input(name)]
            cached = [name for name in CACHED_COLUMNS if name in features[0]]
            of_teacher = [{name[len(TEACHER_PREFIX) :]: each.pop(name) for name in prefixed} for each in features]
            stacked = {name: _stacked([feature.pop(name) for feature in features]) for name in cached}
            batch = _collated(self._collate_student, features, "") | stacked
            if prefixed:
                teacher_batch = _collated(self._collate_teacher, of_teacher, TEACHER_PREFIX)
                batch |= {TEACHER_PREFIX + name: value for name, value in teacher_batch.items()}
            return batch


def default_collator(student: Any, teacher: Any, model: Any) -> DataCollatorForDistillation:
    """Of two processing classes; where that of the teacher is None, it may be a model that has its own."""
    return DataCollatorForDistillation(student, own_tokenizer(model) if teacher is None else teacher)


def _collated(collate: Any, features: list[dict[str, Any]], prefix: str) -> dict[str, Any]:
    """One side's batch; an error says so of labels that are no numbers, or of a side without a processor to pad it."""
    try:
        return dict(collate(features))
    except (ValueError, RuntimeError, TypeError) as error:  # of lists, of tensors, of None
        for name, label in (item for each in features for item in each.items() if is_label(item[0])):
            if isinstance(label, str | None):
                raise ValueError(f"`{name}` has {label!r} in place of a number (-100: no label): {error}") from error
        if collate is not default_data_collator or isinstance(error, TypeError):
            raise
        names = [f"{prefix}{name}" for name in features[0]]
        remedy = f"`{prefix}processing_class`, or as the {'second' if prefix else 'first'} argument of the collator"
        raise ValueError(
            f"the columns {names} could not be collated ({error}). Are they of unequal length? Nothing pads them: "
            f"pass the {'teacher' if prefix else 'student'}'s tokenizer as {remedy}."
        ) from error


def _stacked(rows: list[Any]) -> Tensor:
    """Rows of one length as a tensor; lists become float32, by way of one array, which is the fastest."""
    own = isinstance(rows[0], Tensor)
    return torch.stack(rows) if own else torch.from_numpy(np.asarray(rows, dtype=np.float32))


def collator_of(processor: Any) -> Any:
    """A collator for the examples of a tokenizer, a feature extractor or another processor, or of none."""
    if isinstance(processor, PreTrainedTokenizerBase | SequenceFeatureExtractor):
        return DataCollatorWithPadding(processor)
    # An image processor is callable too, but it makes features rather than batches of them.
    is_collator = callable(processor) and not hasattr(processor, "save_pretrained")
    return processor if is_collator else default_data_collator


def examples_in(batch: Any) -> int:
    """The number of examples in a batch; a ValueError of what has none, or is no dict of tensors."""
    count = find_batch_size(batch) if isinstance(batch, Mapping) else None
    if not count:
        raise ValueError(
            f"a batch must be a dict of tensors with 1 row or more; `data_collator` gave {described(batch)}."
        )
    return count


def has_labels(batch: Mapping[str, Any], label_names: list[str]) -> bool:
    """Whether a batch has any of the labels."""
    return any(batch.get(name) is not None for name in label_names)


def check_batch_labels(batch: Mapping[str, Any], label_names: list[str]) -> None:
    """Raise a ValueError for a batch that has none of the labels which a model needs for its loss."""
    if label_names and not has_labels(batch, label_names):
        raise ValueError(
            f"`task_weight` is above 0, so each batch needs labels: none of {label_names} is in it, as numbers (-100 "
            "for none). Set task_weight=0 to train without labels."
        )


# ---- What is known of a data set ----


class Preview:
    """What can be known of a data set before a run: its columns and its first example, which is read at most once."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    @cached_property
    def example(self) -> Mapping[str, Any]:
        """The first example, without any of a set that has none, or none that is a dict of columns."""
        if self.dataset is None or isinstance(self.dataset, Mapping):
            return {}
        with named_errors("reading the first example of `train_dataset` or `eval_dataset`"):
            one = self.dataset[0] if is_map_style(self.dataset) else next(iter(sample_of(self.dataset, 1)), None)
        return one if isinstance(one, Mapping) else {}

    @cached_property
    def columns(self) -> set[str] | None:
        """The columns, as far as they can be known without reading a stream; otherwise None."""
        names = getattr(self.dataset, "column_names", None)
        if names is not None:
            return None if self.is_transformed else set(names)
        return set(self.example) or None if is_map_style(self.dataset) else None

    @property
    def is_transformed(self) -> bool:
        """Whether a transform makes the examples of a `datasets.Dataset` as they are read, with columns of its own."""
        return isinstance(self.dataset, Dataset) and self.dataset.format["type"] == "custom"

    @property
    def strings(self) -> dict[str, str]:
        """What is a string in the first example, of a set that can be read before the run."""
        example = self.example if is_map_style(self.dataset) else {}
        return {name: value for name, value in example.items() if isinstance(value, str)}

    @property
    def names(self) -> set[str] | None:
        """As `columns`, also of a transform, by its first example."""
        return (set(self.example) or None) if self.is_transformed else self.columns

    def has(self, column: str) -> bool:
        """Whether there is such a column; of a stream without names it is not asked, as it may be read only once."""
        names = getattr(self.dataset, "column_names", None)
        return column in names if names is not None else column in (self.columns or ())

    @property
    def cached_shape(self) -> tuple[int, torch.dtype] | None:
        """Width and dtype of the `teacher_embedding` column, or None; a ValueError where it has no rows of numbers."""
        if "teacher_embedding" not in self.example:
            return None
        feature = (getattr(self.dataset, "features", None) or {}).get("teacher_embedding")
        half = getattr(getattr(feature, "feature", None), "dtype", None) == "float16"
        with named_errors("reading an example", self.example):
            width = _stacked([self.example["teacher_embedding"]]).shape[1:]
        if len(width) != 1 or width[0] == 0:
            raise ValueError(
                f"`teacher_embedding` must be a row of numbers in each example, got the shape {tuple(width)}. "
                "cache_teacher_outputs makes such a column."
            )
        return width[0], torch.float16 if half else torch.float32

    @property
    def classes(self) -> list[str] | None:
        """The names of the labels' classes, where the data set knows them."""
        features = getattr(self.dataset, "features", None) or {}
        label = next((features[name] for name in ("labels", "label", "label_ids") if name in features), None)
        return getattr(getattr(label, "feature", label), "names", None)

    def check_labels(self, label_names: list[str]) -> None:
        """Raise a ValueError where the set is known to have none of the labels that the task loss needs."""
        names = {*label_names, "label", "label_ids"}
        if self.columns is not None and not self.columns & names:
            raise ValueError(
                f"`task_weight` is above 0, so the training set needs labels: none of {sorted(names)} is among its "
                f"columns {sorted(self.columns)}. Add them, or set task_weight=0 to train without labels."
            )


def previews_of(training_set: Preview, eval_dataset: Any) -> dict[str, Preview]:
    """The data sets of a run by the names of their arguments."""
    several = eval_dataset if isinstance(eval_dataset, Mapping) else {}
    evaluated = {f"eval_dataset[{name!r}]": part for name, part in several.items()} or {"eval_dataset": eval_dataset}
    sets = {"train_dataset": training_set} | {name: Preview(part) for name, part in evaluated.items()}
    return {name: preview for name, preview in sets.items() if preview.dataset is not None}


def is_map_style(dataset: Any) -> bool:
    """Whether a data set has a length and examples by number."""
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset)  # which inherits a `__getitem__` that raises
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not is_stream


def check_dataset(name: str, dataset: Any) -> None:
    """Raise a ValueError for what is no data set of examples, for an empty one, or for one such among several."""
    parts, package = dataset.values() if isinstance(dataset, Mapping) else (), type(dataset).__module__.split(".")[0]
    advice = ""
    if isinstance(dataset, str | os.PathLike):
        advice = f"datasets.load_dataset({str(dataset)!r}, split='train') loads one"
    elif package in ("pandas", "polars", "pyarrow"):
        advice = "datasets.Dataset.from_pandas, Dataset.from_polars and Dataset(table) make one"
    elif isinstance(dataset, np.ndarray | Tensor) or any(_is_column(part) for part in parts):
        advice = "datasets.Dataset.from_dict makes one of columns"
    elif isinstance(dataset, Mapping) and name in ("train_dataset", "dataset"):
        advice = f"Pass one of its parts, {list(dataset)}, such as data['train']; `eval_dataset` takes several"
    elif isinstance(dataset, list | tuple) and dataset and isinstance(dataset[0], Dataset | IterableDataset):
        several = "; several sets to evaluate on go into a dict, by name" if name.startswith("eval") else ""
        advice = f"datasets.concatenate_datasets joins them{several}"
    elif isinstance(dataset, torch.utils.data.DataLoader):
        advice = "Pass its `dataset`, and its `collate_fn` as `data_collator`"
    elif dataset is not None and not (hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")):
        advice = "A list of dicts is one"
    if advice:
        raise ValueError(f"`{name}` must be a data set of examples, got a {type(dataset).__name__}. {advice}.")
    if isinstance(dataset, Mapping):
        for key, part in dataset.items():
            check_dataset(f"{name}[{key!r}]", part)
    elif hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty, got 0 examples. Pass at least one.")


def _is_column(part: Any) -> bool:
    """Whether this is a column of values, not a list of examples, which are dicts or objects."""
    values = isinstance(part, list | tuple) and len(part) > 0
    return isinstance(part, np.ndarray | Tensor) or (values and isinstance(part[0], str | float | int | list | None))


# ---- Some examples, and columns on their own ----


def sample_of(dataset: Any, count: int, seed: int = 0) -> Any:
    """At most `count` examples of a training set: drawn at random with a seed, of a stream the first ones."""
    if not is_map_style(dataset):
        return dataset.take(count) if hasattr(dataset, "take") else list(islice(iter(dataset), count))
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return dataset.select(rows) if hasattr(dataset, "select") else torch.utils.data.Subset(dataset, rows)


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Leave the random state of Python, NumPy and torch as it was, so that a run is the same with and without."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def has_cached_embeddings(dataset: Any) -> bool:
    """Whether `teacher_embedding` is a column that can be read on its own, without making whole examples."""
    return isinstance(dataset, Dataset | IterableDataset) and "teacher_embedding" in (dataset.column_names or [])


def note_logits(dataset: Any, teacher: Any) -> None:
    """Keep what the column `teacher_logits` does not say, of which classes it is and of what kind.

    In the column's feature, which goes where it goes; and in the info of a stream, whose `map` forgets features.
    """
    about = {"classes": names_of(teacher), "problem_type": getattr(unwrapped(teacher).config, "problem_type", None)}
    dataset.info.download_checksums = {**(dataset.info.download_checksums or {}), "teacher_logits": about}
    if dataset.info.features is not None:
        value = dataset.info.features["teacher_logits"].feature
        value.id = f"{value.id}; {json.dumps(about)}"


def noted_logits(dataset: Any) -> Mapping[str, Any]:
    """What `note_logits` kept: `classes` and `problem_type`; {} without it, or where it is damaged."""
    column = (getattr(dataset, "features", None) or {}).get("teacher_logits")
    _, _, kept = str(getattr(getattr(column, "feature", None), "id", None)).partition("; ")
    if "teacher_logits" not in (getattr(dataset, "column_names", None) or ["teacher_logits"]):
        return {}
    try:
        about = json.loads(kept) if kept else dataset.info.download_checksums["teacher_logits"]
        return about if all(isinstance(name, str) for name in about["classes"] or ()) else {}
    except (AttributeError, LookupError, TypeError, ValueError):
        return {}


def cached_embeddings(dataset: Dataset | IterableDataset) -> Tensor:
    """All of the column `teacher_embedding`, (examples, width), whatever else the examples have."""
    rows = dataset.select_columns("teacher_embedding").with_format("torch")
    with named_errors("reading the column `teacher_embedding`"):
        column = rows["teacher_embedding"][:] if isinstance(rows, Dataset) else list(rows["teacher_embedding"])
        if isinstance(column, Tensor):
            return column.float()
        widths = {str(tuple(row.shape) if isinstance(row, Tensor) else row) for row in column}
        if len(widths) > 1 or "None" in widths:
            came = ", ".join(sorted(widths)[:4])
            raise ValueError(f"each example needs a row of one width, got the shapes {came}. Leave the others out.")
        return torch.stack(column).float()


def with_cached_arrays(dataset: Any) -> Any:
    """With the cached columns as arrays where all columns would be Python objects: lists of numbers are slow."""
    if isinstance(dataset, Mapping):
        return {name: with_cached_arrays(part) for name, part in dataset.items()}
    cached = [name for name in CACHED_COLUMNS if isinstance(dataset, Dataset) and name in dataset.column_names]
    if not cached or dataset.format["type"] is not None:
        return dataset
    return dataset.with_format("numpy", columns=cached, output_all_columns=True)
