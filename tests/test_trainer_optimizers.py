"""What trains the head, and by which metric the best student is chosen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from hf_rrd import RelationalDistillationTrainer
from hf_rrd.models.head import HEAD, head_of
from tests.builders import Images, config, log_of, tiny_vit, trainer

SGD = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 4}


def halved(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


@pytest.mark.parametrize("scheduler", [lambda optimizer: None, halved])
def test_an_optimizer_from_before_the_trainer_trains_the_head_as_the_trainers_own_does(
    scheduler: Callable[[Any], Any], tmp_path: Path
) -> None:
    student = tiny_vit()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    early = trainer(tmp_path, model=student, optimizers=(optimizer, scheduler(optimizer)), **SGD)
    start = parameters_to_vector(head_of(student).parameters()).detach().clone()
    early.train()
    own = trainer(tmp_path, **SGD)
    own.create_optimizer()
    own.lr_scheduler = scheduler(own.optimizer)
    own.train()
    assert (parameters_to_vector(early.distillation.head.parameters()) - start).abs().max() > 1e-4
    both = [
        parameters_to_vector([*each.model.parameters(), *each.distillation.head.parameters()]) for each in (early, own)
    ]
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-7)
    assert log_of(early, "relational_kl") == pytest.approx(log_of(own, "relational_kl"), abs=1e-6)


def test_a_run_with_an_optimizer_of_ones_own_resumes_to_the_bit(tmp_path: Path) -> None:
    def run(folder: str, **settings: Any) -> RelationalDistillationTrainer:
        student = tiny_vit()
        groups = [{"params": [weight]} for weight in student.parameters()]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        saves = {"save_strategy": "steps", "save_steps": 2}
        given = {"model": student, "optimizers": (optimizer, halved(optimizer)), "max_steps": 4}
        return trainer(tmp_path / folder, **(given | saves | settings))

    whole = run("whole")
    whole.train()
    resumed = run("whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    both = [
        parameters_to_vector([*each.model.parameters(), *each.distillation.head.parameters()])
        for each in (whole, resumed)
    ]
    assert torch.equal(both[0], both[1])


class Chosen(RelationalDistillationTrainer):
    """Trains the body alone, by names."""

    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = torch.optim.SGD(self.model.vit.parameters(), lr=0.1)
        return self.optimizer


def test_an_optimizer_without_the_head_is_refused_when_the_training_starts(tmp_path: Path) -> None:
    student = tiny_vit()
    listed = (torch.optim.AdamW, {"params": list(student.parameters()), "lr": 1e-2})
    teacher = tiny_vit(width=24, seed=1)
    runs = [
        trainer(tmp_path, model=student, optimizer_cls_and_kwargs=listed),
        Chosen(tiny_vit(), config(tmp_path), train_dataset=Images(), teacher=teacher),
    ]
    for run in runs:
        with pytest.raises(ValueError, match="the optimizer leaves out the student's projection") as error:
            run.train()
        assert f"['{HEAD}.projection.weight', '{HEAD}.projection.bias']" in str(error.value)
        assert "list `trainer.model.parameters()`" in str(error.value)
    # Without a head, or with a frozen one, nothing is left out.
    alone = {"teacher": teacher, "train_dataset": Images()}
    Chosen(tiny_vit(), config(tmp_path, relational_weight=0.0), train_dataset=Images()).train()
    Chosen(tiny_vit(24), config(tmp_path, student_projection="none"), **alone).train()
    frozen = Chosen(tiny_vit(), config(tmp_path), **alone)
    head_of(frozen.model).requires_grad_(False)
    frozen.train()


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_relational_kl", False),
        ("relational_kl", False),
        ("eval_b_relational_kl", False),
        ("eval_b_relational_loss", False),
        ("eval_kd_loss", False),
        ("eval_alignment_cka", True),
        ("eval_b_alignment_rank_correlation", True),
        ("eval_b_teacher_retrieval@1", True),
        ("eval_accuracy", True),
    ],
)
def test_a_divergence_is_better_when_it_is_lower(metric: str, greater: bool, tmp_path: Path) -> None:
    assert config(tmp_path, metric_for_best_model=metric).greater_is_better is greater
    assert (
        config(tmp_path, metric_for_best_model=metric, greater_is_better=not greater).greater_is_better is not greater
    )


@pytest.mark.parametrize("metric", ["eval_relational_kl", "eval_b_relational_kl"])
def test_the_best_model_by_divergence_has_the_lowest(metric: str, tmp_path: Path) -> None:
    several = {"a": Images(8, seed=2), "b": Images(8, seed=3)}
    run = trainer(
        tmp_path,
        eval_dataset=several if "_b_" in metric else Images(8, seed=3),
        metric_for_best_model=metric,
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=5,
        learning_rate=0.3,
    )
    run.train()
    values = [entry[metric] for entry in run.state.log_history if metric in entry]
    assert len(values) == 5 and min(values) < max(values) - 0.01
    assert run.state.best_metric == min(values)
    assert run.state.best_global_step == 1 + values.index(min(values))
