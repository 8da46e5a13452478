"""Several relational losses at once: their weighted sum, the parts in the log, and what asks for which."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback

from hf_rrd.losses.in_batch import own_space_loss
from hf_rrd.losses.logits import dist_loss
from hf_rrd.losses.regression import mse_loss
from hf_rrd.losses.relational import infonce_loss, relational_loss
from hf_rrd.training.distillation import RELATIONAL_LOSSES
from hf_rrd.training.terms import TermLog, objective_without_terms
from tests.builders import Images, log_of, tiny_vit, trainer

ALL = {name: 0.5 + number for number, name in enumerate(RELATIONAL_LOSSES)}


def trained(folder: Path, **given: Any) -> Any:
    run = trainer(folder, **given)
    run.train()
    return run


@pytest.mark.parametrize(
    "losses",
    [{"rrd": 1.0, "mse": 0.5}, {"infonce": 2.0, "rkd_angle": 3.0}, {"srd": 0.1, "own_space": 4.0}, ALL],
    ids=len,
)
def test_the_relational_loss_of_several_is_the_sum_of_weights_times_terms(
    tmp_path: Path, losses: dict[str, float]
) -> None:
    run = trained(tmp_path, relational_loss=losses, relational_weight=2.0, eval_dataset=Images(8, seed=3))
    lines = [line for line in run.state.log_history if "loss" in line]
    assert len(lines) == 3
    metrics = {name.removeprefix("eval_"): value for name, value in run.evaluate().items()}
    for line in (*lines, metrics):
        found = {name for name in line if name.startswith("relational_")} - {"relational_loss", "relational_kl"}
        assert found == {f"relational_{name}" for name in losses}
        total = sum(weight * line[f"relational_{name}"] for name, weight in losses.items())
        assert line["relational_loss"] == pytest.approx(total, rel=1e-5)
        assert line["loss"] == pytest.approx(line["task_loss"] + 2 * line["relational_loss"], rel=1e-5)
        assert ("relational_kl" in line) == ("rrd" in losses)


def test_terms_come_in_the_order_of_the_setting_on_every_process(tmp_path: Path) -> None:
    names = [
        "srd",
        "cosine",
        "pkt",
        "mse",
        "rkd_angle",
        "similarity_preserving",
        "rkd_distance",
    ]  # of a set: 1 in 5,040
    run = trained(tmp_path, relational_loss=dict.fromkeys(names, 1.0), max_steps=1)
    (line,) = [line for line in run.state.log_history if "loss" in line]
    found = [name.removeprefix("relational_") for name in line if name.startswith("relational_")]
    assert found == ["loss", *names]


def test_one_loss_of_another_weight_than_1_leaves_the_perplexity_alone(tmp_path: Path) -> None:
    lines = []
    for weight in (1.0, 2.0):
        run = trained(tmp_path, relational_loss={"rrd": weight}, max_steps=1)
        lines += [line for line in run.state.log_history if "loss" in line]
    assert lines[0]["teacher_perplexity"] == pytest.approx(lines[1]["teacher_perplexity"], rel=1e-5)
    assert 2 * lines[0]["relational_loss"] == pytest.approx(lines[1]["relational_loss"], rel=1e-6)


def test_each_term_is_the_loss_of_its_name_of_the_rows_that_it_compares(tmp_path: Path) -> None:
    student, teacher, images = tiny_vit(), tiny_vit(width=24, seed=1), Images(16)
    losses = {"rrd": 1.0, "infonce": 1.0, "mse": 1.0, "own_space": 1.0}
    settings: dict[str, Any] = {"per_device_train_batch_size": 16, "bank_size": 100, "learning_rate": 0.0}
    run = trained(
        tmp_path, model=student, teacher=teacher, train_dataset=images, relational_loss=losses, max_steps=1, **settings
    )
    (line,) = [line for line in run.state.log_history if "loss" in line]
    with torch.no_grad():
        teacher_rows = teacher.vit(images.pixels).last_hidden_state[:, 0]
        pooled = student.eval().vit(images.pixels).last_hidden_state[:, 0]
        rows = run.distillation.head(pooled)
    bank = F.normalize(teacher_rows, dim=-1)
    expected = {
        "rrd": relational_loss(rows, teacher_rows, bank, include_own=True),
        "infonce": infonce_loss(rows, teacher_rows, bank),
        "mse": mse_loss(rows, teacher_rows),
        "own_space": own_space_loss(pooled, teacher_rows),  # before the projection
    }
    for name, value in expected.items():
        assert line[f"relational_{name}"] == pytest.approx(float(value), abs=1e-4), name


@pytest.mark.parametrize("name", RELATIONAL_LOSSES)
def test_a_loss_alone_by_its_name_trains_as_a_dict_of_it(tmp_path: Path, name: str) -> None:
    alone, as_dict, twice = (
        trained(tmp_path, relational_loss=given, max_steps=2) for given in (name, {name: 1.0}, {name: 2.0})
    )
    assert log_of(alone, "relational_loss") == log_of(as_dict, "relational_loss")
    assert log_of(twice, "relational_loss")[0] == pytest.approx(2 * log_of(alone, "relational_loss")[0], rel=1e-5)
    assert [key for key in as_dict.state.log_history[0] if key == f"relational_{name}"] == []


@pytest.mark.parametrize(
    ("losses", "rows"), [({"mse": 1.0, "own_space": 1.0}, 0), ({"mse": 1.0, "rrd": 1e-3}, 20), ("own_space", 0)]
)
def test_a_bank_is_filled_where_one_of_the_losses_compares_with_it(tmp_path: Path, losses: Any, rows: int) -> None:
    run = trained(tmp_path, relational_loss=losses)
    assert run.distillation.bank is not None and len(run.distillation.bank) == rows
    assert ("bank_size" in run._facts._settings()) == (rows > 0)


class Shift(TrainerCallback):
    """Moves the weight from one loss to another, a little each step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.relational_loss = {"rrd": 1.0 - state.global_step / 4, "mse": 0.5 + state.global_step}


def test_a_callback_may_change_the_weights_of_the_losses(tmp_path: Path) -> None:
    run = trained(tmp_path, relational_loss={"rrd": 1.0, "mse": 0.5}, callbacks=[Shift()])
    for step, line in enumerate(run.state.log_history[:3]):
        total = (1 - step / 4) * line["relational_rrd"] + (0.5 + step) * line["relational_mse"]
        assert line["relational_loss"] == pytest.approx(total, rel=1e-5)


def test_an_evaluation_by_several_losses_of_single_examples_does_not_depend_on_its_batches(tmp_path: Path) -> None:
    run = trained(tmp_path, relational_loss={"rrd": 1.0, "infonce": 0.5})
    one, other = (
        run.evaluate(Images(9, seed=3))["eval_relational_loss"] for run.args.per_device_eval_batch_size in (4, 9)
    )
    assert one == pytest.approx(other, rel=1e-6)


def test_own_space_teaches_the_student_and_not_its_projection(tmp_path: Path) -> None:
    run = trainer(tmp_path, relational_loss="own_space", task_weight=0.0, max_steps=1, weight_decay=0.0)
    head = [weight.detach().clone() for weight in run.distillation.head.parameters()]  # type: ignore[union-attr]
    body = [weight.detach().clone() for weight in run.model.vit.parameters()]
    run.train()
    after = run.distillation.head.parameters()  # type: ignore[union-attr]
    assert all(torch.equal(*pair) for pair in zip(head, after, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(body, run.model.vit.parameters(), strict=True))


def test_the_objective_of_a_search_knows_no_part_of_a_relational_loss(tmp_path: Path) -> None:
    metrics = {"eval_loss": 2.0, "eval_relational_rrd": 9.0, "eval_relational_mse": 9.0, "eval_accuracy": 0.75}
    assert objective_without_terms(metrics) == 0.75


def test_the_parts_are_the_same_in_processes_and_micro_batches_where_a_loss_does_not_compare_within_them(
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {"relational_loss": {"rrd": 1.0, "mse": 0.5}, "bank_size": 40, "max_steps": 3}
    whole = trained(tmp_path, per_device_train_batch_size=16, **settings)
    cut = trained(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4, **settings)
    for name in ("loss", "relational_loss", "relational_rrd", "relational_mse"):
        assert log_of(whole, name) == pytest.approx(log_of(cut, name), rel=1e-4)


def test_kd_by_correlation_is_that_loss_of_the_logits(tmp_path: Path) -> None:
    student, teacher, images = tiny_vit(), tiny_vit(width=24, seed=1), Images(8)
    settings: dict[str, Any] = {"kd_weight": 1.0, "kd_loss": "dist", "kd_temperature": 2.0, "learning_rate": 0.0}
    run = trained(tmp_path, model=student, teacher=teacher, train_dataset=images, max_steps=1, **settings)
    with torch.no_grad():
        logits: list[Tensor] = [model.eval()(images.pixels).logits for model in (student, teacher)]
    assert log_of(run, "kd_loss") == [pytest.approx(float(dist_loss(*logits, 2.0)), rel=1e-4)]


def test_a_window_of_many_steps_keeps_few_numbers_and_their_mean() -> None:
    log = TermLog(lambda: {"task_weight": 1.0})
    for step in range(2500):
        log.add({"task_loss": torch.tensor(step / 2)}, 0.5)
    assert len(log.window["task_loss"]) <= 1000
    assert log.line(lambda sums: sums) == {"task_loss": pytest.approx(2499 / 2)}
    assert log.line(lambda sums: sums) == {}
