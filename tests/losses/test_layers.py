"""The losses of layers equal loops over their formulas, and padding counts for nothing."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from hf_rrd.losses.layers import relation_terms, state_terms

EXAMPLES, TOKENS, WIDTH = 3, 5, 12
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])


def rows(width: int = WIDTH, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(EXAMPLES, TOKENS, width, generator=generator, dtype=torch.float64).to(dtype) * 2 + 1


def naive_states(student: Tensor, teacher: Tensor, mask: Tensor) -> list[float]:
    means = []
    for one, other, counted in zip(student, teacher, mask, strict=True):
        differences = []
        for a, b, counts in zip(one, other, counted, strict=True):
            if counts:
                a, b = ((x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() for x in (a, b))
                differences.append(sum(float((x - y) ** 2) for x, y in zip(a, b, strict=True)) / len(a))
        means.append(sum(differences) / len(differences))
    return means


def naive_relations(student: Tensor, teacher: Tensor, heads: int, mask: Tensor) -> list[float]:
    def shares(side: Tensor, place: int, head: int, counted: list[int]) -> list[float]:
        width = side.shape[-1] // heads
        part = side[:, head * width : (head + 1) * width]
        raised = [math.exp(float(part[place] @ part[other]) / math.sqrt(width)) for other in counted]
        return [each / sum(raised) for each in raised]

    means = []
    for one, other, row in zip(student, teacher, mask, strict=True):
        counted = [place for place in range(len(row)) if row[place]]
        total = 0.0
        for head in range(heads):
            for place in counted:
                q, p = shares(one, place, head, counted), shares(other, place, head, counted)
                total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
        means.append(total / heads / len(counted))
    return means


@pytest.mark.parametrize("mask", [MASK, None], ids=["padded", "whole"])
def test_states_are_compared_as_a_loop_would(mask: Tensor | None) -> None:
    found = state_terms(rows(), rows(seed=1), mask)
    expected = naive_states(rows(), rows(seed=1), torch.ones_like(MASK) if mask is None else mask)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mask", [MASK, None], ids=["padded", "whole"])
@pytest.mark.parametrize(("width", "heads"), [(12, 4), (8, 4), (12, 1), (24, 12)])
def test_relations_are_compared_as_a_loop_would(width: int, heads: int, mask: Tensor | None) -> None:
    student, teacher = rows() / 2, rows(width, seed=1) / 2
    expected = naive_relations(student, teacher, heads, torch.ones_like(MASK) if mask is None else mask)
    assert relation_terms(student, teacher, heads, mask).tolist() == pytest.approx(expected, rel=1e-9)


LOSSES = [
    pytest.param(state_terms, id="states"),
    pytest.param(partial(relation_terms, heads=4), id="relations"),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_changes_neither_loss_nor_gradient(loss: Callable[..., Tensor]) -> None:
    found = []
    for more in (0, 3):
        student, teacher = (torch.cat([rows(seed=seed), torch.full((3, more, 12), 7.0)], 1) for seed in (0, 1))
        mask = torch.cat([MASK, torch.zeros(3, more, dtype=torch.long)], 1)
        student.requires_grad_()
        terms = loss(student, teacher, mask=mask)
        terms.sum().backward()
        assert student.grad is not None
        assert student.grad[mask == 0].abs().max() == 0
        found.append((terms.detach(), student.grad[:, :TOKENS]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_sides_have_no_loss_and_an_example_without_a_token_neither(loss: Callable[..., Tensor]) -> None:
    assert loss(rows(), rows()).abs().max() < 1e-12
    nothing = loss(rows().requires_grad_(), rows(seed=1), mask=torch.zeros_like(MASK))
    assert nothing.tolist() == [0, 0, 0]
    nothing.sum().backward()


def test_the_loss_of_states_is_twice_one_minus_their_correlation_whatever_their_scale() -> None:
    student, teacher = rows()[:, :1], rows(seed=1)[:, :1]
    correlation = [
        float(torch.corrcoef(torch.stack([a[0], b[0]]))[0, 1]) for a, b in zip(student, teacher, strict=True)
    ]
    expected = [2 * (1 - each) for each in correlation]
    assert state_terms(student * 100 - 5, teacher * 30).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_computed_in_full_also_under_autocast(loss: Callable[..., Tensor]) -> None:
    student, teacher = rows(dtype=torch.bfloat16), rows(seed=1, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(student, teacher, mask=MASK)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(student.float(), teacher.float(), mask=MASK))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_teacher_gets_no_gradient(loss: Callable[..., Tensor]) -> None:
    student, teacher = rows().requires_grad_(), rows(seed=1).requires_grad_()
    loss(student, teacher).sum().backward()
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize("loss", LOSSES)
def test_other_tokens_are_refused(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"must be of the same tokens.*got \(3, 5, 12\) and \(3, 4, 12\)"):
        loss(rows(), rows()[:, :4])


def test_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="states must have one width here, got 12 and 8"):
        state_terms(rows(), rows(8))
    with pytest.raises(ValueError, match="`heads` must divide the widths 12 and 8, got 3. Try a common divisor"):
        relation_terms(rows(), rows(8), 3)
