"""The body and the embedding of every model class of the installed transformers, from small configs."""

import inspect
import re
from functools import cache
from typing import Any

import pytest
import torch

from hf_rrd import embed
from hf_rrd.models.body import body_of
from hf_rrd.models.embedding import Embedder
from tests.models.zoo import body_on_meta, headless_names, model_classes, small_model

HEAD = re.compile("For[A-Z]|LMHead")  # in the name of a class
HEADLESS = {name for name in headless_names() if not HEAD.search(name)}

# Classes with a head whose body is none that `AutoModel` gives, by the class of that body.
OTHER_BODIES = {
    r".*Decoder": "ForCausalLM of an encoder-decoder's family: it calls its decoder directly",
    r"MT5EncoderModel|T5EncoderModel|UMT5EncoderModel|WhisperEncoder": "it has the encoder alone",
    r"(BlipText|CsmDepthDecoder|Emu3Text|MetaClip2Vision|MllamaText)Model": "the family's own, which AutoModel lacks",
    r"(PPDocLayoutV2|PPOCRV5MobileDet|Rag|Qwen2_5OmniTalker|Qwen3OmniMoeTalkerCodePredictor)Model": "the same",
    r"Gemma3ForConditionalGeneration": "the same",
    r"(PPLCNet)Encoder|(SLANeXt|SLANet|VitPose|Tipsv2Vision)Backbone": "the family's own model has a head of its own",
    r"RfDetrForObjectDetection|SuperPointForKeypointDetection": "another task's model is inside; it has no embedding",
    r"(Eomt|Videomt)Embeddings": "its layers are its own; an embedding is an error that says so",
    r"HGNetV2ForImageClassification": "its layers are its own; an embedding is an error that says so",
}
# Of these there is no embedding, or not of all inputs: each is an error that says what came.
NO_EMBEDDING = {
    r"(Aimv2|AltCLIP|Blip|CLIP|CLIPSeg|ChineseCLIP|Flava|GroupViT|MetaClip2)Model": "of two kinds of input",
    r"(OwlViT|Owlv2)Model": "of two kinds of input",
    r"(Siglip|Siglip2|Tipsv2|Align|Clap|XCLIP|VisionTextDualEncoder|VideoPrismClip)Model": "of two kinds of input",
    r"FlavaForPreTraining|BlipFor.*|Kosmos2_5.*": "of two kinds of input",
    r"FastSpeech2ConformerModel|FastSpeech2ConformerWithHifiGan|UnivNetModel|Bark.*": "gives sounds, or its tokens",
    r"(EfficientLoFTR|LightGlue|Sam3LiteText|SuperGlue|SuperPoint).*": "gives keypoints or masks",
    r".*Backbone|FlavaImageCodebook|BltPatcher": "gives feature maps or pieces",
    r"(Speech|Vision)?EncoderDecoderModel|DPRReader|RfDetrForInstanceSegmentation": "gives the outputs of a head",
    r"HGNetV2ForImageClassification|Llama4ForConditionalGeneration": "has no module that gives its hidden states",
    r"Git(Model|ForCausalLM)|UdopEncoderModel": "with images its mask is of the text alone; texts alone are pooled",
    r"VideoPrismTextModel": "adds a token that its mask has not",
    r"PixtralVisionModel": "puts all images of a batch into one row",
}
# Their heads do not call the body as it is called alone.
CALLED_OTHERWISE = {
    r"BigBirdForQuestionAnswering": "finds the question's token types itself",
    r"BlipTextLMHeadModel": "calls its body as a decoder",
    r"LongformerForSequenceClassification": "lets CLS attend to all tokens",
    r"MobileViT(V2)?ForSemanticSegmentation": "leaves out the body's last convolution",
    r".*Backbone|SLANeXtForTableRecognition": "gives feature maps, or reads them",
}
OURS = (
    "without calling its body|returns `(last_hidden_state|pooler_output)`|is not supported|reads images and texts|"
    "does not fit|gives .* for a batch of"
)


def listed(name: str, reasons: dict[str, str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in reasons)


@cache
def all_classes() -> list[Any]:
    return list(model_classes())  # imports all families


def of_letters(letters: str) -> list[Any]:
    return [each for each in all_classes() if each.__name__[0].upper() in letters]


LETTERS = ["AB", "C", "DE", "FG", "HIJK", "L", "MN", "OP", "QR", "STU", "VWXYZ"]


@pytest.mark.slow
@pytest.mark.parametrize("letters", LETTERS)
def test_the_body_of_every_class_is_the_headless_model_or_is_listed_with_a_reason(letters: str) -> None:
    wrong, built = [], 0
    for model_class in of_letters(letters):
        name = model_class.__name__
        if (
            re.search("ForConditionalGeneration$|EncoderDecoderModel$|Pix2Struct", name)
            and name not in headless_names()
        ):
            continue  # an encoder-decoder is refused, a decoder of several inputs is what it is
        found = body_on_meta(model_class, body_of)
        if found is None:
            continue
        built += 1
        model, body = found
        inside = type(body).__name__
        is_itself, has_head = body is model, HEAD.search(name) is not None
        if is_itself != (not has_head) and (is_itself or inside not in HEADLESS) and not listed(inside, OTHER_BODIES):
            wrong.append((name, inside))
    has_none = [name for name, inside in wrong if name == inside]  # its output has no hidden states either
    assert [each for each in wrong if each[0] not in has_none] == []
    assert not any(re.search("Classification$|MaskedLM$|CausalLM$", name) for name in has_none), has_none
    assert built > 20


@pytest.mark.slow
@pytest.mark.parametrize("letters", LETTERS)
@torch.no_grad()
def test_the_embedding_of_every_class_that_runs_is_the_headless_models_or_an_error(letters: str) -> None:
    wrong, ran = [], 0
    for model_class in of_letters(letters):
        name = model_class.__name__
        model, inputs = small_model(model_class)
        if model is None or inputs is None or re.search("Backbone$|^SLANeXtForTable", name):
            continue
        try:
            torch.manual_seed(0)  # a ViTMAE draws a mask
            rows, body = embed(model, inputs), body_of(model)
            headless = type(body)(body.config).eval() if type(body).__name__ in HEADLESS else body
            headless.load_state_dict(body.state_dict(), strict=False)  # a pooler that is left out on one side
            taken = inspect.signature(headless.forward).parameters
            torch.manual_seed(0)
            outputs = headless(**{name: value for name, value in inputs.items() if name in taken})
            expected, width = Embedder(headless).pool(outputs, inputs), rows.shape[1]
        except ValueError as error:
            refused = "ForConditionalGeneration is not supported" in str(error) or listed(name, NO_EMBEDDING)
            if not refused and HEAD.search(name) and "returns `last_hidden_state`" in str(error):
                refused = not re.search(
                    "Classification$|MaskedLM$|CausalLM$", name
                )  # tasks whose heads know no pooling
            if not refused or not re.search(OURS, str(error)):
                wrong.append((name, str(error)[:150]))
            continue
        except (RuntimeError, TypeError, AttributeError) as error:
            wrong.append((name, repr(error)[:150]))
            continue
        ran += 1
        equal = rows.shape == expected.shape and torch.allclose(rows, expected, atol=1e-5)
        same = equal or listed(name, CALLED_OTHERWISE)
        if rows.shape != (2, width) or not rows.isfinite().all() or not same:
            wrong.append((name, f"{tuple(rows.shape)} for {tuple(expected.shape)}"))
    assert wrong == [], wrong
    assert ran > 10
