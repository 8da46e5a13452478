"""What of a checkpoint is ours: the sidecar, written last but one, and whether all files are there.

The sidecar holds head, teacher projection, bank, and what the bank began with, in one safetensors file. Its metadata
say which teacher the bank is of, and how large the files are that resuming depends on.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from hf_rrd.files import written_whole

logger = logging.get_logger(__name__)

SIDECAR = "_relational_distillation.safetensors"  # the underscore keeps it out of what the Trainer pushes
BINARIES = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".metadata")  # of what is resumed; texts may be edited
MOST_TENSORS, LONGEST_HEADER = 100, 10_000_000  # heads have few weights; so many bytes name a hundred thousand files
PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of a sidecar's tensors
SET_ASIDE = "incomplete-"  # how the name of a checkpoint begins that was not written to its end

State = dict[str, dict[str, Tensor]]  # tensors by group and name


def save_sidecar(folder: str, state: State, about: dict[str, str] | None = None) -> None:
    """Write groups of tensors to a checkpoint, and what is said of them; a failed write leaves the old file."""
    tensors = {
        f"{group}.{name}": tensor.detach().cpu().contiguous()
        for group, content in state.items()
        for name, tensor in content.items()
    }
    with written_whole(Path(folder, SIDECAR)) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **(about or {})})


def load_sidecar(folder: str) -> tuple[State, dict[str, str]]:
    """Read what `save_sidecar` wrote: the tensors by group and name, and what is said of them."""
    path = Path(folder, SIDECAR)
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {SIDECAR}: it was written with save_only_model=True or by another trainer, so the run "
            "cannot be resumed. Load its weights with from_pretrained and start a new run."
        )
    state: State = {}
    try:
        about = said_of(folder)
        for key, tensor in load_file(path).items():
            group, _, name = key.partition(".")
            if group not in ("head", "teacher_projection", "bank", "reference", "balance"):
                raise ValueError(f"{key!r} is of none of the groups of a sidecar")
            if tensor.dtype not in PRECISIONS:
                raise ValueError(f"{key} must be in floating point of 16 to 64 bits, got {tensor.dtype}")
            if not tensor.isfinite().all():
                raise ValueError(f"{key} has values that are not finite")
            if name == "rows" and (torch.linalg.vector_norm(tensor.float(), dim=-1) > 1.01).any():
                raise ValueError(f"{key} must be rows of length 1, got longer ones")
            state.setdefault(group, {})[name] = tensor
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}). Resume from an earlier checkpoint.") from error
    return state, about


def said_of(folder: str | os.PathLike[str]) -> dict[str, str]:
    """What a sidecar's metadata say; a ValueError or an OSError where it is no whole one."""
    path = Path(folder, SIDECAR)
    with path.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    if header > LONGEST_HEADER:  # which would be read for minutes
        raise ValueError(f"a header of {header} bytes")
    with safe_open(path, "pt") as file:
        if (count := len(file.keys())) > MOST_TENSORS:
            raise ValueError(f"{count} tensors, of at most {MOST_TENSORS}")
        return dict(file.metadata() or {})


@contextmanager
def explained_write_errors(checkpoint: str) -> Iterator[None]:
    """Turn what a full disk makes of the writers into one OSError that says what is lost: this checkpoint alone."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        of_torch_save = any(part in str(error) for part in ("inline_container", "PytorchStreamWriter", "iostream"))
        if (isinstance(error, RuntimeError) and not of_torch_save) or flaw_in(checkpoint) is None:
            raise  # of something else, such as a push of the checkpoint that has been written
        number = getattr(error, "errno", None) or 0
        room = "make room, and " if number in (0, errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        message = (
            f"{checkpoint} could not be written: {error}. Earlier checkpoints are as they were: {room}go on with "
            "train(resume_from_checkpoint=True)."
        )
        raise (OSError(number, message) if number else OSError(message)) from error


def has_sidecar(folder: str) -> bool:
    """Whether a checkpoint has the file."""
    return Path(folder, SIDECAR).is_file()


def sizes_of(checkpoint: str) -> str:
    """The size of every file so far that resuming depends on, as JSON."""
    files = [path for path in Path(checkpoint).rglob("*") if path.suffix in BINARIES and path.is_file()]
    kept = [path for path in files if path.name not in (SIDECAR, TRAINING_ARGS_NAME) and ".tmp" not in path.name]
    return json.dumps({path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in sorted(kept)})


def flaw_in(checkpoint: str | os.PathLike[str]) -> str | None:
    """What keeps a checkpoint from being whole, in words; None where it was written to its end and is all there.

    The Trainer writes its state last; the sizes of the files that resuming depends on are in the sidecar. A checkpoint
    without a sidecar (`save_only_model`) is taken at the Trainer's word.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        step = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
        TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        step = None
    if not isinstance(step, int) or step < 0:
        return f"it has no readable {TRAINER_STATE_NAME}"
    if not has_sidecar(str(checkpoint)):
        return None
    try:
        sizes = json.loads(said_of(folder).get("files", "{}"))
        for name, size in sizes.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                return f"its {SIDECAR} is damaged (it names the file {name!r})"
            found = (folder / path).stat().st_size if (folder / path).is_file() else None
            if found is None and fnmatch(name, "model*.safetensors") and _has_weights(folder):
                continue  # they have been cut into other shards since
            if found != size:
                return f"its file {name} has {'gone' if found is None else f'{found} bytes'}, it was {size} bytes long"
    except (SafetensorError, ValueError, LookupError, AttributeError, OSError, RecursionError) as error:
        return f"its {SIDECAR} is damaged ({error})"
    return None


def _has_weights(folder: Path) -> bool:
    """Whether all files of a student's weights are there, one or the shards that an index names."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else ()
    return all((folder / PurePosixPath(name).name).is_file() for name in {*named} or {SAFE_WEIGHTS_NAME})


def invalidate(checkpoint: str) -> None:
    """Make room for a checkpoint: mark an old one as incomplete, and clear away what killed writes left half done.

    Other folders that are incomplete get another name. Under their own they would count among the newest checkpoints,
    and `save_total_limit` would delete whole ones in their favour. One is kept, the last that was found.
    """
    folder = Path(checkpoint)
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    for path in [*folder.glob(f".{SIDECAR}*.tmp"), *folder.glob(".tmp*")]:  # ours, safetensors'
        if path.is_file():
            path.unlink()
    for path in _checkpoints_in(folder.parent):
        flaw = None if path == folder else flaw_in(path)
        if flaw is not None:
            for earlier in folder.parent.glob(f"{SET_ASIDE}{PREFIX_CHECKPOINT_DIR}-*"):
                shutil.rmtree(earlier)
            logger.warning(f"{path} is incomplete, {flaw}: it is now {SET_ASIDE}{path.name}.")
            path.rename(path.with_name(SET_ASIDE + path.name))


def _checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    numbers = {path: path.name.rpartition("-")[2] for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    found = [(int(number), path) for path, number in numbers.items() if number.isdecimal() and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def last_complete_checkpoint(folder: str) -> str | None:
    """The newest checkpoint in a folder that is whole, or None."""
    for path in _checkpoints_in(Path(folder)):
        flaw = flaw_in(path)
        if flaw is None:
            return str(path)
        logger.warning(f"{path} is incomplete, {flaw}: going on to the one before.")
    return None


def checkpoint_to_resume(resume_from_checkpoint: str | bool | None, output_dir: Any) -> str | None:
    """The checkpoint that `train(resume_from_checkpoint=...)` means, which has to be whole; None starts anew."""
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is not True:
        flaw = flaw_in(resume_from_checkpoint)
        if flaw is not None:
            raise ValueError(
                f"{resume_from_checkpoint} is not a complete checkpoint: {flaw}. Pass resume_from_checkpoint=True for "
                "the newest complete one."
            )
        return resume_from_checkpoint
    last = last_complete_checkpoint(output_dir)
    if last is None:
        there = any(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
        flaws = "; a warning says what is wrong with each that is there" if there else ""
        raise ValueError(f"no complete checkpoint found in {output_dir}{flaws}. Start with train().")
    return last


def load_student(model: Any, folder: str, head: str) -> None:
    """Load a checkpoint's weights into a student in place, each into its own dtype; `head` names what is none of them.

    Where they have the names of the student's modules, as they are. Otherwise by way of `from_pretrained`:
    transformers writes some families under other names, and its Trainer loads them unconverted and not strictly
    (5.23, not 5.0: huggingface/transformers#43701 and #48805), so that most of a ViT would silently keep the weights
    it had.
    """
    if not os.path.isdir(folder):  # transformers would look it up on the Hub
        raise ValueError(f"{folder} is gone: there is no such folder.")
    if (adapter := Path(folder, "adapter_model.safetensors")).is_file():  # of `add_adapter`
        from peft import set_peft_model_state_dict

        weights = {name.removeprefix("base_model.model."): weight for name, weight in load_file(adapter).items()}
        unknown = set_peft_model_state_dict(model, weights, adapter_name=model.active_adapters()[0]).unexpected_keys
        if unknown:
            raise ValueError(f"{folder} does not hold this student's adapter: {unknown[:3]} are unknown.")
        return
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
