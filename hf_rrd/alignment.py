"""How alike two embedding sets are: measures that no rotation or scale of either set can change."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def relational_alignment(student: Tensor, teacher: Tensor, neighbors: int = 10) -> dict[str, float]:
    """Compare the relations among examples in two embedding sets. 1 is identical relations.

    Builds (examples, examples) matrices: meant for some thousand examples.

    Args:
        student: (examples, any width), on any device.
        teacher: (examples, any width), the same examples in the same order.
        neighbors: How many nearest neighbours to compare, at most examples - 1.

    Returns:
        `cka`: linear centred kernel alignment, 0 to 1 (Kornblith et al., arXiv:1905.00414, eq. 4); 0 for a set whose
            embeddings are all the same.
        `rank_correlation`: Spearman's correlation of all pairwise cosine similarities, -1 to 1; ties keep their order.
        `neighbor_overlap`: the mean share of each example's nearest neighbours (by cosine) that both sets agree on.

    Raises:
        ValueError: The sets differ in length or have fewer than 3 examples, or `neighbors` is below 1.
    """
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher) or len(student) < 3:
        raise ValueError(
            "alignment needs two sets of the same 3 or more examples, each (examples, dim), got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if neighbors < 1:
        raise ValueError(f"`neighbors` must be at least 1, got {neighbors}.")
    student, teacher = student.detach().double(), teacher.detach().double().to(student.device)
    count = len(student)
    neighbors = min(neighbors, count - 1)
    student_cosine, teacher_cosine = (rows @ rows.T for rows in (F.normalize(student), F.normalize(teacher)))
    above = torch.triu_indices(count, count, offset=1, device=student.device)
    return {
        "cka": _linear_cka(student, teacher),
        "rank_correlation": _correlation(
            _ranks(student_cosine[above[0], above[1]]), _ranks(teacher_cosine[above[0], above[1]])
        ),
        "neighbor_overlap": _neighbor_overlap(student_cosine, teacher_cosine, neighbors),
    }


def _linear_cka(student: Tensor, teacher: Tensor) -> float:
    student, teacher = student - student.mean(0), teacher - teacher.mean(0)
    shared = (student.T @ teacher).square().sum()
    own = (student.T @ student).norm() * (teacher.T @ teacher).norm()
    return float(shared / own) if own > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    ranks = torch.empty_like(values)
    ranks[values.argsort(stable=True)] = torch.arange(len(values), dtype=values.dtype, device=values.device)
    return ranks


def _correlation(left: Tensor, right: Tensor) -> float:
    left, right = left - left.mean(), right - right.mean()
    return float((left @ right) / (left.norm() * right.norm()))


def _neighbor_overlap(student_cosine: Tensor, teacher_cosine: Tensor, neighbors: int) -> float:
    masks = []
    for cosine in (student_cosine, teacher_cosine):
        others = cosine.clone().fill_diagonal_(-torch.inf)
        masks.append(torch.zeros_like(cosine).scatter_(1, others.topk(neighbors, dim=1).indices, 1.0))
    return float((masks[0] * masks[1]).sum() / (len(student_cosine) * neighbors))
