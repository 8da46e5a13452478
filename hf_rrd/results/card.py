"""The model card of a student: the facts of its run, as a page for the Hub."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_rrd.results.facts import TAGS, hub_name
from hf_rrd.results.table import ALIGNMENT, HEADER, digits, percent, place, rows_of, size, whole

TEMPLATE = Path(__file__).with_name("card_template.md")

_SHARES = ("accuracy", "f1", "precision", "recall", "exact_match")
"""Metrics from 0 to 1 that are read in percent."""


def render_card(
    facts: dict[str, Any],
    pictures: dict[str, str] | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """A card that says the facts of a run, and nothing else.

    Args:
        facts: Of `run_facts`, also as read from JSON.
        pictures: Where they are beside the card, by `losses`, `similarities`, `embeddings` and `reliability`.
        license: Of the student, as the Hub names licences.
        language: Of its texts, as ISO codes.
        tags: More of them.
        base_model: Its name on the Hub, what the student derives from. Default: the weights that it started from, or
            its teacher.

    Returns:
        The card; `str` of it is the page, `.data` its header.
    """
    data = _header(facts, license, language, [tags] if isinstance(tags, str) else tags or [], base_model)
    report = facts.get("report", {})
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=facts["name"],
        summary=_summary(facts),
        usage=_usage(facts),
        report_rows=markdown(HEADER, rows_of(report)) if report else "",
        report_note=_report_note(report),
        metrics=_metrics(facts) if facts.get("metrics") else "",
        alignment=_alignment(facts),
        making=_making(facts),
        command=facts.get("command"),
        settings=_settings(facts),
        losses=_losses(facts),
        versions=_versions(facts),
        limits=_limits(facts),
        pictures=pictures or {},
        hf_rrd_version=facts["versions"].get("hf_rrd", ""),
    )
    return ModelCard(re.sub(r"\n{3,}", "\n\n", str(card)))  # where a section is left out


def markdown(header: Any, rows: Any) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    cells = [
        [" ".join(str(cell).split()).replace("|", "&#124;").replace("<", "&lt;") for cell in line] for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _header(
    facts: dict[str, Any], license: str | None, language: Any, tags: list[str], base_model: str | None
) -> ModelCardData:
    dataset, task = facts.get("dataset", {}), facts.get("task")
    # The Hub has no relation for a teacher: it stands under `base_model` where the student has no other origin there.
    teacher = facts.get("teacher", {}).get("name")
    origin = hub_name(base_model) or facts["student"].get("name") or teacher
    results = [
        EvalResult(
            task_type=task,
            dataset_type=metric["id"],
            dataset_name=dataset.get("title", metric["id"]) if metric["id"] == dataset.get("id") else metric["id"],
            dataset_config=metric.get("config"),
            dataset_split=metric.get("split"),
            metric_type=metric["name"],
            metric_name=metric["name"].replace("_", " ").capitalize(),
            metric_value=metric["value"],
        )
        for metric in facts.get("metrics", [])
        if task and "id" in metric
    ]
    return ModelCardData(
        license=license,
        language=language,
        library_name=facts["library"],
        pipeline_tag=task,
        tags=[*dict.fromkeys([*TAGS, *([task] if task else []), *tags])],
        datasets=[dataset["id"]] if dataset.get("id") else None,
        base_model=origin,
        metrics=[*dict.fromkeys(metric["name"] for metric in facts.get("metrics", []))] or None,
        model_name=facts["name"] if results else None,
        eval_results=results or None,
        **({"distilled_from": teacher} if teacher else {}),
    )


def _summary(facts: dict[str, Any]) -> str:
    student, teacher, dataset = facts["student"], facts.get("teacher", {}), facts.get("dataset", {})
    text = f"A `{student['class']}` of {whole(student['parameters'])} parameters ({size(student['bytes'])})"
    if _distils(facts):
        text += (
            f", distilled from {_teacher(teacher)}" if teacher else ", distilled from cached outputs of its teacher"
        )
        text += f" ({whole(teacher['parameters'])} parameters)" if "parameters" in teacher else ""
    if "title" in dataset:
        text += f" on {_link(dataset['title'], dataset.get('id'), 'datasets/')}"
    return f"{text}. It is a plain {facts['library']} model: it loads without the package that trained it."


def _distils(facts: dict[str, Any]) -> bool:
    return facts["settings"]["relational_weight"] > 0 or facts["settings"]["kd_weight"] > 0


def _teacher(teacher: dict[str, Any]) -> str:
    if "description" in teacher:
        return str(teacher["description"])
    if "name" not in teacher:
        return f"a `{teacher['class']}`"
    revision = f" at revision `{teacher['revision'][:12]}`" if "revision" in teacher else ""
    return _link(teacher["name"], teacher["name"]) + revision


def _link(title: str, name: str | None, kind: str = "") -> str:
    return title if name is None else f"[{title}](https://huggingface.co/{kind}{name})"


def _usage(facts: dict[str, Any]) -> str:
    """Four lines, or three where nothing prepares the input; none for a class that is not in transformers."""
    usage, name = facts.get("usage"), facts.get("repository") or facts["name"]
    if usage is None:
        return ""
    model_class, processor = usage["model_class"], usage.get("processor_class")
    more = f", num_labels={usage['num_labels']}" if "num_labels" in usage else ""
    given = f'**processor({_EXAMPLES.get(usage["input"], "inputs")}, return_tensors="pt")'
    result, output = "outputs", ""
    if "pooling" in usage:
        result, output = "embedding", _OUTPUTS.get(usage["pooling"], ".last_hidden_state")
    elif "output" in usage:
        result, output = usage["output"], f".{usage['output']}"
    lines = [
        f"from transformers import {', '.join(sorted([model_class, *([processor] if processor else [])]))}",
        *([f'processor = {processor}.from_pretrained("{name}")'] if processor else []),
        f'model = {model_class}.from_pretrained("{name}"{more})',
        f"{result} = model({given if processor else usage['input'] + '=' + usage['input']}){output}",
    ]
    return "\n".join(lines)


_EXAMPLES = {"input_ids": '"a text"', "pixel_values": "image", "input_values": "waveform"}
_OUTPUTS = {
    "mean": ".last_hidden_state.mean(1)",
    "cls": ".last_hidden_state[:, 0]",
    "last_token": ".last_hidden_state[:, -1]",
    "max": ".last_hidden_state.amax(1)",
    "pooler": ".pooler_output",
    "gap": ".last_hidden_state.mean((2, 3))",
}
"""From a model's output for one example to its embedding, by pooling."""


def _report_note(report: dict[str, Any]) -> str:
    if not report:
        return ""
    split = f" of the {report['split']} split" if "split" in report else ""
    return (
        f"On the same {whole(report['examples'])} examples{split} and the same machine: "
        f"{place(report['environment'])}. Latency is that of a forward, without preparing its input."
    )


def _metrics(facts: dict[str, Any]) -> str:
    rows = []
    for metric in facts.get("metrics", []):
        title = metric["name"].replace("_", " ") + (f", {metric['split']} split" if "split" in metric else "")
        other = metric.get("id") not in (None, facts.get("dataset", {}).get("id"))
        rows.append((f"{title} of {metric['id']}" if other else title, metric))
    return markdown(("metric", "value"), [(title, _metric(each["name"], each["value"])) for title, each in rows])


def _metric(name: str, value: float) -> str:
    is_share = name.startswith(_SHARES) and 0 <= value <= 1
    return percent(value) if is_share else digits(value, 4)


def _alignment(facts: dict[str, Any]) -> str:
    """What the table of the report does not say yet."""
    alignment = facts.get("report", {}).get("alignment")
    if alignment is not None:
        return (
            f"Of {whole(facts['report']['aligned_examples'])} examples, the embeddings as the two models pool them. "
            "CKA is linear and debiased, the rank correlation is Spearman's of all pairwise cosine similarities; "
            "both are 1 where the relations are the same."
            + " The nearest neighbours are an example's 10 by cosine."
            * ("neighbor_overlap" in alignment)
        )
    rows = [
        (title, form(facts["alignment"][name]))
        for name, (title, form) in ALIGNMENT.items()
        if name in facts.get("alignment", {})
    ]
    split = facts["alignment"].get("split") if rows else None
    return (
        markdown((f"at an evaluation, {split} split" if split else "at an evaluation", "value"), rows) if rows else ""
    )


def _making(facts: dict[str, Any]) -> str:
    settings, student, teacher = facts["settings"], facts["student"], facts.get("teacher", {})
    learned = ["its task"] * (settings["task_weight"] > 0) + ["its teacher's logits"] * (settings["kd_weight"] > 0)
    if settings["relational_weight"] > 0:
        relation = "the relations that its teacher sees between examples"
        bank = settings.get("bank_size", 0)
        learned.append(f"{relation} (against a bank of {whole(bank)} of its embeddings)" if bank else relation)
    if not learned or not _distils(facts):
        text = "With `hf_rrd`: the student learned its task, without a teacher."
    else:
        rrd = "By [relational representation distillation](https://arxiv.org/abs/2407.12073) with `hf_rrd`"
        text = f"{rrd if settings['relational_weight'] > 0 else 'With `hf_rrd`'}: the student learned "
        text += f"{' and '.join([', '.join(learned[:-1])] * (len(learned) > 1) + learned[-1:])}."
    if teacher and "description" not in teacher and "name" in teacher:
        text += f" The teacher is {_teacher(teacher)}; it was frozen, and its weights are not part of the student."
    if "from_teacher" in student:
        start = student["from_teacher"]
        text += f" It started from layers {', '.join(map(str, start['layers']))} of the teacher"
        text += f" ({start['copied']} tensors copied, {start['fresh']} fresh)."
    elif "name" in student:
        revision = f" at revision `{student['revision'][:12]}`" if "revision" in student else ""
        text += f" It started from {_link(student['name'], student['name'])}{revision}."
    examples = facts.get("dataset", {}).get("train_examples")
    return text + (f" The training set has {whole(examples)} examples." if examples else "")


def _settings(facts: dict[str, Any]) -> str:
    shown = {name: _setting(name, value) for name, value in facts["settings"].items()}
    training = {name.replace("_", " "): _setting(name, value) for name, value in facts["training"].items()}
    rows = [(f"`{name}`", value) for name, value in shown.items()] + [*training.items()]
    return markdown(("setting", "value"), rows)


def _setting(name: str, value: Any) -> str:
    if name == "seconds":
        return digits(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return whole(value) if isinstance(value, int) else f"{value:g}"


def _losses(facts: dict[str, Any]) -> str:
    places = ["first", "last"]
    if all(each["first_step"] == each["last_step"] for each in facts.get("losses", [])):
        places = ["last"]
    rows = [
        (f"`{each['name']}`", *(f"{digits(each[at], 4)} (step {whole(each[f'{at}_step'])})" for at in places))
        for each in facts.get("losses", [])
    ]
    return markdown(("in the training log", *(f"{at} line" for at in places)), rows) if rows else ""


def _versions(facts: dict[str, Any]) -> str:
    versions = {"Python" if name == "python" else name: value for name, value in facts["versions"].items()}
    return f"With {', '.join(f'{name} {value}' for name, value in versions.items())}."


def _limits(facts: dict[str, Any]) -> str:
    limits, report = [], facts.get("report", {})
    if facts.get("metrics") or report:
        where = facts.get("dataset", {}).get("title")
        limits.append(f"The figures are of {where or 'one data set'}; on other data they are unknown.")
    if "seed" in facts["training"]:
        limits.append(f"One run, with seed {facts['training']['seed']}: how far other seeds differ was not measured.")
    if "agreement" in report:
        limits.append(
            f"It follows its teacher in {percent(report['agreement'])} of the examples, and so also in its errors."
        )
    if report:
        limits.append("Latency is that of the machine named above, and another elsewhere.")
    return "\n".join(f"- {limit}" for limit in limits)
