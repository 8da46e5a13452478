"""The embedding of an example: the output of a model's body, pooled to one row."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers.models import auto

from hf_rrd.errors import described
from hf_rrd.models.body import body_of, keep_next, main_input_of, place_of, take_kept, watch
from hf_rrd.models.pooling import POOLERS

# A key of `POOLERS`, "auto", or a function from the body's output and the attention mask to (batch, width).
Pooling = str | Callable[..., Any]


def embed(
    model: nn.Module, inputs: dict[str, Any], pooling: Pooling = "auto", return_outputs: bool = False
) -> Tensor | tuple[Tensor, Any]:
    """The embedding that training compares: one forward of a model, its body's output pooled.

    With gradients, unless called under `torch.no_grad`. Of many models it is not a pooled `hidden_states[-1]`: a ViT
    is compared by what comes after its last layer norm.

    Args:
        model: A transformers model with a head or none, also inside PEFT or DistributedDataParallel; uncompiled here.
        inputs: Of its forward. `attention_mask` says which tokens are padding.
        pooling: `"auto"`, the trainer's default, `"cls"`, `"mean"`, `"max"`, `"last_token"`, `"pooler"`, `"gap"`, or a
            function `(body_output, attention_mask) -> (batch, width)`.
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
    embedder = Embedder(extract_model_from_parallel(model, keep_torch_compile=False), pooling)
    unwatch = watch(embedder.body)
    keep_next(embedder.body)
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled graph calls no hook
            outputs = model(**inputs)
        embedding = embedder.pool(take_kept(embedder.body), inputs.get("attention_mask"))
    finally:
        unwatch()
    return (embedding, outputs) if return_outputs else embedding


class Embedder:
    """A model's body and the pooling of its output; `argument` is what the user knows the pooling as."""

    def __init__(self, model: nn.Module, pooling: Pooling = "auto", argument: str = "pooling") -> None:
        self.body = body_of(model)
        self.pooling = auto_pooling(self.body) if pooling == "auto" else pooling
        self._argument = argument

    def pool(self, outputs: Any, attention_mask: Tensor | None) -> Tensor:
        """From the body's output to (batch, width)."""
        hidden: Any = getattr(outputs, "last_hidden_state", None)
        choices: Any = None
        if attention_mask is not None and attention_mask.dim() == 3 and len(hidden) == attention_mask[:, :, 0].numel():
            # Multiple choice: the body reads each choice as a text, and an example is the mean of its own.
            choices, attention_mask = attention_mask.shape[:2], attention_mask.flatten(0, 1)
        if attention_mask is not None and isinstance(hidden, Tensor) and attention_mask.shape[-1] != hidden.shape[1]:
            # Speech: the mask counts samples, the hidden states are frames.
            to_frames = getattr(self.body, "_get_feature_vector_attention_mask", lambda length, mask: mask)
            attention_mask = to_frames(hidden.shape[1], attention_mask)
        pooler = POOLERS[self.pooling] if isinstance(self.pooling, str) else self.pooling
        pooled: Tensor = pooler(outputs, attention_mask)
        return pooled if choices is None else pooled.view(*choices, -1).mean(1)

    @cached_property
    def width(self) -> int:
        """The width of a pooled embedding, measured on one blank input, or else `hidden_size` of the config.

        A config does not say it for all: an OPT may project its output, a Wav2Vec2 may end with an adapter. A
        ValueError says that the body gives no hidden states, or that there is no width either way.
        """
        outputs, name = _blank_outputs(self.body), type(self.body).__name__
        if outputs is None:
            width = getattr(self.body.config, "hidden_size", None)
            if isinstance(width, int) and isinstance(self.pooling, str):
                return width
            where = "in its config as `hidden_size`, and a blank input could not be run to measure it"
            raise ValueError(f"the width of {name}'s embedding is not {where}. Add it to the config.")
        try:
            pooled: Any = self.pool(outputs, None)
        except Exception as error:
            came = f"the model needs a body that returns hidden states, {name} gave {type(outputs).__name__}"
            raise ValueError(f"`{self._argument}` does not fit: {came}: {error}") from error
        if not isinstance(pooled, Tensor) or pooled.dim() != 2:
            shape = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
            needed = "a pooling must return a tensor of shape (batch, dim)"
            raise ValueError(f"`{self._argument}`: {needed}, {self.pooling!r} returned {shape}.")
        return pooled.shape[1]


def auto_pooling(body: Any) -> str:
    """The key of `POOLERS` that `"auto"` means for a body.

    The last token of a decoder or of an encoder-decoder, the CLS token of a vision model that has one, otherwise the
    mean over the unmasked tokens, or over the positions of a convolutional map.
    """
    known, family = auto.modeling_auto, body.config.model_type
    reads_text = main_input_of(body) == "input_ids"
    causal, masked = known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    generates = family in causal and family not in masked
    if reads_text and (generates or (body.config.is_encoder_decoder and hasattr(body, "decoder"))):
        return "last_token"
    has_cls = any(name.endswith(("cls_token", "class_embedding")) for name, _ in body.named_parameters())
    return "cls" if has_cls and not reads_text else "mean"


@torch.no_grad()
def _blank_outputs(body: Any) -> Any:
    """The body's output for one blank input of its kind, or None where it does not take one."""
    training = body.training
    try:
        return body.eval()(**{main_input_of(body): _blank_input(body)})
    except Exception:
        return None
    finally:
        body.train(training)


def _blank_input(body: Any) -> Tensor:
    device, dtype = place_of(body)
    if main_input_of(body) == "input_ids":
        return torch.ones(1, 4, dtype=torch.long, device=device)
    shape: tuple[int, ...] = (16_000,)  # a second of speech
    if main_input_of(body) == "pixel_values":
        size = getattr(body.config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        shape = (getattr(body.config, "num_channels", 3), height, width)
    return torch.zeros(1, *shape, dtype=dtype, device=device)
