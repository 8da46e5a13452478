"""Pictures of a finished student: how alike the embeddings are, and how far its confidence can be trusted.

Each function returns a `matplotlib.figure.Figure` that neither a window nor pyplot knows of. Needs the extra [plots].
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from hf_rrd.results.alignment import check_sets
from hf_rrd.results.embedding_log import evenly_spaced
from hf_rrd.results.reliability import NO_LABEL, calibration_error, reliability_bins
from hf_rrd.results.style import (
    COLORS,
    DASHES,
    FAINT,
    HATCHES,
    INK,
    MARKERS,
    SERIES_COLORS,
    Names,
    add_color_bar,
    add_legend,
    class_title,
    laid_out,
    new_figure,
    plain,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMED = 20
"""Classes that are told apart by name."""


def plot_similarities(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    names: Names | None = None,
    max_examples: int = 500,
) -> "Figure":
    """The cosine similarities of all pairs of examples, in the student's embeddings and in the teacher's.

    Args:
        student: (examples, any width), 2 or more examples.
        teacher: (examples, any width), the same examples in the same order.
        labels: (examples,), class ids: the examples are put in the order of their classes, else they keep theirs.
        names: The classes' names, by id; `model.config.id2label` is one.
        max_examples: How many to draw; of more a subset, evenly spaced in that order.

    Returns:
        Two matrices with one colour scale, from the 1st to the 99th percentile of both without their diagonals; with a
        scale each where one set would fill less than a third of it. The colour bar says which. Up to 20 classes are
        named, but for names that would overlap.

    Raises:
        ValueError: The sets or the labels do not match, or an embedding is not finite.
    """
    sets, ids = _checked(student, teacher, labels, max_examples)
    order = np.arange(len(student)) if ids is None else ids.argsort(kind="stable")
    kept = order[evenly_spaced(len(order), max_examples).numpy()]
    units = [rows[kept] / np.linalg.norm(rows[kept], axis=1, keepdims=True).clip(1e-12) for rows in sets]
    matrices = [rows @ rows.T for rows in units]  # each (kept, kept)
    limits, shared = _limits(matrices)
    figure = new_figure(7.2, 4.6, "compressed")  # squares
    panels = list(figure.subplots(1, 2))
    for axes, matrix, title, (low, high) in zip(panels, matrices, ("student", "teacher"), limits, strict=True):
        axes.imshow(matrix, cmap="viridis", vmin=low, vmax=high, interpolation="antialiased", origin="upper")
        axes.set(title=title, xlabel="the same examples", xticks=[], yticks=[])
        style(axes, grid=False)
    amount = f"{len(kept):,} examples" if len(kept) == len(order) else f"{len(kept):,} of {len(order):,} examples"
    panels[0].set_ylabel(f"{amount}, as given")
    if ids is not None:
        _mark_classes(panels, ids[kept], names, amount)
    for axes in panels[:1] if shared else panels:
        scale = "one scale for both" if shared else "a scale of its own"
        label = f"cosine similarity, {scale}\n(1st to 99th percentile of other pairs)"
        add_color_bar(figure, axes.images[0], panels if shared else [axes], label, extend="both")
    return laid_out(figure)


def _limits(matrices: list[np.ndarray]) -> tuple[list[tuple[float, float]], bool]:
    """The colours' limits of each matrix, and whether they are shared: unless one set would look flat."""
    pairs = [matrix[~np.eye(len(matrix), dtype=bool)] for matrix in matrices]
    ends = [np.percentile(values, (1, 99)) for values in (*pairs, np.concatenate(pairs))]
    *own, both = [(low, high) if high - low > 1e-3 else (low - 0.01, high + 0.01) for low, high in ends]
    shared = min(high - low for low, high in own) >= (both[1] - both[0]) / 3
    return ([both] * len(matrices) if shared else own), shared


def _mark_classes(panels: list["Axes"], ids: np.ndarray, names: Names | None, amount: str) -> None:
    """Names and thin borders of the classes of examples in order, where they are few."""
    classes, counts = np.unique(ids, return_counts=True)
    few = len(classes) <= MOST_NAMED
    panels[0].set_ylabel(f"{amount}, by class" + ("" if few else f" ({len(classes):,} classes)"))
    if not few:
        return
    ends = counts.cumsum()
    shown: dict[float, str] = {}
    for middle, label in zip(ends - counts / 2, classes, strict=True):
        if not shown or middle - max(shown) > len(ids) / 24:  # else the names would overlap
            shown[middle] = class_title(names, int(label))
    panels[0].set_yticks([middle - 0.5 for middle in shown], list(shown.values()))
    panels[0].tick_params(length=0)
    for axes in panels:
        for border in ends[:-1] - 0.5:
            axes.axhline(border, color="white", lw=0.5)
            axes.axvline(border, color="white", lw=0.5)


def plot_embeddings(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    names: Names | None = None,
    max_examples: int = 2000,
) -> "Figure":
    """Each embedding set in a plane of its own; the student's is turned so that the two can be compared by eye.

    Args:
        student, teacher, names: As in `plot_similarities`.
        labels: (examples,), class ids; up to 20 classes are told apart by colour and shape, more by colour alone.
        max_examples: How many to lay out and draw; of more an evenly spaced subset.

    Returns:
        Two scatter plots, each over the two directions of most variance (PCA). The student's plane is rotated or
        reflected, never scaled, onto the teacher's by orthogonal Procrustes (Schönemann, 1966).

    Raises:
        ValueError: The sets or the labels do not match, or an embedding is not finite.
    """
    sets, ids = _checked(student, teacher, labels, max_examples)
    kept = evenly_spaced(len(student), max_examples).numpy()
    ids = None if ids is None else ids[kept]
    figure = new_figure(7.2, 4.0)
    planes = [_plane(rows[kept]) for rows in sets]  # each (kept, 2), centred
    left, _, right = np.linalg.svd(planes[0].T @ planes[1])
    planes[0] = planes[0] @ (left @ right)
    panels = list(figure.subplots(1, 2))
    for axes, plane, rows, whose in zip(panels, planes, sets, ("student", "teacher"), strict=True):
        turned = whose == "student"
        axes.set_title(f"{whose}, turned onto the teacher" if turned else whose)
        axes.set_aspect("equal", adjustable="datalim")
        shares = 100 * plane.var(0) / max(rows[kept].var(0).sum(), 1e-30)
        for axis, name in enumerate(("xlabel", "ylabel")):
            axes.set(**{name: f"{'turned ' * turned}PCA axis {axis + 1}, {shares[axis]:.0f} % of variance"})
        _draw_classes(axes, plane, ids, names)
        axes.locator_params(nbins=6)  # or the numbers of a wide scale touch
        style(axes)
    _explain_classes(figure, panels, ids)
    return laid_out(figure)


def _plane(rows: np.ndarray) -> np.ndarray:
    """The rows, (examples, width), along their two directions of most variance, centred: (examples, 2)."""
    rows = rows - rows.mean(0)
    directions = np.linalg.svd(rows, full_matrices=False)[2][:2]  # (2, width), of unit length
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1)
    plane = rows @ (directions * np.sign(largest)).T  # a sign that does not depend on the machine
    return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))  # those of width 1 lie on a line


def _draw_classes(axes: "Axes", plane: np.ndarray, ids: np.ndarray | None, names: Names | None) -> None:
    look: dict[str, Any] = {"s": 30 if len(plane) <= 300 else 14, "ec": INK, "lw": 0.15}
    classes = np.unique(ids) if ids is not None else np.array([])
    if ids is None:
        axes.scatter(plane[:, 0], plane[:, 1], color=COLORS[0], **look)
    elif len(classes) > MOST_NAMED:
        unknown, known = plane[ids == NO_LABEL], plane[ids != NO_LABEL]
        axes.scatter(unknown[:, 0], unknown[:, 1], color=FAINT, **look)
        axes.scatter(known[:, 0], known[:, 1], c=ids[ids != NO_LABEL], cmap="viridis", **look)
    else:
        for index, label in enumerate(classes):
            color, marker = (FAINT, ".") if label == NO_LABEL else (COLORS[index % 8], MARKERS[index % 9])
            here, name = plane[ids == label], class_title(names, int(label))
            axes.scatter(here[:, 0], here[:, 1], color=color, marker=marker, label=name, **look)


def _explain_classes(figure: "Figure", panels: list["Axes"], ids: np.ndarray | None) -> None:
    """A legend of few classes, a colour bar of many."""
    if ids is None:
        return
    if len(np.unique(ids)) > MOST_NAMED:
        label = f"class id ({len(np.unique(ids[ids != NO_LABEL])):,} classes)"
        add_color_bar(figure, panels[0].collections[-1], panels, label)
        return
    names = panels[0].get_legend_handles_labels()[1]
    columns = max(1, min(10, 90 // (max(map(len, names)) + 6)))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(names) / columns))
    add_legend(figure, panels[:1], "outside lower center", columns, markerscale=1.5)


def plot_reliability(
    logits: Tensor, labels: Tensor, name: str = "student", others: Mapping[str, Tensor] | None = None, bins: int = 15
) -> "Figure":
    """A reliability diagram: how often a classifier is right, over how sure it is.

    Args:
        logits: (examples, classes).
        labels: (examples,), class ids; examples of label -100 are left out.
        name: Whose the logits are.
        others: Logits of other models, the teacher's say, for the same examples: (examples, any number of classes).
        bins: How many bins of equal width.

    Returns:
        Above, the accuracy over the mean confidence of each bin, with Wilson's 95 % interval: under the diagonal a
        model is surer than it is right. Below, how many examples each bin has. The legend has the expected calibration
        error.

    Raises:
        ValueError: What `reliability_bins` raises, with the name of the model.
    """
    models = [(name, logits), *(others or {}).items()]
    figure = new_figure(6.5, 5.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot((0, 100), (0, 100), color=FAINT, lw=1, ls=(0, (1, 1)), label="as often right as sure")
    for index, (model, outputs) in enumerate(models):
        try:
            found, error = reliability_bins(outputs, labels, bins), calibration_error(outputs, labels, bins)
        except ValueError as problem:
            raise ValueError(f"{model}: {problem}") from problem
        color, dash, hatch = SERIES_COLORS[index % 8], DASHES[index % 4], HATCHES[index % 4]
        sure, right, count = (found[key].numpy() for key in ("confidence", "accuracy", "count"))
        filled, width = count > 0, 80 / bins / len(models)
        left = (np.arange(bins) + 0.1) * 100 / bins + index * width
        below.bar(left, count, width, align="edge", color=color, ec="white", lw=0, hatch=hatch)
        text = f"{plain(model)}: ECE {100 * error:.1f} %"
        look: dict[str, Any] = {"marker": MARKERS[index % 9], "ms": 5, "lw": 1.5, "ls": dash, "clip_on": False}
        above.plot(100 * sure[filled], 100 * right[filled], color=color, label=text, **look)
        above.vlines(100 * sure[filled], *_wilson(right[filled], count[filled]), color=color, lw=0.8)
    above.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy, % (bars: 95 % interval)")
    below.set(xlabel="confidence, %", ylabel="examples")
    below.locator_params(axis="y", integer=True)
    below.yaxis.set_major_formatter("{x:,.0f}")
    for axes in (above, below):
        style(axes)
    figure.align_ylabels()
    add_legend(figure, [above], "outside upper center", columns=3, handlelength=3.5)
    return laid_out(figure)


def _wilson(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of a share, in percent (Wilson, 1927)."""
    squared = 1.96**2
    middle = share + squared / (2 * count)
    reach = 1.96 * np.sqrt(share * (1 - share) / count + squared / (4 * count**2))
    return 100 * (middle - reach) / (1 + squared / count), 100 * (middle + reach) / (1 + squared / count)


def _checked(
    student: Tensor, teacher: Tensor, labels: Tensor | None, max_examples: int
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Both embedding sets in float64 and the class ids."""
    if max_examples < 2:
        raise ValueError(f"`max_examples` must be at least 2, got {max_examples}.")
    check_sets(student, teacher)
    if labels is not None and (labels.shape != student.shape[:1] or labels.is_floating_point()):
        raise ValueError(
            f"labels must be class ids, one for each of {len(student)} examples, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}. Leave them out where an example has several."
        )
    sets = [rows.detach().cpu().double().numpy() for rows in (student, teacher)]
    return sets, None if labels is None else labels.detach().cpu().long().numpy()
