"""Streams: passes that end within an optimizer step, and what is read of a stream before a training."""

import copy
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

from hf_rrd.training.streams import ReadAhead, WholeSteps, with_reading_ahead
from tests.builders import Images, log_of, trainer


class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """So many images in their order, so many times over, without a length."""

    def __init__(self, count: int, times: int = 1) -> None:
        self.images, self.times = Images(count), times

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(self.times):
            yield from (self.images[index] for index in range(len(self.images)))


def take(iterator: Iterator[Any], count: int, device: Any) -> tuple[list[Any], int]:
    batches = list(islice(iterator, count))
    return batches, sum(batches)


def test_micro_batches_that_are_too_few_for_a_step_begin_those_of_the_next_pass() -> None:
    steps, found = WholeSteps(), []
    for _ in range(3):
        one_pass = iter([1, 2, 3, 4])
        found.append([steps.read(one_pass, 3, take, None) for _ in range(4)])
    none: tuple[list[Any], Any] = ([], None)
    assert found == [
        [([1, 2, 3], 6), none, none, none],
        [([4, 1, 2], 7), none, none, none],
        [([3, 4, 1], 8), ([2, 3, 4], 9), none, none],
    ]


@pytest.mark.parametrize("accumulation", [2, 3, 4])
def test_a_stream_in_passes_of_5_batches_trains_as_the_same_examples_in_one_pass(
    tmp_path: Path, accumulation: int
) -> None:
    settings: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "max_steps": 7}
    short, long = (trainer(tmp_path, train_dataset=Stream(40, times), **settings) for times in (1, 7))
    short.train()
    long.train()
    assert log_of(short) == log_of(long)
    weights = zip(short.model.parameters(), long.model.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in weights)
    for line in short.state.log_history[:7]:
        assert line["loss"] == pytest.approx(line["task_loss"] + line["relational_loss"], rel=1e-6)


def test_a_stream_with_fewer_batches_than_a_step_is_an_error(tmp_path: Path) -> None:
    run = trainer(tmp_path, train_dataset=Stream(24), gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="gave 3 batches, fewer than `gradient_accumulation_steps`. Lower that"):
        run.train()


class Numbers(torch.utils.data.IterableDataset[Any]):
    """The numbers from 0 to 9, by a way of iterating."""

    def __init__(self, way: Any) -> None:
        self.way, self.source, self.next, self.chance = way, iter(range(10)), 0, random.Random(0)
        self.generator = (number for number in range(10))

    def __iter__(self) -> Any:
        return self.way(self)

    def __next__(self) -> int:
        self.next += 1
        if self.next > 10:
            raise StopIteration
        return self.next - 1


def delegating(stream: Numbers) -> Iterator[int]:
    yield from stream.generator


def beginning_anew(stream: Numbers) -> Numbers:
    stream.next = 0
    return stream


def noisy(stream: Numbers) -> Iterator[float]:
    return (number + torch.rand(1).item() for number in range(10))


ONCE = {
    "an iterator that is kept": lambda stream: stream.source,
    "a loop over one": lambda stream: (number for number in stream.source),
    "a generator over one": delegating,
    "the stream itself": lambda stream: stream,
}
AGAIN = {
    "a new iterator": lambda stream: iter(range(10)),
    "the stream itself, which begins anew": beginning_anew,
}


@pytest.mark.parametrize("taken", [[], [4], [1, 4], [4, 1], [12]])
@pytest.mark.parametrize("way", [*ONCE, *AGAIN])
def test_what_is_read_of_a_stream_before_its_first_pass_is_in_that_pass(way: str, taken: list[int]) -> None:
    stream = ReadAhead(Numbers((ONCE | AGAIN)[way]))
    for count in taken:
        assert stream.take(count) == list(range(10))[:count]
    assert list(stream) == list(range(10))
    assert list(stream) == ([] if way in ONCE else list(range(10)))


def test_a_stream_with_random_numbers_can_be_read_again() -> None:
    stream, state = ReadAhead(Numbers(noisy)), torch.get_rng_state()
    assert len(stream.take(4)) == 4
    assert torch.equal(torch.get_rng_state(), state)
    assert [int(number) for number in stream] == list(range(10))


def test_a_stream_shows_what_it_has_and_no_length_and_others_stay_as_they_are() -> None:
    stream = Numbers(ONCE["a loop over one"])
    assert with_reading_ahead(stream, 0).next == 0
    assert not hasattr(with_reading_ahead(stream, 0), "__len__")
    with pytest.raises(AttributeError, match="absent"):
        _ = with_reading_ahead(stream, 0).absent
    copied: Any = copy.deepcopy(with_reading_ahead(Stream(8), 0))
    assert len(list(copied)) == 8
    table = datasets.Dataset.from_dict({"x": [1]})
    others: list[Any] = [
        None,
        Images(1),
        table,
        table.to_iterable_dataset(),
        table.to_iterable_dataset().with_format("torch"),
    ]
    assert [with_reading_ahead(other, 0) is other for other in others] == [True] * 5
    assert with_reading_ahead(stream, 2) is stream


class Sized(Stream):
    """A stream that says how long it is."""

    def __len__(self) -> int:
        return len(self.images)


@pytest.mark.parametrize(("workers", "steps"), [(0, 5), (2, 2)])
def test_a_stream_with_a_length_trains_as_one_without(tmp_path: Path, workers: int, steps: int) -> None:
    settings: dict[str, Any] = {"max_steps": steps, "gradient_accumulation_steps": 2}
    settings |= {"dataloader_num_workers": workers}
    sized, other = (trainer(tmp_path, train_dataset=data, **settings) for data in (Sized(32), Stream(32)))
    sized.train()
    other.train()
    assert log_of(sized) == log_of(other)


class Prepared(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """24 images, with a teacher's embedding or without, that can be read once or again."""

    def __init__(self, once: bool, cached: bool) -> None:
        self.examples = [
            example | ({"teacher_embedding": example["pixel_values"].flatten()[:24]} if cached else {})
            for example in Stream(24)
        ]
        self.iterator = iter(self.examples) if once else None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.iterator or iter(self.examples)


@pytest.mark.parametrize("cached", [False, True])
def test_a_stream_that_can_be_read_once_trains_as_one_that_can_be_read_again(tmp_path: Path, cached: bool) -> None:
    settings: dict[str, Any] = {"teacher_projection": "center"}
    settings |= {"teacher": None} if cached else {}
    once, again = (trainer(tmp_path, train_dataset=Prepared(kind, cached), **settings) for kind in (True, False))
    once.train()
    again.train()
    assert log_of(once) == log_of(again)
    assert len(log_of(once)) == 3
