"""Size and operations against plain counts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_rrd import compare_models
from hf_rrd.models.head import attach_head
from hf_rrd.models.teacher import load_teacher
from hf_rrd.results.measure import size_of
from tests.builders import CLASSES, Images, Texts, tiny_bert, tiny_vit
from tests.sentences import embedder


@pytest.fixture(autouse=True)
def few_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_rrd.results.measure.MOST", 3)


def test_parameters_and_bytes_are_those_of_the_saved_file_without_our_head(tmp_path: Path) -> None:
    student = tiny_vit()
    attach_head(student, 24)
    student.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors").values()
    facts = compare_models(student, None, Images(8)).facts["student"]
    assert facts["parameters"] == sum(weight.numel() for weight in saved)
    assert facts["bytes"] == sum(weight.numel() * weight.element_size() for weight in saved)


def test_half_precision_has_half_the_bytes() -> None:
    whole, half = (
        compare_models(tiny_vit().to(dtype), None, Images(8)).facts for dtype in (torch.float32, torch.half)
    )
    assert half["student"]["bytes"] * 2 == whole["student"]["bytes"]
    assert (whole["student"]["dtype"], half["student"]["dtype"]) == ("float32", "float16")


def test_flops_are_those_of_the_formula() -> None:
    width, length = 16, 9
    layer = 4 * 2 * length * width * width  # queries, keys, values, output
    layer += 2 * 2 * length * length * width  # scores, and their weighted sum
    layer += 2 * 2 * length * width * 2 * width  # the two of the feed-forward part
    head = 2 * width * width + 2 * width * CLASSES  # pooler and classifier
    assert compare_models(tiny_bert(), None, Texts(8)).facts["student"]["flops"] == 2 * layer + head


def test_the_size_of_a_sentence_transformer_has_its_dense_layer(tmp_path: Path) -> None:
    plain = size_of(load_teacher(embedder(tmp_path / "plain")))
    whole = size_of(load_teacher(embedder(tmp_path / "whole", dense=6)))
    assert whole["parameters"] - plain["parameters"] == 24 * 6 + 6
    assert whole["bytes"] - plain["bytes"] == 4 * (24 * 6 + 6)
