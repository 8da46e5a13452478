"""How hard the teacher pulls at a student: its relational terms against the task, where their gradients meet."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_rrd.training.terms import times

START = 1e-3
"""What the relational terms' gradient is multiplied by until it was measured."""

WINDOW = 10
"""Steps over which the pull of the relational terms and the mean of the student's embeddings are averaged."""


class Balance:
    """Scales the relational terms so that at the student their gradient is as long as that of task and KD.

    The two meet at the student's hidden states, which both its own head and the comparison read. There `split` makes
    one tensor two, and its backward pass measures the gradient of each. The gradient of the relational loss is
    multiplied by `factor`, their ratio in the steps before: so a step is the same however its batch is cut, the device
    is never waited for, and what is minimised is a weighted mean of losses, for the projection as for the student.

    Of the task it is the mean norm over all steps so far: a task that is learned by heart pulls no more, and its
    teacher shall go on. Of the relational terms it is a moving average, of their loss before its weight and scale, so
    that a weight may change from step to step. Where the task does not pull at all, nothing is scaled.

    Args:
        width: Of the student's embedding, whose moving average is measured, too.

    Attributes:
        steps: So far.
        measured: Pull of the task, pull of the relational terms of weight 1, mean square of the length of the
            student's rows, mean of its embedding; (3 + width,).
        factor: What the relational terms' gradient is multiplied by in the next step, a scalar.
    """

    def __init__(self, width: int) -> None:
        self.steps = 0
        self.measured = torch.zeros(3 + width)
        self.factor = torch.tensor(START)
        self._squares = torch.zeros(2, requires_grad=True)  # whose gradient is what was measured
        self._rows: list[Tensor] | None = None  # a step's sums, (1,) and (width,)

    @property
    def mean(self) -> Tensor:
        """The moving average of the student's embedding, (width,)."""
        return self.measured[3:]

    @property
    def row_norm(self) -> Tensor:
        """The moving average of the length of the student's projected rows, in the quadratic mean, a scalar."""
        return self.measured[2].sqrt()

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """A tensor as two equal ones: for the student's own head and for the comparison."""
        return _at_border(hidden, self._squares)

    def add(self, embedding: Tensor, rows: Tensor) -> None:
        """Add the student's embeddings of a micro-batch, (batch, width), and these projected, (batch, dim)."""
        norm = torch.linalg.vector_norm(rows.detach(), dtype=torch.float32)
        sums = [norm.square().view(1), embedding.detach().sum(0, dtype=torch.float32)]
        self._rows = sums if self._rows is None else [one + other for one, other in zip(self._rows, sums, strict=True)]

    def clear(self) -> None:
        """Forget all."""
        self.steps = 0
        self.measured.zero_()
        self.factor.fill_(START)
        self._squares.grad = self._rows = None

    def to(self, device: torch.device) -> None:
        """Move all to a device."""
        self.measured, self.factor = self.measured.to(device), self.factor.to(device)
        self._squares = torch.zeros(2, device=device, requires_grad=True)

    @torch.no_grad()
    def update(
        self,
        weight: float,
        examples: float | Tensor,
        total: Callable[[Tensor], Tensor],
        scale: float,
        may_overflow: bool = False,
    ) -> None:
        """End an optimizer step. All is small: it takes as long as it has operations.

        Args:
            weight: What the relational loss was multiplied by, 0 or more: how many times as hard as the task it pulls.
            examples: Of the step, on all processes.
            total: From this process's sums, (3 + width,), to those of all processes.
            scale: What gradients were multiplied by: the processes, and what a loss scaler adds to that.
            may_overflow: The step may be one that a loss scaler skips, as it overflowed: then it does not count. Other
                steps that are not finite count as one like those before, without waiting for the device.
        """
        squares = torch.zeros_like(self._squares) if self._squares.grad is None else self._squares.grad
        rows = [torch.zeros_like(self.measured[2:])] if self._rows is None else self._rows
        sums = total(torch.cat([squares, *(each.to(squares.device) for each in rows)]))
        self._squares.grad = self._rows = None
        if may_overflow and not bool(sums.sum().isfinite()):  # who asks a scaler for its scale has waited already
            return
        self.steps += 1
        share = 1 / min(self.steps, WINDOW)
        sums[:2].sqrt_().div_(scale)
        sums[2:].div_(examples)
        if weight:
            sums[1:2].div_(self.factor * weight)
        new, before = torch.where(sums.sum().abs() < torch.inf, sums, self.measured), self.measured[1:2]
        self.measured[:1].lerp_(new[:1], 1 / self.steps)
        if weight:
            shares = torch.where(before > 0, share, 1.0).to(before.dtype)  # the first that pulled counts whole
            before.lerp_(new[1:2], shares)
        self.measured[2:].lerp_(new[2:], share)
        (task, relation), (no_task, no_relation) = self.measured[:2].unbind(), (self.measured[:2] <= 0).unbind()
        self.factor = (task / relation).masked_fill_(no_relation, START).masked_fill_(no_task, 1.0)

    def state_dict(self) -> dict[str, Tensor]:
        """All there is to save: `measured`, after the steps, (4 + width,), and `factor`, (1,)."""
        steps = self.measured.new_full((1,), self.steps)
        return {"measured": torch.cat([steps, self.measured]), "factor": self.factor.clone().view(1)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what was saved; a ValueError if it is of another student."""
        if {name: each.shape for name, each in state.items()} != {
            "measured": (1 + len(self.measured),),
            "factor": (1,),
        }:
            raise ValueError("the saved balance of the losses is of another student, or lost. Start a new run.")
        self.clear()
        self.steps = int(state["measured"][0])
        self.measured = state["measured"][1:].to(self.measured, copy=True)
        self.factor = state["factor"].to(self.factor, copy=True).squeeze(0)


class _WeightedSum(torch.autograd.Function):
    """`weighted_sum`."""

    @staticmethod
    def forward(ctx: Any, weights: list[float], factors: list[float | Tensor], *losses: Tensor) -> Tensor:
        ctx.factors = factors
        parts = [times(loss, weight) for weight, loss in zip(weights, losses, strict=True)]
        return sum(parts[1:], parts[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(times(grads[0], factor) for factor in ctx.factors)


class _Border(torch.autograd.Function):
    """One tensor as two, and in the backward pass the sum of their gradients and the sums of their squares."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        ctx.place = squares.device
        return hidden.view_as(hidden), hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, task: Tensor, relation: Tensor) -> tuple[Tensor, Tensor]:
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in (task, relation)]  # without a copy
        return task + relation, torch.stack(norms).square_().to(ctx.place)


_at_border: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _Border.apply


def weighted_sum(weights: list[float], factors: list[float | Tensor], losses: list[Tensor]) -> Tensor:
    """The sum of scalar losses, each times its weight; in its gradient each is times its factor instead."""
    total: Tensor = _WeightedSum.apply(weights, factors, *losses)  # type: ignore[no-untyped-call]
    return total
