"""Rows of length 1, and a division by what may be 0."""

import math

import pytest
import torch
from torch import Tensor

from hf_rrd.losses.rows import check_positive, pair, precise, ratio, unit
from tests.losses.loops import gradient_of, rows


@pytest.mark.parametrize("scale", [1e-17, 1e-3, 1.0, 1e3, 1e17])
def test_rows_of_any_scale_in_float32_get_the_length_and_the_gradient_of_float64(scale: float) -> None:
    raw, weights = rows(7, 5, seed=1, dtype=torch.float32), rows(7, 5, seed=2)
    expected, expected_gradient = gradient_of(
        lambda r: (r / r.square().sum(-1, keepdim=True).sqrt() * weights).sum(), raw.double()
    )
    found, gradient = gradient_of(lambda r: (unit(r) * weights.float()).sum(), raw * scale)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(gradient * scale, expected_gradient.float(), rtol=1e-5, atol=1e-6)
    lengths = unit(raw * scale).double().norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_zeros_or_as_good_as_that_stays_0_with_a_gradient_of_0(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    raw = torch.tensor([[0.0, 0.0, 0.0], [tiny, -tiny, 0.0], [3.0, 0.0, 4.0], [0.0, -2.0, 0.0]], dtype=dtype)
    _, gradient = gradient_of(lambda r: (unit(r) * torch.arange(3).to(dtype)).sum(), raw)
    assert unit(raw)[:2].tolist() == gradient[:2].tolist() == [[0.0] * 3] * 2
    torch.testing.assert_close(unit(raw)[2:], torch.tensor([[0.6, 0.0, 0.8], [0.0, -1.0, 0.0]], dtype=dtype))
    assert gradient[2:].isfinite().all() and float(gradient[2:].norm()) > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_not_hidden_and_touches_no_other(value: float) -> None:
    raw = rows(3, 4, seed=1)
    raw[1, 2] = value
    made = unit(raw)
    assert made[1, 2].isnan()
    torch.testing.assert_close(made[[0, 2]], unit(raw[[0, 2]]), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("scale", [1.0, 1e17])
def test_rows_are_made_unit_where_they_lie_or_elsewhere(scale: float) -> None:
    raw = rows(3, 4, seed=1) * scale
    expected, before = unit(raw), raw.clone()
    room = torch.empty_like(raw)
    assert unit(raw, out=room).data_ptr() == room.data_ptr()
    assert torch.equal(room, expected) and torch.equal(raw, before)
    unit(raw, out=raw)
    assert torch.equal(raw, expected)


def test_a_ratio_over_0_is_0_with_a_gradient_of_0_on_both_sides() -> None:
    def value(sides: Tensor) -> Tensor:
        return ratio(sides[0], sides[1]).sum()

    found, gradient = gradient_of(value, torch.tensor([[6.0, 5.0, 0.0], [3.0, 0.0, 0.0]]))
    assert float(found) == 2.0
    torch.testing.assert_close(gradient, torch.tensor([[1 / 3, 0.0, 0.0], [-2 / 3, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_both_sides_are_in_the_students_full_precision_and_the_teacher_has_no_graph(
    given: torch.dtype, expected: torch.dtype
) -> None:
    with pair(rows(3).to(given).requires_grad_(), rows(3).requires_grad_()) as (student, teacher):
        pass
    assert student.dtype == teacher.dtype == precise(rows(3).to(given)).dtype == expected
    assert student.requires_grad and not teacher.requires_grad


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan])
def test_an_option_that_is_not_positive_is_named_with_a_value_to_try(value: float) -> None:
    check_positive("gamma", 1e-9, 0.4)
    with pytest.raises(ValueError, match=f"`gamma` must be positive, got {value}. Try 0.4."):
        check_positive("gamma", value, 0.4)
