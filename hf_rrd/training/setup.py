"""What a run is made of, checked and put together: its data, its teacher, and a student with its head."""

from typing import Any

import numpy as np
from torch import nn
from transformers import DataCollatorWithFlattening
from transformers.utils import find_labels, logging

from hf_rrd.models.body import is_headless, unwrapped
from hf_rrd.models.columns import CACHED_COLUMNS
from hf_rrd.models.embedding import PACKED
from hf_rrd.models.head import check_student
from hf_rrd.models.layers import OWN_INPUT, LayerPairs
from hf_rrd.models.logits import BY_PLACE, NAMED, LogitPair, layout_of
from hf_rrd.models.sentence_transformers import is_cross_encoder, is_sentence_transformer
from hf_rrd.models.teacher import Teacher, check_teacher, load_teacher
from hf_rrd.training.data import Preview, check_dataset, noted_logits
from hf_rrd.training.distillation import Distillation
from hf_rrd.training.distributed import check_same_lengths

logger = logging.get_logger(__name__)


def check_data(training_set: Preview, eval_dataset: Any, student: Any, args: Any, data_collator: Any) -> None:
    """Raise a ValueError for data sets that are empty, of other lengths elsewhere, or without labels for the task."""
    if is_sentence_transformer(student):
        inside = "Pass the transformers model inside, `model[0].auto_model`, with its pooling as `student_pooling`"
        saved = "student_format='sentence_transformers' saves one"
        raise ValueError(f"`model` is a SentenceTransformer. {inside}; {saved}.")
    for check in (check_same_lengths, check_dataset):
        check("train_dataset", training_set.dataset)
        check("eval_dataset", eval_dataset)
    compared = args.relational_weight != 0 or args.layer_weight not in (0, "auto")
    if compared and isinstance(data_collator, DataCollatorWithFlattening):
        raise ValueError(f"`data_collator` is a {type(data_collator).__name__}: {PACKED}.")
    names = args.label_names or (None if student is None else find_labels(type(unwrapped(student))))
    if args.task_weight > 0 and training_set.dataset is not None and data_collator is None and names:
        training_set.check_labels(names)


def prepared(
    teacher: Teacher,
    distillation: Distillation,
    training_set: Preview,
    loss_is_its_own: bool,
    optimizer: Any,
    student: Any,
) -> Any:
    """A student with its head, which a given optimizer trains, too; None of none."""
    if student is None:
        return None
    check_student(student, loss_is_its_own and distillation.args.task_weight > 0)
    if teacher.model is not None:
        check_teacher(teacher.model, student)
    if teacher.wants_logits:
        width = np.shape(training_set.example.get("teacher_logits", ()))[-1:]
        noted = {"width": width, **noted_logits(training_set.dataset)}
        known = (noted, training_set.classes, loss_is_its_own)
        automatic = distillation.args.kd_weight == "auto"
        try:
            distillation.logits = LogitPair(student, teacher.model, *known, same_classes=automatic)
        except ValueError as error:
            if not automatic:
                raise
            # Without embeddings nothing is learned from the teacher.
            say = logger.info if teacher.wants_embedding else logger.warning
            say(f"No distillation of logits: {error}")
            distillation.leave_out_logits()
    distillation.attach(student)
    distillation.layers = _layers_of(teacher, distillation.args, training_set, student)
    teacher.layers = None if distillation.layers is None else distillation.layers.teacher
    if optimizer is not None and distillation.head is not None:
        # Into the first group: a scheduler that was made with the optimizer knows no more of them.
        optimizer.param_groups[0]["params"].extend(distillation.head.parameters())
    return student


def _layers_of(teacher: Teacher, args: Any, training_set: Preview, student: nn.Module) -> LayerPairs | None:
    """The layers that are compared, or None; a ValueError where they are asked for and cannot be."""
    if args.layer_weight in (0, "auto"):
        return None
    cached = [name for name in CACHED_COLUMNS if training_set.has(name)]
    if teacher.model is None or cached:
        came = f"`train_dataset` has {cached}" if cached else "there is none"
        instead = "Pass `teacher=` a model and the data without cached columns, or set layer_weight=0"
        raise ValueError(f"`layer_weight` is above 0 and needs a teacher in training, {came}. {instead}.")
    if teacher.own:
        raise ValueError(OWN_INPUT.format(teacher.own))
    if args.n_gpu > 1:
        raise ValueError(
            "`layer_weight` is above 0, and one process has several GPUs, whose copies of a student are not watched: "
            "start a process for each, with torchrun or accelerate launch."
        )
    return LayerPairs(student, teacher.model, args.layer_pairs)


def teacher_for(teacher: Any, args: Any, training_set: Preview, student: nn.Module | None) -> Teacher:
    """The teacher of a run, as far as the settings need one: a model, or the training set's cached columns."""
    wants_embedding, wants_logits = args.relational_weight != 0, args.kd_weight != 0
    automatic = args.kd_weight == "auto"
    if automatic:
        wants_logits = teacher is not None or training_set.has("teacher_logits")  # until `prepared` looks closer
    if isinstance(teacher, nn.Module) and args.teacher_model_init_kwargs:
        raise ValueError(
            f"`teacher_model_init_kwargs` {sorted(args.teacher_model_init_kwargs)} are for a teacher that is given by "
            "its name or folder, and `teacher` is a model. Load it with them, or leave them out."
        )
    pooling = args.teacher_pooling if wants_embedding else None
    needed = wants_embedding or wants_logits or args.layer_weight not in (0, "auto")
    model = load_teacher(teacher, args.teacher_model_init_kwargs, pooling=pooling) if needed else None
    if model is not None and student is not None:
        check_teacher(model, student)
        if is_headless(student) and is_cross_encoder(model):
            what = f"`teacher` is a cross-encoder, which scores pairs, and the student a {type(student).__name__}"
            raise ValueError(f"{what}, which embeds one text. Pass an embedding model, or a student with a head.")
    compiled = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode} if args.torch_compile else None
    if automatic and model is not None:
        wants_logits = layout_of(model) in (*NAMED, *BY_PLACE) and not is_headless(model)
    made = Teacher(model, wants_embedding, wants_logits, args.teacher_pooling, compiled)
    made.may_lack_logits = automatic
    if model is None and wants_embedding:
        shape = training_set.cached_shape
        if shape is None and training_set.has("teacher_embedding"):
            raise ValueError(
                "the transform or the format of `train_dataset` drops its cached columns. Set it before they "
                "are made, as in cache_teacher_outputs(dataset.with_transform(transform), teacher), and not again."
            )
        if shape is None:
            raise ValueError(
                "the relational loss needs a teacher: pass `teacher=` a model, a Hub name or a folder, or a "
                "training set with a `teacher_embedding` column. Got neither. relational_weight=0 does without."
            )
        made.width, made.dtype = shape
    needs_column = model is None and wants_logits and not automatic and training_set.dataset is not None
    if needs_column and "teacher_logits" not in training_set.example:
        raise ValueError(
            "`kd_weight` is above 0, so a teacher is needed: pass `teacher=` a model, a Hub name or a folder, or a "
            "training set with a `teacher_logits` column. Got neither."
        )
    return made
