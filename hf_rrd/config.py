"""The settings of a distillation run: `TrainingArguments` and ours."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_rrd.losses.in_batch import BATCH_LOSSES
from hf_rrd.models.head import STUDENT_PROJECTIONS
from hf_rrd.models.pooling import POOLERS
from hf_rrd.models.teacher import MEASURED_PROJECTIONS, TEACHER_DTYPES, TEACHER_PROJECTIONS
from hf_rrd.training.objective import RELATIONAL_LOSSES

AUTO_BANK_SIZE = 4096
"""What `bank_size="auto"` comes to, or the size of the training set where that is smaller."""

WEIGHTS = ("task_weight", "kd_weight", "relational_weight")
SWITCHES = ("include_own", "gather_bank", "ignore_teacher_change")
TEMPERATURES = {"kd_temperature": 4, "student_temperature": 0.1, "teacher_temperature": 0.02}


@dataclass(repr=False)
class RelationalDistillationConfig(TrainingArguments):
    """`TrainingArguments` with the settings of relational distillation.

    `loss = task_weight * task + kd_weight * KD + relational_weight * relational`. Every field may come from Python,
    from the command line, JSON or YAML through `HfArgumentParser`; a pooling given as a callable only from Python.

    Raises:
        ValueError: A setting is out of its range, or two do not go together.
    """

    task_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the task loss (the model's own, label smoothing or compute_loss_func included), 0 or "
            "more. 0 trains without labels."
        },
    )
    kd_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of classic distillation on logits, 0 or more. 0 never computes it. Above 0 the teacher "
            "needs a head with the student's classes."
        },
    )
    kd_temperature: float = field(
        default=4.0,
        metadata={
            "help": "Temperature of classic distillation, positive. Raise it to show more of how the teacher ranks "
            "the wrong classes; its loss is multiplied by the square."
        },
    )
    relational_weight: float = field(
        default=10.0,
        metadata={
            "help": "Weight of the relational loss, 0 or more. 0 leaves out head and bank. The default is what "
            "validation data chose on SST-2 and on CIFAR-10, with 500 labels."
        },
    )
    relational_loss: str = field(
        default="rrd",
        metadata={
            "help": "Which relational loss, by name. 'rrd': cross-entropy between the teacher's and the student's "
            "distribution of similarity over the bank; 'infonce': each example finds its own teacher embedding in the "
            "bank; the others compare within the micro-batch, and each wants a relational_weight of its own.",
            "choices": list(RELATIONAL_LOSSES),
        },
    )
    student_temperature: float = field(
        default=0.1,
        metadata={
            "help": "Temperature of the student's similarities, positive. Keep it above teacher_temperature: a "
            "sharper student was worse where labels are few on CIFAR-10, and no better elsewhere."
        },
    )
    teacher_temperature: float = field(
        default=0.02,
        metadata={
            "help": "Temperature of the teacher's similarities, positive. Lower it for a teacher whose embeddings "
            "are all alike; near 0 each example has only itself to match."
        },
    )
    teacher_perplexity: float | None = field(
        default=None,
        metadata={
            "help": "Instead of teacher_temperature: how many rows of the bank each example's target is spread over, "
            "above 1, half of it beside the example's own key. Set it where teacher_perplexity in the log stays near "
            "1, or to be spared the choice of a temperature."
        },
    )
    bank_size: int | str | None = field(
        default=4096,
        metadata={
            "help": "Rows in the bank of teacher embeddings, 0 or more, or 'auto': 4096, or the training set's size "
            "if smaller. 0 compares within the micro-batch, whose result depends on how the batch is cut."
        },
    )
    include_own: bool = field(
        default=True,
        metadata={
            "help": "Whether an example is also compared with its own teacher embedding. Turn it off to compare with "
            "other examples only, which was level on SST-2 and up to 0.7 points worse on CIFAR-10."
        },
    )
    gather_bank: bool = field(
        default=True,
        metadata={
            "help": "Whether each process's bank holds the embeddings of all processes. Turn it off to save one "
            "gather of (batch, width) per step."
        },
    )
    projection_dim: int | None = field(
        default=None,
        metadata={
            "help": "Width in which teacher and student are compared, 1 or more. Unset: the teacher's own "
            "width. Set it, with teacher_projection, for a smaller bank."
        },
    )
    student_projection: str = field(
        default="linear",
        metadata={
            "help": "From the student's embedding to that width, trained and then thrown away: 'linear', 'mlp', or "
            "'none' where the widths are equal.",
            "choices": list(STUDENT_PROJECTIONS),
        },
    )
    teacher_projection: str = field(
        default="center",
        metadata={
            "help": "From the teacher's embedding to that width, frozen: 'center' takes the mean off (see README for "
            "what that is worth), 'none' keeps it as it is, 'pca' projects to projection_dim for a smaller bank; "
            "'orthogonal' and 'centered_orthogonal' do so at random.",
            "choices": list(TEACHER_PROJECTIONS),
        },
    )
    calibration_examples: int = field(
        default=4096,
        metadata={
            "help": "Training examples whose teacher embeddings are computed before the first step, to measure the "
            "teacher_projection and to fill the bank, 0 or more; cached embeddings fill all of it. 0 starts with an "
            "empty bank."
        },
    )
    alignment_examples: int = field(
        default=0,
        metadata={
            "help": "Evaluation examples whose embeddings are compared with the teacher's at each evaluation, 0 or "
            "more, spread evenly over it. Set it to some thousand to have eval_alignment_cka, "
            "eval_alignment_rank_correlation and eval_alignment_neighbor_overlap, also as metric_for_best_model."
        },
    )
    student_pooling: str = field(
        default="auto",
        metadata={
            "help": "From the student's hidden states to one embedding: 'auto', 'cls', 'mean', 'max', 'last_token', "
            "'pooler', 'gap', or in Python a callable (body_output, attention_mask) -> (batch, width). 'auto': last "
            "token of a decoder, CLS of a vision model that has one, otherwise the mean."
        },
    )
    teacher_pooling: str = field(
        default="auto",
        metadata={
            "help": "The same for the teacher. Set it to what the teacher was trained with, 'mean' or 'cls' for most "
            "embedding models."
        },
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={
            "help": "The autocast dtype of the teacher's forward: 'bfloat16', 'float16' or 'float32'. Unset: that of "
            "the training (bf16, fp16). Set 'bfloat16' to spare time in a float32 training. The weights keep "
            "the dtype in which they were loaded.",
            "choices": list(TEACHER_DTYPES),
        },
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of from_pretrained for a teacher given by name or folder, as a dict or JSON: "
            "revision, dtype, token, trust_remote_code."
        },
    )

    ignore_teacher_change: bool = field(
        default=False,
        metadata={
            "help": "When resuming training, whether or not to go on with another teacher than the checkpoint's: the "
            "student and its head are kept, the teacher's projection and the bank are measured anew. Off, another "
            "teacher is an error."
        },
    )

    def __post_init__(self) -> None:
        for name in (*WEIGHTS, *TEMPERATURES):
            setattr(self, name, _number(name, getattr(self, name)))
        if self.teacher_perplexity is not None:
            self.teacher_perplexity = _number("teacher_perplexity", self.teacher_perplexity)
        self.bank_size = _bank_size(self.bank_size)
        self.teacher_model_init_kwargs = _init_kwargs(self.teacher_model_init_kwargs)
        self.validate()
        super().__post_init__()

    def validate(self) -> None:
        """Raise a ValueError for a setting out of its range; the trainer asks again when a training starts."""
        for name, advice in TEMPERATURES.items():
            value = getattr(self, name)
            if not 1e-6 <= value <= 1e6:  # beyond these float32 gives out
                raise ValueError(f"`{name}` must be positive, from 1e-6 to 1e6, got {value}. Try {advice}.")
        for name in WEIGHTS:
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(
                    f"`{name}` must be 0 or more and finite, got {value}. Set it to 0 to turn the term off."
                )
        if all(getattr(self, name) == 0 for name in WEIGHTS):
            raise ValueError(
                "`task_weight`, `kd_weight` and `relational_weight` are all 0, so there is nothing to train. Set at "
                "least one above 0."
            )
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if self.projection_dim is not None and not (_is_whole(self.projection_dim) and self.projection_dim >= 1):
            raise ValueError(
                f"`projection_dim` must be 1 or more, got {self.projection_dim!r}. Try 128, or leave it out."
            )
        _check_choice("relational_loss", self.relational_loss, list(RELATIONAL_LOSSES))
        _check_choice("student_projection", self.student_projection, list(STUDENT_PROJECTIONS))
        _check_choice("teacher_projection", self.teacher_projection, list(TEACHER_PROJECTIONS))
        if self.teacher_dtype is not None:
            _check_choice("teacher_dtype", self.teacher_dtype, list(TEACHER_DTYPES))
        for name in ("student_pooling", "teacher_pooling"):
            if not callable(getattr(self, name)):
                _check_choice(name, getattr(self, name), ["auto", *POOLERS])
        for name in ("calibration_examples", "alignment_examples"):
            count = getattr(self, name)
            if not _is_whole(count):
                raise ValueError(f"`{name}` must be a whole number, got {count!r}.")
            if count < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {count}. Try 4096.")
        if self.alignment_examples == 1:
            raise ValueError("`alignment_examples` must be 0, or 2 or more to compare, got 1. Try 2000.")
        if self.alignment_examples > 0 and self.relational_weight == 0:
            raise ValueError(
                f"`alignment_examples` is {self.alignment_examples}, and without a relational loss no embeddings are "
                "computed. Set it to 0, and call the trainer's report() after the training."
            )
        if self.calibration_examples == 0 and self.teacher_projection in MEASURED_PROJECTIONS:
            raise ValueError(
                f"teacher_projection={self.teacher_projection!r} is measured on training examples, and "
                "`calibration_examples` is 0. Set it to some thousand, or set teacher_projection='none'."
            )
        if self.teacher_projection == "pca" and self.projection_dim is None:
            raise ValueError("teacher_projection='pca' needs a `projection_dim`, got None. Try 128.")
        self._validate_bank()

    def _validate_bank(self) -> None:
        perplexity = self.teacher_perplexity
        if perplexity is not None:
            if not (perplexity > 1 and math.isfinite(perplexity)):
                raise ValueError(f"`teacher_perplexity` must be above 1 and finite, got {perplexity}. Try 20.")
            if self.relational_loss != "rrd":
                raise ValueError(f"`teacher_perplexity` is for relational_loss='rrd', got {self.relational_loss!r}.")
            if isinstance(self.bank_size, int) and self.bank_size <= perplexity:
                raise ValueError(
                    f"`teacher_perplexity` must be below `bank_size`, got {perplexity} and {self.bank_size}."
                )
        if self.relational_loss == "infonce" and not self.include_own:
            raise ValueError("relational_loss='infonce' is about the own key: leave `include_own` on, got False.")
        if isinstance(self.bank_size, int) and self.bank_size < 0:
            raise ValueError(f"`bank_size` must be 0 or more rows, got {self.bank_size}. Try 4096.")
        if self.bank_size == 0 and not self.include_own:
            raise ValueError(
                "`include_own=False` needs a bank, got bank_size=0: within a micro-batch each example finds its own "
                "key. Set bank_size above 0."
            )
        if self.bank_size == 1 and not self.include_own:
            raise ValueError("`bank_size=1` without `include_own` leaves nothing to tell apart: the loss is always 0.")
        if self.bank_size == 0 and self.per_device_train_batch_size == 1 and self.relational_weight > 0:
            raise ValueError(
                "`bank_size=0` compares within the micro-batch, and `per_device_train_batch_size` is 1: the "
                "relational loss is always 0. Set bank_size above 0."
            )

    def to_dict(self) -> dict[str, Any]:
        """As in `TrainingArguments`, with a callable pooling by its name and without the teacher's token."""
        fields = super().to_dict()
        for name in ("student_pooling", "teacher_pooling"):
            fields[name] = name_of(fields[name])
        if isinstance(fields["teacher_model_init_kwargs"], dict):
            fields["teacher_model_init_kwargs"] = {
                name: "<TOKEN>" if name == "token" else value if isinstance(value, bool | int | float) else str(value)
                for name, value in fields["teacher_model_init_kwargs"].items()
            }
        return dict(fields)

    def __str__(self) -> str:
        return TrainingArguments.__str__(self.shareable())

    __repr__ = __str__

    def shareable(self) -> "RelationalDistillationConfig":
        """A copy for `training_args.bin`: without tokens, and without a callable that could not be pickled."""
        shared = copy.copy(self)
        shown = self.to_dict()
        secret = [name for name in shown if name.endswith("_token") and getattr(self, name) is not None]
        for name in ("student_pooling", "teacher_pooling", "teacher_model_init_kwargs", *secret):
            setattr(shared, name, shown[name])
        return shared


def bank_rows(args: RelationalDistillationConfig, train_dataset: Any) -> int:
    """The rows that the settings come to for a training set: none for a loss that compares within the micro-batch."""
    if args.relational_loss in BATCH_LOSSES:
        return 0
    if isinstance(args.bank_size, int):
        return args.bank_size
    return min(AUTO_BANK_SIZE, len(train_dataset)) if hasattr(train_dataset, "__len__") else AUTO_BANK_SIZE


def _number(name: str, value: Any) -> float:
    try:
        return float(value)  # YAML reads 1e-2, without a point, as a string
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor
        raise ValueError(f"`{name}` must be a number, got {value!r}.") from None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bank_size(value: int | str | None) -> int | str:
    if value is None or (isinstance(value, str) and value == "auto"):
        return "auto"
    try:
        size = int(value)
        whole = not isinstance(value, bool) and (isinstance(value, str) or size == value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        whole = False
    if not whole:
        raise ValueError(f"`bank_size` must be a number of rows or 'auto', got {value!r}. Try 4096.")
    return size


def _init_kwargs(value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    try:
        kwargs = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        kwargs = value
    if kwargs is not None and not (isinstance(kwargs, dict) and all(isinstance(name, str) for name in kwargs)):
        raise ValueError(
            f"`teacher_model_init_kwargs` must be a dict or a JSON object, got {value!r}. "
            'Try \'{"revision": "main"}\'.'
        )
    return kwargs


def _check_choice(name: str, value: Any, known: list[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"`{name}` must be one of {known}, got {value!r}.")


def name_of(pooling: str | Callable[..., Any]) -> str:
    """A pooling's name, also of a callable."""
    return pooling if isinstance(pooling, str) else getattr(pooling, "__qualname__", type(pooling).__name__)
