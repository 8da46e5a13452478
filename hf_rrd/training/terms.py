"""The terms of the loss on their way into the log: sums on the device, read only when a line is written."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import default_compute_objective
from transformers.utils import logging

logger = logging.get_logger(__name__)

TERMS = ("task_loss", "kd_loss", "relational_loss", "relational_kl", "layer_loss")
"""The terms' names, in the order of the log."""

PERPLEXITY = "teacher_perplexity"  # over how many rows of the bank the target is spread

LOGGED = ("loss", *TERMS, PERPLEXITY)
"""What a log line has of the loss, in that order."""


def objective_without_terms(metrics: dict[str, float]) -> float:
    """transformers' default objective of a hyperparameter search: the loss, or the sum of the user's own metrics."""
    ours = tuple(f"_{name}" for name in (*TERMS, PERPLEXITY))
    parts = ("_alignment_", "_relational_", "_teacher_retrieval@")
    own = {
        name: value
        for name, value in metrics.items()
        if not name.endswith(ours) and not any(part in name for part in parts)
    }
    return float(default_compute_objective(own))


Weights = dict[str, float]  # by the names of the settings: `task_weight`, `kd_weight` and so on


LAYERS = 1.0
"""The weight of the layers' loss where it is automatic and there are some. That loss has a natural size: 0 to 4."""

HARD, GENTLE = 10.0, 0.3
"""How many times as hard as the task a teacher of the student's own classes pulls, by default; and any teacher of a
head that answers for each token, frame or pixel. Such a head does not read the embedding that is compared."""


def weights_by(args: Any, shares_classes: bool, has_one_answer: bool, has_layers: bool) -> Weights:
    """The weights that the settings give the terms, where the teacher's classes are learned or not, and layers."""
    of_embedding = HARD if shares_classes else 1.0
    automatic = {"kd_weight": float(shares_classes), "relational_weight": of_embedding if has_one_answer else GENTLE}
    automatic["layer_weight"] = LAYERS if has_layers else 0.0
    given = {name: getattr(args, name) for name in ("task_weight", *automatic)}
    return {name: automatic[name] if weight == "auto" else weight for name, weight in given.items()}


def weights_of(weights: Weights, terms: Iterable[str]) -> dict[str, float]:
    """The weights of the terms that have one, by their names."""
    return {name: weights[f"{name.removesuffix('_loss')}_weight"] for name in terms if name.endswith("_loss")}


def mean_of(term: Tensor) -> Tensor:
    """The mean of a term of each example; one that is a mean already costs no operation."""
    return term.mean() if term.dim() else term


def times(value: Tensor, factor: Any) -> Tensor:
    """A product; that with the number 1 costs no operation."""
    product: Tensor = value if not isinstance(factor, Tensor) and factor == 1 else value * factor
    return product


class TermLog:
    """What the terms came to since the last log line, and during an evaluation. Adding never waits for the device.

    Args:
        weights: Gives the weights of the terms as they are now.
    """

    def __init__(self, weights: Callable[[], Weights]) -> None:
        self.weights = weights
        self.start_training()
        self._evaluated: list[Tensor] = []
        self._evaluated_names: list[str] = []

    def start_training(self) -> None:
        """Forget an earlier training."""
        self.window: dict[str, list[Tensor]] = {}  # added up when they are read: no operation in a step
        self._steps: float | Tensor = 0.0  # of one process a number: no operation

    def add(self, parts: dict[str, Tensor], share: float | Tensor) -> None:
        """Add a micro-batch's part of each term of an optimizer step, and its share of the step.

        The shares of a step add up to 1, in the mean over the processes.
        """
        for name, part in parts.items():
            values = self.window.setdefault(name, [])
            values.append(part.detach())
            if len(values) > 1000:
                values[:] = [_sum(values)]
        self._steps = self._steps + share

    def not_finite(self) -> list[str]:
        """The terms that were nan or inf since the last line."""
        return [name for name in TERMS if name in self.window and not _sum(self.window[name]).isfinite()]

    def line(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The mean of each term per optimizer step since the last line, with `teacher_perplexity`; ends the window.

        Args:
            reduce: From this process's sums to their mean over the processes, in one collective.
        """
        window, steps = {name: _sum(values) for name, values in self.window.items()}, self._steps
        self.start_training()
        names = [name for name in TERMS if name in window]
        names += [name for name in window if name not in TERMS]
        if not names:
            return {}
        device = window[names[0]].device
        window["steps"] = torch.as_tensor(steps, dtype=torch.float32)
        sums = reduce(torch.stack([window[name].to(device) for name in (*names, "steps")]))
        return _with_perplexity(dict(zip(names, (sums[:-1] / sums[-1]).tolist(), strict=True)))

    def start_evaluation(self) -> None:
        """Forget an earlier evaluation."""
        self._evaluated = []

    def add_evaluated(self, terms: dict[str, Tensor], examples: int, gather: Callable[[Tensor], Tensor]) -> None:
        """Add the terms of an evaluated batch; `gather` gives the rows of all processes, without duplicates."""
        rows = torch.stack([term.detach().float().expand(examples) for term in terms.values()], dim=1)
        self._evaluated.append(gather(rows))
        self._evaluated_names = [*terms]

    def evaluated(self, description: str = "") -> dict[str, float]:
        """The mean of each term over all examples, and the weighted sum of these as `loss`.

        The Trainer's own sum counts examples twice that fill up the last batch of several processes. `description` is
        the Trainer's: "Evaluation", or else.
        """
        if not self._evaluated:
            if self.weights()["task_weight"] > 0 and description == "Evaluation":
                logger.warning(
                    "An evaluation without labels, with `task_weight` above 0: it has no loss, no terms and no "
                    "alignment. Does the data set have the column of the training set's labels?"
                )
            return {}
        means = torch.cat(self._evaluated).double().mean(0).tolist()
        terms = _with_perplexity(dict(zip(self._evaluated_names, means, strict=True)))
        return {
            "loss": sum(weight * terms[name] for name, weight in weights_of(self.weights(), terms).items()),
            **terms,
        }


def _sum(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum(dtype=torch.float32)


def _with_perplexity(means: dict[str, float]) -> dict[str, float]:
    # A relational loss less its divergence is the entropy of the teacher's distribution.
    if "relational_kl" in means:
        means[PERPLEXITY] = math.exp(means.get("relational_rrd", means["relational_loss"]) - means["relational_kl"])
    return means
