"""The settings of a distillation run: `TrainingArguments` and ours."""

import copy
import inspect
import json
import math
import re
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from transformers.training_args import TrainingArguments

from hf_rrd.errors import refuse_unknown
from hf_rrd.losses.in_batch import FEWEST_EXAMPLES
from hf_rrd.models.head import STUDENT_PROJECTIONS
from hf_rrd.models.pooling import POOLERS, name_of
from hf_rrd.training.distillation import RELATIONAL_LOSSES
from hf_rrd.training.projection import TEACHER_PROJECTIONS

WEIGHTS = ("task_weight", "kd_weight", "relational_weight", "layer_weight")
AUTOMATIC = ("kd_weight", "kd_temperature", "relational_weight", "layer_weight")  # those that may be "auto"
TEMPERATURES = {"kd_temperature": 4, "student_temperature": 0.1, "teacher_temperature": 0.02}
CHOICES = {
    "kd_loss": ("kl", "dist"),
    "student_projection": tuple(STUDENT_PROJECTIONS),
    "teacher_projection": TEACHER_PROJECTIONS,
    "student_format": ("transformers", "sentence_transformers"),
}
# Of `teacher_model_init_kwargs` what may be shown and written; of any other only the name, as it may be a secret.
SHOWN_KWARGS = {
    *("revision", "code_revision", "subfolder", "variant", "dtype", "torch_dtype", "num_labels", "use_safetensors"),
    *("attn_implementation", "device_map", "max_memory", "offload_folder", "quantization_config", "low_cpu_mem_usage"),
    *("trust_remote_code", "local_files_only", "force_download", "ignore_mismatched_sizes"),
}
NUMBERS: dict[Any, type] = {float: float, float | None: float, int: int, int | None: int}  # types of fields

Config = TypeVar("Config", bound=type[TrainingArguments])


def described(config: Config) -> Config:
    """Give each field that a config's docstring describes, under `Args:`, that text as its help on the command line.

    So there is one text, which `help()`, an editor and `--help` all show.
    """
    _, _, section = inspect.cleandoc(config.__doc__ or "").partition("\nArgs:\n")
    for entry in re.split(r"\n {4}(?=\w)", "\n" + section.partition("\n\n")[0]):
        name, _, text = entry.partition(": ")
        if name in config.__dataclass_fields__:
            ours = config.__dataclass_fields__[name]
            ours.metadata = MappingProxyType({**ours.metadata, "help": " ".join(text.split())})
    return config


@described
@dataclass(repr=False)
class RelationalDistillationConfig(TrainingArguments):
    """`TrainingArguments` with the settings of relational distillation.

    `loss = task_weight * task + kd_weight * KD + relational_weight * relational + layer_weight * layers`. Every field
    may come from Python, from the command line, JSON or YAML through `HfArgumentParser`; a pooling given as a callable
    only from Python.

    Args:
        task_weight: Weight of the task loss (the model's own, label smoothing or compute_loss_func included), 0 or
            more. 0 trains without labels.
        kd_weight: Weight of classic distillation on logits, 0 or more. 'auto': 1 where the teacher has the student's
            classes, by the names in `id2label` and by its answers, otherwise 0, which never computes it. Above 0 the
            teacher needs a head with these classes.
        kd_temperature: Temperature of classic distillation, positive. Raise it to show more of how the teacher ranks
            the wrong classes; the loss "kl" is multiplied by the square. 'auto': 1 for the words of language models,
            which have many, otherwise 4.
        kd_loss: Which loss on logits. 'kl': the divergence of the softened class probabilities; 'dist': their
            correlation over the classes and over the examples of the micro-batch, for one label per example or token.
        relational_weight: Weight of the relational loss, 0 or more. 0 leaves out head and bank. With balance_losses:
            how many times as hard as the task it pulls. 'auto': 10 where the teacher has the student's classes, as
            for kd_weight, otherwise 1; and 0.3 where the head answers for each token, frame or pixel.
        balance_losses: Whether the gradient of the relational loss is scaled, where it meets that of task and
            distillation on logits at the student's hidden states, to relational_weight times as hard. Off, the weight
            only multiplies the loss, and what it is worth depends on the task.
        relational_loss: Which relational loss, by name, or several as a dict (on the command line JSON) of names and
            their weights among each other. 'rrd': cross-entropy between the teacher's and the student's distribution
            of similarity over the bank; 'infonce': each example finds its own teacher embedding in the bank; the
            others compare within the micro-batch, 'own_space' in the student's own space, the rest in the teacher's.
        layer_weight: Weight of the loss of layers below the last, 0 or more, never balanced. Above 0 the teacher has
            to be there in training and read the student's input. Of one width the standardised hidden states of each
            token are compared; otherwise how its queries, keys and values in the last layer are like those of the
            other tokens. 'auto': 0.
        layer_pairs: Which layers are compared, as a list (on the command line JSON, "[[0, 1], [1, 3]]") of pairs of
            the student's and the teacher's layer, counted from 0. Unset: of one width all of the student's, evenly
            over the teacher's; otherwise the last of each.
        student_temperature: Temperature of the student's similarities, positive. Keep it above teacher_temperature:
            a sharper student was worse where labels are few on CIFAR-10, and no better elsewhere.
        teacher_temperature: Temperature of the teacher's similarities, positive. Lower it for a teacher whose
            embeddings are all alike; near 0 each example has only itself to match.
        bank_size: Rows in the bank of teacher embeddings, 0 or more; never more than there are training examples. It
            is full from the first step, for which a teacher reads as many examples. 0 compares within the micro-batch,
            whose result depends on how the batch is cut.
        projection_dim: Width in which teacher and student are compared, 1 or more. Unset: the teacher's own width.
            Set it, with teacher_projection, for a smaller bank.
        matryoshka_dims: Widths, as a list (on the command line JSON, "[384, 128, 64]"), to which the student's
            projected embedding may be cut: each relational loss but 'own_space' is the mean over the leading
            dimensions of both sides, as many as each says. The full width counts only if it is among them.
        student_projection: From the student's embedding to that width, trained and then thrown away: 'centered',
            linear after the mean of each 16 examples is taken off, with its gradient; 'linear', without; or 'none'
            where the widths are equal. Of equal widths it starts as the identity.
        teacher_projection: From the teacher's embedding to that width, frozen: 'center' takes the mean off, 'none'
            keeps it as it is, 'pca' projects to projection_dim for a smaller bank; 'orthogonal' does so at random.
        alignment_examples: Evaluation examples whose embeddings are compared with the teacher's at each evaluation, 0
            or more, spread evenly over it. Set it to some thousand to have eval_alignment_cka,
            eval_alignment_rank_correlation, eval_alignment_neighbor_overlap and eval_teacher_retrieval@1 and @10, also
            as metric_for_best_model.
        student_pooling: From the student's hidden states to one embedding: 'auto', 'head', 'cls', 'mean', 'max',
            'last_token', 'pooler', 'gap', or in Python a callable (body_output, attention_mask) -> (batch, width).
            'auto' and 'head': what the last layer of its classifier reads; without one, as for a teacher, the last
            token of a decoder, CLS of a vision model that has one, otherwise the mean.
        teacher_pooling: How the teacher's hidden states become one embedding, as for a student without a head. Set it
            to what the teacher was trained with, 'mean' or 'cls' for most embedding models.
        student_format: What save_model, checkpoints and pushes write: 'transformers', the plain student; or
            'sentence_transformers', with its projection, an embedding model in its teacher's space, whose transformer
            loads as a plain one, too.
        teacher_model_init_kwargs: Arguments of from_pretrained for a teacher given by name or folder, as a dict or
            JSON: revision, dtype, token, trust_remote_code.

    Raises:
        ValueError: A setting is out of its range, or two do not go together.
    """

    task_weight: float = 1.0
    kd_weight: float | str | None = "auto"
    kd_temperature: float | str | None = "auto"
    kd_loss: str = field(default="kl", metadata={"choices": ["kl", "dist"]})
    relational_weight: float | str | None = "auto"
    balance_losses: bool = True
    relational_loss: dict[str, float] | str | None = "rrd"  # a dict also from JSON
    layer_weight: float | str | None = "auto"
    layer_pairs: list[list[int]] | str | None = None  # a list, also from JSON
    student_temperature: float = 0.1
    teacher_temperature: float = 0.02
    bank_size: int = 4096
    projection_dim: int | None = None
    matryoshka_dims: list[int] | str | None = None  # a list, also from JSON
    student_projection: str = field(default="centered", metadata={"choices": list(STUDENT_PROJECTIONS)})
    teacher_projection: str = field(default="center", metadata={"choices": list(TEACHER_PROJECTIONS)})
    alignment_examples: int = 0
    student_pooling: str = "auto"
    teacher_pooling: str = "auto"
    student_format: str = field(
        default="transformers", metadata={"choices": ["transformers", "sentence_transformers"]}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = None  # a dict from here on

    def __new__(cls, *args: Any, **kwargs: Any) -> "RelationalDistillationConfig":
        """Refuse misspelt names, with what may be meant."""
        refuse_unknown(cls, kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in (*WEIGHTS, *TEMPERATURES):
            value = getattr(self, name)
            if name in AUTOMATIC and (value is None or str(value) == "auto"):
                setattr(self, name, "auto")
            else:
                setattr(self, name, _number(name, value))
        self.relational_loss = _read_json("relational_loss", self.relational_loss)
        if isinstance(self.relational_loss, dict):
            weights = self.relational_loss.items()
            self.relational_loss = {name: _number(f"relational_loss[{name!r}]", weight) for name, weight in weights}
        self.matryoshka_dims = _read_json("matryoshka_dims", self.matryoshka_dims)
        if isinstance(self.matryoshka_dims, list | tuple):
            self.matryoshka_dims = [each if isinstance(each, bool) else _whole(each) for each in self.matryoshka_dims]
        self.layer_pairs = _read_json("layer_pairs", self.layer_pairs)
        self._read_strings()
        self.teacher_model_init_kwargs = _init_kwargs(self.teacher_model_init_kwargs)
        self.validate()
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith("relational_kl"):
            self.greater_is_better = False  # transformers takes only what ends with "loss" for one
        super().__post_init__()  # type: ignore[no-untyped-call]

    def _read_strings(self) -> None:
        """Take numbers that came in another type: YAML reads 5e-4 and 1e3, without a point, as strings."""
        for each in fields(self):
            value, kind = getattr(self, each.name), NUMBERS.get(each.type)
            if kind is float and isinstance(value, str):
                setattr(self, each.name, _number(each.name, value))
            elif kind is int and not isinstance(value, int | None):
                setattr(self, each.name, whole := _whole(value))
                _require(not isinstance(whole, str), f"`{each.name}` must be a whole number, got {value!r}.")
        if isinstance(self.lr_scheduler_kwargs, dict):
            self.lr_scheduler_kwargs = {
                name: float(value) if re.fullmatch(r"[+-]?[\d.]+[eE][+-]?\d+", str(value)) else value
                for name, value in self.lr_scheduler_kwargs.items()
            }

    @property
    def relational_terms(self) -> dict[str, float]:
        """The names in `relational_loss`, each with its weight among them."""
        return self.relational_loss if isinstance(self.relational_loss, dict) else {str(self.relational_loss): 1.0}

    def validate(self) -> None:
        """Raise a ValueError for a setting out of its range; the trainer asks again when a training starts."""
        for name, advice in TEMPERATURES.items():  # beyond these limits float32 gives out
            value = getattr(self, name)
            if value == "auto" and name in AUTOMATIC:
                continue
            _require(1e-6 <= value <= 1e6, f"`{name}` must be positive, from 1e-6 to 1e6, got {value}. Try {advice}.")
        weights = {name: getattr(self, name) for name in WEIGHTS}
        for name, value in weights.items():
            if value == "auto" and name in AUTOMATIC:
                continue
            off = "Set it to 0 to turn the term off."
            _require(0 <= value < math.inf, f"`{name}` must be 0 or more and finite, got {value}. {off}")
        _require(
            any(value for name, value in weights.items() if (name, value) != ("layer_weight", "auto")),
            f"{', '.join(f'`{name}`' for name in WEIGHTS)} are all 0, so there is nothing to train. Set at least one "
            "above 0.",
        )
        choices = dict.fromkeys(("student_pooling", "teacher_pooling"), ("auto", "head", *POOLERS)) | CHOICES
        for name, known in choices.items():
            value = getattr(self, name)
            taken = (isinstance(value, str) and value in known) or (name.endswith("_pooling") and callable(value))
            _require(taken, f"`{name}` must be one of {list(known)}, got {value!r}.")
        _require(
            isinstance(self.balance_losses, bool | int | np.bool_),
            f"`balance_losses` must be True or False, got {self.balance_losses!r}.",
        )
        for name in ("bank_size", "alignment_examples"):
            _check_count(name, getattr(self, name), 0, "Try 4096.")
        if self.projection_dim is not None:
            _check_count("projection_dim", self.projection_dim, 1, "Try 128, or leave it out.")
        losses = self.relational_terms
        _require(
            bool(losses) and all(name in RELATIONAL_LOSSES for name in losses),
            f"`relational_loss` must be one of {list(RELATIONAL_LOSSES)}, or a dict of some with their weights, got "
            f"{self.relational_loss!r}.",
        )
        _require(
            all(0 < each < math.inf for each in losses.values()),
            f"the weights in `relational_loss` must be positive and finite, got {self.relational_loss!r}.",
        )
        self._validate_measures()
        self._validate_bank()
        self._validate_prefixes()
        self._validate_layers()

    def _validate_layers(self) -> None:
        pairs: Any = self.layer_pairs
        is_list = isinstance(pairs, list | tuple) and len(pairs) > 0
        known = is_list and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
        _require(
            pairs is None or (known and all(type(each) is int and each >= 0 for pair in pairs for each in pair)),
            f"`layer_pairs` must be a list of pairs of layers, counted from 0, got {pairs!r}. Try [[0, 1], [1, 3]].",
        )

    def _validate_measures(self) -> None:
        examples, projection = self.alignment_examples, self.teacher_projection
        _require(examples != 1, "`alignment_examples` must be 0, or 2 or more to compare, got 1. Try 2000.")
        _require(
            examples == 0 or self.relational_weight != 0,
            f"`alignment_examples` is {examples}, and without a relational loss no embeddings are computed. Set it to "
            "0, and call the trainer's report() after the training.",
        )
        _require(
            projection != "pca" or self.projection_dim is not None,
            "teacher_projection='pca' needs a `projection_dim`, got None. Try 128.",
        )

    def _validate_bank(self) -> None:
        size, losses = self.bank_size, self.relational_terms
        least = {name: FEWEST_EXAMPLES.get(name, 2 if size == 0 else 1) for name in losses}
        loss, fewest = max(least.items(), key=lambda each: each[1])
        for name, in_use in (("train", True), ("eval", self.eval_strategy != "no")):
            count = getattr(self, name := f"per_device_{name}_batch_size")
            _require(
                count >= fewest or self.relational_weight == 0 or not in_use,
                f"relational_loss={loss!r} compares within the micro-batch here, and `{name}` is {count}: the "
                f"relational loss is always 0. Set it to {fewest} or more"
                + ("." if loss in FEWEST_EXAMPLES else ", or bank_size above 0."),
            )

    def _validate_prefixes(self) -> None:
        dims, advice = self.matryoshka_dims, "Try [384, 128, 64], or leave it out."
        if dims is None:
            return
        taken = isinstance(dims, list) and len(dims) > 0
        _require(taken, f"`matryoshka_dims` must be a list of one width or more, got {dims!r}. {advice}")
        for each in dims:
            _check_count("matryoshka_dims", each, 1, advice)
        _require(len({*dims}) == len(dims), f"`matryoshka_dims` must name each width once, got {dims}. {advice}")
        _require(
            [*self.relational_terms] != ["own_space"],
            f"`matryoshka_dims` is {dims}, and relational_loss='own_space' alone compares whole embeddings before "
            "the projection. Leave it out, or add another relational loss.",
        )

    def to_dict(self) -> dict[str, Any]:
        """As in `TrainingArguments`; a callable pooling by its name, of the teacher's arguments what is no secret."""
        fields = super().to_dict()  # type: ignore[no-untyped-call]
        for name in ("student_pooling", "teacher_pooling"):
            fields[name] = name_of(fields[name])
        if isinstance(fields["teacher_model_init_kwargs"], dict):
            fields["teacher_model_init_kwargs"] = {
                name: (value if isinstance(value, bool | int | float) else str(value))
                if name in SHOWN_KWARGS
                else f"<{name.upper()}>"
                for name, value in fields["teacher_model_init_kwargs"].items()
            }
        return dict(fields)

    def __str__(self) -> str:
        shown = copy.copy(self)
        shown.__dict__.update(self.__getstate__())
        return TrainingArguments.__str__(shown)

    __repr__ = __str__

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled, into `training_args.bin`: no token, and of a callable its name."""
        shown = self.to_dict()
        secret = [name for name in shown if name.endswith("_token") and getattr(self, name) is not None]
        masked = ("student_pooling", "teacher_pooling", "teacher_model_init_kwargs", *secret)
        return self.__dict__ | {name: shown[name] for name in masked}

    def __copy__(self) -> "RelationalDistillationConfig":
        """A copy has its tokens, unlike a pickle."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> "RelationalDistillationConfig":
        """As `__copy__`."""
        new = object.__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor
        raise ValueError(f"`{name}` must be a number, got {value!r}.") from None


def _whole(value: Any) -> Any:
    """A whole number in another type, such as "1e3", 20.0 or NumPy's, as an int; anything else as it is."""
    try:
        number = float(value) if isinstance(value, str) else value
        return int(number) if number == int(number) else value
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return value


def _read_json(name: str, value: Any) -> Any:
    """A dict or a list that came from the command line as JSON; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` is no JSON: {error}, got {value!r}.") from None


def _init_kwargs(value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    came = f"a {type(value).__name__}"  # and no more: it may hold a secret
    try:
        kwargs = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        kwargs, came = (), f"a string that is no JSON ({error})"
    if kwargs is not None and not (isinstance(kwargs, dict) and all(isinstance(name, str) for name in kwargs)):
        raise ValueError(
            f"`teacher_model_init_kwargs` must be a dict or a JSON object, with names as keys, got {came}. "
            'Try \'{"revision": "main"}\'.'
        )
    return kwargs


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _check_count(name: str, value: Any, least: int, advice: str) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    _require(whole, f"`{name}` must be a whole number, got {value!r}. {advice}")
    _require(value >= least, f"`{name}` must be {least} or more, got {value}. {advice}")
