"""Size and speed of models: parameters, bytes, operations, and the time of a forward."""

import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_rrd.models.body import placed, unwrapped
from hf_rrd.models.head import HEAD

WARM_UP, FEWEST, MOST, SECONDS = 3, 10, 50, 10.0
"""Forwards before the clock, and how many are timed: 50, or fewer, down to 10, where 10 seconds are over."""


def size_of(model: nn.Module) -> dict[str, Any]:
    """A model's class and weights: without our head, tied ones once, an adapter's base too.

    Returns:
        `class`, `parameters`, `bytes` (of the weights and of the buffers that are saved) and `dtype`.
    """
    weights = {name: weight for name, weight in model.named_parameters() if not name.startswith(f"{HEAD}.")}
    saved = model.state_dict().keys()
    stored = [*weights.values(), *(value for name, value in model.named_buffers() if name in saved)]
    return {
        "class": type(unwrapped(model)).__name__,
        "parameters": sum(weight.numel() for weight in weights.values()),
        "bytes": sum(value.numel() * value.element_size() for value in stored),
        "dtype": next((str(each.dtype).removeprefix("torch.") for each in stored if each.is_floating_point()), "none"),
    }


@torch.no_grad()
def flops_of(model: nn.Module, inputs: dict[str, Any]) -> int | None:
    """The operations of a forward, as torch counts matrix products and convolutions; None where it counts none."""
    try:
        # The counter knows no fused attention of a CPU: the plain one is made of products that it does.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**placed(inputs, model))
    except (NotImplementedError, RuntimeError):  # kernels that are not torch's, as of some quantised weights
        return None
    return counter.get_total_flops() or None


@torch.no_grad()
def forward_times(
    models: Mapping[str, nn.Module], inputs: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Time the forwards of models in turns, so that a machine that grows slower does so for all.

    Args:
        models: By name.
        inputs: What each one's forward takes, by the same names.

    Returns:
        By name, `median` and `p95`, the 95th percentile, in milliseconds.
    """
    ready = {name: placed(inputs[name], model) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    start = time.perf_counter()
    for turn in range(WARM_UP + MOST):
        if turn >= WARM_UP + FEWEST and time.perf_counter() - start > SECONDS * len(models):
            break
        for name, model in models.items():
            seconds[name].append(_time_of(model, ready[name]))
    times = {name: 1000 * torch.tensor(taken[WARM_UP:], dtype=torch.float64) for name, taken in seconds.items()}
    return {
        name: {"median": each.quantile(0.5).item(), "p95": each.quantile(0.95).item()} for name, each in times.items()
    }


def _time_of(model: nn.Module, inputs: Mapping[str, Any]) -> float:
    device = next(model.parameters()).device
    _wait_for(device)
    start = time.perf_counter()
    model(**inputs)
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def environment_of(model: nn.Module) -> dict[str, Any]:
    """The machine that a model is on: `device`, `threads` of a CPU, `torch` and `machine`."""
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
    return {"device": name, **threads, "torch": torch.__version__, "machine": platform.machine()}


@contextmanager
def evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Models in evaluation mode, and afterwards each of their modules as it was."""
    modules = {module: module.training for model in models for module in model.modules()}
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in modules.items():
            module.training = training
