"""The student's projection head: a submodule of the student, run inside its forward.

There the optimizer, gradient clipping, data parallelism and sharding treat it as any other weight. A keyword of the
forward asks for the embedding; without it the student behaves as if there were no head. Saving leaves the head out.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput, logging

from hf_rrd.models.body import Split, forget, is_headless, is_watched, keep_next, take_kept, unwrapped, watch
from hf_rrd.models.embedding import Embedder, Pooling, students
from hf_rrd.models.sentence_transformers import AROUND

logger = logging.get_logger(__name__)

HEAD = "relational_head"  # the name of the head on the student
WITH_EMBEDDING = "with_relational_embedding"  # the keyword of the student's forward that asks for the embedding
EMBEDDING = "relational_embedding"  # the field of the student's output that holds it, projected
POOLED = "relational_pooled"  # another that holds it as the saved student has it: not projected
LAYERS = "relational_layers"  # another that holds what was caught of its layers, a tuple
OURS = (EMBEDDING, POOLED, LAYERS)


def _linear(width: int, dim: int) -> nn.Linear:
    """A linear layer; of equal widths it starts as the identity: a part of the teacher then starts near its space."""
    layer = nn.Linear(width, dim)
    if width == dim:
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layer


# The values of `student_projection=`: functions from the student's width and the teacher's to a module.
STUDENT_PROJECTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "centered": _linear,
    "linear": _linear,
    "none": lambda width, dim: nn.Identity(),
}
GROUP = 16
"""Rows of a micro-batch whose mean "centered" takes off: so one of 64 rows is the same as four of 16."""
FEWEST = 8
"""Rows of a micro-batch from which on it has a mean of its own."""


class RelationalHead(nn.Module):
    """Projects what the student's embedder pools, whose body does not become a submodule, to the width `dim`.

    `projection` is a key of `STUDENT_PROJECTIONS`, whose start draws from `seed` and not from the global random state;
    of equal widths it starts as the identity.
    "centered" takes the mean of each `GROUP` rows off first, with its gradient: what examples have in common is kept
    out of the comparison, as the teacher's mean is. In evaluation it takes off `mean`.
    """

    body_name: str  # of the body, as a submodule of the student
    undo: list[Callable[[], None]]  # what takes the hooks off again
    ignored: Any  # the student's `_keys_to_ignore_on_save` before
    split: Split | None = None  # of the student's hidden states in training: for its own head, and for this one
    mean: Tensor | None = None  # of the student's embeddings, (width,), as a training has measured it

    def __init__(self, embedder: Embedder, dim: int, projection: str, seed: int) -> None:
        super().__init__()
        self.embedder = embedder
        if projection == "none" and embedder.width != dim:
            widths = f"a student as wide as the teacher's embedding, got {embedder.width} and {dim}"
            raise ValueError(f"student_projection='none' needs {widths}. Use student_projection='linear'.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projection = STUDENT_PROJECTIONS[projection](embedder.width, dim)
        self.centers = projection == "centered"

    def forward(self, pooled: Tensor) -> Tensor:
        """From (batch, width) to rows in float32, (batch, dim)."""
        if self.centers:
            pooled = self._centered(pooled.float())
        dtype = next(self.projection.parameters(), pooled).dtype
        rows: Tensor = self.projection(pooled.to(dtype)).float()
        return rows

    def _centered(self, pooled: Tensor) -> Tensor:
        if self.training and len(pooled) >= FEWEST:
            return _less_means(pooled)
        return pooled if self.mean is None else pooled - self.mean.to(pooled.device)

    def pool(self, outputs: Any, inputs: dict[str, Any]) -> Tensor:
        """The body's output for these inputs as one row per example, (batch, width)."""
        pooled, width = self.embedder.pool(outputs, inputs), self.embedder.width
        if pooled.shape[1:] != (width,):
            raise ValueError(f"the student's embedding must be {width} wide, got shape {tuple(pooled.shape)}.")
        return pooled


class _LessMeans(torch.autograd.Function):
    """Rows less the mean of each `GROUP` of them, which is a projection: so is its gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        groups = max(1, len(rows) // GROUP)
        if len(rows) % groups == 0:
            grouped = rows.reshape(groups, -1, rows.shape[1])
            return (grouped - grouped.mean(1, keepdim=True)).view_as(rows)
        return torch.cat([group - group.mean(0) for group in rows.tensor_split(groups)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _less_means(grads[0])


_less_means: Callable[[Tensor], Tensor] = _LessMeans.apply


def attach_head(
    student: nn.Module, dim: int, projection: str = "centered", pooling: Pooling = "auto", seed: int = 0
) -> RelationalHead:
    """Give the student a head, in place of one that it may have from an earlier trainer.

    Afterwards the output of `student(..., with_relational_embedding=True)` has the field `relational_embedding`: rows
    in float32, (batch, dim); and `relational_pooled`: these before the projection, (batch, width).
    """
    detach_head(student)
    unwrapped(student).__dict__.pop(AROUND, None)  # of a student the pooling is `student_pooling`
    head = RelationalHead(Embedder(student, students(pooling), "student_pooling"), dim, projection, seed)
    head.body_name = next(name for name, each in student.named_modules() if each is head.embedder.watched)
    reference = next(student.parameters())
    head.to(dtype=reference.dtype if reference.is_floating_point() else None)
    put_head(student, head)
    return head


def put_head(student: nn.Module, head: RelationalHead) -> None:
    """Put a head on the student that it was made for, in place of one that is there."""
    detach_head(student)
    student.add_module(HEAD, head.to(next(student.parameters()).device))
    ignored = getattr(student, "_keys_to_ignore_on_save", None)
    student._keys_to_ignore_on_save = set(ignored or ()) | {f"{HEAD}.{key}" for key in head.state_dict()}  # type: ignore[assignment]
    head.undo, head.ignored = [], ignored
    _watched_body(student)
    head.undo += [
        student.register_forward_pre_hook(_ask_body, with_kwargs=True, prepend=True).remove,
        student.register_forward_hook(_add_embedding, with_kwargs=True, always_call=True).remove,
    ]


def detach_head(student: nn.Module) -> None:
    """Take the projection head off a student again, with its hooks, if it has one.

    A trainer puts it on when it is made, and takes it off when a training has ended, but for its own evaluations and
    another training. Saved students never have one.
    """
    for model in (student, unwrapped(student)):  # an adapter may have been put around one that has it
        head: Any = head_of(model)
        if head is not None:
            model._keys_to_ignore_on_save = head.ignored
            for undo in head.undo:
                undo()
            delattr(model, HEAD)


def head_of(student: nn.Module) -> Any:
    """The student's head, or None."""
    return student._modules.get(HEAD)


def check_optimizer(student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError for an optimizer that trains weights of the student and not those of its head."""
    own = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    wanted = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
    if all(name.startswith(f"{HEAD}.") for name in wanted):
        logger.warning("No weight of the student asks for a gradient: it stays as it is. Set requires_grad on some.")
    missing = [name for name, weight in wanted.items() if name.startswith(f"{HEAD}.") and id(weight) not in own]
    if missing and own & {id(weight) for weight in wanted.values()}:  # a sharded or a layer-wise one has others
        raise ValueError(
            f"the optimizer leaves out the student's projection, {missing}, which the trainer gave it: its weights "
            "were listed before. Pass it as `optimizers=`, or list `trainer.model.parameters()`."
        )


def load_head(head: RelationalHead, state: dict[str, Tensor]) -> None:
    """Take over a student's saved head; a ValueError if it is of another shape."""
    saved, own = ({name: tuple(each.shape) for name, each in sorted(of.items())} for of in (state, head.state_dict()))
    if saved != own:
        cause = "It was saved with another student_projection, student or teacher."
        raise ValueError(f"the saved head has {saved}, this student's has {own}. {cause}")
    head.load_state_dict(state)


def check_student(student: nn.Module, task: bool) -> None:
    """Raise a ValueError for a student that cannot be trained, or not give the task loss that it is to learn."""
    if "_orig_mod" in student.__dict__:
        what = f"the student is a copy that `compile_regions` made of a {type(student).__name__}"
        raise ValueError(f"{what}, which has no head. Pass the model itself, and set torch_compile=True.")
    if task and is_headless(student):
        came = f"the student needs a head: {type(unwrapped(student)).__name__} has none"
        instead = "Load it with an AutoModelFor... class, pass a `compute_loss_func`, or set task_weight=0"
        raise ValueError(f"`task_weight` is above 0, so {came}. {instead}.")


class StudentOutputs(NamedTuple):
    """What one forward of the student gives; what there is not is None."""

    task_loss: Tensor | None
    outputs: Any  # as the model gives them without us
    embedding: Tensor | None = None  # projected, (batch, dim)
    pooled: Tensor | None = None  # before that, (batch, width)
    layers: tuple[Tensor, ...] | None = None  # as its `LayerTap` caught them


def split_outputs(outputs: Any) -> tuple[Any, Tensor | None, Tensor | None, tuple[Tensor, ...] | None]:
    """All but the first field of `StudentOutputs`, from what a student's forward returned."""
    if type(outputs) not in _EXTENDED.values():
        return outputs, None, None, None
    plain = {key: value for key, value in outputs.items() if key not in OURS}
    embedding, pooled, layers = (outputs.get(name) for name in OURS)
    if not torch.is_grad_enabled() and pooled is not None and "last_hidden_state" in plain:
        # of a headless student an evaluation collects rows alone
        return ModelOutput(embedding=pooled), embedding, pooled, layers
    return type(outputs).__mro__[1](**plain), embedding, pooled, layers


def _watched_body(student: nn.Module) -> nn.Module:
    """The student's body by its name: of a replica or a copy its own, and one that has taken its place later."""
    head: Any = head_of(student)
    body = student.get_submodule(head.body_name)
    if not is_watched(body):
        head.undo.append(watch(body))
    return body


def _ask_body(student: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    wanted = kwargs.pop(WITH_EMBEDDING, False)
    student.__dict__[WITH_EMBEDDING] = wanted
    if wanted:
        split = head_of(student).split if student.training else None
        keep_next(_watched_body(student), split or True)
    return args, kwargs


def _add_embedding(student: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
    if not student.__dict__.pop(WITH_EMBEDDING, False):
        return None
    if outputs is None:  # the forward has failed
        return forget(_watched_body(student))
    head = head_of(student)
    pooled = head.pool(take_kept(_watched_body(student)), kwargs)
    return with_fields(outputs, **{EMBEDDING: head(pooled), POOLED: pooled})


def with_fields(outputs: Any, **ours: Any) -> Any:
    """A model's output with some of the fields `OURS` beside its own."""
    if not isinstance(outputs, ModelOutput):
        raise ValueError(f"the model must return a ModelOutput, got {type(outputs).__name__}. Set return_dict=True.")
    output_class: Any = type(outputs)
    return _extended(output_class)(**dict(outputs.items()), **ours)


_EXTENDED: dict[type, Any] = {}  # no functools.cache, which torch.compile would warn of


def _extended(output_class: type) -> Any:
    # DistributedDataParallel rebuilds an output as `cls(**items)`: one more key has to be a field of the class.
    if output_class in _EXTENDED.values():
        return output_class
    if output_class not in _EXTENDED:
        name, fields = f"{output_class.__name__}WithEmbedding", [(name, object, None) for name in OURS]
        _EXTENDED[output_class] = dataclasses.make_dataclass(name, fields, bases=(output_class,))
    return _EXTENDED[output_class]
