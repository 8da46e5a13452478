"""Teacher and student side by side: size, speed, quality and likeness, on the same examples and the same machine."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import RemoveColumnsCollator
from transformers.utils import logging

from hf_rrd.errors import named_errors
from hf_rrd.files import write_json
from hf_rrd.models.body import body_of, placed, unwrapped
from hf_rrd.models.columns import CACHED_COLUMNS, TEACHER_PREFIX, forward_columns, student_inputs, teacher_inputs
from hf_rrd.models.embedding import embed, students
from hf_rrd.models.logits import class_order, names_of
from hf_rrd.models.sentence_transformers import own_pooling
from hf_rrd.models.teacher import load_teacher
from hf_rrd.results.alignment import EmbeddingLog
from hf_rrd.results.export import OnnxModel
from hf_rrd.results.facts import source_of
from hf_rrd.results.measure import environment_of, evaluating, flops_of, forward_times, size_of
from hf_rrd.results.reliability import NO_LABEL, calibration_error
from hf_rrd.results.table import HEADER, place, plain, rows_of
from hf_rrd.training.data import (
    DataCollatorForDistillation,
    Preview,
    check_dataset,
    examples_in,
    is_map_style,
    noted_logits,
    preserved_randomness,
    with_cached_arrays,
)

logger = logging.get_logger(__name__)

REPORT_FILE = "distillation_report.json"
NEIGHBORS = 10  # as `relational_alignment` has it


@dataclass(repr=False)
class DistillationReport:
    """What `compare_models` measured. Printed, it is the table of teacher and student side by side.

    Attributes:
        facts: What is saved as JSON: `student` and `teacher` with `parameters`, `bytes` and `dtype` of the weights,
            `flops` (of one example's forward; a multiplication and an addition are two), `latency_ms` (by examples in
            the batch: `median`, `p95`), `examples_per_second` (at the largest batch), `accuracy`, `calibration_error`
            (0 to 1); `onnx`, the same of an ONNX file, on the CPU, with its `agreement` with the student; `agreement`
            (the share of examples with the same top class); `alignment` (of `relational_alignment`); `examples`,
            `aligned_examples` and `environment`; of a data set from the Hub `id`, `config` and `split`. What could not
            be measured is left out.
        tensors: What pictures are drawn from, on the CPU: `labels`, (examples,), and `student_` and `teacher_`
            `embedding`, (examples, width), and `logits`, (examples, classes); `onnx_logits`.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return plain(self.facts)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the facts as `distillation_report.json` into a folder; returns the file."""
        return write_json(Path(folder) / REPORT_FILE, self.facts)

    def table(self) -> Any:
        """The table as a `rich.table.Table`, for the terminal. Needs the extra [demo]."""
        try:
            from rich.table import Column, Table
        except ImportError as error:
            raise ImportError("a report's table needs rich: pip install 'hf_rrd[demo]'") from error
        columns = [Column(name, justify="right" if name else "left") for name in HEADER]
        table = Table(*columns, title=f"{self.facts['examples']:,} examples", caption=place(self.facts["environment"]))
        for row in rows_of(self.facts):
            table.add_row(*row)
        return table


def compare_models(
    student: nn.Module | str | os.PathLike[str],
    teacher: nn.Module | str | os.PathLike[str] | None,
    dataset: Any,
    data_collator: Any = None,
    batch_size: int = 32,
    student_pooling: Any = "auto",
    teacher_pooling: Any = "auto",
    label_names: tuple[str, ...] | list[str] = ("labels",),
    *,
    processing_class: Any = None,
    teacher_processing_class: Any = None,
    alignment_examples: int = 4096,
    onnx: str | os.PathLike[str] | None = None,
) -> DistillationReport:
    """Compare a student with its teacher on the same examples, in this process, each on the device where it is.

    Both run in the dtype of their weights, without autocast: as they load. Their forwards are timed in turns, so that
    a machine that grows slower does so for both.

    Args:
        student: The student: a transformers model, a PEFT model around one, or a Hub name or folder.
        teacher: The same; None where there is none, or where the data set has its outputs.
        dataset: A map-style data set, as the trainer evaluates on: columns for the student, and for the teacher its
            own (`teacher_...`), its cached outputs, or the student's.
        data_collator: It gets all columns. Default: `DataCollatorForDistillation` of the two processing classes, which
            gets those that a model reads.
        batch_size: Examples of a forward while quality is measured.
        student_pooling, teacher_pooling: How the embedding is pooled: as in the settings.
        label_names: The batch's columns that are labels.
        processing_class, teacher_processing_class: The tokenizers or processors, for the default collator.
        alignment_examples: Of at most so many examples, spread evenly, the embeddings are aligned.
        onnx: The student as a file of `export_onnx`, in int8 or not, to be measured with them, on the CPU.

    Raises:
        ValueError: The data set has no examples, or is a stream; a model or file cannot be loaded; or a processing
            class is given beside a `data_collator`, which would not use it.
    """
    models: dict[str, nn.Module] = {"student": load_teacher(student, argument="student", pooling=student_pooling)}
    if teacher is not None:
        models["teacher"] = load_teacher(teacher, pooling=teacher_pooling)
    check_dataset("dataset", dataset)
    if not is_map_style(dataset) or len(dataset) == 0:
        raise ValueError(
            f"a report needs a data set with examples and a length, got {type(dataset).__name__}, empty or a stream. "
            "Of a stream take some: datasets.Dataset.from_list(list(stream.take(1000)))."
        )
    if data_collator is None:
        data_collator = DataCollatorForDistillation(processing_class, teacher_processing_class)
        dataset, data_collator = narrowed(dataset, data_collator, _read_columns(models, label_names))
    elif processing_class is not None or teacher_processing_class is not None:
        raise ValueError("`data_collator` makes the batches, and a processing class beside it is not used. Pass one.")
    dataset, collate = with_cached_arrays(dataset), data_collator
    facts: dict[str, Any] = {name: size_of(model) for name, model in models.items()}
    if onnx is not None:
        models["onnx"], facts["onnx"] = OnnxModel(onnx), {"bytes": os.path.getsize(onnx)}
    with evaluating(models.values()), preserved_randomness():  # a loader draws a seed
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
        poolings = {"student": students(student_pooling), "teacher": teacher_pooling, "onnx": None}
        tensors = _outputs(loader, models, poolings, label_names)
        batches = [collate([dataset[i] for i in range(min(count, len(dataset)))]) for count in (1, 32)]
        for name, inputs in _inputs_of(batches[0], models, label_names).items():
            facts[name] |= flops_of(models[name], inputs) | {"latency_ms": {}}
        for batch in batches:
            for name, times in forward_times(models, _inputs_of(batch, models, label_names)).items():
                facts[name]["latency_ms"][str(examples_in(batch))] = times
                facts[name]["examples_per_second"] = 1000 * examples_in(batch) / times["median"]
    logits = _comparable_logits(tensors, models, dataset)
    for name, rows in logits.items():
        if quality := _quality(rows, tensors.get("labels")):
            facts[name] = facts.get(name, {}) | quality
    if _chooses_one(models["student"], _labels_of(batches[0], label_names)):
        for name, found in (("teacher", facts), ("onnx", facts.get("onnx", {}))):
            if name in logits:
                same = logits["student"].argmax(1) == logits[name].argmax(1)
                found["agreement"] = same.float().mean().item()
    facts |= _alignment(tensors, alignment_examples)
    facts |= {"examples": len(dataset), "environment": environment_of(models["student"])}
    return DistillationReport(facts | source_of(dataset), tensors)


def _inputs_of(batch: Any, models: dict[str, nn.Module], label_names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What of a batch the forward of each model takes, without labels."""
    own, others = forward_columns(models["student"]), forward_columns(models["teacher"]) if "teacher" in models else []
    inputs = {"student": student_inputs(batch, own, others), "teacher": teacher_inputs(batch, others)}
    inputs["onnx"] = inputs["student"]
    return {name: {key: inputs[name][key] for key in inputs[name] if key not in label_names} for name in models}


@torch.no_grad()
def _outputs(loader: Any, models: dict[str, Any], poolings: dict[str, Any], label_names: Any) -> dict[str, Tensor]:
    """What each model gives for all examples, in float32 on the CPU; the keys are those of a report's `tensors`."""
    parts: dict[str, list[Tensor]] = {}
    for batch in loader:
        found = {name: batch.get(name) for name in CACHED_COLUMNS}
        for name, inputs in _inputs_of(batch, models, label_names).items():
            with named_errors(f"the {name}", batch):
                outputs = _observe(models[name], poolings[name], inputs)
            found |= {f"{name}_{key}": value for key, value in outputs.items()}
        labels = _labels_of(batch, label_names)
        if isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point():
            parts.setdefault("labels", []).append(labels.masked_fill(labels < 0, NO_LABEL).cpu())  # GLUE's tests: -1
        for name, value in found.items():
            if isinstance(value, Tensor) and value.dim() == 2:
                parts.setdefault(name, []).append(value.float().cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def _observe(model: nn.Module, pooling: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A model's logits and its pooled embedding, as far as it has them."""
    inputs = placed(inputs, model)
    try:
        body_of(model)
    except ValueError:  # no transformers model: it has logits alone
        return {"logits": model(**inputs).get("logits")}
    embedding, outputs = embed(model, inputs, pooling, return_outputs=True)
    return {"logits": outputs.get("logits"), "embedding": embedding}


def _labels_of(batch: Any, label_names: Iterable[str]) -> Any:
    return next((batch[name] for name in label_names if name in batch), None)


def _chooses_one(student: nn.Module, labels: Any) -> bool:
    """Whether a classifier gives each example one class, as far as its config or its labels say."""
    kind = getattr(getattr(unwrapped(student), "config", None), "problem_type", None)
    is_float = isinstance(labels, Tensor) and labels.is_floating_point()
    return kind == "single_label_classification" or not (is_float or kind)


def _comparable_logits(tensors: dict[str, Tensor], models: dict[str, nn.Module], dataset: Any) -> dict[str, Tensor]:
    """The logits of the student and its file, and the teacher's in that order of classes, as far as it is known."""
    given = {name: tensors[f"{name}_logits"] for name in ("student", "teacher", "onnx") if f"{name}_logits" in tensors}
    classes = given["student"].shape[1] if "student" in given else 0
    found = {name: rows for name, rows in given.items() if rows.shape[1] == classes > 1}
    if "teacher" not in found:
        return found
    others = names_of(models.get("teacher")) or noted_logits(dataset).get("classes")
    try:
        order = class_order(names_of(models["student"]), others, Preview(dataset).classes)
    except ValueError:  # other classes
        del found["teacher"]
        return found
    if order is not None and len(order) == classes:
        found["teacher"] = tensors["teacher_logits"] = found["teacher"][:, order]
    if _is_random(models.get("teacher"), found["teacher"], tensors.get("labels")):
        del found["teacher"]
    return found


def _is_random(teacher: nn.Module | None, logits: Tensor, labels: Tensor | None) -> bool:
    """Whether a teacher's head is random: its files had not all weights, and no labels show that it was trained since.

    It was, if more of its answers are right than of the most frequent class's, by two standard deviations.
    """
    if teacher is None or unwrapped(teacher) is not teacher:  # adapters are in no model's files
        return False
    loaded = [getattr(weight, "_is_hf_initialized", False) for weight in teacher.parameters()]
    if all(loaded) or not any(loaded):  # the latter were made from a config
        return False
    if labels is None or not (known := labels != NO_LABEL).any():
        return True
    count, most = int(known.sum()), int(labels[known].bincount().max())
    right = int((logits.argmax(1) == labels)[known].sum())
    return bool(right <= most + 2 * (most * (count - most) / count) ** 0.5)


def _quality(logits: Tensor, labels: Tensor | None) -> dict[str, float]:
    """Accuracy and calibration, where there are labels of the classes."""
    if labels is None or labels.max() >= logits.shape[1]:
        return {}
    logits, labels = logits[labels != NO_LABEL], labels[labels != NO_LABEL]
    if not len(labels) or not logits.isfinite().all():
        return {}
    right = (logits.argmax(1) == labels).float().mean().item()
    return {"accuracy": right, "calibration_error": calibration_error(logits, labels)}


def _alignment(tensors: dict[str, Tensor], most: int) -> dict[str, Any]:
    rows = [tensors[name] for name in ("student_embedding", "teacher_embedding") if name in tensors]
    if len(rows) < 2 or len(rows[0]) < 2 or not all(each.isfinite().all() for each in rows):
        return {}
    log = EmbeddingLog(most)  # which takes those that an evaluation takes
    log.add(rows[0], rows[1], lambda all_rows: all_rows)
    alignment, count = log.alignment(), min(len(rows[0]), most)
    if count <= NEIGHBORS + 1:  # all the others are near
        del alignment["neighbor_overlap"]
    return {"alignment": alignment, "aligned_examples": count}


def teacher_of_report(teacher: Any, args: Any) -> nn.Module:
    """A teacher that is given to a run's report alone, loaded as the run would load it, on the run's device."""
    model: nn.Module = load_teacher(teacher, args.teacher_model_init_kwargs, pooling=args.teacher_pooling)
    return model.to(args.device)


def chosen_dataset(dataset: Any, eval_dataset: Any, sharded: bool = False) -> Any:
    """The data set of a trainer's report: `dataset`, the evaluation set of that name, or the only one."""
    if sharded:
        raise ValueError(
            "a report needs the whole student in one process, not in parts. Load a saved one for compare_models."
        )
    dataset = eval_dataset if dataset is None else dataset
    if isinstance(dataset, str) and isinstance(eval_dataset, dict):
        dataset = eval_dataset.get(dataset, dataset)
    if dataset is None or isinstance(dataset, dict | str):
        known = f", or the name of one of {sorted(eval_dataset)}" if isinstance(eval_dataset, dict) else ""
        came = "none, and the trainer has no `eval_dataset`" if dataset is None else repr(dataset)
        came = f"several: {sorted(dataset)}" if isinstance(dataset, dict) else came
        raise ValueError(f"`dataset` must be one data set{known}, got {came}. Pass one: report(test_set).")
    return dataset


def _read_columns(models: dict[str, nn.Module], label_names: Iterable[str]) -> list[str] | None:
    """The columns that a forward, a label or the teacher's cache has; None where a forward takes anything."""
    read = [forward_columns(model) for model in models.values()]
    names = [name for accepted in read for name in accepted or ()]
    cached_and_labels = [*CACHED_COLUMNS, *label_names, "label", "label_ids"]
    return None if None in read else [*names, *(TEACHER_PREFIX + name for name in names), *cached_and_labels]


def narrowed(dataset: Any, data_collator: Any, columns: list[str] | None) -> tuple[Any, Any]:
    """A data set and its collator without all other columns: what nobody reads is neither decoded nor collated."""
    if columns is None:
        return dataset, data_collator
    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":  # a transform reads others than it gives
        kept = [name for name in dataset.column_names if name in columns]
        if all(name in CACHED_COLUMNS or "label" in name for name in kept):
            came = f"none of the columns that a model reads is in the data set, got {dataset.column_names}"
            raise ValueError(f"{came}. Tokenize or transform its examples first.")
        dataset = dataset.select_columns(kept)
    return dataset, RemoveColumnsCollator(data_collator, columns)


def compare_in_run(
    student: nn.Module,
    teacher: nn.Module | None,
    dataset: Any,
    data_collator: Any,
    columns: list[str],
    label_names: list[str],
    args: Any,
) -> DistillationReport:
    """`compare_models` by a run's settings, which may leave out all but `columns`; saved in the run's folder."""
    read = [] if teacher is None else forward_columns(teacher) or []
    kept = [*columns, *CACHED_COLUMNS, *(TEACHER_PREFIX + name for name in read)]  # the run may have had no teacher
    if args.remove_unused_columns:
        dataset, data_collator = narrowed(dataset, data_collator, kept)
    pooling = args.student_pooling if own_pooling(unwrapped(student)) is None else "auto"
    how = (args.per_device_eval_batch_size, pooling, args.teacher_pooling, label_names)
    most = args.alignment_examples or 4096  # the same as an evaluation's
    report = compare_models(student, teacher, dataset, data_collator, *how, alignment_examples=most)
    learned = args.relational_weight != 0 or args.kd_weight != 0
    if teacher is None and learned and not any(name.startswith("teacher_") for name in report.tensors):
        logger.warning(
            "The report has no teacher: the trainer has none, and the data set not its cached outputs. Pass it: "
            "report(data, teacher=...), or measure on what cache_teacher_outputs gives."
        )
    report.save(args.output_dir)
    return report


def class_names(model: nn.Module | None) -> dict[int, str] | None:
    """A model's classes by number; None where its config only numbers them."""
    names = getattr(getattr(unwrapped(model), "config", None), "id2label", None) or {}
    return None if all(name == f"LABEL_{label}" for label, name in names.items()) else names
