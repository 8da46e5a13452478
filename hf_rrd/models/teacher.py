"""The teacher: frozen, in evaluation mode, without gradients, and never part of the student."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from hf_rrd.errors import named_errors
from hf_rrd.models.body import (
    body_of,
    embedding_width,
    is_headless,
    is_hooked,
    keep_next,
    main_input_of,
    place_of,
    pooler_for,
    take_kept,
    unwrapped,
    watch,
)
from hf_rrd.training.data import forward_columns, teacher_inputs

TEACHER_PROJECTIONS = ("none", "center", "pca", "orthogonal", "centered_orthogonal")
"""The values of `teacher_projection=`."""

MEASURED_PROJECTIONS = ("center", "pca", "centered_orthogonal")
"""Those that are measured on the teacher's embeddings before the first step."""

TEACHER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The values of `teacher_dtype=`."""


LOADED_FROM = "_hf_rrd_loaded_from"
"""On a teacher that was loaded here: the name that it was loaded by, and the commit of it on the Hub, or None."""

HALVES = (torch.float16, torch.bfloat16)


class TeacherOutputs(NamedTuple):
    """What the losses need of the teacher: its pooled embedding, (batch, width), and its logits, or None."""

    embedding: Tensor | None
    logits: Tensor | None


class Teacher:
    """A frozen model that gives pooled embeddings and logits.

    Args:
        model: Any transformers model with a body, with or without a head; any module that returns logits where no
            embedding is wanted. Its parameters are frozen.
        pooling: A key of `POOLERS`, "auto" or a callable.
        wants_embedding: Whether to pool the body's output at all.
        dtype: A key of `TEACHER_DTYPES` for the forward's autocast; None leaves the autocast around it as it is.
        compile_kwargs: Of `torch.compile` for the forward; None does not compile.
    """

    def __init__(
        self,
        model: nn.Module,
        pooling: str | Callable[..., Any],
        wants_embedding: bool,
        dtype: str | None = None,
        compile_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self._forward = self.model if compile_kwargs is None else torch.compile(self.model, **compile_kwargs)
        self._autocast_dtype = None if dtype is None else TEACHER_DTYPES[dtype]
        self.columns = forward_columns(model)
        self.body = body_of(model) if wants_embedding else unwrapped(model)
        self.width: int | None = None
        weights = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), None)
        if weights in HALVES and self._autocast_dtype in HALVES and weights != self._autocast_dtype:
            raise ValueError(
                f"`teacher_dtype` is {dtype!r}, and the teacher's weights are in {weights}: two half precisions do "
                "not mix. Leave it out, or load the teacher in float32."
            )
        if wants_embedding:
            self.width = embedding_width(pooling, self.body, "teacher_pooling")
            self._pool = pooler_for(pooling, self.body)
            watch(self.body)

    @property
    def is_placed(self) -> bool:
        """Whether something else keeps the weights where they are: a device map, offloading or quantisation."""
        return (
            getattr(self.model, "hf_device_map", None) is not None
            or getattr(self.model, "quantization_method", None) is not None
            or is_hooked(self.model)
        )

    def place(self, device: torch.device) -> None:
        """Move the teacher to a device, unless something else has placed it already.

        Raises:
            ValueError: It has no weights: it is on the meta device.
        """
        if self.is_placed:
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
    def shape(self) -> tuple[int, torch.dtype] | None:
        """Width and dtype of its embeddings: a half precision where the forward or the weights have one."""
        dtype = self._autocast_dtype or place_of(self.body)[1]
        return None if self.width is None else (self.width, dtype if dtype in HALVES else torch.float32)

    # `inference_mode` would be no faster here, and its tensors may not enter a graph: the bank's rows do.
    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any]) -> TeacherOutputs:
        """One forward. The outputs are on the device of the inputs.

        Args:
            inputs: Keyword arguments of the teacher's forward.

        Raises:
            ValueError: The teacher's main input is not among them.
        """
        self.model.eval()
        main_input = main_input_of(self.body)
        if main_input not in inputs and "inputs_embeds" not in inputs:
            raise ValueError(
                f"the teacher needs `{main_input}`, the batch offers it {sorted(inputs)}. Add a column "
                f"`teacher_{main_input}` with the teacher's own input, and set remove_unused_columns=False if it is "
                "removed."
            )
        device = getattr(inputs.get(main_input), "device", None)
        if "use_cache" in self.columns:
            inputs = {**inputs, "use_cache": False}
        if self.width is not None:
            keep_next(self.body)
        with named_errors("the teacher", inputs):
            with self._autocast():
                outputs = self._forward(**{name: self._place_input(value) for name, value in inputs.items()})
            logits = outputs.get("logits") if isinstance(outputs, dict) else None
            embedding = None
            if self.width is not None:
                embedding = self._pool(take_kept(self.body), inputs.get("attention_mask")).to(device)
            return TeacherOutputs(embedding, None if logits is None else logits.to(device))

    def _autocast(self) -> Any:
        if self._autocast_dtype is None:
            return nullcontext()
        device = place_of(self.body)[0].type
        return torch.autocast(device, dtype=self._autocast_dtype, enabled=self._autocast_dtype != torch.float32)

    def _place_input(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        device, dtype = place_of(self.body)
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)


def teacher_outputs(
    teacher: Teacher | None, inputs: dict[str, Any], wants_embedding: bool, wants_logits: bool
) -> TeacherOutputs:
    """What is wanted of the teacher for a batch: from its cached columns, otherwise by one forward.

    Without a teacher, what is not cached is None.

    Raises:
        ValueError: Logits are wanted, and the teacher returns none.
    """
    embedding = _cached("teacher_embedding", inputs) if wants_embedding else None
    logits = _cached("teacher_logits", inputs) if wants_logits else None
    if teacher is not None and ((wants_embedding and embedding is None) or (wants_logits and logits is None)):
        computed = teacher(teacher_inputs(inputs, teacher.columns))
        embedding = computed.embedding if embedding is None else embedding
        logits = computed.logits if wants_logits and logits is None else logits
        if wants_logits and logits is None:
            raise ValueError(
                "`kd_weight` is above 0, and the teacher returns no logits. Load it with an AutoModelFor... class, "
                "or set kd_weight=0."
            )
    return TeacherOutputs(embedding, logits)


def _cached(name: str, inputs: dict[str, Any]) -> Tensor | None:
    """A cached column of a batch, or None."""
    value = inputs.get(name)
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dim() < 2 or value.is_complex() or value.dtype == torch.bool:
        kind = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"`{name}` must be numbers of the shape (batch, width), got {kind}.")
    return value


class TeacherProjection:
    """From the teacher's embedding to the rows that are compared: `(embedding - mean) @ matrix`. Frozen.

    Args:
        width: Of the teacher's embedding.
        dim: Of the result; None keeps the width.
        kind: "none"; "center": less the mean; "pca": less the mean, onto the `dim` directions of largest variance;
            "orthogonal": a random projection with orthonormal columns; "centered_orthogonal": that, less the mean.
        seed: Of the random projection.
        unit: Whether the rows are scaled to length 1.

    Raises:
        ValueError: `dim` differs from `width` without a projection, or is wider than it.
    """

    def __init__(self, width: int, dim: int | None, kind: str, seed: int, unit: bool = True) -> None:
        self.kind = kind
        self.width = width
        self.dim = width if dim is None else dim
        self.unit = unit
        self.mean: Tensor | None = None  # (width,)
        self.matrix: Tensor | None = None  # (width, dim), contiguous: as it comes out of a checkpoint, to the bit
        if kind in ("none", "center") and self.dim != width:
            raise ValueError(
                f"`projection_dim` must be the teacher's width, {width}, with teacher_projection={kind!r}, got "
                f"{dim}. Leave it out, or set teacher_projection='pca'."
            )
        if self.dim > width:
            raise ValueError(f"`projection_dim` must be at most the teacher's width, {width}, got {dim}.")
        if kind in ("orthogonal", "centered_orthogonal"):
            generator = torch.Generator().manual_seed(seed)
            # In float64 so that the columns are orthonormal to the last bit of float32.
            square = torch.randn(width, self.dim, generator=generator, dtype=torch.float64)
            self.matrix = torch.linalg.qr(square).Q.float().contiguous()

    @property
    def is_ready(self) -> bool:
        """Whether nothing is left to measure."""
        return self.kind not in MEASURED_PROJECTIONS or self.mean is not None

    def fit(self, embedding: Tensor) -> None:
        """Measure the mean and, for "pca", the directions on the teacher's embeddings, (examples, width).

        Raises:
            ValueError: There are no examples, or fewer than directions to find.
        """
        rows = embedding.detach().cpu().double()
        if len(rows) == 0:
            raise ValueError(f"teacher_projection={self.kind!r} needs training examples to measure, got 0.")
        mean = rows.mean(0)
        if self.kind == "pca":
            if len(rows) <= self.dim:
                raise ValueError(
                    f"teacher_projection='pca' with `projection_dim` {self.dim} needs more than {self.dim} training "
                    f"examples to measure, got {len(rows)}. Lower it, or set teacher_projection='center'."
                )
            covariance = (rows - mean).T @ (rows - mean)  # (width, width)
            directions = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : self.dim]  # largest variance first
            largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))  # (1, dim)
            self.matrix = (
                (directions * largest.sign()).float().contiguous()
            )  # one sign of the two that each direction has
        self.mean = mean.float()

    def state_dict(self) -> dict[str, Tensor]:
        """All there is to save: `mean`, (width,), and `matrix`, (width, dim), as far as there are any."""
        tensors = {"mean": self.mean, "matrix": self.matrix}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what was saved.

        Raises:
            ValueError: It is of another kind or another width.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        kinds = {
            "mean": (self.width,) if self.kind in MEASURED_PROJECTIONS else None,
            "matrix": (self.width, self.dim) if self.kind not in ("none", "center") else None,
        }
        expected = {name: shape for name, shape in kinds.items() if shape is not None}
        if shapes != expected:
            raise ValueError(
                f"the saved teacher projection has {shapes}, teacher_projection={self.kind!r} has {expected}. It was "
                "saved with another teacher or other settings."
            )
        self.mean, self.matrix = state.get("mean"), state.get("matrix")

    def __call__(self, embedding: Tensor) -> Tensor:
        """From (batch, width) to rows in float32, (batch, dim)."""
        if not self.is_ready:
            raise ValueError(
                f"teacher_projection={self.kind!r} is measured on training examples before the first step. Give the "
                "trainer a `train_dataset`, or set teacher_projection='none'."
            )
        if embedding.shape[1:] != (self.width,):
            raise ValueError(
                f"`teacher_embedding` must be {self.width} wide, as that of the first example or of the teacher, got "
                f"the shape {tuple(embedding.shape)}."
            )
        embedding = embedding.detach().float()
        with torch.autocast(embedding.device.type, enabled=False):
            if self.mean is not None:
                self.mean = self.mean.to(embedding.device)
                embedding = embedding - self.mean
            if self.matrix is not None:
                self.matrix = self.matrix.to(embedding.device)
                embedding = embedding @ self.matrix
        return F.normalize(embedding, dim=-1) if self.unit else embedding


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
        kind = getattr(config, "problem_type", None)
        if kind in ("regression", "multi_label_classification") or getattr(config, "num_labels", 2) == 1:
            raise ValueError(
                "`kd_weight` is above 0, and distillation on logits compares probabilities of 2 or more classes: "
                f"{type(model).__name__} has {config.num_labels} and the problem_type {kind!r}. Set kd_weight=0."  # type: ignore[union-attr]
            )
    if is_headless(teacher):
        raise ValueError(
            f"`kd_weight` is above 0, so the teacher needs logits: {type(teacher).__name__} has no head. Load it "
            "with an AutoModelFor... class, or set kd_weight=0."
        )
    teacher_classes, student_classes = (
        model.config.num_labels if "Classification" in type(unwrapped(model)).__name__ else None  # type: ignore[union-attr]
        for model in (teacher, student)
    )
    if teacher_classes and student_classes and teacher_classes != student_classes:
        raise ValueError(
            "`kd_weight` is above 0, so teacher and student need the same classes: the teacher has "
            f"{teacher_classes}, the student {student_classes}. Use a teacher with the student's classes, or set "
            "kd_weight=0: the relational loss does not need them."
        )


def load_teacher(teacher: Any, **kwargs: Any) -> Any:
    """A teacher by Hub name or folder, with the class that its config names; a model is returned as it is.

    Args:
        teacher: A model, a Hub name or a folder.
        kwargs: For `from_pretrained`: `revision`, `dtype`, `token`, `trust_remote_code` and so on.

    Raises:
        TypeError: It is none of these.
        ValueError: It cannot be loaded.
    """
    if teacher is not None and not isinstance(teacher, str | os.PathLike | nn.Module):
        raise TypeError(f"`teacher` must be a model, a Hub name or a folder, got a {type(teacher).__name__}.")
    if not isinstance(teacher, str | os.PathLike):
        return teacher
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
