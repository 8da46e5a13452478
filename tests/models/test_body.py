"""Where the body of a model is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel, PreTrainedConfig, PreTrainedModel, ViTModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from hf_rrd import embed
from hf_rrd.models.body import body_of, is_classifier, is_headless
from hf_rrd.models.embedding import Embedder
from tests.builders import CLASSES, Images, tiny_bert, tiny_vit, trainer


def test_the_body_is_the_part_that_gives_hidden_states_and_a_headless_model_its_own() -> None:
    classifier, headless = tiny_bert(), BertModel(BertConfig(vocab_size=50, hidden_size=16, num_attention_heads=2))
    assert body_of(classifier) is classifier.bert
    assert body_of(headless) is headless
    assert isinstance(body_of(tiny_vit()), ViTModel)


def test_a_model_that_is_not_of_transformers_has_no_body() -> None:
    with pytest.raises(ValueError, match="needs a body that returns hidden states, got Linear.*Use a PreTrainedModel"):
        body_of(nn.Linear(2, 2))


def test_classifiers_and_headless_models_are_told_by_their_classes() -> None:
    classifier, headless = tiny_vit(), tiny_vit().vit
    assert is_classifier(classifier) and not is_headless(classifier)
    assert is_headless(headless) and not is_classifier(headless)


TINY_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}
TINY_TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "projection_dim": 0,
}
CUT_BEFORE = {  # which had another module inside taken for their body
    "DINOv3ViTModel": TINY_VISION,
    "DINOv3ConvNextModel": {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]},
    "DPRQuestionEncoder": TINY_TEXT,
    "DPRContextEncoder": TINY_TEXT,
    "SiglipTextModel": TINY_TEXT,
    "OwlViTVisionModel": TINY_VISION,
    "CLIPVisionModelWithProjection": TINY_VISION,
}


@pytest.mark.parametrize("name", CUT_BEFORE)
def test_a_headless_model_is_not_cut_to_a_part_of_it(name: str) -> None:
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**CUT_BEFORE[name])).eval()
    reads_text = model.main_input_name == "input_ids"
    inputs = {"input_ids": torch.randint(2, 50, (2, 9))} if reads_text else {"pixel_values": torch.randn(2, 3, 64, 64)}
    inputs = inputs if reads_text or "ConvNext" in name else {"pixel_values": inputs["pixel_values"][..., :16, :16]}
    with torch.no_grad():
        outputs = model(**inputs)
        rows = embed(model, inputs)
    assert body_of(model) is model
    pooled = {"DPR": outputs.get("pooler_output"), "CLI": outputs.get("image_embeds")}.get(name[:3])
    if pooled is None:
        hidden = outputs.last_hidden_state
        has_cls = name in ("DINOv3ViTModel", "OwlViTVisionModel")
        pooled = hidden[:, 0] if has_cls else hidden.mean((2, 3) if hidden.dim() == 4 else 1)
    torch.testing.assert_close(rows, pooled)


class OwnBert(BertModel):
    """A class of one's own."""


class OwnClassifier(BertPreTrainedModel):
    """Whose body is not where `base_model_prefix` says."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.encoder, self.head = BertModel(config), nn.Linear(config.hidden_size, 2)
        self.post_init()


def test_classes_of_ones_own_have_the_body_of_what_they_are_made_from() -> None:
    config = BertConfig(vocab_size=50, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    own, classifier = OwnBert(config), OwnClassifier(config)
    assert body_of(own) is own
    assert body_of(classifier) is classifier.encoder


# ---- timm, which transformers wraps ----


class Backbone(nn.Module):
    """What timm's models have, as far as transformers and this package call it."""

    def __init__(self, classes: int, layers: type[nn.Module] | None = nn.Linear) -> None:
        super().__init__()
        self.stem, self.head_hidden_size = nn.Conv2d(3, 16, 8, 8), 16
        self.head: Any = nn.Linear(16, classes) if layers is nn.Linear else (nn.Linear(16, classes),) * 2

    def get_classifier(self) -> Any:
        return self.head

    def forward_features(self, pixels: Tensor) -> Tensor:
        return self.stem(pixels).permute(0, 2, 3, 1)  # (batch, height, width, dim), as a Swin of timm has it

    def forward_head(self, features: Tensor) -> Tensor:
        return features.mean((1, 2))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.forward_head(self.forward_features(pixels)))


class TimmWrapperForImageClassification(PreTrainedModel):  # the name is what it is known by
    config_class, main_input_name, base_model_prefix = PreTrainedConfig, "pixel_values", "timm_model"

    def __init__(self, config: PreTrainedConfig, layers: Any = nn.Linear) -> None:
        super().__init__(config)
        self.timm_model = Backbone(config.num_labels, layers)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        logits = self.timm_model(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class TimmWrapperModel(TimmWrapperForImageClassification):
    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        features = self.timm_model.forward_features(pixel_values)
        return BaseModelOutputWithPooling(features, self.timm_model.forward_head(features))


@pytest.mark.parametrize("model_class", [TimmWrapperForImageClassification, TimmWrapperModel])
def test_a_timm_model_is_compared_by_what_its_classifier_reads(model_class: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = model_class(PreTrainedConfig(num_labels=CLASSES)).eval(), Images(8)
    expected = model.timm_model.forward_head(model.timm_model.forward_features(images.pixels))
    assert torch.equal(embed(model, {"pixel_values": images.pixels}), expected)
    has_head = model_class is TimmWrapperForImageClassification
    weights = {"task_weight": float(has_head), "kd_weight": float(has_head)}
    as_student = trainer(tmp_path, model=model, alignment_examples=8, **weights)
    as_student.train()
    assert as_student.evaluate(images)["eval_alignment_cka"] < 1
    as_teacher = trainer(
        tmp_path, teacher=model_class(PreTrainedConfig(num_labels=CLASSES)), kd_weight=float(has_head)
    )
    as_teacher.train()
    assert as_teacher._teacher.width == 16 and as_teacher.report(images).facts["alignment"]["cka"] < 1


def test_a_timm_classifier_of_several_layers_is_an_error_that_says_what_to_load() -> None:
    model = TimmWrapperForImageClassification(PreTrainedConfig(num_labels=2, architecture="deit"), layers=None)
    with pytest.raises(
        ValueError, match=r"one linear classifier, timm's deit has another \(tuple\). Use AutoModel, which"
    ):
        body_of(model)


TIMM = {  # and the real ones, where timm is installed
    "resnet10t": {},
    "mobilenetv3_small_050": {},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 1},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 2, "depths": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("architecture", TIMM)
def test_a_timm_classifier_has_the_embedding_of_the_same_model_without_its_head(architecture: str) -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig(architecture=architecture, model_args=TIMM[architecture], num_labels=3)
    classifier = transformers.TimmWrapperForImageClassification(config).eval()
    headless = transformers.TimmWrapperModel(config).eval()
    headless.load_state_dict({k: v for k, v in classifier.state_dict().items() if k in headless.state_dict()})
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    with torch.no_grad():
        rows = embed(classifier, inputs)
        torch.testing.assert_close(rows, headless(**inputs).pooler_output)
        torch.testing.assert_close(embed(headless, inputs), rows)
    assert Embedder(classifier).width == Embedder(headless).width == rows.shape[1]
