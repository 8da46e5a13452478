"""The facts that a run's events tell."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_rrd.results.callback import FactsCallback, prefix_of
from hf_rrd.results.facts import ModelFacts
from tests.builders import Images, config, log_of, tiny_vit, trainer
from tests.results.runs import accuracy, card_of, facts_of


def test_the_metrics_are_those_of_the_best_model_where_it_was_loaded(tmp_path: Path) -> None:
    scores = iter([0.1, 0.9, 0.3] * 2)
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
    card = card_of(run)
    facts = facts_of(run)
    assert [metric["value"] for metric in facts["metrics"]] == [0.9]
    training = {name: facts["training"][name] for name in ("steps", "best_step", "metric_for_best_model")}
    assert training == {"steps": 3, "best_step": 2, "metric_for_best_model": "score"}
    assert facts["losses"]["loss"] == [line["loss"] for line in run.state.log_history if "loss" in line][1]
    assert "It is the student of step 2, the best by `score`, of 3 steps." in card.text
    assert "| last in the training log, to the best step | value |" in card.text
    run.args.load_best_model_at_end = False
    run.train()
    assert "best" not in card_of(run).text and facts_of(run)["losses"]["loss"] == log_of(run)[-1]


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


def test_an_unknown_argument_of_a_card_is_named_with_the_method_that_was_called(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    for call in (run.create_model_card, lambda **given: run._facts.write_card("org/student", **given)):
        with pytest.raises(
            TypeError, match=r"create_model_card\(\) takes no \['dataset_name'\]: see its help"
        ) as error:
            call(dataset_name="sst2")
        assert "write_card" not in str(error.value)


def test_a_data_set_from_the_hub_names_itself(tmp_path: Path) -> None:
    data = Images(16)
    rows = datasets.Dataset.from_dict({"pixel_values": data.pixels.numpy(), "labels": data.labels.numpy()})
    rows.info.download_checksums = {"hf://datasets/org/images@0123abc/data/train.parquet": {}}
    rows.info.config_name = "plain"
    run = trainer(tmp_path, train_dataset=rows.with_format("torch"))
    assert card_of(run).data.datasets == ["org/images"]
    assert facts_of(run)["dataset"] == {"id": "org/images", "title": "org/images", "config": "plain"}
    run.train()
    assert card_of(run) and facts_of(run)["training"]["train_examples"] == 16


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


def test_a_reports_accuracy_is_of_the_data_that_it_measured_on(tmp_path: Path) -> None:
    def rows(name: str, split: str) -> datasets.Dataset:
        data = Images(16)
        made = datasets.Dataset.from_dict(
            {"pixel_values": data.pixels.numpy(), "labels": data.labels.numpy()}, split=split
        )
        made.info.download_checksums = {f"hf://datasets/{name}@0123abc/a.parquet": {}}
        return made.with_format("torch")

    run = trainer(tmp_path, train_dataset=rows("org/one", "train"), alignment_examples=8)
    run.train()
    run.evaluate(rows("org/one", "dev"))  # no metric but the alignment
    report = run.report(rows("org/two", "test"))
    assert report is not None and (report.facts["id"], report.facts["split"]) == ("org/two", "test")
    (result,) = card_of(run).data.eval_results
    assert (result.metric_type, result.dataset_type, result.dataset_split) == ("accuracy", "org/two", "test")
    assert result.metric_value == report.facts["student"]["accuracy"]
    run.report(Images(16))
    assert "eval_results" not in card_of(run).data.to_dict(), "of unknown data"
    assert [metric for metric in facts_of(run)["metrics"] if metric["name"] == "accuracy"][0].keys() == {
        "name",
        "value",
    }


def test_settings_are_told_as_they_came_out(tmp_path: Path) -> None:
    run = trainer(tmp_path, train_dataset=Images(30), relational_weight="auto", kd_weight="auto", bank_size=4096)
    run.train()
    card = card_of(run).text
    settings = facts_of(run)["settings"]
    weights = {name: run.distillation.weights()[name] for name in ("task_weight", "kd_weight", "relational_weight")}
    assert (settings["bank_size"], settings["projection_dim"]) == (30, 24)
    assert {name: settings[name] for name in weights} == weights
    assert "against a bank of 30 of its embeddings" in card and "4,096" not in card and "4096" not in card
    assert "| `student_pooling` | head |" in card
    assert "layer_weight" not in settings, "which was off"
    headless = trainer(tmp_path, model=tiny_vit().vit, task_weight=0.0, bank_size=8)
    assert headless._facts._settings()["student_pooling"] == "cls"
    headless.train()
    assert headless._facts._settings()["bank_size"] == 8


def test_layers_are_told_where_they_are_compared(tmp_path: Path) -> None:
    run = trainer(tmp_path, teacher=tiny_vit(seed=1), layer_weight=2.0, layer_pairs=[[0, 1]])
    run.train()
    card = card_of(run).text
    settings = facts_of(run)["settings"]
    assert (settings["layer_weight"], settings["layer_pairs"]) == (2.0, [[0, 1]])
    assert "- its teacher's hidden layers\n" in card


def test_what_was_learned_is_told_after_its_weight_has_come_down_to_0(tmp_path: Path) -> None:
    run = trainer(tmp_path, kd_weight=1.0)
    run.train()
    run.args.relational_weight = run.args.kd_weight = 0.0
    card = card_of(run).text
    assert "- its teacher's logits\n- the relations" in card and "without a teacher" not in card
    assert {"kd_loss", "kd_temperature", "teacher_temperature"} <= facts_of(run)["settings"].keys()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"optimizer": "adamw_torch_fused", "learning_rate": 0.01, "precision": "float32"}),
        ({"warmup_steps": 0.34}, {"scheduler": "linear", "warmup_steps": 2}),
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


def test_a_prefix_is_that_of_the_shortest_runtime_and_some_prefixes_are_splits(tmp_path: Path) -> None:
    assert prefix_of({"eval_my_runtime": 1.0, "eval_runtime": 1.0, "step": 3}) == "eval"
    assert prefix_of({"loss": 1.0, "step": 3}) is None
    run = trainer(tmp_path)
    run.evaluate(Images(8), metric_key_prefix="validation")
    run.evaluate({"a": Images(8), "b": Images(8)})
    assert run._facts.sources == {"validation": {"split": "validation"}, "eval_a": {}, "eval_b": {}}


def test_the_facts_are_gathered_by_a_callback_of_any_trainer(tmp_path: Path) -> None:
    facts = FactsCallback(None, Images(16))
    args = config(tmp_path, max_steps=2, relational_weight=0.0)
    plain = Trainer(tiny_vit(), args, train_dataset=Images(16), eval_dataset=Images(8), callbacks=[facts])
    plain.train()
    plain.evaluate(metric_key_prefix="test")
    told = facts.write_card()
    assert told.training["steps"] == 2 and told.training["train_examples"] == 16
    assert told.student.class_name == "ViTForImageClassification" and told.teacher == ModelFacts()
    assert (tmp_path / "README.md").is_file()
