"""Which cached outputs are trusted: those of the same reading, by its hash and by some outputs, in whole files."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import Wav2Vec2FeatureExtractor

from hf_rrd import cache_teacher_outputs, with_views
from hf_rrd.training import caching, reading
from tests import caching_worker
from tests.builders import tiny_bert
from tests.processes import context, free_port
from tests.training.test_caching import PROBED, WIDTH, Forwards, column, images, teacher_vit, texts
from tests.training.test_checkpoint_faults import files_of_at_most
from tests.training.test_data import tokenizer


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(caching, "SHARD_EXAMPLES", 7)
    monkeypatch.setattr(reading, "PROBED_EXAMPLES", PROBED)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setitem(sys.modules, "own_module", ModuleType("own_module"))
    monkeypatch.setitem(GLOBAL, "factor", 1.0)


def rows_of(data: Dataset, teacher: Any, folder: Path, **settings: Any) -> Tensor:
    cached = cache_teacher_outputs(data, teacher, cache_dir=folder, dtype="float32", **settings)
    return column(cached.with_format(None))


# ---- Code ----

SOURCES = {
    "transform": "def use(rows):\n    return {'pixel_values': [torch.tensor(x) * 1.0 for x in rows['pixel_values']]}",
    "collator": "def use(rows):\n    return {'pixel_values': torch.tensor([x['pixel_values'] for x in rows]) * 1.0}",
    "pooling": "def use(outputs, mask):\n    return outputs.last_hidden_state[:, 1] * 1.0",
    "teacher": "class use(ViTForImageClassification):\n"
    "    def forward(self, pixel_values):\n        return super().forward(pixel_values=pixel_values * 1.0)",
}


def use_of(source: str) -> Any:
    """Of a module of somebody's own, whose functions are pickled by their names."""
    module = ModuleType("own_module")
    module.__file__ = "/home/somebody/own_module.py"
    sys.modules["own_module"] = module
    source = f"import torch\nfrom transformers import ViTForImageClassification\n{source}\n"
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    return module.use


@pytest.mark.parametrize("what", SOURCES)
def test_edited_code_has_a_cache_of_its_own(what: str, tmp_path: Path) -> None:
    def cached(factor: str, folder: str = "one") -> tuple[Tensor, int]:
        use = use_of(SOURCES[what].replace("1.0", factor))
        data, teacher, settings = images(), teacher_vit(), {}
        if what == "transform":
            data = data.with_transform(use)
        elif what == "teacher":
            weights, teacher = teacher.state_dict(), use(teacher.config)
            teacher.load_state_dict(weights)
        else:
            settings["data_collator" if what == "collator" else "pooling"] = use
        reader = Forwards(teacher)
        return rows_of(data, teacher, tmp_path / folder, with_logits=False, **settings), reader.examples

    first, second = cached("1.0")[0], cached("2.0")[0]
    assert torch.equal(second, cached("2.0", "two")[0]) and not torch.equal(first, second)
    for factor, rows in (("1.0", first), ("2.0", second)):
        again, computed = cached(factor)
        assert torch.equal(again, rows) and computed == PROBED


# ---- Values ----

GLOBAL = {"factor": 1.0}


class Scale:
    """A transform with an attribute and a global."""

    factor = 1.0

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        """Multiply the pixels."""
        factor = self.factor * GLOBAL["factor"]
        return {**batch, "pixel_values": [torch.tensor(each) * factor for each in batch["pixel_values"]]}


def shift(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + module.get_buffer("shift")


def other_activation(teacher: nn.Module) -> None:
    for module in list(teacher.modules()):
        for name, child in module.named_children():
            if "GELU" in type(child).__name__:
                setattr(module, name, nn.ReLU())


def hook(teacher: Any) -> None:
    teacher.vit.layernorm.register_forward_hook(lambda module, args, output: output * 1.5)


def other_method(teacher: Any) -> None:
    plain = teacher.vit.embeddings.forward
    teacher.vit.embeddings.forward = lambda *args, **kwargs: plain(*args, **kwargs) * 1.5


# The examples that are computed after the change: those of a new cache; or those compared before all is made anew.
CHANGES: dict[str, tuple[Callable[[Any, Any], Any], int]] = {
    "attribute": (lambda data, teacher: setattr(data.format["format_kwargs"]["transform"], "factor", 2.0), 20),
    "global": (lambda data, teacher: GLOBAL.update(factor=2.0), 20),
    "epsilon": (lambda data, teacher: setattr(teacher.vit.layernorm, "eps", 1e-5), 20),
    "activation": (lambda data, teacher: other_activation(teacher), 20),
    "buffer": (lambda data, teacher: teacher.vit.layernorm.get_buffer("shift").fill_(0.3), 20),
    "scale": (
        lambda data, teacher: [
            each.set_scale("default", 9.0) for each in teacher.modules() if hasattr(each, "set_scale")
        ],
        20,
    ),
    "hook": (lambda data, teacher: hook(teacher), PROBED + 20),
    "method": (lambda data, teacher: other_method(teacher), 20),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_value_gives_the_outputs_that_a_new_cache_has(what: str, tmp_path: Path) -> None:
    data, teacher = images().with_transform(Scale()), teacher_vit()
    teacher.vit.layernorm.register_buffer("shift", torch.zeros(WIDTH), persistent=False)
    teacher.vit.layernorm.register_forward_hook(shift)
    if what == "scale":
        config = LoraConfig(r=2, target_modules=["q_proj", "query"], init_lora_weights=False)
        teacher = get_peft_model(teacher, config)
    first = rows_of(data, teacher, tmp_path / "one")
    CHANGES[what][0](data, teacher)
    reader = Forwards(teacher)
    second = rows_of(data, teacher, tmp_path / "one")
    assert reader.examples == CHANGES[what][1]
    assert torch.equal(second, rows_of(data, teacher, tmp_path / "two")) and not torch.equal(first, second)
    reader.examples = 0
    assert torch.equal(rows_of(data, teacher, tmp_path / "one"), second) and reader.examples == PROBED


def test_outputs_that_are_made_anew_are_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(caching.logger, "warning", said.append)
    teacher = teacher_vit()
    for _ in range(2):
        rows_of(images(), teacher, tmp_path)
    assert said == []
    hook(teacher)
    rows_of(images(), teacher, tmp_path)
    assert len(said) == 1 and "other outputs than this teacher gives for these examples: they are made anew" in said[0]


@pytest.mark.slow
def test_two_processes_make_all_anew_that_is_not_their_teachers(tmp_path: Path) -> None:
    rows = []
    for scale in (1.0, 1.0, 2.0):
        port, counts = free_port(), [context().Value("i", 0, lock=False) for _ in range(2)]
        arguments = [(rank, 2, port, str(tmp_path), counts[rank], scale) for rank in range(2)]
        children = [context().Process(target=caching_worker.run, args=each) for each in arguments]
        for child in children:
            child.start()
        for child in children:
            child.join(timeout=120)
        assert [child.exitcode for child in children] == [0, 0]
        rows.append([column(Dataset.from_parquet(str(tmp_path / f"{rank}.parquet"))) for rank in range(2)])
        assert [count.value for count in counts] == [[12, 11], [1, 1], [13, 12]][len(rows) - 1]
    assert all(torch.equal(*each) for each in rows) and torch.equal(rows[0][0], rows[1][0])
    torch.testing.assert_close(rows[2][0], 2 * rows[0][0], rtol=1e-3, atol=1e-3)


def test_a_projection_of_a_changed_teacher_is_measured_anew(tmp_path: Path) -> None:
    teacher, how = teacher_vit(), {"teacher_projection": "pca", "projection_dim": 5}
    rows_of(images(40), teacher, tmp_path / "one", **how)
    hook(teacher)
    assert torch.equal(
        rows_of(images(40), teacher, tmp_path / "one", **how), rows_of(images(40), teacher, tmp_path / "two", **how)
    )


@pytest.mark.slow
def test_two_processes_measure_the_projection_of_one_and_share_its_work(tmp_path: Path) -> None:
    rows, most = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        port, counts = free_port(), [context().Value("i", 0, lock=False) for _ in range(processes)]
        arguments = [(rank, processes, port, str(folder), counts[rank], 1.0, "pca") for rank in range(processes)]
        children = [context().Process(target=caching_worker.run, args=each) for each in arguments]
        for child in children:
            child.start()
        for child in children:
            child.join(timeout=120)
        assert [child.exitcode for child in children] == [0] * processes
        rows += [column(Dataset.from_parquet(str(folder / f"{rank}.parquet"))) for rank in range(processes)]
        most.append(max(count.value for count in counts))
    assert rows[0].shape == (caching_worker.EXAMPLES, 5) and torch.equal(rows[1], rows[2])
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-3, atol=1e-3)
    assert most == [46, 24]  # 23 batches, in 8 files, of the sample and of all


def test_an_attention_mask_of_a_feature_extractor_is_part_of_the_reading() -> None:
    def fingerprint(**settings: Any) -> str:
        teacher, extractor = caching.Teacher(teacher_vit(), True, False), Wav2Vec2FeatureExtractor(**settings)
        return reading.Reader(teacher, None, extractor, 4, 0, False, "float32", {}).fingerprint()

    assert fingerprint() == fingerprint() != fingerprint(return_attention_mask=True)


def test_a_replaced_image_file_is_read_again(tmp_path: Path) -> None:
    for number in range(20):
        Image.new("RGB", (16, 16), (number, 2 * number, 99)).save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(20)]
    data = Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())

    def pixels(batch: dict[str, list[Any]]) -> dict[str, Any]:
        read = [torch.tensor(list(image.getdata())).float().T.reshape(3, 16, 16) / 255 for image in batch["image"]]
        return {"pixel_values": read}

    teacher = teacher_vit()
    first = rows_of(data.with_transform(pixels), teacher, tmp_path / "one")
    assert torch.equal(first, rows_of(data.with_transform(pixels), teacher, tmp_path / "one"))
    Image.new("RGB", (16, 16), (200, 0, 0)).save(paths[3])  # not among those that are compared
    second = rows_of(data.with_transform(pixels), teacher, tmp_path / "one")
    assert (first != second).any(1).nonzero().flatten().tolist() == [3]


# ---- Rounding is no change ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", [{}, {"teacher_projection": "center"}])
def test_another_batch_size_is_no_change(dtype: torch.dtype, how: Any, tmp_path: Path) -> None:
    teacher = tiny_bert(width=64, layers=8, seed=1).to(dtype)
    reader, passes = Forwards(teacher), 2 if how else 1
    for batch_size, computed in ((20, 20), (1, PROBED), (3, PROBED)):
        reader.examples = 0
        pad = tokenizer("a", "b")
        cache_teacher_outputs(texts(), teacher, batch_size, processing_class=pad, cache_dir=tmp_path, **how)
        assert reader.examples == passes * computed


# ---- An example has one reading ----


def noisy(batch: dict[str, list[Any]]) -> dict[str, Any]:
    return {**batch, "pixel_values": [torch.tensor(each) + torch.randn(()) for each in batch["pixel_values"]]}


def noisy_rows(rows: list[Any]) -> dict[str, Tensor]:
    return {"pixel_values": torch.tensor([row["pixel_values"] for row in rows]) + torch.randn(())}


def noisy_labels(batch: dict[str, list[Any]]) -> dict[str, Any]:
    plain = [torch.tensor(each) for each in batch["pixel_values"]]
    noise = [each + torch.randn(()) for each in plain]
    return {"labels": batch["labels"], "pixel_values": noise, "teacher_pixel_values": plain}


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (images().with_transform(noisy), {}),
        (with_views(images(), 2).with_transform(noisy), {}),
        (images(), {"data_collator": noisy_rows}),
        (images(40).with_transform(noisy), {"teacher_projection": "center"}),
    ],
    ids=["transform", "views without their seed", "collator", "projection"],
)
def test_a_reading_that_differs_each_time_is_refused(data: Dataset, settings: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="read twice gave the teacher two different inputs.* Use with_views, and draw"
    ):
        cache_teacher_outputs(data, teacher_vit(), cache_dir=tmp_path, **settings)
    assert list(tmp_path.iterdir()) == [tmp_path / "datasets"] * (tmp_path / "datasets").exists()


def test_the_students_own_view_may_differ_each_time(tmp_path: Path) -> None:
    cached = rows_of(images().with_transform(noisy_labels), teacher_vit(), tmp_path)
    torch.testing.assert_close(cached, rows_of(images(), teacher_vit(), tmp_path))


class Counting(Scale):
    """A transform that counts its calls."""

    calls = 0

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        """Count, too."""
        self.calls += 1
        return super().__call__(batch)


def test_what_a_transform_counts_is_no_part_of_what_it_does(tmp_path: Path) -> None:
    data, teacher = images().with_transform(Counting()), teacher_vit()
    first, reader = rows_of(data, teacher, tmp_path), Forwards(teacher)
    assert torch.equal(rows_of(data, teacher, tmp_path), first) and reader.examples == PROBED
    data.format["format_kwargs"]["transform"].factor = 2.0
    second = rows_of(data, teacher, tmp_path)
    assert torch.equal(second, rows_of(data, teacher, tmp_path / "fresh")) and not torch.equal(first, second)


def test_caching_leaves_the_programs_random_numbers_alone(tmp_path: Path) -> None:
    data, teacher, before = images(40).with_transform(Scale()), teacher_vit(), torch.get_rng_state()
    for _ in range(2):  # without a cache, and with one
        rows_of(data, teacher, tmp_path, teacher_projection="center")
        assert torch.equal(torch.get_rng_state(), before)


# ---- Files ----


@pytest.mark.parametrize("left", [0.0, 0.3, 0.6, 0.99])
def test_a_file_that_was_cut_short_is_written_anew(left: float, tmp_path: Path) -> None:
    teacher, how = teacher_vit(), {"teacher_projection": "center"}
    first = rows_of(images(), teacher, tmp_path, **how)
    folders = {file.parent for file in tmp_path.glob("*/*.arrow")}
    assert len(folders) == 2  # what the projection was measured on, and the columns
    for file in [sorted(folder.iterdir())[1] for folder in folders]:
        size = file.stat().st_size
        with file.open("r+b") as opened:
            opened.truncate(int(left * size))
        reader = Forwards(teacher)
        assert torch.equal(rows_of(images(), teacher, tmp_path, **how), first)
        assert (reader.examples, file.stat().st_size) == (7 + 2 * PROBED, size)


def test_a_full_disk_is_an_error_with_a_path_and_leaves_nothing(tmp_path: Path) -> None:
    path = rf"{tmp_path}.*/000000000000-000000000007\.arrow"
    for settings in ({}, {"teacher_projection": "center"}):
        with files_of_at_most(50), pytest.raises(OSError, match=f"File too large: '{path}"):
            rows_of(images(), teacher_vit(), tmp_path, **settings)
        assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_what_killed_calls_left_is_cleared_and_what_others_write_is_not(tmp_path: Path) -> None:
    (tmp_path / "another").mkdir()
    names = [
        "another/.0-7.arrow.0123.tmp",
        "another/.mine.tmp",
        "another/0-7.arrow",
    ]
    for name in names:
        for prefix, age in (("", 7200), ("young", 60)):
            file = (tmp_path / name).with_name((tmp_path / name).name.replace("0", prefix + "0", 1))
            file.write_text("part")
            os.utime(file, (time.time() - age,) * 2)
    before = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    rows_of(images(), teacher_vit(), tmp_path)
    after = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert before - after == {names[0]}
