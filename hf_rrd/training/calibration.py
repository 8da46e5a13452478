"""Calibration: the teacher is measured on some training examples before the first step."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_rrd.losses.bank import FeatureBank
from hf_rrd.models.teacher import TeacherProjection
from hf_rrd.training.data import has_cached_embeddings


def calibrate(
    projection: TeacherProjection,
    bank: FeatureBank,
    dataset: Any,
    examples: int,
    seed: int,
    embed: Callable[[Any], Tensor],
    share: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    """Fit the teacher's projection, unless it is, and fill the bank.

    Args:
        projection: Of the teacher's embeddings.
        bank: To be filled.
        dataset: The training set.
        examples: How many are measured; 0 measures none.
        seed: Of their draw.
        embed: From a data set to the teacher's embeddings, (examples, width), on all processes.
        share: From the main process's projection to that of all.

    Raises:
        ValueError: An embedding is not finite, or there are too few to fit the projection.
    """
    if examples == 0:
        return
    # Cached embeddings cost nothing: they fill all of the bank.
    filled = bank.size if has_cached_embeddings(dataset) else min(examples, bank.size)
    count = filled if projection.is_ready else max(examples, filled)
    if count == 0:
        return
    embeddings = embed(sample_of(dataset, count, seed))
    if len(embeddings) == 0 and projection.is_ready:
        return
    if not embeddings.isfinite().all():
        raise ValueError("the teacher's embedding is not finite (nan or inf) on examples of `train_dataset`.")
    if not projection.is_ready:
        projection.fit(embeddings[:examples])
        projection.load_state_dict(share(projection.state_dict()))  # the same to the bit on all processes
    bank.enqueue(projection(embeddings[: bank.size]))


def sample_of(dataset: Any, count: int, seed: int) -> Any:
    """Some examples of a training set: drawn at random with a seed, of a stream the first ones.

    Args:
        dataset: A map-style or iterable data set.
        count: How many; all of a smaller set.
        seed: Of the draw.

    Returns:
        A data set with at most `count` examples.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return dataset.take(count) if hasattr(dataset, "take") else list(islice(iter(dataset), count))
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return dataset.select(rows) if hasattr(dataset, "select") else torch.utils.data.Subset(dataset, rows)


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Leave the random state of Python, NumPy and torch as it was, so that a run is the same with and without."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
