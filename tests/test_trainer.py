"""The step: the same however its batch is cut, and made of the terms that it says."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback

from hf_rrd import RelationalDistillationTrainer
from tests.builders import CLASSES, Images, log_of, tiny_vit, trainer


def trained(folder: Path, batch: int, accumulation: int, examples: int = 64, **given: object) -> torch.Tensor:
    """All parameters, in a row, after 5 steps of 16 examples with all three terms on and a bank of 40."""
    run = trainer(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=5,
        bank_size=40,
        kd_weight=0.5,
        train_dataset=Images(examples),
        **given,
    )
    run.train()
    bank, head = run.distillation.bank, run.distillation.head
    assert bank is not None and head is not None
    return torch.cat([each.detach().flatten() for each in [*run.model.parameters(), *head.parameters(), bank.filled]])


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 2), (4, 4), (3, 6)])
def test_a_step_is_the_same_however_its_batch_is_cut(tmp_path: Path, batch: int, accumulation: int) -> None:
    # SGD: a difference of rounding stays one, where Adam's first steps would blow it up to the learning rate.
    whole = trained(tmp_path, batch=batch * accumulation, accumulation=1, examples=72, optim="sgd")
    cut = trained(tmp_path, batch=batch, accumulation=accumulation, examples=72, optim="sgd")
    assert (whole - cut).abs().max() < 1e-5


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 2), (4, 4)])
def test_a_step_of_adamw_is_the_same_however_its_batch_is_cut(tmp_path: Path, batch: int, accumulation: int) -> None:
    whole = trained(tmp_path, batch=16, accumulation=1, learning_rate=1e-3)
    cut = trained(tmp_path, batch=batch, accumulation=accumulation, learning_rate=1e-3)
    assert (whole - cut).abs().max() < 1e-5


@pytest.mark.parametrize("examples", [70, 65])
def test_micro_batches_of_unequal_length_weigh_by_their_examples(tmp_path: Path, examples: int) -> None:
    whole = trained(tmp_path, batch=16, accumulation=1, examples=examples, optim="sgd")
    cut = trained(tmp_path, batch=4, accumulation=4, examples=examples, optim="sgd")
    assert (whole - cut).abs().max() < 1e-5


def test_the_first_steps_terms_are_those_of_the_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, images = tiny_vit(), tiny_vit(width=24, seed=1), Images(16)
    in_order = torch.utils.data.SequentialSampler(images)
    monkeypatch.setattr(RelationalDistillationTrainer, "_get_train_sampler", lambda *_: in_order)
    run = trainer(
        tmp_path,
        model=student,
        teacher=teacher,
        train_dataset=images,
        per_device_train_batch_size=8,
        max_steps=2,
        learning_rate=0.0,
        kd_weight=0.5,
        kd_temperature=3.0,
        bank_size=100,
    )
    run.train()

    with torch.no_grad():
        teacher_rows = F.normalize(teacher.vit(images.pixels).last_hidden_state[:, 0], dim=-1)
        pooled = student.vit(images.pixels).last_hidden_state[:, 0]
        student_rows = F.normalize(run.distillation.head(pooled), dim=-1)
        student_logits, teacher_logits = student(images.pixels).logits, teacher(images.pixels).logits
    terms = {"task_loss": 0.0, "kd_loss": 0.0, "relational_loss": 0.0, "relational_kl": 0.0}
    for i in range(8, 16):  # the second step: the bank is the training set, of which the own row counts once
        candidates = teacher_rows
        p = F.softmax(candidates @ teacher_rows[i] / 0.02, dim=0)
        log_q = F.log_softmax(candidates @ student_rows[i] / 0.1, dim=0)
        soft, log_soft = F.softmax(teacher_logits[i] / 3, dim=0), F.log_softmax(student_logits[i] / 3, dim=0)
        terms["task_loss"] += -F.log_softmax(student_logits[i], dim=0)[images.labels[i]].item() / 8
        terms["kd_loss"] += 9 * (soft * (soft.log() - log_soft)).sum().item() / 8
        terms["relational_loss"] += -(p * log_q).sum().item() / 8
        terms["relational_kl"] += (torch.special.xlogy(p, p) - p * log_q).sum().item() / 8
    for name, value in terms.items():
        assert log_of(run, name)[1] == pytest.approx(value, abs=1e-4), name
    assert log_of(run)[1] == pytest.approx(
        terms["task_loss"] + 0.5 * terms["kd_loss"] + terms["relational_loss"], abs=1e-4
    )


def test_without_a_bank_a_micro_batch_is_compared_with_itself(tmp_path: Path) -> None:
    run = trainer(tmp_path, bank_size=0, max_steps=1, train_dataset=Images(8))
    run.train()
    assert 0 < log_of(run, "relational_kl")[0] < log_of(run, "relational_loss")[0]
    assert run.distillation.bank is not None and len(run.distillation.bank) == 0


class Anneal(TrainerCallback):
    """Halves all weights before each step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name in ("task_weight", "kd_weight", "relational_weight"):
            setattr(args, name, getattr(args, name) / 2)


def test_a_callback_that_anneals_the_weights_changes_the_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path, kd_weight=4.0, callbacks=[Anneal()])
    run.train()
    for step, entry in enumerate(run.state.log_history[:3], 1):
        terms = entry["task_loss"] + 4 * entry["kd_loss"] + entry["relational_loss"]
        assert entry["loss"] == pytest.approx(terms / 2**step, rel=1e-5)


class Counted(Images):
    """Counts the examples that are read."""

    def __init__(self, cached: bool) -> None:
        super().__init__(8)
        self.reads, self.cached = 0, cached

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.reads += 1
        cached = {"teacher_embedding": torch.ones(24), "teacher_logits": torch.ones(CLASSES)}
        return super().__getitem__(index) | (cached if self.cached else {})


@pytest.mark.parametrize("cached", [False, True])
def test_making_a_trainer_reads_one_example_at_most(tmp_path: Path, cached: bool) -> None:
    data = Counted(cached)
    trainer(tmp_path, train_dataset=data, kd_weight=1.0, **({"teacher": None} if cached else {}))
    assert data.reads == 1


def test_a_second_training_starts_with_the_bank_of_the_first(tmp_path: Path) -> None:
    run, once = trainer(tmp_path, max_steps=2), trainer(tmp_path, max_steps=2)
    run.train()
    run.train()
    once.train()
    bank, expected = run.distillation.bank, once.distillation.bank
    assert bank is not None and expected is not None
    assert torch.equal(bank.filled, expected.filled)


def test_after_a_resumption_a_log_line_is_of_the_steps_since(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    each = trainer(tmp_path / "each", **settings)
    each.train()
    trainer(tmp_path / "threes", logging_steps=3, **settings).train()
    resumed = trainer(tmp_path / "threes", logging_steps=3, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "threes" / "checkpoint-2"))
    for name in ("loss", "task_loss", "relational_loss"):
        assert log_of(resumed, name) == [pytest.approx(log_of(each, name)[2], rel=1e-6)]


def test_the_head_starts_from_the_seed_and_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    weights = [trainer(tmp_path, seed=seed).model.relational_head.projection.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_student_trains_without_a_teacher_where_only_the_task_counts(tmp_path: Path) -> None:
    run = trainer(tmp_path, teacher=None, relational_weight=0.0)
    run.train()
    assert log_of(run) == pytest.approx(log_of(run, "task_loss"))
    assert not hasattr(run.model, "relational_head")


def test_the_arguments_of_a_trainer_come_in_the_order_of_transformers() -> None:
    import inspect

    from transformers import Trainer

    theirs, ours = (
        [*inspect.signature(each.__init__).parameters] for each in (Trainer, RelationalDistillationTrainer)
    )
    assert ours[: len(theirs)] == theirs


def test_the_saved_student_predicts_as_the_trained_one(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    run.save_model(str(tmp_path / "student"))
    loaded = type(run.model).from_pretrained(tmp_path / "student").eval()
    pixels = Images(5, seed=3).pixels
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, run.model.eval()(pixels).logits)
    assert loaded.config.num_labels == CLASSES
