"""Distillation on logits: the classic one, and one by correlation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rrd.losses.rows import check_positive, correlation, pair, precise

ONE, SEVERAL, NUMBERS = "single_label_classification", "multi_label_classification", "regression"
"""What logits may say of an example, as `problem_type` in a config has it: one class, several at once, or numbers."""


def logit_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, problem_type: str = ONE
) -> Tensor:
    """Classic distillation: `temperature**2 * KL(teacher || student)` of the softened class probabilities, as a mean.

    Args:
        student_logits: (batch, classes); further leading dimensions are averaged over as well. Gets the gradient.
        teacher_logits: The same shape.
        temperature: Positive. Higher shows more of how the teacher ranks the wrong classes.
        problem_type: As in a config. "single_label_classification": the probabilities are a softmax over the classes.
            "multi_label_classification": a sigmoid for each class, and the KL is the mean over the classes.
            "regression": the mean squared difference of the logits, without a temperature.

    Returns:
        The mean over all but the last dimension, a scalar.

    Raises:
        ValueError: The temperature is not positive, the shapes differ, there are too few classes, or there is no such
            problem type.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531, section 2.
    """
    return logit_terms(student_logits, teacher_logits, temperature, problem_type).mean()


def logit_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    problem_type: str = ONE,
    candidates: Tensor | None = None,
) -> Tensor:
    """`logit_loss` before the mean: the shape of the logits without their last dimension.

    `candidates`, which can be broadcast to the logits' shape, are the classes that a softmax is over; None is all.
    """
    check_positive("temperature", temperature, 4.0)
    if problem_type not in (ONE, SEVERAL, NUMBERS):
        raise ValueError(f"`problem_type` must be one of {[ONE, SEVERAL, NUMBERS]}, got {problem_type!r}.")
    least = 2 if problem_type == ONE else 1
    if student_logits.shape != teacher_logits.shape or student_logits.shape[-1] < least:
        raise ValueError(
            f"distillation on logits needs the same classes on both sides, at least {least} of them, and the same "
            f"tokens, got student logits of shape {tuple(student_logits.shape)} and teacher logits of shape "
            f"{tuple(teacher_logits.shape)}. If they cannot be the same, set kd_weight=0: the relational loss needs "
            "neither."
        )
    with torch.autocast(student_logits.device.type, enabled=False):
        student = precise(student_logits)
        teacher = teacher_logits.detach().to(student.dtype)
        if problem_type == NUMBERS:
            return (student - teacher).square().mean(-1)
        student, teacher = student / temperature, teacher / temperature
        if problem_type == SEVERAL:
            # Each class is a choice between two, yes and no, whose logits are the class's and its negative.
            student, teacher = (F.logsigmoid(torch.stack([each, -each], -1)) for each in (student, teacher))
            divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
            return divergence.mean(-1) * temperature**2
        if candidates is not None:
            least_of_all = torch.finfo(student.dtype).min
            student, teacher = (each.masked_fill(~candidates, least_of_all) for each in (student, teacher))
        divergence = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
        return divergence.sum(-1) * temperature**2


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """DIST: one minus the correlation of the class probabilities over the classes, and the same over the examples.

    Only how the teacher ranks the classes of an example, and the examples of a class, counts; not how sure it is.
    Probabilities that are all alike have correlation 0.

    Args:
        student_logits: (batch, classes). Gets the gradient.
        teacher_logits: The same shape.
        temperature: Positive. Higher shows more of how the teacher ranks the wrong classes.

    Returns:
        The mean over the rows plus the mean over the columns, a scalar from 0 to 4.

    Raises:
        ValueError: The temperature is not positive, or the logits are not rows of the same examples and classes.

    Source: Huang et al., Knowledge Distillation from a Stronger Teacher, arXiv:2205.10536, section 4.
    """
    check_positive("temperature", temperature, 4.0)
    with pair(student_logits, teacher_logits, one_width=True) as (student, teacher):
        student, teacher = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
        of_rows, of_columns = correlation(student, teacher, 1e-8), correlation(student.T, teacher.T, 1e-8)
        return 2 - of_rows.mean() - of_columns.mean()
