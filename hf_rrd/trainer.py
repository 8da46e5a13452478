"""`RelationalDistillationTrainer`: a `Trainer` whose loss adds what the teacher knows."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_pt_utils import find_batch_size, nested_detach
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, EvalPrediction, HubStrategy
from transformers.utils import PushInProgress, find_labels, logging

from hf_rrd.config import RelationalDistillationConfig, bank_rows
from hf_rrd.errors import named_errors
from hf_rrd.losses.bank import FeatureBank
from hf_rrd.models.body import unwrapped
from hf_rrd.models.head import HEAD, WITH_EMBEDDING, attach_head, check_student, detach_head, head_of, split_embedding
from hf_rrd.models.teacher import (
    Teacher,
    TeacherOutputs,
    TeacherProjection,
    check_teacher,
    load_teacher,
    teacher_outputs,
)
from hf_rrd.results.callback import FactsCallback
from hf_rrd.results.embedding_log import EmbeddingLog
from hf_rrd.results.hub import PushError, create_repository, push_checkpoint, push_student
from hf_rrd.results.report import DistillationReport, chosen_dataset, compare_models, with_columns
from hf_rrd.training.calibration import calibrate, preserved_randomness
from hf_rrd.training.checkpoint import (
    checkpoint_to_resume,
    explained_write_errors,
    has_sidecar,
    invalidate,
    load_sidecar,
    load_student,
    save_sidecar,
    sizes_of,
)
from hf_rrd.training.comparison import bank_of, comparison_state, restore_comparison
from hf_rrd.training.data import (
    TEACHER_PREFIX,
    DataCollatorForDistillation,
    cached_embeddings,
    cached_shape,
    check_cached_logits,
    check_dataset,
    check_labels,
    examples_in,
    forward_columns,
    has_cached_embeddings,
    student_inputs,
    warn_of_shared_tokens,
    with_cached_arrays,
)
from hf_rrd.training.distributed import StepExamples, every_example, gather_rows, mend_wrap_policy, place_teacher
from hf_rrd.training.finite import FiniteCheck, check_weights
from hf_rrd.training.identity import is_of_teacher, teacher_identity
from hf_rrd.training.objective import RAW_LOSSES, DistillationObjective, settings_of
from hf_rrd.training.terms import TermLog

logger = logging.get_logger(__name__)


class RelationalDistillationTrainer(Trainer):
    """Trains `model`, the student, on its task and on what a frozen teacher knows.

    Takes all that `Trainer` takes, under the same names and in the same order, and two arguments more. The student
    that it saves is a plain transformers model.

    Args:
        model: The student: a transformers model, or a PEFT model around one.
        args: The settings.
        data_collator: Default: `DataCollatorForDistillation` of the two processing classes.
        train_dataset: May have columns that begin with `teacher_`: they reach the teacher, without the prefix.
            Without them the teacher sees the student's inputs. Columns `teacher_embedding` and `teacher_logits` stand
            in for the teacher.
        eval_dataset: The same. Without a teacher's outputs an evaluation reports the task alone.
        processing_class: The student's tokenizer or processor, saved beside it.
        model_init, compute_loss_func, compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics: As in `Trainer`. `compute_loss_func` gives the task loss, as a mean over
            the batch: it gets `num_items_in_batch=None`.
        teacher: A transformers model, or a Hub name or folder of one; None where the data set has its outputs. It is
            frozen and set to evaluation mode.
        teacher_processing_class: The teacher's tokenizer or processor, for the default collator.

    Raises:
        ValueError: A model, a data set or their combination with the settings cannot be trained.
        TypeError: `args` is not a `RelationalDistillationConfig`.

    Example:

    ```python
    trainer = RelationalDistillationTrainer(
        model=student,
        teacher="google/vit-base-patch16-224",
        args=RelationalDistillationConfig(output_dir="out"),
        train_dataset=train,
    )
    trainer.train()
    ```
    """

    args: RelationalDistillationConfig

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
    ) -> None:
        args = RelationalDistillationConfig(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, RelationalDistillationConfig):
            raise TypeError(f"`args` must be a RelationalDistillationConfig, got {type(args).__name__}.")
        if isinstance(model, str):
            raise TypeError(f"`model` must be a model, got {model!r}. Load it with from_pretrained.")
        check_dataset("train_dataset", train_dataset)
        check_dataset("eval_dataset", eval_dataset)
        label_names = args.label_names or (find_labels(type(unwrapped(model))) if model is not None else None)
        if args.task_weight > 0 and train_dataset is not None and data_collator is None and label_names:
            check_labels(train_dataset, label_names)
        self._wants_embedding, self._wants_logits = args.relational_weight > 0, args.kd_weight > 0
        self._has_loss_func = compute_loss_func is not None
        self._prepare_teacher(teacher, args, train_dataset, model)
        if self.teacher is not None and model is not None and data_collator is None and train_dataset is not None:
            warn_of_shared_tokens(model, self.teacher, train_dataset)
        self._terms = TermLog()
        self._embeddings = EmbeddingLog(args.alignment_examples)
        self._finite = FiniteCheck(self._terms.not_finite)
        self._resumed: tuple[Tensor, int] | None = None
        self._resuming = False
        self._step: StepExamples | None = None
        if model is not None:
            check_student(model, task=args.task_weight > 0 and not self._has_loss_func)
            self._attach_head(model, args)
        collate = data_collator or DataCollatorForDistillation(processing_class, teacher_processing_class)
        own = optimizers != (None, None) or optimizer_cls_and_kwargs is not None
        saved = processing_class or getattr(collate, "tokenizer", None)  # beside the student, as Trainer does
        self._facts = FactsCallback(self.teacher, train_dataset, saved, own)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=[*(callbacks or []), self._facts],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        # Each of our terms is a mean over the micro-batch, whatever the model would do with the number of its labels:
        # the Trainer has to divide by the accumulation steps. transformers 5.0 does not where there is a
        # `compute_loss_func`.
        self.model_accepts_loss_kwargs = False
        self._trainer_divides = compute_loss_func is None or hasattr(Trainer, "loss_is_scaled_for_ga")
        self.loss_is_scaled_for_ga = False
        self._student_columns = forward_columns(self.model)
        mend_wrap_policy(self.model, self.accelerator)
        wanted = (self._wants_embedding, self._wants_logits)
        identity = teacher_identity(self.teacher, args.teacher_pooling, train_dataset, *wanted)
        self._identity = broadcast_object_list([identity])[0]  # the others may have no weights yet (FSDP)
        place_teacher(self._teacher, self.accelerator)
        if self.distillation.bank is not None:
            self.distillation.bank.to(self.args.device)

    # ---- Construction ----

    def _prepare_teacher(self, teacher: Any, args: Any, train_dataset: Any, student: nn.Module | None) -> None:
        """Build what the terms need: teacher, its projection, bank and objective."""
        needed = self._wants_embedding or self._wants_logits
        self.teacher = load_teacher(teacher, **(args.teacher_model_init_kwargs or {})) if needed else None
        self._teacher: Teacher | None = None
        if self.teacher is not None:
            if student is not None:
                check_teacher(self.teacher, student, self._wants_logits)
            compiled = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
            self._teacher = Teacher(
                self.teacher,
                args.teacher_pooling,
                self._wants_embedding,
                args.teacher_dtype,
                compiled if args.torch_compile else None,
            )
        self._projection: TeacherProjection | None = None
        bank = None
        if self._wants_embedding:
            shape = self._teacher.shape if self._teacher is not None else cached_shape(train_dataset)
            if shape is None:
                raise ValueError(
                    "the relational loss needs a teacher: pass `teacher=` a model, a Hub name or a folder, or a "
                    "training set with a `teacher_embedding` column. Got neither. relational_weight=0 does without."
                )
            width, dtype = shape
            unit = args.relational_loss not in RAW_LOSSES
            self._projection = TeacherProjection(width, args.projection_dim, args.teacher_projection, args.seed, unit)
            bank = FeatureBank(bank_rows(args, train_dataset), self._projection.dim, dtype)
        elif needed and self._teacher is None and train_dataset is not None:
            check_cached_logits(train_dataset)
        self.distillation = DistillationObjective(**settings_of(args), bank=bank)

    def _attach_head(self, student: nn.Module, args: RelationalDistillationConfig) -> None:
        self._head = None
        if self._projection is None:
            detach_head(student)  # of an earlier trainer
        else:
            self._head = attach_head(
                student,
                self._projection.dim,
                args.student_projection,
                args.student_pooling,
                args.seed,
                self._projection.unit,
            )

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new student, with a head."""
        student = super().call_model_init(trial)
        check_student(student, task=self.args.task_weight > 0 and not self._has_loss_func)
        if self.teacher is not None:
            check_teacher(self.teacher, student, self._wants_logits)
        self._attach_head(student, self.args)
        return student

    def _apply_settings(self) -> None:
        """Take over settings that were changed after construction, as a hyperparameter search does."""
        self.args.validate()
        if (self._wants_embedding, self._wants_logits) != (self.args.relational_weight > 0, self.args.kd_weight > 0):
            raise ValueError(
                "`relational_weight` and `kd_weight` cannot go from 0 to above 0 or back after construction, got "
                f"{self.args.relational_weight} and {self.args.kd_weight}. Make a new trainer."
            )
        for name, value in settings_of(self.args).items():
            setattr(self.distillation, name, value)
        if self.distillation.bank is not None:
            self.distillation.bank.size = bank_rows(self.args, self.train_dataset)
        if self._projection is not None and self._projection.unit != (self.args.relational_loss not in RAW_LOSSES):
            raise ValueError(
                f"`relational_loss` was changed after construction to {self.args.relational_loss!r}, which compares "
                "rows of another scale. Make a new trainer."
            )
        if head_of(self._unwrapped_student()) is not self._head:
            raise ValueError(
                "another trainer has taken this student over: its head is not this trainer's. Make a new one."
            )

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the teacher's columns too: its own, those that it shares, and its cached outputs."""
        unset = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if unset:
            accepted = self._teacher.columns if self._teacher is not None else []
            self._signature_columns += [name for name in accepted if name not in self._signature_columns]
            self._signature_columns += [TEACHER_PREFIX + name for name in accepted]
            self._signature_columns += ["teacher_embedding"] * self._wants_embedding
            self._signature_columns += ["teacher_logits"] * self._wants_logits

    def _remove_unused_columns(self, dataset: Dataset, description: str | None = None) -> Dataset:
        return with_cached_arrays(super()._remove_unused_columns(dataset, description))

    # ---- The loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted sum of the terms, each a mean over the micro-batch: `num_items_in_batch` is not used."""
        teacher = self._teacher_outputs(inputs, model.training)
        task_loss, outputs, embedding, pooled = self._student_outputs(model, inputs)
        terms = {} if task_loss is None else {"task_loss": task_loss}
        with named_errors("comparing student and teacher", inputs):
            if teacher.logits is not None:
                if outputs.get("logits") is None:
                    raise ValueError("`kd_weight` is above 0, but the student returns no logits. Set kd_weight=0.")
                terms |= self.distillation.kd_terms(outputs["logits"], teacher.logits, inputs.get("attention_mask"))
            if teacher.embedding is not None and embedding is not None and self._projection is not None:
                rows = self._projection(teacher.embedding)
                terms |= self.distillation.relational_terms(embedding.to(rows.device), rows, model.training)
        if not terms:
            raise ValueError(
                "nothing to compare with: this batch has neither labels to learn nor a teacher's outputs."
            )
        loss = self.distillation.total(terms)
        examples = find_batch_size(inputs) or 1
        if model.training:
            step = self._step or StepExamples(self.accelerator, [examples])
            share = step.share(examples)
            self._terms.add(terms, share)
            if self.accelerator.scaler is None:  # which skips the steps of a float16 training that overflow
                self._finite.note(self.state.global_step + 1, "the loss", loss)
            # The Trainer divides by the number of micro-batches; together that is the micro-batch's share of examples.
            loss = loss * (share * (step.micro_batches if self._trainer_divides else 1))
        else:
            self._terms.add_evaluated(terms, examples, self.accelerator.gather_for_metrics)
            if self.args.alignment_examples > 0 and pooled is not None and teacher.embedding is not None:
                self._embeddings.add(pooled, teacher.embedding, self.accelerator.gather_for_metrics)
        return (loss, outputs) if return_outputs else loss

    def _teacher_outputs(self, inputs: dict[str, Any], training: bool) -> TeacherOutputs:
        """From the batch's cached columns where it has them, otherwise by one forward of the teacher."""
        outputs = self._read_teacher(inputs, self._wants_logits)
        if training and (self._wants_embedding, self._wants_logits) != tuple(each is not None for each in outputs):
            raise ValueError(f"no teacher, and the batch lacks some of its outputs: its columns are {sorted(inputs)}.")
        for name, value in outputs._asdict().items():
            if value is not None:
                self._finite.note(self.state.global_step + training, f"the teacher's {name}", value)
        return outputs

    def _read_teacher(self, inputs: dict[str, Any], wants_logits: bool) -> TeacherOutputs:
        with self.accelerator.autocast():
            return teacher_outputs(self._teacher, inputs, self._wants_embedding, wants_logits)

    def _student_outputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
        """One forward: the student's task loss (a scalar), output, embedding, (batch, dim), and its pooled one.

        The last, (batch, width), is there in evaluation. What there is not is None.
        """
        accepted = self._teacher.columns if self._teacher is not None else []
        inputs = student_inputs(inputs, self._student_columns, accepted)
        if self._projection is not None:
            inputs[WITH_EMBEDDING] = True
        task_loss = None
        if self.args.task_weight > 0:
            if self.label_names and self.compute_loss_func is None and not any(n in inputs for n in self.label_names):
                raise ValueError(
                    f"`task_weight` is above 0, so each batch needs labels: none of {self.label_names} is in it. Set "
                    "task_weight=0 to train without labels."
                )
            with named_errors("the student", inputs):
                task_loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        else:
            with named_errors("the student", inputs):
                outputs = model(**{name: value for name, value in inputs.items() if name not in self.label_names})
        if self._projection is None:
            return task_loss, outputs, None, None
        return task_loss, *split_embedding(outputs)

    # ---- Training ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As in `Trainer`. `resume_from_checkpoint=True` takes the newest checkpoint that was written to its end."""
        resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        self._resuming = resume_from_checkpoint is not None
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        # Also after `auto_find_batch_size` ran out of memory in the middle of a step.
        self.distillation.reset()
        self._apply_settings()
        self._terms, self._resumed = TermLog(), None
        self._finite = FiniteCheck(self._terms.not_finite)
        if not self._resuming:  # else both come from the checkpoint
            self._calibrate()
        output = super()._inner_training_loop(batch_size, *args, **kwargs)
        check_weights(self.model, "the last step broke them")
        if self.state.max_steps > 0 and self.state.global_step == 0:
            raise ValueError(
                "`train_dataset` gave no batch: it is empty, or smaller than one and `dataloader_drop_last` is on."
            )
        return output

    def _calibrate(self) -> None:
        """Measure the teacher on some training examples: fit its projection, unless it is, and fill the bank."""
        projection, bank, args = self._projection, self.distillation.bank, self.args
        if projection is not None and bank is not None and self.train_dataset is not None:
            count, seed = args.calibration_examples, args.seed
            calibrate(projection, bank, self.train_dataset, count, seed, self._embeddings_of, self._of_main_process)

    def _of_main_process(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(broadcast({name: tensor.to(self.args.device) for name, tensor in state.items()}))

    @torch.no_grad()
    def _embeddings_of(self, sample: Any) -> Tensor:
        """The teacher's pooled embeddings of some examples, (examples, width), on all processes."""
        if has_cached_embeddings(sample):
            return cached_embeddings(sample).to(self.args.device)
        with every_example(self.accelerator, self.args):  # none twice: a stream's length has to be known
            loader = self.get_test_dataloader(list(sample) if isinstance(sample, IterableDataset) else sample)
        parts = []
        with preserved_randomness(), named_errors("reading examples of `train_dataset`"):
            for batch in loader:
                with named_errors("calibration on `train_dataset`", batch):
                    outputs = self._read_teacher(self._prepare_inputs(batch), wants_logits=False)
                    if outputs.embedding is None:
                        raise ValueError("there is no teacher, and the batch has no `teacher_embedding`.")
                    parts.append(self.accelerator.gather_for_metrics(outputs.embedding.float()))
        return torch.cat(parts) if parts else torch.empty(0, 0)  # of an empty stream

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step; counts their examples."""
        with named_errors("reading `train_dataset`"):
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:  # a stream is asked on at its end
            self._step = StepExamples(self.accelerator, [examples_in(batch) for batch in batches])
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; the bank is fed after the last one of an optimizer step."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.distillation.update_bank(self._gather_rows)
        self._terms.add_loss(loss)
        if self._resumed is None:
            return loss
        # The checkpoint lay between two log lines: carry over what the interrupted run had summed up by then.
        carried, self._globalstep_last_logged = self._resumed
        self._resumed = None
        self._total_loss_scalar -= carried.item()  # belongs to the interrupted call's `train_loss`
        return loss + carried

    def _gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all processes, (total, dim), in the bank's dtype."""
        if self._banks > 1 or self._step is None or self.distillation.bank is None:
            return rows
        return gather_rows(self.accelerator, rows.to(self.distillation.bank.filled.dtype), self._step.counts())

    @property
    def _banks(self) -> int:
        """How many banks there are: one that all processes share, or one of each."""
        bank = self.distillation.bank
        return 1 if self.args.gather_bank or bank is None or bank.size == 0 else self.accelerator.num_processes

    # ---- Evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """As in `Trainer`; without labels it still gives the loss when that needs none (`task_weight=0`)."""
        has_labels = any(inputs.get(name) is not None for name in self.label_names)
        has_teacher = self._teacher is not None or "teacher_embedding" in inputs or "teacher_logits" in inputs
        if has_labels or (not self.label_names and self.args.task_weight > 0):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.args.task_weight > 0 or not has_teacher:  # a plain prediction: the teacher has nothing to do
            accepted = self._teacher.columns if self._teacher is not None else []
            plain = student_inputs(inputs, self._student_columns, accepted)
            return super().prediction_step(model, plain, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        if ignore_keys is None:
            ignore_keys = getattr(self.model.config, "keys_to_ignore_at_inference", ["past_key_values"])
        values = tuple(nested_detach(value) for name, value in outputs.items() if name not in [*ignore_keys, "loss"])
        return loss, values[0] if len(values) == 1 else values, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `Trainer`, with the mean of each term among the metrics. The bank stays as it is."""
        self._terms.start_evaluation()
        self._embeddings.start()
        if self.distillation.bank is not None and len(self.distillation.bank) == 0:  # before the first step
            self._calibrate()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        self._finite.raise_if_found()
        for name, mean in self._terms.evaluated().items():
            output.metrics[f"{metric_key_prefix}_{name}"] = mean
        for name, value in self._embeddings.alignment().items():
            output.metrics[f"{metric_key_prefix}_alignment_{name}"] = value
        return output

    # ---- Saving ----

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
        state = {"log": self._terms.state(self._of_processes), **comparison_state(*self._comparison)}
        if self._banks > 1 and self.args.process_index > 0:
            save_sidecar(output_dir, {"bank": state["bank"]}, process=self.args.process_index)
        self.accelerator.wait_for_everyone()  # or the end could be marked before another process has written its part
        if self.args.should_save:
            state["log"]["last_logged_step"] = torch.tensor(self._globalstep_last_logged)
            about = {"banks": str(self._banks), "files": sizes_of(output_dir)}
            save_sidecar(output_dir, state, self._identity | about)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        args = self.args
        self.args = args.shareable()  # it is pickled into training_args.bin
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args = args

    # ---- Loading ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._is_sharded() or not isinstance(self.model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_student(self.model, resume_from_checkpoint, HEAD)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self._is_sharded() or not isinstance(self.model, PreTrainedModel):
            super()._load_best_model()
        else:
            load_student(self.model, best, HEAD)
        if has_sidecar(best):
            self._restore_comparison(best)
        elif self._projection is not None:
            logger.warning(f"{best} has no head and bank (save_only_model): those of the last step go on.")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            window = self._restore_comparison(checkpoint)
            last_logged = int(window.pop("last_logged_step", 0))
            place = (self.accelerator.process_index, self.accelerator.num_processes, self.args.device)
            self._terms.load_state(window, *place)
            if "loss" in self._terms.window:
                self._resumed = (self._terms.window["loss"], last_logged)

    def _restore_comparison(self, checkpoint: str) -> dict[str, Tensor]:
        """Take over head, projection and bank of a checkpoint; returns its unfinished log window."""
        state, about = load_sidecar(checkpoint)
        head, projection, bank = self._comparison
        if is_of_teacher(about, self._identity, checkpoint, self.args.ignore_teacher_change):
            state["bank"] = bank_of(state, about, checkpoint, self.accelerator.process_index, self._banks)
            restore_comparison(state, head, projection, bank)
        else:
            restore_comparison(state, head, None, None)
            self._calibrate()
        return state.get("log", {})

    @property
    def _comparison(self) -> tuple[Any, TeacherProjection | None, FeatureBank | None]:
        """Head, projection and bank; a sharded checkpoint holds the head with the student."""
        head = None if self._is_sharded() else head_of(self._unwrapped_student())
        return head, self._projection, self.distillation.bank

    def _unwrapped_student(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    # ---- Results ----

    def report(self, dataset: Any = None, teacher: nn.Module | None = None) -> DistillationReport | None:
        """Compare student and teacher on the same examples and machine; see `compare_models`.

        The facts are written to `distillation_report.json` in `output_dir`, and the next card tells them. Only the
        main process measures; the others get None.

        Args:
            dataset: What to measure on, or its name among several evaluation sets. Default: `eval_dataset`.
            teacher: The teacher, where the trainer has none because its outputs were cached.

        Raises:
            ValueError: There is no data set, or the student is sharded over processes.
        """
        dataset, collate = chosen_dataset(dataset, self.eval_dataset), self.data_collator
        if self._is_sharded():
            raise ValueError(
                "a report needs the whole student in one process, and FSDP or DeepSpeed has it in parts. Load the "
                "saved student, and call compare_models."
            )
        if not self.is_world_process_zero():
            return None
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            dataset, collate = with_columns(dataset, collate, self._signature_columns)
        self._facts.report = compare_models(
            self._unwrapped_student(),
            self.teacher if teacher is None else teacher.to(self.args.device),
            dataset,
            collate,
            self.args.per_device_eval_batch_size,
            self.args.student_pooling,
            self.args.teacher_pooling,
            self.label_names or ["labels"],
        )
        self._facts.report.save(self.args.output_dir)
        return self._facts.report

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the student's card, `README.md`, into `output_dir`, with its facts in `model_card.json` beside it.

        It says what is known of this run and nothing else. With `report` called before, it has the comparison with the
        teacher, and with matplotlib the pictures, in `figures`. Of several tasks or data sets it names the first.

        Args:
            args, kwargs: As in `Trainer`: `language`, `license`, `tags`, `model_name`, `finetuned_from`, `tasks`,
                `dataset_tags` (the name on the Hub), `dataset` (what to call it), `dataset_args`; and `teacher_name`,
                what to call the teacher (by default its name and revision on the Hub, if it was loaded by them).
        """
        if self.is_world_process_zero():
            self._facts.write_card(self.hub_model_id, *args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, or find it. A failure is a warning: the training goes on, the push tries again."""
        self.push_in_progress = None
        if self.is_world_process_zero():
            failure = "`push_to_hub` is on, and the student has no place on the Hub yet"
            try:
                self.hub_model_id = create_repository(self.args, failure, token, private)
            except PushError as error:
                logger.warning(f"{error} Training goes on; the student will be in {self.args.output_dir}.")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`: with `push_to_hub` it pushes, too. That a push failed is a warning here."""
        try:
            super().save_model(output_dir, _internal_call)
        except PushError as error:
            logger.warning(str(error))

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
        jobs = [job for job in getattr(self.push_in_progress, "jobs", []) if not job.done()]
        if not jobs or self.args.hub_always_push:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            student = (self.model, self._facts.processing_class, self.args, self.state)
            self.push_in_progress = PushInProgress(
                [*jobs, *push_checkpoint(self.hub_model_id, checkpoint_folder, *student)]
            )

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, with the terms beside `loss`: over the same steps, so that their weighted sum is `loss`."""
        self._finite.raise_if_found()
        if "loss" in logs:
            logs.update(self._terms.line(self._mean_over_processes))
            if self._terms.lines_near_one == 2 and self.distillation.include_own:
                logger.warning_once(
                    f"The teacher's perplexity over the bank stays near 1 ({logs['teacher_perplexity']:.2f}): each "
                    "example has only its own key to match, as in InfoNCE, and its neighbours have no say. Raise "
                    f"teacher_temperature (now {self.args.teacher_temperature}), or set teacher_perplexity=20."
                )
        super().log(logs, start_time)

    def _of_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.gather(values.to(self.args.device).unsqueeze(0))

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.to(self.args.device), "mean")
