"""Distillation on logits against loops over its formula."""

import math

import pytest
import torch
from torch import Tensor

from hf_rrd.losses import logits as losses
from hf_rrd.losses.logits import dist_loss, logit_loss, logit_terms
from tests.losses.loops import LargestTensor, correlation, gradient_of, slopes_of


def naive_logit_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    total = torch.zeros(()).double()
    for i in range(len(student_logits)):
        student_exp = [(z / temperature).exp() for z in student_logits[i]]
        teacher_exp = [(z / temperature).exp() for z in teacher_logits[i]]
        for k in range(student_logits.shape[1]):
            student_prob, teacher_prob = student_exp[k] / sum(student_exp), teacher_exp[k] / sum(teacher_exp)
            total = total + teacher_prob * (teacher_prob.log() - student_prob.log())
    return temperature**2 * total / len(student_logits)


def logits(*shape: int, seed: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (5, 3), (3, 11)])
def test_logit_loss_and_its_gradient_equal_a_loop_over_the_formula(
    batch: int, classes: int, temperature: float
) -> None:
    student, teacher = logits(batch, classes, seed=1), logits(batch, classes, seed=2)
    expected, expected_gradient = gradient_of(lambda rows: naive_logit_loss(rows, teacher, temperature), student)
    loss, gradient = gradient_of(lambda rows: logit_loss(rows, teacher, temperature), student)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


def test_logit_terms_of_a_sequence_equal_those_of_its_tokens_one_by_one() -> None:
    student, teacher = logits(2, 3, 5, seed=1), logits(2, 3, 5, seed=2)
    terms = logit_terms(student, teacher, 2.0)
    assert terms.shape == (2, 3)
    for i in range(2):
        for token in range(3):
            expected = naive_logit_loss(student[i, token : token + 1], teacher[i, token : token + 1], 2.0)
            assert float(terms[i, token]) == pytest.approx(float(expected), rel=1e-9)
    assert float(logit_loss(student, teacher, 2.0)) == pytest.approx(float(terms.mean()), rel=1e-12)


@pytest.mark.parametrize("at_a_time", [1, 11, 33, 10_000])
def test_however_many_rows_are_compared_at_a_time_the_terms_and_their_gradients_are_the_same(
    monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    monkeypatch.setattr(losses, "CACHED", at_a_time)
    student, teacher, weights = logits(7, 11, seed=1), logits(7, 11, seed=2), logits(7, seed=3)

    def naive(rows: Tensor) -> Tensor:
        each = [naive_logit_loss(rows[i : i + 1], teacher[i : i + 1], 2.0) for i in range(7)]
        return (torch.stack(each) * weights).sum()

    expected, expected_gradient = gradient_of(naive, student)
    loss, gradient = gradient_of(lambda rows: (logit_terms(rows, teacher, 2.0) * weights).sum(), student)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float32, 1e-4)])
def test_half_precision_costs_the_gradient_no_more_than_its_rounding(dtype: torch.dtype, rtol: float) -> None:
    student, teacher = (logits(3, 5000, seed=seed).to(dtype) for seed in (1, 2))
    leaf = student.clone().requires_grad_()
    (logit_terms(leaf, teacher, 1.0).sum() * 2**12).backward()  # scaled, as float16 is trained
    assert leaf.grad is not None and leaf.grad.dtype == dtype
    _, exact = gradient_of(lambda rows: logit_terms(rows, teacher.double(), 1.0).sum() * 2**12, student.double())
    assert ((leaf.grad.double() - exact).norm() / exact.norm()) < rtol
    small = (exact.abs() > 2**-14) & (exact.abs() < 2**-12)  # float16 has these, and before the scale not
    assert small.any() and ((leaf.grad.double() - exact)[small].norm() / exact[small].norm()) < 2 * rtol


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_a_vocabulary_nothing_is_made_whole_but_the_gradient(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(losses, "CACHED", 2 * 1000)
    student, teacher = (logits(8, 20, 1000, seed=seed).to(dtype) for seed in (1, 2))
    with torch.no_grad(), LargestTensor() as largest:
        logit_terms(student, teacher, 4.0)
    assert largest.elements == 2 * 1000
    student.requires_grad_()
    with LargestTensor() as largest:
        terms = logit_terms(student, teacher, 4.0)
    assert largest.whole == [(torch.Size([160, 1000]), dtype)]
    terms.sum().backward()
    assert student.grad is not None and student.grad.dtype == dtype


def test_several_labels_at_once_are_each_a_choice_between_yes_and_no() -> None:
    student, teacher = logits(5, 3, seed=1), logits(5, 3, seed=2)

    def naive(rows: Tensor) -> Tensor:
        total = torch.zeros(()).double()
        for i in range(5):
            for k in range(3):
                zero = torch.zeros(1).double()  # yes or no is a softmax over the logit and 0
                mine, theirs = (torch.cat([each[i, k : k + 1], zero]) for each in (rows, teacher))
                total = total + naive_logit_loss(mine[None], theirs[None], 2.0) / 15
        return total

    expected, expected_gradient = gradient_of(naive, student)
    kind = "multi_label_classification"
    loss, gradient = gradient_of(lambda rows: logit_loss(rows, teacher, 2.0, kind), student)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)
    assert logit_terms(student, teacher, 2.0, kind).shape == (5,)
    huge = 1e4 * student.float()
    assert logit_loss(huge, -huge, 2.0, kind).isfinite()


def test_numbers_differ_by_their_squares_whatever_the_temperature() -> None:
    student, teacher = torch.tensor([[1.0], [4.0]]), torch.tensor([[2.0], [1.0]])
    for temperature in (1.0, 4.0):
        loss, gradient = gradient_of(lambda rows, t=temperature: logit_loss(rows, teacher, t, "regression"), student)
        assert float(loss) == 5.0
        assert gradient.tolist() == [[-1.0], [3.0]]


def test_classes_that_are_no_candidates_are_left_out_of_the_softmax() -> None:
    student, teacher = logits(4, 6, seed=1), logits(4, 6, seed=2)
    candidates = torch.tensor([True, False, True, True, False, True])
    expected = logit_terms(student[:, candidates], teacher[:, candidates], 0.5)
    torch.testing.assert_close(logit_terms(student, teacher, 0.5, candidates=candidates), expected)
    _, gradient = gradient_of(lambda rows: logit_terms(rows, teacher, 0.5, candidates=candidates).mean(), student)
    assert gradient.isfinite().all() and (gradient[:, ~candidates] == 0).all()


def test_the_squared_temperature_keeps_the_gradient_at_the_scale_of_centred_logits() -> None:
    student, teacher = logits(6, 10, seed=1), logits(6, 10, seed=2)
    difference = student - teacher
    limit = (difference - difference.mean(-1, keepdim=True)) / (10 * 6)  # of the gradient, as temperature grows
    for temperature in (1e3, 1e4):
        gradient = gradient_of(lambda rows, t=temperature: logit_loss(rows, teacher, t), student)[1]
        assert float((gradient - limit).norm() / limit.norm()) < 20 / temperature


def test_logit_loss_is_exactly_0_at_equal_logits() -> None:
    student = logits(5, 7, seed=1).float()
    loss, gradient = gradient_of(lambda rows: logit_loss(rows, student.clone()), student)
    assert float(loss) == 0.0
    assert float(gradient.abs().max()) < 1e-6


def test_logit_loss_gives_the_teacher_no_gradient() -> None:
    student, teacher = logits(3, 4, seed=1).requires_grad_(), logits(3, 4, seed=2).requires_grad_()
    logit_loss(student, teacher).backward()
    assert float(student.grad.norm()) > 0
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logit_loss_is_computed_in_float32_also_under_autocast(dtype: torch.dtype) -> None:
    student, teacher = logits(5, 7, seed=1).to(dtype), logits(5, 7, seed=2).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = logit_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert float(loss) == float(logit_loss(student.float(), teacher.float()))


def test_logit_loss_says_which_problem_types_there_are() -> None:
    with pytest.raises(ValueError, match="`problem_type` must be one of .*'regression'.*, got 'ranking'"):
        logit_loss(torch.randn(2, 3), torch.randn(2, 3), problem_type="ranking")


@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "message"),
    [
        ((2, 3), (2, 4), 4.0, r"same classes on both sides, .* got student logits of shape \(2, 3\) and .* \(2, 4\)"),
        ((2, 3), (3, 3), 4.0, r"student logits of shape \(2, 3\) and teacher logits of shape \(3, 3\)"),
        ((2, 1), (2, 1), 4.0, r"at least 2 of them, .* got student logits of shape \(2, 1\)"),
        ((2, 3), (2, 3), 0.0, "`temperature` must be positive, got 0.0"),
        ((2, 3), (2, 3), -1.0, "`temperature` must be positive, got -1.0"),
    ],
)
def test_logit_loss_says_what_is_wrong_with_its_arguments(
    student: tuple[int, ...], teacher: tuple[int, ...], temperature: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        logit_loss(torch.randn(student), torch.randn(teacher), temperature)


def naive_dist(student: list[list[float]], teacher: list[list[float]], temperature: float) -> float:
    def probabilities(rows: list[list[float]]) -> list[list[float]]:
        powers = [[math.exp(z / temperature) for z in row] for row in rows]
        return [[power / math.fsum(row) for power in row] for row in powers]

    sides = [probabilities(side) for side in (student, teacher)]
    loss = 0.0
    for one, other in (sides, [list(zip(*side, strict=True)) for side in sides]):
        loss += 1 - math.fsum(correlation(a, b, 1e-8) for a, b in zip(one, other, strict=True)) / len(one)
    return loss


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("batch", "classes"), [(1, 3), (5, 3), (3, 11)])
def test_dist_and_its_gradient_equal_a_loop_over_the_formula(batch: int, classes: int, temperature: float) -> None:
    student, teacher = logits(batch, classes, seed=1), logits(batch, classes, seed=2)
    loss, gradient = gradient_of(lambda rows: dist_loss(rows, teacher, temperature), student)

    def naive(rows: list[list[float]], others: list[list[float]]) -> float:
        return naive_dist(rows, others, temperature)

    assert loss.shape == ()
    assert float(loss) == pytest.approx(naive(student.tolist(), teacher.tolist()), rel=1e-9)
    torch.testing.assert_close(gradient, slopes_of(naive, student, teacher), rtol=1e-5, atol=1e-6)


def test_dist_is_0_at_the_teacher_4_at_its_opposite_and_2_where_all_is_alike() -> None:
    teacher = logits(6, 2, seed=1)
    assert float(dist_loss(teacher, teacher)) == pytest.approx(0, abs=1e-5)
    assert float(dist_loss(-teacher, teacher)) == pytest.approx(4, abs=1e-5)
    loss, gradient = gradient_of(lambda rows: dist_loss(rows, teacher), torch.zeros_like(teacher).float())
    assert float(loss) == pytest.approx(2, abs=1e-5)
    assert gradient.isfinite().all()


def test_dist_gives_only_the_student_a_gradient_and_names_what_is_wrong() -> None:
    student, teacher = logits(4, 3, seed=1).requires_grad_(), logits(4, 3, seed=2).requires_grad_()
    dist_loss(student, teacher).backward()
    assert float(student.grad.norm()) > 0
    assert teacher.grad is None
    with pytest.raises(ValueError, match="`student` and `teacher` must have one width here, got 3 and 2"):
        dist_loss(student, teacher[:, :2])
    with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
        dist_loss(student, teacher, 0.0)
