"""What models and data sets say of themselves."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from transformers import (
    BertForMaskedLM,
    CLIPImageProcessor,
    CLIPProcessor,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_rrd import cache_teacher_outputs, student_from_teacher
from hf_rrd.models.teacher import load_teacher
from hf_rrd.results.facts import (
    CardFacts,
    EmbedderFacts,
    Metric,
    ModelFacts,
    Usage,
    embedder_facts,
    hub_name,
    last_losses,
    model_facts,
    source_of,
    task_of,
    usage_of,
    versions_in_use,
)
from tests.builders import Images, tiny_bert, tiny_vit
from tests.sentences import embedder, headless, tokenizer


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
        (tiny_vit(), "image-classification"),
        (tiny_bert(), "text-classification"),
        (tiny_bert().bert, "feature-extraction"),
        (tiny_vit().vit, "image-feature-extraction"),
        (torch.nn.Linear(1, 1), None),
    ],
)
def test_the_task_is_that_of_the_models_class(model: Any, task: str | None) -> None:
    assert task_of(model) == task


def test_only_what_transformers_has_is_loaded_and_processed_as_the_card_says() -> None:
    class Mine(ViTForImageClassification):
        pass

    student = tiny_vit()
    assert usage_of(Mine(student.config), None, "auto") is None
    assert usage_of(student, object(), "auto") == Usage("pixel_values", has_processor=False)
    assert usage_of(student, ViTImageProcessor(), "auto") == Usage("pixel_values", has_processor=True)
    assert usage_of(student.vit, None, "auto") == Usage("pixel_values", False, pooling="cls", states="tokens")
    assert usage_of(student.vit, None, lambda output, mask: output[0]) == Usage("pixel_values", False)


def test_what_a_processor_pads_and_what_its_mask_is_of(tmp_path: Path) -> None:
    words, text = tokenizer(tmp_path), headless()
    padded = Usage("input_ids", True, pooling="mean", states="tokens", mask="attention_mask", pads=True)
    assert usage_of(text, words, "auto") == padded
    assert usage_of(text, None, "max") == Usage("input_ids", False, "max", states="tokens", mask="attention_mask")
    whole = CLIPProcessor(CLIPImageProcessor(), words)
    images = Usage("pixel_values", True, pooling="cls", states="tokens")
    assert usage_of(tiny_vit().vit, whole, "auto") == images, "its mask is that of texts"
    assert usage_of(text, whole, "auto") == padded, "its tokenizer is asked"


def test_the_versions_are_those_of_what_is_loaded() -> None:
    versions = versions_in_use("transformers")
    assert versions["torch"] == torch.__version__ and versions["transformers"] == transformers.__version__
    assert versions["hf_rrd"] and list(versions)[0] == "python"


def test_the_facts_come_back_from_json_and_what_is_unknown_is_not_in_it() -> None:
    facts = CardFacts("a", "transformers", ModelFacts("Vit", 10, teacher_layers=[0, 2]), tags=["b"])
    facts.usage, facts.metrics = Usage("input_ids", False), [Metric("accuracy", 0.0, split="test")]
    facts.losses, facts.settings = {"loss": 1.0}, {"balance_losses": False}
    told = facts.to_json()
    assert told["student"] == {"class_name": "Vit", "parameters": 10, "teacher_layers": [0, 2]}
    assert told["metrics"] == [{"name": "accuracy", "value": 0.0, "split": "test"}]
    assert told["settings"] == {"balance_losses": False}
    assert not {"teacher", "dataset", "report", "license", "training"} & told.keys()
    assert CardFacts.from_json(json.loads(json.dumps(told))) == facts


def test_the_losses_are_the_last_finite_value_of_each_term() -> None:
    log = [{"loss": 3.0, "task_loss": 2.0, "step": 1}, {"loss": 2.0, "task_loss": 1.0, "step": 2}]
    log += [{"eval_loss": 9.0, "step": 2}, {"loss": 1.0, "task_loss": float("nan"), "step": 3}]
    log += [{"train_loss": 2.0, "step": 3}]
    assert last_losses(log) == {"loss": 1.0, "task_loss": 1.0}


def test_what_a_sentence_transformer_says_of_itself(tmp_path: Path) -> None:
    prompts = {"query": "find a ", "document": ""}
    found = embedder_facts(embedder(tmp_path, "max", dense=6, similarity_fn_name="dot", prompts=prompts))
    assert found == EmbedderFacts("input_ids", 6, "max", "dot", 32, 24 * 6 + 6, ["query"])
    told = CardFacts("a", "sentence-transformers", ModelFacts("Bert"), embedder=found, baseline={"f1": 0.0})
    assert CardFacts.from_json(json.loads(json.dumps(told.to_json()))) == told


def test_a_teacher_is_loaded_by_that_library_only_if_it_is_a_model_of_it(tmp_path: Path) -> None:
    inner = load_teacher(embedder(tmp_path))
    for model, called, name in (
        (inner, "org/a", "org/a"),
        (inner, "a big one", None),
        (inner, None, None),
        (headless(), "org/a", None),
    ):
        assert model_facts(model, called).encoder == name


def test_a_teacher_that_is_only_called_something_has_no_size() -> None:
    assert model_facts(None) == ModelFacts()
    assert model_facts(None, "a big one") == ModelFacts(description="a big one")
    named = model_facts(tiny_vit(), "a big one")
    assert named.class_name == "ViTForImageClassification" and named.parameters > 1000


def test_a_student_of_which_no_layer_is_the_teachers_is_not_said_to_start_from_any() -> None:
    teacher = BertForMaskedLM(tiny_bert(width=24).config)
    narrow = student_from_teacher(teacher, 1, hidden_size=8, num_attention_heads=1)
    assert narrow.initialization.copied == ["cls.predictions.bias"]
    assert model_facts(narrow).teacher_layers is None and model_facts(narrow).teacher_words
    layers = model_facts(student_from_teacher(teacher, 1))
    assert layers.teacher_layers == [0] and layers.teacher_words is None
