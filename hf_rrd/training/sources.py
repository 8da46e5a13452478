"""Which teacher made the cached columns of a data set, and that no other one stands beside them."""

from collections.abc import Mapping
from typing import Any

from accelerate.utils import broadcast_object_list

from hf_rrd.models.body import unwrapped
from hf_rrd.models.columns import CACHED_COLUMNS
from hf_rrd.models.teacher import Teacher
from hf_rrd.training.data import Preview
from hf_rrd.training.hashing import hash_of
from hf_rrd.training.identity import known_as, weights_sample
from hf_rrd.training.projection import TeacherProjection


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
    here = {"teacher": source_of(teacher)} if teacher.model is not None else {}
    identity, here = broadcast_object_list([identity, here])
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
