"""Whether a teacher knows the classes that the student learns: shown by its answers, where there are labels."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from hf_rrd.errors import named_errors
from hf_rrd.losses.logits import NUMBERS, ONE, SEVERAL
from hf_rrd.models.logits import LogitPair
from hf_rrd.models.teacher import Teacher
from hf_rrd.training.data import preserved_randomness, sample_of
from hf_rrd.training.distributed import every_example

logger = logging.get_logger(__name__)

ASKED = 1024
"""Training examples whose labels a teacher's logits are compared with."""

MOSTLY = 0.75
"""How far a teacher that pulls hard has to come on the way from one answer for all to all answers right.

A weaker one can do harm where its student could be better than it; its embedding alone, which pulls as hard as the
task, is the gentler way.
"""


@torch.no_grad()
def knows_classes(
    dataset: Any,
    seed: int,
    teacher: Teacher,
    pair: LogitPair,
    loader_of: Callable[[Any], Any],
    prepare: Callable[[Any], Any],
    accelerator: Any,
    args: Any,
) -> bool:
    """Whether a teacher's logits tell the labels, mostly; where nothing tells, whether names have shown it.

    That answer is the most frequent class, of examples, tokens or frames; whether each of several labels is there; or
    the mean of numbers. A head of fresh weights has the classes' names, and another task may have as many: neither
    shall teach.

    Args:
        dataset: The training set, of which up to `ASKED` examples are read.
        seed: Which.
        teacher, pair: Of the run.
        loader_of, prepare: From examples to a loader, and from a batch to the same on this process's device.
        accelerator, args: Of the trainer.
    """
    if dataset is None or not hasattr(dataset, "__len__"):
        return pair.is_known
    rows: list[Tensor] = []
    kind = ONE
    with preserved_randomness():
        with every_example(accelerator, args):
            loader = loader_of(sample_of(dataset, ASKED, seed))
        accelerator._dataloaders.remove(loader)  # or it is kept while the run lasts
        for batch in loader:
            with named_errors("asking the teacher for labels of `train_dataset`", batch), accelerator.autocast():
                batch = prepare(batch)
                logits, labels = teacher.read(batch).logits, batch.get("labels")
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
