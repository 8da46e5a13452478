"""What the losses share: checks of their arguments, rows of length 1, a division by what may be 0, directions."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def check_positive(name: str, value: float, example: float) -> None:
    """Raise a ValueError that names an option which is not positive, and a value to try."""
    if not value > 0:
        raise ValueError(f"`{name}` must be positive, got {value}. Try {example:g}.")


def precise(values: Tensor) -> Tensor:
    """The values in float64 if they are, else in float32."""
    return values if values.dtype == torch.float64 else values.float()


@contextmanager
def pair(student: Tensor, teacher: Tensor, one_width: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Both sides checked to be rows of the same examples and `precise`, the teacher without its graph, no autocast."""
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher) or len(student) == 0:
        raise ValueError(
            "`student` and `teacher` must be rows of the same examples, (batch, dim) each with at least 1 row, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if one_width and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"`student` and `teacher` must have one width here, got {student.shape[1]} and {teacher.shape[1]}. "
            "Project the student into the teacher's width, or use a loss on relations, such as PKT."
        )
    student = precise(student)
    with no_autocast(student.device.type):
        yield student, teacher.detach().to(student.dtype)


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """No autocast meanwhile. To leave what is off costs as much as an operation or two, so that is not done."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def unit(rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows over their length, (batch, dim), written to `out` (maybe `rows`) where that is given.

    A row of zeros stays one and gets a gradient of 0. In float32 lengths may lie between 1e-19 and 1e19.
    """
    return torch.div(rows, lengths(rows), out=out)


def lengths(rows: Tensor) -> Tensor:
    """Of each row, (batch, 1), and inf of a row of zeros."""
    return _divisor(torch.linalg.vector_norm(rows, dim=-1, keepdim=True))


def principal_directions(covariance: Tensor, count: int) -> Tensor:
    """The directions of largest variance, largest first, (width, count), each with the one of two signs that is fixed.

    Args:
        covariance: (width, width), in float64, times any factor.
        count: How many, at most the width.
    """
    directions = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :count]
    return directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()


def correlation(one: Tensor, other: Tensor, epsilon: float) -> Tensor:
    """Pearson's of each row of `one` with that of `other`, (batch,). `epsilon` is added to both variances.

    So a row that varies no more than its rounding has correlation 0, and a gradient that is finite.
    """
    one, other = (rows - rows.mean(-1, keepdim=True) for rows in (one, other))
    spreads = [(rows.square().mean(-1) + epsilon).sqrt() for rows in (one, other)]
    return (one * other).mean(-1) / (spreads[0] * spreads[1])


def ratio(numerator: Tensor, denominator: Tensor, out: Tensor | None = None) -> Tensor:
    """`numerator / denominator`, and 0 with a gradient of 0 where the denominator is 0 (or as good as 0)."""
    return torch.div(numerator, _divisor(denominator), out=out)


def _divisor(values: Tensor) -> Tensor:
    least = math.sqrt(torch.finfo(values.dtype).tiny)  # the gradient holds the denominator's square
    return torch.threshold(values, least, torch.inf)
