"""The body of a transformers model: the part that computes hidden states, and how to read its output."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models import auto  # whose `modeling_auto` is loaded when it is used
from transformers.utils import ModelOutput, logging

logger = logging.get_logger(__name__)

Split = Callable[[Tensor], tuple[Tensor, Tensor]]  # one tensor as two: what goes on in a model, what is pooled

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
    if name.endswith(("ForConditionalGeneration", "EncoderDecoderModel")) and model.config.is_encoder_decoder:
        why = "its decoder's states have no mask of their own. Use the family's encoder or its classifier, or "
        why += "relational_weight=0, with which its logits alone are compared"
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
    inner = [each for each in model.children() if (has_head and _has_config(each)) or (own and _gives_states(each))]
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


# ---- What a head reads ----


@torch.random.fork_rng(devices=[])  # a model may drop layers by a draw, and draw in evaluation, too
@torch.no_grad()
def reader_of(model: nn.Module, inputs: dict[str, Any]) -> tuple[nn.Module, int] | None:
    """The module whose input is what a classifier's last layer reads, one row an example, and the width of that.

    It is that layer, or a dropout right before it. None of a model whose logits do not come from such a layer: it has
    no head, or one that reads tokens or maps. Found in a forward with these `inputs` of one example.
    """
    calls: list[tuple[nn.Module, Any, Any]] = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: calls.append((module, (*args, None)[0], output)))
        for module in model.modules()
        if not list(module.children()) or reads_rows(module)  # as one that an adapter is around
    ]
    training = model.training
    try:
        logits = getattr(model.eval()(**inputs), "logits", None)
    except Exception as error:  # it takes other inputs than its body, or its weights are elsewhere
        if is_classifier(model):
            logger.warning_once(
                f"{type(model).__name__} could not be run on a blank example ({error}), so what its classifier reads "
                "is not known: where that is asked for, its embedding is pooled as without a head."
            )
        return None
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    times = Counter(id(module) for module, *_ in calls)
    last = next((place for place, (_, _, output) in enumerate(calls) if logits is not None and output is logits), 0)
    if last == 0 or not isinstance(read := calls[last][1], Tensor) or read.dim() != 2 or len(read) != 1:
        return None
    dropout, _, dropped = calls[last - 1]
    reader = calls[last][0]
    if isinstance(dropout, nn.Dropout) and dropped.data_ptr() == read.data_ptr():  # it gives what it got
        reader = dropout if times[id(dropout)] == 1 else reader
    return (reader, read.shape[1]) if times[id(reader)] == 1 and reads_rows(reader) else None


# ---- Its output ----


def watch(body: nn.Module) -> Callable[[], None]:
    """Let the body keep its next output whenever `keep_next` asked for it; returns what undoes a first watching.

    The hook reads the module that it is handed, never one that it closed over, so that copies and replicas work.
    """
    if is_watched(body):
        return lambda: None
    if reads_rows(body):
        return body.register_forward_pre_hook(_keep_input).remove
    return body.register_forward_hook(_keep_output).remove


def is_watched(body: nn.Module) -> bool:
    """Whether the body is watched already."""
    return _keep_output in body._forward_hooks.values() or _keep_input in body._forward_pre_hooks.values()


def _keep_output(module: nn.Module, args: Any, output: Any) -> Any:
    if not (split := module.__dict__.pop(_KEEP, False)):
        return None
    if split is True or not isinstance(output, ModelOutput):
        module.__dict__[_OUTPUT] = output
        return None
    whole = dict(output.items())
    parts = {name: split(each) for name, each in whole.items() if isinstance(each, Tensor) and each.requires_grad}
    module.__dict__[_OUTPUT] = type(output)(**whole | {name: part[1] for name, part in parts.items()})
    return type(output)(**whole | {name: part[0] for name, part in parts.items()})


def _keep_input(module: nn.Module, args: Any) -> Any:
    if not (split := module.__dict__.pop(_KEEP, False)):
        return None
    onwards, kept = (args[0], args[0]) if split is True else split(args[0])
    module.__dict__[_OUTPUT] = BaseModelOutputWithPooling(pooler_output=kept)
    return onwards, *args[1:]


def reads_rows(body: nn.Module) -> bool:
    """Whether the module is a layer of a classifier, whose input is the embedding."""
    return isinstance(body, nn.Dropout) or hasattr(body, "in_features")


def keep_next(body: nn.Module, split: Split | bool = True) -> None:
    """Ask a watched body to keep the output of its next forward, or of what `split` gives the part that is for us."""
    body.__dict__[_KEEP] = split


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
