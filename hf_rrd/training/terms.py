"""The terms of the loss on their way into the log: sums on the device, read only when a line is written."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

TERMS = ("task_loss", "kd_loss", "relational_loss", "relational_kl")
"""The terms' names, in the order of the log."""

PERPLEXITY = "teacher_perplexity"
"""Over how many rows of the bank the target is spread; logged beside the relational loss."""

LOGGED = ("loss", *TERMS, PERPLEXITY)
"""What a log line has of the loss, in that order."""

NEAR_ONE = 1.1
"""Below this perplexity the teacher's distribution counts as certain."""


class TermLog:
    """What the terms came to since the last log line, and during an evaluation.

    Adding never waits for the device. The window between two log lines is part of a checkpoint, so that the line after
    a resumption says the same as it would have without one.
    """

    def __init__(self) -> None:
        self.window: dict[str, Tensor] = {}
        self.lines_near_one = 0  # on end
        self._evaluated: list[Tensor] = []
        self._evaluated_names: list[str] = []

    def add(self, terms: dict[str, Tensor], share: float | Tensor) -> None:
        """Add a micro-batch.

        Args:
            terms: Each example's terms, or their mean.
            share: The micro-batch's part of its optimizer step; the parts of a step add up to 1, in the mean over the
                processes.
        """
        for name, term in terms.items():
            self._sum(name, term.detach().float().mean() * share)
        self._sum("steps", torch.as_tensor(share, dtype=torch.float32))

    def add_loss(self, loss: Tensor) -> None:
        """Add what a micro-batch gave to the Trainer's own sum of losses."""
        self._sum("loss", loss)

    def _sum(self, name: str, value: Tensor) -> None:
        self.window[name] = self.window[name] + value if name in self.window else value

    def not_finite(self) -> list[str]:
        """The terms that were nan or inf since the last line."""
        return [name for name in TERMS if name in self.window and not self.window[name].isfinite()]

    def state(self, across: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The sums over the processes, in one collective.

        Args:
            across: From this process's sums, (names,), to what is wanted of all: their mean, (names,), or all of them,
                (processes, names).

        Returns:
            By name, a scalar or (processes,).
        """
        if not self.window:
            return {}
        device = next(iter(self.window.values())).device
        sums = across(torch.stack([value.to(device) for value in self.window.values()]))
        return dict(zip(self.window, sums.unbind(-1), strict=True))

    def load_state(self, state: dict[str, Tensor], process: int, processes: int, device: torch.device) -> None:
        """Take over the sums of all processes, (processes,) by name: each its own; of another number their mean."""
        self.window = {
            name: (sums[process] if sums.shape == (processes,) else sums.mean()).to(device)
            for name, sums in state.items()
        }

    def line(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The mean of each term per optimizer step since the last line, which ends the window.

        With the relational loss comes `teacher_perplexity`: how many rows of the bank the target is spread over.
        """
        sums, self.window = self.state(reduce), {}
        names = [name for name in TERMS if name in sums]
        if not names:
            return {}
        means = torch.stack([sums[name] for name in names]) / sums["steps"]
        line = _with_perplexity(dict(zip(names, means.tolist(), strict=True)))
        self.lines_near_one = self.lines_near_one + 1 if line.get(PERPLEXITY, NEAR_ONE) < NEAR_ONE else 0
        return line

    def start_evaluation(self) -> None:
        """Forget an earlier evaluation."""
        self._evaluated = []

    def add_evaluated(self, terms: dict[str, Tensor], examples: int, gather: Callable[[Tensor], Tensor]) -> None:
        """Add an evaluated batch.

        Args:
            terms: Each example's terms, (batch,), or their mean.
            examples: How many there are.
            gather: From this process's rows, (batch, terms), to those of all processes, without duplicates.
        """
        rows = torch.stack([term.detach().float().expand(examples) for term in terms.values()], dim=1)
        self._evaluated.append(gather(rows))
        self._evaluated_names = [*terms]

    def evaluated(self) -> dict[str, float]:
        """The mean of each term over all examples of the evaluation."""
        if not self._evaluated:
            return {}
        means = torch.cat(self._evaluated).mean(0).tolist()
        return _with_perplexity(dict(zip(self._evaluated_names, means, strict=True)))


def _with_perplexity(means: dict[str, float]) -> dict[str, float]:
    # The relational loss less its divergence is the entropy of the teacher's distribution: nothing more to compute.
    if "relational_kl" in means:
        means[PERPLEXITY] = math.exp(means["relational_loss"] - means["relational_kl"])
    return means
