"""The embedding of an example: the output of a model's body, pooled to one row."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import transformers
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models import auto

from hf_rrd.errors import described
from hf_rrd.models.body import (
    body_of,
    forget,
    is_headless,
    keep_next,
    main_input_of,
    place_of,
    reader_of,
    reads_rows,
    take_kept,
    unwrapped,
    watch,
)
from hf_rrd.models.columns import forward_columns
from hf_rrd.models.pooling import POOLERS
from hf_rrd.models.sentence_transformers import opened, own_pooling

# A key of `POOLERS`, "auto", "head", or a function from the body's output and the attention mask to (batch, width).
Pooling = str | Callable[..., Any]


def students(pooling: Pooling) -> Pooling:
    """What a pooling means for a student: of "auto" that is "head"."""
    return "head" if pooling == "auto" else pooling


def embed(
    model: nn.Module, inputs: dict[str, Any], pooling: Pooling = "auto", return_outputs: bool = False
) -> Tensor | tuple[Tensor, Any]:
    """The embedding that training compares: one forward of a model, its body's output pooled.

    With gradients, unless called under `torch.no_grad`. Of many models it is not a pooled `hidden_states[-1]`: a ViT
    is compared by what comes after its last layer norm.

    Args:
        model: A transformers model with a head or none, also inside PEFT or DistributedDataParallel; uncompiled here.
            Or a SentenceTransformer, whose `"auto"` is what its own modules do.
        inputs: Of its forward. `attention_mask` says which tokens are padding. Where a model counts its positions from
            the first token, as GPT-2 and BERT do, padding belongs on the right.
        pooling: `"auto"`, the default for teachers, `"head"`, what a classifier's last layer reads, the default for
            students (of a model without one the same as "auto"), `"cls"`, `"mean"`, `"max"`, `"last_token"`,
            `"pooler"`, `"gap"`, or a function `(body_output, attention_mask) -> (batch, width)`.
        return_outputs: Whether to return what the forward gave, too, such as its logits.

    Returns:
        (batch, width), in the dtype of the forward; with `return_outputs` a tuple of it and the model's output.

    Raises:
        ValueError: The model has no body that returns hidden states, or the pooling does not suit it.

    Example:

    ```python
    teacher_rows = embed(teacher, batch)  # (batch, width)
    student_rows, outputs = embed(student, batch, return_outputs=True)
    ```
    """
    is_dict = isinstance(inputs, Mapping)
    if not is_dict or any(isinstance(value, list | np.ndarray) for value in inputs.values()):
        came = described(inputs) if is_dict else f"a {type(inputs).__name__}"
        made = "a tokenizer or a processor gives it with return_tensors='pt'"
        raise ValueError(f"`inputs` must be a dict of tensors, got {came}: {made}.")
    model = opened(model, "model")
    embedder = Embedder(extract_model_from_parallel(model, keep_torch_compile=False), pooling)
    main_input = main_input_of(embedder.body)
    if main_input not in inputs and not any(name in inputs for name in forward_columns(model) or inputs):
        raise ValueError(f"the model reads `{main_input}`, and `inputs` has {described(inputs)}.")
    unwatch = watch(embedder.watched)
    keep_next(embedder.watched)
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled graph calls no hook
            outputs = model(**inputs)
        embedding = embedder.pool(take_kept(embedder.watched), inputs)
    finally:
        forget(embedder.watched)
        unwatch()
    return (embedding, outputs) if return_outputs else embedding


class Embedder:
    """What is watched of a model, and the pooling of that; `argument` is what the user knows the pooling as.

    Watched is the body, or with the pooling "head" the layer that its classifier reads from. Its `pooling` is then a
    key of `POOLERS` or a function.
    """

    def __init__(self, model: nn.Module, pooling: Pooling = "auto", argument: str = "pooling") -> None:
        self.body = self.watched = body_of(model)
        self._argument, self._read_width = argument, None
        if pooling == "head":
            found = None if is_headless(model) or reads_rows(self.body) else _known_reader(unwrapped(model), self.body)
            if found is not None:
                self.watched, self._read_width = found
            pooling = "auto" if found is None else "pooler"
        if pooling == "auto":
            pooling = own_pooling(model) or auto_pooling(self.body)
        self.pooling = pooling

    @property
    def known_as(self) -> Pooling:
        """The pooling as the settings call it: "head" where it is what the classifier reads."""
        return self.pooling if self.watched is self.body else "head"

    def pool(self, outputs: Any, inputs: dict[str, Any]) -> Tensor:
        """From the body's output for these inputs to (batch, width); a ValueError if it is another number of rows."""
        hidden = getattr(outputs, "last_hidden_state", None)
        mask, choices = fitting_mask(self.body, inputs, hidden)
        if isinstance(hidden, Tensor) and hidden.dim() == 4 and self.body.config.model_type in _CHANNELS_LAST:
            outputs = BaseModelOutput(last_hidden_state=hidden.permute(0, 3, 1, 2))
        pooler = POOLERS[self.pooling] if isinstance(self.pooling, str) else self.pooling
        pooled: Tensor = pooler(outputs, mask)
        pooled = pooled if choices is None else pooled.view(*choices, -1).mean(1)
        if mask is None and _is_packed(inputs):
            raise ValueError(f"`{self._argument}` does not fit: {PACKED}.")
        main, shape = inputs.get(main_input_of(self.body)), getattr(pooled, "shape", None)
        if isinstance(main, Tensor) and shape and len(shape) == 2 and len(main) != shape[0]:
            came = f"{type(self.body).__name__} gives {tuple(shape)} for a batch of {len(main)}"
            raise ValueError(f"`{self._argument}` does not fit: each example needs one embedding, {came}.")
        return pooled

    @cached_property
    def width(self) -> int:
        """The width of a pooled embedding, measured on one blank input, or else `hidden_size` of the config.

        A config does not say it for all: an OPT may project its output, a Wav2Vec2 may end with an adapter.
        """
        if self._read_width is not None:
            return self._read_width
        if reads_rows(self.body):
            return int(self.body.in_features)
        (outputs, blank), name = _blank_outputs(self.body), type(self.body).__name__
        if outputs is None:
            timm = getattr(self.body, "timm_model", None)
            width = getattr(timm, "head_hidden_size", None) or getattr(self.body.config, "hidden_size", None)
            if isinstance(width, int) and isinstance(self.pooling, str):
                return width
            where = "in its config as `hidden_size`, and a blank input could not be run to measure it"
            raise ValueError(
                _towers_of(name) or f"the width of {name}'s embedding is not {where}. Add it to the config."
            )
        try:
            pooled: Any = self.pool(outputs, blank)
        except Exception as error:
            came = f"{name} gave {type(outputs).__name__}"
            if getattr(outputs, "last_hidden_state", None) is None:
                came = f"the model needs a body that returns hidden states, {came}"
            raise ValueError(_towers_of(name) or f"`{self._argument}` does not fit: {came}: {error}") from error
        if not isinstance(pooled, Tensor) or pooled.dim() != 2:
            shape = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
            needed = "a pooling must return a tensor of shape (batch, dim)"
            raise ValueError(f"`{self._argument}`: {needed}, {self.pooling!r} returned {shape}.")
        return pooled.shape[1]

    @property
    def states(self) -> str:
        """What is pooled: `tokens`, `map`, `map_channels_last` or, of "pooler", the name of the body's output.

        Of images the pooling of which depends on it, by a blank one; nothing is run where the weights are in parts.
        """
        if self.pooling == "pooler":
            names = {"VisionModelWithProjection": "image_embeds", "TextModelWithProjection": "text_embeds"}
            names["AudioModelWithProjection"] = "audio_embeds"
            name = type(self.body).__name__
            return next((field for end, field in names.items() if name.endswith(end)), "pooler_output")
        parts = any(not weight.numel() or hasattr(weight, "placements") for weight in self.body.parameters())
        if parts or main_input_of(self.body) != "pixel_values":
            return "tokens"
        outputs, _ = _blank_outputs(self.body)
        if outputs is None or outputs.last_hidden_state.dim() != 4:
            return "tokens"
        return "map_channels_last" if self.body.config.model_type in _CHANNELS_LAST else "map"


def fitting_mask(body: Any, inputs: dict[str, Any], hidden: Tensor | None) -> tuple[Tensor | None, Any]:
    """A batch's mask for a body's hidden states, (rows, tokens); and what the rows are of multiple choice.

    That is (batch, choices): the body reads each choice as a text, and an example is the mean of its own.
    """
    masks = [inputs[name] for name in ("attention_mask", "pixel_attention_mask") if name in inputs]  # of patches
    mask, choices = masks[0] if masks else None, None
    if mask is None or not isinstance(hidden, Tensor):
        return mask, None
    if mask.dim() == 3 and len(hidden) == mask[:, :, 0].numel():
        choices, mask = mask.shape[:2], mask.flatten(0, 1)
    if mask.shape[-1] != hidden.shape[1]:
        # Speech: the mask counts samples, the hidden states are frames.
        to_frames = getattr(body, "_get_feature_vector_attention_mask", lambda length, mask: mask)
        mask = to_frames(hidden.shape[1], mask)
    return mask, choices


PACKED = "the texts of a batch are packed into one row, and each needs its own embedding. Pad them instead"


def _is_packed(inputs: dict[str, Any]) -> bool:
    """Whether a batch is one row of several texts, as `DataCollatorWithFlattening` makes it."""
    places = inputs.get("position_ids")
    if isinstance(places, Tensor) and places.dim() == 2 and not torch.compiler.is_compiling():
        return bool((places.diff(dim=1) < 0).any())
    return "cu_seq_lens_q" in inputs or "seq_idx" in inputs


_CHANNELS_LAST = ("sam2_vision_model", "sam2_hiera_det_model")  # of their maps: (batch, height, width, dim)
# Their mask does not fit their hidden states: these are fewer, or go on with the patches of an image.
_READ_BY_FIRST_TOKEN = ("funnel", "layoutlmv2", "layoutlmv3", "vilt", "visual_bert")


def auto_pooling(body: Any) -> str:
    """The key of `POOLERS` that `"auto"` means for a body.

    The model's own embedding where that is what it is for. Else the last token of a causal decoder or of an
    encoder-decoder, the CLS token of a vision model that has one, otherwise the mean over tokens or positions.
    """
    name = type(body).__name__
    if reads_rows(body) or name.startswith(("TimmWrapper", "DPR")) or name.endswith("WithProjection"):
        return "pooler"
    known, family = auto.modeling_auto, body.config.model_type
    reads_text = main_input_of(body) == "input_ids"
    causal, masked = known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    both_ways = getattr(body.config, "use_bidirectional_attention", None) in (True, "all")  # EmbeddingGemma
    generates = family in causal and family not in masked and not both_ways
    if reads_text and (generates or (body.config.is_encoder_decoder and hasattr(body, "decoder"))):
        return "last_token"
    has_cls = any(name.endswith(("cls_token", "class_embedding")) for name, _ in body.named_parameters())
    has_map = family == "cvt"  # of which the CLS token is no part
    return "cls" if family in _READ_BY_FIRST_TOKEN or (has_cls and not reads_text and not has_map) else "mean"


def _towers_of(name: str) -> str:
    """What to load in place of a model of images and texts, such as CLIP; nothing where it has no classes for them."""
    towers = [f"{name.removesuffix('Model')}{tower}" for tower in ("VisionModel", "TextModel")]
    found = [next((each for each in (f"{x}WithProjection", x) if hasattr(transformers, each)), "") for x in towers]
    which = f"{found[0]} for images, {found[1]} for texts"
    return f"{name} reads images and texts together. Load the part that reads yours: {which}." if all(found) else ""


# Of models seen before: what they were made of, and their readers.
_READERS: WeakKeyDictionary[nn.Module, tuple[list[int], tuple[nn.Module, int] | None]] = WeakKeyDictionary()


def _known_reader(model: nn.Module, body: Any) -> tuple[nn.Module, int] | None:
    parts = [*map(id, model.modules())]
    if model not in _READERS or _READERS[model][0] != parts:  # its head may be another by now
        _READERS[model] = parts, reader_of(model, _blank_inputs(body))
    return _READERS[model][1]


def _blank_inputs(body: Any) -> dict[str, Any]:
    """One blank example of a body's kind."""
    name, (device, dtype) = main_input_of(body), place_of(body)
    if name != "input_ids":
        shape: tuple[int, ...] = (16_000,)  # a second of speech
        if name == "pixel_values":
            size = getattr(body.config, "image_size", 224)
            height, width = (size, size) if isinstance(size, int) else size
            shape = (getattr(body.config, "num_channels", 3), height, width)
        return {name: torch.zeros(1, *shape, dtype=dtype, device=device)}
    ids = torch.ones(1, 4, dtype=torch.long, device=device)
    if not body.config.is_encoder_decoder:
        return {name: ids}
    eos = body.config.eos_token_id
    ids[:, -1] = eos if isinstance(eos, int) and eos < body.config.vocab_size else 1  # BART reads there
    return {each: ids for each in (name, "decoder_input_ids") if each == name or each in (forward_columns(body) or ())}


@torch.random.fork_rng(devices=[])
@torch.no_grad()
def _blank_outputs(body: Any) -> tuple[Any, dict[str, Any]]:
    """The body's output for one blank input of its kind, or None where it does not take one; and the input."""
    training, blank = body.training, _blank_inputs(body)
    try:
        return body.eval()(**blank), blank
    except Exception:
        return None, blank
    finally:
        body.train(training)
