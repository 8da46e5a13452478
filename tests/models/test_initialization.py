"""A student that starts as a part of its teacher."""

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from hf_rrd.models.body import body_of
from hf_rrd.models.initialization import Initialization, student_from_teacher
from tests.builders import tiny_bert

LAYERS = 5
CLASSES = 4
TEXTS = {"vocab_size": 50, "max_position_embeddings": 32, "pad_token_id": 0}
IMAGES = {"image_size": 16, "patch_size": 8}
DECODER = {**TEXTS, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 1}
GPT2 = {"vocab_size": 50, "n_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SPEECH = {
    "conv_dim": (8,) * LAYERS,  # as many convolutions as layers
    "conv_kernel": (10, 3, 1, 1, 1),
    "conv_stride": (5, 2, 1, 1, 1),
    "num_feat_extract_layers": LAYERS,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "apply_spec_augment": False,
}
MODERN = {**TEXTS, **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)}
SLIDING = {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 3}

# The body's class without "Model", what its config takes beyond the sizes, and a class with a head.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("Bert", TEXTS, "ForSequenceClassification"),
    "roberta": ("Roberta", TEXTS, "ForSequenceClassification"),
    "distilbert": ("DistilBert", TEXTS, "ForSequenceClassification"),
    "electra": ("Electra", {**TEXTS, "embedding_size": 8}, "ForSequenceClassification"),
    "modernbert": ("ModernBert", {**MODERN, "local_attention": 4}, "ForSequenceClassification"),
    "vit": ("ViT", IMAGES, "ForImageClassification"),
    "deit": ("DeiT", IMAGES, "ForImageClassification"),
    "dinov2": ("Dinov2", {**IMAGES, "mlp_ratio": 2}, "ForImageClassification"),
    "wav2vec2": ("Wav2Vec2", SPEECH, "ForSequenceClassification"),
    "gpt2": ("GPT2", GPT2, "ForSequenceClassification"),
    "llama": ("Llama", DECODER, "ForSequenceClassification"),
    "qwen2": ("Qwen2", {**DECODER, **SLIDING}, "ForSequenceClassification"),
}
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert_mlm": ("Bert", TEXTS, "ForMaskedLM"),
    "modernbert_mlm": ("ModernBert", {**MODERN, "local_attention": 4}, "ForMaskedLM"),
    "gpt2_lm": ("GPT2", GPT2, "LMHeadModel"),
    "llama_lm": ("Llama", {**DECODER, "tie_word_embeddings": True}, "ForCausalLM"),
    "deberta_v2": ("DebertaV2", {**TEXTS, "relative_attention": True}, "ForSequenceClassification"),
    "bert_headless": ("Bert", TEXTS, "Model"),
    "vit_headless": ("ViT", IMAGES, "Model"),
    "wav2vec2_headless": ("Wav2Vec2", SPEECH, "Model"),
    "llama_headless": ("Llama", DECODER, "Model"),
}
ALL = FAMILIES | OTHERS


def teacher_of(family: str, layers: int = LAYERS, **changes: Any) -> Any:
    """A model of 4 heads of 8 whose every weight is random, biases and norms too."""
    name, settings, head = ALL[family]
    model_class = getattr(hf, name + head)
    names = model_class.config_class.attribute_map
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4}
    inner = {"distilbert": "hidden_dim", "gpt2": "n_inner", "gpt2_lm": "n_inner"}.get(family, "intermediate_size")
    given = {names.get(key, key): value for key, value in sizes.items()} | {inner: 40, "num_labels": CLASSES}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**(given | settings | changes)))
    return randomised(model)


@torch.no_grad()
def randomised(model: Any) -> Any:
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight) * 0.2)
    return model.eval()


def inputs_of(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator, dtype=model.dtype)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(3, 300, generator=generator, dtype=model.dtype)}
    mask = (torch.arange(9) < torch.tensor([[9], [7], [6]])).long()
    return {"input_ids": torch.randint(2, 50, (3, 9), generator=generator) * mask, "attention_mask": mask}


@torch.no_grad()
def output_of(model: Any) -> Tensor:
    return model(**inputs_of(model))[0]


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def addresses(model: nn.Module) -> set[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def stack_of(model: Any) -> nn.ModuleList:
    """The list of layers by the type of its members, not by its length."""
    marks = ("Layer", "Block", "EncoderLayer", "DecoderLayer")
    for name, module in body_of(model).named_modules():
        kind = type(module[0]).__name__ if isinstance(module, nn.ModuleList) else ""
        if kind.endswith(marks) and "conv" not in name:
            return module
    raise AssertionError(type(model))


def without_other_layers(teacher: Any, student: Any) -> Any:
    """A copy of the teacher from which the layers that the student lacks are taken out."""
    pruned, kept = copy.deepcopy(teacher), student.initialization.layers
    stack = stack_of(pruned)
    for layer in reversed(range(len(stack))):
        if layer not in kept:
            del stack[layer]
    for index, layer in enumerate(stack):
        if hasattr(getattr(layer, "self_attn", None), "layer_idx"):
            layer.self_attn.layer_idx = index
    pruned.config.num_hidden_layers = len(kept)
    if hasattr(pruned.config, "layer_types"):
        pruned.config.layer_types = [teacher.config.layer_types[layer] for layer in kept]
    pruned.config.use_cache = False
    return pruned


@pytest.mark.parametrize("family", ALL)
def test_a_student_with_all_layers_computes_bitwise_what_the_teacher_does(family: str) -> None:
    teacher = teacher_of(family)
    student = student_from_teacher(teacher)
    assert type(student) is type(teacher) and not student.training
    assert output_of(teacher).std() > 0
    assert torch.equal(output_of(student), output_of(teacher))
    assert student.initialization.layers == list(range(LAYERS))
    assert student.initialization.fresh == []


@pytest.mark.parametrize("family", ALL)
def test_a_shallower_student_computes_what_the_teacher_does_without_the_other_layers(family: str) -> None:
    teacher = teacher_of(family)
    student = student_from_teacher(teacher, num_hidden_layers=3)
    expected = output_of(without_other_layers(teacher, student))
    assert len(stack_of(student)) == student.config.num_hidden_layers == 3
    assert torch.equal(output_of(student), expected)
    assert not torch.equal(output_of(student), output_of(teacher))
    assert student.initialization.fresh == []


@pytest.mark.parametrize("family", ALL)
def test_each_layer_of_a_shallower_student_holds_the_state_of_the_layer_that_is_reported(family: str) -> None:
    teacher = teacher_of(family)
    student = student_from_teacher(teacher, num_hidden_layers=3)
    layers = student.initialization.layers
    assert layers == [0, 2, 4]
    for mine, theirs in zip(stack_of(student), [stack_of(teacher)[layer] for layer in layers], strict=True):
        state, expected = mine.state_dict(), theirs.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("family", ALL)
def test_the_teacher_stays_as_it_was_and_shares_no_memory(family: str) -> None:
    teacher = teacher_of(family)
    before, config = copied(teacher), teacher.config.to_dict()
    student = student_from_teacher(teacher, num_hidden_layers=2, hidden_size=16, num_attention_heads=2)
    same = student_from_teacher(teacher)
    assert addresses(student) & addresses(teacher) == set()
    assert addresses(same) & addresses(teacher) == set()
    with torch.no_grad():
        for weight in [*student.parameters(), *same.parameters()]:
            weight.add_(1.0)
    student.config.id2label[0] = "changed"
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert teacher.config.to_dict() == config
    assert not hasattr(teacher, "initialization")


@pytest.mark.parametrize("family", ALL)
def test_a_saved_student_loads_to_the_same_outputs_and_nothing_else_is_saved(family: str, tmp_path: Path) -> None:
    teacher = teacher_of(family)
    narrow = {"hidden_size": 16, "num_attention_heads": 2}
    if family == "deberta_v2":
        narrow["pooler_hidden_size"] = 16
    for name, changes in {"shallow": {}, "narrow": narrow}.items():
        student = student_from_teacher(teacher, num_hidden_layers=2, **changes)
        student.save_pretrained(tmp_path / name)
        assert "initialization" not in (tmp_path / name / "config.json").read_text(encoding="utf-8")
        loaded, info = type(student).from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        # A copy, since some convolutions round differently on weights that lie in the mapped file at odd addresses.
        assert torch.equal(output_of(copy.deepcopy(loaded)), output_of(student))
        assert not hasattr(loaded, "initialization")


@pytest.mark.parametrize("family", ALL)
def test_a_teacher_in_bfloat16_gives_a_student_in_bfloat16(family: str, tmp_path: Path) -> None:
    teacher_of(family).to(torch.bfloat16).save_pretrained(tmp_path)
    teacher = getattr(hf, "".join(ALL[family][::2])).from_pretrained(tmp_path, dtype=torch.bfloat16)
    student = student_from_teacher(teacher, hidden_size=32)
    assert {weight.dtype for weight in student.parameters()} == {torch.bfloat16}
    assert torch.equal(output_of(student), output_of(teacher))
    narrow = student_from_teacher(teacher, num_hidden_layers=2, num_labels=7, hidden_size=16, num_attention_heads=2)
    assert {weight.dtype for weight in narrow.parameters()} == {torch.bfloat16}
    tables = {name: buffer.dtype for name, buffer in teacher.named_buffers()}
    assert {name: buffer.dtype for name, buffer in student.named_buffers()} == tables


@pytest.mark.parametrize(
    ("count", "layers"),
    [(1, [0]), (2, [0, 11]), (3, [0, 6, 11]), (4, [0, 4, 7, 11]), (6, [0, 2, 4, 7, 9, 11]), (12, list(range(12)))],
)
def test_the_layers_of_a_student_are_evenly_spaced_from_the_first_to_the_last(count: int, layers: list[int]) -> None:
    teacher = teacher_of("bert", layers=12)
    assert student_from_teacher(teacher, num_hidden_layers=count).initialization.layers == layers


@pytest.mark.parametrize("count", range(1, 23))
def test_each_layer_of_a_modernbert_keeps_its_kind_of_attention_in_the_order_of_its_class(count: int) -> None:
    teacher = teacher_of("modernbert", layers=22)
    student = student_from_teacher(teacher, num_hidden_layers=count)
    layers, kinds = student.initialization.layers, teacher.config.layer_types
    assert layers[0] == 0 and layers == sorted(set(layers)) and len(layers) == count
    assert student.config.layer_types == [kinds[layer] for layer in layers] == kinds[:count]
    assert student.initialization.fresh == []
    assert count < 3 or layers[-1] >= 18


def test_a_qwen2_keeps_the_window_of_each_layer_in_its_config(tmp_path: Path) -> None:
    student = student_from_teacher(teacher_of("qwen2"), num_hidden_layers=3)
    assert student.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    student.save_pretrained(tmp_path)
    assert hf.AutoConfig.from_pretrained(tmp_path).layer_types == student.config.layer_types


@pytest.mark.parametrize("family", ["gpt2_lm", "llama_lm", "qwen2", "modernbert"])
def test_the_layers_of_a_student_are_numbered_anew(family: str) -> None:
    student = student_from_teacher(teacher_of(family), num_hidden_layers=3)
    numbers = {
        int(getattr(module, name))
        for module in stack_of(student).modules()
        for name in ("layer_idx", "layer_id")
        if getattr(module, name, None) is not None
    }
    assert numbers == {0, 1, 2}


@pytest.mark.parametrize("family", ["gpt2_lm", "llama_lm", "bert_mlm", "modernbert_mlm"])
def test_tied_weights_stay_tied_and_count_once(family: str) -> None:
    student = student_from_teacher(teacher_of(family), 2, hidden_size=16, num_attention_heads=2, vocab_size=30)
    embeddings = student.get_input_embeddings().weight
    assert student.get_output_embeddings().weight is embeddings
    assert embeddings.shape == (30, 16)
    parts = student.initialization
    names = [*parts.copied, *parts.fresh]
    assert len(names) == len(set(names)) == len({id(weight) for weight in student.state_dict(keep_vars=True).values()})
    assert any("mbed" in name or "wte" in name for name in parts.fresh)


@pytest.mark.parametrize("family", [name for name, (_, settings, _) in ALL.items() if "vocab_size" in settings])
def test_a_narrower_student_starts_from_the_principal_components_of_the_teachers_words(family: str) -> None:
    teacher = teacher_of(family)
    changes = {"pooler_hidden_size": 16} if family == "deberta_v2" else {}
    changes |= {"embedding_size": 4} if family == "electra" else {}
    torch.manual_seed(3)
    student = student_from_teacher(teacher, 2, hidden_size=16, num_attention_heads=2, **changes)
    (name,) = student.initialization.narrowed
    rows = student.state_dict()[name]
    assert torch.equal(rows, student.get_input_embeddings().weight)
    assert name not in [*student.initialization.copied, *student.initialization.fresh]
    centred = teacher.get_input_embeddings().weight.detach()
    centred = centred - centred.mean(0)
    left, spread, _ = torch.linalg.svd(centred, full_matrices=False)
    width = rows.shape[1]
    expected = left[:, :width] * spread[:width]  # each column up to its sign
    expected = expected * (expected * rows).sum(0).sign()
    torch.manual_seed(3)
    fresh = type(teacher)(student.config).get_input_embeddings().weight
    expected = expected * (fresh.square().mean() / expected.square().mean()).sqrt()
    if (padding := student.get_input_embeddings().padding_idx) is not None:
        expected[padding] = fresh[padding].detach()
    torch.testing.assert_close(rows, expected)


def test_words_are_narrowed_in_full_precision_under_autocast() -> None:
    rows = []
    for autocasts in (False, True):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
            student = student_from_teacher(teacher_of("bert"), 2, hidden_size=16, num_attention_heads=2)
        rows.append(student.get_input_embeddings().weight)
    assert torch.equal(*rows)


@pytest.mark.parametrize("family", ["vit", "dinov2", "wav2vec2"])
def test_a_narrower_student_that_reads_no_words_has_nothing_narrowed(family: str) -> None:
    student = student_from_teacher(teacher_of(family), 2, hidden_size=16, num_attention_heads=2)
    assert student.initialization.narrowed == []


def test_words_of_a_wider_student_or_of_another_vocabulary_start_afresh() -> None:
    name = "bert.embeddings.word_embeddings.weight"
    for changes in ({"hidden_size": 64}, {"hidden_size": 16, "vocab_size": 30}):
        parts = student_from_teacher(teacher_of("bert"), 2, **changes).initialization
        assert parts.narrowed == [] and name in parts.fresh


@pytest.mark.parametrize("value", [0.1, 0.5, torch.nan, torch.inf, 1e30])
def test_words_that_have_no_finite_components_start_afresh(value: float) -> None:
    teacher = teacher_of("bert")
    with torch.no_grad():
        table = teacher.get_input_embeddings().weight
        table.fill_(value) if value < 1 else table[3].fill_(value)
    student = student_from_teacher(teacher, 2, hidden_size=16, num_attention_heads=2)
    parts, words = student.initialization, student.get_input_embeddings().weight
    assert parts.narrowed == [] and "bert.embeddings.word_embeddings.weight" in parts.fresh
    assert words.isfinite().all() and 0.01 < words.std() < 0.03


def test_layers_are_the_teachers_where_most_of_their_tensors_are() -> None:
    teacher = teacher_of("bert")
    assert student_from_teacher(teacher, 2).initialization.has_layers
    assert student_from_teacher(teacher, 2, intermediate_size=8).initialization.has_layers
    for family in ("bert_mlm", "wav2vec2", "electra"):
        student = student_from_teacher(teacher_of(family), 2, hidden_size=16, num_attention_heads=2)
        assert student.initialization.copied and not student.initialization.has_layers


def test_a_student_that_is_tied_by_an_override_starts_from_the_embeddings() -> None:
    teacher = teacher_of("llama_lm", tie_word_embeddings=False)
    student = student_from_teacher(teacher, tie_word_embeddings=True)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert torch.equal(student.lm_head.weight, teacher.model.embed_tokens.weight)


def test_generation_config_attention_and_labels_are_the_teachers() -> None:
    teacher = teacher_of("gpt2_lm")
    teacher.generation_config.max_new_tokens = 3
    teacher.set_attn_implementation("eager")
    student = student_from_teacher(teacher, num_hidden_layers=2)
    assert student.generation_config.max_new_tokens == 3
    assert student.generation_config is not teacher.generation_config
    assert student.config._attn_implementation == "eager"
    tokens = student.generate(**{key: value[:1] for key, value in inputs_of(student).items()}, do_sample=False)
    assert tokens.shape[1] <= 12
    classifier = teacher_of(
        "bert", id2label={0: "a", 1: "b", 2: "c", 3: "d"}, label2id={"a": 0, "b": 1, "c": 2, "d": 3}
    )
    assert student_from_teacher(classifier, 2).config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}


def test_a_frozen_teacher_in_training_mode_gives_a_trainable_student_in_eval_mode() -> None:
    teacher = teacher_of("bert").train().requires_grad_(False)
    student = student_from_teacher(teacher, 2)
    assert all(weight.requires_grad for weight in student.parameters())
    assert not student.training and teacher.training


def test_rotary_tables_are_those_of_the_students_config() -> None:
    teacher = teacher_of("llama")
    student = student_from_teacher(
        teacher, num_hidden_layers=3, rope_parameters={"rope_type": "default", "rope_theta": 7.0}
    )
    assert torch.allclose(student.model.rotary_emb.inv_freq, 7.0 ** (-torch.arange(0, 8, 2) / 8))
    assert not torch.equal(student.model.rotary_emb.inv_freq, teacher.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_feed_forward_changes_it_alone_starts_afresh_and_all_else_is_the_teachers(family: str) -> None:
    teacher = teacher_of(family)
    inner = {"dinov2": "mlp_ratio", "distilbert": "hidden_dim", "gpt2": "n_inner"}.get(family, "intermediate_size")
    student = student_from_teacher(teacher, 3, **{inner: 1 if family == "dinov2" else 24})
    assert output_of(student).isfinite().all()
    parts, mine = student.initialization, student.state_dict()
    prefix = next(name for name, module in student.named_modules() if module is stack_of(student)) + "."
    theirs = {}  # by the students' names
    for name, weight in teacher.state_dict().items():
        number, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            theirs[name] = weight
        elif int(number) in parts.layers:
            theirs[f"{prefix}{parts.layers.index(int(number))}.{rest}"] = weight
    assert sorted([*parts.copied, *parts.fresh]) == sorted(theirs) == sorted(mine)
    assert all(torch.equal(mine[name], theirs[name]) for name in parts.copied)
    changed = {name.rpartition(".")[0] for name in mine if mine[name].shape != theirs[name].shape}
    assert {name.rpartition(".")[0] for name in parts.fresh} == changed
    assert all(name.startswith(prefix) for name in changed) and len(changed) in (2 * 3, 3 * 3)
    assert not any(name.rpartition(".")[0] in changed for name in parts.copied), "a bias is as fresh as its weight"


def test_a_bias_of_the_same_shape_starts_afresh_with_its_weight() -> None:
    student = student_from_teacher(teacher_of("roberta"), hidden_size=16, num_attention_heads=2)
    expected = ["dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"]
    head = [name for name in student.initialization.fresh if name.startswith("classifier.")]
    assert head == [f"classifier.{name}" for name in expected]
    assert not student.classifier.out_proj.bias.any()


def test_a_smaller_vocabulary_starts_afresh_beside_the_teachers_layers() -> None:
    student = student_from_teacher(teacher_of("bert"), vocab_size=30, max_position_embeddings=12)
    embeddings = "bert.embeddings"
    assert student.initialization.fresh == [
        f"{embeddings}.{name}.weight" for name in ("word_embeddings", "position_embeddings")
    ]


def test_a_head_of_another_shape_starts_afresh_and_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hf_rrd.models.initialization"):
        student = student_from_teacher(teacher_of("bert"), 2, num_labels=2)
    assert student.initialization.fresh == ["classifier.weight", "classifier.bias"]
    assert student.config.num_labels == 2 and output_of(student).shape == (3, 2)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "2 tensors (classifier.weight, classifier.bias)" in caplog.records[1].getMessage()
    assert "layers of the teacher: 0, 4" in caplog.records[0].getMessage()


def test_a_student_that_is_all_its_teachers_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hf_rrd.models.initialization"):
        student_from_teacher(teacher_of("bert"), 2)
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_what_is_wider_than_the_teacher_starts_afresh() -> None:
    student = student_from_teacher(teacher_of("bert"), 2, intermediate_size=64)
    fresh = {name.split(".", 4)[-1] for name in student.initialization.fresh}
    assert fresh == {
        "intermediate.dense.weight",
        "intermediate.dense.bias",
        "output.dense.weight",
        "output.dense.bias",
    }
    assert len(student.initialization.fresh) == 8


def test_a_patch_of_another_size_and_its_positions_start_afresh() -> None:
    student = student_from_teacher(teacher_of("vit"), patch_size=4)
    assert {name.rpartition("embeddings.")[2] for name in student.initialization.fresh} == {
        "position_embeddings",
        "projection.weight",
        "projection.bias",
    }


@pytest.mark.gpu
def test_a_student_stands_on_the_device_of_its_teacher() -> None:
    teacher = teacher_of("llama").to("cuda")
    student = student_from_teacher(teacher, 2, hidden_size=16, num_attention_heads=2, num_labels=2)
    assert {tensor.device for tensor in [*student.parameters(), *student.buffers()]} == {teacher.device}


def test_a_model_with_peft_adapters_is_refused_until_they_are_merged() -> None:
    peft = pytest.importorskip("peft")
    teacher = peft.get_peft_model(tiny_bert(), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="Merge them: `teacher.merge_and_unload"):
        student_from_teacher(teacher)
    with pytest.raises(ValueError, match="`teacher` has adapters inside"):
        student_from_teacher(teacher.get_base_model())
    assert student_from_teacher(teacher.merge_and_unload()).initialization.fresh == []


def test_fresh_weights_come_from_the_global_random_state() -> None:
    teacher = teacher_of("bert")
    weights = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        weights.append(student_from_teacher(teacher, 2, num_labels=2).classifier.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_report_is_frozen_and_readable() -> None:
    report = Initialization([0, 3], copied=["layer.0.weight", "layer.1.weight"], fresh=["head.bias"])
    assert str(report) == (
        "layers of the teacher: 0, 3\ncopied: 2 tensors (layer.*.weight)\nfresh: 1 tensors (head.bias)"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.layers = []  # type: ignore[misc]


def test_the_report_names_what_is_narrowed() -> None:
    report = Initialization([0], fresh=["head.bias"], narrowed=["words.weight"])
    lines = ["layers of the teacher: 0", "narrowed: 1 tensors (words.weight)", "copied: 0 tensors"]
    assert str(report).splitlines() == [*lines, "fresh: 1 tensors (head.bias)"]


def test_a_model_without_a_number_of_layers_starts_whole_with_another_head() -> None:
    torch.manual_seed(0)
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    teacher = randomised(hf.ResNetForImageClassification(config))
    with torch.no_grad():
        teacher.train()(**inputs_of(teacher))  # moves the batch norms' statistics
    teacher.eval()
    assert torch.equal(output_of(student_from_teacher(teacher)), output_of(teacher))
    student = student_from_teacher(teacher, num_labels=3)
    assert student.initialization.layers == [] and len(student.initialization.fresh) == 2
    with pytest.raises(ValueError, match="`num_hidden_layers` cannot be chosen, got 2: ResNetConfig"):
        student_from_teacher(teacher, 2)


@pytest.mark.parametrize("count", [0, -1, LAYERS + 1, 2.0, True, "3"])
def test_a_number_of_layers_that_the_teacher_has_not_is_refused(count: Any) -> None:
    with pytest.raises(
        ValueError, match=f"`num_hidden_layers` must be an integer from 1 to the teacher's 5, got {count!r}"
    ):
        student_from_teacher(teacher_of("bert"), count)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hiden_size": 16}, "`hiden_size` is not a field of BertConfig, got 16"),
        ({"save_pretrained": 1}, "`save_pretrained` is not a field"),
        ({"_name_or_path": "x"}, "`_name_or_path` is not a field"),
        ({"attn_implementation": "eager"}, "`attn_implementation` is not a field"),
        ({"dtype": torch.float16}, "`dtype` is always the teacher's"),
        ({"hidden_size": 20, "num_attention_heads": 3}, r"hidden size \(20\) is not a multiple"),
    ],
)
def test_an_override_that_does_not_fit_is_refused_by_name(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        student_from_teacher(teacher_of("bert"), 2, **overrides)


def test_the_number_of_layers_goes_by_one_name() -> None:
    with pytest.raises(ValueError, match="`n_layers` is the number of layers, got 2. Give it as `num_hidden_layers`"):
        student_from_teacher(teacher_of("distilbert"), n_layers=2)


def test_an_override_that_the_config_refuses_says_so() -> None:
    with pytest.raises(ValueError, match=r"Qwen2Config refuses 3 layers and the overrides \{'layer_types': "):
        student_from_teacher(teacher_of("qwen2"), 3, layer_types=["unheard_of"] * 3)


def test_a_stack_that_is_not_to_be_found_is_refused_with_the_class() -> None:
    config = hf.AlbertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        embedding_size=8,
    )
    with pytest.raises(ValueError, match="one list of 3 layers in AlbertModel, got none"):
        student_from_teacher(hf.AlbertModel(config), 2)


def test_two_stacks_of_the_same_length_are_refused_with_their_names() -> None:
    config = hf.XLMConfig(vocab_size=50, emb_dim=16, n_layers=3, n_heads=2, max_position_embeddings=32)
    with pytest.raises(ValueError, match="one list of 3 layers in XLMModel, got .*'attentions'"):
        student_from_teacher(hf.XLMModel(config), 2)


def test_a_teacher_that_is_no_transformers_model_is_refused() -> None:
    for teacher in (nn.Linear(2, 2), None):
        with pytest.raises(TypeError, match=f"`teacher` must be a PreTrainedModel, got {type(teacher).__name__}"):
            student_from_teacher(teacher)  # type: ignore[arg-type]


def test_a_teacher_may_be_named_by_its_folder(tmp_path: Path) -> None:
    teacher = tiny_bert(layers=3)
    teacher.save_pretrained(tmp_path)
    student, expected = student_from_teacher(tmp_path, 2), student_from_teacher(teacher, 2)
    assert type(student) is type(teacher) and student.initialization == expected.initialization
    assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in student.state_dict().items())
    with pytest.raises(ValueError, match="`teacher` '.*nowhere' cannot be loaded"):
        student_from_teacher(str(tmp_path / "nowhere"))


def test_a_teacher_with_adapters_quantized_or_offloaded_weights_is_refused() -> None:
    class Wrapped(nn.Module):
        def get_base_model(self) -> Any: ...

    with pytest.raises(ValueError, match="`teacher` has adapters, got Wrapped. Merge them"):
        student_from_teacher(Wrapped())  # type: ignore[arg-type]
    teacher = tiny_bert()
    teacher.bert.pooler.add_module("base_layer", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="`teacher` has adapters inside, got BertForSequenceClassification"):
        student_from_teacher(teacher)
    teacher = tiny_bert()
    teacher.config.quantization_config = {"quant_method": "some"}
    with pytest.raises(ValueError, match="`teacher` has quantized weights"):
        student_from_teacher(teacher)
    with pytest.raises(ValueError, match="`teacher` has offloaded weights"):
        student_from_teacher(tiny_bert().to("meta"))
