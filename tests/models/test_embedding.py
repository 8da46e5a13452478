"""Which pooling suits a model's body, with what width, and a model's embedding by one call."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BertForMultipleChoice,
    DataCollatorWithFlattening,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    OPTConfig,
    OPTModel,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
)
from transformers.utils import ModelOutput

from hf_rrd import embed
from hf_rrd.models.body import body_of
from hf_rrd.models.embedding import Embedder
from hf_rrd.models.head import WITH_EMBEDDING, attach_head
from hf_rrd.models.pooling import POOLERS
from tests.builders import Images, Texts, tiny_bert, tiny_vit, trainer
from tests.models.test_pooling import MASKS, naive_pool


def tiny_gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1)
    return GPT2ForSequenceClassification(config)


def tiny_swin() -> Any:
    torch.manual_seed(0)
    return SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    )


def tiny_distilbert() -> Any:
    torch.manual_seed(0)
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=32)
    )


def tiny_resnet() -> Any:
    torch.manual_seed(0)
    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1]))


def tiny_mobilenet(finegrained: bool = True) -> Any:
    torch.manual_seed(0)
    return MobileNetV2ForImageClassification(
        MobileNetV2Config(image_size=32, depth_multiplier=0.25, finegrained_output=finegrained)
    )


def wav2vec2_config(**changes: Any) -> Wav2Vec2Config:
    torch.manual_seed(0)
    return Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        **changes,
    )


def run_body(model: nn.Module, **inputs: Tensor) -> tuple[Any, Any]:
    body = body_of(model).eval()
    with torch.no_grad():
        return body, body(**inputs)


@pytest.mark.parametrize(
    ("build", "pooling"),
    [(tiny_vit, "cls"), (tiny_swin, "mean"), (tiny_resnet, "gap"), (tiny_mobilenet, "gap")],
)
def test_auto_pools_images_as_the_family_does(build: Callable[[], Any], pooling: str) -> None:
    model = build()
    size = getattr(model.config, "image_size", 32)
    body, outputs = run_body(model, pixel_values=torch.randn(2, 3, size, size))
    pooled = Embedder(body, "auto").pool(outputs, {})
    torch.testing.assert_close(pooled, POOLERS[pooling](outputs, None), rtol=1e-6, atol=1e-6)
    if pooling != "cls":  # these three hand out the same themselves; a ViT's has one more layer on top
        torch.testing.assert_close(pooled, outputs.pooler_output.flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("build", "pooling"), [(tiny_bert, "mean"), (tiny_distilbert, "mean"), (tiny_gpt2, "last_token")]
)
def test_auto_pools_encoders_by_the_mean_and_decoders_by_the_last_unmasked_token(
    build: Callable[[], Any], pooling: str, side: str
) -> None:
    mask = torch.tensor(MASKS[side])
    body, outputs = run_body(build(), input_ids=torch.randint(2, 50, (3, 5)), attention_mask=mask)
    expected = torch.tensor(naive_pool(pooling, outputs.last_hidden_state, MASKS[side]))
    torch.testing.assert_close(
        Embedder(body, "auto").pool(outputs, {"attention_mask": mask}), expected, rtol=1e-5, atol=1e-6
    )


def test_auto_pools_speech_over_the_frames_whose_samples_are_unmasked() -> None:
    samples = [400, 173]
    mask = (torch.arange(400) < torch.tensor(samples).unsqueeze(1)).long()
    model = Wav2Vec2ForSequenceClassification(wav2vec2_config())
    body, outputs = run_body(model, input_values=torch.randn(2, 400), attention_mask=mask)
    frames = [((count - 10) // 5 + 1 - 3) // 2 + 1 for count in samples]  # two convolutions without padding
    assert outputs.last_hidden_state.shape[1] == frames[0] > frames[1]
    frame_mask = [[int(t < count) for t in range(frames[0])] for count in frames]
    expected = torch.tensor(naive_pool("mean", outputs.last_hidden_state, frame_mask))
    torch.testing.assert_close(
        Embedder(body, "auto").pool(outputs, {"attention_mask": mask}), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("build", "pooling"),
    [
        (tiny_vit, "auto"),
        (tiny_vit, "mean"),
        (lambda: tiny_vit().vit, "cls"),
        (tiny_swin, "auto"),
        (tiny_resnet, "auto"),
        (tiny_resnet, "gap"),
        (tiny_resnet, "pooler"),
        (tiny_mobilenet, "gap"),
        (lambda: tiny_mobilenet(finegrained=False), "gap"),
    ],
)
def test_the_embedding_width_of_an_image_model_is_that_of_what_it_really_pools(
    build: Callable[[], Any], pooling: str
) -> None:
    model = build()
    size = getattr(model.config, "image_size", 32)
    body, outputs = run_body(model, pixel_values=torch.randn(2, 3, size, size))
    assert Embedder(body, pooling).width == Embedder(body, pooling).pool(outputs, {}).shape[1]


OPT = OPTConfig(
    vocab_size=50,
    hidden_size=16,
    word_embed_proj_dim=8,
    num_hidden_layers=1,
    ffn_dim=16,
    num_attention_heads=2,
    max_position_embeddings=32,
)


@pytest.mark.parametrize(
    "build",
    [tiny_bert, tiny_distilbert, tiny_gpt2, pytest.param(lambda: OPTModel(OPT), id="OPT-350m's projected output")],
)
def test_the_embedding_width_of_a_text_model_is_that_of_what_it_really_pools(build: Callable[[], Any]) -> None:
    body, outputs = run_body(build(), input_ids=torch.randint(2, 50, (3, 5)))
    assert Embedder(body, "auto").width == Embedder(body, "auto").pool(outputs, {}).shape[1]


@pytest.mark.parametrize("changes", [{}, {"add_adapter": True, "output_hidden_size": 12}])
def test_the_embedding_width_of_a_speech_model_is_that_of_what_it_really_pools(changes: dict[str, Any]) -> None:
    body, outputs = run_body(Wav2Vec2Model(wav2vec2_config(**changes)), input_values=torch.randn(2, 2000))
    assert Embedder(body, "auto").width == Embedder(body, "auto").pool(outputs, {}).shape[1]


def test_the_embedding_width_of_a_callable_is_measured_on_what_it_returns() -> None:
    body = body_of(tiny_vit(width=16))

    def first_two(outputs: Any, attention_mask: Tensor | None) -> Tensor:
        return outputs.last_hidden_state[:, :2].flatten(1)

    assert Embedder(body, first_two).width == 32


@pytest.mark.parametrize(
    ("pooling", "returned"),
    [(lambda outputs, mask: outputs.last_hidden_state, r"\(1, 5, 16\)"), (lambda outputs, mask: [1.0], "list")],
)
def test_a_callable_that_returns_no_rows_is_an_error_that_says_what_it_returned(
    pooling: Callable[..., Any], returned: str
) -> None:
    with pytest.raises(ValueError, match=rf"pooling must return a tensor of shape \(batch, dim\), .* {returned}"):
        _ = Embedder(tiny_vit(), pooling).width


def test_a_callable_that_cannot_be_called_is_an_error_that_speaks_of_no_hidden_states() -> None:
    message = r"^`pooling` does not fit: ViTModel gave BaseModelOutputWithPooling: .* takes 0 positional arguments"
    with pytest.raises(ValueError, match=message):
        _ = Embedder(tiny_vit(), lambda: None).width


@pytest.mark.parametrize("training", [True, False])
def test_measuring_a_width_leaves_mode_and_statistics_of_the_model_as_they_were(training: bool) -> None:
    body = body_of(tiny_resnet()).train(training)
    before = {name: value.clone() for name, value in body.state_dict().items()}
    assert Embedder(body, "auto").width == 12
    assert all(module.training == training for module in body.modules())
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())


class OnlyLogits(PreTrainedModel):
    """A model of one layer that returns no hidden states, and fails on what is not 4 tokens long."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, config: PretrainedConfig, length: int = 4) -> None:
        super().__init__(config)
        self.length = length
        self.layer = nn.Linear(length, 2)
        self.post_init()

    def forward(self, input_ids: Tensor) -> ModelOutput:
        return ModelOutput(logits=self.layer(input_ids.float()))


def test_a_model_without_hidden_states_is_an_error_that_says_what_it_returned() -> None:
    model = OnlyLogits(PretrainedConfig())
    with pytest.raises(ValueError, match="needs a body that returns hidden states, OnlyLogits gave ModelOutput"):
        _ = Embedder(model).width


def test_a_width_that_can_neither_be_read_nor_measured_is_an_error() -> None:
    model = OnlyLogits(PretrainedConfig(), length=5)
    with pytest.raises(ValueError, match="OnlyLogits's embedding is not in its config as `hidden_size`, and a blank"):
        _ = Embedder(model).width


# ---- embed ----


def test_the_embedding_is_the_one_that_training_compares() -> None:
    student, pixels = tiny_vit().eval(), Images(3).pixels
    attach_head(student, dim=8)
    pooled = student(pixels, **{WITH_EMBEDDING: True}).relational_pooled
    assert torch.equal(embed(student, {"pixel_values": pixels}), pooled)
    last = student(pixels, output_hidden_states=True).hidden_states[-1][:, 0]
    assert (last - pooled).abs().max() > 0.1  # that lacks the last layer norm


def test_of_padded_texts_the_tokens_alone_are_embedded() -> None:
    model, data = tiny_bert().eval(), Texts(4)
    whole = embed(model, {"input_ids": data.tokens, "attention_mask": data.mask})
    for index, count in enumerate(data.mask.sum(1).tolist()):
        alone = embed(model, {"input_ids": data.tokens[index : index + 1, :count]})
        torch.testing.assert_close(whole[index : index + 1], alone, rtol=1e-5, atol=1e-6)


def test_an_embedding_comes_with_the_outputs_and_with_gradients_and_leaves_no_hook() -> None:
    model, pixels = tiny_vit(), Images(3).pixels
    rows, outputs = embed(model, {"pixel_values": pixels}, "mean", return_outputs=True)
    assert outputs.logits.shape == (3, 4) and rows.shape == (3, 16)
    rows.sum().backward()
    assert model.vit.embeddings.cls_token.grad is not None
    assert len(model.vit._forward_hooks) == 0


def test_a_wrapped_model_has_the_embedding_of_the_one_inside() -> None:
    pixels = Images(3).pixels
    expected = embed(tiny_vit().eval(), {"pixel_values": pixels})
    lora = peft.get_peft_model(tiny_vit(), peft.LoraConfig(target_modules=["query", "q_proj"])).eval()
    wrapped = nn.DataParallel(tiny_vit().eval())
    compiled, in_place = torch.compile(tiny_vit().eval(), backend="eager"), tiny_vit().eval()
    in_place.compile(backend="eager")
    for called in (compiled, in_place):
        called(pixel_values=pixels)
    for model in (lora, wrapped, compiled, in_place):
        torch.testing.assert_close(embed(model, {"pixel_values": pixels}), expected)


@pytest.mark.parametrize(
    ("inputs", "came"),
    [
        (["a text"], "a list"),
        ("a text", "a str"),
        (torch.ones(1, 3), "a Tensor"),
        ({"input_ids": np.ones((1, 3), dtype=int)}, r"`input_ids` \(ndarray\)"),
        ({"input_ids": [[1, 2]]}, r"`input_ids` \(list\)"),
    ],
)
def test_what_is_no_dict_of_tensors_is_refused(inputs: Any, came: str) -> None:
    with pytest.raises(ValueError, match=rf"`inputs` must be a dict of tensors, got {came}: .*return_tensors='pt'"):
        embed(tiny_bert(), inputs)


def test_a_batch_without_the_models_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reads `pixel_values`, and `inputs` has `pixels` \(2, 3, 16, 16\) float32"):
        embed(tiny_vit(), {"pixels": torch.zeros(2, 3, 16, 16)})


@pytest.mark.parametrize("choices", [1, 3])
def test_an_example_of_several_choices_is_embedded_as_their_mean(choices: int) -> None:
    model = BertForMultipleChoice(tiny_bert().config).eval()
    texts = [Texts(6)[index] for index in range(6)]
    ids, mask = (torch.stack([text[name] for text in texts]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        found = embed(model, {"input_ids": ids.view(-1, choices, 9), "attention_mask": mask.view(-1, choices, 9)})
        each = embed(model.bert, {"input_ids": ids, "attention_mask": mask})
    expected = torch.stack([each[start : start + choices].mean(0) for start in range(0, 6, choices)])
    torch.testing.assert_close(found, expected)


# ---- Families that are read in another way ----

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TINY_TEXT = {**TINY, "vocab_size": 50, "max_position_embeddings": 32}
TINY_VISION = {**TINY, "image_size": 16, "patch_size": 8}
TOKENS = {"input_ids": torch.tensor([[2, 3, 4, 5, 6], [7, 8, 9, 0, 0]])}
TOKENS["attention_mask"] = (TOKENS["input_ids"] > 0).long()


def built(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**settings)).eval()


@torch.no_grad()
def test_auto_pools_a_gemma_that_looks_both_ways_by_the_mean() -> None:
    settings = {**TINY_TEXT, "head_dim": 8, "num_key_value_heads": 2}
    for both_ways, pooling in ((True, "mean"), (False, "last_token")):
        model = built("Gemma3TextModel", **settings, use_bidirectional_attention=both_ways)
        hidden, mask = model(**TOKENS).last_hidden_state, TOKENS["attention_mask"].tolist()
        expected = torch.tensor(naive_pool(pooling, hidden, mask))
        torch.testing.assert_close(embed(model, TOKENS), expected, rtol=1e-5, atol=1e-6)


CVT = {"embed_dim": [8, 16], "num_heads": [1, 2], "depth": [1, 2], "patch_sizes": [7, 3], "patch_stride": [4, 2]}
CVT |= {"patch_padding": [2, 1], "mlp_ratio": [1.0, 1.0], "cls_token": [False, True], "drop_path_rate": [0.0, 0.0]}
CVT |= {name: [0.0, 0.0] for name in ("attention_drop_rate", "drop_rate")} | {"qkv_bias": [True, True]}
CVT |= {"qkv_projection_method": ["dw_bn", "dw_bn"], "kernel_qkv": [3, 3], "padding_kv": [1, 1], "stride_kv": [2, 2]}
CVT |= {"padding_q": [1, 1], "stride_q": [1, 1]}
LAYOUT = {**TINY_TEXT, "input_size": 16, "patch_size": 8, "has_relative_attention_bias": False}
LAYOUT |= {
    "has_spatial_attention_bias": False,
    "coordinate_size": 2,
    "shape_size": 4,
    "max_2d_position_embeddings": 16,
}
FUNNEL = {"vocab_size": 50, "block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32}


@pytest.mark.parametrize(
    ("name", "settings", "inputs", "pooling"),
    [
        ("CvtForImageClassification", CVT, {"pixel_values": torch.randn(2, 3, 32, 32)}, "mean"),
        ("FunnelForSequenceClassification", FUNNEL, TOKENS, "cls"),
        (
            "LayoutLMv3ForSequenceClassification",
            LAYOUT,
            TOKENS | {"bbox": torch.zeros(2, 5, 4, dtype=torch.long), "pixel_values": torch.randn(2, 3, 16, 16)},
            "cls",
        ),
    ],
)
@torch.no_grad()
def test_auto_is_a_pooling_that_runs(name: str, settings: dict[str, Any], inputs: Any, pooling: str) -> None:
    model = built(name, **settings)
    rows, width = embed(model, inputs), Embedder(model).width
    body, outputs = run_body(model, **inputs)
    assert Embedder(model).pooling == pooling and rows.shape == (2, width)
    torch.testing.assert_close(rows, POOLERS[pooling](outputs, None), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_patches_that_pad_an_image_of_another_size_are_not_pooled() -> None:
    model = built("Siglip2VisionModel", **TINY, num_patches=16, patch_size=4, vision_use_head=False)
    mask = torch.tensor([[1] * 16, [1] * 6 + [0] * 10])
    images = {"pixel_values": torch.randn(2, 16, 48), "pixel_attention_mask": mask}
    images["spatial_shapes"] = torch.tensor([[4, 4], [2, 3]])
    expected = torch.tensor(naive_pool("mean", model(**images).last_hidden_state, mask.tolist()))
    torch.testing.assert_close(embed(model, images), expected, rtol=1e-5, atol=1e-6)
    other = images["pixel_values"].masked_fill(mask.unsqueeze(-1) == 0, 9.0)
    torch.testing.assert_close(embed(model, images | {"pixel_values": other}), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_embedding_of_a_model_with_projection_is_what_it_projects() -> None:
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    vision = built("CLIPVisionModelWithProjection", **TINY_VISION, projection_dim=6)
    text = built("CLIPTextModelWithProjection", **TINY_TEXT, projection_dim=6, eos_token_id=1)
    assert torch.equal(embed(vision, pixels), vision(**pixels).image_embeds)
    assert torch.equal(embed(text, TOKENS), text(**TOKENS).text_embeds)
    assert Embedder(vision).width == Embedder(text).width == 6


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("CLIPModel", "CLIPVisionModelWithProjection for images, CLIPTextModelWithProjection for texts"),
        ("SiglipModel", "SiglipVisionModel for images, SiglipTextModel for texts"),
    ],
)
def test_a_model_of_images_and_texts_is_an_error_that_names_the_class_to_load(name: str, classes: str) -> None:
    model = built(name, text_config=TINY_TEXT, vision_config=TINY_VISION)
    with pytest.raises(ValueError, match=f"{name} reads images and texts together. Load the part .*: {classes}."):
        _ = Embedder(model).width


@torch.no_grad()
def test_a_map_with_its_channels_last_is_pooled_over_its_positions() -> None:
    settings = {
        "hidden_size": 8,
        "blocks_per_stage": [1, 1],
        "embed_dim_per_stage": [8, 16],
        "num_query_pool_stages": 1,
    }
    settings |= {"num_attention_heads_per_stage": [1, 1], "window_size_per_stage": [4, 4]}
    settings |= {"global_attention_blocks": [], "image_size": [32, 32], "num_attention_heads": 1}
    model = built("Sam2HieraDetModel", **settings)
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    hidden = model(**images).last_hidden_state
    assert hidden.shape == (2, 4, 4, 16)
    torch.testing.assert_close(embed(model, images), hidden.mean((1, 2)))


def test_one_embedding_for_a_batch_is_an_error_that_says_how_many_came() -> None:
    model = built("PixtralVisionModel", **TINY_VISION, head_dim=8)
    with pytest.raises(
        ValueError, match=r"each example needs one .* PixtralVisionModel gives \(1, 16\) for a batch of 2"
    ):
        embed(model, {"pixel_values": torch.randn(2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 2)})


def test_the_width_of_an_encoder_and_decoder_of_two_configs_is_measured() -> None:
    module = {**TINY_TEXT, "head_dim": 8, "num_key_value_heads": 2}
    model = built(
        "T5GemmaForSequenceClassification", encoder=module, decoder=module | {"hidden_size": 16}, num_labels=2
    )
    assert Embedder(model).width == 16


def test_texts_packed_into_one_row_are_an_error_at_construction_or_with_the_first_batch(tmp_path: Path) -> None:
    examples = [{"input_ids": [2, 3, 4], "labels": 0}, {"input_ids": [5, 6], "labels": 1}]
    packed = DataCollatorWithFlattening()
    message = "the texts of a batch are packed into one row, and each needs its own embedding. Pad them instead."
    with pytest.raises(ValueError, match=f"`data_collator` is a DataCollatorWithFlattening: {message}"):
        trainer(tmp_path, model=tiny_bert(), teacher=tiny_bert(24), train_dataset=examples, data_collator=packed)
    inputs = dict(packed([{"input_ids": example["input_ids"]} for example in examples]))
    del inputs["labels"]
    with pytest.raises(ValueError, match=message):
        embed(tiny_gpt2().transformer, inputs)
    inputs["position_ids"] = torch.arange(5).unsqueeze(0)
    assert embed(tiny_gpt2().transformer, inputs).shape == (1, 16)  # one text
