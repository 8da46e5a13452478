"""The pictures: what is in them, what they refuse, and the look that they share."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from sklearn.decomposition import PCA
from torch import Tensor

from hf_rrd.results.plots import (
    COLORS,
    MARKERS,
    plot_embeddings,
    plot_losses,
    plot_reliability,
    plot_similarities,
)
from hf_rrd.results.reliability import calibration_error, reliability_bins
from tests.builders import Images, trainer
from tests.results.figures import (
    FIGURES,
    classes,
    draw,
    embeddings,
    legend_of,
    lines_of,
    log,
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
    "arrays of numpy": (embeddings().numpy(), embeddings(seed=1).numpy(), classes().numpy()),
    "half precision with a gradient": (embeddings().bfloat16().requires_grad_(), embeddings().half(), classes()),
}


def test_the_matrices_are_cosines_of_the_examples_in_the_order_of_their_classes() -> None:
    student, teacher, labels = embeddings(mean=5.0), embeddings(width=5, seed=1), classes()
    order = [place for label in range(3) for place in range(30) if labels[place] == label]
    for matrix, rows in zip(matrices(plot_similarities(student, teacher, labels)), (student, teacher), strict=True):
        rows = rows - rows.mean(0)
        for row, left in enumerate(order):
            for column, right in enumerate(order):
                cosine = rows[left] @ rows[right] / rows[left].norm() / rows[right].norm()
                assert matrix[row, column] == pytest.approx(float(cosine), abs=1e-6)


def test_without_labels_the_examples_keep_their_order() -> None:
    figure = plot_similarities(embeddings(), embeddings(seed=1))
    rows = torch.nn.functional.normalize(embeddings().double() - embeddings().double().mean(0))
    assert np.abs(matrices(figure)[0] - (rows @ rows.T).numpy()).max() < 1e-6
    assert figure.axes[0].get_ylabel() == "30 examples, as given"


def test_the_colours_have_one_scale_of_both_without_their_diagonals() -> None:
    figure = plot_similarities(embeddings(), embeddings(width=5, seed=1))
    off = ~np.eye(30, dtype=bool)
    expected = np.percentile([matrix[off] for matrix in matrices(figure)], (1, 99))
    for axes in figure.axes[:2]:
        assert axes.images[0].get_clim() == pytest.approx(tuple(expected))
    (label,) = [axes.get_xlabel().split("\n")[0] for axes in figure.axes[2:]]
    assert label == "cosine similarity, each set less its mean, one scale for both"


def test_few_classes_have_borders_and_names_in_the_middle() -> None:
    labels = torch.tensor([2, 0, 0, 2, 2, 0, 2, -100])
    axes = plot_similarities(embeddings(8), embeddings(8), labels, {0: "cat", 2: "dog"}).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["no label", "cat", "dog"]
    assert list(axes.get_yticks()) == [0, 2, 5.5]
    assert [line.get_ydata()[0] for line in axes.lines[::2]] == [0.5, 3.5]


def test_many_classes_are_not_told_apart() -> None:
    axes = plot_similarities(embeddings(), embeddings(), torch.arange(30)).axes[0]
    assert len(axes.get_yticks()) == len(axes.lines) == 0
    assert axes.get_ylabel() == "30 examples, by class"
    figure = plot_embeddings(embeddings(), embeddings(), torch.arange(30))
    assert figure.legends == [] and len(figure.axes[0].collections) == 1


def test_of_many_examples_an_evenly_spaced_subset_is_drawn_and_counted() -> None:
    figure = plot_similarities(embeddings(), embeddings(seed=1), max_examples=4)
    rows = torch.nn.functional.normalize((embeddings() - embeddings().mean(0))[[0, 9, 19, 29]].double())
    assert np.abs(matrices(figure)[0] - (rows @ rows.T).numpy()).max() < 1e-6
    assert figure.axes[0].get_ylabel() == "4 of 30 examples, as given"


def test_the_teachers_plane_is_scikit_learns_pca() -> None:
    teacher = embeddings(width=5, seed=1)
    expected = PCA(2, svd_solver="full").fit_transform(teacher.double().numpy())
    assert np.abs(points(plot_embeddings(embeddings(), teacher))[1] - expected).max() < 1e-6


@pytest.mark.parametrize("reflected", [False, True])
def test_a_student_that_is_a_rotation_of_the_teacher_in_another_scale_lies_on_it(reflected: bool) -> None:
    teacher = embeddings(200) * torch.arange(1, 9)
    rotation = torch.linalg.qr(embeddings(8)).Q
    rotation[0] *= -1 if reflected else 1
    figure = plot_embeddings(0.1 * teacher @ rotation + 3, teacher)
    left, right = points(figure)
    assert np.abs(left - right).max() < 1e-4
    assert figure.axes[0].get_title() == "student, mapped there: R² 1.00"
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim(), "the same axes"


def test_each_half_of_the_student_is_mapped_by_the_fit_of_the_other() -> None:
    student, teacher = embeddings(80, width=3).numpy(), embeddings(80, width=5, seed=1).numpy()
    mapped, plane = points(plot_embeddings(torch.tensor(student), torch.tensor(teacher)))
    for own, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        inputs = np.column_stack([student, np.ones(80)]).astype(float)
        fit = np.linalg.lstsq(inputs[other], plane[other], rcond=None)[0]
        assert np.abs(inputs[own] @ fit - mapped[own]).max() < 1e-6
    left = 1 - np.square(plane - mapped).sum() / np.square(plane).sum()
    assert left < 0.1, "they have nothing in common"


def test_a_wide_student_with_nothing_in_common_is_not_fitted_to_its_teacher() -> None:
    student, teacher = embeddings(200, width=300), embeddings(200, width=5, seed=1)
    figure = plot_embeddings(student, teacher)
    assert figure.axes[0].get_title() == "student, mapped there: R² 0.00"
    in_sample = np.linalg.lstsq(student.numpy(), points(figure)[1], rcond=None)[0]
    assert np.abs(student.numpy() @ in_sample - points(figure)[1]).max() < 1e-3, "a fit of all would be perfect"


def test_the_axes_say_how_much_of_the_variance_they_show() -> None:
    teacher = embeddings(width=5, seed=1) * torch.tensor([9, 5, 1, 1, 1])
    figure = plot_embeddings(embeddings(), teacher)
    shares = 100 * PCA(2, svd_solver="full").fit(teacher.double().numpy()).explained_variance_ratio_
    labels = [f"teacher's axis {axis + 1}, {share:.0f} % of its variance" for axis, share in enumerate(shares)]
    assert [axes.get_xlabel() for axes in figure.axes] == [labels[0]] * 2
    assert figure.axes[0].get_ylabel() == labels[1] and figure.axes[1].get_title() == "teacher"


def test_ten_classes_have_ten_colours() -> None:
    figure = plot_embeddings(embeddings(40), embeddings(40), torch.arange(40) % 10)
    assert len({to_hex(dots.get_facecolor()[0]) for dots in figure.axes[0].collections}) == 10


def test_up_to_20_classes_have_a_colour_and_a_shape_that_no_other_has() -> None:
    figure = plot_embeddings(embeddings(40), embeddings(40), torch.arange(40) % 20)
    for axes in figure.axes[:2]:
        looks = {
            (to_hex(dots.get_facecolor()[0]), dots.get_paths()[0].vertices.tobytes()) for dots in axes.collections
        }
        assert len(looks) == 20
    assert legend_of(figure) == [str(label) for label in range(20)]


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
        (embeddings(1), embeddings(1), {}, r"2 or more examples, each .*, got \(1, 8\)"),
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
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy, %", "examples"]
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


def test_models_differ_in_shape_beside_their_colour() -> None:
    logits, labels = predictions()
    above, below = plot_reliability(logits, labels, others={"teacher": logits, "other": logits}, bins=1).axes
    assert len({line.get_marker() for line in above.lines[1:]}) == 3
    assert len({bar.get_facecolor() for bar in below.patches}) == 3


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


# ---- The losses ----


@pytest.mark.parametrize(
    ("history", "labels"),
    [
        (
            log(),
            [
                "loss, weighted sum",
                "task loss, nats",
                "kd loss, nats x T²",
                "relational loss, own unit",
                "relational kl, nats",
                "teacher perplexity, keys",
            ],
        ),
        ([{"loss": 1.0, "step": 1}], ["loss, weighted sum"]),
        ([{"eval_loss": 1.0, "eval_relational_kl": 3.0, "step": 1}], ["loss, weighted sum", "relational kl, nats"]),
    ],
)
def test_each_term_has_a_panel_with_its_unit(history: Any, labels: list[str]) -> None:
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
        ("-", "."),
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


def test_a_log_of_one_line_shows_a_dot() -> None:
    assert lines_of(plot_losses([{"loss": 1.0, "step": 1}]).axes[0])["training"].get_marker() == "."


def test_a_loss_that_is_not_finite_leaves_a_gap() -> None:
    history = [{"loss": value, "step": step} for step, value in enumerate([1.0, float("nan"), float("inf"), 2.0])]
    assert draw(plot_losses(history)).axes[0].get_ylim()[1] < 3


@pytest.mark.parametrize("history", [[], [{"loss": 1.0}], [{"train_loss": 1.0, "step": 3}], [{"step": 3}]])
def test_a_log_without_a_loss_at_a_step_is_an_error(history: Any) -> None:
    with pytest.raises(ValueError, match=f"got {len(history)} lines, none of them such. Draw after training"):
        plot_losses(history)


def test_the_log_of_a_run_is_drawn(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=Images(8), eval_strategy="steps", eval_steps=2, kd_weight=1.0)
    run.train()
    figure = draw(plot_losses(run.state.log_history))
    assert len(figure.axes) == 6 and legend_of(figure) == ["training", "eval"]


# ---- The look that all share ----


def test_colours_and_shapes_together_tell_90_classes_apart() -> None:
    assert len({(COLORS[index % 10], MARKERS[index % 9]) for index in range(90)}) == 90


def test_names_of_classes_come_from_a_list_or_a_dict_and_are_plain_text() -> None:
    labels, sets = torch.tensor([0, 1, 2, 3, -100, 0]), (embeddings(6), embeddings(6))
    names = ["$a$", "_b", "long name of a class, first", "long name of a class, second"]
    expected = ["no label", "$a$", " _b", "long name of a clas… (2)", "long name of a clas… (3)"]
    assert legend_of(draw(plot_embeddings(*sets, labels, names))) == expected
    assert legend_of(plot_embeddings(*sets, labels, dict(enumerate(names)))) == expected
    assert legend_of(plot_embeddings(*sets, labels, names[:1])) == ["no label", "$a$", "1", "2", "3"]


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


LONG = [f"a class with a long name, the one of number {number}" for number in range(20)]
SHAPES = {"wide": (20.0, 1.0), "tall": (1.0, 20.0), "square": (1.0, 1.0)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 10, 20])
def test_no_text_is_cut_off_at_an_edge(count: int, shape: str) -> None:
    labels, teacher = torch.arange(200) % count, embeddings(200, width=3, seed=1) * torch.tensor([*SHAPES[shape], 0.5])
    for figure in (plot(embeddings(200), teacher, labels, LONG) for plot in (plot_embeddings, plot_similarities)):
        box = draw(figure).get_tightbbox()  # in inches, of all that is drawn
        assert box.x0 > -0.01 and box.y0 > -0.01
        assert box.x1 < figure.get_figwidth() + 0.01 and box.y1 < figure.get_figheight() + 0.01


@pytest.mark.parametrize("name", FIGURES)
def test_no_setting_of_matplotlib_and_of_the_random_numbers_is_touched(name: str) -> None:
    settings, state = dict(matplotlib.rcParams), (torch.get_rng_state(), np.random.get_state()[1])
    draw(FIGURES[name]())
    assert dict(matplotlib.rcParams) == settings
    assert torch.equal(torch.get_rng_state(), state[0]) and np.array_equal(np.random.get_state()[1], state[1])


@pytest.mark.slow
def test_a_fresh_process_imports_matplotlib_only_to_draw_and_neither_pyplot_nor_evaluate(tmp_path: Path) -> None:
    code = """
import sys, torch, transformers.trainer
theirs = {*sys.modules}  # transformers 5.0 has scikit-learn among them
import hf_rrd.trainer
assert not {"matplotlib", "evaluate", "sklearn"} & (sys.modules.keys() - theirs)
from hf_rrd.results.pictures import draw_pictures
rows, labels = torch.eye(3), torch.arange(3)
tensors = {f"{whose}_{what}": rows for whose in ("student", "teacher") for what in ("embedding", "logits")}
report = hf_rrd.DistillationReport({"student": {"accuracy": 1.0}, "alignment": {}}, tensors | {"labels": labels})
assert len(draw_pictures(sys.argv[1], [{"loss": 1.0, "step": 1}], report, None)) == 4
assert "matplotlib" in sys.modules and not {"matplotlib.pyplot", "evaluate", "sklearn"} & (sys.modules.keys() - theirs)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert len(list((tmp_path / "figures").iterdir())) == 4


@pytest.mark.parametrize("name", FIGURES)
def test_without_matplotlib_the_error_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_rrd\[plots\]'"):
        FIGURES[name]()
