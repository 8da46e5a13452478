"""A teacher that does not fit beside the student: offloaded or quantised, it stays where it is, and teaches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from transformers import AutoModelForImageClassification, BitsAndBytesConfig

from tests.builders import log_of, tiny_vit, trainer

CPU = torch.device("cpu")


def by_device_map(folder: Path) -> Any:
    teacher = tiny_vit(width=24, seed=1)
    teacher.save_pretrained(folder / "teacher")
    places = {f"vit.{name}": "cpu" for name, _ in teacher.vit.named_children()} | {"classifier": "cpu"}
    places |= {name: "disk" for name in places if name in ("vit.layers", "vit.encoder")}  # by version
    return AutoModelForImageClassification.from_pretrained(
        folder / "teacher", device_map=places, offload_folder=folder / "offloaded"
    )


def on_disk(folder: Path) -> Any:
    return accelerate.disk_offload(tiny_vit(width=24, seed=1), folder / "offloaded", execution_device=CPU)


def in_memory(folder: Path) -> Any:
    return accelerate.cpu_offload(tiny_vit(width=24, seed=1), execution_device=CPU)


@pytest.mark.parametrize("load", [by_device_map, on_disk, in_memory])
def test_an_offloaded_teacher_stays_where_it_is_and_teaches_the_same(
    tmp_path: Path, load: Callable[[Path], Any]
) -> None:
    settings: dict[str, Any] = {"kd_weight": 0.5, "teacher_projection": "center"}
    expected = trainer(tmp_path / "plain", **settings)
    expected.train()
    teacher = load(tmp_path)
    run = trainer(tmp_path / "offloaded run", teacher=teacher, **settings)
    run.train()
    assert any(weight.is_meta for weight in teacher.parameters())
    assert run._teacher.width == 24  # measured by a forward
    assert log_of(run) == log_of(expected)


def test_a_teacher_without_weights_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        teacher = tiny_vit(width=24)
    with pytest.raises(ValueError, match="teacher's weights are on the meta device.*Load it with from_pretrained"):
        trainer(tmp_path, teacher=teacher)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_teacher_teaches_nearly_the_same(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_vit(width=64, seed=1).save_pretrained(tmp_path / "teacher")
    # Some CPUs take 4-bit weights in blocks of 64 columns and 32 rows alone, and the classes are 4.
    skipped = {"llm_int8_skip_modules": ["classifier"]}
    quantised = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, **skipped)
    runs = [
        trainer(
            tmp_path / str(number),
            teacher=str(tmp_path / "teacher"),
            teacher_model_init_kwargs=given,
            kd_weight=0.5,
            save_strategy="steps",
            save_steps=2,
        )
        for number, given in enumerate([{}, {"quantization_config": quantised}])
    ]
    for run in runs:
        run.train()
    assert log_of(runs[1]) == pytest.approx(log_of(runs[0]), rel=0.05)
    assert log_of(runs[1]) != log_of(runs[0])
    runs[1].train(resume_from_checkpoint=True)
