"""The features of the Trainer that a distillation run goes through, one fact a test."""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers import logging as transformers_logging
from transformers.modeling_outputs import ImageClassifierOutput

import hf_rrd.models.logits
from hf_rrd.models.head import EMBEDDING, HEAD, WITH_EMBEDDING, detach_head, head_of
from hf_rrd.training.checkpoint import SIDECAR
from tests.builders import CLASSES, Images, Texts, config, log_of, tiny_bert, tiny_vit, trainer


def parameters(model: nn.Module) -> Tensor:
    """All parameters in one row."""
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def close(first: nn.Module, second: nn.Module, tolerance: float) -> None:
    torch.testing.assert_close(parameters(first), parameters(second), rtol=0, atol=tolerance)


def all_of(dataset: Any, start: int = 0, end: int | None = None) -> dict[str, Tensor]:
    """Examples of a data set as one batch."""
    examples = [dataset[index] for index in range(start, len(dataset) if end is None else end)]
    return {name: torch.stack([torch.as_tensor(example[name]) for example in examples]) for name in examples[0]}


@contextmanager
def seen_by(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of the module's forwards meanwhile."""
    calls: list[dict[str, Any]] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(dict(kwargs))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    yield calls
    handle.remove()


def all_terms(entry: dict[str, float], prefix: str = "") -> tuple[float, float, float]:
    task, kd, relational = (entry[f"{prefix}{name}_loss"] for name in ("task", "kd", "relational"))
    return task, kd, relational


# ---- Settings of the Trainer ----


def test_bf16_autocast_compares_in_float32_and_stays_near_the_float32_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = trainer(tmp_path, kd_weight=1.0)
    exact.train()
    run = trainer(tmp_path, kd_weight=1.0, bf16=True)
    dtypes: set[torch.dtype] = set()
    inside: list[torch.dtype] = []
    run.model.classifier.register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    relational, kd = run.distillation.relational_terms, run.distillation.kd_terms

    def relational_spy(student: Tensor, teacher: Tensor, *others: Any) -> dict[str, Tensor]:
        terms = relational(student, teacher, *others)
        dtypes.update(tensor.dtype for tensor in (student, teacher, *terms.values()))
        return terms

    def kd_spy(student: Tensor, *others: Any) -> dict[str, Tensor]:
        terms = kd(student, *others)
        dtypes.update(tensor.dtype for tensor in (student, *terms.values()))
        return terms

    monkeypatch.setattr(run.distillation, "relational_terms", relational_spy)
    monkeypatch.setattr(run.distillation, "kd_terms", kd_spy)
    run.train()

    assert set(inside) == {torch.bfloat16}  # autocast was on
    assert dtypes == {torch.float32}
    assert run.distillation.bank is not None and run.distillation.bank.filled.dtype == torch.float32
    assert {weight.dtype for weight in run.model.parameters()} == {torch.float32}
    assert log_of(run) == pytest.approx(log_of(exact), rel=0.03)
    assert log_of(run) != log_of(exact)


def test_activation_checkpointing_gives_the_same_parameters(tmp_path: Path) -> None:
    plain = trainer(tmp_path, model=tiny_vit(dropout=0.1), kd_weight=1.0)
    plain.train()
    renamed = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    for name in ["gradient_checkpointing", "activation_checkpointing"][: 1 + renamed]:
        model = tiny_vit(dropout=0.1)
        given = {"model": model, "kd_weight": 1.0, name: True}
        if renamed and name == "gradient_checkpointing":
            with pytest.warns(FutureWarning, match="activation_checkpointing"):
                run = trainer(tmp_path, **given)
        else:
            run = trainer(tmp_path, **given)
        run.train()
        assert model.is_gradient_checkpointing
        close(run.model, plain.model, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_student_trains_as_the_eager_one(backend: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"kd_weight": 1.0, "optim": "sgd", "max_steps": 2}
    eager = trainer(tmp_path, model=tiny_vit(layers=1), **settings)
    run = trainer(tmp_path, model=tiny_vit(layers=1), torch_compile=True, torch_compile_backend=backend, **settings)
    before = parameters(run.model.vit)
    eager.train()
    run.train()
    assert isinstance(run.model_wrapped, torch._dynamo.OptimizedModule)
    assert all(math.isfinite(value) for value in log_of(run))
    assert (parameters(run.model.vit) - before).abs().max() > 1e-3
    close(run.model, eager.model, 1e-4)
    close(run.distillation.head, eager.distillation.head, 1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_label_smoothing_is_the_task_loss(accumulation: int, tmp_path: Path) -> None:
    dataset = Images(8)
    batch = all_of(dataset)
    run = trainer(
        tmp_path,
        train_dataset=dataset,
        label_smoothing_factor=0.2,
        max_steps=1,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    with torch.no_grad():
        log_probs = tiny_vit()(pixel_values=batch["pixel_values"]).logits.log_softmax(-1)
    target = F.one_hot(batch["labels"], CLASSES) * 0.8 + 0.2 / CLASSES
    run.train()
    assert log_of(run, "task_loss") == [pytest.approx(-(target * log_probs).sum(1).mean().item(), abs=1e-5)]


def doubled(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return 2 * F.cross_entropy(outputs.logits, labels)


def test_compute_loss_func_is_the_task_loss_whatever_the_cut_of_the_batch(tmp_path: Path) -> None:
    dataset = Images(8)
    batch = all_of(dataset)
    with torch.no_grad():
        logits = tiny_vit()(pixel_values=batch["pixel_values"]).logits
    expected = 2 * F.cross_entropy(logits, batch["labels"]).item()
    runs = [
        trainer(
            tmp_path,
            train_dataset=dataset,
            compute_loss_func=doubled,
            optim="sgd",
            learning_rate=0.1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )
        for size in (8, 4)
    ]
    for run in runs:
        run.train()
        assert log_of(run, "task_loss")[0] == pytest.approx(expected, abs=1e-5)
    close(runs[1].model, runs[0].model, 1e-6)
    assert log_of(runs[1]) == pytest.approx(log_of(runs[0]), abs=1e-5)


# ---- Checkpoints ----


@pytest.mark.parametrize("build, dataset", [(tiny_vit, Images), (tiny_bert, Texts)])
def test_best_model_by_relational_loss_evaluates_exactly_to_the_best_metric(
    build: Any, dataset: Any, tmp_path: Path
) -> None:
    run = trainer(
        tmp_path,
        model=build(),
        teacher=build(width=24, seed=1),
        train_dataset=dataset(),
        eval_dataset=dataset(13, seed=1),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=5,
        learning_rate=0.5,
        student_pooling="mean" if build is tiny_bert else "auto",  # so that the last step is not the best
        load_best_model_at_end=True,
        metric_for_best_model="eval_relational_loss",
    )
    run.train()
    evaluated = {
        entry["step"]: entry["eval_relational_loss"] for entry in run.state.log_history if "eval_loss" in entry
    }
    best = min(evaluated, key=lambda step: evaluated[step])
    assert best < 5 and run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert run.state.best_metric == evaluated[best] != evaluated[5]
    assert run.evaluate()["eval_relational_loss"] == run.state.best_metric


def test_save_only_model_keeps_the_best_model_but_no_run(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True, "max_steps": 4}
    run = trainer(
        tmp_path,
        eval_dataset=Images(13, seed=1),
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_task_loss",
        greater_is_better=True,
        **settings,
    )
    run.train()
    evaluated = [entry["eval_task_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.state.best_metric == max(evaluated)
    assert run.evaluate()["eval_task_loss"] == run.state.best_metric
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "model.safetensors" in files
    assert not files & {"optimizer.pt", "scheduler.pt", SIDECAR}
    with pytest.raises(ValueError, match="save_only_model=True.*cannot be resumed"):
        trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def tiny_lora() -> Any:
    from peft import LoraConfig, get_peft_model

    student = tiny_bert(dropout=0.1)
    torch.manual_seed(3)
    return get_peft_model(student, LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.1))


def test_lora_trains_adapter_and_head_alone_and_resumes_bitwise(tmp_path: Path) -> None:
    def lora_run(folder: str) -> Any:
        settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "kd_weight": 1.0}
        return trainer(
            tmp_path / folder,
            model=tiny_lora(),
            teacher=tiny_bert(width=24, seed=1),
            train_dataset=Texts(),
            **settings,
        )

    whole = lora_run("whole")
    before = {name: weight.detach().clone() for name, weight in whole.model.named_parameters()}
    whole.train()
    after = dict(whole.model.named_parameters()) | {
        f"{HEAD}.{name}": weight for name, weight in whole.distillation.head.named_parameters()
    }
    trained = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert trained == {name for name in before if "lora_" in name or name.startswith(f"{HEAD}.")}
    assert len(trained) == 2 * 2 * 2 + 2  # A and B, of query and value, in two layers; the head's weight and bias

    whole.save_model(str(tmp_path / "adapter"))
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    assert len(keys) == 8 and all("lora_" in key for key in keys)

    resumed = lora_run("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(parameters(resumed.model), parameters(whole.model))
    assert torch.equal(parameters(resumed.distillation.head), parameters(whole.distillation.head))
    assert torch.equal(resumed.distillation.bank.filled, whole.distillation.bank.filled)
    assert len(whole.distillation.bank) == 20
    for term in ("loss", "task_loss", "kd_loss", "relational_loss", "relational_kl"):
        assert log_of(resumed, term) == log_of(whole, term)


def test_bank_holds_only_the_last_attempt_when_the_batch_size_is_found(tmp_path: Path) -> None:
    student = tiny_vit()
    sizes: list[int] = []

    def run_out_of_memory(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(len(kwargs["pixel_values"]))
        if sizes == [8] * 4:  # the second half of the second step
            raise RuntimeError("CUDA out of memory.")

    run = trainer(
        tmp_path,
        model=student,
        auto_find_batch_size=True,
        gradient_accumulation_steps=2,
        max_steps=2,
        bank_size=40,
    )
    student.register_forward_pre_hook(run_out_of_memory, with_kwargs=True)
    run.train()
    assert sizes[:4] == [8] * 4 and len(sizes) == 8 and set(sizes[4:]) == {sizes[4]} and sizes[4] < 8
    assert run.state.global_step == 2
    bank = run.distillation.bank
    assert bank is not None and len(bank) == 40 and run.distillation.reference is not None
    assert torch.equal(bank.filled[: 40 - sum(sizes[4:])], run.distillation.reference[sum(sizes[4:]) :])
    assert run.distillation.pending == []
    for entry in run.state.log_history[-3:-1]:
        assert entry["loss"] == pytest.approx(entry["task_loss"] + entry["relational_loss"], abs=1e-5)


# ---- Students and terms ----


def test_student_from_model_init_gets_a_head_that_trains(tmp_path: Path) -> None:
    def model_init() -> Any:
        with torch.random.fork_rng():  # the builder's seed is not to change the order of the data
            return tiny_vit()

    def of_width(width: int) -> Any:
        return tiny_vit(width)

    assert trainer(tmp_path, model_init=partial(of_width, width=8)).model.config.hidden_size == 8
    run = trainer(tmp_path, model_init=model_init)
    assert head_of(run.model) is not None
    before = parameters(head_of(run.model))
    run.train()
    assert parameters(run.distillation.head).shape == before.shape == (16 * 24 + 24,)
    assert not torch.equal(parameters(run.distillation.head), before)


def test_without_task_loss_neither_training_nor_evaluation_needs_labels(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        task_weight=0.0,
        train_dataset=Images(labels=False),
        eval_dataset=Images(13, seed=1, labels=False),
    )
    before = parameters(run.model)
    run.train()
    metrics = run.evaluate()
    assert not torch.equal(parameters(run.model), before)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_relational_loss"], abs=1e-5)
    assert metrics["eval_relational_loss"] > metrics["eval_relational_kl"] > 0
    assert "eval_task_loss" not in metrics and "task_loss" not in run.state.log_history[0]


def test_a_headless_students_own_loss_gets_the_labels_also_under_a_teacher_that_takes_some(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs.last_hidden_state[:, 0, :4], labels)

    arguments: dict[str, Any] = {"model": BertModel(tiny_bert().config), "teacher": tiny_bert(width=24, seed=1)}
    run = trainer(tmp_path, train_dataset=Texts(), compute_loss_func=loss, label_names=["labels"], **arguments)
    run.train()
    assert len(log_of(run, "task_loss")) == 3
    assert "eval_task_loss" in run.evaluate(Texts(8))


def test_headless_student_trains_without_a_task(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = BertModel(tiny_bert().config)
    before = student.encoder.layer[0].output.dense.weight.detach().clone()
    run = trainer(
        tmp_path,
        model=student,
        teacher=tiny_bert(width=24, seed=1),
        train_dataset=Texts(),
        task_weight=0.0,
    )
    run.train()
    assert all(value > 0 for value in log_of(run, "relational_loss")[1:])
    assert not torch.equal(student.encoder.layer[0].output.dense.weight, before)


def test_without_kd_weight_distillation_on_logits_is_never_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: Any) -> Tensor:
        raise AssertionError("logit_terms was called")

    monkeypatch.setattr(hf_rrd.models.logits, "logit_terms", forbidden)
    run = trainer(tmp_path, kd_weight=0.0, eval_dataset=Images(5))
    run.train()
    assert len(log_of(run)) == 3
    assert log_of(run, "kd_loss") == []
    assert "eval_kd_loss" not in run.evaluate()
    with pytest.raises(ValueError, match="logit_terms was called"):
        trainer(tmp_path, kd_weight=1.0).train()


def test_without_relational_weight_there_is_neither_head_nor_hook_nor_bank(tmp_path: Path) -> None:
    student, teacher = tiny_vit(), tiny_vit(width=24, seed=1)
    run = trainer(tmp_path, model=student, teacher=teacher, relational_weight=0.0, kd_weight=1.0)
    run.train()
    assert head_of(student) is None and run.distillation.bank is None
    assert set(student.state_dict()) == set(tiny_vit().state_dict())
    for model in (student, teacher):
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        assert sum(hooks) == 0
    assert len(log_of(run, "kd_loss")) == 3 and log_of(run, "relational_loss") == []


class Linear(nn.Module):
    """A classifier of images without a body."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classifier = nn.Linear(3 * 16 * 16, CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> ImageClassifierOutput:
        logits = self.classifier(pixel_values.flatten(1))
        return ImageClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


def test_student_without_a_body_learns_logits(tmp_path: Path) -> None:
    dataset = Images(8)
    batch = all_of(dataset)
    teacher = tiny_vit(width=24, seed=1).eval()
    with torch.no_grad():
        mine, theirs = Linear()(**batch).logits, teacher(pixel_values=batch["pixel_values"]).logits
    q_student, q_teacher = (mine / 4).softmax(1), (theirs / 4).softmax(1)
    expected = 16 * (q_teacher * (q_teacher / q_student).log()).sum(1).mean().item()
    run = trainer(
        tmp_path, model=Linear(), teacher=teacher, relational_weight=0.0, kd_weight=1.0, train_dataset=dataset
    )
    run.train()
    assert log_of(run, "kd_loss")[0] == pytest.approx(expected, abs=1e-5)
    assert log_of(run, "kd_loss")[-1] < expected


def test_with_the_task_alone_it_is_the_plain_trainer_bit_for_bit(tmp_path: Path) -> None:
    run = trainer(tmp_path, teacher=None, relational_weight=0.0)
    run.train()
    arguments = {
        name: value for name, value in vars(config(tmp_path)).items() if name in ("seed", "max_steps", "learning_rate")
    }
    plain = Trainer(
        model=tiny_vit(),
        args=TrainingArguments(str(tmp_path), use_cpu=True, save_strategy="no", report_to=[], **arguments),
        train_dataset=Images(),
    )
    plain.train()
    assert torch.equal(parameters(run.model), parameters(plain.model))


# ---- Teachers ----


def test_cached_teacher_outputs_train_as_the_online_teacher(tmp_path: Path) -> None:
    teacher = tiny_vit(width=24, seed=1).eval()
    batch = all_of(Images())
    with torch.no_grad():
        embedding = teacher.vit(pixel_values=batch["pixel_values"]).last_hidden_state[:, 0]
        logits = teacher(pixel_values=batch["pixel_values"]).logits
    columns = {name: value.tolist() for name, value in batch.items()}
    cached = datasets.Dataset.from_dict(
        columns | {"teacher_embedding": embedding.tolist(), "teacher_logits": logits.tolist()}
    )
    settings: dict[str, Any] = {"kd_weight": 1.0, "optim": "sgd", "learning_rate": 0.1}
    online = trainer(tmp_path, teacher=teacher, train_dataset=datasets.Dataset.from_dict(columns), **settings)
    offline = trainer(tmp_path, teacher=None, train_dataset=cached, eval_dataset=cached, **settings)
    before = parameters(online.model.vit)
    online.train()
    offline.train()
    close(offline.model, online.model, 1e-6)
    close(offline.distillation.head, online.distillation.head, 1e-6)
    assert (parameters(online.model.vit) - before).abs().max() > 1e-2
    for term in ("loss", "kd_loss", "relational_loss"):
        assert log_of(offline, term) == pytest.approx(log_of(online, term), abs=1e-5)
    task, kd, relational = all_terms(metrics := offline.evaluate(), "eval_")
    assert metrics["eval_loss"] == pytest.approx(task + kd + relational, abs=1e-4)


def test_teacher_from_a_folder_is_the_teacher_itself(tmp_path: Path) -> None:
    teacher = tiny_vit(width=24, seed=1)
    teacher.save_pretrained(tmp_path / "teacher")
    runs = [trainer(tmp_path, teacher=given, kd_weight=1.0) for given in (teacher, str(tmp_path / "teacher"))]
    for run in runs:
        run.train()
    assert type(runs[1].teacher) is type(teacher) and runs[1].teacher is not teacher
    assert log_of(runs[1]) == log_of(runs[0])
    assert torch.equal(parameters(runs[1].model), parameters(runs[0].model))


def test_teacher_of_another_width_family_and_number_of_classes_teaches_relations(tmp_path: Path) -> None:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 40], "depths": [1, 1], "layer_type": "basic"}
    teacher = ResNetForImageClassification(ResNetConfig(num_labels=7, **sizes))
    centred: dict[str, Any] = {"teacher_projection": "center"}  # or all are alike
    run = trainer(tmp_path, teacher=teacher, max_steps=12, eval_dataset=Images(16), **centred)
    before = run.evaluate()["eval_relational_kl"]
    run.train()
    assert run.distillation.bank is not None and run.distillation.bank.filled.shape == (20, 40)
    assert run.evaluate()["eval_relational_kl"] < 0.9 * before


def word_tokenizer(words: int, padding: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the words "w0", "w1", ..., one of which is the padding."""
    vocabulary = {"[PAD]" if index == padding else f"w{index}": index for index in range(words)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="[PAD]")),
        pad_token="[PAD]",
        model_input_names=["input_ids", "attention_mask"],
    )


def test_two_tokenizers_feed_each_model_its_own_columns(tmp_path: Path) -> None:
    student, teacher = tiny_bert(), tiny_bert(width=24, seed=1)
    teacher.resize_token_embeddings(90)
    lengths = [3 + index % 4 for index in range(16)]
    dataset = datasets.Dataset.from_dict(
        {
            "input_ids": [[2 + index % 40] * length for index, length in enumerate(lengths)],
            "attention_mask": [[1] * length for length in lengths],
            "teacher_input_ids": [[60 + index] * (length + 5) for index, length in enumerate(lengths)],
            "teacher_attention_mask": [[1] * (length + 5) for length in lengths],
            "note": ["neither model reads this"] * 16,
            "label": [index % CLASSES for index in range(16)],
        }
    )
    run = trainer(
        tmp_path,
        model=student,
        teacher=teacher,
        train_dataset=dataset,
        processing_class=word_tokenizer(50, padding=0),
        teacher_processing_class=word_tokenizer(90, padding=1),
        max_steps=2,
    )
    assert run.args.remove_unused_columns
    with seen_by(teacher) as teacher_saw, seen_by(student) as student_saw:
        run.train()
    del student_saw[:2]  # which show whether its loss uses the count of labels
    assert len(teacher_saw) == 4 and len(student_saw) == 2  # two batches fill the bank
    for mine, theirs in zip(student_saw, teacher_saw[2:], strict=True):
        assert set(theirs) - {"position_ids"} == {"input_ids", "attention_mask"}
        assert set(mine) - {"with_relational_embedding"} == {"input_ids", "attention_mask", "labels"}
        assert theirs["input_ids"].shape == (8, 11) and mine["input_ids"].shape == (8, 6)
        tokens, mask = theirs["input_ids"], theirs["attention_mask"] == 1
        assert tokens[mask].min() >= 60 and set(tokens[~mask].tolist()) == {1}  # the teacher's padding
        assert torch.equal(tokens[:, 0] - 60, mine["input_ids"][:, 0] - 2)  # the same examples
        assert set(mine["input_ids"][mine["attention_mask"] == 0].tolist()) == {0}


def test_only_the_teacher_receives_token_type_ids_that_the_student_does_not_take(tmp_path: Path) -> None:
    student = DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=50,
            max_position_embeddings=32,
            dim=16,
            hidden_dim=32,
            n_layers=1,
            n_heads=2,
            num_labels=CLASSES,
        )
    )
    teacher = tiny_bert(width=24, seed=1)
    columns = {name: value.tolist() for name, value in all_of(Texts()).items()}
    columns["token_type_ids"] = [[0] * 4 + [1] * 5] * 48
    run = trainer(
        tmp_path, model=student, teacher=teacher, train_dataset=datasets.Dataset.from_dict(columns), max_steps=1
    )
    with seen_by(teacher) as teacher_saw, seen_by(student) as student_saw:
        run.train()
    assert teacher_saw[0]["token_type_ids"].sum() == 8 * 5
    assert set(teacher_saw[0]) - {"position_ids"} == {"input_ids", "attention_mask", "token_type_ids"}
    assert "token_type_ids" not in student_saw[0] and "labels" in student_saw[0]


# ---- Logs, evaluation and prediction ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 4, "logging_steps": 2},
        {"bank_size": 0},
        {"teacher_temperature": 0.2},
    ],
)
def test_logged_loss_is_the_weighted_sum_of_the_logged_terms(settings: dict[str, Any], tmp_path: Path) -> None:
    weights = {"task_weight": 0.5, "kd_weight": 2.0, "relational_weight": 3.0}
    # 20 examples in batches of 8: the last micro-batch of an epoch has 4, the last step of one fewer micro-batches.
    run = trainer(tmp_path, train_dataset=Images(20), max_steps=6, **weights, **settings)
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(entries) == 6 // run.args.logging_steps
    for entry in entries:
        task, kd, relational = all_terms(entry)
        assert entry["loss"] == pytest.approx(0.5 * task + 2.0 * kd + 3.0 * relational, abs=1e-5)
        assert entry["relational_kl"] <= relational
    assert entries[-1]["relational_kl"] > 0


def test_log_line_is_the_mean_over_the_steps_since_the_last_one(tmp_path: Path) -> None:
    each, pairs = (trainer(tmp_path, kd_weight=1.0, max_steps=6, logging_steps=steps) for steps in (1, 2))
    each.train()
    pairs.train()
    assert [entry["step"] for entry in pairs.state.log_history if "loss" in entry] == [2, 4, 6]
    for term in ("loss", "task_loss", "kd_loss", "relational_loss", "relational_kl"):
        means = torch.tensor(log_of(each, term)).view(3, 2).mean(1)
        torch.testing.assert_close(torch.tensor(log_of(pairs, term)), means, rtol=0, atol=2e-5)


def test_evaluation_terms_are_means_over_examples_when_the_batch_does_not_divide(tmp_path: Path) -> None:
    teacher, dataset = tiny_vit(width=24, seed=1), Images(13, seed=1)
    run = trainer(tmp_path, teacher=teacher, eval_dataset=dataset, kd_weight=1.0, kd_temperature=2.0)
    run.train()
    metrics = run.evaluate()

    batch = all_of(dataset)
    student = run.model.eval()
    with torch.no_grad():
        logits, teacher_logits = (model(pixel_values=batch["pixel_values"]).logits for model in (student, teacher))
        hidden, teacher_hidden = (model.vit(batch["pixel_values"]).last_hidden_state for model in (student, teacher))
        rows = F.normalize(run.distillation.head(hidden[:, 0]), dim=-1)
    teacher_rows = F.normalize(teacher_hidden[:, 0], dim=-1)
    cross_entropies, divergences, kds = [], [], []
    for row, own, mine, theirs in zip(rows, teacher_rows, logits, teacher_logits, strict=True):
        keys = torch.cat([run.distillation.reference, own[None]])  # type: ignore[list-item]
        p_teacher, p_student = (keys @ own / 0.02).softmax(0), (keys @ row / 0.1).softmax(0)
        cross_entropies.append(-(p_teacher * p_student.log()).sum())
        divergences.append((p_teacher * (p_teacher.log() - p_student.log())).nan_to_num().sum())
        q_teacher, q_student = (theirs / 2).softmax(0), (mine / 2).softmax(0)
        kds.append(4 * (q_teacher * (q_teacher / q_student).log()).sum())
    expected = {
        "eval_task_loss": F.cross_entropy(logits, batch["labels"]),
        "eval_kd_loss": torch.stack(kds).mean(),
        "eval_relational_loss": torch.stack(cross_entropies).mean(),
        "eval_relational_kl": torch.stack(divergences).mean(),
    }
    assert len(rows) == 13
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), abs=1e-5), name
    assert metrics["eval_loss"] == pytest.approx(sum(all_terms(metrics, "eval_")), abs=1e-5)


def test_evaluation_and_prediction_leave_the_bank_bitwise_untouched(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=Images(13, seed=1))
    run.train()
    bank = run.distillation.bank
    assert bank is not None
    before = bank.filled.clone()
    run.evaluate()
    run.predict(Images(13, seed=1))
    assert torch.equal(bank.filled, before) and len(before) == 20
    assert run.distillation.pending == []


def test_metrics_and_predictions_see_the_logits_alone(tmp_path: Path) -> None:
    shapes: list[Any] = []

    def measure(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    student, dataset = tiny_vit(), Images(13, seed=1)
    run = trainer(tmp_path, model=student, eval_dataset=dataset, compute_metrics=measure)
    metrics = run.evaluate()
    output = run.predict(dataset)
    assert shapes == [(13, CLASSES)] * 2 and output.predictions.shape == (13, CLASSES)
    with torch.no_grad():
        logits = tiny_vit().eval()(pixel_values=all_of(dataset)["pixel_values"]).logits
    np.testing.assert_allclose(output.predictions, logits.numpy(), atol=1e-6)
    hits = (logits.argmax(-1) == all_of(dataset)["labels"]).float().mean().item()
    assert metrics["eval_accuracy"] == pytest.approx(hits)
    assert EMBEDDING not in student(pixel_values=all_of(dataset)["pixel_values"])


@pytest.mark.parametrize("settings", [{}, {"task_weight": 0.0}, {"kd_weight": 1.0, "relational_weight": 0.0}])
def test_prediction_works_without_labels(settings: dict[str, Any], tmp_path: Path) -> None:
    run = trainer(tmp_path, **settings)
    labelled = run.predict(Images(13, seed=1))
    output = run.predict(Images(13, seed=1, labels=False))
    assert output.predictions.shape == (13, CLASSES) and output.label_ids is None
    np.testing.assert_array_equal(output.predictions, labelled.predictions)


@pytest.mark.parametrize("labels", [True, False])
def test_an_evaluation_that_lacks_its_labels_says_why_it_has_no_loss(
    labels: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, eval_dataset=Images(8, labels=labels), alignment_examples=8)
    transformers_logging.enable_propagation()
    try:
        metrics = run.evaluate()
        run.predict(Images(8, labels=False))
    finally:
        transformers_logging.disable_propagation()
    assert ("eval_loss" in metrics) == ("eval_alignment_cka" in metrics) == labels
    said = [each for each in caplog.messages if each.startswith("An evaluation without labels, with `task_weight`")]
    assert len(said) == (not labels)


# ---- The head ----


def hook_counts(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def test_second_trainer_replaces_the_head_of_the_first(tmp_path: Path) -> None:
    student = tiny_vit()
    first = trainer(tmp_path, model=student, eval_dataset=Images(8))
    assert head_of(student).projection.out_features == 24
    counts = hook_counts(student)
    second = trainer(tmp_path, model=student, teacher=tiny_vit(width=32, seed=2))
    assert head_of(student).projection.out_features == 32
    assert hook_counts(student) == counts
    first.evaluate()
    assert head_of(student) is second.distillation.head and hook_counts(student) == counts
    first.train()
    second.train()
    assert second.distillation.bank is not None and second.distillation.bank.filled.shape == (20, 32)
    student.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if HEAD in key]


def test_a_trained_student_is_a_plain_model_whatever_is_asked_of_its_trainer_afterwards(tmp_path: Path) -> None:
    student, stock = tiny_vit(), tiny_vit()
    run = trainer(tmp_path, model=student, eval_dataset=Images(8, seed=3), kd_weight=1.0, alignment_examples=8)
    assert hook_counts(student) != hook_counts(stock)
    at_the_end: dict[str, float] = {}

    class Ask(TrainerCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            at_the_end.update(run.evaluate())

    run.add_callback(Ask())
    run.train()
    for ask in (run.evaluate, partial(run.predict, Images(8)), run.report, run.create_model_card, run.save_model):
        assert student.num_parameters() == stock.num_parameters() == 7_732
        assert list(student.state_dict()) == list(stock.state_dict())
        assert hook_counts(student) == hook_counts(stock)
        assert student._keys_to_ignore_on_save == stock._keys_to_ignore_on_save
        result = ask()
        if ask == run.evaluate:
            quality = [name for name in at_the_end if "loss" in name or "relational" in name or "alignment" in name]
            assert len(quality) == 8 and all(result[name] == at_the_end[name] for name in quality)
    run.compute_loss(student, all_of(Images(8)))
    assert head_of(student) is run.distillation.head, "asked by hand it has to stay on"
    detach_head(student)
    differing = (set(vars(student)) | set(vars(student.vit))) ^ (set(vars(stock)) | set(vars(stock.vit)))
    assert differing <= {
        "_keys_to_ignore_on_save",
        "_is_accelerate_prepared",
    }  # a None of ours, a mark of accelerate's


def test_a_replica_of_the_student_gives_an_embedding_of_its_own_body(tmp_path: Path) -> None:
    student, pixels = tiny_vit(), Images(2).pixels
    trainer(tmp_path, model=student)
    replica, body = student._replicate_for_data_parallel(), student.vit._replicate_for_data_parallel()
    replica._modules["vit"] = body  # as `nn.DataParallel` has them on another device
    expected, found = (model(pixel_values=pixels, **{WITH_EMBEDDING: True})[EMBEDDING] for model in (student, replica))
    torch.testing.assert_close(found, expected)


def test_evaluation_sets_may_be_in_any_dict(tmp_path: Path) -> None:
    sets = defaultdict(list, {"one": Images(8), "two": Images(8, seed=1)})
    metrics = trainer(tmp_path, eval_dataset=sets).evaluate()
    assert {"eval_one_relational_kl", "eval_two_relational_kl"} <= metrics.keys()


def test_a_teacher_of_logits_alone_may_be_any_module(tmp_path: Path) -> None:
    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3 * 16 * 16, 4)

        def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.layer(pixel_values.flatten(1))}

    run = trainer(tmp_path, teacher=Logits(), relational_weight=0.0, kd_weight=1.0)
    run.train()
    assert run.state.log_history[0]["kd_loss"] > 0
    assert "relational_loss" not in run.state.log_history[0]
