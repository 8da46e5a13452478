"""How a teacher reads the examples of a data set, outside of a training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, send_to_device
from datasets import Features, Sequence, Value
from datasets.fingerprint import Hasher
from torch import Tensor

from hf_rrd.models.body import main_input_of
from hf_rrd.models.columns import TEACHER_PREFIX, teacher_inputs
from hf_rrd.models.teacher import Teacher
from hf_rrd.training.data import collator_of
from hf_rrd.training.projection import TeacherProjection

Columns = dict[str, np.ndarray[Any, Any]]
"""The columns of some examples by name, each (examples, width)."""


@dataclass
class Reader:
    """A teacher, and how it reads examples. `settings` say which teacher it is, and how it is asked."""

    teacher: Teacher
    collate: Callable[[list[Any]], Mapping[str, Any]] | None
    processing_class: Any
    batch_size: int
    num_workers: int
    with_logits: bool
    dtype: str
    settings: dict[str, Any]
    projection: TeacherProjection | None = None
    # `accelerate launch --cpu` says it in the environment, which PartialState alone does not read.
    state: PartialState = field(default_factory=lambda: PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")))

    def __post_init__(self) -> None:
        self.teacher.place(self.state.device)

    def fingerprint(self) -> str:
        """Of all that decides what comes out of an example."""
        processor = self.processing_class
        names = ("padding_side", "pad_token_id", "pad_token_type_id", "padding_value", "model_input_names")
        padding = [type(processor).__name__, *(getattr(processor, name, None) for name in names)]
        projection = None if self.projection is None else (self.projection.kind, self.projection.state_dict())
        reading = self.collate if self.collate is not None else padding
        about = [self.settings, self.with_logits, self.dtype, reading, projection]
        return str(Hasher.hash(about))

    def columns(self, names: list[str]) -> dict[str, str]:
        """Of an example's columns those that the teacher reads, with their names in its forward."""
        chosen = teacher_inputs(dict.fromkeys(names), self.teacher.columns)
        prefixed = {f"{TEACHER_PREFIX}{name}": name for name in chosen}
        own = {name: prefixed[name] for name in names if name in prefixed}
        return own or {name: name for name in chosen}

    def batch(self, examples: list[Any]) -> dict[str, Any]:
        """The teacher's inputs for some examples."""
        if self.collate is not None:
            return self.teacher.inputs_from(self.collate(examples))
        columns = self.columns(list(examples[0]))
        if not columns:
            wanted = main_input_of(self.teacher.body)
            raise ValueError(
                f"the teacher needs `{wanted}`, the examples offer it {sorted(examples[0])}. Tokenize or transform "
                f"them first, with a column `{wanted}` or `{TEACHER_PREFIX}{wanted}`."
            )
        own = [{columns[name]: example[name] for name in columns} for example in examples]
        return dict(collator_of(self.processing_class)(own))

    def outputs(self, inputs: dict[str, Any]) -> Columns:
        """The columns of one batch, (batch, width) and (batch, classes)."""
        embedding, logits = self.teacher.compute(send_to_device(inputs, self.state.device))
        assert embedding is not None
        outputs = {"teacher_embedding": embedding if self.projection is None else self.projection(embedding)}
        if self.with_logits:
            if logits is None or logits.dim() != 2:
                shape = None if logits is None else tuple(logits.shape)
                raise ValueError(
                    f"`with_logits` keeps logits of the shape (batch, classes), this teacher gives {shape}. Set "
                    "with_logits=False; distillation on logits per token needs the teacher in training."
                )
            outputs["teacher_logits"] = logits
        return {name: self._kept(name, value) for name, value in outputs.items()}

    def _kept(self, name: str, value: Tensor) -> np.ndarray[Any, Any]:
        kept = value.float().to(getattr(torch, self.dtype)).cpu()
        if not kept.isfinite().all():
            raise ValueError(
                f"{name} is not finite (nan or inf) in {self.dtype}: the largest value is "
                f"{value.abs().max().item():g}. Check the inputs, load the teacher in bfloat16 or float32, and set "
                "dtype='float32' for values beyond 65,504."
            )
        return cast(np.ndarray[Any, Any], kept.numpy())

    def features(self, widths: dict[str, int]) -> Features:
        """Of the columns, by their widths."""
        return Features({name: Sequence(Value(self.dtype), length=width) for name, width in widths.items()})
