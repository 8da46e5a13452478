"""What a trainer does as a training begins, and as one of its steps has ended."""

import weakref
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import default_compute_objective

from hf_rrd.models.head import check_optimizer
from hf_rrd.training.evidence import knows_classes
from hf_rrd.training.streams import WholeSteps, warn_of_new_pass
from hf_rrd.training.terms import objective_without_terms


def ask_teacher(trainer: Any) -> None:
    """Where the weights are automatic, leave out the logits of a teacher that does not know the student's classes.

    Each student's is asked once, before a training or an evaluation, whichever comes first.
    """
    pair = trainer.distillation.logits
    if trainer.args.kd_weight != "auto" or pair is None or pair.is_asked:
        return
    if not knows_classes(trainer.train_dataset, trainer):
        trainer.distillation.leave_out_logits()
    pair.is_asked, trainer._teacher.may_lack_logits = True, False


class Phases(TrainerCallback):
    """The trainer's own callback."""

    def __init__(self, trainer: Any) -> None:
        self.trainer: Any = weakref.proxy(trainer)  # no circle: the memory is free as soon as the trainer is

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """An empty or a restored state."""
        trainer = self.trainer  # which may begin anew after a step for which the memory did not suffice
        student = trainer._unwrapped_student()
        ask_teacher(trainer)
        trainer.distillation.start(student, trainer.train_dataset)
        check_optimizer(student, trainer.optimizer)
        if getattr(trainer, "compute_objective", None) is default_compute_objective:  # a hyperparameter search's
            trainer.compute_objective = objective_without_terms
        trainer._terms.start_training()
        trainer._steps = WholeSteps(trainer.train_dataset)
        trainer._finite.start()
        if trainer._resumed_from is None:
            trainer._calibrate()
        else:
            trainer._restore(trainer._resumed_from)
            warn_of_new_pass(trainer.train_dataset, trainer.state.epoch)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The teacher's rows of the step go into the bank, and what it measured is used from the next one on."""
        if self.trainer._step is not None:
            self.trainer.distillation.end_step(self.trainer._step, self.trainer.accelerator)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A run that was resumed at its end is neither evaluated nor saved again."""
        last = [name for line in state.log_history if line.get("step") == state.global_step for name in line]
        evaluated = any(name.startswith("eval_") for name in last) or not control.should_evaluate
        if self.trainer._step is None and evaluated:  # a run that was resumed at its end
            control.should_evaluate = control.should_save = False
