"""The losses, as functions of tensors: relational cross-entropy against a bank, and classic distillation on logits."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DENSE_LIMIT = 2**20
"""`relational_loss` builds the (batch, bank) matrix up to this many elements and reads the bank in slices above it."""

SLICE_ROWS = 8192
"""Rows of the bank that the memory-free form reads at a time."""


def relational_loss(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.02,
    include_own: bool = False,
) -> Tensor:
    """Cross-entropy between the teacher's and the student's distribution of similarity over a bank, as a batch mean.

    With `p_t = softmax(teacher @ bank.T / teacher_temperature)` and `p_s` likewise for the student, the loss of an
    example is `-sum_k p_t[k] log p_s[k]`. Only `student` gets a gradient. Computed in float32 (float64 for float64
    input), also under autocast. Up to `DENSE_LIMIT` elements of (batch, bank) this is the formula as it stands; above
    it the same value and gradient come from one pass over slices of the bank, whose memory does not grow with the
    bank.

    Args:
        student: Unit rows of the student, (batch, dim).
        teacher: Unit rows of the teacher for the same examples, (batch, dim).
        bank: Unit rows of teacher embeddings to compare with, (bank, dim). May be empty: the loss is then 0 (a
            distribution over nothing, or with `include_own` over one candidate).
        student_temperature: Positive. Lower is sharper.
        teacher_temperature: Positive. Lower is sharper; near 0 with `include_own` the loss is InfoNCE.
        include_own: Compare each example also with its own teacher row, as one more column. The result then does not
            depend on how the examples were cut into batches.

    Returns:
        The mean over the batch, a scalar.

    Raises:
        ValueError: A temperature is not positive, or the shapes do not agree.

    Source: Relational Representation Distillation, arXiv:2407.12073, section 3.
    """
    cross_entropy, _ = relational_terms(student, teacher, bank, student_temperature, teacher_temperature, include_own)
    return cross_entropy.mean()


def relational_terms(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.02,
    include_own: bool = False,
) -> tuple[Tensor, Tensor]:
    """The relational loss of each example, and how far it is from its floor.

    Args: as for `relational_loss`.

    Returns:
        The cross-entropy of each example, (batch,), and the Kullback-Leibler divergence `KL(p_t || p_s)`, (batch,):
        the cross-entropy less the teacher's own entropy, 0 when the relations agree.

    Raises:
        ValueError: A temperature is not positive, or the shapes do not agree.
    """
    _check_relational(student, teacher, bank, student_temperature, teacher_temperature)
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    with torch.autocast(student.device.type, enabled=False):
        student, teacher, bank = student.to(dtype), teacher.detach().to(dtype), bank.detach()
        if not include_own and len(bank) == 0:
            nothing = (student * 0).sum(-1)  # (batch,), still part of the graph
            return nothing, nothing
        if len(student) * len(bank) <= DENSE_LIMIT:
            return _dense_terms(
                student, teacher, bank.to(dtype), student_temperature, teacher_temperature, include_own
            )
        cross_entropy, divergence = _SlicedTerms.apply(  # type: ignore[no-untyped-call]
            student, teacher, bank, student_temperature, teacher_temperature, include_own
        )
        return cross_entropy, divergence


def _dense_terms(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    include_own: bool,
) -> tuple[Tensor, Tensor]:
    """The definition. Cross-entropy and divergence, (batch,) each."""
    student_similarity = student @ bank.T  # (batch, bank)
    teacher_similarity = teacher @ bank.T  # (batch, bank)
    if include_own:  # one more column: the example's own teacher row
        student_similarity = torch.cat([student_similarity, (student * teacher).sum(-1, keepdim=True)], dim=1)
        teacher_similarity = torch.cat([teacher_similarity, (teacher * teacher).sum(-1, keepdim=True)], dim=1)
    student_log_probs = F.log_softmax(student_similarity / student_temperature, dim=-1)
    teacher_log_probs = F.log_softmax(teacher_similarity / teacher_temperature, dim=-1)
    teacher_probs = teacher_log_probs.exp()
    cross_entropy = -(teacher_probs * student_log_probs).sum(-1)
    divergence = (teacher_probs * (teacher_log_probs - student_log_probs)).sum(-1)
    return cross_entropy, divergence


class _SlicedTerms(torch.autograd.Function):
    """The same two numbers from attention reads of the bank.

    With `s = student @ bank.T / student_temperature`, `m_t` the teacher's read `p_t @ bank` and `m_s` the student's:
    the loss is `logsumexp(s) - <student, m_t> / student_temperature`, its gradient `(m_s - m_t) /
    student_temperature`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        bank: Tensor,
        student_temperature: float,
        teacher_temperature: float,
        include_own: bool,
    ) -> tuple[Tensor, Tensor]:
        own = teacher if include_own else None
        student_logsumexp, student_read = _read(student / student_temperature, bank, own)
        teacher_logsumexp, teacher_read = _read(teacher / teacher_temperature, bank, own)
        cross_entropy = student_logsumexp - (student * teacher_read).sum(-1) / student_temperature  # (batch,)
        entropy = teacher_logsumexp - (teacher * teacher_read).sum(-1) / teacher_temperature  # (batch,)
        ctx.save_for_backward((student_read - teacher_read) / student_temperature)
        return cross_entropy, cross_entropy - entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors  # (batch, dim); the teacher's entropy has no gradient, so both outputs share it
        return (grads[0] + grads[1]).unsqueeze(-1) * slope, None, None, None, None, None


def _read(query: Tensor, bank: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax attention over the rows of the bank (and each query's own row), a slice at a time.

    Args:
        query: Rows already divided by their temperature, (batch, dim).
        bank: (bank, dim), in any floating dtype.
        own: (batch, dim) or None.

    Returns:
        The logsumexp of the logits, (batch,), and the softmax-weighted mean of the rows, (batch, dim).
    """
    if own is None:
        highest = query.new_full((len(query),), -torch.inf)
        total = torch.zeros_like(highest)
        read = torch.zeros_like(query)
    else:
        highest = (query * own).sum(-1)
        total = torch.ones_like(highest)
        read = own.clone()
    for rows in _slices(bank, query.dtype):
        logits = query @ rows.T  # (batch, slice)
        highest, previous = torch.maximum(highest, logits.amax(-1)), highest
        weights = logits.sub_(highest.unsqueeze(-1)).exp_()
        rescale = (previous - highest).exp()
        total = total * rescale + weights.sum(-1)
        read = torch.addmm(read * rescale.unsqueeze(-1), weights, rows)
    return highest + total.log(), read / total.unsqueeze(-1)


def _slices(bank: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    for start in range(0, len(bank), SLICE_ROWS):
        yield bank[start : start + SLICE_ROWS].to(dtype)


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
    _check_temperature("temperature", temperature)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "distillation on logits needs the same classes on both sides, got student logits of shape "
            f"{tuple(student_logits.shape)} and teacher logits of shape {tuple(teacher_logits.shape)}. Use a teacher "
            "with the student's classes, or set kd_weight=0: the relational loss does not need them."
        )
    if student_logits.shape[-1] < 2:
        raise ValueError(
            "distillation on logits needs at least 2 classes, got 1: a softmax over one class is always 1. Set "
            "kd_weight=0."
        )
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    with torch.autocast(student_logits.device.type, enabled=False):
        student_log_probs = F.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
        teacher_log_probs = F.log_softmax(teacher_logits.detach().to(dtype) / temperature, dim=-1)
        divergence = F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True).sum(-1)
        return divergence * temperature**2


def _check_relational(
    student: Tensor, teacher: Tensor, bank: Tensor, student_temperature: float, teacher_temperature: float
) -> None:
    _check_temperature("student_temperature", student_temperature)
    _check_temperature("teacher_temperature", teacher_temperature)
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must be rows of one shape (batch, dim), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}. Project the student into the teacher's width."
        )
    if bank.dim() != 2 or bank.shape[1] != student.shape[1]:
        raise ValueError(f"bank must have the shape (bank, {student.shape[1]}), got {tuple(bank.shape)}.")


def _check_temperature(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"`{name}` must be positive, got {value}.")
