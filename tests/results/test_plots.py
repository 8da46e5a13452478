"""The pictures of embeddings and of reliability: what is in them, and what they refuse."""

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from sklearn.decomposition import PCA
from torch import Tensor

from hf_rrd.results.plots import plot_embeddings, plot_reliability, plot_similarities
from hf_rrd.results.reliability import calibration_error, reliability_bins
from tests.results.figures import (
    classes,
    draw,
    embeddings,
    legend_of,
    lines_of,
    matrices,
    points,
    predictions,
)

AWKWARD = {
    "2 examples": (embeddings(2), embeddings(2, seed=1), None),
    "2 examples of 2 classes": (embeddings(2), embeddings(2, seed=1), torch.tensor([0, 1])),
    "1 class": (embeddings(), embeddings(seed=1), torch.zeros(30).long()),
    "no known label": (embeddings(), embeddings(seed=1), torch.full((30,), -100)),
    "width 1": (embeddings(width=1), embeddings(seed=1), classes()),
    "both of width 1": (embeddings(width=1), embeddings(width=1), None),
    "all the same": (torch.ones(30, 4), embeddings(), classes()),
    "all 0": (torch.zeros(30, 4), torch.zeros(30, 4), classes()),
    "1,000 classes": (embeddings(1000), embeddings(1000, seed=1), torch.arange(1000)),
    "half precision with a gradient": (embeddings().bfloat16().requires_grad_(), embeddings().half(), classes()),
}


def test_the_matrices_are_cosines_of_the_examples_in_the_order_of_their_classes() -> None:
    student, teacher, labels = embeddings(), embeddings(width=5, seed=1), classes()
    order = [place for label in range(3) for place in range(30) if labels[place] == label]
    for matrix, rows in zip(matrices(plot_similarities(student, teacher, labels)), (student, teacher), strict=True):
        for row, left in enumerate(order):
            for column, right in enumerate(order):
                cosine = rows[left] @ rows[right] / rows[left].norm() / rows[right].norm()
                assert matrix[row, column] == pytest.approx(float(cosine), abs=1e-6)


def test_without_labels_the_examples_keep_their_order() -> None:
    figure = plot_similarities(embeddings(), embeddings(seed=1))
    rows = torch.nn.functional.normalize(embeddings().double())
    assert np.abs(matrices(figure)[0] - (rows @ rows.T).numpy()).max() < 1e-6
    assert figure.axes[0].get_ylabel() == "30 examples, as given"


def test_the_colours_have_one_scale_of_both_without_their_diagonals() -> None:
    figure = plot_similarities(embeddings(), embeddings(width=5, seed=1))
    off = ~np.eye(30, dtype=bool)
    expected = np.percentile([matrix[off] for matrix in matrices(figure)], (1, 99))
    for axes in figure.axes[:2]:
        assert axes.images[0].get_clim() == pytest.approx(tuple(expected))
    assert [axes.get_xlabel().split("\n")[0] for axes in figure.axes[2:]] == ["cosine similarity, one scale for both"]


def test_a_set_that_would_look_flat_gives_each_a_scale_of_its_own() -> None:
    figure = plot_similarities(embeddings(), embeddings(seed=1, mean=5.0))
    off = ~np.eye(30, dtype=bool)
    for axes, matrix in zip(figure.axes[:2], matrices(figure), strict=True):
        assert axes.images[0].get_clim() == pytest.approx(tuple(np.percentile(matrix[off], (1, 99))))
    labels = [axes.get_xlabel().split("\n")[0] for axes in figure.axes[2:]]
    assert labels == ["cosine similarity, a scale of its own"] * 2


def test_few_classes_have_borders_and_names_in_the_middle() -> None:
    labels = torch.tensor([2, 0, 0, 2, 2, 0, 2, -100])
    axes = plot_similarities(embeddings(8), embeddings(8), labels, {0: "cat", 2: "dog"}).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["no label", "cat", "dog"]
    assert list(axes.get_yticks()) == [0, 2, 5.5]
    assert [line.get_ydata()[0] for line in axes.lines[::2]] == [0.5, 3.5]


def test_a_name_that_would_overlap_another_is_left_out() -> None:
    labels = torch.tensor([0] * 98 + [1, 2])
    axes = plot_similarities(embeddings(100), embeddings(100), labels).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1"]


def test_many_classes_are_counted_and_not_named() -> None:
    axes = plot_similarities(embeddings(), embeddings(), torch.arange(30)).axes[0]
    assert len(axes.get_yticks()) == len(axes.lines) == 0
    assert axes.get_ylabel() == "30 examples, by class (30 classes)"


def test_of_many_examples_an_evenly_spaced_subset_is_drawn_and_counted() -> None:
    figure = plot_similarities(embeddings(), embeddings(seed=1), max_examples=4)
    rows = torch.nn.functional.normalize(embeddings()[[0, 10, 19, 29]].double())
    assert np.abs(matrices(figure)[0] - (rows @ rows.T).numpy()).max() < 1e-6
    assert figure.axes[0].get_ylabel() == "4 of 30 examples, as given"


def test_the_teachers_plane_is_scikit_learns_pca() -> None:
    teacher = embeddings(width=5, seed=1)
    expected = PCA(2, svd_solver="full").fit_transform(teacher.double().numpy())
    assert np.abs(points(plot_embeddings(embeddings(), teacher))[1] - expected).max() < 1e-6


def test_the_students_plane_is_turned_and_not_scaled() -> None:
    expected = PCA(2, svd_solver="full").fit_transform(embeddings().double().numpy())
    found = points(plot_embeddings(embeddings(), embeddings(width=5, seed=1)))[0]
    assert np.abs(found @ found.T - expected @ expected.T).max() < 1e-6


@pytest.mark.parametrize("reflected", [False, True])
def test_a_student_that_is_a_rotation_of_the_teacher_lies_on_it(reflected: bool) -> None:
    teacher = embeddings() * torch.arange(1, 9)
    rotation = torch.linalg.qr(embeddings(8)).Q
    rotation[0] *= -1 if reflected else 1
    left, right = points(plot_embeddings(teacher @ rotation + 3, teacher))
    assert np.abs(left - right).max() < 1e-3


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_angle_brings_the_student_nearer_to_the_teacher(seed: int) -> None:
    student, teacher = points(plot_embeddings(embeddings(), embeddings(width=5, seed=seed)))
    best = np.square(student - teacher).sum()
    for angle in np.linspace(0, 2 * np.pi, 50):
        for sign in (1, -1):
            turn = np.array([[np.cos(angle), -np.sin(angle)], [sign * np.sin(angle), sign * np.cos(angle)]])
            assert np.square(student @ turn - teacher).sum() >= best - 1e-9


def test_the_axes_say_how_much_of_the_variance_they_show() -> None:
    teacher = embeddings(width=5, seed=1) * torch.tensor([9, 5, 1, 1, 1])
    figure = plot_embeddings(embeddings(), teacher)
    shares = 100 * PCA(2, svd_solver="full").fit(teacher.double().numpy()).explained_variance_ratio_
    labels = [f"PCA axis {axis + 1}, {share:.0f} % of variance" for axis, share in enumerate(shares)]
    assert [figure.axes[1].get_xlabel(), figure.axes[1].get_ylabel()] == labels
    assert figure.axes[0].get_xlabel().startswith("turned PCA axis 1, ")
    assert figure.axes[0].get_title() == "student, turned onto the teacher"


def test_up_to_20_classes_have_a_colour_and_a_shape_that_no_other_has() -> None:
    figure = plot_embeddings(embeddings(40), embeddings(40), torch.arange(40) % 20)
    for axes in figure.axes[:2]:
        looks = {
            (to_hex(dots.get_facecolor()[0]), dots.get_paths()[0].vertices.tobytes()) for dots in axes.collections
        }
        assert len(looks) == 20
    assert legend_of(figure) == [str(label) for label in range(20)]


def test_more_classes_are_told_by_a_colour_bar_and_no_legend() -> None:
    figure = plot_embeddings(embeddings(), embeddings(), torch.arange(30) * 10)
    assert figure.legends == []
    assert figure.axes[2].get_xlabel() == "class id (30 classes)"
    assert figure.axes[0].collections[1].get_array().tolist() == [10 * label for label in range(30)]


def test_without_labels_there_is_one_colour_and_no_legend() -> None:
    figure = plot_embeddings(embeddings(), embeddings())
    assert figure.legends == [] and len(figure.axes) == 2 and len(figure.axes[0].collections) == 1


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
@pytest.mark.parametrize("plot", [plot_similarities, plot_embeddings])
@pytest.mark.parametrize("case", AWKWARD)
def test_awkward_sets_are_drawn(case: str, plot: Any) -> None:
    student, teacher, labels = AWKWARD[case]
    figure = draw(plot(student, teacher, labels))
    assert len(figure.axes) >= 2
    assert all(image.get_clim()[0] < image.get_clim()[1] for axes in figure.axes[:2] for image in axes.images)


@pytest.mark.parametrize("plot", [plot_similarities, plot_embeddings])
@pytest.mark.parametrize(
    ("student", "teacher", "more", "message"),
    [
        (embeddings(3), embeddings(4), {}, r"got \(3, 8\) and \(4, 8\)"),
        (embeddings(1), embeddings(1), {}, r"2 or more examples, each \(examples, dim\), got \(1, 8\)"),
        (embeddings(3)[0], embeddings(3)[0], {}, r"got \(8,\) and \(8,\)"),
        (
            embeddings(3),
            embeddings(3) * torch.nan,
            {},
            "`teacher` must be finite, got nan or infinity in 3 of 3",
        ),
        (embeddings(3), embeddings(3), {"labels": torch.zeros(2).long()}, r"each of 3 examples, got .* shape \(2,\)"),
        (embeddings(3), embeddings(3), {"labels": torch.zeros(3)}, "got torch.float32"),
        (embeddings(3), embeddings(3), {"max_examples": 1}, "`max_examples` must be at least 2, got 1"),
    ],
)
def test_an_error_says_what_came(plot: Any, student: Tensor, teacher: Tensor, more: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot(student, teacher, **more)


def test_the_diagram_shows_the_bins_and_the_legend_the_error() -> None:
    logits, labels = predictions()
    figure = plot_reliability(logits, labels, others={"teacher": logits / 2})
    for name, outputs in (("student", logits), ("teacher", logits / 2)):
        label = f"{name}: ECE {100 * calibration_error(outputs, labels):.1f} %"
        found = reliability_bins(outputs, labels)
        expected = 100 * torch.stack([found["confidence"], found["accuracy"]], dim=1)[found["count"] > 0]
        assert np.array_equal(lines_of(figure.axes[0])[label].get_xydata(), expected.numpy())
        assert label in legend_of(figure)
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy, % (bars: 95 % interval)", "examples"]
    assert figure.axes[1].get_xlabel() == "confidence, %"
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0, 0], [100, 100]]


def test_the_bars_count_the_examples_of_each_bin_side_by_side() -> None:
    logits, labels = predictions()
    models = (logits, logits / 2)
    bars = plot_reliability(logits, labels, others={"teacher": logits / 2}, bins=4).axes[1].patches
    heights = [bar.get_height() for bar in bars]
    assert heights == [count for each in models for count in reliability_bins(each, labels, 4)["count"].tolist()]
    assert [bar.get_x() for bar in bars] == pytest.approx([2.5, 27.5, 52.5, 77.5, 12.5, 37.5, 62.5, 87.5])
    assert {bar.get_width() for bar in bars} == {10}


def test_models_differ_in_shape_dash_and_hatch_beside_their_colour() -> None:
    logits, labels = predictions()
    above, below = plot_reliability(logits, labels, others={"teacher": logits, "other": logits}, bins=1).axes
    looks = [(line.get_marker(), line.get_linestyle()) for line in above.lines[1:]]
    assert len({marker for marker, _ in looks}) == len({dash for _, dash in looks}) == 3
    assert len({bar.get_hatch() for bar in below.patches}) == 3


def test_the_interval_is_wilsons() -> None:
    logits = torch.tensor([[2.0, 0.0]]).repeat(10, 1)  # of 10 in one bin 8 are right
    labels = torch.tensor([0] * 8 + [1] * 2)
    ends = plot_reliability(logits, labels).axes[0].collections[0].get_segments()[0][:, 1]
    assert ends.tolist() == pytest.approx([49.02, 94.33], abs=0.01)  # as in tables


@pytest.mark.parametrize("labels", [torch.tensor([0, -100]), torch.tensor([0, 0])])
def test_a_single_class_or_example_is_drawn(labels: Tensor) -> None:
    figure = draw(plot_reliability(torch.zeros(2, 1), labels, others={"wider": torch.zeros(2, 1000)}))
    assert legend_of(figure)[1:] == ["student: ECE 0.0 %", "wider: ECE 99.9 %"]


def test_an_error_says_of_which_model() -> None:
    logits, labels = predictions()
    with pytest.raises(ValueError, match=r"teacher: reliability needs logits .* got \(3, 5\)"):
        plot_reliability(logits, labels, others={"teacher": logits[:3]})
    with pytest.raises(ValueError, match="student: `bins` must be at least 1, got 0"):
        plot_reliability(logits, labels, bins=0)
