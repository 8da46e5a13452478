"""The losses that compare each example's row with the teacher's, in the teacher's own space.

Only `student` gets a gradient. Computed in float32 (float64 for a float64 student), also under autocast.
"""

import torch.nn.functional as F
from torch import Tensor

from hf_rrd.losses.rows import correlation, pair, unit


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine between the student's row and the teacher's, as a mean over the batch, a scalar.

    The scale of any row does not change it; a rotation does, unless it turns both sides. The cosine of a row of zeros
    is 0.

    Args:
        student: Rows, (batch, dim), of any scale.
        teacher: Rows of the same examples, (batch, dim), of any scale.

    Raises:
        ValueError: `student` and `teacher` are not rows of the same examples and one width.

    Source: the cosine embedding loss of Sanh et al., DistilBERT, arXiv:1910.01108.
    """
    with pair(student, teacher, one_width=True) as (student, teacher):
        return (1 - (unit(student) * unit(teacher)).sum(-1)).mean()


def mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the student's row and the teacher's, as a mean over all entries, a scalar.

    Scale changes it; a rotation or translation does too, unless it moves both sides.

    Args, Raises: as for `cosine_loss`; (batch, dim) each.
    Source: Romero et al., FitNets, arXiv:1412.6550, eq. 3 (there half the sum over the dimensions).
    """
    with pair(student, teacher, one_width=True) as (student, teacher):
        return F.mse_loss(student, teacher)


def srd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Simple regression distillation: how far each dimension's correlation with the teacher's is from 1, in one log.

    Both sides are standardised over the batch, dimension by dimension, as by a batch norm without weights: no scale or
    translation of a dimension changes the loss. A dimension that is the same in all rows has correlation 0.

    Args, Raises: as for `cosine_loss`; (batch, dim) each.

    Returns:
        `log(sum_d |correlation_d - 1|**4 + 1e-5)`, a scalar, at least `log(1e-5)`; 0 for fewer than 3 examples,
        between which all correlations are 1 or -1.

    Source: Miles and Mikolajczyk, Understanding the Role of the Projector in Knowledge Distillation, arXiv:2303.11098.
    """
    with pair(student, teacher, one_width=True) as (student, teacher):
        if len(student) < 3:
            return (student * 0).sum()
        return ((correlation(student.T, teacher.T, 1e-5) - 1).pow(4).sum() + 1e-5).log()
