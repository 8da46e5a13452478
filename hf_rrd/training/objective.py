"""The objective: three terms, their weights, and the order in which an example meets the bank. No parameters."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hf_rrd.losses.bank import FeatureBank
from hf_rrd.losses.in_batch import BATCH_LOSSES
from hf_rrd.losses.relational import infonce_terms, logit_terms, relational_terms

RELATIONAL_LOSSES = ("rrd", "infonce", *BATCH_LOSSES)
"""The values of `relational_loss=`: the first two compare with the bank, the others within the micro-batch."""

RAW_LOSSES = ("rkd_distance", "rkd_angle", "similarity_preserving", "mse")
"""Those whose papers take embeddings as they are; the others get unit rows."""


@dataclass
class DistillationObjective:
    """`task_weight * task + kd_weight * KD(kd_temperature) + relational_weight * relational(...)`.

    Each example is compared with the bank as it was before the step, plus one column of its own. Rows wait in
    `pending` until `update_bank` is called, once per optimizer step: so a step is the same however its batch was cut.

    The fields are those of `RelationalDistillationConfig`; `bank` is None when the relational term is off.
    """

    task_weight: float
    kd_weight: float
    kd_temperature: float
    relational_weight: float
    relational_loss: str
    student_temperature: float
    teacher_temperature: float
    teacher_perplexity: float | None
    include_own: bool
    bank: FeatureBank | None

    def __post_init__(self) -> None:
        self.pending: list[Tensor] = []

    def relational_terms(self, student: Tensor, teacher: Tensor, training: bool) -> dict[str, Tensor]:
        """Compare with the bank and, in training, remember the teacher's rows for it.

        Args:
            student: Rows, (batch, dim): unit, but for `RAW_LOSSES`.
            teacher: The same.
            training: Evaluation leaves the bank as it is.

        Returns:
            `relational_loss`, and of "rrd" also `relational_kl`: of each example, (batch,), or their mean.
        """
        if self.relational_loss in BATCH_LOSSES:
            return {"relational_loss": BATCH_LOSSES[self.relational_loss](student, teacher)}
        assert self.bank is not None
        # With no bank, or in an evaluation before the first step, the micro-batch itself is the bank. Own keys are in
        # it.
        within_batch = self.bank.size == 0 or (len(self.bank) == 0 and not training)
        bank, include_own = (teacher, False) if within_batch else (self.bank.filled, self.include_own)
        if training and self.bank.size > 0:
            self.pending.append(teacher.detach())
        if self.relational_loss == "infonce":
            own = include_own or not within_batch
            return {"relational_loss": infonce_terms(student, teacher, bank, self.student_temperature, own)}
        loss, divergence = relational_terms(
            student,
            teacher,
            bank,
            self.student_temperature,
            self.teacher_temperature,
            include_own,
            self.teacher_perplexity,
        )
        return {"relational_loss": loss, "relational_kl": divergence}

    def kd_terms(self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """`kd_loss` of each example, (batch,), from (batch, classes) or masked (batch, length, classes) logits."""
        terms = logit_terms(student_logits, teacher_logits, self.kd_temperature)
        if terms.dim() > 1:
            mask = torch.ones_like(terms) if mask is None or mask.shape != terms.shape else mask.to(terms.dtype)
            terms = (terms * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)
        return {"kd_loss": terms}

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the terms' means, a scalar. `relational_kl` is for reading and has no weight."""
        weights = {
            "task_loss": self.task_weight,
            "kd_loss": self.kd_weight,
            "relational_loss": self.relational_weight,
        }
        return torch.stack([weights[name] * term.mean() for name, term in terms.items() if name in weights]).sum()

    def update_bank(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Put the rows of the finished step into the bank.

        Args:
            gather: From this process's rows, (n, dim), to those of all processes.
        """
        if self.bank is not None and self.pending:
            self.bank.enqueue(gather(torch.cat(self.pending)))
        self.pending.clear()

    def reset(self) -> None:
        """Forget the bank and what waits for it: a new run starts."""
        self.pending.clear()
        if self.bank is not None:
            self.bank.clear()


def settings_of(args: Any) -> dict[str, Any]:
    """Those of a `RelationalDistillationConfig` that the objective reads, by their common names."""
    return {each.name: getattr(args, each.name) for each in fields(DistillationObjective) if each.name != "bank"}
