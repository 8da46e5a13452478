"""The relational losses within a micro-batch: what its student embeddings should share with the teacher's.

Each takes rows of any scale, `student`, (batch, student_dim), and `teacher`, (batch, teacher_dim), and raises a
ValueError where these are not rows of the same examples. Only `student` gets a gradient. Computed in float32 (float64
for a float64 student), also under autocast. A row of zeros has no direction, so its cosine with anything is 0, and two
rows that coincide have none between them: there, and where a batch is too small to hold a relation, the gradient is 0.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rrd.losses.regression import cosine_loss, mse_loss, srd_loss
from hf_rrd.losses.rows import check_positive, pair, ratio, unit


def rkd_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance-wise relational distillation: Huber loss between the pairwise distances, each over its own mean.

    Neither side's scale, rotation or translation changes it. The paper sums over the pairs; this is their mean.

    Args:
        student: (batch, student_dim).
        teacher: (batch, teacher_dim).

    Returns:
        The mean over pairs of examples, a scalar; 0 for fewer than 3 examples, unless the rows of a side coincide.

    Raises:
        ValueError: `student` and `teacher` are not rows of the same examples.

    Source: Park et al., Relational Knowledge Distillation, arXiv:1904.05068, eq. 5-7.
    """
    with pair(student, teacher) as (student, teacher):
        if len(student) < 2:
            return (student * 0).sum()
        student_distances, teacher_distances = F.pdist(student), F.pdist(teacher)  # each pair once
        return F.huber_loss(
            ratio(student_distances, student_distances.mean()), ratio(teacher_distances, teacher_distances.mean())
        )


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Angle-wise relational distillation: Huber loss between the cosines of the angles of all triangles of examples.

    Neither side's scale, rotation or translation changes it. The paper sums over the triples; this is their mean.
    Holds some tensors of (batch, batch, batch), whatever the widths: 1 MB each for 64 examples, 64 MB for 256.

    Args, Raises: as for `rkd_distance_loss`; (batch, student_dim) and (batch, teacher_dim).
    Returns: the mean over the ordered triples of distinct examples, a scalar; 0 for fewer than 3 examples.
    Source: Park et al., Relational Knowledge Distillation, arXiv:1904.05068, eq. 8-10.
    """
    with pair(student, teacher) as (student, teacher):
        if len(student) < 3:
            return (student * 0).sum()
        terms = F.huber_loss(_angle_cosines(student), _angle_cosines(teacher), reduction="none")
        return terms.triu(1).sum() / (len(student) * math.comb(len(student) - 1, 2))  # (j, i, k) is (j, k, i)


def similarity_preserving_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving distillation: squared distance of the Gram matrices, whose rows are made unit.

    Neither side's scale as a whole nor its rotation changes it.

    Args, Raises: as for `rkd_distance_loss`; (batch, student_dim) and (batch, teacher_dim).
    Returns: the squared Frobenius norm over batch**2, a scalar; 0 for 1 example, unless one of its rows is 0.
    Source: Tung and Mori, Similarity-Preserving Knowledge Distillation, arXiv:1907.09682, eq. 1-4.
    """
    with pair(student, teacher) as (student, teacher):
        return F.mse_loss(unit(student @ student.T), unit(teacher @ teacher.T))


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Probabilistic knowledge transfer: `KL(teacher || student)` of each example's distribution over the others.

    The probability of j given i is `(1 + cos(i, j)) / 2` over its sum over the examples other than i. Neither the
    scale of any row nor a side's rotation changes the loss. The paper sums over the examples i; this is their mean.
    Rows that are exactly opposite get the machine epsilon in place of 0, so that the loss stays finite.

    Args, Raises: as for `rkd_distance_loss`; (batch, student_dim) and (batch, teacher_dim).
    Returns: the mean over the batch, a scalar; 0 for fewer than 3 examples.
    Source: Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, arXiv:1803.10837.
    """
    with pair(student, teacher) as (student, teacher):
        if len(student) < 2:
            return (student * 0).sum()
        student_log_probs, teacher_log_probs = _log_affinities(student), _log_affinities(teacher)  # (batch, batch)
        teacher_probs = teacher_log_probs.exp().fill_diagonal_(0)
        return (teacher_probs * (teacher_log_probs - student_log_probs)).sum(-1).mean()


def correlation_congruence_loss(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Correlation congruence: squared distance of the Gaussian kernel matrices of unit rows, by their Taylor series.

    The kernel `exp(-gamma * |f_i - f_j|**2)` is `exp(-2 gamma) * sum_p (2 gamma)**p / p! * (f_i . f_j)**p`, cut after
    `order`. Neither the scale of any row nor a side's rotation changes the loss.

    Args:
        student, teacher: as for `rkd_distance_loss`; (batch, student_dim) and (batch, teacher_dim).
        gamma: Positive. Higher compares nearer neighbours and needs a higher order.
        order: The highest power of the series, at least 1.

    Returns: as for `similarity_preserving_loss`.
    Raises: as for `rkd_distance_loss`; also a ValueError for a `gamma` or an `order` out of range.
    Source: Peng et al., Correlation Congruence for Knowledge Distillation, arXiv:1904.01802, eq. 6-10.
    """
    check_positive("gamma", gamma, 0.4)
    if order < 1:
        raise ValueError(f"`order` must be at least 1, got {order}. Try 2.")
    with pair(student, teacher) as (student, teacher):
        return F.mse_loss(_taylor_kernel(student, gamma, order), _taylor_kernel(teacher, gamma, order))


def own_space_loss(
    student: Tensor, teacher: Tensor, student_temperature: float = 0.1, teacher_temperature: float = 0.05
) -> Tensor:
    """Cross-entropy of each example's distribution of similarity over the others, each side in a space of its own.

    The distribution is a softmax of cosines over a temperature. Neither the scale of any row nor a side's rotation
    changes the loss. Give it the student's embedding before its projection: the relation then holds in what is used.

    Args:
        student, teacher: as for `rkd_distance_loss`; (batch, student_dim) and (batch, teacher_dim).
        student_temperature, teacher_temperature: Positive. Higher spreads a distribution over more of the others.

    Returns: the mean over the batch, a scalar: 0 for fewer than 3 examples.
    Raises: as for `rkd_distance_loss`; also a ValueError for a temperature that is not positive.
    """
    check_positive("student_temperature", student_temperature, 0.1)
    check_positive("teacher_temperature", teacher_temperature, 0.05)
    with pair(student, teacher) as (student, teacher):
        if len(student) < 2:
            return (student * 0).sum()
        student_log_probs = _log_similarities(student, student_temperature)  # (batch, batch)
        teacher_probs = _log_similarities(teacher, teacher_temperature).exp()
        return -(teacher_probs * student_log_probs).sum(-1).mean()


def _angle_cosines(rows: Tensor) -> Tensor:
    """The cosine at j of the angle between i and k, as [j, i, k], (batch, batch, batch). Arbitrary where i is k.

    By the law of cosines from distances: for rows that nearly coincide the rounding error grows as 1 / distance, where
    that of a Gram matrix of the rows grows as 1 / distance**2.
    """
    upper = torch.ones(len(rows), len(rows), dtype=torch.bool, device=rows.device).triu(1)
    distances = rows.new_zeros(len(rows), len(rows)).masked_scatter(upper, F.pdist(rows))
    distances = distances + distances.T  # (batch, batch)
    squares, inverses = distances.square() / 2, ratio(torch.ones_like(distances), distances)
    cosines = squares.unsqueeze(2) + squares.unsqueeze(1) - squares  # (batch, batch, batch)
    return cosines * inverses.unsqueeze(2) * inverses.unsqueeze(1)


def _log_affinities(rows: Tensor) -> Tensor:
    """`pkt_loss`'s log-probability of j given i, (batch, batch). The diagonal is finite and means nothing."""
    rows = unit(rows)
    kernel = ((rows @ rows.T + 1) / 2).clamp(min=torch.finfo(rows.dtype).eps)
    own = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return kernel.log() - kernel.masked_fill(own, 0).sum(-1, keepdim=True).log()


def _log_similarities(rows: Tensor, temperature: float) -> Tensor:
    """`own_space_loss`'s log-probability of j given i, (batch, batch). The diagonal is very low, but finite."""
    rows = unit(rows)
    own = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return (rows @ rows.T / temperature).masked_fill(own, -1e9).log_softmax(-1)


def _taylor_kernel(rows: Tensor, gamma: float, order: int) -> Tensor:
    rows = unit(rows)
    exponent = 2 * gamma * (rows @ rows.T)  # (batch, batch)
    series = torch.ones_like(exponent)
    for power in range(order, 0, -1):
        series = 1 + exponent / power * series
    return math.exp(-2 * gamma) * series


# The losses that need no bank, by name: functions from the rows of the student and of the teacher to a scalar.
BATCH_LOSSES: dict[str, Callable[..., Tensor]] = {
    "rkd_distance": rkd_distance_loss,
    "rkd_angle": rkd_angle_loss,
    "similarity_preserving": similarity_preserving_loss,
    "pkt": pkt_loss,
    "correlation_congruence": correlation_congruence_loss,
    "cosine": cosine_loss,
    "mse": mse_loss,
    "srd": srd_loss,
}
# How many examples each needs to have anything to compare: with fewer it is 0, whatever the student does.
FEWEST_EXAMPLES: dict[str, int] = {
    **dict.fromkeys(("cosine", "mse"), 1),
    **dict.fromkeys(("similarity_preserving", "correlation_congruence"), 2),
    **dict.fromkeys(("rkd_distance", "rkd_angle", "pkt", "srd", "own_space"), 3),
}
