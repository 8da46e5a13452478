"""The facts of a run, gathered while it goes."""

import math
from typing import Any

import numpy as np
from torch import nn
from transformers import TrainerCallback

from hf_rrd.models.pooling import name_of
from hf_rrd.results.card import write_card
from hf_rrd.results.facts import CardFacts, DataFacts, Metric, hub_name, source_of
from hf_rrd.results.measure import size_of
from hf_rrd.results.report import DistillationReport
from hf_rrd.training.terms import LOGGED

NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", *LOGGED)
"""What an evaluation reports beside the user's metrics."""


class FactsCallback(TrainerCallback):
    """Gathers what a Trainer's events say of its run, and writes the student's card of it.

    Args:
        teacher: The teacher, or None where its outputs are cached.
        train_dataset: The training set.
        processing_class: What is saved beside the student.
        own_optimizer: Whether the optimizer is the user's own: then the settings do not describe it.

    Attributes:
        report: The last comparison with the teacher. A new training makes it void.
    """

    def __init__(
        self, teacher: nn.Module | None, train_dataset: Any, processing_class: Any = None, own_optimizer: bool = False
    ) -> None:
        self.teacher, self.train_dataset = teacher, train_dataset
        self.processing_class, self.own_optimizer = processing_class, own_optimizer
        self.report: DistillationReport | None = None
        self.resumed = False
        self.sources: dict[str, dict[str, str]] = {}  # by prefix, of which data the metrics are

    # ---- Events ----

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Note the student and its settings."""
        self.args, self.state, self.model = args, state, model

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Note that a training begins, or goes on from a checkpoint."""
        self.on_init_end(args, state, control, model)
        self.report, self.resumed = None, state.global_step > 0

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Note which data set and split the metrics are of."""
        prefix = prefix_of(metrics or {})
        if prefix is not None:
            split = {"split": prefix} if prefix in ("train", "validation", "test") else {}
            self.sources[prefix] = split | source_of(getattr(eval_dataloader, "dataset", None))

    # ---- The card ----

    def write_card(
        self,
        repository: str | None = None,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        *,
        teacher_name: str | None = None,
    ) -> CardFacts:
        """Write the student's card into `output_dir`, of what is known by now.

        Args:
            repository: The student's name on the Hub.
            language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args,
                teacher_name: As in `RelationalDistillationTrainer.create_model_card`.
        """
        tags = [tags] if isinstance(tags, str) else list(tags or ())
        tags += [tag for tag in getattr(self.model, "model_tags", None) or () if tag not in tags]
        given = first(dataset_tags)
        return write_card(
            self.args.output_dir,
            self.model,
            teacher=self.teacher,
            teacher_name=teacher_name,
            dataset=self._dataset(first(dataset), given, first(dataset_args)),
            settings=self._settings(),
            training=self._training(),
            log_history=self.state.log_history,
            report=self.report,
            metrics=self._metrics(given if hub_name(given) else None),
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

    def _dataset(self, title: str | None, name: str | None, config: str | None) -> DataFacts:
        """The training set, as the user names it, or as `datasets` had it from the Hub."""
        source = source_of(self.train_dataset)
        if hub_name(name) and name != source.get("id"):
            source = {"id": str(name)}
        facts = DataFacts(source.get("id"), config or source.get("config"), title or source.get("id"))
        if hasattr(self.train_dataset, "__len__") and self.state.global_step > 0:
            facts.train_examples = len(self.train_dataset)
        return facts

    def _settings(self) -> dict[str, Any]:
        """Those of ours that had a part in this run."""
        args = self.args
        names = ["task_weight", "relational_weight", "kd_weight"] + ["kd_temperature"] * (args.kd_weight > 0)
        if args.relational_weight > 0:
            names += ["relational_loss"]
            names += ["student_temperature"] * (args.relational_loss in ("rrd", "infonce"))
            if args.relational_loss == "rrd":
                names += ["teacher_temperature" if args.teacher_perplexity is None else "teacher_perplexity"]
            names += ["student_projection", "teacher_projection", "projection_dim"]
            names += ["student_pooling", "teacher_pooling"]
            names += ["bank_size", "include_own"] if args.relational_loss in ("rrd", "infonce") else []
        settings = {name: getattr(args, name) for name in names}
        shown = {name: name_of(value) if callable(value) else value for name, value in settings.items()}
        return {name: value for name, value in shown.items() if value is not None}

    def _training(self) -> dict[str, Any]:
        args, state = self.args, self.state
        batch = state.train_batch_size or args.train_batch_size  # the former is smaller after a want of memory
        ends = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
        facts = {
            "steps": state.global_step,
            "epochs": round(state.epoch, 2) if state.epoch is not None else None,
            "examples_per_step": batch * args.gradient_accumulation_steps * args.world_size,
            "processes": args.world_size if args.world_size > 1 else None,
            "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else size_of(self.model)["dtype"],
            "seed": args.seed,
            "seconds": round(ends[-1], 1) if ends and not self.resumed else None,  # else of the last part alone
        }
        if not self.own_optimizer:
            warm_up = args.get_warmup_steps(state.max_steps)
            scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
            facts |= {
                "optimizer": getattr(args.optim, "value", args.optim),
                "learning_rate": args.learning_rate,
                "scheduler": f"{scheduler}, {warm_up:,} warm-up steps" if warm_up else scheduler,
                "weight_decay": args.weight_decay or None,
            }
        return {name: value for name, value in facts.items() if value is not None}

    def _metrics(self, given: str | None) -> list[Metric]:
        """The metrics of the student as it is now, each of the data set that was evaluated, else of the given one."""
        best = getattr(self.state, "best_global_step", None) if self.args.load_best_model_at_end else None
        step = self.state.global_step if best is None else best
        metrics: dict[tuple[str, str], Metric] = {}
        for prefix, entry in final_evaluations(self.state.log_history, step).items():
            source = ({"id": given} if given else {}) | self.sources.get(prefix, {})
            for key, value in entry.items():
                name = " ".join(key.removeprefix(f"{prefix}_").split())
                is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
                if key.startswith(f"{prefix}_") and name not in NOT_METRICS and is_number and math.isfinite(value):
                    metrics[name, str(source)] = Metric(name, value, **source)
        return list(metrics.values())


def final_evaluations(log_history: list[dict[str, Any]], step: int) -> dict[str, dict[str, Any]]:
    """By prefix, the last evaluation of a student as it is: after its training, or at the step that it is of."""
    ends = [place for place, entry in enumerate(log_history) if "train_runtime" in entry]
    found = {}
    for place, entry in enumerate(log_history):
        prefix = prefix_of(entry)
        if prefix not in (None, "train") and (entry.get("step") == step or (ends and place > ends[-1])):
            found[str(prefix)] = entry
    return found


def prefix_of(metrics: dict[str, Any]) -> str | None:
    """The prefix of an evaluation's metrics: `eval` of `eval_runtime`; None of other lines of the log."""
    prefixes = [key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")]
    return min(prefixes, key=len, default=None)  # a metric may end like that, too


def first(value: Any) -> Any:
    """Of several, as the Trainer's own card may have them, the first."""
    return (value[0] if value else None) if isinstance(value, list | tuple) else value
