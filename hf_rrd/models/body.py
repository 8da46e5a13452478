"""The body of a transformers model: the part that computes hidden states, and how to read its output."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models import auto  # whose `modeling_auto` is loaded when it is used

_KEEP, _OUTPUT = "_hf_rrd_keep", "_hf_rrd_output"  # on a body: whether to keep the next output, and what was kept
_HEAD = re.compile("For[A-Z]|LMHead")  # in the name of a model's class


def body_of(model: nn.Module) -> Any:
    """The part of a model that computes hidden states: `bert` of a `BertForSequenceClassification`.

    A headless model is its own body. Looks through PEFT wrappers. A timm classifier calls no module that gives hidden
    states: the body is its last layer, whose input is the embedding. A ValueError says what has no body.
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
    if name == "TimmWrapperForImageClassification":
        classifier: Any = model.timm_model.get_classifier()
        if not hasattr(classifier, "in_features"):
            came = f"timm's {model.config.architecture} has another ({type(classifier).__name__})"
            raise ValueError(f"the model needs one linear classifier, {came}. Use AutoModel, which leaves it out.")
        return classifier
    whole = _gives_states(model) or name.endswith("WithProjection")
    has_head = _HEAD.search(name) is not None
    if model.base_model is not model and not whole and (has_head or _gives_states(model.base_model)):
        return model.base_model
    if whole:
        return model
    # CLIP and SigLIP classifiers keep it under another name than `base_model_prefix`; in 5.0 it is a plain module.
    own = not type(model).__module__.startswith("transformers.models.")
    inner = [
        child for child in model.children() if (has_head and _has_config(child)) or (own and _gives_states(child))
    ]
    return inner[0] if len(inner) == 1 else model


def _has_config(module: nn.Module) -> bool:
    return isinstance(getattr(module, "config", None), PreTrainedConfig)


def unwrapped(model: Any) -> Any:
    """The model itself, without a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_headless(model: nn.Module) -> bool:
    """Whether the model only computes hidden states, as `AutoModel` gives it."""
    return type(unwrapped(model)).__name__ in _headless_names()


def is_classifier(model: nn.Module) -> bool:
    """Whether the model has a head with a number of classes, by its name: `...Classification`."""
    return "Classification" in type(unwrapped(model)).__name__


def _headless_names() -> set[str]:
    known = auto.modeling_auto.MODEL_MAPPING_NAMES.values()
    names = {name for each in known for name in ([each] if isinstance(each, str) else each)}
    return {name for name in names if not _HEAD.search(name)}  # of some families AutoModel gives one with a head


def _gives_states(module: nn.Module) -> bool:
    """Whether the module is such a model, or of a class of one's own that is made from one."""
    return not _headless_names().isdisjoint(base.__name__ for base in type(module).__mro__)


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
    if is_watched(body):
        return lambda: None
    return body.register_forward_hook(_keep_output).remove


def is_watched(body: nn.Module) -> bool:
    """Whether the body is watched already."""
    return _keep_output in body._forward_hooks.values()


def _keep_output(module: nn.Module, args: Any, output: Any) -> None:
    if module.__dict__.pop(_KEEP, False):
        module.__dict__[_OUTPUT] = BaseModelOutputWithPooling(pooler_output=args[0]) if reads_rows(module) else output


def reads_rows(body: nn.Module) -> bool:
    """Whether the body is the last layer of a timm classifier, so that its input is the embedding."""
    return hasattr(body, "in_features")


def keep_next(body: nn.Module) -> None:
    """Ask a watched body to keep the output of its next forward."""
    body.__dict__[_KEEP] = True


def take_kept(body: nn.Module) -> Any:
    """The output that the body kept, once; a ValueError if it was not called."""
    if _OUTPUT not in body.__dict__:
        name = type(body).__name__
        late = "If it was replaced after the trainer was made, make a new one"
        raise ValueError(f"the model computes its output without calling its body, {name} as a whole. {late}.")
    return body.__dict__.pop(_OUTPUT)


def forget(body: nn.Module) -> None:
    """Undo a `keep_next` whose forward has failed; nothing is kept."""
    body.__dict__.pop(_KEEP, None)
    body.__dict__.pop(_OUTPUT, None)
