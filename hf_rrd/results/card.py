"""Writing the model card of a student: from what is given to the files."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_rrd.files import write_json, written_whole
from hf_rrd.models.body import unwrapped
from hf_rrd.results.facts import (
    CardFacts,
    DataFacts,
    Metric,
    hub_name,
    loss_terms,
    student_facts,
    task_of,
    teacher_facts,
    usage_of,
    versions_in_use,
)
from hf_rrd.results.pictures import draw_pictures
from hf_rrd.results.render import render_card
from hf_rrd.results.report import DistillationReport, class_names

CARD = "README.md"

FACTS_FILE = "model_card.json"
"""The facts of a card, beside it; not pushed."""


def write_card(
    folder: str | os.PathLike[str],
    student: nn.Module,
    *,
    teacher: nn.Module | None = None,
    teacher_name: str | None = None,
    dataset: str | DataFacts | None = None,
    settings: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    log_history: Sequence[Mapping[str, Any]] = (),
    report: DistillationReport | None = None,
    metrics: Mapping[str, float] | Sequence[Metric] = (),
    processing_class: Any = None,
    pooling: Any = "auto",
    name: str | None = None,
    repository: str | None = None,
    task: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    base_model: str | None = None,
) -> CardFacts:
    """Write a student's card, `README.md`, with its facts in `model_card.json` and its pictures in `figures`.

    The card says what it is given and what the models say of themselves, and nothing else. Nothing is fetched. The
    pictures need matplotlib.

    Args:
        folder: Where the student is saved.
        student: A transformers model, or a PEFT model around one.
        teacher: The teacher, where it is at hand.
        teacher_name: What to call the teacher. Default: its name on the Hub and its revision, if it is from there.
        dataset: The training set's name on the Hub, "user/name", or what to call it.
        settings: Of the distillation, by the names of `RelationalDistillationConfig`.
        training: More to tell of the training, such as `epochs`, `learning_rate` and `seed`.
        log_history: Lines with `step`, `loss` and its terms, as `trainer.state.log_history` has them.
        report: The comparison with the teacher, as `compare_models` gives it.
        metrics: Values by name, of `dataset`. Default: the report's accuracy.
        processing_class: The student's tokenizer or processor.
        pooling: How a headless student is pooled.
        name: What to call the student. Default: the name of its repository or folder.
        repository: The student's name on the Hub, "user/name".
        task: The Hub's name of the task. Default: by the model's class.
        license, language, tags: Of the student, as the Hub names them.
        base_model: On the Hub, what the student derives from. Default: the weights that it started from, or its
            teacher.

    Returns:
        The facts of the card.

    Example:

    ```python
    report = compare_models(student, teacher, validation)
    write_card("out", student, teacher=teacher, report=report, dataset="stanfordnlp/sst2", training={"seed": 0})
    ```
    """
    folder, model = Path(folder), unwrapped(student)
    if not isinstance(dataset, DataFacts):
        found = hub_name(dataset) if dataset and "/" in dataset else None
        dataset = DataFacts(id=found, title=dataset)
    name = name or (repository or str(folder.absolute())).split("/")[-1]
    library = "transformers" if model is student else "peft"
    facts = CardFacts(
        name=name,
        library=library,
        student=student_facts(student),
        repository=repository,
        task=task or task_of(model)[0],
        usage=usage_of(student, processing_class, pooling, repository or name),
        teacher=teacher_facts(teacher, teacher_name),
        dataset=dataset,
        settings=dict(settings or {}),
        training=dict(training or {}),
        losses=loss_terms(log_history),
        metrics=_metrics(metrics, dataset, report),
        report={} if report is None else report.facts,
        pictures=draw_pictures(folder, log_history, report, class_names(student)),
        versions=versions_in_use(library),
        license=license,
        language=language,
        tags=[tags] if isinstance(tags, str) else list(tags or ()),
        base_model=hub_name(base_model),
    )
    write_json(folder / FACTS_FILE, facts.to_json())
    with written_whole(folder / CARD) as temporary:
        render_card(facts).save(temporary)
    return facts


def _metrics(
    given: Mapping[str, float] | Sequence[Metric], dataset: DataFacts, report: DistillationReport | None
) -> list[Metric]:
    """The metrics that were given; without any, the report's accuracy."""
    metrics = list(given) if not isinstance(given, Mapping) else []
    values = dict(given) if isinstance(given, Mapping) else {}
    measured = {} if report is None else report.facts
    if not metrics and not values and "accuracy" in measured.get("student", {}):
        values = {"accuracy": measured["student"]["accuracy"]}
    metrics += [Metric(name, value, dataset.id, split=measured.get("split")) for name, value in values.items()]
    return metrics
