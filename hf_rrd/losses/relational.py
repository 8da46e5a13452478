"""The relational losses against a bank: RRD and InfoNCE."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_rrd.losses.rows import check_positive, lengths, no_autocast, pair, ratio, unit

SLICE_ROWS = 4096  # of the bank, that are read at a time on a CPU, at most
LOGITS_MEMORY = 2**31
"""Bytes that an accelerator may hold at the peak in matrices as large as the logits of both sides."""
SAME_COSINE = 1 - 1e-4
"""From this cosine on, a row of the bank is a copy of an example's own: half precision leaves no less of 1."""
INFONCE_TEMPERATURE = 1e-7
"""A teacher's temperature at which a cosine of `SAME_COSINE` has a weight of exp(-1000) beside the own key's."""


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
    autocast. On a CPU the bank is read in slices, and memory does not grow with it. An accelerator makes all logits at
    once while that takes no more than 2 GiB, and reads larger slices beyond.

    On CUDA the products with the bank are in TF32, from torch 2.9 on unless it was told otherwise
    (`torch.set_float32_matmul_precision("highest")`, `tf32=False`), before where it was asked to. Cosines are then
    right to 1e-3 at worst, at the default temperatures loss and divergence to 0.02 and the gradient to half a percent.
    All else stays float32.

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


def relational_terms(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """`relational_loss` of each example, (batch,), and how far it is from its floor: `KL(p_t || p_s)`, (batch,).

    Takes what `relational_parts` does.
    """
    cross_entropy, divergence, _ = relational_parts(*args, **kwargs)
    return cross_entropy, divergence


def relational_parts(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.02,
    include_own: bool = False,
    bank_is_unit: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The two of `relational_terms`, and the teacher's rows over their length, (batch, dim).

    With `s` the student's logits, `m_s` its mean of the candidates under p_s and `m_t` the teacher's, all rows unit,
    the first is `logsumexp(s) - <student, m_t> / student_temperature`, with the gradient
    `(m_s - m_t) / student_temperature`: two attention reads of the bank. `bank_is_unit` says that its rows have the
    length 1 already.
    """
    check_positive("teacher_temperature", teacher_temperature, 0.02)
    student, teacher, bank = _prepared(student, teacher, bank, student_temperature)
    if len(bank) == 0:  # nothing, or one candidate alone: certain either way
        nothing = (student * 0).sum(-1)  # (batch,), still part of the graph
        return nothing, nothing, unit(teacher)
    if include_own and _fits(student, bank):
        with torch.no_grad(), no_autocast(student.device.type):
            kernels, given = _kernels(student), (student, teacher, bank, student_temperature, teacher_temperature)
            parts = _by_kernels(kernels, *given, bank_is_unit) if kernels else _at_once(*given, bank_is_unit)
        one, other, slope, teacher = parts
        return *_with_slope(student, one, other, slope), teacher
    student, teacher = unit(student), unit(teacher)
    with torch.no_grad(), no_autocast(student.device.type):
        # Both sides as columns of one matrix: half as many products, and a wider one is faster.
        queries = torch.cat(
            [student / student_temperature, teacher / teacher_temperature]
        ).T.contiguous()  # (dim, 2 * batch)
        own = teacher.T.repeat(1, 2)  # (dim, 2 * batch)
        own_logits = (queries * own).sum(0) if include_own else queries.new_full((queries.shape[1],), -torch.inf)
        logsumexp, read = _read(queries, bank, own, own_logits, SAME_COSINE / teacher_temperature, bank_is_unit)
        (student_norm, teacher_norm), (student_mean, teacher_mean) = logsumexp.chunk(2), read.chunk(2, dim=1)
        student_query, teacher_query = queries.chunk(2, dim=1)
        entropy = teacher_norm - (teacher_query * teacher_mean).sum(0)
        cross_entropy = student_norm - (student_query * teacher_mean).sum(0)
        slope = (student_mean - teacher_mean).T / student_temperature  # (batch, dim)
    return *_with_slope(student, cross_entropy, cross_entropy - entropy, slope), teacher


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
    return relational_terms(student, teacher, bank, student_temperature, INFONCE_TEMPERATURE, include_own=True)[0]


def _fits(student: Tensor, bank: Tensor) -> bool:
    """Whether all logits are made at once: on an accelerator, where each operation costs a launch."""
    if not _is_accelerator(bank.device):
        return False
    batch, (matrices, own) = len(student), (1, 2) if _kernels(student) else (2, 1)  # own columns, in batches
    most = _slice_rows(bank.device, 2 * batch, student, matrices)
    return own * batch + len(bank) <= most + most // 64  # so a bank of a power of two does not fail by a few columns


def _is_accelerator(device: torch.device) -> bool:
    return device.type != "cpu"


def _slice_rows(device: torch.device, queries: int, like: Tensor, matrices: int = 2) -> int:
    """Rows of the bank that are read at a time for so many queries, of the width and the dtype of `like`.

    On an accelerator there are so many matrices of the logits' size at the peak.
    """
    if _is_accelerator(device):
        return max(1, LOGITS_MEMORY // (matrices * queries * like.itemsize))
    # 2 MiB of a slice and its logits, which stay in the cache.
    return max(1, min(SLICE_ROWS, 2**19 // max(1, queries + like.shape[1])))


@contextmanager
def _tf32(device: torch.device) -> Iterator[None]:
    """Products of float32 in TF32 on CUDA meanwhile, where torch knows whether it was told otherwise: from 2.9 on."""
    matmul = torch.backends.cuda.matmul
    if device.type != "cuda" or getattr(matmul, "fp32_precision", "") != "none":
        yield
        return
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = "none"


@lru_cache(maxsize=8)
def _others(batch: int, device: torch.device) -> Tensor:
    """Which keys of a batch are those of other examples, (batch, batch)."""
    return ~torch.eye(batch, dtype=torch.bool, device=device)


def _at_once(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    unit_bank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of raw rows, with the own keys: cross-entropy and divergence, (batch,) each, gradient and unit teacher rows.

    Written for few operations: factors go into products, and each example's own key is found among those of all, by
    the same product. So TF32 makes a row's cosine with its copy no other than that with itself.
    """
    batch, contrast = len(student), student_temperature / teacher_temperature
    queries = torch.cat([student, teacher])  # (2 * batch, dim)
    norms = lengths(queries)
    queries.div_(norms)
    teacher = queries[batch:]
    rows = torch.cat([teacher, bank if unit_bank else unit(bank.to(queries.dtype))])  # (batch + bank, dim)
    queries[:batch].div_(contrast)
    nothing = queries.new_empty(1)  # is not read
    with _tf32(queries.device):
        logits = torch.addmm(nothing, queries, rows.T, beta=0, alpha=1 / teacher_temperature)
    both = logits.view(2, batch, -1)  # (2, batch, batch + bank): of the student, of the teacher
    own = both[:, :, :batch].diagonal(dim1=1, dim2=2)  # (2, batch)
    copies = both[1] > (own[1] * SAME_COSINE).unsqueeze(1)  # (batch, batch + bank)
    copies[:, :batch] = _others(batch, copies.device)
    both.masked_fill_(copies, -torch.inf)
    log_probs = torch.log_softmax(logits, 1)
    logsumexp = own - log_probs.view_as(both)[:, :, :batch].diagonal(dim1=1, dim2=2)  # (2, batch)
    probs = torch.exp(log_probs, out=logits)
    with _tf32(queries.device):
        means = torch.addmm(nothing, probs, rows, beta=0, alpha=1 / student_temperature)
    slope = means[:batch].sub_(means[batch:])  # (batch, dim)
    # (batch, 2, dim): queries of either side; (batch, dim, 2): the slope, and the teacher's mean
    sides, pulls = queries.view(2, batch, -1).transpose(0, 1), means.view(2, batch, -1).permute(1, 2, 0)
    dots = torch.baddbmm(nothing, sides, pulls, beta=0, alpha=contrast)  # (batch, 2, 2)
    cross_entropy, entropy = torch.sub(logsumexp, dots[:, :, 1].T).unbind()
    # Less what would only lengthen a row.
    slope = slope.addcmul(queries[:batch], dots[:, 0, :1], value=-contrast).div_(norms[:batch])
    return cross_entropy, cross_entropy - entropy, slope, teacher


def _kernels(student: Tensor) -> Any:
    """The module with Triton's kernels where they run and fit, else None."""
    return _working_kernels(student.device) if student.is_cuda and student.dtype == torch.float32 else None


@cache
def _working_kernels(device: torch.device) -> Any:
    """The module where its kernels give what PyTorch gives, which is looked at once."""
    try:
        from hf_rrd.losses import kernels

        rows = torch.arange(30, device=device, dtype=torch.float32).sin().view(10, 3)
        # Of so low a temperature PyTorch's operations do not give the divergence.
        for temperature, parts in ((0.1, (0, 1, 2, 3)), (INFONCE_TEMPERATURE, (0, 2, 3))):
            given = (rows[:2], rows[2:4], rows[2:], 0.1, temperature, False)
            with torch.no_grad(), no_autocast(device.type):
                found, expected = _by_kernels(kernels, *given), _at_once(*given)
            for part in parts:
                torch.testing.assert_close(found[part], expected[part], rtol=0.02, atol=0.02)
    except Exception as error:  # no Triton, no compiler of C for it, a device that it does not know, ...
        what = f"{type(error).__name__}: {error}"[:300]
        warnings.warn(f"The relational loss runs without Triton's kernels, in more launches. {what}", stacklevel=2)
        return None
    return kernels


def _by_kernels(
    kernels: Any,
    student: Tensor,
    teacher: Tensor,
    bank: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    unit_bank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_at_once` does: two products, and two kernels for all else."""
    batch = len(student)
    with torch.cuda.device_of(student), _tf32(student.device):  # type: ignore[no-untyped-call]
        rows, own, norms = kernels.unit_rows(student, teacher, bank, unit_bank)  # (2 * batch + bank, dim)
        logits = torch.mm(rows[: 2 * batch], rows.T)
        losses = kernels.compare(logits, norms, student_temperature, teacher_temperature, SAME_COSINE)
        return *losses, torch.mm(logits[:batch], rows), own


def _read(
    queries: Tensor, bank: Tensor, own: Tensor, own_logits: Tensor, same: float, unit_bank: bool
) -> tuple[Tensor, Tensor]:
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
    slice_rows = min(_slice_rows(bank.device, queries.shape[1], queries.T), len(bank))
    # On an accelerator before each slice the batch's own keys: TF32 makes of copies what it makes of a row and itself.
    front = batch if _is_accelerator(bank.device) else 0
    # Two pieces of memory for all slices: so it is flat, and no time goes into asking for it.
    row_room, logit_room = (queries.new_empty(front + slice_rows, n) for n in queries.shape)
    row_room[:front] = own[:, :front].T
    for start in range(0, len(bank), slice_rows):
        rows = bank[start : start + slice_rows]
        room = row_room[: front + len(rows)]
        if front or not unit_bank or rows.dtype != room.dtype:
            part = room[front:]
            unit(rows if rows.dtype == room.dtype else part.copy_(rows), out=part)  # (slice, dim)
            rows = room
        with _tf32(bank.device):
            logits = torch.mm(rows, queries, out=logit_room[: len(rows)])  # (front + slice, 2 * batch)
        limit: Any = logits[:front, batch:].diagonal() * SAME_COSINE if front else same
        rows, logits = rows[front:], logits[front:]
        peak = logits.amax(0)
        if front or bool((peak[batch:] > limit).any()):  # an accelerator is not waited for
            copies = logits[:, batch:] > limit  # (slice, batch)
            logits.view(len(rows), 2, batch).masked_fill_(copies.unsqueeze(1), -torch.inf)
            peak = logits.amax(0)
        highest, previous = torch.maximum(highest, peak), highest
        weights = logits.sub_(highest).exp_()
        rescale = (previous - highest).exp()
        total = total * rescale + weights.sum(0)
        with _tf32(bank.device):
            read.mul_(rescale).addmm_(rows.T, weights)
    found = total > 0
    return (highest + total.log()).masked_fill(~found, 0), ratio(read, total)


class _WithSlope(torch.autograd.Function):
    """Two values of each example, (batch,), as functions of the student of one known gradient, (batch, dim)."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, one: Tensor, other: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(slope)
        return one, other

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        one, other = grads
        grad = other if one is None else one if other is None else one + other
        return None if grad is None else grad.unsqueeze(-1) * ctx.saved_tensors[0], None, None, None


_with_slope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = _WithSlope.apply


def _prepared(student: Tensor, teacher: Tensor, bank: Tensor, student_temperature: float) -> tuple[Tensor, ...]:
    """Checked; student and teacher in full precision, a gradient for the student alone, the bank as it is."""
    check_positive("student_temperature", student_temperature, 0.1)
    with pair(student, teacher, one_width=True) as (student, teacher):
        shape = tuple(getattr(bank, "shape", ()))
        if len(shape) != 2 or shape[1] != student.shape[1]:
            came = shape if isinstance(bank, Tensor) else type(bank).__name__
            raise ValueError(f"`bank` must have the shape (bank, {student.shape[1]}), got {came}.")
        return student, teacher, bank.detach()
