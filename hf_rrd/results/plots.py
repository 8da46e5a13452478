"""Pictures of a distillation: its losses, how alike the embeddings are, and how far confidence can be trusted.

Each function returns a `matplotlib.figure.Figure` that neither a window nor pyplot knows of. Needs the extra [plots].
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from torch import Tensor

from hf_rrd.results.reliability import NO_LABEL, calibration_error, reliability_bins

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Names = Mapping[int, str] | Sequence[str]
Points = list[tuple[float, float]]

PANELS = {
    "loss": "loss, weighted sum",
    "task_loss": "task loss, nats",
    "kd_loss": "kd loss, nats x T²",
    "relational_loss": "relational loss, nats",
    "relational_kl": "relational KL, nats",
    "teacher_perplexity": "teacher perplexity, keys",
}
"""The terms that are drawn, in order, with their units."""
MOST_POINTS = 1000
"""Of a line of training: more log lines are averaged in groups."""
MOST_MARKERS = 40
"""Of an evaluation."""
MOST_NAMED = 20
"""Classes that are told apart by name."""

INK, FAINT, GRID = "#333333", "#999999", "#dddddd"
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")  # 9 and 8 have no common divisor: 72 pairs
SERIES_COLORS = tuple(COLORS[place] for place in (0, 3, 2, 4, 5, 6, 1, 7))  # those that are dark on white first
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "////", "....", "xxxx")


def plot_losses(log_history: Sequence[Mapping[str, Any]]) -> "Figure":
    """The terms of the loss over the optimizer steps, a panel for each: lines of training, markers of evaluations.

    Args:
        log_history: `trainer.state.log_history`. A training value is the mean since the log line before.

    Returns:
        A panel for each term that was logged, all with the same steps. The units are those of a classifier.

    Raises:
        ValueError: No line has a step and a loss.
    """
    series = _series_of(log_history)
    terms = [term for term in PANELS if any(term in values for values in series.values())]
    if not terms:
        raise ValueError(
            f"`log_history` must have a line with a `step` and a loss, got {len(log_history)} lines without. Draw "
            "after training, with logging_steps below the number of steps."
        )
    rows = len(terms) // 2 + 1 if len(terms) % 2 else len(terms) // 2
    figure = _figure(7.2, 0.9 + (1.75 if rows > 1 else 2.4) * rows)
    cells = [place + 1 for place in range(2 * rows - len(terms), 2 * rows)]
    for term, cell in zip(terms, cells, strict=True):
        wide = cell == 2 and len(terms) % 2  # of an odd number the first has a row for itself
        shared = figure.axes[0] if figure.axes else None
        axes = figure.add_subplot(rows, 2, (1, 2) if wide else cell, sharex=shared)
        axes.set_ylabel(_loss_label(term, terms))
        lowest = cell > 2 * rows - 2
        axes.tick_params(labelbottom=bool(lowest or wide))
        axes.set_xlabel("optimizer step" if lowest else "")
        for index, (prefix, values) in enumerate(series.items()):
            _draw_series(axes, prefix, index, values.get(term, []))
        if term == "relational_kl":
            axes.set_ylim(bottom=0)  # there student and teacher agree
        axes.locator_params(axis="x", integer=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        _style(axes)
    figure.align_ylabels()
    _legend(figure, figure.axes, "outside upper center", columns=4)
    return _laid_out(figure)


def _series_of(log: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Points]]:
    """By prefix ("" of training), by term: (step, value) in the order of steps."""
    series: dict[str, dict[str, Points]] = {"": {}}
    for line in log:
        # A line has one prefix, that of its shortest key: a metric `eval_my_loss` belongs to `eval`, not to `eval_my`.
        ends = {key[: -len(term)] for key in line for term in PANELS if key == term or key.endswith(f"_{term}")}
        prefix = min(ends, key=len, default="")
        if "step" not in line or prefix == "train_":  # the summary at the end
            continue
        for term in PANELS:
            if isinstance(line.get(prefix + term), int | float):
                series.setdefault(prefix, {}).setdefault(term, []).append((line["step"], line[prefix + term]))
    for values in series.values():
        for points in values.values():
            points.sort(key=lambda point: point[0])
    return series


def _loss_label(term: str, terms: list[str]) -> str:
    if len(terms) == 1 and term == "loss":
        return "loss"
    # A relational loss without a divergence need not be a cross-entropy, and has no unit that is known here.
    return "relational loss" if term == "relational_loss" and "relational_kl" not in terms else PANELS[term]


def _draw_series(axes: "Axes", prefix: str, index: int, points: Points) -> None:
    if not points:
        return
    color, marker = SERIES_COLORS[index % 8], MARKERS[index % 9]
    values = np.array(points, dtype=float)  # (points, 2)
    if prefix:
        shown = values[_evenly(len(values), MOST_MARKERS)]
        label = _plain(prefix.rstrip("_")) + (
            f" ({len(shown)} of {len(values):,})" if len(shown) < len(values) else ""
        )
        axes.plot(*shown.T, ls="", marker=marker, ms=5.5, color=color, mec="white", mew=0.5, label=label, zorder=3)
        return
    together = math.ceil(len(values) / MOST_POINTS)
    groups = [values[first : first + together].mean(0) for first in range(0, len(values), together)]
    label = "training" + (f" (means of {together} log lines)" if together > 1 else "")
    dot = marker if len(groups) == 1 else ""
    axes.plot(*np.array(groups).T, ls="-", lw=1.5, marker=dot, ms=4, color=color, label=label)


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
    kept = order[_evenly(len(order), max_examples)]
    units = [rows[kept] / np.linalg.norm(rows[kept], axis=1, keepdims=True).clip(1e-12) for rows in sets]
    matrices = [rows @ rows.T for rows in units]  # each (kept, kept)
    limits, shared = _limits(matrices)
    figure = _figure(7.2, 4.6, "compressed")  # squares
    panels = list(figure.subplots(1, 2))
    for axes, matrix, title, (low, high) in zip(panels, matrices, ("student", "teacher"), limits, strict=True):
        axes.imshow(matrix, cmap="viridis", vmin=low, vmax=high, interpolation="antialiased", origin="upper")
        axes.set(title=title, xlabel="the same examples", xticks=[], yticks=[])
        _style(axes, grid=False)
    amount = f"{len(kept):,} examples" if len(kept) == len(order) else f"{len(kept):,} of {len(order):,} examples"
    panels[0].set_ylabel(f"{amount}, as given")
    if ids is not None:
        _mark_classes(panels, ids[kept], names, amount)
    for axes in panels[:1] if shared else panels:
        scale = "one scale for both" if shared else "a scale of its own"
        label = f"cosine similarity, {scale}\n(1st to 99th percentile of other pairs)"
        _color_bar(figure, axes.images[0], panels if shared else [axes], label, extend="both")
    return _laid_out(figure)


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
            shown[middle] = _name(names, int(label))
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
    method: str = "pca",
    max_examples: int = 2000,
) -> "Figure":
    """Each embedding set in a plane of its own; the student's is turned so that the two can be compared by eye.

    Args:
        student: (examples, any width), 2 or more examples.
        teacher: (examples, any width), the same examples in the same order.
        labels: (examples,), class ids; up to 20 classes are told apart by colour and shape, more by colour alone.
        names: The classes' names, by id; `model.config.id2label` is one.
        method: `pca`, the two directions of most variance, or `tsne`, which keeps neighbours and no distances.
        max_examples: How many to lay out and draw; of more an evenly spaced subset.

    Returns:
        Two scatter plots. The student's plane is rotated or reflected, never scaled, onto the teacher's by orthogonal
        Procrustes (Schönemann, 1966).

    Raises:
        ValueError: The sets or the labels do not match, an embedding is not finite, or the method is unknown.
    """
    if method not in LAYOUTS:
        raise ValueError(f"`method` must be one of {sorted(LAYOUTS)}, got {method!r}.")
    sets, ids = _checked(student, teacher, labels, max_examples)
    kept = _evenly(len(student), max_examples)
    ids = None if ids is None else ids[kept]
    figure = _figure(7.2, 4.0)
    planes = [LAYOUTS[method](rows[kept]) for rows in sets]  # each (kept, 2), centred
    left, _, right = np.linalg.svd(planes[0].T @ planes[1])
    planes[0] = planes[0] @ (left @ right)
    panels = list(figure.subplots(1, 2))
    for axes, plane, rows, whose in zip(panels, planes, sets, ("student", "teacher"), strict=True):
        turned = whose == "student"
        axes.set_title(f"{whose}, turned onto the teacher" if turned else whose)
        axes.set_aspect("equal", adjustable="datalim")
        shares = 100 * plane.var(0) / max(rows[kept].var(0).sum(), 1e-30)
        for axis, name in enumerate(("xlabel", "ylabel")):
            about = f"PCA axis {axis + 1}, {shares[axis]:.0f} % of variance"
            about = about if method == "pca" else f"t-SNE axis {axis + 1} (no unit)"
            axes.set(**{name: f"turned {about}" if turned else about})
        _draw_classes(axes, plane, ids, names)
        axes.locator_params(nbins=6)  # or the numbers of a wide scale touch
        _style(axes)
    _explain_classes(figure, panels, ids)
    return _laid_out(figure)


def _pca(rows: np.ndarray) -> np.ndarray:
    from sklearn.decomposition import PCA

    with np.errstate(invalid="ignore"):  # embeddings that are all the same have no variance to share out
        plane = PCA(min(2, *rows.shape), random_state=0).fit_transform(rows)
    return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))  # those of width 1 lie on a line


def _tsne(rows: np.ndarray) -> np.ndarray:
    from sklearn.manifold import TSNE

    start = _pca(rows)
    start *= 1e-4 / (start[:, 0].std() or 1.0)
    plane = TSNE(perplexity=min(30.0, (len(rows) - 1) / 3), init=start, random_state=0).fit_transform(rows)
    return plane - plane.mean(0)


LAYOUTS = {"pca": _pca, "tsne": _tsne}


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
            here, name = plane[ids == label], _name(names, int(label))
            axes.scatter(here[:, 0], here[:, 1], color=color, marker=marker, label=name, **look)


def _explain_classes(figure: "Figure", panels: list["Axes"], ids: np.ndarray | None) -> None:
    """A legend of few classes, a colour bar of many."""
    if ids is None:
        return
    if len(np.unique(ids)) > MOST_NAMED:
        label = f"class id ({len(np.unique(ids[ids != NO_LABEL])):,} classes)"
        _color_bar(figure, panels[0].collections[-1], panels, label)
        return
    names = panels[0].get_legend_handles_labels()[1]
    columns = max(1, min(10, 90 // (max(map(len, names)) + 6)))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(names) / columns))
    _legend(figure, panels[:1], "outside lower center", columns, markerscale=1.5)


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
        ValueError: As of `reliability_bins`; it says of which model.
    """
    models = [(name, logits), *(others or {}).items()]
    figure = _figure(6.5, 5.6)
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
        text = f"{_plain(model)}: ECE {100 * error:.1f} %"
        look: dict[str, Any] = {"marker": MARKERS[index % 9], "ms": 5, "lw": 1.5, "ls": dash, "clip_on": False}
        above.plot(100 * sure[filled], 100 * right[filled], color=color, label=text, **look)
        above.vlines(100 * sure[filled], *_wilson(right[filled], count[filled]), color=color, lw=0.8)
    above.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy, % (bars: 95 % interval)")
    below.set(xlabel="confidence, %", ylabel="examples")
    below.locator_params(axis="y", integer=True)
    below.yaxis.set_major_formatter("{x:,.0f}")
    for axes in (above, below):
        _style(axes)
    figure.align_ylabels()
    _legend(figure, [above], "outside upper center", columns=3, handlelength=3.5)
    return _laid_out(figure)


def _wilson(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of a share, in percent (Wilson, 1927)."""
    squared = 1.96**2
    middle = share + squared / (2 * count)
    reach = 1.96 * np.sqrt(share * (1 - share) / count + squared / (4 * count**2))
    return 100 * (middle - reach) / (1 + squared / count), 100 * (middle + reach) / (1 + squared / count)


def save_plots(figures: Mapping[str, "Figure"], folder: str | Path) -> list[Path]:
    """Write each figure to `<name>.png`, 150 dots per inch; the same figure gives the same bytes.

    Args:
        figures: By name, which becomes that of the file.
        folder: Made where there is none. A file of that name is replaced, at once and whole.

    Returns:
        The files, in the order of the figures.

    Raises:
        ValueError: A name is no plain file name; then nothing is written.
    """
    for name in figures:
        if not name or Path(name).name != name or "\\" in name:
            raise ValueError(f"a figure's name must be a plain file name without a folder, got {name!r}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        temporary = folder / f".{path.name}.{uuid4().hex}.tmp"
        try:
            figure.savefig(temporary, format="png", dpi=150, facecolor="white", metadata={"Software": None})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return paths


# ---- What the figures share ----


def _checked(
    student: Tensor, teacher: Tensor, labels: Tensor | None, max_examples: int
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Both embedding sets in float64 and the class ids."""
    if max_examples < 2:
        raise ValueError(f"`max_examples` must be at least 2, got {max_examples}.")
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher) or len(student) < 2:
        raise ValueError(
            "a picture needs two sets of the same 2 or more examples, each (examples, dim), got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    for whose, rows in (("student", student), ("teacher", teacher)):
        if not rows.isfinite().all():
            wrong = int((~rows.isfinite()).any(1).sum())
            raise ValueError(f"the {whose}'s embeddings must be finite, got nan or inf in {wrong} of {len(rows)}.")
    if labels is not None and (labels.shape != student.shape[:1] or labels.is_floating_point()):
        raise ValueError(
            f"labels must be class ids, one for each of {len(student)} examples, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}. Leave them out where an example has several."
        )
    sets = [rows.detach().cpu().double().numpy() for rows in (student, teacher)]
    return sets, None if labels is None else labels.detach().cpu().long().numpy()


def _evenly(count: int, most: int) -> np.ndarray:
    """Up to `most` of `count` places, evenly spaced, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def _name(names: Names | None, label: int) -> str:
    if label == NO_LABEL:
        return "no label"
    known = names if isinstance(names, Mapping) else dict(enumerate(names or ()))
    text = str(known.get(label, label))
    return _plain(text if len(text) <= 20 else f"{text[:19]}…")


def _plain(text: str) -> str:
    """So that matplotlib takes no dollars for a formula and leaves no entry out for its first underscore."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _figure(width: float, height: float, layout: Any = "constrained") -> "Figure":
    try:
        import matplotlib.figure
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError("pictures need matplotlib and scikit-learn: pip install 'hf_rrd[plots]'") from error
    return matplotlib.figure.Figure(figsize=(width, height), facecolor="white", layout=layout)


def _laid_out(figure: "Figure") -> "Figure":
    """With its layout fixed: made anew at each drawing, it would move a little each time."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _style(axes: "Axes", grid: bool = True) -> None:
    """Set on the artists: no style sheet of somebody's changes it, and it changes nobody's."""
    axes.set_facecolor("white")
    axes.tick_params(colors=INK, labelsize=8, width=0.6)
    for text, size in ((axes.title, 10), (axes.xaxis.label, 9), (axes.yaxis.label, 9)):
        text.set(color=INK, fontsize=size)
    for side, spine in axes.spines.items():
        spine.set(color=INK, lw=0.6, visible=side in ("left", "bottom"))
    axes.set_axisbelow(True)
    axes.grid(False)
    if grid:
        axes.grid(True, color=GRID, lw=0.5, ls="-", alpha=1)


def _color_bar(figure: "Figure", image: Any, panels: list["Axes"], label: str, extend: str = "neither") -> None:
    bar = figure.colorbar(image, ax=panels, location="bottom", extend=extend, aspect=20 * len(panels), pad=0.03)
    bar.set_label(label)
    bar.ax.locator_params(axis="x", nbins=5)
    _style(bar.ax, grid=False)
    bar.outline.set(color=INK, lw=0.6)


def _legend(figure: "Figure", panels: list["Axes"], place: Any, columns: int, **look: Any) -> None:
    """One legend outside of the data; what several panels share is in it once."""
    handles, texts = panels[0].get_legend_handles_labels()
    for axes in panels[1:]:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            if text not in texts:
                handles, texts = [*handles, handle], [*texts, text]
    look |= {"loc": place, "ncols": columns, "frameon": False, "fontsize": 9, "labelcolor": INK}
    figure.legend(handles, texts, **look)
