"""A teacher's outputs, from a forward or from cached columns."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import ViTForImageClassification, ViTModel

from hf_rrd import cache_teacher_outputs
from hf_rrd.models.teacher import Teacher, load_teacher
from tests.builders import CLASSES, Images, tiny_vit, trainer


def teacher_vit() -> Any:
    return tiny_vit(width=24, seed=1)


@pytest.mark.parametrize("cached", [(), ("embedding",), ("logits",), ("embedding", "logits")])
def test_what_is_cached_is_read_and_the_rest_is_computed(cached: tuple[str, ...]) -> None:
    model, pixels = teacher_vit(), Images(3).pixels
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    teacher = Teacher(model, wants_embedding=True, wants_logits=True)
    forwards.clear()
    columns = {"embedding": torch.ones(3, 24), "logits": torch.ones(3, CLASSES)}
    outputs = teacher.read({"pixel_values": pixels} | {f"teacher_{name}": columns[name] for name in cached})
    with torch.no_grad():
        embedding = model.vit(pixels).last_hidden_state[:, 0]
        computed = {"embedding": embedding, "logits": model.classifier(embedding)}
    for name, value in outputs._asdict().items():
        torch.testing.assert_close(value, columns[name] if name in cached else computed[name])
    assert len(forwards) == (0 if len(cached) == 2 else 1)


def test_without_a_model_what_is_not_cached_is_none() -> None:
    teacher = Teacher(None, wants_embedding=True, wants_logits=True)
    rows = torch.ones(2, 5)
    assert teacher.read({"teacher_embedding": rows}).logits is None
    assert teacher.read({"teacher_embedding": rows}).embedding is rows
    assert not teacher.answers({"input_ids": rows}) and teacher.answers({"teacher_logits": rows})
    assert teacher.columns == [] and not teacher.is_placed


def test_an_evaluation_whose_loss_lacks_a_term_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("hf_rrd.models.teacher.logger.warning_once", warnings.append)
    data = Images(24)
    rows = datasets.Dataset.from_dict({"pixel_values": data.pixels.numpy(), "labels": data.labels.numpy()})
    cached = cache_teacher_outputs(rows.with_format("torch"), teacher_vit())
    run = trainer(tmp_path, teacher=None, train_dataset=cached, kd_weight=1.0)
    run.train()
    run.evaluate(cached)
    run.predict(Images(8, labels=False))
    assert warnings == []
    for lacking in (cached.remove_columns("teacher_logits"), data):
        metrics = run.evaluate(lacking)
        assert len(warnings) == 3 and warnings[0].startswith("An evaluation has neither the teacher nor all of its ca")
        assert "eval_kd_loss" not in metrics
        warnings.clear()


def test_a_teacher_of_many_trainers_has_one_hook(tmp_path: Path) -> None:
    teacher = teacher_vit()
    for _ in range(3):
        trainer(tmp_path, teacher=teacher)
    assert len(teacher.vit._forward_hooks) == 1


def test_the_banks_dtype_is_that_of_the_teachers_embeddings(tmp_path: Path) -> None:
    for settings, weights, expected in (
        ({}, torch.float32, torch.float32),
        ({}, torch.bfloat16, torch.bfloat16),
        ({"bf16": True}, torch.float32, torch.float32),  # the last normalisation is in float32 under autocast
    ):
        run = trainer(tmp_path, teacher=teacher_vit().to(weights), calibration_examples=8, **settings)
        run.train()
        assert run.distillation.bank.filled.dtype == expected


@pytest.mark.parametrize("named", ["AutoTokenizer", "pipeline", "Trainer", "GenerationConfig", "logging", "Absent"])
def test_of_what_a_config_names_only_a_model_class_is_called(tmp_path: Path, named: str) -> None:
    teacher_vit().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [named]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert type(load_teacher(str(tmp_path))) is ViTModel  # of the config's type, by AutoModel
    (tmp_path / "config.json").write_text(json.dumps(settings | {"architectures": ["ViTForImageClassification"]}))
    assert type(load_teacher(str(tmp_path))) is ViTForImageClassification


def test_a_compiled_teacher_gives_what_it_gives_eagerly() -> None:
    model, pixels = teacher_vit(), Images(5).pixels
    eager = Teacher(model, True, True).compute({"pixel_values": pixels})
    compiled = Teacher(model, True, True, compile_kwargs={"backend": "aot_eager"})
    for _ in range(2):
        outputs = compiled.compute({"pixel_values": pixels})
        torch.testing.assert_close(outputs.embedding, eager.embedding, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(outputs.logits, eager.logits, rtol=1e-5, atol=1e-6)
    assert isinstance(compiled._forward, torch._dynamo.OptimizedModule)
