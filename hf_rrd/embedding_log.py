"""The embeddings of an evaluation: collected as it goes, compared at its end."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_rrd.alignment import relational_alignment


class EmbeddingLog:
    """Teacher's and student's embeddings of the same examples, on the host.

    Args:
        examples: At most so many are compared, spread evenly over the evaluation.
    """

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self._student: list[Tensor] = []
        self._teacher: list[Tensor] = []

    def start(self) -> None:
        """Forget an earlier evaluation."""
        self._student, self._teacher = [], []

    def add(self, student: Tensor, teacher: Tensor, gather: Callable[[Tensor], Tensor]) -> None:
        """Add an evaluated batch.

        Args:
            student: (batch, width).
            teacher: (batch, another width).
            gather: From this process's rows to those of all processes, without duplicates.
        """
        both = torch.cat([student.detach().float(), teacher.detach().float().to(student.device)], dim=1)
        both = gather(both).cpu()
        self._student.append(both[:, : student.shape[1]])
        self._teacher.append(both[:, student.shape[1] :])

    def alignment(self) -> dict[str, float]:
        """`relational_alignment` of what was added, without what so few examples leave undefined."""
        if sum(map(len, self._student)) < 2:
            return {}
        student, teacher = (evenly(torch.cat(parts), self.examples) for parts in (self._student, self._teacher))
        return {name: value for name, value in relational_alignment(student, teacher).items() if value == value}


def evenly(rows: Tensor, count: int) -> Tensor:
    """At most so many of the rows, spread evenly over them."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count, dtype=torch.float64).long()]
