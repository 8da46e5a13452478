"""Whether a teacher knows the classes that the student learns: shown by its answers, where there are labels."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from datasets import ClassLabel, Dataset, Value
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from hf_rrd.errors import named_errors
from hf_rrd.losses.logits import NUMBERS, ONE, SEVERAL
from hf_rrd.models.logits import BY_PLACE, WORDS, LogitPair
from hf_rrd.training.data import preserved_randomness, sample_of
from hf_rrd.training.distributed import read_all
from hf_rrd.training.terms import GENTLE, HARD

logger = logging.get_logger(__name__)

ASKED = 1024  # training examples whose labels a teacher's logits are compared with

# How far a teacher that pulls hard has to come on the way from one answer for all to all answers right. A weaker one
# can do harm where its student could be better than it; its embedding, which pulls as hard as the task, is gentler.
MOSTLY = 0.75

# The same of words, which nobody gets mostly right: how far below the loss of their frequencies that of a teacher is.
SOME = 0.1


def knows_classes(dataset: Any, trainer: Any) -> bool:
    """Whether the teacher's logits tell the labels of a training set, mostly; or else whether names have shown it.

    It has to do better than one answer for all: the most frequent class, of examples, tokens or frames; whether each
    of several labels is there; the mean of numbers; of words their frequencies. A head of fresh weights has the
    classes' names, and another task may have as many: neither shall teach.
    """
    pair, found = trainer.distillation.logits, None
    asked = _asked(dataset, trainer) if hasattr(dataset, "__len__") else None
    if asked is not None:
        kind, rows, examples = asked
        if kind == NUMBERS:
            found = _of_numbers(rows)
        elif pair.layout in WORDS:
            found = _of_words(rows)
        else:
            found = _of_classes(rows, 2 if kind == SEVERAL else len(rows) - 1, examples)
    knows, said = found or (bool(pair.is_known), "have no labels to be compared with")
    if not knows:
        teaches = trainer._teacher.wants_embedding
        alone = "its embeddings alone teach" if teaches else "nothing of it teaches"
        hard = f" and relational_weight={HARD if trainer.distillation.has_one_answer else GENTLE:g}"
        instead = f"set kd_weight=1{hard if trainer.args.relational_weight == 'auto' else ''}"
        (logger.info if teaches and found is None else logger.warning)(
            f"The teacher's logits {said}: they are left out, and {alone}. To learn them all the same, {instead}."
        )
    return knows


@torch.no_grad()
def _asked(dataset: Any, trainer: Any) -> tuple[str, Tensor, int] | None:
    """What the logits are of, what is kept of up to `ASKED` examples, and of how many; None where nothing compares.

    Rows are as `_compared` has them, but for numbers added up: of a vocabulary they would be gigabytes. Processes say
    together that nothing compares, or one would wait for ever.
    """
    pair, accelerator = trainer.distillation.logits, trainer.accelerator
    found: list[Tensor] = []
    kind, examples = ONE, 0
    sample = sample_of(_labelled(dataset), ASKED, trainer.distillation.seed)
    with preserved_randomness():
        for batch in read_all(sample, trainer, "Asking the teacher"):
            row = None
            with named_errors("asking the teacher for labels of `train_dataset`", batch), accelerator.autocast():
                batch = trainer._prepare_inputs(batch)
                logits, labels = trainer._teacher.read(batch).logits, _labels_of(batch)
                if logits is not None and labels is not None:
                    kind, row = _compared(pair, logits, labels, batch)
            if not all(gather_object([row is not None])):
                return None
            # Places in a text and choices are as many as the largest of a batch has.
            rows = accelerator.gather_for_metrics(accelerator.pad_across_processes(row, dim=1)).cpu().double()
            examples += len(rows)
            found = [*found, rows] if kind == NUMBERS else [pad_sequence([*found, rows.sum(0)]).sum(1)]
    return (kind, torch.cat(found), examples) if found else None


def _of_numbers(rows: Tensor) -> tuple[bool, str] | None:
    """Whether a teacher knows the labels, and what is said if not; None where nothing has one. From `_compared`."""
    answers, labels = rows.chunk(2, 1)
    labels = labels.where(labels != -100, torch.nan)
    if labels.isnan().all():
        return None
    error, spread = ((labels - each).square().nansum().item() for each in (answers, labels.nanmean(0)))
    what = f"miss the numbers of {int((~labels.isnan()).any(1).sum())} training examples by {error:.3g} in squares"
    return error < (1 - MOSTLY) * spread, f"{what}, their mean by {spread:.3g}"


def _of_words(sums: Tensor) -> tuple[bool, str] | None:
    loss, counts = sums[0].item(), sums[1:]
    count = int(counts.sum())
    if count == 0:
        return None
    blind = -counts.xlogy(counts / count).sum().item()
    what = f"have a loss of {loss / count:.3g} on {count} words of training examples"
    return loss < (1 - SOME) * blind, f"{what}, the words' frequencies {blind / count:.3g}"


def _of_classes(sums: Tensor, columns: int, examples: int) -> tuple[bool, str] | None:
    right, classes = int(sums[0]), sums[1:].view(-1, columns)
    count, most = int(classes.sum()), int(classes.amax(1).sum())
    if count == 0:
        return None
    of = "training examples" if count <= examples else "places in training examples"
    said = f"name the label of {right} of {count} {of}, the most frequent class that of {most}"
    return right > most and right - most >= MOSTLY * (count - most), said


def _labels_of(batch: Any) -> Tensor | None:
    """Of a batch: `labels`, or of answers in a text start and end, (batch, 2)."""
    spans = [batch.get(name) for name in ("start_positions", "end_positions")]
    labels = batch.get("labels") if None in spans else torch.stack(spans, 1).flatten(1)
    return labels if isinstance(labels, Tensor) else None


def _labelled(dataset: Any) -> Any:
    """The rows that have a label, where it is a column of one number each: a draw from all may find but one."""
    for name in ("labels", "label", "label_ids") if isinstance(dataset, Dataset) else ():
        feature = dataset.features.get(name)
        if isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype):
            rows = np.flatnonzero(dataset.with_format("numpy", columns=[name])[name][:] != -100)
            return dataset.select(rows) if 0 < len(rows) < len(dataset) else dataset
    return dataset


def _compared(pair: LogitPair, logits: Tensor, labels: Tensor, batch: Any) -> tuple[str, Tensor | None]:
    """What logits are of, and what is kept of each example, (batch, ...); None where nothing can be compared.

    Of numbers answers and labels; of classes how many answers are right, and how often each label is there; of words
    their loss instead.
    """
    kind = pair.kind_of(logits, batch)
    if pair.layout in BY_PLACE and pair.layout != "choices":
        if logits.dim() != 3 or labels.is_floating_point():  # of a class whose name misleads
            return kind, None
        try:
            counted = pair.counted(pair.layout, logits, batch)
        except ValueError as error:  # other tokens
            logger.info(f"No distillation of logits: {error}")
            return kind, None
        if pair.layout in WORDS:
            return kind, _words(logits, labels, counted, shifts=pair.layout == "next words")
        logits = logits if counted is None else logits.masked_fill(~counted.unsqueeze(1), -torch.inf)
    if pair.layout == "pixels" and labels.dim() == 3:
        logits = logits.movedim(1, -1)
        labels = F.interpolate(labels.unsqueeze(1).float(), logits.shape[1:3]).squeeze(1).long()
    logits = pair.in_order(logits)
    if kind == NUMBERS and labels.numel() == logits.numel():
        return kind, torch.cat([logits.float(), labels.view_as(logits).float()], 1)
    if kind == SEVERAL and labels.shape == logits.shape:
        there, known = labels > 0.5, labels >= 0
        right = (((logits > 0) == there) & known).sum(1, keepdim=True)
        return kind, torch.cat([right, torch.stack([~there & known, there & known], 2).flatten(1)], 1)
    if kind != ONE or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        return kind, None
    known = ((labels >= 0) & (labels < logits.shape[-1])).view(len(labels), -1)
    labels, answers = labels.view(len(labels), -1), logits.argmax(-1).view(len(labels), -1)
    each = labels.new_zeros(len(labels), logits.shape[-1]).scatter_add_(1, labels.masked_fill(~known, 0), known.long())
    return kind, torch.cat([((answers == labels) & known).sum(1, keepdim=True), each], 1)


def _words(logits: Tensor, labels: Tensor, counted: Tensor | None, shifts: bool) -> Tensor | None:
    """The sum of the losses of each text's words, and how often each word is there, (batch, 1 + vocabulary)."""
    if labels.shape != logits.shape[:2]:
        return None
    if shifts:
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    known = (labels >= 0) & (labels < logits.shape[-1])
    known = known if counted is None else known & counted
    labels = labels.masked_fill(~known, -100)
    # One text at a time: all at once would need far more memory than a step of small batches.
    texts = [F.cross_entropy(row.float(), own, reduction="sum") for row, own in zip(logits, labels, strict=True)]
    each = torch.zeros(len(labels), logits.shape[-1], device=logits.device)
    each.scatter_add_(1, labels.clamp(min=0), known.float())
    return torch.cat([torch.stack(texts).unsqueeze(1), each], 1)
