"""Columns know the teacher that made them, and no other is taken beside them."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from hf_rrd import cache_teacher_outputs
from hf_rrd.models.teacher import Teacher
from hf_rrd.training.data import Preview
from hf_rrd.training.identity import source_of, teacher_identity
from tests.builders import Images, tiny_vit, trainer
from tests.training.test_caching import images, teacher_vit


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def second(outputs: Any, mask: Any) -> Any:
    return outputs.last_hidden_state[:, 1]


def last(outputs: Any, mask: Any) -> Any:
    return outputs.last_hidden_state[:, -1]


def test_a_source_names_class_dtype_weights_pooling_and_projection() -> None:
    source = source_of(Teacher(teacher_vit(), True, False))
    cached = cache_teacher_outputs(images(), teacher_vit(), pooling="cls")
    assert source.startswith("ViTForImageClassification, float32, weights ") and source.endswith(", pooling cls")
    ids = [cached.features[name].feature.id for name in ("teacher_embedding", "teacher_logits")]
    assert ids[0] == source and ids[1].startswith(f'{source}; {{"classes": ["LABEL_0", ')
    centered = cache_teacher_outputs(images(), teacher_vit(), teacher_projection="center")
    assert centered.features["teacher_embedding"].feature.id.startswith(f"{source}, projection center ")


@pytest.mark.parametrize(
    ("caching", "training", "is_other"),
    [
        ({}, {}, False),
        ({"pooling": "cls"}, {}, False),
        ({"dtype": "float32"}, {}, False),
        ({"teacher": teacher_vit().bfloat16()}, {}, False),  # whether these are the same weights is not known
        ({}, {"relational_weight": 0.0, "kd_weight": 1.0, "teacher_pooling": "mean"}, False),
        ({"pooling": second}, {"teacher_pooling": second}, False),
        ({"teacher": teacher_vit(seed=2)}, {}, True),
        ({"teacher": teacher_vit(seed=2)}, {"relational_weight": 0.0, "kd_weight": 1.0}, True),
        ({"teacher": teacher_vit().vit}, {}, True),
        ({"pooling": "mean"}, {}, True),
        ({"pooling": second}, {"teacher_pooling": last}, True),
        ({"teacher_projection": "center"}, {}, True),
        ({"teacher_projection": "pca", "projection_dim": 5}, {}, True),
    ],
)
def test_columns_of_another_teacher_are_refused(
    caching: dict[str, Any], training: dict[str, Any], is_other: bool, tmp_path: Path
) -> None:
    cached = cache_teacher_outputs(images(), **({"teacher": teacher_vit()} | caching))
    trainer(tmp_path, teacher=None, train_dataset=cached)
    if is_other:
        with pytest.raises(
            ValueError, match=r"columns of `train_dataset` are of another teacher \(ViT.*than `teacher` \("
        ):
            trainer(tmp_path, teacher=teacher_vit(), train_dataset=cached, **training)
    else:
        trainer(tmp_path, teacher=teacher_vit(), train_dataset=cached, **training)


def test_columns_that_were_saved_and_loaded_know_it_still(tmp_path: Path) -> None:
    cached = cache_teacher_outputs(images(), teacher_vit(seed=2))
    cached.save_to_disk(tmp_path / "saved")
    cached.to_parquet(tmp_path / "cached.parquet")
    for other in (
        datasets.load_from_disk(tmp_path / "saved").select(range(9)).shuffle(seed=0),
        datasets.load_dataset("parquet", data_files=str(tmp_path / "cached.parquet"), split="train"),
        cached.map(lambda example: {"labels": 0}),
        cached.to_iterable_dataset(),
        cache_teacher_outputs(images().to_iterable_dataset(), teacher_vit(seed=2)),
    ):
        with pytest.raises(ValueError, match="are of another teacher"):
            trainer(tmp_path, teacher=teacher_vit(), train_dataset=other)


def test_training_and_evaluation_sets_are_of_one_teacher(tmp_path: Path) -> None:
    first, other = (cache_teacher_outputs(images(), teacher_vit(seed=seed)) for seed in (1, 2))
    trainer(tmp_path, teacher=None, train_dataset=first, eval_dataset={"a": first, "b": images()})
    with pytest.raises(ValueError, match=r"of `eval_dataset\['b'\]` are of another teacher .* than `train_dataset`"):
        trainer(tmp_path, teacher=None, train_dataset=first, eval_dataset={"a": first, "b": other})
    with pytest.raises(ValueError, match="of `eval_dataset` are of another teacher .* than `teacher`"):
        trainer(tmp_path, teacher=teacher_vit(), train_dataset=images(), eval_dataset=other)


def test_another_data_set_is_evaluated_and_reported_only_with_columns_of_the_runs_teacher(tmp_path: Path) -> None:
    first, other = (cache_teacher_outputs(images(), teacher_vit(seed=seed)) for seed in (1, 2))
    run = trainer(tmp_path, teacher=None, train_dataset=first, max_steps=1)
    run.train()
    run.evaluate(first)
    for ask in (run.evaluate, run.predict, run.report):
        with pytest.raises(ValueError, match="columns of `dataset` are of another teacher .* than `train_dataset`"):
            ask(other)
    run = trainer(tmp_path, teacher=teacher_vit(seed=1), train_dataset=images(), max_steps=1)
    run.train()
    assert run.evaluate(first)["eval_loss"] == pytest.approx(run.evaluate(images())["eval_loss"], rel=1e-3)
    with pytest.raises(ValueError, match="columns of `dataset` are of another teacher .* than `teacher`"):
        run.evaluate(other)


@pytest.mark.parametrize(("pooling", "known"), [("cls", "mean"), (second, "cls"), (second, last)])
def test_a_pooling_that_cached_columns_have_not_is_refused(pooling: Any, known: Any, tmp_path: Path) -> None:
    cached = cache_teacher_outputs(images(), teacher_vit(), pooling=known)
    trainer(tmp_path, teacher=None, train_dataset=cached, teacher_pooling=known)
    trainer(tmp_path, teacher=None, train_dataset=cached, teacher_pooling=pooling, relational_weight=0.0)
    with pytest.raises(ValueError, match="`teacher_pooling` has no say in cached columns, and asks for pooling"):
        trainer(tmp_path, teacher=None, train_dataset=cached, teacher_pooling=pooling)


def test_a_teacher_for_what_the_columns_lack_may_be_another(tmp_path: Path) -> None:
    cached = cache_teacher_outputs(images(), teacher_vit(seed=2))
    for column in ("teacher_embedding", "teacher_logits"):
        part = cached.remove_columns(column)
        trainer(tmp_path, teacher=teacher_vit(), train_dataset=part, kd_weight=1.0, max_steps=1).train()
    with pytest.raises(ValueError, match="are of another teacher"):
        trainer(tmp_path, teacher=teacher_vit(), train_dataset=cached, kd_weight=1.0)


def test_columns_of_ones_own_are_taken_as_they_are(tmp_path: Path) -> None:
    own = images().add_column("teacher_embedding", torch.randn(20, 24).tolist())
    trainer(tmp_path, teacher=teacher_vit(), train_dataset=own, eval_dataset=Images(8)).train()


def test_two_functions_of_one_name_are_two_poolings() -> None:
    def identity(pooling: Any) -> dict[str, str]:
        return teacher_identity(Teacher(tiny_vit(), True, False, pooling), Preview(Images(4)))

    def token(number: int) -> Any:
        return lambda outputs, mask: outputs.last_hidden_state[:, number]

    assert identity(token(0)) == identity(token(0)) != identity(token(1))
    assert identity("cls")["teacher_embedding"].endswith(", pooling cls")
