"""Classic distillation on logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rrd.losses.rows import check_positive, precise


def logit_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Classic distillation: `temperature**2 * KL(teacher || student)` of the softened class probabilities, as a mean.

    Args:
        student_logits: (batch, classes); further leading dimensions are averaged over as well. Gets the gradient.
        teacher_logits: The same shape.
        temperature: Positive. Higher shows more of how the teacher ranks the wrong classes.

    Returns:
        The mean over all but the last dimension, a scalar.

    Raises:
        ValueError: The temperature is not positive, the shapes differ, or there are fewer than two classes.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531, section 2.
    """
    return logit_terms(student_logits, teacher_logits, temperature).mean()


def logit_terms(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """`logit_loss` before the mean: the shape of the logits without their last dimension."""
    check_positive("temperature", temperature, 4.0)
    if student_logits.shape != teacher_logits.shape or student_logits.shape[-1] < 2:
        raise ValueError(
            "distillation on logits needs the same classes on both sides, at least 2 of them, got student logits of "
            f"shape {tuple(student_logits.shape)} and teacher logits of shape {tuple(teacher_logits.shape)}. Use a "
            "teacher with the student's classes, or set kd_weight=0: the relational loss does not need them."
        )
    with torch.autocast(student_logits.device.type, enabled=False):
        student_log_probs = F.log_softmax(precise(student_logits) / temperature, dim=-1)
        teacher_logits = teacher_logits.detach().to(student_log_probs.dtype)
        teacher_log_probs = F.log_softmax(teacher_logits / temperature, dim=-1)
        divergence = F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True).sum(-1)
        return divergence * temperature**2
