"""A card says the facts of its run and nothing else."""

import json
import math
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import BertTokenizer

from hf_rrd import RelationalDistillationTrainer, cache_teacher_outputs, student_from_teacher
from hf_rrd.results.card import FACTS_FILE
from hf_rrd.results.facts import CardFacts, hub_name, source_of, task_of
from hf_rrd.results.render import TEMPLATE, render_card
from tests.builders import Images, Texts, tiny_bert, tiny_vit, trainer
from tests.loopback_hub import header_errors

DATASET = {"dataset_tags": "org/images", "dataset": "Images"}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


def finished(folder: Path, report: bool = True, **settings: Any) -> RelationalDistillationTrainer:
    """A run that was trained, evaluated and compared with its teacher."""
    run = trainer(folder, **({"eval_dataset": Images(40, seed=3), "compute_metrics": accuracy} | settings))
    run.train()
    run.evaluate(metric_key_prefix="test")
    if report:
        run.report()
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RelationalDistillationTrainer:
    patch = pytest.MonkeyPatch()
    patch.setattr("hf_rrd.results.measure.MOST", 3)
    yield finished(tmp_path_factory.mktemp("run") / "student", alignment_examples=40, kd_weight=0.5)  # type: ignore[misc]
    patch.undo()


def card_of(run: RelationalDistillationTrainer, **given: Any) -> ModelCard:
    run.create_model_card(**given)
    return ModelCard.load(Path(run.args.output_dir, "README.md"))


def facts_of(run: RelationalDistillationTrainer) -> dict[str, Any]:
    return json.loads(Path(run.args.output_dir, FACTS_FILE).read_text())


def numbers_in(facts: Any) -> set[float]:
    """All numbers of a JSON value, those within its texts too."""
    if isinstance(facts, dict):
        return set().union(*(numbers_in(each) for each in [*facts, *facts.values()]), set())
    if isinstance(facts, list):
        return set().union(*map(numbers_in, facts), set())
    if isinstance(facts, str):
        return {float(found) for found in re.findall(r"\d+(?:\.\d+)?", facts)}
    return {float(facts)} if isinstance(facts, int | float) and not isinstance(facts, bool) else set()


def numbers_shown(card: str) -> list[tuple[str, int]]:
    """The numbers of a page without its header and its citations: the digits, and how many of them count."""
    page = card.split("---\n", 2)[2].split("## Citation")[0].replace("arxiv.org/abs/2407.12073", "")
    page = re.sub(r"figures/\w+\.png", "", page)
    shown = []
    for found in re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?", page):
        digits = re.sub(r"e.*|[-,.]", "", found).lstrip("0")
        shown.append((found.replace(",", ""), len(digits)))
    return shown


def is_said_by(shown: str, digits: int, numbers: set[float]) -> bool:
    """Whether a number on a page is one of the facts, rounded to its digits, maybe in other units."""
    value = float(shown)
    for number in numbers:
        for power in (0, 2, 3, -3, -6, -9, -12):  # a share in percent, milliseconds, kB, MB, GFLOP
            scaled = number * 10.0**power
            if math.isclose(value, scaled, rel_tol=1e-9, abs_tol=1e-12):
                return True
            decimals = len(shown.split("e")[0].partition(".")[2])
            if power in (0, 2) and "e" not in shown and round(scaled, decimals) == value and decimals > 0:
                return True
            if digits >= 3 and scaled and float(f"{scaled:.{digits}g}") == value:
                return True
    return False


def unsaid(card: str, facts: dict[str, Any]) -> list[str]:
    """The numbers of a page that are neither among its facts nor ratios of student and teacher."""
    numbers = numbers_in(facts)
    report = facts.get("report", {})
    for name, value in _flat(report.get("student", {})).items():
        other = _flat(report.get("teacher", {})).get(name)
        numbers |= {float(f"{value / other:.3g}")} if other else set()
    fixed = {1.0, 10.0, 32.0, 95.0}  # batches, the percentile, the neighbours, and 1 as the best alignment
    return [text for text, digits in numbers_shown(card) if not is_said_by(text, digits, numbers | fixed)]


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            flat[prefix + name] = value
    return flat


def test_every_number_of_a_card_is_among_the_facts_of_the_run(run: RelationalDistillationTrainer) -> None:
    card = str(card_of(run, **DATASET))
    assert len(numbers_shown(card)) > 60
    assert unsaid(card, facts_of(run)) == [] and header_errors(card) == []
    wrong = card.replace("| accuracy | ", "| accuracy | 99.87 % ", 1)
    assert unsaid(wrong, facts_of(run)) == ["99.87"], "the check sees a number that is not among them"


def test_the_cards_of_our_own_students_say_the_facts_beside_them() -> None:
    folders = sorted(path.parent for path in (Path(__file__).parents[2] / "model_cards").glob(f"*/{FACTS_FILE}"))
    assert len(folders) >= 4
    for folder in folders:
        card, facts = ModelCard.load(folder / "README.md"), json.loads((folder / FACTS_FILE).read_text())
        assert unsaid(str(card), facts) == [], folder.name
        assert header_errors(str(card)) == [], folder.name
        pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", card.text)
        assert len(pictures) >= 3 and all((folder / picture).is_file() for picture in pictures)
        again = render_card(CardFacts.from_json(facts))
        assert str(again).strip() == str(card).strip(), f"{folder.name} was rendered by another version"


def test_a_card_is_a_function_of_its_facts(run: RelationalDistillationTrainer) -> None:
    card = card_of(run, license="mit", tags="mine", language=["en", "de"], finetuned_from="org/base", **DATASET)
    facts = CardFacts.from_json(facts_of(run))
    assert str(render_card(facts)).strip() == str(card).strip()
    assert facts.to_json() == facts_of(run)


def test_the_header_has_what_the_hub_reads(run: RelationalDistillationTrainer) -> None:
    data = card_of(run, license="apache-2.0", language="en", tags="digits", model_name="a-student", **DATASET).data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", "en", "transformers")
    assert data.pipeline_tag == "image-classification"
    ours = {"hf-rrd", "knowledge-distillation", "relational-representation-distillation", "image-classification"}
    assert ours | {"digits"} <= set(data.tags)
    assert data.datasets == ["org/images"] and data.metrics == ["accuracy"]
    (result,) = data.eval_results
    logged = next(entry["test_accuracy"] for entry in run.state.log_history if "test_accuracy" in entry)
    assert (data.model_name, result.task_type) == ("a-student", "image-classification")
    assert (result.dataset_type, result.dataset_name, result.dataset_split) == ("org/images", "Images", "test")
    assert (result.metric_type, result.metric_value) == ("accuracy", logged)
    assert "base_model" not in data.to_dict(), "neither student nor teacher has a name on the Hub"


def test_what_is_unknown_is_absent(tmp_path: Path) -> None:
    run = trainer(tmp_path / "student", train_dataset=Images(16))
    card = card_of(run)
    header, page = card.data.to_dict(), card.text
    assert header.keys() == {"library_name", "pipeline_tag", "tags"}
    for section in ("Teacher and student", "Results", "How alike", "!["):
        assert section not in page
    for nothing in ("None", "nan", "null", "unknown", "[]", "{}", "More information"):
        assert nothing not in page.split("## Citation")[0]
    assert "\n\n\n" not in page


def test_only_the_names_of_models_on_the_hub_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = {"org/teacher": ["0123456789abcdef0123"], "org/small": ["aaaa", "bbbb"]}

    def cached(name: str, file: str) -> str | None:
        for commit in commits.get(name, []):
            (tmp_path / "cache" / name / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        return str(tmp_path / "cache" / name / "snapshots" / commits[name][0] / file) if name in commits else None

    monkeypatch.setattr("hf_rrd.results.facts.try_to_load_from_cache", cached)
    teacher, student = tiny_vit(width=24, seed=1), tiny_vit()
    teacher.config._name_or_path = "org/teacher"
    run = trainer(tmp_path, teacher=teacher, model=student)
    card = card_of(run)
    assert card.data.base_model == "org/teacher" and card.data.distilled_from == "org/teacher"
    assert "[org/teacher](https://huggingface.co/org/teacher) at revision `0123456789ab`" in card.text
    student.config._name_or_path = "org/small"
    card = card_of(run)
    assert card.data.base_model == "org/small"
    assert "It started from [org/small](https://huggingface.co/org/small)." in card.text, (
        "one of two commits: not said"
    )
    assert card_of(run, finetuned_from="org/other").data.base_model == "org/other"
    for name in (str(tmp_path), "runs/moved_since", ""):
        teacher.config._name_or_path = student.config._name_or_path = name
        data = card_of(run, finetuned_from="/home/someone/model").data.to_dict()
        assert "base_model" not in data and "distilled_from" not in data


def test_a_student_of_its_teachers_layers_says_so(tmp_path: Path) -> None:
    teacher = tiny_vit(width=24, layers=3)
    card = card_of(trainer(tmp_path, teacher=teacher, model=student_from_teacher(teacher, num_hidden_layers=2)))
    assert "It started from layers 0, 2 of the teacher" in card.text


def test_no_path_no_token_and_no_home_is_on_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, secret = tmp_path / "student", "hf_" + "s" * 30
    teacher = tmp_path / "teacher"
    tiny_vit(width=24, seed=1).save_pretrained(teacher)
    monkeypatch.setattr(sys, "argv", [__file__, "--output_dir", str(folder), "--hub_token", secret, "--seed", "3"])
    run = finished(
        folder,
        teacher=str(teacher),
        teacher_model_init_kwargs={"token": secret},
        hub_token=secret,
        eval_dataset=Images(8),
    )
    run.create_model_card()
    for name in ("README.md", FACTS_FILE, "distillation_report.json"):
        text = (folder / name).read_text()
        assert not any(
            hidden in text for hidden in (str(tmp_path), secret, os.path.expanduser("~"), socket.gethostname())
        )
    assert "command" not in facts_of(run) and "--seed" not in (folder / "README.md").read_text()


def test_hub_names_are_told_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a", "b").mkdir(parents=True)
    names = ["org/name", "name-1.0", "a/b", str(tmp_path), "a/b/c", "", None]
    assert [hub_name(name) for name in names] == ["org/name", "name-1.0", None, None, None, None, None]


def usage_of(card: ModelCard) -> str:
    return re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]  # type: ignore[index]


def test_the_student_is_used_in_four_lines_or_fewer_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "text"]))
    tokenizer = BertTokenizer(str(vocabulary))
    runs = {
        "vit": ({}, "pixel_values = torch.zeros(1, 3, 16, 16)", (1, 4)),
        "bert": (
            {
                "model": tiny_bert(),
                "teacher": tiny_bert(width=24),
                "train_dataset": Texts(),
                "processing_class": tokenizer,
            },
            "",
            (1, 4),
        ),
        "headless": (
            {"model": tiny_vit().vit, "task_weight": 0.0},
            "pixel_values = torch.zeros(1, 3, 16, 16)",
            (1, 16),
        ),
    }
    for name, (given, before, shape) in runs.items():
        run = trainer(tmp_path / name, **given)
        run.save_model()
        code = usage_of(card_of(run))
        assert len(code.strip().splitlines()) <= 4
        result = "embedding" if name == "headless" else "logits"
        names: dict[str, Any] = {"torch": torch}
        exec(f"{before}\n{code}", names)
        assert names[result].shape == shape, name


def test_the_metrics_are_those_of_the_best_model_where_it_was_loaded(tmp_path: Path) -> None:
    scores = iter([0.1, 0.9, 0.3])
    run = trainer(
        tmp_path,
        eval_dataset=Images(8),
        compute_metrics=lambda prediction: {"score": next(scores)},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    run.train()
    run.create_model_card()
    assert [metric["value"] for metric in facts_of(run)["metrics"]] == [0.9]


def test_metrics_of_an_earlier_step_are_not_those_of_the_student(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=Images(8))
    evaluated, ended = {"eval_score": 0.5, "eval_runtime": 1.0, "step": 2}, {"train_runtime": 1.0, "step": 3}
    for history, expected in (
        ([evaluated, ended], None),
        ([evaluated | {"step": 3}, ended], 0.5),
        ([ended, evaluated], 0.5),
    ):
        run.state.global_step, run.state.log_history = 3, history
        run.create_model_card()
        assert [metric["value"] for metric in facts_of(run).get("metrics", [])] == [expected] * (expected is not None)


def test_an_adapter_is_a_card_of_peft(tmp_path: Path) -> None:
    student = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"))
    run = trainer(tmp_path, model=student, teacher=tiny_bert(width=24), train_dataset=Texts())
    card = card_of(run, finetuned_from="org/base")
    assert card.data.library_name == "peft" and card.data.base_model == "org/base"
    assert ", num_labels=4)" in usage_of(card), "the base has classes of its own"
    assert "peft" in facts_of(run)["versions"]


def test_a_data_set_from_the_hub_names_itself(tmp_path: Path) -> None:
    data = Images(16)
    rows = datasets.Dataset.from_dict({"pixel_values": data.pixels.numpy(), "labels": data.labels.numpy()})
    rows.info.download_checksums = {"hf://datasets/org/images@0123abc/data/train.parquet": {}}
    rows.info.config_name = "plain"
    run = trainer(tmp_path, train_dataset=rows.with_format("torch"))
    assert card_of(run).data.datasets == ["org/images"]
    assert facts_of(run)["dataset"] == {"id": "org/images", "title": "org/images", "config": "plain"}
    run.train()
    assert card_of(run) and facts_of(run)["dataset"]["train_examples"] == 16


def test_a_cached_data_set_is_still_from_where_it_was() -> None:
    data = Images(16)
    rows = datasets.Dataset.from_dict({"pixel_values": data.pixels.numpy()}, split="train").with_format("torch")
    rows.info.download_checksums = {"hf://datasets/org/images@0123abc/a.parquet": {}}
    rows.info.config_name = "plain"
    cached = cache_teacher_outputs(rows, tiny_vit())
    assert source_of(cached) == {"id": "org/images", "config": "plain", "split": "train"}


def test_nothing_is_fetched_for_a_card(run: RelationalDistillationTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    card_of(run, **DATASET)


def test_without_matplotlib_a_card_has_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(tmp_path, report=False)
    assert "![Loss terms over the steps](figures/losses.png)" in card_of(run).text
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.setitem(sys.modules, module, None)
    assert "![" not in card_of(run).text
    assert not (tmp_path / "figures" / "losses.png").exists(), "a picture of an earlier card is not left"


@pytest.mark.parametrize(
    ("model", "task"),
    [
        (tiny_vit(), ("image-classification", "AutoModelForImageClassification")),
        (tiny_bert(), ("text-classification", "AutoModelForSequenceClassification")),
        (tiny_bert().bert, ("feature-extraction", "AutoModel")),
        (tiny_vit().vit, ("image-feature-extraction", "AutoModel")),
        (torch.nn.Linear(1, 1), (None, "Linear")),
    ],
)
def test_the_task_is_that_of_the_models_class(model: Any, task: tuple[str | None, str]) -> None:
    if not isinstance(model, torch.nn.Linear):
        assert task_of(model) == task


def test_the_template_has_no_fact_of_its_own() -> None:
    text = TEMPLATE.read_text().split("## Citation")[0]
    assert re.findall(r"\d", text) == []


def test_metrics_are_of_the_data_that_was_evaluated(tmp_path: Path) -> None:
    def rows(name: str | None, split: str) -> datasets.Dataset:
        data = Images(16)
        columns = {"pixel_values": data.pixels.numpy(), "labels": data.labels.numpy()}
        made = datasets.Dataset.from_dict(columns, split=split).with_format("torch")
        made.info.download_checksums = {f"hf://datasets/{name}@0123abc/a.parquet": {}} if name else None
        return made

    run = trainer(
        tmp_path, train_dataset=rows("org/one", "train"), eval_dataset=rows("org/one", "dev"), compute_metrics=accuracy
    )
    run.train()
    run.evaluate()
    run.evaluate(rows("org/two", "test"), metric_key_prefix="other")
    run.evaluate(rows(None, "mine"), metric_key_prefix="local")
    run.evaluate(Images(8), metric_key_prefix="plain")
    found = [(result.dataset_type, result.dataset_split) for result in card_of(run).data.eval_results]
    assert found == [("org/one", "dev"), ("org/two", "test")], "others are in the text alone"
    shown = [(metric.get("id"), metric.get("split")) for metric in facts_of(run)["metrics"]]
    assert shown == [("org/one", "dev"), ("org/two", "test"), (None, "mine"), (None, None)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"optimizer": "adamw_torch_fused", "learning_rate": 0.01, "precision": "float32"}),
        ({"warmup_steps": 0.34}, {"scheduler": "linear, 2 warm-up steps"}),
        ({"bf16": True}, {"precision": "bfloat16"}),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5})}, {"optimizer": None, "learning_rate": None}),
        ({"model": tiny_vit().to(torch.bfloat16)}, {"precision": "bfloat16"}),
        ({"gradient_accumulation_steps": 2}, {"examples_per_step": 16}),
        ({"learning_rate": np.float32(1e-3)}, {"learning_rate": pytest.approx(1e-3)}),
    ],
)
def test_the_training_is_told_as_it_was(tmp_path: Path, settings: dict[str, Any], expected: dict[str, Any]) -> None:
    run = trainer(tmp_path, **settings)
    run.train()
    run.create_model_card()
    assert {name: facts_of(run)["training"].get(name) for name in expected} == expected


def test_a_resumed_run_does_not_tell_the_time_of_its_last_part(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_strategy="steps", save_steps=2)
    run.train()
    run.create_model_card()
    assert "seconds" in facts_of(run)["training"]
    run = trainer(tmp_path, save_strategy="steps", save_steps=2)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    run.create_model_card()
    assert "seconds" not in facts_of(run)["training"]


def test_a_student_without_a_teacher_is_not_called_distilled(tmp_path: Path) -> None:
    card = card_of(trainer(tmp_path, relational_weight=0.0, teacher=None))
    assert "distilled from" not in card.text and "without a teacher" in card.text


def test_lists_are_taken_as_the_trainers_own_card_takes_them(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    lists = {
        "tasks": ["image-classification"],
        "dataset": ["Images"],
        "dataset_tags": ["org/images"],
        "tags": ["a", "b"],
    }
    card = card_of(run, dataset_args=["plain"], **lists)
    assert card.data.datasets == ["org/images"] and {"a", "b"} <= set(card.data.tags)
    assert "[Images](https://huggingface.co/datasets/org/images)" in card.text


def test_names_cannot_break_a_table(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=Images(8), compute_metrics=lambda _: {"a|b\nc <i>": 0.5, "flag": True})
    run.train()
    run.evaluate()
    card = card_of(run)
    assert "| a&#124;b c &lt;i> | 0.5000 |" in card.text and "flag" not in card.text


def test_a_picture_that_fails_costs_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("hf_rrd.results.pictures.plot_losses", fail)
    run = trainer(tmp_path)
    run.train()
    assert "![" not in card_of(run).text
