"""How far a classifier's confidence can be trusted: confidence against accuracy, in bins."""

import torch
from torch import Tensor

NO_LABEL = -100
"""The label of an example that is left out, as in torch's cross-entropy."""


@torch.no_grad()
def reliability_bins(logits: Tensor, labels: Tensor, bins: int = 15) -> dict[str, Tensor]:
    """Sort examples into bins by their confidence, the largest softmax probability, and see how many are right.

    The bins are of equal width and contain their upper edge: of 15, the first is 0 < confidence <= 1/15.

    Args:
        logits: (examples, classes), on any device; the bins are made on the CPU, in float64.
        labels: (examples,), class ids; examples of label -100 are left out.
        bins: How many, at least 1.

    Returns:
        Each (bins,): `confidence`, the mean in the bin, and `accuracy`, the share that is right, both 0 to 1 and nan
        where the bin is empty; `count`, how many examples are in it.

    Raises:
        ValueError: The shapes do not match, a label is no class, a logit is nan, there is no label, or `bins` < 1.

    Source: Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599, section 2.
    """
    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels)  # also of numpy
    if bins < 1:
        raise ValueError(f"`bins` must be at least 1, got {bins}. Try 15.")
    if logits.dim() != 2 or logits.shape[-1] < 1 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "reliability needs logits of shape (examples, classes) and labels of shape (examples,), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}. Flatten those per token."
        )
    if labels.is_floating_point():
        raise ValueError(f"labels must be class ids, got {labels.dtype}. Of probabilities, take `labels.argmax(-1)`.")
    known = labels.cpu() != NO_LABEL
    labels, logits = labels.cpu()[known], logits.cpu()[known].double()
    if not len(labels):
        raise ValueError(f"reliability needs at least 1 example with a label, got {len(known)} without.")
    wrong = labels[(labels < 0) | (labels >= logits.shape[1])].tolist()
    if wrong:
        raise ValueError(f"labels must be classes of the logits, 0 to {logits.shape[1] - 1}, or -100, got {wrong[0]}.")
    confidence, predicted = logits.softmax(1).max(1)  # (labelled,) each
    if bad := int(confidence.isnan().sum()):
        raise ValueError(f"logits must be finite, got nan for {bad} of {len(logits)} examples. Did training diverge?")
    inner_edges = torch.arange(1, bins, dtype=torch.double) / bins
    places = torch.bucketize(confidence, inner_edges)  # (labelled,), the upper edge included
    count = places.bincount(minlength=bins)
    return {
        "confidence": places.bincount(confidence, minlength=bins) / count,
        "accuracy": places.bincount((predicted == labels).double(), minlength=bins) / count,
        "count": count,
    }


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """The expected calibration error: the mean gap between confidence and accuracy of a bin, weighted by its examples.

    Args, errors and source (eq. 3) are those of `reliability_bins`.

    Returns:
        0 (as often right as confident, in each bin) to 1 (certain and always wrong).
    """
    found = reliability_bins(logits, labels, bins)
    gaps = (found["accuracy"] - found["confidence"]).abs().nan_to_num(0.0)  # (bins,)
    return float((gaps * found["count"]).sum() / found["count"].sum())
