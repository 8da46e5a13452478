"""A teacher's outputs as columns: what is in them, when they are computed again, and training from them."""

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, IterableDatasetDict
from torch import Tensor
from transformers import AutoModel, BertForMaskedLM, BertModel, DataCollatorWithPadding

from hf_rrd import DataCollatorForDistillation, cache_teacher_outputs, with_views
from hf_rrd.training import caching, reading
from hf_rrd.training.caching import weights_hash
from hf_rrd.training.data import noted_logits
from tests import caching_worker
from tests.builders import Images, log_of, tiny_bert, tiny_vit, trainer
from tests.caching_worker import BATCH, EXAMPLES, SHARD
from tests.processes import context, free_port
from tests.training.test_data import tokenizer

WIDTH = 24
PROBED = 4  # examples that a call computes which finds a cache


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(caching, "SHARD_EXAMPLES", 7)
    monkeypatch.setattr(reading, "PROBED_EXAMPLES", PROBED)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def teacher_vit(seed: int = 1) -> Any:
    return tiny_vit(width=WIDTH, seed=seed)


def images(count: int = 20) -> Dataset:
    data = Images(count)
    assert data.labels is not None
    return Dataset.from_dict({"pixel_values": data.pixels.tolist(), "labels": data.labels.tolist()})


def texts(count: int = 20, seed: int = 0) -> Dataset:
    """Token sequences of 2 to 12 tokens, not padded."""
    choose = random.Random(seed)
    tokens = [[choose.randrange(2, 40) for _ in range(choose.randrange(2, 13))] for _ in range(count)]
    columns = {"input_ids": tokens, "attention_mask": [[1] * len(each) for each in tokens]}
    return Dataset.from_dict(columns | {"labels": [number % 4 for number in range(count)]})


def column(dataset: Any, name: str = "teacher_embedding") -> Tensor:
    """A column in float32, whatever the data set's format."""
    return torch.tensor(np.array([example[name] for example in dataset.select_columns(name)]), dtype=torch.float32)


@torch.no_grad()
def one_by_one(model: Any, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Embedding (CLS of images, mean over the tokens of texts) and logits, from a forward for each example."""
    embeddings, logits = [], []
    for example in dataset:
        if "pixel_values" in example:
            inputs = {"pixel_values": torch.tensor(example["pixel_values"]).unsqueeze(0)}
        else:
            inputs = {"input_ids": torch.tensor([example["input_ids"]])}
        hidden = model.base_model(**inputs).last_hidden_state[0]
        embeddings.append(hidden[0] if "pixel_values" in example else hidden.mean(0))
        logits.append(model(**inputs).logits[0])
    return torch.stack(embeddings), torch.stack(logits)


class Forwards:
    """Counts the examples that a model reads."""

    def __init__(self, model: Any) -> None:
        self.examples = 0
        model.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, model: Any, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        self.examples += len(next(iter(kwargs.values())))


# ---- What is in the columns ----


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("count", [1, 7, 20])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_columns_are_the_teachers_outputs_one_example_at_a_time(batch_size: int, count: int, dtype: str) -> None:
    tolerance = 2e-6 if dtype == "float32" else 2**-10
    pad = tokenizer("a", "b")
    cases = [(images(count), teacher_vit(), None), (texts(count), tiny_bert(width=WIDTH, seed=1), pad)]
    for dataset, teacher, processor in cases:
        cached = cache_teacher_outputs(dataset, teacher, batch_size, processing_class=processor, dtype=dtype)
        embedding, logits = one_by_one(teacher, dataset)
        for name, width in (("teacher_embedding", WIDTH), ("teacher_logits", 4)):
            kind = cached.features[name]
            assert (type(kind), kind.length, kind.feature.dtype) == (datasets.List, width, dtype)
        torch.testing.assert_close(column(cached), embedding, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(column(cached, "teacher_logits"), logits, rtol=tolerance, atol=tolerance)


def test_the_examples_stay_as_they_were_beside_the_new_columns() -> None:
    dataset = texts()
    pad = tokenizer("a", "b")
    cached = cache_teacher_outputs(dataset, tiny_bert(), 4, processing_class=pad)
    for before, after in zip(dataset, cached, strict=True):
        assert {name: after[name] for name in before} == before
        assert [len(after["teacher_embedding"]), len(after["teacher_logits"])] == [16, 4]
    for style in ("numpy", "torch"):
        formatted = dataset.with_format(style, columns=["labels"])
        example = cache_teacher_outputs(formatted, tiny_bert(), 4, processing_class=pad)[0]
        assert set(example) == {"labels", "teacher_embedding", "teacher_logits"}
        assert type(example["teacher_embedding"]) is type(formatted.with_format(style)[0]["input_ids"])


def test_the_teacher_reads_its_own_columns_where_there_are_any() -> None:
    dataset, own = texts(9), texts(9, seed=5)
    for name in ("input_ids", "attention_mask"):
        dataset = dataset.add_column(f"teacher_{name}", own[name][:])
    teacher = tiny_bert(width=WIDTH, seed=1)
    cached = cache_teacher_outputs(dataset, teacher, 4, processing_class=tokenizer("a", "b"), dtype="float32")
    torch.testing.assert_close(column(cached), one_by_one(teacher, own)[0], rtol=1e-5, atol=1e-6)
    collator = DataCollatorForDistillation(tokenizer("a", "b"), tokenizer("a", "b"))
    collated = cache_teacher_outputs(dataset, teacher, 4, collator, dtype="float32")
    assert torch.equal(column(collated), column(cached))


def test_a_shuffled_part_of_a_data_set_keeps_its_order() -> None:
    dataset, teacher = images().shuffle(seed=3).select(range(4, 17)), teacher_vit()
    cached = cache_teacher_outputs(dataset, teacher, 5, dtype="float32")
    torch.testing.assert_close(column(cached), one_by_one(teacher, dataset)[0], rtol=1e-5, atol=1e-6)
    assert [example["labels"] for example in cached] == [example["labels"] for example in dataset]


@pytest.mark.parametrize("pooling", ["mean", lambda outputs, mask: outputs.last_hidden_state[:, 1]])
def test_pooling_is_the_callers_choice(pooling: Any) -> None:
    dataset, teacher = images(9), teacher_vit()
    cached = cache_teacher_outputs(dataset, teacher, 4, pooling=pooling, with_logits=False, dtype="float32")
    assert cached.column_names == ["pixel_values", "labels", "teacher_embedding"]
    with torch.no_grad():
        hidden = teacher.vit(torch.tensor(dataset["pixel_values"][:])).last_hidden_state
    expected = hidden.mean(1) if pooling == "mean" else hidden[:, 1]
    torch.testing.assert_close(column(cached), expected, rtol=1e-5, atol=1e-6)


def test_logits_are_kept_of_a_classifier_and_of_no_headless_model() -> None:
    assert "teacher_logits" not in cache_teacher_outputs(images(3), teacher_vit().vit).column_names
    with pytest.raises(ValueError, match="`with_logits` needs a teacher with a head, got ViTModel"):
        cache_teacher_outputs(images(3), teacher_vit().vit, with_logits=True)


@pytest.mark.parametrize("kind", ["pca", "center", "orthogonal"])
def test_projected_embeddings_are_those_that_the_projection_gives(kind: str, tmp_path: Path) -> None:
    dataset, teacher = images(40), teacher_vit()
    dim = None if kind == "center" else 5
    cached = cache_teacher_outputs(
        dataset, teacher, dtype="float32", teacher_projection=kind, projection_dim=dim, cache_dir=tmp_path
    )
    rows, embedding = column(cached).double(), one_by_one(teacher, dataset)[0].double()
    if kind != "orthogonal":
        assert rows.mean(0).abs().max() < 1e-6
        assert rows.square().mean() == pytest.approx(1, rel=1e-6)
        embedding = embedding - embedding.mean(0)
    if kind == "pca":
        values = torch.linalg.svdvals(embedding)[:5]
        assert torch.linalg.svdvals(rows) == pytest.approx(values / (values.square().sum() / 200).sqrt(), rel=1e-5)
    if kind == "center":
        torch.testing.assert_close(rows, embedding / embedding.square().mean().sqrt(), rtol=1e-5, atol=1e-6)
    reader = Forwards(teacher)
    again = cache_teacher_outputs(
        dataset, teacher, dtype="float32", teacher_projection=kind, projection_dim=dim, cache_dir=tmp_path
    )
    probes = PROBED if kind == "orthogonal" else 2 * PROBED  # of the projection, too
    assert (reader.examples, torch.equal(column(again), column(cached))) == (probes, True)


# ---- Other kinds of data sets ----


def test_a_dict_of_data_sets_and_of_streams_stays_one() -> None:
    teacher = teacher_vit()
    parts = DatasetDict(train=images(9), test=images(5))
    cached = cache_teacher_outputs(parts, teacher, 4, dtype="float32")
    streams = IterableDatasetDict({name: part.to_iterable_dataset() for name, part in parts.items()})
    streamed = cache_teacher_outputs(streams, teacher, 4, dtype="float32")
    assert (type(cached), type(streamed)) == (DatasetDict, IterableDatasetDict)
    for name, part in parts.items():
        torch.testing.assert_close(column(cached[name]), one_by_one(teacher, part)[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(column(streamed[name]), column(cached[name]), rtol=1e-5, atol=1e-6)
        assert streamed[name].features == cached[name].features
        assert [example["labels"] for example in streamed[name]] == part["labels"][:]


def test_a_cached_data_set_is_saved_loaded_and_streamed_as_any_other(tmp_path: Path) -> None:
    dataset = images(20)
    cached = cache_teacher_outputs(dataset, teacher_vit(), 4)
    cached.save_to_disk(tmp_path / "saved", num_shards=3)
    cached.to_parquet(tmp_path / "cached.parquet")
    parquet = str(tmp_path / "cached.parquet")
    for other in (
        datasets.load_from_disk(tmp_path / "saved"),
        datasets.load_dataset("parquet", data_files=parquet, split="train"),
        datasets.load_dataset("parquet", data_files=parquet, split="train", streaming=True),
        cached.to_iterable_dataset(num_shards=2),
    ):
        assert other.features == cached.features
        assert torch.equal(column(other), column(cached))
        run = trainer(tmp_path, teacher=None, train_dataset=other, kd_weight=1.0, bank_size=16)
        run.train()
        assert len(run.distillation.bank) == 16
        assert all(value > 0 for value in log_of(run, "relational_loss"))


def flipped(batch: dict[str, list[Any]]) -> dict[str, Any]:
    """Images mirrored by their seed, and shifted by noise from it."""
    views = []
    for pixels, seed in zip(batch["pixel_values"], batch["view_seed"], strict=True):
        generator = torch.Generator().manual_seed(seed)
        image = torch.tensor(pixels)
        image = image.flip(-1) if torch.rand((), generator=generator) < 0.5 else image
        views.append(image + torch.randn((), generator=generator))
    return {"pixel_values": views, "labels": batch["labels"]}


def test_of_several_views_the_student_sees_the_one_whose_embedding_is_cached(tmp_path: Path) -> None:
    dataset, teacher = images(11), teacher_vit()
    viewed = with_views(dataset, 3).with_transform(flipped)
    cached = cache_teacher_outputs(viewed, teacher, 4, dtype="float32")
    assert (len(cached), viewed.with_format(None)["view_seed"][:]) == (33, list(range(33)))
    pixels = torch.stack([example["pixel_values"] for example in cached])
    with torch.no_grad():
        expected = teacher.vit(pixels).last_hidden_state[:, 0]
    found = torch.tensor([example["teacher_embedding"] for example in cached])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (expected[:11] - expected[11:22]).abs().amax(1).min() > 1e-2  # the views differ
    assert [example["labels"] for example in cached] == dataset["labels"][:] * 3
    run = trainer(tmp_path, teacher=None, train_dataset=cached, remove_unused_columns=False, bank_size=33)
    run.train()
    assert log_of(run, "relational_loss")[-1] > 0


# ---- When it is computed again ----


def changed_weights(teacher: Any) -> Any:
    with torch.no_grad():
        teacher.vit.layernorm.bias[3] += 1e-3
    return teacher


@pytest.mark.parametrize(
    ("change", "computed"),
    [
        (lambda data, teacher: (data, teacher, {}), PROBED),
        (lambda data, teacher: (data, copy.deepcopy(teacher), {}), PROBED),
        (lambda data, teacher: (data, teacher, {"batch_size": 5}), PROBED),
        (lambda data, teacher: (data, changed_weights(teacher), {}), 20),
        (lambda data, teacher: (data, teacher, {"pooling": "mean"}), 20),
        (lambda data, teacher: (data, teacher, {"with_logits": False}), 20),
        (lambda data, teacher: (data, teacher, {"dtype": "float32"}), 20),
        (lambda data, teacher: (data, teacher, {"data_collator": DataCollatorForDistillation()}), 20),
        (lambda data, teacher: (data.map(lambda example: {"labels": 0}), teacher, {}), 20),
        (lambda data, teacher: (data.with_transform(lambda batch: batch), teacher, {}), 20),
        (lambda data, teacher: (data.select(range(12)), teacher, {}), 12),
        (lambda data, teacher: (data, teacher_vit(seed=4), {}), 20),
    ],
    ids=[
        "nothing",
        "a copy",
        "batch size",
        "weights",
        "pooling",
        "logits",
        "dtype",
        "collator",
        "map",
        "transform",
        "rows",
        "teacher",
    ],
)
def test_only_a_change_of_data_teacher_or_reading_computes_anew(
    change: Callable[[Dataset, Any], tuple[Dataset, Any, dict[str, Any]]], computed: int, tmp_path: Path
) -> None:
    data, teacher = images(), teacher_vit()
    cache_teacher_outputs(data, teacher, cache_dir=tmp_path)
    data, teacher, settings = change(data, teacher)
    reader = Forwards(teacher)
    cache_teacher_outputs(data, teacher, cache_dir=tmp_path, **settings)
    assert reader.examples == computed


def test_a_teacher_from_another_folder_with_the_same_weights_has_the_same_hash(tmp_path: Path) -> None:
    model = tiny_bert().bert
    for folder in ("first", "second"):
        model.save_pretrained(tmp_path / folder)
    loaded = [AutoModel.from_pretrained(tmp_path / folder) for folder in ("first", "second")]
    assert isinstance(loaded[0], BertModel)
    assert weights_hash(loaded[0]) == weights_hash(loaded[1]) == weights_hash(model)
    assert weights_hash(loaded[1].to(torch.bfloat16)) != weights_hash(model)
    loaded[0].config.hidden_act = "relu"
    assert weights_hash(loaded[0]) != weights_hash(model)


# ---- Several processes, and a kill ----


def expected_columns() -> tuple[Tensor, Tensor]:
    return one_by_one(teacher_vit(), caching_worker.images())


def check_parquet(path: Path) -> None:
    written = datasets.load_dataset("parquet", data_files=str(path), split="train")
    embedding, logits = expected_columns()
    torch.testing.assert_close(column(written), embedding, rtol=2**-10, atol=2**-10)
    torch.testing.assert_close(column(written, "teacher_logits"), logits, rtol=2**-10, atol=2**-10)
    assert written["labels"][:] == caching_worker.images()["labels"][:]


@pytest.mark.parametrize("kill", [0, *(pytest.param(kill, marks=pytest.mark.slow) for kill in range(1, 5))])
def test_after_a_kill_a_second_call_finishes_the_work(tmp_path: Path, kill: int) -> None:
    chance = random.Random(kill)
    all_forwards = sum(
        -(-len(range(start, min(start + SHARD, EXAMPLES))) // BATCH) for start in range(0, EXAMPLES, SHARD)
    )
    kill_at = chance.randrange(1, all_forwards - 3)
    forwards = context().Value("i", 0, lock=False)
    child = context().Process(target=caching_worker.run, args=(0, 1, 0, str(tmp_path), forwards))
    child.start()
    while child.is_alive() and forwards.value < kill_at:
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.004))
    child.kill()
    child.join()
    assert child.exitcode == -9
    done = len(list(tmp_path.glob("*/*.arrow")))
    before = forwards.value
    child = context().Process(target=caching_worker.run, args=(0, 1, 0, str(tmp_path), forwards))
    child.start()
    child.join(timeout=120)
    assert child.exitcode == 0
    # What was whole is not computed again, but for one batch that is compared.
    assert forwards.value - before == all_forwards - 3 * done + min(done, 1)
    check_parquet(tmp_path / "0.parquet")


def test_two_processes_share_the_work_and_both_have_all_of_it(tmp_path: Path) -> None:
    port = free_port()
    counts = [context().Value("i", 0, lock=False) for _ in range(2)]
    children = [
        context().Process(target=caching_worker.run, args=(rank, 2, port, str(tmp_path), counts[rank]))
        for rank in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=120)
    assert [child.exitcode for child in children] == [0, 0]
    assert [count.value for count in counts] == [12, 11]  # 8 files of 3, 3, 3, 3, 3, 3, 3 and 2 batches, in turn
    for rank in range(2):
        check_parquet(tmp_path / f"{rank}.parquet")


def test_a_file_under_its_temporary_name_is_no_part_of_the_cache(tmp_path: Path) -> None:
    teacher = teacher_vit()
    cached = cache_teacher_outputs(images(), teacher, cache_dir=tmp_path)
    (files,) = [sorted(folder.glob("*.arrow")) for folder in tmp_path.iterdir()]
    assert [file.name for file in files] == [
        "000000000000-000000000007.arrow",
        "000000000007-000000000014.arrow",
        "000000000014-000000000020.arrow",
    ]
    files[1].rename(files[1].with_suffix(".0.tmp"))
    reader = Forwards(teacher)
    again = cache_teacher_outputs(images(), teacher, cache_dir=tmp_path)
    assert reader.examples == 7 + PROBED
    assert torch.equal(column(again), column(cached))


# ---- Training from the cache ----


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3)])
def test_training_from_the_cache_is_training_under_the_teacher(dtype: str, tolerance: float, tmp_path: Path) -> None:
    dataset, teacher = images(48), teacher_vit()
    settings: dict[str, Any] = {"kd_weight": 1.0, "teacher_projection": "center"}
    online = trainer(tmp_path, teacher=teacher, train_dataset=dataset, **settings)
    online.train()
    cached = cache_teacher_outputs(dataset, teacher, dtype=dtype)
    offline = trainer(tmp_path, teacher=None, train_dataset=cached, **settings)
    offline.train()
    assert offline.teacher is None
    assert offline.distillation.bank.filled.dtype == getattr(torch, dtype)
    for term in ("task_loss", "kd_loss", "relational_loss", "relational_kl"):
        assert log_of(offline, term) == pytest.approx(log_of(online, term), rel=tolerance, abs=tolerance)


def test_cached_embeddings_fill_all_of_the_bank_and_measure_as_many_examples_as_online(tmp_path: Path) -> None:
    dataset, teacher = images(48), teacher_vit()
    cached = cache_teacher_outputs(dataset, teacher, dtype="float32")
    settings: dict[str, Any] = {"teacher_projection": "center", "bank_size": 48}
    online = trainer(tmp_path, teacher=teacher, train_dataset=dataset, **settings)
    offline = trainer(tmp_path, teacher=None, train_dataset=cached, **settings)
    both = trainer(tmp_path, teacher=teacher, train_dataset=cached, **settings)
    reader = Forwards(teacher)
    for run in (online, offline, both):
        run._calibrate()
    assert reader.examples == 48  # the second and the third read the column
    assert [len(run.distillation.bank) for run in (online, offline, both)] == [48, 48, 48]
    for run in (offline, both):
        torch.testing.assert_close(
            run.distillation.projection.mean, online.distillation.projection.mean, rtol=1e-5, atol=1e-6
        )
    rows = F.normalize(column(cached) - offline.distillation.projection.mean, dim=-1)
    distances = torch.cdist(offline.distillation.bank.filled, rows)
    assert distances.min(1).values.max() < 1e-3
    assert sorted(distances.argmin(1).tolist()) == list(range(48))


# ---- What is refused ----


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "bfloat16"}, r"`dtype` must be one of \['float16', 'float32'\], got 'bfloat16'"),
        ({"teacher_projection": "pcaa"}, r"`teacher_projection` must be one of \['none', .*\], got 'pcaa'"),
        ({"batch_size": 0}, "`batch_size` must be 1 or more, got 0"),
        ({"projection_dim": 8}, "`projection_dim` needs a `teacher_projection`, got 8 and 'none'"),
        ({"teacher_projection": "pca"}, "teacher_projection='pca' needs a `projection_dim`, got None. Try 128"),
        ({"teacher_projection": "orthogonal"}, "teacher_projection='orthogonal' needs a `projection_dim`, got None"),
        (
            {"dataset": texts(4), "teacher": tiny_bert()},
            r"columns \['attention_mask', 'input_ids'\] could not be collated .*tokenizer .* as `processing_class`",
        ),
        ({"dataset": images(4).select([])}, "`dataset` is empty"),
        ({"dataset": DatasetDict(train=images(2), test=images(2).select([]))}, r"dataset\['test'\] is empty"),
        ({"dataset": [{"pixel_values": 1}]}, "must be a data set of the library datasets, got list"),
        (
            {"dataset": images(4).rename_column("pixel_values", "image")},
            r"needs `pixel_values`.*\['image', 'labels'\]",
        ),
        ({"dataset": images(2).add_column("teacher_logits", [[1.0]] * 2)}, r"columns \['teacher_logits'\] already"),
    ],
)
def test_what_cannot_be_cached_is_refused(given: dict[str, Any], message: str) -> None:
    arguments = {"dataset": images(4), "teacher": teacher_vit()} | given
    with pytest.raises(ValueError, match=message):
        cache_teacher_outputs(**arguments)


def test_an_output_beyond_float16_is_refused_and_fits_float32() -> None:
    teacher = teacher_vit()
    with torch.no_grad():
        teacher.vit.layernorm.bias.fill_(1e5)
    with pytest.raises(ValueError, match=r"teacher_embedding is not finite .* in float16: .*dtype='float32'"):
        cache_teacher_outputs(images(4), teacher)
    assert column(cache_teacher_outputs(images(4), teacher, dtype="float32")).mean() > 9e4


def test_logits_per_token_are_refused() -> None:
    teacher = BertForMaskedLM(tiny_bert().config)
    pad = DataCollatorWithPadding(tokenizer("a", "b"))
    with pytest.raises(ValueError, match=r"logits of the shape \(batch, classes\), this teacher gives \(4, "):
        cache_teacher_outputs(texts(4), teacher, 4, pad, with_logits=True)


def test_views_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="`views` must be 1 or more, got 0"):
        with_views(images(2), 0)


def test_views_of_several_splits_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"got a DatasetDict\. .* only the training set .*with_views\(data\['train'\], 4\)"
    ):
        with_views(datasets.DatasetDict(train=images(2)), 2)  # type: ignore[arg-type]


def test_cached_logits_know_their_classes_wherever_the_data_set_goes(tmp_path: Path) -> None:
    names, student = {0: "owl", 1: "cat", 2: "pig", 3: "dog"}, tiny_vit()
    teacher = teacher_vit()
    teacher.config.id2label, student.config.id2label = names, dict(enumerate(sorted(names.values())))
    made = cache_teacher_outputs(images(), teacher, dtype="float32")
    made.save_to_disk(tmp_path / "disk")
    made.to_parquet(tmp_path / "data.parquet")  # which a push to the Hub writes, too
    ways = {
        "stream": made.to_iterable_dataset(),
        "mapped stream": cache_teacher_outputs(images().to_iterable_dataset(), teacher).map(lambda row: row),
        "disk": datasets.load_from_disk(tmp_path / "disk"),
        "parquet": Dataset.from_parquet(str(tmp_path / "data.parquet")),
        "joined": datasets.concatenate_datasets([made, made.map(lambda row: row, num_proc=2)]),
    }
    for way, data in ways.items():
        assert noted_logits(data) == {"classes": list(names.values()), "problem_type": None}, way
        pair = trainer(tmp_path, model=student, teacher=None, train_dataset=data, kd_weight=1.0).distillation.logits
        assert pair is not None and pair._order is not None and pair._order.tolist() == [1, 3, 0, 2], way


def test_no_teacher_is_refused() -> None:
    with pytest.raises(TypeError, match="`teacher` must be a model, a Hub name or a folder, got None"):
        cache_teacher_outputs(images(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "damage", ["{bad", "[1]", "{}", '{"classes": 5}', '{"classes": [1, 2, 3, 4]}', '{"classes": null}']
)
def test_damaged_notes_of_cached_logits_are_none(damage: str, tmp_path: Path) -> None:
    made = cache_teacher_outputs(images(), teacher_vit())
    value = datasets.Value("float16", id=f"somebody; {damage}")
    data = made.cast_column("teacher_logits", datasets.Sequence(value, length=4))
    assert not noted_logits(data).get("classes")
    trainer(tmp_path, teacher=None, train_dataset=data.with_format("torch"), kd_weight=1.0, max_steps=1).train()
