"""Models of sentence-transformers: the transformers model inside, and the other modules as its own pooling."""

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import cached_file

OWN_POOLING = "_hf_rrd_own_pooling"  # on a transformers model: how the modules around it make one row of its output
KIND = "_hf_rrd_kind"  # on a transformers model: which of the library's models its folder was, if any
MISSING = "needs the library. Try: pip install 'hf_rrd[sentence-transformers]'"
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")
SAME = ("last_hidden_state", ("last_hidden_state",), ["last_hidden_state"])  # what the modules after the first read


class OwnPooling:
    """What the modules of a SentenceTransformer after the first do, as a pooling: Pooling, Dense, Normalize.

    Args:
        modules: Those modules, which are frozen and set to evaluation mode.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = nn.Sequential(*modules).requires_grad_(False).eval()
        self.__qualname__ = f"sentence-transformers ({', '.join(type(each).__name__ for each in modules)})"

    def __call__(self, outputs: Any, attention_mask: Tensor | None) -> Tensor:
        """As any pooling: (batch, width)."""
        hidden = outputs.last_hidden_state
        features = {"token_embeddings": hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden}
        if attention_mask is not None:
            features["attention_mask"] = attention_mask
        for module in self.modules.to(hidden.device):
            features = module(features)
        row: Tensor = features["sentence_embedding"]
        return row


def is_sentence_transformer(model: Any) -> bool:
    """Whether this is an object of the library's, which then is loaded already."""
    library = sys.modules.get("sentence_transformers")
    return library is not None and isinstance(model, library.SentenceTransformer)


def opened(model: Any, argument: str) -> Any:
    """The transformers model inside a SentenceTransformer, with its own pooling; any other model as it is.

    Raises:
        ValueError: It is another model of the library, or its first module is none that gives hidden states.
    """
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
    first.auto_model.__dict__[OWN_POOLING] = OwnPooling(others)
    return first.auto_model


def own_pooling(model: nn.Module) -> OwnPooling | None:
    """What `opened` found, on the model itself."""
    found: OwnPooling | None = model.__dict__.get(OWN_POOLING)
    return found


def kind_of(name: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> str | None:
    """Which of the library's models a folder or a repository of the Hub is: "SentenceTransformer", "CrossEncoder", ...

    None where it is none, as far as its files say.
    """
    how = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    how |= {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    if "subfolder" in kwargs:
        return None
    config = cached_file(name, "config_sentence_transformers.json", **how)
    if config is not None:
        with open(config, encoding="utf-8") as file:
            if kind := json.load(file).get("model_type"):
                return str(kind)
    return None if cached_file(name, "modules.json", **how) is None else "SentenceTransformer"


def is_cross_encoder(model: Any) -> bool:
    """Whether a transformers model was saved by the library as one of its cross-encoders."""
    noted = getattr(getattr(model, "config", None), "sentence_transformers", None)  # by its version 4
    return model.__dict__.get(KIND) == "CrossEncoder" or (isinstance(noted, Mapping) and "activation_fn" in noted)


def load(name: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Any:
    """A SentenceTransformer by its folder or name on the Hub, on the CPU unless a `device_map` says otherwise.

    Raises:
        ImportError: The library is missing.
    """
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
