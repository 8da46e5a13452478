"""Which columns a failure was about: an error from inside a model, a collator or a loss does not say so."""

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

# What unsuitable data make of the code that reads them, and what a device raises whatever the data.
FROM_DATA = (ValueError, TypeError, RuntimeError, LookupError, AttributeError, ArithmeticError, AssertionError)
OF_DEVICES = (torch.OutOfMemoryError, torch.distributed.DistError, getattr(torch, "AcceleratorError", ()))


class BatchError(ValueError):
    """Some data do not suit; it names their columns, and its cause says how."""


@contextmanager
def named_errors(what: str, data: Any = None) -> Iterator[None]:
    """Turn an error inside the block into a `BatchError` that says what failed, and with which columns.

    Errors of memory, devices and the network stay as they are: the data have no part in them. So do errors of classes
    of somebody's own. `what` is the beginning of a sentence; `data` a batch or an example, where it is known.
    """
    try:
        yield
    except FROM_DATA as error:
        if type(error).__module__ != "builtins" or _is_of_the_machine(error):
            raise
        on = "" if data is None else f" on {described(data)}"
        advice = ""
        if "(`teacher_" in str(error):  # a tokenizer's, whose collator was asked to pad what is not for it
            advice = " The teacher's columns are for a DataCollatorForDistillation(data_collator, teacher_tokenizer)."
        elif isinstance(data, Mapping) and "labels" in data and re.search("[Tt]arget|can't be cast to", str(error)):
            kinds = "integers below `num_labels`, or, of several at once, floats of the shape (batch, num_labels)"
            advice = f" (A classifier's `labels` are {kinds}.)"
        raise BatchError(f"{what} failed{on}. {type(error).__name__}: {error}{advice}") from error


MEANT = {"tokenizer": "processing_class", "teacher_tokenizer": "teacher_processing_class", "student": "model"}


def refuse_unknown(made: Any, given: Iterable[str]) -> None:
    """Raise a TypeError for a class's keyword arguments that it has not, with the ones that may be meant."""
    parameters = inspect.signature(made.__init__).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for name in given if not takes_any else ():
        if name not in parameters:
            near = [MEANT[name]] if name in MEANT else difflib.get_close_matches(name, parameters, 1)
            advice = f" Did you mean `{near[0]}`?" if near else ""
            raise TypeError(f"{made.__name__} has no argument `{name}`.{advice}")


def described(data: Any) -> str:
    """The columns of a batch or an example, with their shapes and dtypes."""
    if not isinstance(data, Mapping):
        return f"a {type(data).__name__} in place of a dict of columns (see `train_dataset` and `data_collator`)"
    if not data:
        return "no columns at all"
    return ", ".join(f"`{name}` {_kind_of(value)}" for name, value in data.items())


def _kind_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"({type(value).__name__})"


def _is_of_the_machine(error: Exception) -> bool:
    if isinstance(error, OF_DEVICES) or should_reduce_batch_size(error):
        return True
    words = ("out of memory", "gloo", "nccl", "connection", "dataloader worker", "cuda error", "cublas", "cudnn")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
