"""What belongs on the Hub, and what may go wrong on the way there."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

CARD = "README.md"

FIGURES = "figures"
"""The folder of a card's pictures, beside it."""

WEIGHTS = (".safetensors",)

PICTURES = ("losses", "similarities", "embeddings", "reliability")

HUB_ERRORS: tuple[Any, ...] = (OSError, RuntimeError, ValueError, *HfHubHTTPError.__bases__)
"""What a push may raise; among its bases is the HTTP library's own error, and that library differs by version."""


class PushError(OSError):
    """The Hub could not be reached, or it refused; the student is on disk."""


def model_files(folder: str, adapters: list[str] | None = None) -> list[str]:
    """The files of a student in a folder: config and weights in one file or in shards, or its adapters alone."""
    if adapters:  # the one called `default` lies in the folder itself
        places = ["" if name == "default" else f"{name}/" for name in adapters]
        names = [f"{place}{file}" for place in places for file in (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME)]
        return [name for name in names if Path(folder, name).is_file()]
    names = [CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME]
    index = Path(folder, SAFE_WEIGHTS_INDEX_NAME)
    if index.is_file() and not Path(folder, SAFE_WEIGHTS_NAME).is_file():  # not one of an earlier run
        names += [SAFE_WEIGHTS_INDEX_NAME, *sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    config = Path(folder, CONFIG_NAME)
    if config.is_file() and "auto_map" in json.loads(config.read_text()):  # code of its own
        names += sorted(file.name for file in Path(folder).glob("*.py"))
    return [name for name in names if Path(folder, name).is_file()]


def files_in(folder: str) -> list[Path]:
    """All files in a folder and the folders in it."""
    return [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy(source, target)


def published_files(
    folder: str, processing_class: Any, adapters: list[str] | None = None, with_card: bool = True
) -> list[str]:
    """What of a folder belongs on the Hub: the student, its processing class, the card and its pictures."""
    names = model_files(folder, adapters)
    if with_card:
        names += [CARD, *(f"{FIGURES}/{name}.png" for name in PICTURES)]
    if processing_class is not None:
        with tempfile.TemporaryDirectory() as saved:  # its files have no fixed names
            processing_class.save_pretrained(saved)
            names += [str(file.relative_to(saved)) for file in files_in(saved)]
    return [name for name in dict.fromkeys(names) if Path(folder, name).is_file()]


@contextmanager
def explained_hub_errors(what: str) -> Iterator[None]:
    """Say in one sentence what failed on the way to the Hub, and what to do."""
    try:
        yield
    except HUB_ERRORS as error:
        told = [str(each) for each in (error, error.__cause__) if each is not None and str(each)]
        reason = " ".join(": ".join(told or [type(error).__name__]).split()).rstrip(".")
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = "Then call trainer.push_to_hub()."
        if status in (None, 401, 403) and not isinstance(error, RuntimeError | ValueError):
            advice = (
                "See that the Hub can be reached and that you are logged in (`hf auth login`, or hub_token=), and "
                "call trainer.push_to_hub()."
            )
        raise PushError(f"{what}: {reason}. {advice}") from error
