"""The facts of a finished run that its model card tells: only what is known, nothing fetched, no path, no token."""

import math
import os
import platform
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers.models import auto

from hf_rrd.config import bank_rows, name_of
from hf_rrd.models.body import auto_pooling, body_of, is_headless, main_input_of, unwrapped
from hf_rrd.models.teacher import LOADED_FROM
from hf_rrd.results.report import DistillationReport, size_of
from hf_rrd.training.objective import TERMS
from hf_rrd.training.terms import PERPLEXITY

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
    dataset: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
    tasks: str | list[str] | None = None,
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
        "task": _first(tasks) or task,
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
        "versions": versions_in_use(() if model is trainer.model else ("peft",)),
    }
    facts["metrics"], facts["alignment"] = _metrics(trainer, facts["report"], hub_name(_first(dataset_tags)))
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
    """The command that started this process; None where it was no script.

    What may be private is replaced by `...`: the values of flags that have a secret, and all that is neither a word, a
    number nor a path in this folder. Of an absolute path its last part is left.
    """
    script = arguments[0] if arguments else ""
    if not script.endswith(".py") or not os.path.exists(script) or "site-packages" in script:
        return None
    if processes > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:  # by what else is not known
        return None
    shown, secret = [], False
    for argument in arguments[1:]:
        name, equals, value = argument.partition("=")
        is_flag = argument.startswith("--")
        if secret and not is_flag:
            shown.append(HIDDEN)
        elif equals and re.fullmatch(r"(--)?\w[\w.-]*", name):
            shown.append(f"{name}={HIDDEN if _is_secret(name) else _shown(value)}")
        else:
            shown.append(argument if is_flag and re.fullmatch(r"--\w[\w-]*", argument) else _shown(argument))
        secret = is_flag and not equals and _is_secret(name)
    launcher = ["python"] if processes == 1 else ["accelerate", "launch", "--num_processes", str(processes)]
    words = [part if HIDDEN in part else shlex.quote(part) for part in (_shown(script), *shown)]
    return " ".join([*launcher, *words])


HIDDEN = "..."
_SECRETS = {"token", "key", "secret", "password", "passwd", "credential", "credentials", "auth"}


def _is_secret(flag: str) -> bool:
    return not _SECRETS.isdisjoint(re.split(r"[-_.]", flag.lower()))


def _shown(value: str) -> str:
    """A value as it may be published."""
    if re.match(r"[/~]|[A-Za-z]:[\\/]", value) and not re.search(r"[,;:=]\s*[/~]", value):
        relative = os.path.relpath(os.path.expanduser(value))
        value = os.path.basename(value.rstrip("/")) if relative.startswith("..") else relative
    outside = re.search(r"(^|[^\w.-])[/~]|//|\.\.|\\|^-[A-Za-z].|@|hf_\w{20}", value)
    plain = re.fullmatch(r"[\w .,:;=+%'()/-]*", value)
    return value if plain and not outside else HIDDEN


def _usage(trainer: Any, model: Any, model_class: str) -> dict[str, str]:
    """What a reader needs to load the student: classes, what goes in and what comes out."""
    if not hasattr(transformers, model_class):  # a class of the user's own
        return {}
    bases = [base.__name__ for base in type(trainer.publishing_processor).__mro__]
    kind = next((loader for name, loader in _PROCESSORS.items() if name in bases), None)
    usage = {"model_class": model_class, "input": main_input_of(model)}
    if is_headless(model):
        pooling = trainer.args.student_pooling
        name = auto_pooling(body_of(model)) if pooling == "auto" else pooling
        usage |= {"pooling": name} if isinstance(name, str) else {}
    elif task_of(model)[0] is not None:
        usage["output"] = "logits"
        if model is not trainer.model and "Classification" in model_class:  # the base has classes of its own
            usage["num_labels"] = str(model.config.num_labels)
    return usage if kind is None else {**usage, "processor_class": kind}


def _origin(trainer: Any, model: Any) -> dict[str, Any]:
    """The family, the size, and the weights that the student started from."""
    sizes = {name: getattr(model.config, name, None) for name in ("num_hidden_layers", "hidden_size")}
    origin: dict[str, Any] = {"family": model.config.model_type}
    origin |= {name: value for name, value in sizes.items() if isinstance(value, int)}
    if hasattr(model, "initialization"):
        parts = ("copied", "fresh")
        return origin | {
            "from_teacher": {"layers": model.initialization.layers}
            | {part: len(getattr(model.initialization, part)) for part in parts}
        }
    return origin | _named(model.config._name_or_path, model.config)


def _teacher(trainer: Any, teacher_name: str | None) -> dict[str, Any]:
    if trainer.teacher is None:
        return {} if teacher_name is None else {"description": teacher_name}
    teacher, facts = unwrapped(trainer.teacher), size_of(trainer.teacher)
    if teacher_name is not None:
        return facts | {"description": teacher_name}
    name, revision = trainer.teacher.__dict__.get(LOADED_FROM, (None, None))
    if revision is not None:
        return facts | {"name": name, "revision": revision}
    config = getattr(teacher, "config", None)
    return facts | _named(getattr(config, "_name_or_path", None), config)


def _named(name: Any, config: Any) -> dict[str, Any]:
    """The name of a model on the Hub, if it is in the local cache of it, and its commit, if that is beyond doubt."""
    if hub_name(name) is None:
        return {}
    file = try_to_load_from_cache(name, "config.json")
    if not isinstance(file, str):
        return {}
    commit = Path(file).parent  # snapshots/<commit>
    only = [commit.name] if len(list(commit.parent.iterdir())) == 1 else [None]  # or it may have been another
    revision = getattr(config, "_commit_hash", None) or only[0]  # transformers 5.23 does not say
    return {"name": name} | ({} if revision is None else {"revision": revision})


def dataset_facts(dataset: Any) -> dict[str, Any]:
    """What `datasets` knows of where a data set is from: its name on the Hub, configuration and split."""
    info: Any = getattr(dataset, "info", None)
    sources = getattr(info, "download_checksums", None) or ()
    names = [re.match(r"hf://datasets/([^/@]+/[^/@]+)@", source) for source in sources]
    found = next((name[1] for name in names if name), None)
    configuration = info.config_name if found is not None and info.config_name != "default" else None
    split = getattr(dataset, "split", None)
    facts = {"id": found, "config": configuration, "split": None if split is None else str(split)}
    return {key: value for key, value in facts.items() if value}


def _dataset(trainer: Any, title: Any, name: Any, configuration: Any) -> dict[str, Any]:
    """Its name on the Hub, as given or as `datasets` had it from there, and how many examples were trained on."""
    facts = {key: value for key, value in dataset_facts(trainer.train_dataset).items() if key != "split"}
    name, title, configuration = _first(name), _first(title), _first(configuration)
    if hub_name(name) and name != facts.get("id"):
        facts = {"id": name}
    facts |= {"config": configuration} if configuration else {}
    facts |= {"title": title or facts["id"]} if title or "id" in facts else {}
    if hasattr(trainer.train_dataset, "__len__") and trainer.state.global_step > 0:
        facts["train_examples"] = len(trainer.train_dataset)
    return facts


def _first(value: Any) -> Any:
    """Of several, as the Trainer's own card may have them, the first."""
    return (value[0] if value else None) if isinstance(value, list | tuple) else value


def _metrics(
    trainer: Any, report: dict[str, Any] | None, given: str | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Metrics and alignment of the final student from the log, by split; without any, the report's accuracy.

    Each is of the data set that was evaluated: its own name on the Hub, or the one that the user gave.
    """
    metrics: dict[tuple[str, str], dict[str, Any]] = {}
    alignment: dict[str, Any] = {}
    for prefix, entry in _final_evaluations(trainer).items():
        on = ({"id": given} if given else {}) | trainer.evaluated_on.get(prefix, {})
        for key, value in entry.items():
            name = " ".join(key.removeprefix(f"{prefix}_").split())
            is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if name in _NOT_METRICS or not key.startswith(f"{prefix}_") or not is_number or not math.isfinite(value):
                continue
            if name.startswith("alignment_"):
                alignment |= {name.removeprefix("alignment_"): value} | on
            else:
                metrics[name, str(on)] = {"name": name, "value": value} | on
    accuracy = (report or {}).get("student", {}).get("accuracy")
    if not metrics and accuracy is not None and report is not None:
        on = ({"id": given} if given else {}) | ({"split": report["split"]} if "split" in report else {})
        metrics["accuracy", ""] = {"name": "accuracy", "value": accuracy} | on
    return list(metrics.values()), alignment


def _final_evaluations(trainer: Any) -> dict[str, dict[str, Any]]:
    """By prefix, the last evaluation of the student as it is now: after the training, or of the best checkpoint."""
    history = trainer.state.log_history
    ends = [place for place, entry in enumerate(history) if "train_runtime" in entry]
    best = getattr(trainer.state, "best_global_step", None) if trainer.args.load_best_model_at_end else None
    step = trainer.state.global_step if best is None else best
    found = {}
    for place, entry in enumerate(history):
        prefixes = [key.removesuffix("_runtime") for key in entry if key.endswith("_runtime")]
        after = bool(ends) and place > ends[-1]
        if prefixes and "train" not in prefixes and (after or entry.get("step") == step):
            found[min(prefixes, key=len)] = entry  # a metric may end like that, too
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
    batch = getattr(trainer, "_train_batch_size", None) or args.train_batch_size  # smaller after a want of memory
    end: dict[str, Any] = next((entry for entry in reversed(state.log_history) if "train_runtime" in entry), {})
    weights = size_of(trainer.model)["dtype"]
    facts = {
        "steps": state.global_step,
        "epochs": round(state.epoch, 2) if state.epoch is not None else None,
        "examples_per_step": batch * args.gradient_accumulation_steps * args.world_size,
        "processes": args.world_size if args.world_size > 1 else None,
        "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else weights,
        "seed": args.seed,
        "seconds": None if trainer.was_resumed else end.get("train_runtime"),  # of the last part alone
    }
    if not trainer.has_own_optimizer:
        warm_up = args.get_warmup_steps(state.max_steps)
        scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        facts |= {
            "optimizer": getattr(args.optim, "value", args.optim),
            "learning_rate": args.learning_rate,
            "scheduler": f"{scheduler}, {warm_up:,} warm-up steps" if warm_up else scheduler,
            "weight_decay": args.weight_decay or None,
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


def versions_in_use(more: tuple[str, ...] = ()) -> dict[str, str]:
    """Exact versions of Python and of the packages in use."""
    versions = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        if package in sys.modules:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
    return versions
