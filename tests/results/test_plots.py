"""The pictures: what is in them, what they refuse, and that they leave matplotlib as it was."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from torch import Tensor

from hf_rrd.results.loss_plot import plot_losses
from hf_rrd.results.pictures import save_plots
from hf_rrd.results.plots import plot_embeddings, plot_reliability, plot_similarities
from hf_rrd.results.reliability import calibration_error, reliability_bins
from hf_rrd.results.style import COLORS, MARKERS
from tests.builders import Images, trainer


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


# ---- Losses ----


@pytest.mark.parametrize(
    ("history", "labels"),
    [
        (
            log(),
            [
                "loss, weighted sum",
                "task loss, nats",
                "kd loss, nats x T²",
                "relational loss, nats",
                "relational KL, nats",
                "teacher perplexity, keys",
            ],
        ),
        ([{"loss": 1.0, "step": 1}], ["loss"]),
        ([{"loss": 1.0, "relational_loss": 3.0, "step": 1}], ["loss, weighted sum", "relational loss"]),
        ([{"eval_loss": 1.0, "eval_relational_kl": 3.0, "step": 1}], ["loss, weighted sum", "relational KL, nats"]),
    ],
)
def test_each_term_has_a_panel_with_its_unit_where_that_is_known(history: Any, labels: list[str]) -> None:
    assert [axes.get_ylabel() for axes in plot_losses(history).axes] == labels


@pytest.mark.parametrize("kd", [True, False])
def test_the_panels_share_the_steps_and_the_lowest_name_them(kd: bool) -> None:
    figure = draw(plot_losses([*log(kd=kd), {"loss": 60.0, "step": 500}]))  # where the others have no value
    assert {axes.get_xlim() for axes in figure.axes} == {figure.axes[0].get_xlim()}
    assert [axes.get_xlabel() for axes in figure.axes] == [""] * (len(figure.axes) - 2) + ["optimizer step"] * 2


def test_of_an_odd_number_of_terms_the_first_has_a_row_for_itself() -> None:
    wide, narrow, *_ = draw(plot_losses(log(kd=False))).axes
    assert wide.get_position().width > 1.9 * narrow.get_position().width


def test_training_is_a_line_and_each_evaluation_has_its_own_markers() -> None:
    lines = lines_of(plot_losses(log()).axes[1])
    assert [(line.get_linestyle(), line.get_marker()) for line in lines.values()] == [
        ("-", ""),
        ("None", MARKERS[1]),
        ("None", MARKERS[2]),
    ]
    assert list(lines) == ["training", "eval", "test"]
    assert lines["training"].get_xydata().tolist() == [[step, 9.0 / step] for step in range(10, 121, 10)]
    assert lines["eval"].get_xydata().tolist() == [[step, 9.0 / step + 1] for step in (40, 80, 120)]
    assert lines["test"].get_xydata().tolist() == [[120, 9.0 / 120 + 2]]


def test_the_legend_has_what_several_panels_share_once() -> None:
    assert legend_of(plot_losses(log())) == ["training", "eval", "test"]


def test_the_summary_at_the_end_is_no_evaluation() -> None:
    assert legend_of(plot_losses([{"loss": 1.0, "step": 1}, {"train_loss": 2.0, "step": 1}])) == ["training"]


def test_a_metric_that_is_called_a_loss_is_no_evaluation_of_its_own() -> None:
    history = [{"eval_loss": 1.0, "eval_my_loss": 7.0, "step": 1}, {"eval_small_loss": 2.0, "step": 1}]
    lines = lines_of(plot_losses(history).axes[0])
    assert {name: line.get_ydata().tolist() for name, line in lines.items()} == {"eval": [1.0], "eval_small": [2.0]}


def test_the_divergence_starts_at_0_where_student_and_teacher_agree() -> None:
    assert plot_losses(log()).axes[4].get_ylim()[0] == 0


def test_a_log_of_one_line_shows_a_dot() -> None:
    assert lines_of(plot_losses([{"loss": 1.0, "step": 1}]).axes[0])["training"].get_marker() == "o"


def test_lines_are_drawn_in_the_order_of_their_steps() -> None:
    figure = plot_losses([{"loss": 1.0, "step": 20}, {"loss": 2.0, "step": 10}])
    assert lines_of(figure.axes[0])["training"].get_xdata().tolist() == [10, 20]


def test_a_long_log_is_averaged_and_the_legend_says_so() -> None:
    history = [{"loss": float(step), "step": step} for step in range(2500)]
    history += [{"eval_loss": float(step), "step": step} for step in range(2500)]
    train, evaluated = plot_losses(history).axes[0].lines
    assert train.get_label() == "training (means of 3 log lines)"
    assert train.get_xydata().tolist() == [[step, step] for step in [*range(1, 2499, 3), 2499]]
    assert evaluated.get_label() == "eval (40 of 2,500)"
    assert evaluated.get_xdata()[[0, -1]].tolist() == [0, 2499]


def test_a_loss_that_is_not_finite_leaves_a_gap() -> None:
    history = [{"loss": value, "step": step} for step, value in enumerate([1.0, float("nan"), float("inf"), 2.0])]
    assert draw(plot_losses(history)).axes[0].get_ylim()[1] < 3


@pytest.mark.parametrize("history", [[], [{"loss": 1.0}], [{"train_loss": 1.0, "step": 3}], [{"step": 3}]])
def test_a_log_without_a_loss_at_a_step_is_an_error(history: Any) -> None:
    with pytest.raises(ValueError, match=f"got {len(history)} lines without. Draw after training"):
        plot_losses(history)


def test_the_log_of_a_run_is_drawn(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=Images(8), eval_strategy="steps", eval_steps=2, kd_weight=1.0)
    run.train()
    figure = draw(plot_losses(run.state.log_history))
    assert len(figure.axes) == 6 and legend_of(figure) == ["training", "eval"]


# ---- Similarities ----


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


# ---- Embeddings ----


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


def test_colours_and_shapes_together_tell_72_classes_apart() -> None:
    assert len({(COLORS[index % 8], MARKERS[index % 9]) for index in range(72)}) == 72


def test_more_classes_are_told_by_a_colour_bar_and_no_legend() -> None:
    figure = plot_embeddings(embeddings(), embeddings(), torch.arange(30) * 10)
    assert figure.legends == []
    assert figure.axes[2].get_xlabel() == "class id (30 classes)"
    assert figure.axes[0].collections[1].get_array().tolist() == [10 * label for label in range(30)]


def test_without_labels_there_is_one_colour_and_no_legend() -> None:
    figure = plot_embeddings(embeddings(), embeddings())
    assert figure.legends == [] and len(figure.axes) == 2 and len(figure.axes[0].collections) == 1


def test_names_of_classes_come_from_a_list_or_a_dict_and_are_plain_text() -> None:
    labels, sets = torch.tensor([0, 1, 2, 3, -100, 0]), (embeddings(6), embeddings(6))
    names = ["$a$", "_b", "long name of a class, first", "long name of a class, second"]
    expected = ["no label", r"\$a\$", " _b", "long name of a clas…", "long name of a clas…"]
    assert legend_of(draw(plot_embeddings(*sets, labels, names))) == expected
    assert legend_of(plot_embeddings(*sets, labels, dict(enumerate(names)))) == expected
    assert legend_of(plot_embeddings(*sets, labels, names[:1])) == ["no label", r"\$a\$", "1", "2", "3"]


# ---- Embedding sets that are awkward or wrong ----

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
            "teacher's embeddings must be finite, got nan or inf in 3 of 3",
        ),
        (embeddings(3), embeddings(3), {"labels": torch.zeros(2).long()}, r"each of 3 examples, got .* shape \(2,\)"),
        (embeddings(3), embeddings(3), {"labels": torch.zeros(3)}, "got torch.float32"),
        (embeddings(3), embeddings(3), {"max_examples": 1}, "`max_examples` must be at least 2, got 1"),
    ],
)
def test_an_error_says_what_came(plot: Any, student: Tensor, teacher: Tensor, more: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot(student, teacher, **more)


# ---- Reliability ----


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


# ---- Files, and matplotlib as it was ----


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


def test_pyplot_is_not_imported_and_matplotlib_only_to_draw(tmp_path: Path) -> None:
    code = """
import sys, torch
from hf_rrd.results.loss_plot import plot_losses
from hf_rrd.results.pictures import save_plots
from hf_rrd.results.plots import plot_embeddings, plot_reliability, plot_similarities
assert "matplotlib" not in sys.modules
rows, labels = torch.eye(3), torch.arange(3)
figures = {"a": plot_losses([{"loss": 1.0, "step": 1}]), "b": plot_similarities(rows, rows, labels)}
figures |= {"c": plot_embeddings(rows, rows, labels), "d": plot_reliability(rows, labels)}
save_plots(figures, sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("name", FIGURES)
def test_without_matplotlib_the_error_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_rrd\[plots\]'"):
        FIGURES[name]()
