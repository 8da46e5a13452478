"""The embedding model of images: its teachers, its data, what it measures and what it saves."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
    ViTImageProcessor,
    ViTModel,
)

from hf_rrd import embed
from tests.examples.scripts import QUIET, load_script, start_process

FILES = "--train_file {}/train.parquet --validation_file {}/validation.parquet "
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SEES = TINY | {"image_size": 16, "patch_size": 8}
NEW = "--student_config_name vit --student_config_overrides " + ",".join(
    f"{name}={size}" for name, size in (SEES | {"hidden_size": 8, "num_hidden_layers": 1}).items()
)


def pixels_of(folder: Path, file: str, cache: Path) -> torch.Tensor:
    rows = datasets.Dataset.from_parquet(str(folder / file), cache_dir=str(cache))
    return ViTImageProcessor.from_pretrained(folder / "vit")(rows[:]["image"], return_tensors="pt")["pixel_values"]


def test_image_embeddings_run_on_two_processes_and_save_a_plain_encoder_of_the_printed_worth(
    folder: Path, tmp_path: Path
) -> None:
    line = (
        f"{FILES} --label_column_name label --teacher_model_name_or_path {{}}/vit {NEW} --num_train_epochs 1 {QUIET}"
    )
    printed = start_process("image_embeddings", f"{line} --output_dir OUT", folder, tmp_path, processes=2)
    assert [printed.count(name) for name in ("student before", "student after")] == [1, 1]
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3  # 48 images by twice 8
    metrics = json.loads((tmp_path / "eval_results.json").read_text())
    for name in ("neighbours", "linear_probe", "knn", "teacher_retrieval@1", "teacher_retrieval@10"):
        assert 0 <= metrics[f"eval_{name}"] <= 1
        assert f"{100 * metrics[f'eval_{name}']:.1f} %" in printed
    student = AutoModel.from_pretrained(tmp_path)
    assert type(student) is ViTModel and (student.config.image_size, student.config.hidden_size) == (16, 8)
    teacher, script = AutoModel.from_pretrained(folder / "vit").eval(), load_script("image_embeddings")
    pixels = pixels_of(folder, "validation.parquet", tmp_path / "cache")
    with torch.no_grad():
        ours, wanted = (embed(model.eval(), {"pixel_values": pixels}) for model in (student, teacher))
    expected = script.measure({"validation": ours}, wanted, {})["neighbours"]
    assert metrics["eval_neighbours"] == pytest.approx(expected)


def test_with_its_head_it_answers_in_its_teachers_space(start: Any, folder: Path, tmp_path: Path) -> None:
    line = (
        f"{FILES} --teacher_model_name_or_path {{}}/vit --student_num_layers 1 --max_steps 2 {QUIET} --output_dir OUT"
    )
    trainer = start("image_embeddings", f"{line} --student_format sentence_transformers")
    assert trainer.args.task_weight == 0
    rows = datasets.Dataset.from_parquet(str(folder / "validation.parquet"), cache_dir=str(tmp_path / "cache"))
    found = SentenceTransformer(str(tmp_path), device="cpu").encode(list(rows["image"]), convert_to_tensor=True)
    assert found.shape == (20, 16)  # as wide as the teacher
    assert type(AutoModel.from_pretrained(tmp_path)) is ViTModel


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["dino", "clip", "clip tower", "siglip"])
def test_a_teacher_may_be_a_dino_or_one_side_of_clip_or_siglip(kind: str, start: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = TINY | {"vocab_size": 10, "max_position_embeddings": 8}
    models = {
        "dino": lambda: Dinov2Model(Dinov2Config(**SEES)),
        "clip": lambda: CLIPModel(
            CLIPConfig(text_config=text, vision_config=SEES | {"projection_dim": 12}, projection_dim=12)
        ),
        "siglip": lambda: SiglipModel(SiglipConfig(text_config=text, vision_config=SEES)),
    }
    save(models[kind.split()[0]](), tmp_path / "teacher")
    if kind == "clip tower":
        save(CLIPVisionModelWithProjection.from_pretrained(tmp_path / "teacher"), tmp_path / "teacher")
    line = f"{FILES} --teacher_model_name_or_path OUT/teacher {NEW} --max_steps 1 --cached_views 1 --smallest_crop 1"
    trainer = start("image_embeddings", f"{line} {QUIET} --output_dir OUT/out")
    row = trainer.eval_dataset[0]
    pixels = {"pixel_values": torch.as_tensor(row["pixel_values"])[None]}
    with torch.no_grad():
        if kind == "dino":
            wanted = Dinov2Model.from_pretrained(tmp_path / "teacher").eval()(**pixels).last_hidden_state[:, 0]
        elif kind == "siglip":
            wanted = SiglipVisionModel.from_pretrained(tmp_path / "teacher").eval()(**pixels).pooler_output
        else:
            wanted = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "teacher").eval()(**pixels).image_embeds
    assert (torch.tensor(row["teacher_embedding"]) - wanted[0]).abs().max() < 2e-3


@pytest.mark.parametrize("student", ["--student_num_layers 1", "--student_model_name_or_path {}/other_vit"])
def test_the_student_sees_the_views_whose_embeddings_are_cached(start: Any, folder: Path, student: str) -> None:
    line = f"{FILES} --teacher_model_name_or_path {{}}/vit {student} --num_train_epochs 2 --cached_views 2 {QUIET}"
    run = start("image_embeddings", f"{line} --output_dir OUT")
    assert run.teacher is None
    assert (len(run.train_dataset), run.state.global_step) == (2 * 48, 12)  # 2 epochs of 48 images, 8 a step
    rows = [run.train_dataset[number] for number in (0, 50, 95)]
    pixels = torch.stack([row.get("teacher_pixel_values", row["pixel_values"]) for row in rows])
    expected = AutoModel.from_pretrained(folder / "vit").eval()(pixels).last_hidden_state[:, 0]
    assert (torch.tensor([row["teacher_embedding"] for row in rows]) - expected).abs().max() < 2e-3


def test_a_folder_of_images_without_labels_is_enough_and_a_tenth_is_held_out(start: Any, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        pixels = torch.randint(0, 256, (20, 20, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{number}.png")
    line = "--dataset_name OUT/images --teacher_model_name_or_path {}/vit --student_num_layers 1 --max_steps 1"
    run = start("image_embeddings", f"{line} {QUIET} --output_dir OUT/out")
    assert (len(run.train_dataset), len(run.eval_dataset)) == (36, 4)
    metrics = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert "eval_neighbours" in metrics and "eval_linear_probe" not in metrics


def test_a_field_that_the_students_config_has_not_is_refused(start: Any) -> None:
    line = f"{FILES} --teacher_model_name_or_path {{}}/vit {NEW},hiden_layers=1 --output_dir OUT"
    with pytest.raises(SystemExit, match=r"a ViTConfig has no \['hiden_layers'\]"):
        start("image_embeddings", line)


def test_neighbours_and_probes_are_shares_of_what_is_known() -> None:
    measure = load_script("image_embeddings").measure
    torch.manual_seed(0)
    labels = {"train": [0, 1] * 20, "validation": [0, 1] * 15}
    rows = {
        split: torch.tensor(each)[:, None] * 4.0 + torch.randn(len(each), 3) * 0.1 for split, each in labels.items()
    }
    shifted = {split: each - 2 for split, each in rows.items()}  # the classes on two sides of 0
    assert measure(shifted, shifted["validation"], labels) == {"neighbours": 1.0, "linear_probe": 1.0, "knn": 1.0}
    random = {"train": rows["train"], "validation": torch.randn(30, 3)}
    assert measure(random, torch.randn(30, 4), labels)["linear_probe"] < 0.9
