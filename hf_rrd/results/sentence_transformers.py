"""A student as a model of sentence-transformers, which answers in its teacher's space."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor, nn
from transformers.utils import logging

from hf_rrd.models.body import unwrapped
from hf_rrd.models.head import RelationalHead
from hf_rrd.models.sentence_transformers import AROUND, MISSING, opened
from hf_rrd.results.facts import EmbedderFacts, embedder_facts
from hf_rrd.results.measure import evaluating
from hf_rrd.training.data import preserved_randomness
from hf_rrd.training.projection import TeacherProjection

logger = logging.get_logger(__name__)

POOLINGS = {"mean": "mean", "cls": "cls", "max": "max", "last_token": "lasttoken"}
"""Of our poolings those that the library has, with its names."""

FORMAT = "sentence_transformers"
"""The value of `student_format=` that writes such a model."""


def save_sentence_transformer(
    trainer: Any,
    folder: str | os.PathLike[str],
    *,
    prompts: dict[str, str] | None = None,
    default_prompt_name: str | None = None,
    truncate_dim: int | None = None,
) -> None:
    """Write a trainer's student as a model of sentence-transformers: Transformer, Pooling, Dense, Normalize.

    The Dense layer is the student's projection, with what the teacher's projection took off put back. So a row of the
    student is one of the teacher's space, and can be looked for among the teacher's own:
    `student.encode(query) @ teacher_index.T`. With `matryoshka_dims` and teacher_projection="pca" it stays in the
    turned space, whose first dimensions carry most. `from_pretrained(folder)` loads the transformer alone.

    Args:
        trainer: A `RelationalDistillationTrainer`, after its training.
        folder: Where to write. Tokenizer or processor are the trainer's `processing_class`; the length is that of the
            longest text in the training set, if that has a column `input_ids`, else the tokenizer's.
        prompts, default_prompt_name, truncate_dim: As of `SentenceTransformer`, to be saved with it.

    Raises:
        ImportError: The library is missing.
        ValueError: The student is not compared with a teacher's embedding, is sharded over processes, has no
            processing class, or its pooling is none of the library's.
    """
    student = trainer._unwrapped_student()
    with trainer.distillation.worn():
        if trainer.is_world_process_zero():
            Path(folder).mkdir(parents=True, exist_ok=True)
            add_modules(trainer, folder, prompts, default_prompt_name, truncate_dim, student)


def add_modules(
    trainer: Any,
    folder: str | os.PathLike[str],
    prompts: dict[str, str] | None = None,
    default_prompt_name: str | None = None,
    truncate_dim: int | None = None,
    student: Any = None,
) -> None:
    """Write beside a saved student what makes a model of sentence-transformers of it; or with the `student` itself.

    All is whole before the first file takes its place, so a write that fails leaves what was there before.
    """
    model = sentence_transformer_of(trainer)
    model.prompts.update(prompts or {})
    model.truncate_dim = truncate_dim
    if default_prompt_name is not None and default_prompt_name not in model.prompts:
        raise ValueError(f"`default_prompt_name` must be one of {sorted(model.prompts)}, got {default_prompt_name!r}.")
    model.default_prompt_name = default_prompt_name
    first = model[0]
    first.save = lambda path, **_: (first.processor.save_pretrained(path), first.save_config(path))  # no weights again
    with tempfile.TemporaryDirectory(dir=folder, prefix=".modules-") as temporary:
        if student is not None:
            student.save_pretrained(temporary)
        model.save(temporary, create_model_card=False)
        found = {path.name: path for path in Path(temporary).iterdir()}
        for old in Path(folder).glob("model*.safetensors*") if student is not None else ():
            if old.name not in found:  # of a model in another number of files
                old.unlink()
        # The mark of a whole one comes last.
        for path in sorted(found.values(), key=lambda path: path.name == "modules.json"):
            target = Path(folder, path.name)
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)


def check_format(args: Any, head: RelationalHead | None, processing_class: Any) -> None:
    """Raise an error where a student cannot become a model of sentence-transformers."""
    what = "a student as a model of sentence-transformers"
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ImportError(f"{what} {MISSING}.")
    if head is None:
        raise ValueError(f"{what} has to be compared with its teacher's embedding. Set relational_weight above 0.")
    embedder = head.embedder
    if embedder.watched is not embedder.body or embedder.pooling not in POOLINGS:
        pooling = "head" if embedder.watched is not embedder.body else embedder.pooling
        raise ValueError(
            f"{what} needs a pooling that the library has, one of {sorted(POOLINGS)}, got {pooling!r}. Set "
            "`student_pooling` to one of them."
        )
    if not hasattr(processing_class, "save_pretrained"):
        raise ValueError(
            f"{what} needs its tokenizer or processor: pass `processing_class`, got {processing_class!r}."
        )
    if args.fsdp or args.deepspeed:
        raise ValueError(f"{what} has to be whole on a process, and FSDP or DeepSpeed shard it. Train it without.")


@preserved_randomness()
def sentence_transformer_of(trainer: Any) -> Any:
    """A `SentenceTransformer` of the trainer's student as it is now: it has the student's own weights, not a copy."""
    distillation, processing_class = trainer.distillation, trainer._facts.processing_class
    head, args = distillation.head, trainer.args
    check_format(args, head, processing_class)
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    body: Any = head.embedder.body

    class Inside(Transformer):
        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            return body

    with tempfile.TemporaryDirectory() as shell:  # the library builds its first module from a folder
        body.config.save_pretrained(shell)
        processing_class.save_pretrained(shell)
        length = longest_text(trainer.train_dataset)
        first: Any = Inside(shell, processor_kwargs={} if length is None else {"model_max_length": length})
    first.__class__ = Transformer  # by whose name the library finds it again
    modules: list[nn.Module] = [first, Pooling(head.embedder.width, POOLINGS[head.embedder.pooling])]
    prefixes = distillation.prefixes
    weight, bias = dense_of(head, distillation.projection, distillation.balance.row_norm, turned=bool(prefixes))
    if prefixes:  # what comes after the widest has learned nothing
        weight, bias = weight[: prefixes[0]].clone(), bias[: prefixes[0]].clone()
    if not _is_identity(weight, bias):
        how: dict[str, Any] = {"activation_function": nn.Identity(), "init_weight": weight, "init_bias": bias}
        modules.append(Dense(weight.shape[1], weight.shape[0], **how))
    model = SentenceTransformer(modules=[*modules, Normalize()], device=str(args.device), similarity_fn_name="cosine")
    return model.eval()


@torch.no_grad()
def dense_of(
    head: RelationalHead, projection: TeacherProjection, row_norm: Tensor, turned: bool = False
) -> tuple[Tensor, Tensor]:
    """Weight, (out, width), and bias, (out,), of the layer from a student's embedding to its teacher's space.

    With the head's rows `r = A x + a` and the teacher's `t = (y - mean) M / scale`, that of x is `k r M^T + mean`. The
    losses mostly see the directions of rows: k gives them the length that the teacher's have, `sqrt(dim) * scale` over
    the student's.

    Args:
        head: Of the student.
        projection: Of the teacher.
        row_norm: The quadratic mean of the lengths of the student's rows; 0 where it was not measured.
        turned: Leave out `M^T` and the mean: a row stays in the space in which it is compared.
    """
    linear = head.projection
    if isinstance(linear, nn.Linear):
        weight, bias = linear.weight.float().cpu(), linear.bias.float().cpu()
    else:
        weight, bias = torch.eye(head.embedder.width), torch.zeros(head.embedder.width)
    if head.centers and head.mean is not None:
        bias = bias - weight @ head.mean.float().cpu()
    mean, scale, matrix = (
        None if each is None else each.float().cpu() for each in (projection.mean, projection.scale, projection.matrix)
    )
    if turned and matrix is not None:
        return weight, bias
    if scale is not None and row_norm > 0:
        length = scale * projection.dim**0.5 / row_norm.float().cpu()
        weight, bias = length * weight, length * bias
    if matrix is not None:
        weight, bias = matrix @ weight, matrix @ bias
    return weight, bias if mean is None else bias + mean


def _is_identity(weight: Tensor, bias: Tensor) -> bool:
    same = weight.shape[0] == weight.shape[1] and torch.equal(weight, torch.eye(len(weight)))
    return same and not bias.any()


def longest_text(dataset: Any) -> int | None:
    """Tokens of the longest text of a data set that is tokenized; None where that is not known without reading it."""
    column = "input_ids"
    if not isinstance(dataset, Dataset) or column not in dataset.column_names or dataset.format["type"] == "custom":
        return None
    lengths = pc.list_value_length(dataset.data.column(column))
    if (rows := dataset._indices) is not None:  # it is a part of what is stored, as of a filter
        lengths = lengths.take(rows.column(0))
    return int(pc.max(lengths).as_py())


def scores_of(evaluators: list[Any], trainer: Any, prefix: str) -> dict[str, float]:
    """What evaluators of sentence-transformers say of the student as it is now, on all processes.

    Args:
        evaluators: Each gives numbers by name, or one number, which then is called by its class.
        trainer: Of the student.
        prefix: Of the evaluation's metrics. Of several sets the first asks, and the others have nothing.
    """
    sets = trainer.eval_dataset
    if not evaluators or (isinstance(sets, dict) and not prefix.endswith(f"_{next(iter(sets), '')}")):
        return {}
    scores: dict[str, float] = {}
    failure: Exception | None = None
    if trainer.is_world_process_zero():
        try:
            model = sentence_transformer_of(trainer)
            with preserved_randomness(), evaluating([model]):
                for each in evaluators:
                    found = each(model, steps=trainer.state.global_step)
                    scores |= found if isinstance(found, dict) else {type(each).__name__: found}
        except Exception as error:  # the other processes wait for an answer
            failure = error
    scores, failed = broadcast_object_list([scores, failure is not None])
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError("one of `evaluators` failed on the main process, whose error says how.")
    try:
        return {name: float(score) for name, score in scores.items()}
    except (TypeError, ValueError):
        raise ValueError(f"each of `evaluators` must give one number, or numbers by name, got {scores}.") from None


def checked(evaluators: Any, trainer: Any) -> list[Any]:
    """A trainer's evaluators, none, one or several, as a list.

    An error where the student is to become a model of sentence-transformers, for them or to be saved, and cannot.
    """
    found = list(evaluators) if isinstance(evaluators, list | tuple) else [evaluators] if evaluators else []
    if wrong := [type(each).__name__ for each in found if isinstance(each, type) or not callable(each)]:
        raise ValueError(f"`evaluators` must be evaluators of sentence-transformers, got {wrong}.")
    args, head = trainer.args, trainer.distillation.head
    if found or args.student_format == FORMAT:
        check_format(args, head, trainer._facts.processing_class)
        try:
            sentence_transformer_of(trainer)
        except Exception as error:  # whatever the library has against it: not after hours of training
            what = f"a {type(head.embedder.body).__name__} cannot become a model of sentence-transformers"
            raise ValueError(f"{what}: {error}") from error
    if args.student_format == FORMAT and args.save_only_model and args.load_best_model_at_end:
        raise ValueError(
            f"student_format={FORMAT!r} saves the student's projection, too, and with save_only_model no checkpoint "
            "has that of the best student. Set save_only_model=False, or leave out load_best_model_at_end."
        )
    return found


@contextmanager
def as_saved(trainer: Any) -> Iterator[Any]:
    """A trainer's student; one that is saved as a model of sentence-transformers has its pooling and projection on."""
    is_one = trainer.args.student_format == FORMAT
    inside = opened(sentence_transformer_of(trainer), "student") if is_one else trainer._unwrapped_student()
    try:
        yield trainer._unwrapped_student()
    finally:
        unwrapped(inside).__dict__.pop(AROUND, None)


def embedder_of(trainer: Any) -> EmbedderFacts | None:
    """What a trainer's student is as a model of sentence-transformers; None where it is not saved as one."""
    if trainer.args.student_format != FORMAT:
        return None
    facts, args, distillation = embedder_facts(sentence_transformer_of(trainer)), trainer.args, trainer.distillation
    turned = args.matryoshka_dims is not None and distillation.projection.matrix is not None
    facts.in_teachers_space = distillation.is_calibrated and args.teacher_pooling == "auto" and not turned
    return facts


def save_format(trainer: Any, folder: str | None) -> None:
    """Write beside a saved student, by default in `output_dir`, what `student_format` asks for.

    A warning says that the folder of a plain student has the modules of another save, which may be the user's.
    """
    if not trainer.args.should_save:
        return
    folder = folder or trainer.args.output_dir
    if trainer.args.student_format == FORMAT:
        add_modules(trainer, folder)
    elif Path(folder, "modules.json").is_file():
        logger.warning(
            f"{folder} has the modules.json of an earlier save: SentenceTransformer({str(folder)!r}) reads this "
            "student with the pooling and projection of that one. Remove modules.json, save elsewhere, or set "
            f"student_format={FORMAT!r}. A push leaves them out."
        )
