"""What is measured on the teacher before the first step, and what the bank starts with."""

import random
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor

from hf_rrd import RelationalDistillationTrainer
from hf_rrd.training.data import preserved_randomness
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


@pytest.mark.parametrize("projection", ["none", "center"])
@pytest.mark.parametrize("bank_size", [20, 48, 100])
def test_the_bank_starts_full_of_teacher_rows_of_different_training_examples(
    tmp_path: Path, bank_size: int, projection: str
) -> None:
    run = trainer(tmp_path, bank_size=bank_size, teacher_projection=projection)
    run.evaluate(Images(8, seed=3))  # measured before the first evaluation, too
    rows, known = bank_of(run), embeddings_of(Images())
    known = unit(known if projection == "none" else known - known.mean(0))
    assert len(rows) == min(bank_size, 48)
    distances = torch.cdist(rows, known)
    assert distances.amin(1).max() < 1e-3  # each is a training example's
    assert len(set(distances.argmin(1).tolist())) == len(rows)  # and none is there twice


@pytest.mark.parametrize("bank_size", [48, 100])
def test_a_bank_of_the_whole_training_set_stays_as_it_is(tmp_path: Path, bank_size: int) -> None:
    run = trainer(tmp_path, bank_size=bank_size, max_steps=15)
    run._calibrate()
    before = bank_of(run).clone()
    run.train()
    assert torch.equal(bank_of(run), before)


@pytest.mark.parametrize("examples", [50, 300, pytest.param(7000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", ["online", "cached", "streamed"])
def test_evaluations_of_a_frozen_student_are_the_same_from_the_first_to_the_last(
    tmp_path: Path, examples: int, source: str
) -> None:
    columns = {"pixel_values": Images(7000).pixels[:examples], "labels": Images(7000).labels[:examples]}
    arrays = {name: np.asarray(column) for name, column in columns.items()}
    if source == "cached":
        arrays["teacher_embedding"] = embeddings_of(Images(7000))[:examples].numpy()
    data = datasets.Dataset.from_dict(arrays).with_format("torch")
    run = trainer(
        tmp_path,
        train_dataset=data.to_iterable_dataset() if source == "streamed" else data,
        eval_dataset=Images(16, seed=5) if source != "cached" else data.select(range(16)),
        teacher=None if source == "cached" else tiny_vit(width=24, seed=1),
        bank_size=4096,
        per_device_train_batch_size=50,
        per_device_eval_batch_size=256,
        learning_rate=0.0,
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        teacher_temperature=0.5,
        teacher_projection="center",
    )
    first = run.evaluate()
    run.train()
    assert len(bank_of(run)) == min(4096, examples)
    for name in ("loss", "relational_loss", "relational_kl", "teacher_perplexity"):
        later = [entry[f"eval_{name}"] for entry in run.state.log_history if f"eval_{name}" in entry]
        assert later == pytest.approx([first[f"eval_{name}"]] * 4, abs=1e-6)


def test_of_several_passes_over_a_small_set_the_logged_perplexity_is_that_of_the_first(tmp_path: Path) -> None:
    run = trainer(tmp_path, bank_size=1000, max_steps=24, learning_rate=0.0, teacher_temperature=0.05)
    run.train()
    by_pass = torch.tensor(log_of(run, "teacher_perplexity")).log().view(4, 6).mean(1)
    assert by_pass.max() - by_pass.min() < 0.02  # copies would add log 2, log 3, log 4 to all but the first


def test_the_perplexity_is_that_over_other_examples_and_the_own_key_once(tmp_path: Path) -> None:
    run = trainer(tmp_path, bank_size=48, max_steps=1, per_device_train_batch_size=48, teacher_temperature=0.1)
    run.train()
    rows = unit(embeddings_of(Images())).double()
    each = (rows @ rows.T / 0.1).log_softmax(-1)
    entropy = -(each.exp() * each).sum(-1).mean()
    assert log_of(run, "teacher_perplexity") == pytest.approx([float(entropy.exp())], rel=1e-4)


def test_a_resumed_run_evaluates_against_the_rows_that_the_whole_one_began_with(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_dataset": Images(9, seed=3),
    }
    whole, resumed = trainer(tmp_path, **settings), trainer(tmp_path, **settings)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.evaluate()["eval_relational_loss"] == whole.evaluate()["eval_relational_loss"]
    assert resumed.distillation.reference is not None and whole.distillation.reference is not None
    assert torch.equal(resumed.distillation.reference, whole.distillation.reference)
    assert not torch.equal(resumed.distillation.reference, bank_of(resumed))


def test_an_evaluation_without_a_training_set_is_of_the_task_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path, train_dataset=None, teacher_projection="center")
    metrics = run.evaluate(Images(8))
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_task_loss"])
    assert "eval_relational_loss" not in metrics
    run = trainer(tmp_path, train_dataset=None, task_weight=0.0)
    with pytest.raises(ValueError, match="an evaluation needs the `train_dataset`"):
        run.evaluate(Images(8))


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("projection", ["none", "center"])
@pytest.mark.parametrize("bank_size", [0, 20])
def test_a_teacher_that_gives_all_examples_one_embedding_is_refused(
    tmp_path: Path, value: float, projection: str, bank_size: int
) -> None:
    def constant(output: Any, attention_mask: Tensor | None) -> Tensor:
        return torch.full((len(output.last_hidden_state), 24), value)

    run = trainer(
        tmp_path,
        teacher_pooling=constant,
        teacher_projection=projection,
        bank_size=bank_size,
    )
    if bank_size == 0 and projection == "none":  # nothing is measured
        return
    with pytest.raises(ValueError, match="embeddings of .* training examples are all alike .* no relation to learn"):
        run.train()


def test_measuring_leaves_order_and_dropout_of_the_run_alone(tmp_path: Path) -> None:
    logs = []
    for bank_size in (0, 30):  # nothing is measured for a bank of no rows
        run = trainer(
            tmp_path,
            model=tiny_vit(dropout=0.3),
            bank_size=bank_size,
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
    for part in ("model", "distillation.head"):
        mine, theirs = (attrgetter(part)(run).parameters() for run in (whole, resumed))
        assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))


def test_cached_embeddings_are_read_from_their_column(tmp_path: Path) -> None:
    images = Images()
    known = embeddings_of(images)
    columns = {"pixel_values": images.pixels.tolist(), "labels": images.labels, "teacher_embedding": known.tolist()}
    run = trainer(
        tmp_path,
        teacher=None,
        train_dataset=datasets.Dataset.from_dict(columns),
        teacher_projection="center",
        bank_size=48,
        max_steps=1,
    )
    run.train()
    assert run.distillation.projection is not None
    assert (run.distillation.projection.state_dict()["mean"] - known.mean(0)).abs().max() < 1e-5
    assert len(bank_of(run)) == 48


def eight_wide(outputs: Any, mask: Tensor | None) -> Tensor:
    """Of which twice as many rows as it is wide are soon read."""
    return outputs.last_hidden_state[:, 0, :8]


class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Images that come one after another."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        images = Images(40)
        return (images[index] for index in range(40))


@pytest.mark.parametrize(("bank_size", "read"), [(8, 16), (24, 24)])
def test_a_stream_is_measured_at_its_beginning(
    tmp_path: Path, bank_size: int, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_rrd.training.distillation.MEASURED", 16)
    how = {"teacher_pooling": eight_wide, "teacher_projection": "center", "bank_size": bank_size, "max_steps": 2}
    run = trainer(tmp_path, train_dataset=Stream(), **how)
    run.train()
    known = embeddings_of(Images(40))[:read, :8]
    assert run.distillation.projection is not None
    assert (run.distillation.projection.state_dict()["mean"] - known.mean(0)).abs().max() < 1e-5


def test_a_teacher_that_is_not_finite_is_found_before_the_first_step(tmp_path: Path) -> None:
    images = Images()
    images.pixels[::2] = torch.nan
    with pytest.raises(ValueError, match="the teacher's embedding is not finite"):
        trainer(tmp_path, train_dataset=images).train()


# ---- The perplexity ----


def test_the_log_gives_the_teachers_perplexity(tmp_path: Path) -> None:
    run = trainer(tmp_path, teacher_temperature=0.5)
    run.train()
    loss, divergence = log_of(run, "relational_loss"), log_of(run, "relational_kl")
    for found, entropy in zip(log_of(run, "teacher_perplexity"), np.subtract(loss, divergence), strict=True):
        assert found == pytest.approx(np.exp(entropy), rel=1e-5)
        assert 2 < found <= 21  # 20 rows and the own key
    assert run.evaluate(Images(8))["eval_teacher_perplexity"] > 2


def test_the_loader_of_the_calibration_is_not_kept(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    assert len(run.accelerator._dataloaders) == 1


@pytest.mark.parametrize("silent", [False, True])
def test_it_shows_how_far_it_is(
    tmp_path: Path, silent: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)
    run = trainer(tmp_path, disable_tqdm=silent, kd_weight="auto")
    run.evaluate(Images(8, seed=3))
    shown = capsys.readouterr().err
    for bar in ("Asking the teacher: 100%", "Measuring the teacher: 100%"):
        assert (bar in shown) == (not silent)
