"""The student's head, through what else is done to a student."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.utils import compile_regions

from hf_rrd.models.head import WITH_EMBEDDING, attach_head, detach_head, head_of
from tests.builders import Images, log_of, tiny_vit, trainer

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
