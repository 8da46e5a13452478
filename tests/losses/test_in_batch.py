"""The losses on a batch against loops over their formulas, in plain Python numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rrd.losses.in_batch import (
    BATCH_LOSSES,
    FEWEST_EXAMPLES,
    correlation_congruence_loss,
    own_space_loss,
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_preserving_loss,
)
from hf_rrd.losses.regression import cosine_loss, mse_loss, srd_loss
from tests.losses.loops import (
    Rows,
    cosine,
    dot,
    gradient_of,
    minus,
    naive_cosine,
    naive_mse,
    naive_srd,
    rotation,
    rows,
    slopes_of,
)

ONE_WIDTH = ["cosine", "mse", "srd"]
RELATIONAL = [name for name in BATCH_LOSSES if name not in ONE_WIDTH]
SIZES = [(1, 1, 1), (1, 5, 2), (2, 1, 1), (2, 5, 3), (3, 1, 5), (3, 5, 5), (7, 5, 1), (7, 1, 1), (7, 5, 5), (7, 3, 5)]
"""(batch, student_dim, teacher_dim)."""


def huber(a: float, b: float) -> float:
    return (a - b) ** 2 / 2 if abs(a - b) <= 1 else abs(a - b) - 0.5


def naive_rkd_distance(student: Rows, teacher: Rows) -> float:
    pairs = [(i, j) for i in range(len(student)) for j in range(len(student)) if i != j]
    if not pairs:
        return 0.0

    def potential(side: Rows, i: int, j: int) -> float:
        mean = math.fsum(math.dist(side[a], side[b]) for a, b in pairs) / len(pairs)
        return math.dist(side[i], side[j]) / mean if mean > 0 else 0.0

    return math.fsum(huber(potential(student, i, j), potential(teacher, i, j)) for i, j in pairs) / len(pairs)


def naive_rkd_angle(student: Rows, teacher: Rows) -> float:
    terms = []
    for i in range(len(student)):
        for j in range(len(student)):
            for k in range(len(student)):
                if i != j and j != k and i != k:
                    at_j = [cosine(minus(s[i], s[j]), minus(s[k], s[j])) for s in (student, teacher)]
                    terms.append(huber(*at_j))
    return math.fsum(terms) / len(terms) if terms else 0.0


def naive_similarity_preserving(student: Rows, teacher: Rows) -> float:
    def entry(side: Rows, i: int, j: int) -> float:
        length = math.sqrt(math.fsum(dot(side[i], other) ** 2 for other in side))
        return dot(side[i], side[j]) / length if length > 0 else 0.0

    batch = range(len(student))
    return (
        math.fsum((entry(student, i, j) - entry(teacher, i, j)) ** 2 for i in batch for j in batch) / len(batch) ** 2
    )


def naive_pkt(student: Rows, teacher: Rows) -> float:
    def kernel(side: Rows, i: int, j: int) -> float:
        return max((cosine(side[i], side[j]) + 1) / 2, 2**-52)

    total = 0.0
    for i in range(len(student)):
        others = [j for j in range(len(student)) if j != i]
        for j in others:
            teacher_prob = kernel(teacher, i, j) / math.fsum(kernel(teacher, i, k) for k in others)
            student_prob = kernel(student, i, j) / math.fsum(kernel(student, i, k) for k in others)
            total += teacher_prob * math.log(teacher_prob / student_prob)
    return total / len(student)


def naive_correlation_congruence(student: Rows, teacher: Rows, gamma: float = 0.4, order: int = 2) -> float:
    def kernel(side: Rows, i: int, j: int) -> float:
        terms = [(2 * gamma) ** p / math.factorial(p) * cosine(side[i], side[j]) ** p for p in range(order + 1)]
        return math.exp(-2 * gamma) * math.fsum(terms)

    batch = range(len(student))
    return sum((kernel(student, i, j) - kernel(teacher, i, j)) ** 2 for i in batch for j in batch) / len(batch) ** 2


NAIVE = {
    "rkd_distance": naive_rkd_distance,
    "rkd_angle": naive_rkd_angle,
    "similarity_preserving": naive_similarity_preserving,
    "pkt": naive_pkt,
    "correlation_congruence": naive_correlation_congruence,
    "cosine": naive_cosine,
    "mse": naive_mse,
    "srd": naive_srd,
}


def test_the_table_names_the_losses_of_the_module_and_those_of_regression() -> None:
    assert BATCH_LOSSES == {
        "rkd_distance": rkd_distance_loss,
        "rkd_angle": rkd_angle_loss,
        "similarity_preserving": similarity_preserving_loss,
        "pkt": pkt_loss,
        "correlation_congruence": correlation_congruence_loss,
        "cosine": cosine_loss,
        "mse": mse_loss,
        "srd": srd_loss,
    }


@pytest.mark.parametrize(("batch", "student_dim", "teacher_dim"), SIZES)
@pytest.mark.parametrize("name", RELATIONAL)
def test_each_loss_and_its_gradient_equal_a_loop_over_the_formula(
    name: str, batch: int, student_dim: int, teacher_dim: int
) -> None:
    student, teacher = rows(batch, student_dim, seed=1), rows(batch, teacher_dim, seed=2)
    loss, gradient = gradient_of(lambda s: BATCH_LOSSES[name](s, teacher), student)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(NAIVE[name](student.tolist(), teacher.tolist()), rel=1e-9, abs=1e-9)
    torch.testing.assert_close(gradient, slopes_of(NAIVE[name], student, teacher), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_the_relational_losses_of_park_are_linear_beyond_a_difference_of_1(name: str) -> None:
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.1], [50.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-30.0, 0.1], [0.5, 0.0]], dtype=torch.float64)
    loss, gradient = gradient_of(lambda s: BATCH_LOSSES[name](s, teacher), student)
    assert float(loss) == pytest.approx(NAIVE[name](student.tolist(), teacher.tolist()), rel=1e-9)
    assert float(loss) > 0.5
    torch.testing.assert_close(gradient, slopes_of(NAIVE[name], student, teacher), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.05, 0.4, 2.0])
@pytest.mark.parametrize("order", [1, 2, 5])
def test_correlation_congruence_cuts_its_series_after_the_order(gamma: float, order: int) -> None:
    student, teacher = rows(4, 3, seed=1), rows(4, 6, seed=2)
    loss, gradient = gradient_of(lambda s: correlation_congruence_loss(s, teacher, gamma, order), student)

    def naive(s: Rows, t: Rows) -> float:
        return naive_correlation_congruence(s, t, gamma, order)

    assert float(loss) == pytest.approx(naive(student.tolist(), teacher.tolist()), rel=1e-9)
    torch.testing.assert_close(gradient, slopes_of(naive, student, teacher), rtol=1e-6, atol=1e-7)


def test_correlation_congruence_of_a_high_order_compares_gaussian_kernels() -> None:
    student, teacher = F.normalize(rows(5, 3, seed=1), dim=-1), F.normalize(rows(5, 4, seed=2), dim=-1)
    student_kernel, teacher_kernel = ((-0.4 * torch.cdist(r, r) ** 2).exp() for r in (student, teacher))
    expected = float((student_kernel - teacher_kernel).square().mean())
    assert float(correlation_congruence_loss(student, teacher, 0.4, order=20)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", RELATIONAL)
def test_the_scale_and_the_rotation_of_one_side_change_no_relational_loss(name: str, side: str) -> None:
    student, teacher = rows(6, 5, seed=1), rows(6, 4, seed=2)
    expected = float(BATCH_LOSSES[name](student, teacher))
    assert expected > 1e-3
    if side == "student":
        student = 7.5 * student @ rotation(5)
    else:
        teacher = 0.02 * teacher @ rotation(4)
    assert float(BATCH_LOSSES[name](student, teacher)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", RELATIONAL)
def test_the_translation_of_one_side_changes_all_but_the_losses_on_differences(name: str) -> None:
    student, teacher = rows(6, 5, seed=1), rows(6, 4, seed=2)
    expected = float(BATCH_LOSSES[name](student, teacher))
    moved = float(BATCH_LOSSES[name](student + 3 * rows(1, 5, seed=3), teacher))
    assert (moved == pytest.approx(expected, rel=1e-9)) == (name in ["rkd_distance", "rkd_angle"])


@pytest.mark.parametrize("name", BATCH_LOSSES)
def test_the_scale_of_single_rows_changes_all_but_the_losses_on_cosines(name: str) -> None:
    student, teacher = rows(6, 5, seed=1), rows(6, 5, seed=2)
    scales = torch.tensor([[0.1], [1.0], [20.0], [3.0], [0.5], [7.0]], dtype=torch.float64)
    expected = float(BATCH_LOSSES[name](student, teacher))
    student_scaled = float(BATCH_LOSSES[name](student * scales, teacher))
    teacher_scaled = float(BATCH_LOSSES[name](student, teacher * scales))
    on_cosines = name in ["pkt", "correlation_congruence", "cosine"]
    assert (student_scaled == pytest.approx(expected, rel=1e-9)) == on_cosines
    assert (teacher_scaled == pytest.approx(expected, rel=1e-9)) == on_cosines


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 1e-7)])
@pytest.mark.parametrize("name", [name for name in BATCH_LOSSES if name != "srd"])
def test_each_loss_and_its_gradient_are_0_at_the_teacher(name: str, dtype: torch.dtype, tolerance: float) -> None:
    teacher = rows(6, 5, seed=1, dtype=dtype)
    loss, gradient = gradient_of(lambda s: BATCH_LOSSES[name](s, teacher), teacher)
    assert abs(float(loss)) <= tolerance
    assert float(gradient.abs().max()) <= tolerance


@pytest.mark.parametrize("name", RELATIONAL)
def test_relational_losses_are_0_at_a_turned_and_scaled_teacher_in_a_wider_space(name: str) -> None:
    teacher = rows(6, 3, seed=1)
    student = 4 * F.pad(teacher, (0, 2)) @ rotation(5)
    assert abs(float(BATCH_LOSSES[name](student, teacher))) < 1e-15


@pytest.mark.parametrize("name", BATCH_LOSSES)
def test_gradient_descent_from_a_random_student_brings_each_loss_to_a_tenth(name: str) -> None:
    student, teacher = rows(6, 5, seed=1).requires_grad_(), rows(6, 5, seed=2)
    optimizer = torch.optim.Adam([student], lr=0.05)
    start = float(BATCH_LOSSES[name](student.detach(), teacher))
    for _ in range(200):
        optimizer.zero_grad()
        BATCH_LOSSES[name](student, teacher).backward()
        optimizer.step()
    assert float(BATCH_LOSSES[name](student.detach(), teacher)) < start / 10


@pytest.mark.parametrize("name", BATCH_LOSSES)
def test_only_the_student_gets_a_gradient(name: str) -> None:
    student, teacher = rows(5, seed=1).requires_grad_(), rows(5, seed=2).requires_grad_()
    BATCH_LOSSES[name](student, teacher).backward()
    assert float(student.grad.norm()) > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", RELATIONAL)
def test_a_batch_without_relations_has_a_loss_and_a_gradient_of_0(name: str) -> None:
    for batch in (1, 2) if name in ["rkd_distance", "rkd_angle", "pkt"] else (1,):
        loss, gradient = gradient_of(lambda s, n=batch: BATCH_LOSSES[name](s, rows(n, 3, seed=2)), rows(batch, seed=1))
        assert abs(float(loss)) < 1e-15
        assert float(gradient.abs().max()) < 1e-15


def degenerate(kind: str, dtype: torch.dtype) -> Tensor:
    values = rows(6, seed=1, dtype=dtype)
    if kind == "two rows coincide":
        values[3] = values[1]
    elif kind == "all rows coincide":
        values[:] = values[0].clone()
    elif kind == "one row is 0":
        values[2] = 0
    elif kind == "all rows are 0":
        values[:] = 0
    elif kind == "two rows are opposite":
        values[3] = -values[1]
    elif kind == "rows too small to square":
        values = values * torch.finfo(dtype).tiny
    return values


DEGENERATE = [
    "two rows coincide",
    "all rows coincide",
    "one row is 0",
    "all rows are 0",
    "two rows are opposite",
    "rows too small to square",
]


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("name", BATCH_LOSSES)
def test_degenerate_rows_give_a_finite_loss_and_a_gradient_of_ordinary_size(name: str, kind: str, side: str) -> None:
    for dtype in (torch.float32, torch.float64):
        plain, odd = rows(6, seed=2, dtype=dtype), degenerate(kind, dtype)
        student, teacher = (plain if side == "teacher" else odd), (plain if side == "student" else odd)
        loss, gradient = gradient_of(lambda s, t=teacher: BATCH_LOSSES[name](s, t), student)
        assert math.isfinite(loss)
        # Over a student without variance SRD divides by the root of 1e-5.
        assert float(gradient.abs().max()) < (100 if name == "srd" else 10)


@pytest.mark.parametrize("kind", DEGENERATE[:-1])
@pytest.mark.parametrize("name", BATCH_LOSSES)
def test_degenerate_rows_have_the_loss_of_the_loop(name: str, kind: str) -> None:
    odd, plain = degenerate(kind, torch.float64), rows(6, seed=2)
    for student, teacher in ((odd, plain), (plain, odd)):
        expected = NAIVE[name](student.tolist(), teacher.tolist())
        # Opposite rows: how close to the floor of PKT the affinity comes is a matter of rounding.
        tolerance = 1e-6 if kind == "two rows are opposite" else 1e-9
        assert float(BATCH_LOSSES[name](student, teacher)) == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_losses_on_differences_stay_exact_in_float32_where_rows_nearly_coincide(name: str) -> None:
    centres = F.normalize(rows(4, 32, seed=1), dim=-1).repeat_interleave(4, dim=0)
    student, teacher = ((centres + 1e-3 * rows(16, 32, seed=s)).float() for s in (2, 3))
    loss, gradient = gradient_of(lambda s: BATCH_LOSSES[name](s, teacher), student)
    expected, expected_gradient = gradient_of(lambda s: BATCH_LOSSES[name](s, teacher.double()), student.double())
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < 1e-2


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("rkd_distance", 1e-6),
        ("rkd_angle", 1e-6),
        ("similarity_preserving", 1e-6),
        ("pkt", 5e-5),  # its terms of both signs nearly cancel
        ("correlation_congruence", 1e-6),
        ("cosine", 1e-6),
        ("mse", 1e-6),
        ("srd", 1e-6),
    ],
)
def test_float32_is_as_good_as_float64_for_64_unit_rows_of_384(name: str, tolerance: float) -> None:
    teacher = F.normalize(rows(64, 384, seed=1, dtype=torch.float32), dim=-1)
    student = F.normalize(teacher + 0.05 * rows(64, 384, seed=2, dtype=torch.float32), dim=-1)
    loss, gradient = gradient_of(lambda s: BATCH_LOSSES[name](s, teacher), student)
    expected, expected_gradient = gradient_of(lambda s: BATCH_LOSSES[name](s, teacher.double()), student.double())
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=tolerance)
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < 1e-5


@pytest.mark.parametrize("name", BATCH_LOSSES)
def test_bfloat16_autocast_changes_no_bit_of_the_loss_and_its_gradient(name: str) -> None:
    student, teacher = rows(6, seed=1, dtype=torch.float32), rows(6, seed=2, dtype=torch.float32)
    loss, gradient = gradient_of(lambda s: BATCH_LOSSES[name](s, teacher), student)

    def under_autocast(s: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            assert (s @ teacher.T).dtype == torch.bfloat16
            return BATCH_LOSSES[name](s, teacher)

    cast_loss, cast_gradient = gradient_of(under_autocast, student)
    assert cast_loss.dtype == torch.float32
    assert float(cast_loss) == float(loss)
    assert torch.equal(cast_gradient, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BATCH_LOSSES)
def test_half_precision_rows_are_compared_in_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher = rows(6, seed=1, dtype=dtype), rows(6, seed=2, dtype=dtype)
    loss, gradient = gradient_of(lambda s: BATCH_LOSSES[name](s, teacher), student)
    expected, expected_gradient = gradient_of(lambda s: BATCH_LOSSES[name](s, teacher.float()), student.float())
    assert loss.dtype == torch.float32
    assert float(loss) == float(expected)
    assert torch.equal(gradient, expected_gradient.to(dtype))


@pytest.mark.parametrize(
    ("student", "teacher", "got"),
    [
        ((2, 4), (3, 4), r"\(2, 4\) and \(3, 4\)"),
        ((4,), (4,), r"\(4,\) and \(4,\)"),
        ((2, 4), (2, 1, 4), r"\(2, 4\) and \(2, 1, 4\)"),
        ((2, 1, 4), (2, 4), r"\(2, 1, 4\) and \(2, 4\)"),
        ((0, 4), (0, 4), r"\(0, 4\) and \(0, 4\)"),
    ],
)
@pytest.mark.parametrize("name", BATCH_LOSSES)
def test_each_loss_names_the_shapes_that_are_not_rows_of_the_same_examples(
    name: str, student: tuple[int, ...], teacher: tuple[int, ...], got: str
) -> None:
    with pytest.raises(ValueError, match=r"`student` and `teacher` must be rows of the same examples.*" + got):
        BATCH_LOSSES[name](torch.randn(student), torch.randn(teacher))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"gamma": 0.0}, "`gamma` must be positive, got 0.0"),
        ({"gamma": -1.0}, "`gamma` must be positive, got -1.0"),
        ({"gamma": float("nan")}, "`gamma` must be positive, got nan"),
        ({"order": 0}, "`order` must be at least 1, got 0"),
    ],
)
def test_correlation_congruence_names_an_option_out_of_range(option: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        correlation_congruence_loss(rows(3), rows(3), **option)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", *DEGENERATE[:4]])
@pytest.mark.parametrize("name", BATCH_LOSSES)
def test_each_loss_gives_on_cuda_what_it_gives_on_the_cpu(name: str, kind: str) -> None:
    student, teacher = degenerate(kind, torch.float64), rows(6, seed=2)
    loss, gradient = gradient_of(lambda s: BATCH_LOSSES[name](s, teacher), student)
    with torch.autocast("cuda", torch.bfloat16):
        cuda_loss, cuda_gradient = gradient_of(lambda s: BATCH_LOSSES[name](s, teacher.cuda()), student.cuda())
    torch.testing.assert_close(cuda_loss.cpu(), loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cuda_gradient.cpu(), gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BATCH_LOSSES)
def test_a_loss_teaches_from_its_fewest_examples_on_and_is_0_below(name: str) -> None:
    fewest = FEWEST_EXAMPLES[name]
    norms = []
    for count in (fewest - 1, fewest):
        if count > 0:
            student = torch.randn(count, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
            teacher = torch.randn(count, 5, generator=torch.Generator().manual_seed(1))
            loss = BATCH_LOSSES[name](student, teacher).mean()
            loss.backward()
            norms.append((abs(float(loss.detach())), float(student.grad.norm())))
    *below, (loss_there, gradient) = norms
    assert below == [(0.0, 0.0)] * (fewest > 1)
    assert min(loss_there, gradient) > 1e-3


# ---- Each side in a space of its own ----


def naive_own_space(student: Rows, teacher: Rows, student_temperature: float, teacher_temperature: float) -> float:
    total = 0.0
    for i in range(len(student)):
        others = [j for j in range(len(student)) if j != i]
        powers = [
            [math.exp(cosine(side[i], side[j]) / temperature) for j in others]
            for side, temperature in ((student, student_temperature), (teacher, teacher_temperature))
        ]
        probs = [[power / math.fsum(side) for power in side] for side in powers]
        total -= math.fsum(t * math.log(s) for s, t in zip(*probs, strict=True))
    return total / len(student)


@pytest.mark.parametrize(("batch", "student_dim", "teacher_dim"), SIZES)
@pytest.mark.parametrize("temperatures", [(0.1, 0.05), (1.0, 2.0)])
def test_own_space_and_its_gradient_equal_a_loop_over_the_formula(
    batch: int, student_dim: int, teacher_dim: int, temperatures: tuple[float, float]
) -> None:
    student, teacher = rows(batch, student_dim, seed=1), rows(batch, teacher_dim, seed=2)
    loss, gradient = gradient_of(lambda s: own_space_loss(s, teacher, *temperatures), student)

    def naive(s: Rows, t: Rows) -> float:
        return naive_own_space(s, t, *temperatures)

    assert loss.shape == ()
    assert float(loss) == pytest.approx(naive(student.tolist(), teacher.tolist()), rel=1e-9, abs=1e-9)
    torch.testing.assert_close(gradient, slopes_of(naive, student, teacher), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_own_space_does_not_see_scale_and_rotation_of_a_side(side: str) -> None:
    student, teacher = rows(6, 5, seed=1), rows(6, 4, seed=2)
    expected = float(own_space_loss(student, teacher))
    scales = torch.arange(1, 7, dtype=torch.float64)[:, None]
    if side == "student":
        student = scales * student @ rotation(5)
    else:
        teacher = scales * teacher @ rotation(4)
    assert float(own_space_loss(student, teacher)) == pytest.approx(expected, rel=1e-9)


def test_own_space_is_the_teachers_entropy_where_both_sides_agree_and_its_gradient_is_0_there() -> None:
    teacher = rows(6, 5, seed=1)
    loss, gradient = gradient_of(lambda s: own_space_loss(s, teacher, 0.2, 0.2), 4 * teacher @ rotation(5))
    assert float(loss) == pytest.approx(naive_own_space(teacher.tolist(), teacher.tolist(), 0.2, 0.2), rel=1e-9)
    assert float(gradient.abs().max()) < 1e-12


@pytest.mark.parametrize("count", [1, 2])
def test_own_space_is_0_where_there_are_no_others_to_choose_from(count: int) -> None:
    assert FEWEST_EXAMPLES["own_space"] == 3
    loss, gradient = gradient_of(lambda s: own_space_loss(s, rows(count, 3, seed=2)), rows(count, seed=1))
    assert float(loss) == 0
    assert float(gradient.abs().max()) == 0


@pytest.mark.parametrize("kind", DEGENERATE)
def test_own_space_of_degenerate_rows_is_finite_and_teaches_the_student_alone(kind: str) -> None:
    for dtype in (torch.float32, torch.float64):
        student, teacher = degenerate(kind, dtype), rows(6, 3, seed=2, dtype=dtype).requires_grad_()
        for given in (student, rows(6, seed=3, dtype=dtype)):
            loss, gradient = gradient_of(lambda s, t=teacher: own_space_loss(s, t), given)
            assert math.isfinite(loss)
            assert float(gradient.abs().max()) < 100
        assert teacher.grad is None
        swapped, _ = gradient_of(lambda s, t=student: own_space_loss(s, t), rows(6, seed=3, dtype=dtype))
        assert math.isfinite(swapped)


@pytest.mark.parametrize("name", ["student_temperature", "teacher_temperature"])
def test_own_space_names_a_temperature_that_is_not_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be positive, got 0.0"):
        own_space_loss(rows(3), rows(3), **{name: 0.0})
