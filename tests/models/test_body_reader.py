"""What a classifier's last layer reads, across families: found, the same as its logits come from, and trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForTokenClassification,
    BertModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTModel,
    Wav2Vec2ForSequenceClassification,
)

from hf_rrd import cache_teacher_outputs, compare_models, embed
from hf_rrd.models.body import reader_of
from hf_rrd.models.embedding import Embedder
from hf_rrd.models.head import WITH_EMBEDDING, attach_head
from hf_rrd.models.teacher import Teacher
from tests.builders import CLASSES, Images, Texts, log_of, tiny_bert, tiny_tokens, tiny_vit, trainer
from tests.models.test_embedding import tiny_distilbert, tiny_resnet, tiny_swin, wav2vec2_config

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
WORDS: dict[str, Any] = {"vocab_size": 50, "max_position_embeddings": 40, "num_labels": CLASSES}


def made(model_class: Any, config_class: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    return model_class(config_class(**settings))


def tiny_roberta() -> Any:
    return made(RobertaForSequenceClassification, RobertaConfig, **SIZES, **WORDS)


def tiny_dinov2() -> Any:
    images = {"image_size": 16, "patch_size": 8, "num_labels": CLASSES}
    return made(Dinov2ForImageClassification, Dinov2Config, **SIZES | images | {"mlp_ratio": 2})


def tiny_gpt2_classifier() -> Any:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "pad_token_id": 0, "vocab_size": 50}
    return made(GPT2ForSequenceClassification, GPT2Config, **sizes, num_labels=CLASSES)


def lora(build: Callable[[], Any], **settings: Any) -> Any:
    """PEFT around a model, whose head is trained as a copy."""
    model = build()
    names = ["query", "q_proj", "q_lin"]
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**({"target_modules": names} | settings)))


def with_classifier(*more: nn.Module) -> Any:
    """A ViT whose classifier is a linear layer and more."""
    model = tiny_vit()
    model.classifier = nn.Sequential(nn.Linear(16, CLASSES), *more)
    return model


BART: dict[str, Any] = {"d_model": 16, "vocab_size": 50, "max_position_embeddings": 40, "num_labels": CLASSES}
BART |= {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")}

# A model, its last layer, and the width that this reads.
READ: dict[str, tuple[Callable[[], Any], Callable[[Any], nn.Module], int]] = {
    "bert": (tiny_bert, lambda model: model.classifier, 16),
    "roberta": (tiny_roberta, lambda model: model.classifier.out_proj, 16),
    "distilbert": (tiny_distilbert, lambda model: model.classifier, 16),
    "electra": (
        lambda: made(ElectraForSequenceClassification, ElectraConfig, **SIZES, **WORDS, embedding_size=8),
        lambda model: model.classifier.out_proj,
        16,
    ),
    "deberta": (
        lambda: made(DebertaV2ForSequenceClassification, DebertaV2Config, **SIZES, **WORDS, pooler_hidden_size=16),
        lambda model: model.classifier,
        16,
    ),
    "modernbert": (
        lambda: made(
            ModernBertForSequenceClassification,
            ModernBertConfig,
            **{**SIZES, **WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
            **{"cls_token_id": 1, "sep_token_id": 1, "reference_compile": False, "attn_implementation": "eager"},
        ),
        lambda model: model.classifier,
        16,
    ),
    "vit": (tiny_vit, lambda model: model.classifier, 16),
    "dinov2": (tiny_dinov2, lambda model: model.classifier, 32),  # CLS, and the mean of the patches
    "resnet": (tiny_resnet, lambda model: model.classifier[-1], 12),
    "convnext": (
        lambda: made(ConvNextForImageClassification, ConvNextConfig, hidden_sizes=[4, 6, 8, 10], depths=[1] * 4),
        lambda model: model.classifier,
        10,
    ),
    "mobilenet": (
        lambda: made(MobileNetV2ForImageClassification, MobileNetV2Config, image_size=32, depth_multiplier=0.25),
        lambda model: model.classifier,
        1280,
    ),
    "swin": (tiny_swin, lambda model: model.classifier, 16),
    "wav2vec2": (
        lambda: Wav2Vec2ForSequenceClassification(wav2vec2_config(classifier_proj_size=10)),
        lambda model: model.classifier,
        10,
    ),
    "bert under LoRA, with a copy of its head": (
        lambda: lora(tiny_bert, modules_to_save=["classifier"]),
        lambda model: model.get_base_model().classifier.modules_to_save["default"],
        16,
    ),
    "roberta under LoRA for classification": (
        lambda: lora(tiny_roberta, task_type="SEQ_CLS"),
        lambda model: model.get_base_model().classifier.modules_to_save["default"].out_proj,
        16,
    ),
    "vit under LoRA": (lambda: lora(tiny_vit), lambda model: model.get_base_model().classifier, 16),
    "LoRA of the last layer itself": (
        lambda: lora(tiny_bert, target_modules=["query", "q_proj", "classifier"]),
        lambda model: model.get_base_model().classifier,
        16,
    ),
    "bart, which reads the end of a text": (
        lambda: made(BartForSequenceClassification, BartConfig, **BART),
        lambda model: model.classification_head.out_proj,
        16,
    ),
}


def inputs_for(model: Any) -> dict[str, Tensor]:
    config, name = model.config, getattr(model, "main_input_name", None) or model.get_base_model().main_input_name
    generator = torch.Generator().manual_seed(0)
    if name == "pixel_values":
        size = config.image_size if isinstance(getattr(config, "image_size", None), int) else 32
        return {name: torch.randn(3, 3, min(size, 32), min(size, 32), generator=generator)}
    if name == "input_values":
        return {name: torch.randn(3, 400, generator=generator)}
    tokens = torch.randint(3, 50, (3, 7), generator=generator)
    tokens[:, -1] = 2  # where BART's texts end
    return {name: tokens}


def our_hooks_on(model: nn.Module) -> list[str]:
    hooks = [
        each for part in model.modules() for each in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    ]
    return [each.__name__ for each in hooks if each.__module__.startswith("hf_rrd")]  # transformers may add its own


@pytest.mark.parametrize("family", READ)
def test_the_last_layer_gives_the_logits_of_what_is_found(family: str) -> None:
    build, layer_of, width = READ[family]
    model = build().eval()
    inputs = inputs_for(model)
    embedder = Embedder(model, "head")
    assert embedder.watched is not embedder.body and embedder.width == width
    with torch.no_grad():
        rows, outputs = embed(model, inputs, "head", return_outputs=True)
        assert isinstance(rows, Tensor) and rows.shape == (3, width)
        torch.testing.assert_close(layer_of(model)(rows), outputs.logits, rtol=1e-5, atol=1e-6)
    assert our_hooks_on(model) == []


@pytest.mark.parametrize("family", READ)
def test_looking_for_it_leaves_modes_hooks_and_statistics_of_a_model_alone(family: str) -> None:
    model = READ[family][0]().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    Embedder(model, "head")
    assert all(module.training for module in model.modules() if list(module.parameters(recurse=False)))
    assert our_hooks_on(model) == []
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)


# A model without such a layer, and the pooling that stands in for it.
FALLBACKS: dict[str, tuple[Callable[[], Any], str]] = {
    "gpt2, which reads each token": (tiny_gpt2_classifier, "last_token"),
    "a classifier of tokens": (lambda: tiny_tokens(BertForTokenClassification), "mean"),
    "a masked language model": (lambda: tiny_tokens(BertForMaskedLM), "mean"),
    "multiple choice": (lambda: made(BertForMultipleChoice, BertConfig, **SIZES, **WORDS), "mean"),
    "a headless text model": (lambda: made(BertModel, BertConfig, **SIZES, **WORDS), "mean"),
    "a headless image model": (lambda: ViTModel(tiny_vit().config), "cls"),
    "a layer norm of the logits": (lambda: with_classifier(nn.LayerNorm(CLASSES)), "cls"),
    "a softmax of the logits": (lambda: with_classifier(nn.LogSoftmax(-1)), "cls"),
}


@pytest.mark.parametrize("kind", FALLBACKS)
def test_without_such_a_layer_a_student_has_the_pooling_of_its_family(kind: str) -> None:
    build, pooling = FALLBACKS[kind]
    model = build().eval()
    embedder = Embedder(model, "head")
    assert embedder.watched is embedder.body and embedder.pooling == pooling
    student = attach_head(model, dim=8)
    assert student.embedder.pooling == pooling


def test_a_head_that_was_replaced_since_the_last_look_is_looked_at_again() -> None:
    model = tiny_bert()
    assert Embedder(model, "head").watched is model.dropout
    model.classifier = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    embedder = Embedder(model, "head")
    assert embedder.watched is model.classifier[2] and embedder.width == 8


def test_a_layer_that_is_called_twice_is_none_to_watch() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, rows: Tensor) -> Any:
            return type("Output", (), {"logits": self.layer(self.layer(rows))})

    assert reader_of(Twice(), {"rows": torch.zeros(1, 4)}) is None


def test_a_dropout_before_the_last_layer_is_no_part_of_what_is_compared() -> None:
    student = tiny_bert(dropout=0.5).train()
    attach_head(student, dim=8)
    pooled = []
    for _ in range(2):
        torch.manual_seed(0)
        outputs = student(torch.arange(2, 9)[None], **{WITH_EMBEDDING: True})
        pooled.append(outputs.relational_pooled)
        with torch.no_grad():
            student.dropout.p = 0.9  # of the dropout before the classifier alone
    assert torch.equal(*pooled) and (pooled[0] != 0).all()


# ---- In a run ----


@pytest.mark.parametrize(
    ("build", "data"),
    [(tiny_bert, Texts), (tiny_roberta, Texts), (tiny_dinov2, Images)],
    ids=["bert", "roberta", "dinov2"],
)
def test_a_report_and_a_comparison_embed_the_student_as_its_training_does(
    build: Callable[[], Any], data: Any, tmp_path: Path
) -> None:
    student, images = build(), data(12, seed=3)
    teacher = tiny_bert(width=24, seed=1) if data is Texts else tiny_vit(width=24, seed=1)
    run = trainer(tmp_path, model=student, teacher=teacher, train_dataset=data())
    run.train()
    student.eval()
    batch = {name: torch.stack([images[i][name] for i in range(12)]) for name in images[0] if name != "labels"}
    with torch.no_grad(), run.distillation.worn():
        trained = student(**batch, **{WITH_EMBEDDING: True}).relational_pooled
    for report in (run.report(images), compare_models(student, teacher, images)):
        torch.testing.assert_close(report.tensors["student_embedding"], trained, rtol=1e-5, atol=1e-6)
        expected = embed(teacher, batch)
        torch.testing.assert_close(report.tensors["teacher_embedding"], expected, rtol=1e-5, atol=1e-6)


def test_alignment_in_a_training_is_that_of_the_report(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, model=tiny_bert(), teacher=tiny_bert(24, seed=1), train_dataset=Texts(), alignment_examples=12
    )
    run.train()
    metrics, report = run.evaluate(Texts(12, seed=3)), run.report(Texts(12, seed=3))
    assert metrics["eval_alignment_cka"] == pytest.approx(report.facts["alignment"]["cka"], abs=1e-5)


@pytest.mark.parametrize("build", [tiny_roberta, tiny_distilbert, tiny_bert])
def test_a_teacher_can_be_pooled_as_its_head_reads(build: Callable[[], Any], tmp_path: Path) -> None:
    model = build().eval()
    batch = {name: torch.stack([Texts(6)[i][name] for i in range(6)]) for name in ("input_ids", "attention_mask")}
    teacher = Teacher(model, wants_embedding=True, wants_logits=True, pooling="head")
    found = teacher.read(batch)
    assert found.embedding is not None and teacher.pooling == "head"
    with torch.no_grad():
        torch.testing.assert_close(found.embedding, embed(model, batch, "head"))
    run = trainer(tmp_path, model=tiny_bert(), teacher=model, teacher_pooling="head", train_dataset=Texts())
    run.train()
    assert len(log_of(run, "relational_loss")) == 3


def test_cached_embeddings_of_what_a_teachers_head_reads_are_those_of_a_run(tmp_path: Path) -> None:
    import datasets

    texts = Texts()
    columns = {"input_ids": texts.tokens.numpy(), "attention_mask": texts.mask.numpy(), "labels": texts.labels.numpy()}
    data = datasets.Dataset.from_dict(columns).with_format("torch")
    cached = cache_teacher_outputs(data, tiny_roberta(), dtype="float32", pooling="head", with_logits=False)
    rows = torch.stack([cached[i]["teacher_embedding"] for i in range(48)])
    batch = {"input_ids": texts.tokens, "attention_mask": texts.mask}
    with torch.no_grad():
        torch.testing.assert_close(rows, embed(tiny_roberta().eval(), batch, "head"), rtol=1e-5, atol=1e-6)
    trainer(tmp_path, model=tiny_bert(), teacher=None, teacher_pooling="head", train_dataset=cached).train()
