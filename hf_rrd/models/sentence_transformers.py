"""Models of sentence-transformers: the transformers model inside, and the other modules as its own pooling."""

import copy
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

from hf_rrd.models.body import unwrapped

logger = logging.get_logger(__name__)

AROUND = "_hf_rrd_around"  # on a transformers model: the `Around` of the SentenceTransformer that it is inside of
KIND = "_hf_rrd_kind"  # on a transformers model: which of the library's models its folder was, if any
MISSING = "needs the library. Try: pip install 'hf_rrd[sentence-transformers]'"
SAME = ("last_hidden_state", ("last_hidden_state",), ["last_hidden_state"])  # what the modules after the first read


class OwnPooling:
    """What the modules of a SentenceTransformer after the first do, as a pooling: Pooling, Dense, Normalize.

    They are frozen and set to evaluation mode. The leading `truncate_dim` dimensions are kept, as `encode` does; None
    keeps all.
    """

    def __init__(self, modules: list[nn.Module], truncate_dim: int | None = None) -> None:
        self.modules, self.truncate_dim = nn.Sequential(*modules).requires_grad_(False).eval(), truncate_dim
        self.__qualname__ = f"sentence-transformers ({', '.join(type(each).__name__ for each in modules)})"

    def __call__(self, outputs: Any, attention_mask: Tensor | None, prompt_length: int | None = None) -> Tensor:
        """As any pooling: (batch, width). The first `prompt_length` tokens count unless `include_prompt` is False."""
        hidden = outputs.last_hidden_state
        features = {"token_embeddings": hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden}
        if prompt_length is not None:
            features["prompt_length"] = prompt_length
        if attention_mask is not None:
            features["attention_mask"] = attention_mask
        for module in self.modules.to(hidden.device):
            features = module(features)
        row: Tensor = features["sentence_embedding"]
        return row[:, : self.truncate_dim]

    @property
    def leaves_prompt_out(self) -> bool:
        """Whether the tokens of a prompt are no part of the mean, as in INSTRUCTOR."""
        return any(getattr(module, "include_prompt", True) is False for module in self.modules)


@dataclass
class Around:
    """What a SentenceTransformer does around the model inside, which holds this; a copy of that is a plain model."""

    pooling: OwnPooling  # its modules after the first
    first: Any  # its first module, without the weights
    prompts: dict[str, str]
    default_prompt_name: str | None

    def __deepcopy__(self, memo: Any) -> None:
        return None


class Texts:
    """How a teacher makes its inputs of texts: a SentenceTransformer as its `encode` does, another by a tokenizer.

    Args:
        model: As `opened` gives it.
        tokenizer: In place of the SentenceTransformer's own.
        prompt_name: One of its prompts; None is its `default_prompt_name`.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, prompt_name: str | None = None) -> None:
        own = _around(model)
        if own is None and prompt_name is not None:
            raise ValueError(
                f"`prompt_name` {prompt_name!r} is for a SentenceTransformer, and the teacher, a "
                f"{type(unwrapped(model)).__name__}, has no prompts. Leave it out."
            )
        if own is not None and prompt_name not in (None, *own.prompts):
            raise ValueError(f"`prompt_name` must be one of the teacher's {sorted(own.prompts)}, got {prompt_name!r}.")
        if not isinstance(tokenizer, PreTrainedTokenizerBase) and (own is None or tokenizer is not None):
            raise ValueError(f"`text_column` needs the teacher's tokenizer as `processing_class`, got {tokenizer!r}.")
        self.prompt = None if own is None else own.prompts.get(prompt_name or own.default_prompt_name or "")
        self.first = None if own is None else copy.copy(own.first)
        if self.first is not None and tokenizer is not None:
            self.first.processor, self.first._prompt_length_mapping = tokenizer, {}
        self.tokenizer = tokenizer if self.first is None else self.first.tokenizer
        most = getattr(getattr(unwrapped(model), "config", None), "max_position_embeddings", None) or sys.maxsize
        self.longest = min(self.tokenizer.model_max_length, most)

    def __call__(self, texts: list[str]) -> dict[str, Any]:
        """Tensors by name, (texts, tokens), with what the library adds to them."""
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"each example needs a text in `text_column`, got {wrong[0]!r}. Leave it out.")
        if self.first is not None:
            return dict(self.first.preprocess(texts, prompt=self.prompt))
        how = {"truncation": self.longest < sys.maxsize, "max_length": self.longest}
        return dict(self.tokenizer(texts, padding=True, return_tensors="pt", **how))

    @cached_property
    def prompt_length(self) -> int | None:
        """Tokens of the prompt, for the pooling."""
        return self(["a"]).get("prompt_length")

    @property
    def rules(self) -> list[Any]:
        """All that decides what becomes of a text, but for what the tokenizer remembers of its last call."""
        rules = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = sorted(self.tokenizer.get_vocab().items()) if rules is None else json.loads(rules.to_str())
        if isinstance(rules, dict):
            rules |= {"truncation": None, "padding": None}
        names = ["padding_side", "truncation_side", "pad_token_id", "pad_token_type_id", "model_input_names"]
        settings = [getattr(self.tokenizer, name, None) for name in [*names, "chat_template"]]
        how = None if self.first is None else self.first.get_config_dict()
        return [type(self.tokenizer).__name__, json.dumps(rules), settings, self.longest, repr(how), self.prompt]


def is_sentence_transformer(model: Any) -> bool:
    """Whether this is an object of the library's, which then is loaded already."""
    library = sys.modules.get("sentence_transformers")
    return library is not None and isinstance(model, library.SentenceTransformer)


def opened(model: Any, argument: str) -> Any:
    """The transformers model inside a SentenceTransformer, with its own pooling; any other model as it is."""
    name = type(model).__name__
    if not is_sentence_transformer(model):
        if type(model).__module__.startswith("sentence_transformers."):
            scores = " A cross-encoder scores pairs: pass the model inside, its `.model`, to a student that does, too."
            raise ValueError(
                f"`{argument}` must be a SentenceTransformer or a transformers model, got the library's {name}."
                + (scores if name == "CrossEncoder" else "")
            )
        return model
    first, *others = model
    ways = getattr(first, "modality_config", {}).values()
    plain = ways and all(way["method"] == "forward" and way["method_output_name"] in SAME for way in ways)
    if not plain or not others:
        came = f"{type(first).__name__} with {type(getattr(first, 'auto_model', None)).__name__}"
        raise ValueError(
            f"`{argument}` is a SentenceTransformer whose first module gives no hidden states of tokens, got {came}. "
            "Cache its embeddings as a column `teacher_embedding`, from its own encode()."
        )
    reads = copy.copy(first)  # each text is a row of its own, whatever the attention could do
    reads._modules, reads.can_flatten_inputs = {}, False
    reads.model = SimpleNamespace(config=first.auto_model.config)
    pooling = OwnPooling(others, model.truncate_dim)
    around = Around(pooling, reads, model.prompts, model.default_prompt_name)
    unwrapped(first.auto_model).__dict__[AROUND] = around
    return first.auto_model


def _around(model: nn.Module | None) -> Around | None:
    return None if model is None else unwrapped(model).__dict__.get(AROUND)


def default_prompt(model: nn.Module) -> str:
    """What a SentenceTransformer puts before each text unless it is told otherwise; of others nothing."""
    own = _around(model)
    return "" if own is None else own.prompts.get(own.default_prompt_name or "", "")


def own_tokenizer(model: nn.Module | None) -> Any:
    """A SentenceTransformer's tokenizer, if it can pad; None of another model."""
    own = _around(model)
    return None if own is None or getattr(own.first.tokenizer, "pad_token", None) is None else own.first.tokenizer


def own_pooling(model: nn.Module) -> OwnPooling | None:
    """What `opened` found, on the model itself."""
    own = _around(model)
    return None if own is None else own.pooling


def kind_of(name: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> str | None:
    """Which of the library's models a folder or a repository of the Hub is: "SentenceTransformer", "CrossEncoder", ...

    None where it is none, as far as its files say.
    """
    if "subfolder" in kwargs:
        return None
    how = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    how |= {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    config = cached_file(name, "config_sentence_transformers.json", **how)
    if config is not None:
        with open(config, encoding="utf-8") as file:
            if kind := json.load(file).get("model_type"):
                return str(kind)
    if cached_file(name, "modules.json", **how) is not None:
        return "SentenceTransformer"
    where = {key: kwargs.get(key) for key in ("revision", "cache_dir")}
    if not os.path.isdir(name) and try_to_load_from_cache(str(name), "modules.json", **where) is None:
        logger.warning(
            f"Whether {str(name)!r} is a model of sentence-transformers is unknown: the Hub could not be asked. It is "
            "read as a plain transformers model; if it is one, set `teacher_pooling` to its own, or go online once."
        )
    return None


def is_cross_encoder(model: Any) -> bool:
    """Whether a transformers model was saved by the library as one of its cross-encoders."""
    noted = getattr(getattr(model, "config", None), "sentence_transformers", None)  # by its version 4
    return model.__dict__.get(KIND) == "CrossEncoder" or (isinstance(noted, Mapping) and "activation_fn" in noted)


def load(name: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Any:
    """A SentenceTransformer by its folder or name on the Hub, on the CPU unless a `device_map` says otherwise."""
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ImportError(
            f"{str(name)!r} is a model of sentence-transformers, and to read its pooling as it was trained {MISSING}, "
            "or set `teacher_pooling`, such as 'mean' or 'cls', and it is read as a plain transformers model."
        )
    from sentence_transformers import SentenceTransformer

    own = {key: kwargs[key] for key in ("revision", "token", "trust_remote_code", "local_files_only") if key in kwargs}
    others = {key: value for key, value in kwargs.items() if key not in (*own, "cache_dir")}
    device = None if "device_map" in kwargs else torch.device("cpu")
    where: dict[str, Any] = {"cache_folder": kwargs.get("cache_dir"), "device": device, "model_kwargs": others}
    return SentenceTransformer(str(name), **own, **where)
