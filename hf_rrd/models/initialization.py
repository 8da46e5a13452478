"""A student that starts as a part of its teacher: some of the layers, the leading part of the widths."""

import copy
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Modules whose output is several of one width, one after the other: queries, keys and values, or input and gate.
_FUSED = {("Conv1D", "c_attn"): 3, ("Linear", "Wqkv"): 3, ("Linear", "Wi"): 2}
# Other families fuse them too, in layouts of their own.
_UNKNOWN_LAYOUT = re.compile(r"qkv|query_key_value|gate_up|in_proj|c_attn|Wqkv")
# Integers of a config that are no width, so that a dimension which changes like them does so by chance.
_NO_WIDTH = ("_id", "layer", "layers", "patch_size", "image_size")


@dataclass(frozen=True)
class Initialization:
    """Where the tensors of a student come from, by their names in its state dict, a tied one by its first.

    Args:
        layers: The teacher's layer, counted from 0, that each layer of the student started from.
        copied: Tensors that are the teacher's as a whole.
        sliced: Tensors that are the leading part of the teacher's.
        fresh: Tensors that the model class initialised.
    """

    layers: list[int]
    copied: list[str] = field(default_factory=list)
    sliced: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = {kind: getattr(self, kind) for kind in ("copied", "sliced", "fresh")}
        counts = [f"{kind}: {_short(names)}" for kind, names in kinds.items()]
        return "\n".join([f"layers of the teacher: {', '.join(map(str, self.layers)) or 'not counted'}", *counts])


def _short(names: list[str]) -> str:
    patterns = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)  # layers differ in a number alone
    return f"{len(names)} tensors" + (f" ({', '.join(patterns)})" if names else "")


def student_from_teacher(
    teacher: PreTrainedModel, num_hidden_layers: int | None = None, **config_overrides: Any
) -> Any:
    """A new, smaller model of the teacher's class that starts from the teacher's weights.

    Layers: of n the student keeps k, layer `round(i * (n - 1) / (k - 1))` as its i-th, so both the first and the last,
    and the first for k = 1. A ModernBERT keeps the order of local and global attention that its class expects: its
    i-th layer is the nearest to that one of the kind of the teacher's i-th.

    Widths: a tensor of the body that is narrower than the teacher's is the leading part of it (the first tokens, the
    first features, the first whole heads), where each narrower dimension is the width that a field of the config
    gives. All else that is not of the teacher's shape starts afresh: what is wider, a head of another shape, a
    convolution in groups, a fused weight of unknown layout; and a bias with its weight. An attention head keeps its
    width, and as many query heads share a key-value head as in the teacher: `num_key_value_heads` follows
    `num_attention_heads`. Other fields that must agree with an override have to be given with it.

    The teacher stays as it was and shares no memory with the student; fresh weights draw from torch's global random
    state. The student has the teacher's dtype, device, attention implementation and generation config, is in eval
    mode as after `from_pretrained`, and all its weights train. Its `initialization` (an `Initialization`, never
    saved) says what came from where; what starts afresh is also logged as a warning.

    Args:
        teacher: A transformers model with any head or none.
        num_hidden_layers: How many layers to keep, 1 to as many as the teacher has; all for None.
        **config_overrides: Fields of the config to change, such as `hidden_size`, `num_labels` or `vocab_size`.

    Returns:
        The student, of the class of the teacher.

    Raises:
        TypeError: `teacher` is not a transformers model.
        ValueError: The teacher has adapters, is quantized or not in memory; `num_hidden_layers` is out of range or the
            stack of layers is not to be found; an override is not a field of the config, or is refused by it.
    """
    weights = _weights_of(teacher)
    layers = _layers_to_keep(teacher.config, num_hidden_layers)
    student: Any = type(teacher)(_student_config(teacher.config, layers, config_overrides))
    student.to(teacher.device).eval()
    source = _Source(teacher, student, layers)
    done: set[int] = set()
    initialization = Initialization(layers)
    # `data` is replaced, not filled: tied weights stay one parameter, and rotary tables keep their own precision.
    for name, weight in student.state_dict(keep_vars=True).items():
        if not isinstance(weight, Tensor) or id(weight) in done:
            continue
        done.add(id(weight))
        given = source.part_for(name, weight, weights)
        if given is None or f"{name.rpartition('.')[0]}.weight" in initialization.fresh:
            initialization.fresh.append(name)
            weight.data = weight.data.to(teacher.dtype) if weight.is_floating_point() else weight.data
        else:
            whole = given.shape == weights[source.name_of(name)].shape
            (initialization.copied if whole else initialization.sliced).append(name)
            weight.data = given.detach().to(teacher.device, copy=True)
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    student.initialization = initialization
    logger.info(f"{type(student).__name__} from its teacher:\n{initialization}")
    if initialization.fresh:
        logger.warning(f"Initialised afresh, not from the teacher: {_short(initialization.fresh)}.")
    return student


def _weights_of(teacher: Any) -> dict[str, Tensor]:
    name = type(teacher).__name__
    if hasattr(teacher, "get_base_model"):
        raise ValueError(f"`teacher` has adapters, got {name}. Merge them: `teacher.merge_and_unload()`.")
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(f"`teacher` must be a PreTrainedModel, got {name}. Load one: AutoModel.from_pretrained(...).")
    weights: dict[str, Tensor] = teacher.state_dict()
    problems = {
        "adapters inside": any(".base_layer." in weight for weight in weights),
        "quantized weights": getattr(teacher.config, "quantization_config", None) is not None,
        "offloaded weights": any(weight.is_meta for weight in weights.values()),
        "weights that ZeRO-3 has partitioned": any(hasattr(weight, "ds_id") for weight in teacher.parameters()),
    }
    for problem in (problem for problem, found in problems.items() if found):
        raise ValueError(f"`teacher` has {problem}, got {name}. Load it plain, whole and in full precision.")
    return weights


def _layers_to_keep(config: Any, count: int | None) -> list[int]:
    total = getattr(config, "num_hidden_layers", None)
    if count is None:
        return list(range(total)) if isinstance(total, int) else []
    if not isinstance(total, int):
        raise ValueError(
            f"`num_hidden_layers` cannot be chosen, got {count!r}: {type(config).__name__} has no such number. Leave "
            "it out, or build the student from a config of its own."
        )
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= total:
        raise ValueError(
            f"`num_hidden_layers` must be an integer from 1 to the teacher's {total}, got {count!r}."
            f" Try {total // 2 or 1}."
        )
    even = [round(index * (total - 1) / max(count - 1, 1)) for index in range(count)]
    # transformers 5.0 reads a layer's window from its position, whatever `layer_types` says.
    return _nearest_of_kind(even, config.layer_types) if config.model_type == "modernbert" else even


def _nearest_of_kind(even: list[int], kinds: list[str]) -> list[int]:
    """The ascending layers nearest to the even ones such that their kinds are those of the first layers."""
    latest: list[int] = []
    for index in reversed(range(len(even))):
        end = latest[0] if latest else len(kinds)
        latest.insert(0, max(layer for layer in range(end) if kinds[layer] == kinds[index]))
    chosen = [-1]
    for index, wanted in enumerate(even):
        free = [layer for layer in range(chosen[-1] + 1, latest[index] + 1) if kinds[layer] == kinds[index]]
        chosen.append(min(free, key=lambda layer: abs(layer - wanted)))
    return chosen[1:]


def _student_config(before: Any, layers: list[int], overrides: dict[str, Any]) -> Any:
    _check_names(before, overrides)
    config = copy.deepcopy(before)
    try:
        if len(layers) != getattr(before, "num_hidden_layers", 0) and layers:
            _keep_layers(config, layers)
        for name, value in overrides.items():
            setattr(config, name, value)
        if getattr(config, "num_key_value_heads", None) and "num_key_value_heads" not in overrides:
            shared = before.num_attention_heads // before.num_key_value_heads
            config.num_key_value_heads = config.num_attention_heads // shared
        type(config).from_dict(config.to_dict())  # what a saved student would be loaded with
    except Exception as error:
        changes = ", ".join(f"{name}={value!r}" for name, value in overrides.items())
        raise ValueError(
            f"{type(before).__name__} refuses {len(layers)} layers and the overrides ({changes}): {error}"
        ) from error
    _check_heads(before, config)
    return config


def _check_names(config: Any, overrides: dict[str, Any]) -> None:
    for name, value in overrides.items():
        if name == config.attribute_map.get("num_hidden_layers"):
            raise ValueError(f"`{name}` is the number of layers, got {value!r}. Give it as `num_hidden_layers`.")
        if name in ("dtype", "torch_dtype"):
            raise ValueError(
                f"`{name}` is always the teacher's, got {value!r}. Convert the student: `student.to(...)`."
            )
        if name.startswith("_") or not hasattr(config, name) or callable(getattr(config, name)):
            kind = type(config).__name__
            raise ValueError(f"`{name}` is not a field of {kind}, got {value!r}. Its `to_dict()` lists them.")


def _keep_layers(config: Any, layers: list[int]) -> None:
    total = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == total:
            setattr(config, name, type(value)(value[layer] for layer in layers))
    config.num_hidden_layers = len(layers)
    if len(getattr(config, "stage_names", None) or ()) == total + 1:  # a backbone's: the stem and each layer
        config.stage_names = config.stage_names[: len(layers) + 1]
        config.out_features = config.stage_names[-1:]


def _check_heads(before: Any, after: Any) -> None:
    heads, new_heads = _heads(before), _heads(after)
    if heads != new_heads:
        width, shared = heads
        raise ValueError(
            f"`num_attention_heads` must keep the width of a head, {width:g}, and the query heads for each key-value "
            f"head, {shared:g}, got {new_heads[0]:g} and {new_heads[1]:g}. Choose a `hidden_size` that is a multiple "
            f"of {width:g} and set `num_attention_heads` to the quotient, a multiple of {shared:g}."
        )


def _heads(config: Any) -> tuple[float | None, float | None]:
    """The width of a head, and how many query heads share a key-value head."""
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)  # `d_kv` is T5's
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not isinstance(hidden, int) or not isinstance(heads, int):
        return width, None
    return width or hidden / heads, heads / (getattr(config, "num_key_value_heads", None) or heads)


def _widths(config: PreTrainedConfig) -> dict[str, int]:
    """The integers of a config that may be the size of a dimension, and those that follow from them."""
    widths = {
        name: value for name, value in config.to_dict().items() if type(value) is int and not name.endswith(_NO_WIDTH)
    }
    width, shared = _heads(config)
    if width and shared:
        widths["query"] = int(width * config.num_attention_heads)
        widths["key"] = int(widths["query"] / shared)
    if getattr(config, "n_inner", 0) is None:  # GPT-2
        widths["inner"] = 4 * config.hidden_size
    if isinstance(getattr(config, "hidden_size", None), int) and hasattr(config, "mlp_ratio"):  # DINOv2
        widths["inner"] = int(config.hidden_size * config.mlp_ratio)
    return widths


class _Source:
    """Finds the part of a teacher that a tensor of the student starts from."""

    def __init__(self, teacher: Any, student: Any, layers: list[int]) -> None:
        self.student = student
        self.layers = layers
        self.stack = _stack_of(teacher, student)
        self.body = f"{student.base_model_prefix}." if student.base_model is not student else ""
        before, after = _widths(teacher.config), _widths(student.config)
        self.narrowed = {
            (before[name], after[name]) for name in before if before[name] > after.get(name, before[name])
        }
        self.changed_groups = tuple(
            f"{name}."
            for name, module in student.named_modules()
            if isinstance(module, (nn.Conv1d, nn.Conv2d))
            and module.groups > 1
            and module.in_channels != teacher.get_submodule(self.name_of(name)).in_channels
        )

    def name_of(self, name: str) -> str:
        """The teacher's name for what the student calls `name`."""
        if not self.stack or not name.startswith(f"{self.stack}."):
            return name
        index, dot, rest = name.removeprefix(f"{self.stack}.").partition(".")
        return f"{self.stack}.{self.layers[int(index)]}{dot}{rest}"

    def part_for(self, name: str, weight: Tensor, weights: dict[str, Tensor]) -> Tensor | None:
        """The teacher's tensor or its leading part, of the shape of the student's, or None."""
        given = weights.get(self.name_of(name))
        if given is None or given.dim() != weight.dim() or name.startswith(self.changed_groups):
            return None
        if given.shape == weight.shape:
            return given
        if not name.startswith(self.body):
            return None
        path = name.rpartition(".")[0]
        kind = type(self.student.get_submodule(path)).__name__
        parts = _FUSED.get((kind, path.rpartition(".")[2]), 1)
        if parts == 1 and _UNKNOWN_LAYOUT.search(path):
            return None
        fused = given.dim() - 1 if kind == "Conv1D" else 0  # the dimension of the outputs
        for dim, size in enumerate(weight.shape):
            kept = self._kept(given.shape[dim], size, parts if dim == fused else 1)
            if kept is None:
                return None
            given = given.index_select(dim, kept.to(given.device))
        return given

    def _kept(self, size: int, new_size: int, parts: int) -> Tensor | None:
        positions = torch.arange(size)
        if size == new_size:
            return positions
        if size % parts or new_size % parts or (size // parts, new_size // parts) not in self.narrowed:
            return None
        return positions.view(parts, -1)[:, : new_size // parts].flatten()


def _stack_of(teacher: Any, student: Any) -> str:
    """The name of the list that holds the layers: it is as long as the config says, in both models."""
    total, count = (getattr(model.config, "num_hidden_layers", None) for model in (teacher, student))
    if total == count:
        return ""
    lengths = {name: len(module) for name, module in student.named_modules() if isinstance(module, nn.ModuleList)}
    stacks = [
        name
        for name, module in teacher.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total and lengths.get(name) == count
    ]
    if len(stacks) != 1:
        raise ValueError(
            f"`num_hidden_layers` needs one list of {total} layers in {type(teacher).__name__}, got "
            f"{stacks or 'none'}. Leave it out to keep all layers, or build the student from a config of its own."
        )
    return stacks[0]
