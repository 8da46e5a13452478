"""Distillation on logits: the classic one, and one by correlation."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rrd.losses.rows import check_positive, correlation, no_autocast, pair, precise

ONE, SEVERAL, NUMBERS = "single_label_classification", "multi_label_classification", "regression"
"""What logits may say of an example, as `problem_type` in a config has it: one class, several at once, or numbers."""

CACHED, AT_ONCE = 2**18, 2**25  # logits that are compared at a time: on a CPU they stay in its cache


def logit_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, problem_type: str = ONE
) -> Tensor:
    """Classic distillation: `temperature**2 * KL(teacher || student)` of the softened class probabilities, as a mean.

    Of a softmax nothing of the logits' size is made but their gradient, and there is no second derivative.

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
    with no_autocast(student_logits.device.type):
        student, teacher = student_logits, teacher_logits.detach()
        if problem_type == ONE:
            if candidates is not None:
                student, teacher = precise(student), precise(teacher)
                least_of_all = torch.finfo(torch.float32).min * min(1, temperature)  # finite over the temperature, too
                student, teacher = (each.masked_fill(~candidates, least_of_all) for each in (student, teacher))
            return _of_softmax(student, teacher, temperature)
        student = precise(student)
        teacher = teacher.to(student.dtype)
        if problem_type == NUMBERS:
            return (student - teacher).square().mean(-1)
        # Each class is a choice between two, yes and no, whose logits are the class's and its negative.
        student, teacher = (F.logsigmoid(torch.stack([each, -each], -1) / temperature) for each in (student, teacher))
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        return divergence.mean(-1) * temperature**2


class _OfSoftmax(torch.autograd.Function):
    """`logit_terms` of one class, of logits in any dtype, (..., classes).

    Over a large vocabulary each matrix in full precision may be the largest of a step. So it is made for some rows at
    a time, and what is kept for the backward pass is the gradient, but for the temperature. That is in the dtype of
    the student's logits, but not in float16, which has no numbers so small.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        classes = student.shape[-1]
        rows, others = student.reshape(-1, classes), teacher.reshape(-1, classes)
        terms = precise(rows.new_empty(len(rows)))
        kept = terms.dtype if rows.dtype == torch.float16 else rows.dtype
        slope = torch.empty_like(rows, dtype=kept) if ctx.needs_input_grad[0] else None
        step = max(1, (CACHED if rows.device.type == "cpu" else AT_ONCE) // classes)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            mine, theirs = (precise(each[part]).to(terms.dtype) / temperature for each in (rows, others))
            mine, theirs = mine.log_softmax(-1), theirs.log_softmax(-1)
            probabilities = theirs.exp()
            terms[part] = theirs.sub_(mine).mul_(probabilities).sum(-1) * temperature**2
            if slope is not None:
                torch.sub(mine.exp_(), probabilities, out=slope[part])
        if slope is not None:
            ctx.temperature = temperature
            ctx.save_for_backward(slope.view(student.shape))
        return terms.view(student.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        grad = (grads[0] * ctx.temperature).unsqueeze(-1).to(slope.dtype)
        return slope * grad, None, None  # autograd gives it the logits' dtype


_of_softmax: Callable[[Tensor, Tensor, float], Tensor] = _OfSoftmax.apply


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
