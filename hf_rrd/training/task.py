"""The student's own task: its labels, its loss, and what a forward of the student is asked for."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers.trainer_pt_utils import nested_detach

from hf_rrd.errors import named_errors
from hf_rrd.models.head import WITH_EMBEDDING, StudentOutputs, split_embedding
from hf_rrd.training.data import check_batch_labels


def ask_student(
    model: nn.Module,
    inputs: dict[str, Any],
    label_names: list[str],
    embedding: bool,
    task_loss: Callable[..., Any] | None,
    needs_labels: bool,
) -> StudentOutputs:
    """One forward of the student.

    Args:
        model, inputs: The student, and its part of the batch.
        label_names: Its columns that are labels; without a task loss they stay away.
        embedding: Whether the student has a head, whose embedding is wanted.
        task_loss: The Trainer's `compute_loss`; None where the task has no weight.
        needs_labels: Whether the task loss is the model's own.
    """
    asked = inputs | {WITH_EMBEDDING: True} if embedding else inputs
    if task_loss is not None and needs_labels:
        check_batch_labels(inputs, label_names)
    with named_errors("the student", inputs):
        if task_loss is not None:
            loss, outputs = task_loss(model, asked, return_outputs=True)
        else:
            loss, outputs = None, model(**{name: value for name, value in asked.items() if name not in label_names})
    return StudentOutputs(loss, *split_embedding(outputs))


def has_labels(inputs: Mapping[str, Any], label_names: list[str]) -> bool:
    """Whether a batch has any of the labels."""
    return any(inputs.get(name) is not None for name in label_names)


def predictions_of(outputs: Any, model: Any, ignored: list[str] | None) -> Any:
    """An output's values as the Trainer gives them to metrics, detached: one, or a tuple of several."""
    if ignored is None:
        ignored = getattr(model.config, "keys_to_ignore_at_inference", ["past_key_values"])
    values = tuple(nested_detach(value) for name, value in outputs.items() if name not in [*ignored, "loss"])
    return values[0] if len(values) == 1 else values
