"""The losses of layers below the last: hidden states of tokens, or how tokens attend to each other.

Only `student` gets a gradient. Computed in float32 (float64 for a float64 student), also under autocast. Tokens that a
mask leaves out count for nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rrd.losses.rows import no_autocast, precise


def state_terms(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared difference of the hidden states of each token, as a mean over width and tokens.

    Each state is standardised over its width, as by a layer norm without weights: the loss is twice one minus their
    correlation, from 0 to 4, whatever the scale of a layer.

    Args:
        student: Hidden states, (batch, tokens, width).
        teacher: The same shape.
        mask: (batch, tokens), not 0 for the tokens that count; None for all.

    Returns:
        Of each example, (batch,).

    Raises:
        ValueError: The shapes differ.

    Source: the hidden states of Jiao et al., TinyBERT, arXiv:1909.10351, eq. 9, standardised.
    """
    _check_tokens(student, teacher)
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(f"states must have one width here, got {student.shape[-1]} and {teacher.shape[-1]}.")
    student = precise(student)
    with no_autocast(student.device.type):
        rows = [F.layer_norm(each, each.shape[-1:]) for each in (student, teacher.detach().to(student.dtype))]
        return _of_examples((rows[0] - rows[1]).square().mean(-1), mask)


def relation_terms(student: Tensor, teacher: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """`KL(teacher || student)` of how much each token's query is like those of all; or key, or value.

    Of each of the relation heads it is the softmax over the tokens of the products, divided by the root of the head's
    width. So the widths may differ, and how many attention heads there are does not matter.

    Args:
        student: Queries, keys or values, (batch, tokens, width).
        teacher: The same, of any width.
        heads: Relation heads, which divide both widths.
        mask: (batch, tokens), not 0 for the tokens that count; None for all.

    Returns:
        Of each example, the mean over heads and tokens, (batch,).

    Raises:
        ValueError: The tokens are not the same, or a width is not divisible.

    Source: Wang et al., MiniLMv2, arXiv:2012.15828, eqs. 4 to 7.
    """
    _check_tokens(student, teacher)
    if student.shape[-1] % heads or teacher.shape[-1] % heads:
        widths = f"{student.shape[-1]} and {teacher.shape[-1]}"
        raise ValueError(f"`heads` must divide the widths {widths}, got {heads}. Try a common divisor.")
    student = precise(student)
    with no_autocast(student.device.type):
        logs = []  # (batch, heads, tokens, tokens)
        for side in (student, teacher.detach().to(student.dtype)):
            parts = side.view(*side.shape[:2], heads, -1).transpose(1, 2)  # (batch, heads, tokens, width of a head)
            products = parts @ parts.transpose(-1, -2) / parts.shape[-1] ** 0.5
            if mask is not None:
                products = products.masked_fill(mask[:, None, None] == 0, torch.finfo(products.dtype).min)
            logs.append(products.log_softmax(-1))
        divergence = F.kl_div(logs[0], logs[1], reduction="none", log_target=True).sum(-1).mean(1)  # (batch, tokens)
        return _of_examples(divergence, mask)


def _check_tokens(student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 3 or student.shape[:2] != teacher.shape[:2]:
        came = f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"`student` and `teacher` must be of the same tokens, (batch, tokens, width), {came}.")


def _of_examples(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """From (batch, tokens) to the mean over those that count, (batch,); 0 where none does."""
    if mask is None:
        return tokens.mean(1)
    counted = mask != 0
    return tokens.masked_fill(~counted, 0).sum(1) / counted.sum(1).clamp(min=1)
