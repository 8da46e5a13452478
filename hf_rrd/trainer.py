"""`RelationalDistillationTrainer`: a `Trainer` whose loss adds what the teacher knows."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel
from transformers.trainer import Trainer
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    HubStrategy,
    number_of_arguments,
)
from transformers.utils import logging

from hf_rrd.config import RelationalDistillationConfig
from hf_rrd.errors import named_errors, refuse_unknown
from hf_rrd.models.columns import forward_columns, student_inputs
from hf_rrd.models.head import HEAD, detach_head
from hf_rrd.results.alignment import EmbeddingLog
from hf_rrd.results.callback import FactsCallback
from hf_rrd.results.hub import (
    PushError,
    create_repository,
    found_repository,
    push_checkpoint,
    push_student,
    unfinished,
)
from hf_rrd.results.report import DistillationReport, chosen_dataset, compare_in_run, teacher_of_report
from hf_rrd.results.sentence_transformers import as_saved, checked, embedder_of, save_format, scores_of
from hf_rrd.training.checkpoint import (
    checkpoint_to_resume,
    explained_write_errors,
    flaw_in,
    has_sidecar,
    invalidate,
    load_sidecar,
    load_student,
    save_sidecar,
    sizes_of,
)
from hf_rrd.training.data import (
    Preview,
    default_collator,
    examples_in,
    has_labels,
    previews_of,
    with_cached_arrays,
)
from hf_rrd.training.distillation import Distillation
from hf_rrd.training.distributed import StepExamples, calibrate, mend_wrap_policy, place_teacher, train_together
from hf_rrd.training.finite import FiniteCheck, check_weights
from hf_rrd.training.identity import (
    check_identity,
    check_source,
    check_sources,
    resuming,
    settings_of,
    teacher_identity,
)
from hf_rrd.training.inputs import check_given_teacher, check_inputs, check_reports_input
from hf_rrd.training.phases import Phases, ask_teacher
from hf_rrd.training.setup import check_data, prepared, teacher_for
from hf_rrd.training.streams import WholeSteps, with_reading_ahead
from hf_rrd.training.task import TaskLoss, ask_student, predictions_of
from hf_rrd.training.terms import TermLog

logger = logging.get_logger(__name__)


class RelationalDistillationTrainer(Trainer):
    """Trains `model`, the student, on its task and on what a frozen teacher knows.

    Takes what `Trainer` takes, in the same order, and two arguments more. The student that it saves is a plain
    transformers model.

    Args:
        model: The student: a transformers model, or a PEFT model around one.
        args: The settings.
        data_collator: Default: `DataCollatorForDistillation` of the two processing classes.
        train_dataset: May have columns that begin with `teacher_`: they reach the teacher, without the prefix.
            Without them the teacher sees the student's inputs. Columns `teacher_embedding` and `teacher_logits` stand
            in for the teacher.
        eval_dataset: The same. Without a teacher's outputs an evaluation reports the task alone.
        processing_class: The student's tokenizer or processor, saved beside it.
        model_init, compute_metrics, callbacks, preprocess_logits_for_metrics, optimizer_cls_and_kwargs: As in Trainer.
        compute_loss_func: Gives the task loss: a sum divided by `num_items_in_batch`, or a mean over the micro-batch.
        optimizers: As in Trainer. The student's projection goes into the first group of an optimizer.
        teacher: A transformers model or a SentenceTransformer, or a Hub name or folder of one; None where the data set
            has its outputs. It is frozen and set to evaluation mode.
        teacher_processing_class: The teacher's, for the default collator; that of a SentenceTransformer is its own.
        evaluators: One or several evaluators of sentence-transformers, which each evaluation asks about the student as
            an embedding model; of a dict of evaluation sets that of the first.

    Raises:
        ValueError: A model, a data set or their combination with the settings cannot be trained.
        TypeError: `args` is not a `RelationalDistillationConfig`.

    Example:

    ```python
    trainer = RelationalDistillationTrainer(student, args, train_dataset=train, teacher="google/vit-base-patch16-224")
    trainer.train()
    ```
    """

    args: RelationalDistillationConfig
    model: nn.Module
    hub_model_id: Any
    _signature_columns: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> "RelationalDistillationTrainer":
        """Refuse misspelt names, with what may be meant."""
        refuse_unknown(cls, kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: RelationalDistillationConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        teacher: PreTrainedModel | nn.Module | str | os.PathLike[str] | None = None,
        teacher_processing_class: Any = None,
        evaluators: Any = None,
    ) -> None:
        args = RelationalDistillationConfig(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, RelationalDistillationConfig):
            raise TypeError(f"`args` must be a RelationalDistillationConfig, got {type(args).__name__}.")
        if not isinstance(model, nn.Module | None):
            raise TypeError(f"`model` must be a model, got {model!r}. Load it with from_pretrained.")
        train_dataset = with_reading_ahead(train_dataset, args.dataloader_num_workers)
        preview = Preview(train_dataset)
        check_data(preview, eval_dataset, model, args, data_collator)
        self._teacher = teacher_for(teacher, args, preview, model)
        sets = previews_of(preview, eval_dataset)
        check_inputs(sets, model, self._teacher, args, data_collator, [processing_class, teacher_processing_class])
        self.distillation = Distillation(args, self._teacher)
        self._terms = TermLog(self.distillation.weights)
        self._finite = FiniteCheck(self._terms.not_finite)
        self._embeddings = EmbeddingLog(args.alignment_examples)
        self._step: StepExamples | None = None
        self._steps = WholeSteps()
        self._resumed_from: str | None = None
        prepare = partial(
            prepared, self._teacher, self.distillation, preview, compute_loss_func is None, optimizers[0]
        )
        collate = data_collator or default_collator(processing_class, teacher_processing_class, self.teacher)
        own_optimizer = optimizers != (None, None) or optimizer_cls_and_kwargs is not None
        saved_beside = processing_class or getattr(collate, "tokenizer", None)
        facts = (self.teacher, train_dataset, saved_beside, own_optimizer, self.distillation)
        self._facts = FactsCallback(*facts)
        super().__init__(
            model=prepare(model),
            args=args,
            data_collator=collate,
            train_dataset=with_cached_arrays(train_dataset),
            eval_dataset=with_cached_arrays(eval_dataset),
            processing_class=processing_class,
            model_init=model_init and (lambda *trial: prepare(model_init(*trial[: number_of_arguments(model_init)]))),
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=[Phases(self), *(callbacks or []), self._facts],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self._task = TaskLoss(self, compute_loss_func)
        self._student_columns = forward_columns(self.model, compute_loss_func is not None and args.task_weight > 0)
        self._set_signature_columns_if_needed()
        raw = [name for each in sets.values() if each.is_transformed for name in each.dataset.column_names]
        self._signature_columns = [*self._signature_columns, *self._teacher.signature_columns, *raw]
        mend_wrap_policy(self.model, self.accelerator)
        identity = settings_of(self.distillation, train_dataset)
        identity |= teacher_identity(self._teacher, preview)
        self._identity = check_sources(identity, self._teacher, sets)
        place_teacher(self._teacher, self.accelerator)
        self.distillation.to(self.args.device)
        self._evaluators = checked(evaluators, self)

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher's model; None where the data set has its outputs."""
        return self._teacher.model

    # ---- The loss ----

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the terms; in training the micro-batch's part of the optimizer step's."""
        with self.accelerator.autocast():
            teacher = self._teacher.read(inputs, required=model.training)
        self._finite.note_teacher(self.state.global_step + int(model.training), teacher.embedding, teacher.logits)
        plain = student_inputs(inputs, self._student_columns, self._teacher.columns)
        self.distillation.wear()
        examples = find_batch_size(inputs) or 1
        step = (self._step or StepExamples(self.accelerator, [examples])) if model.training else None
        task_loss = self._task.of_step(super().compute_loss, step, num_items_in_batch)
        how = (self.label_names, self.distillation, self.compute_loss_func is None)
        student = ask_student(model, plain, task_loss if self.args.task_weight > 0 else None, *how)
        with named_errors("comparing student and teacher", inputs):
            terms = self.distillation.terms(student, teacher, inputs, model.training)
        if step is not None:
            # A micro-batch counts by its examples. The Trainer divides each by their number, as if they were alike.
            share = step.share(examples)
            terms = self._task.parts(terms, plain, student.outputs, step, share)
            self._terms.add(terms, share)
            undone = self.current_gradient_accumulation_steps if self._task.divides else 1
            loss = self.distillation.total(terms, undone)
            if self._step is None:  # nobody counted: `training_step` was called by hand
                self.distillation.end_step(step, self.accelerator)
            if self.accelerator.scaler is None:  # which skips the steps of a float16 training that overflow
                self._finite.note(self.state.global_step + 1, "the loss", loss)
        else:
            loss = self.distillation.total(terms)
            gather = self.accelerator.gather_for_metrics
            self._terms.add_evaluated(terms, examples, gather)
            self._embeddings.add(student.pooled, teacher.embedding, gather, student.embedding)
        return (loss, student.outputs) if return_outputs else loss

    # ---- Training ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As in `Trainer`. `resume_from_checkpoint=True` takes the newest checkpoint that was written to its end.

        Afterwards the student is a plain model again; the trainer keeps its head.
        """
        self._resumed_from = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        train_together(self.model, self.accelerator)
        self.distillation.wear()
        with resuming(self._resumed_from, self._identity):
            output, self._step = super().train(self._resumed_from, trial, ignore_keys_for_eval), None
        check_weights(self.model, "the last step broke them")
        if self.state.max_steps > 0 and self.state.global_step == 0:
            self._steps.raise_for_none()
        if not self._is_sharded:
            detach_head(self._unwrapped_student())
        return output

    def _calibrate(self) -> None:
        calibrate(self)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step; counts their examples and labels."""
        if 0 < self.state.max_steps <= self.state.global_step:  # a run that is resumed at its end
            self.control.should_training_stop = True
            return [], None
        with named_errors("reading `train_dataset`"):
            batches, num_items = self._steps.read(epoch_iterator, num_batches, super().get_batch_samples, device)
        if batches:  # a stream is asked on at its end
            examples, labels = [examples_in(batch) for batch in batches], map(self._task.labels_in, batches)
            self._step = StepExamples(self.accelerator, examples, list(labels))
        return batches, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, with the terms beside `loss`: over the same steps, so that their weighted sum is `loss`."""
        self._finite.raise_if_found()
        if "loss" in logs:
            logs.update(self._terms.line(lambda sums: self.accelerator.reduce(sums.to(self.args.device), "mean")))
        super().log(logs, start_time)

    # ---- Evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """As in `Trainer`; without labels it still gives the loss when that needs none (`task_weight=0`)."""
        if has_labels(inputs, self.label_names) or (not self.label_names and self.args.task_weight > 0):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.args.task_weight > 0 or not self._teacher.answers(inputs):  # a plain prediction
            plain = student_inputs(inputs, self._student_columns, self._teacher.columns)
            return super().prediction_step(model, plain, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, predictions_of(outputs, self.model, ignore_keys), None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `Trainer`, with the mean of each term among the metrics. The bank stays as it is."""
        check_source("dataset", Preview(getattr(dataloader, "dataset", None)), self._teacher)
        self._terms.start_evaluation()
        self._embeddings = EmbeddingLog(self.args.alignment_examples)
        ask_teacher(self)
        if not self.distillation.is_calibrated:  # before the first step
            self._calibrate()
        how = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        with self.distillation.worn():
            output = super().evaluation_loop(*how)
            scores = scores_of(self._evaluators, self, metric_key_prefix) if description == "Evaluation" else {}
        self._finite.raise_if_found()
        measured = self._terms.evaluated(description) | self._embeddings.measured(self.distillation.target)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in (measured | scores).items()})
        return output

    # ---- Checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._finite.raise_if_found()
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        check_weights(self.model, f"{folder} is not written")
        with explained_write_errors(folder):
            if self.args.should_save:
                invalidate(folder)
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Our part too: here, where only the Trainer's own state is still to come, and that is the mark of the end."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # or the end could be marked before another process has written its part
        if self.args.should_save:
            state = self.distillation.state_dict(head=not self._is_sharded)
            save_sidecar(output_dir, state, self._identity | {"files": sizes_of(output_dir)})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._is_sharded or not isinstance(self.model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_student(self.model, resume_from_checkpoint, HEAD)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if (flaw := flaw_in(best)) is not None:
            return logger.warning(f"The best checkpoint, {best}, is not loaded, {flaw}: the last weights stay.")
        if self._is_sharded or not isinstance(self.model, PreTrainedModel):
            super()._load_best_model()
        else:
            load_student(self.model, best, HEAD)
        if has_sidecar(best):
            self._restore(best)
        elif self.distillation.head is not None:
            logger.warning(f"{best} has no head and bank (save_only_model): those of the last step go on.")

    def _restore(self, checkpoint: str) -> None:
        state, about = load_sidecar(checkpoint)
        check_identity(about, self._identity, checkpoint)
        self.distillation.load_state_dict(state, head=not self._is_sharded)

    # ---- Results ----

    def report(self, dataset: Any = None, teacher: Any = None) -> DistillationReport | None:
        """Compare student and teacher on the same examples and machine; see `compare_models`.

        The facts are written to `distillation_report.json` in `output_dir`, and the next card tells them. Only the
        main process measures; the others get None.

        Args:
            dataset: What to measure on, or its name among several evaluation sets. Default: `eval_dataset`.
            teacher: The teacher, its Hub name or folder, where the trainer has none because its outputs were cached.

        Raises:
            ValueError: There is no data set, or the student is sharded over processes.
        """
        dataset = chosen_dataset(dataset, self.eval_dataset, self._is_sharded)
        if self.is_world_process_zero():
            if teacher is None:
                check_reports_input(dataset, self._teacher, self.data_collator)
                self._facts.teacher = self.teacher
            else:
                self._facts.teacher = teacher_of_report(teacher, self.args)
                check_given_teacher(dataset, self._unwrapped_student(), self._facts.teacher, self.data_collator)
            how = (self.data_collator, self._signature_columns, self.label_names or ["labels"], self.args)
            with as_saved(self) as student:
                self._facts.report = compare_in_run(student, self._facts.teacher, dataset, *how)
        return self._facts.report

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the student's card, `README.md`, into `output_dir`, with its facts in `model_card.json` beside it.

        It says what is known of this run and nothing else. With `report` called before, it has the comparison with the
        teacher, and with matplotlib the pictures, in `figures`. Of several tasks or data sets it names the first.

        Args:
            args, kwargs: As in `Trainer`: `language`, `license`, `tags`, `model_name`, `finetuned_from`, `tasks`,
                `dataset_tags` (the name on the Hub), `dataset` (what to call it), `dataset_args`; `baseline`, values
                of the same student without distillation, by name; `teacher_name` (by default that on the Hub).
        """
        if self.is_world_process_zero():
            self._facts.write_card(embedder_of(self), self.hub_model_id, *args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, or find it. A failure is a warning: the training goes on, the push tries again."""
        self.push_in_progress = None
        if self.is_world_process_zero():
            self.hub_model_id = found_repository(self.args, token, private) or self.hub_model_id

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`: with `push_to_hub` it pushes, too. That a push failed is a warning here."""
        try:
            super().save_model(output_dir, _internal_call)
        except PushError as error:
            logger.warning(str(error))
        save_format(self, output_dir)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in `Trainer`; only the student, its processing class, its card and the card's pictures are uploaded.

        `kwargs` go to `create_model_card`.

        Raises:
            PushError: An `OSError`: the Hub could not be reached, or it refused. The student is in `output_dir`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)  # on all processes: each may hold a part of it
        if not self.is_world_process_zero():
            return None
        failure = f"the student is in {self.args.output_dir}, and not on the Hub"
        try:
            self.hub_model_id = self.hub_model_id or create_repository(self.args, failure, token, private)
        finally:
            self.create_model_card(**kwargs)  # also where there is no Hub
        self._finish_current_push()
        student = (self.model, self._facts.processing_class, self.args)
        how = {"token": token, "revision": revision, "run_as_future": not blocking}
        return push_student(self.hub_model_id, commit_message, *student, failure, **how)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in `Trainer`, with the student's files alone, from the checkpoint itself."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END or self.hub_model_id is None:
            return
        jobs = unfinished(self.push_in_progress)
        if not jobs or self.args.hub_always_push:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            student = (self.model, self._facts.processing_class, self.args, self.state)
            self.push_in_progress = push_checkpoint(self.hub_model_id, checkpoint_folder, *student, jobs)

    @property
    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _unwrapped_student(self) -> nn.Module:
        student: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return student
