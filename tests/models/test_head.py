"""The student's head, through what else is done to a student."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.utils import compile_regions

from hf_rrd.models.head import FEWEST, GROUP, WITH_EMBEDDING, attach_head, detach_head, head_of
from tests.builders import Images, Texts, log_of, tiny_bert, tiny_vit, trainer

LORA: dict[str, Any] = {"target_modules": ["query", "q_proj"]}  # as transformers 5.0 calls it, and as it does later


def kept_on(model: Any) -> list[str]:
    return [name for name in model.__dict__ if "hf_rrd" in name or name == WITH_EMBEDDING]


def test_a_forward_that_fails_leaves_nothing_on_the_student() -> None:
    student = tiny_vit().eval()
    attach_head(student, dim=8)
    with pytest.raises(ValueError, match="channel"):
        student(torch.zeros(1, 5, 16, 16), **{WITH_EMBEDDING: True})
    assert kept_on(student) == kept_on(student.vit) == []
    student(Images(2).pixels)
    assert kept_on(student) == kept_on(student.vit) == []


def test_a_body_that_is_replaced_after_the_trainer_was_made_is_compared_in_its_place(tmp_path: Path) -> None:
    logs = []
    for body in (None, tiny_vit(seed=3).vit):
        student = tiny_vit(seed=0 if body is None else 1)
        student.classifier.load_state_dict(tiny_vit(seed=5).classifier.state_dict())
        if body is None:
            student.vit.load_state_dict(tiny_vit(seed=3).vit.state_dict())
        run = trainer(tmp_path, model=student)
        if body is not None:
            student.vit = body
        run.create_optimizer()
        run.train()
        logs.append(log_of(run, "relational_loss"))
        detach_head(student)
        assert len(student.vit._forward_hooks) == 0
    assert logs[0] == logs[1]


def test_a_student_whose_blocks_were_compiled_one_by_one_is_an_error_that_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a copy that `compile_regions` made of a ViTFor.*set torch_compile=True"):
        trainer(tmp_path, model=compile_regions(tiny_vit(), backend="eager"))


@pytest.mark.slow
def test_a_teacher_whose_blocks_were_compiled_one_by_one_teaches_as_it_does_eagerly(tmp_path: Path) -> None:
    run = trainer(tmp_path, teacher=compile_regions(tiny_vit(width=24, seed=1), backend="eager"))
    run.train()
    plain = trainer(tmp_path)
    plain.train()
    assert log_of(run, "relational_loss") == pytest.approx(log_of(plain, "relational_loss"), rel=1e-5)


@pytest.mark.parametrize("targets", [LORA["target_modules"], "all-linear"])
def test_lora_around_a_student_that_has_a_trainers_head_trains_under_another(targets: Any, tmp_path: Path) -> None:
    student = tiny_vit()
    trainer(tmp_path, model=student)  # whose head is on it
    wrapped = peft.get_peft_model(student, peft.LoraConfig(target_modules=targets))
    run = trainer(tmp_path, model=wrapped)
    names = [name for name, _ in wrapped.named_parameters() if "relational_head" in name]
    assert names == ["relational_head.projection.weight", "relational_head.projection.bias"]
    run.train()
    assert run.evaluate(Images(8))["eval_relational_loss"] > 0


def test_a_student_with_an_added_adapter_resumes_where_it_was(tmp_path: Path) -> None:
    runs, flat = [], {"lr_scheduler_type": "constant"}
    for steps in (None, 2, 4):
        student = tiny_vit()
        torch.manual_seed(0)
        student.add_adapter(peft.LoraConfig(**LORA))
        folder = tmp_path / ("whole" if steps is None else "parts")
        run = trainer(folder, model=student, max_steps=steps or 4, save_strategy="steps", save_steps=2, **flat)
        run.train(resume_from_checkpoint=steps == 4)
        runs.append({name: weight.clone() for name, weight in student.state_dict().items() if "lora" in name})
    assert len(runs[0]) == 4 and all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_an_evaluation_of_a_headless_student_collects_its_embeddings_and_no_hidden_states(tmp_path: Path) -> None:
    data = Images(10, labels=False)
    student = tiny_vit().vit
    run = trainer(tmp_path, model=student, task_weight=0.0, train_dataset=data)
    predictions = run.predict(data).predictions
    with torch.no_grad():
        expected = student.eval()(data.pixels).last_hidden_state[:, 0]
    assert predictions.shape == (10, 16)
    torch.testing.assert_close(torch.as_tensor(predictions), expected, rtol=1e-5, atol=1e-6)


def test_a_copy_of_a_student_computes_its_own_embedding() -> None:
    student, pixels = tiny_vit().eval(), Images(3).pixels
    attach_head(student, dim=8)
    copied = copy.deepcopy(student)
    assert head_of(copied) is not head_of(student)
    with torch.no_grad():
        copied.vit.layernorm.weight.zero_(), copied.vit.layernorm.bias.fill_(1.0)
        pooled = copied(pixels, **{WITH_EMBEDDING: True}).relational_pooled
    assert torch.equal(pooled, torch.ones(3, 16))


# ---- Less the mean ----

CENTERED: dict[str, Any] = {"student_projection": "centered", "balance_losses": True}


@pytest.mark.parametrize(
    ("rows", "groups"),
    [(8, [8]), (16, [16]), (17, [17]), (31, [31]), (32, [16, 16]), (40, [20, 20]), (50, [17, 17, 16]), (64, [16] * 4)],
)
def test_in_training_the_mean_of_each_group_is_taken_off_with_its_gradient(rows: int, groups: list[int]) -> None:
    head = attach_head(tiny_vit(), dim=5).train()
    head.mean = torch.full((16,), 9.0)  # which is for other cases
    pooled = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.randn(rows, 5, generator=torch.Generator().manual_seed(1))
    centered = torch.cat([group - group.mean(0, keepdim=True) for group in pooled.split(groups)])
    expected = centered @ head.projection.weight.T + head.projection.bias
    torch.testing.assert_close(head(pooled), expected, rtol=1e-5, atol=1e-6)
    (slope,) = torch.autograd.grad((head(pooled) * weights).sum(), pooled)
    (expected_slope,) = torch.autograd.grad((expected * weights).sum(), pooled)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-5, atol=1e-6)
    assert slope.split(groups)[0].sum(0).abs().max() < 1e-5  # what all have in common is taught nothing


@pytest.mark.parametrize(("rows", "training"), [(1, True), (FEWEST - 1, True), (1, False), (GROUP, False)])
def test_few_rows_and_an_evaluation_are_compared_less_the_running_mean(rows: int, training: bool) -> None:
    head = attach_head(tiny_vit(), dim=5).train(training)
    pooled, mean = torch.randn(rows, 16), torch.randn(16)
    for given in (None, mean):
        head.mean = given
        expected = head.projection(pooled if given is None else pooled - given)
        torch.testing.assert_close(head(pooled), expected, rtol=1e-5, atol=1e-6)


def test_other_projections_take_no_mean_off() -> None:
    for projection, dim in (("linear", 5), ("none", 16)):
        head, pooled = attach_head(tiny_vit(), dim=dim, projection=projection).train(), torch.randn(32, 16)
        head.mean = torch.randn(16)
        torch.testing.assert_close(head(pooled), head.projection(pooled), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [5, 16])
def test_an_evaluation_reads_the_mean_of_the_embeddings_of_the_last_steps(batch: int, tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        learning_rate=0.0,
        per_device_train_batch_size=batch,
        max_steps=4,
        train_dataset=Images(80),
        **CENTERED,
    )
    pooled: list[torch.Tensor] = []
    balance = run.distillation.balance
    assert balance is not None and run.distillation.head is not None
    add = balance.add
    balance.add = lambda own, rows: (pooled.append(own.detach().clone()), add(own, rows))[1]  # type: ignore[method-assign]
    run.train()
    assert [len(rows) for rows in pooled] == [batch] * 4
    assert run.distillation.head.mean is not None
    torch.testing.assert_close(run.distillation.head.mean, torch.cat(pooled).mean(0), rtol=1e-5, atol=1e-6)
    one, eight = (
        run.evaluate(Images(8, seed=3))["eval_relational_loss"] for run.args.per_device_eval_batch_size in (1, 8)
    )
    assert one == pytest.approx(eight, rel=1e-5)  # so an evaluation does not depend on its batches


def test_micro_batches_of_5_rows_train_less_the_running_mean_of_the_steps_before(tmp_path: Path) -> None:
    run = trainer(tmp_path, per_device_train_batch_size=5, gradient_accumulation_steps=2, max_steps=4, **CENTERED)
    head = run.distillation.head
    assert head is not None
    means: list[Any] = []

    def note(module: Any, args: Any) -> None:
        if torch.is_grad_enabled():
            means.append((head.mean.clone(), args[0]))

    head.projection.register_forward_pre_hook(note)
    run.train()
    assert len(means) == 8 and (means[0][0] == 0).all()  # nothing is known before the first step
    for first, second in zip(means[::2], means[1::2], strict=True):
        assert torch.equal(first[0], second[0])
    assert all(not torch.equal(means[i][0], means[i + 2][0]) for i in range(0, 6, 2))
    assert all(len(rows) == 5 for _, rows in means) and all(value > 0 for value in log_of(run, "relational_loss"))


def test_gradient_checkpointing_changes_no_step(tmp_path: Path) -> None:
    for build, data in ((tiny_vit, Images), (tiny_bert, None)):
        given: dict[str, Any] = {"kd_weight": 0.5, "relational_weight": 3.0, "max_steps": 4, **CENTERED}
        if data is None:
            given |= {"train_dataset": Texts(), "teacher": tiny_bert(24, seed=1)}
        logs = []
        for checkpointing in (False, True):
            run = trainer(tmp_path, model=build(), gradient_checkpointing=checkpointing, **given)
            run.train()
            assert run.distillation.balance is not None
            logs.append([*log_of(run), *run.distillation.balance.measured[:2].tolist()])
        assert logs[0] == pytest.approx(logs[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny_vit, tiny_bert])
def test_a_compiled_student_trains_with_the_defaults_as_an_eager_one(build: Any, tmp_path: Path) -> None:
    given: dict[str, Any] = {"kd_weight": 0.5, "relational_weight": 3.0, "max_steps": 4, **CENTERED}
    if build is tiny_bert:
        given |= {"train_dataset": Texts(), "teacher": tiny_bert(24, seed=1)}
    logs = []
    for compiled in (False, True):
        run = trainer(
            tmp_path,
            model=build(),
            torch_compile=compiled,
            torch_compile_backend="eager" if compiled else None,
            **given,
        )
        run.train()
        assert run.distillation.balance is not None and run.distillation.balance.steps == 4
        logs.append([*log_of(run), *run.distillation.balance.measured[:2].tolist()])
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)


@pytest.mark.parametrize("projection", ["centered", "linear"])
def test_of_equal_widths_the_projection_starts_as_the_identity(projection: str) -> None:
    student = tiny_vit(width=16)
    head = attach_head(student, 16, projection).eval()
    pooled = torch.randn(5, 16)
    assert torch.equal(head(pooled), pooled)
    assert not torch.equal(attach_head(student, 12, projection).projection.weight, torch.eye(12, 16))
