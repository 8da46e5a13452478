"""Which model this is, and whether a checkpoint was written with the same teacher."""

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_rrd.body import unwrapped
from hf_rrd.data import cached_embeddings, cached_shape, has_cached_embeddings

SAMPLED = 1024
"""Values of each weight in a `weights_sample`."""

SAMPLED_ROWS = 64
"""Cached embeddings that stand for all of a data set's."""


def weights_hash(model: nn.Module) -> str:
    """Of a model's class, config and weights: equal where two models give equal outputs.

    Where the weights lie does not matter, so a moved branch on the Hub is noticed, and a new revision with the same
    weights is not computed again. The class of remote code has its revision in its name.
    """
    tensors = sorted(unwrapped(model).state_dict().items())
    return _hash_of(model, ((name, tensor) for name, tensor in tensors if isinstance(tensor, Tensor)))


def weights_sample(model: nn.Module) -> str:
    """The same of `SAMPLED` values of each weight, spread over it: enough to tell two trainings apart, in no time.

    Of weights that are not in memory (offloaded to disk) and of packed quantised ones the shapes have to do. Where
    DeepSpeed has partitioned the weights, all processes have to call it.
    """
    return _hash_of(model, _samples(unwrapped(model)))


def teacher_identity(teacher: nn.Module | None, pooling: Any, train_dataset: Any) -> dict[str, str]:
    """What a bank's rows depend on: the teacher and how it is pooled, or the cached embeddings in its place.

    Of cached embeddings that are streamed, only width and dtype are known.
    """
    if has_cached_embeddings(train_dataset) or teacher is None:
        digest = hashlib.sha256(repr(cached_shape(train_dataset)).encode())
        if has_cached_embeddings(train_dataset) and hasattr(train_dataset, "select"):
            step = max(1, len(train_dataset) // SAMPLED_ROWS)
            rows = train_dataset.select(range(0, len(train_dataset), step)[:SAMPLED_ROWS])
            digest.update(cached_embeddings(rows).float().numpy().tobytes())
        return {"teacher": f"cached outputs {digest.hexdigest()[:16]}"}
    name = pooling if isinstance(pooling, str) else getattr(pooling, "__qualname__", type(pooling).__qualname__)
    return {"teacher": f"{type(unwrapped(teacher)).__name__} {weights_sample(teacher)[:16]}", "teacher_pooling": name}


def is_of_teacher(about: dict[str, str], identity: dict[str, str], checkpoint: str, ignore_change: bool) -> bool:
    """Whether a checkpoint was written with this teacher.

    Args:
        about: What its sidecar says.
        identity: `teacher_identity` of this run.
        checkpoint: Its folder, for the message.
        ignore_change: Whether another teacher is what the user wants.

    Raises:
        ValueError: It was another, and that is not wanted.
    """
    changed = {name: about.get(name) for name in identity if about.get(name) != identity[name]}
    if changed and not ignore_change:
        there = ", ".join(f"{name} {value}" for name, value in changed.items())
        here = ", ".join(f"{name} {identity[name]}" for name in changed)
        raise ValueError(
            f"{checkpoint} was written with another teacher: its bank is of {there}; this run has {here}. Pass the "
            "same teacher, or set ignore_teacher_change=True to go on with this one: the student and its head are "
            "kept, the projection and the bank are measured anew."
        )
    return not changed


def _samples(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda named: named[0]):
        with _gathered(tensor):
            plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta
            values = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // SAMPLED)][:SAMPLED] if plain else None
            yield f"{name} {tuple(tensor.shape)}", values


def _gathered(tensor: Tensor) -> Any:
    """The whole of a weight that ZeRO-3 has partitioned."""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])


def _hash_of(model: nn.Module, tensors: Iterator[tuple[str, Any]]) -> str:
    model = unwrapped(model)
    digest = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    config = getattr(model, "config", None)
    if config is not None:
        about = {name: value for name, value in config.to_dict().items() if name not in _ELSEWHERE}
        digest.update(repr(sorted(about.items())).encode())
    for name, tensor in tensors:
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            digest.update(f" {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


_ELSEWHERE = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype")
"""Fields of a config that say nothing about a model's outputs beside its weights."""
