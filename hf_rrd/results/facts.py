"""The facts that a model card tells, as one object; `model_card.json` holds the same.

They are what is known of a run, and nothing else: nothing is fetched for them, and no path and no token is among them.
"""

import math
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import try_to_load_from_cache
from torch import nn

from hf_rrd.models.body import is_headless, is_one_of, main_input_of, unwrapped
from hf_rrd.models.embedding import Embedder
from hf_rrd.models.teacher import LOADED_FROM
from hf_rrd.results.measure import size_of
from hf_rrd.training.terms import LOGGED

PACKAGES = ("hf_rrd", "transformers", "torch", "accelerate", "datasets", "tokenizers")
"""Whose versions a card gives, as far as they are in use."""

ALIGNED = "alignment_"
"""How the names of metrics begin that are of the alignment at an evaluation."""


@dataclass
class ModelFacts:
    """A model: its class and its size, and where it is from. What is unknown is None."""

    class_name: str | None = None
    parameters: int | None = None
    bytes: int | None = None
    dtype: str | None = None
    family: str | None = None
    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    name: str | None = None  # on the Hub; of a student, of the weights that it started from
    revision: str | None = None  # the commit there
    description: str | None = None  # what the user calls it
    teacher_layers: list[int] | None = None  # that a student started from, with how many tensors:
    copied_tensors: int | None = None
    fresh_tensors: int | None = None


@dataclass
class DataFacts:
    """A data set: its name and configuration on the Hub, what to call it, and how many examples were trained on."""

    id: str | None = None
    config: str | None = None
    title: str | None = None
    train_examples: int | None = None


@dataclass
class Metric:
    """A metric of the finished student, and the data that it is of."""

    name: str
    value: float
    id: str | None = None  # of the data set on the Hub
    config: str | None = None
    split: str | None = None


@dataclass
class LossTerm:
    """A term of the loss in the first and in the last line of the training log."""

    name: str
    first_step: int
    first: float
    last_step: int
    last: float


@dataclass
class CardFacts:
    """All that a card says of a student."""

    name: str
    library: str  # `transformers` or `peft`
    student: ModelFacts
    repository: str | None = None  # on the Hub, "user/name"
    task: str | None = None  # as the Hub names it
    usage: str | None = None  # the lines of Python that load it
    teacher: ModelFacts | None = None
    dataset: DataFacts = field(default_factory=DataFacts)
    settings: dict[str, Any] = field(default_factory=dict)  # by the names of `RelationalDistillationConfig`
    training: dict[str, Any] = field(default_factory=dict)  # such as `steps`, `learning_rate` and `seed`
    losses: list[LossTerm] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)  # among them alignment at an evaluation
    report: dict[str, Any] = field(default_factory=dict)  # the facts of a `DistillationReport`
    pictures: list[str] = field(default_factory=list)  # the names of those beside the card
    versions: dict[str, str] = field(default_factory=dict)
    license: str | None = None
    language: str | list[str] | None = None
    tags: list[str] = field(default_factory=list)
    base_model: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What is known, as dicts and lists."""
        known: dict[str, Any] = _known(asdict(self))
        return known

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "CardFacts":
        """The facts again, of what `to_json` gave."""
        one = {"student": ModelFacts, "teacher": ModelFacts, "dataset": DataFacts}
        several = {"losses": LossTerm, "metrics": Metric}
        given = {each.name: facts[each.name] for each in fields(cls) if each.name in facts}
        given |= {name: kind(**facts[name]) for name, kind in one.items() if name in facts}
        given |= {name: [kind(**each) for each in facts[name]] for name, kind in several.items() if name in facts}
        return cls(**given)


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        known = {name: _known(each) for name, each in value.items()}
        return {
            name: each
            for name, each in known.items()
            if not (each is None or (isinstance(each, dict | list) and not each))
        }
    return [_known(each) for each in value] if isinstance(value, list) else value


# ---- Models ----

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


def task_of(model: Any) -> tuple[str | None, str]:
    """The Hub's name of a model's task, where it has one, and the class that loads it."""
    name = type(model).__name__
    for mapping, (task, loader) in _TASKS.items():
        if is_one_of(model, mapping):
            return task, loader
    if is_headless(model):
        reads = {"input_ids": "feature-extraction", "pixel_values": "image-feature-extraction"}
        return reads.get(main_input_of(model)), "AutoModel"
    return None, name


def usage_of(student: nn.Module, processing_class: Any, pooling: Any, name: str) -> str | None:
    """Four lines of Python that load and run a student, or three where nothing prepares its input.

    A class of the user's own has none.
    """
    model = unwrapped(student)
    task, model_class = task_of(model)
    if not hasattr(transformers, model_class):
        return None
    bases = [base.__name__ for base in type(processing_class).__mro__]
    processor = next((loader for base, loader in _PROCESSORS.items() if base in bases), None)
    reads, result, output, more = main_input_of(model), "outputs", "", ""
    if is_headless(model):
        pooling = Embedder(model, pooling).pooling
        result = "embedding" if isinstance(pooling, str) else "outputs"
        output = _POOLED[pooling] if isinstance(pooling, str) else ""
    elif task is not None:
        result, output = "logits", ".logits"
        if model is not student and task.endswith("classification"):  # an adapter's base has classes of its own
            more = f", num_labels={model.config.num_labels}"
    given = f'**processor({_EXAMPLES.get(reads, "inputs")}, return_tensors="pt")' if processor else f"{reads}={reads}"
    lines = [f"from transformers import {', '.join(sorted(filter(None, [model_class, processor])))}"]
    lines += [f'processor = {processor}.from_pretrained("{name}")'] if processor else []
    lines += [f'model = {model_class}.from_pretrained("{name}"{more})', f"{result} = model({given}){output}"]
    return "\n".join(lines)


_EXAMPLES = {"input_ids": '"a text"', "pixel_values": "image", "input_values": "waveform"}
"""What a processor is given, by the model's input."""

_POOLED = {
    "mean": ".last_hidden_state.mean(1)",
    "cls": ".last_hidden_state[:, 0]",
    "last_token": ".last_hidden_state[:, -1]",
    "max": ".last_hidden_state.amax(1)",
    "pooler": ".pooler_output",
    "gap": ".last_hidden_state.mean((2, 3))",
}
"""From a model's output for one example to its embedding, by pooling."""


def student_facts(student: nn.Module) -> ModelFacts:
    """A student's class, size and family, and the weights that it started from."""
    model, facts = unwrapped(student), _sized(student)
    facts.family = model.config.model_type
    for name in ("num_hidden_layers", "hidden_size"):
        value = getattr(model.config, name, None)
        setattr(facts, name, value if isinstance(value, int) else None)
    if hasattr(model, "initialization"):  # of `student_from_teacher`
        start = model.initialization
        facts.teacher_layers = list(start.layers)
        facts.copied_tensors, facts.fresh_tensors = len(start.copied), len(start.fresh)
    else:
        facts.name, facts.revision = _on_the_hub(model.config)
    return facts


def teacher_facts(teacher: nn.Module | None, description: str | None) -> ModelFacts | None:
    """A teacher's class and size, and its name on the Hub, or what the user calls it instead."""
    if teacher is None:
        return None if description is None else ModelFacts(description=description)
    facts = _sized(teacher)
    facts.description = description
    if description is None:
        facts.name, facts.revision = teacher.__dict__.get(LOADED_FROM, (None, None))
        if facts.revision is None:
            facts.name, facts.revision = _on_the_hub(getattr(unwrapped(teacher), "config", None))
    return facts


def _sized(model: nn.Module) -> ModelFacts:
    found = size_of(model)
    return ModelFacts(found["class"], found["parameters"], found["bytes"], found["dtype"])


def hub_name(name: Any) -> str | None:
    """A name as the Hub has them; None for a folder or an empty name."""
    found = isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not os.path.exists(name)
    return name if found else None


def _on_the_hub(config: Any) -> tuple[str | None, str | None]:
    """A model's name, if the Hub's local cache has a model of that name, and its commit, if that is beyond doubt."""
    name = hub_name(getattr(config, "_name_or_path", None))
    file = None if name is None else try_to_load_from_cache(name, "config.json")
    if not isinstance(file, str):
        return None, None
    commit = Path(file).parent  # snapshots/<commit>
    only = commit.name if len(list(commit.parent.iterdir())) == 1 else None  # or it may have been another
    return name, getattr(config, "_commit_hash", None) or only  # transformers 5.23 does not say


# ---- Data, losses, versions ----


def source_of(dataset: Any) -> dict[str, str]:
    """What `datasets` knows of where a data set is from: `id`, its name on the Hub, `config` and `split`."""
    info: Any = getattr(dataset, "info", None)
    sources = getattr(info, "download_checksums", None) or ()
    names = [re.match(r"hf://datasets/([^/@]+/[^/@]+)@", source) for source in sources]
    found = next((name[1] for name in names if name), None)
    config = info.config_name if found is not None and info.config_name != "default" else None
    split = getattr(dataset, "split", None)
    source = {"id": found, "config": config, "split": None if split is None else str(split)}
    return {key: value for key, value in source.items() if value}


def loss_terms(log_history: Sequence[Mapping[str, Any]]) -> list[LossTerm]:
    """Each term in the first and in the last line of the training log."""
    lines = [entry for entry in log_history if "loss" in entry and "step" in entry]
    terms = []
    for name in LOGGED:
        values = [(entry["step"], entry[name]) for entry in lines if name in entry and math.isfinite(entry[name])]
        if values:
            terms.append(LossTerm(name, *values[0], *values[-1]))
    return terms


def versions_in_use(library: str) -> dict[str, str]:
    """Exact versions of Python, of the packages in use, and of a student's library."""
    versions = {"python": platform.python_version()}
    for package in dict.fromkeys((*PACKAGES, library)):
        if package in sys.modules:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
    return versions
