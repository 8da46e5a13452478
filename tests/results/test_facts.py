"""What models and data sets say of themselves."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from hf_rrd import cache_teacher_outputs
from hf_rrd.results.facts import (
    CardFacts,
    LossTerm,
    Metric,
    ModelFacts,
    hub_name,
    loss_terms,
    source_of,
    task_of,
    teacher_facts,
)
from tests.builders import Images, tiny_bert, tiny_vit


def test_hub_names_are_told_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a", "b").mkdir(parents=True)
    names = ["org/name", "name-1.0", "a/b", str(tmp_path), "a/b/c", "", None]
    assert [hub_name(name) for name in names] == ["org/name", "name-1.0", None, None, None, None, None]


def test_a_cached_data_set_is_still_from_where_it_was() -> None:
    data = Images(16)
    rows = datasets.Dataset.from_dict({"pixel_values": data.pixels.numpy()}, split="train").with_format("torch")
    rows.info.download_checksums = {"hf://datasets/org/images@0123abc/a.parquet": {}}
    rows.info.config_name = "plain"
    cached = cache_teacher_outputs(rows, tiny_vit())
    assert source_of(cached) == {"id": "org/images", "config": "plain", "split": "train"}


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


def test_the_facts_come_back_from_json_and_what_is_unknown_is_not_in_it() -> None:
    facts = CardFacts("a", "transformers", ModelFacts("Vit", 10, teacher_layers=[0, 2]), tags=["b"])
    facts.usage, facts.metrics = "import this", [Metric("accuracy", 0.0, split="test")]
    facts.losses, facts.settings = [LossTerm("loss", 1, 2.0, 3, 1.0)], {"include_own": False}
    told = facts.to_json()
    assert told["student"] == {"class_name": "Vit", "parameters": 10, "teacher_layers": [0, 2]}
    assert told["metrics"] == [{"name": "accuracy", "value": 0.0, "split": "test"}]
    assert told["settings"] == {"include_own": False}
    assert not {"teacher", "dataset", "report", "license", "training"} & told.keys()
    assert CardFacts.from_json(json.loads(json.dumps(told))) == facts


def test_the_losses_are_the_first_and_the_last_finite_line_of_each_term() -> None:
    log = [{"loss": 3.0, "task_loss": float("nan"), "step": 1}, {"loss": 2.0, "task_loss": 1.0, "step": 2}]
    log += [{"eval_loss": 9.0, "step": 2}, {"loss": 1.0, "step": 3}, {"train_loss": 2.0, "step": 3}]
    assert loss_terms(log) == [LossTerm("loss", 1, 3.0, 3, 1.0), LossTerm("task_loss", 2, 1.0, 2, 1.0)]


def test_a_teacher_that_is_only_called_something_has_no_size() -> None:
    assert teacher_facts(None, None) is None
    assert teacher_facts(None, "a big one") == ModelFacts(description="a big one")
    named = teacher_facts(tiny_vit(), "a big one")
    assert named is not None and named.class_name == "ViTForImageClassification" and named.parameters > 1000
