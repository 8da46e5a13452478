"""What is measured on the teacher before the first step, and what the bank starts with."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor

from hf_rrd import RelationalDistillationTrainer
from hf_rrd.training.distillation import preserved_randomness
from tests.builders import Images, log_of, tiny_vit, trainer


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def embeddings_of(images: Images) -> Tensor:
    """What the default teacher of `trainer` gives for images, (images, 24)."""
    with torch.no_grad():
        return tiny_vit(width=24, seed=1).eval().vit(images.pixels).last_hidden_state[:, 0]


def bank_of(run: RelationalDistillationTrainer) -> Tensor:
    assert run.distillation.bank is not None
    return run.distillation.bank.filled


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


@pytest.mark.parametrize("kind, dim", [("center", None), ("pca", 6)])
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
    assert whole.distillation.projection is not None and resumed.distillation.projection is not None
    for name, tensor in whole.distillation.projection.state_dict().items():
        assert torch.equal(tensor, resumed.distillation.projection.state_dict()[name])
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
    assert run.distillation.projection is not None
    assert (run.distillation.projection.state_dict()["mean"] - known.mean(0)).abs().max() < 1e-5
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
    assert run.distillation.projection is not None
    assert (run.distillation.projection.state_dict()["mean"] - known.mean(0)).abs().max() < 1e-5


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


def test_the_loader_of_the_calibration_is_not_kept(tmp_path: Path) -> None:
    run = trainer(tmp_path, calibration_examples=16)
    run.train()
    assert len(run.accelerator._dataloaders) == 1


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


@pytest.mark.parametrize("silent", [False, True])
def test_it_shows_how_far_it_is(
    tmp_path: Path, silent: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)
    run = trainer(tmp_path, calibration_examples=20, disable_tqdm=silent)
    run.evaluate(Images(8, seed=3))
    assert ("Measuring the teacher: 100%" in capsys.readouterr().err) == (not silent)
