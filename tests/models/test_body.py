"""Where the body of a model is."""

import pytest
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    ViTModel,
)

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
