"""Random rows, and the formulas that several losses share, in plain Python numbers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Rows = Sequence[Sequence[float]]


def rows(count: int, dim: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotation(dim: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(rows(dim, dim, seed))[0]


def gradient_of(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """The value of a function of the student, and its gradient."""
    student = at.clone().requires_grad_()
    value = function(student)
    value.backward()
    assert student.grad is not None
    return value.detach(), student.grad


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    lengths = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / lengths if lengths > 0 else 0.0


def naive_cosine(student: Rows, teacher: Rows) -> float:
    return sum(1 - cosine(s, t) for s, t in zip(student, teacher, strict=True)) / len(student)


def naive_mse(student: Rows, teacher: Rows) -> float:
    return sum(dot(minus(s, t), minus(s, t)) / len(s) for s, t in zip(student, teacher, strict=True)) / len(student)


def correlation(a: Sequence[float], b: Sequence[float], epsilon: float) -> float:
    a, b = ([x - math.fsum(each) / len(each) for x in each] for each in (a, b))
    variances = [dot(each, each) / len(each) + epsilon for each in (a, b)]
    return dot(a, b) / len(a) / math.sqrt(variances[0] * variances[1])


def naive_srd(student: Rows, teacher: Rows) -> float:
    if len(student) < 3:
        return 0.0
    columns = zip(zip(*student, strict=True), zip(*teacher, strict=True), strict=True)
    return math.log(math.fsum((correlation(s, t, 1e-5) - 1) ** 4 for s, t in columns) + 1e-5)


def slopes_of(naive: Callable[..., float], student: Tensor, teacher: Tensor) -> Tensor:
    """The gradient of a loop by central differences of the fourth order."""
    step, slopes = 1e-3, torch.zeros_like(student)
    for i in range(student.shape[0]):
        for d in range(student.shape[1]):
            shift = torch.zeros_like(student)
            shift[i, d] = step
            two_below, below, above, two_above = (
                naive((student + n * shift).tolist(), teacher.tolist()) for n in (-2, -1, 1, 2)
            )
            slopes[i, d] = (8 * (above - below) - (two_above - two_below)) / (12 * step)
    return slopes


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest result of an operation has that is no view of an input.

    `whole` has shape and dtype of all that are as large.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.whole: list[tuple[torch.Size, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in inputs:
            if result.numel() > self.elements:
                self.elements, self.whole = result.numel(), []
            if result.numel() == self.elements:
                self.whole.append((result.shape, result.dtype))
        return result
