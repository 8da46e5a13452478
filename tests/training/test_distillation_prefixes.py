"""`matryoshka_dims`: the relational losses as means over the leading dimensions of both sides."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rrd.losses.in_batch import own_space_loss
from hf_rrd.losses.regression import cosine_loss, mse_loss
from hf_rrd.training.distillation import RELATIONAL_LOSSES
from tests.builders import Images, log_of, tiny_vit, trainer

WIDTH = 24  # of the teacher in `trainer`
DIMS = [24, 9, 5]


def trained(folder: Path, **given: Any) -> Any:
    run = trainer(folder, **given)
    run.train()
    return run


def cosine(one: Tensor, other: Tensor, dim: int) -> float:
    one, other = one[:dim], other[:dim]
    return float(one @ other / (one.norm() * other.norm()))


def log_softmax(values: list[float]) -> list[float]:
    total = math.log(sum(math.exp(value - max(values)) for value in values)) + max(values)
    return [value - total for value in values]


def naive_rrd(student: Tensor, teacher: Tensor, bank: Tensor, dim: int) -> tuple[float, float, float]:
    """The means over the batch of rrd, its divergence and InfoNCE in the first `dim` dimensions, by loops."""
    sums = [0.0, 0.0, 0.0]
    for mine, own in zip(student, teacher, strict=True):
        keys = [own, *[row for row in bank if cosine(own, row, dim) < 0.9999]]
        student_log = log_softmax([cosine(mine, key, dim) / 0.1 for key in keys])
        teacher_log = log_softmax([cosine(own, key, dim) / 0.05 for key in keys])
        for p, q in zip(teacher_log, student_log, strict=True):
            sums[0] -= math.exp(p) * q / len(student)
            sums[1] += math.exp(p) * (p - q) / len(student)
        sums[2] -= student_log[0] / len(student)
    return sums[0], sums[1], sums[2]


@pytest.mark.parametrize("bank_size", [20, 0])
def test_each_term_is_the_mean_over_the_prefixes(tmp_path: Path, bank_size: int) -> None:
    student, teacher, images = tiny_vit(), tiny_vit(width=WIDTH, seed=1), Images(16)
    losses = {"rrd": 1.0, "infonce": 2.0, "mse": 3.0, "cosine": 4.0, "own_space": 5.0}
    settings: dict[str, Any] = {"per_device_train_batch_size": 16, "learning_rate": 0.0, "teacher_temperature": 0.05}
    run = trained(
        tmp_path,
        model=student,
        teacher=teacher,
        train_dataset=images,
        relational_loss=losses,
        bank_size=bank_size,
        max_steps=1,
        matryoshka_dims=[5, 24, 9],
        **settings,
    )
    (line,) = [line for line in run.state.log_history if "loss" in line]
    with torch.no_grad():
        rows = teacher.vit(images.pixels).last_hidden_state[:, 0]
        pooled = student.eval().vit(images.pixels).last_hidden_state[:, 0]
        projected = run.distillation.head(pooled)
    by_prefix = [naive_rrd(projected.double(), rows.double(), rows.double(), dim) for dim in DIMS]
    rrd, kl, infonce = (sum(values) / 3 for values in zip(*by_prefix, strict=True))
    expected = {
        "rrd": rrd,
        "kl": kl,
        "infonce": infonce,
        "mse": sum(float(mse_loss(projected[:, :dim], rows[:, :dim])) for dim in DIMS) / 3,
        "cosine": sum(float(cosine_loss(projected[:, :dim], rows[:, :dim])) for dim in DIMS) / 3,
        "own_space": float(own_space_loss(pooled, rows)),  # which is of the whole embedding before the projection
    }
    for name, value in expected.items():
        assert line[f"relational_{name}"] == pytest.approx(value, abs=1e-4), name
    assert line["teacher_perplexity"] == pytest.approx(math.exp(rrd - kl), rel=1e-4)
    total = sum(weight * expected[name] for name, weight in losses.items())
    assert line["relational_loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("name", RELATIONAL_LOSSES[:-1])
def test_the_full_width_alone_trains_as_no_prefixes_to_the_bit(tmp_path: Path, name: str) -> None:
    whole, prefix = (
        trained(tmp_path, relational_loss=name, max_steps=2, matryoshka_dims=dims) for dims in (None, [WIDTH])
    )
    assert log_of(whole, "relational_loss") == log_of(prefix, "relational_loss")
    weights = zip(whole.model.parameters(), prefix.model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in weights)


def test_the_order_of_the_widths_changes_nothing_to_the_bit(tmp_path: Path) -> None:
    one, other = (trained(tmp_path, matryoshka_dims=dims) for dims in ([24, 9, 5], [5, 24, 9]))
    assert log_of(one, "loss") == log_of(other, "loss")


def test_what_no_prefix_reaches_learns_nothing_and_a_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, matryoshka_dims=[9, 5], weight_decay=0.0)
    assert "`matryoshka_dims` [9, 5] leaves out the full width, 24: the student learns nothing in what" in caplog.text
    projection = run.distillation.head.projection.weight  # type: ignore[union-attr]
    before = projection.detach().clone()
    run.train()
    moved = (projection != before).any(1)  # (24,)
    assert moved.tolist() == [True] * 9 + [False] * 15
    caplog.clear()
    trainer(tmp_path, matryoshka_dims=[24, 5])
    assert "matryoshka_dims" not in caplog.text


def test_a_step_by_prefixes_is_the_same_however_its_batch_is_cut(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"relational_loss": {"rrd": 1.0, "infonce": 0.5}, "matryoshka_dims": DIMS}
    whole = trained(tmp_path, per_device_train_batch_size=16, **settings)
    cut = trained(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2, **settings)
    for name in ("loss", "relational_loss", "relational_kl"):
        assert log_of(whole, name) == pytest.approx(log_of(cut, name), rel=1e-4)
    for one, other in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=3e-5)


def test_a_resumed_run_ends_where_the_whole_one_does_to_the_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "matryoshka_dims": DIMS}
    whole, resumed = trainer(tmp_path, **settings), trainer(tmp_path, **settings)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    weights = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in weights)
    assert log_of(whole)[2:] == log_of(resumed)[2:]


def test_an_evaluation_by_prefixes_does_not_depend_on_its_batches(tmp_path: Path) -> None:
    run = trained(tmp_path, matryoshka_dims=DIMS)
    first = run.evaluate(Images(9, seed=3))
    run.args.per_device_eval_batch_size = 4
    second = run.evaluate(Images(9, seed=3))
    for name in ("eval_relational_loss", "eval_relational_kl", "eval_teacher_perplexity"):
        assert first[name] == pytest.approx(second[name], rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"projection_dim": 8, "teacher_projection": "pca"}])
def test_a_width_beyond_what_is_compared_is_refused_at_construction(tmp_path: Path, settings: dict[str, Any]) -> None:
    width = settings.get("projection_dim", WIDTH)
    with pytest.raises(ValueError, match=f"must be at most the width that is compared, {width}, got .*4, {width + 1}"):
        trainer(tmp_path, matryoshka_dims=[4, width + 1], **settings)
    trainer(tmp_path, matryoshka_dims=[4, width], **settings)


def test_other_widths_than_a_trainer_was_made_with_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, matryoshka_dims=[24, 8])
    run.args.matryoshka_dims = [24, 4]
    with pytest.raises(
        ValueError, match=r"`matryoshka_dims` was \[24, 8\] when the trainer was made and is \[24, 4\]"
    ):
        run.train()


def test_a_prefix_that_tells_no_example_from_another_is_refused_before_the_first_step(tmp_path: Path) -> None:
    teacher = tiny_vit(width=WIDTH, seed=1)
    with torch.no_grad():  # its first two dimensions are the same for all
        teacher.vit.layernorm.weight[:2] = 0
        teacher.vit.layernorm.bias[:2] = 1
    with pytest.raises(ValueError, match="embeddings of 20 .* all alike .* in the 2 dimensions"):
        trainer(tmp_path, teacher=teacher, matryoshka_dims=[24, 2]).train()
    trainer(tmp_path, teacher=teacher, matryoshka_dims=[24, 4], max_steps=1).train()


def test_the_card_tells_the_widths(tmp_path: Path) -> None:
    run = trained(tmp_path, matryoshka_dims=[24, 8], max_steps=1)
    run.create_model_card()
    assert "| `matryoshka_dims` | [24, 8] |" in (tmp_path / "README.md").read_text(encoding="utf-8")
    run = trained(tmp_path, max_steps=1)
    assert "matryoshka_dims" not in run._facts._settings()
