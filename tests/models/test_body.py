"""Where the body of a model is."""

import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel, ViTModel

from hf_rrd import embed
from hf_rrd.models.body import body_of, is_classifier, is_headless
from tests.builders import tiny_bert, tiny_vit


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
