"""The losses without relations against loops over their formulas, in plain Python numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_rrd.losses.regression import cosine_loss, mse_loss
from tests.losses.loops import gradient_of, naive_cosine, naive_mse, rotation, rows, slopes_of

NAIVE: dict[Callable[[Tensor, Tensor], Tensor], Callable[..., float]] = {
    cosine_loss: naive_cosine,
    mse_loss: naive_mse,
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


@pytest.mark.parametrize("loss", NAIVE)
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
