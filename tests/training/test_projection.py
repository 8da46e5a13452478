"""From the teacher's embedding to the rows that are compared."""

import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from hf_rrd.training.projection import MEASURED_PROJECTIONS, TeacherProjection


def embeddings(count: int = 60, width: int = 8, seed: int = 0) -> Tensor:
    """Rows of unequal variance around a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * torch.arange(1, width + 1) + 5


def test_center_takes_the_measured_mean_off_and_divides_by_one_scale_for_all() -> None:
    rows = embeddings()
    projection = TeacherProjection(8, None, "center", seed=0)
    projection.fit(rows)
    centered = rows - rows.mean(0)
    assert (projection(rows) - centered / centered.square().mean().sqrt()).abs().max() < 1e-5
    assert projection(rows).square().mean() == pytest.approx(1, abs=1e-5)


def test_teacher_embeddings_that_are_all_alike_are_not_divided_by_0() -> None:
    projection = TeacherProjection(8, None, "center", seed=0)
    projection.fit(torch.ones(5, 8))
    assert torch.equal(projection(torch.ones(2, 8)), torch.zeros(2, 8))


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_pca_is_scikit_learns_up_to_the_signs_of_its_directions(dim: int) -> None:
    rows, others = embeddings(), embeddings(7, seed=1)
    projection = TeacherProjection(8, dim, "pca", seed=0)
    projection.fit(rows)
    pca = PCA(dim).fit(rows.double().numpy())
    expected = torch.tensor(pca.transform(others.double().numpy()))
    expected /= torch.tensor(pca.transform(rows.double().numpy())).square().mean().sqrt()
    assert (projection(others).abs() - expected.abs()).abs().max() < 1e-5


def test_a_random_projection_is_orthonormal() -> None:
    rows = embeddings()
    projection = TeacherProjection(8, 3, "orthogonal", seed=0)
    matrix = projection.state_dict()["matrix"]
    assert (matrix.T @ matrix - torch.eye(3)).abs().max() < 1e-6
    assert (projection(rows) - rows @ matrix).abs().max() < 1e-5


def test_without_a_projection_rows_stay_as_they_are() -> None:
    rows = embeddings()
    assert torch.equal(TeacherProjection(8, None, "none", seed=0)(rows), rows)


def test_a_projection_that_was_not_measured_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="'pca' is measured on training examples.*`train_dataset`"):
        TeacherProjection(8, 3, "pca", seed=0)(embeddings())


@pytest.mark.parametrize("count", [0, 3])
def test_pca_of_too_few_examples_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"'pca'.*examples to measure, got {count}"):
        TeacherProjection(8, 3, "pca", seed=0).fit(embeddings(count))


@pytest.mark.parametrize("kind", ["none", "center", "pca", "orthogonal"])
def test_a_saved_projection_gives_the_same_rows_bitwise(kind: str) -> None:
    dim = None if kind in ("none", "center") else 3
    saved, loaded = TeacherProjection(8, dim, kind, seed=0), TeacherProjection(8, dim, kind, seed=1)
    if kind in MEASURED_PROJECTIONS:
        saved.fit(embeddings())
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(saved(embeddings(seed=2)), loaded(embeddings(seed=2)))


def test_a_saved_projection_of_another_kind_is_refused() -> None:
    measured = TeacherProjection(8, None, "center", seed=0)
    measured.fit(embeddings())
    with pytest.raises(ValueError, match="the saved teacher projection has .*mean.*teacher_projection='none'"):
        TeacherProjection(8, None, "none", seed=0).load_state_dict(measured.state_dict())
