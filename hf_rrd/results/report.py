"""Teacher and student side by side: size, speed, quality and likeness, on the same examples and the same machine."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import RemoveColumnsCollator

from hf_rrd.errors import named_errors
from hf_rrd.files import write_json
from hf_rrd.models.body import body_of, placed, unwrapped
from hf_rrd.models.columns import CACHED_COLUMNS, forward_columns, student_inputs, teacher_inputs
from hf_rrd.models.embedding import embed
from hf_rrd.results.embedding_log import known_alignment
from hf_rrd.results.measure import environment_of, evaluating, flops_of, forward_times, size_of
from hf_rrd.results.reliability import NO_LABEL, calibration_error
from hf_rrd.results.table import HEADER, place, rows_of
from hf_rrd.training.data import DataCollatorForDistillation, examples_in, is_map_style, with_cached_arrays
from hf_rrd.training.distillation import preserved_randomness

REPORT_FILE = "distillation_report.json"
"""The name under which a report is saved."""

LATENCY_BATCHES = (1, 32)
"""How many examples a timed forward has."""

ALIGNED_EXAMPLES = 4096
"""Alignment is measured on so many examples at most, spread evenly over the data set."""

NEIGHBORS = 10
"""As `relational_alignment` has it."""


@dataclass
class DistillationReport:
    """What `compare_models` measured.

    Attributes:
        facts: What is saved as JSON: `student` and `teacher` with `parameters`, `bytes` and `dtype` of the weights,
            `flops` (of one example's forward; a multiplication and an addition are two), `latency_ms` (by examples in
            the batch: `median`, `p95`), `examples_per_second` (at the largest batch), `accuracy`, `calibration_error`
            (0 to 1); `agreement` (the share of examples with the same top class); `alignment` (of
            `relational_alignment`); `examples`, `aligned_examples` and `environment`. What could not be measured is
            left out.
        tensors: What pictures are drawn from, on the CPU: `labels`, (examples,), and `student_` and `teacher_`
            `embedding`, (examples, width), and `logits`, (examples, classes).
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the facts as `distillation_report.json` into a folder; returns the file."""
        return write_json(Path(folder) / REPORT_FILE, self.facts)

    def table(self) -> Any:
        """Teacher and student side by side: a `rich.table.Table`, for the terminal.

        Raises:
            ImportError: rich is not installed.
        """
        try:
            from rich.table import Table
        except ImportError as error:
            raise ImportError("the table needs rich: pip install 'hf_rrd[demo]'.") from error
        table = Table(title=f"{self.facts['examples']:,} examples", caption=place(self.facts["environment"]))
        for column in HEADER:
            table.add_column(column, justify="left" if column == "" else "right")
        for row in rows_of(self.facts):
            table.add_row(*row)
        return table


class _Side(NamedTuple):
    """One of the two models: how it is pooled, and what of a batch its forward takes."""

    model: nn.Module
    pooling: Any
    inputs_of: Callable[[dict[str, Any]], dict[str, Any]]


def compare_models(
    student: nn.Module,
    teacher: nn.Module | None,
    dataset: Any,
    data_collator: Any = None,
    batch_size: int = 32,
    student_pooling: Any = "auto",
    teacher_pooling: Any = "auto",
    label_names: tuple[str, ...] | list[str] = ("labels",),
) -> DistillationReport:
    """Compare a student with its teacher on the same examples, in this process, each on the device where it is.

    Both run in the dtype of their weights, without autocast: as they load. Their forwards are timed in turns, so that
    a machine that grows slower does so for both.

    Args:
        student: The student: a transformers model, or a PEFT model around one.
        teacher: The teacher; None where there is none, or where the data set has its outputs.
        dataset: A map-style data set, as the trainer evaluates on: columns for the student, and for the teacher its
            own (`teacher_...`), its cached outputs, or the student's.
        data_collator: Default: `DataCollatorForDistillation()`.
        batch_size: Examples of a forward while quality is measured.
        student_pooling: How the student's embedding is pooled: as in the settings.
        teacher_pooling: How the teacher's embedding is pooled.
        label_names: The batch's columns that are labels.

    Raises:
        ValueError: The data set has no examples, or is a stream.
    """
    if not is_map_style(dataset) or len(dataset) == 0:
        raise ValueError(
            "a report needs a data set with examples and a length, got "
            f"{'none in it' if hasattr(dataset, '__len__') else type(dataset).__name__}. Of a stream take some: "
            "datasets.Dataset.from_list(list(stream.take(1000)))."
        )
    collate = data_collator or DataCollatorForDistillation()
    dataset = with_cached_arrays(dataset)
    sides = _sides(student, teacher, (student_pooling, teacher_pooling), label_names)
    facts: dict[str, Any] = {name: size_of(side.model) for name, side in sides.items()}
    with evaluating(side.model for side in sides.values()):
        tensors = _outputs(DataLoader(dataset, batch_size=batch_size, collate_fn=collate), sides, label_names)
        batches = [collate([dataset[i] for i in range(min(count, len(dataset)))]) for count in LATENCY_BATCHES]
        for name, speed in _speed(sides, batches).items():
            facts[name] |= speed
    comparable = _same_classes(student, teacher)
    for name, quality in _quality(tensors, ["student", "teacher"] if comparable else ["student"]).items():
        facts[name] = facts.get(name, {}) | quality
    facts |= _likeness(tensors, comparable and not _is_multiple(student))
    split = getattr(dataset, "split", None)
    facts |= {"examples": len(dataset)} | ({} if split is None else {"split": str(split)})
    return DistillationReport(facts | {"environment": environment_of(student)}, tensors)


def chosen_dataset(dataset: Any, eval_dataset: Any) -> Any:
    """The data set that a trainer's report is of: `dataset`, the evaluation set of that name, or the only one.

    Raises:
        ValueError: There is none, or it is not said which one.
    """
    dataset = eval_dataset if dataset is None else dataset
    if isinstance(dataset, str) and isinstance(eval_dataset, dict):
        dataset = eval_dataset.get(dataset, dataset)
    if dataset is None or isinstance(dataset, dict | str):
        known = f"one of {sorted(eval_dataset)}" if isinstance(eval_dataset, dict) else "a data set"
        came = "none" if dataset is None else dataset if isinstance(dataset, str) else f"several, {sorted(dataset)}"
        raise ValueError(f"`dataset` must be {known}, got {came}.")
    return dataset


def compare_in_run(
    student: nn.Module,
    teacher: nn.Module | None,
    dataset: Any,
    data_collator: Any,
    columns: list[str],
    label_names: list[str],
    args: Any,
) -> DistillationReport:
    """`compare_models` as a trainer reads its data; the report is saved in the run's folder.

    Args:
        student, teacher, dataset, data_collator, label_names: As of `compare_models`.
        columns: Those that the models read: the others are left out, unless the settings keep them.
        args: The settings.
    """
    kept = [*columns, *CACHED_COLUMNS]  # cached logits are of use, also without kd_weight
    if args.remove_unused_columns and isinstance(dataset, Dataset):
        dataset = dataset.select_columns([name for name in dataset.column_names if name in kept])
    elif args.remove_unused_columns:
        data_collator = RemoveColumnsCollator(data_collator, kept)
    poolings = (args.student_pooling, args.teacher_pooling)
    batch_size = args.per_device_eval_batch_size
    report = compare_models(student, teacher, dataset, data_collator, batch_size, *poolings, label_names)
    report.save(args.output_dir)
    return report


def class_names(model: nn.Module | None) -> dict[int, str] | None:
    """A model's classes by number; None where its config only numbers them."""
    names = getattr(getattr(unwrapped(model), "config", None), "id2label", None) or {}
    return None if all(name == f"LABEL_{label}" for label, name in names.items()) else names


def _sides(
    student: nn.Module, teacher: nn.Module | None, poolings: tuple[Any, Any], label_names: Iterable[str]
) -> dict[str, _Side]:
    own, others = forward_columns(student), [] if teacher is None else forward_columns(teacher)

    def unlabelled(inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name not in label_names}

    sides = {"student": _Side(student, poolings[0], lambda batch: unlabelled(student_inputs(batch, own, others)))}
    if teacher is not None:
        sides["teacher"] = _Side(teacher, poolings[1], lambda batch: unlabelled(teacher_inputs(batch, others)))
    return sides


# ---- Speed ----


def _speed(sides: dict[str, _Side], batches: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each model `flops` of the first batch, `latency_ms` by batch size, `examples_per_second` of the last one."""
    speed: dict[str, dict[str, Any]] = {}
    for name, side in sides.items():
        flops = flops_of(side.model, side.inputs_of(batches[0]))
        speed[name] = ({} if flops is None else {"flops": flops}) | {"latency_ms": {}}
    for batch in batches:
        examples = examples_in(batch)
        inputs = {name: side.inputs_of(batch) for name, side in sides.items()}
        for name, times in forward_times({name: side.model for name, side in sides.items()}, inputs).items():
            speed[name]["latency_ms"][str(examples)] = times
            speed[name]["examples_per_second"] = 1000 * examples / times["median"]
    return speed


# ---- Outputs and quality ----


@torch.no_grad()
def _outputs(
    loader: Iterable[dict[str, Any]], sides: dict[str, _Side], label_names: Iterable[str]
) -> dict[str, Tensor]:
    """What each model gives for all examples, in float32 on the CPU; the keys are those of a report's `tensors`."""
    parts: dict[str, list[Tensor]] = {}
    with preserved_randomness():  # a loader draws a seed
        for batch in loader:
            found = {f"teacher_{name}": batch.get(f"teacher_{name}") for name in ("embedding", "logits")}
            for name, side in sides.items():
                with named_errors(f"the {name}", batch):
                    outputs = _observe(side.model, side.pooling, side.inputs_of(batch))
                found |= {f"{name}_{key}": value for key, value in outputs.items()}
            labels = next((batch[name] for name in label_names if name in batch), None)
            # GLUE's test sets have -1.
            if isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point():
                parts.setdefault("labels", []).append(labels.masked_fill(labels < 0, NO_LABEL).cpu())
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


def _is_multiple(model: nn.Module) -> bool:
    """Whether a model's outputs are not one class of several: of a regression, or several labels at once."""
    kind = getattr(getattr(unwrapped(model), "config", None), "problem_type", None)
    return kind in ("regression", "multi_label_classification")


def _same_classes(student: nn.Module, teacher: nn.Module | None) -> bool:
    """Whether the n-th class of both is the same, as far as their configs tell."""
    names = [class_names(student), class_names(teacher)]
    return None in names or names[0] == names[1]


def _quality(tensors: dict[str, Tensor], models: list[str]) -> dict[str, dict[str, float]]:
    """Accuracy and calibration of models with the same classes, where there are labels of such."""
    labels, quality = tensors.get("labels"), {}
    classes = tensors["student_logits"].shape[1] if "student_logits" in tensors else 0
    for name in models:
        logits = tensors.get(f"{name}_logits")
        if logits is None or labels is None or logits.shape[1] != classes or classes < 2:
            continue
        known = labels != NO_LABEL
        if known.any() and int(labels[known].max()) < classes and logits[known].isfinite().all():
            right = (logits.argmax(1) == labels)[known].float().mean().item()
            quality[name] = {"accuracy": right, "calibration_error": calibration_error(logits[known], labels[known])}
    return quality


def _likeness(tensors: dict[str, Tensor], same_classes: bool) -> dict[str, Any]:
    """How alike the two are: of classes and of embeddings."""
    likeness: dict[str, Any] = {}
    logits = [tensors[name] for name in ("student_logits", "teacher_logits") if name in tensors]
    if same_classes and len(logits) == 2 and logits[0].shape == logits[1].shape and logits[0].shape[1] > 1:
        likeness["agreement"] = (logits[0].argmax(1) == logits[1].argmax(1)).float().mean().item()
    rows = [tensors[name] for name in ("student_embedding", "teacher_embedding") if name in tensors]
    if len(rows) == 2 and len(rows[0]) > 1 and all(each.isfinite().all() for each in rows):
        likeness["alignment"] = known_alignment(rows[0], rows[1], ALIGNED_EXAMPLES)
        likeness["aligned_examples"] = min(len(rows[0]), ALIGNED_EXAMPLES)
        if len(rows[0]) <= NEIGHBORS + 1:  # all the others are near
            del likeness["alignment"]["neighbor_overlap"]
    return likeness
