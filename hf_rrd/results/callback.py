"""The facts of a run, gathered while it goes."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import nn
from transformers import TrainerCallback

from hf_rrd.config import WEIGHTS
from hf_rrd.models.pooling import name_of
from hf_rrd.results.card import write_card
from hf_rrd.results.facts import OURS, CardFacts, DataFacts, EmbedderFacts, Metric, hub_name, last_losses, source_of
from hf_rrd.results.measure import size_of
from hf_rrd.results.report import DistillationReport
from hf_rrd.training.checkpoint import flaw_in
from hf_rrd.training.distillation import BANK_LOSSES, Distillation
from hf_rrd.training.terms import LOGGED

Names = str | list[str] | None


class FactsCallback(TrainerCallback):
    """Gathers what a Trainer's events say of its run, and writes the student's card of it.

    Args:
        teacher: The teacher, or None where its outputs are cached.
        train_dataset: The training set.
        processing_class: What is saved beside the student.
        own_optimizer: Whether the optimizer is the user's own: then the settings do not describe it.
        distillation: The run's, which knows what came of its settings.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        train_dataset: Any,
        processing_class: Any = None,
        own_optimizer: bool = False,
        distillation: Distillation | None = None,
    ) -> None:
        self.teacher, self.train_dataset = teacher, train_dataset
        self.processing_class, self.own_optimizer, self.distillation = processing_class, own_optimizer, distillation
        self.report: DistillationReport | None = None  # the last one since a training began
        self.sources: dict[str, dict[str, str]] = {}  # by prefix, of which data the metrics are
        self.best_step: int | None = None  # where the student is not that of the last step

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Note the student and its settings."""
        self.args, self.state, self.model = args, state, model

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Note the student again; an earlier report is not of it."""
        self.on_init_end(args, state, control, model)
        self.report = self.best_step = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step that the student is of, if its best checkpoint was there to be loaded."""
        if args.load_best_model_at_end and flaw_in(state.best_model_checkpoint or "") is None:
            self.best_step = state.best_global_step

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Note which data set and split the metrics are of."""
        prefix = prefix_of(given.get("metrics") or {})
        if prefix is not None:
            split = {"split": prefix} if prefix in ("train", "validation", "test") else {}
            self.sources[prefix] = split | source_of(getattr(given.get("eval_dataloader"), "dataset", None))

    def write_card(
        self,
        embedder: EmbedderFacts | None = None,
        repository: str | None = None,
        language: Names = None,
        license: str | None = None,
        tags: Names = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: Names = None,
        dataset_tags: Names = None,
        dataset: Names = None,
        dataset_args: Names = None,
        *,
        teacher_name: str | None = None,
        baseline: Mapping[str, float] | None = None,
        **unknown: Any,
    ) -> CardFacts:
        """Write the student's card into `output_dir`, of what is known by now.

        `embedder` is as in `hf_rrd.write_card`, `repository` the student's name on the Hub, and the others are the
        arguments of the trainer's `create_model_card`.
        """
        if unknown:
            instead = "see its help (of a data set `dataset_tags` is the name on the Hub, `dataset` what to call it)"
            raise TypeError(f"create_model_card() takes no {sorted(unknown)}: {instead}.")
        tags = [tags] if isinstance(tags, str) else list(tags or ())
        tags += [tag for tag in getattr(self.model, "model_tags", None) or () if tag not in tags]
        named = hub_name(first(dataset_tags))
        return write_card(
            self.args.output_dir,
            self.model,
            teacher=self.teacher,
            teacher_name=teacher_name,
            dataset=self._dataset(named, first(dataset), first(dataset_args)),
            settings=self._settings(),
            training=self._training(),
            log_history=self.state.log_history,
            report=self.report,
            metrics=self._metrics(named),
            baseline=baseline,
            embedder=embedder,
            processing_class=self.processing_class,
            pooling=self.args.student_pooling,
            name=model_name,
            repository=repository or self.args.hub_model_id,
            task=first(tasks),
            license=license,
            language=language,
            tags=tags,
            base_model=finetuned_from,
        )

    def _dataset(self, name: str | None, title: str | None, config: str | None) -> DataFacts:
        """The training set, as the user names it, or as `datasets` had it from the Hub."""
        source = source_of(self.train_dataset)
        if name not in (None, source.get("id")):
            source = {"id": str(name)}
        return DataFacts(source.get("id"), config or source.get("config"), title or source.get("id"))

    def _settings(self) -> dict[str, Any]:
        """Those of ours that had a part in this run, as they came out: numbers for "auto", the rows in the bank."""
        args, found = self.args, {} if self.distillation is None else in_use(self.distillation)
        settings = vars(args) | found
        names = [*WEIGHTS]
        learned = last_losses(self.state.log_history)  # a weight may have come down to 0 since
        if settings["kd_weight"] or "kd_loss" in learned:
            names += ["kd_loss", "kd_temperature"]
        if settings["relational_weight"] or "relational_loss" in learned:
            names += ["balance_losses", "relational_loss", "student_projection", "teacher_projection"]
            names += ["projection_dim", "matryoshka_dims", "student_pooling", "teacher_pooling"]
            if args.relational_terms.keys() & set(BANK_LOSSES):
                names += ["bank_size", "student_temperature"]
            if "rrd" in args.relational_terms:
                names += ["teacher_temperature"]
        if settings["layer_weight"]:
            names += ["layer_pairs"]
        else:
            names.remove("layer_weight")
        names += ["alignment_examples"] * (args.alignment_examples > 0)
        told = {name: name_of(settings[name]) if callable(settings[name]) else settings[name] for name in names}
        return {name: value for name, value in told.items() if value is not None}

    def _training(self) -> dict[str, Any]:
        """How it was trained."""
        args, state = self.args, self.state
        batch = state.train_batch_size or args.train_batch_size  # the former is smaller after a want of memory
        facts = {
            "steps": state.global_step,
            "best_step": self.best_step,
            "metric_for_best_model": None if self.best_step is None else args.metric_for_best_model,
            "epochs": None if state.epoch is None else round(state.epoch, 2),
            "train_examples": len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None,
            "examples_per_step": batch * args.gradient_accumulation_steps * args.world_size,
            "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else size_of(self.model)["dtype"],
            "seed": args.seed,
        }
        if not self.own_optimizer:
            facts |= {
                "optimizer": getattr(args.optim, "value", args.optim),
                "learning_rate": args.learning_rate,
                "scheduler": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
                "warmup_steps": args.get_warmup_steps(state.max_steps),
                "weight_decay": args.weight_decay,
            }
        return {name: value for name, value in facts.items() if value is not None}

    def _metrics(self, named: str | None) -> list[Metric]:
        """The metrics of the student as it is now, each of the data set that was evaluated, else of the named one."""
        history = self.state.log_history
        step = self.state.global_step if self.best_step is None else self.best_step
        end = max((place for place, line in enumerate(history) if "train_runtime" in line), default=len(history))
        others = {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time", *LOGGED}
        metrics: dict[tuple[str, str], Metric] = {}  # by name and data set
        for place, line in enumerate(history):
            prefix = prefix_of(line)
            if prefix in (None, "train") or (line.get("step") != step and place < end):
                continue
            source = ({"id": named} if named else {}) | self.sources.get(str(prefix), {})
            for key, value in line.items():
                name = " ".join(key.removeprefix(f"{prefix}_").split())
                is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
                if key.startswith(f"{prefix}_") and name not in others and is_number:
                    metrics[name, str(source)] = Metric(name, value, **source)
        measured = {} if self.report is None else self.report.facts
        if "accuracy" in measured.get("student", {}) and all(name.startswith(OURS) for name, _ in metrics):
            source = {key: measured[key] for key in ("id", "config", "split") if key in measured}
            source = ({"id": named} if named else {}) | source
            metrics["accuracy", str(source)] = Metric("accuracy", measured["student"]["accuracy"], **source)
        return list(metrics.values())


def in_use(distillation: Distillation) -> dict[str, Any]:
    """What came of a run's settings, by their names: weights, poolings, the width and the rows of the bank."""
    found: dict[str, Any] = dict(distillation.weights())
    if distillation.logits is not None:
        found["kd_temperature"] = distillation.logits.temperature(distillation.args.kd_temperature)
    if distillation.projection is not None:
        found["projection_dim"] = distillation.projection.dim
    if distillation.reference is not None:
        found["bank_size"] = len(distillation.reference)
    if distillation.head is not None:
        found["student_pooling"] = distillation.head.embedder.known_as
    return found


def prefix_of(metrics: dict[str, Any]) -> str | None:
    """The prefix of an evaluation's metrics: `eval` of `eval_runtime`; None of other lines of the log."""
    prefixes = [key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")]
    return min(prefixes, key=len, default=None)  # a metric may end like that, too


def first(value: Names) -> str | None:
    """Of several names the first."""
    return (value[0] if value else None) if isinstance(value, list | tuple) else value
