"""How a teacher reads the examples of a data set, outside of a training."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, send_to_device
from datasets import Dataset, Features, Sequence, Value
from torch import Tensor

from hf_rrd.models.body import main_input_of
from hf_rrd.models.columns import TEACHER_PREFIX, teacher_inputs
from hf_rrd.models.sentence_transformers import Texts
from hf_rrd.models.teacher import Teacher
from hf_rrd.training.data import collator_of
from hf_rrd.training.hashing import hash_of
from hf_rrd.training.projection import TeacherProjection

Columns = dict[str, np.ndarray[Any, Any]]  # of some examples by name, each (examples, width)
PROBED_EXAMPLES = 16  # that are computed anew before a cache is trusted


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
    texts: Texts | None = None  # where it reads the texts of `text_column` itself
    text_column: str = ""
    source: str = ""  # kept in the columns: who made them
    # `accelerate launch --cpu` says it in the environment, which PartialState alone does not read.
    state: PartialState = field(default_factory=lambda: PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")))

    def __post_init__(self) -> None:
        self.teacher.place(self.state.device)

    def fingerprint(self) -> str:
        """Of all that decides what comes out of an example, but for a `collate` of somebody's own."""
        processor = self.processing_class
        names = ["padding_side", "pad_token_id", "pad_token_type_id", "padding_value", "model_input_names"]
        names += ["return_attention_mask", "feature_size"]
        padding: Any = [type(processor), *(getattr(processor, name, None) for name in names)]
        padding = padding if self.collate is None else ""
        projection = None if self.projection is None else (self.projection.kind, self.projection.state_dict())
        return hash_of(self.settings, self.with_logits, self.dtype, padding, projection)

    def columns(self, names: Iterable[str]) -> dict[str, str]:
        """Of an example's columns those that the teacher reads, by their names in its forward."""
        return teacher_inputs({name: name for name in names}, self.teacher.columns)

    def batch(self, examples: list[Any]) -> dict[str, Any]:
        """The teacher's inputs for some examples."""
        if self.texts is not None:
            made = self.texts([example[self.text_column] for example in examples])
            tensors = {name: value for name, value in made.items() if isinstance(value, Tensor)}
            return teacher_inputs(tensors, self.teacher.columns)
        if self.collate is not None:
            return self.teacher.inputs_from(self.collate(examples))
        columns = self.columns(examples[0])
        if not columns:
            wanted = main_input_of(self.teacher.body)
            raise ValueError(
                f"the teacher needs `{wanted}`, the examples offer it {sorted(examples[0])}. Tokenize or transform "
                f"them first, with a column `{wanted}` or `{TEACHER_PREFIX}{wanted}`."
            )
        own = [{name: example[column] for name, column in columns.items()} for example in examples]
        try:
            return dict(collator_of(self.processing_class)(own))
        except (ValueError, RuntimeError) as error:  # of lists, of tensors
            raise ValueError(
                f"the columns {sorted(columns.values())} could not be collated ({error}). Are they of unequal length? "
                "Pass the teacher's tokenizer or feature extractor as `processing_class`, or a `data_collator`."
            ) from error

    def outputs(self, inputs: dict[str, Any]) -> Columns:
        """The columns of one batch, (batch, width) and (batch, classes)."""
        embedding, logits, _ = self.teacher.compute(send_to_device(inputs, self.state.device))
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
        """Of the columns, by their widths, with their source."""
        kinds = {name: Sequence(Value(self.dtype, id=self.source), length=width) for name, width in widths.items()}
        return Features(kinds)


def outputs_of(dataset: Dataset, reader: Reader, bar: Any = None) -> Columns:
    """All columns of a data set, in its order; without a bar in this process alone, as it is of a few examples."""
    order, parts = _longest_first(dataset, reader), []
    for inputs in _batches(dataset, order, reader if bar is not None else replace(reader, num_workers=0)):
        parts.append(reader.outputs(inputs))
        if bar is not None:
            bar.update(len(parts[-1]["teacher_embedding"]))
    back = np.argsort(order)
    return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}


def _batches(dataset: Dataset, order: Any, reader: Reader) -> Any:
    """The teacher's inputs, batch by batch, of the examples in an order."""
    if dataset.format["type"] != "custom" and reader.texts is not None:
        dataset = dataset.with_format(None).select_columns([reader.text_column])
    elif dataset.format["type"] != "custom" and reader.collate is None:
        columns = list(reader.columns(dataset.column_names).values()) or dataset.column_names
        dataset = dataset.with_format(None).select_columns(columns).with_format("numpy")
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=[order[start : start + reader.batch_size] for start in range(0, len(order), reader.batch_size)],
        collate_fn=reader.batch,
        num_workers=reader.num_workers,
        generator=torch.Generator(),  # the program's random numbers are the same, whether there is a cache or not
    )


def _longest_first(dataset: Dataset, reader: Reader) -> Any:
    """The order of reading: texts of one length together, so that little is padded, the longest first.

    Of images a range: Arrow reads its parts as slices, without gathering rows.
    """
    main_input = main_input_of(reader.teacher.body)
    names = (reader.text_column, TEACHER_PREFIX + main_input, main_input)  # of texts the characters
    column = next((name for name in names if name in dataset.column_names), None)
    if column is None or main_input == "pixel_values" or dataset.format["type"] == "custom":
        return range(len(dataset))
    values = dataset.with_format("numpy")[column][:]
    lengths = np.array([0 if value is None else len(value) for value in values])  # None is refused as it is read
    return np.argsort(-lengths, kind="stable").tolist()


def fingerprint_of(dataset: Dataset, reader: Reader) -> str:
    """Of a data set as it is read now: its rows, its transform, and the files of images or sounds that it names.

    A ValueError where the teacher would read something else of an example each time.
    """
    files = []
    for column in (dataset.data.column(name) for name, kind in dataset.features.items() if hasattr(kind, "decode")):
        if pa.types.is_struct(column.type) and {"bytes", "path"} <= {field.name for field in column.type}:
            paths = pc.struct_field(column, "path").filter(pc.is_null(pc.struct_field(column, "bytes")))
            files += [_state_of(path) for path in paths.to_pylist()]
    about = (_code_of(dataset, reader), np.array(files, dtype=np.int64), reader.fingerprint())
    return hash_of(dataset._fingerprint, *about)[:16]


def _state_of(path: str | None) -> tuple[int, int]:
    """The size of a file and when it was written; zeros of what is no file of this machine."""
    try:
        found = os.stat(path or "")
        return found.st_size, found.st_mtime_ns
    except (OSError, ValueError):
        return 0, 0


def _code_of(dataset: Dataset, reader: Reader) -> str:
    """A hash of the transform and the collator, in the state that using them leaves; "" of what differs each time."""
    code = (dataset.format["format_kwargs"].get("transform"), reader.collate)
    if code == (None, None):
        return ""
    some, alone = dataset.select(spread(len(dataset))), replace(reader, num_workers=0)
    once, again = ((hash_of(list(_batches(some, range(len(some)), alone))), hash_of(code)) for _ in range(2))
    if once[0] != again[0]:
        raise ValueError(
            "an example that was read twice gave the teacher two different inputs: the transform or the "
            "`data_collator` draws random numbers. The student would see another view than the one whose outputs are "
            "cached. Use with_views, and draw from `view_seed` alone, or train with the teacher itself."
        )
    return once[1] if once[1] == again[1] else ""  # it counts or remembers what it read


def agree(fresh: Columns, kept: Mapping[str, Any], reader: Reader) -> bool:
    """Whether two computations of the same rows are one up to rounding, also in another batch.

    An accelerator may compute float32 with the 10 bits of float16; how a quantised model rounds depends on the batch.
    """
    bits = 7 if reader.teacher.is_placed else 15 if reader.state.device.type == "cpu" else 10
    tolerance = 8 * max(torch.finfo(reader.teacher.dtype).eps, 2.0**-bits)
    for name, values in fresh.items():
        old, new = np.asarray(kept[name], dtype=np.float64), values.astype(np.float64)
        if old.shape != new.shape or np.linalg.norm(new - old) > tolerance * np.linalg.norm(old):
            return False
    return True


def spread(count: int) -> list[int]:
    """At most `PROBED_EXAMPLES` numbers below a count, from its beginning to its end."""
    return sorted({int(place) for place in np.linspace(0, count - 1, PROBED_EXAMPLES)})
