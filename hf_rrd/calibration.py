"""Calibration: which training examples the teacher is measured on before the first step."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch


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
