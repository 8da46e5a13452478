"""Whether a teacher knows the student's classes, and what follows from that for the weights."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from hf_rrd import cache_teacher_outputs
from hf_rrd.models.teacher import TeacherOutputs
from hf_rrd.training.data import sample_of
from hf_rrd.training.evidence import _labelled, knows_classes
from hf_rrd.training.terms import GENTLE, HARD
from tests.builders import CLASSES, Images, Texts, Tokens, log_of, tiny_bert, tiny_tokens, tiny_vit, trainer

NAMES = ["owl", "cat", "pig", "dog"]
AUTO: dict[str, Any] = {"kd_weight": "auto", "relational_weight": "auto"}


def named(model: Any, names: list[str] | None = None) -> Any:
    model.config.id2label = dict(enumerate(names or NAMES))
    return model


def teacher_vit(names: list[str] | None = None) -> Any:
    """A teacher whose answers spread over the classes."""
    teacher = named(tiny_vit(width=24, seed=1), names)
    with torch.no_grad():
        logits = teacher.eval()(Images(200).pixels).logits
        teacher.classifier.bias -= logits.mean(0)
    return teacher


@torch.no_grad()
def known_to(teacher: Any, right: float = 1.0, count: int = 48) -> Images:
    """Images whose labels are the teacher's answers for that share of them, and the next class for the others."""
    images = Images(count)
    answers = teacher.eval()(images.pixels).logits.argmax(-1)
    names = teacher.config.id2label.values()
    if set(names) == set(NAMES):
        answers = torch.tensor([NAMES.index(name) for name in names])[answers]  # as the student has them
    wrong = torch.arange(count) >= right * count
    images.labels = torch.where(wrong, (answers + 1) % CLASSES, answers)
    return images


def run_of(folder: Path, teacher: Any, **given: Any) -> Any:
    return trainer(folder, **({"model": named(tiny_vit()), "teacher": teacher} | AUTO | given))


def trained(folder: Path, teacher: Any, **given: Any) -> Any:
    run = run_of(folder, teacher, **given)
    run.train()
    return run


def weights_of(run: Any) -> tuple[float, float]:
    weights = run.distillation.weights()
    return weights["kd_weight"], weights["relational_weight"]


TEACHES, IS_LEFT_OUT = (1.0, HARD), (0.0, 1.0)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the log has said of the teacher's logits, each line after its level."""
    lines: list[str] = []
    for module, level in (("evidence", "warning"), ("setup", "info")):
        logger = logging.get_logger(f"hf_rrd.training.{module}")
        monkeypatch.setattr(logger, level, lambda line, level=level: lines.append(f"{level}: {line}"))
    return lines


def test_a_teacher_that_knows_the_labels_teaches_its_logits_and_pulls_hard(tmp_path: Path, said: list[str]) -> None:
    teacher = teacher_vit()
    run = trained(tmp_path, teacher, train_dataset=known_to(teacher))
    assert weights_of(run) == TEACHES and said == []
    for line in run.state.log_history[:3]:
        total = line["task_loss"] + line["kd_loss"] + HARD * line["relational_loss"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    metrics = run.evaluate(Images(8))
    assert metrics["eval_loss"] == pytest.approx(
        metrics["eval_task_loss"] + metrics["eval_kd_loss"] + HARD * metrics["eval_relational_loss"], rel=1e-5
    )


def test_a_teacher_of_a_fresh_head_teaches_its_embeddings_alone_and_is_balanced(
    tmp_path: Path, said: list[str]
) -> None:
    run = trained(tmp_path, teacher_vit(), train_dataset=Images())  # of random labels
    assert weights_of(run) == IS_LEFT_OUT and log_of(run, "kd_loss") == []
    (line,) = said
    assert line.startswith("warning: The teacher's logits name the label of ")
    assert " of 48 training examples, the most frequent class that of " in line
    assert line.endswith("set kd_weight=1 and relational_weight=10.")
    assert "eval_kd_loss" not in run.evaluate(Images(8))
    for entry in run.state.log_history[:3]:
        assert entry["loss"] == pytest.approx(entry["task_loss"] + entry["relational_loss"], rel=1e-5)


@pytest.mark.parametrize(("above", "teaches"), [(17, False), (18, True)])
def test_a_teacher_must_come_three_quarters_of_the_way_from_the_most_frequent_class_to_all(
    tmp_path: Path, above: int, teaches: bool
) -> None:
    images = Images()
    images.labels = torch.arange(48) % 2  # 24 of each
    answers = torch.where(torch.arange(48) < 24 + above, images.labels, (images.labels + 1) % CLASSES)
    logits, embedding = np.eye(CLASSES, dtype=np.float32)[answers], images.pixels.flatten(1)[:, :6].numpy()
    data = table_of(images, lambda: {"teacher_embedding": embedding, "teacher_logits": logits})
    assert weights_of(trained(tmp_path, None, train_dataset=data)) == (TEACHES if teaches else IS_LEFT_OUT)


@pytest.mark.parametrize(("right", "expected"), [(48, TEACHES), (46, IS_LEFT_OUT)])
def test_a_teacher_that_knows_a_rare_class_teaches_too(
    tmp_path: Path, right: int, expected: tuple[float, float]
) -> None:
    images = Images()
    images.labels = (torch.arange(48) >= 44).long()  # 4 of 48, which leave little to be better by
    answers = torch.where(torch.arange(48) < right, images.labels, 0)
    logits, embedding = np.eye(CLASSES, dtype=np.float32)[answers], images.pixels.flatten(1)[:, :6].numpy()
    data = table_of(images, lambda: {"teacher_embedding": embedding, "teacher_logits": logits})
    assert weights_of(trained(tmp_path, None, train_dataset=data)) == expected


@pytest.mark.parametrize("right", [1.0, 0.1])
def test_an_evaluation_before_the_training_counts_with_the_weights_of_the_training(
    right: float, tmp_path: Path
) -> None:
    teacher = teacher_vit()
    images = known_to(teacher, right)
    run = run_of(tmp_path, teacher, train_dataset=images, eval_dataset=Images(8, seed=3))
    before = run.evaluate()
    assert weights_of(run) == (TEACHES if right == 1.0 else IS_LEFT_OUT)
    total = before["eval_task_loss"] + weights_of(run)[1] * before["eval_relational_loss"]
    assert before["eval_loss"] == pytest.approx(total + before.get("eval_kd_loss", 0.0), rel=1e-5)


def test_classes_in_another_order_are_compared_by_their_names(tmp_path: Path) -> None:
    teacher = teacher_vit(NAMES[::-1])
    assert weights_of(trained(tmp_path, teacher, train_dataset=known_to(teacher))) == TEACHES


@pytest.mark.parametrize("labeled", [True, False])
def test_a_teacher_of_unnamed_classes_teaches_where_its_answers_show_that_they_are_the_same(
    tmp_path: Path, labeled: bool
) -> None:
    teacher = teacher_vit([f"LABEL_{number}" for number in range(CLASSES)])
    images = known_to(teacher)
    images.labels = images.labels if labeled else torch.full_like(images.labels, -100)
    run = trained(tmp_path, teacher, train_dataset=images, **({} if labeled else {"task_weight": 0.0}))
    assert weights_of(run) == (TEACHES if labeled else IS_LEFT_OUT)


def test_a_teacher_of_other_names_is_left_out_without_a_warning(tmp_path: Path, said: list[str]) -> None:
    run = trained(tmp_path, teacher_vit(["a", "b", "c", "d"]))
    assert weights_of(run) == IS_LEFT_OUT and log_of(run, "kd_loss") == []
    assert len(said) == 1 and said[0].startswith("info: No distillation of logits: ")


def test_a_teacher_without_a_head_or_of_more_classes_is_left_out_without_a_warning(
    tmp_path: Path, said: list[str]
) -> None:
    for teacher in (tiny_vit(width=24, seed=1).vit, tiny_vit(width=24, seed=1, classes=6)):
        run = trained(tmp_path, teacher)
        assert weights_of(run) == IS_LEFT_OUT and not run._teacher.wants_logits
    assert [line for line in said if line.startswith("warning")] == []


def test_a_weight_that_was_set_is_not_asked_for(tmp_path: Path, said: list[str]) -> None:
    run = trained(tmp_path, teacher_vit(), kd_weight=0.5)  # of random labels
    assert weights_of(run) == (0.5, HARD) and len(log_of(run, "kd_loss")) == 3 and said == []
    run = trained(tmp_path, teacher_vit(), relational_weight=4.0)
    assert weights_of(run) == (0.0, 4.0)


def test_labels_below_0_count_as_none(tmp_path: Path) -> None:
    teacher = teacher_vit()
    images = known_to(teacher, right=0.4)
    assert images.labels is not None
    images.labels[20:] = -100  # the teacher is right where there are labels
    assert weights_of(trained(tmp_path, teacher, train_dataset=images)) == TEACHES
    images.labels[:] = -100
    assert weights_of(trained(tmp_path, teacher, train_dataset=images, task_weight=0.0)) == TEACHES


@pytest.mark.parametrize("kind", ["several", "numbers"])
def test_several_labels_or_numbers_of_minus_100_count_as_none(tmp_path: Path, kind: str) -> None:
    student, teacher, data = bert_pair(kind)
    places = (data.mask.long().cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": data.tokens, "attention_mask": data.mask, "position_ids": places}
    with torch.no_grad():
        logits = teacher.eval()(**batch).logits
        teacher.classifier.bias -= logits.median(0).values  # each class is there in half of the examples
        logits = teacher(**batch).logits
    data.labels = (logits > 0).float() if kind == "several" else logits.squeeze(1)
    data.labels[16:] = -100.0
    student.config.problem_type = {"several": "multi_label_classification", "numbers": "regression"}[kind]

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        known = labels != -100
        squares = (outputs["logits"].view_as(labels) - labels).square() * known
        return squares.sum() / (known.sum() if num_items_in_batch is None else num_items_in_batch).clamp(min=1)

    given = {"model": student, "train_dataset": data, "compute_loss_func": loss}
    assert weights_of(trained(tmp_path, teacher, **given)) == TEACHES
    data.labels[:] = -100.0
    given |= {"task_weight": 0.0, "compute_loss_func": None}
    assert weights_of(trained(tmp_path, teacher, **given)) == TEACHES  # by their names


def test_without_labels_the_names_tell(tmp_path: Path, said: list[str]) -> None:
    unlabelled: dict[str, Any] = {"train_dataset": Images(labels=False), "task_weight": 0.0}
    assert weights_of(trained(tmp_path, teacher_vit(), **unlabelled)) == TEACHES and said == []
    assert weights_of(trained(tmp_path, teacher_vit(["a", "b", "c", "d"]), **unlabelled)) == IS_LEFT_OUT


def bert_pair(kind: str) -> tuple[Any, Any, Any]:
    """A student and a teacher of named classes whose head is fresh, with a data set of that kind."""
    if kind == "tokens":
        return named(tiny_tokens()), named(tiny_tokens(width=24, seed=1)), Tokens(24, CLASSES)
    classes, texts = {"numbers": 1, "several": CLASSES}[kind], Texts()
    models = [named(tiny_bert(width, seed=width, classes=classes), NAMES[:classes]) for width in (16, 24)]
    draw = torch.randn(48, classes, generator=torch.Generator().manual_seed(1))
    texts.labels = 2000 + draw.squeeze(1) if kind == "numbers" else (draw > 1).float()
    return *models, texts


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("tokens", "name the label of 34 of 101 places in training examples, the most frequent class that of 29: "),
        ("several", " of 192 places in training examples, the most frequent class that of "),
        ("numbers", "miss the numbers of 48 training examples by 1.92e+08 in squares, their mean by 40.8"),
    ],
)
def test_a_fresh_head_over_tokens_several_labels_or_numbers_is_left_out_and_one_that_knows_them_teaches(
    tmp_path: Path, said: list[str], kind: str, line: str
) -> None:
    student, teacher, data = bert_pair(kind)
    left_out = (0.0, GENTLE) if kind == "tokens" else IS_LEFT_OUT  # no head over tokens reads the embedding
    assert weights_of(trained(tmp_path, teacher, model=student, train_dataset=data)) == left_out
    assert line in said[0]
    places = (data.mask.long().cumsum(1) - 1).clamp(min=0)  # as a teacher counts them, padding or not
    batch = {"input_ids": data.tokens, "attention_mask": data.mask, "position_ids": places}
    if kind == "numbers":
        with torch.no_grad():
            teacher.classifier.bias += 2000
            teacher.classifier.weight *= 1000
    with torch.no_grad():
        logits = teacher.eval()(**batch).logits
    if kind == "tokens":
        data.labels = torch.where(data.labels < 0, data.labels, logits.argmax(-1))
    elif kind == "several":  # each class is there in half of the examples
        with torch.no_grad():
            teacher.classifier.bias -= logits.median(0).values
        data.labels = (logits > logits.median(0).values).float()
    else:
        data.labels = logits.squeeze(1) + 0.1 * torch.randn(48)
    expected = (1.0, GENTLE) if kind == "tokens" else TEACHES
    assert weights_of(trained(tmp_path, teacher, model=student, train_dataset=data)) == expected


@pytest.mark.parametrize(
    ("labels", "wrong", "expected"),
    [
        ([0, 1, 0, 1], 0, TEACHES),
        ([0] * 9 + [1], 0, TEACHES),
        ([0, 1, 0, 1], 1, IS_LEFT_OUT),
        ([0] * 9 + [1], 1, IS_LEFT_OUT),
        ([0] * 10, 0, IS_LEFT_OUT),  # as any answer that is always the same
    ],
)
def test_of_few_examples_a_teacher_has_to_know_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: list[int], wrong: int, expected: Any
) -> None:
    images = Images(len(labels))
    images.labels = torch.tensor(labels)
    run = run_of(tmp_path, teacher_vit(), train_dataset=images)
    answers = F.one_hot((images.labels + (torch.arange(len(labels)) >= len(labels) - wrong)) % CLASSES, CLASSES)

    def read(batch: Any, **asked: Any) -> TeacherOutputs:
        places = (batch["pixel_values"].unsqueeze(1) == images.pixels).flatten(2).all(2).int().argmax(1)
        return TeacherOutputs(batch["pixel_values"][:, 0, 0, :1].expand(-1, 24), answers[places].float())

    monkeypatch.setattr(run._teacher, "read", read)
    if not knows_classes(images, run):
        run.distillation.leave_out_logits()
    assert weights_of(run) == expected


class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Images one after another; a stream is not read twice to ask its teacher."""

    passes = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        type(self).passes += 1
        images = Images(48)
        return (images[index] for index in range(48))


def test_of_a_stream_the_names_tell(tmp_path: Path) -> None:
    for names, expected in ((NAMES, TEACHES), (["a", "b", "c", "d"], IS_LEFT_OUT)):
        assert weights_of(trained(tmp_path, teacher_vit(names), train_dataset=Stream())) == expected


def table_of(images: Images, columns: Callable[[], dict[str, Any]] = dict) -> datasets.Dataset:
    assert images.labels is not None
    arrays: dict[str, Any] = {"pixel_values": images.pixels.numpy(), "labels": images.labels.numpy()}
    return datasets.Dataset.from_dict(arrays | columns()).with_format("torch")


@pytest.mark.parametrize(("right", "expected"), [(1.0, TEACHES), (0.25, IS_LEFT_OUT)])
def test_cached_logits_whose_classes_were_noted_are_asked_as_the_teacher_is(
    tmp_path: Path, right: float, expected: tuple[float, float]
) -> None:
    teacher = teacher_vit(NAMES[::-1])
    data = cache_teacher_outputs(table_of(known_to(teacher, right)), teacher, dtype="float32")
    run = trained(tmp_path, None, train_dataset=data)
    assert weights_of(run) == expected and (len(log_of(run, "kd_loss")) == 3) == (expected == TEACHES)


def test_cached_logits_of_other_names_or_another_count_are_left_out_and_unnamed_ones_of_as_many_asked(
    tmp_path: Path,
) -> None:
    others = teacher_vit(["a", "b", "c", "d"])
    data = cache_teacher_outputs(table_of(Images()), others, dtype="float32")
    assert weights_of(trained(tmp_path, None, train_dataset=data)) == IS_LEFT_OUT
    for width, right in ((CLASSES, True), (CLASSES, False), (CLASSES + 2, True)):
        images = Images()
        assert images.labels is not None
        rows = np.eye(width, dtype=np.float32)[(images.labels + (not right)) % CLASSES]
        embedding = images.pixels.flatten(1)[:, :6].numpy()
        data = table_of(images, lambda e=embedding, r=rows: {"teacher_embedding": e, "teacher_logits": r})
        run = trained(tmp_path, None, train_dataset=data)
        assert weights_of(run) == (TEACHES if right and width == CLASSES else IS_LEFT_OUT)


def test_a_data_set_of_cached_embeddings_alone_has_no_logits_to_ask(tmp_path: Path) -> None:
    embedding = Images().pixels.flatten(1)[:, :6].numpy()
    run = trained(tmp_path, None, train_dataset=table_of(Images(), lambda: {"teacher_embedding": embedding}))
    assert weights_of(run) == IS_LEFT_OUT


@pytest.mark.parametrize("right", [1.0, 0.25])
def test_a_resumed_run_decides_as_the_whole_one_and_ends_bitwise_as_it(tmp_path: Path, right: float) -> None:
    teacher = teacher_vit()
    settings: dict[str, Any] = {
        **{"train_dataset": known_to(teacher, right), "max_steps": 6, "save_strategy": "steps", "save_steps": 3},
        **{"balance_losses": True, "student_projection": "centered", "teacher_projection": "center"},
    }
    whole = trained(tmp_path, teacher, model=named(tiny_vit(dropout=0.1)), **settings)
    again = run_of(tmp_path, teacher_vit(), model=named(tiny_vit(dropout=0.1)), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert weights_of(again) == weights_of(whole) == (TEACHES if right == 1 else IS_LEFT_OUT)
    weights = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in weights)
    assert log_of(whole) == log_of(again)


def test_asking_leaves_the_order_and_the_dropout_of_a_run_and_its_loaders_alone(tmp_path: Path) -> None:
    teacher = teacher_vit()
    given: dict[str, Any] = {"train_dataset": known_to(teacher), "relational_weight": 1.0}
    runs = [
        trained(tmp_path, teacher, model=named(tiny_vit(dropout=0.3)), **(given | {"kd_weight": weight}))
        for weight in ("auto", 1.0)
    ]
    assert log_of(runs[0]) == log_of(runs[1])
    assert [len(run.accelerator._dataloaders) for run in runs] == [1, 1]
    unasked = trained(tmp_path, teacher, train_dataset=Images(labels=False), task_weight=0.0)
    assert len(unasked.accelerator._dataloaders) == 1


def test_a_training_set_smaller_than_a_batch_of_an_evaluation_is_asked_too(tmp_path: Path) -> None:
    teacher = teacher_vit()
    small: dict[str, Any] = {"train_dataset": known_to(teacher, count=12), "per_device_train_batch_size": 4}
    run = trained(tmp_path, teacher, **small, per_device_eval_batch_size=64, dataloader_drop_last=True, max_steps=2)
    assert weights_of(run) == TEACHES


def test_only_so_many_examples_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setattr("hf_rrd.training.evidence.ASKED", 20)
    trained(tmp_path, teacher_vit())
    assert " of 20 training examples, " in said[0]


def test_a_second_training_of_the_same_trainer_and_another_trial_decide_alike(tmp_path: Path) -> None:
    for right, expected in ((1.0, TEACHES), (0.25, IS_LEFT_OUT)):
        teacher = teacher_vit()
        run = trained(tmp_path, teacher, train_dataset=known_to(teacher, right))
        run.train()
        assert weights_of(run) == expected


def test_a_student_that_knows_no_classes_of_the_teachers_shows_1_and_0_on_its_card(tmp_path: Path) -> None:
    run = trained(tmp_path, teacher_vit())
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    for row in ("| `kd_weight` | 0 |", "| `relational_weight` | 1 |"):
        assert row in card.splitlines()


def test_few_labels_are_asked_for_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_rrd.training.evidence.ASKED", 16)
    teacher = teacher_vit()
    images = known_to(teacher, count=64)
    assert images.labels is not None
    run = run_of(tmp_path, teacher, train_dataset=images)
    drawn = sample_of(range(64), 16, run.distillation.seed).indices
    kept = [drawn[0], *(row for row in range(64) if row not in drawn)][:8]  # a draw from all would find one of them
    labels = [int(label) if row in kept else -100 for row, label in enumerate(images.labels)]
    assert knows_classes(table_of(images, lambda: {"labels": labels}), run)


def test_the_rows_with_a_label_are_told_where_it_is_one_number_and_others_are_left_as_they_are() -> None:
    rows = {"labels": [-100, 2, -100], "label": [1, 1, 1]}
    assert _labelled(datasets.Dataset.from_dict(rows).with_transform(lambda batch: batch))["label"] == [1]
    maps = datasets.Features({"labels": datasets.Array2D((1, 2), "int64")})
    for labels, features in (([[[-100, -100]], [[-100, 1]]], maps), ([[-100], [1]], None), ([-100, -100], None)):
        dataset = datasets.Dataset.from_dict({"labels": labels}, features=features)
        assert _labelled(dataset) is dataset
    assert _labelled([{"labels": -100}]) == [{"labels": -100}]
