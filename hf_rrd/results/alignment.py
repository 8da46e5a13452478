"""How alike two embedding sets are: measures that no rotation or scale of either set can change."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT_EXAMPLES = 4096
"""Up to here all similarities are held at once, in float64; above, they come in blocks, in float32."""

BLOCK = 1024
"""Examples on each side of a block."""

EXACT_STEPS, BLOCK_STEPS = 2**40, 2**19
"""How finely similarities are told apart, in steps from 0 to 1: finer than that is rounding of float64 or float32."""


@torch.no_grad()
def relational_alignment(
    student: Tensor, teacher: Tensor, neighbors: int = 10, debiased: bool = True
) -> dict[str, float]:
    """Compare the relations among examples in two embedding sets. 1 is identical relations.

    Up to 4,096 examples all is in float64. Larger sets take cosine similarities in float32, block by block and twice
    over, and tell them apart in steps of 2**-19; the memory is a few copies of the embeddings, the time grows with
    the square of the examples.

    Args:
        student: (examples, any width), of any dtype, on any device.
        teacher: (examples, any width), the same examples in the same order.
        neighbors: How many nearest neighbours to compare, at most examples - 1.
        debiased: Whether `cka` is free of the bias that few examples of wide embeddings have: the classic one gives
            two unrelated sets of 100 examples, 768 wide, about 0.9 instead of 0.

    Returns:
        `cka`: linear centred kernel alignment. Debiased: -1 to 1, about 0 for unrelated sets, by the unbiased
            estimator of HSIC (Song et al., JMLR 13, 2012; Nguyen et al., arXiv:2010.15327, eq. 3); nan below 4
            examples, where there is none. Classic: 0 to 1 (Kornblith et al., arXiv:1905.00414, eq. 4). 0 for a set
            without relations: all embeddings the same or, debiased, all pairs alike.
        `rank_correlation`: Spearman's correlation of all pairwise cosine similarities, -1 to 1; ties get their mean
            rank. nan if one set's similarities are all the same, as with 2 examples.
        `neighbor_overlap`: the mean share, 0 to 1, of each example's nearest neighbours (by cosine) that both sets
            agree on. Whatever ties with the last neighbour is one too, and the share is of the larger neighbourhood.
            An embedding of zeros has a cosine of 0 with all.

    Raises:
        ValueError: The sets differ in length, have fewer than 2 examples or values that are not finite, or
            `neighbors` is below 1.
    """
    check_sets(student, teacher)
    if neighbors < 1:
        raise ValueError(f"`neighbors` must be at least 1, got {neighbors}.")
    device = "cpu" if student.device.type == "mps" else student.device  # mps has no float64
    student, teacher = student.detach().to(device), teacher.detach().to(device)
    compare = _compare_at_once if len(student) <= EXACT_EXAMPLES else _compare_in_blocks
    with torch.autocast(student.device.type, enabled=False):
        rank_correlation, neighbor_overlap = compare(student, teacher, min(neighbors, len(student) - 1))
        cka = _linear_cka(student, teacher, debiased)
    return {"cka": cka, "rank_correlation": rank_correlation, "neighbor_overlap": neighbor_overlap}


def check_sets(student: Tensor, teacher: Tensor) -> None:
    """Raise a ValueError unless both sets are finite embeddings of the same 2 or more examples."""
    shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher) or len(student) < 2:
        raise ValueError(
            f"a comparison needs two sets of the same 2 or more examples, each (examples, dim), got {shapes}."
        )
    if not student.shape[1] or not teacher.shape[1]:
        raise ValueError(f"a comparison needs embeddings that are 1 or more wide, got {shapes}.")
    for name, rows in (("student", student), ("teacher", teacher)):
        bad = int((~rows.isfinite()).any(1).sum())
        if bad:
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


def _compare_at_once(student: Tensor, teacher: Tensor, neighbors: int) -> tuple[float, float]:
    """The rank correlation and the neighbour overlap, by (examples, examples) matrices."""
    above = torch.ones(len(student), len(student), dtype=torch.bool, device=student.device).triu_(1)
    ranks, near = [], []
    for rows in (student, teacher):
        unit = _unit(rows, torch.float64)
        cosine = _in_steps(unit, unit, EXACT_STEPS)
        _, place, counts = torch.unique(cosine[above], return_inverse=True, return_counts=True)
        ranks.append(_standard_ranks(counts)[place])  # (pairs,)
        cosine.fill_diagonal_(-1)  # below all: no example is its own neighbour
        near.append(cosine >= cosine.topk(neighbors).values[:, -1:])
    return float(ranks[0] @ ranks[1]), _overlap(_count_near(*near))


def _compare_in_blocks(student: Tensor, teacher: Tensor, neighbors: int) -> tuple[float, float]:
    """The same by blocks: first how often each similarity occurs and the nearest of each, then both sets together."""
    sets = [_unit(rows, torch.float32) for rows in (student, teacher)]
    count, device = len(student), student.device
    histograms = torch.zeros(2, 2 * BLOCK_STEPS + 1, dtype=torch.long, device=device)
    nearest = torch.full((2, count, neighbors), -1, dtype=torch.int32, device=device)
    for rows, columns, blocks in _blocks(sets):
        for block, histogram, kept in zip(blocks, histograms, nearest, strict=True):
            pairs = _pairs(block, rows == columns)
            histogram.index_add_(0, pairs, histogram.new_ones(1).expand(len(pairs)))
            _keep_largest(kept[rows], block)
            if rows != columns:
                _keep_largest(kept[columns], block.T.contiguous())

    ranks = [_standard_ranks(histogram).float() for histogram in histograms]
    last = nearest[:, :, -1]  # (2, examples): as similar as the last neighbour
    correlation = torch.zeros((), dtype=torch.float64, device=device)
    near = torch.zeros(3, count, dtype=torch.long, device=device)
    for rows, columns, blocks in _blocks(sets):
        own, other = (ranks[i].index_select(0, _pairs(blocks[i], rows == columns)) for i in (0, 1))
        correlation += own @ other
        near[:, rows] += _count_near(*(blocks[i] >= last[i, rows, None] for i in (0, 1)))
        if rows != columns:
            near[:, columns] += _count_near(*((blocks[i] >= last[i, columns]).T for i in (0, 1)))
    return float(correlation), _overlap(near)


def _unit(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Of length 1, whatever the length was."""
    parts = []
    for part in torch.split(rows, BLOCK):
        part = part.double()
        largest = part.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        parts.append(F.normalize(part / largest).to(dtype))
    return torch.cat(parts)


def _in_steps(left: Tensor, right: Tensor, steps: int) -> Tensor:
    """(left, right): the cosines of unit rows as whole numbers, 0 for -1 to 2 * steps for 1."""
    nearest_step = ((left * steps) @ right.T).add_(steps + 0.5)  # that is rounding, as what follows cuts the fraction
    return nearest_step.to(torch.int32 if steps < 2**30 else torch.int64)


def _blocks(sets: list[Tensor]) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """The upper triangle of both sets' similarities: its rows, its columns, what stands there; -1 on the diagonal."""
    slices = [slice(start, start + BLOCK) for start in range(0, len(sets[0]), BLOCK)]
    for number, rows in enumerate(slices):
        for columns in slices[number:]:
            blocks = [_in_steps(each[rows], each[columns], BLOCK_STEPS) for each in sets]
            yield rows, columns, [block.fill_diagonal_(-1) for block in blocks] if rows == columns else blocks


def _pairs(block: Tensor, on_diagonal: bool) -> Tensor:
    """The similarities of its pairs, each once."""
    return block[torch.ones_like(block, dtype=torch.bool).triu_(1)] if on_diagonal else block.flatten()


def _keep_largest(kept: Tensor, block: Tensor) -> None:
    """Of each row. They stand in the groups that have the largest maxima, which costs less than to search all."""
    groups = F.pad(block, (0, -block.shape[1] % 8), value=-1).view(len(block), 8, -1)  # a group is a column of these
    best = groups.amax(1).topk(min(kept.shape[1], groups.shape[2]), dim=1).indices  # (rows, groups)
    candidates = groups.gather(2, best[:, None].expand(-1, 8, -1)).flatten(1)
    kept.copy_(torch.cat([kept, candidates], dim=1).topk(kept.shape[1], dim=1).values)


def _standard_ranks(counts: Tensor) -> Tensor:
    """The mean rank of each value that occurs so often, in rising order; the ranks of all have mean 0 and length 1.

    Where all are the same their rank is 0 / 0, nan, and so is what comes of it.
    """
    ranks = counts.cumsum(0).double() - (counts.double() - 1) / 2 - (counts.sum().double() + 1) / 2
    return ranks / (counts * ranks.square()).sum().sqrt()


def _count_near(student: Tensor, teacher: Tensor) -> Tensor:
    """(3, examples): the neighbours in both sets, in the student's and in the teacher's."""
    return torch.stack([near.sum(1, dtype=torch.int32) for near in (student & teacher, student, teacher)])


def _overlap(near: Tensor) -> float:
    return float((near[0].double() / near[1:].amax(0)).mean())
