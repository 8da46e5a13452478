"""The collator of two sides, and which columns reach whom."""

import re
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Wav2Vec2FeatureExtractor,
    default_data_collator,
)

from hf_rrd import DataCollatorForDistillation
from hf_rrd.training.data import Preview, cached_embeddings, check_dataset, sample_of
from tests.builders import Images, Texts


def tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, whose ids are their places."""
    model = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")


STUDENT = tokenizer("[PAD]", "[UNK]", "a", "good", "film")  # pads with 0
TEACHER = tokenizer("[UNK]", "a", "go", "od", "film", "not", "[PAD]")  # pads with 6


def two_sides() -> list[dict[str, Any]]:
    texts = [("a good film", "a go od film"), ("good", "go od"), ("a film", "not a film")]
    return [
        {**STUDENT(student), "labels": label}
        | {f"teacher_{name}": value for name, value in TEACHER(teacher).items()}
        | {"teacher_embedding": [0.25 * label, 0.5], "teacher_logits": [1.0 * label, 0.0, 2.0]}
        for label, (student, teacher) in enumerate(texts)
    ]


def test_each_side_is_padded_with_its_own_pad_id_and_to_its_own_length() -> None:
    batch = DataCollatorForDistillation(STUDENT, TEACHER)(two_sides())
    assert batch["input_ids"].tolist() == [[2, 3, 4], [3, 0, 0], [2, 4, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["teacher_input_ids"].tolist() == [[1, 2, 3, 4], [2, 3, 6, 6], [5, 1, 4, 6]]
    assert batch["teacher_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("as_tensors", [False, True])
def test_cached_outputs_are_stacked_and_keep_their_names(as_tensors: bool) -> None:
    features = [{**example, "teacher_logits": [1.0, 0.0]} for example in two_sides()]
    if as_tensors:
        features = [
            {**example, "teacher_embedding": torch.tensor(example["teacher_embedding"])} for example in features
        ]
    batch = DataCollatorForDistillation(STUDENT, TEACHER)(features)
    assert batch["teacher_embedding"].tolist() == [[0.0, 0.5], [0.25, 0.5], [0.5, 0.5]]
    assert batch["teacher_logits"].tolist() == [[1.0, 0.0]] * 3
    assert batch["teacher_embedding"].dtype == torch.float32
    assert "embedding" not in batch


def test_collating_leaves_the_examples_as_they_were() -> None:
    features = two_sides()
    DataCollatorForDistillation(STUDENT, TEACHER)(features)
    assert features == two_sides()


@pytest.mark.parametrize("as_tensors", [False, True])
def test_ragged_teacher_columns_without_a_teacher_processor_are_an_error_that_names_the_remedy(
    as_tensors: bool,
) -> None:
    features = two_sides()
    if as_tensors:  # as `Dataset.with_format("torch")` gives them
        features = [{name: torch.tensor(value) for name, value in example.items()} for example in features]
    with pytest.raises(ValueError, match=r"\['teacher_input_ids', .* unequal length\?.*`teacher_processing_class`"):
        DataCollatorForDistillation(STUDENT)(features)


def test_teacher_columns_of_equal_length_need_no_teacher_processor() -> None:
    features = [{"pixel_values": [1.0], "teacher_pixel_values": [float(i), 3.0]} for i in range(2)]
    batch = DataCollatorForDistillation()(features)
    assert batch["teacher_pixel_values"].tolist() == [[0.0, 3.0], [1.0, 3.0]]
    assert batch["pixel_values"].tolist() == [[1.0], [1.0]]


def assert_same_batches(left: Any, right: Any) -> None:
    assert sorted(left) == sorted(right)
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name])


@pytest.mark.parametrize("label", ["label", "labels", "label_ids"])
def test_without_teacher_columns_texts_are_collated_as_the_trainer_would(label: str) -> None:
    features = [{**STUDENT(text), label: i} for i, text in enumerate(["a good film", "film"])]
    assert_same_batches(
        DataCollatorForDistillation(STUDENT, TEACHER)(features), DataCollatorWithPadding(STUDENT)(features)
    )


def test_without_teacher_columns_speech_is_collated_as_the_trainer_would() -> None:
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    features = [{"input_values": [0.5] * count} for count in (7, 4)]
    expected = DataCollatorWithPadding(extractor)(features)
    assert expected["attention_mask"].tolist() == [[1] * 7, [1] * 4 + [0] * 3]
    assert_same_batches(DataCollatorForDistillation(extractor)(features), expected)


class ImageProcessorLike:
    """Callable and savable, as an image processor is; it makes features, not batches."""

    def __call__(self, images: Any) -> Any:
        raise AssertionError("a processor was called as a collator")

    def save_pretrained(self, folder: str) -> None: ...


@pytest.mark.parametrize("processor", [None, ImageProcessorLike()])
def test_without_teacher_columns_images_are_collated_as_the_trainer_would(processor: Any) -> None:
    images = Images(count=3)
    features = [{"pixel_values": images[i]["pixel_values"], "label": i} for i in range(3)]
    assert_same_batches(DataCollatorForDistillation(processor)(features), default_data_collator(features))


def test_a_collator_of_ones_own_collates_its_side() -> None:
    def total(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"ids": torch.tensor(sum(sum(feature["input_ids"]) for feature in features))}

    batch = DataCollatorForDistillation(STUDENT, total)(two_sides())
    assert int(batch["teacher_ids"]) == (1 + 2 + 3 + 4) + (2 + 3) + (5 + 1 + 4)
    assert int(DataCollatorForDistillation(total, TEACHER)(two_sides())["ids"]) == (2 + 3 + 4) + 3 + (2 + 4)


class Example:
    def __init__(self, value: float) -> None:
        self.pixel_values = [value]
        self.teacher_embedding = [value, 1.0]


def test_examples_may_be_objects_with_attributes() -> None:
    batch = DataCollatorForDistillation()([Example(1.0), Example(2.0)])
    assert batch["pixel_values"].tolist() == [[1.0], [2.0]]
    assert batch["teacher_embedding"].tolist() == [[1.0, 1.0], [2.0, 1.0]]


def test_the_collator_shows_the_students_tokenizer_alone() -> None:
    assert DataCollatorForDistillation(STUDENT, TEACHER).tokenizer is STUDENT
    assert DataCollatorForDistillation(ImageProcessorLike(), TEACHER).tokenizer is None


def arrow(**columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    def __init__(self, count: int = 3) -> None:
        self.count = count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i in range(self.count):
            yield {"pixel_values": [1.0], "teacher_embedding": [float(i)] * 5}


class Pairs(torch.utils.data.Dataset[tuple[int, int]]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, 0


TWO = {"image": [1, 2], "label": [0, 1]}


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        pytest.param(arrow(**TWO), {"image", "label"}, id="arrow"),
        pytest.param(arrow(**TWO).with_format("torch"), {"image", "label"}, id="arrow as tensors"),
        pytest.param(arrow(**TWO).with_transform(lambda batch: {"x": batch["image"]}), None, id="arrow transformed"),
        pytest.param(arrow(**TWO).to_iterable_dataset(), {"image", "label"}, id="arrow stream"),
        pytest.param(
            datasets.IterableDataset.from_generator(lambda: iter([{"image": 1}])), None, id="stream of unknown columns"
        ),
        pytest.param(Images(2), {"pixel_values", "labels"}, id="torch"),
        pytest.param(Images(2, labels=False), {"pixel_values"}, id="torch without labels"),
        pytest.param(torch.utils.data.Subset(Texts(3), [1]), {"input_ids", "attention_mask", "labels"}, id="subset"),
        pytest.param([{"a": 1}], {"a"}, id="list"),
        pytest.param(Pairs(), None, id="torch of tuples"),
        pytest.param(Stream(), None, id="torch stream"),
    ],
)
def test_columns_are_known_where_they_can_be_read_without_a_stream(dataset: Any, expected: set[str] | None) -> None:
    assert Preview(dataset).columns == expected


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        pytest.param(arrow(image=[1, 2], teacher_embedding=[[0.0] * 7] * 2), 7, id="arrow"),
        pytest.param(arrow(teacher_embedding=[[0.0] * 7] * 2).with_format("torch"), 7, id="arrow as tensors"),
        pytest.param(arrow(**TWO), None, id="arrow without"),
        pytest.param(arrow(teacher_logits=[[0.0] * 7] * 2), None, id="logits alone"),
        pytest.param(Images(2), None, id="torch without"),
        pytest.param(Stream(), 5, id="stream"),
        pytest.param(Stream(count=0), None, id="empty stream"),
        pytest.param([{"teacher_embedding": torch.zeros(3)}], 3, id="list"),
        pytest.param(Pairs(), None, id="torch of tuples"),
        pytest.param(None, None, id="none"),
    ],
)
def test_the_cached_shape_is_that_of_the_first_embedding(dataset: Any, expected: int | None) -> None:
    assert Preview(dataset).cached_shape == (None if expected is None else (expected, torch.float32))


@pytest.mark.parametrize("label", ["label", "label_ids", "labels", "start_positions"])
def test_a_training_set_with_labels_under_any_known_name_is_taken(label: str) -> None:
    assert Preview(arrow(x=[1], **{label: [0]})).check_labels(["labels", "start_positions"]) is None


@pytest.mark.parametrize("dataset", [Stream(), Pairs(), arrow(x=[1]).with_transform(lambda batch: batch)])
def test_a_training_set_of_unknown_columns_is_taken(dataset: Any) -> None:
    assert Preview(dataset).check_labels(["labels"]) is None


@pytest.mark.parametrize("dataset", [arrow(x=[1], target=[0]), [{"x": 1, "target": 0}]])
def test_a_training_set_without_labels_is_refused_with_its_columns(dataset: Any) -> None:
    with pytest.raises(
        ValueError, match=r"none of \['label', 'label_ids', 'labels'\] is .* \['target', 'x'\].*task_w"
    ):
        Preview(dataset).check_labels(["labels"])


SEVERAL = {"a": [{"x": 1}], "b": Images(1)}


@pytest.mark.parametrize("dataset", [Images(1), arrow(x=[1]), Stream(), Stream(count=0), None, SEVERAL])
def test_a_data_set_that_is_not_known_to_be_empty_is_taken(dataset: Any) -> None:
    assert check_dataset("eval_dataset", dataset) is None


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        (Images(0), "eval"),
        (arrow(x=[]), "eval"),
        ([], "eval"),
        ({"a": [{"x": 1}], "b": []}, r"eval\['b'\]"),
        (datasets.DatasetDict(a=arrow(x=[1]), b=arrow(x=[])), r"eval\['b'\]"),
    ],
)
def test_an_empty_data_set_is_refused_by_its_name(dataset: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is empty, got 0 examples. Pass at least one"):
        check_dataset("eval", dataset)


FRAME = pd.DataFrame({"x": [1, 2], "label": ["a", "b"]})
LOADER: Any = torch.utils.data.DataLoader(Images(2))


@pytest.mark.parametrize(
    ("name", "dataset", "message"),
    [
        ("train_dataset", "imdb", r"got a str\. datasets\.load_dataset\('imdb', split='train'\)"),
        ("train_dataset", FRAME, r"got a DataFrame\. .*from_pandas"),
        ("train_dataset", torch.zeros(2, 3), r"got a Tensor\. datasets\.Dataset\.from_dict"),
        ("train_dataset", 3, r"got a int\. A list of dicts is one"),
        ("eval_dataset", FRAME, r"got a DataFrame\. .*from_pandas"),
        ("eval_dataset['a']", FRAME, r"got a DataFrame\. .*from_pandas"),
        ("train_dataset", LOADER, r"got a DataLoader\. Pass its `dataset`, and"),
        ("train_dataset", {"x": [1, 2], "label": [0, 1]}, r"got a dict\. .*datasets\.Dataset\.from_dict"),
        ("eval_dataset", {"x": ["a", "b"], "label": [0, 1]}, r"got a dict\. .*datasets\.Dataset\.from_dict"),
        ("train_dataset", {"x": np.zeros((2, 2)), "y": torch.ones(2)}, r"got a dict\. .*datasets\.Dataset\.from_dict"),
        (
            "train_dataset",
            datasets.DatasetDict(a=arrow(x=[1])),
            r"got a DatasetDict\. .*parts, \['a'\].*`eval_dataset`",
        ),
    ],
)
def test_what_is_no_data_set_of_examples_is_refused_with_how_to_make_one(
    name: str, dataset: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"`{re.escape(name)}` must be a data set of examples, {message}"):
        check_dataset(name, dataset)


def test_ragged_columns_without_a_processor_are_an_error_that_names_the_remedy() -> None:
    features = [{name: value for name, value in example.items() if "teacher" not in name} for example in two_sides()]
    with pytest.raises(
        ValueError, match=r"\['input_ids', .* unequal length\?.* student's tokenizer as `processing_class`"
    ):
        DataCollatorForDistillation()(features)


@pytest.mark.parametrize("label", [None, "cat"])
@pytest.mark.parametrize("padded", [True, False])
def test_a_label_that_is_no_number_is_named_and_not_taken_for_missing_padding(label: Any, padded: bool) -> None:
    examples = [{"input_ids": [1, 2], "label": 1}, {"input_ids": [1, 2], "label": label}]
    message = re.escape(f"`label` has {label!r} in place of a number (-100: no label): ")
    with pytest.raises(ValueError, match=message):
        DataCollatorForDistillation(STUDENT if padded else None)(examples)


@pytest.mark.parametrize("processor", [STUDENT, None])
def test_labels_that_are_texts_are_left_out(processor: Any) -> None:
    examples = [{"input_ids": [1, 2], "label": "cat", "labels": 1}, {"input_ids": [1, 2], "label": "dog", "labels": 0}]
    batch = DataCollatorForDistillation(processor)(examples)
    assert "label" not in batch and batch["labels"].tolist() == [1, 0] and examples[0]["label"] == "cat"


def test_a_sample_is_drawn_without_repetition_and_by_its_seed() -> None:
    data = datasets.Dataset.from_dict({"x": list(range(50))})
    first, again, other = (sample_of(data, 20, seed)["x"][:] for seed in (3, 3, 4))
    assert first == again != other
    assert len(set(first)) == 20
    assert [row["x"] for row in sample_of(list(data), 20, 3)] == first


def test_a_sample_of_a_smaller_set_is_the_whole_set() -> None:
    assert sorted(sample_of(datasets.Dataset.from_dict({"x": [1, 2, 3]}), 20, 0)["x"]) == [1, 2, 3]


def test_a_sample_of_a_stream_is_its_beginning() -> None:
    stream = datasets.Dataset.from_dict({"x": list(range(50))}).to_iterable_dataset()
    assert [row["x"] for row in sample_of(stream, 4, 0)] == [0, 1, 2, 3]


@pytest.mark.parametrize(("other", "shapes"), [(None, r"\(6,\), None"), ([1.0] * 5, r"\(5,\), \(6,\)")])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_cached_column_with_rows_of_several_widths_or_none_is_an_error(
    other: Any, shapes: str, streamed: bool
) -> None:
    data: Any = datasets.Dataset.from_dict({"teacher_embedding": [[1.0] * 6, [2.0] * 6, other]})
    # datasets 4.0 fails on a row that is not there before it gives the others.
    with pytest.raises(
        ValueError, match=f"a row of one width, got the shapes {shapes}|column `teacher_embedding`.*inhom"
    ):
        cached_embeddings(data.to_iterable_dataset() if streamed else data)
