"""How hard the teacher pulls, measured and set where its gradient meets the task's."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_rrd.models.head import GROUP
from hf_rrd.training.balance import START, WINDOW, Balance, weighted_sum
from tests.builders import Images, Texts, log_of, tiny_bert, tiny_vit, trainer

DEFAULTS: dict[str, Any] = {"balance_losses": True, "student_projection": "centered", "relational_weight": 3.0}


def alone(sums: Tensor) -> Tensor:
    """The sums of one process are those of all."""
    return sums


def pulled(balance: Balance, task: Tensor, relation: Tensor, weight: float = 1.0) -> Tensor:
    """The gradient of what was split, for the gradients of a task and of relational terms of this weight."""
    hidden = torch.zeros_like(task, requires_grad=True)
    onwards, compared = balance.split(hidden)
    losses = [(onwards * task).sum(), (compared * relation).sum()]
    weighted_sum([1.0, weight], [1.0, weight * balance.factor], losses).backward()
    assert hidden.grad is not None
    return hidden.grad


def test_the_parts_equal_the_whole_and_the_first_step_pulls_little() -> None:
    hidden = torch.randn(5, 7, requires_grad=True)
    balance = Balance(7)
    assert all(torch.equal(part, hidden) for part in balance.split(hidden))
    assert weighted_sum([1.0, 2.0], [0.0, balance.factor], [torch.tensor(2.3), torch.tensor(0.1)]) == 2.5
    task, relation = torch.randn(5, 7), torch.randn(5, 7)
    torch.testing.assert_close(pulled(balance, task, relation), task + START * relation)


def test_a_later_steps_gradient_is_the_weight_times_as_hard_as_the_task() -> None:
    torch.manual_seed(0)
    balance, task = Balance(4), torch.randn(6, 4)
    relation = 50 * torch.randn(6, 4)
    for _ in range(3):
        found = pulled(balance, task, relation, 2.0) - task
        balance.update(2.0, 6, alone, scale=1.0)
    torch.testing.assert_close(found.norm(), 2 * task.norm())
    torch.testing.assert_close(found / found.norm(), relation / relation.norm())


def test_the_tasks_pull_is_the_mean_of_all_steps_and_the_relations_a_moving_average() -> None:
    torch.manual_seed(1)
    balance, tasks, relations = Balance(3), torch.rand(40) + 0.1, torch.rand(40) + 0.1
    expected = 0.0
    for step, (task, relation) in enumerate(zip(tasks.tolist(), relations.tolist(), strict=True), 1):
        pulled(balance, torch.full((1, 3), task / 3**0.5), torch.full((1, 3), relation / 3**0.5))
        balance.update(1.0, 1, alone, scale=1.0)
        expected += (relation - expected) / min(step, WINDOW)
    assert balance.measured[0].item() == pytest.approx(tasks.mean().item(), rel=1e-5)
    assert balance.measured[1].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_step_that_overflows_measures_nothing(broken: float) -> None:
    balance = Balance(2)
    pulled(balance, torch.ones(3, 2), torch.ones(3, 2))
    balance.update(1.0, 3, alone, scale=1.0)
    before = balance.state_dict()
    pulled(balance, torch.full((3, 2), broken), torch.ones(3, 2))
    balance.update(1.0, 3, alone, scale=1.0, may_overflow=True)
    assert balance.steps == 1 and balance.factor == 1
    assert all(torch.equal(before[name], after) for name, after in balance.state_dict().items())


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_counts_as_one_like_those_before(broken: float) -> None:
    balance = Balance(2)
    for step in range(3):
        pulled(balance, torch.full((3, 2), broken if step == 1 else 2.0), torch.ones(3, 2))
        balance.add(torch.ones(3, 2), torch.ones(3, 4))
        balance.update(1.0, 3, alone, scale=1.0)
        torch.testing.assert_close(balance.measured, torch.tensor([24**0.5, 6**0.5, 4.0, 1.0, 1.0]))
        torch.testing.assert_close(balance.factor, torch.tensor(2.0))


def test_the_first_pull_counts_whole_also_after_pulls_of_0_and_a_checkpoint() -> None:
    balance, restored = Balance(2), Balance(2)
    for step in range(4):
        pulled(balance, torch.ones(3, 2), torch.full((3, 2), 0.0 if step < 3 else 5.0))
        if step == 3:
            restored.load_state_dict(balance.state_dict())
            restored._squares.grad = balance._squares.grad
            restored.update(1.0, 3, alone, scale=1.0)
        balance.update(1.0, 3, alone, scale=1.0)
    torch.testing.assert_close(balance.measured[1], torch.tensor(150.0).sqrt())
    assert torch.equal(restored.measured, balance.measured)


def test_a_state_that_was_taken_over_stays_as_it_was() -> None:
    balance, restored = Balance(2), Balance(2)
    pulled(balance, torch.ones(3, 2), torch.ones(3, 2))
    balance.update(1.0, 3, alone, scale=1.0)
    state = balance.state_dict()
    restored.load_state_dict(state)
    restored.clear()
    assert all(torch.equal(state[name], balance.state_dict()[name]) for name in state)


def test_a_step_that_a_loss_scaler_skips_measures_nothing(tmp_path: Path) -> None:
    calls: list[int] = []

    def broken_once(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        calls.append(1)  # twice before the first step, to see whether it counts labels
        return torch.nn.functional.cross_entropy(outputs["logits"], labels) * (torch.nan if len(calls) == 4 else 1)

    run = trainer(tmp_path, compute_loss_func=broken_once, max_steps=4, **DEFAULTS)
    run.accelerator.scaler = torch.amp.GradScaler("cpu")  # as a float16 training on a GPU has one
    run.train()
    balance = run.distillation.balance
    assert balance is not None and balance.steps == 3 and balance.measured.isfinite().all()


def test_where_only_the_relations_pull_they_stay_as_they_are() -> None:
    balance, relation = Balance(2), torch.randn(3, 2)
    for _ in range(2):
        found = pulled(balance, torch.zeros(3, 2), relation, 5.0)
        balance.update(5.0, 3, alone, scale=1.0)
    assert torch.equal(found, 5 * relation)


def test_a_loss_scaler_and_more_processes_change_nothing() -> None:
    one, many = Balance(2), Balance(2)
    task, relation = torch.randn(4, 2), torch.randn(4, 2)
    pulled(one, task, relation)
    one.update(1.0, 4, alone, scale=1.0)
    pulled(many, 1024 * 2 * task[:2], 1024 * 2 * relation[:2])  # of the other process the other two rows
    other = 1024 * 2 * torch.stack([task[2:].norm(), START * relation[2:].norm()])
    many.update(1.0, 4, lambda sums: sums + torch.cat([other.square(), torch.zeros(3)]), scale=2 * 1024)
    torch.testing.assert_close(one.measured, many.measured)


def test_the_mean_of_the_students_embeddings_and_the_length_of_its_rows_are_theirs() -> None:
    balance, embeddings, rows = Balance(3), torch.randn(10, 3), torch.randn(10, 5)
    balance.add(embeddings[:4], rows[:4])
    balance.add(embeddings[4:], rows[4:])
    balance.update(1.0, 10, alone, scale=1.0)
    torch.testing.assert_close(balance.mean, embeddings.mean(0))
    torch.testing.assert_close(balance.row_norm, rows.square().sum(-1).mean().sqrt())


def test_what_is_saved_is_taken_over_and_of_another_student_refused() -> None:
    balance, restored = Balance(3), Balance(3)
    pulled(balance, torch.randn(4, 3), torch.randn(4, 3))
    balance.update(2.0, 4, alone, scale=1.0)
    restored.load_state_dict(balance.state_dict())
    assert torch.equal(restored.measured, balance.measured) and restored.steps == 1
    assert torch.equal(restored.factor, balance.factor)
    for state in ({}, Balance(4).state_dict()):
        with pytest.raises(ValueError, match="of another student"):
            restored.load_state_dict(state)


def parameters_of(folder: Path, batch: int, accumulation: int, student: Any = tiny_vit) -> Tensor:
    run = trainer(
        folder,
        model=student(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=6,
        bank_size=40,
        kd_weight=0.5,
        learning_rate=1e-3,
        train_dataset=Images(6 * 2 * GROUP),
        **DEFAULTS,
    )
    run.train()
    assert run.distillation.balance is not None and 0 < run.distillation.balance.factor
    return torch.cat(
        [each.detach().flatten() for each in [*run.model.parameters(), run.distillation.balance.measured]]
    )


def test_a_step_is_the_same_however_it_is_cut_into_groups(tmp_path: Path) -> None:
    whole, cut = parameters_of(tmp_path, 2 * GROUP, 1), parameters_of(tmp_path, GROUP, 2)
    assert (whole - cut).abs().max() < 1e-5


@pytest.mark.parametrize("pooling", ["auto", "mean", "cls"])
def test_the_pull_that_a_training_measures_is_its_weight_times_the_tasks(pooling: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, student_pooling=pooling, max_steps=30, learning_rate=1e-4, **DEFAULTS)
    pulls: list[float] = []
    balance = run.distillation.balance
    assert balance is not None
    update = balance.update

    def noted(*args: Any, **kwargs: Any) -> None:
        squares = balance._squares.grad
        assert squares is not None
        pulls.append((squares[1] / squares[0]).sqrt().item())
        update(*args, **kwargs)

    balance.update = noted  # type: ignore[method-assign]
    run.train()
    assert pulls[0] < 0.5 and 2 < sum(pulls[-10:]) / 10 < 4.5


@pytest.mark.parametrize("student", [tiny_vit, partial(tiny_vit, dropout=0.1)])
def test_a_split_without_scaling_trains_as_none_does(student: Any, tmp_path: Path) -> None:
    # Of a weight of 1 half the gradient is left, which AdamW does not feel where nothing is clipped.
    exact: dict[str, Any] = {"max_grad_norm": 0.0, "adam_epsilon": 1e-30, "relational_weight": 1.0, "kd_weight": 1.0}
    logs = []
    for splits in (False, True):
        run = trainer(tmp_path, model=student(), balance_losses=splits, **exact)
        if splits:
            balance = run.distillation.balance
            assert balance is not None

            def unscaled(*_: Any, of: Any = balance) -> None:
                of.factor = torch.ones(())

            balance.update = unscaled  # type: ignore[method-assign, assignment]
            clear = balance.clear
            balance.clear = lambda of=balance, clear=clear: (clear(), unscaled())  # type: ignore[method-assign, misc]
        run.train()
        logs.append([line["loss"] for line in run.state.log_history if "loss" in line])
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


def test_a_students_text_classifier_is_compared_by_what_its_classifier_reads() -> None:
    from hf_rrd import embed

    student = tiny_bert(dropout=0.1).eval()
    inputs = {"input_ids": torch.randint(1, 20, (3, 5))}
    rows, outputs = embed(student, inputs, "head", return_outputs=True)
    assert isinstance(rows, Tensor)
    torch.testing.assert_close(student.classifier(rows), outputs.logits)


# ---- Weights that change, and poolings of one's own ----


class Weights(TrainerCallback):
    """Sets the relational weight of each step."""

    def __init__(self, weights: list[float]) -> None:
        self.weights = iter(weights)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.relational_weight = next(self.weights)


def pulls_of(run: Any) -> list[float]:
    """How many times as hard as the task's mean pull so far the relational terms pull in each step of a training."""
    pulls: list[float] = []
    balance, task = run.distillation.balance, []
    update = balance.update

    def noted(weight: float, *args: Any) -> None:
        task_pull, pull = ((1 + weight) * balance._squares.grad.sqrt()).tolist()
        task.append(task_pull)
        pulls.append(pull / (sum(task) / len(task)))
        update(weight, *args)

    balance.update = noted
    run.train()
    return pulls


@pytest.mark.parametrize("weight", [0.0, 0.5, 10.0])
def test_the_gradient_is_that_of_a_weighted_mean_and_the_value_that_of_the_sum(weight: float, tmp_path: Path) -> None:
    run = trainer(tmp_path, **DEFAULTS | {"relational_weight": 3.0, "kd_weight": 0.0})
    distillation = run.distillation
    distillation.start(run.model, run.train_dataset)
    assert distillation.balance is not None
    distillation.balance.factor, run.args.relational_weight = torch.tensor(0.2), weight
    task, relation = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([5.0], requires_grad=True)
    total = distillation.total({"task_loss": task, "relational_loss": relation})
    total.backward()
    assert total.item() == pytest.approx(2 + weight * 5)
    torch.testing.assert_close(task.grad, torch.full((2,), 0.5 / (1 + weight)))
    torch.testing.assert_close(relation.grad, torch.tensor([0.2 * weight / (1 + weight)]))


@pytest.mark.parametrize("before", [0.0, 0.1, 30.0])
def test_a_weight_that_a_callback_changes_holds_from_that_step_on(before: float, tmp_path: Path) -> None:
    weights = [before] * 5 + [3.0] * 15
    settings: dict[str, Any] = {"max_steps": 20, "learning_rate": 1e-5, "bank_size": 48, **DEFAULTS}
    run = trainer(tmp_path, callbacks=[Weights(weights)], per_device_train_batch_size=16, **settings)
    pulls = pulls_of(run)
    assert all(pull == pytest.approx(before, rel=0.5) for pull in pulls[1:5])
    first = 6 if before == 0 else 5  # where nothing pulled yet, one step more measures
    assert all(pull == pytest.approx(3.0, rel=0.5) for pull in pulls[first:]), pulls
    assert pulls[first - 5 if before else 5] < 1


def hidden_mean(output: Any, attention_mask: Tensor | None) -> Any:
    return output.last_hidden_state.mean(1)


def pooler(output: Any, attention_mask: Tensor | None) -> Any:
    return output.pooler_output


def by_number(output: Any, attention_mask: Tensor | None) -> Any:
    return output[0][:, 0]


@pytest.mark.parametrize("pooling", [hidden_mean, pooler, by_number])
def test_a_pooling_of_ones_own_is_balanced_whatever_it_reads(pooling: Any, tmp_path: Path) -> None:
    texts: dict[str, Any] = {"train_dataset": Texts(), "teacher": tiny_bert(24, seed=1), "model": tiny_bert()}
    settings: dict[str, Any] = {"max_steps": 20, "learning_rate": 1e-5, "bank_size": 48, **DEFAULTS}
    run = trainer(tmp_path, student_pooling=pooling, per_device_train_batch_size=16, **texts, **settings)
    pulls = pulls_of(run)
    assert pulls[0] < 0.5 and all(pull == pytest.approx(3.0, rel=0.5) for pull in pulls[1:]), pulls


def test_without_a_task_nothing_is_split_and_the_weight_multiplies_the_loss(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"task_weight": 0.0, **DEFAULTS}
    logs = [log_of(trained(trainer(tmp_path, **(settings | {"balance_losses": on})))) for on in (True, False)]
    assert logs[0] == logs[1]


def trained(run: Any) -> Any:
    run.train()
    return run


@pytest.mark.parametrize("labels", [True, False])
def test_saved_and_resumed_with_the_defaults_a_run_ends_bitwise_as_the_whole_one(labels: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        **{"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2},
        **{"relational_weight": "auto", "kd_weight": "auto", "teacher_projection": "center"},
        **{"balance_losses": True, "student_projection": "centered", "task_weight": float(labels)},
        "per_device_train_batch_size": 8 if labels else 5,  # of 5 rows the mean is that of the steps before
        **{"relational_loss": {"rrd": 1.0, "own_space": 0.5}, "train_dataset": Images(48, labels=labels)},
        **{"eval_dataset": Images(9, seed=3, labels=labels), "remove_unused_columns": True},
    }

    def made() -> Any:
        models = tiny_vit(dropout=0.1), tiny_vit(width=24, seed=1)
        for model in models:
            model.config.id2label = dict(enumerate("abcd"))
        return trainer(tmp_path, model=models[0], teacher=models[1], **settings)

    whole, again = trained(made()), made()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for part in ("balance", "head", "bank", "reference", "teacher_projection"):
        states = [run.distillation.state_dict()[part] for run in (whole, again)]
        assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    weights = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in weights)
    assert log_of(whole) == log_of(again)
    terms = [name for name in whole.evaluate() if "loss" in name or "relational" in name]
    found = [run.evaluate() for run in (whole, again)]
    assert [found[0][name] for name in terms] == [found[1][name] for name in terms]


def test_a_student_that_model_init_makes_for_the_training_is_balanced_on_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[Balance] = []
    monkeypatch.setattr(Balance, "to", lambda self, device: moved.append(self))
    run = trainer(tmp_path, model_init=lambda: tiny_vit(), balance_losses=True)
    run.train()
    assert run.distillation.balance in moved
