"""The student's own task: its labels, its loss, and what a forward of the student is asked for."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_pt_utils import nested_detach
from transformers.utils import logging

from hf_rrd.errors import named_errors
from hf_rrd.models.body import unwrapped
from hf_rrd.models.head import WITH_EMBEDDING, StudentOutputs, split_outputs
from hf_rrd.models.layers import WITH_LAYERS
from hf_rrd.models.logits import layout_of
from hf_rrd.training.data import check_batch_labels, preserved_randomness
from hf_rrd.training.terms import mean_of, times

logger = logging.get_logger(__name__)


class TaskLoss:
    """The task's part of an optimizer step, which is a mean over the step's labels however its batch is cut.

    A loss that uses the step's count of labels gives its part of that mean. Any other gives the mean of its
    micro-batch. Which of them it is shows once, in two forwards with other counts: many forwards take a count that
    their loss then ignores.

    With it the trainer always divides by the accumulation steps, whatever a model does with a count. transformers 5.0
    does not where there is `func`, a `compute_loss_func`; `divides` says whether the trainer does.
    """

    def __init__(self, trainer: Any, func: Any) -> None:
        self.accelerator, self.func = trainer.accelerator, func
        self.in_forward = trainer.model_accepts_loss_kwargs and trainer.args.n_gpu <= 1  # takes the count
        self.uses_count = None if self.in_forward or func is not None else False
        self.divides = func is None or hasattr(Trainer, "loss_is_scaled_for_ga")
        trainer.model_accepts_loss_kwargs = trainer.loss_is_scaled_for_ga = False
        trainer.current_gradient_accumulation_steps = 1  # outside of train(), for a `training_step` called by hand
        model, layout = unwrapped(trainer.model), layout_of(trainer.model)
        # Asked of the loss itself: the names of GPT-2's class and of others do not tell it.
        self._shifts = layout == "next words" and getattr(model, "loss_function", None) is ForCausalLMLoss
        self._looked = False
        self._sums = layout == "letters" and func is None and getattr(model.config, "ctc_loss_reduction", "") == "sum"

    def labels_in(self, batch: Mapping[str, Any]) -> Tensor | None:
        """How many labels of a batch the loss is about, as a scalar; None where that is not known."""
        labels = batch.get("shift_labels", batch.get("labels"))
        if not isinstance(labels, Tensor):
            return None
        # A causal language model's loss has nothing to predict the first token from.
        return (labels[..., 1:] if self._shifts and "shift_labels" not in batch else labels).ne(-100).sum()

    def of_step(self, compute_loss: Callable[..., Any], step: Any, count: Any) -> Callable[..., Any]:
        """From student and inputs to loss and outputs, by the Trainer's `compute_loss`.

        In training with the step's count of labels if the loss uses it; without a step as the Trainer has it.
        """
        if step is None:
            return partial(compute_loss, return_outputs=True, num_items_in_batch=count)
        count = None if self.uses_count is False else step.labels if count is None else count
        if isinstance(count, Tensor):
            count = count.clamp(min=1)  # a step without a label has a loss of 0, not of 0 / 0

        def with_count(model: nn.Module, inputs: dict[str, Any], count: Any) -> Any:
            given = {} if count is None or not self.in_forward else {"num_items_in_batch": count}
            return compute_loss(model, inputs | given, return_outputs=True, num_items_in_batch=count)

        def of_student(model: nn.Module, inputs: dict[str, Any]) -> Any:
            self._look_at(inputs.get("labels"))
            if self.uses_count is None and count is not None:
                self.uses_count = self._uses(with_count, model, inputs, count)
            return with_count(model, inputs, None if self.uses_count is False else count)

        return of_student

    def _look_at(self, labels: Any) -> None:
        """Warn of a missing label in the first batch, where the student's own loss takes it for a number."""
        if not self._looked and self.func is None and isinstance(labels, Tensor) and labels.is_floating_point():
            if bool((labels == -100).any()):
                logger.warning(
                    "Some `labels` are -100.0, which this student's own loss takes for a number, not for a missing "
                    "label: several labels at once and numbers need a `compute_loss_func` that leaves these out."
                )
        self._looked = True

    @torch.no_grad()
    def _uses(self, with_count: Callable[..., Any], model: nn.Module, inputs: Any, count: Any) -> bool | None:
        """What the processes agree on; None while there is no label to tell by."""
        losses = []
        model.eval()
        try:
            for each in (count, 2 * count):
                with preserved_randomness():
                    losses.append(float(with_count(model, inputs, each)[0].mean()))
        except (TypeError, AttributeError):  # a forward that cannot do with this keyword; a loss of None
            losses = [1.0, 1.0]
        finally:
            model.train()
        one, half = losses
        known = one == one and one != 0
        votes = torch.tensor([abs(one - half) > 1e-3 * abs(one), known], device=self.accelerator.device)
        uses, knows = self.accelerator.reduce(votes.float(), "sum").tolist()
        return bool(uses) if knows else None

    def parts(
        self, terms: dict[str, Tensor], inputs: Mapping[str, Any], outputs: Any, step: Any, share: Any
    ) -> dict[str, Tensor]:
        """A micro-batch's part of each term of the step: of the task by its labels, of the others `share`.

        Gradients are averaged over the processes, so all shares of a step together are as many as these. Without a
        label the part of the task is 0, whose mean over labels is not a number.
        """
        parts = {name: times(mean_of(term), share) for name, term in terms.items() if name != "task_loss"}
        if "task_loss" not in terms:
            return parts
        task = times(mean_of(terms["task_loss"]), self._share(inputs, outputs, step, share))
        if self.func is None:
            labels = step.labels if step.is_one else self.labels_in(inputs)
            task = task if labels is None else task.masked_fill(labels == 0, 0.0)
        return {"task_loss": task, **parts}

    def _share(self, inputs: Mapping[str, Any], outputs: Any, step: Any, otherwise: Any) -> Any:
        if self._sums:  # over the examples, as CTC does by default
            return step.processes
        labels, logits = inputs.get("labels"), outputs.get("logits") if isinstance(outputs, dict) else None
        if self.uses_count is not False and step.labels is not None:
            return 1 if self.func is not None else step.processes  # the Trainer itself does so with a function's
        if self.func is not None or step.labels is None or not isinstance(labels, Tensor) or logits is None:
            return otherwise
        means_over_labels = labels.shape == logits.shape[:-1] and not labels.is_floating_point()
        if not means_over_labels:
            return otherwise
        return 1 if step.is_one else self.labels_in(inputs) * step.processes / step.labels.clamp(min=1)


def ask_student(
    model: nn.Module,
    inputs: dict[str, Any],
    task_loss: Callable[..., Any] | None,
    label_names: list[str],
    distillation: Any,
    needs_labels: bool,
) -> StudentOutputs:
    """One forward of the student, with its embedding where it has a head, and with the layers that are compared.

    `task_loss` gives loss and outputs, the student's own where it `needs_labels`; without one the labels stay away.
    """
    asked = inputs if distillation.head is None else inputs | {WITH_EMBEDDING: True}
    if distillation.layers is not None:
        asked = asked | {WITH_LAYERS: True}
    if task_loss is not None and needs_labels:
        check_batch_labels(inputs, label_names)
    with named_errors("the student", inputs), distillation.layers.student if WITH_LAYERS in asked else nullcontext():
        if task_loss is None:
            loss, outputs = None, model(**{name: value for name, value in asked.items() if name not in label_names})
        else:
            loss, outputs = task_loss(model, asked)
    if task_loss is not None and not isinstance(loss, Tensor):
        whose = "the student's own loss" if needs_labels else "what `compute_loss_func` returns"
        raise ValueError(f"{whose} must be a tensor, got {loss!r}. Set task_weight=0 to train without it.")
    return StudentOutputs(loss, *split_outputs(outputs))


def predictions_of(outputs: Any, model: Any, ignored: list[str] | None) -> Any:
    """An output's values as the Trainer gives them to metrics, detached: one, or a tuple of several."""
    if ignored is None:
        ignored = getattr(model.config, "keys_to_ignore_at_inference", ["past_key_values"])
    values = tuple(nested_detach(value) for name, value in outputs.items() if name not in [*ignored, "loss"])
    return values[0] if len(values) == 1 else values
