"""A student on its way to the Hub: which files belong there, and how they get there."""

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress, logging

from hf_rrd.results.card import CARD
from hf_rrd.results.pictures import PICTURES, place_of
from hf_rrd.results.sentence_transformers import FORMAT

logger = logging.get_logger(__name__)

HUB = HfApi(library_name="hf_rrd")
"""One for all pushes: what it does in the background it does in order."""

HUB_ERRORS: tuple[Any, ...] = (OSError, RuntimeError, ValueError, *HfHubHTTPError.__bases__)
"""What a push may raise; among its bases is the HTTP library's own error, and that library differs by version."""


class PushError(OSError):
    """The Hub could not be reached, or it refused; the student is on disk."""


@contextmanager
def explained_hub_errors(what: str) -> Iterator[None]:
    """Turn an error on the way to the Hub into a `PushError`: in one sentence what failed, and what to do."""
    try:
        yield
    except HUB_ERRORS as error:
        told, cause = (" ".join(str(each or "").split()) for each in (error, error.__cause__))
        reason = ": ".join(filter(None, (told, "" if cause in told else cause))).rstrip(".") or type(error).__name__
        advice = "Mend that (to log in: `hf auth login`, or hub_token=), and call trainer.push_to_hub()."
        raise PushError(f"{what}: {reason}. {advice}") from error


def published_files(
    folder: str | Path, processing_class: Any, model: Any = None, with_card: bool = True, with_modules: bool = False
) -> list[str]:
    """What of a folder belongs on the Hub: the student, its processing class, the card and its pictures.

    `with_modules` adds what makes a model of sentence-transformers of it; in a plain run that is of an earlier one.
    """
    names = model_files(folder, model) + (module_files(folder) if with_modules else [])
    if with_card:
        names += [CARD, *map(place_of, PICTURES)]
    if processing_class is not None:
        with tempfile.TemporaryDirectory() as saved:  # its files have no fixed names
            processing_class.save_pretrained(saved)
            names += sorted(str(file.relative_to(saved)) for file in Path(saved).rglob("*"))
    return [name for name in dict.fromkeys(names) if Path(folder, name).is_file()]


def model_files(folder: str | Path, model: Any) -> list[str]:
    """The files that a student may have: config and weights in one file or in shards, or its adapters alone."""
    adapters = getattr(model, "peft_config", None) or {}
    for base in {config.base_model_name_or_path for config in adapters.values()}:
        if base and os.path.isdir(base):
            logger.warning_once(
                f"The adapter names the folder {base} as its base model: nobody else can load it, and the path is "
                "published. Push the base first, and load it by its name."
            )
    if adapters:  # the one called `default` lies in the folder itself
        places = ["" if name == "default" else f"{name}/" for name in adapters]
        return [f"{place}{file}" for place in places for file in ("adapter_config.json", "adapter_model.safetensors")]
    names, index = ["config.json", "generation_config.json", "model.safetensors"], "model.safetensors.index.json"
    if Path(folder, index).is_file() and not Path(folder, names[-1]).is_file():  # else it is of an earlier run
        names += [index, *sorted(set(json.loads(Path(folder, index).read_text())["weight_map"].values()))]
    return names


def module_files(folder: str | Path) -> list[str]:
    """The files of a model of sentence-transformers beside its transformer; none where it is not whole."""
    modules = Path(folder, "modules.json")
    if not modules.is_file():
        return []
    places = [Path(folder, each["path"]) for each in json.loads(modules.read_text(encoding="utf-8")) if each["path"]]
    inside = [str(file.relative_to(folder)) for place in places for file in sorted(place.rglob("*"))]
    return [modules.name, "config_sentence_transformers.json", "sentence_bert_config.json", *inside]


def create_repository(args: Any, failure: str, token: str | None = None, private: bool | None = None) -> str:
    """Create a run's repository, or find it; returns its name with the user's.

    Args:
        args: The run's settings. The name is `hub_model_id`, or that of the output folder.
        failure: The beginning of the error: what it means that there is none.
        token, private: In place of those of the settings.

    Raises:
        ValueError: The Hub does not take such a name.
        PushError: The Hub could not be reached, or it refused.
    """
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    validate_repo_id(name)
    private = args.hub_private_repo if private is None else private
    with explained_hub_errors(failure):
        return str(HUB.create_repo(name, token=token or args.hub_token, private=private, exist_ok=True).repo_id)


def found_repository(args: Any, token: str | None = None, private: bool | None = None) -> str | None:
    """`create_repository` before a training, where a failure is a warning and gives None."""
    failure = "`push_to_hub` is on, and the student has no place on the Hub yet"
    try:
        return create_repository(args, failure, token, private)
    except PushError as error:
        logger.warning(f"{error} Training goes on; the student will be in {args.output_dir}.")
        return None


def push_student(
    repository: str, message: str | None, model: Any, processing_class: Any, args: Any, failure: str, **how: Any
) -> Any:
    """Upload the student in `output_dir` with all that belongs to it; returns the commit.

    Args:
        repository, message: The repository's name, and the commit's message.
        model, processing_class, args: The run's.
        failure: The beginning of the error: what it means that it was not pushed.
        how: More arguments of `HfApi.upload_folder`; None is the default. `run_as_future=True` returns a future.

    Raises:
        PushError: There are no weights, the Hub could not be reached, or it refused.
    """
    names = published_files(args.output_dir, processing_class, model, with_modules=args.student_format == FORMAT)
    if not any(name.endswith(".safetensors") for name in names):
        raise PushError(f"{failure}: no weights were found there, among {sorted(os.listdir(args.output_dir))}.")
    with explained_hub_errors(failure):
        return _upload(repository, args.output_dir, names, message, args, **how)


def push_checkpoint(
    repository: str, checkpoint: str, model: Any, processing_class: Any, args: Any, state: Any, earlier: list[Any]
) -> PushInProgress:
    """Push the student of a checkpoint, and with some of the strategies the checkpoint, in the background.

    Its files are linked, because it may be deleted before they are uploaded. Returns the futures, in order, after the
    earlier ones.
    """
    links = tempfile.mkdtemp(prefix="_push-", dir=args.output_dir)
    shutil.copytree(checkpoint, links, copy_function=link, dirs_exist_ok=True)
    step = f"step {state.global_step}" if args.save_strategy == SaveStrategy.STEPS else f"epoch {int(state.epoch)}"
    message = f"Training in progress, {step}"
    names = published_files(links, processing_class, model, False, with_modules=args.student_format == FORMAT)
    jobs = [_upload(repository, links, names, message, args, run_as_future=True)]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else Path(checkpoint).name
        files = [file for file in Path(links).rglob("*") if file.is_file() and file.name != CARD]  # PEFT's names paths
        how = {"path_in_repo": place, "run_as_future": True}
        names = [str(file.relative_to(links)) for file in files]
        jobs.append(_upload(repository, links, names, f"{message}, checkpoint", args, **how))
    for job in jobs:
        job.add_done_callback(_warn_of_failure)
    return PushInProgress([*earlier, *jobs, HUB.run_as_future(shutil.rmtree, links, ignore_errors=True)])


def unfinished(push: PushInProgress | None) -> list[Any]:
    """The futures of a push that still go on."""
    return [job for job in getattr(push, "jobs", []) if not job.done()]


def _upload(repository: str, folder: str, files: list[str], message: str | None, args: Any, **how: Any) -> Any:
    settings = {"token": args.hub_token, "revision": args.hub_revision, "commit_message": message}
    settings |= {name: value for name, value in how.items() if value is not None}
    names = [glob.escape(name) for name in files]
    return HUB.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=names, **settings)


def _warn_of_failure(job: Any) -> None:
    if job.exception() is not None:
        logger.warning(f"A checkpoint was not pushed; a later push makes up for it. {job.exception()}")


def link(source: str, target: str) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
