"""Streams: what is read of one before its first pass, and passes that end within an optimizer step."""

from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from datasets import IterableDataset
from datasets.fingerprint import Hasher
from transformers.utils import logging

from hf_rrd.training.data import is_map_style, preserved_randomness

logger = logging.get_logger(__name__)


class ReadAhead(torch.utils.data.IterableDataset[Any]):
    """A stream of which examples are read before its first pass, which begins with them all the same.

    Where the stream can be read only once, which shows in a second reading that begins with another example, what was
    read is kept for that pass.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._read: list[Any] = []
        self._open: list[Iterator[Any]] = []  # both: a generator that is let go may close what it reads

    def __getattr__(self, name: str) -> Any:
        if name == "stream" or name.startswith("__"):  # the first while it is unpickled
            raise AttributeError(name)
        return getattr(self.stream, name)

    def __iter__(self) -> Iterator[Any]:
        read, opened, self._read, self._open = self._read, self._open, [], []
        yield from read
        yield from opened[0] if opened else self.stream

    def take(self, count: int) -> list[Any]:
        """The first examples, at most `count`."""
        if self._open:
            self._read += islice(self._open[0], max(0, count - len(self._read)))
            return self._read[:count]
        with preserved_randomness():
            first = iter(self.stream)
            read = list(islice(first, count))
        with preserved_randomness():
            second = iter(self.stream)
            again = list(islice(second, 1))
        if [Hasher.hash(example) for example in again] != [Hasher.hash(example) for example in read[:1]]:
            self._read, self._open = read + again, [first, second]
        return read


def with_reading_ahead(dataset: Any, workers: int) -> Any:
    """A stream of torch's as one that can be read before its first pass; any other data set as it is."""
    kinds = (IterableDataset, torch.utils.data.IterDataPipe)  # which can be read again, and which a loader knows
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset) and not isinstance(dataset, kinds)
    return ReadAhead(dataset) if is_stream and workers <= 1 and not hasattr(dataset, "__len__") else dataset


class WholeSteps:
    """Micro-batches by the optimizer step. Too few at the end of a stream's pass wait for those of the next pass.

    The Trainer gives them a step of their own where the data set has a length. Otherwise it would add their gradients
    to those of the next step.
    """

    def __init__(self, dataset: Any = None) -> None:
        self._closes = hasattr(dataset, "__len__")
        self.waiting: list[Any] = []
        self._ended: Any = None

    def read(
        self, iterator: Iterator[Any], count: int, take: Callable[..., Any], device: Any
    ) -> tuple[list[Any], Any]:
        """What `take`, the Trainer's way, gives of `count` micro-batches; nothing where a pass has fewer left."""
        if iterator is self._ended:  # a Trainer asks on until its steps are over
            return [], None
        batches, num_items = take(chain(self.waiting, iterator), count, device)
        is_whole = len(batches) == count or self._closes
        self.waiting, self._ended = ([], None) if is_whole else (batches, iterator)
        return (batches, num_items) if is_whole else ([], None)

    def raise_for_none(self) -> None:
        """Raise the ValueError of a training without a single step."""
        if self.waiting:
            few = f"`train_dataset` gave {len(self.waiting)} batches, fewer than `gradient_accumulation_steps`"
            raise ValueError(f"{few}. Lower that, or the batch size.")
        raise ValueError("`train_dataset` gave no batch. Is it smaller than one, with `dataloader_drop_last` on?")


def warn_of_new_pass(dataset: Any, passes: float | None) -> None:
    """Warn where a resumed run was past the first pass of a stream: the Trainer does not find the place again."""
    if not is_map_style(dataset) and (passes or 0) >= 1:
        logger.warning("The stream was past its first pass, of which no checkpoint knows: it begins a new pass.")
