"""The task's part of a step: over labels where the loss is, whatever the cut of the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BertForMaskedLM,
    BertForTokenClassification,
    Trainer,
    TrainingArguments,
)

from hf_rrd import RelationalDistillationTrainer
from tests.builders import CLASSES, Images, Texts, Tokens, log_of, tiny_bert, tiny_gpt2, tiny_tokens, tiny_vit, trainer


class SomeLabels(Images):
    """Images of which every third has a label: some micro-batches have none."""

    def __init__(self, count: int = 24) -> None:
        super().__init__(count)
        assert self.labels is not None
        self.labels[torch.arange(count) % 3 > 0] = -100


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """As transformers' documentation has it."""
    logits = outputs["logits"].flatten(0, -2)
    return F.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch


def squared(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The mean over the numbers that are known."""
    known = labels != -100
    return ((outputs["logits"].squeeze(-1) - labels).square() * known).sum() / known.sum().clamp(min=1)


STUDENTS: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]] = {
    "causal LM": (tiny_gpt2, Tokens, {}),
    "masked LM, whose loss ignores the count": (lambda: tiny_tokens(BertForMaskedLM), Tokens, {}),
    "tokens, whose loss ignores the count": (
        lambda: tiny_tokens(BertForTokenClassification),
        lambda: Tokens(classes=CLASSES),
        {},
    ),
    "smoothed": (tiny_gpt2, Tokens, {"label_smoothing_factor": 0.1}),
    "compute_loss_func of tokens": (tiny_gpt2, Tokens, {"compute_loss_func": summed}),
    "compute_loss_func of images": (tiny_vit, Images, {"compute_loss_func": summed}),
    "images": (tiny_vit, lambda: Images(24), {}),
    "images with few labels": (tiny_vit, SomeLabels, {}),
    "texts, whose loss ignores the count": (tiny_bert, lambda: Texts(24), {}),
    "one logit": (
        lambda: tiny_vit(classes=1),
        lambda: FloatLabels(),
        {"teacher": tiny_vit(width=24, seed=1)},
    ),
}


class FloatLabels(Images):
    """Images, each with a number to predict."""

    def __init__(self) -> None:
        super().__init__(24)
        assert self.labels is not None
        self.labels = self.labels.float()


def runs_of(
    kind: str, folder: Path, cuts: tuple[int, ...], whole: int = 8, **more: Any
) -> list[RelationalDistillationTrainer]:
    build, dataset, settings = STUDENTS[kind]
    teacher = tiny_vit(width=24, seed=1) if isinstance(dataset(), Images) else tiny_bert(width=24, seed=1)
    runs = []
    for size in cuts:
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": whole // size}
        given = {"model": build(), "train_dataset": dataset(), "teacher": teacher, "learning_rate": 0.1}
        given |= {"optim": "sgd", "max_grad_norm": 0.0, "teacher_temperature": 0.1, "student_temperature": 0.5}
        run = trainer(folder, **(given | settings | cut | more))
        run.train()
        runs.append(run)
    return runs


@pytest.mark.parametrize("kind", STUDENTS)
def test_loss_and_gradient_do_not_depend_on_the_cut_of_the_batch(kind: str, tmp_path: Path) -> None:
    whole, single, some = runs_of(kind, tmp_path, (8, 1, 4))
    for cut in (single, some):
        for name in ("loss", "task_loss", "relational_loss", "grad_norm"):
            assert log_of(cut, name) == pytest.approx(log_of(whole, name), abs=1e-6, rel=1e-6), name
        rows = [torch.cat([weight.detach().flatten() for weight in run.model.parameters()]) for run in (whole, cut)]
        torch.testing.assert_close(rows[1], rows[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["causal LM", "masked LM, whose loss ignores the count", "images with few labels"])
def test_the_task_loss_of_a_step_is_the_mean_over_its_labels(kind: str, tmp_path: Path) -> None:
    build, dataset, _ = STUDENTS[kind]
    whole, single = runs_of(kind, tmp_path, (24, 1), whole=24, max_steps=1)
    batch = {name: torch.stack([example[name] for example in dataset()]) for name in dataset()[0]}
    with torch.no_grad():
        expected = build().eval()(**batch).loss.item()
    for run in (whole, single):
        assert log_of(run, "task_loss") == [pytest.approx(expected, abs=1e-6)]


@pytest.mark.parametrize("kind", ["images with few labels", "texts, whose loss ignores the count", "causal LM"])
def test_a_step_without_a_label_has_no_task_and_the_teacher_all_the_same(kind: str, tmp_path: Path) -> None:
    build, dataset, _ = STUDENTS[kind]

    class Unlabelled(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 24

        def __getitem__(self, row: int) -> dict[str, Tensor]:
            example = dataset()[row]
            return example | {"labels": torch.full_like(example["labels"], -100)}

    with_task, without = (
        runs_of(kind, tmp_path, (4,), train_dataset=Unlabelled(), task_weight=weight)[0] for weight in (1.0, 0.0)
    )
    assert set(log_of(with_task, "task_loss")) == {0.0}
    assert log_of(with_task) == log_of(without)
    for ours, theirs in zip(with_task.model.parameters(), without.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


class MeanOverCount(BertForTokenClassification):
    """Its loss is the mean over a batch's labels, which is nan without any, scaled to a sum over the step's count."""

    def forward(self, input_ids: Any, labels: Any = None, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        outputs = super().forward(input_ids, labels=labels, **inputs)
        if num_items_in_batch is not None:
            outputs.loss = outputs.loss * labels.ne(-100).sum() / num_items_in_batch
        return outputs


def test_a_batch_without_a_label_has_no_task_where_a_mean_is_scaled_by_the_count(tmp_path: Path) -> None:
    data = Tokens(24, classes=CLASSES)
    data.labels[:12] = -100
    student = MeanOverCount(tiny_tokens().config)
    given: dict[str, Any] = {"model": student, "teacher": tiny_bert(width=24, seed=1), "train_dataset": data}
    run = trainer(tmp_path, per_device_train_batch_size=1, max_steps=24, **given)
    run.train()
    assert run._task.uses_count
    assert sorted(loss > 0 for loss in log_of(run, "task_loss")) == [False] * 12 + [True] * 12


@pytest.mark.parametrize("accumulation", [1, 4])
def test_with_the_task_alone_a_step_of_several_micro_batches_is_the_plain_trainers_to_the_bit(
    accumulation: int, tmp_path: Path
) -> None:
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation, "max_steps": 3}
    run = trainer(tmp_path, model=tiny_vit(dropout=0.3), teacher=None, relational_weight=0.0, **settings)
    run.train()
    assert run._task.uses_count
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, save_strategy="no", report_to=[], learning_rate=1e-2, seed=7, **settings
    )
    plain = Trainer(tiny_vit(dropout=0.3), args, train_dataset=Images())
    plain.train()
    for ours, theirs in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if accumulation == 1 else 1e-7)


def test_only_a_loss_that_uses_the_count_is_given_it(tmp_path: Path) -> None:
    for kind, uses in (
        ("causal LM", True),
        ("masked LM, whose loss ignores the count", False),
        ("images", True),
        ("texts, whose loss ignores the count", False),
        ("compute_loss_func of tokens", True),
        ("one logit", False),
    ):
        (run,) = runs_of(kind, tmp_path, (4,), max_steps=1)
        assert run._task.uses_count is uses, kind


class Picky(BertForMaskedLM):
    """Takes any keyword, and cannot do with the count."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **given: Any) -> Any:
        if given:
            raise TypeError(f"unexpected {sorted(given)}")
        return super().forward(input_ids, attention_mask, labels=labels)


def test_a_forward_that_cannot_do_with_the_count_trains_without(tmp_path: Path) -> None:
    runs = [
        trainer(tmp_path, model=tiny_tokens(build), teacher=tiny_bert(width=24), train_dataset=Tokens())
        for build in (Picky, BertForMaskedLM)
    ]
    for run in runs:
        run.train()
    assert log_of(runs[0]) == log_of(runs[1])


class Normed(torch.nn.Module):
    """A student with statistics of its batches, and a loss that takes the count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.classifier = torch.nn.BatchNorm1d(768), torch.nn.Linear(768, CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor, **given: Any) -> Any:
        logits = self.classifier(self.norm(pixel_values.flatten(1)))
        return {
            "loss": summed({"logits": logits}, labels, given.get("num_items_in_batch", len(labels))),
            "logits": logits,
        }


def test_finding_out_leaves_statistics_and_randomness_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=Normed(), relational_weight=0.0, kd_weight=1.0, max_steps=3)
    run.train()
    assert run._task.uses_count and run.model.norm.num_batches_tracked == 3


@pytest.mark.parametrize("given", [None, 1.5])
def test_a_loss_that_is_no_tensor_is_an_error(given: Any, tmp_path: Path) -> None:
    run = trainer(tmp_path, compute_loss_func=lambda outputs, labels, num_items_in_batch=None: given)
    message = f"what `compute_loss_func` returns must be a tensor, got {given}. Set task_weight=0 to train without it."
    with pytest.raises(ValueError) as error:
        run.train()
    assert str(error.value) == message

    class Lossless(Normed):
        def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
            return {"loss": given, "logits": self.classifier(pixel_values.flatten(1))}

    run = trainer(tmp_path, model=Lossless(), relational_weight=0.0, kd_weight=1.0, eval_dataset=Images(8))
    for call in (run.train, run.evaluate):
        with pytest.raises(ValueError, match=f"the student's own loss must be a tensor, got {given}"):
            call()


@pytest.mark.parametrize("func", [None, summed])
def test_a_training_step_by_hand_is_that_of_one_micro_batch_before_and_after_a_training(
    func: Any, tmp_path: Path
) -> None:
    run = trainer(
        tmp_path,
        model=tiny_gpt2(),
        teacher=tiny_gpt2(width=24, seed=1),
        train_dataset=Tokens(),
        relational_weight=0.0,
        kd_weight=1.0,
        compute_loss_func=func,
        gradient_accumulation_steps=3,
        learning_rate=0.0,
        max_steps=1,
    )
    batch = {name: torch.stack([example[name] for example in Tokens(8)]) for name in Tokens(8)[0]}
    run.create_optimizer()
    with torch.no_grad():
        outputs = run.model(**batch)
        task = outputs.loss if func is None else func(outputs, batch["labels"], batch["labels"].ne(-100).sum())
        kd = run.distillation.kd_terms(outputs.logits, run.teacher(**batch).logits, batch)["kd_loss"].mean()
    for _ in range(2):
        count = None if func is None else batch["labels"].ne(-100).sum()
        loss = run.training_step(run.model, dict(batch), count)
        assert loss.item() == pytest.approx((task + kd).item(), abs=1e-5)
        run.train()


def test_a_function_that_divides_by_the_count_evaluates_to_the_mean_over_labels(tmp_path: Path) -> None:
    data = Images(16, seed=3)
    run = trainer(tmp_path, compute_loss_func=summed, eval_dataset=data, max_steps=1)
    run.train()
    with torch.no_grad():
        logits = run.model.eval()(pixel_values=data.pixels).logits
    expected = F.cross_entropy(logits, data.labels).item()
    assert run.evaluate()["eval_task_loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("missing", "given", "warned"), [(True, {}, 1), (False, {}, 0), (True, {"compute_loss_func": squared}, 0)]
)
def test_a_missing_number_that_the_students_own_loss_would_take_for_one_is_a_warning(
    missing: bool, given: dict[str, Any], warned: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("hf_rrd.training.task.logger.warning", lines.append)
    data = FloatLabels()
    if missing:
        data.labels[1:] = -100.0
    student, teacher = tiny_vit(classes=1), tiny_vit(width=24, seed=1)
    trainer(tmp_path, model=student, teacher=teacher, train_dataset=data, **given).train()
    assert len(lines) == warned and all("a `compute_loss_func` that leaves these out" in line for line in lines)
