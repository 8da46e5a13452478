"""What all pictures share: text that can be read, classes that can be told apart, matplotlib as it was."""

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from hf_rrd.results.plots import plot_embeddings
from hf_rrd.results.style import COLORS, MARKERS
from tests.results.figures import (
    FIGURES,
    draw,
    embeddings,
    legend_of,
)


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
from hf_rrd.results.pictures import draw_pictures
rows, labels = torch.eye(3), torch.arange(3)
tensors = {f"{whose}_{what}": rows for whose in ("student", "teacher") for what in ("embedding", "logits")}
report = hf_rrd.DistillationReport({"student": {"accuracy": 1.0}}, tensors | {"labels": labels})
assert len(draw_pictures(sys.argv[1], [{"loss": 1.0, "step": 1}], report, None)) == 4
assert "matplotlib" in sys.modules and not {"matplotlib.pyplot", "evaluate", "sklearn"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert len(list((tmp_path / "figures").iterdir())) == 4


@pytest.mark.parametrize("name", FIGURES)
def test_without_matplotlib_the_error_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_rrd\[plots\]'"):
        FIGURES[name]()
