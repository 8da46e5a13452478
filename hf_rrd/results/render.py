"""A model card in words: the facts of a student as a page for the Hub."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_rrd.results.facts import ALIGNED, CardFacts, ModelFacts
from hf_rrd.results.pictures import PICTURES, place_of
from hf_rrd.results.report import NEIGHBORS
from hf_rrd.results.table import ALIGNMENT, HEADER, digits, markdown, percent, place, rows_of, size, whole

TEMPLATE = Path(__file__).with_name("card_template.md")

TAGS = ("hf-rrd", "knowledge-distillation", "relational-representation-distillation", "generated_from_trainer")
"""Of each card; the task's and the user's come after them."""


def render_card(facts: CardFacts) -> ModelCard:
    """The card of some facts. It says them and nothing else, so that the same facts always give the same card.

    Returns:
        The card; `str` of it is the page, `.data` its header.
    """
    learned = _learned(facts.settings)
    card = ModelCard.from_template(
        _header(facts),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        facts=facts,
        summary=_summary(facts, learned),
        report_rows=markdown(HEADER, rows_of(facts.report)) if facts.report else "",
        environment=place(facts.report["environment"]) if facts.report else "",
        metrics=_metric_table(facts),
        alignment="" if facts.report.get("alignment") else _alignment_table(facts),
        neighbors=NEIGHBORS,
        making=_making(facts, learned),
        settings=_settings(facts),
        losses=_losses(facts),
        versions=", ".join(f"{name.replace('python', 'Python')} {value}" for name, value in facts.versions.items()),
        pictures={name: f"![{PICTURES[name]}]({place_of(name)})" for name in facts.pictures},
        whole=whole,
        percent=percent,
    )
    return ModelCard(re.sub(r"\n{3,}", "\n\n", str(card)))  # where a section is left out


def _header(facts: CardFacts) -> ModelCardData:
    """The header in YAML. A metric is in it if the task and its data set are known to the Hub."""
    teacher = facts.teacher.name if facts.teacher else None
    metrics = [metric for metric in facts.metrics if not metric.name.startswith(ALIGNED)]
    results = [
        EvalResult(
            task_type=facts.task,
            dataset_type=metric.id,
            dataset_name=(facts.dataset.title if metric.id == facts.dataset.id else None) or metric.id,
            dataset_config=metric.config,
            dataset_split=metric.split,
            metric_type=metric.name,
            metric_name=metric.name.replace("_", " ").capitalize(),
            metric_value=metric.value,
        )
        for metric in metrics
        if facts.task and metric.id
    ]
    more: dict[str, Any] = {"distilled_from": teacher} if teacher else {}
    return ModelCardData(
        license=facts.license,
        language=facts.language,
        library_name=facts.library,
        pipeline_tag=facts.task,
        tags=[*dict.fromkeys([*TAGS, *([facts.task] if facts.task else []), *facts.tags])],
        datasets=[facts.dataset.id] if facts.dataset.id else None,
        # The Hub has no relation for a teacher: it stands here where the student has no other origin.
        base_model=facts.base_model or facts.student.name or teacher,
        metrics=[*dict.fromkeys(metric.name for metric in metrics)] or None,
        model_name=facts.name if results else None,
        eval_results=results or None,
        **more,
    )


# ---- Sentences ----


def _link(title: str | None, name: str | None, kind: str = "") -> str:
    return str(title) if name is None else f"[{title}](https://huggingface.co/{kind}{name})"


def _named(model: ModelFacts) -> str:
    """What a model is called, with its commit where that is known."""
    if model.description or not model.name:
        return model.description or f"a `{model.class_name}`"
    return _link(model.name, model.name) + (f" at revision `{model.revision[:12]}`" if model.revision else "")


def _learned(settings: dict[str, Any]) -> list[str]:
    """What the student learned from its teacher, by the weights that are known."""
    learned = ["its teacher's logits"] * (settings.get("kd_weight", 0) > 0)
    if settings.get("relational_weight", 0) > 0:
        bank = f" (against a bank of {whole(settings['bank_size'])} of its embeddings)"
        learned.append("the relations that its teacher sees between examples" + bank * bool(settings.get("bank_size")))
    return learned


def _summary(facts: CardFacts, learned: list[str]) -> str:
    student, teacher, data = facts.student, facts.teacher, facts.dataset
    text = f"A `{student.class_name}` of {whole(student.parameters)} parameters ({size(student.bytes)})"
    if learned:
        text += f", distilled from {_named(teacher) if teacher else 'cached outputs of its teacher'}"
        text += f" ({whole(teacher.parameters)} parameters)" if teacher and teacher.parameters else ""
    text += f" on {_link(data.title, data.id, 'datasets/')}" if data.title else ""
    return f"{text}. It is a plain {facts.library} model: it loads without the package that trained it."


def _making(facts: CardFacts, learned: list[str]) -> str:
    student, teacher, settings = facts.student, facts.teacher, facts.settings
    is_known = {"kd_weight", "relational_weight"} & settings.keys()
    text = f"With `hf_rrd`{': the student learned its task, without a teacher' if is_known else ''}."
    if learned:
        what = [*["its task"] * (settings.get("task_weight", 0) > 0), *learned]
        how = "By [relational representation distillation](https://arxiv.org/abs/2407.12073) with `hf_rrd`"
        how = how if settings.get("relational_weight", 0) > 0 else "With `hf_rrd`"
        text = f"{how}: the student learned {', '.join(what[:-1])}{' and ' * (len(what) > 1)}{what[-1]}."
    if teacher and teacher.name and not teacher.description:
        text += f" The teacher is {_named(teacher)}; it was frozen, and its weights are not part of the student."
    if student.teacher_layers:
        text += f" It started from layers {', '.join(map(str, student.teacher_layers))} of the teacher"
        text += f" ({student.copied_tensors} tensors copied, {student.fresh_tensors} fresh)."
    elif student.name:
        text += f" It started from {_named(student)}."
    examples = facts.dataset.train_examples
    return text + (f" The training set has {whole(examples)} examples." if examples else "")


# ---- Tables ----


def _metric_table(facts: CardFacts) -> str:
    rows = []
    for metric in facts.metrics:
        if metric.name.startswith(ALIGNED):
            continue
        title = metric.name.replace("_", " ") + (f", {metric.split} split" if metric.split else "")
        other = metric.id not in (None, facts.dataset.id)
        is_share = metric.name.startswith(_SHARES) and 0 <= metric.value <= 1
        value = percent(metric.value) if is_share else digits(metric.value, 4)
        rows.append((f"{title} of {metric.id}" if other else title, value))
    return markdown(("metric", "value"), rows) if rows else ""


_SHARES = ("accuracy", "f1", "precision", "recall", "exact_match")
"""Metrics from 0 to 1 that are read in percent."""


def _alignment_table(facts: CardFacts) -> str:
    """Alignment at the last evaluation that measured it."""
    found = {metric.name.removeprefix(ALIGNED): metric for metric in facts.metrics if metric.name.startswith(ALIGNED)}
    rows = [(each.title, each.written(found[name].value)) for name, each in ALIGNMENT.items() if name in found]
    split = next((f", {metric.split} split" for metric in found.values() if metric.split), "")
    return markdown((f"at an evaluation{split}", "value"), rows) if rows else ""


def _settings(facts: CardFacts) -> str:
    rows = [(f"`{name}`", _setting(value)) for name, value in facts.settings.items()]
    rows += [(name.replace("_", " "), _setting(value)) for name, value in facts.training.items()]
    return markdown(("setting", "value"), rows) if rows else ""


def _setting(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return whole(value) if isinstance(value, int) else f"{value:g}"


def _losses(facts: CardFacts) -> str:
    """The terms in the first and the last line of the log; where that is one line, once."""
    single = all(term.first_step == term.last_step for term in facts.losses)
    rows = []
    for term in facts.losses:
        ends = ((term.first, term.first_step), (term.last, term.last_step))[single:]
        rows.append((f"`{term.name}`", *(f"{digits(value, 4)} (step {whole(step)})" for value, step in ends)))
    header = ("in the training log", *("first line", "last line")[single:])
    return markdown(header, rows) if rows else ""
