"""The losses that compare each example's row with the teacher's, without relations to other examples.

Only `student` gets a gradient. Computed in float32 (float64 for a float64 student), also under autocast.
"""

import torch.nn.functional as F
from torch import Tensor

from hf_rrd.losses.rows import pair, unit


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
