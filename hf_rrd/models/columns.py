"""Which columns of a batch reach the student, and which the teacher."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hf_rrd.models.body import unwrapped

TEACHER_PREFIX = "teacher_"  # columns with it reach the teacher, without it
CACHED_COLUMNS = ("teacher_embedding", "teacher_logits")  # stand in for a teacher: (batch, width), (batch, classes)
Accepted = list[str] | None  # the names of a forward's arguments; None for a forward that takes anything


def forward_columns(model: nn.Module, labels: bool = False) -> Accepted:
    """The names of a model's forward arguments; None for a forward that takes `**kwargs` alone.

    With `labels` these are read, too, by a `compute_loss_func`.
    """
    parameters = inspect.signature(unwrapped(model).forward).parameters.values()
    names = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    return [*names, *["labels"] * labels] if names else None


def is_teacher_input(name: str) -> bool:
    """Whether a column is for the teacher's forward, by its prefix."""
    return name.startswith(TEACHER_PREFIX) and name not in CACHED_COLUMNS


def is_label(name: str) -> bool:
    """Whether a column is a label, by its name, as transformers tells them."""
    return "label" in name or name in ("start_positions", "end_positions")


def own_columns(names: Iterable[str], accepted: Accepted) -> list[str]:
    """Those of the columns that are for a teacher with these `forward_columns` alone: its `teacher_` ones."""
    bare = {name: name.removeprefix(TEACHER_PREFIX) for name in names if is_teacher_input(name)}
    return [name for name, own in bare.items() if _takes(accepted, own) and not is_label(own)]


def teacher_inputs(inputs: Mapping[str, Any], accepted: Accepted) -> dict[str, Any]:
    """What a teacher with these `forward_columns` sees: its `teacher_` columns, or else those that it shares."""
    own = own_columns(inputs, accepted)
    if own:
        return {name.removeprefix(TEACHER_PREFIX): inputs[name] for name in own}
    shared = {name: value for name, value in inputs.items() if not name.startswith(TEACHER_PREFIX)}
    # Labels stay away: the teacher's loss is nobody's, and its classes may differ.
    return {name: value for name, value in shared.items() if _takes(accepted, name) and not is_label(name)}


def student_inputs(inputs: Mapping[str, Any], accepted: Accepted, teacher_accepted: Accepted) -> dict[str, Any]:
    """The batch without what is only there for the teacher, such as `token_type_ids` beside a DistilBERT student.

    From the `forward_columns` of both; `teacher_accepted` is [] where there is no teacher.
    """
    return {
        name: value
        for name, value in inputs.items()
        if not name.startswith(TEACHER_PREFIX) and (_takes(accepted, name) or not _takes(teacher_accepted, name))
    }


def _takes(accepted: Accepted, name: str) -> bool:
    return accepted is None or name in accepted
