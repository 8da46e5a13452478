"""The student's projection head: a submodule of the student, run inside its forward.

There the optimizer, gradient clipping, data parallelism and sharding treat it as any other weight. A keyword of the
forward asks for the embedding; without it the student behaves as if there were no head. Saving leaves the head out.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hf_rrd.models.body import is_headless, keep_next, take_kept, unwrapped, watch
from hf_rrd.models.embedding import Embedder, Pooling

HEAD = "relational_head"
"""The name of the head on the student."""

WITH_EMBEDDING = "with_relational_embedding"
"""The keyword of the student's forward that asks for the embedding."""

EMBEDDING = "relational_embedding"
"""The field of the student's output that holds the projected embedding."""

POOLED = "relational_pooled"
"""The field that holds it before the projection, in evaluation mode: the embedding of the student as it is saved."""

STUDENT_PROJECTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "mlp": lambda width, dim: nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim)),
    "none": lambda width, dim: nn.Identity(),
}
"""The values of `student_projection=`: functions from the student's width and the teacher's to a module."""


class RelationalHead(nn.Module):
    """Pools the output of the student's body and projects it into the width of the comparison.

    Args:
        embedder: Of the student. Its body does not become a submodule.
        dim: Width of the result: that of the teacher's (projected) embedding.
        projection: A key of `STUDENT_PROJECTIONS`.
        seed: Of the projection's start, which leaves the global random state alone.

    Raises:
        ValueError: `projection` is "none" and the student's width is not `dim`.
    """

    def __init__(self, embedder: Embedder, dim: int, projection: str, seed: int) -> None:
        super().__init__()
        self.embedder = embedder
        if projection == "none" and embedder.width != dim:
            raise ValueError(
                f"student_projection='none' needs a student as wide as the teacher's embedding, got {embedder.width} "
                f"and {dim}. Use student_projection='linear'."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projection = STUDENT_PROJECTIONS[projection](embedder.width, dim)

    def forward(self, pooled: Tensor) -> Tensor:
        """From (batch, width) to rows in float32, (batch, dim)."""
        weight = next(self.projection.parameters(), None)
        rows: Tensor = self.projection(pooled if weight is None else pooled.to(weight.dtype)).float()
        return rows

    def pool(self, attention_mask: Tensor | None) -> Tensor:
        """What the body kept of its last forward, as one row per example, (batch, width)."""
        pooled, width = self.embedder.pool(take_kept(self.embedder.body), attention_mask), self.embedder.width
        if pooled.shape[1:] != (width,):
            raise ValueError(f"the student's embedding must be {width} wide, got shape {tuple(pooled.shape)}.")
        return pooled


def attach_head(
    student: nn.Module, dim: int, projection: str = "linear", pooling: Pooling = "auto", seed: int = 0
) -> RelationalHead:
    """Give the student a head, in place of one that it may have from an earlier trainer.

    Afterwards `student(..., with_relational_embedding=True)` returns the output with one more field,
    `relational_embedding`: rows in float32, (batch, dim); in evaluation mode with another, `relational_pooled`: what
    they were projected from, (batch, width).
    """
    detach_head(student)
    embedder = Embedder(student, pooling, "student_pooling")
    head = RelationalHead(embedder, dim, projection, seed)
    reference = next(student.parameters())
    head.to(device=reference.device, dtype=reference.dtype if reference.is_floating_point() else None)
    student.add_module(HEAD, head)
    ignored = getattr(student, "_keys_to_ignore_on_save", None)
    student._keys_to_ignore_on_save = set(ignored or ()) | {f"{HEAD}.{key}" for key in head.state_dict()}  # type: ignore[assignment]
    undo = [
        watch(embedder.body),
        student.register_forward_pre_hook(_ask_body, with_kwargs=True).remove,
        student.register_forward_hook(_add_embedding, with_kwargs=True).remove,
    ]
    head.__dict__["_undo"] = (undo, ignored)
    return head


def detach_head(student: nn.Module) -> None:
    """Take the projection head of a training off the student again, with its hooks.

    A trained student keeps its head until then, so that a second training goes on with it; saved students never have
    one. Nothing happens to a student without a head.

    Args:
        student: The model that was trained: `trainer.model`.
    """
    head = head_of(student)
    if head is None:
        return
    undo, ignored = head.__dict__["_undo"]
    for each in undo:
        each()
    delattr(student, HEAD)
    student._keys_to_ignore_on_save = ignored


def head_of(student: nn.Module) -> Any:
    """The student's head, or None."""
    return student._modules.get(HEAD)


def load_head(head: RelationalHead, state: dict[str, Tensor]) -> None:
    """Take over a student's saved head.

    Raises:
        ValueError: It is of another shape.
    """
    saved, own = ({name: tuple(each.shape) for name, each in sorted(of.items())} for of in (state, head.state_dict()))
    if saved != own:
        raise ValueError(
            f"the saved head has {saved}, this student's has {own}. It was saved with another student_projection, "
            "student or teacher."
        )
    head.load_state_dict(state)


def check_student(student: nn.Module, task: bool) -> None:
    """Raise a ValueError for a student that cannot give the task loss that it is to learn."""
    if task and is_headless(student):
        raise ValueError(
            f"`task_weight` is above 0, so the student needs a head: {type(unwrapped(student)).__name__} has none. "
            "Load it with an AutoModelFor... class, pass a `compute_loss_func`, or set task_weight=0."
        )


class StudentOutputs(NamedTuple):
    """What one forward of the student gives; what there is not is None."""

    task_loss: Tensor | None
    outputs: Any  # as the model gives them without us
    embedding: Tensor | None = None  # projected, (batch, dim)
    pooled: Tensor | None = None  # before that, (batch, width); in evaluation mode


def split_embedding(outputs: Any) -> tuple[Any, Tensor | None, Tensor | None]:
    """A student's output without our fields, its embedding, (batch, dim), and its pooled one in evaluation mode."""
    if not isinstance(outputs, dict) or EMBEDDING not in outputs:
        return outputs, None, None
    plain = {key: value for key, value in outputs.items() if key not in (EMBEDDING, POOLED)}
    return type(outputs).__mro__[1](**plain), outputs[EMBEDDING], outputs.get(POOLED)


def _ask_body(student: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    wanted = kwargs.pop(WITH_EMBEDDING, False)
    student.__dict__[WITH_EMBEDDING] = wanted
    if wanted:
        keep_next(head_of(student).embedder.body)
    return args, kwargs


def _add_embedding(student: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
    if not student.__dict__.pop(WITH_EMBEDDING, False):
        return None
    if not isinstance(outputs, ModelOutput):
        raise ValueError(f"the student must return a ModelOutput, got {type(outputs).__name__}. Set return_dict=True.")
    head = head_of(student)
    pooled = head.pool(kwargs.get("attention_mask"))
    ours = {EMBEDDING: head(pooled)} | ({} if student.training else {POOLED: pooled})
    return _with_embedding(type(outputs))(**dict(outputs.items()), **ours)


_EXTENDED: dict[type, Any] = {}


def _with_embedding(output_class: type) -> Any:
    # DistributedDataParallel rebuilds an output as `cls(**items)`: one more key has to be a field of the class.
    if output_class not in _EXTENDED:
        _EXTENDED[output_class] = dataclasses.make_dataclass(
            f"{output_class.__name__}WithEmbedding",
            [(EMBEDDING, object, None), (POOLED, object, None)],
            bases=(output_class,),
        )
    return _EXTENDED[output_class]
