"""What all pictures share: text that can be read, classes that can be told apart, matplotlib as it was."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor

from hf_rrd.results.loss_plot import plot_losses
from hf_rrd.results.plots import plot_embeddings, plot_reliability, plot_similarities
from hf_rrd.results.style import COLORS, MARKERS


def embeddings(count: int = 30, width: int = 8, seed: int = 0, mean: float = 0.0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + mean


def classes(count: int = 30, classes: int = 3) -> Tensor:
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(5))


def log(lines: int = 12, kd: bool = True) -> list[dict[str, float]]:
    """Of a distillation: an evaluation each 4 lines, the summary at the end and a test after it."""
    history: list[dict[str, float]] = []
    for step in range(10, 10 * lines + 1, 10):
        terms = {"task_loss": 9.0 / step, "relational_loss": 6.0, "relational_kl": 0.5, "teacher_perplexity": 20.0}
        terms |= {"kd_loss": 2.0} if kd else {}
        terms |= {"loss": terms["task_loss"] + 60.0}
        history.append(terms | {"learning_rate": 0.1, "grad_norm": 1.0, "epoch": step / 40, "step": step})
        if step % 40 == 0:
            history.append({f"eval_{name}": value + 1 for name, value in terms.items()} | {"step": step})
            history[-1] |= {"eval_accuracy": 0.9, "eval_runtime": 1.0}
    history.append({"train_loss": 3.0, "train_runtime": 1.0, "step": 10 * lines})
    return [*history, {f"test_{name}": value + 2 for name, value in terms.items()} | {"step": 10 * lines}]


def predictions(count: int = 200, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    logits = 3 * torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), labels] += 2
    return logits, labels


FIGURES: dict[str, Callable[[], Figure]] = {
    "losses": lambda: plot_losses(log()),
    "similarities": lambda: plot_similarities(embeddings(), embeddings(width=5, seed=1), classes()),
    "embeddings": lambda: plot_embeddings(embeddings(), embeddings(width=5, seed=1), classes()),
    "many classes": lambda: plot_embeddings(embeddings(), embeddings(width=5, seed=1), torch.arange(30)),
    "reliability": lambda: plot_reliability(*predictions(), others={"teacher": predictions()[0] / 2}),
}


def draw(figure: Figure) -> Figure:
    figure.draw_without_rendering()
    return figure


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_colours_and_shapes_together_tell_72_classes_apart() -> None:
    assert len({(COLORS[index % 8], MARKERS[index % 9]) for index in range(72)}) == 72


def test_names_of_classes_come_from_a_list_or_a_dict_and_are_plain_text() -> None:
    labels, sets = torch.tensor([0, 1, 2, 3, -100, 0]), (embeddings(6), embeddings(6))
    names = ["$a$", "_b", "long name of a class, first", "long name of a class, second"]
    expected = ["no label", r"\$a\$", " _b", "long name of a clas…", "long name of a clas…"]
    assert legend_of(draw(plot_embeddings(*sets, labels, names))) == expected
    assert legend_of(plot_embeddings(*sets, labels, dict(enumerate(names)))) == expected
    assert legend_of(plot_embeddings(*sets, labels, names[:1])) == ["no label", r"\$a\$", "1", "2", "3"]


@pytest.mark.parametrize("name", FIGURES)
def test_text_is_dark_on_white_and_8_points_or_more_whatever_the_style(name: str) -> None:
    with matplotlib.rc_context({"text.color": "white", "axes.facecolor": "black", "figure.facecolor": "black"}):
        with matplotlib.rc_context({"font.size": 5, "xtick.color": "white", "axes.labelcolor": "white"}):
            figure = draw(FIGURES[name]())
    assert to_hex(figure.get_facecolor()) == "#ffffff"
    assert {to_hex(axes.get_facecolor()) for axes in figure.axes} == {"#ffffff"}
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() and text.get_visible()]
    assert {to_hex(text.get_color()) for text in texts} == {"#333333"}
    assert min(text.get_fontsize() for text in texts) >= 8
    assert 6.5 <= figure.get_figwidth() <= 8


@pytest.mark.parametrize("name", FIGURES)
def test_no_setting_of_matplotlib_and_of_the_random_numbers_is_touched(name: str) -> None:
    settings, state = dict(matplotlib.rcParams), (torch.get_rng_state(), np.random.get_state()[1])
    draw(FIGURES[name]())
    assert dict(matplotlib.rcParams) == settings
    assert torch.equal(torch.get_rng_state(), state[0]) and np.array_equal(np.random.get_state()[1], state[1])


@pytest.mark.slow
def test_a_fresh_process_imports_matplotlib_only_to_draw_and_neither_pyplot_nor_evaluate(tmp_path: Path) -> None:
    code = """
import sys, torch
import hf_rrd.trainer
assert not {"matplotlib", "evaluate", "sklearn"} & sys.modules.keys()
from hf_rrd.results.loss_plot import plot_losses
from hf_rrd.results.pictures import save_plots
from hf_rrd.results.plots import plot_embeddings, plot_reliability, plot_similarities
rows, labels = torch.eye(3), torch.arange(3)
figures = {"a": plot_losses([{"loss": 1.0, "step": 1}]), "b": plot_similarities(rows, rows, labels)}
figures |= {"c": plot_embeddings(rows, rows, labels), "d": plot_reliability(rows, labels)}
save_plots(figures, sys.argv[1])
assert not {"matplotlib.pyplot", "evaluate", "sklearn"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("name", FIGURES)
def test_without_matplotlib_the_error_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_rrd\[plots\]'"):
        FIGURES[name]()
