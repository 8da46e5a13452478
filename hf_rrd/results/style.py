"""The look that all pictures share: colours, marks, legends, and figures that neither a window nor pyplot knows of."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_rrd.results.reliability import NO_LABEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Names = Mapping[int, str] | Sequence[str]

INK, FAINT, GRID = "#333333", "#999999", "#dddddd"
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")  # 9 and 8 have no common divisor: 72 pairs
SERIES_COLORS = tuple(COLORS[place] for place in (0, 3, 2, 4, 5, 6, 1, 7))  # those that are dark on white first
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "////", "....", "xxxx")


def class_title(names: Names | None, label: int) -> str:
    """A class's name, at most 20 letters of it, or its number."""
    if label == NO_LABEL:
        return "no label"
    known = names if isinstance(names, Mapping) else dict(enumerate(names or ()))
    text = str(known.get(label, label))
    return plain(text if len(text) <= 20 else f"{text[:19]}…")


def plain(text: str) -> str:
    """A text as it stands: matplotlib reads dollars as a formula, and leaves entries out that begin with `_`."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def new_figure(width: float, height: float, layout: Any = "constrained") -> "Figure":
    """An empty white figure of so many inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'hf_rrd[plots]'") from error
    return matplotlib.figure.Figure(figsize=(width, height), facecolor="white", layout=layout)


def laid_out(figure: "Figure") -> "Figure":
    """The figure with its layout fixed. Made anew at each drawing, it would move a little each time."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def style(axes: "Axes", grid: bool = True) -> None:
    """Set the look on the panel's own parts, so that no style sheet changes it and it changes no style sheet."""
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


def add_color_bar(figure: "Figure", image: Any, panels: list["Axes"], label: str, extend: str = "neither") -> None:
    """Add a colour bar below the panels."""
    bar = figure.colorbar(image, ax=panels, location="bottom", extend=extend, aspect=20 * len(panels), pad=0.03)
    bar.set_label(label)
    bar.ax.locator_params(axis="x", nbins=5)
    style(bar.ax, grid=False)
    bar.outline.set(color=INK, lw=0.6)


def add_legend(figure: "Figure", panels: list["Axes"], place: Any, columns: int, **look: Any) -> None:
    """Add one legend outside of the data, in which each entry stands once."""
    handles, texts = panels[0].get_legend_handles_labels()
    for axes in panels[1:]:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            if text not in texts:
                handles, texts = [*handles, handle], [*texts, text]
    look |= {"loc": place, "ncols": columns, "frameon": False, "fontsize": 9, "labelcolor": INK}
    figure.legend(handles, texts, **look)
