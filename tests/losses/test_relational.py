"""The losses against loops over their formulas, whatever the slices in which the bank is read and the rows' scale."""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_rrd import FeatureBank, relational_loss
from hf_rrd.losses import relational as losses
from hf_rrd.losses.relational import relational_terms
from tests.losses.loops import LargestTensor, gradient_of
from tests.losses.test_kernels import STAND_INS

DIM = 4
WHOLE = 4096
SLICES = [WHOLE, 1, 3, 7, "at once", "kernels", "accelerator 1", "accelerator 3"]
"""Rows of the bank that are read at a time; as on an accelerator, all at once or so many; as with Triton's kernels."""


def read_by(monkeypatch: pytest.MonkeyPatch, slice_rows: int | str) -> None:
    if isinstance(slice_rows, str):
        rows = int(slice_rows.split()[1]) if slice_rows.startswith("accelerator") else 1 << 20
        monkeypatch.setattr(losses, "_is_accelerator", lambda device: True)
        monkeypatch.setattr(losses, "_slice_rows", lambda *_: rows)
        if slice_rows.endswith("kernels"):
            monkeypatch.setattr(losses, "_kernels", lambda student: STAND_INS if slice_rows == "kernels" else None)
    else:
        monkeypatch.setattr(losses, "SLICE_ROWS", slice_rows)


def unit_rows(count: int, dim: int = DIM, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator, dtype=dtype), dim=-1)


def raw_rows(count: int, dim: int = DIM, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows whose lengths lie between a hundredth and a hundred."""
    generator = torch.Generator().manual_seed(1000 + seed)
    exponents = 4 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 2
    return unit_rows(count, dim, seed, dtype) * (10**exponents).to(dtype)


def naive_cosine(one: Tensor, other: Tensor) -> Tensor:
    """By a loop over the dimensions; 0 where a row has no direction."""
    dot, square, other_square = torch.zeros(3).double()
    for d in range(len(one)):
        dot, square, other_square = dot + one[d] * other[d], square + one[d] ** 2, other_square + other[d] ** 2
    return dot / (square.sqrt() * other_square.sqrt()) if square > 0 and other_square > 0 else dot * 0


def naive_relational(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    include_own: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Cross-entropy and divergence of each example: loops over examples, keys and dimensions; autograd works."""
    teacher, bank = teacher.detach(), bank.detach()
    cross_entropies, divergences = [], []
    for i in range(len(student)):
        keys = [*bank, teacher[i]] if include_own else [*bank]
        student_exp, teacher_exp = [], []
        for key in keys:
            student_exp.append((naive_cosine(student[i], key) / student_temperature).exp())
            teacher_exp.append((naive_cosine(teacher[i], key) / teacher_temperature).exp())
        cross_entropy, divergence = torch.zeros(()).double(), torch.zeros(()).double()
        for k in range(len(keys)):
            student_prob, teacher_prob = student_exp[k] / sum(student_exp), teacher_exp[k] / sum(teacher_exp)
            cross_entropy = cross_entropy - teacher_prob * student_prob.log()
            divergence = divergence + teacher_prob * (teacher_prob.log() - student_prob.log())
        cross_entropies.append(cross_entropy)
        divergences.append(divergence)
    return cross_entropies, divergences


@pytest.mark.parametrize("slice_rows", SLICES)
@pytest.mark.parametrize("include_own", [False, True])
@pytest.mark.parametrize(
    ("batch", "bank_rows", "temperatures"),
    [
        (1, 1, (0.1, 0.02)),
        (1, 5, (0.1, 0.02)),
        (4, 1, (0.1, 0.02)),
        (5, 13, (0.1, 0.02)),
        (9, 4, (0.1, 0.02)),
        (3, 7, (0.05, 0.3)),
    ],
)
def test_relational_loss_and_its_gradient_equal_a_triple_loop_over_the_formula(
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    bank_rows: int,
    temperatures: tuple[float, float],
    include_own: bool,
    slice_rows: int | str,
) -> None:
    read_by(monkeypatch, slice_rows)
    student, teacher, bank = raw_rows(batch, seed=1), raw_rows(batch, seed=2), raw_rows(bank_rows, seed=3)
    expected, expected_gradient = gradient_of(
        lambda rows: sum(naive_relational(rows, teacher, bank, *temperatures, include_own)[0]) / batch, student
    )
    loss, gradient = gradient_of(
        lambda rows: relational_loss(rows, teacher, bank, *temperatures, include_own=include_own), student
    )
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("slice_rows", SLICES)
@pytest.mark.parametrize("include_own", [False, True])
def test_each_examples_loss_and_divergence_and_a_mix_of_their_gradients_equal_the_loop(
    monkeypatch: pytest.MonkeyPatch, include_own: bool, slice_rows: int | str
) -> None:
    read_by(monkeypatch, slice_rows)
    student, teacher, bank = raw_rows(4, seed=1), raw_rows(4, seed=2), raw_rows(10, seed=3)
    weights = torch.tensor([[0.5, -1.0, 2.0, 0.0], [3.0, 0.25, 0.0, -2.0]], dtype=torch.float64)

    def mixed(terms: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        def value(rows: Tensor) -> Tensor:
            cross_entropy, divergence = terms(rows, teacher, bank, 0.1, 0.05, include_own)
            return (weights[0] * as_row(cross_entropy) + weights[1] * as_row(divergence)).sum()

        return value

    def as_row(values: Any) -> Tensor:
        return values if isinstance(values, Tensor) else torch.stack(values)

    for got, expected in zip(
        relational_terms(student, teacher, bank, 0.1, 0.05, include_own),
        naive_relational(student, teacher, bank, 0.1, 0.05, include_own),
        strict=True,
    ):
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-9, atol=1e-9)
    expected_gradient = gradient_of(mixed(naive_relational), student)[1]
    gradient = gradient_of(mixed(relational_terms), student)[1]
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("slice_rows", SLICES)
def test_the_gradient_equals_central_differences_of_the_loss(
    monkeypatch: pytest.MonkeyPatch, slice_rows: int | str
) -> None:
    read_by(monkeypatch, slice_rows)
    student, teacher, bank = unit_rows(2, seed=1), unit_rows(2, seed=2), unit_rows(8, seed=3)
    gradient = gradient_of(lambda rows: relational_loss(rows, teacher, bank, include_own=True), student)[1]
    step = 1e-5
    for i in range(2):
        for d in range(DIM):
            shift = torch.zeros_like(student)
            shift[i, d] = step
            above = relational_loss(student + shift, teacher, bank, include_own=True)
            below = relational_loss(student - shift, teacher, bank, include_own=True)
            assert float(gradient[i, d]) == pytest.approx(float(above - below) / (2 * step), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("slice_rows", SLICES)
def test_with_the_own_key_and_a_teacher_temperature_near_0_the_loss_is_info_nce(
    monkeypatch: pytest.MonkeyPatch, slice_rows: int | str
) -> None:
    read_by(monkeypatch, slice_rows)
    student, teacher, bank = unit_rows(6, 16, seed=1), unit_rows(6, 16, seed=2), unit_rows(40, 16, seed=3)

    def info_nce(rows: Tensor) -> Tensor:
        rows = F.normalize(rows, dim=-1)
        logits = torch.cat([(rows * teacher).sum(-1, keepdim=True), rows @ bank.T], dim=1) / 0.1
        return F.cross_entropy(logits, torch.zeros(len(rows), dtype=torch.long))

    expected, expected_gradient = gradient_of(info_nce, student)
    loss, gradient = gradient_of(
        lambda rows: relational_loss(rows, teacher, bank, 0.1, teacher_temperature=1e-4, include_own=True), student
    )
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("slice_rows", SLICES)
@pytest.mark.parametrize("include_own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_divergence_is_exactly_0_for_equal_embeddings_and_temperatures(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, include_own: bool, slice_rows: int | str
) -> None:
    read_by(monkeypatch, slice_rows)
    rows, bank = unit_rows(5, seed=1, dtype=dtype), unit_rows(11, seed=2, dtype=dtype)
    cross_entropy, divergence = relational_terms(rows, rows.clone(), bank, 0.07, 0.07, include_own)
    if isinstance(slice_rows, str):  # rows of one product may be added up in another order
        assert divergence.abs().max() <= 8 * torch.finfo(dtype).eps / 0.07
    else:
        assert divergence.tolist() == [0.0] * 5
    assert cross_entropy.min() > 0  # what is left is the teacher's entropy


@pytest.mark.parametrize("slice_rows", [WHOLE, 7, "at once", "kernels", "accelerator 7"])
@pytest.mark.parametrize("include_own", [False, True])
def test_temperatures_of_a_ten_thousandth_stay_finite_in_float32(
    monkeypatch: pytest.MonkeyPatch, include_own: bool, slice_rows: int | str
) -> None:
    read_by(monkeypatch, slice_rows)
    student, teacher, bank = (unit_rows(n, seed=s, dtype=torch.float32) for n, s in ((6, 1), (6, 2), (20, 3)))
    bank = torch.cat([-student, bank, student])  # similarities of -10,000 in one slice and of 10,000 in a later one
    loss, gradient = gradient_of(lambda rows: relational_loss(rows, teacher, bank, 1e-4, 1e-4, include_own), student)
    assert math.isfinite(loss)
    assert gradient.isfinite().all()


def softmax_terms(student: Tensor, teacher: Tensor, bank: Tensor, include_own: bool) -> Tensor:
    """The loss from both (batch, candidates) matrices, at temperatures of 0.1 and 0.02."""
    student, teacher, bank = (F.normalize(rows, dim=-1) for rows in (student, teacher, bank))
    logits = []
    for query in (student, teacher):
        own = (query * teacher).sum(-1, keepdim=True)
        logits.append(torch.cat([query @ bank.T, own], dim=1) if include_own else query @ bank.T)
    return -((logits[1] / 0.02).softmax(-1) * (logits[0] / 0.1).log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize("include_own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_float32_the_loss_is_that_of_float64_to_5e_6_for_64_examples_and_a_bank_of_20_000(
    include_own: bool, dtype: torch.dtype
) -> None:
    student, teacher, bank = (raw_rows(n, 32, seed=n, dtype=torch.float32) for n in (64, 63, 20_000))
    teacher, bank = (
        F.normalize(torch.cat([teacher, student[:1]]), dim=-1) + F.normalize(student, dim=-1),
        bank.to(dtype),
    )
    loss, gradient = gradient_of(lambda rows: relational_loss(rows, teacher, bank, include_own=include_own), student)
    expected, expected_gradient = gradient_of(
        lambda rows: softmax_terms(rows, teacher.double(), bank.double(), include_own), student.double()
    )
    assert float((loss - expected).abs() / expected) <= 5e-6
    assert float((gradient - expected_gradient).abs().max() / expected_gradient.abs().max()) <= 5e-6


LOSSES: dict[str, Callable[..., Tensor]] = {
    "rrd": losses.relational_loss,
    "rrd with its own key": partial(losses.relational_loss, include_own=True),
    "infonce": losses.infonce_loss,
}


# ---- Copies of an example's own row in the bank ----


def with_copies(teacher: Tensor, bank: Tensor, dtype: torch.dtype) -> Tensor:
    """The bank with each teacher row in it once or twice, at some scale, as it comes back from a store of a dtype."""
    rows = torch.cat([bank[:3], 3 * teacher, bank[3:], teacher[:2]])
    return F.normalize(rows, dim=-1).to(dtype).to(bank.dtype)


@pytest.mark.parametrize("slice_rows", [WHOLE, 1, 5])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_copies_of_an_examples_own_row_are_no_candidates_for_it_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, stored: torch.dtype, slice_rows: int | str
) -> None:
    read_by(monkeypatch, slice_rows)
    student, teacher, bank = raw_rows(5, 16, seed=1), raw_rows(5, 16, seed=2), raw_rows(20, 16, seed=3)
    bank = with_copies(teacher, bank, stored)
    for i in range(5):
        cosines = F.normalize(bank, dim=-1) @ F.normalize(teacher[i], dim=0)
        others = bank[cosines < 0.999]
        assert len(others) == len(bank) - (2 if i < 2 else 1)
        one = slice(i, i + 1)
        expected, expected_gradient = gradient_of(
            lambda rows, o=others, n=one: LOSSES[name](rows, teacher[n], o), student[one]
        )
        loss, gradient = gradient_of(lambda rows, n=one: LOSSES[name](rows, teacher[n], bank), student[one])
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-12)
    whole = LOSSES[name](student, teacher, bank)
    single = [LOSSES[name](student[i : i + 1], teacher[i : i + 1], bank) for i in range(5)]
    assert float(whole) == pytest.approx(float(torch.stack(single).mean()), rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_candidate_but_copies_of_the_own_row_the_loss_and_its_gradient_are_0(name: str) -> None:
    student, teacher = raw_rows(3, 8, seed=1), raw_rows(3, 8, seed=2)
    loss, gradient = gradient_of(lambda rows: LOSSES[name](rows, teacher[:1].expand(3, 8), teacher[:1]), student)
    assert float(loss) == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-9


def test_a_row_that_is_almost_the_own_one_stays_a_candidate() -> None:
    teacher = unit_rows(1, 16, seed=2)
    near = F.normalize(teacher + 0.02 * unit_rows(1, 16, seed=5), dim=-1)  # a cosine of 0.9998
    bank = torch.cat([unit_rows(4, 16, seed=3), near])
    terms = relational_terms(unit_rows(1, 16, seed=1), teacher, bank, 0.1, 0.02)
    expected = softmax_terms(unit_rows(1, 16, seed=1), teacher, bank, False)
    assert float(terms[0]) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("slice_rows", [WHOLE, 7, "at once", "kernels", "accelerator 7"])
@pytest.mark.parametrize("raw", ["student", "teacher", "bank", "all"])
@pytest.mark.parametrize("name", LOSSES)
def test_raw_rows_give_what_unit_rows_give_whichever_side_is_raw(
    monkeypatch: pytest.MonkeyPatch, name: str, raw: str, slice_rows: int | str
) -> None:
    read_by(monkeypatch, slice_rows)
    sides = {side: raw_rows(n, 16, seed=s) for side, n, s in (("student", 6, 1), ("teacher", 6, 2), ("bank", 40, 3))}
    unit = {side: F.normalize(rows, dim=-1) for side, rows in sides.items()}
    given = {side: sides[side] if raw in (side, "all") else unit[side] for side in sides}
    expected, expected_gradient = gradient_of(
        lambda rows: LOSSES[name](rows, unit["teacher"], unit["bank"]), unit["student"]
    )
    loss, gradient = gradient_of(lambda rows: LOSSES[name](rows, given["teacher"], given["bank"]), given["student"])
    lengths = given["student"].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(gradient * lengths, expected_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("slice_rows", [WHOLE, 7, "at once", "kernels", "accelerator 7"])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_1e17_and_1e_minus_17_give_in_float32_what_unit_rows_give(
    monkeypatch: pytest.MonkeyPatch, name: str, slice_rows: int | str
) -> None:
    read_by(monkeypatch, slice_rows)
    unit = [unit_rows(n, 16, seed=s, dtype=torch.float32) for n, s in ((6, 1), (6, 2), (40, 3))]
    scales = [torch.tensor([1e17, 1e-17, 1.0]).repeat(14)[: len(rows), None] for rows in unit]
    student, teacher, bank = (rows * scale for rows, scale in zip(unit, scales, strict=True))
    expected, expected_gradient = gradient_of(lambda rows: LOSSES[name](rows, *unit[1:]), unit[0])
    loss, gradient = gradient_of(lambda rows: LOSSES[name](rows, teacher, bank), student)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(gradient * scales[0], expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slice_rows", SLICES)
@pytest.mark.parametrize("include_own", [False, True])
def test_rows_of_zeros_have_a_cosine_of_0_with_all_and_a_gradient_of_0(
    monkeypatch: pytest.MonkeyPatch, include_own: bool, slice_rows: int | str
) -> None:
    read_by(monkeypatch, slice_rows)
    student, teacher, bank = raw_rows(4, seed=1), raw_rows(4, seed=2), raw_rows(10, seed=3)
    student[1], teacher[2], bank[[0, 6]] = 0, 0, 0
    expected, expected_gradient = gradient_of(
        lambda rows: sum(naive_relational(rows, teacher, bank, 0.1, 0.05, include_own)[0]) / 4, student
    )
    loss, gradient = gradient_of(lambda rows: relational_loss(rows, teacher, bank, 0.1, 0.05, include_own), student)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)
    assert gradient[1].tolist() == [0.0] * DIM
    assert gradient[2].norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_grows_with_the_bank(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(losses, "SLICE_ROWS", 64)
    student, teacher = (raw_rows(8, 16, seed=n, dtype=torch.float32).requires_grad_() for n in (1, 2))
    for rows in (100, 10_000):
        bank = raw_rows(rows, 16, seed=3).to(dtype)
        with LargestTensor() as largest:
            relational_loss(student, teacher, bank, include_own=True).backward()
            losses.infonce_loss(student, teacher, bank).backward()
        assert largest.elements == 64 * 16  # a slice: of its logits for 16 queries, or of its rows


@pytest.mark.parametrize("slice_rows", [WHOLE, 3, "at once", "kernels", "accelerator 3"])
@pytest.mark.parametrize("include_own", [False, True])
def test_only_the_student_gets_a_gradient(
    monkeypatch: pytest.MonkeyPatch, include_own: bool, slice_rows: int | str
) -> None:
    read_by(monkeypatch, slice_rows)
    student, teacher, bank = (unit_rows(n, seed=n).requires_grad_() for n in (5, 5, 8))
    teacher = unit_rows(5, seed=99).requires_grad_()
    relational_loss(student, teacher, bank, include_own=include_own).backward()
    assert float(student.grad.norm()) > 0
    assert teacher.grad is None
    assert bank.grad is None


@pytest.mark.parametrize("slice_rows", [WHOLE, 7, "at once", "kernels", "accelerator 7"])
@pytest.mark.parametrize("include_own", [False, True])
def test_an_empty_bank_gives_a_loss_and_a_gradient_of_0(
    monkeypatch: pytest.MonkeyPatch, include_own: bool, slice_rows: int | str
) -> None:
    read_by(monkeypatch, slice_rows)
    loss, gradient = gradient_of(
        lambda rows: relational_loss(rows, unit_rows(3, seed=2), torch.empty(0, DIM), include_own=include_own),
        unit_rows(3, seed=1, dtype=torch.float32),
    )
    assert float(loss) == 0.0
    assert gradient.tolist() == [[0.0] * DIM] * 3


@pytest.mark.parametrize("slice_rows", [WHOLE, 7, "at once", "kernels", "accelerator 7"])
@pytest.mark.parametrize("include_own", [False, True])
def test_bfloat16_autocast_changes_no_bit_of_the_loss_and_its_gradient(
    monkeypatch: pytest.MonkeyPatch, include_own: bool, slice_rows: int | str
) -> None:
    read_by(monkeypatch, slice_rows)
    student, teacher, bank = (unit_rows(n, 16, seed=s, dtype=torch.float32) for n, s in ((6, 1), (6, 2), (20, 3)))
    loss, gradient = gradient_of(lambda rows: relational_loss(rows, teacher, bank, 0.1, 0.02, include_own), student)

    def under_autocast(rows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            assert (rows @ bank.T).dtype == torch.bfloat16
            return relational_loss(rows, teacher, bank, 0.1, 0.02, include_own)

    cast_loss, cast_gradient = gradient_of(under_autocast, student)
    assert cast_loss.dtype == torch.float32
    assert float(cast_loss) == float(loss)
    assert torch.equal(cast_gradient, gradient)


@pytest.mark.parametrize("slice_rows", [WHOLE, 7, "at once", "kernels", "accelerator 7"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_compared_in_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, slice_rows: int | str
) -> None:
    read_by(monkeypatch, slice_rows)
    student, teacher, bank = (raw_rows(n, 16, seed=s).to(dtype) for n, s in ((6, 1), (6, 2), (20, 3)))
    loss, gradient = gradient_of(lambda rows: relational_loss(rows, teacher, bank, include_own=True), student)
    expected, expected_gradient = gradient_of(
        lambda rows: relational_loss(rows, teacher.float(), bank.float(), include_own=True), student.float()
    )
    assert loss.dtype == torch.float32
    assert float(loss) == float(expected)
    assert torch.equal(gradient, expected_gradient.to(dtype))


@pytest.mark.parametrize("slice_rows", [WHOLE, 3, "at once", "kernels", "accelerator 3"])
def test_a_bank_written_between_loss_and_backward_leaves_the_gradient_as_it_was(
    monkeypatch: pytest.MonkeyPatch, slice_rows: int | str
) -> None:
    read_by(monkeypatch, slice_rows)
    start, teacher = unit_rows(4, seed=1), unit_rows(4, seed=2)
    bank = FeatureBank(6, DIM, dtype=torch.float64)
    bank.enqueue(unit_rows(6, seed=3))
    expected = gradient_of(lambda rows: relational_loss(rows, teacher, bank.filled), start)[1]
    student = start.clone().requires_grad_()
    loss = relational_loss(student, teacher, bank.filled)
    bank.enqueue(teacher)
    loss.backward()
    assert torch.equal(student.grad, expected)


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan")])
@pytest.mark.parametrize("name", ["student_temperature", "teacher_temperature"])
def test_relational_loss_names_a_temperature_that_is_not_positive(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be positive, got {value}"):
        relational_loss(unit_rows(2), unit_rows(2), unit_rows(3), **{name: value})


@pytest.mark.parametrize(
    ("student", "teacher", "bank", "message"),
    [
        ((2, 4), (2, 5), (3, 4), r"must have one width here, got 4 and 5\. Project the student"),
        ((2, 4), (3, 4), (3, 4), r"rows of the same examples, .* got \(2, 4\) and \(3, 4\)"),
        ((4,), (4,), (3, 4), r"rows of the same examples, .* got \(4,\) and \(4,\)"),
        ((2, 4), (2, 4), (3, 5), r"`bank` must have the shape \(bank, 4\), got \(3, 5\)"),
        ((2, 4), (2, 4), (4,), r"`bank` must have the shape \(bank, 4\), got \(4,\)"),
    ],
)
def test_relational_loss_names_the_shapes_that_do_not_agree(
    student: tuple[int, ...], teacher: tuple[int, ...], bank: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        relational_loss(torch.randn(student), torch.randn(teacher), torch.randn(bank))


@pytest.mark.gpu
@pytest.mark.parametrize("include_own", [False, True])
@pytest.mark.parametrize("slice_rows", [WHOLE, 7, "at once", "no kernels", "accelerator 7"])
@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [(torch.float64, "ieee", 1e-10), (torch.float32, "ieee", 1e-5), (torch.float32, "none", 0.02)],
)
def test_relational_loss_gives_on_cuda_what_they_give_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    precision: str,
    tolerance: float,
    slice_rows: int | str,
    include_own: bool,
) -> None:
    read_by(monkeypatch, slice_rows)
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # "none": TF32, as nobody told otherwise
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
    student, teacher, bank = (raw_rows(n, 16, seed=s, dtype=dtype) for n, s in ((9, 1), (9, 2), (50, 3)))
    bank = torch.cat([bank, teacher[:3]])  # copies of own rows
    loss, gradient = gradient_of(lambda rows: relational_loss(rows, teacher, bank, 0.1, 0.05, include_own), student)

    def on_cuda(rows: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return relational_loss(rows, teacher.cuda(), bank.cuda(), 0.1, 0.05, include_own)

    cuda_loss, cuda_gradient = gradient_of(on_cuda, student.cuda())
    torch.testing.assert_close(cuda_loss.cpu(), loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(cuda_gradient.cpu(), gradient, rtol=tolerance, atol=tolerance)


class Tf32(TorchDispatchMode):
    """Gives float32 products what a GPU may make of them: operands with 10 bits of mantissa, cut off or rounded."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.half = half  # added before the last 13 bits go

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            args = (*args[:-2], *map(self.rounded, args[-2:]))
        return func(*args, **(kwargs or {}))

    def rounded(self, values: Tensor) -> Tensor:
        return ((values.contiguous().view(torch.int32) + self.half) & -(2**13)).view(torch.float32)


@pytest.mark.parametrize("half", [0, 2**12])
@pytest.mark.parametrize("slice_rows", ["at once", "kernels", "accelerator 500"])
def test_products_in_tf32_still_find_all_copies_and_leave_loss_and_divergence_right_to_2_hundredths(
    monkeypatch: pytest.MonkeyPatch, slice_rows: str, half: int
) -> None:
    teacher = unit_rows(32, 64, seed=1, dtype=torch.float32)
    near = teacher.repeat(32, 1) + unit_rows(1024, 64, seed=2, dtype=torch.float32) * 0.8
    bank = torch.cat([teacher, F.normalize(near, dim=-1)])  # 32 copies of own keys, of which none may count
    student = F.normalize(teacher + unit_rows(32, 64, seed=3, dtype=torch.float32) * 0.3, dim=-1)

    def terms_and_gradient() -> tuple[Tensor, Tensor, Tensor]:
        rows = student.clone().requires_grad_()
        cross_entropy, divergence = relational_terms(rows, teacher, bank, include_own=True)
        cross_entropy.sum().backward()
        return cross_entropy.detach(), divergence.detach(), rows.grad

    expected = terms_and_gradient()
    read_by(monkeypatch, slice_rows)
    with Tf32(half):
        found = terms_and_gradient()
    errors = [float((one - other).abs().max()) for one, other in zip(found, expected, strict=True)]
    assert max(errors[:2]) < 0.02
    assert errors[2] < 0.005 * float(expected[2].abs().max())
    assert min(errors) > 1e-5  # it did round


@pytest.mark.parametrize(("was", "meanwhile"), [("none", "tf32"), ("ieee", "ieee"), ("tf32", "tf32")])
def test_cuda_products_are_in_tf32_unless_torch_was_told_to_be_exact(
    monkeypatch: pytest.MonkeyPatch, was: str, meanwhile: str
) -> None:
    matmul = SimpleNamespace(fp32_precision=was)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    with losses._tf32(torch.device("cuda")):
        assert matmul.fp32_precision == meanwhile
    with losses._tf32(torch.device("cpu")):
        assert matmul.fp32_precision == was
    monkeypatch.setattr(torch.backends.cuda, "matmul", old := SimpleNamespace(allow_tf32=False))  # torch 2.8
    with losses._tf32(torch.device("cuda")):
        assert vars(old) == {"allow_tf32": False}


def test_an_accelerator_reads_so_many_rows_that_the_logits_of_both_sides_take_1_gib() -> None:
    cuda, cpu, like = torch.device("cuda"), torch.device("cpu"), torch.empty(1, 384)
    assert losses._slice_rows(cuda, 2 * 256, like) == 2**30 // (2 * 256 * 4) == 524_288
    assert losses._slice_rows(cuda, 2 * 1024, like.double()) == 65_536
    assert losses._slice_rows(cpu, 2 * 64, like) == 2**19 // (2 * 64 + 384)


# ---- InfoNCE ----


@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize("slice_rows", [WHOLE, 6, "at once", "kernels", "accelerator 6"])
def test_infonce_is_the_loop_over_its_formula(
    rows: int, slice_rows: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_by(monkeypatch, slice_rows)
    student, teacher, bank = raw_rows(5, 4, 0).requires_grad_(), raw_rows(5, 4, 1), raw_rows(rows, 4, 2)
    expected = torch.zeros(()).double()
    for s, t in zip(student, teacher, strict=True):
        total = sum((naive_cosine(s, key) / 0.2).exp() for key in [*bank, t])
        expected = expected + (total.log() - naive_cosine(s, t) / 0.2) / 5
    found = losses.infonce_loss(student, teacher, bank, 0.2)
    assert abs(found - expected) < 1e-9
    (gradient,) = torch.autograd.grad(expected, student)
    (ours,) = torch.autograd.grad(found, student)
    assert (gradient - ours).abs().max() < 1e-9


def test_infonce_within_a_batch_is_cross_entropy_on_the_diagonal() -> None:
    student, teacher = unit_rows(6, 4, 0), unit_rows(6, 4, 1)
    expected = F.cross_entropy(student @ teacher.T / 0.1, torch.arange(6))
    assert abs(losses.infonce_loss(student, teacher, teacher) - expected) < 1e-9


@pytest.mark.parametrize(("bank", "came"), [(None, "NoneType"), (torch.zeros(9, 3), r"9, 3"), (torch.zeros(8), "8,")])
def test_a_bank_that_is_no_matrix_of_the_width_is_refused(bank: Any, came: str) -> None:
    with pytest.raises(ValueError, match=rf"`bank` must have the shape \(bank, 8\), got \(?{came}"):
        relational_loss(torch.randn(4, 8), torch.randn(4, 8), bank)
