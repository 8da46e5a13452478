"""The body of a transformers model: the part that computes hidden states, and how to read its output."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models import auto  # whose `modeling_auto` is loaded when it is used

_KEEP, _OUTPUT = "_hf_rrd_keep", "_hf_rrd_output"  # on a body: whether to keep the next output, and what was kept


def body_of(model: nn.Module) -> Any:
    """The part of a model that computes hidden states: `bert` of a `BertForSequenceClassification`.

    A headless model is its own body. Looks through PEFT wrappers. A ValueError says what has no body.
    """
    model = unwrapped(model)
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"the model needs a body that returns hidden states, got {name}, which is not a transformers model. Use a "
            "PreTrainedModel (any AutoModelFor...) or a PEFT model around one."
        )
    if name.endswith("ForConditionalGeneration") and model.config.is_encoder_decoder:
        why = "its decoder's states have no mask of their own. Use the family's encoder or its classifier"
        raise ValueError(f"{name} is not supported: {why}.")
    if name.endswith("ForCausalLM") and hasattr(model.base_model, "decoder"):
        return model.base_model.decoder  # OPT, BART and their kin call it directly
    if model.base_model is not model:
        return model.base_model
    if is_headless(model):
        return model
    # CLIP and SigLIP classifiers keep it under another name than `base_model_prefix`; in 5.0 it is a plain module.
    inner = [child for child in model.children() if isinstance(getattr(child, "config", None), PreTrainedConfig)]
    return inner[0] if len(inner) == 1 else model


def unwrapped(model: Any) -> Any:
    """The model itself, without a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_headless(model: nn.Module) -> bool:
    """Whether the model only computes hidden states, as `AutoModel` gives it."""
    return is_one_of(model, "MODEL_MAPPING_NAMES")


def is_classifier(model: nn.Module) -> bool:
    """Whether the model has a head with a number of classes, by its name: `...Classification`."""
    return "Classification" in type(unwrapped(model)).__name__


def is_one_of(model: nn.Module, mapping: str) -> bool:
    """Whether the model's class is among those of an auto class, given by the name of its mapping."""
    name, known = type(unwrapped(model)).__name__, getattr(auto.modeling_auto, mapping).values()
    return any(name == each if isinstance(each, str) else name in each for each in known)


def main_input_of(body: Any) -> str:
    """The name of the input that a body reads: `input_ids`, `pixel_values`, `input_values`."""
    return getattr(body, "main_input_name", "pixel_values")


def place_of(body: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a body's inputs belong: the device and the dtype of its first weight in floating point."""
    weight = next(weight for weight in body.parameters() if weight.is_floating_point())
    if weight.is_meta:  # offloaded: between two forwards on no device, but its hooks know where it is brought to
        hooks = [getattr(module, "_hf_hook", None) for module in body.modules()]
        places = [getattr(hook, "execution_device", None) for hook in hooks]
        return next((torch.device(place) for place in places if place is not None), weight.device), weight.dtype
    return weight.device, weight.dtype


def placed(inputs: dict[str, Any], body: nn.Module) -> dict[str, Any]:
    """A forward's inputs on the device of a body, those in floating point in its dtype."""
    device, dtype = place_of(body)

    def place(value: torch.Tensor) -> torch.Tensor:
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

    return {name: place(value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


# ---- Its output ----


def watch(body: nn.Module) -> Callable[[], None]:
    """Let the body keep its next output whenever `keep_next` asked for it; returns what undoes a first watching.

    The hook reads the module that it is handed, never one that it closed over, so that copies and replicas work.
    """
    if _keep_output in body._forward_hooks.values():
        return lambda: None
    return body.register_forward_hook(_keep_output).remove


def _keep_output(module: nn.Module, args: Any, output: Any) -> None:
    if module.__dict__.pop(_KEEP, False):
        module.__dict__[_OUTPUT] = output


def keep_next(body: nn.Module) -> None:
    """Ask a watched body to keep the output of its next forward."""
    body.__dict__[_KEEP] = True


def take_kept(body: nn.Module) -> Any:
    """The output that the body kept, once; a ValueError if it was not called."""
    if _OUTPUT not in body.__dict__:
        raise ValueError(f"the model computes its output without calling its body, {type(body).__name__} as a whole.")
    return body.__dict__.pop(_OUTPUT)
