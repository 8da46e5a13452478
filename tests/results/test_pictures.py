"""Figures as files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from hf_rrd.results.loss_plot import plot_losses
from hf_rrd.results.pictures import save_plots
from hf_rrd.results.plots import plot_embeddings, plot_reliability, plot_similarities


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


def test_the_same_figure_gives_the_same_bytes_again_and_made_anew(tmp_path: Path) -> None:
    once = {name: make() for name, make in FIGURES.items()}
    anew = {name: make() for name, make in FIGURES.items()}
    first, again, other = (
        [path.read_bytes() for path in save_plots(figures, tmp_path / str(place))]
        for place, figures in enumerate((once, once, anew))
    )
    assert first == again == other
    assert all(data.startswith(b"\x89PNG") and b"Software" not in data for data in first)


def test_files_are_named_by_their_figures_and_nothing_else_is_left(tmp_path: Path) -> None:
    paths = save_plots({"b": Figure(), "a": Figure()}, tmp_path / "deep" / "er")
    assert paths == [tmp_path / "deep" / "er" / "b.png", tmp_path / "deep" / "er" / "a.png"]
    assert sorted((tmp_path / "deep" / "er").iterdir()) == sorted(paths)


def test_a_file_stays_whole_when_its_figure_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = save_plots({"a": Figure()}, tmp_path)
    before = path.read_bytes()

    def fail(self: Figure, target: Path, **_: Any) -> None:
        target.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="full"):
        save_plots({"a": Figure()}, tmp_path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["", "../a", "a/b", "a\\b"])
def test_a_name_that_is_no_file_name_is_an_error_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="plain file name"):
        save_plots({"fine": Figure(), name: Figure()}, tmp_path)
    assert list(tmp_path.iterdir()) == []
