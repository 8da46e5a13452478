"""Teacher and student side by side: size, speed, quality and likeness, on the same examples and the same machine."""

import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from hf_rrd.errors import named_errors
from hf_rrd.models.body import body_of, placed, unwrapped
from hf_rrd.models.columns import forward_columns, student_inputs, teacher_inputs
from hf_rrd.models.embedding import embed
from hf_rrd.models.head import HEAD
from hf_rrd.results.alignment import relational_alignment
from hf_rrd.results.embedding_log import evenly
from hf_rrd.results.reliability import NO_LABEL, calibration_error
from hf_rrd.results.table import HEADER, place, rows_of
from hf_rrd.training.data import DataCollatorForDistillation, examples_in, with_cached_arrays
from hf_rrd.training.distillation import preserved_randomness

REPORT_FILE = "distillation_report.json"
"""The name under which a report is saved."""

LATENCY_BATCHES = (1, 32)
"""How many examples a timed forward has."""

ALIGNED_EXAMPLES = 4096
"""Alignment is measured on so many examples at most, spread evenly over the data set."""

NEIGHBORS = 10
"""As `relational_alignment` has it."""

WARM_UP, FEWEST, MOST, SECONDS = 3, 10, 50, 10.0
"""Forwards before the clock, and how many are timed: from 10 to 50, fewer where 10 seconds are over."""


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
        teacher_pooling: The same of the teacher.
        label_names: The batch's columns that are labels.

    Raises:
        ValueError: The data set has no examples, or is a stream.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or len(dataset) == 0:
        raise ValueError(
            "a report needs a data set with examples and a length, got "
            f"{'none in it' if hasattr(dataset, '__len__') else type(dataset).__name__}. Of a stream take some: "
            "datasets.Dataset.from_list(list(stream.take(1000)))."
        )
    collate = data_collator or DataCollatorForDistillation()
    dataset = with_cached_arrays(dataset) if isinstance(dataset, Dataset) else dataset
    labels = [*label_names]
    teacher_columns = [] if teacher is None else forward_columns(teacher)
    inputs_of = {
        "student": lambda batch: _without(student_inputs(batch, forward_columns(student), teacher_columns), labels),
        "teacher": lambda batch: _without(teacher_inputs(batch, teacher_columns), labels),
    }
    models = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    poolings = {"student": student_pooling, "teacher": teacher_pooling}
    with _evaluating(models.values()):
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
        tensors = _outputs(loader, models, inputs_of, poolings, labels)
        facts: dict[str, Any] = {"student": size_of(student)} | (
            {} if teacher is None else {"teacher": size_of(teacher)}
        )
        timed = {count: collate([dataset[i] for i in range(min(count, len(dataset)))]) for count in LATENCY_BATCHES}
        for name, model in models.items():
            flops = _flops(model, inputs_of[name](timed[1]))
            facts[name] |= {} if flops is None else {"flops": flops}
        for name, speed in _speed(models, inputs_of, timed).items():
            facts[name] |= speed
    comparable = _same_classes(student, teacher)
    for name, quality in _quality(tensors, ["student", "teacher"] if comparable else ["student"]).items():
        facts[name] = facts.get(name, {}) | quality
    facts |= _likeness(tensors, comparable and not _is_multiple(student))
    split = getattr(dataset, "split", None)
    facts |= {"examples": len(dataset)} | ({} if split is None else {"split": str(split)})
    return DistillationReport(facts | {"environment": _environment(student)}, tensors)


# ---- Outputs and quality ----


@torch.no_grad()
def _outputs(
    loader: Iterable[dict[str, Any]],
    models: dict[str, nn.Module],
    inputs_of: dict[str, Any],
    poolings: dict[str, Any],
    label_names: list[str],
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    with preserved_randomness():  # a loader draws a seed
        for batch in loader:
            found = {f"teacher_{name}": batch.get(f"teacher_{name}") for name in ("embedding", "logits")}
            for name, model in models.items():
                with named_errors(f"the {name}", batch):
                    found |= {
                        f"{name}_{key}": value
                        for key, value in _observe(model, poolings[name], inputs_of[name](batch)).items()
                    }
            rows = {
                name: value.float() for name, value in found.items() if isinstance(value, Tensor) and value.dim() == 2
            }
            labels = next((batch[name] for name in label_names if name in batch), None)
            if isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point():
                rows["labels"] = labels.masked_fill(labels < 0, NO_LABEL)  # GLUE's test sets have -1
            for name, value in rows.items():
                parts.setdefault(name, []).append(value.detach().cpu())
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


def class_names(model: nn.Module | None) -> dict[int, str] | None:
    """A model's classes by number; None where its config only numbers them."""
    names = getattr(getattr(unwrapped(model), "config", None), "id2label", None) or {}
    return None if all(name == f"LABEL_{label}" for label, name in names.items()) else names


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
        student, teacher = (evenly(each, ALIGNED_EXAMPLES) for each in rows)
        alignment = relational_alignment(student, teacher)
        if len(student) <= NEIGHBORS + 1:  # all the others are near
            del alignment["neighbor_overlap"]
        likeness["alignment"] = {name: value for name, value in alignment.items() if value == value}
        likeness["aligned_examples"] = len(student)
    return likeness


# ---- Size and speed ----


def size_of(model: nn.Module) -> dict[str, Any]:
    """Class, parameters, bytes and dtype of the weights: without our head, tied ones once, an adapter's base too."""
    weights = {name: weight for name, weight in model.named_parameters() if not name.startswith(f"{HEAD}.")}
    saved = model.state_dict().keys()
    buffers = {name: value for name, value in model.named_buffers() if name in saved}
    stored = [value for values in (weights, buffers) for value in values.values()]
    return {
        "class": type(unwrapped(model)).__name__,
        "parameters": sum(weight.numel() for weight in weights.values()),
        "bytes": sum(value.numel() * value.element_size() for value in stored),
        "dtype": next((str(each.dtype).removeprefix("torch.") for each in stored if each.is_floating_point()), "none"),
    }


@torch.no_grad()
def _flops(model: nn.Module, inputs: dict[str, Any]) -> int | None:
    """Of the forward of one example, as torch counts matrix products and convolutions; None where it counts none."""
    try:
        # The counter knows no fused attention of a CPU: the plain one is made of products that it does.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**placed(inputs, model))
    except (NotImplementedError, RuntimeError):  # kernels that are not torch's, as of some quantised weights
        return None
    return counter.get_total_flops() or None


@torch.no_grad()
def _speed(models: dict[str, nn.Module], inputs_of: dict[str, Any], timed: dict[int, Any]) -> dict[str, Any]:
    """Median and 95th percentile of a forward in milliseconds by batch size, the models in turns."""
    speed: dict[str, dict[str, Any]] = {name: {"latency_ms": {}} for name in models}
    for batch in timed.values():
        examples = examples_in(batch)
        ready = {name: placed(inputs_of[name](batch), model) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        start = time.perf_counter()
        for turn in range(WARM_UP + MOST):
            if turn >= WARM_UP + FEWEST and time.perf_counter() - start > SECONDS * len(models):
                break
            for name, model in models.items():
                seconds[name].append(_time_of(model, ready[name]))
        for name, taken in seconds.items():
            milliseconds = 1000 * torch.tensor(taken[WARM_UP:], dtype=torch.float64)
            median, p95 = milliseconds.quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
            speed[name]["latency_ms"][str(examples)] = {"median": median, "p95": p95}
            speed[name]["examples_per_second"] = 1000 * examples / median
    return speed


def _time_of(model: nn.Module, inputs: dict[str, Any]) -> float:
    device = next(model.parameters()).device
    _wait_for(device)
    start = time.perf_counter()
    model(**inputs)
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def _environment(model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
    return {"device": name, **threads, "torch": torch.__version__, "machine": platform.machine()}


# ---- Small things ----


@contextmanager
def _evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """The models in evaluation mode, and back."""
    modules = {module: module.training for model in models for module in model.modules()}
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in modules.items():
            module.training = training


def _without(inputs: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


def write_json(file: Path, facts: dict[str, Any]) -> Path:
    """Write facts as JSON, under a temporary name that is then renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    text = json.dumps(facts, indent=2, allow_nan=False, default=lambda value: value.item())  # NumPy's numbers
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, file)
    return file
