"""A student that starts as a part of its teacher: some of the layers, and all else that fits."""

import copy
import os
import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_rrd.losses.rows import no_autocast, principal_directions
from hf_rrd.models.teacher import load_teacher

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Initialization:
    """Where the tensors of a student come from, by their names in its state dict, a tied one by its first.

    Args:
        layers: The teacher's layer, counted from 0, that each layer of the student started from.
        copied, fresh, narrowed: Tensors that are the teacher's, that the model class initialised, and that are made
            from the teacher's wider ones.
    """

    layers: list[int]
    copied: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    narrowed: list[str] = field(default_factory=list)

    @property
    def has_layers(self) -> bool:
        """Whether most tensors of layers are copies, by the numbers in their names."""
        copied, fresh = (sum(bool(re.search(r"\.\d+\.", name)) for name in each) for each in (self.copied, self.fresh))
        return copied > fresh

    def __str__(self) -> str:
        lines = [f"layers of the teacher: {', '.join(map(str, self.layers)) or 'not counted'}"]
        lines += [f"narrowed: {_short(self.narrowed)}"] if self.narrowed else []
        return "\n".join([*lines, f"copied: {_short(self.copied)}", f"fresh: {_short(self.fresh)}"])


def _short(names: list[str]) -> str:
    patterns = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)  # layers differ in a number alone
    return f"{len(names)} tensors" + (f" ({', '.join(patterns)})" if names else "")


def student_from_teacher(
    teacher: PreTrainedModel | str | os.PathLike[str], num_hidden_layers: int | None = None, **overrides: Any
) -> Any:
    """A new, smaller model of the teacher's class that starts from the teacher's weights.

    Of n layers it keeps k, layer `round(i * (n - 1) / (k - 1))` as its i-th: the first, the last and evenly between. A
    ModernBERT's i-th is the nearest to that of the kind of the teacher's i-th, local or global, as its class expects.
    A tensor of the teacher's shape is a copy of it. Where the student is narrower, its input embeddings of tokens are
    the principal components of the teacher's, without their mean, as large as fresh ones. All else starts afresh from
    torch's random state, and a bias with its weight: a head for other classes, the embeddings of another vocabulary,
    the layers at another `hidden_size`. Fields that must agree with an override have to be given with it.

    The student shares no memory with the teacher, has its dtype, device, attention implementation and generation
    config, is in eval mode, and all its weights train.

    Args:
        teacher: A transformers model with any head or none, or a Hub name or folder of one.
        num_hidden_layers: How many layers to keep, 1 to as many as the teacher has; all for None.
        **overrides: Fields of the config to change, such as `hidden_size`, `num_labels` or `vocab_size`.

    Returns:
        The student, of the teacher's class. Its `initialization` (an `Initialization`, never saved) says what came
        from where; a warning names what is fresh.

    Raises:
        TypeError: `teacher` is not a transformers model.
        ValueError: The teacher cannot be loaded, has adapters, is quantized or not in memory, or its layers cannot be
            chosen; `num_hidden_layers` is out of range; an override is not a field of the config, or is refused by it.
    """
    teacher = load_teacher(teacher)
    weights = plain_weights_of(teacher)
    layers = _layers_to_keep(teacher.config, num_hidden_layers)
    student: Any = type(teacher)(_student_config(teacher.config, layers, overrides))
    student.to(teacher.device).eval()
    number = rf"(?<=^{re.escape(_stack_of(teacher, student))}\.)\d+"  # a layer's, in the name of its tensor
    done: set[int] = set()
    words, wider = embedding_of_tokens(student), embedding_of_tokens(teacher)
    narrow = None if words is None or wider is None else _narrowed(wider.weight, words)
    source = Initialization(layers)
    # `data` is replaced, not filled: tied weights stay one parameter, and rotary tables keep their own precision.
    for name, weight in student.state_dict(keep_vars=True).items():
        if not isinstance(weight, Tensor) or id(weight) in done:
            continue
        done.add(id(weight))
        given = weights.get(re.sub(number, lambda found: str(layers[int(found[0])]), name))
        its_weight = f"{name.rpartition('.')[0]}.weight"  # a bias is as fresh as that
        if narrow is not None and words is not None and weight is words.weight:
            source.narrowed.append(name)
            weight.data = narrow.to(teacher.device, teacher.dtype)
        elif given is None or given.shape != weight.shape or its_weight in source.fresh:
            source.fresh.append(name)
            weight.data = weight.data.to(dtype=teacher.dtype if weight.is_floating_point() else None)
        else:
            source.copied.append(name)
            weight.data = given.detach().to(teacher.device, copy=True)
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    student.initialization = source
    logger.info(f"{type(student).__name__} from its teacher:\n{source}")
    if source.fresh:
        logger.warning(f"Initialised afresh, not from the teacher: {_short(source.fresh)}.")
    return student


def embedding_of_tokens(model: Any) -> nn.Embedding | None:
    """A model's, with a weight of (vocabulary, width); None where it reads something else."""
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError, ValueError):
        return None
    return table if isinstance(table, nn.Embedding) else None


def _narrowed(wider: Tensor, words: nn.Embedding) -> Tensor | None:
    """The principal components of a table's rows, of the size of the fresh ones that are there; None without any."""
    fresh = words.weight.detach().float()
    if len(wider) != len(fresh) or wider.shape[1] <= fresh.shape[1]:
        return None
    with no_autocast(wider.device.type):
        rows = wider.detach().float()
        whole = rows.square().mean().sqrt()
        rows = rows - rows.mean(0)
        covariance = (rows.T @ rows).cpu().double()
        if not covariance.isfinite().all() or rows.square().mean().sqrt() <= 1e-6 * whole:
            return None
        rows = rows @ principal_directions(covariance, fresh.shape[1]).to(rows)
    rows *= fresh.to(rows).square().mean().sqrt() / rows.square().mean().sqrt()
    if words.padding_idx is not None:
        rows[words.padding_idx] = fresh[words.padding_idx].to(rows)
    return rows


def plain_weights_of(model: Any, argument: str = "teacher") -> dict[str, Tensor]:
    """The state dict of a model that is plain, whole and in full precision; of another an error names the argument."""
    name = type(model).__name__
    if hasattr(model, "get_base_model"):
        raise ValueError(f"`{argument}` has adapters, got {name}. Merge them: `{argument}.merge_and_unload()`.")
    if not isinstance(model, PreTrainedModel):
        advice = "Load one: AutoModel.from_pretrained(...)."
        raise TypeError(f"`{argument}` must be a PreTrainedModel, got {name}. {advice}")
    weights: dict[str, Tensor] = model.state_dict()
    problems = {
        "adapters inside": any(".base_layer." in weight for weight in weights),
        "quantized weights": getattr(model.config, "quantization_config", None) is not None,
        "offloaded weights": any(weight.is_meta for weight in weights.values()),
        "weights that ZeRO-3 has partitioned": any(hasattr(weight, "ds_id") for weight in model.parameters()),
    }
    for problem, found in problems.items():
        if found:
            raise ValueError(f"`{argument}` has {problem}, got {name}. Load it plain, whole and in full precision.")
    return weights


def _layers_to_keep(config: Any, count: int | None) -> list[int]:
    total = getattr(config, "num_hidden_layers", None)
    if count is None:
        return list(range(total)) if isinstance(total, int) else []
    if not isinstance(total, int):
        came = f"got {count!r}: {type(config).__name__} has no such number"
        raise ValueError(f"`num_hidden_layers` cannot be chosen, {came}. Leave it out.")
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= total:
        bounds = f"an integer from 1 to the teacher's {total}"
        raise ValueError(f"`num_hidden_layers` must be {bounds}, got {count!r}. Try {total // 2 or 1}.")
    even = [round(index * (total - 1) / max(count - 1, 1)) for index in range(count)]
    # transformers 5.0 reads a layer's window from its position, whatever `layer_types` says.
    return _nearest_of_kind(even, config.layer_types) if config.model_type == "modernbert" else even


def _nearest_of_kind(even: list[int], kinds: list[str]) -> list[int]:
    """The ascending layers nearest to the even ones such that their kinds are those of the first layers."""
    latest: list[int] = []  # each layer as late as those after it allow
    for kind in reversed(kinds[: len(even)]):
        end = latest[0] if latest else len(kinds)
        latest.insert(0, max(layer for layer in range(end) if kinds[layer] == kind))
    chosen = [-1]
    for wanted, last, kind in zip(even, latest, kinds, strict=False):
        free = [layer for layer in range(chosen[-1] + 1, last + 1) if kinds[layer] == kind]
        chosen.append(min(free, key=lambda layer: abs(layer - wanted)))
    return chosen[1:]


def _student_config(before: Any, layers: list[int], overrides: dict[str, Any]) -> Any:
    for name, value in overrides.items():
        if name == before.attribute_map.get("num_hidden_layers"):
            raise ValueError(f"`{name}` is the number of layers, got {value!r}. Give it as `num_hidden_layers`.")
        if name in ("dtype", "torch_dtype"):
            raise ValueError(f"`{name}` is always the teacher's, got {value!r}. Convert the student: student.to(...).")
        if name.startswith("_") or not hasattr(before, name) or callable(getattr(before, name)):
            raise ValueError(f"`{name}` is not a field of {type(before).__name__}, got {value!r}: see `to_dict()`.")
    config = copy.deepcopy(before)
    try:
        if layers and len(layers) != before.num_hidden_layers:
            _keep_layers(config, layers)
        for name, value in overrides.items():
            setattr(config, name, value)
        type(config).from_dict(config.to_dict())  # what a saved student would be loaded with
    except Exception as error:
        what = f"{len(layers)} layers and the overrides {overrides}"
        raise ValueError(f"{type(before).__name__} refuses {what}: {error}") from error
    return config


def _keep_layers(config: Any, layers: list[int]) -> None:
    total = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == total:
            setattr(config, name, type(value)(value[layer] for layer in layers))
    config.num_hidden_layers = len(layers)
    if len(getattr(config, "stage_names", None) or ()) == total + 1:  # a backbone's: the stem and each layer
        config.stage_names = config.stage_names[: len(layers) + 1]
        config.out_features = config.stage_names[-1:]


def _stack_of(teacher: Any, student: Any) -> str:
    """The name of the list of layers, as long as the config says in both models; nothing where no layer moves."""
    total, count = (getattr(model.config, "num_hidden_layers", None) for model in (teacher, student))
    if total == count:
        return ""
    before, after = (
        {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
        for model in (teacher, student)
    )
    stacks = [name for name, length in before.items() if length == total and after.get(name) == count]
    if len(stacks) != 1:
        needed = f"one list of {total} layers in {type(teacher).__name__}, got {stacks or 'none'}"
        raise ValueError(f"`num_hidden_layers` needs {needed}. Leave it out, or build the student from a config.")
    return stacks[0]
