"""What cannot be trained is refused with a message that says what to do."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertModel,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    ViTModel,
)
from transformers import logging as transformers_logging
from transformers.modeling_outputs import ImageClassifierOutput

from hf_rrd import RelationalDistillationTrainer
from tests.builders import CLASSES, Images, Texts, config, tiny_bert, tiny_vit, trainer
from tests.training.test_data import tokenizer


class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """A data set in its own order and of unknown length."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.dataset[index] for index in range(len(self.dataset)))


class Plain(nn.Module):
    """A classifier of images that is no transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(3 * 16 * 16, CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        logits = self.classifier(pixel_values.flatten(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class BodilessConfig(PreTrainedConfig):
    model_type = "bodiless"
    image_size = 16


class Bodiless(PreTrainedModel):
    """A transformers model without hidden states."""

    config_class = BodilessConfig
    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__(BodilessConfig())
        self.plain = Plain()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        return self.plain(pixel_values, labels)


def columns(dataset: Any, *names: str) -> datasets.Dataset:
    """Some columns of a data set as a datasets.Dataset."""
    return datasets.Dataset.from_dict(
        {name: [dataset[index][name].tolist() for index in range(len(dataset))] for name in names}
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "needs a teacher.*teacher_embedding.*relational_weight=0"),
        (
            {"kd_weight": 1.0, "relational_weight": 0.0},
            "`kd_weight` is above 0, so a teacher is needed.*teacher_logits",
        ),
    ],
)
def test_neither_teacher_nor_cached_outputs(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, teacher=None, **settings)


def test_cached_embedding_without_cached_logits_cannot_do_both_distillations(tmp_path: Path) -> None:
    cached = columns(Images(8), "pixel_values", "labels").add_column("teacher_embedding", [[1.0, 0.5]] * 8)
    with pytest.raises(ValueError, match="`kd_weight` is above 0, so a teacher is needed.*teacher_logits"):
        trainer(tmp_path, teacher=None, train_dataset=cached, kd_weight=1.0)


def test_distillation_on_logits_with_other_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="same classes: the teacher has 7, the student 4.*kd_weight=0"):
        trainer(tmp_path, teacher=tiny_vit(classes=7), kd_weight=1.0)


def test_distillation_on_logits_of_a_headless_teacher(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs logits: ViTModel has no head.*AutoModelFor.*kd_weight=0"):
        trainer(tmp_path, teacher=ViTModel(tiny_vit().config), kd_weight=1.0)


@pytest.mark.parametrize("side", ["model", "teacher"])
@pytest.mark.parametrize(
    "build, message",
    [
        (Plain, "body that returns hidden states, got Plain, which is not a transformers model.*PreTrainedModel"),
        (Bodiless, "body that returns hidden states, Bodiless gave ImageClassifierOutput"),
    ],
)
def test_model_without_a_body(build: Any, message: str, side: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **{side: build()})


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("empty", [Images(0), datasets.Dataset.from_dict({"pixel_values": [], "labels": []})])
def test_empty_data_set(empty: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is empty, got 0 examples"):
        trainer(tmp_path, **{name: empty})


def test_empty_data_set_among_several(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`eval_dataset\['second'\]` is empty"):
        trainer(tmp_path, eval_dataset={"first": Images(3), "second": Images(0)})


@pytest.mark.parametrize("dataset", [Images(8, labels=False), columns(Images(8), "pixel_values")])
def test_data_set_without_labels_is_refused_at_once(dataset: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs labels.*columns \['pixel_values'\].*task_weight=0"):
        trainer(tmp_path, train_dataset=dataset)


def test_stream_without_labels_is_refused_at_its_first_batch(tmp_path: Path) -> None:
    run = trainer(tmp_path, train_dataset=Stream(Images(24, labels=False)))
    with pytest.raises(ValueError, match=r"each batch needs labels: none of \['labels'\].*task_weight=0"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "settings, output",
    [({}, "embedding"), ({"kd_weight": 1.0, "relational_weight": 0.0}, "logits")],
)
def test_non_finite_teacher_output_is_named_with_its_step(
    settings: dict[str, Any], output: str, value: float, tmp_path: Path
) -> None:
    dataset = Images(32)
    dataset.pixels[17, 0, 0, 0] = value  # in the third batch of 8
    run = trainer(tmp_path, train_dataset=Stream(dataset), max_steps=4, bank_size=16, **settings)
    with pytest.raises(ValueError, match=f"teacher's {output} is not finite .* at step 3"):
        run.train()
    assert run.state.global_step == 2


def test_non_finite_teacher_output_is_found_in_an_evaluation(tmp_path: Path) -> None:
    dataset = Images(13, seed=1)
    dataset.pixels[12, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="teacher's embedding is not finite .* at step 0"):
        trainer(tmp_path, eval_dataset=dataset).evaluate()


def test_student_that_is_its_own_teacher(tmp_path: Path) -> None:
    student = tiny_vit()
    with pytest.raises(ValueError, match=f"share {len(list(student.parameters()))} parameters.*copy.deepcopy"):
        trainer(tmp_path, model=student, teacher=student)


def test_teacher_that_shares_a_layer_with_the_student(tmp_path: Path) -> None:
    student, teacher = tiny_vit(), tiny_vit(seed=1)
    teacher.classifier = student.classifier
    with pytest.raises(ValueError, match="share 2 parameters"):
        trainer(tmp_path, model=student, teacher=teacher)
    assert all(weight.requires_grad for weight in student.parameters())


def test_student_from_model_init_that_shares_with_the_teacher(tmp_path: Path) -> None:
    teacher = tiny_vit()
    with pytest.raises(ValueError, match="share .* parameters"):
        trainer(tmp_path, model_init=lambda: teacher, teacher=teacher, train_dataset=None)


def test_plain_training_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a RelationalDistillationConfig, got TrainingArguments"):
        RelationalDistillationTrainer(
            model=tiny_vit(),
            teacher=tiny_vit(seed=1),
            args=TrainingArguments(str(tmp_path), use_cpu=True),  # type: ignore[arg-type]
            train_dataset=Images(8),
        )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"projection_dim": 8}, "must be the teacher's width, 24, with teacher_projection='none', got 8.*pca"),
        ({"projection_dim": 25, "teacher_projection": "orthogonal"}, "at most the teacher's width, 24, got 25"),
        ({"student_projection": "none"}, "as wide as the teacher's embedding, got 16 and 24.*linear"),
    ],
)
def test_widths_that_do_not_meet(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny run after its second step."""
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, save_strategy="steps", save_steps=2, max_steps=2).train()
    return folder / "checkpoint-2"


@pytest.mark.parametrize("damage", ["absent", "cut short"])
def test_incomplete_checkpoint(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    if damage == "absent":
        state.unlink()
    else:
        state.write_text(state.read_text()[:40])
    with pytest.raises(ValueError, match="checkpoint-2 is not a complete checkpoint.*resume_from_checkpoint=True"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match=f"no complete checkpoint found in {tmp_path}; a warning says what is wrong"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("folder", [".", "not there"])
def test_no_checkpoint_at_all_speaks_of_no_warning(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        trainer(tmp_path / folder).train(resume_from_checkpoint=True)
    assert str(error.value) == f"no complete checkpoint found in {tmp_path / folder}. Start with train()."


def test_checkpoint_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint-9 is not a complete checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


@pytest.mark.parametrize(
    "shape, message",
    [
        ({"layers": 3}, "16 weights are missing .* 0 are unknown"),
        ({"layers": 1}, "0 weights are missing .* 16 are unknown"),
        ({"width": 32}, "0 weights are missing .* 39 are unknown or of another shape"),
    ],
)
def test_checkpoint_of_another_student(shape: dict[str, int], message: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"checkpoint-2 does not hold this student: {message}"):
        trainer(tmp_path, model=tiny_vit(**shape)).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("as_columns", [False, True])
def test_data_without_the_main_input_of_the_teacher(as_columns: bool, tmp_path: Path) -> None:
    texts: Any = columns(Texts(8), "input_ids", "attention_mask", "labels") if as_columns else Texts(8)
    with pytest.raises(ValueError, match="the teacher needs `pixel_values`.*column `teacher_pixel_values`"):
        trainer(tmp_path, model=tiny_bert(), teacher=tiny_vit(), train_dataset=texts)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("teacher_model", "teacher"),
        ("tokenizer", "processing_class"),
        ("teacher_tokenizer", "teacher_processing_class"),
        ("student", "model"),
        ("train_data_set", "train_dataset"),
    ],
)
def test_a_misspelt_argument_is_refused_with_what_may_be_meant(name: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"Trainer has no argument `{name}`. Did you mean `{meant}`?"):
        trainer(tmp_path, **{name: None})


def test_a_subclass_may_take_arguments_of_its_own(tmp_path: Path) -> None:
    class Own(RelationalDistillationTrainer):
        def __init__(self, margin: float, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.margin = margin

    run = Own(0.5, model=tiny_vit(), teacher=tiny_vit(seed=1), args=config(tmp_path), train_dataset=Images(8))
    assert run.margin == 0.5


def test_arguments_for_loading_beside_a_teacher_that_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`teacher_model_init_kwargs` \['dtype'\] are for .* `teacher` is a model"):
        trainer(tmp_path, teacher_model_init_kwargs={"dtype": "bfloat16"})
    trainer(tmp_path, teacher_model_init_kwargs={})


def test_an_error_of_the_student_names_the_columns_of_the_data_alone(tmp_path: Path) -> None:
    images = Images(8)
    examples = [{**images[i], "teacher_pixel_values": images.pixels[i]} for i in range(8)]
    examples = [{**example, "pixel_values": torch.zeros(3, 15, 16)} for example in examples]
    message = r"the student failed on `pixel_values` \(8, 3, 15, 16\) float32, `labels` \(8,\) int64\. ValueError"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, train_dataset=examples).train()


@pytest.mark.parametrize(
    ("label", "problem_type"),
    [(1.0, None), (CLASSES, None), ([1] * CLASSES, None), ([1] * CLASSES, "multi_label_classification")],
)
def test_labels_of_another_kind_than_the_loss_reads_are_an_error_that_says_which(
    label: Any, problem_type: str | None, tmp_path: Path
) -> None:
    examples = [{**Images(8)[index], "labels": label} for index in range(8)]
    student = tiny_vit()
    student.config.problem_type = problem_type
    kinds = r"integers below `num_labels`, or, of several at once, floats of the shape \(batch, num_labels\)"
    with pytest.raises(ValueError, match=rf"`labels` \(8.*\(A classifier's `labels` are {kinds}\.\)$"):
        trainer(tmp_path, model=student, train_dataset=examples).train()


@pytest.mark.parametrize("frozen", [True, False])
def test_a_student_that_is_frozen_is_a_warning(frozen: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student = tiny_vit()
    for name, weight in student.named_parameters():
        weight.requires_grad_(not frozen and name == "classifier.bias")
    transformers_logging.enable_propagation()
    try:
        trainer(tmp_path, model=student, max_steps=1).train()
    finally:
        transformers_logging.disable_propagation()
    assert ("No weight of the student asks for a gradient" in caplog.text) == frozen


def test_a_list_of_data_sets(tmp_path: Path) -> None:
    parts = [datasets.Dataset.from_list([{**Images(4)[0], "labels": 0}])] * 2
    joins = r"got a list\. datasets\.concatenate_datasets joins them"
    with pytest.raises(ValueError, match=rf"`eval_dataset` must .* {joins}; several sets .* into a dict, by name\."):
        trainer(tmp_path, eval_dataset=parts)
    with pytest.raises(ValueError, match=rf"`train_dataset` must .* {joins}\."):
        trainer(tmp_path, train_dataset=parts)


def test_a_transform_that_drops_the_cached_columns(tmp_path: Path) -> None:
    images = Images(4)
    rows = datasets.Dataset.from_list([{"number": index, "teacher_embedding": [1.0] * 24} for index in range(4)])
    made = rows.with_transform(lambda batch: {name: [images[i][name] for i in batch["number"]] for name in images[0]})
    message = r"format of `train_dataset` drops .* as in cache_teacher_outputs\(dataset\.with_transform"
    for dataset in (made, rows.with_format("torch", columns=["number"])):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, teacher=None, train_dataset=dataset, task_weight=0.0)


def test_a_teacher_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere' cannot be loaded\. There is no such folder\.$"):
        trainer(tmp_path, teacher=tmp_path / "nowhere")


def test_a_folder_that_is_misspelt_may_be_a_name_of_the_hub_so_both_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = r"(?s)'out/nowhere' cannot be loaded\. .+ Nor is there such a folder\.$"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, teacher="out/nowhere", teacher_pooling="mean")


def test_a_tokenizers_collator_on_the_teachers_columns_is_pointed_to_ours(tmp_path: Path) -> None:
    words = tokenizer("[PAD]", "[UNK]", "a", "good", "film")
    sides = [(words(text), words(f"a {text}")) for text in ("film", "good film")]
    examples = [
        {**student, **{f"teacher_{name}": value for name, value in teacher.items()}, "label": 0}
        for student, teacher in sides
    ]
    given: dict[str, Any] = {"model": tiny_bert(), "teacher": tiny_bert(seed=1), "train_dataset": examples * 4}
    run = trainer(tmp_path, data_collator=DataCollatorWithPadding(words), **given)
    with pytest.raises(ValueError, match=r"DataCollatorForDistillation\(data_collator, teacher_tokenizer\)\.$"):
        run.train()


def test_headless_student_of_a_task(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"teacher": tiny_bert(seed=1), "train_dataset": Texts(8)}
    with pytest.raises(ValueError, match="`task_weight` is above 0.*task_weight=0"):
        trainer(tmp_path, model=BertModel(tiny_bert().config), **settings).train()


def test_headless_student_cannot_learn_logits(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"teacher": tiny_bert(seed=1), "train_dataset": Texts(8), "task_weight": 0.0}
    with pytest.raises(ValueError, match="student needs logits: BertModel has no head.*AutoModelFor.*kd_weight=0"):
        trainer(tmp_path, model=BertModel(tiny_bert().config), kd_weight=1.0, **settings)
