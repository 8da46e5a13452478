"""The poolers against loops."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rrd.models.pooling import POOLERS, cls_pool, gap_pool, last_token_pool, max_pool, mean_pool, pooler_pool

MASKS = {
    "none": None,
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0]],
}


def hidden_states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output(hidden: Any, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(last_hidden_state=hidden, **more)


def naive_pool(name: str, hidden: Tensor, mask: list[list[int]] | None) -> list[list[float]]:
    pooled = []
    for i, tokens in enumerate(hidden.tolist()):
        seen = [token for t, token in enumerate(tokens) if mask is None or mask[i][t]]
        columns = list(zip(*seen, strict=True))
        pooled.append(
            {
                "cls": tokens[0],
                "mean": [sum(column) / len(column) for column in columns],
                "max": [max(column) for column in columns],
                "last_token": seen[-1],
            }[name]
        )
    return pooled


@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool, torch.float32])
@pytest.mark.parametrize("name", ["cls", "mean", "max", "last_token"])
def test_a_pooler_of_tokens_equals_a_loop_over_the_unmasked_ones(
    name: str, mask_dtype: torch.dtype, mask_name: str
) -> None:
    hidden = hidden_states(3, 5, 4) - 3.0  # mostly negative, so that a padding of 0 would be seen in a maximum
    mask = MASKS[mask_name]
    pooled = POOLERS[name](output(hidden), None if mask is None else torch.tensor(mask).to(mask_dtype))
    expected = torch.tensor(naive_pool(name, hidden, mask), dtype=torch.float64)
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["mean", "max", "last_token"])
def test_what_stands_under_the_padding_does_not_matter(name: str, side: str) -> None:
    mask = torch.tensor(MASKS[side])
    hidden = hidden_states(3, 5, 4)
    other = torch.where(mask.unsqueeze(-1) == 0, 1e6, hidden)
    assert torch.equal(POOLERS[name](output(hidden), mask), POOLERS[name](output(other), mask))


@pytest.mark.parametrize("name", ["mean", "max", "gap"])
def test_a_pooler_of_maps_equals_a_loop_over_their_positions(name: str) -> None:
    hidden = hidden_states(2, 3, 4, 5)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for i in range(2):
        for channel in range(3):
            values = [float(hidden[i, channel, y, x]) for y in range(4) for x in range(5)]
            expected[i, channel] = max(values) if name == "max" else sum(values) / 20
    torch.testing.assert_close(POOLERS[name](output(hidden), None), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1, 1)])
def test_the_bodys_own_pooled_output_comes_as_one_row_per_example(shape: tuple[int, ...]) -> None:
    pooled = hidden_states(*shape)
    assert torch.equal(pooler_pool(output(None, pooler_output=pooled)), pooled.reshape(2, 3))


@pytest.mark.parametrize(
    ("pooler", "outputs", "mask_shape", "message"),
    [
        (
            cls_pool,
            output(hidden_states(2, 3, 4, 4)),
            None,
            r"'cls' needs .* \(batch, length, dim\), got \(2, 3, 4, 4",
        ),
        (mean_pool, output(hidden_states(2, 3)), None, r"'mean' needs .* \(batch, length, dim\) or .*, got \(2, 3\)"),
        (
            mean_pool,
            output(hidden_states(2, 3)),
            (2, 3),
            r"'mean' needs .* \(batch, length, dim\) or .*, got \(2, 3\)",
        ),
        (mean_pool, output(hidden_states(2, 3, 2, 2, 2)), (2, 3), r"'mean' needs .*, got \(2, 3, 2, 2, 2\)"),
        (max_pool, output(hidden_states(2, 3)), (2, 3), r"'max' needs .* \(batch, length, dim\) or .*, got \(2, 3\)"),
        (last_token_pool, output(hidden_states(2, 3, 4, 4)), None, "'last_token' needs hidden states of shape"),
        (
            gap_pool,
            output(hidden_states(2, 3, 4)),
            None,
            r"'gap' needs .* width\), got \(2, 3, 4\). Try 'mean'",
        ),
        (pooler_pool, output(hidden_states(2, 3, 4)), None, "'pooler' needs a body that returns `pooler_output`"),
        (pooler_pool, output(None, pooler_output=None), None, "'pooler' needs a body that returns `pooler_output`"),
        (
            mean_pool,
            output(hidden_states(2, 3, 4)),
            (2, 5),
            r"`attention_mask`, \(2, 5\), does not fit .* \(2, 3, 4\)",
        ),
        (max_pool, output(hidden_states(2, 3, 4)), (2, 5), r"`attention_mask`, \(2, 5\), .* \(2, 3, 4\)"),
        (last_token_pool, output(hidden_states(2, 3, 4)), (1, 3), r"`attention_mask`, \(1, 3\), does not fit"),
        (mean_pool, SimpleNamespace(logits=1), None, "returns `last_hidden_state`, got SimpleNamespace"),
        (cls_pool, output((hidden_states(2, 3, 4),)), None, "returns `last_hidden_state`, got SimpleNamespace"),
    ],
)
def test_a_pooler_says_what_it_needs_and_what_came(
    pooler: Callable[..., Tensor], outputs: Any, mask_shape: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pooler(outputs, None if mask_shape is None else torch.ones(mask_shape))
