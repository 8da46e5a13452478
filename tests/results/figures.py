"""Embeddings, logs and figures to look at, and what is in a figure."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from hf_rrd.results.plots import plot_embeddings, plot_losses, plot_reliability, plot_similarities


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


def lines_of(axes: Any) -> dict[str, Any]:
    """The lines of a panel by their labels."""
    return {line.get_label(): line for line in axes.lines}


def matrices(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes[:2]]


def points(figure: Figure) -> list[np.ndarray]:
    """Where the points of each panel are, class after class."""
    return [np.concatenate([np.asarray(dots.get_offsets()) for dots in axes.collections]) for axes in figure.axes[:2]]


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]
