"""What a student is compared with, and by which losses: one object, which a checkpoint holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers.utils import logging

from hf_rrd.losses.bank import FeatureBank
from hf_rrd.losses.in_batch import BATCH_LOSSES, own_space_loss
from hf_rrd.losses.relational import infonce_terms, relational_parts
from hf_rrd.losses.rows import unit
from hf_rrd.models.head import RelationalHead, StudentOutputs, attach_head, detach_head, head_of, load_head, put_head
from hf_rrd.models.layers import LayerPairs, for_all_weights
from hf_rrd.models.logits import LogitPair, has_one_answer, logits_of
from hf_rrd.models.teacher import Teacher, TeacherOutputs
from hf_rrd.training.balance import Balance, weighted_sum
from hf_rrd.training.checkpoint import State
from hf_rrd.training.data import is_map_style, preserved_randomness, sample_of
from hf_rrd.training.projection import TeacherProjection, check_variety, prefixes_of
from hf_rrd.training.terms import Weights, mean_of, weights_by, weights_of

logger = logging.get_logger(__name__)

BANK_LOSSES = ("rrd", "infonce")
"""The values of `relational_loss=` that compare with the bank."""

RELATIONAL_LOSSES = (*BANK_LOSSES, *BATCH_LOSSES, "own_space")
"""The values of `relational_loss=`, each alone or several with weights.

The last is of the student's embedding as it is saved, the others of the projected one. All but those of the bank
compare within the micro-batch.
"""

MEASURED = 1024
"""Training examples on which the teacher's mean and directions are measured, unless bank or width ask for more."""

MADE_WITH = ("teacher_pooling", "teacher_projection", "projection_dim", "matryoshka_dims")
"""Settings that are read when a trainer is made, and not again."""

NO_HEAD = (
    "the student has not the head that the trainer gave to its own: `trainer.model` was replaced. Make a new trainer."
)


class Distillation:
    """The weighted sum of the task's loss, KD, the relational loss and that of layers. No parameters.

    Where the settings say so, the relational part is balanced: its gradient is scaled to the others' at the student.

    Owns the projection of the teacher's embeddings and the bank of them, which is full from the first step on. Each
    example is compared with the bank as it was before the step, plus one column of its own; rows wait until
    `update_bank` is called, once per optimizer step: so a step is the same however its batch was cut. A bank of the
    whole training set stays as it is. An evaluation compares with the rows of the first step, whenever it comes.

    Args:
        args: A `RelationalDistillationConfig`. It is read at each step, so a callback may change a weight.
        teacher: The teacher of the run: the width and the dtype of its embeddings, if the run learns them.

    Attributes:
        projection: Of the teacher's embeddings; None where the run learns none.
        bank: The rows that they are compared with; None where the run learns none.
        prefixes: The widths in which they are compared, the widest first; none stands for all of them at once.
        reference: The rows that the bank began with, (rows, dim); None before, or where there is no training set.
        student, head: From `attach` on. The head stays None where the run learns no embeddings; after a training it is
            on the student only while that is compared.
        logits: How the student's are compared with the teacher's; None where the run learns none.
        layers: The same of hidden states below the last.
    """

    def __init__(self, args: Any, teacher: Teacher) -> None:
        self.args = args
        self.projection: TeacherProjection | None = None
        self.bank: FeatureBank | None = None
        self.prefixes: list[int] = []
        self.student: nn.Module | None = None
        self.has_one_answer = True  # for an example
        self.head: RelationalHead | None = None
        self.logits: LogitPair | None = None
        self.layers: LayerPairs | None = None
        self.reference: Tensor | None = None
        self.pending: list[Tensor] = []
        self.balance: Balance | None = None  # where there is a head
        self.seed: int = broadcast_object_list([args.seed])[0]  # each process may have one of its own
        self._teacher = teacher
        self._fits = False  # the training set, into the bank
        self._learned = {"relational_weight": teacher.wants_embedding, "kd_weight": teacher.wants_logits}
        self._made_with = {name: getattr(args, name) for name in MADE_WITH} if teacher.wants_embedding else {}
        if teacher.width is not None:
            self.projection = TeacherProjection(teacher.width, args.projection_dim, args.teacher_projection, self.seed)
            self.bank = FeatureBank(self.rows, self.projection.dim, teacher.dtype)
            self.prefixes = prefixes_of(args.matryoshka_dims, self.projection.dim)

    @property
    def rows(self) -> int:
        """How many rows the settings give the bank: none for a loss that compares within the micro-batch."""
        return int(self.args.bank_size) if self.args.relational_terms.keys() & set(BANK_LOSSES) else 0

    def weights(self) -> Weights:
        """The weights of the terms as they are now, by the names of the settings."""
        return weights_by(self.args, self._learned["kd_weight"], self.has_one_answer, self.layers is not None)

    @property
    def is_calibrated(self) -> bool:
        """Whether an evaluation has all that it compares with: always, where the run learns no embeddings."""
        if self.projection is None:
            return True
        return self.projection.is_ready and (self.rows == 0 or self.reference is not None)

    @property
    def is_whole(self) -> bool:
        """Whether the bank holds the whole training set, so that no newer rows can come."""
        return self.reference is not None and (self._fits or len(self.reference) < self.rows)

    @property
    def is_balanced(self) -> bool:
        """Whether the relational terms are scaled to the others: from `start` on, where there are others."""
        return self.head is not None and self.head.split is not None

    def leave_out_logits(self) -> None:
        """Learn none, because the teacher has not the student's classes."""
        self._learned["kd_weight"], self._teacher.wants_logits, self.logits = False, False, None

    def attach(self, student: nn.Module) -> None:
        """Give a student the head that the comparison needs, in place of an earlier one, or take that off."""
        self.student, self.has_one_answer = student, has_one_answer(student)
        if self.projection is None:
            detach_head(student)
        else:
            how = (self.args.student_projection, self.args.student_pooling, self.seed)
            self.head = attach_head(student, self.projection.dim, *how)
            self.balance = Balance(self.head.embedder.width)

    def wear(self) -> None:
        """Put on the student what `attach` gave it, if that was taken off since, by us, a user or another trainer."""
        if self.student is not None and head_of(self.student) is not self.head:
            detach_head(self.student) if self.head is None else put_head(self.student, self.head)

    @contextmanager
    def worn(self) -> Iterator[None]:
        """The student has its head meanwhile, and afterwards what it had before."""
        before = None if self.student is None else head_of(self.student)
        self.wear()
        try:
            yield
        finally:
            if self.student is not None and before is not self.head:
                detach_head(self.student) if before is None else put_head(self.student, before)

    def to(self, device: torch.device) -> None:
        """Move the bank to a device; the projection follows what it reads."""
        if self.bank is not None:
            self.bank.to(device)
        if self.balance is not None:
            self.balance.to(device)

    # ---- The loss ----

    def terms(
        self, student: StudentOutputs, teacher: TeacherOutputs, inputs: dict[str, Any], training: bool
    ) -> dict[str, Tensor]:
        """The terms of one micro-batch by name, each of every example, (batch,), or their mean.

        Args:
            student, teacher: Of the same examples; what is None has no term.
            inputs: The batch, whose labels and masks say which logits count.
            training: Evaluation leaves the bank as it is.

        Raises:
            ValueError: The teacher has logits, or an embedding, and the student has none; a weight has left the 0 that
                this object was made with; or there is no term at all.
        """
        weights = self.weights()
        for name, learned in (*self._learned.items(), ("layer_weight", self.layers is not None)):
            if (weight := weights[name]) > 0 and not learned:
                raise ValueError(f"`{name}` was 0 when the trainer was made and is {weight} now. Make a new trainer.")
        terms = {} if student.task_loss is None else {"task_loss": student.task_loss}
        if teacher.logits is not None:
            assert self.logits is not None
            logits = logits_of(student.outputs)
            if self.args.kd_weight == "auto" and not self.logits.fit(logits, teacher.logits):
                shapes = [None if each is None else tuple(each.shape) for each in (teacher.logits, logits)]
                logger.warning("The teacher's logits, {}, are left out: the student's are {}.".format(*shapes))
                self.leave_out_logits()
            elif logits is None:
                raise ValueError("`kd_weight` is above 0, but the student returns no logits. Set kd_weight=0.")
            else:
                terms |= self.kd_terms(logits, teacher.logits, inputs)
        if teacher.embedding is not None and (training or self.is_calibrated):
            if student.embedding is None:
                raise ValueError(NO_HEAD)
            terms |= self.relational_terms(student.embedding, teacher.embedding, training, student.pooled)
        if self.layers is not None and student.layers is not None and teacher.layers is not None:
            loss = self.layers.terms(student.layers, teacher.layers, inputs)
            terms["layer_loss"] = loss if terms else for_all_weights(loss, student.outputs)
        if not terms:
            raise ValueError(
                "nothing to compare with: this batch has neither labels to learn nor a teacher's outputs that can be "
                "compared (an evaluation needs the `train_dataset`, whose embeddings are the bank)."
            )
        return terms

    def relational_terms(
        self, student: Tensor, teacher_embedding: Tensor, training: bool, pooled: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`relational_loss`, the weighted sum, and each that is not the whole of it; of "rrd" also `relational_kl`.

        In training the teacher's rows wait for the bank.

        Args:
            student: The student's projected embeddings, (batch, dim).
            teacher_embedding: The teacher's, (batch, width).
            training: Evaluation leaves the bank as it is.
            pooled: The student's embeddings before the projection, (batch, width).
        """
        assert self.projection is not None and self.bank is not None
        teacher = self.projection(teacher_embedding)
        student = student.to(teacher.device)
        if pooled is not None and training and self.balance is not None:
            self.balance.add(pooled, student)
        losses, rows, unit_rows = self.args.relational_terms, teacher, None  # without a bank the micro-batch itself
        if self.bank.size > 0:
            rows = self.bank.filled if training or self.reference is None else self.reference
        if self.prefixes:
            # Stored are unit rows of the full width: of their leading dimensions the losses make unit rows anew.
            each = [self._compared(student[:, :dim], teacher[:, :dim], rows[:, :dim])[0] for dim in self.prefixes]
            terms = {name: torch.stack([part[name] for part in each]).mean(0) for name in each[0]}
        else:
            terms, unit_rows = self._compared(student, teacher, rows)
        if training and self.bank.size > 0 and not self.is_whole:
            self.pending.append(unit(teacher) if unit_rows is None else unit_rows)
        if pooled is not None and "own_space" in losses:
            terms["relational_own_space"] = own_space_loss(pooled, teacher)
        if [*losses.values()] != [1.0]:
            # Of each example, as far as the losses are: an evaluation's mean then does not depend on its batches.
            loss = torch.zeros((), device=teacher.device)
            for name, weight in losses.items():
                loss = loss + weight * terms[f"relational_{name}"]
            return {"relational_loss": loss, **terms}
        return {"relational_loss": terms.pop(f"relational_{[*losses][0]}"), **terms}

    @torch.no_grad()
    def target(self, teacher_embedding: Tensor) -> Tensor | None:
        """What the student's rows are to be, as wide as is compared, (batch, dim); None where that is not known."""
        if self.projection is None or not self.projection.is_ready:
            return None
        return self.projection(teacher_embedding)[:, : self.prefixes[0] if self.prefixes else None]

    def _compared(self, student: Tensor, teacher: Tensor, rows: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """The terms in the teacher's space by name, in one order on all processes; and its unit rows, if made."""
        assert self.bank is not None
        args, terms, unit_rows = self.args, {}, None
        if "infonce" in args.relational_terms:
            terms["relational_infonce"] = infonce_terms(student, teacher, rows, args.student_temperature)
        if "rrd" in args.relational_terms:
            is_unit = self.bank.size > 0 and rows.shape[1] == self.bank.dim  # as they went into the bank
            how = (args.student_temperature, args.teacher_temperature, True, is_unit)
            terms["relational_rrd"], terms["relational_kl"], unit_rows = relational_parts(student, teacher, rows, *how)
        for name in [name for name in args.relational_terms if name in BATCH_LOSSES]:
            terms[f"relational_{name}"] = BATCH_LOSSES[name](student, teacher)
        return terms, unit_rows

    def kd_terms(self, student_logits: Tensor, teacher_logits: Tensor, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """`kd_loss` of each example, (batch,); of "dist" their mean."""
        assert self.logits is not None
        how = (self.logits.temperature(self.args.kd_temperature), self.args.kd_loss)
        return {"kd_loss": self.logits.terms(student_logits, teacher_logits, inputs, *how)}

    def total(self, terms: dict[str, Tensor], times: float = 1) -> Tensor:
        """The weighted sum of the terms' means, so many times; where the losses are balanced its gradient is, too.

        That gradient is then of the mean of both sides, not of their sum: as long as the task's, whatever the weight,
        so that `max_grad_norm` and the learning rate of SGD mean what they mean without a teacher. `relational_kl` is
        for reading and has no weight.
        """
        settings = self.weights()
        weights = {name: times * weight for name, weight in weights_of(settings, terms).items()}
        factors: dict[str, float | Tensor] = {**weights}
        if self.balance is not None and self.is_balanced:
            factors = {name: weight / (1 + settings["relational_weight"]) for name, weight in weights.items()}
            if "relational_loss" in factors:
                factors["relational_loss"] = self.balance.factor * factors["relational_loss"]
        return weighted_sum([*weights.values()], [*factors.values()], [mean_of(terms[name]) for name in weights])

    # ---- The bank ----

    def end_step(self, step: Any, accelerator: Any) -> None:
        """Put the rows of an optimizer step into the bank, and balance the next one by what this one measured.

        Args:
            step: The `StepExamples` of all processes.
            accelerator: Of the trainer.
        """
        self.update_bank(step.gather)
        if self.balance is not None and self.head is not None:
            scaler, weight = accelerator.scaler, self.weights()["relational_weight"]
            scale = step.processes * (1.0 if scaler is None else scaler.get_scale()) / (1 + weight)
            may_overflow = scaler is not None or accelerator.mixed_precision == "fp16"  # DeepSpeed has its own scaler
            self.balance.update(weight, step.total, step.summed, scale, may_overflow)

    def update_bank(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Put the step's rows, gathered from all processes, into the bank: unit rows, which fit any dtype."""
        if self.bank is not None and self.pending:
            rows = self.pending[0] if len(self.pending) == 1 else torch.cat(self.pending)
            self.bank.enqueue(gather(rows.to(self.bank.filled.dtype)))
        self.pending.clear()

    def start(self, student: nn.Module, dataset: Any) -> None:
        """Begin a training on a data set: an empty bank, and the settings as a search may have changed them.

        Raises:
            ValueError: A setting is out of its range, or changed where it cannot be; or the student has not the head
                that it was given.
        """
        self.args.validate()
        for name, value in self._made_with.items():
            if (now := getattr(self.args, name)) != value:
                raise ValueError(
                    f"`{name}` was {value!r} when the trainer was made and is {now!r} now. Make a new trainer."
                )
        if head_of(student) is not self.head:
            raise ValueError(NO_HEAD)
        self.pending.clear()
        if self.balance is not None and self.head is not None:
            self.to(self.args.device)  # a student of `model_init` has a new one
            self.balance.clear()
            self.head.mean = self.balance.mean
            weights = self.weights()
            competes = self.args.balance_losses and weights["task_weight"] + weights["kd_weight"] > 0
            self.head.split = self.balance.split if competes else None
        self.reference, self._fits = None, is_map_style(dataset) and len(dataset) <= self.rows
        if self.bank is not None:
            self.bank.clear()
            self.bank.size = self.rows

    def calibrate(
        self, dataset: Any, embed: Callable[[Any], Tensor], share: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    ) -> None:
        """Measure the teacher on some training examples: fit its projection, unless it is, and fill the bank.

        Args:
            dataset: The training set.
            embed: From a data set to the teacher's embeddings, (examples, width), on all processes.
            share: From the main process's projection to that of all.

        Raises:
            ValueError: An embedding is not finite, all are alike, or there are too few to fit the projection.
        """
        projection, bank = self.projection, self.bank
        if projection is None or bank is None or dataset is None:
            return
        count = bank.size if projection.is_ready else max(MEASURED, bank.size, 2 * projection.dim)
        if count == 0:
            return
        with preserved_randomness():
            embeddings = embed(sample_of(dataset, count, self.seed))
        if len(embeddings) == 0 and projection.is_ready:
            return
        if not embeddings.isfinite().all():
            raise ValueError("the teacher's embedding is not finite (nan or inf) on examples of `train_dataset`.")
        if not projection.is_ready:
            projection.fit(embeddings)
            projection.load_state_dict(share(projection.state_dict()))  # the same to the bit on all processes
        rows = unit(projection(embeddings))
        for dim in self.prefixes or [projection.dim]:
            check_variety(embeddings, unit(rows[:, :dim]))
        bank.clear()
        bank.enqueue(rows[: bank.size])
        self.reference = bank.filled

    # ---- A checkpoint ----

    def state_dict(self, head: bool = True) -> State:
        """All there is to save: projection, bank, reference, balance, and the head unless it is sharded."""
        bank = None if self.is_whole else self.bank  # which then is the reference
        parts: dict[str, Any] = {"head": self.head if head else None, "teacher_projection": self.projection}
        parts |= {"bank": bank, "balance": self.balance}
        state = {name: dict(part.state_dict()) for name, part in parts.items() if part is not None}
        return state if self.reference is None else state | {"reference": {"rows": self.reference.clone()}}

    def load_state_dict(self, state: State, head: bool = True) -> None:
        """Take over what was saved; a ValueError if it is of another teacher or of other settings."""
        if self.bank is not None:
            if self.rows > 0:
                self.bank.load_state_dict(state.get("reference", {}))
                self.reference = self.bank.filled
            if not self.is_whole:
                self.bank.load_state_dict(state.get("bank", {}))
        if self.projection is not None:
            self.projection.load_state_dict(state.get("teacher_projection", {}))
        if self.head is not None and head:
            load_head(self.head, state.get("head", {}))
        if self.balance is not None and self.head is not None:
            self.balance.load_state_dict(state.get("balance", {}))
            self.head.mean = self.balance.mean
