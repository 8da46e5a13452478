"""The picture of the losses: panels, units, and which line is of what."""

from pathlib import Path
from typing import Any

import pytest

from hf_rrd.results.loss_plot import plot_losses
from hf_rrd.results.style import MARKERS
from tests.builders import Images, trainer
from tests.results.figures import (
    draw,
    legend_of,
    lines_of,
    log,
)


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
