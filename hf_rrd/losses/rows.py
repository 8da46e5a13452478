"""What the losses share: checks of their arguments, rows of length 1, and a division by what may be 0."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

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
            "Project the student into the teacher's width, or use a loss on relations, such as pkt_loss."
        )
    student = precise(student)
    with torch.autocast(student.device.type, enabled=False):
        yield student, teacher.detach().to(student.dtype)


def unit(rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows of any scale over their length, (batch, dim), written to `out` (maybe `rows`) where that is given.

    A row of zeros, or of entries as good as 0 (below 1e-31 in float32), becomes zeros and gets a gradient of 0.
    """
    if rows.device.type == "cpu":  # half the time, but a question that another device would have to be waited for
        lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        if ((lengths > 1e-15) & (lengths < 1e15)).all():
            return torch.div(rows, lengths, out=out)
    # Over the largest entry first, so that no square overflows or vanishes: the length is then at least 1.
    values, limits = rows.detach(), torch.finfo(rows.dtype)
    largest = torch.maximum(values.amax(-1, keepdim=True), -values.amin(-1, keepdim=True))  # faster than abs
    scaled = torch.div(rows, largest.masked_fill(largest < limits.tiny / limits.eps, torch.inf), out=out)
    return torch.div(scaled, torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp(min=1), out=out)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """`numerator / denominator`, and 0 with a gradient of 0 where the denominator is 0 (or as good as 0)."""
    least = math.sqrt(torch.finfo(denominator.dtype).tiny)  # the gradient holds the denominator's square
    return numerator / denominator.masked_fill(denominator < least, torch.inf)
