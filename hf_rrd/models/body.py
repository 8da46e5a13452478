"""The body of a transformers model: where it is, how wide its embeddings are, which pooling suits it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models import auto  # whose `modeling_auto` is loaded when it is used

from hf_rrd.models.pooling import POOLERS, Pooler

_OUTPUT = "_hf_rrd_output"
_KEEP = "_hf_rrd_keep"


def body_of(model: nn.Module) -> Any:
    """The part of a model that computes hidden states: `bert` of a `BertForSequenceClassification`.

    A headless model is its own body. Looks through PEFT wrappers.

    Raises:
        ValueError: The model has no body that transformers knows of.
    """
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"the model needs a body that returns hidden states, got {type(model).__name__}, which is not a "
            "transformers model. Use a PreTrainedModel (any AutoModelFor...) or a PEFT model around one."
        )
    name = type(model).__name__
    if name.endswith("ForConditionalGeneration") and model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is not supported: its decoder's states have no mask of their own. Use the family's encoder or "
            "its classifier as the model."
        )
    if name.endswith("ForCausalLM") and hasattr(model.base_model, "decoder"):
        return model.base_model.decoder  # OPT, BART and their kin call it directly
    if model.base_model is not model:
        return model.base_model
    if is_headless(model):
        return model
    # CLIP and SigLIP classifiers keep their body under another name than `base_model_prefix`; in 5.0 it is even a
    # plain module.
    inner = [child for child in model.children() if isinstance(getattr(child, "config", None), PreTrainedConfig)]
    return inner[0] if len(inner) == 1 else model


def main_input_of(body: Any) -> str:
    """The name of the input that a body reads: `input_ids`, `pixel_values`, `input_values`."""
    return getattr(body, "main_input_name", "pixel_values")


def place_of(body: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a body's inputs belong: the device and the dtype of its first weight in floating point.

    Of offloaded weights, which are on no device between two forwards, the device that they are brought to.
    """
    weight = next(weight for weight in body.parameters() if weight.is_floating_point())
    device = weight.device
    if weight.is_meta:
        hooks = [module._hf_hook for module in body.modules() if hasattr(module, "_hf_hook")]
        places = [getattr(hook, "execution_device", None) for hook in hooks]
        device = next((torch.device(place) for place in places if place is not None), device)
    return device, weight.dtype


def is_hooked(model: nn.Module) -> bool:
    """Whether hooks of accelerate bring the weights or the inputs to where they are needed."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def unwrapped(model: Any) -> Any:
    """The model itself, without a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_headless(model: nn.Module) -> bool:
    """Whether the model only computes hidden states, as `AutoModel` gives it."""
    name = type(unwrapped(model)).__name__
    return any(
        name in ((known,) if isinstance(known, str) else known)
        for known in auto.modeling_auto.MODEL_MAPPING_NAMES.values()
    )


def pooler_for(pooling: str | Callable[..., Any], body: Any) -> Pooler:
    """The pooler that a `*_pooling` setting means for this body.

    `"auto"`: the last token of a decoder or of an encoder-decoder, the CLS token of a vision model that has one,
    otherwise the mean over the unmasked tokens, or over the positions of a convolutional map.
    """
    name = auto_pooling(body) if pooling == "auto" else pooling
    return partial(_pool, POOLERS[name] if isinstance(name, str) else name, body)


def auto_pooling(body: Any) -> str:
    """The key of `POOLERS` that `"auto"` means for this body."""
    family = body.config.model_type
    reads_text = main_input_of(body) == "input_ids"
    generates = (
        family in auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and family not in auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    if reads_text and (generates or (body.config.is_encoder_decoder and hasattr(body, "decoder"))):
        return "last_token"
    has_cls = any(name.endswith(("cls_token", "class_embedding")) for name, _ in body.named_parameters())
    return "cls" if has_cls and not reads_text else "mean"


def _pool(pooler: Pooler, body: Any, outputs: Any, attention_mask: Tensor | None) -> Tensor:
    hidden = getattr(outputs, "last_hidden_state", None)
    if attention_mask is not None and isinstance(hidden, Tensor) and hidden.dim() == 3:
        length = hidden.shape[1]
        if attention_mask.shape[-1] != length and hasattr(body, "_get_feature_vector_attention_mask"):
            # Speech: the mask counts samples, the hidden states are frames.
            attention_mask = body._get_feature_vector_attention_mask(length, attention_mask)
    return pooler(outputs, attention_mask)


def embedding_width(pooling: str | Callable[..., Any], body: Any, argument: str = "pooling") -> int:
    """The width of a pooled embedding, measured on one blank input.

    A config does not say it for all: an OPT may project its output, a Wav2Vec2 may end with an adapter. Where the body
    does not take a blank input, `hidden_size` of its config has to do. `argument` is the name under which the
    user gave the pooling.

    Raises:
        ValueError: The body gives no hidden states, or its width is neither in the config nor to be measured.
    """
    outputs = _blank_outputs(body)
    if outputs is None:
        width = getattr(body.config, "hidden_size", None)
        if not isinstance(width, int) or not isinstance(pooling, str):
            raise ValueError(
                f"the width of {type(body).__name__}'s embedding is not in its config as `hidden_size`, and a blank "
                "input could not be run to measure it. Add it to the config."
            )
        return width
    try:
        pooled = pooler_for(pooling, body)(outputs, None)
    except Exception as error:
        raise ValueError(
            f"`{argument}` does not fit: the model needs a body that returns hidden states, {type(body).__name__} "
            f"gave {type(outputs).__name__}: {error}"
        ) from error
    if not isinstance(pooled, Tensor) or pooled.dim() != 2:
        shape = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
        raise ValueError(
            f"`{argument}`: a pooling must return a tensor of shape (batch, dim), {pooling!r} returned {shape}."
        )
    return pooled.shape[1]


@torch.no_grad()
def _blank_outputs(body: Any) -> Any:
    """The body's output for one blank input of its kind, or None where it does not take one."""
    training = body.training
    body.eval()
    try:
        return body(**{main_input_of(body): _blank_input(body)})
    except Exception:
        return None
    finally:
        body.train(training)


def _blank_input(body: Any) -> Tensor:
    device, dtype = place_of(body)
    if main_input_of(body) == "pixel_values":
        size = getattr(body.config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return torch.zeros(1, getattr(body.config, "num_channels", 3), height, width, dtype=dtype, device=device)
    if main_input_of(body) == "input_ids":
        return torch.ones(1, 4, dtype=torch.long, device=device)
    return torch.zeros(1, 16_000, dtype=dtype, device=device)


def watch(body: nn.Module) -> Any:
    """Let the body keep its next output whenever `keep_next` asked for it; returns the hook's handle.

    A hook reads the module that it is handed, never one that it closed over, so that copies and replicas work.
    """
    return body.register_forward_hook(_keep_output)


def _keep_output(module: nn.Module, args: Any, output: Any) -> None:
    if module.__dict__.pop(_KEEP, False):
        module.__dict__[_OUTPUT] = output


def keep_next(body: nn.Module) -> None:
    """Ask a watched body to keep the output of its next forward."""
    body.__dict__[_KEEP] = True


def take_kept(body: nn.Module) -> Any:
    """The output that the body kept, once."""
    if _OUTPUT not in body.__dict__:
        raise ValueError(f"the model computes its output without calling its body, {type(body).__name__} as a whole.")
    return body.__dict__.pop(_OUTPUT)
