"""The facts of a finished run that its model card tells: only what is known, nothing fetched, no path, no token."""

import math
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers.models import auto

from hf_rrd.body import auto_pooling, body_of, is_headless, main_input_of, unwrapped
from hf_rrd.config import bank_rows, name_of
from hf_rrd.objective import TERMS
from hf_rrd.report import DistillationReport, size_of
from hf_rrd.terms import PERPLEXITY

TAGS = ("hf-rrd", "knowledge-distillation", "relational-representation-distillation", "generated_from_trainer")
"""Of each card; the task's comes as its `pipeline_tag`."""

PACKAGES = ("hf_rrd", "transformers", "torch", "accelerate", "datasets", "tokenizers")
"""Whose versions a card gives, as far as they are in use."""

# By the attribute of `modeling_auto` that knows the classes: the Hub's task, and the class that loads them.
_TASKS = {
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": ("text-classification", "AutoModelForSequenceClassification"),
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": ("image-classification", "AutoModelForImageClassification"),
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": ("token-classification", "AutoModelForTokenClassification"),
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES": ("audio-classification", "AutoModelForAudioClassification"),
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": ("question-answering", "AutoModelForQuestionAnswering"),
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": ("fill-mask", "AutoModelForMaskedLM"),
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": ("text-generation", "AutoModelForCausalLM"),
}
# By the name of a base class, because importing them all takes a second.
_PROCESSORS = {
    "PreTrainedTokenizerBase": "AutoTokenizer",
    "ImageProcessingMixin": "AutoImageProcessor",
    "FeatureExtractionMixin": "AutoFeatureExtractor",
    "ProcessorMixin": "AutoProcessor",
}
# What an evaluation reports beside the user's metrics.
_NOT_METRICS = (
    "loss",
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "model_preparation_time",
    *TERMS,
    PERPLEXITY,
)


def run_facts(
    trainer: Any,
    report: DistillationReport | None = None,
    model_name: str | None = None,
    repository: str | None = None,
    teacher_name: str | None = None,
    dataset: str | None = None,
    dataset_tags: str | None = None,
    dataset_args: str | None = None,
    tasks: str | None = None,
) -> dict[str, Any]:
    """All that a card says about a run, as it can be written to JSON.

    Args:
        trainer: A `RelationalDistillationTrainer`.
        report: Its comparison with the teacher, where one was made.
        model_name: Default: the name of the output folder.
        repository: On the Hub, "user/name", where it is known.
        teacher_name: What to call the teacher. Default: its name on the Hub and its revision, if it was loaded by one.
        dataset: What to call the data set.
        dataset_tags: Its name on the Hub. Default: where `datasets` had it from.
        dataset_args: Which configuration of it.
        tasks: The Hub's name of the task. Default: by the model's class.
    """
    model = unwrapped(trainer.model)
    task, model_class = task_of(model)
    facts: dict[str, Any] = {
        "name": model_name or Path(trainer.args.output_dir).absolute().name,
        "repository": repository,
        "task": tasks or task,
        "library": "transformers" if model is trainer.model else "peft",
        "usage": _usage(trainer, model, model_class),
        "student": {**size_of(trainer.model), **_origin(trainer, model)},
        "teacher": _teacher(trainer, teacher_name),
        "dataset": _dataset(trainer, dataset, dataset_tags, dataset_args),
        "settings": _settings(trainer),
        "training": _training(trainer),
        "losses": _losses(trainer.state.log_history),
        "report": None if report is None else report.facts,
        "command": command_of(sys.argv, trainer.args.world_size),
        "versions": _versions(() if model is trainer.model else ("peft",)),
    }
    metrics = _metrics(trainer, facts["report"])
    facts |= {"metrics": metrics.pop("metrics"), "alignment": metrics.pop("alignment")}
    return {name: value for name, value in facts.items() if value not in (None, {}, [])}


def task_of(model: Any) -> tuple[str | None, str]:
    """The Hub's name of a model's task, where it has one, and the class that loads it."""
    name = type(model).__name__
    for mapping, (task, loader) in _TASKS.items():
        known = getattr(auto.modeling_auto, mapping).values()
        if any(name in ((each,) if isinstance(each, str) else each) for each in known):
            return task, loader
    if is_headless(model):
        reads = {"input_ids": "feature-extraction", "pixel_values": "image-feature-extraction"}
        return reads.get(main_input_of(model)), "AutoModel"
    return None, name


def hub_name(name: Any) -> str | None:
    """A name as the Hub has them; None for a folder or an empty name."""
    found = isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not os.path.exists(name)
    return name if found else None


def command_of(arguments: list[str], processes: int = 1) -> str | None:
    """The command that started this process, without absolute paths and tokens; None where it was no script."""
    script = arguments[0] if arguments else ""
    if not script.endswith(".py") or not os.path.exists(script) or "site-packages" in script:
        return None
    shown = [_shown_path(script)]
    secret = False
    for argument in arguments[1:]:
        flag, _, value = argument.partition("=")
        if secret and not argument.startswith("--"):
            secret = False
        elif "token" in flag.replace("tokenizer", "") and flag.startswith("--"):
            secret = not value
        elif re.search(r"[\"']token[\"']|hf_\w{20}", argument):
            shown = shown[:-1] if shown[-1].startswith("--") else shown
        else:
            shown.append("=".join(_shown_path(part) for part in argument.split("=", 1)))
    launcher = "python" if processes == 1 else f"accelerate launch --num_processes {processes}"
    return " ".join([launcher, *(f"'{part}'" if re.search(r"[^\w./=,:+@%-]", part) else part for part in shown)])


def _shown_path(text: str) -> str:
    if not os.path.isabs(text) and not text.startswith(("~", "..")):
        return text
    relative = os.path.relpath(os.path.expanduser(text))
    return os.path.basename(text.rstrip("/")) if relative.startswith("..") else relative


def _usage(trainer: Any, model: Any, model_class: str) -> dict[str, str]:
    """What a reader needs to load the student: classes, what goes in, and what comes out."""
    bases = [base.__name__ for base in type(trainer.processing_class).__mro__]
    kind = next((loader for name, loader in _PROCESSORS.items() if name in bases), None)
    usage = {"model_class": model_class, "input": main_input_of(model)}
    if is_headless(model):
        pooling = trainer.args.student_pooling
        usage["pooling"] = auto_pooling(body_of(model)) if pooling == "auto" else name_of(pooling)
    return usage if kind is None else {**usage, "processor_class": kind}


def _origin(trainer: Any, model: Any) -> dict[str, Any]:
    """The family, the size, and the weights that the student started from."""
    sizes = {name: getattr(model.config, name, None) for name in ("num_hidden_layers", "hidden_size")}
    origin: dict[str, Any] = {"family": model.config.model_type}
    origin |= {name: value for name, value in sizes.items() if isinstance(value, int)}
    if hasattr(model, "initialization"):
        parts = ("copied", "sliced", "fresh")
        return origin | {
            "from_teacher": {"layers": model.initialization.layers}
            | {part: len(getattr(model.initialization, part)) for part in parts}
        }
    name = hub_name(model.config._name_or_path)
    return origin if name is None else origin | _named(name, model.config, {})


def _teacher(trainer: Any, teacher_name: str | None) -> dict[str, Any]:
    if trainer.teacher is None:
        return {} if teacher_name is None else {"description": teacher_name}
    teacher = unwrapped(trainer.teacher)
    facts = size_of(trainer.teacher)
    config = getattr(teacher, "config", None)
    if teacher_name is not None:
        return facts | {"description": teacher_name}
    name = hub_name(getattr(config, "_name_or_path", None))
    return facts if name is None else facts | _named(name, config, trainer.args.teacher_model_init_kwargs or {})


def _named(name: str, config: Any, loaded_with: dict[str, Any]) -> dict[str, Any]:
    """A name on the Hub and the commit that was loaded, as the local cache knows it."""
    revision = getattr(config, "_commit_hash", None)  # gone in transformers 5.23
    if revision is None:
        where = {key: loaded_with[key] for key in ("revision", "cache_dir") if loaded_with.get(key)}
        file = try_to_load_from_cache(name, "config.json", **where)
        revision = Path(file).parent.name if isinstance(file, str) else None  # snapshots/<commit>/config.json
    return {"name": name} | ({} if revision is None else {"revision": revision})


def _dataset(trainer: Any, title: str | None, name: str | None, configuration: str | None) -> dict[str, Any]:
    """Its name on the Hub, as given or as `datasets` had it from there, and how many examples were trained on."""
    info: Any = getattr(trainer.train_dataset, "info", None)
    sources = [
        re.match(r"hf://datasets/([^/@]+/[^/@]+)@", each) for each in getattr(info, "download_checksums", None) or ()
    ]
    found = next((source[1] for source in sources if source), None)
    name = hub_name(name) or found
    if name == found and configuration is None and found is not None:
        configuration = None if info.config_name == "default" else info.config_name
    facts = {"id": name, "title": title or name, "config": configuration}
    if hasattr(trainer.train_dataset, "__len__"):
        facts["train_examples"] = len(trainer.train_dataset)
    return {key: value for key, value in facts.items() if value}


def _metrics(trainer: Any, report: dict[str, Any] | None) -> dict[str, Any]:
    """Metrics and alignment of the final student from the log, by split; without any, the report's accuracy."""
    metrics: dict[tuple[str, str], float] = {}
    alignment = {}
    for prefix, entry in _final_evaluations(trainer).items():
        own = {key.removeprefix(f"{prefix}_"): value for key, value in entry.items() if key.startswith(f"{prefix}_")}
        split = str(getattr(trainer.eval_dataset, "split", None) or "") if prefix == "eval" else prefix
        for name, value in own.items():
            if not isinstance(value, int | float) or not math.isfinite(value) or name in _NOT_METRICS:
                continue
            if name.startswith("alignment_"):
                alignment[name.removeprefix("alignment_")] = value
            else:
                metrics[split, name] = value
    accuracy = (report or {}).get("student", {}).get("accuracy")
    if not metrics and accuracy is not None and report is not None:
        metrics[report.get("split", ""), "accuracy"] = accuracy
    shown = [
        {"name": name, "value": value} | ({"split": split} if split else {})
        for (split, name), value in metrics.items()
    ]
    return {"metrics": shown, "alignment": alignment}


def _final_evaluations(trainer: Any) -> dict[str, dict[str, Any]]:
    """By prefix, the last evaluation of the student as it is now: after the training, or of the best checkpoint."""
    history = trainer.state.log_history
    ends = [place for place, entry in enumerate(history) if "train_runtime" in entry]
    best = getattr(trainer.state, "best_global_step", None) if trainer.args.load_best_model_at_end else None
    step = trainer.state.global_step if best is None else best
    found = {}
    for place, entry in enumerate(history):
        for key in entry:
            prefix = key.removesuffix("_runtime")
            after = bool(ends) and place > ends[-1]
            if prefix not in (key, "train") and (after or entry.get("step") == step):
                found[prefix] = entry
    return found


def _settings(trainer: Any) -> dict[str, Any]:
    """Those of ours that had a part in this run."""
    args = trainer.args
    names = ["task_weight", "relational_weight", "kd_weight"] + ["kd_temperature"] * (args.kd_weight > 0)
    if args.relational_weight > 0:
        names += ["relational_loss"]
        if args.relational_loss in ("rrd", "infonce"):
            names += ["student_temperature"]
        if args.relational_loss == "rrd":
            names += ["teacher_temperature" if args.teacher_perplexity is None else "teacher_perplexity"]
        names += ["student_projection", "teacher_projection", "projection_dim", "student_pooling", "teacher_pooling"]
    names += ["teacher_dtype"]
    settings = {name: getattr(args, name) for name in names}
    if args.relational_weight > 0:
        settings |= {"bank_size": bank_rows(args, trainer.train_dataset), "include_own": args.include_own}
    shown = {name: name_of(value) if callable(value) else value for name, value in settings.items()}
    return {name: value for name, value in shown.items() if value is not None}


def _training(trainer: Any) -> dict[str, Any]:
    args, state = trainer.args, trainer.state
    together = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    end: dict[str, Any] = next((entry for entry in reversed(state.log_history) if "train_runtime" in entry), {})
    scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    facts = {
        "steps": state.global_step,
        "epochs": round(state.epoch, 2) if state.epoch is not None else None,
        "examples_per_step": together,
        "processes": args.world_size if args.world_size > 1 else None,
        "optimizer": getattr(args.optim, "value", args.optim),
        "learning_rate": args.learning_rate,
        "scheduler": f"{scheduler}, {args.warmup_steps:g} warm-up steps" if args.warmup_steps else scheduler,
        "weight_decay": args.weight_decay or None,
        "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "seed": args.seed,
        "seconds": end.get("train_runtime"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _losses(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each term's first and last line of the training log."""
    lines = [entry for entry in history if "loss" in entry and "step" in entry]
    losses = []
    for name in ("loss", *TERMS, PERPLEXITY):
        values = [(entry["step"], entry[name]) for entry in lines if name in entry and math.isfinite(entry[name])]
        if values:
            (first_step, first), (last_step, last) = values[0], values[-1]
            losses.append(
                {"name": name, "first_step": first_step, "first": first, "last_step": last_step, "last": last}
            )
    return losses


def _versions(more: tuple[str, ...]) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        if package in sys.modules:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
    return versions
