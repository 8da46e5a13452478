"""The relational losses against a bank: RRD and InfoNCE."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_rrd.losses.rows import check_positive, pair, ratio, unit

SLICE_ROWS = 4096  # of the bank, that are read at a time, at most; 16 times as many on an accelerator
SAME_COSINE = 1 - 1e-4
"""From this cosine on, a row of the bank is a copy of an example's own: half precision and TF32 leave no less of 1."""


def relational_loss(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.02,
    include_own: bool = False,
) -> Tensor:
    """Cross-entropy between the teacher's and the student's distribution of similarity over a bank, as a batch mean.

    With `p_t = softmax(cosines(teacher, bank) / teacher_temperature)` and `p_s` likewise for the student, the loss of
    an example is `-sum_k p_t[k] log p_s[k]`. Rows of the bank that are copies of an example's own teacher row, with a
    cosine of 0.9999 or more, are no candidates for it, on either side. Only `student` gets a gradient, and no second
    derivative; the cosine of a row of zeros is 0. Computed in float32 (float64 for a float64 student), also under
    autocast, from one pass over slices of the bank: memory does not grow with it.

    Args:
        student: Rows of any scale, (batch, dim).
        teacher: Rows of the same examples, of any scale, (batch, dim).
        bank: Teacher rows to compare with, of any scale, (bank, dim). An example with no candidate has a loss of 0.
        student_temperature: Positive. Lower is sharper.
        teacher_temperature: Positive. Lower is sharper; near 0 with `include_own` the loss is InfoNCE.
        include_own: Compare each example also with its own teacher row, as one more column, whether or not the bank
            has copies of it.

    Returns:
        The mean over the batch, a scalar.

    Raises:
        ValueError: A temperature is not positive, or the shapes do not agree.

    Source: Relational Representation Distillation, arXiv:2407.12073, section 3.
    """
    return relational_terms(student, teacher, bank, student_temperature, teacher_temperature, include_own)[0].mean()


def relational_terms(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.02,
    include_own: bool = False,
) -> tuple[Tensor, Tensor]:
    """`relational_loss` of each example, (batch,), and how far it is from its floor: `KL(p_t || p_s)`, (batch,).

    With `s` the student's logits, `m_s` its mean of the candidates under p_s and `m_t` the teacher's, all rows unit,
    the first is `logsumexp(s) - <student, m_t> / student_temperature`, with the gradient
    `(m_s - m_t) / student_temperature`: two attention reads of the bank.
    """
    check_positive("teacher_temperature", teacher_temperature, 0.02)
    student, teacher, bank = _prepared(student, teacher, bank, student_temperature)
    if len(bank) == 0:  # nothing, or one candidate alone: certain either way
        nothing = (student * 0).sum(-1)  # (batch,), still part of the graph
        return nothing, nothing
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        # Both sides as columns of one matrix: half as many products, and a wider one is faster.
        queries = torch.cat(
            [student / student_temperature, teacher / teacher_temperature]
        ).T.contiguous()  # (dim, 2 * batch)
        own = teacher.T.repeat(1, 2)  # (dim, 2 * batch)
        own_logits = (queries * own).sum(0) if include_own else queries.new_full((queries.shape[1],), -torch.inf)
        logsumexp, read = _read(queries, bank, own, own_logits, SAME_COSINE / teacher_temperature)
        (student_norm, teacher_norm), (student_mean, teacher_mean) = logsumexp.chunk(2), read.chunk(2, dim=1)
        student_query, teacher_query = queries.chunk(2, dim=1)
        entropy = teacher_norm - (teacher_query * teacher_mean).sum(0)
        cross_entropy = student_norm - (student_query * teacher_mean).sum(0)
        slope = (student_mean - teacher_mean).T / student_temperature  # (batch, dim)
    return _with_slope(student, cross_entropy, slope), _with_slope(student, cross_entropy - entropy, slope)


def infonce_loss(student: Tensor, teacher: Tensor, bank: Tensor, student_temperature: float = 0.1) -> Tensor:
    """InfoNCE against a bank: each student row has to find its own teacher row among those of other examples.

    `-log p_s[own]`, with the `p_s` of `relational_loss` with `include_own`, which comes to this at a teacher's
    temperature of 0.

    Args, Returns, Raises: as for `relational_loss`.
    Source: van den Oord et al., arXiv:1807.03748, eq. 4; as distillation: Tian et al., arXiv:1910.10699.
    """
    return infonce_terms(student, teacher, bank, student_temperature).mean()


def infonce_terms(student: Tensor, teacher: Tensor, bank: Tensor, student_temperature: float = 0.1) -> Tensor:
    """`infonce_loss` of each example, (batch,)."""
    student, teacher, bank = _prepared(student, teacher, bank, student_temperature)
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        queries = torch.cat([student / student_temperature, teacher]).T.contiguous()  # (dim, 2 * batch)
        own = teacher.T.repeat(1, 2)  # (dim, 2 * batch)
        own_logits = (queries * own).sum(0)
        logsumexp, read = _read(queries, bank, own, own_logits, SAME_COSINE)
        slope = (read[:, : len(student)] - teacher.T).T / student_temperature  # (batch, dim)
        value = (logsumexp - own_logits)[: len(student)]
    return _with_slope(student, value, slope)


def _read(queries: Tensor, bank: Tensor, own: Tensor, own_logits: Tensor, same: float) -> tuple[Tensor, Tensor]:
    """Softmax attention over the rows of the bank, made unit, and each query's own column, a slice at a time.

    Args:
        queries: Over their temperature, (dim, 2 * batch): the student's, then the teacher's.
        bank: (bank, dim).
        own: Unit columns, (dim, 2 * batch).
        own_logits: Theirs, (2 * batch,); -inf for no candidate.
        same: The teacher's logit from which on a row is a copy of an example's own.

    Returns:
        The logsumexp of all logits, (2 * batch,), and the softmax mean of the candidates, (dim, 2 * batch); 0 where
        there was no candidate.
    """
    batch, floor = queries.shape[1] // 2, torch.finfo(queries.dtype).min / 2  # below any logit, and finite
    highest = own_logits.clamp(min=floor)
    total = own_logits.isfinite().to(queries.dtype)
    read = own * total
    # On a CPU, 2 MiB of a slice and its logits, which stay in its cache; elsewhere each slice costs some launches.
    slice_rows = max(1, min(SLICE_ROWS, 2**19 // max(1, sum(queries.shape))))
    slice_rows *= 1 if bank.device.type == "cpu" else 16
    # Two pieces of memory for all slices: so it is flat, and no time goes into asking for it.
    count = min(slice_rows, len(bank))
    row_room, logit_room = queries.new_empty(count, len(queries)), queries.new_empty(count, len(own_logits))
    for start in range(0, len(bank), slice_rows):
        rows = bank[start : start + slice_rows]
        room = row_room[: len(rows)]
        rows = unit(rows if rows.dtype == room.dtype else room.copy_(rows), out=room)  # (slice, dim)
        logits = torch.mm(rows, queries, out=logit_room[: len(rows)])  # (slice, 2 * batch)
        peak = logits.amax(0)
        if bank.device.type != "cpu" or bool((peak[batch:] >= same).any()):  # an accelerator is not waited for
            copies = logits[:, batch:] >= same  # (slice, batch)
            logits.view(len(rows), 2, batch).masked_fill_(copies.unsqueeze(1), -torch.inf)
            peak = logits.amax(0)
        highest, previous = torch.maximum(highest, peak), highest
        weights = logits.sub_(highest).exp_()
        rescale = (previous - highest).exp()
        total = total * rescale + weights.sum(0)
        read.mul_(rescale).addmm_(rows.T, weights)
    found = total > 0
    return (highest + total.log()).masked_fill(~found, 0), ratio(read, total)


class _WithSlope(torch.autograd.Function):
    """Each example's value, (batch,), as a function of the student whose gradient, (batch, dim), is known."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return grads[0].unsqueeze(-1) * slope, None, None


_with_slope: Callable[[Tensor, Tensor, Tensor], Tensor] = _WithSlope.apply


def _prepared(student: Tensor, teacher: Tensor, bank: Tensor, student_temperature: float) -> tuple[Tensor, ...]:
    """Checked; student and teacher unit and in full precision, a gradient for the student alone, the bank as it is."""
    check_positive("student_temperature", student_temperature, 0.1)
    with pair(student, teacher, one_width=True) as (student, teacher):
        shape = tuple(getattr(bank, "shape", ()))
        if len(shape) != 2 or shape[1] != student.shape[1]:
            came = shape if isinstance(bank, Tensor) else type(bank).__name__
            raise ValueError(f"`bank` must have the shape (bank, {student.shape[1]}), got {came}.")
        return unit(student), unit(teacher), bank.detach()
