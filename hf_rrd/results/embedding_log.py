"""The embeddings of an evaluation: collected as it goes, compared at its end."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_rrd.results.alignment import relational_alignment


class EmbeddingLog:
    """Teacher's and student's embeddings of the same examples, on the host.

    Args:
        examples: At most so many are compared, spread evenly over the evaluation.
    """

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self.start()

    def start(self) -> None:
        """Forget an earlier evaluation."""
        self._student, self._teacher = torch.empty(0), torch.empty(0)  # (kept, width) each
        self._seen, self._stride = 0, 1

    def add(self, student: Tensor, teacher: Tensor, gather: Callable[[Tensor], Tensor]) -> None:
        """Add an evaluated batch.

        Args:
            student: (batch, width).
            teacher: (batch, another width).
            gather: From this process's rows to those of all processes, without duplicates.
        """
        width = student.shape[1]
        both = torch.cat([student.detach().float(), teacher.detach().float().to(student.device)], dim=1)
        both = gather(both)  # (all processes' batch, both widths)
        kept = both[-self._seen % self._stride :: self._stride].cpu()
        self._seen += len(both)
        parts = [kept[:, :width], kept[:, width:]]
        if len(self._student):
            parts = [torch.cat([old, new]) for old, new in zip((self._student, self._teacher), parts, strict=True)]
        while len(parts[0]) > 2 * self.examples:  # memory does not grow with the evaluation
            parts, self._stride = [rows[::2] for rows in parts], 2 * self._stride
        self._student, self._teacher = parts

    def alignment(self) -> dict[str, float]:
        """`known_alignment` of what was added."""
        return known_alignment(self._student, self._teacher, self.examples)


def known_alignment(student: Tensor, teacher: Tensor, most: int) -> dict[str, float]:
    """`relational_alignment` of at most so many of the examples, without what so few leave undefined."""
    if len(student) < 2:
        return {}
    some = evenly_spaced(len(student), most)
    return {
        name: value for name, value in relational_alignment(student[some], teacher[some]).items() if value == value
    }


def evenly_spaced(count: int, most: int) -> Tensor:
    """Up to `most` of `count` places, evenly spaced, the first and the last among them: (places,), whole numbers."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()
