"""The teacher: frozen, in evaluation mode, without gradients, and never part of the student."""

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers.utils import logging

from hf_rrd.errors import described, named_errors
from hf_rrd.models.body import forget, keep_next, main_input_of, place_of, placed, take_kept, unwrapped, watch
from hf_rrd.models.columns import TEACHER_PREFIX, Accepted, forward_columns, own_columns, teacher_inputs
from hf_rrd.models.embedding import Embedder, Pooling
from hf_rrd.models.head import LAYERS
from hf_rrd.models.layers import OWN_INPUT, WITH_LAYERS, LayerTap
from hf_rrd.models.logits import layout_of, logits_of
from hf_rrd.models.sentence_transformers import KIND, OwnPooling, default_prompt, kind_of, load, opened

logger = logging.get_logger(__name__)

LOADED_FROM = "_hf_rrd_loaded_from"  # on a teacher: the name that it was loaded by, and its commit on the Hub or None


class TeacherOutputs(NamedTuple):
    """What the losses need of the teacher: pooled embedding, (batch, width), logits and what was caught of layers."""

    embedding: Tensor | None = None
    logits: Tensor | None = None
    layers: tuple[Tensor, ...] | None = None


class Teacher:
    """What a teacher says of a batch: read from its cached columns, or else computed by one forward of the model.

    Args:
        model: A transformers model, which is frozen here; any module that returns logits where no embedding is wanted;
            None where the data set has all its outputs.
        wants_embedding, wants_logits: Which outputs the run learns.
        pooling: How the body's output becomes an embedding.
        compile_kwargs: Of `torch.compile` for the forward; None does not compile.
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
        self.may_lack_logits = False  # whether the run goes on without them, until that is decided
        self.pooling = pooling  # of a model with embeddings never "auto"
        self.columns: Accepted = []  # the arguments of the forward; none without a model
        self.own: list[str] | None = None  # the `teacher_` columns that it reads, of the first data that were seen
        self.sources: dict[str, str] = {}  # who made the cached columns of a run's sets, and who it is itself
        self.before_sharing: Callable[[], None] | None = None  # called once, before it reads the student's input
        self.width: int | None = None  # of its embedding, be it cached
        self.dtype = torch.float32  # of its embedding: a half precision where the weights or the columns have one
        self.layers: LayerTap | None = None  # catches them, where the run learns some
        self._embedder: Embedder | None = None
        if model is None:
            return
        model.requires_grad_(False).eval()
        self.forward: Any = model if compile_kwargs is None else torch.compile(model, **compile_kwargs)
        self.columns = forward_columns(model)
        self.body = unwrapped(model)
        self._counts_padding = _counts_padding(self.body)
        self._prompt = default_prompt(model) if wants_embedding else ""
        self._writes = wants_logits and layout_of(model) == "target words"
        if getattr(getattr(self.body, "config", None), "mask_ratio", None):
            self.body.config.mask_ratio = 0.0  # a ViTMAE would hide other patches in each forward
        if wants_embedding:
            self._embedder = Embedder(model, pooling, "teacher_pooling")
            self.body, self.width = self._embedder.body, self._embedder.width
            self.pooling = self._embedder.known_as
            weights = place_of(self.body)[1]
            self.dtype = weights if weights in (torch.float16, torch.bfloat16) else torch.float32
            watch(self._embedder.watched)

    @property
    def is_placed(self) -> bool:
        """Whether something else keeps the weights where they are: a device map, offloading or quantisation."""
        return self.model is not None and (
            getattr(self.model, "hf_device_map", None) is not None
            or getattr(self.model, "quantization_method", None) is not None
            or any(hasattr(module, "_hf_hook") for module in self.model.modules())
        )

    def place(self, device: torch.device) -> None:
        """Move the model to a device, unless something else has placed it; a ValueError if it has no weights."""
        if self.model is None or self.is_placed:
            return
        if any(weight.is_meta for weight in self.model.parameters()):
            instead = "Load it with from_pretrained, with a `device_map` if it is to be offloaded"
            raise ValueError(f"the teacher's weights are on the meta device, so it has none. {instead}.")
        self.model.to(device)

    def read_after(self, prompt_length: int | None) -> None:
        """Tell a SentenceTransformer's pooling how many tokens at the beginning of each text are a prompt."""
        if self._embedder is not None and isinstance(self.pooling, OwnPooling):
            self._embedder.pooling = partial(self.pooling, prompt_length=prompt_length)

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
        """What is wanted of the teacher for a batch, with the columns of both sides; None for what there is not.

        `logits` says whether these are needed this time, if they are wanted at all; `required`, whether it is an error
        that something is missing, without a model.
        """
        wants_logits = self.wants_logits and logits
        found = TeacherOutputs(
            _cached("teacher_embedding", inputs) if self.wants_embedding else None,
            _cached("teacher_logits", inputs) if wants_logits else None,
        )
        lacks_logits = wants_logits and found.logits is None
        if not (lacks_logits or (found.embedding is None and self.wants_embedding) or self.layers is not None):
            return found
        if self.model is not None:
            try:
                given = self.inputs_from(inputs)
            except ValueError as error:
                if not self.may_lack_logits or found.embedding is None or self.layers is not None:
                    raise
                logger.warning(f"No distillation of logits: {error}")
                return found  # the embeddings are cached, and nothing else would have needed its input
            if wants_logits and not self.wants_logits:  # as it turned out
                return self.read(inputs, False, required)
            computed = self.compute(given)
            if self.layers is not None and self.own:
                raise ValueError(OWN_INPUT.format(self.own))
            if lacks_logits and computed.logits is None and not self.may_lack_logits:
                own = "let a module of your own return them, or a dict with `logits`"
                instead = f"Load it with an AutoModelFor... class, {own}, or set kd_weight=0"
                raise ValueError(f"`kd_weight` is above 0, and the teacher returns no logits. {instead}.")
            embedding = computed.embedding if found.embedding is None else found.embedding
            return TeacherOutputs(embedding, computed.logits if lacks_logits else found.logits, computed.layers)
        if required:
            raise ValueError(f"no teacher, and the batch lacks some of its outputs: its columns are {sorted(inputs)}.")
        logger.warning_once(
            "An evaluation has neither the teacher nor all of its cached outputs: its loss lacks their terms, unlike "
            "training's. Cache them for that data set, too: cache_teacher_outputs(eval_dataset, teacher)."
        )
        return found

    def inputs_from(self, batch: Mapping[str, Any], what: str = "the batch") -> dict[str, Any]:
        """What the teacher reads of a batch: its own `teacher_` columns, or in all batches the student's."""
        own = own_columns(batch, self.columns)
        if self.own is None:
            self.own = own
        if bool(own) != bool(self.own):
            others = f"the training set {self.own}" if self.own else "the training set no such column"
            raise ValueError(
                f"{what} has {own or sorted(batch)} for the teacher, and {others}: in one of them it would read the "
                "student's input. Add the teacher's columns to all data sets, and where a `data_collator` drops them, "
                "pass DataCollatorForDistillation(data_collator, teacher_processor)."
            )
        inputs, main_input = teacher_inputs(batch, self.columns), main_input_of(self.body)
        if main_input not in inputs and "inputs_embeds" not in inputs:
            raise ValueError(
                f"the teacher needs `{main_input}`, and {what} has {sorted(batch)}. Make it by map or with_transform; "
                f"where its input is not the student's, add a column `teacher_{main_input}`, and set "
                "remove_unused_columns=False if that is removed."
            )
        if self.wants_logits and self._writes and not {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
            # Some would fail, BART would read the source in its place.
            problem = "the teacher has to read what the student is to write. Add `decoder_input_ids`, as "
            problem += "DataCollatorForSeq2Seq(tokenizer, model=student) does, or set kd_weight=0."
            if not self.may_lack_logits:
                raise ValueError(f"`kd_weight` is above 0, and {problem}")
            logger.warning(f"No distillation of logits: {problem}")
            self.wants_logits = False
        self.mind_prompt()
        if not own and self.before_sharing is not None:
            self.before_sharing()
            self.before_sharing = None
        return inputs

    def mind_prompt(self) -> None:
        """Warn once, where columns of tokens are read, that a prompt which the teacher is asked with has to be there.

        A ValueError where its pooling would have to know which tokens these are.
        """
        if not self._prompt:
            return
        cached = "cache_teacher_outputs(..., text_column=...) reads the texts with it"
        if isinstance(self.pooling, OwnPooling) and self.pooling.leaves_prompt_out:
            raise ValueError(
                f"the teacher's pooling leaves out its prompt {self._prompt!r}, which cannot be found in columns of "
                f"tokens: {cached}. Without a prompt set its `default_prompt_name` to None."
            )
        logger.warning(
            f"The teacher is asked with the prompt {self._prompt!r} by default. In columns of tokens it has to be "
            f"there already, before each text: {cached}."
        )
        self._prompt = ""

    # `inference_mode` would be no faster here, and its tensors may not enter a graph: the bank's rows do.
    @torch.no_grad()
    def compute(self, inputs: dict[str, Any]) -> TeacherOutputs:
        """One forward of the model, whose keyword arguments these are. The outputs are on the device of the inputs."""
        assert self.model is not None
        self.model.eval()
        device = getattr(inputs.get(main_input_of(self.body)), "device", None)
        watched = self.body if self._embedder is None else self._embedder.watched
        if self.columns is not None and "use_cache" in self.columns:
            inputs = {**inputs, "use_cache": False}
        mask = inputs.get("attention_mask")
        if self._counts_padding and mask is not None and mask.dim() == 2 and "position_ids" not in inputs:
            inputs = {**inputs, "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}
        with named_errors("the teacher", inputs):
            try:
                if self._embedder is not None:
                    keep_next(watched)
                asked = {} if self.layers is None else {WITH_LAYERS: True}
                with self.layers or nullcontext():
                    outputs = self.forward(**placed(inputs, self.body), **asked)
                logits = logits_of(outputs) if self.wants_logits else None
                logits = None if logits is None else logits.to(device)
                layers = outputs.get(LAYERS) if asked else None
                if self._embedder is None:
                    return TeacherOutputs(None, logits, layers)
                pooled = self._embedder.pool(take_kept(watched), inputs)
            finally:
                forget(watched)
            if pooled.shape[1:] != (self.width,):
                raise ValueError(
                    f"the teacher's embedding must be {self.width} wide, got shape {tuple(pooled.shape)}."
                )
            return TeacherOutputs(pooled.to(device), logits, layers)


def _counts_padding(body: nn.Module) -> bool:
    """Whether a body has learned positions that it counts from the first token on, be that padding or not.

    RoBERTa and its kin, whose table of positions has a row for padding, look where the padding is.
    """
    names = ("position_embeddings", "wpe", "positions_embed", "embed_positions")
    tables = [each for name, each in body.named_modules() if name.endswith(names) and isinstance(each, nn.Embedding)]
    return any(table.padding_idx is None for table in tables) and "position_ids" in (forward_columns(body) or ())


def _cached(name: str, inputs: dict[str, Any]) -> Tensor | None:
    """A cached column of a batch, or None."""
    value = inputs.get(name)
    usable = isinstance(value, Tensor) and value.dim() > 1 and not value.is_complex() and value.dtype != torch.bool
    if value is not None and not usable:
        came = described({name: value})
        raise ValueError(f"a cached output must be numbers of the shape (batch, width), got {came}.")
    return value


def check_teacher(teacher: nn.Module, student: nn.Module) -> None:
    """Raise a ValueError for a teacher that shares weights with the student."""
    shared = {id(weight) for weight in teacher.parameters()} & {id(weight) for weight in student.parameters()}
    if shared:
        what = f"teacher and student share {len(shared)} parameters, and the teacher's are frozen"
        raise ValueError(f"{what}. Pass a copy as the teacher: copy.deepcopy(model).")


def load_teacher(teacher: Any, kwargs: Any = None, argument: str = "teacher", pooling: Any = None) -> Any:
    """A teacher by Hub name or folder, with the class that its config names; a model, or None, is returned as it is.

    Of a SentenceTransformer, or where the pooling "auto" is to be used the name of one, it is the model inside, which
    then has that one's own pooling. `argument` is what the user knows it as: a student that is only measured is loaded
    in the same way, with these `kwargs` of `from_pretrained`.
    """
    if teacher is None or isinstance(teacher, nn.Module):
        return opened(teacher, argument)
    if not isinstance(teacher, str | os.PathLike):
        raise TypeError(f"`{argument}` must be a model, a Hub name or a folder, got a {type(teacher).__name__}.")
    kwargs = kwargs or {}
    try:
        kind = kind_of(teacher, kwargs) if pooling == "auto" else None
        whole = kind == "SentenceTransformer"
        model = opened(load(teacher, kwargs), argument) if whole else _loaded(teacher, kwargs)
        model.__dict__[KIND], model.__dict__[LOADED_FROM] = kind, (str(teacher), _commit_of(teacher, kwargs))
        return model
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        given = f" with `teacher_model_init_kwargs` {sorted(kwargs)}" if kwargs else ""
        has_adapters = os.path.isfile(os.path.join(teacher, "adapter_config.json"))
        advice = " It holds adapters: load it with peft, and pass the model." if has_adapters else ""
        is_lost = not os.path.exists(teacher)
        why = "There is no such folder." if is_lost and str(teacher).startswith((os.sep, ".")) else error
        advice = " Nor is there such a folder." if is_lost and why is error else advice
        raise ValueError(f"`{argument}` {str(teacher)!r} cannot be loaded{given}. {why}{advice}") from error


def _loaded(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> Any:
    shared = ("revision", "token", "cache_dir", "trust_remote_code", "subfolder", "local_files_only", "code_revision")
    config = transformers.AutoConfig.from_pretrained(name, **{key: kwargs[key] for key in shared if key in kwargs})
    remote = [each for each in getattr(config, "auto_map", None) or {} if each.startswith("AutoModel")]
    classes = [*(getattr(config, "architectures", None) or [])[:1], *remote, "AutoModel"]
    for each in classes:
        found: Any = getattr(transformers, each, None)
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if is_model or getattr(found, "__name__", "").startswith("AutoModel"):
            return found.from_pretrained(name, **kwargs)


def _commit_of(name: Any, kwargs: dict[str, Any]) -> str | None:
    """Of a model of the Hub, as the local cache has just resolved it; None of a folder."""
    where = {key: kwargs.get(key) for key in ("revision", "cache_dir")}
    file = None if os.path.isdir(name) else try_to_load_from_cache(str(name), "config.json", **where)
    return os.path.basename(os.path.dirname(file)) if isinstance(file, str) else None  # snapshots/<commit>/config.json
