"""Counts the operations that a GPU would have to launch: no GPU is needed for that."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from hf_rrd.losses import relational
from hf_rrd.losses.rows import lengths

FREE = set(
    "alias as_strided detach diagonal empty empty_like empty_strided expand new_empty select slice split t transpose "
    "permute unbind unsqueeze squeeze view _unsafe_view _reshape_alias lift_fresh _record_function_enter_new "
    "_record_function_exit".split()
)
"""Views, allocations and marks."""
KERNELS = "hf_rrd.losses.kernels"  # a module that is there where Triton is


class Operations(TorchDispatchMode):
    """The names of the operations meanwhile, in their order, without those that are free."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._patches = ExitStack()

    def __enter__(self) -> "Operations":
        for kernels in filter(None, (sys.modules.get(KERNELS), STAND_INS)):
            for name in ("unit_rows", "compare"):
                self._patches.enter_context(patch.object(kernels, name, self._one(name, getattr(kernels, name))))
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def _one(self, name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.names.append(name)
            with _disable_current_modes():
                return launch(*args)

        return counted


def unit_rows(student: Tensor, teacher: Tensor, bank: Tensor, bank_is_unit: bool) -> tuple[Tensor, ...]:
    """What the kernel of that name does."""
    rows = torch.cat([student, teacher, bank.to(student.dtype)])
    norms = lengths(rows)
    rows[: 2 * len(student) if bank_is_unit else None] /= norms[: 2 * len(student) if bank_is_unit else None]
    return rows, rows[len(student) : 2 * len(student)].clone(), norms[: len(student), 0]


def compare(
    logits: Tensor, norms: Tensor, student_temperature: float, teacher_temperature: float, same: float
) -> tuple[Tensor, ...]:
    """What the kernel of that name does."""
    batch = len(norms)
    own = batch + torch.arange(batch)
    student, teacher = logits[:batch], logits[batch:]
    counts = ~(teacher > teacher[range(batch), own].unsqueeze(1) * same)
    counts[:, : 2 * batch] = False
    counts[range(batch), own] = True
    student_log, teacher_log = (
        (each / temperature).masked_fill(~counts, -torch.inf).log_softmax(1)
        for each, temperature in ((student, student_temperature), (teacher, teacher_temperature))
    )
    wanted = teacher_log.exp()
    student_log, teacher_log = (each.masked_fill(~counts, 0) for each in (student_log, teacher_log))
    pull = (student_log.exp() * counts - wanted) / student_temperature / norms.unsqueeze(1)
    radial = (pull * student).sum(1)
    logits[:batch] = pull
    logits[range(batch), range(batch)] = -radial
    return -(wanted * student_log).sum(1), (wanted * (teacher_log - student_log)).sum(1)


STAND_INS = SimpleNamespace(unit_rows=unit_rows, compare=compare)


def as_on_a_gpu(kernels: Any = STAND_INS) -> AbstractContextManager[Any]:
    """The relational loss as it is on a GPU, by stand-ins of Triton's kernels, or None of them."""
    return patch.multiple(relational, _is_accelerator=lambda device: True, _kernels=lambda student: kernels)
