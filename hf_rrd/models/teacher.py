"""The teacher: frozen, in evaluation mode, without gradients, and never part of the student."""

import os
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from hf_rrd.errors import named_errors
from hf_rrd.models.body import (
    is_classifier,
    is_headless,
    keep_next,
    main_input_of,
    place_of,
    placed,
    take_kept,
    unwrapped,
    watch,
)
from hf_rrd.models.columns import TEACHER_PREFIX, Accepted, forward_columns, teacher_inputs
from hf_rrd.models.embedding import Embedder, Pooling

LOADED_FROM = "_hf_rrd_loaded_from"
"""On a teacher that was loaded here: the name that it was loaded by, and the commit of it on the Hub, or None."""

HALVES = (torch.float16, torch.bfloat16)


class TeacherOutputs(NamedTuple):
    """What the losses need of the teacher: its pooled embedding, (batch, width), and its logits, or None."""

    embedding: Tensor | None
    logits: Tensor | None


class Teacher:
    """What a teacher says of a batch: read from its cached columns, or else computed by one forward of the model.

    Args:
        model: Any transformers model with a body, with or without a head; any module that returns logits where no
            embedding is wanted; None where the data set has all its outputs. Its parameters are frozen.
        wants_embedding: Whether its embedding is needed.
        wants_logits: Whether its logits are.
        pooling: How the body's output becomes an embedding.
        compile_kwargs: Of `torch.compile` for the forward; None does not compile.

    Attributes:
        model: The model, or None.
        columns: The arguments of its forward; [] without a model.
        body: What computes its hidden states.
        width: Of its embedding; None where none is wanted, or without a model until `cached_as` says it.
        dtype: Of its embedding: a half precision where the weights or the cached columns have one.
    """

    def __init__(
        self,
        model: nn.Module | None,
        wants_embedding: bool,
        wants_logits: bool,
        pooling: Pooling = "auto",
        compile_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.wants_embedding, self.wants_logits = wants_embedding, wants_logits
        self.columns: Accepted = []
        self.width: int | None = None
        self.dtype = torch.float32
        self._embedder: Embedder | None = None
        if model is None:
            return
        model.requires_grad_(False).eval()
        self._forward: Any = model if compile_kwargs is None else torch.compile(model, **compile_kwargs)
        self.columns = forward_columns(model)
        self.body = unwrapped(model)
        if wants_embedding:
            self._embedder = Embedder(model, pooling, "teacher_pooling")
            self.body, self.width = self._embedder.body, self._embedder.width
            weights = place_of(self.body)[1]
            self.dtype = weights if weights in HALVES else torch.float32
            watch(self.body)

    def cached_as(self, width: int, dtype: torch.dtype) -> None:
        """Take over the form of cached embeddings, in place of a model's."""
        self.width, self.dtype = width, dtype

    @property
    def is_placed(self) -> bool:
        """Whether something else keeps the weights where they are: a device map, offloading or quantisation."""
        return self.model is not None and (
            getattr(self.model, "hf_device_map", None) is not None
            or getattr(self.model, "quantization_method", None) is not None
            or any(hasattr(module, "_hf_hook") for module in self.model.modules())
        )

    def place(self, device: torch.device) -> None:
        """Move the model to a device, unless something else has placed it already.

        Raises:
            ValueError: It has no weights: it is on the meta device.
        """
        if self.model is None or self.is_placed:
            return
        if any(weight.is_meta for weight in self.model.parameters()):
            raise ValueError(
                "the teacher's weights are on the meta device, so it has none. Load it with from_pretrained, with a "
                "`device_map` if it is to be offloaded."
            )
        self.model.to(device)

    def run_through(self, engine: nn.Module) -> None:
        """Let the forward go through a wrapper of the model."""
        self._forward = engine

    @property
    def signature_columns(self) -> list[str]:
        """A data set's columns that are for the teacher: its own, those that it shares, and its cached outputs."""
        accepted = self.columns or []
        cached = ["teacher_embedding"] * self.wants_embedding + ["teacher_logits"] * self.wants_logits
        return [*accepted, *(TEACHER_PREFIX + name for name in accepted), *cached]

    def answers(self, inputs: dict[str, Any]) -> bool:
        """Whether there is anything to learn from the teacher in a batch."""
        return self.model is not None or "teacher_embedding" in inputs or "teacher_logits" in inputs

    def read(self, inputs: dict[str, Any], logits: bool = True, required: bool = False) -> TeacherOutputs:
        """What is wanted of the teacher for a batch. Without a model, what is not cached is None.

        Args:
            inputs: The batch, with the columns of both sides.
            logits: Whether logits are needed this time, if they are wanted at all.
            required: Whether it is an error that something is missing.

        Raises:
            ValueError: Logits are wanted, and the teacher returns none; a cached column is of no use, or missing.
        """
        wants_logits = self.wants_logits and logits
        embedding = _cached("teacher_embedding", inputs) if self.wants_embedding else None
        cached_logits = _cached("teacher_logits", inputs) if wants_logits else None
        missing = (self.wants_embedding and embedding is None) or (wants_logits and cached_logits is None)
        if self.model is None and missing and required:
            raise ValueError(f"no teacher, and the batch lacks some of its outputs: its columns are {sorted(inputs)}.")
        if self.model is None or not missing:
            return TeacherOutputs(embedding, cached_logits)
        computed = self.compute(teacher_inputs(inputs, self.columns))
        if wants_logits and cached_logits is None and computed.logits is None:
            raise ValueError(
                "`kd_weight` is above 0, and the teacher returns no logits. Load it with an AutoModelFor... class, "
                "or set kd_weight=0."
            )
        return TeacherOutputs(
            computed.embedding if embedding is None else embedding,
            None if not wants_logits else computed.logits if cached_logits is None else cached_logits,
        )

    # `inference_mode` would be no faster here, and its tensors may not enter a graph: the bank's rows do.
    @torch.no_grad()
    def compute(self, inputs: dict[str, Any]) -> TeacherOutputs:
        """One forward of the model. The outputs are on the device of the inputs.

        Args:
            inputs: Keyword arguments of the forward.

        Raises:
            ValueError: The main input is not among them.
        """
        assert self.model is not None
        self.model.eval()
        main_input = main_input_of(self.body)
        if main_input not in inputs and "inputs_embeds" not in inputs:
            raise ValueError(
                f"the teacher needs `{main_input}`, the batch offers it {sorted(inputs)}. Add a column "
                f"`teacher_{main_input}` with the teacher's own input, and set remove_unused_columns=False if it is "
                "removed."
            )
        device = getattr(inputs.get(main_input), "device", None)
        if self.columns is not None and "use_cache" in self.columns:
            inputs = {**inputs, "use_cache": False}
        with named_errors("the teacher", inputs):
            if self._embedder is not None:
                keep_next(self.body)
            outputs = self._forward(**placed(inputs, self.body))
            logits = outputs.get("logits") if isinstance(outputs, dict) else None
            embedding = None
            if self._embedder is not None:
                pooled = self._embedder.pool(take_kept(self.body), inputs.get("attention_mask"))
                embedding = pooled.to(device)
            return TeacherOutputs(embedding, None if logits is None else logits.to(device))


def _cached(name: str, inputs: dict[str, Any]) -> Tensor | None:
    """A cached column of a batch, or None."""
    value = inputs.get(name)
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dim() < 2 or value.is_complex() or value.dtype == torch.bool:
        kind = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"`{name}` must be numbers of the shape (batch, width), got {kind}.")
    return value


def check_teacher(teacher: nn.Module, student: nn.Module, kd: bool) -> None:
    """Raise a ValueError for a teacher that cannot teach this student.

    Args:
        teacher: The teacher.
        student: The student.
        kd: Whether the student also learns the teacher's logits.
    """
    shared = {id(weight) for weight in teacher.parameters()} & {id(weight) for weight in student.parameters()}
    if shared:
        raise ValueError(
            f"teacher and student share {len(shared)} parameters, and the teacher's are frozen. Pass a copy as the "
            "teacher: copy.deepcopy(model)."
        )
    if not kd:
        return
    for model in (teacher, student):
        config = getattr(unwrapped(model), "config", None)
        kind, classes = getattr(config, "problem_type", None), getattr(config, "num_labels", 2)
        if kind in ("regression", "multi_label_classification") or classes == 1:
            raise ValueError(
                "`kd_weight` is above 0, and distillation on logits compares probabilities of 2 or more classes: "
                f"{type(model).__name__} has {classes} and the problem_type {kind!r}. Set kd_weight=0."
            )
    if is_headless(teacher):
        raise ValueError(
            f"`kd_weight` is above 0, so the teacher needs logits: {type(teacher).__name__} has no head. Load it "
            "with an AutoModelFor... class, or set kd_weight=0."
        )
    if is_classifier(teacher) and is_classifier(student):
        teacher_classes, student_classes = (unwrapped(model).config.num_labels for model in (teacher, student))
        if teacher_classes != student_classes:
            raise ValueError(
                "`kd_weight` is above 0, so teacher and student need the same classes: the teacher has "
                f"{teacher_classes}, the student {student_classes}. Use a teacher with the student's classes, or set "
                "kd_weight=0: the relational loss does not need them."
            )


def load_teacher(teacher: Any, kwargs: Any = None) -> Any:
    """A teacher by Hub name or folder, with the class that its config names; a model is returned as it is.

    Args:
        teacher: A model, a Hub name or a folder.
        kwargs: A dict for `from_pretrained`: `revision`, `dtype`, `token`, `trust_remote_code` and so on.

    Raises:
        TypeError: It is none of these.
        ValueError: It cannot be loaded.
    """
    if teacher is not None and not isinstance(teacher, str | os.PathLike | nn.Module):
        raise TypeError(f"`teacher` must be a model, a Hub name or a folder, got a {type(teacher).__name__}.")
    if not isinstance(teacher, str | os.PathLike):
        return teacher
    kwargs = kwargs or {}
    try:
        return _loaded(teacher, kwargs)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        given = f" with `teacher_model_init_kwargs` {sorted(kwargs)}" if kwargs else ""
        raise ValueError(f"`teacher` {str(teacher)!r} cannot be loaded{given}. {error}") from error


def _loaded(teacher: str | os.PathLike[str], kwargs: dict[str, Any]) -> Any:
    names = ("revision", "token", "cache_dir", "trust_remote_code", "subfolder", "local_files_only", "code_revision")
    config = transformers.AutoConfig.from_pretrained(
        teacher, **{name: kwargs[name] for name in names if name in kwargs}
    )
    architecture = (getattr(config, "architectures", None) or [""])[0]
    remote_classes = [name for name in getattr(config, "auto_map", None) or {} if name.startswith("AutoModel")]
    name = architecture if hasattr(transformers, architecture or "-") else next(iter(remote_classes), "AutoModel")
    model = getattr(transformers, name, transformers.AutoModel).from_pretrained(teacher, **kwargs)
    model.__dict__[LOADED_FROM] = (str(teacher), revision_of(teacher, kwargs.get("revision"), kwargs.get("cache_dir")))
    return model


def revision_of(name: Any, revision: str | None = None, cache_dir: Any = None) -> str | None:
    """The commit of a model of the Hub, as the local cache has just resolved it; None of a folder."""
    if os.path.isdir(name):
        return None
    file = try_to_load_from_cache(str(name), "config.json", revision=revision, cache_dir=cache_dir)
    return os.path.basename(os.path.dirname(file)) if isinstance(file, str) else None  # snapshots/<commit>/config.json
