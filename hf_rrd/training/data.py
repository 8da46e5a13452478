"""Columns and batches: which input reaches the student, which the teacher, and how both are collated."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
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

logger = logging.get_logger(__name__)

TEACHER_PREFIX = "teacher_"
"""Columns with this prefix reach the teacher, without it."""

CACHED_COLUMNS = ("teacher_embedding", "teacher_logits")
"""Columns that stand in for a teacher: (batch, width) and (batch, classes)."""


class DataCollatorForDistillation:
    """Collates the student's columns, and those that begin with `teacher_` on their own.

    So two tokenizers or two image processors can serve one data set: each side is padded by its own. The teacher's
    columns keep their prefix in the batch; `teacher_embedding` and `teacher_logits` are stacked.

    Args:
        student: A tokenizer, feature extractor or other processor, or any data collator. None collates without
            padding.
        teacher: The same for the teacher's columns.
    """

    def __init__(self, student: Any = None, teacher: Any = None) -> None:
        self.tokenizer = student if isinstance(student, PreTrainedTokenizerBase) else None
        self._collate_student = collator_of(student)
        self._collate_teacher = collator_of(teacher)

    def __call__(self, features: list[Any]) -> dict[str, Tensor]:
        """Make one batch of examples given as dicts.

        Raises:
            ValueError: They do not make one; it names the columns.
        """
        with named_errors("making a batch of `train_dataset` or `eval_dataset`", features[0] if features else None):
            return self._collated(features)

    def _collated(self, features: list[Any]) -> dict[str, Tensor]:
        features = [dict(feature) if isinstance(feature, Mapping) else dict(vars(feature)) for feature in features]
        prefixed = [name for name in features[0] if is_teacher_input(name)]
        cached = [name for name in CACHED_COLUMNS if name in features[0]]
        teacher_features = [
            {name.removeprefix(TEACHER_PREFIX): feature.pop(name) for name in prefixed} for feature in features
        ]
        stacked = {name: _stacked([feature.pop(name) for feature in features]) for name in cached}
        batch = dict(self._collate_student(features)) | stacked
        if prefixed:
            try:
                teacher_batch = self._collate_teacher(teacher_features)
            except (ValueError, RuntimeError) as error:  # of lists, of tensors
                raise ValueError(
                    f"the columns {prefixed} could not be collated ({error}). Are they of unequal length? Pass the "
                    "teacher's tokenizer as `teacher_processing_class`."
                ) from error
            batch |= {TEACHER_PREFIX + name: value for name, value in teacher_batch.items()}
        return batch


def _stacked(rows: list[Any]) -> Tensor:
    """Rows of one length as a tensor; lists become float32, by way of one array, which is the fastest."""
    if isinstance(rows[0], Tensor):
        return torch.stack(rows)
    return torch.from_numpy(np.asarray(rows, dtype=np.float32))


def collator_of(processor: Any) -> Any:
    """A collator for the examples of a tokenizer, a feature extractor or another processor, or of none."""
    if isinstance(processor, PreTrainedTokenizerBase | SequenceFeatureExtractor):
        return DataCollatorWithPadding(processor)
    # An image processor is callable too, but it makes features rather than batches of them.
    is_collator = callable(processor) and not hasattr(processor, "save_pretrained")
    return processor if is_collator else default_data_collator


def is_teacher_input(name: str) -> bool:
    """Whether a column is for the teacher's forward, by its prefix."""
    return name.startswith(TEACHER_PREFIX) and name not in CACHED_COLUMNS


def forward_columns(model: nn.Module) -> list[str]:
    """The names of a model's forward arguments; none for a forward that takes `**kwargs` alone, and so anything."""
    parameters = inspect.signature(unwrapped(model).forward).parameters.values()
    return [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def teacher_inputs(inputs: Mapping[str, Any], accepted: list[str]) -> dict[str, Any]:
    """What the teacher sees of a batch: its `teacher_` columns, or without any what it shares with the student.

    Args:
        inputs: The batch.
        accepted: `forward_columns` of the teacher.
    """
    prefixed = {name.removeprefix(TEACHER_PREFIX): value for name, value in inputs.items() if is_teacher_input(name)}

    def is_read(name: str) -> bool:
        # Labels stay away: the teacher's loss is nobody's, and its classes may differ.
        return (name in accepted or not accepted) and "label" not in name

    return {name: value for name, value in prefixed.items() if is_read(name)} or {
        name: value for name, value in inputs.items() if is_read(name) and not name.startswith(TEACHER_PREFIX)
    }


def student_inputs(inputs: Mapping[str, Any], accepted: list[str], teacher_accepted: list[str]) -> dict[str, Any]:
    """The batch without what is only there for the teacher, such as `token_type_ids` beside a DistilBERT student."""
    return {
        name: value
        for name, value in inputs.items()
        if not name.startswith(TEACHER_PREFIX) and (name in accepted or not accepted or name not in teacher_accepted)
    }


def column_names(dataset: Any) -> set[str] | None:
    """The columns of a data set, as far as they can be known without reading a stream; otherwise None."""
    names = getattr(dataset, "column_names", None)
    if names is not None:
        transformed = (getattr(dataset, "format", None) or {}).get("type") == "custom"
        return None if transformed else set(names)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return None
    example = dataset[0]
    return set(example) if isinstance(example, Mapping) else None


def has_cached_embeddings(dataset: Any) -> bool:
    """Whether `teacher_embedding` is a column that can be read on its own, without making whole examples."""
    return isinstance(dataset, Dataset | IterableDataset) and "teacher_embedding" in (dataset.column_names or [])


def cached_embeddings(dataset: Dataset | IterableDataset) -> Tensor:
    """All of the column `teacher_embedding`, (examples, width), whatever else the examples have."""
    rows = dataset.select_columns("teacher_embedding").with_format("torch")
    with named_errors("reading the column `teacher_embedding`"):
        if isinstance(rows, Dataset):
            return rows["teacher_embedding"][:].float()
        return torch.stack([row["teacher_embedding"] for row in rows]).float()


def with_cached_arrays(dataset: Dataset) -> Dataset:
    """With the cached columns as arrays where all columns would be Python objects: lists of numbers are slow."""
    cached = [name for name in CACHED_COLUMNS if name in dataset.column_names]
    if not cached or dataset.format["type"] is not None:
        return dataset
    return dataset.with_format("numpy", columns=cached, output_all_columns=True)


def cached_shape(dataset: Any) -> tuple[int, torch.dtype] | None:
    """Width and dtype of the `teacher_embedding` column, or None where a data set has no such column.

    Raises:
        ValueError: There is one, of something else than rows of numbers.
    """
    example = None if dataset is None else next(iter(dataset), None)
    if not isinstance(example, Mapping) or "teacher_embedding" not in example:
        return None
    feature = getattr((getattr(dataset, "features", None) or {}).get("teacher_embedding"), "feature", None)
    half = getattr(feature, "dtype", None) == "float16"
    with named_errors("reading an example", example):
        width = _stacked([example["teacher_embedding"]]).shape[1:]
    if len(width) != 1 or width[0] == 0:
        raise ValueError(
            f"`teacher_embedding` must be a row of numbers in each example, got the shape {tuple(width)}. "
            "cache_teacher_outputs makes such a column."
        )
    return width[0], torch.float16 if half else torch.float32


def check_cached_logits(dataset: Any) -> None:
    """Raise a ValueError for a training set that is to stand in for a teacher of logits, and has none."""
    example = next(iter(dataset), None)
    if not isinstance(example, Mapping) or "teacher_logits" not in example:
        raise ValueError(
            "`kd_weight` is above 0, so a teacher is needed: pass `teacher=` a model, a Hub name or a folder, or a "
            "training set with a `teacher_logits` column. Got neither."
        )


def examples_in(batch: Any) -> int:
    """The number of examples in a batch.

    Raises:
        ValueError: It has none, or is no dict of tensors.
    """
    count = find_batch_size(batch) if isinstance(batch, Mapping) else None
    if not count:
        raise ValueError(
            f"a batch must be a dict of tensors with 1 row or more; `data_collator` gave {described(batch)}."
        )
    return count


def check_dataset(name: str, dataset: Any) -> None:
    """Raise a ValueError for an empty data set, or for one empty set among several."""
    if isinstance(dataset, Mapping):
        for key, part in dataset.items():
            check_dataset(f"{name}[{key!r}]", part)
    elif hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty, got 0 examples. Pass at least one.")


def check_labels(dataset: Any, label_names: list[str]) -> None:
    """Raise a ValueError where a training set is known to have none of the labels that the task loss needs."""
    columns = column_names(dataset)
    names = {*label_names, "label", "label_ids"}
    if columns is not None and not columns & names:
        raise ValueError(
            f"`task_weight` is above 0, so the training set needs labels: none of {sorted(names)} is among its "
            f"columns {sorted(columns)}. Add them, or set task_weight=0 to train without labels."
        )


def warn_of_shared_tokens(student: nn.Module, teacher: nn.Module, dataset: Any) -> None:
    """Warn where a teacher would read the student's `input_ids` and has another vocabulary."""
    columns = column_names(dataset)
    sizes = [getattr(getattr(unwrapped(model), "config", None), "vocab_size", None) for model in (student, teacher)]
    reads_own = columns is None or any(is_teacher_input(name) for name in columns)
    if not reads_own and columns is not None and "input_ids" in columns and None not in sizes and sizes[0] != sizes[1]:
        logger.warning(
            f"The teacher reads the student's `input_ids`, but their vocabularies differ ({sizes[1]} and {sizes[0]} "
            "tokens). With another tokenizer, give the teacher a column `teacher_input_ids`."
        )
