"""The pictures of a card: which there are, and their files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from hf_rrd import DistillationReport, compare_models
from hf_rrd.results.pictures import PICTURES, draw_pictures, place_of
from hf_rrd.results.plots import plane_of
from tests.builders import Images, tiny_vit
from tests.results.figures import FIGURES, draw, embeddings, log


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> DistillationReport:
    monkeypatch.setattr("hf_rrd.results.measure.MOST", 3)
    return compare_models(tiny_vit(), tiny_vit(width=24, seed=1), Images(40))


def test_the_same_facts_give_the_same_bytes_again(tmp_path: Path, report: DistillationReport) -> None:
    for folder in ("a", "b"):
        assert draw_pictures(tmp_path / folder, log(), report, None) == [*PICTURES]
    for name in PICTURES:
        first, again = ((tmp_path / folder / place_of(name)).read_bytes() for folder in ("a", "b"))
        assert first == again and first.startswith(b"\x89PNG") and b"Software" not in first


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_that_is_drawn_again_does_not_move(name: str) -> None:
    figure = FIGURES[name]()
    before = [axes.get_position().bounds for axes in draw(figure).axes]
    assert [axes.get_position().bounds for axes in draw(figure).axes] == before


def test_what_there_is_nothing_of_is_not_drawn_and_an_earlier_picture_is_removed(
    tmp_path: Path, report: DistillationReport
) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.png").write_bytes(b"")
    (tmp_path / place_of("reliability")).write_bytes(b"of an earlier card")
    assert draw_pictures(tmp_path, [], None, None) == []
    assert draw_pictures(tmp_path, [{"loss": 1.0, "step": 1}], None, None) == ["losses"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["losses.png", "mine.png"]
    del report.facts["student"]["accuracy"]
    assert draw_pictures(tmp_path, [], report, None) == ["similarities", "embeddings"]


@pytest.mark.parametrize(("scale", "is_drawn"), [(3.0, True), (1.0, False)])
def test_embeddings_whose_two_axes_show_less_than_a_fifth_are_not_drawn(
    scale: float, is_drawn: bool, tmp_path: Path, report: DistillationReport
) -> None:
    rows = embeddings(400, width=30, seed=1) * torch.tensor([scale, scale, *[1.0] * 28])
    share = float(plane_of(rows)[1].sum())
    assert (share >= 0.2) == is_drawn and 0.05 < share < 0.5
    report.tensors |= {"teacher_embedding": rows, "student_embedding": rows, "labels": torch.arange(400) % 4}
    report.tensors["student_logits"] = report.tensors["teacher_logits"] = torch.randn(400, 4)
    drawn = draw_pictures(tmp_path, [], report, None)
    assert drawn == ["similarities", *["embeddings"] * is_drawn, "reliability"]


def test_a_full_disk_costs_the_pictures_and_leaves_no_part_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Figure, target: Path, **_: Any) -> None:
        target.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Figure, "savefig", fail)
    warnings: list[str] = []
    monkeypatch.setattr("hf_rrd.results.pictures.logger.warning", warnings.append)
    assert draw_pictures(tmp_path, log(), None, None) == []
    assert list((tmp_path / "figures").iterdir()) == [] and warnings == ["The card has no pictures. the disk is full"]
