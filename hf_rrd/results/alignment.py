"""How alike two embedding sets are, by measures that no rotation and no scale can change, and how near their rows.

Both are measured at an evaluation, too.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT_EXAMPLES = 4096
"""Up to here all similarities are held at once, in float64; above, they come in blocks, in float32."""

BLOCK, STEPS = 1024, 2**19
"""Examples on each side of a block, and the steps from 0 to 1 that tell its similarities apart: finer is rounding."""

ROUNDING = 1e-5
"""Cosines of rows in float32 that differ by no more are equal."""


@torch.no_grad()
def relational_alignment(student: Any, teacher: Any, neighbors: int = 10, debiased: bool = True) -> dict[str, float]:
    """Compare the relations among examples in two embedding sets. 1 is identical relations.

    Up to 4,096 examples all is in float64. Of more, cosine similarities are in float32 and told apart in steps of
    2**-19; the memory is a few copies of the embeddings, the time grows with the square of the examples.

    Args:
        student, teacher: (examples, any width), the same examples in the same order, of any dtype, on any device;
            tensors, arrays of numpy or lists of rows.
        neighbors: How many nearest neighbours to compare, at most examples - 1.
        debiased: Whether `cka` is free of the bias of few wide embeddings: the classic one gives two unrelated sets of
            100 examples, 768 wide, about 0.9 instead of 0.

    Returns:
        `cka`: linear centred kernel alignment. Debiased: -1 to 1, about 0 for unrelated sets, nan below 4 examples
            (Song et al., JMLR 13, 2012; Nguyen et al., arXiv:2010.15327, eq. 3). Classic: 0 to 1 (Kornblith et al.,
            arXiv:1905.00414, eq. 4). 0 if all embeddings of a set are the same or, debiased, all its pairs alike.
        `rank_correlation`: Spearman's correlation of all pairwise cosine similarities, -1 to 1; ties get their mean
            rank. nan if one set's similarities are all the same, as with 2 examples.
        `neighbor_overlap`: the mean share, 0 to 1, of each example's nearest neighbours (by cosine) that both sets
            agree on. What ties with the last neighbour is one too; the share is of the larger neighbourhood.

    Raises:
        ValueError: The sets differ in length, have under 2 examples or a value that is not finite, or `neighbors` < 1.
    """
    student, teacher = torch.as_tensor(student), torch.as_tensor(teacher)
    check_sets(student, teacher)
    if neighbors < 1:
        raise ValueError(f"`neighbors` must be at least 1, got {neighbors}.")
    device = "cpu" if student.device.type == "mps" else student.device  # mps has no float64
    sets = [rows.detach().to(device) for rows in (student, teacher)]
    compare = _compare_at_once if len(student) <= EXACT_EXAMPLES else _compare_in_blocks
    with torch.autocast(sets[0].device.type, enabled=False):
        rank_correlation, (shared, *own) = compare(sets, min(neighbors, len(student) - 1))
        overlap = (shared.double() / torch.maximum(*own)).mean()
        cka = _linear_cka(sets[0], sets[1], debiased)
    return {"cka": cka, "rank_correlation": float(rank_correlation), "neighbor_overlap": float(overlap)}


@torch.no_grad()
def teacher_retrieval(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """The share of examples whose student row finds its own teacher row among those of all, by cosine. In blocks.

    What is no more similar than the own row, such as a copy of it, does not come before it. A row of zeros finds none.

    Args:
        student, teacher: Rows in one space, (examples, dim), of the same examples in the same order.

    Returns:
        `teacher_retrieval@1`: how many find it first, 0 to 1. `teacher_retrieval@10`: among the first 10.

    Raises:
        ValueError: As for `relational_alignment`.
    """
    check_sets(student, teacher)
    student, teacher = (_unit(rows, torch.float32) for rows in (student, teacher))
    least = (student * teacher).sum(1, keepdim=True) + ROUNDING  # (examples, 1)
    blocks = [slice(start, start + BLOCK) for start in range(0, len(student), BLOCK)]
    before = torch.cat([(student[block] @ teacher.T > least[block]).sum(1) for block in blocks])  # (examples,)
    finds = student.any(1)
    return {f"teacher_retrieval@{most}": float(((before < most) & finds).double().mean()) for most in (1, 10)}


class EmbeddingLog:
    """Teacher's and student's embeddings of the same examples, on the host.

    Args:
        examples: At most so many are compared, spread evenly over the evaluation.
    """

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self._kept = torch.empty(0)  # later (kept, all widths): side by side, as `_widths` says
        self._widths: list[int] = []
        self._seen, self._stride = 0, 1

    def add(
        self,
        student: Tensor | None,
        teacher: Tensor | None,
        gather: Callable[[Tensor], Tensor],
        projected: Tensor | None = None,
    ) -> None:
        """Add an evaluated batch, if it has both and any are wanted.

        Args:
            student: (batch, width).
            teacher: (batch, another width).
            gather: From this process's rows to those of all processes, without duplicates.
            projected: The student's rows in its teacher's space, (batch, dim).
        """
        if self.examples == 0 or student is None or teacher is None:
            return
        parts = [rows for rows in (student, teacher, projected) if rows is not None]
        self._widths = [rows.shape[1] for rows in parts]
        rows = gather(torch.cat([rows.detach().float().to(student.device) for rows in parts], dim=1))
        kept = rows[-self._seen % self._stride :: self._stride].cpu()
        self._seen += len(rows)
        self._kept = torch.cat([self._kept, kept])
        while len(self._kept) > 2 * self.examples:  # memory does not grow with the evaluation
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    def alignment(self) -> dict[str, float]:
        """`relational_alignment` of at most so many of the examples, without what so few leave undefined."""
        if len(self._kept) < 2:
            return {}
        student, teacher, *_ = self._sets()
        measured = relational_alignment(student, teacher)
        return {name: value for name, value in measured.items() if value == value}

    def measured(self, target: Callable[[Tensor], Tensor | None]) -> dict[str, float]:
        """The same by its names in a log, and `teacher_retrieval` of the same examples.

        Args:
            target: From the teacher's embeddings to what the student's projected rows are to be, maybe no wider than
                their first dimensions; None where that is not known.
        """
        found = {f"alignment_{name}": value for name, value in self.alignment().items()}
        if not found or len(self._widths) < 3:
            return found
        _, teacher, projected = self._sets()
        rows = target(teacher)
        return found if rows is None else found | teacher_retrieval(projected[:, : rows.shape[1]], rows)

    def _sets(self) -> tuple[Tensor, ...]:
        return torch.split_with_sizes(self._kept[evenly_spaced(len(self._kept), self.examples)], self._widths, dim=1)


def evenly_spaced(count: int, most: int) -> Tensor:
    """Up to `most` of `count` places, evenly spaced, the first and the last among them: (places,), whole numbers."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).long()


def check_sets(student: Tensor, teacher: Tensor) -> None:
    """Raise a ValueError unless both sets are finite embeddings of the same 2 or more examples."""
    shapes = [tuple(rows.shape) for rows in (student, teacher)]
    if any(len(shape) != 2 or shape[0] < 2 or shape[1] < 1 for shape in shapes) or len(student) != len(teacher):
        raise ValueError(
            "a comparison needs two sets of the same 2 or more examples, each (examples, dim), 1 or more wide, got "
            f"{shapes[0]} and {shapes[1]}."
        )
    for name, rows in (("student", student), ("teacher", teacher)):
        if bad := int((~rows.isfinite()).any(1).sum()):
            raise ValueError(f"`{name}` must be finite, got nan or infinity in {bad} of {len(rows)} embeddings.")


def _linear_cka(student: Tensor, teacher: Tensor, debiased: bool) -> float:
    if debiased and len(student) < 4:
        return float("nan")
    student, teacher = _centred(student), _centred(teacher)
    shared = _hsic(student, teacher, debiased)
    own = _hsic(student, student, debiased), _hsic(teacher, teacher, debiased)
    return shared / (own[0] * own[1]) ** 0.5 if min(own) > 0 else 0.0


def _centred(rows: Tensor) -> Tensor:
    """Minus the mean, in float64; the largest entry was 1. Zeros if only rounding tells the rows apart."""
    rows = rows.to(torch.float64, copy=True)
    rows /= torch.linalg.vector_norm(rows, torch.inf).clamp_min(torch.finfo(torch.float64).tiny)
    rows -= rows.mean(0)
    return rows if rows.norm() > 1e-12 * rows.numel() ** 0.5 else rows.zero_()


def _hsic(left: Tensor, right: Tensor, debiased: bool) -> float:
    """The Hilbert-Schmidt independence criterion of linear kernels of centred rows, up to a factor.

    Debiased, the kernels lose their diagonals l and r. As their rows sum to 0, what is left of them sums to -l and -r.
    """
    count, wide = len(left), left.shape[1] * right.shape[1] > len(left) ** 2
    product = ((left @ left.T) * (right @ right.T)).sum() if wide else (left.T @ right).square().sum()
    if not debiased:
        return float(product)
    left_diagonal, right_diagonal = left.norm(dim=1).square(), right.norm(dim=1).square()  # (examples,)
    both = left_diagonal @ right_diagonal
    sums = left_diagonal.sum() * right_diagonal.sum()
    unbiased = product - both + sums / ((count - 1) * (count - 2)) - 2 * both / (count - 2)
    return float(unbiased) if unbiased.abs() > 1e-12 * product else 0.0  # the rest is rounding


def _compare_at_once(sets: list[Tensor], neighbors: int) -> tuple[Tensor, Tensor]:
    """The rank correlation, and `_count_near` of all, by (examples, examples) matrices."""
    count, device = len(sets[0]), sets[0].device
    pairs = torch.ones(count, count, dtype=torch.bool, device=device).triu_(1)
    ranks, near = [], []
    for rows in sets:
        unit = _unit(rows, torch.float64)
        cosine = _in_steps(unit, unit, 2**40)  # finer is rounding of float64
        _, place, counts = torch.unique(cosine[pairs], return_inverse=True, return_counts=True)
        ranks.append(_standard_ranks(counts)[place])  # (pairs,)
        cosine.fill_diagonal_(-1)  # below all: no example is its own neighbour
        near.append(cosine >= cosine.topk(neighbors).values[:, -1:])
    return ranks[0] @ ranks[1], _count_near(torch.stack(near))


def _compare_in_blocks(sets: list[Tensor], neighbors: int) -> tuple[Tensor, Tensor]:
    """The same by blocks: first how often each similarity occurs and the nearest of each, then both sets together."""
    count, device = len(sets[0]), sets[0].device
    units = [_unit(rows, torch.float32) for rows in sets]
    histograms = torch.zeros(2, 2 * STEPS + 1, dtype=torch.long, device=device)
    nearest = torch.full((2, count, neighbors), -1, dtype=torch.int32, device=device)
    for rows, columns, block, pairs in _blocks(units):
        for histogram, places in zip(histograms, pairs, strict=True):
            histogram.index_add_(0, places, histogram.new_ones(1).expand(len(places)))
        _keep_largest(nearest[:, rows], block)
        if rows != columns:
            _keep_largest(nearest[:, columns], block.mT)

    ranks = [_standard_ranks(histogram).float() for histogram in histograms]
    last = nearest[:, :, -1:]  # (2, examples, 1): as similar as the last neighbour
    correlation = torch.zeros((), dtype=torch.float64, device=device)
    near = torch.zeros(3, count, dtype=torch.long, device=device)
    for rows, columns, block, pairs in _blocks(units):
        correlation += ranks[0].index_select(0, pairs[0]) @ ranks[1].index_select(0, pairs[1])
        near[:, rows] += _count_near(block >= last[:, rows])
        if rows != columns:
            near[:, columns] += _count_near(block.mT >= last[:, columns])
    return correlation, near


def _unit(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Of length 1, whatever the length was."""
    rows = rows.double()
    largest = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return F.normalize(rows / largest).to(dtype)


def _in_steps(left: Tensor, right: Tensor, steps: int) -> Tensor:
    """(left, right): the cosines of unit rows as whole numbers, 0 for -1 to 2 * steps for 1."""
    nearest_step = ((left * steps) @ right.T).add_(steps + 0.5)  # that is rounding, as what follows cuts the fraction
    return nearest_step.to(torch.int32 if steps < 2**30 else torch.int64)


def _blocks(units: list[Tensor]) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Both sets' similarities above the diagonal: where, (2, rows, columns), and of each pair once, (2, pairs)."""
    slices = [slice(start, start + BLOCK) for start in range(0, len(units[0]), BLOCK)]
    for number, rows in enumerate(slices):
        for columns in slices[number:]:
            block = torch.stack([_in_steps(unit[rows], unit[columns], STEPS) for unit in units])
            pairs = block.flatten(1)
            if rows == columns:
                pairs = block[:, torch.ones_like(block[0], dtype=torch.bool).triu_(1)]
                block.diagonal(dim1=1, dim2=2).fill_(-1)  # no example is its own neighbour
            yield rows, columns, block, pairs


def _keep_largest(kept: Tensor, block: Tensor) -> None:
    kept.copy_(torch.cat([kept, block], dim=2).topk(kept.shape[2]).values)


def _standard_ranks(counts: Tensor) -> Tensor:
    """The mean rank of each value that occurs so often, in rising order; of mean 0 and length 1, nan where all tie."""
    ranks = counts.cumsum(0).double() - (counts.double() - 1) / 2 - (counts.sum().double() + 1) / 2
    return ranks / (counts * ranks.square()).sum().sqrt()


def _count_near(near: Tensor) -> Tensor:
    """(3, examples), of (2, examples, others): the neighbours in both sets, in the student's and in the teacher's."""
    return torch.stack([each.sum(1, dtype=torch.int32) for each in (near[0] & near[1], *near)])
