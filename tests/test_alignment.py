"""The alignment measures against loops over their definitions."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_rrd import relational_alignment


def embeddings(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(count: int = 14) -> tuple[Tensor, Tensor]:
    """Two sets, 5 and 7 wide, that share a part of their relations."""
    teacher = embeddings(count, 7, seed=1) + 0.3
    return teacher @ embeddings(7, 5, seed=2) + embeddings(count, 5, seed=3), teacher


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    dot = sum(float(a) * float(b) for a, b in zip(left, right, strict=True))
    return dot / (sum(float(a) ** 2 for a in left) * sum(float(b) ** 2 for b in right)) ** 0.5


def naive_cka(student: np.ndarray, teacher: np.ndarray) -> float:
    """By the centred Gram matrices, one entry at a time; the package goes by the covariances."""
    count, grams = len(student), []
    for rows in (student, teacher):
        gram = np.array([[sum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows])
        means = [sum(gram[i]) / count for i in range(count)]
        centred = np.zeros((count, count))
        for i in range(count):
            for j in range(count):
                centred[i, j] = gram[i, j] - means[i] - means[j] + sum(means) / count
        grams.append(centred)

    def inner(left: np.ndarray, right: np.ndarray) -> float:
        return sum(left[i, j] * right[i, j] for i in range(count) for j in range(count))

    return inner(*grams) / (inner(grams[0], grams[0]) * inner(grams[1], grams[1])) ** 0.5


def naive_rank_correlation(student: np.ndarray, teacher: np.ndarray) -> float:
    ranks = []
    for rows in (student, teacher):
        values = [cosine(rows[i], rows[j]) for i in range(len(rows)) for j in range(i + 1, len(rows))]
        ranks.append([sum(other < value for other in values) for value in values])
    return float(np.corrcoef(*ranks)[0, 1])


def naive_overlap(student: np.ndarray, teacher: np.ndarray, neighbors: int) -> float:
    shared = 0
    for i in range(len(student)):
        nearest = []
        for rows in (student, teacher):
            others = [j for j in range(len(rows)) if j != i]
            nearest.append(set(sorted(others, key=lambda j: -cosine(rows[i], rows[j]))[:neighbors]))
        shared += len(nearest[0] & nearest[1])
    return shared / (len(student) * neighbors)


@pytest.mark.parametrize(("count", "neighbors"), [(3, 1), (3, 2), (14, 1), (14, 4), (14, 10)])
def test_the_three_measures_equal_loops_over_their_definitions(count: int, neighbors: int) -> None:
    student, teacher = related(count)
    measured = relational_alignment(student, teacher, neighbors=neighbors)
    left, right = student.numpy(), teacher.numpy()
    assert sorted(measured) == ["cka", "neighbor_overlap", "rank_correlation"]
    assert measured["cka"] == pytest.approx(naive_cka(left, right), abs=1e-9)
    assert measured["rank_correlation"] == pytest.approx(naive_rank_correlation(left, right), abs=1e-9)
    assert measured["neighbor_overlap"] == pytest.approx(naive_overlap(left, right, neighbors), abs=1e-9)


@pytest.mark.parametrize("change", ["rotate", "scale", "permute"])
def test_rotation_scale_and_the_order_of_examples_change_nothing(change: str) -> None:
    student, teacher = related()
    expected = relational_alignment(student, teacher, neighbors=4)
    if change == "rotate":
        student = student @ torch.linalg.qr(embeddings(5, 5, seed=9)).Q
        teacher = teacher @ torch.linalg.qr(embeddings(7, 7, seed=9)).Q
    elif change == "scale":
        student, teacher = 17.0 * student, 0.01 * teacher
    else:
        order = torch.randperm(len(student), generator=torch.Generator().manual_seed(0))
        student, teacher = student[order], teacher[order]
    assert relational_alignment(student, teacher, neighbors=4) == pytest.approx(expected, abs=1e-9)


def test_a_set_is_wholly_aligned_with_itself_and_with_itself_made_wider() -> None:
    rows = embeddings(12, 5, seed=0)
    wider = torch.cat([rows, torch.zeros(12, 3)], dim=1)
    for other in (rows, wider, rows.float()):
        perfect = {"cka": 1.0, "rank_correlation": 1.0, "neighbor_overlap": 1.0}
        assert relational_alignment(rows, other, neighbors=3) == pytest.approx(perfect, abs=1e-6)


def test_opposite_similarities_have_a_rank_correlation_of_minus_1() -> None:
    angles = torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64)  # pairs by nearness: 0-1, 1-2, 0-2
    opposite = torch.tensor([0.0, 0.5, 0.1], dtype=torch.float64)  # 0-2, 1-2, 0-1
    student, teacher = (torch.stack([a.cos(), a.sin()], dim=1) for a in (angles, opposite))
    assert relational_alignment(student, teacher, neighbors=1)["rank_correlation"] == pytest.approx(-1.0, abs=1e-9)


def test_more_neighbors_than_other_examples_overlap_wholly() -> None:
    assert relational_alignment(*related(6), neighbors=100)["neighbor_overlap"] == 1.0


def test_unrelated_sets_share_about_the_neighbors_that_chance_gives() -> None:
    measured = relational_alignment(embeddings(300, 16, seed=1), embeddings(300, 16, seed=2))
    assert measured["neighbor_overlap"] == pytest.approx(10 / 299, abs=0.02)
    assert measured["rank_correlation"] == pytest.approx(0.0, abs=0.05)
    assert measured["cka"] < 0.15


@pytest.mark.parametrize(
    ("student", "teacher", "shapes"),
    [
        ((4, 3), (5, 3), r"\(4, 3\) and \(5, 3\)"),
        ((2, 3), (2, 3), r"\(2, 3\) and \(2, 3\)"),
        ((4, 3, 1), (4, 3), r"\(4, 3, 1\) and \(4, 3\)"),
        ((4,), (4,), r"\(4,\) and \(4,\)"),
    ],
)
def test_sets_that_cannot_be_compared_are_an_error_that_gives_their_shapes(
    student: tuple[int, ...], teacher: tuple[int, ...], shapes: str
) -> None:
    with pytest.raises(ValueError, match=f"two sets of the same 3 or more examples.* got {shapes}"):
        relational_alignment(torch.randn(student), torch.randn(teacher))


def test_a_collapsed_set_is_aligned_with_nothing() -> None:
    assert relational_alignment(torch.ones(5, 3), torch.randn(5, 3))["cka"] == 0.0


def test_fewer_than_one_neighbor_is_refused() -> None:
    with pytest.raises(ValueError, match="`neighbors` must be at least 1, got 0"):
        relational_alignment(torch.randn(5, 3), torch.randn(5, 3), neighbors=0)
