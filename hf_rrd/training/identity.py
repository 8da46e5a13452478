"""Which model this is, and whether a checkpoint, or the cached columns of a data set, are of the same teacher."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from hf_rrd.errors import named_errors
from hf_rrd.models.body import unwrapped
from hf_rrd.models.columns import CACHED_COLUMNS
from hf_rrd.models.pooling import name_of
from hf_rrd.models.teacher import Teacher
from hf_rrd.training.checkpoint import has_sidecar, said_of
from hf_rrd.training.data import Preview, cached_embeddings, has_cached_embeddings, is_map_style
from hf_rrd.training.hashing import hash_of
from hf_rrd.training.projection import TeacherProjection

SAMPLED = 1024  # values of each weight in a `weights_sample`

# Fields of a config that say nothing about a model's outputs beside its weights.
NO_PART_OF_OUTPUTS = (
    *("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype"),
    *("problem_type", "use_cache", "output_hidden_states", "output_attentions", "return_dict"),
    *("id2label", "label2id"),
)
PATHS = ("base_model_name_or_path", "revision", "inference_mode")  # in an adapter's config: where it came from


def weights_hash(model: nn.Module) -> str:
    """Of a model's class, config, adapters and weights: equal where two models give equal outputs.

    With the numbers that their modules hold, such as an epsilon or an adapter's scale, buffers that are not saved, and
    the code of classes that no package brings. Where the weights lie does not matter, so a moved branch on the Hub is
    noticed, and a new revision with the same weights is not computed again.
    """
    plain = unwrapped(model)
    tensors = sorted({**dict(plain.named_buffers()), **plain.state_dict()}.items())
    weights = _hash_of(model, ((name, tensor) for name, tensor in tensors if isinstance(tensor, Tensor)))
    return hash_of(weights, [(name, type(module), _values_of(module)) for name, module in plain.named_modules()])


def weights_sample(model: nn.Module) -> str:
    """The same of `SAMPLED` values of each weight, spread over it: enough to tell two trainings apart, in no time.

    Of weights that are not in memory (offloaded to disk) and of packed quantised ones the shapes have to do. Where
    DeepSpeed has partitioned the weights, all processes have to call it.
    """
    return _hash_of(model, _samples(unwrapped(model)))


def teacher_identity(teacher: Teacher, training_set: Preview) -> dict[str, str]:
    """By the name of the column, what stands for the source of the outputs that a run learns.

    That is the model, with its pooling for embeddings, or a sample of a cached column; of a stream's column only the
    name is known.
    """
    if teacher.model is not None:
        teacher.sources["teacher"] = source_of(teacher)
    identity, own = {}, teacher.sources.get("teacher", "")
    wanted = {"teacher_embedding": teacher.wants_embedding, "teacher_logits": teacher.wants_logits}
    for column in [column for column, is_wanted in wanted.items() if is_wanted]:
        is_cached = teacher.model is None or training_set.has(column)
        made = own if column == "teacher_embedding" else own.partition(", pooling ")[0]
        identity[column] = f"cached outputs {_column_sample(training_set, column)}" if is_cached else made
    return identity


def settings_of(distillation: Any, training_set: Any) -> dict[str, str]:
    """By name, those settings of a run on whose values the content of its checkpoints depends."""
    if distillation.projection is None:
        return {"relational_weight": "0"}
    names = ("student_projection", "teacher_projection", "projection_dim")
    settings = {name: str(getattr(distillation.args, name)) for name in names}
    settings["matryoshka_dims"] = str(distillation.prefixes or "none")
    if distillation.rows > 0:
        fits = is_map_style(training_set) and len(training_set) <= distillation.rows
        settings["bank_size"] = "for the whole training set" if fits else str(distillation.rows)
    return {"relational_weight": "above 0", **settings}


def known_as(pooling: Any) -> str:
    """A pooling's name, of a function with a hash of what it does."""
    return pooling if isinstance(pooling, str) else f"{name_of(pooling)} {hash_of(pooling)[:8]}"


def _values_of(module: nn.Module) -> dict[str, Any]:
    """What a module computes with beside its weights: numbers, also by an adapter's name, and functions."""
    without = ("training", "gradient_checkpointing", "warnings_issued")
    values = {name: value for name, value in vars(module).items() if name[0] != "_" and name not in without}
    kinds = (bool, int, float, FunctionType)
    return {
        name: value
        for name, value in values.items()
        if all(isinstance(each, kinds) for each in (value.values() if isinstance(value, dict) else [value]))
    }


def check_identity(about: dict[str, str], identity: dict[str, str], checkpoint: str) -> None:
    """Raise a ValueError for a checkpoint that says of itself that it is of another teacher, or of other settings."""
    instead = "start a new run from the student: `from_pretrained` loads it from the checkpoint."
    columns = identity.keys() & CACHED_COLUMNS
    for name in sorted(identity.keys() - columns, key=lambda name: name != "relational_weight"):  # that one first
        if "relational_weight" in about and (there := about.get(name, "none")) != identity[name]:
            what = f"{checkpoint} was written with {name} {there}, this run has {name} {identity[name]}"
            raise ValueError(f"{what}. Resume with the same settings, or {instead}")
    known = columns & about.keys()  # a term that was off then has no source to compare
    changed = sorted(column for column in known or columns if about.get(column) != identity[column])
    if changed:
        source = " and ".join(f"{column} from {about.get(column, 'one that it does not name')}" for column in changed)
        here = " and ".join(f"{column} from {identity[column]}" for column in changed)
        what = f"{checkpoint} was written with another teacher: {source}; this run has {here}"
        raise ValueError(f"{what}. Pass the same teacher, or {instead}")


@contextmanager
def resuming(checkpoint: str | None, identity: dict[str, str]) -> Iterator[None]:
    """Check a checkpoint before a training goes on from it; say what torch means where its optimizer does not fit."""
    if checkpoint is not None and has_sidecar(checkpoint):
        check_identity(said_of(checkpoint), identity, checkpoint)
    try:
        yield
    except ValueError as error:
        if checkpoint is None or "parameter group" not in str(error):
            raise
        raise ValueError(
            f"{checkpoint} was written by a run that trained other weights ({error}). Resume with the same student, "
            "frozen and adapted as it was then, or start a new run from it."
        ) from error


# ---- Who made the cached columns of a data set ----


def source_of(teacher: Teacher, projection: TeacherProjection | None = None) -> str:
    """What cached columns tell of who made them: the model's class, its dtype, a hash of its weights, the pooling."""
    assert teacher.model is not None
    model = unwrapped(teacher.model)
    dtypes = sorted({"meta" if weight.is_meta else str(weight.dtype)[6:] for weight in model.parameters()})
    parts = [type(model).__name__, " and ".join(dtypes), f"weights {weights_sample(teacher.model)[:16]}"]
    parts += [f"pooling {known_as(teacher.pooling)}"]
    if projection is not None:
        parts += [f"projection {projection.kind} {hash_of(projection.state_dict())[:8]}"]
    return ", ".join(parts)


def check_sources(identity: dict[str, str], teacher: Teacher, sets: Mapping[str, Preview]) -> dict[str, str]:
    """The main process's identity of the teacher: the others may have no weights yet (FSDP).

    A ValueError, on all processes, for cached columns that were made by another teacher than this one, or than others.
    A teacher beside columns that lack some of what is wanted may be another one: it is there for the rest.
    """
    sources = {name: source for name, preview in sets.items() if (source := _noted(preview.dataset))}
    identity, here = broadcast_object_list([identity, teacher.sources])
    teacher.sources = here | sources
    for name in sources:
        check_source(name, sets[name], teacher)
    return identity


def check_source(name: str, preview: Preview, teacher: Teacher) -> None:
    """Raise a ValueError for a set whose cached columns are of another teacher than the run's, or another pooling."""
    wanted = ["teacher_embedding"] * teacher.wants_embedding + ["teacher_logits"] * teacher.wants_logits
    source = _noted(preview.dataset)
    if source is None:
        return
    is_all = all(preview.has(column) for column in wanted)
    known = ((first, other) for first, other in teacher.sources.items() if is_all or first != "teacher")
    first, other = next(known, (name, source))
    if _differ(source, other, teacher.wants_embedding):
        raise ValueError(
            f"the cached columns of `{name}` are of another teacher ({source}) than `{first}` ({other}). Pass the "
            "teacher and the pooling that they were made with, or none, or make them anew with "
            "cache_teacher_outputs, of training and evaluation sets in one call."
        )
    pooling, is_given = f"pooling {known_as(teacher.pooling)}", teacher.model is None and teacher.pooling != "auto"
    if is_given and teacher.wants_embedding and pooling not in source.split(", "):
        raise ValueError(
            f"`teacher_pooling` has no say in cached columns, and asks for {pooling}; those of `{name}` have another "
            f"({source}). Leave it out, or make them with cache_teacher_outputs(..., pooling=...)."
        )


def _noted(dataset: Any) -> str | None:
    features = getattr(dataset, "features", None) or {}
    values = [getattr(features.get(column), "feature", None) for column in CACHED_COLUMNS]
    return next((source.partition("; ")[0] for value in values if (source := getattr(value, "id", None))), None)


def _differ(source: str, other: str, with_embeddings: bool) -> bool:
    parts, others = (each.split(", ")[: None if with_embeddings else 3] for each in (source, other))
    if parts[1] != others[1]:  # the weights of one model in two dtypes have two hashes
        parts[1:3] = others[1:3]
    return parts != others


# ---- Parts of what stands for a model ----


def _column_sample(training_set: Preview, column: str) -> str:
    """Of some rows of a cached column, or of one where each would have to be made."""
    digest, dataset = hashlib.sha256(column.encode()), training_set.dataset
    if column == "teacher_embedding" and has_cached_embeddings(dataset) and is_map_style(dataset):
        rows = dataset.select(range(0, len(dataset), max(1, len(dataset) // 64)))
        digest.update(cached_embeddings(rows).numpy().tobytes())
    elif is_map_style(dataset) and training_set.has(column):
        with named_errors(f"reading the column `{column}`"):
            digest.update(repr(torch.as_tensor(training_set.example[column]).flatten().tolist()).encode())
    return digest.hexdigest()[:16]


def _samples(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda named: named[0]):
        with _gathered(tensor):
            values = None
            if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta:
                count = min(SAMPLED, tensor.numel())
                places = torch.linspace(0, tensor.numel() - 1, count, dtype=torch.float64, device=tensor.device).long()
                values = tensor.detach().reshape(-1)[places]
            yield f"{name} {tuple(tensor.shape)}", values


def _gathered(tensor: Tensor) -> Any:
    """The whole of a weight that ZeRO-3 has partitioned."""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])


def _hash_of(model: nn.Module, tensors: Iterator[tuple[str, Any]]) -> str:
    plain = unwrapped(model)
    digest = hashlib.sha256(f"{type(plain).__module__}.{type(plain).__qualname__}".encode())
    config = getattr(plain, "config", None)
    about = [_facts(config, NO_PART_OF_OUTPUTS) if config is not None else {}, _adapters(model)]
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in tensors:
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            digest.update(f" {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _facts(config: Any, without: tuple[str, ...]) -> dict[str, Any]:
    return {str(name): value for name, value in config.to_dict().items() if name not in without}


def _adapters(model: nn.Module) -> list[Any]:
    """What decides how a PEFT model uses its adapters, beside their weights."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return []
    states = {  # as its layers have them: the model of `get_base_model` knows of none that are active
        (module._disable_adapters, *getattr(module, "merged_adapters", []), *getattr(module, "active_adapters", []))
        for module in model.modules()
        if hasattr(module, "_disable_adapters")
    }
    described = {name: _facts(config, PATHS) for name, config in configs.items()}
    return [described, sorted(map(str, states))]
