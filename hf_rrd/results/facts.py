"""The facts that a model card tells, as one object; `model_card.json` holds the same.

They are what is known of a run, and nothing else: nothing is fetched for them, and no path and no token is among them.
"""

import math
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, metadata
from typing import Any

import transformers
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers.modelcard import TASK_MAPPING
from transformers.utils import PushToHubMixin

from hf_rrd.models.body import is_classifier, is_headless, main_input_of, unwrapped
from hf_rrd.models.columns import forward_columns
from hf_rrd.models.embedding import Embedder
from hf_rrd.models.initialization import Initialization
from hf_rrd.models.sentence_transformers import own_pooling
from hf_rrd.models.teacher import LOADED_FROM
from hf_rrd.results.measure import size_of
from hf_rrd.training.terms import LOGGED

OURS = ("alignment_", "teacher_retrieval@")  # how the metrics begin that no hub knows


@dataclass
class ModelFacts:
    """A model: its class and its size, and where it is from. What is unknown is None."""

    class_name: str | None = None
    parameters: int | None = None
    bytes: int | None = None
    name: str | None = None  # on the Hub; of a student, of the weights that it started from
    revision: str | None = None  # the commit there
    description: str | None = None  # what the user calls it
    teacher_layers: list[int] | None = None  # that a student started from
    teacher_words: bool | None = None  # whether a narrower student's embeddings of tokens started from the teacher's
    encoder: str | None = None  # the name by which sentence-transformers loads it, if it is a model of that library


@dataclass
class Usage:
    """How a student is run that is of a class of transformers."""

    reads: str  # the name of its input
    has_processor: bool  # whether there is a class of transformers that prepares it
    pooling: str | None = None  # of a headless student
    states: str | None = None  # what it pools, by the shape: `tokens`, `map`, `map_channels_last`, or an output's name
    mask: str | None = None  # the input that says which of its tokens are padding
    pads: bool = False  # whether the processor makes texts or speech of several lengths one batch
    frames: bool = False  # whether that mask is of samples, and the hidden states are of frames
    num_labels: int | None = None  # of an adapter, whose base has classes of its own


@dataclass
class EmbedderFacts:
    """A student as a model of sentence-transformers."""

    reads: str  # the name of its input
    dimensions: int
    pooling: str | None = None
    similarity: str | None = None  # the name of the library's function
    length: int | None = None  # of a text, in tokens
    projection: int = 0  # the parameters of the modules after the transformer
    prompts: list[str] = field(default_factory=list)  # the names of those that are not empty
    in_teachers_space: bool = False  # whether its rows are to be compared with the teacher's own


@dataclass
class DataFacts:
    """A data set: its name and configuration on the Hub, and what to call it."""

    id: str | None = None
    config: str | None = None
    title: str | None = None


@dataclass
class Metric:
    """A metric of the finished student, and the data that it is of."""

    name: str
    value: float
    id: str | None = None  # of the data set on the Hub
    config: str | None = None
    split: str | None = None


@dataclass
class CardFacts:
    """All that a card says of a student."""

    name: str
    library: str  # `transformers`, `peft` or `sentence-transformers`
    student: ModelFacts
    repository: str | None = None  # on the Hub, "user/name"
    task: str | None = None  # as the Hub names it
    usage: Usage | None = None
    embedder: EmbedderFacts | None = None
    teacher: ModelFacts = field(default_factory=ModelFacts)
    dataset: DataFacts = field(default_factory=DataFacts)
    settings: dict[str, Any] = field(default_factory=dict)  # by the names of `RelationalDistillationConfig`
    training: dict[str, Any] = field(default_factory=dict)  # such as `steps`, `learning_rate` and `seed`
    losses: dict[str, float] = field(default_factory=dict)  # each term's last value in the log
    classes: list[str] = field(default_factory=list)  # the names of a classifier's, in the order of its logits
    metrics: list[Metric] = field(default_factory=list)  # among them alignment at an evaluation
    baseline: dict[str, float] = field(default_factory=dict)  # metrics of the same student without distillation
    report: dict[str, Any] = field(default_factory=dict)  # the facts of a `DistillationReport`
    pictures: list[str] = field(default_factory=list)  # the names of those beside the card
    versions: dict[str, str] = field(default_factory=dict)
    made_with: str | None = None  # the address of this package
    license: str | None = None
    language: str | list[str] | None = None
    tags: list[str] = field(default_factory=list)
    base_model: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What is known, as dicts and lists."""
        return asdict(self, dict_factory=_known)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "CardFacts":
        """The facts again, of what `to_json` gave."""
        kinds: dict[str, Any] = {"student": ModelFacts, "teacher": ModelFacts, "usage": Usage, "dataset": DataFacts}
        kinds["embedder"] = EmbedderFacts
        given = {name: kinds[name](**value) if name in kinds else value for name, value in facts.items()}
        given["metrics"] = [Metric(**each) for each in facts.get("metrics", [])]
        return cls(**given)


def _known(facts: list[tuple[str, Any]]) -> dict[str, Any]:
    """Those that are neither None nor empty."""
    return {name: value for name, value in facts if value or value == 0}


def task_of(model: nn.Module) -> str | None:
    """The Hub's name of a model's task, by its class."""
    for task, classes in TASK_MAPPING.items():
        if any(type(model).__name__ in (each if isinstance(each, tuple) else (each,)) for each in classes.values()):
            return str(task)
    reads = main_input_of(model) if is_headless(model) else ""
    return {"input_ids": "feature-extraction", "pixel_values": "image-feature-extraction"}.get(reads)


def usage_of(student: nn.Module, processing_class: Any, pooling: Any) -> Usage | None:
    """How a student is run; None for a class of the user's own, which nobody else has."""
    model = unwrapped(student)
    if type(model) is not getattr(transformers, type(model).__name__, None):
        return None
    usage = Usage(main_input_of(model), isinstance(processing_class, PushToHubMixin))
    _note_padding(usage, model, processing_class)
    if is_headless(model) or type(model).__name__.endswith("WithProjection"):
        embedder = Embedder(model, pooling)
        usage.pooling = embedder.pooling if isinstance(embedder.pooling, str) else None
        usage.states = embedder.states if usage.pooling else None
    elif model is not student and is_classifier(model):
        usage.num_labels = model.config.num_labels
    return usage


def _note_padding(usage: Usage, model: nn.Module, processing_class: Any) -> None:
    """Note what a student's processor does with inputs of several lengths, and what its mask is of."""
    parts = {"input_ids": "tokenizer", "pixel_values": "image_processor"}
    part = getattr(processing_class, parts.get(usage.reads, "feature_extractor"), processing_class)
    mask = "pixel_attention_mask" if usage.reads == "pixel_values" else "attention_mask"
    if usage.has_processor:
        has_mask = mask in getattr(part, "model_input_names", ()) and getattr(part, "return_attention_mask", True)
    else:
        has_mask = usage.reads == "input_ids" and mask in (forward_columns(model) or ())
    usage.mask = mask if has_mask else None
    padding = getattr(part, "pad_token", getattr(part, "padding_value", None))
    usage.pads = usage.has_processor and usage.reads in ("input_ids", "input_values") and padding is not None
    usage.frames = usage.reads == "input_values" and hasattr(model, "_get_feature_vector_attention_mask")


def model_facts(model: nn.Module | None, description: str | None = None) -> ModelFacts:
    """A model's class and size, and where it is from: its name on the Hub, or what the user calls it instead."""
    if model is None:
        return ModelFacts(description=description)
    plain, size = unwrapped(model), size_of(model)
    facts = ModelFacts(size["class"], size["parameters"], size["bytes"], description=description)
    start = getattr(plain, "initialization", None)
    if isinstance(start, Initialization):  # by `student_from_teacher`, whose config names the teacher
        facts.teacher_layers = list(start.layers) if start.has_layers else None
        facts.teacher_words = bool(start.narrowed) or None
    elif description is None:
        name, revision = model.__dict__.get(LOADED_FROM, (None, None))
        facts.name, facts.revision = (name, revision) if revision else _on_the_hub(plain)
    if own_pooling(plain) is not None:
        facts.encoder = facts.name or (hub_name(description) if "/" in (description or "") else None)
    return facts


def embedder_facts(model: Any) -> EmbedderFacts:
    """What a SentenceTransformer says of itself."""
    first, *others = model
    reads = main_input_of(first.auto_model)
    return EmbedderFacts(
        reads=reads,
        dimensions=model.get_embedding_dimension(),
        pooling=next((str(each.pooling_mode) for each in others if hasattr(each, "pooling_mode")), None),
        similarity=model.similarity_fn_name,
        length=model.max_seq_length if reads == "input_ids" else None,
        projection=sum(weight.numel() for module in others for weight in module.parameters()),
        prompts=sorted(name for name, prompt in model.prompts.items() if prompt),
    )


def hub_name(name: Any) -> str | None:
    """A name as the Hub has them; None for a folder or an empty name."""
    found = isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not os.path.exists(name)
    return name if found else None


def _on_the_hub(model: Any) -> tuple[str | None, str | None]:
    """A model's name, if the Hub's local cache has a model of that name, and its commit, if its config knows it."""
    config = getattr(model, "config", None)
    name = hub_name(getattr(config, "_name_or_path", None))
    is_cached = name is not None and isinstance(try_to_load_from_cache(name, "config.json"), str)
    return (name, getattr(config, "_commit_hash", None)) if is_cached else (None, None)


def source_of(dataset: Any) -> dict[str, str]:
    """What `datasets` knows of where a data set is from: `id`, its name on the Hub, `config` and `split`."""
    info: Any = getattr(dataset, "info", None)
    sources = getattr(info, "download_checksums", None) or ()
    names = [re.match(r"hf://datasets/([^/@]+/[^/@]+)@", source) for source in sources]
    found = next((name[1] for name in names if name), None)
    config = info.config_name if found is not None and info.config_name != "default" else None
    source = {"id": found, "config": config, "split": getattr(dataset, "split", None)}
    return {key: str(value) for key, value in source.items() if value}


def last_losses(log_history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last finite value of each term in the training log."""
    lines = [entry for entry in log_history if "loss" in entry and "step" in entry]
    return {name: line[name] for line in lines for name in LOGGED if math.isfinite(line.get(name, math.nan))}


def home_of_package() -> str | None:
    """The address of this package, the first that its metadata has; None where that has none."""
    try:
        addresses = metadata("hf_rrd").get_all("Project-URL") or []
    except PackageNotFoundError:  # it runs from a folder
        return None
    return addresses[0].partition(", ")[2] if addresses else None


def versions_in_use(*libraries: str) -> dict[str, str]:
    """Exact versions of Python, of the packages that are loaded, and of a student's libraries."""
    packages = ("hf_rrd", "transformers", "torch", "accelerate", "datasets", "tokenizers", *libraries)
    versions = {name: str(sys.modules[name].__version__) for name in packages if name in sys.modules}
    return {"python": platform.python_version()} | versions
