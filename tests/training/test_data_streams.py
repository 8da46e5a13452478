"""Streams: passes that end within an optimizer step, and what is read of a stream before a training."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rrd.training.data import WholeSteps
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
