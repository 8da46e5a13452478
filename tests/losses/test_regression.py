"""The losses without relations against loops over their formulas, in plain Python numbers."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_rrd.losses.regression import cosine_loss, mse_loss, srd_loss
from tests.losses.loops import gradient_of, naive_cosine, naive_mse, naive_srd, rotation, rows, slopes_of

NAIVE: dict[Callable[[Tensor, Tensor], Tensor], Callable[..., float]] = {
    cosine_loss: naive_cosine,
    mse_loss: naive_mse,
    srd_loss: naive_srd,
}


@pytest.mark.parametrize(("batch", "dim"), [(1, 1), (1, 5), (2, 1), (3, 5), (7, 5), (7, 3)])
@pytest.mark.parametrize("loss", NAIVE)
def test_each_loss_and_its_gradient_equal_a_loop_over_the_formula(
    loss: Callable[[Tensor, Tensor], Tensor], batch: int, dim: int
) -> None:
    student, teacher = 3 * rows(batch, dim, seed=1), rows(batch, dim, seed=2)
    value, gradient = gradient_of(lambda s: loss(s, teacher), student)
    assert value.shape == ()
    assert float(value) == pytest.approx(NAIVE[loss](student.tolist(), teacher.tolist()), rel=1e-9, abs=1e-9)
    torch.testing.assert_close(gradient, slopes_of(NAIVE[loss], student, teacher), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", [cosine_loss, mse_loss])
def test_a_rotation_changes_each_loss_unless_it_turns_both_sides(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher, turn = rows(6, 5, seed=1), rows(6, 5, seed=2), rotation(5)
    expected = float(loss(student, teacher))
    assert float(loss(student @ turn, teacher @ turn)) == pytest.approx(expected, rel=1e-9)
    assert float(loss(student @ turn, teacher)) != pytest.approx(expected, rel=1e-3)


def test_the_cosine_of_rows_of_any_scale_in_float32_is_that_of_float64() -> None:
    student, teacher = rows(6, 5, seed=1, dtype=torch.float32), rows(6, 5, seed=2, dtype=torch.float32)
    expected, expected_gradient = gradient_of(lambda s: cosine_loss(s, teacher.double()), student.double())
    for scale in (1e-17, 1e17):
        value, gradient = gradient_of(lambda s, c=scale: cosine_loss(s, teacher * c), student * scale)
        assert float(value) == pytest.approx(float(expected), rel=1e-6)
        torch.testing.assert_close(gradient * scale, expected_gradient.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", NAIVE)
def test_each_loss_names_widths_that_differ(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="`student` and `teacher` must have one width here, got 4 and 5"):
        loss(torch.randn(3, 4), torch.randn(3, 5))


def test_srd_does_not_see_scale_and_translation_of_a_dimension() -> None:
    student, teacher = rows(40, 5, seed=1), rows(40, 5, seed=2)
    scales = torch.tensor([[0.5, 1.0, 20.0, 3.0, 7.0]], dtype=torch.float64)
    expected = float(srd_loss(student, teacher))
    assert float(srd_loss(student * scales + rows(1, 5, seed=3), teacher)) == pytest.approx(expected, abs=1e-4)
    assert float(srd_loss(student, teacher * scales + 5)) == pytest.approx(expected, abs=1e-4)
    assert float(srd_loss(-student, -teacher)) == pytest.approx(expected, rel=1e-12)


def test_srd_has_its_floor_at_the_teacher_and_counts_a_dimension_that_is_constant_as_uncorrelated() -> None:
    teacher = rows(8, 5, seed=1)
    assert float(srd_loss(teacher * 3 + 1, teacher)) == pytest.approx(math.log(1e-5), abs=1e-9)
    student = teacher.clone()
    student[:, 2] = 0.3
    assert float(srd_loss(student, teacher)) == pytest.approx(math.log(1 + 1e-5), abs=1e-9)
    loss, gradient = gradient_of(lambda s: srd_loss(s, teacher), torch.zeros_like(teacher))
    assert float(loss) == pytest.approx(math.log(5 + 1e-5), abs=1e-9)
    assert gradient.isfinite().all()
