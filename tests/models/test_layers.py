"""What is caught of a model's layers is what it computes there, in every family, and with gradients."""

import copy
import re
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from hf_rrd.losses.layers import relation_terms, state_terms
from hf_rrd.models.body import body_of
from hf_rrd.models.layers import LAYERS, WITH_LAYERS, LayerPairs
from tests.builders import Images, Texts, tiny_bert, tiny_gpt2

LAYERS_OF = 3
SPEECH = {
    **{"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0},
    **{"apply_spec_augment": False, "feat_extract_norm": "layer", "hidden_dropout": 0.0, "attention_dropout": 0.0},
    **{"feat_proj_dropout": 0.0, "final_dropout": 0.0, "activation_dropout": 0.0, "classifier_proj_size": 8},
}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_dropout": 0.0}
IMAGE = {"image_size": 16, "patch_size": 8}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_DROPOUT = dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout"), 0.0)
WORDS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "max_position_embeddings": 32}
MODERN = {"cls_token_id": 1, "sep_token_id": 1, "global_attn_every_n_layers": 2, "local_attention": 4}
FAMILIES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "Bert": (hf.BertConfig, WORDS | DROPOUT),
    "Roberta": (hf.RobertaConfig, WORDS | DROPOUT),
    "DistilBert": (
        hf.DistilBertConfig,
        WORDS | {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    ),
    "Electra": (hf.ElectraConfig, WORDS | DROPOUT | {"embedding_size": 12}),
    "ModernBert": (hf.ModernBertConfig, WORDS | MODERN),
    "Deberta": (hf.DebertaConfig, WORDS | DROPOUT | DISENTANGLED),
    "DebertaV2": (hf.DebertaV2Config, WORDS | DROPOUT | DISENTANGLED | {"share_att_key": True}),
    "ViT": (hf.ViTConfig, DROPOUT | IMAGE),
    "DeiT": (hf.DeiTConfig, DROPOUT | IMAGE),
    "Dinov2": (hf.Dinov2Config, DROPOUT | IMAGE),
    "Wav2Vec2": (hf.Wav2Vec2Config, {"vocab_size": 20, **SPEECH}),
}


def model_of(family: str, width: int = 16, seed: int = 0) -> Any:
    """A classifier of a family, of 3 layers, in training mode."""
    torch.manual_seed(seed)
    config_class, settings = FAMILIES[family]
    sizes = {"num_hidden_layers": LAYERS_OF, "num_attention_heads": 2, "hidden_size": width}
    names = {config_class.attribute_map.get(name, name): size for name, size in sizes.items()}
    names["hidden_dim" if family == "DistilBert" else "intermediate_size"] = 20
    kind = "ForImageClassification" if "image_size" in settings else "ForSequenceClassification"
    return getattr(hf, f"{family}{kind}")(config_class(**names, **settings)).train()


def inputs_of(family: str) -> dict[str, Tensor]:
    """Three examples, the second and the third with padding."""
    if family in ("ViT", "DeiT", "Dinov2"):
        return {"pixel_values": Images(3).pixels}
    if family == "Wav2Vec2":
        mask = (torch.arange(400) < torch.tensor([[400], [300], [200]])).long()
        samples = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
        return {"input_values": samples * mask, "attention_mask": mask}
    texts = Texts(3)
    mask = (torch.arange(9) < torch.tensor([[9], [7], [5]])).long()
    return {"input_ids": texts.tokens * mask + 2 * mask, "attention_mask": mask}


def caught(pairs: LayerPairs, side: str, model: Any, inputs: dict[str, Tensor]) -> tuple[Any, tuple[Tensor, ...]]:
    """A forward's output, and what was caught in it."""
    with getattr(pairs, side):
        outputs = model(**inputs, **{WITH_LAYERS: True})
    return outputs, outputs[LAYERS]


def projected(layer: nn.Module, read: Tensor, family: str) -> list[Tensor]:
    """Queries, keys and values of a layer's attention, from what its projections read and their weights."""
    weights = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    if family == "ModernBert":
        return [F.linear(read, part) for part in weights["Wqkv"].weight.chunk(3)]
    if family == "Deberta":  # of both heads: query, key, value
        parts = weights["in_proj"].weight.chunk(6)
        return [F.linear(read, torch.cat([parts[place], parts[place + 3]])) for place in range(3)]
    found = [
        weights[name] for each in "qkv" for name in weights if re.fullmatch(f"{each}([a-z]+)?(_proj|_lin)?", name)
    ]
    return [F.linear(read, each.weight, each.bias) for each in found]


def stack_of(model: Any) -> Any:
    """The list of a model's layers."""
    return [each for each in body_of(model).modules() if isinstance(each, nn.ModuleList) and len(each) == LAYERS_OF][
        -1
    ]


def frames_of(model: Any, inputs: dict[str, Tensor], tokens: int) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return body_of(model)._get_feature_vector_attention_mask(tokens, mask) if "input_values" in inputs else mask


@pytest.mark.parametrize("family", FAMILIES)
def test_the_states_of_all_layers_are_compared_where_the_widths_are_one(family: str) -> None:
    student, teacher, inputs = model_of(family), model_of(family, seed=1).eval(), inputs_of(family)
    pairs = LayerPairs(student, teacher, [(0, 1), (1, 0)])
    found = [caught(pairs, side, model, inputs)[1] for side, model in (("student", student), ("teacher", teacher))]
    states = [model(**inputs, output_hidden_states=True).hidden_states for model in (student, teacher)]
    mask = frames_of(student, inputs, states[0][0].shape[1])
    expected = (state_terms(states[0][1], states[1][2], mask) + state_terms(states[0][2], states[1][1], mask)) / 2
    terms = pairs.terms(*found, inputs)
    torch.testing.assert_close(terms, expected)
    terms.mean().backward()
    given = [stack_of(student)[layer] for layer in (0, 1)]
    assert all(any(weight.grad is not None for weight in layer.parameters()) for layer in given)
    assert all(weight.grad is None for weight in stack_of(student)[2].parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_relations_of_queries_keys_and_values_are_compared_where_the_widths_differ(family: str) -> None:
    student, teacher, inputs = model_of(family), model_of(family, 24, seed=1).eval(), inputs_of(family)
    pairs = LayerPairs(student, teacher)
    assert (pairs.pairs, pairs.heads) == ([(2, 2)], 8)
    sides = []
    for model in (student, teacher):
        read: list[Tensor] = []
        names = "q_proj|query|q_lin|Wqkv|in_proj|query_proj"
        reader = next(m for name, m in stack_of(model)[2].named_modules() if re.fullmatch(names, name.split(".")[-1]))
        hook = reader.register_forward_pre_hook(lambda module, args, read=read: read.append(args[0]))
        model(**inputs)
        hook.remove()
        sides.append(projected(stack_of(model)[2], read[0], family))
    mask = frames_of(student, inputs, sides[0][0].shape[1])
    expected = sum(relation_terms(one, other, 8, mask) for one, other in zip(*sides, strict=True))
    found = [caught(pairs, side, model, inputs)[1] for side, model in (("student", student), ("teacher", teacher))]
    torch.testing.assert_close(pairs.terms(*found, inputs), expected)


@pytest.mark.parametrize("teacher_width", [16, 24], ids=["states", "relations"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family: str, teacher_width: int) -> None:
    gradients, teacher = [], model_of(family, teacher_width, seed=1).eval()
    for checkpoints in (False, True):
        student, inputs = model_of(family), inputs_of(family)
        if checkpoints:
            student.gradient_checkpointing_enable()
        pairs = LayerPairs(student, teacher)
        with torch.no_grad():
            others = caught(pairs, "teacher", teacher, inputs)[1]
        with pairs.student:
            outputs = student(**inputs, **{WITH_LAYERS: True})
            loss = outputs.logits.square().sum() + pairs.terms(outputs[LAYERS], others, inputs).sum()
            loss.backward()
        gradients.append({name: weight.grad for name, weight in student.named_parameters() if weight.grad is not None})
        assert [name for name in vars(student) if "hf_rrd" in name] == []
    assert len(gradients[0]) > 20
    torch.testing.assert_close(gradients[0], gradients[1])


# ---- Which layers, and what cannot be ----


@pytest.mark.parametrize(
    ("own", "others", "pairs"),
    [
        (3, 6, [(0, 1), (1, 3), (2, 5)]),
        (2, 3, [(0, 1), (1, 2)]),
        (3, 3, [(0, 0), (1, 1), (2, 2)]),
        (4, 2, [(0, 0), (1, 0), (2, 1), (3, 1)]),
    ],
)
def test_layers_are_paired_evenly_by_where_they_end(own: int, others: int, pairs: list[tuple[int, int]]) -> None:
    assert LayerPairs(tiny_bert(layers=own), tiny_bert(layers=others)).pairs == pairs


def test_a_layer_that_is_compared_twice_is_caught_once() -> None:
    student, teacher, inputs = model_of("Bert"), model_of("Bert", seed=1), inputs_of("Bert")
    both, one, other = (LayerPairs(student, teacher, each) for each in ([[1, 0], [1, 2]], [[1, 0]], [[1, 2]]))
    found = []
    for pairs in (both, one, other):
        sides = [caught(pairs, side, model, inputs)[1] for side, model in (("student", student), ("teacher", teacher))]
        found.append(pairs.terms(*sides, inputs))
    torch.testing.assert_close(found[0], (found[1] + found[2]) / 2)


def test_an_adapters_part_is_caught_with_that_of_its_base() -> None:
    student, inputs = model_of("Bert"), inputs_of("Bert")
    adapted = peft.get_peft_model(
        copy.deepcopy(student), peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    )
    pairs = LayerPairs(adapted, model_of("Bert", 24))
    found, plain = caught(pairs, "student", adapted, inputs)[1], LayerPairs(student, model_of("Bert", 24))
    base = caught(plain, "student", student, inputs)[1]
    assert all((one - other).abs().max() > 0 for one, other in zip(found, base, strict=True))
    assert (found[0] - base[0]).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    again = caught(LayerPairs(merged, model_of("Bert", 24)), "student", merged, inputs)[1]
    torch.testing.assert_close(found, again)


def test_multiple_choice_is_the_mean_of_its_choices() -> None:
    texts, models = Texts(6), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(hf.BertForMultipleChoice(model_of("Bert").config).eval())
    flat = {"input_ids": texts.tokens, "attention_mask": texts.mask}
    inputs = {name: each.view(2, 3, 9) for name, each in flat.items()}
    pairs = LayerPairs(*models)
    found = [caught(pairs, side, model, inputs)[1] for side, model in zip(("student", "teacher"), models, strict=True)]
    terms = pairs.terms(*found, inputs)
    torch.testing.assert_close(terms, pairs.terms(*found, flat).view(2, 3).mean(1))


def test_states_without_their_padding_are_padded_again() -> None:
    inputs, pairs = inputs_of("Bert"), LayerPairs(model_of("Bert"), model_of("Bert", seed=1), [(0, 0)])
    found = [[torch.randn(3, 9, 16)], [torch.randn(3, 9, 16)]]
    packed = [[each[0][inputs["attention_mask"] == 1]] for each in found]
    torch.testing.assert_close(pairs.terms(*packed, inputs), pairs.terms(*found, inputs))


def test_a_forward_without_the_keyword_or_outside_gives_what_the_model_gives() -> None:
    student, inputs = model_of("Bert"), inputs_of("Bert")
    pairs = LayerPairs(student, model_of("Bert", seed=1))
    with pairs.student:
        assert LAYERS not in student(**inputs)
    assert type(student(**inputs)).__name__ == "SequenceClassifierOutput"
    assert [name for module in student.modules() for name in module.__dict__ if "hf_rrd" in name] == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


def test_a_forward_that_fails_leaves_nothing() -> None:
    student = model_of("Bert")
    pairs = LayerPairs(student, model_of("Bert", seed=1))
    with pytest.raises(IndexError), pairs.student:
        student(input_ids=torch.full((1, 4), 99), **{WITH_LAYERS: True})
    assert [name for module in student.modules() for name in module.__dict__ if "hf_rrd" in name] == []


def refused(student: Any, teacher: Any, message: str, pairs: Any = None) -> None:
    with pytest.raises(ValueError, match=message):
        LayerPairs(student, teacher, pairs)


def test_what_cannot_be_compared_is_refused() -> None:
    own = "layers from 0 to 1 of the student and from 0 to 3 of the teacher"
    refused(tiny_bert(), tiny_bert(layers=4), rf"`layer_pairs` must name {own}, got \[\[0, 4\]\]", [[0, 4]])
    images = hf.ResNetForImageClassification(hf.ResNetConfig(depths=[1, 1], hidden_sizes=[8, 8]))
    what = "has not one list of `num_hidden_layers` layers of one width. Set layer_weight=0"
    refused(images, tiny_bert(), f"`layer_weight` is above 0, and the student, ResNetModel, {what}")
    what = "is not as wide as the other side, and the projections of its GPT2Block are not known. Set"
    refused(tiny_gpt2(), tiny_bert(width=24), f"the student {what}")
    speech = model_of("Wav2Vec2")
    speech.config.layerdrop = 0.1
    what = "with layerdrop=0.1, and `layer_weight` needs them all. Set its config's `layerdrop` to 0"
    refused(speech, model_of("Wav2Vec2"), f"the student skips layers at random, {what}")
