"""Pooling: from the hidden states of a model's body to one embedding per example."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# From a body's output (with `last_hidden_state`) and an attention mask, (batch, length) or None, to (batch, dim).
Pooler = Callable[[Any, Tensor | None], Tensor]

SHAPES = {3: "(batch, length, dim)", 4: "(batch, dim, height, width)"}  # of the hidden states of tokens, and of maps


def cls_pool(outputs: Any, attention_mask: Tensor | None = None) -> Tensor:
    """The first token's hidden state, (batch, dim)."""
    return _hidden(outputs, "cls")[:, 0]


def mean_pool(outputs: Any, attention_mask: Tensor | None = None) -> Tensor:
    """The mean over the unmasked tokens, or over all positions of a map; (batch, dim)."""
    hidden = _hidden(outputs, "mean", attention_mask, (3, 4))
    if hidden.dim() == 4:
        return hidden.mean((2, 3))
    if attention_mask is None:
        return hidden.mean(1)
    mask = attention_mask.to(hidden.dtype).unsqueeze(-1)  # (batch, length, 1)
    wide = torch.promote_types(hidden.dtype, torch.float32)  # a sum over tokens overflows float16
    return ((hidden * mask).sum(1, dtype=wide) / mask.sum(1, dtype=wide).clamp(min=1)).to(hidden.dtype)


def max_pool(outputs: Any, attention_mask: Tensor | None = None) -> Tensor:
    """The maximum over the unmasked tokens, or over all positions of a map; (batch, dim)."""
    hidden = _hidden(outputs, "max", attention_mask, (3, 4))
    if hidden.dim() == 4:
        return hidden.amax((2, 3))
    if attention_mask is not None:
        hidden = hidden.masked_fill((attention_mask == 0).unsqueeze(-1), torch.finfo(hidden.dtype).min)
    return hidden.amax(1)


def last_token_pool(outputs: Any, attention_mask: Tensor | None = None) -> Tensor:
    """The hidden state of the last unmasked token, whichever side is padded; (batch, dim)."""
    hidden = _hidden(outputs, "last_token", attention_mask)
    if attention_mask is None:
        return hidden[:, -1]
    positions = torch.arange(hidden.shape[1], device=attention_mask.device)
    last = ((attention_mask != 0) * positions).argmax(1)  # (batch,)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def pooler_pool(outputs: Any, attention_mask: Tensor | None = None) -> Tensor:
    """The body's own `image_embeds`, `text_embeds`, `audio_embeds` or `pooler_output`, flattened to (batch, dim)."""
    fields = ("image_embeds", "text_embeds", "audio_embeds", "pooler_output")
    pooled = next((each for name in fields if (each := getattr(outputs, name, None)) is not None), None)
    if pooled is None:
        raise ValueError("pooling 'pooler' needs a body that returns `pooler_output`; this one does not. Try 'mean'.")
    return torch.flatten(pooled, 1)


def gap_pool(outputs: Any, attention_mask: Tensor | None = None) -> Tensor:
    """Global average over the positions of a (batch, dim, height, width) map, (batch, dim)."""
    return _hidden(outputs, "gap", dims=(4,)).mean((2, 3))


POOLERS: dict[str, Pooler] = {
    "cls": cls_pool,
    "mean": mean_pool,
    "max": max_pool,
    "last_token": last_token_pool,
    "pooler": pooler_pool,
    "gap": gap_pool,
}


def name_of(pooling: str | Callable[..., Any]) -> str:
    """A pooling's name, also of a function."""
    return pooling if isinstance(pooling, str) else getattr(pooling, "__qualname__", type(pooling).__qualname__)


def _hidden(outputs: Any, pooling: str, mask: Tensor | None = None, dims: tuple[int, ...] = (3,)) -> Tensor:
    """The hidden states, checked to have one of these numbers of dimensions, and those of tokens against the mask."""
    hidden = getattr(outputs, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        needed = f"pooling needs a body that returns `last_hidden_state`, got {type(outputs).__name__}"
        instead = "Set return_dict=True" if isinstance(outputs, tuple) else "Pass a function as the pooling"
        raise ValueError(f"{needed}. {instead}.")
    shape = tuple(hidden.shape)
    if len(shape) not in dims:
        needed = " or ".join(SHAPES[dim] for dim in dims)
        instead = "Try 'mean'" if len(shape) in SHAPES else "Pass a function as the pooling"
        raise ValueError(f"pooling '{pooling}' needs hidden states of shape {needed}, got {shape}. {instead}.")
    if mask is not None and len(shape) == 3 and tuple(mask.shape) != shape[:2]:
        given = f"the `attention_mask`, {tuple(mask.shape)},"
        raise ValueError(f"{given} does not fit hidden states of shape {shape}. Pass a function as the pooling.")
    return hidden
