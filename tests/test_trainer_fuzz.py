"""Whatever the settings and the data: it trains, or it is refused by name.

Two tests of 500 drawn cases each, the same cases at every run. A case is a run of one or two steps that is in order
but for a few oddities. A failure says which, and `configuration(Random(seed))` or `batches(Random(seed))` makes the
case again from the number in its report.
"""

import copy
import gc
import inspect
import math
import re
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, note, reject, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import default_data_collator

from hf_rrd import RelationalDistillationConfig, RelationalDistillationTrainer
from hf_rrd.config import TEMPERATURES, WEIGHTS
from hf_rrd.losses.in_batch import BATCH_LOSSES
from hf_rrd.models.pooling import cls_pool
from tests.builders import CLASSES, Images, Texts, tiny_bert, tiny_vit, trainer

CASES = [100, pytest.param(500, marks=pytest.mark.slow)]
WIDTH = 24
"""Of the teachers' embeddings; the students' are 16 wide."""

DICE = st.randoms(use_true_random=True)
"""A case comes whole from one of these: of choices one by one hypothesis repeats some again and again."""

fuzz = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class TookTooLong(Exception):
    """A case has not come to an end."""


class Unnamed(AssertionError):
    """A case was refused with a message that does not say because of what."""


# ---- What may come of a case ----

ARGUMENTS = RelationalDistillationConfig.__dataclass_fields__.keys() | (
    inspect.signature(RelationalDistillationTrainer.__init__).parameters.keys() - {"self"}
)
"""Of the settings and of the trainer."""


def is_named(name: str, message: str) -> bool:
    """Whether a message has a name; one that is a word of English too, such as `model`, has to be marked as a name."""
    if "_" in name:
        return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) is not None
    return any(form in message for form in (f"`{name}`", f"'{name}'", f'"{name}"', f"`{name}=", f" {name}="))


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TookTooLong(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(build: Callable[[], RelationalDistillationTrainer], names: set[str]) -> str:
    """'trained' or 'refused'; anything else is an error."""
    with at_most(60):
        try:
            run = build()
            run.train()
        except (ValueError, TypeError) as error:
            if not any(is_named(name, str(error)) for name in names):
                raise Unnamed(f"{type(error).__name__} names no argument and no column: {error}") from error
            return "refused"
    check_trained(run)
    return "trained"


def check_trained(run: RelationalDistillationTrainer) -> None:
    assert run.state.global_step == run.args.max_steps
    logged = [value for line in run.state.log_history for key, value in line.items() if "loss" in key]
    assert logged
    assert all(math.isfinite(value) for value in logged)
    assert run.model is not None
    assert [name for name, weight in run.model.named_parameters() if not weight.isfinite().all()] == []


# ---- Models, made once ----


@dataclass
class Pair:
    """A student and a teacher, to be copied for each case, and examples for both."""

    student: Any
    teacher: Any
    folder: str
    examples: list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pair]]:
    made = {}
    for name, build, dataset in (("vit", tiny_vit, Images(12)), ("bert", tiny_bert, Texts(12))):
        teacher, student = build(WIDTH, 1, seed=1), build(layers=1)
        for model in (student, teacher):
            model.config.id2label = dict(enumerate("abcd"))
        folder = str(tmp_path_factory.mktemp(name))
        teacher.save_pretrained(folder)
        made[name] = Pair(student, teacher, folder, [dataset[index] for index in range(12)])
    gc.collect()
    gc.freeze()  # else each training spends most of its time here: it collects garbage at its end
    yield made
    gc.unfreeze()


def with_outputs(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The examples with cached outputs of a teacher."""
    generator = torch.Generator().manual_seed(3)
    widths = {"teacher_embedding": WIDTH, "teacher_logits": CLASSES}
    return [
        example | {name: torch.randn(width, generator=generator) for name, width in widths.items()}
        for example in examples
    ]


# ---- Configurations ----


def wide_pooling(outputs: Any, mask: Tensor | None) -> Tensor:
    return outputs.last_hidden_state


def text_pooling(outputs: Any, mask: Tensor | None) -> str:
    return "pooled"


JUNK: list[Any] = [
    *(None, True, -1, 0, 2.5, math.nan, math.inf, -math.inf, 10**12, 2**70, 1j),
    *("text", "", "8", b"8", [], [8], {}, {"a": 1}, np.ones(2), torch.ones(2), torch.tensor(8), object()),
]
"""Values of every type, any of which may be given for any setting."""

NUMBERS: list[Any] = [0, -0.0, 1, 1.0001, 1e-2, 20, 1e3, "0.5", "1e-2"]
ODD_NUMBERS: list[Any] = [-0.1, 5e-324, 1e-45, 1e-30, 1e-8, 1e20, 3e38, 1e308, 10**400, "nan", "much"]
POOLINGS: list[Any] = ["auto", "head", "cls", "mean", "max", "last_token", cls_pool]

SENSIBLE: dict[str, list[Any]] = {
    "task_weight": [0.0, 0.5, 1.0],
    "kd_weight": [0.0, "auto", 1.0],
    "balance_losses": [True, False],
    "kd_loss": ["kl", "dist"],
    "kd_temperature": [1.0, 4.0, 20],
    "relational_weight": [0.0, 1.0, 10.0, "auto"],
    "student_temperature": [0.05, 0.1, 1.0],
    "teacher_temperature": [0.02, 0.1, 1.0],
    "student_projection": ["linear", "centered"],
    "student_pooling": POOLINGS,
    "teacher_pooling": POOLINGS,
    "teacher_model_init_kwargs": [None, {}, {"dtype": "float32"}, '{"dtype": "bfloat16"}'],
    "per_device_train_batch_size": [1, 2, 3, 4, 5, 8],
    "gradient_accumulation_steps": [1, 2, 3],
    "max_steps": [1, 2],
    "dataloader_drop_last": [True, False],
    "label_smoothing_factor": [0.0, 0.1],
    "max_grad_norm": [0.0, 0.5, 1.0],
    "bf16": [False, False, True],
    "gradient_checkpointing": [False, False, True],
    "optim": ["adamw_torch", "sgd", "adafactor", "rmsprop"],
    "remove_unused_columns": [True, False],
}

COMPARISONS: list[dict[str, Any]] = [
    {},
    {"bank_size": 2},
    {"bank_size": 7, "matryoshka_dims": [8, 3]},
    {"relational_loss": {"rrd": 1, "mse": 0.5}, "bank_size": 5},
    {"relational_loss": '{"rrd": 1, "own_space": 1e-1}', "per_device_train_batch_size": 4},
    {"relational_loss": {"infonce": "2", "srd": 0.1}, "per_device_train_batch_size": 4},
    {"relational_loss": "own_space", "per_device_train_batch_size": 4},
    {"bank_size": 3, "relational_loss": "infonce"},
    {"bank_size": "5", "relational_loss": "infonce"},
    {"bank_size": 0, "per_device_train_batch_size": 3},
    {"bank_size": 0, "per_device_train_batch_size": 2, "relational_loss": "infonce"},
    *({"relational_loss": name, "per_device_train_batch_size": 4} for name in BATCH_LOSSES),
]
PROJECTIONS: list[dict[str, Any]] = [
    {"teacher_projection": "none"},
    {"teacher_projection": "none", "projection_dim": WIDTH},
    {"teacher_projection": "none"},
    {"teacher_projection": "center"},
    {"teacher_projection": "pca", "projection_dim": 1},
    {"teacher_projection": "pca", "projection_dim": 16, "student_projection": "none"},
    {"teacher_projection": "orthogonal", "projection_dim": 8},
    {"teacher_projection": "orthogonal", "projection_dim": WIDTH},
]
"""Settings that go together; so do those of COMPARISONS."""

NUMERIC = [*WEIGHTS, *TEMPERATURES]
ODD: dict[str, list[Any]] = {name: [*NUMBERS, *ODD_NUMBERS] for name in NUMERIC} | {
    "relational_loss": ["RRD", "crd", {}, {"rrd": 0}, {"rrd": None}, "{rrd: 1}", ["rrd"], *BATCH_LOSSES],
    "balance_losses": ["no", 2, {}],
    "kd_loss": ["KL", ["kl"]],
    "bank_size": [1, 8.0, 8.5, False, "Auto", "-3", "8.0", 2**62],
    "projection_dim": [1, 16, WIDTH, WIDTH + 1, False, 8.0],
    "matryoshka_dims": [[WIDTH, 1], "[8, 4]", (4.0,), [], [8, 8], [0], [WIDTH + 1], [None], [[8]], "[8", True],
    "student_projection": ["none", "mlp2"],
    "teacher_projection": ["pca", "PCA", "center"],
    "student_pooling": ["gap", "pooler", "CLS", wide_pooling, text_pooling],
    "teacher_pooling": ["gap", "pooler", "CLS", wide_pooling, text_pooling],
    "teacher_model_init_kwargs": ["{", "[1]", "null", {"dtype": "float7"}, {"revision": 3}, {1: 2}, {"unknown": 1}],
    "teacher": ["no/such/folder", tiny_vit],
}
"""Values at the border of what is allowed and beyond; JUNK comes on top."""


@dataclass(frozen=True)
class Configuration:
    """A drawn case: models, data and settings by name."""

    pair: str
    teacher: str
    cached: bool
    count: int
    settings: dict[str, Any]


ODD_SETTINGS = [(name, value) for name, own in ODD.items() for value in [*own, *own, *JUNK]]


def any_float(dice: Random) -> float:
    """Of any size and sign, and sometimes nan."""
    return float(struct.unpack("d", dice.randbytes(8))[0])


def configuration(dice: Random) -> Configuration:
    common = {name: dice.choice(values) for name, values in SENSIBLE.items() if dice.random() < 0.5}
    odd = dict(dice.sample(ODD_SETTINGS, dice.choice([0, 0, 1, 1, 2])))
    if dice.random() < 0.15:
        odd[dice.choice(NUMERIC)] = any_float(dice)
    return Configuration(
        pair=dice.choice(["vit", "bert"]),
        teacher=dice.choice(["model", "model", "folder", "none"]),
        cached=dice.random() < 0.3,
        count=dice.randint(5, 12),
        settings=common | dice.choice(COMPARISONS) | dice.choice(PROJECTIONS) | odd,
    )


def configured(case: Configuration, pair: Pair, folder: Path) -> RelationalDistillationTrainer:
    changes = {"max_steps": 2, "per_device_train_batch_size": 4} | case.settings
    if "teacher" not in changes:
        kinds = {"model": pair.teacher, "folder": pair.folder, "none": None}
        changes["teacher"] = copy.deepcopy(kinds[case.teacher])
    examples = pair.examples[: case.count]
    examples = with_outputs(examples) if case.cached or changes["teacher"] is None else examples
    return trainer(folder, model=copy.deepcopy(pair.student), train_dataset=examples, **changes)


CORNERS: list[dict[str, Any]] = [
    {"kd_weight": 1.0, "kd_temperature": 1e308},
    {"relational_weight": 1e20, "max_grad_norm": 0.0, "max_steps": 1},
    {"relational_weight": 3e38, "max_steps": 1},
    {"task_weight": 3e38, "max_steps": 1},
    {"teacher_temperature": 1e-30, "task_weight": 0.0, "bank_size": 2, "per_device_train_batch_size": 2},
    {"teacher_temperature": 1e-45},
    {"student_temperature": 1e-45},
    {"teacher_model_init_kwargs": {"dtype": "bfloat16"}},
    {"bank_size": 10**12},
    {"bank_size": 2**62},
    {"bank_size": 2**70},
    {"projection_dim": True, "teacher_projection": "orthogonal"},
    {"projection_dim": 8.0, "teacher_projection": "orthogonal"},
    {"per_device_train_batch_size": 8, "dataloader_drop_last": True},
]
"""Rare among the drawn ones."""


@pytest.mark.parametrize("changes", CORNERS, ids=str)
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_configuration_in_a_corner_trains_or_is_refused_by_name(
    name: str, changes: dict[str, Any], pairs: dict[str, Pair], tmp_path: Path
) -> None:
    case = Configuration(name, "folder", cached=False, count=7, settings=changes)
    outcome(lambda: configured(case, pairs[name], tmp_path), set(ARGUMENTS))


@pytest.mark.parametrize("cases", CASES)
def test_any_configuration_trains_or_is_refused_by_name(cases: int, pairs: dict[str, Pair], tmp_path: Path) -> None:
    counts: Counter[str] = Counter()

    @settings(fuzz, max_examples=cases)
    @given(DICE.map(configuration))
    def attempt(case: Configuration) -> None:
        note(repr(case))
        came_to = outcome(lambda: configured(case, pairs[case.pair], tmp_path), set(ARGUMENTS))
        counts[came_to] += 1
        event(came_to)

    attempt()
    assert counts["trained"] + counts["refused"] >= cases
    assert min(counts["trained"], counts["refused"]) >= cases // 5, counts


# ---- Batches ----


@dataclass(frozen=True)
class Filled:
    """A tensor of one value."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    value: float

    def tensor(self) -> Tensor:
        return torch.full(self.shape, self.value, dtype=torch.float64).to(self.dtype)


@dataclass(frozen=True)
class Oddity:
    """Something else in a column; `value` is `MISSING` where the column is left out."""

    column: str
    value: Any
    where: str


MISSING, WHOLE = "(missing)", "(the whole example)"
WHERE: dict[str, Callable[[int], bool]] = {
    "all": lambda index: True,
    "first": lambda index: index == 0,
    "every other": lambda index: index % 2 == 1,
}

FLOAT, INT, BOOL, HALF, DOUBLE = torch.float32, torch.int64, torch.bool, torch.float16, torch.float64
DTYPES = [FLOAT, INT, BOOL, HALF, DOUBLE, torch.bfloat16, torch.uint8, torch.int32, torch.complex64]
FILLS = [0.0, 1.0, 3.0, -1.0, -100.0, 4.0, 50.0, 0.5, 1e30, math.nan, math.inf]

IMAGE, TOKENS = (3, 16, 16), (9,)
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "pixel_values": [IMAGE, (3, 15, 16), (3, 32, 32), (1, 16, 16), (4, 16, 16), (16, 16), (1, 3, 16, 16), (3, 0, 0)],
    "labels": [(), (1,), (2,), (CLASSES,), (9,), (0,)],
    "input_ids": [TOKENS, (9,), (5,), (1,), (0,), (32,), (33,), (40,), (1, 9), ()],
    "teacher_embedding": [(WIDTH,), (WIDTH,), (WIDTH + 1,), (16,), (1,), (0,), (1, WIDTH), ()],
    "teacher_logits": [(CLASSES,), (CLASSES,), (7,), (1,), (0,), (1, CLASSES), ()],
}
SHAPES |= {"teacher_pixel_values": SHAPES["pixel_values"]}
SHAPES |= {name: SHAPES["input_ids"] for name in ("attention_mask", "token_type_ids", "position_ids")}
SHAPES |= {"teacher_" + name: SHAPES["input_ids"] for name in ("input_ids", "attention_mask")}
SHAPES |= {"teacher_labels": SHAPES["labels"], "inputs_embeds": [(9, 16), (9, 24), (9,)]}

OWN_DTYPE = {name: INT for name in SHAPES} | {
    name: FLOAT
    for name in ("pixel_values", "teacher_pixel_values", "teacher_embedding", "teacher_logits", "inputs_embeds")
}

COLUMNS = {
    "vit": ["pixel_values", "labels", "teacher_pixel_values", "teacher_embedding", "teacher_logits"],
    "bert": [
        *("input_ids", "attention_mask", "labels", "token_type_ids", "position_ids", "inputs_embeds"),
        *("teacher_input_ids", "teacher_attention_mask", "teacher_embedding", "teacher_logits", "teacher_labels"),
    ],
}
STRANGE = ["idx", "label", "label_ids", "teacher_idx", "return_dict", "output_attentions", "with_relational_embedding"]
"""Columns that nobody asked for, some of which are names of other things."""

VALUES: list[Any] = [MISSING, None, "cat", "", b"cat", 1, 1.5, math.nan, -1, 2**40, True, [], [0], [0.5, 1], {}, [[]]]
LONG_ENOUGH = [[1] * 9, [0.5] * WIDTH, [0.5] * CLASSES, ["cat"] * 9]
EXAMPLES: list[Any] = [{}, None, 3, "cat", ("cat", 1), []]
"""What may stand in place of an example."""


def odd_tensor(column: str, dice: Random) -> Filled:
    """Mostly of a shape and a dtype that the column might have."""
    any_shape = tuple(dice.randrange(18) for _ in range(dice.randrange(5)))
    shape = dice.choice([*SHAPES.get(column, [(), TOKENS]), any_shape])
    dtype = OWN_DTYPE.get(column, INT) if dice.random() < 0.6 else dice.choice(DTYPES)
    return Filled(shape, dtype, dice.choice(FILLS))


def oddity(pair: str, dice: Random) -> Oddity:
    where = dice.choice(list(WHERE))
    if dice.random() < 0.06:
        return Oddity(WHOLE, dice.choice(EXAMPLES), where)
    column = dice.choice(COLUMNS[pair]) if dice.random() < 0.8 else dice.choice(STRANGE)
    value = odd_tensor(column, dice) if dice.random() < 0.65 else dice.choice([*VALUES, *LONG_ENOUGH])
    return Oddity(column, value, where)


@dataclass(frozen=True)
class Batches:
    """A drawn case: models, examples, how they are given, and settings."""

    pair: str
    teacher: bool
    cached: bool
    count: int
    oddities: tuple[Oddity, ...]
    kind: str
    collator: str
    settings: dict[str, Any]


BATCH_SETTINGS: dict[str, list[Any]] = {
    "task_weight": [0.0, 1.0],
    "kd_weight": [0.0, 1.0, "auto"],
    "relational_weight": [1.0, "auto", 0.0],
    "balance_losses": [True, False],
    "student_projection": ["centered", "linear"],
    "relational_loss": ["rrd", "rrd", "infonce", "rkd_distance", {"rrd": 1.0, "mse": 0.5}],
    "teacher_projection": ["none", "center"],
    "student_pooling": ["auto", "mean", "last_token"],
    "per_device_train_batch_size": [1, 3, 4],
    "remove_unused_columns": [True, True, False],
    "max_steps": [2],
}


def batches(dice: Random) -> Batches:
    pair = dice.choice(["vit", "bert"])
    collator = dice.choice(list(COLLATORS)) if dice.random() < 0.1 else "default"
    odd = dice.choice([0, 1, 1, 1, 2, 3]) if collator == "default" else 0
    return Batches(
        pair=pair,
        teacher=dice.random() < 0.7,
        cached=dice.random() < 0.5,
        count=dice.choice([7, 7, 6, 5, 5, 2, 1, 0]),
        oddities=tuple(oddity(pair, dice) for _ in range(odd)),
        kind=dice.choice(list(KINDS)),
        collator=collator,
        settings={name: dice.choice(values) for name, values in BATCH_SETTINGS.items()},
    )


def odd_examples(case: Batches, pair: Pair) -> list[Any]:
    examples: list[Any] = [dict(example) for example in pair.examples[: case.count]]
    examples = with_outputs(examples) if case.cached or not case.teacher else examples
    for oddity in case.oddities:
        for index in filter(WHERE[oddity.where], range(len(examples))):
            if oddity.column == WHOLE:
                examples[index] = oddity.value
            elif isinstance(examples[index], dict):
                changed = {name: value for name, value in examples[index].items() if name != oddity.column}
                value = oddity.value.tensor() if isinstance(oddity.value, Filled) else oddity.value
                examples[index] = changed if oddity.value is MISSING else changed | {oddity.column: value}
    return examples


class Stream(torch.utils.data.IterableDataset[Any]):
    """A data set of unknown length."""

    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.examples)


class Mapped(torch.utils.data.Dataset[Any]):
    """A map-style data set that is no list."""

    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]


def table(examples: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {name: value.tolist() if isinstance(value, Tensor) else value for name, value in example.items()}
            for example in examples
        ]
    )


KINDS: dict[str, Callable[[list[Any]], Any]] = {
    "mapped": Mapped,
    "list": list,
    "stream": Stream,
    "table": table,
    "table of tensors": lambda examples: table(examples).with_format("torch"),
    "table as stream": lambda examples: table(examples).to_iterable_dataset(),
}


def as_kind(kind: str, examples: list[Any]) -> Any:
    try:
        return KINDS[kind](examples)
    except Exception:  # what Arrow cannot hold is no case
        reject()


COLLATORS: dict[str, Any] = {
    "default": None,
    "nothing": lambda examples: None,
    "no columns": lambda examples: {},
    "no rows": lambda examples: {name: value[:0] for name, value in default_data_collator(examples).items()},
    "one row": lambda examples: {name: value[:1] for name, value in default_data_collator(examples).items()},
    "the examples": lambda examples: examples,
    "lists": lambda examples: {name: [example[name] for example in examples] for name in examples[0]},
}


def names_in(case: Batches, examples: list[Any]) -> set[str]:
    """Of arguments and of columns: those that are there, and those that should be."""
    columns = {name for example in examples if isinstance(example, dict) for name in example}
    return {*ARGUMENTS, *columns, *COLUMNS[case.pair], "labels"}


def fed(case: Batches, pair: Pair, dataset: Any, folder: Path) -> RelationalDistillationTrainer:
    return trainer(
        folder,
        model=copy.deepcopy(pair.student),
        teacher=copy.deepcopy(pair.teacher) if case.teacher else None,
        train_dataset=dataset,
        data_collator=COLLATORS[case.collator],
        **case.settings,
    )


@pytest.mark.parametrize("cases", CASES)
def test_any_batches_are_trained_on_or_refused_by_name(cases: int, pairs: dict[str, Pair], tmp_path: Path) -> None:
    counts: Counter[str] = Counter()

    @settings(fuzz, max_examples=cases)
    @given(DICE.map(batches))
    def attempt(case: Batches) -> None:
        pair = pairs[case.pair]
        examples = odd_examples(case, pair)
        dataset = as_kind(case.kind, examples)
        note(repr(case))
        came_to = outcome(lambda: fed(case, pair, dataset, tmp_path), names_in(case, examples))
        counts[came_to] += 1
        event(came_to)

    attempt()
    assert counts["trained"] + counts["refused"] >= cases
    assert min(counts["trained"], counts["refused"]) >= cases // 5, counts
