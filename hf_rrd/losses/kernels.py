"""What stands around the two products of the comparison with a bank, as two kernels of Triton, for CUDA.

Imported only where Triton is. PyTorch's own operations do the same, in more launches and passes over the logits.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

SHORTEST = tl.constexpr(math.sqrt(torch.finfo(torch.float32).tiny))  # below it a row counts as one of zeros
BELOW_ALL = tl.constexpr(-1e38)  # logits, and finite
MADE_UNIT, COMPARED = 1024, 4096  # numbers that a program reads at a time


def unit_rows(student: Tensor, teacher: Tensor, bank: Tensor, bank_is_unit: bool) -> tuple[Tensor, Tensor, Tensor]:
    """All rows over their length, in float32 and in one matrix, (2 * batch + bank, dim): student, teacher, bank.

    And the teacher's once more, (batch, dim), which may be kept without all the others; and the lengths of the
    student's, (batch,), inf of a row of zeros.
    """
    student, teacher, bank = (each if each.stride(1) == 1 else each.contiguous() for each in (student, teacher, bank))
    (batch, dim), count = student.shape, 2 * len(student) + len(bank)
    rows, own, norms = student.new_empty(count, dim), student.new_empty(batch, dim), student.new_empty(batch)
    width = triton.next_power_of_2(dim)
    some = max(1, MADE_UNIT // width)
    tensors, sizes = (student, teacher, bank, rows, own, norms), (batch, count, dim)
    strides = (student.stride(0), teacher.stride(0), bank.stride(0))
    _unit_rows[(triton.cdiv(count, some),)](*tensors, *sizes, *strides, bank_is_unit, some, width)
    return rows, own, norms


def compare(
    logits: Tensor, norms: Tensor, student_temperature: float, teacher_temperature: float, same: float
) -> tuple[Tensor, Tensor]:
    """From cosines of the student's and the teacher's rows with all rows to cross-entropy and divergence, (batch,).

    Args:
        logits: Of the matrix of `unit_rows`, the cosines of its first 2 * batch rows with all. The student's half is
            overwritten: its product with the matrix is the gradient of the student's rows, of any length.
        norms: The lengths of the student's rows, (batch,).
        student_temperature, teacher_temperature: Positive.
        same: What part of its cosine with itself makes a row a copy of a teacher's.
    """
    batch, count = len(norms), logits.shape[1]
    losses = logits.new_empty(2, batch)
    block = min(COMPARED, max(128, triton.next_power_of_2(count)))
    factors = (1 / student_temperature, 1 / teacher_temperature, same)
    _compare[(batch,)](logits, norms, losses, batch, count, *factors, block, num_warps=8)
    cross_entropy, divergence = losses.unbind()
    return cross_entropy, divergence


@triton.jit
def _unit_rows(
    student,
    teacher,
    bank,
    rows,
    own,
    norms,
    batch,
    count,
    dim,
    student_stride,
    teacher_stride,
    bank_stride,
    bank_is_unit: tl.constexpr,
    some: tl.constexpr,
    width: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * some + tl.arange(0, some)[:, None]  # (some, 1)
    column = tl.arange(0, width)[None, :]  # (1, width)
    inside = column < dim
    is_student, is_teacher = row < batch, (row >= batch) & (row < 2 * batch)
    is_bank = (row >= 2 * batch) & (row < count)
    values = tl.load(student + row * student_stride + column, mask=is_student & inside, other=0.0).to(tl.float32)
    place = teacher + (row - batch) * teacher_stride + column
    values += tl.load(place, mask=is_teacher & inside, other=0.0).to(tl.float32)
    place = bank + (row - 2 * batch) * bank_stride + column
    values += tl.load(place, mask=is_bank & inside, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(values * values, 1))[:, None]  # (some, 1)
    norm = tl.where(norm <= SHORTEST, float("inf"), norm)
    if bank_is_unit:
        norm = tl.where(is_bank, 1.0, norm)
    values = values / norm
    tl.store(rows + row * dim + column, values, mask=(row < count) & inside)
    tl.store(own + (row - batch) * dim + column, values, mask=is_teacher & inside)
    tl.store(norms + row, norm, mask=is_student)


@triton.jit
def _compare(
    logits,
    norms,
    losses,
    batch,
    count,
    student_factor,
    teacher_factor,
    same,
    block: tl.constexpr,
):
    example = tl.program_id(0).to(tl.int64)
    own = batch + example  # the example's own teacher row
    students, teachers = logits + example * count, logits + own * count
    # Of all candidates the own row has the teacher's largest cosine. It is taken off before the cosines are scaled: so
    # its logit is 0 to the bit, whatever is fused, however low the temperature.
    largest = tl.load(teachers + own)
    limit = largest * same
    # Each lane has a maximum and sums of its own: no lane waits for another until the end.
    student_top = tl.full([block], BELOW_ALL, tl.float32)
    student_sum = tl.zeros([block], tl.float32)
    teacher_sum = tl.zeros([block], tl.float32)
    for start in range(0, count, block):
        row = start + tl.arange(0, block)
        student = tl.load(students + row, mask=row < count, other=0.0)
        teacher = tl.load(teachers + row, mask=row < count, other=0.0)
        # Not those of other examples of the batch, nor copies.
        counts = (row < count) & ((row == own) | ((row >= 2 * batch) & ~(teacher > limit)))
        student = tl.where(counts, student * student_factor, float("-inf"))
        top = tl.maximum(student_top, student)
        student_sum = student_sum * tl.exp(student_top - top) + tl.exp(student - top)
        student_top = top
        teacher_sum += tl.where(counts, tl.exp((teacher - largest) * teacher_factor), 0.0)
    top = tl.max(student_top, 0)
    student_norm = top + tl.log(tl.sum(student_sum * tl.exp(student_top - top), 0))
    teacher_norm = tl.log(tl.sum(teacher_sum, 0))

    scale = student_factor / tl.load(norms + example)
    cross_entropy = tl.zeros([block], tl.float32)
    divergence = tl.zeros([block], tl.float32)
    longer = tl.zeros([block], tl.float32)
    for start in range(0, count, block):
        row = start + tl.arange(0, block)
        student = tl.load(students + row, mask=row < count, other=0.0)
        teacher = tl.load(teachers + row, mask=row < count, other=0.0)
        counts = (row < count) & ((row == own) | ((row >= 2 * batch) & ~(teacher > limit)))
        student_log = student * student_factor - student_norm
        teacher_log = (teacher - largest) * teacher_factor - teacher_norm
        wanted = tl.where(counts, tl.exp(teacher_log), 0.0)
        pull = (tl.where(counts, tl.exp(student_log), 0.0) - wanted) * scale
        cross_entropy -= wanted * student_log
        divergence += wanted * (teacher_log - student_log)
        longer += tl.where(counts, pull * student, 0.0)
        tl.store(students + row, pull, mask=(row < count) & (row != example))
    tl.store(students + example, -tl.sum(longer, 0))  # less what would only lengthen the row: along itself
    tl.store(losses + example, tl.sum(cross_entropy, 0))
    tl.store(losses + own, tl.sum(divergence, 0))
