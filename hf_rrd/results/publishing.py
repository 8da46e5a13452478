"""From a trained student to a page on the Hub: the trainer's report, card and push."""

import glob
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import nn
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress, logging

from hf_rrd.models.columns import CACHED_COLUMNS
from hf_rrd.results.card import render_card
from hf_rrd.results.facts import dataset_facts, run_facts
from hf_rrd.results.hub import (
    CARD,
    FIGURES,
    PICTURES,
    WEIGHTS,
    PushError,
    explained_hub_errors,
    files_in,
    link,
    published_files,
)
from hf_rrd.results.plots import plot_embeddings, plot_losses, plot_reliability, plot_similarities, save_plots
from hf_rrd.results.report import DistillationReport, class_names, compare_models, write_json

logger = logging.get_logger(__name__)

FACTS_FILE = "model_card.json"
"""The facts of a card, beside it; not pushed."""

HUB = HfApi(library_name="hf_rrd")
"""One for all pushes: what it does in the background it does in order."""


class PublishingMixin:
    """What `RelationalDistillationTrainer` does once the student is trained. Not to be used alone."""

    args: Any
    state: Any
    model: Any
    teacher: Any
    processing_class: Any
    eval_dataset: Any
    hub_model_id: str | None
    push_in_progress: Any
    has_own_optimizer: bool
    last_report: DistillationReport | None = None
    evaluated_on: Mapping[str, dict[str, Any]] = MappingProxyType({})  # by prefix, of which data set and split

    @property
    def was_resumed(self: Any) -> bool:
        """Whether the last training went on from a checkpoint."""
        return bool(self._resuming)

    @property
    def publishing_processor(self: Any) -> Any:
        """What is saved beside the student: the processing class, else the collator's tokenizer; or None."""
        return self.processing_class or getattr(self.data_collator, "tokenizer", None)

    def evaluate(
        self: Any, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in `Trainer`; notes which data set the metrics are of, for the card."""
        on = dataset_facts(self.eval_dataset if eval_dataset is None else eval_dataset)
        if "split" not in on and metric_key_prefix in ("train", "validation", "test"):
            on["split"] = metric_key_prefix
        self.evaluated_on = {**self.evaluated_on, metric_key_prefix: on}
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[misc]

    # ---- Report ----

    def report(self: Any, dataset: Any = None, teacher: nn.Module | None = None) -> DistillationReport | None:
        """Compare student and teacher on the same examples and machine; see `compare_models`.

        The facts are written to `distillation_report.json` in `output_dir`, and the next card tells them. Only the
        main process measures; the others get None.

        Args:
            dataset: What to measure on, or its name among several evaluation sets. Default: `eval_dataset`.
            teacher: The teacher, where the trainer has none because its outputs were cached.

        Raises:
            ValueError: There is no data set, or the student is sharded over processes.
        """
        dataset = self.eval_dataset if dataset is None else dataset
        if isinstance(dataset, str) and isinstance(self.eval_dataset, dict) and dataset in self.eval_dataset:
            dataset = self.eval_dataset[dataset]
        if dataset is None or isinstance(dataset, dict | str):
            known = f"one of {sorted(self.eval_dataset)}" if isinstance(self.eval_dataset, dict) else "a data set"
            came = (
                dataset if isinstance(dataset, str) else "none" if dataset is None else f"several, {sorted(dataset)}"
            )
            raise ValueError(f"`dataset` must be {known}, got {came}.")
        if self._is_sharded():
            raise ValueError(
                "a report needs the whole student in one process, and FSDP or DeepSpeed has it in parts. Load the "
                "saved student, and call compare_models."
            )
        if not self.is_world_process_zero():
            return None
        collate = self.data_collator
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            if isinstance(dataset, Dataset):
                kept = [*self._signature_columns, *CACHED_COLUMNS]  # cached logits are of use, also without kd_weight
                dataset = dataset.remove_columns([name for name in dataset.column_names if name not in kept])
            else:
                collate = self._get_collator_with_removed_columns(collate, description="report")
        report = compare_models(
            self._unwrapped_student(),
            self.teacher if teacher is None else teacher.to(self.args.device),
            dataset,
            collate,
            self.args.per_device_eval_batch_size,
            self.args.student_pooling,
            self.args.teacher_pooling,
            self.label_names or ["labels"],
        )
        report.save(self.args.output_dir)
        self.last_report = report
        return report

    # ---- Card ----

    def create_model_card(
        self: Any,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        *,
        teacher_name: str | None = None,
    ) -> None:
        """Write the student's card, `README.md`, into `output_dir`, with its facts in `model_card.json` beside it.

        The card says what is known of this run and nothing else; nothing is fetched for it. With `report` called
        before, it has the comparison with the teacher, and with matplotlib the pictures, in `figures`. Of several
        tasks or data sets it names the first.

        Args:
            language: Of the texts, as ISO codes.
            license: Of the student, as the Hub names licences.
            tags: More tags.
            model_name: Default: the name of the repository or of the output folder.
            finetuned_from: On the Hub, what the student derives from. Default: the weights that it started from, or
                its teacher.
            tasks: The Hub's name of the task. Default: by the model's class.
            dataset_tags: The data set's name on the Hub. Default: where `datasets` had it from.
            dataset: What to call the data set.
            dataset_args: Which configuration of it.
            teacher_name: What to call the teacher. Default: its name on the Hub and its revision, if it was loaded by
                one.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        repository = self.hub_model_id or self.args.hub_model_id
        name = model_name or (repository or str(folder.absolute())).split("/")[-1]
        facts = run_facts(
            self, self.last_report, name, repository, teacher_name, dataset, dataset_tags, dataset_args, tasks
        )
        tags = [tags] if isinstance(tags, str) else list(tags or ())
        tags += [tag for tag in getattr(self.model, "model_tags", None) or () if tag not in tags]
        pictures = self._draw(folder)
        card = render_card(facts, pictures, license, language, tags, finetuned_from)
        write_json(folder / FACTS_FILE, facts)
        card.save(folder / CARD)

    def _draw(self: Any, folder: Path) -> dict[str, str]:
        """The card's pictures, by name: where they are beside it. Without matplotlib there are none."""
        for name in PICTURES:  # of an earlier run
            (folder / FIGURES / f"{name}.png").unlink(missing_ok=True)
        try:
            figures = figures_of(self.state.log_history, self.last_report, class_names(self.model))
            files = save_plots(figures, folder / FIGURES)
        except Exception as error:  # whatever it is: a picture must not cost the card and the push
            logger.warning(f"The card has no pictures. {error}")
            return {}
        return {file.stem: f"{FIGURES}/{file.name}" for file in files}

    # ---- Push ----

    def init_hf_repo(self: Any, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, or find it. A failure is a warning: the training goes on, the push tries again."""
        if not self.is_world_process_zero():
            return
        validate_repo_id(self._repository_name)  # a ValueError now, not after the training
        try:
            self._create_repository(token, private, "`push_to_hub` is on, and the student has no place on the Hub yet")
        except PushError as error:
            logger.warning(f"{error} Training goes on; the student will be in {self.args.output_dir}.")

    @property
    def _repository_name(self: Any) -> str:
        return str(self.args.hub_model_id or Path(self.args.output_dir).absolute().name)

    def _create_repository(self: Any, token: str | None, private: bool | None, failure: str) -> None:
        token = self.args.hub_token if token is None else token
        private = self.args.hub_private_repo if private is None else private
        with explained_hub_errors(failure):
            self.hub_model_id = HUB.create_repo(
                self._repository_name, token=token, private=private, exist_ok=True
            ).repo_id
        self.push_in_progress = None

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`: with `push_to_hub` it pushes, too; that a push failed is a warning here."""
        super().save_model(output_dir, _internal_call=True)  # type: ignore[misc]
        if self.args.push_to_hub and not _internal_call:
            try:
                self.push_to_hub(commit_message="Model save")
            except PushError as error:
                logger.warning(str(error))

    def push_to_hub(
        self: Any,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the student with its card, and upload both with the processing class and the card's pictures.

        Nothing else in `output_dir` is uploaded. As in `Trainer`, `kwargs` go to `create_model_card`.

        Args:
            commit_message: Of the commit.
            blocking: Whether to wait for the upload.
            token: Default: `hub_token`, or the one that you are logged in with.
            revision: The branch. Default: `hub_revision`, or the main one.
            private: Whether a new repository is private. Default: `hub_private_repo`.
            kwargs: Arguments of `create_model_card`.

        Returns:
            What `huggingface_hub.HfApi.upload_folder` returns: the commit, or its future.

        Raises:
            PushError: An `OSError`: the Hub could not be reached, or it refused. The student is in `output_dir`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)  # on all processes: each may hold a part of it
        if not self.is_world_process_zero():
            return None
        folder, failure = self.args.output_dir, f"the student is in {self.args.output_dir}, and not on the Hub"
        if self.hub_model_id is None:
            try:
                self._create_repository(token, private, failure)
            except PushError:
                self.create_model_card(**kwargs)  # it is to be on disk, too
                raise
        self.create_model_card(**kwargs)
        self._finish_current_push()
        names = published_files(folder, self.publishing_processor, self._adapters)
        if not any(name.endswith(WEIGHTS) for name in names):
            raise PushError(f"{failure}: no weights were found there, among {sorted(os.listdir(folder))}.")
        with explained_hub_errors(failure):
            return self._upload(folder, commit_message, token, revision, not blocking, allow_patterns=names)

    @property
    def _adapters(self: Any) -> list[str]:
        """The names of the adapters of a PEFT student; warns of a base that nobody else can load."""
        configs = getattr(self.model, "peft_config", None) or {}
        bases = {config.base_model_name_or_path for config in configs.values()}
        for base in bases:
            if base and os.path.isdir(base):
                logger.warning_once(
                    f"The adapter names the folder {base} as its base model: nobody else can load it, and the path is "
                    "published. Push the base first, and load it by its name."
                )
        return list(configs)

    def _push_from_checkpoint(self: Any, checkpoint_folder: str) -> None:
        """Push the student of a checkpoint, and with some of the strategies the checkpoint, in the background."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END or self.hub_model_id is None:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        steps = self.args.save_strategy == SaveStrategy.STEPS
        message = f"Training in progress, {'step' if steps else 'epoch'} "
        message += str(self.state.global_step if steps else int(self.state.epoch))
        names = published_files(checkpoint_folder, self.publishing_processor, self._adapters, with_card=False)
        pushes = [self._upload_later(checkpoint_folder, names, message)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            place = "last-checkpoint" if last else Path(checkpoint_folder).name
            everything = [str(file.relative_to(checkpoint_folder)) for file in files_in(checkpoint_folder)]
            everything = [name for name in everything if Path(name).name != CARD]  # PEFT's, with the base's path
            pushes.append(self._upload_later(checkpoint_folder, everything, f"{message}, checkpoint", place))
        if busy:
            self.push_in_progress.jobs.extend(pushes)
        else:
            self.push_in_progress = PushInProgress(pushes)

    def _upload_later(self: Any, folder: str, names: list[str], message: str, place: str | None = None) -> Any:
        """Upload files of a checkpoint in the background, by links: it may be deleted before that has ended."""
        links = tempfile.mkdtemp(prefix="_push-", dir=self.args.output_dir)
        for name in names:
            Path(links, name).parent.mkdir(parents=True, exist_ok=True)
            link(Path(folder, name), Path(links, name))
        job = self._upload(links, message, None, None, True, path_in_repo=place)

        def end(job: Any) -> None:
            shutil.rmtree(links, ignore_errors=True)
            if job.exception() is not None:
                logger.warning(f"{message!r} was not pushed; a later push makes up for it. {job.exception()}")

        job.add_done_callback(end)
        return job

    def _upload(
        self: Any,
        folder: str,
        message: str | None,
        token: str | None,
        revision: str | None,
        run_as_future: bool,
        allow_patterns: list[str] | None = None,
        path_in_repo: str | None = None,
    ) -> Any:
        how: dict[str, Any] = {"run_as_future": run_as_future, "path_in_repo": path_in_repo}
        return HUB.upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=message,
            token=self.args.hub_token if token is None else token,
            revision=self.args.hub_revision if revision is None else revision,
            allow_patterns=None if allow_patterns is None else [glob.escape(name) for name in allow_patterns],
            **how,
        )


def figures_of(log_history: list[dict[str, Any]], report: DistillationReport | None, names: Any) -> dict[str, Any]:
    """What there is to draw of a run and its report, of `PICTURES`."""
    figures: dict[str, Any] = {}
    if any("loss" in entry and "step" in entry for entry in log_history):
        figures["losses"] = plot_losses(log_history)
    if report is None:
        return figures
    tensors, has_classes = report.tensors, "accuracy" in report.facts["student"]
    labels = tensors["labels"] if has_classes else None
    student, teacher = (tensors.get(f"{name}_embedding") for name in ("student", "teacher"))
    if student is not None and teacher is not None and len(student) > 1:
        figures["similarities"] = plot_similarities(student, teacher, labels, names)
        figures["embeddings"] = plot_embeddings(student, teacher, labels, names)
    if labels is not None:
        is_rival = "accuracy" in report.facts.get("teacher", {})
        others = {"teacher": tensors["teacher_logits"]} if is_rival else None
        figures["reliability"] = plot_reliability(tensors["student_logits"], labels, others=others)
    return figures
