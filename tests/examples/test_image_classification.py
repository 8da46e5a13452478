"""The classifier of images: its views, its processors and what it saves."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
)

from tests.examples.scripts import QUIET, load_script, start_process


def test_image_classification_saves_a_student_of_the_printed_accuracy(folder: Path, tmp_path: Path) -> None:
    line = (
        "--train_file {}/train.parquet --validation_file {}/validation.parquet --teacher_model_name_or_path {}/vit "
        "--student_config_name vit --student_config_overrides "
        '"patch_size=8,hidden_size=8,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16" '
        f"--max_train_samples 24 --max_eval_samples 10 --kd_weight 1 --num_train_epochs 1 {QUIET} --output_dir OUT"
    )
    printed = start_process("image_classification", line, folder, tmp_path)
    student = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert (student.config.image_size, student.config.hidden_size) == (16, 8)
    assert student.config.id2label == {0: "b", 1: "a", 2: "d", 3: "c"}
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    rows = datasets.Dataset.from_parquet(str(folder / "validation.parquet"), cache_dir=str(tmp_path / "cache"))
    rows = rows.shuffle(seed=0).select(range(10))
    found = student(processor(rows[:]["image"], return_tensors="pt")["pixel_values"]).logits.argmax(-1)
    saved = json.loads((tmp_path / "validation_results.json").read_text())["validation_accuracy"]
    assert saved == pytest.approx((found == torch.tensor(rows[:]["label"])).float().mean().item())
    assert f"{100 * saved:.1f} %" in printed and "teacher" in printed


def test_two_image_processors_see_one_view(start: Any) -> None:
    line = (
        "--train_file {}/train.parquet --test_file {}/test.parquet --teacher_model_name_or_path {}/vit "
        f"--student_model_name_or_path {{}}/other_vit --max_steps 1 {QUIET} --output_dir OUT"
    )
    rows = start("image_classification", line).train_dataset[:16]
    own, given = (torch.stack(list(rows[name])) for name in ("pixel_values", "teacher_pixel_values"))
    assert own.shape == given.shape == (16, 3, 16, 16)
    assert (own * 0.5 + 0.25 - (given * 0.5 + 0.5)).abs().max() < 1e-5  # the deviation is 0.5, the means 0.25 and 0.5


@pytest.mark.parametrize("student", ["--student_num_layers 1", "--student_model_name_or_path {}/other_vit"])
def test_the_student_sees_the_views_whose_embeddings_are_cached(start: Any, folder: Path, student: str) -> None:
    line = (
        "--train_file {}/train.parquet --test_file {}/test.parquet --teacher_model_name_or_path {}/vit "
        f"{student} --num_train_epochs 2 --cached_views 3 {QUIET} --output_dir OUT"
    )
    run = start("image_classification", line)
    assert run.teacher is None
    assert (len(run.train_dataset), run.state.global_step) == (3 * 48, 12)  # 2 epochs of 48 images, 8 a step
    rows = [run.train_dataset[number] for number in (0, 50, 100, 143)]
    pixels = torch.stack([row.get("teacher_pixel_values", row["pixel_values"]) for row in rows])
    teacher = AutoModelForImageClassification.from_pretrained(folder / "vit").eval()
    expected = teacher.vit(pixels).last_hidden_state[:, 0]
    assert (torch.tensor([row["teacher_embedding"] for row in rows]) - expected).abs().max() < 2e-3


@pytest.mark.parametrize("named", [True, False])
def test_images_whose_label_is_empty_are_there_to_distil_on(
    named: bool, start: Any, folder: Path, tmp_path: Path
) -> None:
    rows = datasets.Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=str(tmp_path / "cache"))
    labels = [label if place % 5 == 0 else None for place, label in enumerate(rows["label"])]
    kind = rows.features["label"] if named else datasets.Value("float64")  # as a file with empty cells has them
    rows.remove_columns("label").add_column("label", labels, feature=kind).to_parquet(str(tmp_path / "few.parquet"))
    line = f"--train_file {tmp_path}/few.parquet --teacher_model_name_or_path {{}}/vit --student_num_layers 1 {QUIET}"
    run = start("image_classification", f"{line} --output_dir OUT --max_steps 2")
    assert [int(each["labels"]) for each in run.train_dataset].count(-100) == 38
    names = dict(enumerate("badc" if named else "0123"))
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.id2label == names


@pytest.mark.parametrize("smallest", [0.1, 0.5, 0.99])
def test_a_random_view_keeps_its_share_of_an_image(smallest: float) -> None:
    from PIL import Image

    script = load_script("image_classification")
    torch.manual_seed(0)
    views = [script.random_view(Image.new("RGB", (64, 48)), smallest) for _ in range(200)]
    assert all(view.width <= 64 and view.height <= 48 for view in views)
    # Less only where a wide view did not fit in.
    assert min(view.width * view.height for view in views) >= smallest * 64 * 48 * 0.7
    assert len({view.size for view in views}) > 3
