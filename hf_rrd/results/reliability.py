"""How far a classifier's confidence can be trusted: confidence against accuracy, in bins."""

import torch
from torch import Tensor

NO_LABEL = -100
"""The label of an example that is left out, as in torch's cross-entropy."""


@torch.no_grad()
def reliability_bins(logits: Tensor, labels: Tensor, bins: int = 15) -> dict[str, Tensor]:
    """Sort examples into bins by their confidence, the largest softmax probability, and see how many are right.

    The bins are of equal width and contain their upper edge: of 15, the first is 0 < confidence <= 1/15. Of classes
    that are level at the top, the prediction is the one that `torch.max` gives.

    Args:
        logits: (examples, classes), on any device; the bins are made on the CPU, in float64.
        labels: (examples,), class ids; examples of label -100 are left out.
        bins: How many, at least 1.

    Returns:
        Each (bins,): `confidence`, the mean in the bin, and `accuracy`, the share that is right, both 0 to 1 and nan
        where the bin is empty; `count`, how many examples are in it.

    Raises:
        ValueError: The shapes do not match, a label is no class, a logit is nan, no example has a label, or `bins` is
            below 1.

    Source: Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599, section 2.
    """
    if bins < 1:
        raise ValueError(f"`bins` must be at least 1, got {bins}. Try 15.")
    logits, labels = _labelled(logits, labels)
    confidence, predicted = logits.double().softmax(-1).max(-1)  # (labelled,)
    if confidence.isnan().any():
        raise ValueError(
            f"logits must say something of each example, got nan for {int(confidence.isnan().sum())} of "
            f"{len(confidence)}. Look at the model's outputs: a training that diverged gives nan."
        )
    inner_edges = torch.arange(1, bins, dtype=torch.double) / bins
    places = torch.bucketize(confidence, inner_edges)  # (labelled,), the upper edge included
    right = (predicted == labels).double()
    count = places.bincount(minlength=bins)
    return {
        "confidence": places.bincount(confidence, minlength=bins) / count,
        "accuracy": places.bincount(right, minlength=bins) / count,
        "count": count,
    }


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """The expected calibration error: the mean gap between confidence and accuracy of a bin, weighted by its examples.

    Args:
        logits: (examples, classes).
        labels: (examples,), class ids; examples of label -100 are left out.
        bins: How many bins of equal width.

    Returns:
        0 (as often right as confident, in each bin) to 1 (certain and always wrong).

    Raises:
        ValueError: As of `reliability_bins`.

    Source: Guo et al., arXiv:1706.04599, eq. 3.
    """
    found = reliability_bins(logits, labels, bins)
    gaps = (found["accuracy"] - found["confidence"]).abs().nan_to_num(0.0)  # (bins,)
    return float((gaps * found["count"]).sum() / found["count"].sum())


def _labelled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The examples that have a label, checked."""
    if logits.dim() != 2 or logits.shape[-1] < 1 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "reliability needs logits of shape (examples, classes) and labels of shape (examples,), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}. Flatten logits per token: `logits.flatten(0, -2)`, "
            "`labels.flatten()`."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be class ids, got {labels.dtype}. Of probabilities, take `labels.argmax(-1)`.")
    logits, labels = logits.cpu(), labels.cpu()
    kept = labels != NO_LABEL
    logits, labels = logits[kept], labels[kept]
    if not len(labels):
        raise ValueError(
            f"reliability needs at least 1 example with a label, got {len(kept)} of which all have {NO_LABEL}."
        )
    wrong = labels[(labels < 0) | (labels >= logits.shape[-1])]
    if len(wrong):
        raise ValueError(
            f"labels must be classes of the logits, 0 to {logits.shape[-1] - 1}, or {NO_LABEL}, got "
            f"{wrong[0].item()}. Use a model with the classes of the data."
        )
    return logits, labels
