"""Pictures of a training and of a finished student: losses, likeness of the embeddings, reliability.

Each function returns a `matplotlib.figure.Figure` that neither a window nor pyplot knows of. Needs the extra [plots].
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_rrd.results.alignment import check_sets, evenly_spaced
from hf_rrd.results.reliability import NO_LABEL, calibration_error, reliability_bins
from hf_rrd.training.terms import LOGGED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Names = Mapping[int, str] | Sequence[str]

MOST_CLASSES = 20  # of more, none is told apart

INK, FAINT = "#333333", "#999999"
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#E69F00", "#F0E442"),  # Okabe and Ito
    *("#6A3D9A", "#8C564B"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LOOKS = [{"color": COLORS[index % 10], "marker": MARKERS[index % 9]} for index in range(90)]  # all pairs

STYLE: dict[str, Any] = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
STYLE |= {"axes.titlesize": 10, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8}
STYLE |= {"axes.edgecolor": INK, "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"axes.grid": True, "axes.axisbelow": True, "grid.color": "#dddddd", "grid.linewidth": 0.5}
STYLE |= {"legend.frameon": False, "legend.fontsize": 9, "legend.labelspacing": 0.2, "text.parse_math": False}
"""Settings of matplotlib; all others have their defaults. A dollar in a class's name is no formula."""

UNITS = {"loss": "weighted sum", "kd_loss": "nats x T²", "teacher_perplexity": "keys"}
UNITS |= dict.fromkeys(("relational_loss", "layer_loss"), "own unit")
"""By term of the loss, where it is not nats."""


@contextmanager
def _figure(width: float, height: float, layout: Any = "constrained") -> Iterator["Figure"]:
    """An empty figure of so many inches, to be drawn in meanwhile, in the style above, whatever the user's is."""
    try:
        import matplotlib.figure
        import matplotlib.style
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'hf_rrd[plots]'") from error
    with matplotlib.style.context(["default", STYLE]):
        figure = matplotlib.figure.Figure(figsize=(width, height), layout=layout)
        yield figure
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # made anew at each drawing, it would move a little each time


def plot_losses(log_history: Sequence[Mapping[str, Any]]) -> "Figure":
    """The terms of the loss over the optimizer steps, a panel for each: lines of training, markers of evaluations.

    Args:
        log_history: `trainer.state.log_history`. A training value is the mean since the log line before.

    Returns:
        A panel for each term that was logged, all with the same steps.

    Raises:
        ValueError: No line has a step and a loss.
    """
    series = _series_of(log_history)
    terms = [term for term in LOGGED if any(term == logged for _, logged in series)]
    if not terms:
        raise ValueError(
            f"`log_history` must have a line with a `step` and a loss, got {len(log_history)} lines, none of them "
            "such. Draw after training, with `logging_steps` no larger than the number of steps."
        )
    cells = terms if len(terms) % 2 == 0 else [terms[0], *terms]  # of an odd number the first has a row for itself
    rows: Any = [cells[start : start + 2] for start in range(0, len(cells), 2)]
    with _figure(7.2, 1.1 + 1.7 * len(rows)) as figure:
        panels = figure.subplot_mosaic(rows, sharex=True)
        for term, axes in panels.items():
            axes.set_ylabel(f"{term.replace('_', ' ')}, {UNITS.get(term, 'nats')}")
            axes.set_xlabel("optimizer step" if term in rows[-1] else "")
            axes.locator_params(axis="x", integer=True)
        legend = {}
        for index, prefix in enumerate(sorted({"", *(prefix for prefix, _ in series)})):
            look: dict[str, Any] = LOOKS[index] | ({"ls": "", "mec": "white"} if prefix else {"marker": ".", "ms": 3})
            name = prefix.rstrip("_") or "training"
            for term in terms:
                if (prefix, term) in series:
                    steps, values = zip(*series[prefix, term], strict=True)
                    legend[name] = panels[term].plot(steps, values, label=name, **look)[0]
        figure.legend(list(legend.values()), list(legend), loc="outside upper center", ncols=4)
    return figure


def _series_of(log: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """By prefix ("" of training) and term: each step with its value."""
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in log:
        # A line has one prefix, that of its shortest key: a metric `eval_my_loss` belongs to `eval`, not to `eval_my`.
        ends = {key[: -len(term)] for key in line for term in LOGGED if key == term or key.endswith(f"_{term}")}
        prefix = min(ends, key=len, default="")
        if "step" in line and prefix != "train_":  # that is the summary at the end
            for term in LOGGED:
                if prefix + term in line:
                    series.setdefault((prefix, term), []).append((line["step"], line[prefix + term]))
    return series


def plot_similarities(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, names: Names | None = None, max_examples: int = 500
) -> "Figure":
    """The cosine similarities of all pairs of examples, in the student's embeddings and in the teacher's.

    Each set is taken less its mean first, as in training: what all its embeddings have in common tells no two apart.

    Args:
        student, teacher: (examples, any width), the same 2 or more examples in the same order.
        labels: (examples,), class ids: the examples are put in the order of their classes, else they keep theirs.
        names: The classes' names, by id; `model.config.id2label` is one.
        max_examples: How many to draw; of more a subset, evenly spaced in that order.

    Returns:
        Two matrices with one colour scale, from the 1st to the 99th percentile of both without their diagonals. Up to
        20 classes are named.

    Raises:
        ValueError: The sets or the labels do not match, or an embedding is not finite.
    """
    sets, ids = _checked(student, teacher, labels, max_examples)
    order = np.arange(len(student)) if ids is None else ids.argsort(kind="stable")
    kept = order[evenly_spaced(len(order), max_examples).numpy()]
    centred = [(rows - rows.mean(0))[kept] for rows in sets]
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12) for rows in centred]
    matrices = [rows @ rows.T for rows in units]  # each (kept, kept)
    others = ~np.eye(len(kept), dtype=bool)
    low, high = np.percentile([matrix[others] for matrix in matrices], (1, 99))
    with _figure(7.2, 4.6, "compressed") as figure:
        panels = figure.subplots(1, 2)
        for axes, matrix, title in zip(panels, matrices, ("student", "teacher"), strict=True):
            image = axes.imshow(matrix, vmin=low, vmax=max(high, low + 1e-3))
            axes.set(title=title, xlabel="the same examples", xticks=[], yticks=[])
            axes.grid(False)
        how_many = f"{len(kept):,}" + (f" of {len(order):,}" if len(kept) < len(order) else "")
        panels[0].set_ylabel(f"{how_many} examples, {'as given' if ids is None else 'by class'}")
        classes, counts = np.unique([] if ids is None else ids[kept], return_counts=True)
        if 0 < len(classes) <= MOST_CLASSES:
            ends = counts.cumsum() - 0.5
            panels[0].set_yticks(ends - counts / 2, _class_names(names, classes))
            for border in ends[:-1]:
                for axes in panels:
                    axes.axhline(border, color="white", lw=0.5)
                    axes.axvline(border, color="white", lw=0.5)
        bar = figure.colorbar(image, ax=panels, location="bottom", extend="both", aspect=40, pad=0.03)
        bar.set_label(
            "cosine similarity, each set less its mean, one scale for both\n(1st to 99th percentile of other pairs)"
        )
    return figure


def plot_embeddings(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    names: Names | None = None,
    max_examples: int = 2000,
) -> "Figure":
    """Both embedding sets on the teacher's axes, so that the two can be compared by eye.

    Args:
        student, teacher, names: As in `plot_similarities`, whose errors this one has, too.
        labels: (examples,), class ids; up to 20 classes are told apart, by colour and shape.
        max_examples: How many to lay out and draw; of more an evenly spaced subset.

    Returns:
        Two scatter plots over the two directions in which the teacher varies most (PCA). The student's embeddings are
        mapped there by least squares, each half of the examples as the other half's fit has it, so that what is alike
        was not put there by the fit.
    """
    sets, ids = _checked(student, teacher, labels, max_examples)
    rows, target = (each[evenly_spaced(len(each), max_examples).numpy()] for each in sets)
    ids = None if ids is None else ids[evenly_spaced(len(ids), max_examples).numpy()]
    plane, shares = plane_of(target)
    mapped = _mapped(rows, plane)
    spread = np.square(plane).sum()
    found = 1 - np.square(plane - mapped).sum() / spread if spread > 0 else 0.0
    low, high = (end(np.concatenate([mapped, plane]), 0) for end in (np.min, np.max))  # each (2,)
    middle, half = (low + high) / 2, 0.55 * max(*(high - low), 1e-6)
    classes = np.unique([] if ids is None else ids)
    texts = _class_names(names, classes) if len(classes) <= MOST_CLASSES else []
    columns = min(5, 100 // (6 + max(map(len, texts), default=0)))  # of the legend: as many as fit, of so many letters
    with _figure(7.2, 4.2 + 0.2 * -(-len(texts) // columns), "compressed") as figure:
        panels = figure.subplots(1, 2)
        titles = (f"student, mapped there: R² {max(found, 0.0):.2f}", "teacher")
        for axes, points, title in zip(panels, (mapped, plane), titles, strict=True):
            axes.set(title=title, xlabel=f"teacher's axis 1, {100 * shares[0]:.0f} % of its variance")
            axes.set(
                xlim=middle[0] + np.array([-half, half]), ylim=middle[1] + np.array([-half, half]), aspect="equal"
            )
            axes.locator_params(nbins=6)  # or the numbers of a wide scale touch
            for index, (label, text) in enumerate(zip(classes, texts, strict=False)):
                look = {"color": FAINT, "marker": "."} if label == NO_LABEL else LOOKS[index]
                axes.scatter(*points[ids == label].T, s=14, lw=0, label=text, **look)
            if not texts:
                axes.scatter(*points.T, color=COLORS[0], s=14, lw=0)
        panels[0].set_ylabel(f"teacher's axis 2, {100 * shares[1]:.0f} % of its variance")
        if texts:
            handles = panels[0].get_legend_handles_labels()
            figure.legend(*handles, loc="outside lower center", ncols=columns, markerscale=1.5)
    return figure


def plane_of(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows, (examples, width), in the plane of most variance, (examples, 2), and the share of each axis, (2,)."""
    rows = np.asarray(rows, dtype=np.float64)
    rows = rows - rows.mean(0)
    directions = np.linalg.svd(rows, full_matrices=False)[2][:2]  # (2, width), of unit length
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1)
    plane = rows @ (directions * np.sign(largest)).T  # a sign that does not depend on the machine
    plane = np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))  # those of width 1 lie on a line
    return plane, np.square(plane).sum(0) / max(np.square(rows).sum(), 1e-30)


def _mapped(rows: np.ndarray, plane: np.ndarray) -> np.ndarray:
    """Rows, (examples, width), in a plane, (examples, 2), by least squares, each half by the fit of the other half.

    Of a half's rows so many directions count as there are examples in a quarter of it: of more, a fit would be noise.
    """
    mapped = np.zeros_like(plane)
    halves = np.arange(len(rows)) % 2
    for half in (halves == 0, halves == 1):
        mean, place = rows[~half].mean(0), plane[~half].mean(0)
        left, sizes, right = np.linalg.svd(rows[~half] - mean, full_matrices=False)
        count = min(max(len(left) // 4, 1), int((sizes > 1e-9 * sizes[0]).sum()))
        fit = left[:, :count].T @ (plane[~half] - place) / sizes[:count, None]  # (count, 2)
        mapped[half] = (rows[half] - mean) @ right[:count].T @ fit + place
    return mapped


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
        Above, the accuracy over the mean confidence of each bin: under the diagonal a model is surer than it is right.
        Below, how many examples each bin has. The legend has the expected calibration error.

    Raises:
        ValueError: What `reliability_bins` raises, with the name of the model.
    """
    models = {name: logits, **(others or {})}
    with _figure(6.5, 5.6) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot((0, 100), (0, 100), color=FAINT, lw=1, ls=":", label="as often right as sure")
        for index, (model, outputs) in enumerate(models.items()):
            try:
                found, error = reliability_bins(outputs, labels, bins), calibration_error(outputs, labels, bins)
            except ValueError as problem:
                raise ValueError(f"{model}: {problem}") from problem
            sure, right, count = (found[key].numpy() for key in ("confidence", "accuracy", "count"))  # each (bins,)
            filled, width, look = count > 0, 80 / bins / len(models), LOOKS[index]
            left = (np.arange(bins) + 0.1) * 100 / bins + index * width
            below.bar(left, count, width, align="edge", color=look["color"])
            text = f"{model}: ECE {100 * error:.1f} %"
            above.plot(100 * sure[filled], 100 * right[filled], label=text, clip_on=False, **look)
        above.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy, %")
        below.set(xlabel="confidence, %", ylabel="examples")
        figure.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _class_names(names: Names | None, labels: Any) -> list[str]:
    """The classes' names, at most 20 letters of each, or their numbers; which follow where two would look the same."""
    known = names if isinstance(names, Mapping) else dict(enumerate(names or ()))
    texts = ["no label" if label == NO_LABEL else str(known.get(int(label), label)) for label in labels]
    texts = [text if len(text) <= 20 else f"{text[:19]}…" for text in texts]
    texts = [
        text if texts.count(text) == 1 else f"{text} ({label})" for text, label in zip(texts, labels, strict=True)
    ]
    return [f" {text}" if text.startswith("_") else text for text in texts]  # matplotlib leaves such out of a legend


def _checked(student: Tensor, teacher: Tensor, labels: Tensor | None, max_examples: int) -> tuple[list[Any], Any]:
    """Both embedding sets in float64 and the class ids."""
    if max_examples < 2:
        raise ValueError(f"`max_examples` must be at least 2, got {max_examples}.")
    student, teacher = torch.as_tensor(student), torch.as_tensor(teacher)  # also of numpy
    labels = None if labels is None else torch.as_tensor(labels)
    check_sets(student, teacher)
    if labels is not None and (labels.shape != student.shape[:1] or labels.is_floating_point()):
        raise ValueError(
            f"labels must be class ids, one for each of {len(student)} examples, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}. Leave them out where an example has several."
        )
    sets = [rows.detach().cpu().double().numpy() for rows in (student, teacher)]
    return sets, None if labels is None else labels.detach().cpu().long().numpy()
