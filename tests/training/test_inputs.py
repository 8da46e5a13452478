"""Each model gets its own input, or the trainer says at once that it would not."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from transformers import (
    BeitImageProcessor,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
    default_data_collator,
)
from transformers import logging as transformers_logging

from hf_rrd import DataCollatorForDistillation, cache_teacher_outputs, with_views
from hf_rrd.models.teacher import Teacher
from hf_rrd.training.data import Preview
from hf_rrd.training.inputs import check_inputs
from tests.builders import Images, Texts, config, log_of, tiny_bert, tiny_vit, trainer
from tests.training.test_data import tokenizer

STUDENT = tokenizer("[PAD]", "[UNK]", "a", "good", "film")
OTHER = tokenizer("[PAD]", "film", "a", "good", "[UNK]")  # of the same size
MORE = tokenizer("[PAD]", "[UNK]", "a", "good", "film", "[MASK]")  # the same ids, and one more
TEXTS = ["a good film", "good", "a film", "film"] * 4


class ForBoth(Images):
    """Images with inputs of the teacher's own: the same at half the contrast."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = super().__getitem__(index)
        return example | {"teacher_pixel_values": example["pixel_values"] / 2}


def arrow(dataset: Any) -> datasets.Dataset:
    examples = [dataset[index] for index in range(len(dataset))]
    return datasets.Dataset.from_list(
        [{name: value.tolist() for name, value in example.items()} for example in examples]
    ).with_format("torch")


def transformed(dataset: Any) -> datasets.Dataset:
    """With a transform that makes the columns from others as they are read."""
    columns = arrow(dataset).with_format(None)
    raw = columns.rename_columns({name: f"raw_{name}" for name in columns.column_names})
    return raw.with_transform(
        lambda batch: {name.removeprefix("raw_"): torch.tensor(values) for name, values in batch.items()}
    )


class Stream(torch.utils.data.IterableDataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return (self.dataset[index] for index in range(len(self.dataset)))


def students_columns(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The collator of many a tutorial."""
    return {name: torch.stack([example[name] for example in examples]) for name in ("pixel_values", "labels")}


def texts(*sides: tuple[str, PreTrainedTokenizerFast]) -> datasets.Dataset:
    columns: dict[str, Any] = {"label": [0, 1, 2, 3] * 4}
    for prefix, read in sides:
        columns |= {prefix + name: values for name, values in read(TEXTS).items()}
    return datasets.Dataset.from_dict(columns)


def text_trainer(folder: Path, dataset: Any, **given: Any) -> Any:
    models = {"model": tiny_bert(), "teacher": tiny_bert(width=24, seed=1)}
    return trainer(folder, **(models | {"train_dataset": dataset} | given))


# ---- The teacher's own columns ----


@pytest.mark.parametrize(
    "kind", [ForBoth, lambda count: arrow(ForBoth(count)), lambda count: transformed(ForBoth(count))]
)
def test_a_collator_that_drops_the_teachers_columns_is_refused_at_once(kind: Any, tmp_path: Path) -> None:
    message = (
        r"`data_collator` makes of `train_dataset` has \['labels', 'pixel_values'\] .* \['teacher_pixel_values'\]"
    )
    with pytest.raises(ValueError, match=message + ".*DataCollatorForDistillation"):
        trainer(tmp_path, train_dataset=kind(16), data_collator=students_columns)
    trainer(tmp_path, train_dataset=kind(16), data_collator=DataCollatorForDistillation(students_columns)).train()


def test_a_stream_is_not_read_to_ask_the_collator(tmp_path: Path) -> None:
    run = trainer(tmp_path, train_dataset=arrow(ForBoth(16)).to_iterable_dataset(), data_collator=students_columns)
    with pytest.raises(ValueError, match=r"the batch has \['labels', 'pixel_values'\] .* \['teacher_pixel_values'\]"):
        run.train()


def test_a_collator_that_cannot_be_asked_before_is_refused_at_its_first_batch(tmp_path: Path) -> None:
    def no_single(examples: list[Any]) -> dict[str, Tensor]:
        assert len(examples) > 1
        return students_columns(examples)

    run = trainer(tmp_path, train_dataset=ForBoth(16), data_collator=no_single)
    with pytest.raises(ValueError, match=r"the batch has \['labels', 'pixel_values'\] .* \['teacher_pixel_values'\]"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize("kind", [lambda data: data, arrow, transformed])
@pytest.mark.parametrize("several", [False, True])
def test_an_evaluation_set_without_the_teachers_columns_is_refused_at_once(
    several: bool, kind: Any, tmp_path: Path
) -> None:
    without = kind(Images(8))
    dataset, name = ({"a": kind(ForBoth(8)), "b": without}, r"\['b'\]") if several else (without, "")
    with pytest.raises(ValueError, match=rf"`eval_dataset{name}` has .* the training set \['teacher_pixel_values'\]"):
        trainer(tmp_path, train_dataset=kind(ForBoth(16)), eval_dataset=dataset)


def test_columns_of_the_teachers_in_the_evaluation_set_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`eval_dataset` has \['teacher_pixel_values'\] .* set no such column"):
        trainer(tmp_path, train_dataset=Images(16), eval_dataset=ForBoth(8))


@pytest.mark.parametrize("training_set", [ForBoth(16), Stream(ForBoth(16))])
def test_another_evaluation_set_without_them_is_refused_at_its_first_batch(training_set: Any, tmp_path: Path) -> None:
    run = trainer(tmp_path, train_dataset=training_set, max_steps=1)
    run.train()
    with pytest.raises(ValueError, match=r"the batch has \['labels', 'pixel_values'\] .* \['teacher_pixel_values'\]"):
        run.evaluate(Images(8))


def test_cached_outputs_need_no_columns_of_the_teachers(tmp_path: Path) -> None:
    cached = arrow(Images(8)).add_column("teacher_embedding", torch.eye(8).tolist())
    trainer(tmp_path, teacher=None, train_dataset=cached, eval_dataset=Images(8)).evaluate()
    wide = arrow(Images(8)).add_column("teacher_embedding", torch.eye(8, 24).tolist())
    trainer(tmp_path, train_dataset=ForBoth(16), eval_dataset=wide).evaluate()


def test_asking_a_collator_before_the_run_draws_no_random_number() -> None:
    def noisy(examples: list[Any]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([example["pixel_values"] for example in examples]) + torch.rand(1)}

    student, sets = tiny_vit(), {"train_dataset": Preview(Images(8))}
    teacher, args = Teacher(tiny_vit(width=24), wants_embedding=True, wants_logits=False), config("out")
    torch.manual_seed(3)
    check_inputs(sets, student, teacher, args, noisy, (None, None))
    after = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(4))
    assert teacher.own == []


# ---- What both read ----


@pytest.mark.parametrize("as_collator", [False, True])
def test_two_tokenizers_without_columns_of_the_teachers_are_refused_also_of_one_size(
    as_collator: bool, tmp_path: Path
) -> None:
    both = {"processing_class": STUDENT, "teacher_processing_class": OTHER}
    given = {"data_collator": DataCollatorForDistillation(STUDENT, OTHER)} if as_collator else both
    with pytest.raises(ValueError, match=r"different processors.*no `teacher_` columns.*f'teacher_\{name\}'"):
        text_trainer(tmp_path, texts(("", STUDENT)), **given)
    text_trainer(tmp_path, texts(("", STUDENT), ("teacher_", OTHER)), **given).train()


@pytest.mark.parametrize("teachers", [STUDENT, tokenizer("[PAD]", "[UNK]", "a", "good", "film"), MORE])
def test_two_tokenizers_of_one_vocabulary_share_their_columns(teachers: Any, tmp_path: Path) -> None:
    both = {"processing_class": STUDENT, "teacher_processing_class": teachers}
    text_trainer(tmp_path, texts(("", STUDENT)), **both).train()


def test_two_image_processors_share_their_columns_only_if_they_do_the_same(tmp_path: Path) -> None:
    square, halves = {"height": 224, "width": 224}, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    given = {"train_dataset": Images(16), "processing_class": ViTImageProcessor()}
    for same in (
        ViTImageProcessor(),
        BeitImageProcessor(size=square, do_center_crop=False, resample=2, **halves),  # with settings of its own
    ):
        trainer(tmp_path, teacher_processing_class=same, **given)
    for other in (
        ViTImageProcessor(image_mean=[0.1, 0.2, 0.3]),
        ViTImageProcessor(size={"height": 256, "width": 256}),
        BeitImageProcessor(size={"height": 256, "width": 256}, crop_size=square, do_center_crop=True, **halves),
    ):
        with pytest.raises(ValueError, match="different processors"):
            trainer(tmp_path, teacher_processing_class=other, **given)


@pytest.mark.parametrize("collator", [None, DataCollatorWithPadding(STUDENT)])
def test_the_tokenizer_beside_the_teachers_weights_says_whether_it_can_read_the_students_input(
    collator: Any, tmp_path: Path
) -> None:
    tiny_bert(width=24, seed=1).save_pretrained(tmp_path)
    given = {"teacher": str(tmp_path), "processing_class": STUDENT, "data_collator": collator}
    text_trainer(tmp_path, texts(("", STUDENT)), **given)
    MORE.save_pretrained(tmp_path)
    text_trainer(tmp_path, texts(("", STUDENT)), **given)
    OTHER.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="different processors"):
        text_trainer(tmp_path, texts(("", STUDENT)), **given)


@pytest.mark.parametrize(
    ("own", "beside", "warns"),
    [
        (ViTImageProcessor(), {"image_mean": [0.1, 0.2, 0.3]}, True),
        (ViTImageProcessor(), {"image_std": [0.5, 0.5, 0.5], "size": {"height": 7, "width": 7}}, False),
        (ViTImageProcessor(do_normalize=False), {"image_mean": [0.1, 0.2, 0.3]}, False),
        (None, {"image_mean": [0.1, 0.2, 0.3]}, False),
        (ViTImageProcessor(), None, False),
    ],
)
def test_an_image_processor_beside_the_teachers_weights_with_another_mean_is_a_warning(
    own: Any, beside: dict[str, Any] | None, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_vit(width=24, seed=1).save_pretrained(tmp_path)
    if beside is not None:
        ViTImageProcessor(**beside).save_pretrained(tmp_path)
    transformers_logging.enable_propagation()
    try:
        trainer(tmp_path, teacher=str(tmp_path), processing_class=own)
    finally:
        transformers_logging.disable_propagation()
    said = "made with {'image_mean': [0.5, 0.5, 0.5], 'image_std': [0.5, 0.5, 0.5]}, and the processor beside"
    assert (said in caplog.text) == warns


@pytest.mark.parametrize("collator", [None, default_data_collator, students_columns])
@pytest.mark.parametrize("tokens", [50, 60])
def test_vocabularies_of_two_sizes_are_a_warning_with_any_collator(
    tokens: int, collator: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def of_a_list(examples: list[Any]) -> dict[str, Tensor]:
        assert len(examples) > 1  # the run's first batch is the first that is seen
        return dict(default_data_collator(examples))

    teacher = tiny_bert(width=24, seed=1)
    teacher.resize_token_embeddings(tokens)
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            given = of_a_list if collator is students_columns else collator
            text_trainer(tmp_path, Texts(16), teacher=teacher, data_collator=given).train()
    finally:
        transformers_logging.disable_propagation()
    found = [each.getMessage() for each in caplog.records if "vocabularies differ" in each.getMessage()]
    assert len(found) == (tokens == 60)
    assert all("(60 and 50 tokens)" in each for each in found)


def test_a_processor_that_the_collator_would_not_use_is_refused(tmp_path: Path) -> None:
    dataset, message = texts(("", STUDENT), ("teacher_", OTHER)), r"for the default collator.*data_collator=DataColl"
    for collator in (DataCollatorForDistillation(STUDENT), DataCollatorWithPadding(STUDENT)):
        with pytest.raises(ValueError, match="`teacher_processing_class` is " + message):
            text_trainer(tmp_path, dataset, data_collator=collator, teacher_processing_class=OTHER)
    both = DataCollatorForDistillation(STUDENT, OTHER)
    text_trainer(tmp_path, dataset, data_collator=both, teacher_processing_class=OTHER).train()


# ---- What reaches the models ----


@pytest.mark.parametrize("kept", [False, True])
def test_raw_texts_are_refused_with_what_to_do(kept: bool, tmp_path: Path) -> None:
    raw = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1, 2, 3] * 4})
    message = r"`train_dataset` has the columns \['label', 'text'\], and none is an input of BertForSeq.* `input_ids`"
    with pytest.raises(ValueError, match=message + r"\. Tokenize it first: .*tokenizer\(batch\['text'\]\)"):
        text_trainer(tmp_path, raw, processing_class=STUDENT, remove_unused_columns=not kept)


def test_a_collator_may_read_raw_texts_where_they_are_kept(tmp_path: Path) -> None:
    def read(examples: list[Any]) -> Any:
        batch = STUDENT([example["text"] for example in examples], padding=True, return_tensors="pt")
        return batch | {"labels": torch.tensor([example["label"] for example in examples])}

    raw = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1, 2, 3] * 4})
    with pytest.raises(ValueError, match="Set remove_unused_columns=False, if `data_collator` makes one"):
        text_trainer(tmp_path, raw, data_collator=read)
    text_trainer(tmp_path, raw, data_collator=read, remove_unused_columns=False).train()


def test_a_teacher_of_texts_on_images_is_refused_at_once(tmp_path: Path) -> None:
    message = r"teacher needs `input_ids`, and `train_dataset` has \['labels', 'pixel_values'\].*`teacher_input_ids`"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, teacher=tiny_bert(seed=1))


def test_a_column_that_is_all_but_the_teachers_input_is_refused(tmp_path: Path) -> None:
    dataset = arrow(ForBoth(8))
    trainer(tmp_path, train_dataset=dataset.rename_column("teacher_pixel_values", "teacher_size"))
    with pytest.raises(ValueError, match="a column `teacher_pixels_value`, which nobody .* `teacher_pixel_values`?"):
        trainer(tmp_path, train_dataset=dataset.rename_column("teacher_pixel_values", "teacher_pixels_value"))


def test_a_transform_reads_its_columns_though_unused_ones_are_removed(tmp_path: Path) -> None:
    logs = []
    for kind in (arrow, transformed):
        run = trainer(tmp_path, train_dataset=kind(ForBoth(16)), eval_dataset=kind(ForBoth(8)))
        assert run.args.remove_unused_columns
        run.train()
        logs.append([*log_of(run), run.evaluate()["eval_loss"]])
    assert logs[0] == logs[1]
    assert len(logs[0]) == 4


def test_cached_views_train_though_unused_columns_are_removed(tmp_path: Path) -> None:
    def augment(batch: dict[str, list[Any]]) -> dict[str, Any]:
        generators = [torch.Generator().manual_seed(seed) for seed in batch["view_seed"]]
        noise = torch.stack([torch.randn(3, 16, 16, generator=generator) for generator in generators])
        return {"pixel_values": torch.tensor(batch["image"]) + noise, "labels": batch["class"]}

    images = arrow(Images(8)).with_format(None).rename_columns({"pixel_values": "image", "labels": "class"})
    views = with_views(images, 2).with_transform(augment)
    cached = cache_teacher_outputs(views, tiny_vit(width=24, seed=1), dtype="float32", cache_dir=tmp_path / "cache")
    online = trainer(tmp_path, train_dataset=views)
    offline = trainer(tmp_path, train_dataset=cached, teacher=None)
    for run in (online, offline):
        assert run.args.remove_unused_columns
        run.train()
    assert log_of(offline) == pytest.approx(log_of(online), rel=1e-6)


@pytest.mark.parametrize("as_arrow", [False, True])
@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_labels_that_are_strings_are_refused_with_how_to_number_them(
    name: str, as_arrow: bool, tmp_path: Path
) -> None:
    images = Images(8)
    examples = [{"pixel_values": images.pixels[index].tolist(), "labels": "cat"} for index in range(8)]
    dataset = datasets.Dataset.from_list(examples) if as_arrow else examples
    message = rf"`labels` of `{name}` must have the numbers .* got 'cat'.*class_encode_column\('labels'\)"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **({"train_dataset": Images(8)} | {name: dataset}))
    trainer(tmp_path, task_weight=0.0, **({"train_dataset": Images(8)} | {name: dataset})).train()


@pytest.mark.parametrize("task_weight", [0.0, 1.0])
@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_classes_that_the_data_number_otherwise_than_the_student_are_warned_of_until_they_are_aligned(
    name: str, task_weight: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student, names = tiny_vit(), ["cat", "dog", "owl", "pig"]
    student.config.id2label = {0: "Cat", 1: "Owl", 2: "Dog", 3: "Pig"}
    student.config.label2id = {"Cat": 0, "Owl": 1, "Dog": 2, "Pig": 3}
    dataset = arrow(Images(8)).with_format(None).cast_column("labels", datasets.ClassLabel(names=names))
    aligned = dataset.align_labels_with_mapping(student.config.label2id, "labels")
    said = f"Class 1 is 'dog' in `{name}` and 'owl' in the student's `id2label`: it will name them wrongly"
    for data, warns in ((aligned, False), (dataset, task_weight > 0)):
        caplog.clear()
        trainer(tmp_path, model=student, task_weight=task_weight, **({"train_dataset": Images(8)} | {name: data}))
        assert (said in caplog.text) == warns and ("wrongly" in caplog.text) == warns


@pytest.mark.parametrize("name", ["processing_class", "teacher_processing_class"])
def test_the_name_of_a_processor_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be a tokenizer or a processor, got 'bert-base'"):
        trainer(tmp_path, **{name: "bert-base"})


def test_a_report_on_data_without_the_teachers_columns_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, train_dataset=ForBoth(16), eval_dataset=ForBoth(8))
    with pytest.raises(ValueError, match=r"`dataset` has \['labels', 'pixel_values'\] .* \['teacher_pixel_values'\]"):
        run.report(Images(8))
    run.report()


def test_examples_that_are_objects_are_the_collators_own_affair(tmp_path: Path) -> None:
    class Example:
        def __init__(self, index: int) -> None:
            self.columns = Images(8)[index]

    def collate(examples: list[Any]) -> dict[str, Tensor]:
        columns = [each.columns for each in examples if isinstance(each, Example)]
        return students_columns(columns) if columns else {}

    examples = [Example(index) for index in range(8)]
    trainer(tmp_path, train_dataset=examples, data_collator=collate, remove_unused_columns=False).train()


def test_an_example_that_cannot_be_read_is_an_error_that_says_so(tmp_path: Path) -> None:
    class Lost(Images):
        def __getitem__(self, index: int) -> Any:
            raise KeyError("file")

    with pytest.raises(ValueError, match="reading the first example of `train_dataset` .* failed. KeyError: 'file'"):
        trainer(tmp_path, train_dataset=Lost(8))
