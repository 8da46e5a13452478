"""The layers of a student that learn from those of its teacher, and what is caught of them in a forward."""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_rrd.losses.layers import relation_terms, state_terms
from hf_rrd.models.body import body_of
from hf_rrd.models.embedding import fitting_mask
from hf_rrd.models.head import LAYERS, with_fields

WITH_LAYERS = "with_relational_layers"  # the keyword of a forward that asks for the layers
RELATION_HEADS = 48
"""At most so many relation heads compare queries, keys and values: as many of them as divide both widths."""

OWN_INPUT = (
    "`layer_weight` compares student and teacher token by token, so both must read the same input, and the data have "
    "columns of the teacher's own, {}. Leave them out where one tokenizer suits both, or set layer_weight=0."
)

_ASKED, _CAUGHT = "_hf_rrd_asked", "_hf_rrd_caught"  # on a module: whether to catch its next output, and what it was
_QUERY_KEY_VALUE = [
    rf"({short}|{long})(_proj|_lin)?" for short, long in (("q", "query"), ("k", "key"), ("v", "value"))
]
_IN_ONE = ("Wqkv", "in_proj")


class LayerPairs:
    """Which layers of a student learn from which of its teacher, and what is compared.

    Of one width it is the hidden states, as `state_terms` compares them, of every layer of the student: its i-th of k
    with the teacher's at the end of the i-th of k equal parts. Where the widths differ it is the queries, keys and
    values of the last layer of each, as `relation_terms` compares them.

    Args:
        student, teacher: transformers models, also inside PEFT.
        pairs: (student's layer, teacher's layer) each, counted from 0; None for those above.

    Attributes:
        student, teacher: What catches the layers of each.

    Raises:
        ValueError: The layers cannot be found, there is no such layer, or layers may be skipped at random.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, pairs: Sequence[Sequence[int]] | None = None) -> None:
        self._body: Any = body_of(student)
        sides = [_Side("student", self._body), _Side("teacher", body_of(teacher))]
        widths = [side.width for side in sides]
        self.of_states = widths[0] == widths[1]
        own, others = (len(side.layers) for side in sides)
        last = [(own - 1, others - 1)]
        even = [(place, max(0, round((place + 1) * others / own) - 1)) for place in range(own)]
        self.pairs = [(one, other) for one, other in pairs] if pairs else even if self.of_states else last
        if any(one >= own or other >= others for one, other in self.pairs):
            layers = f"from 0 to {own - 1} of the student and from 0 to {others - 1} of the teacher"
            raise ValueError(f"`layer_pairs` must name layers {layers}, got {pairs}.")
        if getattr(self._body.config, "layerdrop", 0):
            what = f"the student skips layers at random, with layerdrop={self._body.config.layerdrop}"
            raise ValueError(f"{what}, and `layer_weight` needs them all. Set its config's `layerdrop` to 0.")
        self.heads = next(count for count in range(RELATION_HEADS, 0, -1) if math.gcd(*widths) % count == 0)
        chosen = [[pair[place] for pair in self.pairs] for place in range(2)]
        caught = [side.caught(layers, self.of_states) for side, layers in zip(sides, chosen, strict=True)]
        self.student, self.teacher = LayerTap(student, caught[0]), LayerTap(teacher, caught[1])
        self._sides = sides

    def terms(self, student: Sequence[Tensor], teacher: Sequence[Tensor], inputs: dict[str, Any]) -> Tensor:
        """The mean over the pairs of their loss, of relations the sum of that of queries, keys and values, (batch,).

        Args:
            student, teacher: What was caught of each for the same batch.
            inputs: The batch, whose mask says which tokens count.
        """
        terms = []
        own, others = self._sides
        for one, other in zip(own.split(student), others.split(teacher), strict=True):
            mask, choices = fitting_mask(self._body, inputs, one)
            one, other = (_padded(each, mask) for each in (one, other))
            if one.shape[:2] != other.shape[:2]:
                came = f"got {tuple(one.shape[:2])} of the student and {tuple(other.shape[:2])} of the teacher"
                same = "`layer_weight` needs as many tokens on both sides, (batch, tokens)"
                raise ValueError(f"{same}, {came}. Give both the same input, or set layer_weight=0.")
            other = other.to(one.device)
            loss = state_terms(one, other, mask) if self.of_states else relation_terms(one, other, self.heads, mask)
            terms.append(loss if choices is None else loss.view(choices).mean(1))
        return torch.stack(terms).sum(0) / len(self.pairs)


class _Side:
    """The layers of one side's body, and how to read what is caught of them."""

    def __init__(self, name: str, body: Any) -> None:
        self.name, self.config = name, body.config
        self.width: Any = getattr(self.config, "hidden_size", None)
        stacks = [
            module
            for module in body.modules()
            if isinstance(module, nn.ModuleList)
            and len(module) == getattr(self.config, "num_hidden_layers", None)
            and any(weight.dim() == 2 for weight in module[0].parameters())  # of convolutions none is
        ]
        if len(stacks) != 1 or not isinstance(self.width, int):
            what = f"the {name}, {type(body).__name__}, has not one list of `num_hidden_layers` layers of one width"
            raise ValueError(f"`layer_weight` is above 0, and {what}. Set layer_weight=0.")
        self.layers: Any = stacks[0]
        self.in_one = ""  # the name of the module that gives query, key and value at once

    def caught(self, layers: list[int], states: bool) -> list[nn.Module]:
        """The modules whose outputs are caught: the layers, or the projections inside them."""
        if states:
            return [self.layers[layer] for layer in layers]
        found = []
        for layer in layers:
            inside = [*self.layers[layer].named_modules()]
            named = {name.rpartition(".")[2]: module for name, module in reversed(inside)}  # an adapter's outermost
            names = [name for name in named if name in _IN_ONE]
            self.in_one = names[0] if names else ""
            names = names or [name for each in _QUERY_KEY_VALUE for name in named if re.fullmatch(each, name)]
            if len(names) != (1 if self.in_one else 3):
                kind = f"the projections of its {type(self.layers[layer]).__name__} are not known"
                what = f"the {self.name} is not as wide as the other side, and {kind}"
                raise ValueError(f"`layer_weight` is above 0, {what}. Set layer_weight=0.")
            found += [named[name] for name in names]
        return found

    def split(self, caught: Sequence[Tensor]) -> list[Tensor]:
        """What is compared, one after the other: also of a projection that gives query, key and value in one."""
        if self.in_one == "in_proj":  # a DeBERTa's: for each attention head all three
            heads = self.config.num_attention_heads
            parts = [each.view(*each.shape[:-1], heads, -1).chunk(3, -1) for each in caught]
            return [part.flatten(-2) for three in parts for part in three]
        return [part for each in caught for part in each.chunk(3, -1)] if self.in_one else [*caught]


def _padded(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Hidden states with their padding, which a ModernBERT leaves out under flash attention."""
    if tokens.dim() != 2 or mask is None:
        return tokens
    whole = tokens.new_zeros(*mask.shape, tokens.shape[-1])
    whole[mask != 0] = tokens
    return whole


def for_all_weights(loss: Tensor, outputs: Any) -> Tensor:
    """A loss that reaches some weights of a model, with a gradient of 0 for those that its other outputs reach.

    Who gathers gradients (DDP, FSDP2) waits for those of all weights.
    """
    others = [each for each in outputs.values() if isinstance(each, Tensor) and each.requires_grad]
    return loss + 0 * others[0].sum() if others else loss


class LayerTap:
    """Catches the outputs of some modules of a model, while it is entered.

    A forward with the keyword `with_relational_layers=True` then has them as the field `relational_layers` of its
    output, a tuple: so a wrapper for data parallelism knows of them. A module that is called twice in a forward, as
    one whose activations are computed again, gives the first. Nothing else is kept.
    """

    def __init__(self, model: nn.Module, modules: list[nn.Module]) -> None:
        self.model, self.modules = model, modules
        self._hooks: list[Any] = []
        self._wanted = False

    def __enter__(self) -> None:
        self._hooks = [module.register_forward_hook(_catch) for module in {*self.modules}]
        self._hooks += [
            self.model.register_forward_pre_hook(self._ask, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(self._add, with_kwargs=True),
        ]

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        for module in self.modules:
            module.__dict__.pop(_ASKED, None)
            module.__dict__.pop(_CAUGHT, None)

    def _ask(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._wanted = kwargs.pop(WITH_LAYERS, False)
        for module in self.modules if self._wanted else ():
            module.__dict__[_ASKED] = "with a graph" if torch.is_grad_enabled() else "without"
        return args, kwargs

    def _add(self, model: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        if not self._wanted:
            return None
        caught = tuple(module.__dict__.get(_CAUGHT) for module in self.modules)
        if any(each is None for each in caught):
            raise ValueError("a layer that `layer_weight` compares was not called. Set layer_weight=0.")
        return with_fields(outputs, **{LAYERS: caught})


def _catch(module: nn.Module, args: Any, output: Any) -> None:
    asked = module.__dict__.pop(_ASKED, None)
    if asked == "with a graph" and not torch.is_grad_enabled():
        raise ValueError(
            "`layer_weight` needs the graph of a layer, which gradient checkpointing leaves out in its first forward. "
            "Set gradient_checkpointing_kwargs={'use_reentrant': False}."
        )
    if asked is not None:
        module.__dict__[_CAUGHT] = output[0] if isinstance(output, tuple) else output
