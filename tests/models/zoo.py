"""Small models of all classes of the installed transformers, from shrunken configs, and inputs that they take."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

_SMALL = {
    16: "projection_dim image_size",
    32: "hidden_size d_model dim n_embd embed_dim embedding_size emb_dim moe_intermediate_size",
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers depth",
    4: "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_key_value_heads num_local_experts n_routed_experts",
    8: "head_dim d_kv rotary_dim patch_size",
    64: "intermediate_size d_ff ffn_dim hidden_dim encoder_ffn_dim decoder_ffn_dim n_inner mlp_dim vocab_size "
    "max_position_embeddings n_positions d_inner",
}
_SIZES = {name: size for size, names in _SMALL.items() for name in names.split()}
_FEWER = {name for size in (2, 64) for name in _SMALL[size].split()} - {"max_position_embeddings"}  # and nothing else
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "cls_token_id", "sep_token_id")
MOST = 30_000_000  # weights of a model that is run


def headless_names() -> set[str]:
    """The classes that `AutoModel` gives."""
    given = modeling_auto.MODEL_MAPPING_NAMES.values()
    return {name for each in given for name in ([each] if isinstance(each, str) else each)}


def model_classes() -> Iterator[type[PreTrainedModel]]:
    """All of transformers', by name."""
    for name in sorted(set(dir(transformers))):
        try:
            found = getattr(transformers, name, None)
        except Exception:  # of a library that is not installed
            continue
        is_model = isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is not None
        if is_model and found.__module__.startswith("transformers.models.") and "PreTrained" not in name:
            yield found


def body_on_meta(model_class: type[PreTrainedModel], body_of: Any) -> tuple[Any, Any] | None:
    """A model without memory, from the config as it comes, and its body; None where there is no such config."""
    try:
        with torch.device("meta"):
            model = model_class(model_class.config_class())
    except Exception:
        return None
    return model, body_of(model)


def _shrunk(config: PreTrainedConfig, sizes: set[str]) -> dict[str, Any]:
    names = {*inspect.signature(type(config).__init__).parameters, *getattr(config, "__dataclass_fields__", ())}
    given: dict[str, Any] = {}
    for name in sorted(names):
        try:
            value = getattr(config, name, None)
        except Exception:
            continue
        if isinstance(value, PreTrainedConfig):
            small = type(value)(**_shrunk(value, sizes))
            given[name] = small if name == "backbone_config" else small.to_dict()
        elif name in sizes and type(value) is int and value > _SIZES[name]:
            given[name] = _SIZES[name]
        elif name in _TOKENS and isinstance(value, int) and value >= 64:
            given[name] = 1
    return given


def small_model(
    model_class: type[PreTrainedModel], inputs_wanted: bool = True
) -> tuple[Any, dict[str, Tensor] | None]:
    """A model of random weights and inputs of two examples that it takes; None of either where it has none."""
    for sizes in (set(_SIZES), set(_SIZES) - {"head_dim", "image_size", "patch_size"}, _FEWER, set()):
        try:
            config = model_class.config_class(**_shrunk(model_class.config_class(), sizes))
            with torch.device("meta"):
                count = sum(weight.numel() for weight in model_class(config).parameters())
            if count > MOST:
                continue
            torch.manual_seed(0)
            model = model_class(config).eval()
        except Exception:
            continue
        for inputs in _tries(model):
            try:
                with torch.no_grad():
                    model(**inputs)
            except Exception:
                continue
            return model, inputs
    return None, None


def _tries(model: Any) -> Iterator[dict[str, Tensor]]:
    taken = inspect.signature(model.forward).parameters
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    text = {"input_ids": torch.randint(2, 50, (2, 8)) * mask, "attention_mask": mask}
    text |= {"decoder_input_ids": text["input_ids"]} if "decoder_input_ids" in taken else {}
    text |= {"bbox": torch.zeros(2, 8, 4, dtype=torch.long)} if "bbox" in taken else {}
    vision = getattr(model.config, "vision_config", model.config)
    size = getattr(vision, "image_size", 64)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    if not isinstance(height, int) or height > 512 or not isinstance(channels, int):
        height = width = 64
        channels = 3
    image = {"pixel_values": torch.randn(2, channels, height, width)}
    frames = {"pixel_values": torch.randn(2, getattr(vision, "num_frames", 2) or 2, channels, height, width)}
    bins = getattr(model.config, "num_mel_bins", 80)
    features = [torch.randn(2, bins, 3000), torch.randn(2, 64, bins), torch.randn(2, 1024, bins)]
    if "input_features" in taken:
        yield from ({"input_features": each} for each in features)
    if "input_values" in taken:
        yield {"input_values": torch.randn(2, 16_000)}
        yield from ({"input_values": each} for each in features[1:])
    if "pixel_values" in taken and "input_ids" in taken:
        yield text | image
    if "pixel_values" in taken:
        yield image
        yield {"pixel_values": torch.randn(2, channels, 64, 64)}
        yield {"pixel_values": torch.randn(2, channels, 224, 224)}
        yield frames
        patches = {"pixel_values": torch.randn(2, 16, 768), "spatial_shapes": torch.tensor([[4, 4], [2, 5]])}
        yield patches | {"pixel_attention_mask": (torch.arange(16) < torch.tensor([[16], [10]])).long()}
    if "pixel_values_videos" in taken:
        yield {"pixel_values_videos": frames["pixel_values"]}
    if "input_ids" in taken:
        yield text
        yield {"input_ids": torch.randint(2, 50, (2, 64)), "attention_mask": torch.ones(2, 64, dtype=torch.long)}
        yield {"input_ids": text["input_ids"]}
