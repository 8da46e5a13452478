"""The sidecar of a checkpoint: head, teacher projection, bank and unfinished log window, in one safetensors file."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)

SIDECAR = "_relational_distillation.safetensors"
"""The file's name. The underscore keeps it out of what the Trainer pushes to the Hub."""


def save_sidecar(folder: str, state: dict[str, dict[str, Tensor]]) -> None:
    """Write groups of tensors to a checkpoint; a failed write leaves the old file.

    Args:
        folder: The checkpoint.
        state: Tensors by group and name.
    """
    tensors = {
        f"{group}.{name}": tensor.detach().cpu().contiguous()
        for group, content in state.items()
        for name, tensor in content.items()
    }
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, SIDECAR)
    save_file(tensors, path + ".tmp", metadata={"format": "pt"})
    os.replace(path + ".tmp", path)


def load_sidecar(folder: str) -> dict[str, dict[str, Tensor]]:
    """Read what `save_sidecar` wrote.

    Raises:
        ValueError: There is no such file, or it is not a whole one.
    """
    path = os.path.join(folder, SIDECAR)
    if not os.path.isfile(path):
        raise ValueError(
            f"{folder} has no {SIDECAR}: it was written with save_only_model=True or by another trainer, so the run "
            "cannot be resumed. Load its weights with from_pretrained and start a new run."
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Resume from an earlier checkpoint.") from error
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, name = key.partition(".")
        state.setdefault(group, {})[name] = tensor
    return state


def has_sidecar(folder: str) -> bool:
    """Whether a checkpoint has the file."""
    return os.path.isfile(os.path.join(folder, SIDECAR))


def is_complete(checkpoint: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes its state last."""
    try:
        json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def invalidate(checkpoint: str) -> None:
    """Mark a checkpoint as incomplete before it is written over."""
    Path(checkpoint, TRAINER_STATE_NAME).unlink(missing_ok=True)


def last_complete_checkpoint(folder: str) -> str | None:
    """The newest checkpoint in a folder that was written to its end, or None."""
    steps = {
        int(path.name.removeprefix(PREFIX_CHECKPOINT_DIR + "-")): path
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.removeprefix(PREFIX_CHECKPOINT_DIR + "-").isdigit()
    }
    for _, path in sorted(steps.items(), reverse=True):
        if is_complete(path):
            return str(path)
        logger.warning(f"{path} is incomplete, it was interrupted while being written: going on to the one before.")
    return None


def load_student(model: Any, folder: str, head: str) -> None:
    """Load a checkpoint's weights into a student in place, each into its own dtype.

    Where they have the names of the student's modules, as they are. Otherwise by way of `from_pretrained`:
    transformers writes some families under other names, and its Trainer loads them unconverted and not strictly
    (5.23, not 5.0: huggingface/transformers#43701 and #48805), so that most of a ViT would silently keep the weights
    it had.

    Args:
        model: The student.
        folder: The checkpoint.
        head: The name of the student's head, which is not among the weights.

    Raises:
        ValueError: The checkpoint lacks a weight of the student or has one too many.
    """
    own = {name: weight for name, weight in model.state_dict().items() if not name.startswith(head + ".")}
    path = Path(folder, "model.safetensors")
    saved = load_file(path) if path.is_file() else {}
    stored = {own[name].data_ptr() for name in saved if name in own}
    same_names = all(name in saved or weight.data_ptr() in stored for name, weight in own.items())  # tied ones once
    if same_names and all(name in own and own[name].shape == weight.shape for name, weight in saved.items()):
        model.load_state_dict(saved, strict=False)
        return
    with torch.random.fork_rng(devices=[]):  # a model starts from random weights before they are loaded
        loaded, loading = type(model).from_pretrained(
            folder,
            config=model.config,
            dtype=torch.promote_types(model.dtype, torch.float32),  # holds what any of the weights was saved in
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, with the others
        )
    weights = loaded.state_dict()
    missing = [*loading["missing_keys"], *(own.keys() - weights.keys())]
    unknown = [*loading["unexpected_keys"], *loading["mismatched_keys"], *(weights.keys() - own.keys())]
    if missing or unknown:
        raise ValueError(
            f"{folder} does not hold this student: {len(missing)} weights are missing ({missing[:3]}), "
            f"{len(unknown)} are unknown or of another shape ({unknown[:3]})."
        )
    model.load_state_dict(weights, strict=False)
