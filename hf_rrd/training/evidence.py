"""Whether a teacher knows the classes that the student learns: shown by its answers, where there are labels."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Value
from torch import Tensor
from transformers.utils import logging

from hf_rrd.errors import named_errors
from hf_rrd.losses.logits import NUMBERS, ONE, SEVERAL
from hf_rrd.models.logits import LogitPair
from hf_rrd.training.data import preserved_randomness, sample_of
from hf_rrd.training.distributed import loader_of

logger = logging.get_logger(__name__)

ASKED = 1024  # training examples whose labels a teacher's logits are compared with

# How far a teacher that pulls hard has to come on the way from one answer for all to all answers right. A weaker one
# can do harm where its student could be better than it; its embedding, which pulls as hard as the task, is gentler.
MOSTLY = 0.75


@torch.no_grad()
def knows_classes(dataset: Any, trainer: Any) -> bool:
    """Whether the teacher's logits tell the labels of a training set, mostly; or else whether names have shown it.

    It has to do better than one answer for all: the most frequent class, of examples, tokens or frames; whether each
    of several labels is there; or the mean of numbers. A head of fresh weights has the classes' names, and another
    task may have as many: neither shall teach.
    """
    pair, accelerator = trainer.distillation.logits, trainer.accelerator
    if not hasattr(dataset, "__len__"):
        return pair.is_known
    rows: list[Tensor] = []
    kind = ONE
    with preserved_randomness():
        for batch in loader_of(sample_of(_labelled(dataset), ASKED, trainer.distillation.seed), trainer):
            with named_errors("asking the teacher for labels of `train_dataset`", batch), accelerator.autocast():
                batch = trainer._prepare_inputs(batch)
                logits, labels = trainer._teacher.read(batch).logits, batch.get("labels")
                if logits is None or not isinstance(labels, Tensor):
                    return pair.is_known
                kind, row = _compared(pair, logits, labels, batch)
            if row is None:
                return pair.is_known
            rows.append(accelerator.gather_for_metrics(row))
    if not rows:
        return pair.is_known
    found = torch.cat(rows).cpu().double()
    if kind == NUMBERS:
        answers, labels = found.chunk(2, 1)
        labels = labels.where(labels != -100, torch.nan)
        if labels.isnan().all():
            return pair.is_known
        error, spread = ((labels - each).square().nansum().item() for each in (answers, labels.nanmean(0)))
        if error < (1 - MOSTLY) * spread:
            return True
        what = f"miss the numbers of {int((~labels.isnan()).any(1).sum())} training examples by {error:.3g} in squares"
        said = f"{what}, their mean by {spread:.3g}"
    else:
        columns = 2 if kind == SEVERAL else found.shape[1] - 1
        right, classes = int(found[:, 0].sum()), found[:, 1:].sum(0).view(-1, columns)
        count, most = int(classes.sum()), int(classes.amax(1).sum())
        if count == 0:
            return pair.is_known
        if right > most and right - most >= MOSTLY * (count - most):
            return True
        of = "training examples" if count <= len(found) else "places in training examples"
        said = f"name the label of {right} of {count} {of}, the most frequent class that of {most}"
    logger.warning(
        f"The teacher's logits {said}: they are left out, and its embeddings alone teach. To learn them all the same, "
        "set kd_weight=1 and relational_weight=10."
    )
    return False


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

    Of numbers answers and labels; of classes how many answers are right, and how often each label is there.
    """
    kind = pair.kind_of(logits, batch)
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
