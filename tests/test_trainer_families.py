"""Each model family as the student and as the teacher."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from torch import Tensor, nn

from hf_rrd.models.body import body_of
from hf_rrd.models.head import head_of
from tests.builders import CLASSES, Images, Texts, log_of, tiny_bert, tiny_vit, trainer

EOS = 1  # T5's classifier reads the last of these


class TextsWithEos(Texts):
    """Padded sequences of 5 to 9 tokens that end with an end-of-sequence token."""

    def __init__(self, count: int = 48, seed: int = 0) -> None:
        super().__init__(count, seed)
        self.tokens[torch.arange(count), self.mask.sum(1) - 1] = EOS


class Sounds(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random waves of 300 to 400 samples, padded to 400, with labels."""

    def __init__(self, count: int = 48) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(300, 401, (count,), generator=generator)
        self.mask = (torch.arange(400) < lengths.unsqueeze(1)).long()
        self.waves = torch.randn(count, 400, generator=generator) * self.mask
        self.labels = torch.randint(0, CLASSES, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.waves)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_values": self.waves[index],
            "attention_mask": self.mask[index],
            "labels": self.labels[index],
        }


def transformer(name: str, **changes: Any) -> Callable[..., Any]:
    """Builds a model of a class with one layer of a given width, from the config class that it names."""
    model_class = getattr(hf, name)

    def build(width: int = 16, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": CLASSES}
        settings = {key: value(width) if callable(value) else value for key, value in changes.items()}
        return model_class(model_class.config_class(**(sizes | {"intermediate_size": 2 * width} | settings)))

    return build


def others(name: str, settings: Callable[[int], dict[str, Any]]) -> Callable[..., Any]:
    """Builds a model of a class whose config has names of its own."""
    model_class = getattr(hf, name)

    def build(width: int = 16, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return model_class(model_class.config_class(num_labels=CLASSES, **settings(width)))

    return build


def t5(width: int) -> dict[str, Any]:
    return {
        "vocab_size": 50,
        "d_model": width,
        "d_kv": width // 2,
        "d_ff": 2 * width,
        "num_layers": 1,
        "num_heads": 2,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
        "classifier_dropout": 0.0,
    }


SMALL_IMAGES = {"image_size": 16, "patch_size": 8}
SMALL_TEXTS = {"vocab_size": 50, "max_position_embeddings": 32}
DECODER = {**SMALL_TEXTS, "pad_token_id": 0, "num_key_value_heads": 2}

VISION: dict[str, Callable[..., Any]] = {
    "vit": transformer("ViTForImageClassification", **SMALL_IMAGES),
    "deit": transformer("DeiTForImageClassification", **SMALL_IMAGES),
    "dinov2": transformer("Dinov2ForImageClassification", **SMALL_IMAGES),
    "beit": transformer("BeitForImageClassification", **SMALL_IMAGES),
    "swin": others(
        "SwinForImageClassification",
        lambda width: {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": width // 2,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 2,
        },
    ),
    "resnet": others(
        "ResNetForImageClassification",
        lambda width: {"embedding_size": 8, "hidden_sizes": [8, width], "depths": [1, 1], "layer_type": "basic"},
    ),
    "convnext": others(
        "ConvNextForImageClassification",
        lambda width: {"num_stages": 2, "hidden_sizes": [8, width], "depths": [1, 1], "image_size": 16},
    ),
    "mobilenet_v2": others(
        "MobileNetV2ForImageClassification",
        lambda width: {"image_size": 16, "depth_multiplier": 0.1, "min_depth": 4, "finegrained_output": False},
    ),
    "clip": others(
        "CLIPForImageClassification",
        lambda width: {
            "vision_config": {
                "hidden_size": width,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 2 * width,
                **SMALL_IMAGES,
            },
            "text_config": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9},
        },
    ),
}

TEXT: dict[str, Callable[..., Any]] = {
    "bert": transformer("BertForSequenceClassification", **SMALL_TEXTS),
    "distilbert": others(
        "DistilBertForSequenceClassification",
        lambda width: {"dim": width, "hidden_dim": 2 * width, "n_layers": 1, "n_heads": 2, **SMALL_TEXTS},
    ),
    "roberta": transformer("RobertaForSequenceClassification", **SMALL_TEXTS, pad_token_id=0),
    "electra": transformer("ElectraForSequenceClassification", **SMALL_TEXTS, embedding_size=8),
    "modernbert": transformer(
        "ModernBertForSequenceClassification",
        **SMALL_TEXTS,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
    ),
    "deberta_v2": transformer(
        "DebertaV2ForSequenceClassification",
        **SMALL_TEXTS,
        pooler_hidden_size=lambda width: width,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
    ),
    "t5_encoder": others("T5EncoderModel", t5),
    "t5": others("T5ForSequenceClassification", t5),
    "gpt2": others(
        "GPT2ForSequenceClassification",
        lambda width: {
            "vocab_size": 50,
            "n_positions": 32,
            "n_embd": width,
            "n_layer": 1,
            "n_head": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
    ),
    "llama": transformer("LlamaForSequenceClassification", **DECODER),
    "qwen2": transformer("Qwen2ForSequenceClassification", **DECODER),
}

SPEECH: dict[str, Callable[..., Any]] = {
    "wav2vec2": transformer(
        "Wav2Vec2ForSequenceClassification",
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        apply_spec_augment=False,
    ),
}

HEADLESS = {"t5_encoder"}


def stored_keys(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    """The names whose tensors are no longer bitwise what they were."""
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def batch_of(dataset: Any) -> dict[str, Tensor]:
    examples = [dataset[index] for index in range(6)]
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


@torch.no_grad()
def calibrate(model: nn.Module, dataset: Any) -> None:
    """Let batch norm take its statistics from one batch: with its first ones a deep teacher has one output for all."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = None
    model.train()(pixel_values=batch_of(dataset)["pixel_values"])


@torch.no_grad()
def prediction(model: Any, dataset: Any) -> Tensor:
    """Logits, or hidden states of a headless model, of the first examples."""
    return model.eval()(**{name: value for name, value in batch_of(dataset).items() if name != "labels"})[0]


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("family", [*VISION, *TEXT, *SPEECH])
def test_family_trains_as_either_side_and_saves_a_stock_student(family: str, role: str, tmp_path: Path) -> None:
    build = (VISION | TEXT | SPEECH)[family]
    partner = tiny_vit if family in VISION else tiny_bert if family in TEXT else build
    dataset = Images() if family in VISION else TextsWithEos() if family in TEXT else Sounds()
    build_student, build_teacher = (build, partner) if role == "student" else (partner, build)
    fresh = build_student(width=16, seed=0)
    fresh.save_pretrained(tmp_path / "stock")
    student, teacher = build_student(width=16, seed=0), build_teacher(width=24, seed=1)
    calibrate(teacher, dataset)
    teacher_before, student_before = copied(teacher), copied(student)
    both_classify = family not in HEADLESS
    run = trainer(
        tmp_path / "out",
        model=student,
        teacher=teacher,
        train_dataset=dataset,
        task_weight=0.0 if family in HEADLESS and role == "student" else 1.0,
        kd_weight=float(both_classify),
        max_steps=2,
    )
    head_before, body_names = copied(head_of(student)), {name for name, _ in body_of(student).named_parameters()}
    run.train()

    expected = {"loss", "relational_loss", "relational_kl"} | ({"kd_loss"} if both_classify else set())
    expected |= {"task_loss"} if run.args.task_weight else set()
    assert set(run.state.log_history[0]) >= expected
    for term in expected:
        values = log_of(run, term)
        assert len(values) == 2 and all(math.isfinite(value) for value in values), (term, values)
    assert ("kd_loss" in run.state.log_history[0]) == both_classify
    assert log_of(run, "relational_loss")[1] > 0

    assert "projection.weight" in changed(head_before, run.distillation.head)
    student_before = {name: student_before.get(name, tensor) for name, tensor in student.state_dict().items()}
    prefix = next(name for name, module in student.named_modules() if module is body_of(student))
    trained = {name.removeprefix(f"{prefix}." if prefix else "") for name in changed(student_before, student)}
    assert trained & body_names

    assert changed(teacher_before, teacher) == set()
    assert not any(weight.requires_grad for weight in teacher.parameters())

    run.save_model(str(tmp_path / "saved"))
    assert stored_keys(tmp_path / "saved") == stored_keys(tmp_path / "stock")
    # A copy, since some convolutions round differently on weights that lie in the mapped file at odd addresses.
    reloaded = copy.deepcopy(type(student).from_pretrained(tmp_path / "saved"))
    torch.testing.assert_close(prediction(reloaded, dataset), prediction(student, dataset), rtol=0, atol=0)


class Questions(Texts):
    """Texts with the span of an answer."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = super().__getitem__(index)
        return example | {"start_positions": example.pop("labels"), "end_positions": torch.tensor(4)}


class Choices(Texts):
    """Three texts of which one is right."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        texts = [super(Choices, self).__getitem__((index + shift) % len(self)) for shift in range(3)]
        example = {name: torch.stack([text[name] for text in texts]) for name in ("input_ids", "attention_mask")}
        return example | {"labels": torch.tensor(index % 3)}


@pytest.mark.parametrize("task_weight", [0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "data"), [("BertForQuestionAnswering", Questions), ("BertForMultipleChoice", Choices)]
)
def test_tasks_with_other_labels_or_several_texts_an_example_train_and_evaluate(
    name: str, data: Any, task_weight: float, tmp_path: Path
) -> None:
    build = transformer(name, vocab_size=50, num_labels=2)
    models = {"model": build(), "teacher": build(24, seed=1)}
    run = trainer(tmp_path, train_dataset=data(24), eval_dataset=data(8), task_weight=task_weight, **models)
    run.train()
    metrics = run.evaluate()
    assert len(run.distillation.bank) == 20
    assert ("eval_task_loss" in metrics) == (task_weight > 0)
    assert metrics["eval_relational_kl"] > 0
