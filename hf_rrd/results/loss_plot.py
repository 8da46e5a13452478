"""The picture of a training: each term of the loss over the steps."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_rrd.results.embedding_log import evenly_spaced
from hf_rrd.results.style import MARKERS, SERIES_COLORS, add_legend, laid_out, new_figure, plain, style
from hf_rrd.training.terms import LOGGED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[float, float]]

TITLES = {"relational_kl": "relational KL"}
UNITS = {"loss": "weighted sum", "kd_loss": "nats x T²", "teacher_perplexity": "keys"}
"""By term, where the unit is not nats."""

MOST_POINTS, MOST_MARKERS = 1000, 40
"""Points of a line of training, where more log lines are averaged in groups, and markers of an evaluation."""


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
    terms = [term for term in LOGGED if any(term in values for values in series.values())]
    if not terms:
        raise ValueError(
            f"`log_history` must have a line with a `step` and a loss, got {len(log_history)} lines without. Draw "
            "after training, with logging_steps below the number of steps."
        )
    rows = len(terms) // 2 + 1 if len(terms) % 2 else len(terms) // 2
    figure = new_figure(7.2, 0.9 + (1.75 if rows > 1 else 2.4) * rows)
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
        style(axes)
    figure.align_ylabels()
    add_legend(figure, figure.axes, "outside upper center", columns=4)
    return laid_out(figure)


def _series_of(log: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Points]]:
    """By prefix ("" of training), by term: (step, value) in the order of steps."""
    series: dict[str, dict[str, Points]] = {"": {}}
    for line in log:
        # A line has one prefix, that of its shortest key: a metric `eval_my_loss` belongs to `eval`, not to `eval_my`.
        ends = {key[: -len(term)] for key in line for term in LOGGED if key == term or key.endswith(f"_{term}")}
        prefix = min(ends, key=len, default="")
        if "step" not in line or prefix == "train_":  # the summary at the end
            continue
        for term in LOGGED:
            if isinstance(line.get(prefix + term), int | float):
                series.setdefault(prefix, {}).setdefault(term, []).append((line["step"], line[prefix + term]))
    for values in series.values():
        for points in values.values():
            points.sort(key=lambda point: point[0])
    return series


def _loss_label(term: str, terms: list[str]) -> str:
    title = TITLES.get(term, term.replace("_", " "))
    # A relational loss without a divergence need not be a cross-entropy, and has no unit that is known here.
    if terms == ["loss"] or (term == "relational_loss" and "relational_kl" not in terms):
        return title
    return f"{title}, {UNITS.get(term, 'nats')}"


def _draw_series(axes: "Axes", prefix: str, index: int, points: Points) -> None:
    if not points:
        return
    color, marker = SERIES_COLORS[index % 8], MARKERS[index % 9]
    values = np.array(points, dtype=float)  # (points, 2)
    if prefix:
        shown = values[evenly_spaced(len(values), MOST_MARKERS).numpy()]
        label = plain(prefix.rstrip("_")) + (f" ({len(shown)} of {len(values):,})" if len(shown) < len(values) else "")
        axes.plot(*shown.T, ls="", marker=marker, ms=5.5, color=color, mec="white", mew=0.5, label=label, zorder=3)
        return
    together = math.ceil(len(values) / MOST_POINTS)
    groups = [values[first : first + together].mean(0) for first in range(0, len(values), together)]
    label = "training" + (f" (means of {together} log lines)" if together > 1 else "")
    dot = marker if len(groups) == 1 else ""
    axes.plot(*np.array(groups).T, ls="-", lw=1.5, marker=dot, ms=4, color=color, label=label)
