"""The poolers against loops, and which one suits a model's body, with what width."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
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
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
)
from transformers.utils import ModelOutput

from hf_rrd.models.body import body_of, embedding_width, pooler_for
from hf_rrd.models.pooling import POOLERS, cls_pool, gap_pool, last_token_pool, max_pool, mean_pool, pooler_pool
from tests.builders import tiny_bert, tiny_vit

MASKS = {
    "none": None,
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0]],
}


def hidden_states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output(hidden: Any, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(last_hidden_state=hidden, **more)


def naive_pool(name: str, hidden: Tensor, mask: list[list[int]] | None) -> list[list[float]]:
    pooled = []
    for i, tokens in enumerate(hidden.tolist()):
        seen = [token for t, token in enumerate(tokens) if mask is None or mask[i][t]]
        columns = list(zip(*seen, strict=True))
        pooled.append(
            {
                "cls": tokens[0],
                "mean": [sum(column) / len(column) for column in columns],
                "max": [max(column) for column in columns],
                "last_token": seen[-1],
            }[name]
        )
    return pooled


@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool, torch.float32])
@pytest.mark.parametrize("name", ["cls", "mean", "max", "last_token"])
def test_a_pooler_of_tokens_equals_a_loop_over_the_unmasked_ones(
    name: str, mask_dtype: torch.dtype, mask_name: str
) -> None:
    hidden = hidden_states(3, 5, 4) - 3.0  # mostly negative, so that a padding of 0 would be seen in a maximum
    mask = MASKS[mask_name]
    pooled = POOLERS[name](output(hidden), None if mask is None else torch.tensor(mask).to(mask_dtype))
    expected = torch.tensor(naive_pool(name, hidden, mask), dtype=torch.float64)
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["mean", "max", "last_token"])
def test_what_stands_under_the_padding_does_not_matter(name: str, side: str) -> None:
    mask = torch.tensor(MASKS[side])
    hidden = hidden_states(3, 5, 4)
    other = torch.where(mask.unsqueeze(-1) == 0, 1e6, hidden)
    assert torch.equal(POOLERS[name](output(hidden), mask), POOLERS[name](output(other), mask))


@pytest.mark.parametrize("name", ["mean", "max", "gap"])
def test_a_pooler_of_maps_equals_a_loop_over_their_positions(name: str) -> None:
    hidden = hidden_states(2, 3, 4, 5)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for i in range(2):
        for channel in range(3):
            values = [float(hidden[i, channel, y, x]) for y in range(4) for x in range(5)]
            expected[i, channel] = max(values) if name == "max" else sum(values) / 20
    torch.testing.assert_close(POOLERS[name](output(hidden), None), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1, 1)])
def test_the_bodys_own_pooled_output_comes_as_one_row_per_example(shape: tuple[int, ...]) -> None:
    pooled = hidden_states(*shape)
    assert torch.equal(pooler_pool(output(None, pooler_output=pooled)), pooled.reshape(2, 3))


@pytest.mark.parametrize(
    ("pooler", "outputs", "mask_shape", "message"),
    [
        (
            cls_pool,
            output(hidden_states(2, 3, 4, 4)),
            None,
            r"'cls' needs .* \(batch, length, dim\), got \(2, 3, 4, 4",
        ),
        (mean_pool, output(hidden_states(2, 3)), None, r"'mean' needs .* \(batch, length, dim\), got \(2, 3\)"),
        (mean_pool, output(hidden_states(2, 3)), (2, 3), r"'mean' needs .* \(batch, length, dim\), got \(2, 3\)"),
        (mean_pool, output(hidden_states(2, 3, 2, 2, 2)), (2, 3), r"'mean' needs .*, got \(2, 3, 2, 2, 2\)"),
        (max_pool, output(hidden_states(2, 3)), (2, 3), r"'max' needs .* \(batch, length, dim\), got \(2, 3\)"),
        (last_token_pool, output(hidden_states(2, 3, 4, 4)), None, "'last_token' needs hidden states of shape"),
        (gap_pool, output(hidden_states(2, 3, 4)), None, r"'gap' needs a .* map, got .* \(2, 3, 4\). Try 'mean'"),
        (pooler_pool, output(hidden_states(2, 3, 4)), None, "'pooler' needs a body that returns `pooler_output`"),
        (pooler_pool, output(None, pooler_output=None), None, "'pooler' needs a body that returns `pooler_output`"),
        (
            mean_pool,
            output(hidden_states(2, 3, 4)),
            (2, 5),
            r"`attention_mask`, \(2, 5\), does not fit .* \(2, 3, 4\)",
        ),
        (max_pool, output(hidden_states(2, 3, 4)), (2, 5), r"`attention_mask`, \(2, 5\), .* \(2, 3, 4\)"),
        (last_token_pool, output(hidden_states(2, 3, 4)), (1, 3), r"`attention_mask`, \(1, 3\), does not fit"),
        (mean_pool, SimpleNamespace(logits=1), None, "returns `last_hidden_state`, got SimpleNamespace"),
        (cls_pool, output((hidden_states(2, 3, 4),)), None, "returns `last_hidden_state`, got SimpleNamespace"),
    ],
)
def test_a_pooler_says_what_it_needs_and_what_came(
    pooler: Callable[..., Tensor], outputs: Any, mask_shape: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pooler(outputs, None if mask_shape is None else torch.ones(mask_shape))


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
    pooled = pooler_for("auto", body)(outputs, None)
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
    torch.testing.assert_close(pooler_for("auto", body)(outputs, mask), expected, rtol=1e-5, atol=1e-6)


def test_auto_pools_speech_over_the_frames_whose_samples_are_unmasked() -> None:
    samples = [400, 173]
    mask = (torch.arange(400) < torch.tensor(samples).unsqueeze(1)).long()
    model = Wav2Vec2ForSequenceClassification(wav2vec2_config())
    body, outputs = run_body(model, input_values=torch.randn(2, 400), attention_mask=mask)
    frames = [((count - 10) // 5 + 1 - 3) // 2 + 1 for count in samples]  # two convolutions without padding
    assert outputs.last_hidden_state.shape[1] == frames[0] > frames[1]
    frame_mask = [[int(t < count) for t in range(frames[0])] for count in frames]
    expected = torch.tensor(naive_pool("mean", outputs.last_hidden_state, frame_mask))
    torch.testing.assert_close(pooler_for("auto", body)(outputs, mask), expected, rtol=1e-5, atol=1e-6)


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
    assert embedding_width(pooling, body) == pooler_for(pooling, body)(outputs, None).shape[1]


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
    assert embedding_width("auto", body) == pooler_for("auto", body)(outputs, None).shape[1]


@pytest.mark.parametrize("changes", [{}, {"add_adapter": True, "output_hidden_size": 12}])
def test_the_embedding_width_of_a_speech_model_is_that_of_what_it_really_pools(changes: dict[str, Any]) -> None:
    body, outputs = run_body(Wav2Vec2Model(wav2vec2_config(**changes)), input_values=torch.randn(2, 2000))
    assert embedding_width("auto", body) == pooler_for("auto", body)(outputs, None).shape[1]


def test_the_embedding_width_of_a_callable_is_measured_on_what_it_returns() -> None:
    body = body_of(tiny_vit(width=16))

    def first_two(outputs: Any, attention_mask: Tensor | None) -> Tensor:
        return outputs.last_hidden_state[:, :2].flatten(1)

    assert embedding_width(first_two, body) == 32


@pytest.mark.parametrize(
    ("pooling", "returned"),
    [(lambda outputs, mask: outputs.last_hidden_state, r"\(1, 5, 16\)"), (lambda outputs, mask: [1.0], "list")],
)
def test_a_callable_that_returns_no_rows_is_an_error_that_says_what_it_returned(
    pooling: Callable[..., Any], returned: str
) -> None:
    with pytest.raises(ValueError, match=rf"pooling must return a tensor of shape \(batch, dim\), .* {returned}"):
        embedding_width(pooling, body_of(tiny_vit()))


@pytest.mark.parametrize("training", [True, False])
def test_measuring_a_width_leaves_mode_and_statistics_of_the_model_as_they_were(training: bool) -> None:
    body = body_of(tiny_resnet()).train(training)
    before = {name: value.clone() for name, value in body.state_dict().items()}
    assert embedding_width("auto", body) == 12
    assert all(module.training == training for module in body.modules())
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())


def test_the_body_is_the_part_that_gives_hidden_states_and_a_headless_model_its_own() -> None:
    classifier, headless = tiny_bert(), BertModel(BertConfig(vocab_size=50, hidden_size=16, num_attention_heads=2))
    assert body_of(classifier) is classifier.bert
    assert body_of(headless) is headless
    assert isinstance(body_of(tiny_vit()), ViTModel)


def test_a_model_that_is_not_of_transformers_has_no_body() -> None:
    with pytest.raises(ValueError, match="needs a body that returns hidden states, got Linear.*Use a PreTrainedModel"):
        body_of(nn.Linear(2, 2))


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
        embedding_width("auto", body_of(model))


def test_a_width_that_can_neither_be_read_nor_measured_is_an_error() -> None:
    model = OnlyLogits(PretrainedConfig(), length=5)
    with pytest.raises(ValueError, match="OnlyLogits's embedding is not in its config as `hidden_size`, and a blank"):
        embedding_width("auto", body_of(model))
