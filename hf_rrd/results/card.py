"""The model card of a student: from what is known of it to the page and its files."""

import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from hf_rrd.files import write_json, written_whole
from hf_rrd.models.body import is_classifier, unwrapped
from hf_rrd.models.sentence_transformers import is_sentence_transformer, kind_of, load
from hf_rrd.models.teacher import load_teacher
from hf_rrd.results.facts import (
    OURS,
    CardFacts,
    DataFacts,
    EmbedderFacts,
    Metric,
    embedder_facts,
    home_of_package,
    hub_name,
    last_losses,
    model_facts,
    task_of,
    usage_of,
    versions_in_use,
)
from hf_rrd.results.pictures import PICTURES, draw_pictures, place_of
from hf_rrd.results.report import NEIGHBORS, DistillationReport, class_names
from hf_rrd.results.table import HEADER, markdown, place, rows_of, size, whole

CARD = "README.md"
FACTS_FILE = "model_card.json"  # beside the card, and not pushed
HIDDEN, JOINERS = ("Cc", "Cf", "Cs"), "\u200c\u200d"  # Unicode's categories; Persian and emoji need the joiners
MARKUP = str.maketrans({"<": "&lt;", "[": "&#91;", "]": "&#93;", "`": "&#96;", "|": "&#124;"})
EMBEDDER, TASKS, FEATURES = "SentenceTransformer", {"input_ids": "sentence-similarity"}, "feature-extraction"
TEMPLATE = Path(__file__).with_name("card_template.md")


def write_card(
    folder: str | os.PathLike[str],
    student: nn.Module | str | os.PathLike[str],
    *,
    teacher: nn.Module | str | os.PathLike[str] | None = None,
    teacher_name: str | None = None,
    dataset: str | DataFacts | None = None,
    settings: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    log_history: Sequence[Mapping[str, Any]] = (),
    report: DistillationReport | None = None,
    metrics: Mapping[str, float] | Sequence[Metric] = (),
    baseline: Mapping[str, float] | None = None,
    embedder: EmbedderFacts | None = None,
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
        student: A transformers model, a PEFT model around one, a SentenceTransformer, or a Hub name or folder.
        teacher: The same, where it is at hand.
        teacher_name: What to call the teacher. Default: its name on the Hub and its revision, if it is from there.
        dataset: The training set's name on the Hub, "user/name", or what to call it.
        settings: Of the distillation, by the names of `RelationalDistillationConfig`; any of them may be missing.
        training: More to tell of the training, such as `epochs`, `learning_rate` and `seed`. With `best_step` the card
            says that the student is that of this step, and gives its losses.
        log_history: Lines with `step`, `loss` and its terms, as `trainer.state.log_history` has them.
        report: The comparison with the teacher, as `compare_models` gives it.
        metrics: Values by name, of `dataset`. Default: the report's accuracy.
        baseline: Values by the same names, of the same student without distillation.
        embedder: What the student is as a model of sentence-transformers. Default: what it says itself, if it is one.
        processing_class, pooling: The student's tokenizer or processor, and how it is pooled if it is headless.
        name, repository: The student's name (default: of its repository or folder), and "user/name" on the Hub.
        task, license, language, tags: As the Hub names them. Default of the task: by the model's class.
        base_model: What it derives from, on the Hub. Default: the weights that it started from, or its teacher.

    Returns:
        The facts of the card.

    Raises:
        ValueError: A model cannot be loaded, or a metric, one of the baseline too, is no finite number.

    Example:

    ```python
    report = compare_models(student, teacher, validation)
    write_card("out", student, teacher=teacher, report=report, dataset="stanfordnlp/sst2", training={"seed": 0})
    ```
    """
    if isinstance(student, str | os.PathLike) and pooling == "auto" and kind_of(student, {}) == EMBEDDER:
        student = load(student, {})
    if is_sentence_transformer(student) and embedder is None:
        embedder = embedder_facts(student)
    folder, model = Path(folder), load_teacher(student, argument="student")
    about, names = model_facts(model), class_names(model)
    if model is not student:  # it started from elsewhere
        about.name = about.revision = about.encoder = None
    measured: dict[str, Any] = {} if report is None else report.facts
    if not isinstance(dataset, DataFacts):
        dataset = DataFacts(id=hub_name(dataset) if dataset and "/" in dataset else None, title=dataset)
    if not metrics and "accuracy" in measured.get("student", {}):
        metrics = {"accuracy": measured["student"]["accuracy"]}
    if isinstance(metrics, Mapping):
        metrics = [Metric(each, value, dataset.id, split=measured.get("split")) for each, value in metrics.items()]
    _check_finite("metrics", [(each.name, each.value) for each in metrics])
    _check_finite("baseline", (baseline or {}).items())
    last = (training or {}).get("best_step", math.inf)
    libraries = ["peft"] * (unwrapped(model) is not model) + ["sentence_transformers"] * (embedder is not None)
    facts = CardFacts(
        name=name or (repository or str(folder.absolute())).split("/")[-1],
        library=(libraries or ["transformers"])[-1].replace("_", "-"),
        student=about,
        repository=repository,
        task=task or (task_of(unwrapped(model)) if embedder is None else TASKS.get(embedder.reads, FEATURES)),
        usage=usage_of(model, processing_class, pooling),
        embedder=embedder,
        teacher=model_facts(load_teacher(teacher), teacher_name),
        dataset=dataset,
        settings=dict(settings or {}),
        training=dict(training or {}),
        classes=[str(name) for _, name in sorted((names or {}).items())] if is_classifier(model) else [],
        losses=last_losses(line for line in log_history if line.get("step", 0) <= last),
        metrics=list(metrics),
        baseline=dict(baseline or {}),
        report=measured,
        pictures=draw_pictures(folder, log_history, report, names),
        versions=versions_in_use(*libraries),
        made_with=home_of_package(),
        license=license,
        language=language,
        tags=[tags] if isinstance(tags, str) else list(tags or ()),
        base_model=hub_name(base_model),
    )
    file = write_json(folder / FACTS_FILE, facts.to_json())
    facts = CardFacts.from_json(json.loads(file.read_text(encoding="utf-8")))  # the card says what the file says
    with written_whole(folder / CARD) as temporary:
        render_card(facts).save(temporary)
    return facts


def render_card(facts: CardFacts) -> ModelCard:
    """The card of some facts, and of nothing else: the same facts always give the same card."""
    plain = CardFacts.from_json(_rewritten(facts.to_json(), _plain))
    facts = CardFacts.from_json(_rewritten(facts.to_json(), _escaped))
    card = ModelCard.from_template(
        _header(plain),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        facts=facts,
        folder=plain.repository or plain.name,
        compared=markdown(HEADER, rows_of(facts.report)),
        metrics=_results(facts),
        settings=_table("setting", facts.settings | facts.training),
        losses=_table(
            f"last in the training log{', to the best step' if 'best_step' in facts.training else ''}", facts.losses
        ),
        pictures={name: f"![{PICTURES[name]}]({place_of(name)})" for name in facts.pictures},
        neighbors=NEIGHBORS,
        place=place,
        size=size,
        whole=whole,
    )
    return ModelCard(re.sub(r"\n{3,}", "\n\n", str(card)))  # where a section is left out


def _rewritten(value: Any, write: Callable[[str], str]) -> Any:
    """A JSON value with each of its texts, names too, written in another way."""
    if isinstance(value, dict):
        return {write(name): _rewritten(each, write) for name, each in value.items()}
    if isinstance(value, list):
        return [_rewritten(each, write) for each in value]
    return write(value) if isinstance(value, str) else value


def _plain(text: str) -> str:
    """Somebody's text on one line, without what cannot be seen, such as marks that turn the direction of reading."""
    kept = (each for each in " ".join(text.split()) if each in JOINERS or unicodedata.category(each) not in HIDDEN)
    return "".join(kept)


def _escaped(text: str) -> str:
    """The same as it has to stand in a page of Markdown: no HTML, no link, no code and no cell comes of it."""
    return _plain(text).translate(MARKUP)


def _results(facts: CardFacts) -> str:
    """The metrics of a student; with a baseline beside it, and beside the teacher where a report measured it."""
    report, baseline = facts.report, facts.baseline
    source = [report.get(name) for name in ("id", "config", "split")]
    teachers = {"accuracy": report["teacher"]["accuracy"]} if "accuracy" in report.get("teacher", {}) else {}
    rows = []
    for each in facts.metrics:
        is_same = [each.id, each.config, each.split] == source
        others = baseline.get(each.name), teachers.get(each.name) if is_same else None
        rows.append([each.name, f"{each.id or ''} {each.split or ''}", each.value, *others])
    names = [each.name for each in facts.metrics]
    rows += [[name, "", None, value, None] for name, value in baseline.items() if name not in names]
    header = ["metric", "data", "value", "without distillation", "teacher"]
    kept = header if any(row[-1] is not None for row in rows) else header[:-1]
    kept = kept if baseline else header[:3]
    return markdown(kept, [["" if cell is None else _written(cell) for cell in row[: len(kept)]] for row in rows])


def _check_finite(argument: str, values: Iterable[tuple[str, Any]]) -> None:
    for name, value in values:
        if not isinstance(value, Real) and not hasattr(value, "item") or not math.isfinite(value):
            raise ValueError(f"`{argument}` must be finite numbers, got {name} {value!r}.")


def _table(title: str, values: Mapping[str, Any]) -> str:
    return markdown((title, "value"), [(f"`{name}`", _written(value)) for name, value in values.items()])


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _header(facts: CardFacts) -> ModelCardData:
    """The header in YAML. The value of a metric is in it if the Hub knows its task and its data set."""
    tags = ["hf-rrd", "knowledge-distillation", "relational-representation-distillation", "generated_from_trainer"]
    if facts.embedder is not None:
        tags += ["sentence-transformers", *TASKS.values(), FEATURES]
    metrics = [metric for metric in facts.metrics if not metric.name.startswith(OURS)]
    results = [
        EvalResult(
            facts.task, each.id, each.id, each.name, each.value, dataset_config=each.config, dataset_split=each.split
        )
        for each in metrics
        if facts.task and each.id
    ]
    return ModelCardData(
        license=facts.license,
        language=facts.language,
        library_name=facts.library,
        pipeline_tag=facts.task,
        tags=[*dict.fromkeys(filter(None, (*tags, facts.task, *facts.tags)))],
        datasets=[facts.dataset.id] if facts.dataset.id else None,
        # The Hub has no relation for a teacher: it stands here where the student has no other origin.
        base_model=facts.base_model or facts.student.name or facts.teacher.name,
        distilled_from=facts.teacher.name,
        metrics=[*dict.fromkeys(metric.name for metric in metrics)] or None,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )
