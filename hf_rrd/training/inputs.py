"""Whether each model gets its own input: asked before the run of data that are known by then, or of a first batch."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from tokenizers import Tokenizer
from torch import nn
from transformers.utils import cached_file, logging

from hf_rrd.models.body import main_input_of, unwrapped
from hf_rrd.models.columns import forward_columns, is_label, own_columns
from hf_rrd.models.teacher import Teacher
from hf_rrd.training.data import DataCollatorForDistillation, Preview, preserved_randomness

logger = logging.get_logger(__name__)


def check_inputs(
    sets: Mapping[str, Preview],
    student: nn.Module | None,
    teacher: Teacher,
    args: Any,
    data_collator: Any,
    processors: tuple[Any, Any],
) -> None:
    """Raise a ValueError for data without a model's input, or where the teacher would read another's.

    Args:
        sets: The training set and those of an evaluation, by the names of their arguments.
        student, teacher, args: Of the run.
        data_collator: The user's, or None.
        processors: `processing_class` and `teacher_processing_class`.
    """
    own = processors
    if isinstance(data_collator, DataCollatorForDistillation):
        own = data_collator.processors
    elif data_collator is not None:
        own = (processors[0] or getattr(data_collator, "tokenizer", None), None)
    if processors[1] is not None and processors[1] is not own[1]:
        raise ValueError(
            "`teacher_processing_class` is for the default collator, and there is a `data_collator`, which would not "
            "use it. Pass data_collator=DataCollatorForDistillation(data_collator, teacher_processing_class)."
        )
    if teacher.model is not None:
        teacher.before_sharing = partial(check_shared_input, student, teacher, *own)
    for name, preview in sets.items():
        if student is not None:
            _check_student(name, preview, student, args, data_collator)
        if teacher.model is None or preview.has("teacher_embedding"):
            continue
        if data_collator is None and preview.names is not None:
            teacher.inputs_from(dict.fromkeys(preview.names), f"`{name}`")
        elif data_collator is not None:
            teacher.own = teacher.own or own_columns(preview.names or (), teacher.columns) or None
            batch = _batch_of_one(preview, student, teacher, args, data_collator)
            if batch:
                teacher.inputs_from(batch, f"what `data_collator` makes of `{name}`")


def _check_student(name: str, preview: Preview, student: nn.Module, args: Any, data_collator: Any) -> None:
    """Raise a ValueError for a data set that is known to have no input of the student, such as one of raw text."""
    accepted, columns = forward_columns(student), preview.names
    collates_all = data_collator is not None and (preview.is_transformed or not args.remove_unused_columns)
    if accepted is None or columns is None or collates_all:
        return
    if not any(column in accepted and not is_label(column) for column in columns):
        texts = [column for column, value in preview.example.items() if isinstance(value, str)]
        advice = "Make one by map or with_transform, with a processor"
        if data_collator is not None:
            advice = "Set remove_unused_columns=False, if `data_collator` makes one"
        elif texts:
            advice = f"Tokenize it first: dataset.map(lambda batch: tokenizer(batch[{texts[0]!r}]), batched=True)"
        which = f"{type(unwrapped(student)).__name__}, which reads `{main_input_of(unwrapped(student))}`"
        raise ValueError(f"`{name}` has the columns {sorted(columns)}, and none is an input of {which}. {advice}.")


def _batch_of_one(preview: Preview, student: Any, teacher: Teacher, args: Any, data_collator: Any) -> Any:
    """What a collator makes of a map-style set's first example; None where that is not known before the run."""
    accepted = None if student is None else forward_columns(student)
    example = preview.example if preview.names is not None else {}
    if args.remove_unused_columns and not preview.is_transformed and accepted is not None:
        read = {*accepted, *teacher.signature_columns, *(args.label_names or ())}
        example = {name: value for name, value in example.items() if name in read or is_label(name)}
    if not example:
        return None
    try:
        with preserved_randomness():
            batch = data_collator([dict(example)])
    except Exception:  # of its own: the first batch will say why
        return None
    return batch if isinstance(batch, Mapping) else None


# ---- An input that both read ----


def check_shared_input(student: nn.Module | None, teacher: Teacher, own: Any, others: Any) -> None:
    """Raise a ValueError where the teacher cannot read the student's input, by their processors; or warn of a doubt.

    Of models that have none here the tokenizers are looked for where their weights came from, on this machine.
    """
    assert teacher.model is not None
    if main_input_of(teacher.body) == "input_ids":
        own, others = own or _tokenizer_of(student), others or _tokenizer_of(teacher.model)
    if own is not None and others is not None:
        if _read_alike(own, others):
            return
        raise ValueError(
            "student and teacher have different processors, tokenizers for example, and the data have no `teacher_` "
            "columns: the teacher would read the student's input. Make them with its own, as in dataset.map(lambda "
            "batch: {f'teacher_{name}': value for name, value in teacher_tokenizer(batch['text']).items()}, "
            "batched=True), and pass it as `teacher_processing_class`."
        )
    configs = [getattr(unwrapped(model), "config", None) for model in (student, teacher.model)]
    mine, theirs = (getattr(config, "vocab_size", None) for config in configs)
    if main_input_of(teacher.body) == "input_ids" and None not in (mine, theirs) and mine != theirs:
        logger.warning(
            "The teacher reads the student's `input_ids`, but their vocabularies differ "
            f"({theirs} and {mine} tokens). With another tokenizer, give the teacher a column `teacher_input_ids`."
        )


def _read_alike(own: Any, others: Any) -> bool:
    """Whether two processors make the same of an example, as far as their vocabularies or settings say."""
    own, others = (getattr(each, "tokenizer", each) for each in (own, others))
    if hasattr(own, "get_vocab") and hasattr(others, "get_vocab"):
        mine, theirs = own.get_vocab(), {number: token for token, number in others.get_vocab().items()}
        unlike = [token for token, number in mine.items() if theirs.get(number, token) != token]
        return len(unlike) * 100 <= len(mine)  # a special token more, or moved, is no other vocabulary
    settings = [each.to_dict() if hasattr(each, "to_dict") else {"": each} for each in (own, others)]
    kept = [{name: each[name] for name in each if not name.endswith(("_type", "_class"))} for each in settings]
    return kept[0] == kept[1]


def _tokenizer_of(model: nn.Module | None) -> Any:
    name = getattr(getattr(unwrapped(model), "config", None), "_name_or_path", None)
    try:  # AutoTokenizer would make one of special tokens alone where there is none
        return Tokenizer.from_file(cached_file(name, "tokenizer.json", local_files_only=True)) if name else None
    except Exception:
        return None
