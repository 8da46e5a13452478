"""Distillation on logits of all kinds of heads, against loops over their examples, positions and classes."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BeitConfig,
    BeitForSemanticSegmentation,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    ConvNextConfig,
    Data2VecVisionConfig,
    Data2VecVisionForSemanticSegmentation,
    DPTConfig,
    DPTForSemanticSegmentation,
    GPT2Config,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    HubertConfig,
    HubertForCTC,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from hf_rrd import cache_teacher_outputs
from hf_rrd.losses.logits import dist_loss
from hf_rrd.models.logits import DIMENSIONS, LAYOUTS, LogitPair, class_order, layout_of, logits_of
from hf_rrd.training.data import noted_logits
from tests.builders import CLASSES, Images, Texts, log_of, tiny_bert, tiny_vit, trainer

TEMPERATURE = 3.0
SENTIMENTS = ["NEG", "NEU", "POS", "MIXED"]
OTHER_ORDER = ["pos", "Neu ", "mixed", "neg"]


def named(model: Any, names: Sequence[str]) -> Any:
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    return model


def softmax(row: Sequence[float]) -> list[float]:
    powers = [math.exp(value / TEMPERATURE) for value in row]
    return [power / sum(powers) for power in powers]


def divergence(student: Tensor, teacher: Tensor) -> float:
    """`T**2 * KL` of two rows, by a loop."""
    pairs = zip(softmax(teacher.tolist()), softmax(student.tolist()), strict=True)
    return TEMPERATURE**2 * sum(p * math.log(p / q) for p, q in pairs)


def mean_divergence(student: Tensor, teacher: Tensor, counted: Callable[..., bool]) -> list[float]:
    """Of each example the mean over those of its positions that count; the classes are the last dimension."""
    found = []
    for i in range(len(student)):
        places = [place for place in torch.ones(student.shape[1:-1]).nonzero().tolist() if counted(i, *place)]
        total = sum(divergence(student[(i, *place)], teacher[(i, *place)]) for place in places)
        found.append(total / max(len(places), 1))
    return found


def pair_of(student: Any, teacher: Any = None, **given: Any) -> LogitPair:
    return LogitPair(student, teacher, **({"cached": {}, "of_data": None, "own_loss": True} | given))


@torch.no_grad()
def terms_of(student: Any, teacher: Any, batch: dict[str, Any], pair: LogitPair | None = None) -> list[float]:
    """The terms of a batch that both models read, whatever of it they take; `student` has seen the labels."""
    inputs = {name: value for name, value in batch.items() if name != "labels" and not name.startswith("teacher_")}
    outputs = [logits_of(model.eval()(**inputs)) for model in (student, teacher)]
    assert outputs[0] is not None and outputs[1] is not None
    return (pair or pair_of(student, teacher)).terms(outputs[0], outputs[1], batch, TEMPERATURE).tolist()


@torch.no_grad()
def both_logits(student: Any, teacher: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    found = [logits_of(model.eval()(**inputs)) for model in (student, teacher)]
    assert found[0] is not None and found[1] is not None
    return found[0], found[1]


def two(make: Callable[[], Any], by: float = 0.5) -> tuple[Any, Any]:
    """A student and a teacher of one kind, with weights so large that their logits differ by some units."""
    torch.manual_seed(0)
    return shaken(make(), 1, by), shaken(make(), 2, by)


@torch.no_grad()
def shaken(model: Any, seed: int, by: float = 0.5) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.add_(torch.randn(weight.shape, generator=generator), alpha=by)
    return model


# ---- Classes in another order ----


@pytest.mark.parametrize(
    ("own", "others", "order"),
    [
        (["a", "b", "c"], ["a", "b", "c"], [0, 1, 2]),
        (["POS", "NEU", "NEG"], ["NEG", "NEU", "POS"], [2, 1, 0]),
        ([" Not  Entailment", "entailment"], ["ENTAILMENT", "not_entailment"], [1, 0]),
        (["LABEL_1", "LABEL_0"], ["LABEL_0", "LABEL_1"], [1, 0]),
        (["a", "b"], ["LABEL_0", "LABEL_1"], None),
        (["LABEL_0", "LABEL_1"], ["b", "a"], None),
        (["a", "b"], ["0", "1"], None),
        (["a", "b"], None, None),
        (None, None, None),
        (["crane", "x", "crane"], ["crane", "x", "crane"], [0, 1, 2]),
    ],
)
def test_classes_are_matched_by_their_names_whatever_their_case_and_spaces(
    own: list[str] | None, others: list[str] | None, order: list[int] | None
) -> None:
    assert class_order(own, others) == order


@pytest.mark.parametrize(
    ("own", "others"), [(["a", "b"], ["a", "c"]), (["a", "b", "c"], ["a", "b"]), (["b", "a", "a"], ["a", "b", "b"])]
)
def test_classes_of_other_names_are_refused(own: list[str], others: list[str]) -> None:
    with pytest.raises(ValueError, match=r"the teacher names its classes \['a', .*give both configs one `id2label`"):
        class_order(own, others)


def permuted() -> tuple[Any, Any]:
    """A student that is its teacher, but for the order and the spelling of its classes."""
    teacher, student = named(tiny_vit(seed=1), SENTIMENTS), named(tiny_vit(seed=1), OTHER_ORDER)
    order = [2, 1, 3, 0]  # the teacher's class of each of the student's
    with torch.no_grad():
        student.classifier.weight.copy_(teacher.classifier.weight[order])
        student.classifier.bias.copy_(teacher.classifier.bias.normal_(0, 3)[order])
    return student, teacher


def test_a_student_whose_classes_have_another_order_learns_each_from_its_own(tmp_path: Path) -> None:
    student, teacher = permuted()
    run = trainer(tmp_path, model=student, teacher=teacher, kd_weight=1.0, eval_dataset=Images(8))
    assert run.evaluate()["eval_kd_loss"] == pytest.approx(0, abs=1e-5)
    student.config.id2label = dict(enumerate(SENTIMENTS))
    wrong = trainer(tmp_path, model=student, teacher=teacher, kd_weight=1.0, eval_dataset=Images(8))
    assert wrong.evaluate()["eval_kd_loss"] > 0.5


def test_cached_logits_know_the_classes_of_their_teacher(tmp_path: Path) -> None:
    student, teacher = permuted()
    columns = {name: [example[name].tolist() for example in Images(8)] for name in ("pixel_values", "labels")}
    data = datasets.Dataset.from_dict(columns)
    cached = cache_teacher_outputs(data, teacher, cache_dir=tmp_path, dtype="float32")
    cached.map(lambda example: example).save_to_disk(tmp_path / "saved")
    for each in (cached, datasets.load_from_disk(str(tmp_path / "saved"))):
        run = trainer(tmp_path, model=student, teacher=None, kd_weight=1.0, train_dataset=each, eval_dataset=each)
        assert run.evaluate()["eval_kd_loss"] == pytest.approx(0, abs=1e-5)
    stream = cache_teacher_outputs(data.to_iterable_dataset(), teacher, dtype="float32")
    run = trainer(tmp_path, model=student, teacher=None, kd_weight=1.0, train_dataset=stream, eval_dataset=cached)
    assert run.evaluate()["eval_kd_loss"] == pytest.approx(0, abs=1e-5)
    named(student, ["w", "x", "y", "z"])
    with pytest.raises(ValueError, match=r"the teacher names its classes \['NEG', .* the student \['w'"):
        trainer(tmp_path, model=student, teacher=None, kd_weight=1.0, train_dataset=cached)


def test_where_a_student_has_no_names_those_of_the_labels_count(tmp_path: Path) -> None:
    student, teacher = permuted()
    named(student, [f"LABEL_{number}" for number in range(CLASSES)])
    features = datasets.Features(
        {
            "pixel_values": datasets.Array3D((3, 16, 16), "float32"),
            "labels": datasets.ClassLabel(names=OTHER_ORDER),
        }
    )
    columns = {name: [example[name].tolist() for example in Images(8)] for name in features}
    data = datasets.Dataset.from_dict(columns, features=features)
    run = trainer(tmp_path, model=student, teacher=teacher, kd_weight=1.0, train_dataset=data, eval_dataset=data)
    assert run.evaluate()["eval_kd_loss"] == pytest.approx(0, abs=1e-5)


def said(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> list[str]:
    logger, lines = logging.get_logger("hf_rrd.models.logits"), []
    monkeypatch.setattr(logger, "warning_once", lambda line: lines.append(line))
    act()
    return lines


def test_that_one_order_was_assumed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with_names, without = named(tiny_vit(), SENTIMENTS), tiny_vit()
    assert said(monkeypatch, lambda: pair_of(with_names, with_names)) == []
    assert said(monkeypatch, lambda: pair_of(without, without)) == []
    (line,) = said(monkeypatch, lambda: pair_of(without, with_names))
    assert line.startswith("`kd_weight`: the classes of the student have no names: both sides are taken")
    (line,) = said(monkeypatch, lambda: pair_of(without, with_names, of_data=OTHER_ORDER))
    assert line.startswith(
        "`kd_weight`: the classes of the student have no names: ['pos', 'Neu ', 'mixed', 'neg'] are"
    )
    (line,) = said(monkeypatch, lambda: pair_of(with_names))  # cached logits that nothing is known of
    assert line.startswith("`kd_weight`: the classes of the teacher have no names: both sides are taken")


def test_cached_logits_of_other_classes_are_refused_at_construction() -> None:
    cached = {"classes": [f"LABEL_{number}" for number in range(7)], "problem_type": None}
    with pytest.raises(ValueError, match="same classes: the teacher has 7, the student 4"):
        pair_of(tiny_vit(), cached=cached)


def test_logits_that_are_no_named_classes_have_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = two(lambda: BertForMultipleChoice(bert_config()))
    named(student, ["a", "b"]), named(teacher, ["c", "d"])
    assert said(monkeypatch, lambda: pair_of(student, teacher)) == []
    assert pair_of(student, teacher).layout == "choices"


# ---- Layouts ----


def bert_config(**changes: Any) -> BertConfig:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertConfig(vocab_size=20, max_position_embeddings=32, **size, **changes)


def token_batch(**more: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [0] * 3 + [1] * 4])
    return {"input_ids": torch.randint(1, 20, (3, 7), generator=generator) * mask, "attention_mask": mask, **more}


def some_labels(classes: int) -> Tensor:
    labels = torch.arange(21).reshape(3, 7) % classes
    labels[0, :4] = -100  # a prompt
    labels[1, 2] = labels[1, 5:] = -100
    labels[2, :3] = -100
    return labels


def test_of_tokens_those_count_that_have_a_label_and_are_attended_to() -> None:
    student, teacher = two(lambda: BertForTokenClassification(bert_config(num_labels=5)))
    batch = token_batch()
    mine, theirs = both_logits(student, teacher, **batch)
    expected = mean_divergence(mine, theirs, lambda i, token: bool(batch["attention_mask"][i, token]))
    assert terms_of(student, teacher, batch) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert expected[0] > 0.1
    labels = some_labels(5)
    batch["labels"] = labels
    expected = mean_divergence(mine, theirs, lambda i, token: labels[i, token] != -100)
    assert terms_of(student, teacher, batch) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    batch["labels"] = labels.clamp(min=0)  # a collator that leaves labels at padding
    assert terms_of(student, teacher, batch) == pytest.approx(terms_of(student, teacher, token_batch()), rel=1e-6)
    batch["labels"] = torch.full_like(labels, -100)
    assert terms_of(student, teacher, batch) == pytest.approx(terms_of(student, teacher, token_batch()), rel=1e-6)
    batch["labels"][0] = labels[0]  # beside texts without any label those of this one count
    found = terms_of(student, teacher, batch)
    assert found[0] == pytest.approx(expected[0], rel=1e-4) and found[1] > 0 and found[2] > 0


def test_of_masked_words_those_count_that_were_masked() -> None:
    student, teacher = two(lambda: BertForMaskedLM(bert_config()))
    labels = torch.full((3, 7), -100)
    labels[0, 2] = labels[1, 1] = labels[2, 4] = labels[2, 5] = 7
    batch = token_batch(labels=labels)
    mine, theirs = both_logits(student, teacher, **token_batch())
    expected = mean_divergence(mine, theirs, lambda i, token: labels[i, token] != -100)
    assert terms_of(student, teacher, batch) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    batch["labels"][0] = -100  # of this text no word is asked
    assert terms_of(student, teacher, batch) == pytest.approx([0.0, *expected[1:]], rel=1e-4, abs=1e-5)


def tiny_gpt2(head: Any = GPT2LMHeadModel, **changes: Any) -> Any:
    return head(GPT2Config(vocab_size=20, n_positions=32, n_embd=16, n_layer=1, n_head=2, **changes))


def test_of_a_causal_language_model_the_logits_at_a_token_are_those_of_the_next() -> None:
    student, teacher = two(tiny_gpt2)
    batch, labels = token_batch(), some_labels(20)
    mine, theirs = both_logits(student, teacher, **batch)
    expected = mean_divergence(
        mine, theirs, lambda i, at: at < 6 and bool(batch["attention_mask"][i, at]) and labels[i, at + 1] != -100
    )
    assert terms_of(student, teacher, batch | {"labels": labels}) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    expected = mean_divergence(mine, theirs, lambda i, at: bool(batch["attention_mask"][i, at]))
    assert terms_of(student, teacher, batch) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert expected[0] > 0.1


def tiny_bart() -> Any:
    size = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32}
    depth = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=20, **size, **depth))


def test_of_an_encoder_decoder_the_logits_at_a_token_are_its_own() -> None:
    student, teacher = two(tiny_bart)
    labels = torch.tensor([[3, 4, 5, 2], [6, 2, -100, -100], [7, 8, 2, -100]])
    batch = token_batch(decoder_input_ids=torch.tensor([[2, 3, 4, 5], [2, 6, 2, 1], [2, 7, 8, 2]]))
    mine, theirs = both_logits(student, teacher, **batch)
    expected = mean_divergence(mine, theirs, lambda i, token: labels[i, token] != -100)
    assert terms_of(student, teacher, batch | {"labels": labels}) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_of_question_answering_the_softmax_is_over_the_tokens_that_are_attended_to() -> None:
    student, teacher = two(lambda: BertForQuestionAnswering(bert_config()))
    batch = token_batch()
    mine, theirs = both_logits(student, teacher, **batch)
    assert mine.shape == (3, 2, 7)
    expected = []
    for i in range(3):
        real = batch["attention_mask"][i] == 1
        both = [divergence(mine[i, side, real], theirs[i, side, real]) for side in (0, 1)]
        expected.append(sum(both) / 2)
    assert terms_of(student, teacher, batch) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert expected[0] > 0.05


def test_of_multiple_choice_the_softmax_is_over_the_choices() -> None:
    student, teacher = two(lambda: BertForMultipleChoice(bert_config()))
    batch = {name: torch.stack([value, value.flip(0), value.roll(1, 0)]) for name, value in token_batch().items()}
    mine, theirs = both_logits(student, teacher, **batch)
    expected = [divergence(*rows) for rows in zip(mine, theirs, strict=True)]
    assert terms_of(student, teacher, batch) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def tiny_segformer(classes: int = 3) -> Any:
    shape: dict[str, Any] = {"patch_sizes": [3, 3], "strides": [2, 2], "depths": [1, 1], "sr_ratios": [1, 1]}
    width: dict[str, Any] = {"hidden_sizes": [8, 16], "num_attention_heads": [1, 1], "mlp_ratios": [1, 1]}
    config = SegformerConfig(num_encoder_blocks=2, **shape, **width, decoder_hidden_size=8, num_labels=classes)
    return SegformerForSemanticSegmentation(config)


def tiny_upernet() -> Any:
    stages = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "out_features": [f"stage{i}" for i in range(1, 5)]}
    head = {"hidden_size": 8, "auxiliary_channels": 8, "auxiliary_in_channels": 8, "pool_scales": [1, 2]}
    return UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=ConvNextConfig(**stages), **head, num_labels=3)
    )


def tiny_beit(model: Any = BeitForSemanticSegmentation, config: Any = BeitConfig) -> Any:
    size = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    return model(config(**size, image_size=32, patch_size=4, num_labels=3, out_indices=[0, 1, 2, 3]))


def tiny_data2vec() -> Any:
    return tiny_beit(Data2VecVisionForSemanticSegmentation, Data2VecVisionConfig)


def tiny_dpt() -> Any:
    size = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    neck: dict[str, Any] = {
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8] * 4,
        "fusion_hidden_size": 8,
    }
    return DPTForSemanticSegmentation(DPTConfig(**size, **neck, image_size=32, patch_size=8, num_labels=3))


@pytest.mark.parametrize(
    ("make", "by"),
    [(tiny_segformer, 0.5), (tiny_upernet, 0.5), (tiny_beit, 0.15), (tiny_data2vec, 0.15), (tiny_dpt, 0.2)],
)
def test_of_a_segmentation_the_softmax_is_over_the_classes_of_a_pixel_that_has_one(make: Any, by: float) -> None:
    student, teacher = two(make, by)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mine, theirs = (logits.movedim(1, -1) for logits in both_logits(student, teacher, pixel_values=pixels))
    batch: dict[str, Tensor] = {"pixel_values": pixels}
    expected = mean_divergence(mine, theirs, lambda *place: True)
    assert terms_of(student, teacher, batch) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert expected[0] > 0.1
    labels = torch.randint(0, 3, (2, 32, 32), generator=torch.Generator().manual_seed(1))
    labels[:, 8:, :] = 255  # all but the upper quarter is void
    quarter = mine.shape[1] // 4
    expected = mean_divergence(mine, theirs, lambda i, row, column: row < quarter)
    assert terms_of(student, teacher, batch | {"labels": labels}) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_maps_of_a_teacher_are_brought_to_the_students_size() -> None:
    student, teacher = two(tiny_segformer)[0], two(tiny_upernet)[1]
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mine, theirs = both_logits(student, teacher, pixel_values=pixels)
    assert mine.shape == (2, 3, 16, 16) and theirs.shape == (2, 3, 32, 32)
    blocks = theirs.unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5))  # at half the size: the mean of 2 x 2
    expected = mean_divergence(mine.movedim(1, -1), blocks.movedim(1, -1), lambda *place: True)
    assert terms_of(student, teacher, {"pixel_values": pixels}) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("model", "config"), [(Wav2Vec2ForCTC, Wav2Vec2Config), (HubertForCTC, HubertConfig)], ids=["wav2vec2", "hubert"]
)
def test_of_speech_those_frames_count_that_hear_samples_of_the_example(
    model: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ears: dict[str, Any] = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3]}
    ears |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    student, teacher = two(lambda: model(config(**size, **ears, vocab_size=6, feat_extract_norm="layer")))
    (line,) = said(monkeypatch, lambda: pair_of(student, teacher))
    assert line == "`kd_weight`: both sides are taken to number letters alike, by an equal `vocab.json`."
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, 200:] = 0
    sound = torch.randn(2, 400, generator=torch.Generator().manual_seed(0)) * mask
    batch = {"input_values": sound, "attention_mask": mask}
    mine, theirs = both_logits(student, teacher, **batch)
    frames = [((samples - 10) // 5 + 1 - 3) // 2 + 1 for samples in (400, 200)]  # by kernels and strides
    assert mine.shape[1] == frames[0] == 39 and frames[1] == 19
    expected = mean_divergence(mine, theirs, lambda i, frame: frame < frames[i])
    labels = torch.tensor([[1] * 39, [2] * 20 + [-100] * 19])  # letters, of which there are as many by chance
    assert terms_of(student, teacher, batch | {"labels": labels}) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert expected[0] > 0.1


AUTO_CLASSES = {
    "SEQUENCE_CLASSIFICATION": "classes",
    "IMAGE_CLASSIFICATION": "classes",
    "VIDEO_CLASSIFICATION": "classes",
    "AUDIO_CLASSIFICATION": "classes",
    "TOKEN_CLASSIFICATION": "tokens",
    "AUDIO_FRAME_CLASSIFICATION": "frames",
    "CTC": "letters",
    "MULTIPLE_CHOICE": "choices",
    "NEXT_SENTENCE_PREDICTION": "choices",
    "QUESTION_ANSWERING": "spans",
    "SEMANTIC_SEGMENTATION": "pixels",
    "CAUSAL_IMAGE_MODELING": "next words",
    "OBJECT_DETECTION": None,
    "ZERO_SHOT_OBJECT_DETECTION": None,
    "UNIVERSAL_SEGMENTATION": None,
    "INSTANCE_SEGMENTATION": None,
    "DEPTH_ESTIMATION": None,
    "MASK_GENERATION": None,
    "AUDIO_XVECTOR": None,
}


def classes_of(auto_class: str) -> list[str]:
    values = getattr(modeling_auto, f"MODEL_FOR_{auto_class}_MAPPING_NAMES").values()
    return [name for value in values for name in ([value] if isinstance(value, str) else value)]


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_what_logits_are_of_is_known_of_all_models_of_transformers(auto_class: str) -> None:
    config = type("Config", (), {"is_encoder_decoder": False})()
    found = {name: layout_of(type(name, (), {"config": config})()) for name in classes_of(auto_class)}
    assert set(found.values()) == {AUTO_CLASSES[auto_class]}, found


def test_language_models_of_transformers_are_known_too() -> None:
    config = type("Config", (), {"is_encoder_decoder": False})()
    for auto_class, layouts in (("CAUSAL_LM", {"next words", "words"}), ("MASKED_LM", {"words", "next words"})):
        found = {name: layout_of(type(name, (), {"config": config})()) for name in classes_of(auto_class)}
        unknown = {name for name, layout in found.items() if layout not in layouts}
        assert all("For" not in name for name in unknown), unknown
    assert {layout for layout in LAYOUTS if DIMENSIONS.get(layout, 3) == 2} == {"choices", "classes"}


# ---- Several labels at once, and numbers ----


def several(student: Tensor, teacher: Tensor) -> float:
    """`T**2 * KL` of each class's yes or no, as a mean over the classes of a row."""
    total = 0.0
    for mine, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = (1 / (1 + math.exp(-value / TEMPERATURE)) for value in (mine, theirs))
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return TEMPERATURE**2 * total / len(student)


class Tagged(Texts):
    """Texts with labels of another kind: floats, several for each example or one."""

    def __init__(self, count: int, labels: int) -> None:
        super().__init__(count)
        generator = torch.Generator().manual_seed(5)
        self.labels = torch.randint(0, 2, (count, labels), generator=generator).float()


def written(model: Any, problem_type: str | None) -> Any:
    model.config.problem_type = problem_type
    return model


@pytest.mark.parametrize("cached", [False, True], ids=["online", "cached"])
@pytest.mark.parametrize("implied", [False, True], ids=["said", "implied"])
@pytest.mark.parametrize(("labels", "kind"), [(4, "multi_label_classification"), (1, "regression")])
def test_several_labels_at_once_and_numbers_are_learned_as_such(
    tmp_path: Path, labels: int, kind: str, implied: bool, cached: bool
) -> None:
    student, teacher = two(lambda: written(tiny_bert(classes=labels), None if implied else kind))
    data = Tagged(8, labels)
    columns = {
        name: [example[name].tolist() for example in data] for name in ("input_ids", "attention_mask", "labels")
    }
    inputs = {name: torch.tensor(columns[name]) for name in ("input_ids", "attention_mask")}
    mine, theirs = both_logits(student, teacher, **inputs)
    rows = zip(mine, theirs, strict=True)
    each = [float((a - b) ** 2) if kind == "regression" else several(a, b) for a, b in rows]
    dataset = datasets.Dataset.from_dict(columns)
    if cached:
        dataset = cache_teacher_outputs(dataset, teacher, cache_dir=tmp_path, dtype="float32")
    how = {"model": student, "teacher": None if cached else teacher, "train_dataset": dataset, "eval_dataset": dataset}
    run = trainer(tmp_path, kd_weight=1.0, kd_temperature=TEMPERATURE, relational_weight=0.0, **how)
    run.train()
    assert sum(each) / 8 > 0.05
    assert log_of(run, "kd_loss")[0] == pytest.approx(sum(each) / 8, rel=1e-4, abs=1e-5)
    assert log_of(run, "kd_loss")[-1] < log_of(run, "kd_loss")[0]


def test_two_logits_of_numbers_are_two_numbers() -> None:
    pair = pair_of(written(tiny_vit(), "regression"), tiny_vit())
    mine, theirs = torch.randn(3, 4), torch.randn(3, 4)
    expected = [float(((mine[i] - theirs[i]) ** 2).sum() / 4) for i in range(3)]
    assert pair.terms(mine, theirs, {}, TEMPERATURE).tolist() == pytest.approx(expected, rel=1e-5)


def test_one_class_of_pixels_is_a_yes_or_no() -> None:
    student, teacher = two(lambda: tiny_segformer(1))
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mine, theirs = both_logits(student, teacher, pixel_values=pixels)
    rows = zip(mine.reshape(-1, 1), theirs.reshape(-1, 1), strict=True)
    expected = sum(several(*row) for row in rows) / mine.numel()
    assert terms_of(student, teacher, {"pixel_values": pixels}) == pytest.approx([expected], rel=1e-4, abs=1e-5)


def test_cached_logits_know_the_problem_type_of_their_teacher(tmp_path: Path) -> None:
    teacher, texts = written(tiny_bert(seed=1), "multi_label_classification"), Texts(4)
    columns = {name: [text[name].tolist() for text in texts] for name in ("input_ids", "attention_mask")}
    data = cache_teacher_outputs(datasets.Dataset.from_dict(columns), teacher, cache_dir=tmp_path)
    cached = noted_logits(data)
    mine, theirs = torch.randn(3, 4), torch.randn(3, 4)
    found = pair_of(tiny_vit(), cached=cached).terms(mine, theirs, {}, TEMPERATURE)
    assert found.tolist() == pytest.approx([several(mine[i], theirs[i]) for i in range(3)], rel=1e-4, abs=1e-5)


def test_float_labels_that_no_model_reads_are_several_labels_as_it_would_read_them() -> None:
    mine, theirs, labels = torch.randn(3, 4), torch.randn(3, 4), torch.ones(3, 4)
    found = pair_of(tiny_vit(), tiny_vit(seed=1)).terms(mine, theirs, {"labels": labels}, TEMPERATURE)
    assert found.tolist() == pytest.approx([several(mine[i], theirs[i]) for i in range(3)], rel=1e-4)


def test_float_labels_that_may_be_probabilities_want_a_word() -> None:
    labels, logits = torch.rand(3, 4), torch.randn(3, 4)
    teacher = tiny_vit(seed=1)
    with pytest.raises(
        ValueError, match="float labels may be several labels at once, .*Set the student's config.problem_type"
    ):
        pair_of(tiny_vit(), teacher, own_loss=False).terms(logits, logits, {"labels": labels}, TEMPERATURE)
    said_so = pair_of(written(tiny_vit(), "single_label_classification"), teacher, own_loss=False)
    other = torch.randn(3, 4)
    expected = [divergence(logits[i], other[i]) for i in range(3)]
    assert said_so.terms(logits, other, {"labels": labels}, TEMPERATURE).tolist() == pytest.approx(
        expected, rel=1e-4, abs=1e-5
    )


def test_two_problem_types_are_refused(tmp_path: Path) -> None:
    student = written(tiny_vit(), "single_label_classification")
    teacher = written(tiny_vit(seed=1), "multi_label_classification")
    message = "the student's `problem_type` is 'single_label_.*', the teacher's 'multi_label_.*kd_weight=0"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=student, teacher=teacher, kd_weight=1.0)
    student.config.problem_type = None  # which its first labels decide
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=student, teacher=teacher, kd_weight=1.0).train()


# ---- What has no meaning ----


def tiny_yolos() -> Any:
    size: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    return YolosForObjectDetection(YolosConfig(**size, image_size=[16, 16], patch_size=8, num_detection_tokens=5))


def tiny_mae() -> Any:
    size: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    return ViTMAEForPreTraining(ViTMAEConfig(**size, **decoder, image_size=16, patch_size=8))


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            tiny_yolos,
            tiny_yolos,
            "the student's outputs, of YolosForObjectDetection, have no classes in a common order",
        ),
        (tiny_mae, tiny_mae, "the student's outputs, of ViTMAEForPreTraining, have no classes in a common order"),
        (tiny_vit, tiny_yolos, "the teacher's outputs, of YolosForObjectDetection, have no classes"),
        (lambda: BertForPreTraining(bert_config()), tiny_vit, "the student's outputs, of BertForPreTraining"),
        (lambda: BertModel(bert_config()), tiny_bert, "the student needs logits: BertModel has no head.*AutoModelFor"),
        (
            tiny_bert,
            lambda: BertForTokenClassification(bert_config()),
            "logits are of classes, the teacher's of tokens",
        ),
        (
            lambda: BertForMaskedLM(bert_config()),
            tiny_gpt2,
            "student's logits are of words, the teacher's of next words",
        ),
        (
            tiny_gpt2,
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=21, n_embd=16, n_layer=1, n_head=2)),
            "same classes: the teacher has 21, the student 20",
        ),
    ],
)
def test_logits_without_a_common_order_are_refused_at_construction(
    tmp_path: Path, student: Any, teacher: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"`kd_weight` is above 0, and .*{message}.*kd_weight=0"):
        how = {"model": student(), "teacher": teacher(), "train_dataset": None}
        trainer(tmp_path, **how, kd_weight=1.0, relational_weight=0.0, task_weight=0.0)


def test_a_headless_student_of_cached_logits_is_refused_at_construction(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"input_ids": [[1, 2]], "teacher_logits": [[0.0, 1.0]]})
    how = {"model": BertModel(bert_config()), "teacher": None, "train_dataset": data}
    with pytest.raises(ValueError, match="the student needs logits: BertModel has no head"):
        trainer(tmp_path, **how, kd_weight=1.0, relational_weight=0.0, task_weight=0.0)


class Own(nn.Module):
    """A model of nobody's, with logits of a given shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))))

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        return {"logits": self.logits}


def test_an_unknown_models_logits_are_known_by_the_shapes_of_labels_and_mask() -> None:
    student, teacher = Own(2, 3, 4), Own(2, 3, 4)
    teacher.logits.data.neg_()
    with pytest.raises(
        ValueError, match=r"nothing tells which dimension of logits of shape \(2, 3, 4\) has the classes"
    ):
        terms_of(student, teacher, {})
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = mean_divergence(student.logits.data, teacher.logits.data, lambda i, token: bool(mask[i, token]))
    assert terms_of(student, teacher, {"attention_mask": mask}) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    labels = torch.tensor([[1, -100, 2], [3, -100, -100]])
    expected = mean_divergence(student.logits.data, teacher.logits.data, lambda i, token: labels[i, token] != -100)
    assert terms_of(student, teacher, {"labels": labels}) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    pixels = Own(2, 3, 4, 4), Own(2, 3, 4, 4)
    pixels[1].logits.data.neg_()
    maps = [each.logits.data.movedim(1, -1) for each in pixels]
    expected = mean_divergence(*maps, lambda *place: True)
    assert terms_of(*pixels, {"labels": torch.zeros(2, 8, 8, dtype=torch.long)}) == pytest.approx(
        expected, rel=1e-4, abs=1e-5
    )
    rows = Own(2, 3), Own(2, 3)
    rows[1].logits.data.neg_()
    expected = [divergence(rows[0].logits.data[i], rows[1].logits.data[i]) for i in range(2)]
    assert terms_of(*rows, {}) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_an_own_subclass_has_the_layout_of_its_class() -> None:
    class Tagger(BertForTokenClassification):
        pass

    assert layout_of(Tagger(bert_config())) == "tokens"
    assert layout_of(BertForSequenceClassification(bert_config())) == "classes"
    assert layout_of(tiny_gpt2(GPT2ForTokenClassification)) == "tokens"
    assert layout_of(tiny_bart()) == "target words"
    assert layout_of(Own(1)) is None


def test_logits_of_other_shapes_are_refused() -> None:
    student, teacher = two(lambda: BertForTokenClassification(bert_config(num_labels=5)))
    pair = pair_of(student, teacher)
    mask = torch.ones(2, 7, dtype=torch.long)
    with pytest.raises(ValueError, match=r"the same tokens, got student logits of shape \(2, 7, 5\) .* \(2, 8, 5\)"):
        pair.terms(torch.randn(2, 7, 5), torch.randn(2, 8, 5), {"attention_mask": mask}, TEMPERATURE)
    with pytest.raises(ValueError, match=r"logits of tokens must have 3 dimensions, got \(2, 5\) of the student"):
        pair.terms(torch.randn(2, 5), torch.randn(2, 5), {"attention_mask": mask}, TEMPERATURE)
    with pytest.raises(ValueError, match=r"the attention mask, \(2, 7\), does not fit logits at \(2, 9\)"):
        pair.terms(torch.randn(2, 9, 5), torch.randn(2, 9, 5), {"attention_mask": mask}, TEMPERATURE)


def test_tokens_of_another_tokenizer_are_refused_also_where_all_texts_are_padded_to_one_length() -> None:
    student, teacher = two(lambda: BertForTokenClassification(bert_config(num_labels=5)))
    mask, logits = torch.tensor([[1, 1, 1, 0]]), torch.randn(1, 4, 5)
    batch = {"attention_mask": mask, "teacher_attention_mask": torch.tensor([[1, 1, 0, 0]])}
    with pytest.raises(ValueError, match="student and teacher read other tokens"):
        pair_of(student, teacher).terms(logits, logits, batch, TEMPERATURE)
    pair_of(student, teacher).terms(logits, logits, batch | {"teacher_attention_mask": mask.clone()}, TEMPERATURE)


def test_a_model_without_a_config_is_compared_by_its_logits(tmp_path: Path) -> None:
    outputs = SequenceClassifierOutput(logits=torch.ones(2, 3))
    assert logits_of(outputs) is outputs.logits and logits_of((outputs.logits,)) is None
    assert logits_of(TokenClassifierOutput()) is None
    pair = pair_of(Own(2, 3), tiny_vit(classes=3))
    assert pair.layout == "classes" and pair.terms(torch.ones(2, 3), torch.ones(2, 3), {}, 1.0).tolist() == [0, 0]


# ---- By correlation ----


def test_dist_compares_classes_in_the_students_order_and_the_tokens_that_count() -> None:
    mine, theirs = torch.randn(5, 4), torch.randn(5, 4)
    student, teacher = named(tiny_vit(), SENTIMENTS), named(tiny_vit(seed=1), OTHER_ORDER)
    found = pair_of(student, teacher).terms(mine, theirs, {}, TEMPERATURE, "dist")
    ordered = theirs[:, class_order(SENTIMENTS, OTHER_ORDER)]
    assert float(found) == pytest.approx(float(dist_loss(mine, ordered, TEMPERATURE)), rel=1e-6)
    tagger = BertForTokenClassification(bert_config(num_labels=4))
    mine, theirs, mask = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
    pair = pair_of(tagger, tagger)
    found = pair.terms(mine, theirs, {"attention_mask": mask}, TEMPERATURE, "dist")
    counted = dist_loss(mine[mask == 1], theirs[mask == 1], TEMPERATURE)
    assert float(found) == pytest.approx(float(counted), rel=1e-6)
    assert float(pair.terms(mine, theirs, {"attention_mask": 0 * mask}, TEMPERATURE, "dist")) == 0


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_dist_of_logits_that_are_not_of_one_label_is_refused(kind: str) -> None:
    pair = pair_of(written(tiny_vit(), kind), tiny_vit())
    message = f"one label for each example or token, and these are logits of classes, {kind}. Set kd_loss='kl'."
    with pytest.raises(ValueError, match=re.escape(message)):
        pair.terms(torch.randn(3, 4), torch.randn(3, 4), {}, TEMPERATURE, "dist")


def test_a_student_learns_by_dist(tmp_path: Path) -> None:
    run = trainer(tmp_path, kd_weight=1.0, kd_loss="dist", relational_weight=0.0, max_steps=30, logging_steps=10)
    run.train()
    assert 0 < log_of(run, "kd_loss")[-1] < log_of(run, "kd_loss")[0] < 4
