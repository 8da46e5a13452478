"""The bank against a plain list."""

import random

import pytest
import torch
from torch import Tensor

from hf_rrd import FeatureBank

DIM = 3


def numbered(start: int, count: int) -> Tensor:
    """Rows that are told apart by their number."""
    return torch.arange(start, start + count, dtype=torch.float32).unsqueeze(1).expand(count, DIM)


@pytest.mark.parametrize("size", [0, 1, 2, 5, 8, 33])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bank_holds_what_a_list_cut_to_the_newest_rows_holds(size: int, seed: int) -> None:
    choose = random.Random(seed)
    bank, expected, count = FeatureBank(size, DIM), [], 0
    for _ in range(40):
        batch = choose.choice([0, 1, 2, 3, 5, 8, 13, 40])
        bank.enqueue(numbered(count, batch))
        expected = [*expected, *range(count, count + batch)]
        expected = expected[len(expected) - min(size, len(expected)) :]
        count += batch
        assert bank.filled.tolist() == [[float(number)] * DIM for number in expected]
        assert len(bank) == len(expected)


def test_a_new_bank_has_no_rows_and_a_partly_filled_one_only_those_put_in() -> None:
    bank = FeatureBank(10, DIM)
    assert bank.filled.shape == (0, DIM)
    bank.enqueue(numbered(1, 4))
    assert bank.filled[:, 0].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_bank_keeps_the_newest_rows_when_the_batch_exceeds_it() -> None:
    bank = FeatureBank(3, DIM)
    bank.enqueue(numbered(0, 2))
    bank.enqueue(numbered(2, 8))
    assert bank.filled[:, 0].tolist() == [7.0, 8.0, 9.0]


@pytest.mark.parametrize("put_in", [0, 3, 8, 21])
def test_a_restored_bank_has_the_same_bits_and_goes_on_as_the_saved_one(put_in: int) -> None:
    saved, restored = FeatureBank(8, DIM), FeatureBank(8, DIM)
    restored.enqueue(torch.randn(5, DIM))  # what a bank held before is gone after loading
    saved.enqueue(torch.randn(put_in, DIM, generator=torch.Generator().manual_seed(0)))
    restored.load_state_dict(saved.state_dict())
    assert len(restored) == min(put_in, 8)
    for batch in (0, 3, 1, 9):
        assert torch.equal(restored.filled, saved.filled)
        rows = torch.randn(batch, DIM)
        saved.enqueue(rows)
        restored.enqueue(rows)
    assert torch.equal(restored.filled, saved.filled)


@pytest.mark.parametrize(("size", "kept"), [(0, []), (1, [5.0]), (4, [2.0, 3.0, 4.0, 5.0]), (9, [0, 1, 2, 3, 4, 5])])
def test_loading_into_a_bank_of_another_size_keeps_the_newest(size: int, kept: list[float]) -> None:
    saved, other = FeatureBank(6, DIM), FeatureBank(size, DIM)
    saved.enqueue(numbered(0, 6))
    other.load_state_dict(saved.state_dict())
    assert other.filled[:, 0].tolist() == kept


def test_neither_a_write_nor_a_clear_changes_rows_or_a_state_obtained_earlier() -> None:
    bank = FeatureBank(4, DIM)
    bank.enqueue(numbered(0, 4))
    rows, state = bank.filled, bank.state_dict()
    bank.enqueue(numbered(4, 2))
    later = bank.filled
    bank.clear()
    bank.enqueue(numbered(6, 4))
    assert rows[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert state["rows"][:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert later[:, 0].tolist() == [2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("size", [4, 40])
def test_a_loss_that_keeps_the_rows_for_its_backward_survives_later_writes(size: int) -> None:
    bank = FeatureBank(size, DIM)
    bank.enqueue(torch.randn(size, DIM))
    query = torch.randn(2, DIM, requires_grad=True)
    (expected,) = torch.autograd.grad((query @ bank.filled.T).exp().sum(), query)
    loss = (query @ bank.filled.T).exp().sum()  # autograd keeps the rows, and would refuse ones that were written to
    bank.enqueue(torch.randn(3, DIM))
    (found,) = torch.autograd.grad(loss, query)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("count", [2, 4, 6])
def test_a_change_to_rows_after_they_were_put_in_does_not_reach_the_bank(count: int) -> None:
    bank, loaded = FeatureBank(4, DIM), FeatureBank(4, DIM)
    rows = torch.ones(count, DIM)
    bank.enqueue(rows)
    loaded.load_state_dict({"rows": rows})
    rows.zero_()
    assert bank.filled.unique().tolist() == [1.0]
    assert loaded.filled.unique().tolist() == [1.0]


def test_rows_with_a_graph_leave_it_outside_the_bank() -> None:
    bank = FeatureBank(4, DIM)
    bank.enqueue(torch.ones(2, DIM, requires_grad=True) * 2)
    assert not bank.filled.requires_grad
    assert bank.filled.tolist() == [[2.0] * DIM] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bank_keeps_its_dtype_whatever_is_put_in(dtype: torch.dtype) -> None:
    bank = FeatureBank(4, DIM, dtype=dtype)
    for given in (torch.float32, torch.float64, torch.bfloat16):
        bank.enqueue(torch.full((3, DIM), 0.5, dtype=given))
        assert bank.filled.dtype == dtype
        assert bank.filled.unique().tolist() == [0.5]
    bank.load_state_dict({"rows": torch.full((3, DIM), 0.25, dtype=torch.float64)})
    bank.clear()
    assert (bank.filled.dtype, bank.filled.shape) == (dtype, (0, DIM))
    assert bank.state_dict()["rows"].dtype == dtype


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_moved_bank_goes_on_with_its_rows_and_spares_those_given_out(dtype: torch.dtype | None) -> None:
    bank = FeatureBank(6, DIM)
    bank.enqueue(numbered(0, 4))
    before = bank.filled
    assert bank.to(dtype=dtype) is bank
    after = bank.filled
    bank.enqueue(numbered(4, 3))
    assert bank.filled.dtype == (dtype or torch.float32)
    assert bank.filled[:, 0].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert before[:, 0].tolist() == after[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_bank_says_how_full_it_is() -> None:
    bank = FeatureBank(4, DIM)
    bank.enqueue(numbered(0, 3))
    assert repr(bank.to("cpu")) == "FeatureBank(size=4, dim=3, filled=3)"


@pytest.mark.parametrize("shape", [(2, 4), (2, 2), (3,), (1, 2, 3)])
def test_rows_of_another_width_are_an_error_that_leaves_the_bank_as_it_was(shape: tuple[int, ...]) -> None:
    bank = FeatureBank(4, DIM)
    bank.enqueue(numbered(0, 2))
    with pytest.raises(ValueError, match=r"`rows` must have the shape \(n, 3\), got"):
        bank.enqueue(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"must hold `rows` of shape \(n, 3\), got \{'rows': .*another projection"):
        bank.load_state_dict({"rows": torch.zeros(shape)})
    with pytest.raises(ValueError, match=r"must hold `rows` of shape \(n, 3\), got \{'queue': \(2, 3\)\}"):
        bank.load_state_dict({"queue": torch.zeros(2, DIM)})
    assert bank.filled[:, 0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("size", "dim", "message"),
    [(-1, 3, "`size` must be 0 or more rows and .* got -1 and 3"), (3, 0, "`dim` at least 1, got 3 and 0")],
)
def test_a_bank_of_no_possible_shape_is_an_error(size: int, dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureBank(size, dim)
