"""Whether each model gets its own input: asked before the run of data that are known by then, or of a first batch."""

import difflib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file, logging

from hf_rrd.models.body import main_input_of, unwrapped
from hf_rrd.models.columns import forward_columns, is_label, own_columns
from hf_rrd.models.logits import names_of
from hf_rrd.models.sentence_transformers import own_tokenizer
from hf_rrd.models.teacher import Teacher
from hf_rrd.training.data import (
    DataCollatorForDistillation,
    Preview,
    check_dataset,
    is_map_style,
    preserved_randomness,
)
from hf_rrd.training.identity import check_source

logger = logging.get_logger(__name__)

Sets = Mapping[str, Preview]  # the training set and those of an evaluation, by the names of their arguments


def check_inputs(sets: Sets, student: Any, teacher: Teacher, args: Any, collator: Any, processors: list[Any]) -> None:
    """Raise a ValueError for data without a model's input, or where the teacher would read another's.

    `collator` is the user's, or None, and `processors` are `processing_class` and `teacher_processing_class`.
    """
    is_ours = isinstance(collator, DataCollatorForDistillation)
    own, others = collator.processors if is_ours else processors
    if collator is not None and processors[1] is not None and not (is_ours and others is processors[1]):
        raise ValueError(
            "`teacher_processing_class` is for the default collator, and there is a `data_collator`, which would not "
            "use it. Pass data_collator=DataCollatorForDistillation(data_collator, teacher_processing_class)."
        )
    for name, processor in zip(("processing_class", "teacher_processing_class"), (own, others), strict=True):
        if isinstance(processor, str):
            raise ValueError(f"`{name}` must be a tokenizer or a processor, got {processor!r}: load it.")
    if student is not None:
        for name, preview in sets.items():
            _check_student(name, preview, student, args, collator)
    if teacher.model is not None:
        own = own or getattr(collator, "tokenizer", None)
        teacher.before_sharing = partial(check_shared_input, student, teacher, own, others)
        _check_teacher(sets, teacher, collator)


def _check_student(name: str, preview: Preview, student: nn.Module, args: Any, collator: Any) -> None:
    """Raise a ValueError for a data set that is known to have no input of the student, or labels that are strings."""
    accepted, columns = forward_columns(student), preview.names
    for label in {"label", "label_ids", *filter(is_label, accepted or ())} & preview.strings.keys():
        if args.task_weight > 0 and collator is None:
            raise ValueError(
                f"`{label}` of `{name}` must have the numbers of classes, got {preview.strings[label]!r}. Number them "
                f"as dataset.class_encode_column({label!r}) does, or set task_weight=0 to train without labels."
            )
    its, own = ([each.lower() for each in names or ()] for names in (preview.classes, names_of(student)))
    if its != own and sorted(its) == sorted(own) and args.task_weight > 0 and not preview.is_transformed:
        number = next(number for number, each in enumerate(its) if each != own[number])
        logger.warning(
            f"Class {number} is {its[number]!r} in `{name}` and {own[number]!r} in the student's `id2label`: it will "
            "name them wrongly. dataset.align_labels_with_mapping(student.config.label2id, 'label') numbers them so."
        )
    makes_them = collator is not None and (preview.is_transformed or not args.remove_unused_columns)
    if accepted is None or columns is None or makes_them:
        return
    if not any(column in accepted and not is_label(column) for column in columns):
        main_input, texts = main_input_of(unwrapped(student)), list(preview.strings)
        advice = "Make one by map or with_transform, with a processor"
        if collator is not None:
            advice = "Set remove_unused_columns=False, if `data_collator` makes one"
        elif texts and main_input == "input_ids":
            advice = f"Tokenize it first: dataset.map(lambda batch: tokenizer(batch[{texts[0]!r}]), batched=True)"
        which = f"{type(unwrapped(student)).__name__}, which reads `{main_input}`"
        raise ValueError(f"`{name}` has the columns {sorted(columns)}, and none is an input of {which}. {advice}.")


def _check_teacher(sets: Sets, teacher: Teacher, collator: Any) -> None:
    """Raise a ValueError for data whose teacher would read another's input than elsewhere, or none."""
    for name, preview in sets.items():
        if preview.has("teacher_embedding"):
            continue
        if collator is None and preview.names is not None:
            _check_prefixed(name, preview, teacher)
            teacher.inputs_from(dict.fromkeys(preview.names), f"`{name}`")
        elif collator is not None:
            teacher.own = teacher.own or own_columns(preview.names or (), teacher.columns) or None
            batch = _batch_of_one(preview, collator)
            if isinstance(batch, Mapping):
                teacher.inputs_from(batch, f"what `data_collator` makes of `{name}`")


def _check_prefixed(name: str, preview: Preview, teacher: Teacher) -> None:
    """Raise a ValueError where a column is all but the name of the teacher's input, which it would not read."""
    wanted = f"teacher_{main_input_of(teacher.body)}"
    rest = [] if wanted in (preview.names or ()) else (preview.names or set()) - preview.strings.keys()
    near = difflib.get_close_matches(wanted, [each for each in rest if each.startswith("teacher_")], 1, 0.9)
    if near:
        raise ValueError(f"`{name}` has a column `{near[0]}`, which nobody reads. Did you mean `{wanted}`?")


def check_reports_input(dataset: Any, teacher: Teacher, collator: Any) -> None:
    """Raise a ValueError for a data set to report on whose teacher would read another's input than in training."""
    check_dataset("dataset", dataset)
    check_source("dataset", Preview(dataset), teacher)
    if teacher.model is not None and is_map_style(dataset) and len(dataset) > 0:
        own = None if isinstance(collator, DataCollatorForDistillation) else collator
        _check_teacher({"dataset": Preview(dataset)}, teacher, own)


def check_given_teacher(dataset: Any, student: nn.Module, teacher: nn.Module, collator: Any) -> None:
    """Raise a ValueError where a teacher that a report alone is given would read another's input, as far as known."""
    check_dataset("dataset", dataset)
    if not isinstance(collator, DataCollatorForDistillation) or not is_map_style(dataset) or len(dataset) == 0:
        return
    if not own_columns(Preview(dataset).names or (), forward_columns(teacher)):
        own, others = collator.processors
        body: Any = SimpleNamespace(model=teacher, body=unwrapped(teacher))
        check_shared_input(student, body, own, others or own_tokenizer(teacher))


def _batch_of_one(preview: Preview, collator: Any) -> Any:
    """What a collator makes of a map-style set's first example; None where that is not known before the run."""
    try:
        with preserved_randomness():
            is_known = is_map_style(preview.dataset) and preview.example
            return collator([dict(preview.example)]) if is_known else None
    except Exception:  # of its own: the first batch will say why
        return None


def check_shared_input(student: nn.Module | None, teacher: Teacher, own: Any, others: Any) -> None:
    """Raise a ValueError where the teacher cannot read the student's input, by their processors; or warn of a doubt.

    A teacher's tokenizer that is not given is looked for where its weights came from, on this machine.
    """
    models, of_tokens = (student, teacher.model), main_input_of(teacher.body) == "input_ids"
    if of_tokens and own is not None and others is None:
        others = _beside(teacher.model, "tokenizer.json", lambda file: PreTrainedTokenizerFast(tokenizer_file=file))
    if own is not None and others is not None:
        if _read_alike(own, others):
            return
        raise ValueError(
            "student and teacher have different processors, tokenizers for example, and the data have no `teacher_` "
            "columns: the teacher would read the student's input. Make them with its own, as in dataset.map(lambda "
            "batch: {f'teacher_{name}': value for name, value in teacher_tokenizer(batch['text']).items()}, "
            "batched=True), and pass it as `teacher_processing_class`."
        )
    if main_input_of(teacher.body) == "pixel_values" and own is not None:
        settings = _beside(teacher.model, "preprocessor_config.json", lambda file: json.loads(Path(file).read_bytes()))
        values = [_normalization_of(each) for each in (own, settings)]
        if all(values) and values[0] != values[1]:
            logger.warning(
                f"The teacher reads the student's `pixel_values`, made with {values[0]}, and the processor beside its "
                f"weights has {values[1]}. If it learned with that, give it a column `teacher_pixel_values`."
            )
    mine, theirs = (getattr(getattr(unwrapped(model), "config", None), "vocab_size", None) for model in models)
    if of_tokens and None not in (mine, theirs) and mine != theirs:
        logger.warning(
            "The teacher reads the student's `input_ids`, but their vocabularies differ "
            f"({theirs} and {mine} tokens). With another tokenizer, give the teacher a column `teacher_input_ids`."
        )


def _read_alike(own: Any, others: Any) -> bool:
    """Whether two processors make the same of a picture, or as far as their vocabularies or settings say."""
    own, others = (getattr(each, "tokenizer", each) for each in (own, others))
    if hasattr(own, "get_vocab") and hasattr(others, "get_vocab"):
        mine, theirs = own.get_vocab(), {number: token for token, number in others.get_vocab().items()}
        unlike = [token for token, number in mine.items() if theirs.get(number, token) != token]
        return len(unlike) * 100 <= len(mine)  # a special token more, or moved, is no other vocabulary
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    try:  # one family's processor has settings that another's has not, and does the same
        one, other = (np.asarray(each(images=picture, return_tensors="np")["pixel_values"]) for each in (own, others))
        return one.shape == other.shape and bool(np.allclose(one, other, atol=0.05))
    except Exception:
        pass
    settings = [each.to_dict() if hasattr(each, "to_dict") else {"": each} for each in (own, others)]
    kept = [{name: each[name] for name in each if not name.endswith(("_type", "_class"))} for each in settings]
    return kept[0] == kept[1]


def _beside(model: nn.Module | None, file: str, read: Callable[[str], Any]) -> Any:
    """What a file beside a model's weights says; None where it is not on this machine, or cannot be read."""
    name = getattr(getattr(unwrapped(model), "config", None), "_name_or_path", None)
    try:  # AutoTokenizer would make one of special tokens alone where there is no file
        path = cached_file(name, file, local_files_only=True) if name else None
        return None if path is None else read(path)
    except Exception:
        return None


def _normalization_of(processor: Any) -> dict[str, list[float]]:
    """With what mean and deviation an image processor, or the dict of one, normalizes; {} where that is not known."""
    processor = getattr(processor, "image_processor", processor)
    settings = processor if isinstance(processor, dict) else getattr(processor, "__dict__", {})
    values: dict[str, Any] = {name: settings.get(name) for name in ("image_mean", "image_std")}
    if settings.get("do_normalize") is False or not all(isinstance(each, list | tuple) for each in values.values()):
        return {}
    return {name: [float(each) for each in value] for name, value in values.items()}
