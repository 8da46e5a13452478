"""What is measured on the teacher before the first step, and what the bank starts with."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from hf_rrd import RelationalDistillationTrainer
from hf_rrd.models.teacher import MEASURED_PROJECTIONS, TeacherProjection
from hf_rrd.training.calibration import preserved_randomness, sample_of
from tests.builders import Images, log_of, tiny_vit, trainer


def embeddings(count: int = 60, width: int = 8, seed: int = 0) -> Tensor:
    """Rows of unequal variance around a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * torch.arange(1, width + 1) + 5


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def embeddings_of(images: Images) -> Tensor:
    """What the default teacher of `trainer` gives for images, (images, 24)."""
    with torch.no_grad():
        return tiny_vit(width=24, seed=1).eval().vit(images.pixels).last_hidden_state[:, 0]


def bank_of(run: RelationalDistillationTrainer) -> Tensor:
    assert run.distillation.bank is not None
    return run.distillation.bank.filled


# ---- The projection ----


def test_center_takes_the_measured_mean_off() -> None:
    rows = embeddings()
    projection = TeacherProjection(8, None, "center", seed=0)
    projection.fit(rows)
    assert (projection(rows) - unit(rows - rows.mean(0))).abs().max() < 1e-6


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_pca_is_scikit_learns_up_to_the_signs_of_its_directions(dim: int) -> None:
    rows, others = embeddings(), embeddings(7, seed=1)
    projection = TeacherProjection(8, dim, "pca", seed=0)
    projection.fit(rows)
    expected = unit(torch.tensor(PCA(dim).fit(rows.double().numpy()).transform(others.double().numpy())))
    assert (projection(others).abs() - expected.abs()).abs().max() < 1e-5


def test_a_centred_random_projection_is_orthonormal_and_takes_the_mean_off_first() -> None:
    rows = embeddings()
    projection = TeacherProjection(8, 3, "centered_orthogonal", seed=0)
    projection.fit(rows)
    matrix = projection.state_dict()["matrix"]
    assert (matrix.T @ matrix - torch.eye(3)).abs().max() < 1e-6
    assert (projection(rows) - unit((rows - rows.mean(0)) @ matrix)).abs().max() < 1e-5


def test_rows_keep_their_length_where_a_loss_takes_embeddings_as_they_are() -> None:
    rows = embeddings()
    assert torch.equal(TeacherProjection(8, None, "none", seed=0, unit=False)(rows), rows)


def test_a_projection_that_was_not_measured_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="'pca' is measured on training examples.*`train_dataset`"):
        TeacherProjection(8, 3, "pca", seed=0)(embeddings())


@pytest.mark.parametrize("count", [0, 3])
def test_pca_of_too_few_examples_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"'pca'.*examples to measure, got {count}"):
        TeacherProjection(8, 3, "pca", seed=0).fit(embeddings(count))


@pytest.mark.parametrize("kind", ["none", "center", "pca", "orthogonal", "centered_orthogonal"])
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


# ---- The sample ----


def test_a_sample_is_drawn_without_repetition_and_by_its_seed() -> None:
    data = datasets.Dataset.from_dict({"x": list(range(50))})
    first, again, other = (sample_of(data, 20, seed)["x"][:] for seed in (3, 3, 4))
    assert first == again != other
    assert len(set(first)) == 20
    assert [row["x"] for row in sample_of(list(data), 20, 3)] == first


def test_a_sample_of_a_smaller_set_is_the_whole_set() -> None:
    assert sorted(sample_of(datasets.Dataset.from_dict({"x": [1, 2, 3]}), 20, 0)["x"]) == [1, 2, 3]


def test_a_sample_of_a_stream_is_its_beginning() -> None:
    stream = datasets.Dataset.from_dict({"x": list(range(50))}).to_iterable_dataset()
    assert [row["x"] for row in sample_of(stream, 4, 0)] == [0, 1, 2, 3]


def test_randomness_goes_on_as_if_nothing_had_been_drawn() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(5)
    expected = draw()
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(5)
    with preserved_randomness():
        draw()
    assert draw() == expected


# ---- In the trainer ----


@pytest.mark.parametrize("bank_size, examples", [(20, 4096), (20, 7), (100, 4096)])
def test_the_bank_starts_with_teacher_rows_of_training_examples(tmp_path: Path, bank_size: int, examples: int) -> None:
    run = trainer(tmp_path, bank_size=bank_size, calibration_examples=examples)
    run.evaluate(Images(8, seed=3))  # measured before the first evaluation, too
    rows, known = bank_of(run), unit(embeddings_of(Images()))
    assert len(rows) == min(bank_size, examples, 48)
    distances = torch.cdist(rows, known)
    assert distances.amin(1).max() < 1e-3  # each is a training example's
    assert len(set(distances.argmin(1).tolist())) == len(rows)  # and none is there twice


def test_a_run_from_a_full_bank_has_a_relational_loss_in_its_first_step(tmp_path: Path) -> None:
    cold, warm = (trainer(tmp_path, calibration_examples=count, max_steps=1) for count in (0, 4096))
    cold.train()
    warm.train()
    assert log_of(cold, "relational_loss") == [0]
    assert log_of(warm, "relational_loss")[0] > 1


def test_measuring_leaves_order_and_dropout_of_the_run_alone(tmp_path: Path) -> None:
    logs = []
    for count in (0, 30):
        run = trainer(
            tmp_path,
            model=tiny_vit(dropout=0.3),
            calibration_examples=count,
            relational_weight=1e-30,  # measured, and without a say
        )
        run.train()
        logs.append(log_of(run, "task_loss"))
    assert logs[0] == logs[1]


@pytest.mark.parametrize("kind, dim", [("center", None), ("pca", 6), ("centered_orthogonal", 6)])
def test_a_resumed_run_keeps_the_measured_projection_and_measures_nothing(
    tmp_path: Path, kind: str, dim: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "teacher_projection": kind,
        "projection_dim": dim,
        "calibration_examples": 30,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = trainer(tmp_path, **settings)
    whole.train()
    resumed = trainer(tmp_path, **settings)
    monkeypatch.setattr(resumed, "_calibrate", lambda: pytest.fail("measured again"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert whole._projection is not None and resumed._projection is not None
    for name, tensor in whole._projection.state_dict().items():
        assert torch.equal(tensor, resumed._projection.state_dict()[name])
    assert torch.equal(bank_of(whole), bank_of(resumed))
    for mine, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_cached_embeddings_are_read_from_their_column(tmp_path: Path) -> None:
    images = Images()
    known = embeddings_of(images)
    columns = {"pixel_values": images.pixels.tolist(), "labels": images.labels, "teacher_embedding": known.tolist()}
    run = trainer(
        tmp_path,
        teacher=None,
        train_dataset=datasets.Dataset.from_dict(columns),
        teacher_projection="center",
        calibration_examples=4096,
        bank_size=48,
        max_steps=1,
    )
    run.train()
    assert run._projection is not None
    assert (run._projection.state_dict()["mean"] - known.mean(0)).abs().max() < 1e-5
    assert len(bank_of(run)) == 48


class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Images that come one after another."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        images = Images(40)
        return (images[index] for index in range(40))


def test_a_stream_is_measured_at_its_beginning(tmp_path: Path) -> None:
    run = trainer(tmp_path, train_dataset=Stream(), calibration_examples=16, teacher_projection="center", max_steps=2)
    run.train()
    known = embeddings_of(Images(40))[:16]
    assert run._projection is not None
    assert (run._projection.state_dict()["mean"] - known.mean(0)).abs().max() < 1e-5


def test_a_teacher_that_is_not_finite_is_found_before_the_first_step(tmp_path: Path) -> None:
    images = Images()
    images.pixels[::2] = torch.nan
    with pytest.raises(ValueError, match="the teacher's embedding is not finite"):
        trainer(tmp_path, train_dataset=images, calibration_examples=30).train()


# ---- The perplexity ----


def test_the_log_gives_the_teachers_perplexity(tmp_path: Path) -> None:
    run = trainer(tmp_path, calibration_examples=4096, teacher_temperature=0.5)
    run.train()
    loss, divergence = log_of(run, "relational_loss"), log_of(run, "relational_kl")
    for found, entropy in zip(log_of(run, "teacher_perplexity"), np.subtract(loss, divergence), strict=True):
        assert found == pytest.approx(np.exp(entropy), rel=1e-5)
        assert 2 < found <= 21  # 20 rows and the own key
    assert run.evaluate(Images(8))["eval_teacher_perplexity"] > 2


def test_a_run_can_be_given_the_teachers_perplexity(tmp_path: Path) -> None:
    run = trainer(tmp_path, calibration_examples=4096, teacher_perplexity=9.0)
    run.train()
    # Half on the own key and half over 9 rows: an entropy of log 2 + log(9) / 2.
    assert log_of(run, "teacher_perplexity") == pytest.approx([6.0] * 3, rel=1e-3)


def test_a_perplexity_that_stays_near_one_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import transformers

    logger = transformers.logging.get_logger("hf_rrd.trainer")
    logger.parent.addHandler(caplog.handler)  # transformers does not propagate
    try:
        run = trainer(tmp_path, bank_size=8, calibration_examples=1, teacher_temperature=1e-4, max_steps=5)
        run.train()
    finally:
        logger.parent.removeHandler(caplog.handler)
    said = [record.message for record in caplog.records if "perplexity" in record.message]
    assert len(said) <= 1  # once in a process
    assert log_of(run, "teacher_perplexity") == pytest.approx([1.0] * 5, abs=0.1)
    assert run._terms.lines_near_one == 5
