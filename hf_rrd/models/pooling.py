"""Pooling: from the hidden states of a model's body to one embedding per example."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Pooler = Callable[[Any, Tensor | None], Tensor]
"""From a body's output (with `last_hidden_state`) and an attention mask, (batch, length) or None, to (batch, dim)."""


def cls_pool(outputs: Any, attention_mask: Tensor | None = None) -> Tensor:
    """The first token's hidden state, (batch, dim)."""
    return _tokens(outputs, "cls")[:, 0]


def mean_pool(outputs: Any, attention_mask: Tensor | None = None) -> Tensor:
    """The mean over the unmasked tokens, or over all positions of a (batch, dim, height, width) map; (batch, dim)."""
    hidden = _hidden(outputs)
    if hidden.dim() == 4:
        return gap_pool(outputs)
    hidden = _tokens(outputs, "mean")
    if attention_mask is None:
        return hidden.mean(1)
    mask = _checked_mask(attention_mask, hidden).to(hidden.dtype).unsqueeze(-1)  # (batch, length, 1)
    wide = torch.promote_types(hidden.dtype, torch.float32)  # a sum over tokens overflows float16
    return ((hidden * mask).sum(1, dtype=wide) / mask.sum(1, dtype=wide).clamp(min=1)).to(hidden.dtype)


def max_pool(outputs: Any, attention_mask: Tensor | None = None) -> Tensor:
    """The maximum over the unmasked tokens, or over all positions of a map; (batch, dim)."""
    hidden = _hidden(outputs)
    if hidden.dim() == 4:
        return hidden.amax((2, 3))
    hidden = _tokens(outputs, "max")
    if attention_mask is not None:
        padding = _checked_mask(attention_mask, hidden) == 0
        hidden = hidden.masked_fill(padding.unsqueeze(-1), torch.finfo(hidden.dtype).min)
    return hidden.amax(1)


def last_token_pool(outputs: Any, attention_mask: Tensor | None = None) -> Tensor:
    """The hidden state of the last unmasked token, whichever side is padded; (batch, dim)."""
    hidden = _tokens(outputs, "last_token")
    if attention_mask is None:
        return hidden[:, -1]
    mask = _checked_mask(attention_mask, hidden)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = ((mask != 0) * positions).argmax(1)  # (batch,)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def pooler_pool(outputs: Any, attention_mask: Tensor | None = None) -> Tensor:
    """The body's own `pooler_output`, flattened to (batch, dim)."""
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is None:
        raise ValueError("pooling 'pooler' needs a body that returns `pooler_output`; this one does not. Try 'auto'.")
    return torch.flatten(pooled, 1)


def gap_pool(outputs: Any, attention_mask: Tensor | None = None) -> Tensor:
    """Global average over the positions of a (batch, dim, height, width) map, (batch, dim)."""
    hidden = _hidden(outputs)
    if hidden.dim() != 4:
        raise ValueError(
            "pooling 'gap' needs a (batch, dim, height, width) map, got hidden states of shape "
            f"{tuple(hidden.shape)}. Try 'mean'."
        )
    return hidden.mean((2, 3))


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


def _hidden(outputs: Any) -> Tensor:
    hidden = getattr(outputs, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"pooling needs a body that returns `last_hidden_state`, got {type(outputs).__name__}. Pass a callable "
            "as the pooling to read another output."
        )
    return hidden


def _tokens(outputs: Any, pooling: str) -> Tensor:
    hidden = _hidden(outputs)
    if hidden.dim() != 3:
        raise ValueError(
            f"pooling '{pooling}' needs hidden states of shape (batch, length, dim), got {tuple(hidden.shape)}. Try "
            "'auto'."
        )
    return hidden


def _checked_mask(attention_mask: Tensor, hidden: Tensor) -> Tensor:
    if attention_mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"the `attention_mask`, {tuple(attention_mask.shape)}, does not fit hidden states of shape "
            f"{tuple(hidden.shape)}. Pass a callable as the pooling."
        )
    return attention_mask
