"""The teacher's outputs computed once, as columns of the data set that stand in for the teacher."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict
from datasets.arrow_writer import ArrowWriter
from torch import nn
from transformers.utils import logging

from hf_rrd.files import clear_leftovers, written_whole
from hf_rrd.models.body import is_classifier, is_headless, unwrapped
from hf_rrd.models.columns import CACHED_COLUMNS
from hf_rrd.models.sentence_transformers import Texts, own_tokenizer
from hf_rrd.models.teacher import Teacher, load_teacher
from hf_rrd.training.data import Preview, cached_embeddings, note_logits, sample_of
from hf_rrd.training.identity import source_of, weights_hash
from hf_rrd.training.projection import TEACHER_PROJECTIONS, TeacherProjection
from hf_rrd.training.reading import Columns, Reader, agree, fingerprint_of, outputs_of, spread

logger = logging.get_logger(__name__)

SHARD_EXAMPLES = 8192  # in a file of the cache: what a killed call loses at most, for each process
CALIBRATION_EXAMPLES = 4096  # that a projection is measured on

AnyDataset = TypeVar("AnyDataset", bound=Dataset | DatasetDict | IterableDataset | IterableDatasetDict)


def cache_teacher_outputs(
    dataset: AnyDataset,
    teacher: nn.Module | str | os.PathLike[str],
    batch_size: int = 32,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    *,
    processing_class: Any = None,
    text_column: str | None = None,
    prompt_name: str | None = None,
    pooling: str | Callable[..., Any] = "auto",
    with_logits: bool | None = None,
    teacher_projection: str = "none",
    projection_dim: int | None = None,
    dtype: str = "float16",
    num_workers: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    teacher_model_init_kwargs: dict[str, Any] | None = None,
) -> AnyDataset:
    """The data set with the columns `teacher_embedding` and, where wanted, `teacher_logits`.

    The trainer finds them by their names and then needs no teacher. Works on tokenized or transformed examples: on
    what the teacher would see in training, its `teacher_` columns or those that it shares with the student.

    The outputs lie in Arrow files of `SHARD_EXAMPLES` examples; a call after a kill goes on with those that are whole.
    Their folder is named by a hash of the data set with its preprocessing, the teacher's class, config and weights,
    and all that is said here about reading it: of functions of yours (a transform, a collator, a pooling, a model
    class) by their code and what it refers to. Before old files are trusted, `PROBED_EXAMPLES` of their examples are
    computed and compared: a changed teacher never meets an old cache. Under `accelerate launch` the processes share
    the work, in a folder that all of them see, and each returns the whole data set. A stream is computed as it is
    read, and nothing is kept.

    Args:
        dataset: Map-style or streamed, one or a dict of them.
        teacher: A transformers model or a SentenceTransformer, or a Hub name or folder of one. It is frozen, set to
            evaluation mode and moved to the process's device.
        batch_size: Examples of one forward, on each process. Texts are sorted by length within a file first.
        data_collator: From whole examples to a batch, as in training. Default: pads and stacks the teacher's columns.
        processing_class: The teacher's tokenizer or feature extractor, for the default. That of a SentenceTransformer
            is its own.
        text_column: A column of texts, which the teacher reads itself, in place of columns of tokens: a
            SentenceTransformer as its `encode` does, with its tokenizer, length and prompt; another model by its
            tokenizer, `processing_class`.
        prompt_name: Which of the SentenceTransformer's prompts comes before each text of `text_column`; None is its
            `default_prompt_name`.
        pooling: As `teacher_pooling` in `RelationalDistillationConfig`.
        with_logits: Whether to keep logits, (classes,) for each example; None keeps those of a classifier.
        teacher_projection, projection_dim: As in `RelationalDistillationConfig`, to keep narrower embeddings; the
            trainer then takes them as they are. "pca" and "orthogonal" need a `projection_dim`. Measured on
            `CALIBRATION_EXAMPLES` examples, of a dict those of its first data set, so pass training and evaluation
            sets together.
        dtype: "float16" or "float32", of what is kept.
        num_workers: Processes that read and collate ahead.
        cache_dir: Default: `teacher_outputs` in the cache folder of datasets.
        teacher_model_init_kwargs: For `from_pretrained`, of a teacher given by name: `revision`, `dtype` and so on.

    Returns:
        The data set, of the same kind and format, with the columns. `teacher_embedding` has the teacher's width or
        the projection's.

    Raises:
        ValueError: A setting is out of its range, there are such columns already, the teacher lacks an input, reads
            another one each time, has no such prompt, or an output is not finite in `dtype`.
        FileNotFoundError: The processes do not share the folder.

    Example:

    ```python
    train = cache_teacher_outputs(train, "google/vit-base-patch16-224", batch_size=64)
    trainer = RelationalDistillationTrainer(model=student, args=args, train_dataset=train)
    ```
    """
    choices = {"dtype": (dtype, ["float16", "float32"])}  # Arrow has no bfloat16
    choices["teacher_projection"] = teacher_projection, list(TEACHER_PROJECTIONS)
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"`{name}` must be one of {known}, got {value!r}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be 1 or more, got {batch_size}.")
    if text_column is None and prompt_name is not None:
        raise ValueError(f"`prompt_name` {prompt_name!r} needs a `text_column`, whose texts it comes before.")
    if text_column is not None and data_collator is not None:
        raise ValueError(f"`text_column` {text_column!r} is read without a `data_collator`. Leave one of them out.")
    model = load_teacher(teacher, teacher_model_init_kwargs, pooling=pooling)
    if model is None:
        raise TypeError("`teacher` must be a model, a Hub name or a folder, got None.")
    with_logits = is_classifier(model) if with_logits is None else with_logits
    if with_logits and is_headless(model):
        raise ValueError(f"`with_logits` needs a teacher with a head, got {type(model).__name__}.")
    frozen = Teacher(model, wants_embedding=True, wants_logits=with_logits, pooling=pooling)
    texts = None if text_column is None else Texts(model, processing_class, prompt_name)
    settings: dict[str, Any] = {"weights": weights_hash(model), "pooling": frozen.pooling}
    if texts is None:
        frozen.mind_prompt()
    else:
        frozen.read_after(texts.prompt_length)
        settings["texts"] = (text_column, *texts.rules)
    reader = Reader(
        teacher=frozen,
        collate=data_collator,
        processing_class=own_tokenizer(model) if processing_class is None else processing_class,
        batch_size=batch_size,
        num_workers=num_workers,
        with_logits=with_logits,
        dtype=dtype,
        settings=settings,
        texts=texts,
        text_column=text_column or "",
    )
    if projection_dim is None and teacher_projection in ("pca", "orthogonal"):
        raise ValueError(f"teacher_projection={teacher_projection!r} needs a `projection_dim`, got None. Try 128.")
    root = Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE) / "teacher_outputs"
    clear_leftovers(root, "*/.*.arrow")
    parts: dict[str, Any] = dict(dataset) if isinstance(dataset, dict) else {"": dataset}
    for name, part in parts.items():
        _check_part(name, part, text_column)
    if teacher_projection != "none":
        reader.projection = _projection(next(iter(parts.values())), reader, teacher_projection, projection_dim, root)
    elif projection_dim is not None:
        raise ValueError(f"`projection_dim` needs a `teacher_projection`, got {projection_dim} and 'none'. Try 'pca'.")
    reader.source = source_of(reader.teacher, reader.projection)
    parts = {
        name: _streamed(part, reader) if isinstance(part, IterableDataset) else _cached(part, reader, root)
        for name, part in parts.items()
    }
    return cast(AnyDataset, type(dataset)(parts) if isinstance(dataset, dict) else parts[""])


def with_views(dataset: Dataset, views: int) -> Dataset:
    """Each example several times, with a column `view_seed`, so that an augmentation can be cached.

    A transform that draws its random numbers from `view_seed` alone (docs/guides/caching.md has one) gives the same
    view each time it is asked: teacher and student see one and the same. One epoch is then `views` passes over the
    examples. Each example is stored once; a shuffled or selected set is first written out in its order.

    Args:
        dataset: Map-style.
        views: How many times, 1 or more.

    Returns:
        `views * len(dataset)` examples.

    Raises:
        ValueError: `views` is below 1, or this is no single map-style data set of the library datasets.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"`dataset` must be a datasets.Dataset, got a {type(dataset).__name__}. Of several splits only the "
            "training set is augmented: with_views(data['train'], 4)."
        )
    if views < 1:
        raise ValueError(f"`views` must be 1 or more, got {views}.")
    count = len(dataset)
    seeds = np.arange(views * count).reshape(views, count)
    return datasets.concatenate_datasets([dataset.add_column("view_seed", row) for row in seeds])


def _check_part(name: str, part: Any, text_column: str | None) -> None:
    """Raise a ValueError for a data set that cannot be given the columns."""
    which = f"dataset[{name!r}]" if name else "`dataset`"
    if not isinstance(part, Dataset | IterableDataset):
        raise ValueError(
            f"{which} must be a data set of the library datasets, got {type(part).__name__}. Dataset.from_list or "
            "Dataset.from_generator make one."
        )
    present = [column for column in CACHED_COLUMNS if column in (part.column_names or [])]
    if present:
        raise ValueError(f"{which} has the columns {present} already. Take them out with remove_columns first.")
    if isinstance(part, Dataset) and len(part) == 0:
        raise ValueError(f"{which} is empty, got 0 examples.")
    example = {} if text_column is None else Preview(part).example
    if text_column is not None and not isinstance(text := example.get(text_column), str):
        came = f"a {type(text).__name__} there" if text_column in example else f"the columns {sorted(example)}"
        raise ValueError(f"`text_column` {text_column!r} must be a column of texts, and {which} has {came}.")


def _projection(dataset: Any, reader: Reader, kind: str, dim: int | None, root: Path) -> TeacherProjection:
    """Measured on the embeddings of examples of a data set, which are kept as any others."""
    assert reader.teacher.width is not None
    projection = TeacherProjection(reader.teacher.width, dim, kind, seed=0)
    if not projection.is_ready:
        sample = sample_of(dataset, CALIBRATION_EXAMPLES, seed=0)
        if isinstance(sample, IterableDataset):
            sample = Dataset.from_list(list(sample))
        projection.fit(cached_embeddings(_outputs(sample, replace(reader, with_logits=False, dtype="float32"), root)))
        projection.load_state_dict(broadcast_object_list([projection.state_dict()])[0])  # the same on all processes
    return projection


def _outputs(dataset: Dataset, reader: Reader, root: Path) -> Dataset:
    """The columns alone, from files that are there or are written now."""
    folder = root / fingerprint_of(dataset, reader)
    starts = range(0, len(dataset), SHARD_EXAMPLES)
    shards = [range(start, min(start + SHARD_EXAMPLES, len(dataset))) for start in starts]
    whole = {rows: part for rows in shards if (part := _kept(folder, rows)) is not None}
    if whole and not _is_trusted(whole, dataset, reader):
        logger.warning(f"{folder} holds other outputs than this teacher gives for these examples: they are made anew.")
        whole = {}
    # The main process decides, or a late one would no longer see what is missing.
    folder, missing = broadcast_object_list([folder, [rows for rows in shards if rows not in whole]])
    own = missing[reader.state.process_index :: reader.state.num_processes]
    quiet = not own or not reader.state.is_local_main_process
    with logging.tqdm(total=sum(map(len, own)), desc="teacher outputs", unit=" examples", disable=quiet) as bar:
        for rows in own:
            _write(outputs_of(dataset.select(rows), reader, bar), reader, _file_of(folder, rows))
    reader.state.wait_for_everyone()
    parts = [_kept(folder, rows) for rows in shards]
    if absent := [_file_of(folder, rows).name for rows, part in zip(shards, parts, strict=True) if part is None]:
        raise FileNotFoundError(
            f"{len(absent)} files of {folder} are not there, {absent[0]} first: another process wrote them elsewhere. "
            "Set `cache_dir` to a folder that all processes share."
        )
    return datasets.concatenate_datasets(parts)


def _cached(dataset: Dataset, reader: Reader, root: Path) -> Dataset:
    """A map-style data set with the columns."""
    both = [dataset.with_format(None), _outputs(dataset, reader, root)]
    result = datasets.concatenate_datasets(both, axis=1, split=dataset.split)
    # Where it is from, for the model card.
    result.info.download_checksums, result.info.config_name = dataset.info.download_checksums, dataset.info.config_name
    if reader.with_logits:
        note_logits(result, reader.teacher.model)
    return _formatted(result, dataset)


def _file_of(folder: Path, rows: range) -> Path:
    return folder / f"{rows.start:012d}-{rows.stop:012d}.arrow"


def _kept(folder: Path, rows: range) -> Dataset | None:
    """The outputs of some rows as they were written; None where there are none, or not all of them."""
    try:
        part = Dataset.from_file(str(_file_of(folder, rows)))
    except Exception:  # there is no file, or something else is in it
        return None
    return part if len(part) == len(rows) else None


def _is_trusted(whole: dict[range, Dataset], dataset: Dataset, reader: Reader) -> bool:
    """Whether the teacher gives for some examples what was kept of them."""
    kept, shards = datasets.concatenate_datasets(list(whole.values())), list(whole)  # all but the last of one length
    places = spread(len(kept))
    rows = [shards[place // SHARD_EXAMPLES][place % SHARD_EXAMPLES] for place in places]
    return agree(outputs_of(dataset.select(rows), reader), kept.select(places).with_format("numpy")[:], reader)


def _write(columns: Columns, reader: Reader, path: Path) -> None:
    """One Arrow file, whole or not at all."""
    features = reader.features({name: values.shape[1] for name, values in columns.items()})
    arrays = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        for name, values in columns.items()
    }
    with written_whole(path) as temporary, ArrowWriter(features=features, path=str(temporary)) as writer:
        writer.write_table(pa.table(arrays))
        writer.finalize()


def _formatted(result: Dataset, original: Dataset) -> Dataset:
    """With examples as the original gives them, and the new columns beside them."""
    style = original.format
    if style["type"] is None:
        return result
    new = [name for name in CACHED_COLUMNS if name in result.column_names]
    is_custom = style["type"] == "custom"  # a transform sees its own columns alone
    return result.with_format(
        style["type"],
        columns=style["columns"] if is_custom else style["columns"] + new,
        output_all_columns=is_custom or style["output_all_columns"],
        **style["format_kwargs"],
    )


def _streamed(dataset: IterableDataset, reader: Reader) -> IterableDataset:
    """The columns computed as the stream is read."""

    def outputs(batch: dict[str, list[Any]]) -> Columns:
        examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return reader.outputs(reader.batch(examples))

    features = None
    if dataset.features is not None:
        widths = {"teacher_embedding": reader.teacher.width if reader.projection is None else reader.projection.dim}
        if reader.with_logits:
            widths["teacher_logits"] = unwrapped(reader.teacher.model).config.num_labels
        features = Features({**dataset.features, **reader.features(cast(dict[str, int], widths))})
    result = dataset.map(outputs, batched=True, batch_size=reader.batch_size, features=features)
    if reader.with_logits:
        note_logits(result, reader.teacher.model)
    return result
