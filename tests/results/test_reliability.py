"""Confidence against accuracy, checked against plain loops."""

import math

import pytest
import torch
from torch import Tensor

from hf_rrd.results.reliability import calibration_error, reliability_bins


def predictions(count: int = 97, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a model that knows a little and is too sure, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    logits = 3 * torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), labels] += 2
    return logits, labels


def logits_of(*probabilities: float) -> Tensor:
    """Of two classes, the first with these probabilities."""
    first = torch.tensor(probabilities, dtype=torch.double)
    return torch.stack([first, 1 - first], dim=1).log()


def bins_by_a_loop(logits: Tensor, labels: Tensor, bins: int) -> list[tuple[float, float, int]]:
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        if label == -100:
            continue
        weights = [math.exp(logit - max(row)) for logit in row]
        confidence = max(weights) / sum(weights)
        for place in range(bins):
            if place / bins < confidence <= (place + 1) / bins:
                members[place].append((confidence, row.index(max(row)) == label))
    return [
        (
            sum(confidence for confidence, _ in inside) / len(inside) if inside else math.nan,
            sum(right for _, right in inside) / len(inside) if inside else math.nan,
            len(inside),
        )
        for inside in members
    ]


@pytest.mark.parametrize("bins", [1, 2, 10, 15, 200])
@pytest.mark.parametrize("classes", [2, 5, 40])
def test_bins_and_error_are_those_of_plain_loops(bins: int, classes: int) -> None:
    logits, labels = predictions(classes=classes)
    labels[::7] = -100
    expected = bins_by_a_loop(logits, labels, bins)
    found = reliability_bins(logits, labels, bins)
    assert found["count"].tolist() == [count for _, _, count in expected]
    for name, column in (("confidence", 0), ("accuracy", 1)):
        assert found[name].tolist() == pytest.approx([row[column] for row in expected], abs=1e-9, nan_ok=True)
    total = sum(count for _, _, count in expected)
    error = sum(count / total * abs(accuracy - sure) for sure, accuracy, count in expected if count)
    assert calibration_error(logits, labels, bins) == pytest.approx(error, abs=1e-9)


def test_a_model_that_is_certain_and_right_has_error_0() -> None:
    labels = torch.arange(6) % 3
    assert calibration_error(1000 * torch.eye(3)[labels], labels) == 0


def test_a_model_that_is_certain_and_wrong_has_error_1() -> None:
    labels = torch.arange(6) % 3
    assert calibration_error(1000 * torch.eye(3)[(labels + 1) % 3], labels) == 1


def test_a_model_that_is_as_often_right_as_it_is_confident_has_error_0() -> None:
    logits = logits_of(0.75, 0.75, 0.75, 0.75)
    assert calibration_error(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx(0, abs=1e-12)


def test_gaps_of_opposite_sign_in_two_bins_do_not_cancel() -> None:
    logits = logits_of(0.6, 0.6, 0.9, 0.9)  # at 0.6 all are right, at 0.9 half
    assert calibration_error(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx((0.4 + 0.4) / 2)
    assert calibration_error(logits, torch.tensor([0, 0, 0, 1]), bins=1) == pytest.approx(0)


def test_a_bin_contains_its_upper_edge_and_not_its_lower_one() -> None:
    evenly = torch.zeros(1, 2)  # exactly 0.5
    assert reliability_bins(evenly, torch.tensor([0]), bins=2)["count"].tolist() == [1, 0]
    assert reliability_bins(evenly + torch.tensor([1e-6, 0]), torch.tensor([0]), bins=2)["count"].tolist() == [0, 1]
    quarters = torch.zeros(1, 4)  # exactly 0.25
    assert reliability_bins(quarters, torch.tensor([0]), bins=4)["count"].tolist() == [1, 0, 0, 0]


def test_certainty_is_in_the_last_bin() -> None:
    assert reliability_bins(torch.tensor([[900.0, 0.0]]), torch.tensor([0]), bins=3)["count"].tolist() == [0, 0, 1]


def test_an_empty_bin_has_no_confidence_and_no_accuracy() -> None:
    found = reliability_bins(logits_of(0.9), torch.tensor([0]), bins=2)
    assert found["confidence"].isnan().tolist() == found["accuracy"].isnan().tolist() == [True, False]


def test_a_single_class_is_always_certain_and_right() -> None:
    found = reliability_bins(torch.tensor([[-3.0], [4.0]]), torch.tensor([0, 0]), bins=2)
    assert found["count"].tolist() == [0, 2]
    assert found["accuracy"][1] == found["confidence"][1] == 1


def test_one_class_more_that_is_never_likely_changes_nothing() -> None:
    logits, labels = predictions()
    more = torch.cat([logits, torch.full((len(logits), 1), -torch.inf)], dim=1)
    assert calibration_error(more, labels) == calibration_error(logits, labels)


def test_examples_without_a_label_are_left_out() -> None:
    logits, labels = predictions()
    labels[10:] = -100
    assert calibration_error(logits, labels) == calibration_error(logits[:10], labels[:10])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision_are_computed_on_in_float64(dtype: torch.dtype) -> None:
    logits, labels = predictions()
    logits = logits.to(dtype)
    assert calibration_error(logits, labels) == calibration_error(logits.double(), labels)


def test_nothing_is_changed_and_no_gradient_is_kept() -> None:
    logits, labels = predictions()
    before, kept = logits.clone(), logits.requires_grad_()
    assert not any(values.requires_grad for values in reliability_bins(kept, labels).values())
    assert torch.equal(before, logits)


@pytest.mark.parametrize(
    ("logits", "labels", "bins", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), 15, r"got \(3,\) and \(3,\)"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), 15, r"got \(2, 3, 4\) and \(2, 3\)\. Flatten"),
        (torch.zeros(3, 2), torch.zeros(2).long(), 15, r"got \(3, 2\) and \(2,\)"),
        (torch.zeros(3, 0), torch.zeros(3).long(), 15, r"got \(3, 0\)"),
        (torch.zeros(3, 2), torch.zeros(3), 15, "class ids, got torch.float32"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), 15, "0 to 1, or -100, got 2"),
        (torch.zeros(3, 2), torch.tensor([0, 1, -1]), 15, "0 to 1, or -100, got -1"),
        (torch.zeros(2, 2), torch.tensor([-100, -100]), 15, "at least 1 example with a label, got 2"),
        (torch.zeros(0, 2), torch.zeros(0).long(), 15, "at least 1 example with a label, got 0"),
        (torch.tensor([[0.0, torch.nan]]), torch.tensor([0]), 15, "got nan for 1 of 1"),
        (torch.zeros(3, 2), torch.zeros(3).long(), 0, "`bins` must be at least 1, got 0"),
    ],
)
def test_an_error_says_what_came(logits: Tensor, labels: Tensor, bins: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_error(logits, labels, bins)


def test_arrays_of_numpy_give_the_same() -> None:
    logits, labels = predictions()
    assert calibration_error(logits.numpy(), labels.numpy()) == calibration_error(logits, labels)
