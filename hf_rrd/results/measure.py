"""Size and speed of models: parameters, bytes, operations, and the time of a forward."""

import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_rrd.models.body import placed, unwrapped
from hf_rrd.models.head import HEAD
from hf_rrd.models.sentence_transformers import own_pooling

WARM_UP, FEWEST, MOST, SECONDS = 3, 10, 50, 10.0
"""Forwards before the clock, and how many are timed: 50, or fewer, down to 10, where 10 seconds are over."""


def size_of(model: nn.Module) -> dict[str, Any]:
    """A model's `class`, `parameters`, `bytes` (of the weights and of the buffers that are saved) and `dtype`.

    Without our head, tied weights once, an adapter's base too, and what a SentenceTransformer has after this model.
    """
    weights = {name: weight for name, weight in model.named_parameters() if not name.startswith(f"{HEAD}.")}
    own = own_pooling(unwrapped(model))
    weights |= {} if own is None else {f"own pooling.{name}": each for name, each in own.modules.named_parameters()}
    saved = model.state_dict().keys()
    stored = [*weights.values(), *(value for name, value in model.named_buffers() if name in saved)]
    return {
        "class": type(unwrapped(model)).__name__,
        "parameters": sum(weight.numel() for weight in weights.values()),
        "bytes": sum(value.numel() * value.element_size() for value in stored),
        "dtype": next((str(each.dtype).removeprefix("torch.") for each in stored if each.is_floating_point()), "none"),
    }


@torch.no_grad()
def flops_of(model: nn.Module, inputs: dict[str, Any]) -> dict[str, int]:
    """The `flops` of a forward, as torch counts matrix products and convolutions; {} where it counts none."""
    try:
        # The counter knows no fused attention of a CPU: the plain one is made of products that it does.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**placed(inputs, model))
    except (NotImplementedError, RuntimeError):  # kernels that are not torch's, as of some quantised weights
        return {}
    return {"flops": counter.get_total_flops()} if counter.get_total_flops() else {}


@torch.no_grad()
def forward_times(models: dict[str, nn.Module], inputs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By model the `median` and `p95` (95th percentile) time of a forward of its inputs, in milliseconds.

    The models take turns, so that a machine that grows slower does so for all.
    """
    ready = {name: placed(inputs[name], model) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}  # milliseconds
    start = time.perf_counter()
    for turn in range(WARM_UP + MOST):
        if turn >= WARM_UP + FEWEST and time.perf_counter() - start > SECONDS * len(models):
            break
        for name, model in models.items():
            begun = _now(model)
            model(**ready[name])
            times[name].append(1000 * (_now(model) - begun))
    ends = torch.tensor([0.5, 0.95], dtype=torch.float64)
    found = {name: torch.tensor(each[WARM_UP:], dtype=torch.float64).quantile(ends) for name, each in times.items()}
    return {name: dict(zip(("median", "p95"), each.tolist(), strict=True)) for name, each in found.items()}


def _now(model: nn.Module) -> float:
    """The time in seconds once the model's device has done all it was given."""
    device = next(model.parameters()).device
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
    return time.perf_counter()


def environment_of(model: nn.Module) -> dict[str, Any]:
    """The machine that a model is on: `device`, `threads` of a CPU, `torch` and `machine`."""
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
    return {"device": name, **threads, "torch": torch.__version__, "machine": platform.machine()}


@contextmanager
def evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Models in evaluation mode, and afterwards each of their modules as it was."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
