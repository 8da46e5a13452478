"""The other relational losses: what a batch of student embeddings should share with the teacher's.

Every function takes `student`, (batch, student_dim), and `teacher`, (batch, teacher_dim), of the same examples and
returns the mean over the batch, a scalar. Only `student` gets a gradient. Computed in float32 (float64 for a float64
student), also under autocast. A row of zeros has no direction, so its cosine with anything is 0, and two rows that
coincide have none between them: there, and where a batch is too small to hold a relation, the gradient is 0.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def rkd_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance-wise relational distillation: Huber loss between the pairwise distances, each over its own mean.

    Neither side's scale, rotation or translation changes it. The paper sums over the pairs; this is their mean.

    Args:
        student: (batch, student_dim).
        teacher: (batch, teacher_dim).

    Returns:
        The mean over the ordered pairs of distinct examples, a scalar; 0 for fewer than 3 examples, unless the rows
        of one side coincide.

    Raises:
        ValueError: `student` and `teacher` are not rows of the same examples.

    Source: Park et al., Relational Knowledge Distillation, arXiv:1904.05068, eq. 5-7.
    """
    student, teacher = _rows(student, teacher)
    if len(student) < 2:
        return (student * 0).sum()
    with torch.autocast(student.device.type, enabled=False):
        student_distances, teacher_distances = F.pdist(student), F.pdist(teacher)  # each pair once
        return F.huber_loss(
            _ratio(student_distances, student_distances.mean()), _ratio(teacher_distances, teacher_distances.mean())
        )


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Angle-wise relational distillation: Huber loss between the cosines of the angles of all triangles of examples.

    Neither side's scale, rotation or translation changes it. The paper sums over the triples; this is their mean.
    Holds some tensors of (batch, batch, batch), whatever the widths: 1 MB each for 64 examples, 64 MB for 256.

    Args, Raises: as for `rkd_distance_loss`; (batch, student_dim) and (batch, teacher_dim).

    Returns:
        The mean over the ordered triples of distinct examples, a scalar; 0 for fewer than 3 examples.

    Source: Park et al., Relational Knowledge Distillation, arXiv:1904.05068, eq. 8-10.
    """
    student, teacher = _rows(student, teacher)
    if len(student) < 3:
        return (student * 0).sum()
    with torch.autocast(student.device.type, enabled=False):
        terms = F.huber_loss(_angle_cosines(student), _angle_cosines(teacher), reduction="none")
        return terms.triu(1).sum() / (len(student) * math.comb(len(student) - 1, 2))  # (j, i, k) is (j, k, i)


def similarity_preserving_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving distillation: squared distance of the Gram matrices, whose rows are made unit.

    Neither side's scale as a whole nor its rotation changes it.

    Args, Raises: as for `rkd_distance_loss`; (batch, student_dim) and (batch, teacher_dim).

    Returns:
        The squared Frobenius norm over batch**2, a scalar; 0 for 1 example, unless one of its rows is 0.

    Source: Tung and Mori, Similarity-Preserving Knowledge Distillation, arXiv:1907.09682, eq. 1-4.
    """
    student, teacher = _rows(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(_unit(student @ student.T), _unit(teacher @ teacher.T))


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Probabilistic knowledge transfer: `KL(teacher || student)` of each example's distribution over the others.

    The probability of j given i is `(1 + cos(i, j)) / 2` over its sum over the examples other than i. Neither the
    scale of any row nor a side's rotation changes the loss. The paper sums over the examples i; this is their mean.
    Rows that are exactly opposite get the machine epsilon in place of 0, so that the loss stays finite.

    Args, Raises: as for `rkd_distance_loss`; (batch, student_dim) and (batch, teacher_dim).

    Returns:
        The mean over the batch, a scalar; 0 for fewer than 3 examples.

    Source: Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, arXiv:1803.10837.
    """
    student, teacher = _rows(student, teacher)
    if len(student) < 2:
        return (student * 0).sum()
    with torch.autocast(student.device.type, enabled=False):
        student_log_probs, teacher_log_probs = _log_affinities(student), _log_affinities(teacher)  # (batch, batch)
        teacher_probs = teacher_log_probs.exp().fill_diagonal_(0)
        return (teacher_probs * (teacher_log_probs - student_log_probs)).sum(-1).mean()


def correlation_congruence_loss(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Correlation congruence: squared distance of the Gaussian kernel matrices of unit rows, by their Taylor series.

    The kernel `exp(-gamma * |f_i - f_j|**2)` is `exp(-2 gamma) * sum_p (2 gamma)**p / p! * (f_i . f_j)**p`, cut after
    `order`. Neither the scale of any row nor a side's rotation changes the loss.

    Args:
        student: (batch, student_dim).
        teacher: (batch, teacher_dim).
        gamma: Positive. Higher compares nearer neighbours and needs a higher order.
        order: The highest power of the series, at least 1.

    Returns:
        The squared Frobenius norm over batch**2, a scalar; 0 for 1 example, unless one of its rows is 0.

    Raises:
        ValueError: `student` and `teacher` are not rows of the same examples, `gamma` is not positive, or `order` is
            below 1.

    Source: Peng et al., Correlation Congruence for Knowledge Distillation, arXiv:1904.01802, eq. 6-10.
    """
    if not gamma > 0:
        raise ValueError(f"`gamma` must be positive, got {gamma}. Try 0.4.")
    if order < 1:
        raise ValueError(f"`order` must be at least 1, got {order}. Try 2.")
    student, teacher = _rows(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(_taylor_kernel(student, gamma, order), _taylor_kernel(teacher, gamma, order))


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine between the student's row and the teacher's: each example on its own, no relations.

    The scale of any row does not change it; a rotation does, unless it turns both sides.

    Args:
        student: (batch, dim).
        teacher: (batch, dim).

    Returns:
        The mean over the batch, a scalar.

    Raises:
        ValueError: `student` and `teacher` are not rows of the same examples and one width.

    Source: the cosine embedding loss of Sanh et al., DistilBERT, arXiv:1910.01108.
    """
    student, teacher = _rows(student, teacher, one_width=True)
    with torch.autocast(student.device.type, enabled=False):
        return (1 - (_unit(student) * _unit(teacher)).sum(-1)).mean()


def mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the student's row and the teacher's: each example on its own, no relations.

    Scale changes it; a rotation or translation does too, unless it moves both sides.

    Args, Raises: as for `cosine_loss`; (batch, dim) each.

    Returns:
        The mean over the batch and the dimensions, a scalar.

    Source: Romero et al., FitNets, arXiv:1412.6550, eq. 3 (there half the sum over the dimensions).
    """
    student, teacher = _rows(student, teacher, one_width=True)
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(student, teacher)


def _rows(student: Tensor, teacher: Tensor, one_width: bool = False) -> tuple[Tensor, Tensor]:
    """Both sides checked and in the dtype of the computation, the teacher without its graph."""
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
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.to(dtype), teacher.detach().to(dtype)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """`numerator / denominator`, and 0 with a gradient of 0 where the denominator is 0 (or as good as 0)."""
    least = math.sqrt(torch.finfo(denominator.dtype).tiny)  # the gradient holds the denominator's square
    return numerator / denominator.masked_fill(denominator < least, torch.inf)


def _unit(rows: Tensor) -> Tensor:
    """Rows over their length, (batch, dim). A row of zeros stays one."""
    return _ratio(rows, torch.linalg.vector_norm(rows, dim=-1, keepdim=True))


def _angle_cosines(rows: Tensor) -> Tensor:
    """The cosine at j of the angle between i and k, as [j, i, k], (batch, batch, batch). Arbitrary where i is k.

    By the law of cosines, from distances that are themselves taken from differences: for rows that nearly coincide
    the rounding error grows as 1 / distance, where that of a Gram matrix of the rows grows as 1 / distance**2.
    """
    upper = torch.ones(len(rows), len(rows), dtype=torch.bool, device=rows.device).triu(1)
    distances = rows.new_zeros(len(rows), len(rows)).masked_scatter(upper, F.pdist(rows))
    distances = distances + distances.T  # (batch, batch)
    squares, inverses = distances.square() / 2, _ratio(torch.ones_like(distances), distances)
    cosines = squares.unsqueeze(2) + squares.unsqueeze(1) - squares  # (batch, batch, batch)
    return cosines * inverses.unsqueeze(2) * inverses.unsqueeze(1)


def _log_affinities(rows: Tensor) -> Tensor:
    """The logarithm of the probability of j given i, (batch, batch). The diagonal is finite and means nothing."""
    unit = _unit(rows)
    kernel = ((unit @ unit.T + 1) / 2).clamp(min=torch.finfo(unit.dtype).eps)
    own = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return kernel.log() - kernel.masked_fill(own, 0).sum(-1, keepdim=True).log()


def _taylor_kernel(rows: Tensor, gamma: float, order: int) -> Tensor:
    unit = _unit(rows)
    exponent = 2 * gamma * (unit @ unit.T)  # (batch, batch)
    series = torch.ones_like(exponent)
    for power in range(order, 0, -1):
        series = 1 + exponent / power * series
    return math.exp(-2 * gamma) * series


BATCH_LOSSES: dict[str, Callable[..., Tensor]] = {
    "rkd_distance": rkd_distance_loss,
    "rkd_angle": rkd_angle_loss,
    "similarity_preserving": similarity_preserving_loss,
    "pkt": pkt_loss,
    "correlation_congruence": correlation_congruence_loss,
    "cosine": cosine_loss,
    "mse": mse_loss,
}
"""The losses of this module by name: functions from the rows of the student and of the teacher to a scalar."""
